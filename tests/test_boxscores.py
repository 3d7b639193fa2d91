"""boxscores.py, chapter two: a picture's boxes by hand, a set's numbers as pycocotools has them."""

import contextlib
import io
import json
import random

import numpy as np
import pytest

from boxes import View
from boxscores import box_summary, detect, marked, rec
from example import Example
from scorers import further, load_scorer, read_results, rescore, score_row, summary, told


def about(solution, view=None, **extra) -> Example:
    text = solution if isinstance(solution, str) else json.dumps(solution)
    return Example("Where?", text, ("a.png", "b.png"), extra=extra, view=view)


def says(answer) -> str:
    return f"<think> so </think> <answer> {answer} </answer>"


def things(*boxes, label="cube") -> list[dict]:
    return [{"bbox_2d": list(box), "label": label} for box in boxes]


# -------------------------------------------------------------------------------------------- rec


@pytest.mark.parametrize("answer, right, iou, giou", [
    ("[0, 0, 10, 10]", 1, 1, 1),
    ("[0, 0, 10, 20]", 0, 1 / 2, 1 / 2),  # half is not above one half
    ("[0, 0, 10, 19]", 1, 10 / 19, 10 / 19),
    ("[10, 10, 20, 20]", 0, 0, -1 / 2),  # 0 - (400 - 200) / 400
    ('{"bbox_2d": [5, 0, 15, 10], "label": "cube"}', 0, 1 / 3, 1 / 3),
    ("(0,0),(10,10)", 1, 1, 1),
    ("[0, 0, 10, 10] [0, 0, 10, 10]", 0, 0, -1),  # several are no answer
    ("None", 0, 0, -1),
    ("there", 0, 0, -1),
])  # fmt: skip
def test_one_box_is_right_above_half_an_iou(answer, right, iou, giou):
    value, said, more = rec(says(answer), about("[0, 0, 10, 10]"))
    assert (value, more) == (right, {"iou": pytest.approx(iou), "giou": pytest.approx(giou)})
    assert (said is None) == (answer == "there")


def test_boxes_are_compared_in_pixels_of_the_file():
    """A picture of 200 x 100 that the model sees as 56 x 28 and speaks of in thousandths."""
    view = View("0-1000", "pixels", ((100, 200, 28, 56),))
    row = score_row(says("[100, 200, 300, 400]"), about("[20, 20, 60, 40]", view), rec)
    assert row["accuracy"] == row["iou"] == row["giou"] == 1 and row["is_correct"] is True
    assert row["boxes"] == [{"box": [20, 20, 60, 40], "label": "", "score": 1}]
    assert row["boxes"] == row["gold_boxes"] == row["extracted_answer"]
    assert row["view"] == {"frame": "0-1000", "gold": "pixels", "sizes": [[100, 200, 28, 56]]}
    json.dumps(row)


def test_means_over_a_set_count_what_cannot_be_read_as_far_off():
    gold = about("[0, 0, 10, 10]")
    answers = ("[0, 0, 10, 10]", "[10, 10, 20, 20]", "there", "[0, 0, 10, 20]")
    found = summary([score_row(says(a), gold, rec) for a in answers])
    assert found["accuracy"] == found["score"] == 1 / 4 and found["unparsable"] == 1 / 4
    assert found["iou"] == (1 + 0 + 0 + 1 / 2) / 4 and found["giou"] == (1 - 1 / 2 - 1 + 1 / 2) / 4
    assert further(found) == {"iou": 3 / 8, "giou": 0.0} and "Mean IoU 0.375, " in told(found)


# ----------------------------------------------------------------------------------------- detect

TWO = things((0, 0, 10, 10), (20, 0, 30, 10))


@pytest.mark.parametrize("answer, value, matched", [
    (TWO, 1, 2),
    (TWO[:1], 2 / 3, 1),
    (TWO + TWO[:1], 4 / 5, 2),  # said twice: one too many
    (things((0, 0, 10, 20), (20, 0, 30, 10), label="CUBE"), 1, 2),  # an IoU of half finds a box
    (things((0, 0, 10, 21), (20, 0, 30, 10)), 1 / 2, 1),
    (things((0, 0, 10, 10), (20, 0, 30, 10), label="ball"), 0, 0),
    ([], 0, 0),
    ("there", 0, 0),
])  # fmt: skip
def test_a_picture_is_right_where_all_is_found_and_nothing_else(answer, value, matched):
    text = says(answer if isinstance(answer, str) else json.dumps(answer))
    found, said, more = detect(text, about(TWO))
    assert (found, more) == (pytest.approx(value), {"matched": matched})
    assert (said is None) == (answer == "there") and (found == 1) == (value == 1)


def test_nothing_said_of_nothing_is_right():
    assert detect(says("None"), about("None")) == (1.0, [], {"matched": 0})
    assert detect(says(json.dumps(TWO)), about("None"))[0] == 0.0


def test_the_best_pair_is_matched_first():
    """VLM-R1's greedy match: the first box said would take the true one that the second fits."""
    said = things((0, 1, 10, 11), (0, 0, 10, 10))
    for item, sure in zip(said, (0.9, 0.1)):
        item["confidence"] = sure
    gold = things((0, 0, 10, 10), (0, 4, 10, 14))
    assert detect(says(json.dumps(said)), about(gold))[2] == {"matched": 2}


def test_a_set_by_hand():
    """Found are 1 of 2, 1 of 1 (and two boxes too many), none of 0 where one was said."""
    rows = [score_row(says(json.dumps(said)), about(gold if gold else "None"), detect)
            for said, gold in ((TWO[:1], TWO), (TWO + TWO[:1], TWO[:1]), (TWO[:1], []))]
    found = summary(rows)
    assert (found["precision"], found["recall"]) == (2 / 5, 2 / 3)
    assert found["accuracy"] == 0 and found["score"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    none = summary([score_row(says("None"), about("None"), detect)])
    assert (none["precision"], none["recall"], none["ap"]) == (None, None, None)
    assert none["accuracy"] == 1 and further(none) == {}


def coco(images) -> tuple[float, float]:
    """(AP, AP50) of pycocotools over [(said, true), ...] of {"box", "label", "score"}."""
    data = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    labels = sorted({b["label"] for both in images for boxes in both for b in boxes})

    def rows(which):
        return [{"id": 1, "image_id": i, "category_id": labels.index(b["label"]), "iscrowd": 0,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
                 **({"score": b["score"]} if which == 0 else {})}
                for i, both in enumerate(images) for b in both[which]
                for x1, y1, x2, y2 in [b["box"]]]  # fmt: skip

    true = data.COCO()
    true.dataset = {"images": [{"id": i} for i in range(len(images))], "info": {},
                    "categories": [{"id": i, "name": name} for i, name in enumerate(labels)],
                    "annotations": [{**row, "id": n} for n, row in enumerate(rows(1), 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        true.createIndex()
        judged = evaluation.COCOeval(true, true.loadRes(rows(0)), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return float(judged.stats[0]), float(judged.stats[1])


@pytest.mark.parametrize("sure", [True, False])
def test_a_set_has_the_ap_of_pycocotools(sure):
    """30 pictures, three labels; boxes moved, left out, made up; labels mixed up; with a confidence
    or none, where equals stand in the order of the set. Some pictures have nothing."""
    rng = random.Random(sure)
    rows = []
    for _ in range(30):
        true, said = [], []
        for _ in range(rng.randrange(6)):
            x, y, w, h = (rng.randrange(5, 60) for _ in range(4))
            label = rng.choice(["cube", "ball", "cone"])
            true += things((x, y, x + w, y + h), label=label)
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                a, b, c, d = (v + rng.randrange(-4, 5) for v in (x, y, x + w, y + h))
                wrong = rng.random() < 0.1
                said += things((max(a, 0), max(b, 0), max(c, 8), max(d, 8)),
                               label="ball" if wrong else label)
        if sure:
            said = [{**item, "confidence": rng.randrange(100) / 100} for item in said]
        rows.append(score_row(says(json.dumps(said) if said else "None"),
                              about(true if true else "None"), detect))
    found = box_summary(rows)
    images = [(row.get("boxes") or [], row.get("gold_boxes") or []) for row in rows]
    assert (found["ap"], found["ap50"]) == pytest.approx(coco(images), abs=1e-12)
    assert 0.1 < found["ap"] < found["ap50"] < 0.9
    assert box_summary(json.loads(json.dumps(rows))) == found


def test_where_no_true_box_has_a_label_none_counts():
    bare = [[0, 0, 10, 10], [20, 0, 30, 10]]
    rows = [score_row(says(json.dumps(TWO)), about(gold), detect) for gold in (bare, "None")]
    assert rows[0]["accuracy"] == 1 and rows[0]["boxes"][0]["label"] == "cube"
    found = summary(rows)
    assert found["ap50"] == 1 and found["precision"] == 1 / 2


# ------------------------------------------------------------------------------ in a run's files


def test_a_question_about_no_boxes_leaves_no_trace():
    for solution in ("3", "none", "A"):
        assert marked(["3", says("no box")], about(solution)) == ({}, [{}, {}])
    asked, said = marked([says("[1, 2, 3, 4]"), "?"], about("None", box_image=1))
    assert asked == {"gold_boxes": [], "box_image": 1}
    assert said == [{"boxes": [{"box": [1, 2, 3, 4], "label": "", "score": 1}]}, {"boxes": None}]


def test_saved_results_are_scored_anew_in_their_frames(tmp_path):
    """The second of two pictures is meant, 100 x 50 and seen as 56 x 28."""
    view = View("resized", "0-1000", ((9, 9, 28, 28), (50, 100, 28, 56)))
    example = about("[500, 500, 1000, 1000]", view, box_image=1)
    row = score_row(says("[28, 14, 56, 28]"), example, load_scorer("accuracy"))
    assert row["accuracy"] == 0 and row["boxes"][0]["box"] == [50, 25, 100, 50]
    row["question"] = {"problem": "Where?", "box_image": 1}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": [row]}))
    ((again, _, _),) = read_results(str(path))
    assert again.view == view and again.extra["box_image"] == 1
    found = rescore(str(path), load_scorer("rec"))
    assert (found["accuracy"], found["iou"], found["results"][0]["iou"]) == (1, 1, 1)
    path.write_text(json.dumps(found))
    other = rescore(str(path), load_scorer("detect"))
    assert other["ap"] == other["precision"] == 1 and "iou" not in other
    assert "iou" not in other["results"][0]


def test_none_in_the_second_picture_is_scored_anew(tmp_path):
    """Nothing is there and nothing is said, so the row holds no view, and no number of pictures."""
    view = View("resized", "pixels", ((9, 9, 28, 28), (50, 100, 28, 56)))
    row = score_row(says("None"), about("None", view, box_image=1), rec)
    row["question"] = {"problem": "Where?", "box_image": 1}
    (tmp_path / "results.json").write_text(json.dumps({"results": [row]}))
    assert rescore(tmp_path / "results.json", rec)["results"] == [row]


@pytest.mark.parametrize("view", [[1], "x", {"sizes": 3}, {"size": []}])
def test_a_view_that_is_none_is_refused(view, tmp_path):
    path = tmp_path / "results.json"
    row = {"model_output": "x", "ground_truth": "3", "view": view}
    path.write_text(json.dumps({"results": [row]}))
    with pytest.raises(ValueError, match=r"results.json: result 1: a view or a question"):
        read_results(str(path))


def test_any_reward_is_a_scorer_with_its_arguments():
    gold, half = about("[0, 0, 10, 10]"), says("[0, 0, 10, 20]")
    for name, value in (("iou", 1 / 2), ("iou(least=0.5)", 1), ("giou", 3 / 4)):
        row = score_row(half, gold, load_scorer(name))
        assert row["accuracy"] == pytest.approx(value), name
        found = summary([row, score_row("?", gold, load_scorer(name))])
        assert found["score"] == pytest.approx(value / 2)
        assert found["accuracy"] == (value == 1) / 2
    assert np.isclose(further(found)["score"], 3 / 8) and "Score 0.375, " in told(found)
