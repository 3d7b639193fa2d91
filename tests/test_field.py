"""field.py, chapter two: every run's stages are asked, and a stopped series goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import field
from field import EVALS, LINES, PLAIN, RUNS, Line, run_all, show, spread, stage_of
from stages import read

ROOT = Path(__file__).resolve().parent.parent
START = ROOT / "tiny_forms"
SHARED = f"""model = {json.dumps(str(START))}
probes = 0
"""
GRPO = """data = "world:A:n=8:objects=2-3:ask=open"
steps = 1
prompts = 2
group = 2
max_new = 8
beta = 0.0
"""
STAGED = """[[stage]]
name = "cold"
method = "sft"
data = "world:A:n=4:objects=2-3:ask=open:teacher=listed"
steps = 1
batch = 2
[[stage]]
method = "grpo"
"""


def samples(stage) -> int:
    """Completions that a stage learns from by reinforcement."""
    return stage.cfg.steps * stage.cfg.prompts * stage.cfg.group if stage.method == "grpo" else 0


@pytest.mark.parametrize("name", RUNS)
def test_every_run_learns_from_as_many_samples_from_the_same_start(name):
    recipe, words = RUNS[name]
    stages = read([str(ROOT / "recipes" / f"{recipe}.toml"), *words]).stages
    assert sum(map(samples, stages)) in (19_200, 17_920)  # Curr-ReFT: 1,200 for its last stage
    assert stages[0].cfg.model == "tiny_forms"


def test_every_line_of_the_table_asks_a_run_that_there_is():
    assert {line.of for line in LINES} == set(RUNS)
    assert len({(line.of, field.key(line)) for line in LINES}) == len(LINES)
    for line in LINES:
        recipe, words = RUNS[line.of]
        stages = read([str(ROOT / "recipes" / f"{recipe}.toml"), *words]).stages
        assert line.stage is None or line.stage in [stage.name for stage in stages]


@pytest.fixture
def series(tmp_path, monkeypatch):
    """A small series of two runs, one of them of two stages, in this process."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "one.toml").write_text(SHARED + GRPO)
    (tmp_path / "recipes" / "two.toml").write_text(SHARED + STAGED + GRPO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(field, "START", str(START))
    monkeypatch.setattr(field, "EVALS", tuple(x.replace("n=400", "n=2") for x in EVALS))
    monkeypatch.setattr(field, "RUNS", {PLAIN: ("one", []), "two": ("two", ["--max_new", "6"])})
    lines = (Line(PLAIN, PLAIN, ""), Line("two", "two", ""), Line("- cold", "two", "", "", "cold"),
             Line("- direct", "two", "", "", None, "direct"))  # fmt: skip
    monkeypatch.setattr(field, "LINES", lines)
    return field.Config(seeds=(0,), runs=(PLAIN, "two"), jobs=0, out="f.json", picture="f.png")


def test_a_series_goes_on_where_it_was_stopped_and_is_shown(series, monkeypatch):
    started, train = [], field.train
    monkeypatch.setattr(field, "train", lambda *of: started.append(of) or train(*of))
    run_all(series)
    assert started == [(PLAIN, 0), ("two", 0)]
    assert stage_of(Path("runs/field/two_0"), "cold").endswith("1_cold/step_000001")
    assert stage_of(Path("runs/field/two_0"), None).endswith("2_grpo/step_000001")
    found = json.loads(Path("f.json").read_text())
    del found["results"]["two"]
    field.write_json(found, series.out)
    run_all(series)
    assert started[2:] == [("two", 0)]
    found = json.loads(Path("f.json").read_text())
    assert show(found).count("\n") == 1 + 1 + 4
    field.plot(found, series.picture)
    assert np.asarray(Image.open(series.picture).convert("L")).std() > 5


def test_the_table_has_mean_and_range_and_the_difference_seed_by_seed():
    def one(seconds, **values):
        return {"seconds": seconds, "asked": {
            name: {e: {"accuracy": x, "length": 9} for e in "AC"} for name, x in values.items()}}

    start = {name: {"accuracy": 0.25, "length": 8} for name in "AC"}
    runs = {PLAIN: {"0": one(60, last=0.5), "1": one(62, last=0.7)},
            "open_r1": {"1": one(70, last=0.8, direct=0.6)}}
    lines = show({"start": start, "results": runs}).splitlines()
    assert lines[0] == "|  | its idea | A | C | A, against plain | tokens | its paper says |"
    assert lines[2] == "| start | a flawed teacher | 0.250 | 0.250 |  | 8 |  |"
    mean = "0.600 (0.50 to 0.70)"
    assert lines[3] == f"| {PLAIN} | {LINES[0].idea} | {mean} | {mean} |  | 9 |  |"
    assert lines[4].startswith("| open-r1-multimodal | ")
    assert "| 0.800 | 0.800 | +0.100 | 9 | with thoughts" in lines[4]
    assert lines[5].startswith("| - asked directly | ") and "| -0.100 | 9 |" in lines[5]
    assert len(lines) == 6
    assert spread([0.1, -0.1], "+") == "+0.000 (-0.10 to +0.10)"
