"""paper.py, chapter two: what each method learns from is right, and a stopped series goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import paper
from data import Processor
from model import Qwen2VL
from paper import METHODS, cell, right_answer, run_all, show, thought
from rewards import accuracy, format
from rows import load_examples

TINY = Path(__file__).resolve().parent.parent / "tiny"
SMALL = """model = "tiny"
data = "world:A:n=24:objects=3-4"
steps = 2
prompts = 4
group = 2
max_new = 8
beta = 0.0
lr = 1e-4
micro_prompts = 4
"""


def test_what_is_taught_is_right_and_in_format():
    for example in load_examples("world:A:n=40:ask=count+attribute"):
        assert accuracy(right_answer(example), example) == 1
        assert accuracy(thought(example), example) == format(thought(example), example) == 1


def test_a_thought_lists_the_objects_that_are_asked_for_from_left_to_right():
    (example,) = load_examples("world:A:n=1:objects=4-4")
    objects = sorted(example.extra["scene"]["objects"], key=lambda o: o["pixel_coords"][0])
    items = ", ".join(f"{i} {o['color']} {o['shape']}" for i, o in enumerate(objects, 1))
    assert thought(example) == f"<think> {items}</think> <answer>4</answer>"
    asked = [e for e in load_examples("world:A:n=60:ask=attribute") if e.solution == "0"]
    assert thought(asked[0]) == "<think> none</think> <answer>0</answer>"


def test_thoughts_fit_the_tokens_that_an_answer_may_have():
    processor = Processor.from_pretrained("tiny")
    taught = [thought(example) for example in load_examples("world:A:n=200:objects=8-10")]
    assert max(len(processor.encode(text)) for text in taught) < paper.Config().max_new


@pytest.fixture
def series(tmp_path, monkeypatch):
    """A small series, in a folder of its own."""
    (tmp_path / "small.toml").write_text(SMALL.replace('"tiny"', json.dumps(str(TINY))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "EVALS", ("A=world:A:n=4", "B=world:B:n=4"))
    monkeypatch.setattr(paper, "FEW", "world:A:n=4:objects=3-4:seed={}")
    return paper.Config(recipe="small.toml", seeds=1, max_new=8, out="p.json", picture="p.png")


def test_a_series_goes_on_where_it_was_stopped(series, monkeypatch):
    """What is in the file is not run again; what is not, is; the file is the whole in the end."""
    started = []
    train = paper.train
    monkeypatch.setattr(
        paper, "train", lambda name, recipe, seed: started.append(name) or train(name, recipe, seed)
    )
    chosen = {name: METHODS[name] for name in ("base", "SFT thoughts", "GRPO think, 256")}
    monkeypatch.setattr(paper, "METHODS", chosen)
    found = run_all(series)
    assert started == list(chosen) == list(found["results"])
    summary = found["results"]["SFT thoughts"]["0"]["r1v"]["A"]
    assert summary["n"] == 4 and 0 <= summary["accuracy"] <= 1
    del found["results"]["SFT thoughts"]
    paper.write_json(found, series.out)
    again = run_all(series)
    assert started == [*chosen, "SFT thoughts"]
    assert again["results"]["SFT thoughts"]["0"]["r1v"]["A"] == summary  # a seed fixes it


def test_every_method_changes_the_weights_it_starts_from(series):
    start = Qwen2VL.from_pretrained(TINY).state_dict()
    for name in ("SFT answers, 256", "GRPO direct"):
        trained = Qwen2VL.from_pretrained(paper.train(name, series.recipe, 0)).state_dict()
        assert any(not start[k].equal(trained[k]) for k in start)
    assert paper.train("base", series.recipe, 0) == str(TINY)


def made_up() -> dict:
    """Accuracies by hand: 0.5 with seed 0 and 0.7 with seed 1; 0.1 less under the direct prompt."""
    names = [item.partition("=")[0] for item in paper.EVALS]
    run = [{prompt: {n: {"accuracy": x - less, "length": 9} for n in names}
            for prompt, less in zip(paper.PROMPTS, (0, 0.1))} for x in (0.5, 0.7)]  # fmt: skip
    return {"results": {m: {"0": run[0], "1": run[1]} for m in METHODS}}


def test_the_table_has_mean_and_range_under_both_prompts():
    lines = show(made_up()).splitlines()
    assert lines[0] == "|  | prompt | A | A_attribute | B | C | A, other prompt | tokens |"
    assert len(lines) == 2 + len(METHODS)
    think, direct = "0.600 (0.500-0.700)", "0.500 (0.400-0.600)"
    assert f"| GRPO think | think | {' | '.join([think] * 4)} | {direct} | 9 |" in lines
    assert f"| SFT answers | direct | {' | '.join([direct] * 4)} | {think} | 9 |" in lines
    assert cell([0.5]) == cell([0.5, 0.5]) == "0.500"


def test_the_picture_is_drawn(tmp_path):
    paper.plot(made_up(), str(tmp_path / "p.png"))
    assert np.asarray(Image.open(tmp_path / "p.png").convert("L")).std() > 5


def test_results_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        paper.main(["--plot_only", "--out", str(tmp_path / "none.json")])
