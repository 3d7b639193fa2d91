"""recipes/, chapter two: every recipe is understood, and takes two steps on a small checkpoint.

The published runs are at hand only in their settings: weights and data are replaced by small ones
of the same kind, everything else stays.
"""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from tiny_checkpoint import make_checkpoint, picture

import grpo
import sft
from config import read

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PUBLISHED = [path for path in RECIPES if path.stem.startswith(("r1v", "sft"))]
each = pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)


def script(path: Path):
    return sft if path.stem.startswith("sft") else grpo


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_known(path):
    assert read(script(path).Config, [str(path)])


@each
def test_a_published_recipe_opens_with_a_command_for_eight_gpus_and_one_for_one(path):
    target = "sft" if path.stem.startswith("sft") else "train"
    head = path.read_text().splitlines()[:4]
    assert f"# 8 GPUs:    make {target} GPUS=8 RECIPE=recipes/{path.name}" in head
    assert f"# one GPU:   make {target} RECIPE=recipes/{path.name}" in head


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    families = ("qwen2_vl", "qwen2_5_vl")
    return {family: make_checkpoint(folder / family, family=family) for family in families}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows as the hub's data sets have them: clevr_cogen_a_train, and Clevr_CoGenT_TrainA_R1."""
    folder = tmp_path_factory.mktemp("rows")
    with open(folder / "train.jsonl", "w", encoding="utf-8") as f:
        for i in range(4):
            Image.fromarray(picture(i, 160, 240)).save(folder / f"{i}.png")
            row = {"image": f"{i}.png", "problem": "How many items are there in the image?",
                   "thinking": "<think> one, two </think>", "solution": f"<answer> {i} </answer>"}
            f.write(json.dumps(row) + "\n")
    return folder / "train.jsonl"


@each
def test_a_published_recipe_takes_two_steps(path, checkpoints, rows, tmp_path):
    """With its own rewards, template, pixels, optimizer, schedule, and bfloat16; to the rewards one
    is added that a random model can earn, so that there is something to learn from."""
    pytest.importorskip("math_verify")
    (tmp_path / "mine.py").write_text("def vowels(text, example):\n"
                                      "    return sum(c in 'aeiou' for c in text)\n")
    text = path.read_text()
    family = "qwen2_5_vl" if "Qwen2.5-VL" in re.search('model = "(.*)"', text)[1] else "qwen2_vl"
    words = [str(path), "--model", str(checkpoints[family]), "--data", str(rows), "--steps", "2"]
    words += ["--out", str(tmp_path / "run"), "--workers", "0", "--max_new", "8"]
    if script(path) is grpo:
        words += ["--prompts", "2", "--group", "4", "--probes", "1", "--reward_weights", "1,1,1"]
        words += ["--rewards", f"r1v_accuracy,r1v_format,{tmp_path}/mine.py:vowels"]
    else:
        words += ["--batch", "4", "--probes", "1"]
    summary = script(path).main(words)
    assert summary["steps"] == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in metrics)
    assert (tmp_path / "run" / "step_000002" / "model.safetensors").is_file()


def test_the_published_settings_are_those_of_r1v():
    """src/scripts/run_grpo_clevr.sh, run_grpo_vllm_qwen25vl.sh, configs/qwen2vl_sft_config.yaml."""
    clevr = read(grpo.Config, [str(ROOT / "recipes" / "r1v_clevr_2b.toml")])
    assert (clevr.prompts, clevr.group, clevr.max_new, clevr.steps) == (16, 8, 512, 100)
    assert (clevr.lr, clevr.beta, clevr.temperature, clevr.max_pixels) == (1e-6, 0.04, 1.0, 401408)
    assert clevr.min_pixels == 3136 and clevr.updates_per_batch == 1 and clevr.mean == "sequence"
    geoqa = read(grpo.Config, [str(ROOT / "recipes" / "r1v_geoqa_qwen25_3b.toml")])
    assert (geoqa.group, geoqa.max_prompt, geoqa.max_new) == (8, 4096, 2048)
    assert (geoqa.max_pixels, geoqa.schedule) == (501760, "constant")
    base = read(sft.Config, [str(ROOT / "recipes" / "sft_clevr_r1.toml")])
    assert (base.lr, base.warmup, base.schedule) == (2e-5, 0.1, "cosine")
    assert (base.micro, base.batch, base.max_length, base.mask) == (4, 4 * 4 * 8, 4096, "all")
