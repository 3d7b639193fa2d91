"""logbook.py, chapter two: which checkpoint is the best, as the run's scorer has it."""

import json

import pytest
from tiny_checkpoint import make_checkpoint

import grpo
from journal import steps_of

TOLD = """
from pathlib import Path

def falls(text, example):
    "What it gives falls from call to call but for the first, which is that before training."
    seen = Path(__file__).with_name("seen")
    n = len(seen.read_text()) if seen.exists() else 0
    seen.write_text("x" * (n + 1))
    return [0.125, 0.75, 0.5, 0.25, 0.0][n]
"""


@pytest.fixture
def words(tmp_path):
    make_checkpoint(tmp_path / "model")
    (tmp_path / "mine.py").write_text(TOLD)
    return ["--model", str(tmp_path / "model"), "--data", "world:A:n=4", "--max_pixels", "3136",
            "--evals", "A=world:A:n=1", "--max_new", "2", "--probes", "0", "--save_every", "1",
            "--prompts", "2", "--group", "2", "--steps", "4", "--keep", "1",
            "--out", str(tmp_path / "run")]  # fmt: skip


def test_the_best_checkpoint_is_that_of_the_highest_score(words, tmp_path):
    """By accuracy, which is 0 throughout, the last but one would stay beside the last."""
    summary = grpo.main([*words, "--eval_saves", "true", "--scorer", f"{tmp_path}/mine.py:falls"])
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")
            if row]  # fmt: skip
    assert [row.get("eval/A") for row in rows] == [0, 0, 0, None]
    assert [row.get("eval/A/score") for row in rows] == [0.75, 0.5, 0.25, None]
    assert [p.name for p in steps_of(tmp_path / "run")] == ["step_000001", "step_000004"]
    found = [summary[when]["A"]["score"] for when in ("before", "after")]
    assert found == [0.125, 0.0]


@pytest.mark.parametrize("scorer, message", [
    ("acuracy", "scorer acuracy: unknown; did you mean accuracy"),
    ("rec", r"1 of 1 rows do not fit .*is to be \[x1, y1, x2, y2\]"),
])  # fmt: skip
def test_a_scorer_that_cannot_score_is_refused_before_anything_is_written(
    words, tmp_path, scorer, message
):
    with pytest.raises(SystemExit, match=message):
        grpo.main([*words, "--scorer", scorer])
    assert not (tmp_path / "run").exists()
