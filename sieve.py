"""Sieve: a model answers every row several times, and the rows that it can learn from are kept.

    python sieve.py --model Qwen/Qwen2.5-VL-7B-Instruct --data rows.jsonl --n 8 --out runs/sieve
    python grpo.py --data "rows.jsonl only=runs/sieve/kept.jsonl"

Source: MM-Eureka (arXiv 2503.07365), which leaves out what its model answers always or never right:
a group whose rewards are all equal has no gradient. Kept are rows whose mean reward, over n answers
with the weights of the rewards, lies between `above` and `below`, both excluded.

    runs/sieve/
      scored.jsonl    a line per row, as they come: {"row", "problem", "solution", "rewards",
                      "mean"}
      kept.jsonl      those of them that are kept; rows.py reads it behind only=
      summary.json    how many, and a histogram of the means

The same command goes on where it was ended. The answers of a row depend on its place in the data
and on the seed only: on no batch and no number of processes.
"""

import json
import math
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from ahead import Ahead
from boxes import FRAMES
from config import opt, parse, to_dict
from data import Processor, without_long
from grading import fitting, load_rewards
from journal import Seconds, append, newest_checkpoint, write_json
from model import Qwen2VL
from resume import Stop
from rollout import sample
from rows import load_examples
from tally import reward_table, total_reward


@dataclass(frozen=True)
class Config:
    """Keys of `python sieve.py`."""

    model: str = opt("tiny", "checkpoint that answers: folder, run, or hub id")
    data: str = opt("world:A:n=1000", "rows to choose from; several are joined by ' + '")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    out: str = opt("runs/sieve", "folder to write")
    template: str = opt("r1v", "prompt template by name, or a text that holds {Question}")
    system: str | None = opt(None, "system prompt; default: the template's")
    min_pixels: int | None = opt(None, "pixels of an image at least; default: the checkpoint's")
    max_pixels: int | None = opt(None, "pixels of an image at most; default: the checkpoint's")
    max_prompt: int | None = opt(None, "refuse rows of more tokens at the start, or skip them")
    frame: str | None = opt(None, "as in grpo.py", choices=FRAMES)
    gold_frame: str = opt("pixels", "as in grpo.py", choices=FRAMES)
    workers: int | None = opt(None, "as in grpo.py", least=0)

    n: int = opt(8, "answers to each row", least=1)
    batch: int = opt(16, "rows in work at a time, in each process", least=1)
    max_new: int = opt(512, "tokens of an answer at most", least=1)
    temperature: float = opt(1.0, "of the distribution that is sampled", above=0)
    seed: int = opt(0, "fixes the answers", least=0)
    rewards: tuple[str, ...] = opt(("accuracy",), "names, or file.py:function")
    reward_weights: tuple[float, ...] = opt((), "one weight per reward; none: 1 for each")
    reward_seconds: float = opt(10.0, "a call of a reward of one's own may take", above=0)
    reward_memory: float = opt(4.0, "GB that a process of such a reward may have", above=0)
    above: float = opt(0.0, "rows of a mean reward above this are kept")
    below: float = opt(1.0, "if it is below this, too")
    bf16: bool = opt(False, "compute in bfloat16")
    must_save_by: float | None = opt(None, "minutes after which it ends, to go on later", above=0)


# Keys that may change when it goes on.
FREE = {"out", "batch", "workers", "reward_seconds", "reward_memory", "must_save_by"}


def keeps(mean: float | None, cfg: Config) -> bool:
    """Whether a row of this mean reward is kept; of None, no answer had a reward."""
    return mean is not None and cfg.above < mean < cfg.below


def score_rows(model, ahead: Ahead, rewards, numbers, later, cfg: Config) -> list[dict]:
    """A line for each of the rows of these numbers; those of the numbers `later` come next."""
    if not numbers:
        return []
    prompts = ahead(numbers, expected=later)
    rollout = sample(model, ahead.processor, prompts, cfg.n, cfg.max_new, cfg.temperature, cfg.seed,
                     uids=numbers, slots=cfg.batch)
    reward = total_reward(reward_table(rollout, rewards), rewards)  # (B, n)
    lines = []
    for prompt, values in zip(prompts, reward.tolist()):
        there = [value for value in values if not math.isnan(value)]
        lines.append({
            "row": prompt.example.row, "problem": prompt.example.problem,
            "solution": prompt.example.solution,
            "rewards": [None if math.isnan(value) else value for value in values],
            "mean": sum(there) / len(there) if there else None,
        })  # fmt: skip
    return lines


def scored(path: Path, about: dict, rows) -> list[dict]:
    """The lines that an earlier start left in `path`, but what a kill cut short. ValueError if they
    are of another model, other rows or other keys."""
    whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    if not whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        append(path, about)
        return []
    try:
        there, *lines = map(json.loads, whole)
        said = [[line[key] for key in ("row", "problem", "solution", "mean")] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is damaged ({error!r}); remove it to start anew") from error
    other = [key for key in about if there.get(key) != about[key]]
    if not other and any([rows[i].row, rows[i].problem, rows[i].solution] != asked
                         for i, (*asked, _) in enumerate(said[: len(rows)])):
        other = ["data"]
    if other:
        raise ValueError(f"{path}: holds answers of another sieve, with another "
                         f"{', '.join(other)}; give another --out")
    path.write_bytes(b"".join(line + b"\n" for line in whole))
    return lines


def histogram(means: list[float | None]) -> dict[str, int]:
    """How many rows have which mean reward: exactly 0, tenths between, exactly 1, others."""
    names = ["0", *(f"{k / 10:.1f} to {(k + 1) / 10:.1f}" for k in range(10)), "1", "other"]

    def name(mean):
        if mean is None or not 0 <= mean <= 1:
            return "other"
        return f"{mean:.0f}" if mean in (0, 1) else names[1 + int(10 * mean)]

    found = Counter(map(name, means))
    return {key: found[key] for key in names if found[key] or key != "other"}


def setup(cfg: Config) -> tuple:
    """(checkpoint, processor, rewards, rows), checked."""
    if cfg.above >= cfg.below:
        raise ValueError(f"above {cfg.above:g}, below {cfg.below:g}: nothing is between them")
    rewards = load_rewards(cfg.rewards, cfg.reward_weights, cfg.reward_seconds, cfg.reward_memory)
    start = newest_checkpoint(cfg.model)
    processor = Processor.from_pretrained(start, cfg.template, cfg.min_pixels, cfg.max_pixels,
                                          cfg.system, cfg.frame, cfg.gold_frame)
    rows = load_examples(cfg.data, cfg.images, "train", bad_rows=cfg.bad_rows)
    rows = fitting(rewards, rows, cfg.bad_rows)
    rows = without_long(rows, processor.length, "max_prompt", cfg.max_prompt, cfg.bad_rows)
    if more := [name for name, n in Counter(row.row for row in rows).items() if n > 1]:
        raise ValueError(f"{cfg.data}: several rows are called {more[0]}, so that only= could not "
                         "tell them apart; rename a file, or sieve one source at a time")
    return start, processor, rewards, rows


def sift(cfg: Config) -> dict:
    """Answers, scores and keeps rows as cfg says; returns the summary, which is also in a file."""
    device, seconds, path = parallel.start(), Seconds(), Path(cfg.out) / "scored.jsonl"
    half = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=cfg.bf16)
    first, lines = parallel.rank() == 0, []
    with Stop(cfg.must_save_by) as stop, parallel.told():
        with parallel.agreed():
            start, processor, rewards, rows = setup(cfg)
            if first:
                free = FREE | {"above", "below"}
                about = {key: x for key, x in to_dict(cfg).items() if key not in free}
                lines = scored(path, {**about, "model": start, "n_rows": len(rows)}, rows)
                write_json(to_dict(cfg), path.with_name("config.json"))
        if (done := parallel.gathered(len(lines))[0]) < len(rows):
            model = Qwen2VL.from_pretrained(start, device=device)
            model.frozen(torch.bfloat16 if cfg.bf16 else torch.float32)
        each = cfg.batch * (4 if device != "cpu" else 1) * parallel.size()  # come in as others end
        bar = tqdm(total=len(rows), initial=done, desc="sieve", unit="row", disable=not first)
        ahead = Ahead(processor, rows, workers=cfg.workers)
        with closing(ahead), bar, half(), stop.after_steps():
            for at in range(done, len(rows), each):
                mine = score_rows(model, ahead, rewards, share(at, each, len(rows)),
                                  share(at + each, each, len(rows)), cfg)
                for line in chain(*parallel.gathered(mine)):
                    if first:
                        append(path, line)
                    lines.append(line)
                    bar.update()
                if stop.asked(0.0):
                    break
        with parallel.agreed():
            return finish(cfg, lines, seconds) if first else {}


def share(at: int, count: int, most: int) -> range:
    """This process's rows of the `count` that begin with `at`, of `most` in all."""
    first, n = parallel.share(max(0, min(count, most - at)))
    return range(at + first, at + first + n)


def finish(cfg: Config, lines: list[dict], seconds: Seconds) -> dict:
    """Writes what is kept, and the summary. ValueError if that is nothing."""
    means, out = [line["mean"] for line in lines], Path(cfg.out)
    found, kept = histogram(means), [line for line in lines if keeps(line["mean"], cfg)]
    told = [f"{name:>10}  {n:6}  {'#' * math.ceil(40 * n / len(lines))}"
            for name, n in found.items()]  # fmt: skip
    print("\n".join(["mean reward    rows", *told]))
    if not kept:
        raise ValueError(f"{cfg.data}: no row has a mean reward above {cfg.above:g} and below "
                         f"{cfg.below:g}; {out / 'scored.jsonl'} has those of all")
    part = out / "kept.jsonl.tmp"
    part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    part.replace(out / "kept.jsonl")
    summary = {"rows": len(lines), "kept": len(kept), "histogram": found,
               "seconds": {"all": round(seconds.since_start(), 1)}}
    write_json(summary, out / "summary.json")
    print(f"{out / 'kept.jsonl'}: {len(kept)} of {len(lines)} rows are kept")
    return summary


def main(argv=None) -> dict:
    cfg = parse(Config, argv, __doc__)
    with parallel.together(), parallel.told(OSError):
        return sift(cfg)


if __name__ == "__main__":
    main()
