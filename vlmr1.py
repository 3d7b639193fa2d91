"""VLM-R1's claims in miniature: boxes by reinforcement or by imitation, and what a reward invites.

    python vlmr1.py                # `make vlmr1`: three seeds; goes on where it was stopped
    python vlmr1.py --plot_only    # table and picture again, from bench/vlmr1.json

VLM-R1 (arXiv 2504.07615; om-ai-lab's notes of 2025-03-20) says: of referring expressions,
reinforcement learns something that holds out of distribution, where supervised training on the same
boxes falls; and that AP alone, as the reward of detection, teaches a model to name boxes without
end, which a penalty for their number ends. Here all start from the tiny checkpoint that points at
things, and take the steps of recipes/tiny_rec.toml, tiny_detect.toml and tiny_difference.toml:

    rec         GRPO, or supervised training on the true boxes of the same pictures
    detect      GRPO with the reward AP x penalty, or with AP alone
    difference  GRPO

All are asked held-out questions of A, of B (the colours of cubes and cylinders swapped) and of C
(other shapes on another ground).
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import grpo
from config import opt, parse, read
from controls import cell, learn, present, save
from evaluate import evaluate_all, load_evals
from journal import write_json
from rewards import ANSWER
from tiny_boxes import true_answer

# task: (recipe, the number that is shown, {method: keys of the recipe, or None: supervised})
TASKS = {
    "rec": ("recipes/tiny_rec.toml", "iou", {"GRPO": [], "SFT": None}),
    "detect": ("recipes/tiny_detect.toml", "ap50", {
        "GRPO": [], "GRPO, AP alone": ["--rewards", "detection(penalty=0),format"]}),
    "difference": ("recipes/tiny_difference.toml", "accuracy", {"GRPO": []}),
}  # fmt: skip
SHOWN = {"rec": ("iou", "accuracy"), "detect": ("ap", "ap50", "precision", "recall", "length"),
         "difference": ("accuracy",)}  # fmt: skip
COLOURS = {"start": "#9a9a9a", "GRPO": "#1f6fb4", "SFT": "#4b9b5f", "GRPO, AP alone": "#d1663b"}
CURVES = ("step", "length/mean", "reward")


@dataclass(frozen=True)
class Config:
    """Keys of `python vlmr1.py`."""

    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of each method", least=0)
    tasks: tuple[str, ...] = opt(tuple(TASKS), "which of them", choices=tuple(TASKS))
    out: str = opt("bench/vlmr1.json", "results; a method and seed that it holds is not run again")
    picture: str = opt("docs/vlmr1.png", "the plot of them")
    plot_only: bool = opt(False, "table and picture of the results that are there")


# ----------------------------------------------------------------------------------------- the runs


def true_box(example) -> str:
    """What supervised training learns: the box, in the asked format, without a thought."""
    asked = {"answer": example.solution, "said": example.extra["said"]}
    answer = true_answer("rec", asked, example.extra["scene"])
    return answer[answer.index(ANSWER[0]):]


def train(task: str, method: str, seed: int) -> dict:
    """Trains the method; {"before", "after": {eval: summary}, "curve": [...], "seconds"}."""
    recipe, _, methods = TASKS[task]
    out = Path("runs/vlmr1") / f"{task}_{method.replace(', ', '_').replace(' ', '_')}_{seed}"
    words = [recipe, "--seed", str(seed), "--out", str(out), *(methods[method] or [])]
    run, begin = read(grpo.Config, words), time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    if methods[method] is not None:
        found = grpo.train(run)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found["curve"] = [{key: row.get(key) for key in CURVES} for row in rows]
    else:
        model, processor = learn(run, true_box, out)
        evals = load_evals(run.evals, run.scorer)
        found = {"after": evaluate_all(model, processor, evals, run.max_new, out, "after",
                                       run.scorer)}  # fmt: skip
    kept = {key: found[key] for key in ("before", "after", "curve") if key in found}
    return {**kept, "seconds": round(time.perf_counter() - begin, 1)}


def run_all(cfg: Config) -> None:
    """Writes cfg.out after every run: {"results": {task: {method: {seed: see train}}}, "torch"}."""
    for seed in map(str, cfg.seeds):
        for task in cfg.tasks:
            for method in TASKS[task][2]:
                if seed in read_results(cfg.out)["results"].get(task, {}).get(method, {}):
                    continue
                one = train(task, method, int(seed))
                found = read_results(cfg.out)  # anew: another process may fill it too
                found["results"].setdefault(task, {}).setdefault(method, {})[seed] = one
                write_json(found, cfg.out)


def read_results(out: str) -> dict:
    """What the file holds, or nothing yet."""
    if Path(out).is_file():
        return json.loads(Path(out).read_text())
    return {"torch": torch.__version__, "results": {}}


# -------------------------------------------------------------------------------- table and picture


def summaries(found: dict, task: str, method: str) -> list[dict]:
    """[{eval: summary}, ...] of each seed; of "start", what GRPO began with."""
    runs = found["results"][task]["GRPO" if method == "start" else method].values()
    runs = [run["before" if method == "start" else "after"] for run in runs]
    return runs[:1] if method == "start" else runs


def show(found: dict) -> str:
    """A Markdown table: mean over seeds, lowest and highest, on A, B and C."""
    lines = ["| task | | | A | B | C |", "|---" * 6 + "|"]
    for task, methods in found["results"].items():
        for key in SHOWN[task]:
            for method in ("start", *methods):
                runs = summaries(found, task, method)
                cells = [cell([run[name][key] or 0.0 for run in runs]) for name in "ABC"]
                lines.append(f"| {' | '.join([task, key, method, *cells])} |")
    return "\n".join(lines)


def plot(found: dict, path: str) -> None:
    """Left: what each method reaches, a dot per seed. Right: tokens of a sampled list of boxes, a
    line per seed, with the penalty and without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(found["results"])
    fig, axes = plt.subplots(1, len(tasks) + 1, figsize=(3.3 * len(tasks) + 3.3, 3.4))
    for ax, task in zip(axes, tasks):
        methods = ("start", *found["results"][task])
        for i, method in enumerate(methods):
            x = np.arange(3) + (i - (len(methods) - 1) / 2) * 0.26
            runs = summaries(found, task, method)
            values = np.array([[run[name][TASKS[task][1]] or 0.0 for run in runs]
                               for name in "ABC"])  # fmt: skip
            ax.bar(x, values.mean(1), 0.25, color=COLOURS[method], label=method)
            for column in values.T:
                ax.plot(x, column, ".", color="black", ms=2.5)
        ax.set_xticks(range(3), "ABC")
        label = {"iou": "mean IoU", "ap50": "AP@.5"}.get(TASKS[task][1], TASKS[task][1])
        ax.set(title=f"{task}: {label}", ylim=(0, 1))
        ax.legend(fontsize=7, frameon=False)
    for method, runs in found["results"].get("detect", {}).items():
        for i, run in enumerate(runs.values()):
            data = [(row["step"], row["length/mean"]) for row in run["curve"]]
            axes[-1].plot(*zip(*data), color=COLOURS[method], lw=1, label=method if not i else None)
    axes[-1].set(title="detect: tokens of an answer", xlabel="step", ylim=(0, None))
    axes[-1].legend(fontsize=7, frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    fig.tight_layout()
    save(fig, path)


def main(argv=None) -> None:
    present(parse(Config, argv, __doc__), run_all, show, plot)


if __name__ == "__main__":
    main()
