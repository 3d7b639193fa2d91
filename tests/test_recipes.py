"""recipes/, chapter two: every recipe is understood, and takes two steps on a small checkpoint.

The published runs are at hand only in their settings: weights and data are replaced by small ones
of the same kind, everything else stays. Teachers behind an address are one on the loopback.
"""

import gc
import json
import re
from pathlib import Path

import pytest
from chat_server import ChatServer
from PIL import Image
from tiny_checkpoint import make_checkpoint, picture

import grading
import grpo
import plan
import run
import sft
import stages
from config import read

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SINGLE = [path for path in RECIPES if path.stem.startswith(("r1v", "sft", "vlm", "visual_rft"))]
STAGED = [path for path in RECIPES if path not in SINGLE and not path.stem.startswith("tiny")]
each = pytest.mark.parametrize("path", SINGLE, ids=lambda path: path.stem)


def script(path: Path):
    return sft if path.stem.startswith("sft") else grpo


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_known(path):
    if path.stem.startswith("sft"):
        assert read(sft.Config, [str(path)])
    else:
        assert stages.read([str(path)]).stages


@pytest.mark.parametrize("path", SINGLE + STAGED, ids=lambda path: path.stem)
def test_a_published_recipe_opens_with_a_command_for_eight_gpus_and_one_for_one(path):
    target = "sft" if path.stem.startswith("sft") else "train"
    head = path.read_text().splitlines()[:4]
    assert f"# 8 GPUs:    make {target} GPUS=8 RECIPE=recipes/{path.name}" in head
    assert f"# one GPU:   make {target} RECIPE=recipes/{path.name}" in head


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What a run takes in memory is worked out for the first one alone (test_plan.py has that), and
    the garbage that run.py collects after each stage is not looked for in all of transformers."""
    real, told = plan.of, []

    def once(*work):
        told.append(told[0] if told else real(*work))
        return told[0]

    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "of", once)
        yield
    gc.unfreeze()


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
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text.replace("file:///HERE", f"file://{folder}"))
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


# ------------------------------------------------------------------------- systems made of stages

CHAT = [{"role": "user", "content": [{"type": "image", "image": "file:///HERE/0.png"},
                                     {"type": "text", "text": "What is half of 7?"}]}]
GOLD = "<think> one, wait, and one more </think>"
ROWS |= {  # HERE: the folder of the rows
    # LLaVA-CoT's half of Vision-R1-cold, and Mulberry's; Vision-R1-rl
    "cold_llava": [chat("<image>\nWhich?", GOLD + "<answer> Final Answer:B </answer>", f"{i}.png")
                   for i in range(2)],
    "cold_mulberry": [{"images": [f"{i}.png"], "conversations": [
        {"from": "user", "value": "<image>Which?"},
        {"from": "assistant", "value": GOLD + "<answer> Final Answer:C </answer>"}]}
        for i in range(2)],
    "geometry": [{"images": [f"{i}.png"], "problem": "<image>Find x.", "answer": f"{i} \\sqrt{{3}}"}
                 for i in range(4)],
    # SAT
    "sat": [{"messages": [{"role": "user", "content": "<image> Answer in natural language. Which "
                           "way? Choose between the following options: left or right"},
                          {"role": "assistant", "content": "left"}], "images": [f"{i}.png"]}
            for i in range(4)],
    # what the steps that ask start from; multimodal-open-r1-8k-verified; R1-Onevision's chats; text
    "questions": [{"id": f"q{i}", "image": f"{i}.png", "problem": "How many?", "solution": "2"}
                  for i in range(2)],
    "verified": [{"image": f"{i}.png", "problem": "How many?", "original_question": "A. 2",
                  "solution": GOLD + "\n\n<answer>2</answer>", "original_answer": "A"}
                 for i in range(4)],
    "onevision": [{"messages": [{"role": "user", "content": "<image>How many?"},
                                {"role": "assistant", "content": GOLD + "\n\nTwo."}],
                   "images": [f"{i}.png"]} for i in range(2)],
    "read": [{"id": f"t{i}", "problem": f"What is {i} + 1?", "thinking": GOLD,
              "solution": f"<answer> {i + 1} </answer>"} for i in range(2)],
    # MM-Eureka's first and second version; LMM-R1's, with a picture and without
    "eureka": [{"id": str(i), "answer": "$3.5$", "image_urls": ["file:///HERE/1.png"][:i],
                "conversations": [{"role": "system", "content": "You solve."},
                                  {"role": "user", "content": "<image>" * i + "Half of 7?"}]}
               for i in (1, 1, 0, 1)],
    "message": [{"id": str(i), "message": json.dumps(CHAT), "answer": "$\\frac{7}{2}$"}
                for i in range(4)],
    "words": [{"message": json.dumps([{"role": "user", "content": "What is 1 + 2?"}]),
               "question": "What is 1 + 2?", "answer": "$3$"} for _ in range(4)],
    # Curr-ReFT's three stages; what is asked before answers are judged
    "judge": [{"problem": "Is there a dog?", "solution": "<answer>no</answer>", "task": task,
               "image": f"{i}.png"} for i, task in enumerate(("detection", "classify", "math"))],
    "pick": [{"problem": "Which? A. dog B. cat C. bird", "solution": f"<answer>{gold}</answer>",
              "task": task, "image": "1.png"}
             for gold, task in (("B", "detection"), ("A, C", "classify"), ("C", "math"))],
    "open": [{"problem": "Where, or how many?", "task": task, "image": "2.png",
              "solution": f"<thinking>so</thinking><answer>{gold}</answer>"}
             for gold, task in (('{"bbox_2d": [1, 2, 20, 30]}', "detection"),
                                ("dog, cat", "classify"), ("4.5", "math"))],
}  # fmt: skip
STAGE_DATA = {  # of each recipe: {stage: its rows}, "" for a recipe without stages
    "vision_r1": {"bridge": "@questions", "ptst_4k": "@geometry", "ptst_8k": "@geometry"},
    "vision_r1_ci": {"cold_start": "@cold_llava + @cold_mulberry"},
    "vision_r1_long": {"cold_start": "@cold_llava + @cold_mulberry", "long_16k": "@geometry"},
    "vision_r1_zero": {"": "@geometry"},
    **{path.stem: {"": "@sat"} for path in STAGED if path.stem.startswith("visualthinker")},
    "open_r1_multimodal": {"rewrite": "@questions"},
    "r1_onevision": {"formal": "@questions", "rl": "@count"},
    "r1_vision": {"caption": "@questions", "letters": "@read",
                  "cold_start": "{set} + {letters} + @read"},
    "mm_eureka": {"neither_all_nor_none": "@eureka", "rl": "@eureka only={neither_all_nor_none}"},
    "mm_eureka_qwen": {"": "@message"},
    "curr_reft": {"judge": "@judge", "choice": "@pick", "open": "@open", "answers": "@read"},
    "lmm_r1": {"words": "@words", "pictures": "@message"},
}  # fmt: skip
ANEW = "<question>How many?</question><reasoning>One, two.</reasoning><answer>2</answer>"


def teacher(n: int, body: dict) -> str:
    """Who sees says what every ask of a picture wants to hear; who reads thinks, and is right."""
    if body["model"] == "eye":
        anew = "<question>" in str(body["messages"])
        return ANEW if anew else "A red cube and a ball. Consistent: yes. Score: 90"
    begun = body["messages"][-1]["role"] == "assistant"
    return "<think>" * (not begun) + "Wait: one and one. </think> <answer> 2 </answer>"


def odd(text, example):
    """A reward that a random model can earn, 0 or 1."""
    return float(sum(letter in "aeiou" for letter in text) % 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of one layer; with it there is an odd reward, and a key for the teachers."""
    folder = make_checkpoint(tmp_path_factory.mktemp("small") / "1", family="qwen2_5_vl", layers=1,
                             depth=1, fullatt_block_indexes=(0,), width=32, ffn=32)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grading.REWARDS, "odd", odd)
        patch.setattr(grading, "KNOWN", (*grading.KNOWN, "odd"))
        for name in ("OPENAI_API_KEY", "DEEPSEEK_API_KEY"):
            patch.setenv(name, "none")
        yield folder


def cut(recipe: stages.Recipe, rows: Path, url: str) -> list[str]:
    """The words that make a recipe small: rows of the test, two steps, short answers, pictures of
    4 x 4 patches, who answers on the loopback; to the rewards an odd one is added."""
    words = []
    for stage in recipe.stages:
        own = STAGE_DATA[Path(recipe.path).stem].get(stage.name if stage.number else "", "")
        of = {"data": re.sub(r"@(\w+)", rf"{rows}/\1.jsonl images={rows}", own)} if own else {}
        if stage.method == "grpo":
            rewards = ("odd", *stage.cfg.rewards)
            of |= {"steps": 2, "prompts": 2, "group": 4, "rewards": ",".join(rewards)}
            of |= {"reward_weights": ",".join(["1"] * len(rewards)), "most_right": 1, "warmup": 0}
            of |= {"minibatches": min(2, stage.cfg.minibatches)}
        elif stage.method == "sft":
            of |= {"steps": 2, "batch": 2, "warmup": 0}
        elif stage.method == "filter":
            of |= {"rewards": "odd", "n": 4}
        elif stage.step != "sample" and hasattr(stage.cfg, "teacher"):
            of |= {"teacher": f"eye@{url}", "retries": 0}
        if hasattr(stage.cfg, "reasoner") and stage.cfg.reasoner:
            of |= {"reasoner": f"mind@{url}"}
        if hasattr(stage.cfg, "max_new"):
            of |= {"max_new": 8}
        more = {"probes": 0, "workers": 0, "min_pixels": 3136, "max_pixels": 3136, "bf16": "false"}
        of |= {key: x for key, x in more.items() if hasattr(stage.cfg, key)}
        if getattr(stage.cfg, "images", None):  # which are not at hand
            of |= {"images": str(rows)}
        at = f"{stage.name}." if stage.number else ""
        words += [word for key, x in of.items() for word in (f"--{at}{key}", str(x))]
    return words


@pytest.mark.parametrize("path", STAGED, ids=lambda path: path.stem)
def test_every_stage_of_a_system_takes_two_steps(path, small, rows, tmp_path):
    """With its own prompts, rewards, estimator, parts that learn, optimizer and schedule, on rows
    in the columns of its data sets; each stage from what the one before has left."""
    pytest.importorskip("math_verify")
    recipe = stages.read([str(path)])
    with ChatServer(teacher) as server:
        words = ["--model", str(small), "--out", str(tmp_path), *cut(recipe, rows, server.url)]
        done = run.main([str(path), *words])
    assert list(done) == [stage.name for stage in recipe.stages]
    for stage in recipe.stages:
        if stage.method in stages.TRAINS:
            lines = (stage.folder(tmp_path) / "metrics.jsonl").read_text().splitlines()
            metrics = [json.loads(line) for line in lines]
            assert [row["step"] for row in metrics] == [1, 2]
            assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in metrics)
            assert (stage.folder(tmp_path) / "step_000002" / "model.safetensors").is_file()
        else:
            assert stage.leaves(tmp_path).exists()
    assert (tmp_path / "report.html").is_file()
    assert bool(server.asked) == any("@http" in str(vars(stage.cfg)) for stage in recipe.stages)


BEGUN = {"open_r1_multimodal": ("rl", "verified"), "r1_onevision": ("cold_start", "onevision")}


@pytest.mark.parametrize("name", BEGUN)
def test_a_published_set_takes_the_place_of_its_teachers(name, small, rows, tmp_path):
    """As the heads of the recipes say: --first NAME --NAME.data SOURCE."""
    pytest.importorskip("math_verify")
    first, source = BEGUN[name]
    words = [str(ROOT / "recipes" / f"{name}.toml"), "--first", first]
    words += [f"--{first}.data", f"{rows}/{source}.jsonl images={rows}"]
    recipe = stages.read(words)
    words += ["--model", str(small), "--out", str(tmp_path), *cut(recipe, rows, "")]
    assert run.main(words)[first]["steps"] == 2
    assert recipe.stages[0].name == first and recipe.stages[0].folder(tmp_path).is_dir()


def settings(name: str) -> dict:
    """{stage: its config} of a recipe."""
    recipe = stages.read([str(ROOT / "recipes" / f"{name}.toml")])
    return {stage.name: stage.cfg for stage in recipe.stages}


def test_the_published_settings_are_those_of_vision_r1():
    """arXiv 2503.06749, and its train.yaml: 32 rows a step; samples x tokens stay the same."""
    found = settings("vision_r1")
    assert list(found) == ["bridge", "right", "set", "cold_start", "ptst_4k", "ptst_8k"]
    for cold in (found["cold_start"], *settings("vision_r1_ci").values()):
        assert (cold.lr, cold.schedule, cold.warmup, cold.epochs) == (5e-6, "cosine", 0.05, 2)
        assert (cold.batch, cold.max_length, cold.mask) == (32, 16384, "completion")
    long, zero = settings("vision_r1_long")["long_16k"], settings("vision_r1_zero")["grpo"]
    some = found["ptst_4k"], found["ptst_8k"], long, zero
    assert [(cfg.steps, cfg.group, cfg.max_new) for cfg in some] == [
        (100, 16, 4096), (100, 8, 8192), (300, 4, 16384), (300, 16, 4096)]  # fmt: skip
    for cfg in some:
        assert (cfg.beta, cfg.clip_low, cfg.clip_high) == (0.01, 0.2, 0.2)
        assert (cfg.rewards, cfg.temperature) == (("all_of(math,format)",), 1.0)
    assert (found["ptst_4k"].model, found["ptst_8k"].model) == ("{cold_start}", "{ptst_4k}")


def test_the_published_settings_are_those_of_visualthinker():
    """Its paper's table 2 and run_grpo_SAT.sh: 4 GPUs x 1 prompt x 2 accumulated."""
    ways = {"": (), "_instruct": (), "_frozen_vision": ("vision", "merger"),
            "_frozen_language": ("language",), "_length": ()}  # fmt: skip
    for way, frozen in ways.items():
        cfg = settings(f"visualthinker{way}")["grpo"]
        assert (cfg.prompts, cfg.group, cfg.steps, cfg.max_new) == (8, 8, 1500, 700)
        assert (cfg.max_prompt, cfg.max_pixels, cfg.beta, cfg.lr) == (1024, 401408, 0.04, 1e-6)
        assert cfg.model == "Qwen/Qwen2-VL-2B" + "-Instruct" * bool(way)
        assert cfg.template == "visualthinker" + "_instruct" * bool(way)
        assert cfg.freeze == frozen and cfg.rewards[:2] == ("math", "format")
    assert settings("visualthinker_length")["grpo"].rewards[2] == "length(per=0.001,most=700)"


def test_the_published_settings_are_those_of_open_r1_and_r1_onevision():
    """train_qwen2_vl.sh: 8 GPUs x 1 prompt; qwen2.5_vl_7b_full_sft.yaml: 8 x 1 x 16 rows;
    run_grpo.sh: 8 x 1 x 2 prompts, 10,000 rows."""
    found = settings("open_r1_multimodal")
    rl = found["rl"]
    assert found["rewrite"].temperature == 0.2 and "gpt-4o-2024-08-06" in found["rewrite"].teacher
    assert (rl.prompts, rl.group, rl.max_prompt, rl.max_new) == (8, 8, 8192, 256)
    assert (rl.max_pixels, rl.steps * rl.prompts, rl.template) == (2359296, 8000, "r1v")
    found = settings("r1_onevision")
    cold, rl = found["cold_start"], found["rl"]
    assert (cold.lr, cold.schedule, cold.warmup, cold.epochs) == (1e-5, "cosine", 0.05, 1)
    assert (cold.batch, cold.max_length, cold.freeze) == (128, 8192, ())
    assert (rl.prompts, rl.group, rl.max_prompt, rl.steps * rl.prompts) == (16, 8, 1024, 10_000)
    assert (rl.rewards, rl.template, cold.template) == (
        ("fuzzy", "format"), "vlm_r1", "r1_onevision")  # fmt: skip
    assert settings("r1_vision")["cold_start"].mask == "completion"  # all that is published


def test_the_published_settings_are_those_of_mm_eureka():
    """Its two training scripts: 128 prompts x 8; updates of 64, and of 128 completions."""
    found = settings("mm_eureka")
    sieve, one, two = found["neither_all_nor_none"], found["rl"], settings("mm_eureka_qwen")["grpo"]
    assert (sieve.n, sieve.above, sieve.below, sieve.rewards) == (8, 0, 1, ("math",))
    for cfg in (one, two):
        assert (cfg.prompts, cfg.group, cfg.max_new, cfg.beta) == (128, 8, 4096, 0)
        assert (cfg.rewards, cfg.reward_weights) == (("math", "format(around=1)"), (1.0, 0.5))
    assert (one.advantage, one.lr, one.max_prompt, one.mean) == ("baseline", 3e-7, 2048, "sequence")
    assert one.prompts * one.group // one.minibatches == 64 and one.steps == 54_931 // 128
    assert (two.advantage, two.lr, two.max_prompt, two.freeze) == (
        "group", 1e-6, 3000, ("vision", "merger"))  # fmt: skip
    assert two.prompts * two.group // two.minibatches == 128 and two.steps == 10 * 15_000 // 128
    assert (two.least_right, two.most_right, two.ratio_cap, two.adora) == (0.1, 0.9, 3.0, 0.1)


def test_the_published_settings_are_those_of_curr_reft_and_lmm_r1():
    """Train_sh_files: 8 GPUs x 1 prompt; reject_sft_all.sh: 8 x 1 x 4 rows; LMM-R1's table A7."""
    found = settings("curr_reft")
    for name, steps, group in (("judge", 500, 4), ("choice", 500, 2), ("open", 2300, 4)):
        cfg = found[name]
        assert (cfg.steps, cfg.group, cfg.prompts, cfg.max_prompt) == (steps, group, 8, 2048)
        assert (cfg.min_pixels, cfg.max_pixels, cfg.lr, cfg.beta) == (262144, 410000, 1e-6, 0.04)
    reject = found["reject_sft"]
    assert (reject.lr, reject.batch, reject.epochs, reject.max_length, reject.warmup) == (
        2e-7, 32, 3, 8192, 0.05)  # fmt: skip
    assert found["judged"].above == 85 and reject.model == "{open}" and reject.freeze == ()
    found = settings("lmm_r1")
    assert [(c.prompts, c.lr, c.group, c.max_new) for c in found.values()] == [
        (128, 1e-6, 16, 8192), (256, 4e-7, 16, 8192)]  # fmt: skip
    for cfg in found.values():
        assert (cfg.advantage, cfg.kl, cfg.beta, cfg.mean) == ("baseline", "reward", 1e-3, "token")
        assert (cfg.rewards, cfg.reward_weights) == (("math", "format(strict=1)"), (1.0, 0.5))
        assert cfg.warmup / cfg.steps == pytest.approx(0.03, abs=0.003)
    assert found["words"].steps == 40_300 // 128 and found["pictures"].steps == 2 * 65_000 // 256
