"""Which run a command goes on with, and how a run is ended without losing anything.

    run = open_run(cfg, steps)                 # a new folder, or a run to go on with
    with Stop(cfg.must_save_by) as stop:       # SIGTERM, SIGINT: nothing is lost, exit status 0
        ...                                    # loading, evaluation: a signal ends the run at once
        with stop.after_steps():               # here it waits for the end of the step
            for step in ...:
                last = stop.asked(seconds.last.get("save"))
                if last or step % cfg.save_every == 0:
                    save(...)
                if last:
                    break

`--resume auto`, the default, goes on with a run in `out` of the same config that has not done its
steps; every other run is left alone, and the new one gets a name beside it. What was logged after
the checkpoint is cut away, so that the journals of a run that was killed and went on are those of
one that was not.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import IO

import parallel
from config import show, to_dict
from journal import steps_of, write_json
from saving import damage, load_optimizers, progress

# Keys that may change when a run goes on: they change no result, or make more steps of it.
FREE = {
    "out", "steps", "epochs", "note", "workers", "micro", "micro_prompts", "recompute",
    "micro_tokens", "shard_group", "save_every", "keep", "must_save_by", "resume", "dry_run",
    "probes", "probe_every", "eval_every", "eval_saves", "trackers", "reward_seconds",
    "reward_memory", "check_memory",
}  # fmt: skip


# -------------------------------------------------------------------------------------- which run


@dataclass
class Run:
    """A run that is being written: its folder, and, if it goes on, from where."""

    out: Path
    checkpoint: Path | None = None
    numbers: dict | None = None  # as they were saved with it
    lock: IO | None = None  # of the first process; held as long as this object lives


def open_run(cfg, steps: int) -> Run:
    """The run of `cfg` in cfg.out: new, or with resume auto the one of the same config there that
    has not done `steps` yet. All processes call it; the first decides.

    ValueError, in all, if another process is writing it, or a process does not see the folder.
    """
    run = error = None
    if parallel.rank() == 0:
        try:
            run = choose_run(cfg, steps)
        except (ValueError, OSError) as e:
            error = str(e)
    parallel.agree(error)
    told = parallel.gathered(run and (run.out, run.checkpoint, run.numbers))[0]
    sees = (told[0] / "config.json").is_file()
    parallel.agree(None if sees else f"--out {told[0]}: {socket.gethostname()} does not see what "
                   "the first process wrote there; it must be on a disk that all machines share")
    return run or Run(*told)


def take_up(run: Run, model, optimizers: list, rows: int) -> None:
    """The optimizers' state of the checkpoint that a run goes on from, if it does, whose weights
    the model has. ValueError if it was of another model, or the data has another number of rows."""
    if run.checkpoint:
        if run.numbers["rows"] != rows:
            raise ValueError(f"data: has {rows} rows now, and had {run.numbers['rows']} when "
                             f"{run.checkpoint} was saved; --resume never begins anew with them")
        load_optimizers(run.checkpoint, model, optimizers)


def choose_run(cfg, steps: int) -> Run:
    """The first run in cfg.out, cfg.out_2 … that goes on, else a new one behind them. Where resume
    is never, only torchrun's restart goes on, with the last of them: the one it began."""
    names = (Path(cfg.out if n == 1 else f"{cfg.out}_{n}") for n in count(1))
    taken = []
    while holds_run(out := next(names)):
        taken.append(out)
    for old in taken if cfg.resume == "auto" else taken[-1:] * restarted():
        if not (why := why_not(old, cfg, steps)):
            return go_on(old, cfg)
        print(f"{old} is left alone: {why}", file=sys.stderr)
    while not (lock := take_lock(out)) or holds_run(out):  # another command may be as fast
        out = next(names)
    if out != Path(cfg.out):
        print(f"{cfg.out} holds a run already; this one goes to {out}", file=sys.stderr)
    write_json(to_dict(replace(cfg, out=str(out))), out / "config.json")
    return Run(out, lock=lock)


def restarted() -> bool:
    """Whether torchrun has started this process anew after one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def holds_run(out: Path) -> bool:
    return (out / "config.json").exists() or bool(steps_of(out))


def why_not(out: Path, cfg, steps: int) -> str | None:
    """Why the run in `out` is not one that this command goes on with; None if it is."""
    if other := other_config(out, cfg):
        return other
    if (done := summary_steps(out)) >= steps:
        return f"it is finished, {done} steps"
    found = steps_of(out)
    if done and not found:
        return f"it is finished, {done} steps, and has no checkpoint to go on from"
    whole = next((p for p in reversed(found) if not damage(p)), None)
    if found and not whole:
        return (f"{found[-1].name} cannot be gone on from ({damage(found[-1])}); to begin anew "
                f"with its weights: --model {found[-1]}")
    if whole and progress(whole)["step"] > steps:
        return f"it has done {progress(whole)['step']} steps, more than {steps}"
    return None


def other_config(out: Path, cfg, free: set[str] = FREE, grows: tuple[str, ...] = ()) -> str | None:
    """How the config of the run in `out` differs, but for the keys that may change; None if it does
    not. Those of `grows` may, but not to less."""
    try:
        there = json.loads((out / "config.json").read_bytes())
    except (FileNotFoundError, ValueError) as error:
        return f"no readable config.json ({error})"
    now, start = to_dict(cfg), to_dict(type(cfg)())  # a key that it did not know had its default
    there = {**start, **there}
    other = [k for k in {**now, **there} if k not in free and there.get(k) != now.get(k)]
    for key in now.keys() & {*grows}:
        if there[key] != now[key] and (None in (there[key], now[key]) or there[key] > now[key]):
            other.append(key)
    told = ", ".join(f"{k} {show(there.get(k))}, not {show(now.get(k))}" for k in other)
    return f"it has another config: {told}" if other else None


def summary_steps(out: Path) -> int:
    """Steps of a finished run, 0 for one that is not."""
    try:
        return json.loads((out / "summary.json").read_bytes())["steps"]
    except (FileNotFoundError, ValueError, KeyError):
        return 0


def take_lock(out: Path) -> IO | None:
    """The lock of a run's folder, which is made; None if another process holds it. It ends with
    this process, however that ends. Workers do not inherit it, as they would that of flock."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "run.lock", "a", encoding="utf-8")  # noqa: SIM115 (it is held open)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return lock.close()
        # else a file system without locks: then this cannot be known
    lock.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
    return lock


def go_on(out: Path, cfg) -> Run:
    """The run in `out`, taken back to its newest whole checkpoint; from its start without one."""
    if not (lock := take_lock(out)):
        writer = (out / "run.lock").read_text("utf-8").strip()
        raise ValueError(f"{out} is being written by {writer}; give this run another --out, or "
                         "--resume never")
    found = steps_of(out)
    while found and (problem := damage(found[-1])):
        set_aside(found.pop(), problem)
    checkpoint = found[-1] if found else None
    numbers = progress(checkpoint) if checkpoint else None
    cut_back(out, numbers["journals"] if numbers else {})
    (out / "summary.json").unlink(missing_ok=True)  # of fewer steps
    write_json(to_dict(replace(cfg, out=str(out))), out / "config.json")
    print(f"goes on from {checkpoint}" if checkpoint else
          f"{out} was ended before its first checkpoint; it starts over", file=sys.stderr)
    return Run(out, checkpoint, numbers, lock)


def set_aside(folder: Path, problem: str) -> None:
    """Renames a checkpoint that is not whole, so that it is none any more."""
    names = (folder.with_name(f"damaged_{folder.name}" + f"_{n}" * (n > 1)) for n in count(1))
    aside = next(name for name in names if not name.exists())
    folder.rename(aside)
    print(f"{folder} is set aside as {aside.name}: {problem}", file=sys.stderr)


def cut_back(out: Path, journals: dict[str, int]) -> None:
    """Takes the journals back to these sizes in bytes, and removes what was half written."""
    for path in out.glob("*.jsonl"):
        size = journals.get(path.name, 0)
        if path.stat().st_size < size:
            print(f"{path} has lost lines: {path.stat().st_size} of {size} bytes", file=sys.stderr)
            size = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, size)
    for path in out.glob("*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --------------------------------------------------------------------------------- ending in time


class Stop:
    """SIGTERM and SIGINT as a wish that the run ends, see above; and `minutes` after the start of
    the process (of torchrun, where that started it) the run ends by itself, with time to save.

    During steps a wish of any process is one of all, after the same step; the run ends when
    after_steps() is left. A second SIGINT ends this process at once, with status 130. One within a
    second of the first is the same: torchrun passes on what the terminal tells all processes.
    """

    def __init__(self, minutes: float | None = None):
        self.minutes, self.waits, self.reason, self.heard = minutes, False, None, 0.0
        self.begin = time.monotonic() - age_of_process()
        self.last, self.recent = time.monotonic(), deque(maxlen=20)  # seconds of steps
        self.before = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.hear)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number: int, frame) -> None:
        """What a signal does."""
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.heard:
            self.reason, self.heard = self.reason or name, now
            if not self.waits:
                self.end(f"{name}: ended")
            say(f"{name}: the run ends after this step, when it is saved; Ctrl-C ends it at once")
        elif number == signal.SIGINT and now - self.heard > 1:
            self.end("SIGINT again: ended at once, not saved", 130)

    @contextmanager
    def after_steps(self):
        """Here a wish waits for the end of the step; the run ends when this is left."""
        self.waits, self.last = True, time.monotonic()
        yield
        self.waits = False
        if self.asked():
            self.end(f"{self.reason or 'another process'}: ended and saved")

    def asked(self, save_seconds: float | None = None) -> bool:
        """If this is the last step: somebody asked, or there is time left for no other one as long
        as the longest of late and to save, which took so many seconds. All call it, once a step."""
        now = time.monotonic()
        self.recent.append(now - self.last)
        self.last, longest = now, max(self.recent)
        needs = longest + (longest if save_seconds is None else save_seconds)
        if self.minutes and now - self.begin + needs > 60 * self.minutes:
            self.reason = self.reason or f"must_save_by {self.minutes:g} minutes"
        return any(parallel.gathered(bool(self.reason)))

    def end(self, message: str, status: int = 0) -> None:
        say(f"{message}; the same command goes on from the newest checkpoint")
        raise SystemExit(status)


def say(message: str) -> None:
    """A line on stderr by the first process; print() may not be called within itself, as a signal
    could make it."""
    if parallel.rank() == 0:
        os.write(2, f"\n{message}\n".encode())


def age_of_process() -> float:
    """Seconds since the start of this process or, under torchrun, of that, since its restarts have
    the same limit; 0 on systems that do not tell."""
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return 0.0
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
