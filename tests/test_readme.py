"""README.md is checked against the code: its commands, files, keys, symbols and numbers."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from test_budget import FILES
from tiny_checkpoint import make_checkpoint

import bench
import controls
import distill
import estimators
import evaluate
import field
import grpo
import paper
import sft
import stages
import workload
from config import read
from template import TEMPLATES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, re.S | re.M))


def test_every_make_target_in_it_exists():
    targets = set(re.findall(r"^([a-z0-9_.-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z][a-z0-9_-]+)", README))
    assert {"train", "test", "eval", "tiny", "controls", "clean", "help"} <= named
    assert named <= targets


def test_make_help_lists_every_target_with_a_line():
    command = ["make", "--no-print-directory", "-s", "help"]  # also below another make
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    listed = dict(line.split(None, 1) for line in told.splitlines())
    assert set(listed) == set(phony)


def test_its_table_of_files_is_the_files():
    table = SECTIONS["The files, in reading order"]
    named = set(re.findall(r"`(\w+\.py)`", table.split("`tests/")[0]))
    assert named == {path.name for path in FILES}


def test_the_functions_and_keys_of_the_algorithm_exist():
    section = SECTIONS["The algorithm"]
    fields = set(grpo.Config.__dataclass_fields__)
    symbols, _, systems = section.split("| symbol |")[1].partition("\n\n")
    for row in re.findall(r"^\|.*\|$", systems, re.M)[2:]:
        assert set(re.findall(r"`(\w+)\b", row)) <= fields | {"baseline"}, row
    for row in re.findall(r"^\|.*\|$", symbols, re.M)[1:]:
        cells = [c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]]
        for name in re.findall(r"`(\w+)`", cells[2]):
            assert callable(getattr(estimators, name)), name
        keys = re.findall(r"`(\w+)`", cells[3])
        assert keys and set(keys) <= fields, row
    for row in re.findall(r"^\| [\d, ]+ \|.*\|$", section, re.M):
        for name in re.findall(r"`(\w+)`", row.rsplit("|", 2)[1]):
            assert hasattr(grpo, name), name


def test_its_metrics_are_those_that_runs_write(tmp_path):
    """Of GRPO, resumed once, and of SFT: none is missing, none is told that nobody writes."""
    make_checkpoint(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--data", "world:A:n=4", "--max_pixels", "3136",
             "--evals", "A=world:A:n=1", "--max_new", "4", "--probes", "0", "--save_every", "1"]
    for steps in "13":
        out = ["--out", str(tmp_path / "grpo"), "--steps", steps]
        grpo.main([*words, *out, "--prompts", "2", "--group", "2", "--eval_saves", "true"])
    sft.main([*words, "--out", str(tmp_path / "sft"), "--steps", "1", "--batch", "2",
              "--held_out", "world:A:n=2"])  # fmt: skip
    found = set()
    for line in "".join(p.read_text() for p in tmp_path.glob("*/metrics.jsonl")).splitlines():
        found |= json.loads(line).keys()
    told = re.findall(r"^\| (`.*?) \|", SECTIONS["What each metric means"], re.M)
    told = [name for cell in told for name in re.findall(r"`([\w/]+)`", cell)]
    found = {re.sub("^(reward|eval)/.*", r"\1/NAME", name) for name in found}
    assert sorted(told) == sorted(found)


def test_its_commands_parse():
    """Every ARGS="..." after a make target resolves to a config, and so does a plain python."""
    commands = README.replace("\\\n", " ")
    for where, args in re.findall(r'make train([^\n]*)ARGS="([^"]+)"', commands):
        recipe = (re.findall(r"RECIPE=(recipes/\S+)", where) or ["recipes/tiny.toml"])[0]
        if "my.toml" not in where:
            stages.read([str(ROOT / recipe), *args.split()])
    for recipe, args in re.findall(r"python run.py (recipes/\S+)([^\n#`]*)", commands):
        stages.read([str(ROOT / recipe), *args.split()])
    for args in re.findall(r'make eval[^\n]*ARGS="([^"]+)"', commands):
        read(evaluate.Config, args.split())
    for args in re.findall(r'make sft[^\n]*ARGS="([^"]+)"', commands):
        read(sft.Config, [str(ROOT / "recipes/sft_clevr_r1.toml"), *args.split()])
    steps = re.findall(r'make distill STEP=(\w+) ARGS="([^"]+)"', commands)
    assert {step for step, _ in steps} == set(distill.STEPS)
    for step, args in steps:
        read(distill.STEPS[step][0], args.split())
    for args in re.findall(r'make bench[^\n]*ARGS="([^"]+)"', commands):
        read(bench.Config, args.split())
    for args in re.findall(r"python bench.py r1v ([^\n#`]+)", commands):
        read(workload.Config, args.split())
    for args in re.findall(r"python evaluate.py ([^\n#`]+)", commands):
        read(evaluate.Config, args.split())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_is_in_it_and_resolves(path):
    if path.stem.startswith("sft"):
        assert read(sft.Config, [str(path)]).out == f"runs/{path.stem}"
    else:
        assert stages.read([str(path)]).whole.out == f"runs/{path.stem}"
    assert f"recipes/{path.name}" in README


def test_its_table_of_results_is_the_measured_one():
    found = json.loads((ROOT / "bench/controls.json").read_text())
    assert controls.show(found) in README
    assert paper.show(json.loads((ROOT / "bench/paper.json").read_text())) in README
    assert field.show(json.loads((ROOT / "bench/field.json").read_text())) in README
    assert bench.text(json.loads((ROOT / "bench/results/cpu.json").read_text())) in README


def test_every_template_is_in_it():
    assert not [name for name in TEMPLATES if f"`{name}`" not in README]


def test_nothing_in_it_waits_for_a_number():
    for name in ("README.md", "LOG.md"):
        assert not re.search(r"@[A-Z]+\d*@", (ROOT / name).read_text(encoding="utf-8")), name


def test_its_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", README):
        assert (ROOT / target).is_file(), target
