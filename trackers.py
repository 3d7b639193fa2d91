"""Trackers: the numbers of a run to wandb or TensorBoard as well, where asked for and installed.

    python grpo.py recipes/tiny.toml --trackers wandb,tensorboard
    tensorboard --logdir runs         # or WANDB_MODE=offline before, wandb sync RUN/wandb/* after

metrics.jsonl has all of it, and is what a run relies on: a tracker that fails is left out, and the
run goes on. wandb stores everything below the run's folder first; where its server cannot be
reached at the start it keeps to that, later it tries again, and a minute at the end.

A run that was resumed continues its curves: wandb knows it by the id kept in the run's folder, gets
what it lacks of metrics.jsonl, and has the steps done twice from the first time; TensorBoard
forgets them (purge_step).

Neither package is imported unless it is asked for.
"""

import importlib.util
import json
import math
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Tracker(NamedTuple):
    """Where numbers go: write({key: number}, step), close()."""

    name: str
    write: Callable
    close: Callable


def check_installed(names: tuple[str, ...]) -> None:
    """ValueError if one of these trackers is unknown or its package missing; imports nothing."""
    for name in names:
        if name not in OPEN:
            raise ValueError(f"trackers: {name!r} is none of {', '.join(OPEN)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder wandb/, such as its runs leave
            raise ValueError(f"trackers {name} needs a package: pip install {name}")


def open_trackers(names: tuple[str, ...], out: Path, cfg: dict, step: int) -> list[Tracker]:
    """Trackers of the run in folder `out`, by the main process only. cfg: every key of its config.
    step: the last that it has done, 0 for a new one. ValueError as told by check_installed, or if
    wandb knows no login."""
    check_installed(names)
    return [OPEN[name](Path(out), cfg, step) for name in names]


def log(trackers: list[Tracker], row: dict) -> None:
    """Every finite number of a row of metrics, under its own name, at row["step"]."""
    for tracker in list(trackers):
        try:
            tracker.write(numbers(row), row["step"])
        except OSError as error:  # its process is gone, the disk is full
            trackers.remove(tracker)
            tell(tracker.name, f"is left out from now on ({error})")


def numbers(row: dict) -> dict[str, float]:
    """The finite numbers of a row of metrics, without its step."""
    return {key: value for key, value in row.items()
            if key != "step" and type(value) in (int, float) and math.isfinite(value)}


def close(trackers: list[Tracker]) -> None:
    """Sends what is left, for a minute at most."""
    for tracker in trackers:
        try:
            tracker.close()
        except OSError as error:
            tell(tracker.name, f"was not closed ({error})")


def tell(name: str, what: str) -> None:
    print(f"warning: {name} {what}; metrics.jsonl has everything", file=sys.stderr)


def open_wandb(out: Path, cfg: dict, step: int) -> Tracker:
    """A run of project nanor1v with the folder's name, the same one each time it is opened."""
    import wandb

    kept = out / "wandb_id"
    if not kept.exists():
        kept.write_text(secrets.token_hex(4))
    settings = wandb.Settings(console="off", init_timeout=30, finish_timeout=60)
    start = {"project": "nanor1v", "name": out.resolve().name, "id": kept.read_text().strip(),
             "config": cfg, "dir": out, "settings": settings}
    try:
        run = wandb.init(resume="allow", **start)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise ValueError(f"trackers wandb: {error} (or WANDB_MODE=offline)") from error
    except wandb.errors.CommError as error:
        tell("wandb", f"writes to {out}/wandb only, for `wandb sync` ({error})")
        wandb.teardown()  # the failed run still holds the id
        run = wandb.init(mode="offline", **start)

    def write(found: dict, at: int) -> None:
        if at >= run.starting_step:  # what it has already it would refuse, with a warning each
            run.log(found, step=at)

    if step:  # kill -9 takes what wandb had not written yet, some seconds
        for row in map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines()):
            write(numbers(row), row["step"])
    return Tracker("wandb", write, run.finish)


def open_tensorboard(out: Path, cfg: dict, step: int) -> Tracker:
    """Event files in out/tensorboard, flushed each step: those of a killed run are whole too."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
    writer.add_text("config", "    " + json.dumps(cfg, indent=1).replace("\n", "\n    "))

    def write(found: dict, at: int) -> None:
        for key, value in found.items():
            writer.add_scalar(key, value, at)
        writer.flush()

    return Tracker("tensorboard", write, writer.close)


OPEN = {"wandb": open_wandb, "tensorboard": open_tensorboard}
