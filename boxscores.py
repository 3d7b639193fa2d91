"""Box scores: what an evaluation says of boxes, in an answer and over a whole set.

    rec       right if the box said has an IoU above .5 with the true one: VLM-R1's accuracy
              (src/eval/test_rec_r1.py); beside it the mean IoU and GIoU
    detect    right if every object is found, under its name, and nothing else; beside it, over the
              set, AP@[.5:.95] and AP@.5, pycocotools' numbers, and VLM-R1's greedy precision and
              recall (src/eval/test_od_r1.py): boxes matched at IoU .5, the best first

An answer that cannot be read says no box: IoU 0, GIoU -1, nothing found. Several boxes are no
answer to `rec`, see boxes.box_iou. What is said and what is true stands in the rows in pixels of
the picture's file, so that a set is summed up from rows alone.
"""

from boxes import (
    NOWHERE,
    Box,
    average_precision,
    compared,
    giou,
    gold_boxes,
    iou,
    match,
    said_boxes,
)
from example import Example

FOUND = 0.5  # IoU at which a box is found


def rec(text: str, example: Example):
    """1 if the IoU is above .5, else 0; the box said; {"iou", "giou"}."""
    said, true = said_boxes(text, example), gold_boxes(example)
    fit = {"iou": 0.0, "giou": -1.0}
    if said == true == []:  # that there is none is right, too
        fit = {"iou": 1.0, "giou": 1.0}
    elif said and true and len(said) == len(true) == 1 and said[0].box != NOWHERE:
        fit = {"iou": iou(said[0].box, true[0].box), "giou": giou(said[0].box, true[0].box)}
    return float(fit["iou"] > FOUND), in_files(said), fit


def detect(text: str, example: Example):
    """F1 of the picture: 1 where all is found and nothing else, nothing said of nothing too; the
    boxes said; {"matched": pairs}."""
    found = compared(text, example)
    if found is None:
        return 0.0, None, {"matched": 0}
    matched, both = len(match(*found, FOUND, best=True)), sum(map(len, found))
    value = 2 * matched / both if both else 1.0
    return value, in_files(said_boxes(text, example)), {"matched": matched}


def in_files(boxes: list[Box] | None) -> list[dict] | None:
    """Boxes as a run's files have them."""
    return None if boxes is None else [{"box": [*b.box], "label": b.label, "score": b.score}
                                       for b in boxes]  # fmt: skip


def marked(texts: list[str], example: Example) -> tuple[dict, list[dict]]:
    """What files of a run hold of a question about boxes: ({"gold_boxes", "view"}, and "box_image"
    if it is not the first; {"boxes"}, None for unreadable ones, of each text). All empty where the
    gold answer is none, or there is none and nobody says any."""
    true, view = gold_boxes(example), example.view
    said = [None if true is None else said_boxes(text, example) for text in texts]
    if not true and not any(said):
        return {}, [{} for _ in texts]
    found = {"gold_boxes": in_files(true)}
    if view is not None:
        found["view"] = {**vars(view), "sizes": [[*size] for size in view.sizes]}
    if example.extra.get("box_image"):
        found["box_image"] = example.extra["box_image"]
    return found, [{"boxes": in_files(boxes)} for boxes in said]


def box_summary(results: list[dict]) -> dict:
    """The further numbers over scored rows, of `rec` or `detect`; {} for any other scorer's."""
    if all("iou" in row for row in results):
        return {key: sum(row[key] for row in results) / len(results) for key in ("iou", "giou")}
    if not all("matched" in row for row in results):
        return {}
    images = [tuple([Box(tuple(b["box"]), b["label"], b["score"]) for b in row.get(key) or []]
                    for key in ("boxes", "gold_boxes")) for row in results]  # fmt: skip
    if not any(box.label for _, true in images for box in true):  # then none was asked for
        images = [([box._replace(label="") for box in said], true) for said, true in images]
    said, true = (sum(len(image[i]) for image in images) for i in (0, 1))
    matched = sum(row["matched"] for row in results)
    return {
        "ap": average_precision(images),
        "ap50": average_precision(images, (FOUND,)),
        "precision": matched / said if said else None,
        "recall": matched / true if true else None,
    }
