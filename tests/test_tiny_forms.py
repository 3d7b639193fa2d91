"""tiny_forms.py, chapter two: the checkpoint that answers one question in four forms, badly."""

from pathlib import Path

import pytest

import tiny_forms
from data import Processor
from evaluate import evaluate
from model import Qwen2VL
from rewards import format
from scenes import load_world
from template import TEMPLATES

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tiny_forms"


def test_the_rows_are_under_two_prompts_and_hold_what_the_flawed_teacher_says():
    rows = tiny_forms.rows(120, seed=3)
    direct = TEMPLATES["direct"].user.partition("{Question}")[2]
    r1v = TEMPLATES["r1v"].user.partition("{Question}")[2]
    asked = [row.problem.endswith(direct) for row in rows]
    assert all(row.problem.endswith(r1v) for row, plain in zip(rows, asked) if not plain)
    assert 0.1 < sum(asked) / 120 < 0.4
    assert {row.task for row in rows} == {"open", "pick", "judge", "read"}
    said = [row.extra["completion"] for row in rows]
    assert 0.25 < sum(format(text, None) for text in said) / 120 < 0.5


def test_the_committed_checkpoint_is_what_it_is_said_to_be():
    """Its eye and words are tiny/'s; it answers in every form, and by no means always rightly."""
    model, processor = Qwen2VL.from_pretrained(FOLDER), Processor.from_pretrained(FOLDER)
    eye = Qwen2VL.from_pretrained(ROOT / "tiny").visual.state_dict()
    assert all(x.equal(eye[name]) for name, x in model.visual.state_dict().items())
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (FOLDER / name).read_bytes() == (ROOT / "tiny" / name).read_bytes()
    bounds = {"open": (0.35, 0.75), "read": (0.3, 0.7), "judge": (0.4, 0.8)}
    for form, (low, high) in bounds.items():
        rows = load_world(f"world:A:n=60:part=test:objects=3-8:ask={form}")
        assert low < evaluate(model, processor, rows, 60, 24)["accuracy"] < high


def test_it_is_made_as_it_says(tmp_path):
    words = ["--steps", "2", "--start", str(ROOT / "tiny")]
    for name in "ab":
        tiny_forms.main([*words, "--out", str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in FOLDER.iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(SystemExit, match="there already"):
        tiny_forms.main([*words, "--out", str(tmp_path / "a")])
