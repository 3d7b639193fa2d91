"""recipes/, chapter two: every recipe is understood, and takes two steps on a small checkpoint.

The published runs are at hand only in their settings: weights and data are replaced by small ones
of the same kind, everything else stays.
"""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_checkpoint import make_checkpoint, picture

import grpo
import sft
from config import read

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PUBLISHED = [path for path in RECIPES if path.stem.startswith(("r1v", "sft", "vlm", "visual"))]
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


def chat(question, answer, *images, **more):
    """A row as VLM-R1's."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    image = images[0] if len(images) == 1 else list(images)
    return {"image": image, "conversations": turns, **more}


BOXES = [{"bbox_2d": [2, 3, 9, 12], "label": "cube"}, {"bbox_2d": [0, 0, 5, 5], "label": "ball"}]
VIRFT = "<answer>[{'Position': [100, 80, 900, 700], 'Confidence': 1}]</answer>"
ROWS = {  # four of each, as the published sets have them; pictures are 0.png to 3.png
    # clevr_cogen_a_train, and Clevr_CoGenT_TrainA_R1
    "count": [{"image": f"{i}.png", "problem": "How many items are there in the image?",
               "thinking": "<think> one, two </think>", "solution": f"<answer> {i} </answer>"}
              for i in range(4)],
    "rec": [chat("<image>Please provide the bounding box coordinate of the region this sentence "
                 "describes: the left one.", [i, 1, i + 9, 12], f"{i}.png") for i in range(4)],
    "ovd": [chat("Detect the following objects: cube, ball.", gold, f"{i}.png")
            for i, gold in enumerate((BOXES, "None", BOXES[:1], json.dumps(BOXES)))],
    "gui": [chat("<image><image>Which defect is there?", "No Defect", "0.png", "1.png"),
            chat("Which defect is there?", "Operation No Response", "2.png", "1.png", "3.png"),
            chat("<image>Which defect is there?", "No Defect", "3.png"),
            {**chat("Name a defect.", "No Defect"), "image": None}],
    "math": [chat("<image>What is half of 7?", "\\frac{7}{2}", "0.png"), chat("And of 8?", 4),
             chat("Of 9?", 4.5, "1.png"), chat("Is it so?", "yes", accu_reward_method="yes_no")],
    "choice": [chat("Which? (A) red (B) blue", "B", f"{i}.png") for i in range(4)],
    "virft": [{"image": f"{i}.png", "problem": "Detect all objects of the category 'dog'.",
               "solution": VIRFT if i else "<answer>No Objects</answer>"} for i in range(4)],
    "ground": [{"image": f"{i}.png", "problem": "what one could sit on",
                "solution": f"({i},80),(900,700)"} for i in range(4)],
    "class": [{"image": f"{i}.png", "problem": "Which plant is this?",
               "solution": f"<answer>rose {i}</answer>"} for i in range(4)],
}  # fmt: skip
SIZES = [(160, 240), (14, 20), (84, 168), (300, 200)]  # of the pictures: height, width


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The folder of the rows, NAME.jsonl each, and of their pictures."""
    folder = tmp_path_factory.mktemp("rows")
    for i, size in enumerate(SIZES):
        Image.fromarray(picture(i, *size)).save(folder / f"{i}.png")
    for name, some in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


DATA = {  # of the recipes: names of ROWS, and the columns that the recipe adds to them
    "vlm_r1_rec": ("rec", "rec", "rec"), "vlm_r1_rec_lora": ("rec", "rec", "rec"),
    "vlm_r1_ovd": ("ovd",), "vlm_r1_gui": ("gui",),
    "vlm_r1_math": ("math accu_reward_method=math", "choice accu_reward_method=choice"),
    "visual_rft_detection": ("virft",), "visual_rft_classification": ("class",),
    "visual_rft_grounding": ("ground",),
}  # fmt: skip


def source(path: Path, rows: Path) -> str:
    """The recipe's sources, with the rows of the test in the places of the published ones."""
    parts = [name.partition(" ") for name in DATA.get(path.stem, ("count",))]
    return " + ".join(f"{rows}/{name}.jsonl images={rows} {more}" for name, _, more in parts)


@each
def test_a_published_recipe_takes_two_steps(path, checkpoints, rows, tmp_path):
    """With its own rewards, template, pixels, optimizer, schedule, and bfloat16; to the rewards one
    is added that a random model can earn, so that there is something to learn from."""
    pytest.importorskip("math_verify")
    (tmp_path / "mine.py").write_text("def vowels(text, example):\n"
                                      "    return sum(c in 'aeiou' for c in text)\n")
    cfg = read(script(path).Config, [str(path)])
    family = "qwen2_5_vl" if "Qwen2.5-VL" in cfg.model else "qwen2_vl"
    words = [str(path), "--model", str(checkpoints[family]), "--data", source(path, rows)]
    words += ["--steps", "2", "--out", str(tmp_path / "run"), "--workers", "0", "--max_new", "8"]
    if script(path) is grpo:
        rewards = [*cfg.rewards, f"{tmp_path}/mine.py:vowels"]
        words += ["--prompts", "2", "--group", "4", "--probes", "1", "--rewards", ",".join(rewards)]
        words += ["--reward_weights", ",".join("1" for _ in rewards)]
    else:
        words += ["--batch", "4", "--probes", "1"]
    summary = script(path).main(words)
    assert summary["steps"] == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in metrics)
    weights = "adapter_model" if getattr(cfg, "lora", 0) else "model"
    assert (tmp_path / "run" / "step_000002" / f"{weights}.safetensors").is_file()


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


def test_the_published_settings_are_those_of_vlm_r1():
    """run_scripts/run_grpo_rec.sh, run_grpo_rec_lora.sh, run_grpo_gui.sh: 8 GPUs x 8 (GUI: 2)
    completions x 2 accumulated, of 8 a prompt."""
    cfg = {name: read(grpo.Config, [str(ROOT / "recipes" / f"vlm_r1_{name}.toml")])
           for name in ("rec", "rec_lora", "gui", "ovd", "math")}  # fmt: skip
    for name, one in cfg.items():
        prompts = 8 * (2 if name == "gui" else 8) * 2 // 8
        assert (one.prompts, one.group, one.max_new) == (prompts, 8, 2048)
        assert (one.clip_low, one.clip_high, one.updates_per_batch) == (0.2, 0.2, 1)
        assert (one.min_pixels, one.max_pixels, one.temperature) == (3136, 12845056, 1.0)
        assert one.beta == (0 if name == "ovd" else 0.04)
        assert one.lr == (1e-5 if name == "rec_lora" else 1e-6)
        assert one.model == "Qwen/Qwen2.5-VL-3B-Instruct"
    lora = cfg["rec_lora"]
    assert (lora.lora, lora.lora_alpha, lora.lora_dropout) == (64, 128, 0.05)
    assert lora.freeze == ("vision", "merger") and not (lora.lora_targets or lora.lora_vision)
    assert cfg["rec"].freeze == () and cfg["rec"].rewards == lora.rewards == ("iou", "box_format")
    assert (cfg["gui"].steps, cfg["gui"].save_every, cfg["gui"].rewards) == (
        1200, 400, ("exact", "format"))  # fmt: skip
    assert [cfg[name].template for name in cfg] == ["rec", "rec", "vlm_r1", "od_length", "vlm_r1"]
    assert {cfg[name].frame for name in ("rec", "rec_lora", "ovd")} == {"resized"}


def test_the_published_settings_are_those_of_visual_rft():
    """src/scripts: 8 GPUs x 1 prompt x 2 accumulated; boxes in thousandths."""
    for name in ("detection", "classification"):
        cfg = read(grpo.Config, [str(ROOT / "recipes" / f"visual_rft_{name}.toml")])
        assert (cfg.prompts, cfg.group, cfg.max_prompt, cfg.max_new) == (16, 8, 1024, 256)
        assert (cfg.lr, cfg.beta, cfg.max_pixels, cfg.template) == (1e-6, 0.04, 401408, "plain")
    detection = read(grpo.Config, [str(ROOT / "recipes" / "visual_rft_detection.toml")])
    assert detection.frame == detection.gold_frame == "0-1000"
    assert detection.rewards == ("mean_iou", "confidence", "format")
    assert detection.steps == 6000 // detection.prompts
