"""R1-V's claims in miniature: supervised answers, supervised thoughts and GRPO from one start.

    python paper.py                # `make paper`: three seeds; goes on where it was stopped
    python paper.py --plot_only    # table and picture again, from bench/paper.json

R1-V (github.com/Deep-Agent/R1-V) says: a verifiable reward teaches a small vision-language model to
count; it does so better than imitating chains of thought, above all out of distribution; and it
does not take long. Here every method starts from the tiny checkpoint and takes the steps of
recipes/tiny.toml, over the same pictures:

    base           no training
    SFT answers    learns the right answer under the direct prompt
    SFT thoughts   learns to list the objects, then the right answer, under the think prompt
    GRPO think     the think prompt; accuracy and format are rewarded
    GRPO direct    the direct prompt; accuracy is rewarded

and once more with 256 pictures instead of 11,200, each seen 44 times. All are asked held-out
questions under both prompts: A (how many items), A_attribute (how many red cubes), B (the same with
the colours of cubes and cylinders swapped) and C (other shapes on another ground).
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import forms
import grpo
import parallel
import world
from config import opt, parse, read
from controls import cell, learn, present, save
from data import Processor
from evaluate import evaluate, load_evals
from journal import newest_checkpoint, write_json
from model import Qwen2VL

EVALS = ("A=world:A:n=500", "A_attribute=world:A:n=500:ask=attribute", "B=world:B:n=500",
         "C=world:C:n=500")  # fmt: skip
PROMPTS = ("r1v", "direct")
FEW = "world:A:n=256:look=wild:ask=count+count+count+attribute:seed={}"  # each seed's own pictures
# name: (prompt that it is trained under, what it learns from, few pictures or all, colour)
METHODS = {
    "base": ("r1v", None, False, "#9a9a9a"),
    "SFT answers": ("direct", "answers", False, "#8fc79b"),
    "SFT thoughts": ("r1v", "thoughts", False, "#4b9b5f"),
    "GRPO think": ("r1v", ("accuracy", "format"), False, "#1f6fb4"),
    "GRPO direct": ("direct", ("accuracy",), False, "#8db7dc"),
    "SFT answers, 256": ("direct", "answers", True, "#8fc79b"),
    "SFT thoughts, 256": ("r1v", "thoughts", True, "#4b9b5f"),
    "GRPO think, 256": ("r1v", ("accuracy", "format"), True, "#1f6fb4"),
}


@dataclass(frozen=True)
class Config:
    """Keys of `python paper.py`."""

    recipe: str = opt("recipes/tiny.toml", "start, pictures and steps of every method")
    seeds: int = opt(3, "seeds 0 ... n-1 of each method", least=1)
    max_new: int = opt(80, "tokens of an answer in the evaluations at most", least=1)
    out: str = opt("bench/paper.json", "results; a method and seed that it holds is not run again")
    picture: str = opt("docs/paper.png", "the plot of them")
    plot_only: bool = opt(False, "table and picture of the results that are there")


# ----------------------------------------------------------------------------------- what is learnt


def right_answer(example) -> str:
    """`<answer>3</answer>`."""
    return forms.wrapped(example.solution)


def thought(example) -> str:
    """A chain of thought that is right: the objects that are asked for, numbered from left to
    right, as a teacher who reads the scene's description would go through them."""
    scene, program = (example.extra[key] for key in ("scene", "program"))
    return forms.listed(scene, {}, forms.in_order(scene, world.execute(program[:-1], scene)), None)


TARGETS = {"answers": right_answer, "thoughts": thought}

# ----------------------------------------------------------------------------------------- the runs


def train(name: str, recipe: str, seed: int) -> str:
    """Trains the method of that name; returns the folder of its checkpoint."""
    template, learns, few, _ = METHODS[name]
    out = Path("runs/paper") / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    words = ["--seed", str(seed), "--template", template, "--out", str(out), "--evals", ""]
    words += ["--data", FEW.format(seed)] if few else []
    base = read(grpo.Config, [recipe, *words])
    if learns is None:
        return base.model
    shutil.rmtree(out, ignore_errors=True)
    if isinstance(learns, tuple):
        grpo.train(replace(base, rewards=learns, probes=0))
        return newest_checkpoint(str(out))
    learn(base, TARGETS[learns], out)
    return newest_checkpoint(str(out))


def examine(folder: str, evals: dict, max_new: int) -> dict:
    """Summaries of a checkpoint on every eval: {prompt: {eval: summary}}."""
    model = Qwen2VL.from_pretrained(folder, device=parallel.start())
    found = {}
    for template in PROMPTS:
        processor = Processor.from_pretrained(folder, template)
        for name, examples in evals.items():
            full = evaluate(model, processor, examples, 100, max_new, title=f"{template}: {name}")
            del full["results"]
            found.setdefault(template, {})[name] = full
    return found


def run_all(cfg: Config) -> dict:
    """What cfg.out holds after every method and seed that it did not hold is run:
    {"results": {method: {seed: {prompt: {eval: summary}}}}, "seconds": {method: {seed: s}}, ...}"""
    found = {"recipe": cfg.recipe, "torch": torch.__version__, "results": {}, "seconds": {}}
    if Path(cfg.out).is_file():
        found = json.loads(Path(cfg.out).read_text())
    evals = load_evals(EVALS)
    for seed in map(str, range(cfg.seeds)):
        for name in METHODS:
            if seed in found["results"].get(name, {}) or (name == "base" and seed != "0"):
                continue
            begin = time.perf_counter()
            folder = train(name, cfg.recipe, int(seed))
            seconds = time.perf_counter() - begin
            found["results"].setdefault(name, {})[seed] = examine(folder, evals, cfg.max_new)
            found["seconds"].setdefault(name, {})[seed] = round(seconds, 1)
            write_json(found, cfg.out)
    return found


# -------------------------------------------------------------------------------- table and picture


def summaries(found: dict, name: str, own: bool = True) -> dict[str, list[dict]]:
    """{eval: [summary of each seed]} of a method, under the prompt that it was trained with or
    under the other one."""
    prompt = next(p for p in PROMPTS if (p == METHODS[name][0]) == own)
    runs = [run[prompt] for run in found["results"][name].values()]
    return {key: [run[key] for run in runs] for key in runs[0]}


def show(found: dict) -> str:
    """A Markdown table: greedy accuracy under the method's own prompt, on A under the other one
    too; tokens of an answer on A."""
    names = [item.partition("=")[0] for item in EVALS]
    heads = ["", "prompt", *names, f"{names[0]}, other prompt", "tokens"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, (prompt, *_) in METHODS.items():
        own, other = summaries(found, method), summaries(found, method, own=False)
        columns = [*(own[name] for name in names), other[names[0]]]
        shown = [cell([s["accuracy"] for s in column]) for column in columns]
        tokens = np.mean([s["length"] for s in own[names[0]]])
        prompt = "think" if prompt == "r1v" else prompt
        lines.append(f"| {' | '.join([method, prompt, *shown, f'{tokens:.0f}'])} |")
    return "\n".join(lines)


def plot(found: dict, path: str) -> None:
    """Greedy accuracy of every method under its own prompt, a dot per seed; left with all pictures,
    right with few. The line is the base under the think prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [item.partition("=")[0] for item in EVALS]
    base = [summaries(found, "base")[name][0]["accuracy"] for name in names]
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for ax, few, title in zip(axes, (False, True), ("11,200 pictures", "256 pictures, 44 times")):
        shown = [name for name in METHODS if METHODS[name][1] and METHODS[name][2] == few]
        for i, method in enumerate(shown):
            own = summaries(found, method)
            values = np.array([[s["accuracy"] for s in own[name]] for name in names])
            x = np.arange(len(names)) + (i - (len(shown) - 1) / 2) * 0.19
            label = method.partition(",")[0]
            ax.bar(x, values.mean(1), 0.18, color=METHODS[method][3], label=label)
            for j in range(values.shape[1]):
                ax.plot(x, values[:, j], ".", color="black", ms=2.5)
        for x, y in enumerate(base):
            label = None if x else "base"
            ax.hlines(y, x - 0.4, x + 0.4, color="#555555", lw=1.2, label=label)
        ax.set_xticks(range(len(names)), names)
        ax.set(title=title, ylim=(0, 1))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("greedy accuracy, held-out")
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="lower center", ncols=5, frameon=False, fontsize=9)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    save(fig, path)


def main(argv=None) -> None:
    present(parse(Config, argv, __doc__), run_all, show, plot)


if __name__ == "__main__":
    main()
