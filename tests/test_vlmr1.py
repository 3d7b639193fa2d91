"""vlmr1.py, chapter two: what is learnt is right, and a stopped series goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlmr1
from boxes import View, box_iou
from rows import load_examples
from vlmr1 import TASKS, run_all, show, true_box

START = Path(__file__).resolve().parent.parent / "tiny_boxes"
SMALL = """model = {start}
data = "world:A:n=8:objects=2-3:ask={ask}"
template = "rec"
rewards = ["{reward}", "format"]
scorer = "{scorer}"
steps = 1
prompts = 2
group = 2
max_new = 8
beta = 0.0
lr = 1e-4
evals = ["A=world:A:n=2:ask={ask}", "B=world:B:n=2:ask={ask}", "C=world:C:n=2:ask={ask}"]
"""


def test_supervised_training_learns_the_true_box_and_no_thought():
    for example in load_examples("world:A:n=30:ask=rec:objects=2-4"):
        text = true_box(example)
        assert text.startswith('<answer>{"bbox_2d": [')
        seen = replace(example, view=View("0-1000", "pixels", ((112, 112, 112, 112),)))
        assert box_iou(text, seen) > 0.9  # thousandths are rounded, and boxes 10 pixels small


@pytest.fixture
def series(tmp_path, monkeypatch):
    """A small series of two tasks, in a folder of its own."""
    small = {}
    for task, reward in (("rec", "iou"), ("detect", "detection")):
        (tmp_path / f"{task}.toml").write_text(SMALL.format(
            start=json.dumps(str(START)), ask=task, reward=reward, scorer=task))
        small[task] = (f"{task}.toml", *TASKS[task][1:])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlmr1, "TASKS", small)
    return vlmr1.Config(seeds=(0,), tasks=("rec", "detect"), out="v.json", picture="v.png")


def test_a_series_goes_on_where_it_was_stopped_and_is_shown(series, monkeypatch):
    started, train = [], vlmr1.train
    monkeypatch.setattr(
        vlmr1, "train", lambda task, name, seed: started.append(name) or train(task, name, seed)
    )
    run_all(series)
    assert started == ["GRPO", "SFT", "GRPO", "GRPO, AP alone"]
    found = json.loads(Path("v.json").read_text())
    del found["results"]["rec"]["SFT"]
    vlmr1.write_json(found, series.out)
    run_all(series)
    assert started[4:] == ["SFT"]
    found = json.loads(Path("v.json").read_text())
    assert show(found).count("\n") == 1 + 2 * 3 + 5 * 3
    assert [row["step"] for row in found["results"]["detect"]["GRPO"]["0"]["curve"]] == [1]
    vlmr1.plot(found, series.picture)
    assert np.asarray(Image.open(series.picture).convert("L")).std() > 5


def test_the_table_has_mean_and_range_of_each_method():
    run = {"before": {}, "after": {}}
    for when, x in (("before", 0.25), ("after", 0.5)):
        run[when] = {name: {"iou": x, "accuracy": x + 0.1} for name in "ABC"}
    other = {"before": run["before"], "after": {n: {"iou": 0.7, "accuracy": 0.9} for n in "ABC"}}
    lines = show({"results": {"rec": {"GRPO": {"0": run, "1": other}}}}).splitlines()
    assert lines[0] == "| task | | | A | B | C |"
    assert lines[2] == "| rec | iou | start | 0.250 | 0.250 | 0.250 |"
    cells = " | ".join(["0.600 (0.500-0.700)"] * 3)
    assert lines[3] == f"| rec | iou | GRPO | {cells} |"
    assert len(lines) == 6


def test_results_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        vlmr1.main(["--plot_only", "--out", str(tmp_path / "none.json")])
