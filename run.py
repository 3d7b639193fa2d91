"""Run: the stages of a recipe, one after the other, in one folder and with one report.

    python run.py recipes/vision_r1.toml --dry_run                # prints all stages, reads nothing
    python run.py recipes/vision_r1.toml --model DIR --cold.lr 1e-5
    make train GPUS=8 RECIPE=recipes/vision_r1.toml

What a recipe is: stages.py. The same command goes on in the middle of any stage, and runs no stage
again that has ended; of the last one it may ask for more steps. Another recipe never writes into
the same folder: it goes to OUT_2, as a single run does.

    runs/vision_r1/
      recipe.json      path, note and stages
      1_cold/          what the method of the stage writes, and its summary.json
      2_grpo/
      report.html      all stages as one page

Training runs on all processes of torchrun, filters too; a step of distillation on the first one,
while the others wait.
"""

import gc
import json
import math
import os
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

import distill
import grpo
import parallel
import report
import resume
import sft
import sieve
import stages
from config import to_dict
from grading import load_rewards
from hub import is_hub_id
from journal import newest_checkpoint, write_json
from resume import Stop, take_lock
from rows import apart, on_hub, with_columns
from scenes import parse_world
from scorers import load_scorer
from stages import Recipe, Stage
from template import find_template

RUNS = {"sft": sft.train, "grpo": grpo.train, "filter": sieve.sift}
# Keys of a config that name what must be there, and those that say more of the rewards.
NAMING = ("template", "rewards", "scorer", "model", "teacher", "reasoner", "data", "images",
          "held_out", "evals")  # fmt: skip
REWARDED = ("reward_weights", "reward_seconds", "reward_memory")


def main(argv=None) -> dict:
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__, stages.__doc__, sep="\n")
        raise SystemExit(0)
    try:
        recipe = stages.read(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if recipe.whole.dry_run:
        print(recipe.text())
        return {}
    with parallel.together(), parallel.told(OSError):
        return run(recipe)


def run(recipe: Recipe) -> dict:
    """Runs all stages that have not ended yet; {name: summary} of all of them."""
    parallel.start()
    if not recipe.stages[0].number:
        return {recipe.stages[0].name: single(recipe)}
    with parallel.told():
        out, lock = open_whole(recipe)
        left, found = {}, {}
        for stage in recipe.stages:
            cfg, folder = stage.ready(out, left), stage.folder(out)
            if not parallel.gathered(ended(folder, cfg))[0]:
                perform(stage, cfg, folder)
            with parallel.agreed():  # the first process writes it, the others may be ahead
                there = read_json(folder / "summary.json") if parallel.rank() == 0 else None
            found[stage.name] = parallel.gathered(there)[0]
            left[stage.name] = str(chosen(stage, out, found[stage.name]))
        if parallel.rank() == 0:
            print(table(recipe, found, left), f"\nreport  {out / 'report.html'}", sep="\n")
        del lock  # held until here
        return found


def table(recipe: Recipe, found: dict, left: dict) -> str:
    """What every stage did to the evaluations, in how many seconds, and where what it left is."""
    lines = [f"\n{'stage':14}  {'seconds':>8}  {'eval':10}  before -> after"]
    for stage in recipe.stages:
        summary, rows = found[stage.name], []
        for name, after in (summary.get("after") or {}).items():
            before = summary["before"][name]
            rows.append(f"{name:10}  {before['accuracy']:.3f} -> {after['accuracy']:.3f}")
        if "kept" in summary:
            rows.append(f"{summary['kept']} of {summary['rows']} rows kept")
        for n, row in enumerate(rows or [""]):
            head = (stage.name, f"{summary['seconds']['all']:.0f}") if n == 0 else ("", "")
            lines.append(f"{head[0]:14}  {head[1]:>8}  {row}".rstrip())
        lines.append(f"{'':14}  {'':8}  {left[stage.name]}")
    return "\n".join(lines)


def single(recipe: Recipe) -> dict:
    """The only run of a recipe without stages, as its method's own command runs it."""
    [stage] = recipe.stages
    cfg = stage.ready(Path(recipe.whole.out), {})
    if stage.method in stages.TRAINS:
        cfg = replace(cfg, resume=recipe.whole.resume)
    return RUNS[stage.method](cfg)


def perform(stage: Stage, cfg, folder: Path) -> None:
    """Runs a stage, or goes on with it, and lets go of its models."""
    first = parallel.rank() == 0
    if first:
        print(f"\n== {stage.what} -> {folder}", flush=True)
        report.write(folder.parent, running=True)
    if stage.method in RUNS:
        RUNS[stage.method](cfg)
    else:
        distilled(stage, cfg, folder)
    if first:
        report.write(folder.parent)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def distilled(stage: Stage, cfg, folder: Path) -> None:
    """A step of distillation, by the first process. The others look now and then if it is done: a
    sum over processes would not wait for days."""
    begin = time.monotonic()

    def work():
        _, step = distill.STEPS[stage.step]
        write_json(to_dict(cfg), folder / "config.json")
        if stage.step != "pack" or not Path(cfg.out).exists():  # a set is there if it is whole
            step(cfg)
        seconds = {"all": round(time.monotonic() - begin, 1)}
        write_json({"seconds": seconds}, folder / "summary.json")

    with Stop():
        alone(work, folder.name)


def alone(work, name: str) -> None:
    """work() in the first process. ValueError in all where it fails."""
    if parallel.size() == 1:
        return work()
    store, error = parallel.store(), None
    if parallel.rank() == 0:
        try:
            work()
        except (ValueError, OSError) as e:
            error = str(e)
        finally:
            store.set(f"ended {name}", "")  # however it ended
    while not store.check([f"ended {name}"]):
        time.sleep(0.5)
    parallel.agree(error)


# -------------------------------------------------------------------------------- where it goes on


def open_whole(recipe: Recipe) -> tuple:
    """(folder, its lock): new, or that of the same recipe, which goes on. All processes call it,
    the first decides."""
    found, error = (None, None), None
    if parallel.rank() == 0:
        try:
            found = choose_whole(recipe)
        except (ValueError, OSError) as e:
            error = str(e)
    parallel.agree(error)
    return parallel.gathered(found[0])[0], found[1]


def choose_whole(recipe: Recipe) -> tuple:
    """The first of OUT, OUT_2 … that goes on, else a new one behind them. Where resume is never,
    only torchrun's restart goes on, with the last."""
    names = (Path(recipe.whole.out if n == 1 else f"{recipe.whole.out}_{n}") for n in count(1))
    taken = []
    while holds(out := next(names)):
        taken.append(out)
    for old in taken if recipe.whole.resume == "auto" else taken[-1:] * resume.restarted():
        if not (why := why_not(old, recipe)):
            out = old
            break
        print(f"{old} is left alone: {why}", file=sys.stderr)
    check(recipe, out)
    if not (lock := take_lock(out)):
        raise ValueError(f"{out} is being written by {(out / 'run.lock').read_text().strip()}; "
                         "give this run another --out")
    write_json({"recipe": recipe.path, "stages": [
        {"folder": stage.folder(out).name, "what": stage.what, "choose": stage.choose,
         "config": to_dict(stage.cfg)} for stage in recipe.stages]}, out / "recipe.json")
    return out, lock


def check(recipe: Recipe, out: Path) -> None:
    """What can be known before the first stage begins of those that have not ended: whether there
    are their rewards, scorer, template, and the files and folders that they name, but for those
    that earlier stages leave. Nothing is downloaded, no server asked. ValueError names recipe,
    stage and key."""
    names = {stage.name for stage in recipe.stages}
    for stage in recipe.stages:
        if (stage.folder(out) / "summary.json").exists():
            continue
        for key in NAMING:
            try:
                look(stage.cfg, key, lambda said: bool(stages.braced(said) & names))
            except (ValueError, OSError) as error:
                raise ValueError(f"{recipe.path}: stage {stage.name}: {key}: {error}") from error


def look(cfg, key: str, comes=lambda said: False) -> None:
    """ValueError where a key of any config, if it has it, names what is not there, or there is no
    such reward, scorer or template. Nothing is downloaded, no server asked. comes(text): whether
    that will be there in time."""
    value, served = getattr(cfg, key, None), hasattr(cfg, "base_url")  # whose model no file is
    if value is None or (served and key in ("template", "teacher")):
        return
    if key == "rewards" and value:
        load_rewards(value, *(getattr(cfg, more) for more in REWARDED if hasattr(cfg, more)))
    elif key == "scorer":
        load_scorer(value)
    elif key == "template":
        find_template(value, cfg.system)
    elif key in ("model", "teacher", "reasoner"):
        if not (is_hub_id(value) or "@http" in value or comes(value)):
            newest_checkpoint(value)
    elif key in ("data", "images", "held_out", "evals"):
        sources = [item.partition("=")[2] for item in value] if key == "evals" else [value]
        for source in sources:
            gone = [source] * (not os.path.isdir(source)) if key == "images" else absent(source)
            if gone := [place for place in gone if not comes(place)]:
                raise ValueError(f"{gone[0] or 'none given'}: no such file or folder")


def absent(source: str) -> list[str]:
    """The files and folders that a source of rows names, also behind images= and only=, and that
    are not there; what may be an id of the hub may be there. ValueError for a world that cannot
    be."""
    found = []
    for place, more in map(with_columns, apart(source)):
        named = {place.rpartition(":")[0], place} - {""}  # with a split behind it, and without
        if place.startswith("world:"):
            parse_world(place, "train")
        elif not any(os.path.exists(name) or on_hub(name) for name in named):
            found.append(place)
        behind = (str(more[key]) for key in ("images", "only") if key in more)
        found += [name for name in behind if not os.path.exists(name)]
    return found


def holds(out: Path) -> bool:
    return any((out / name).exists() for name in ("recipe.json", "config.json"))


def why_not(out: Path, recipe: Recipe) -> str | None:
    """Why what lies in `out` is not this recipe, begun; None if it is."""
    if not (out / "recipe.json").exists():
        return "it holds a single run"
    begun = {p.parent.name for p in out.glob("*/config.json")}
    left = {}
    for stage in recipe.stages:
        cfg, folder = stage.ready(out, left), stage.folder(out)
        if folder.name not in begun:
            break
        begun.remove(folder.name)
        if why := differs(stage, folder, cfg):
            return f"its stage {folder.name}: {why}"
        if not ended(folder, cfg):
            break
        left[stage.name] = str(chosen(stage, out, read_json(folder / "summary.json")))
    return f"it has a stage {min(begun)} already" if begun else None


def differs(stage: Stage, folder: Path, cfg) -> str | None:
    """Why a stage that was begun in `folder` is not one of this config, or cannot be gone on with;
    None if it can. It may ask for more steps than before, but the best is of steps that were all
    scored."""
    trains = stage.method in stages.TRAINS
    free = resume.FREE if trains else sieve.FREE
    free = free - {"eval_saves"} if stage.choose == "best" else free
    why = resume.other_config(folder, cfg, free, ("steps", "epochs"))
    return why or (resume.why_not(folder, cfg, math.inf) if trains and not ended(folder, cfg)
                   else None)  # fmt: skip


def ended(folder: Path, cfg) -> bool:
    """Whether a stage has done all that its config asks for."""
    if not (folder / "summary.json").exists():
        return False
    there, now = read_json(folder / "config.json"), to_dict(cfg)
    keys = ("steps", "epochs") if now.get("steps") is None else ("steps",)  # epochs say nothing
    return all(there.get(key) == now.get(key) for key in keys)


def chosen(stage: Stage, out: Path, summary: dict) -> Path:
    """What a stage has left: of a training stage the checkpoint that it chooses."""
    if stage.method not in stages.TRAINS:
        return stage.leaves(out)
    step = summary["best"]["step"] if stage.choose == "best" else summary["steps"]
    return stage.folder(out) / f"step_{step:06d}"


def read_json(path: Path) -> dict:
    return json.loads(path.read_bytes())


if __name__ == "__main__":
    main()
