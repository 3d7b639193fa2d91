"""Chapter two of overlay.py: a picture stands on the page once, and boxes where they belong."""

import base64
import json
import math
import re

import pytest
from PIL import Image
from test_report import EVIL, Page

import overlay
import report


def shape(tags: list, name: str, kind: str) -> list[dict]:
    """Attributes of the tags of a name and class."""
    return [attrs for tag, attrs in tags if tag == name and attrs.get("class") == kind]


def test_a_small_picture_is_inlined_and_enlarged_by_a_whole_number(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    ((_, img),) = Page(overlay.inlined(overlay.load(tmp_path, "a.png"), EVIL)).tags
    assert (img["alt"], img["width"], img["height"], img["class"]) == (EVIL, "200", "100", "pixels")
    kind, code = img["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(code) == (tmp_path / "a.png").read_bytes()


def test_a_picture_outside_the_run_is_not_read(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png"):
        assert overlay.load(run, name) is None
    Image.new("RGB", (8, 8)).save(run / "own.png")
    assert overlay.load(run, "sub/../own.png").size == (8, 8)


def test_a_picture_that_is_missing_too_large_or_none_leaves_a_note(tmp_path, monkeypatch):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "text.png").write_text("<svg onload=alert(1)>")
    Image.new("RGB", (8, 8)).save(tmp_path / "large.png")
    monkeypatch.setattr(overlay, "PICTURE", 10)
    for name in ("gone.png", "loop.png", "text.png", "large.png", "", "a\0b", "\ud800", 7, EVIL):
        row = {"images": [name], "gold_boxes": [], "problem": "q"}
        text = report.pictures(tmp_path, row)
        assert f"No picture: {report.esc(name)} is" in text and "<img" not in text
        assert report.pointed(tmp_path, row, {"boxes": [{"box": [1, 2, 3, 4]}]}) == ""


def test_a_picture_of_another_kind_has_no_size_and_no_boxes(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.jpg")
    picture = overlay.load(tmp_path, "a.jpg")
    assert (picture.kind, picture.size) == ("jpeg", None)
    row = {"images": ["a.jpg"], "gold_boxes": [{"box": [1, 2, 3, 4]}]}
    text = report.pictures(tmp_path, row)
    assert "<img" in text and "<rect" not in text
    assert report.pointed(tmp_path, row, {"boxes": [{"box": [1, 2, 3, 4]}]}) == ""


@pytest.fixture
def run(tmp_path):
    """A folder with two pictures of 100 x 50, and a question about the second, with two answers."""
    for name in "ab":
        Image.new("RGB", (100, 50)).save(tmp_path / f"{name}.png")
    true = [{"box": [10, 5, 30.25, 25.0], "label": "cube"}, {"box": [60, 5, 99, 45], "label": EVIL}]
    said = [{"box": [12, 5, 32, 25], "label": "cube", "score": 0.75}, {"box": [0, 0, 9e9, 9e9]}]
    row = {"problem": "Which?", "images": ["a.png", "b.png"], "gold_boxes": true, "box_image": 1}
    return tmp_path, row, {"boxes": said}


def test_true_boxes_lie_on_their_picture_and_the_others_stay_pictures(run):
    folder, row, _ = run
    page = Page(report.pictures(folder, row))
    assert [tag for tag, _ in page.tags if tag in ("img", "svg")] == ["img", "svg"]
    (svg,) = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert svg["viewbox"] == "0 0 100 50" and (svg["width"], svg["height"]) == ("200", "100")
    assert svg["aria-label"] == "Picture for: Which?"
    first, second = shape(page.tags, "rect", "true")
    assert first == {"class": "true", "x": "10.0", "y": "5.0", "width": "20.2", "height": "20.0"}
    assert second["x"] == "60.0"
    assert shape(page.tags, "rect", "said") == [] and len(shape(page.tags, "rect", "rim")) == 2
    assert page.words == ["true: cube at 10, 5, 30.2, 25", "cube", f"true: {EVIL} at 60, 5, 99, 45",
                          EVIL[:40], "true", " ", "predicted"]  # fmt: skip


def test_an_answer_s_boxes_are_drawn_on_the_picture_that_is_there_already(run):
    folder, row, answer = run
    whole, text = report.pictures(folder, row), report.pointed(folder, row, answer)
    tags = Page(text).tags
    name = re.search('<image id="(.*?)"', whole)[1]
    assert [attrs["href"] for tag, attrs in tags if tag == "use"] == [f"#{name}"]
    assert "data:" not in text and len(shape(tags, "rect", "true")) == 2
    first, far = shape(tags, "rect", "said")
    assert (first["x"], first["width"]) == ("12.0", "20.0")
    assert (far["width"], far["height"]) == ("1000.0", "500.0")  # brought nearer
    assert "<title>predicted: cube 0.75 at 12, 5, 32, 25</title>" in text
    assert report.pointed(folder, row, {"boxes": []}) == ""
    assert report.pointed(folder, row, {"boxes": None}) == report.pointed(folder, row, {}) == ""
    assert report.pointed(folder, {**row, "box_image": 2}, answer) == ""


def test_boxes_said_of_nothing_at_a_later_step_find_their_picture(run):
    """Where nothing is there and nothing is said, a probe's row says nothing of boxes."""
    folder, row, answer = run
    first = {key: row[key] for key in ("problem", "images")}
    steps = [first | {"text": "None"}, first | {"gold_boxes": [], "text": "x"} | answer]
    steps[1]["box_image"] = 1
    text = report.probes(folder, [{"step": n, "answers": [a]} for n, a in enumerate(steps)])
    (name,) = re.findall('<use href="#(.*?)"', text)
    assert f'<image id="{name}"' in text and text.count("<li>") == 2


def test_a_page_with_boxes_refers_to_nothing_outside_itself(run):
    """What is shown again is on the page before, once."""
    folder, row, answer = run
    (folder / "config.json").write_text("{}")
    group = {"step": 1, **row, "completions": [{"text": "x", **answer}] * 3}
    (folder / "rollouts.jsonl").write_text(json.dumps(group) + "\n")
    tags = Page(report.page(folder)).tags
    links = [attrs["href"] for tag, attrs in tags if tag in ("image", "use")]
    names = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(names) == 1 and links[1:] == [f"#{names[0]}"] * 3
    assert links[0].startswith("data:image/png;base64,")
    assert {tag for tag, _ in tags}.isdisjoint(("script", "iframe", "object"))


def test_a_label_that_all_true_boxes_have_hides_nothing(run):
    folder, row, _ = run
    row["gold_boxes"] = [{"box": [1, 1, 9, 9], "label": "cube"}] * 2
    said = [{"box": [1, 1, 9, 9], "label": word, "score": 0.5} for word in ("cube", "ball")]
    text = report.pointed(folder, row, {"boxes": said})
    assert re.findall("<text .*?>(.*?)<", text) == ["0.5", "ball 0.5"]


@pytest.mark.parametrize("box", [
    None, 3, {}, {"box": None}, {"box": [1, 2, 3]}, {"box": [1, 2, "3", 4]},
    {"box": [1, 2, math.nan, 4]}, {"box": [5, 5, 5, 9]}, {"box": [0, 0, 0, 0], "label": "x"},
    {"box": [9, 1, 3, 4]},
])  # fmt: skip
def test_what_is_no_box_is_not_drawn(box):
    assert overlay.drawn("said", [box], (100, 50), 8.0) == ""


def test_no_more_boxes_are_drawn_than_can_be_seen():
    text = overlay.drawn("said", [{"box": [1, 1, 2, 2]}] * 500, (100, 50), 8.0)
    assert text.count('<rect class="said"') == overlay.BOXES


def test_labels_stay_inside_the_picture():
    """Above a box there is no room at the top, below one none at the bottom; one that begins in the
    right half ends where its box does."""
    boxes = [{"box": [0, 0, 20, 50], "label": "a"}, {"box": [60, 40, 120, 50], "label": "b"}]
    for kind, first, second in (("true", 8.0, 38.0), ("said", 48.0, 48.0)):
        found = Page(overlay.drawn(kind, boxes, (100, 50), 8.0)).tags
        places = [(a["x"], a["y"], a["text-anchor"]) for tag, a in found if tag == "text"]
        assert places == [("0.0", f"{first}", "start"), ("100.0", f"{second}", "end")]
