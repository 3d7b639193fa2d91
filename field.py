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
from typing import NamedTuple

import numpy as np
import torch

import run
from config import opt, parse
from controls import present, save
from data import Processor
from evaluate import evaluate_all, load_evals, prompt_of
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


class Line(NamedTuple):
    """A line of the table. idea: of the system, or what is other here; claim: what its paper says;
    stage: whose checkpoint is asked, default the last; template: the prompt, default the run's."""

    name: str
    of: str
    idea: str
    claim: str = ""
    stage: str | None = None
    template: str | None = None


LINES = (
    Line(PLAIN, PLAIN, "accuracy and format are rewarded, no KL"),
    Line("Vision-R1", "vision_r1", "a cold start on thoughts full of doubt; then 16 short answers, "
         "then 8 longer ones; one reward, for both at once",
         "mean of its benchmarks 49.6 -> 55.4"),
    Line("- cold start alone", "vision_r1", "SFT", "44.5", "cold_start"),
    Line("- no cold start", "vision_r1_zero", "the one reward, long answers at once", "50.7"),
    Line("- long at once", "vision_r1_long", "the cold start, then long answers", "47.7"),
    Line("VisualThinker", "visualthinker", "no chat template; `<think>` is given",
         "a base model passes its SFT: CV-Bench 57.8 (SFT), 59.5"),
    Line("- reward for length", "visualthinker_length", "and .01 for each token",
         "longer, not better"),
    Line("- frozen vision tower", "frozen_vision", "plain GRPO", "68.3; nothing frozen 63.6"),
    Line("- frozen language model", "frozen_language", "plain GRPO", "65.4"),
    Line("open-r1-multimodal", "open_r1", "choices rewritten as open questions (as all here); KL",
         "with thoughts MMMU 31.2 -> 35.2; direct 39.7"),
    Line("- asked directly", "open_r1", "the same, for the answer only", "", None, "direct"),
    Line("R1-Onevision", "r1_onevision", "SFT on formal descriptions that led to the right answer, "
         "then GRPO", "MathVision 25.4 -> 26.3 (SFT) -> 29.9"),
    Line("- SFT alone", "r1_onevision", "", "26.3", "cold_start"),
    Line("R1-Vision, and GRPO", "r1_vision", "SFT on thoughts that open with a caption",
         "no numbers"),
    Line("- SFT alone", "r1_vision", "as published", "", "caption_first"),
    Line("MM-Eureka", "mm_eureka", "rows always or never right left out; RLOO, no KL, format .5",
         "MathVista 64.4 -> 67.1; KL hurts"),
    Line("MM-Eureka 2", "mm_eureka_qwen", "groups below .1 and above .9 replaced, frozen vision, "
         "capped ratio, ADORA", "MathVista 68.2 -> 73.0"),
    Line("Curr-ReFT", "curr_reft", "yes/no, then choice, then open; then SFT on own right answers",
         "MathVista 52.0 -> 55.3 (RL) -> 56.3 (curriculum) -> 57.9"),
    Line("- before the last SFT", "curr_reft", "", "56.3", "open"),
    Line("LMM-R1", "lmm_r1", "questions in words first, then pictures; REINFORCE++, KL in the "
         "reward, strict format", "pictures 36.1 -> 41.0; MathVerse 41.8, without words 38.0"),
    Line("- after the words", "lmm_r1", "", "text 46.9 -> 51.1", "words"),
    Line("- pictures only", "lmm_r1_pictures", "the same without words first", "38.0"),
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
    """Trains the run of that name and asks its checkpoints: {"seconds", "asked": {stage or prompt
    or "last": {eval: summary}}}. In a process of its own, of one thread."""
    recipe, words = RUNS[name]
    out, begin = Path("runs/field") / f"{name.replace(' ', '_')}_{seed}", time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    run.main([f"recipes/{recipe}.toml", "--seed", str(seed), "--out", str(out), *words])
    seconds, evals = time.perf_counter() - begin, load_evals(EVALS)
    asked = {key(line): examine(stage_of(out, line.stage), line.template, evals, out, key(line))
             for line in LINES if line.of == name}  # fmt: skip
    return {"seconds": round(seconds, 1), "asked": asked}


def key(line: Line) -> str:
    """What a line is called among those of its run."""
    return line.stage or line.template or "last"


def stage_of(out: Path, stage: str | None) -> str:
    """The checkpoint that a stage of a run left, or its last stage."""
    found = sorted(out.glob(f"*_{stage or '*'}"))
    trained = [folder for folder in found if steps_of(folder)]
    return newest_checkpoint(str(trained[-1] if trained else out))


def examine(folder: str, template: str | None, evals: dict, out: Path, when: str) -> dict:
    """Summaries of a checkpoint on every eval, under its own prompt or another; its answers go to
    out/eval."""
    model = Qwen2VL.from_pretrained(folder)
    processor = Processor.from_pretrained(folder, **prompt_of(folder, template, None))
    return evaluate_all(model, processor, evals, 100, out, when)


def run_all(cfg: Config) -> None:
    """Writes cfg.out after every run: {"torch", "start": {eval: summary}, "results": {run: {seed:
    see train}}}."""
    found = {"torch": torch.__version__, "results": {}}
    if Path(cfg.out).is_file():
        found = json.loads(Path(cfg.out).read_text())
    if "start" not in found:
        out = Path("runs/field/start")
        found["start"] = examine(START, None, load_evals(EVALS), out, "start")
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
    highest beside it; on the first also the difference to plain GRPO, seed by seed."""
    names = list(found["start"])
    heads = ["", "its idea", *names, f"{names[0]}, against plain", "tokens", "its paper says"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    *accuracy, tokens = numbers([found["start"]], names)
    lines.append(f"| start | a flawed teacher | {' | '.join(accuracy)} |  | {tokens} |  |")
    plain = summaries(found, LINES[0])
    for line in LINES:
        if asked := summaries(found, line):
            gains = [asked[seed][names[0]]["accuracy"] - plain[seed][names[0]]["accuracy"]
                     for seed in asked if seed in plain and line.name != PLAIN]  # fmt: skip
            *accuracy, tokens = numbers(list(asked.values()), names)
            gain = spread(gains, "+") if gains else ""
            cells = [line.name, line.idea, *accuracy, gain, tokens, line.claim]
            lines.append(f"| {' | '.join(cells)} |".replace("->", "→"))
    return "\n".join(lines)


def summaries(found: dict, line: Line) -> dict[str, dict]:
    """{seed: {eval: summary}} of a line."""
    return {seed: one["asked"][key(line)] for seed, one in found["results"].get(line.of, {}).items()
            if key(line) in one["asked"]}  # fmt: skip


def numbers(asked: list[dict], names: list) -> list[str]:
    """The cells of greedy accuracy on each eval, and of the tokens of an answer on the first."""
    cells = [spread([one[name]["accuracy"] for one in asked]) for name in names]
    return [*cells, f"{np.mean([one[names[0]]['length'] for one in asked]):.0f}"]


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
    shown = [line for line in LINES if summaries(found, line)]
    fig, axes = plt.subplots(1, 2, figsize=(11, 0.6 + 0.25 * len(shown)), sharey=True)
    for ax, name in zip(axes, names):
        for y, line in enumerate(shown):
            values = [one[name]["accuracy"] for one in summaries(found, line).values()]
            colour = "#8db7dc" if line.name.startswith("- ") else "#1f6fb4"
            ax.barh(y, np.mean(values), 0.75, color="#9a9a9a" if line.name == PLAIN else colour)
            ax.plot(values, [y] * len(values), ".", color="black", ms=3)
        plain = summaries(found, LINES[0]).values()
        for x, style in ((found["start"][name]["accuracy"], ":"),
                         (np.mean([one[name]["accuracy"] for one in plain]), "-")):
            ax.axvline(x, color="#555555", lw=0.8, ls=style)
        ax.set(title=f"{name}: greedy accuracy, held-out", xlim=(0, 1))
        ax.margins(y=0.01)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(shown)), [line.name for line in shown], fontsize=8)
    axes[0].invert_yaxis()
    fig.tight_layout()
    save(fig, path)


def main(argv=None) -> None:
    present(parse(Config, argv, __doc__), run_all, show, plot)


if __name__ == "__main__":
    main()
