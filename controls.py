"""Control runs: what else could have made the tiny model better than GRPO's verifier did?

    python controls.py                 # `make controls`: three seeds, about 22 minutes on 2 cores
    python controls.py --plot_only     # the picture again, from bench/controls.json

Every run starts from the same checkpoint and sees the same images as recipes/tiny.toml:

    start         no training
    flawed SFT    more of the flawed teacher who taught the start
    format only   GRPO with the format reward alone
    GRPO          recipes/tiny.toml
    clean SFT     a teacher who sees everything and always answers in format: the upper bound
"""

import json
import platform
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import grpo
import parallel
from config import opt, parse, read
from data import Processor
from evaluate import evaluate_all, load_evals
from journal import write_json
from lora import Learns, set_learning
from model import Qwen2VL
from rows import load_examples
from saving import save_checkpoint
from sft import Config as SFTConfig
from sft import fit, taught
from tiny import STYLES, taught_answer

COLOURS = {"start": "#9a9a9a", "flawed SFT": "#c58b3b", "format only": "#8064a2",
           "GRPO": "#1f6fb4", "clean SFT": "#4b9b5f"}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Keys of `python controls.py`."""

    recipe: str = opt("recipes/tiny.toml", "the run that is controlled")
    seeds: int = opt(3, "seeds 0 ... n-1 of each kind of run", least=1)
    out: str = opt("bench/controls.json", "results")
    picture: str = opt("docs/controls.png", "the plot of them")
    overlook: float = opt(0.22, "the flawed teacher's, as in tiny.py", least=0)
    plot_only: bool = opt(False, "draw the picture of the results that are there")


def learn(run: grpo.Config, teach, out: Path) -> tuple[Qwen2VL, Processor]:
    """SFT of the start on the rows of the run, one pass with its prompt, steps and optimizer; the
    checkpoint goes to `out`. teach(example) is the text to learn."""
    model = Qwen2VL.from_pretrained(run.model, device=parallel.start())
    set_learning(model, Learns(freeze=run.freeze))
    processor = Processor.from_pretrained(run.model, run.template)
    examples = load_examples(run.data, run.images, part="train")
    rows = [taught(example, teach(example)) for example in examples]
    stage = SFTConfig(steps=run.steps, batch=run.prompts, micro=run.prompts, seed=run.seed,
                      optimizer=run.optimizer, lr=run.lr, schedule=run.schedule, warmup=run.warmup)
    list(fit(model, processor, rows, stage, title=out.name))
    shutil.rmtree(out, ignore_errors=True)
    save_checkpoint(model, processor, out / f"step_{run.steps:06d}")
    return model, processor


def run_sft(cfg, run: grpo.Config, evals: dict, overlook: float, styles, out: Path) -> dict:
    """SFT by a teacher who overlooks and speaks so; its evaluation."""
    rng = np.random.default_rng((run.seed, 5))
    model, processor = learn(
        run, lambda e: taught_answer(e.extra["scene"], e.extra, overlook, rng, styles), out
    )
    return evaluate_all(model, processor, evals, run.max_new, out, "after")


def run_all(cfg: Config) -> dict:
    """Results of every run: {kind: {eval: [summary of each seed]}}, curves: {kind: [[...]]}."""
    found, curves = {}, {}
    for seed in range(cfg.seeds):
        base = read(grpo.Config, [cfg.recipe, "--seed", str(seed)])
        evals = load_evals(base.evals)
        kinds = {"GRPO": [], "format only": ["--rewards", "format"]}
        after = {}
        for kind, extra in kinds.items():
            out = Path(f"runs/controls_{kind.replace(' ', '_')}_{seed}")
            shutil.rmtree(out, ignore_errors=True)
            words = [cfg.recipe, "--seed", str(seed), "--out", str(out), *extra]
            summary = grpo.train(read(grpo.Config, words))
            after[kind], after["start"] = summary["after"], summary["before"]
            lines = (out / "metrics.jsonl").read_text().splitlines()
            curves.setdefault(kind, []).append([json.loads(x) for x in lines])
        sft = partial(run_sft, cfg, base, evals)
        after["flawed SFT"] = sft(cfg.overlook, STYLES, Path(f"runs/controls_flawed_{seed}"))
        after["clean SFT"] = sft(0.0, STYLES[:2], Path(f"runs/controls_clean_{seed}"))
        for kind, results in after.items():
            for name, summary in results.items():
                found.setdefault(kind, {}).setdefault(name, []).append(summary)
    keys = ("step", "reward/accuracy", "reward/format", "length/mean", "entropy")
    thin = {
        kind: [[{k: row[k] for k in keys if k in row} for row in run] for run in runs]
        for kind, runs in curves.items()
    }
    return {"recipe": cfg.recipe, "seeds": cfg.seeds, "torch": torch.__version__,
            "python": platform.python_version(), "results": found, "curves": thin}  # fmt: skip


def cell(values: list[float]) -> str:
    """Mean, and lowest and highest where they differ."""
    spread = f" ({min(values):.3f}-{max(values):.3f})" if max(values) > min(values) else ""
    return f"{np.mean(values):.3f}{spread}"


def show(found: dict) -> str:
    """A Markdown table: greedy accuracy, mean over seeds, lowest and highest beside it."""
    kinds = [k for k in COLOURS if k in found["results"]]
    names = list(found["results"][kinds[0]])
    lines = ["| | " + " | ".join(names) + " | format on A |", "|---" * (len(names) + 2) + "|"]
    for kind in kinds:
        results = found["results"][kind]
        cells = [cell([s["accuracy"] for s in results[name]]) for name in names]
        form = np.mean([s["format"] for s in results[names[0]]])
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {form:.2f} |")
    return "\n".join(lines)


def plot(found: dict, path: str) -> None:
    """Left: sampled accuracy while GRPO trains, a line per seed (mean of 21 steps). Right: greedy
    accuracy after, a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1, 1.9))
    for kind, runs in found["curves"].items():
        for run in runs:
            steps = [r["step"] for r in run]
            share = [r.get("reward/accuracy", np.nan) for r in run]
            left.plot(steps, share, ".", color=COLOURS[kind], ms=2, alpha=0.2, mew=0)
            mean = [np.mean(share[max(0, k - 10) : k + 11]) for k in range(len(share))]
            left.plot(steps, mean, color=COLOURS[kind], lw=1.3)
    left.set(xlabel="step", ylabel="sampled accuracy, training questions", ylim=(0, 1))
    kinds = [k for k in COLOURS if k in found["results"]]
    names = list(found["results"][kinds[0]])
    for i, kind in enumerate(kinds):
        x = np.arange(len(names)) + (i - (len(kinds) - 1) / 2) * 0.16
        values = np.array([[s["accuracy"] for s in found["results"][kind][n]] for n in names])
        right.bar(x, values.mean(1), 0.15, color=COLOURS[kind], label=kind)
        for j in range(values.shape[1]):
            right.plot(x, values[:, j], ".", color="black", ms=2.5)
    right.set_xticks(range(len(names)), names)
    right.set(ylabel="greedy accuracy, held-out", ylim=(0, 1))
    right.legend(ncols=len(kinds), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.14),
                 frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    fig.tight_layout()
    save(fig, path)


def save(fig, path: str) -> None:
    """Writes a figure, and lets go of it."""
    import matplotlib.pyplot as plt

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def present(cfg, run_all, show, plot) -> None:
    """A study: run_all() writes cfg.out unless there is only to plot; then prints show() and draws
    plot() of the results that are there. SystemExit if there are none."""
    if not cfg.plot_only:
        run_all(cfg)
    if not Path(cfg.out).is_file():
        raise SystemExit(f"error: {cfg.out}: no results; run without --plot_only first")
    found = json.loads(Path(cfg.out).read_text())
    print(show(found))
    plot(found, cfg.picture)


def main(argv=None) -> None:
    present(parse(Config, argv, __doc__), lambda cfg: write_json(run_all(cfg), cfg.out), show, plot)


if __name__ == "__main__":
    main()
