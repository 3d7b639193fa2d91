"""The field in miniature: eight systems as recipes, from one start, with as many samples each.

    python field.py                # `make field`: three seeds; goes on where it was stopped
    python field.py --plot_only    # table and picture again, from bench/field.json

Most of what followed R1-V differs from it in an order of stages, a reward, an estimator, a prompt
and a way of making data. Here each idea is tried on one question,
"how many?", from the checkpoint tiny_forms/, whose teacher overlooked small objects and forgot the
format. Every run trains on 19,200 completions of the same pictures; what a cold start learns, or a
filter samples, comes on top and is in the seconds. All are asked held-out questions under their own
prompt, greedily: A; C (other shapes, another ground); and A's scenes in words, without a picture.
"""

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import run
from config import opt, parse
from controls import present
from data import Processor
from evaluate import evaluate, load_evals, prompt_of
from journal import newest_checkpoint, steps_of, write_json
from model import Qwen2VL

START = "tiny_forms"
EVALS = ("A=world:A:n=400:ask=open:objects=3-8", "C=world:C:n=400:ask=open:objects=3-8",
         "words=world:A:n=400:ask=read:objects=3-8")  # fmt: skip
PLAIN = "plain GRPO"
LONG = ["--short.max_new", "96", "--short.group", "8", "--short.prompts", "16"]
PICTURES = "world:A:n=2400:look=wild:objects=3-8:ask=open"
# What is trained: name: (recipe, keys of its command line).
RUNS = {
    PLAIN: ("tiny_plain", []),
    "vision_r1": ("tiny_vision_r1", []),
    "vision_r1_zero": ("tiny_plain", ["--rewards", "all_of(accuracy,format)", "--max_new", "96"]),
    "vision_r1_long": ("tiny_vision_r1", LONG),
    "visualthinker": ("tiny_visualthinker", []),
    "visualthinker_length": ("tiny_visualthinker", [
        "--rewards", "accuracy,format,length(per=0.01,most=100)", "--max_new", "96"]),
    "frozen_vision": ("tiny_plain", ["--freeze", "vision"]),
    "frozen_language": ("tiny_plain", ["--freeze", "language"]),
    "open_r1": ("tiny_open_r1", []),
    "r1_onevision": ("tiny_r1_onevision", []),
    "r1_vision": ("tiny_r1_vision", []),
    "mm_eureka": ("tiny_mm_eureka", []),
    "mm_eureka_qwen": ("tiny_mm_eureka_qwen", []),
    "curr_reft": ("tiny_curr_reft", []),
    "lmm_r1": ("tiny_lmm_r1", []),
    "lmm_r1_pictures": ("tiny_lmm_r1", ["--words.data", PICTURES]),
}  # fmt: skip
# Lines of the table: (what it is called, run, stage whose checkpoint is asked or None: the last,
# prompt or None: its own).
LINES = (
    (PLAIN, PLAIN, None, None),
    ("Vision-R1: cold start, then short, then long", "vision_r1", None, None),
    ("- cold start alone (CI)", "vision_r1", "cold_start", None),
    ("- no cold start (Zero)", "vision_r1_zero", None, None),
    ("- long from the beginning (Long)", "vision_r1_long", None, None),
    ("VisualThinker: no chat template, <think> given", "visualthinker", None, None),
    ("- with a reward for length", "visualthinker_length", None, None),
    ("- plain, frozen vision tower", "frozen_vision", None, None),
    ("- plain, frozen language model", "frozen_language", None, None),
    ("open-r1-multimodal: rewritten questions, KL", "open_r1", None, None),
    ("- the same, asked for the answer only", "open_r1", None, "direct"),
    ("R1-Onevision: formal description, SFT, GRPO", "r1_onevision", None, None),
    ("- SFT alone", "r1_onevision", "cold_start", None),
    ("R1-Vision: caption first, SFT, here with GRPO after", "r1_vision", None, None),
    ("- SFT alone, as published", "r1_vision", "caption_first", None),
    ("MM-Eureka: offline filter, RLOO, no KL", "mm_eureka", None, None),
    ("MM-Eureka 2: online filter, ratio cap, ADORA", "mm_eureka_qwen", None, None),
    ("Curr-ReFT: yes/no, choice, open, own right answers", "curr_reft", None, None),
    ("- before the last stage", "curr_reft", "open", None),
    ("LMM-R1: words first, then pictures", "lmm_r1", None, None),
    ("- after the words", "lmm_r1", "words", None),
    ("- pictures only", "lmm_r1_pictures", None, None),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Keys of `python field.py`."""

    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of each run", least=0)
    runs: tuple[str, ...] = opt(tuple(RUNS), "which of them", choices=tuple(RUNS))
    jobs: int = opt(2, "runs at a time, of one thread each; 0: one after another, here", least=0)
    out: str = opt("bench/field.json", "results; a run and seed that it holds is not run again")
    picture: str = opt("docs/field.png", "the plot of them")
    plot_only: bool = opt(False, "table and picture of the results that are there")


# ----------------------------------------------------------------------------------------- the runs


def train(name: str, seed: int) -> dict:
    """Trains the run of that name and asks its checkpoints: {"seconds", "asked": {line: {eval:
    summary}}}. In a process of its own, of one thread."""
    recipe, words = RUNS[name]
    out, begin = Path("runs/field") / f"{name.replace(' ', '_')}_{seed}", time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    run.main([f"recipes/{recipe}.toml", "--seed", str(seed), "--out", str(out), *words])
    seconds, evals = time.perf_counter() - begin, load_evals(EVALS)
    asked = {line: examine(stage_of(out, stage), template, evals)
             for line, of, stage, template in LINES if of == name}  # fmt: skip
    return {"seconds": round(seconds, 1), "asked": asked}


def stage_of(out: Path, stage: str | None) -> str:
    """The checkpoint that a stage of a run left, or its last stage."""
    found = sorted(out.glob(f"*_{stage or '*'}"))
    trained = [folder for folder in found if steps_of(folder)]
    return newest_checkpoint(str(trained[-1] if trained else out))


def examine(folder: str, template: str | None, evals: dict) -> dict:
    """Summaries of a checkpoint on every eval, under its own prompt or another."""
    model = Qwen2VL.from_pretrained(folder)
    processor = Processor.from_pretrained(folder, **prompt_of(folder, template, None))
    found = {}
    for name, examples in evals.items():
        full = evaluate(model, processor, examples, 100, 100, title=name)
        found[name] = {key: value for key, value in full.items() if key != "results"}
    return found


def run_all(cfg: Config) -> None:
    """Writes cfg.out after every run: {"torch", "start": {eval: summary}, "results": {run: {seed:
    see train}}}."""
    found = {"torch": torch.__version__, "results": {}}
    if Path(cfg.out).is_file():
        found = json.loads(Path(cfg.out).read_text())
    if "start" not in found:
        found["start"] = examine(START, None, load_evals(EVALS))
        write_json(found, cfg.out)
    left = [(name, seed) for seed in cfg.seeds for name in cfg.runs
            if str(seed) not in found["results"].get(name, {})]  # fmt: skip
    for name, seed, one in done(left, cfg.jobs):
        found["results"].setdefault(name, {})[str(seed)] = one
        write_json(found, cfg.out)


def done(left: list[tuple], jobs: int) -> Iterator[tuple]:
    """(name, seed, see train) of runs, as they end."""
    if not jobs:
        yield from ((name, seed, train(name, seed)) for name, seed in left)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        asked = {pool.submit(train, name, seed): (name, seed) for name, seed in left}
        yield from ((*asked[one], one.result()) for one in as_completed(asked))


# -------------------------------------------------------------------------------- table and picture


def show(found: dict) -> str:
    """A Markdown table: greedy accuracy of each line on each eval, mean over the seeds, lowest and
    highest beside it; on A also the difference to plain GRPO, seed by seed."""
    names = list(found["start"])
    heads = ["", *names, "A, against plain", "tokens on A", "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines.append(row("start", [found["start"]], names, None, None))
    plain = summaries(found, PLAIN, PLAIN)
    for line, of, stage, template in LINES:
        if asked := summaries(found, of, line):
            less = [seed for seed in asked if seed in plain]
            gains = [asked[s][names[0]]["accuracy"] - plain[s][names[0]]["accuracy"] for s in less]
            seconds = np.mean([found["results"][of][seed]["seconds"] for seed in asked])
            lines.append(row(line, list(asked.values()), names, None if line == PLAIN else gains,
                             None if stage or template else seconds))
    return "\n".join(lines)


def summaries(found: dict, of: str, line: str) -> dict[str, dict]:
    """{seed: {eval: summary}} of a line."""
    return {seed: one["asked"][line] for seed, one in found["results"].get(of, {}).items()
            if line in one["asked"]}  # fmt: skip


def row(line: str, asked: list[dict], names: list, gains: list | None, seconds) -> str:
    """A line of the table."""
    cells = [spread([one[name]["accuracy"] for one in asked]) for name in names]
    cells.append(spread(gains, "+") if gains else "")
    cells.append(f"{np.mean([one[names[0]]['length'] for one in asked]):.0f}")
    cells.append("" if seconds is None else f"{seconds:.0f}")
    return f"| {line} | {' | '.join(cells)} |"


def spread(values: list[float], sign: str = "") -> str:
    """Mean, and lowest to highest where they differ."""
    text = f"{np.mean(values):{sign}.3f}"
    if max(values) - min(values) < 5e-4:
        return text
    return f"{text} ({min(values):{sign}.2f} to {max(values):{sign}.2f})"


def plot(found: dict, path: str) -> None:
    """Greedy accuracy of every line on A and C, a dot per seed; upright lines are plain GRPO's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(found["start"])[:2]
    shown = [(line, of) for line, of, _, _ in LINES if summaries(found, of, line)]
    fig, axes = plt.subplots(1, 2, figsize=(11, 0.6 + 0.25 * len(shown)), sharey=True)
    for ax, name in zip(axes, names):
        for y, (line, of) in enumerate(shown):
            values = [one[name]["accuracy"] for one in summaries(found, of, line).values()]
            colour = "#8db7dc" if line.startswith("- ") else "#1f6fb4"
            ax.barh(y, np.mean(values), 0.75, color="#9a9a9a" if line == PLAIN else colour)
            ax.plot(values, [y] * len(values), ".", color="black", ms=3)
        plain = summaries(found, PLAIN, PLAIN).values()
        for x, style in ((found["start"][name]["accuracy"], ":"),
                         (np.mean([one[name]["accuracy"] for one in plain]), "-")):
            ax.axvline(x, color="#555555", lw=0.8, ls=style)
        ax.set(title=f"{name}: greedy accuracy, held-out", xlim=(0, 1))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(shown)), [line for line, _ in shown], fontsize=8)
    axes[0].invert_yaxis()
    fig.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    if not cfg.plot_only:
        run_all(cfg)
    present(cfg, show, plot)


if __name__ == "__main__":
    main()
