"""Boxes: coordinate frames, what a text says of boxes, and how well they fit the true ones.

    said, gold = said_boxes(text, example), gold_boxes(example)     # in pixels of the file
    average_precision([(said, gold), ...], AP)                      # COCO's, over many pictures

A box is (x1, y1, x2, y2): left, top, right and lower edge. Qwen2-VL speaks of boxes in thousandths
of the picture (0-1000), Qwen2.5-VL in pixels of the resized picture that it sees; data sets give
them in pixels of the file, or in thousandths. So every box has a frame, and what is compared is
brought to pixels of the file first. An area is width times height, nothing is inclusive: VLM-R1
adds a pixel in one place and not in the other, and gives 0 to two equal boxes one pixel wide.

Below are the rewards of boxes, in [0, 1] and never raising, for the one answer that a text commits
to. One that cannot be read as boxes has 0. No object: 1 where neither gold nor answer has one, 0
where one of the two has. What is no box (NaN, infinite, negative, beyond a million, x2 <= x1, a
confidence outside [0, 1]) lies nowhere: it is wrong, and it counts. Labels are compared but for
case; one that no gold has is wrong, where VLM-R1 drops it. A gold without labels asks for none.
"""

import contextlib
import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from rewards import final_answer, format, gold_answer, plain

# pixels: of the file. resized: of the picture that the model sees. 0-1000: thousandths of it.
FRAMES = ("pixels", "resized", "0-1000")
NOWHERE = (0.0, 0.0, 0.0, 0.0)
NOTHING = ("none", "no objects", "no object", "null")  # no boxes, in words
KEYS = ((("bbox_2d", "bbox", "box", "position"), None), (("label", "category"), ""),
        (("confidence", "score"), 1.0))  # fmt: skip
MOST = 300  # boxes of an answer; one that says more says nothing
FARTHEST = 1e6  # of a coordinate
AP = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.8999999999999999, 0.95)  # of IoU, COCO's
RECALLS = [i * 0.01 for i in range(101)]  # and the points of its curve, rounded as they are there
DETECTIONS = 100  # of a label in a picture, those of the highest confidence: COCO's maxDets
N = r"(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)"
PLACES = re.compile(  # [x1, y1, x2, y2] and (x1,y1),(x2,y2); possessive, so linear
    rf"\[\s*+{N}\s*+,\s*+{N}\s*+,\s*+{N}\s*+,\s*+{N}\s*+\]"
    rf"|\(\s*+{N}\s*+,\s*+{N}\s*+\)\s*+,?\s*+\(\s*+{N}\s*+,\s*+{N}\s*+\)"
)


class Box(NamedTuple):
    """What was said of an object, or is true of it. box: in pixels of the file where the frames are
    known; score: the confidence in [0, 1], 1 where none was said."""

    box: tuple[float, float, float, float]
    label: str = ""
    score: float = 1.0


@dataclass(frozen=True)
class View:
    """How an example's boxes are to be read: set by data.Processor.prompt."""

    frame: str = "pixels"  # that the model speaks, and is asked for
    gold: str = "pixels"  # of the solution
    sizes: tuple[tuple[int, int, int, int], ...] = ()  # (height, width, resized height and width)


def convert(box, source: str, target: str, size) -> tuple[float, ...]:
    """A box from frame `source` to frame `target` in a picture of `size`: (height, width, resized
    height, resized width) in pixels. Nothing is rounded, so there and back is the same."""
    (h, w, rh, rw), scale = size, {}
    scale["pixels"], scale["resized"], scale["0-1000"] = (w, h), (rw, rh), (1000, 1000)
    (x, y), (u, v) = scale[source], scale[target]
    return box[0] * u / x, box[1] * v / y, box[2] * u / x, box[3] * v / y


# ---- what a text says ----


def said_boxes(text: str, example) -> list[Box] | None:
    """The boxes that text commits to, in pixels of the file; [] says that there are none, None
    that this cannot be read."""
    answer = final_answer(text)
    return None if answer is None else placed(read_boxes(answer), example, "frame")


def gold_boxes(example) -> list[Box] | None:
    """The true ones. None if the solution says no boxes, or one that has no area."""
    found = read_boxes(gold_answer(example.solution))
    if found is None or any(box == NOWHERE for box, _, _ in found):
        return None
    return placed(found, example, "gold")


def placed(found: list[Box] | None, example, which: str) -> list[Box] | None:
    """Boxes in pixels of the file, from the frame that view.<which> names; None where there is no
    picture. They lie in the first, or in the one that the row's column box_image counts, from 0."""
    view = getattr(example, "view", None)
    source = getattr(view, which, "pixels")
    if not found or source == "pixels":
        return found
    if not view.sizes:
        return None
    size = view.sizes[example.extra.get("box_image") or 0]
    return [box._replace(box=convert(box.box, source, "pixels", size)) for box in found]


def respoken(text: str, example) -> str:
    """A text in the frame of the gold, all its [x1, y1, x2, y2] and (x1,y1),(x2,y2) in the frame
    that the model speaks, in whole numbers: what it is to learn to say."""
    view = example.view
    if view is None or view.frame == view.gold or not view.sizes:
        return text
    size = view.sizes[example.extra.get("box_image") or 0]

    def in_frame(found):
        numbers = [float(n) for n in found.groups() if n is not None]
        a, b, c, d = (round(n) for n in convert(numbers, view.gold, view.frame, size))
        c, d = max(c, a + 1), max(d, b + 1)  # no box without area
        return f"[{a}, {b}, {c}, {d}]" if found[0][0] == "[" else f"({a},{b}),({c},{d})"

    return PLACES.sub(in_frame, text)


def read_boxes(text: str) -> list[Box] | None:
    """The boxes of an answer in its own frame, or None. Read are JSON (read_json), or else every
    [x1, y1, x2, y2] and (x1,y1),(x2,y2) in the text, which then has no labels."""
    found = read_json(text)
    if found is None:
        found = [valid([float(n) for n in place if n]) for place in PLACES.findall(text)] or None
    return None if found is None or len(found) > MOST else found


def read_json(text: str) -> list[Box] | None:
    """The boxes of a JSON object, of a list of them, of [x1, y1, x2, y2] or a list of these, in a
    ```json fence or not; of a word for none. As in Visual-RFT single quotes are taken for double
    ones where it is no JSON without, and a list that breaks off is read up to its last object."""
    text = text.strip()
    if 0 < text.count("```") < 3:
        text = text.partition("```")[2].removeprefix("json").partition("```")[0].strip()
    if text.casefold().removesuffix(".") in NOTHING:
        return []
    quoted, found = text.replace("'", '"'), None
    cut = quoted[: quoted.rfind("}") + 1] + "]" if text.startswith("[") else quoted
    for words in (text, quoted, cut):
        # Else it is no JSON, or has a number of 5,000 digits, or 1,000 brackets.
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(words)
            break
    if not found or not isinstance(found, list | dict):
        return [] if found in ([], {}) else None
    one = isinstance(found, dict) or not isinstance(found[0], list | dict)
    return [to_box(item) for item in ([found] if one else found)]


def to_box(item) -> Box:
    """A Box of what JSON says of one: {"bbox_2d": four numbers, "label": ..., "confidence": ...},
    with the names that the field has for these, or four numbers."""
    if not isinstance(item, dict):
        return valid(item)
    named = {key.casefold(): value for key, value in item.items()}
    box, label, score = (next((named[key] for key in keys if key in named), missing)
                         for keys, missing in KEYS)  # fmt: skip
    return valid(box, plain(str(label)) if isinstance(label, str | int) else "", score)


def valid(box, label: str = "", score=1.0) -> Box:
    """A Box, which lies NOWHERE if box is not four numbers with x1 < x2 and y1 < y2, or if score is
    no confidence."""
    good = isinstance(box, list) and len(box) == 4 and type(score) in (int, float)
    good = good and all(type(n) in (int, float) and 0 <= n <= FARTHEST for n in box)
    if good and box[0] < box[2] and box[1] < box[3] and 0 <= score <= 1:
        return Box(tuple(map(float, box)), label, float(score))
    return Box(NOWHERE, label)


# ---- how well boxes fit ----


def iou(a, b) -> float:
    """Area of the intersection over area of the union of two boxes, in [0, 1]."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def giou(a, b) -> float:
    """IoU - 1 + union / area of the smallest box around both, in (-1, 1] (Rezatofighi 2019)."""
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    areas, share = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]), iou(a, b)
    return share - 1 + areas / (1 + share) / around  # union: areas - both, both = share * union


def match(said, gold, least: float = 0.5, best: bool = False) -> list[tuple[int, int, float]]:
    """Pairs (place in said, place in gold, IoU) of one label and an IoU of at least `least`, no box
    in two of them. As COCO does: by falling confidence, equals in their order, each takes the free
    true box that it fits best, the last of equals. best: the pair of highest IoU first, instead."""
    return take(touching(said, gold, best), least)


def touching(said, gold, best: bool = False) -> list[tuple[int, int, float]]:
    """All pairs of one label and an IoU above 0, in the order in which they are to be had."""
    pairs = [(i, j, iou(s.box, g.box)) for i, s in enumerate(said) for j, g in enumerate(gold)
             if s.label == g.label]  # fmt: skip
    order = (lambda p: -p[2]) if best else (lambda p: (-said[p[0]].score, p[0], -p[2], -p[1]))
    return sorted((pair for pair in pairs if pair[2] > 0), key=order)


def take(pairs, least: float) -> list[tuple[int, int, float]]:
    """Of pairs in their order those that can be had, of an IoU of at least `least`."""
    found, used_said, used_gold = [], set(), set()
    for i, j, fit in pairs:
        if fit >= min(least, 1 - 1e-10) and i not in used_said and j not in used_gold:
            found.append((i, j, fit))
            used_said.add(i)
            used_gold.add(j)
    return found


def average_precision(images, thresholds=AP) -> float | None:
    """COCO's AP over [(said, gold), ...], one pair of lists of Box per picture: the mean over the
    labels of the gold and the thresholds of IoU of the mean over 101 recalls of the precision at
    that recall or more. Equal to pycocotools with its maxDets of 100 a label and picture, all
    areas. In [0, 1]; None where no picture has a true box. Labels that no gold has are not seen."""
    found = []
    for label in sorted({box.label for _, gold in images for box in gold}):
        mine = [([b for b in said if b.label == label], [b for b in gold if b.label == label])
                for said, gold in images]  # fmt: skip
        mine = [(sorted(said, key=lambda b: -b.score)[:DETECTIONS], gold) for said, gold in mine]
        pairs = [touching(said, gold) for said, gold in mine]
        found += [precision(mine, pairs, threshold) for threshold in thresholds]
    return sum(found) / len(found) if found else None


def precision(images, pairs, threshold: float) -> float:
    """AP of one label that some gold has, at one threshold."""
    ranked = []  # (confidence, whether it is true)
    for (said, _), touch in zip(images, pairs):
        right = {i for i, _, _ in take(touch, threshold)}
        ranked += [(box.score, i in right) for i, box in enumerate(said)]
    ranked.sort(key=lambda one: -one[0])
    hits = [rank for rank, (_, right) in enumerate(ranked, 1) if right]
    n, most, total = sum(len(gold) for _, gold in images), 0.0, 0.0
    for k in range(len(hits), 0, -1):  # the highest precision at this recall or more
        most = max(most, k / hits[k - 1])
        below = (k - 1) / n if k > 1 else -1.0  # recall 0 is a point, too
        total += most * (bisect_right(RECALLS, k / n) - bisect_right(RECALLS, below)) / len(RECALLS)
    return total


# ---- rewards ----


def compared(text, example) -> tuple[list[Box], list[Box]] | None:
    """(said, gold), or None if one of the two cannot be read. Without labels in the gold, without
    in what was said."""
    said, gold = said_boxes(text, example), gold_boxes(example)
    if said is None or gold is None:
        return None
    if not any(box.label for box in gold):
        said = [box._replace(label="") for box in said]
    return said, gold


def box_iou(text, example, least=0.0):
    """`iou`, for one box: the IoU of the box said with the true one, as VLM-R1's REC; with `least`,
    1 where it is at least that, else 0. Labels do not count. Several boxes are no answer, where
    VLM-R1 takes the first; nor does ours ask for whole numbers."""
    return one_box(text, example, lambda a, b: float(iou(a, b) >= least) if least else iou(a, b))


def box_giou(text, example):
    """`giou`, for one box: (GIoU + 1) / 2, half of Visual-RFT's reward for grounding, so that its
    range is that of the others (a weight of 2 gives its own). Boxes apart are told from boxes far
    apart, where IoU is 0 for both."""
    return one_box(text, example, lambda a, b: (giou(a, b) + 1) / 2)


def one_box(text, example, fit):
    """fit(box said, true box) where there is one of each, else whether there is none of either."""

    def score(said, gold):
        one = len(said) == len(gold) == 1 and said[0].box != NOWHERE
        return one and fit(said[0].box, gold[0].box)

    return boxes_fit(text, example, score)


def boxes_fit(text, example, score):
    """score(said, gold) where both have boxes, else whether neither has."""
    found = compared(text, example)
    return float(score(*found) if found and all(found) else found == ([], []))


def detection(text, example, ap=0.0, penalty=1.0):
    """AP x min(1, number of true boxes / number said) ** penalty. ap: the threshold of IoU of AP,
    0 for COCO's ten (VLM-R1's map), .5 for its od_ap50; penalty 1 is VLM-R1's odLength, 0 its
    od_ap, where boxes said after the right ones cost nothing, and so are said. The mean over
    labels goes over those said too, at an AP of 0."""

    def score(said, gold):
        labels = {box.label for box in gold}
        share = len(labels) / len(labels.union(box.label for box in said))
        found = average_precision([(said, gold)], (ap,) if ap else AP)
        return found * share * min(1.0, len(gold) / len(said)) ** penalty

    return boxes_fit(text, example, score)


def weighted(text, example, iou=0.7):
    """VLM-R1's weighted_sum: iou x (sum of IoU / number of true boxes) + (1 - iou) x completeness,
    which is 1 - (share of true boxes missed + share of said boxes that are false) / 2; pairs of an
    IoU of at least .5, the best first. To VLM-R1 a box of a wrong label is found, with IoU 0; to us
    it is false, and takes no true box from a right one. All false boxes together cost .15."""

    def score(said, gold):
        pairs = match(said, gold, best=True)
        complete = (len(pairs) / len(gold) + len(pairs) / len(said)) / 2
        return iou * sum(fit for _, _, fit in pairs) / len(gold) + (1 - iou) * complete

    return boxes_fit(text, example, score)


def mean_iou(text, example, least=0.5):
    """Visual-RFT's IoU reward: the sum of the IoU of pairs (`match`) / the larger of the numbers of
    boxes, said and true. It drops repeated boxes first; here they count, as any that is false."""

    def score(said, gold):
        return sum(fit for _, _, fit in match(said, gold, least)) / max(len(said), len(gold))

    return boxes_fit(text, example, score)


def confidence(text, example, least=0.5):
    """Visual-RFT's confidence reward: the mean over the boxes said of their confidence where they
    are true (`match`), of 1 - confidence where not. Of boxes none of which is true it is 0: there
    junk said with confidence 0 has 1."""

    def score(said, gold):
        right = {i for i, _, _ in match(said, gold, least)}
        sure = [b.score if i in right else 1 - b.score for i, b in enumerate(said)]
        return sum(sure) / len(sure) if right else 0.0

    return boxes_fit(text, example, score)


def box_format(text, example):
    """VLM-R1's format of REC: 1 for the thought and the answer of `format`, the answer in JSON
    that read_json reads, each box of it valid; a word for no object too. Else 0. VLM-R1's pattern
    wants one object, anywhere in the answer, and takes seconds for 2,000 characters."""
    found = read_json(final_answer(text) or "") if format(text, example) else None
    return float(found is not None and all(box.box != NOWHERE for box in found))
