"""controls.py, chapter two: what README's table and picture are made of."""

import json

import numpy as np
import pytest
from PIL import Image

import controls
import grpo
from rewards import format
from rows import load_examples
from sft import completion_of


def found() -> dict:
    """Two seeds of two kinds of run on two evaluations."""
    score = lambda a, f: {"accuracy": a, "format": f}  # noqa: E731
    return {
        "results": {
            "start": {"A": [score(0.4, 1.0)] * 2, "B": [score(0.3, 1.0)] * 2},
            "GRPO": {"A": [score(0.8, 0.9), score(0.9, 1.0)], "B": [score(0.5, 1.0)] * 2},
        },
        "curves": {"GRPO": [[{"step": 1, "reward/accuracy": 0.2}] * 2] * 2},
    }


def test_the_table_shows_means_and_ranges_of_the_seeds():
    assert controls.show(found()).splitlines() == [
        "| | A | B | format on A |",
        "|---|---|---|---|",
        "| start | 0.400 | 0.300 | 1.00 |",
        "| GRPO | 0.850 (0.800-0.900) | 0.500 | 0.95 |",
    ]


def test_the_picture_is_drawn_from_the_results_alone(tmp_path):
    (tmp_path / "found.json").write_text(json.dumps(found()))
    picture = tmp_path / "docs" / "controls.png"
    controls.main([
        "--plot_only", "--out", str(tmp_path / "found.json"), "--picture", str(picture),
    ])  # fmt: skip
    assert np.asarray(Image.open(picture).convert("L")).std() > 5


def test_results_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        controls.main(["--plot_only", "--out", str(tmp_path / "none.json")])


def test_the_clean_teacher_answers_the_rows_of_the_run_right_and_in_format(tmp_path, monkeypatch):
    """The rows are those of the run; what the clean teacher says of them is right, in format."""
    run = grpo.Config(
        model="tiny", data="world:A:n=32", steps=2, prompts=16, max_new=24, optimizer="muon",
        lr=1e-4,
    )  # fmt: skip
    taught = []
    monkeypatch.setattr(
        controls, "fit", lambda m, p, rows, stage, title: taught.append((rows, stage)) or []
    )
    evals = {"E": load_examples("world:A:n=4", part="val")}
    out = controls.run_sft(controls.Config(), run, evals, 0.0, controls.STYLES[:2], tmp_path / "x")
    ((rows, stage),) = taught
    assert len(rows) == 32 and (stage.steps, stage.batch, stage.lr) == (2, 16, 1e-4)
    for example in rows:
        text = completion_of(example)
        assert format(text, example) == 1
        assert text.endswith(f"<answer>{example.solution}</answer>")
    assert out["E"]["n"] == 4 and (tmp_path / "x" / "step_000002" / "config.json").is_file()
