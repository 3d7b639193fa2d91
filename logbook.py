"""Logbook: what GRPO and SFT do alike around their steps: evaluate, tell, save, end, sum up.

    book = Logbook(cfg, run, seconds, stop, steps=…, model=…, …)
    book.open()                                # evaluate, or know from before how that went
    for step in book.steps("grpo"):
        …
        book.end(step, row, samples, tokens)   # tells and, where it is time, evaluates and saves
    summary = book.close()

A row of metrics goes to metrics.jsonl, to the trackers that were asked for, and to the report,
which is written anew every minute; where the rows show trouble, the console says what to try.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import torch
from tqdm import tqdm

import live
import parallel
import plan
import report
import saving
import trackers
from advice import advice
from config import to_dict
from evaluate import evaluate_all, print_summary
from journal import Seconds, append, peak_memory_gb, steps_of, write_json
from resume import Run, Stop
from scorers import evaluated, load_scorer

REFRESH = 60  # seconds between two versions of the report; more where writing it takes long


def announce(found: plan.Plan, device: str, cfg, rows: int, steps: int, batch: int) -> None:
    """Prints what a run will take, and ends it there if it is a dry run. ValueError where it cannot
    fit into memory, before a weight was read."""
    limit = live.memory_of(device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if parallel.rank() == 0:
        told = f"{steps} steps of {batch} rows, {steps * batch / rows:.2f} epochs of {rows}; "
        told += f"{parallel.size()} process{'es' * (parallel.size() > 1)}, {device.split(':')[0]}"
        print(told, plan.text(found, limit), sep="\n", flush=True)
    try:
        plan.check(found, limit)
    except ValueError as error:
        if cfg.check_memory and not cfg.dry_run:
            raise ValueError(f"{error}; or --check_memory false, if you know better") from error
        if parallel.rank() == 0:
            print(f"warning: {error}", file=sys.stderr)
    if cfg.dry_run:
        raise SystemExit(0)


def check_room(found: plan.Plan, run: Run, cfg, steps: int) -> None:
    """ValueError, in all processes, where the run's disk has no room for the checkpoints that are
    yet to come: those that stay, and the new one, which is there before an old one goes."""
    every = math.ceil(steps / cfg.save_every)
    stay = every if cfg.keep is None else cfg.keep + 1 + bool(cfg.eval_saves and cfg.evals)
    with parallel.agreed():
        plan.check_disk(found, run.out, max(1, min(every, stay) - len(steps_of(run.out))))


class Logbook:
    """Of the run `run`, by all its processes; the first one writes.

    state: what resuming needs beside model and optimizers, for JSON: "step" (the last that was
    done), "before", and what the loop adds; with eval_saves "after" (of the last step that was the
    end), "scored" (the last step that was) and "best" (the highest mean over the evals of what the
    scorer gave, of equals the later). shown: metrics of the progress bar. ValueError as told by
    load_scorer and trackers.open_trackers.
    """

    def __init__(self, cfg, run: Run, seconds: Seconds, stop: Stop, *, steps: int, model, processor,
                 optimizers: list, evals: dict, state: dict, shown: tuple[str, ...]):  # fmt: skip
        self.cfg, self.run, self.out, self.seconds, self.stop = cfg, run, run.out, seconds, stop
        self.total, self.model, self.processor, self.evals = steps, model, processor, evals
        self.optimizers, self.state, self.shown = optimizers, state, shown
        self.scorer = load_scorer(cfg.scorer)
        self.first, self.last, self.rows = parallel.rank() == 0, False, deque(maxlen=100)
        self.half = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=cfg.bf16)
        self.resumed, self.next_page, self.trackers = state["step"] > 0, time.monotonic(), []
        seconds.start -= state.get("seconds", 0.0)  # those of before count too
        if self.first:
            self.trackers = trackers.open_trackers(cfg.trackers, run.out, to_dict(cfg),
                                                   state["step"])

    def open(self) -> None:
        """The evaluations of the start; and of a checkpoint to go on from, if there was no time."""
        state, step = self.state, self.state["step"]
        if "before" not in state:
            state["before"] = self.score("before")
        regular = 0 < step < self.total and step % self.cfg.save_every == 0
        if self.cfg.eval_saves and self.evals and regular and state.get("scored") != step:
            self.note_best(step, self.score(f"step_{step:06d}"))

    def score(self, when: str) -> dict:
        """Greedy results on every eval by the run's scorer; details in eval/NAME_WHEN.json."""
        with self.seconds("eval"), self.half():
            return evaluate_all(parallel.copy(self.model), self.processor, self.evals,
                                self.cfg.max_new, self.out, when, self.scorer)

    def steps(self, title: str) -> Iterator[int]:
        """The numbers of the steps that are left. Signals wait for the end of a step; where one
        came, or time is up, the run ends here, saved."""
        done = self.state["step"]
        self.bar = tqdm(range(done + 1, self.total + 1), title, self.total, unit="step",
                        initial=done, disable=not self.first)
        self.seconds.lap()
        with self.stop.after_steps(), closing(self.bar):
            for step in self.bar:
                yield step
                if self.last:
                    break

    def end(self, step: int, row: dict, samples: int, tokens: float) -> None:
        """Of a step, with its metrics and what all processes did in it."""
        state, cfg = self.state, self.cfg
        saves = step == self.total or step % cfg.save_every == 0
        scores = saves and cfg.eval_saves and self.evals
        if scores and not any(parallel.gathered(bool(self.stop.reason))):
            if step == self.total:
                self.end_score()
            else:
                row |= evaluated(found := self.score(f"step_{step:06d}"))
                self.note_best(step, found)
        lap = self.seconds.lap()
        row |= {f"time/{name}": spent for name, spent in lap.items()
                if name not in ("all", "setup")}
        row |= {"samples_per_second": samples / lap["all"],
                "tokens_per_second": tokens / lap["all"],
                "memory_gb": max(parallel.gathered(peak_memory_gb())),
                "seconds": self.seconds.since_start()}  # fmt: skip
        shares = {name: f"{spent / lap['all']:.0%}" for name, spent in lap.items()
                  if name != "all" and spent > 0.01 * lap["all"]}  # fmt: skip
        told = {k: f"{row[k]:.2f}" for k in self.shown} | shares
        told |= {"tok/s": f"{row['tokens_per_second']:.0f}", "GB": f"{row['memory_gb']:.1f}"}
        self.bar.set_postfix(told, refresh=False)
        with self.seconds("log"), parallel.told():
            if self.first:
                self.write({"step": step, **row})
        self.last = self.stop.asked(self.seconds.last.get("save"))
        if saves or self.last:
            state |= {"step": step, "seconds": self.seconds.since_start()}
            with self.seconds("save"), parallel.told():
                saving.save(self.model, self.processor, self.optimizers, self.out, step, state,
                            cfg.keep, state.get("best", {}).get("step"))  # fmt: skip
        if self.last and self.first:
            report.write(self.out)  # the page before it said that the run goes on

    def write(self, row: dict) -> None:
        """A row of metrics, to all who want it."""
        row = {**row, "resumed": True} if self.resumed else row
        self.resumed = False
        append(self.out / "metrics.jsonl", row)
        trackers.log(self.trackers, row)
        self.rows.append(row)
        if said := advice(list(self.rows)):
            tqdm.write(said, file=sys.stderr)
        if time.monotonic() > self.next_page:
            begin = time.monotonic()
            report.write(self.out, running=True)
            self.next_page = max(begin + REFRESH, begin + 50 * (time.monotonic() - begin))

    def note_best(self, step: int, found: dict) -> None:
        """Notes if a step that is saved is the best of all until now."""
        mean = sum(each["score"] for each in found.values()) / len(found)
        self.state["scored"] = step
        if mean >= self.state.get("best", {}).get("score", -math.inf):
            self.state["best"] = {"step": step, "score": mean}

    def end_score(self) -> dict:
        """The evaluations of the end. With eval_saves they take part in what is the best, so they
        are done, and kept, before the end is saved."""
        kept = self.state.get("after") or {}
        if kept.get("step") != self.total:
            kept = {"step": self.total, "found": self.score("after")}
            if self.cfg.eval_saves and self.evals:
                self.state["after"] = kept
                self.note_best(self.total, kept["found"])
        return kept["found"]

    def close(self, **more) -> dict:
        """Evaluates the end; the summary, which is also summary.json, with `more` in it."""
        after = self.end_score()
        more |= {"best": self.state["best"]} if "best" in self.state else {}
        seconds = {**self.seconds, "all": self.seconds.since_start()}
        seconds = {name: round(spent, 1) for name, spent in seconds.items()}
        summary = {"before": self.state["before"], "after": after, "steps": self.total,
                   "seed": self.cfg.seed, **more, "seconds": seconds,
                   "peak_memory_gb": round(max(parallel.gathered(peak_memory_gb())), 3)}
        if self.first:
            with parallel.told():
                write_json(summary, self.out / "summary.json")
            trackers.close(self.trackers)
            print_summary(summary, self.out, report.write(self.out))
        return summary
