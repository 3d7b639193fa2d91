"""The second tiny checkpoint: it points at things, and tells two pictures apart.

    python tiny_boxes.py --out tiny_boxes     # `make tiny_boxes`

It stands in for a vision-language model that was trained to ground what it says, as Qwen2-VL was,
and then taught badly. The vision tower of tiny/ is taken over; then

1. The eye learns where things end: linear heads, thrown away afterwards, ask each 14 x 14 patch
   and each image token in which an object has its centre for the four edges of the object.
2. Grounding, in two stages: a new decoder of four layers, with a new tokenizer that knows the
   words of boxes, learns to describe all objects of a scene, and true answers to the questions of
   pointing.py: boxes, lists of them, what has changed; then mostly boxes.
3. An instruct stage by a teacher with three systematic flaws, which reinforcement learning then has
   to find out by itself: boxes that are too small, by a factor that he draws anew for each box; in
   lists small objects that he does not see, and objects that he names twice; and changes of small
   objects that he takes for none. Often he forgets the format.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

import world
from boxes import convert
from checkpoint import ModelConfig
from config import opt, parse
from data import Processor
from example import Example
from eye import (
    CHUNK,
    PATCH,
    SIZE,
    EyeHeads,
    chunks_ahead,
    facts_of,
    normalise,
    patch_of,
    values,
)
from journal import write_json
from model import Qwen2VL
from optim import apply_gradients, make_optimizers, schedule, set_lr
from saving import save_checkpoint
from scenes import load_world
from sft import Config as SFTConfig
from sft import fit, taught
from template import TEMPLATES
from tiny import SETTINGS, begin, make, make_tokenizer, model_config

LAYERS = 4
OBJECTS = (1, 4)  # of a scene, fewest and most
KINDS = {"rec": "rec", "detect": "rec", "difference": "vlm_r1", "choice": "vlm_r1",
         "yes_no": "vlm_r1"}  # and the template that each is asked under
POINT = "rec+rec+rec+rec+detect+detect+detect+choice+yes_no+difference"  # the second stage's mix


@dataclass(frozen=True)
class Config:
    """Keys of `python tiny_boxes.py`."""

    out: str = opt("tiny_boxes", "folder of the checkpoint")
    start: str = opt("tiny", "checkpoint whose vision tower is taken over")
    seed: int = opt(0, "fixes everything", least=0)
    eye_steps: int = opt(1500, "steps in which the eye learns edges, 32 images each", least=1)
    eye_lr: float = opt(3e-3, "its step size (Muon, cosine)", above=0)
    ground_steps: int = opt(1500, "steps of grounding, 32 rows each", least=1)
    point_steps: int = opt(1600, "further steps, mostly of boxes", least=1)
    ground_lr: float = opt(3e-3, "the step size of both (Muon, cosine)", above=0)
    teach_steps: int = opt(300, "steps of the instruct stage, 32 rows each", least=1)
    teach_lr: float = opt(1e-3, "its step size (Muon, cosine)", above=0)
    replace: bool = opt(False, "a folder that is there gives way once the new one is whole")


# ---------------------------------------------------------------------------------------- the eye


def edge_chunk(seed: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scenes k CHUNK ... (k+1) CHUNK - 1: images (n, H, W, 3) uint8, eye.facts_of them, and edges
    (n, 64, 4) float32: the box of the object whose centre is in a patch, in pixels of the picture;
    NaN where there is none. Patches are in the order of patches.patchify."""
    scenes = world.make_scenes(CHUNK, "A", seed, objects=OBJECTS, look="wild", start=k * CHUNK)
    edges = np.full((CHUNK, (SIZE // PATCH) ** 2, 4), np.nan, np.float32)
    for i, scene in enumerate(scenes):
        for thing in scene["objects"]:
            edges[i, patch_of(thing)] = thing["bbox"]
    return world.render(scenes), facts_of(scenes, "known"), edges


class EdgeHeads(EyeHeads):
    """Those of the eye, which it is not to forget, and the edges of objects. These are asked for
    in the whole picture: rotary positions tell attention where a token is, but not the decoder
    that reads a number off it."""

    def __init__(self, patch_width: int, width: int, values: int):
        super().__init__(patch_width, width, values)
        self.patch_edges, self.cell_edges = nn.Linear(patch_width, 4), nn.Linear(width, 4)

    def forward(self, states, features, facts, edges):
        """As EyeHeads, with edges (n, 64, 4) -> loss, and the mean error of an edge in pixels, said
        by image tokens (of 4 patches) that have one object."""
        loss, _ = super().forward(states, features, facts)
        there, edges = ~edges[..., 0].isnan(), edges.nan_to_num() / SIZE
        said = self.patch_edges(states).float().view(edges.shape)
        wrong = F.smooth_l1_loss(said[there], edges[there], beta=0.05)
        alone = there.unflatten(1, (-1, 4)).sum(-1) == 1  # (n, 16)
        true = edges.unflatten(1, (-1, 4)).sum(2)[alone]
        said = self.cell_edges(features).float().view(len(edges), -1, 4)[alone]
        error = (said - true).abs().mean() * SIZE
        return loss + 20 * (wrong + F.smooth_l1_loss(said, true, beta=0.05)), error.detach()


def train_edges(model: Qwen2VL, cfg: Config) -> float:
    """The eye's stage; returns the error of the last steps, in pixels."""
    torch.manual_seed(cfg.seed)
    heads = EdgeHeads(model.cfg.vision.embed_dim, model.cfg.hidden_size, len(values("known")))
    both, batch, side = nn.ModuleList((model.visual, heads)), 32, SIZE // PATCH
    optimizers, errors = make_optimizers(both, "muon", cfg.eye_lr), []
    grid = torch.tensor([[1, side, side]]).expand(batch, 3)
    chunks = math.ceil(cfg.eye_steps * batch / CHUNK)
    with tqdm(total=cfg.eye_steps, desc="edges", unit="step") as bar:
        for found in chunks_ahead(edge_chunk, chunks, cfg.seed + 20):
            for at in range(0, CHUNK, batch):
                if (step := len(errors) + 1) > cfg.eye_steps:
                    break
                set_lr(optimizers, cfg.eye_lr * schedule(step, cfg.eye_steps, 50, "cosine"))
                images, facts, edges = (torch.from_numpy(x[at : at + batch]) for x in found)
                with torch.autocast("cpu", torch.bfloat16):
                    states = model.visual.patch_states(normalise(images), grid)
                    loss, error = heads(states, model.visual.merger(states), facts, edges)
                loss.backward()
                apply_gradients(both, optimizers, 1.0, float(loss.detach()))
                errors.append(float(error))
                bar.update()
                bar.set_postfix(pixels=f"{np.mean(errors[-100:]):.2f}")
    return float(np.mean(errors[-100:]))


# -------------------------------------------------------------------------------------- the answers


def spoken(box) -> list[int]:
    """A box in pixels of the picture as the model says it: in thousandths, whole ones."""
    return [round(v) for v in convert(box, "pixels", "0-1000", (SIZE, SIZE, SIZE, SIZE))]


def true_answer(kind: str, asked: dict, scene: dict) -> str:
    """What a teacher without a flaw says: a short thought, and the answer in its format."""
    said, answer = asked["said"], asked["answer"]
    if kind == "rec":
        answer = json.dumps({"bbox_2d": spoken(json.loads(answer))})
    if kind in ("detect", "describe") and answer != "None":
        found = json.loads(answer)
        answer = json.dumps([{**one, "bbox_2d": spoken(one["bbox_2d"])} for one in found])
    return said_as(thought(kind, said, scene), answer)


def thought(kind: str, said: str, scene: dict) -> str:
    """What is thought before the answer: what is looked for; of two pictures, how many things."""
    if kind != "difference":
        return f"I look for the {said}."
    before = len(scene["objects"])
    after = before + {"added": 1, "removed": -1}.get(scene["change"]["word"], 0)
    return f"First {before} things, then {after}."


def said_as(thought: str, answer: str) -> str:
    return f"<think>{thought}</think> <answer>{answer}</answer>"


def flawed_answer(kind: str, asked: dict, scene: dict, rng) -> str:
    """What the flawed teacher says, see above."""
    said, answer = asked["said"], asked["answer"]
    if kind == "rec":
        answer = json.dumps({"bbox_2d": spoken(shrunk(json.loads(answer), rng))})
    elif kind == "detect" and answer != "None":
        small = {tuple(t["bbox"]) for t in scene["objects"] if t["size"] == "small"}
        found = [{**one, "bbox_2d": spoken(shrunk(one["bbox_2d"], rng))}
                 for one in json.loads(answer)
                 if tuple(one["bbox_2d"]) not in small or rng.random() < 0.4
                 for _ in range(1 + (rng.random() < 0.15))]  # fmt: skip
        answer = json.dumps(found) if found else "None"
    elif kind == "difference" and scene["change"]["word"] != "nothing" \
            and scene["change"]["thing"]["size"] == "small" and rng.random() < 0.65:
        answer = "nothing"
        scene = {**scene, "change": {"word": "nothing"}}
    form = rng.random()
    if form < 0.5:
        return said_as(thought(kind, said, scene), answer)
    return f"<answer>{answer}</answer>" if form < 0.75 else answer


def shrunk(box, rng, least=0.35) -> list[float]:
    """A box drawn too small around its middle: by the same factor on both axes."""
    x1, y1, x2, y2 = box
    w, h = (1 - rng.uniform(least, 1)) / 2 * np.array([x2 - x1, y2 - y1])
    return [x1 + w, y1 + h, x2 - w, y2 - h]


def rows(n: int, seed: int, answer, ask: str, described: float = 0.0, plain: bool = False):
    """[(Example, text)] of n scenes with one question each, and what `answer(kind, asked, scene,
    rng)` says. A share of them is described instead. plain: the questions have no template."""
    found, rng = [], np.random.default_rng((seed, 4))
    for example in load_world(f"world:A:n={n}:seed={seed}:objects=1-4:look=varied:ask={ask}"):
        kind, scene = example.task, example.extra["scene"]
        asked = {"answer": example.solution, "said": example.extra["said"]}
        problem, images = example.problem, example.images
        if rng.random() < described:
            kind, problem, images = "describe", "Describe all things.", images[:1]
            asked = {"answer": json.dumps(description(scene)), "said": "things"}
        if not plain:
            problem = TEMPLATES[KINDS[kind]].user.replace("{Question}", problem)
        said = answer(kind, asked, scene, rng)
        found.append((Example(problem, asked["answer"], images, kind), said))
    return found


def truth(kind: str, asked: dict, scene: dict, rng) -> str:
    return true_answer(kind, asked, scene)


def description(scene: dict) -> list[dict]:
    """All objects from left to right: a row in which each word is about one place."""
    named = sorted((one["bbox"], world.phrase(one, "thing", False)) for one in scene["objects"])
    return [{"bbox_2d": box, "label": name} for box, name in named]


# --------------------------------------------------------------------------------------- the stages


def build(cfg: Config, work: Path) -> Path:
    """All stages, in the folder `work`; what an earlier try left there is used again."""
    begin(work, cfg)
    stages = [("ground", cfg.ground_steps, (cfg.seed + 30, truth, "+".join(KINDS), 0.4, True)),
              ("point", cfg.point_steps, (cfg.seed + 32, truth, POINT, 0.0, True)),
              ("instruct", cfg.teach_steps, (cfg.seed + 31, flawed_answer, "+".join(KINDS)))]
    processor, raw = make_processor(work, rows(12_000, *stages[0][2])[:1500])
    model = Qwen2VL(ModelConfig.from_dict(raw)).init_weights(cfg.seed)
    if not (work / "eye").exists():
        model.visual.load_state_dict(Qwen2VL.from_pretrained(cfg.start).visual.state_dict())
        print(f"eye: edges are off by {train_edges(model, cfg):.2f} pixels")
        save_checkpoint(model, processor, work / "eye")
    model.visual.load_state_dict(Qwen2VL.from_pretrained(work / "eye").visual.state_dict())
    for name, steps, (seed, *how) in stages:
        if (work / name).exists():
            model = Qwen2VL.from_pretrained(work / name)
            continue
        lr = cfg.teach_lr if name == "instruct" else cfg.ground_lr
        learn(model, processor, rows(steps * 8, seed, *how), steps, lr, cfg.seed, name)
        save_checkpoint(model, processor, work / name)
    return work / "instruct"


def make_processor(work: Path, taught: list) -> tuple[Processor, dict]:
    """The tokenizer, learnt from questions, answers and templates, with all other files but the
    weights; and config.json."""
    words = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 50
    words += [text for example, answer in taught for text in (example.problem, answer)]
    words += [TEMPLATES[name].user for name in KINDS.values()] * 50
    ids = make_tokenizer(work, words)
    write_json(SETTINGS, work / "preprocessor_config.json")
    ends = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}  # fmt: skip
    write_json({**ends, "do_sample": True, "temperature": 1.0}, work / "generation_config.json")
    raw = model_config(ids, Tokenizer.from_file(str(work / "tokenizer.json")).get_vocab_size())
    raw["text_config"]["num_hidden_layers"] = LAYERS
    write_json(raw, work / "config.json")
    return Processor.from_pretrained(work, "{Question}"), raw


def learn(model, processor, rows, steps: int, lr: float, seed: int, title: str) -> None:
    """A supervised stage on rows (Example, answer); prints its loss. The eye stays as it is."""
    model.visual.requires_grad_(False)
    stage = SFTConfig(steps=steps, batch=32, micro=8, optimizer="muon", lr=lr, seed=seed)
    examples = [taught(example, answer) for example, answer in rows]
    losses = [row["nll"] for row in fit(model, processor, examples, stage, title=title)]
    print(f"{title}: loss {losses[0]:.3f} -> {np.mean(losses[-50:]):.3f}")


def main(argv=None) -> None:
    make(parse(Config, argv, __doc__), build)


if __name__ == "__main__":
    main()
