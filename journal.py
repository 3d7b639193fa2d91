"""What a run writes to disk beside its checkpoints (saving.py): metrics, samples and probes.

    runs/NAME/
      config.json     every key, after recipe and command line (resume.py)
      metrics.jsonl   a line per step
      rollouts.jsonl  samples: prompt, pictures, completions with rewards, advantages and boxes
      probes.jsonl    the same held-out questions, answered greedily as training goes
      images/         the pictures of both
      eval/           answers of the evaluations before and after
      step_000100/    a Hugging Face checkpoint, with state/ to go on from
      summary.json    before and after, seconds, memory
      report.html     all of it as one page (report.py)

Whatever a reader may find half written gets a temporary name first and is renamed when whole.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from boxscores import marked
from checkpoint import checkpoint_folder
from data import Prompt
from grading import score_all
from hub import is_hub_id
from images import open_image
from rollout import Rollout, sample


def steps_of(folder: Path) -> list[Path]:
    """The folders step_… of a run, oldest first; step_….tmp was never finished."""
    found = [p for p in Path(folder).glob("step_*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_checkpoint(folder: str) -> str:
    """`folder` if it is a checkpoint, else that which the run that it is has left, or the last
    stage of the recipe that it is, or the newest run in it: see left. Where there is no such
    folder, the hub's checkpoint of that id, downloaded if need be. ValueError if there is none."""
    if whole(Path(folder)):
        return folder
    if is_hub_id(folder):
        return str(checkpoint_folder(folder))
    runs = [Path(folder), *(Path(folder) / name for name in reversed(stages_of(Path(folder))))]
    found = next(filter(None, map(left, runs)), None)
    if not found:
        steps = [p for pattern in ("*", "*/*") for run in Path(folder).glob(pattern)
                 for p in steps_of(run) if whole(p)]  # of a stage, too
        found = left(max(steps, key=lambda p: p.stat().st_mtime).parent) if steps else None
    if not found:
        raise ValueError(f"model {folder}: neither a checkpoint folder (config.json and "
                         "tokenizer.json), nor a run that has one (step_…), nor a folder of runs, "
                         "nor the id of one on the hub (owner/name)")
    return str(found)


def whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))


def stages_of(out: Path) -> dict[str, str]:
    """{folder: what it chooses, last or best} of the stages of a recipe that run.py runs in `out`,
    in their order; {} if it runs none there."""
    try:
        told = json.loads((out / "recipe.json").read_bytes())
        return {stage["folder"]: stage["choose"] for stage in told["stages"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def left(run: Path) -> Path | None:
    """The checkpoint that a run has left: its newest; of a stage that has ended and chooses the
    best, that one. None if there is none yet."""
    steps = [p for p in steps_of(run) if whole(p)]
    if stages_of(run.parent).get(run.name) == "best" and (run / "summary.json").is_file():
        best = json.loads((run / "summary.json").read_bytes()).get("best", {}).get("step")
        steps = [p for p in steps if int(p.name[5:]) == best] or steps
    return steps[-1] if steps else None


@contextmanager
def naming(path):
    """Lets an OSError of what is written here, a full disk above all, name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_json(obj, path) -> None:
    """Writes obj as JSON, whole or not at all; what stood at path before stays until then."""
    part = Path(f"{path}.tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            with open(part, "w", encoding="utf-8") as f:
                json.dump(jsonable(obj), f, indent=1, allow_nan=False)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def append(path: Path, row: dict) -> None:
    """One line of JSON. A number that is not finite, which JSON does not know, is null."""
    with naming(path), open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(jsonable(row), allow_nan=False) + "\n")


def jsonable(item):
    """The same with None for every float that is not finite."""
    if isinstance(item, dict):
        return {key: jsonable(value) for key, value in item.items()}
    if isinstance(item, list):
        return [jsonable(value) for value in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item


# ------------------------------------------------------------------------------ samples and probes


def save_images(out: Path, prompt: Prompt, name: str) -> list[str]:
    """The pictures of a prompt as PNG under out/images; their paths, relative to out."""
    paths = []
    for i, image in enumerate(prompt.example.images):
        paths.append(f"images/{name}_{i}.png")
        if not (out / paths[-1]).exists():
            (out / "images").mkdir(exist_ok=True)
            part = out / f"{paths[-1]}.tmp"
            Image.fromarray(open_image(image)).save(part, format="PNG")
            part.replace(out / paths[-1])
    return paths


def log_rollout(out: Path, step: int, rollout: Rollout, names, table, reward, adv, most=4):
    """The first `most` groups of a step to rollouts.jsonl. names of the R reward functions, their
    table (R, B, G), the weighted sum reward (B, G) that was trained on, adv (B, G)."""
    for b, prompt in enumerate(rollout.prompts[:most]):
        asked, said = marked(rollout.texts[b], prompt.example)
        completions = [
            {
                "text": text,
                "rewards": dict(zip(names, table[:, b, g].tolist())),
                "reward": float(reward[b, g]),
                "advantage": float(adv[b, g]),
                "length": int(rollout.lengths[b, g]),
                "finished": bool(rollout.finished[b, g]),
                **said[g],
            }
            for g, text in enumerate(rollout.texts[b])
        ]
        append(out / "rollouts.jsonl", {
            "step": step, "prompt": prompt.text, "problem": prompt.example.problem,
            "solution": prompt.example.solution, "row": prompt.example.row,
            "images": save_images(out, prompt, f"rollout_{step:06d}_{b}"), **asked,
            "completions": completions,
        })  # fmt: skip


def log_probes(out: Path, step: int, model, processor, prompts: list[Prompt], rewards, max_new):
    """Greedy answers to the same few questions, to probes.jsonl."""
    if not prompts:
        return
    out_of = sample(model, processor, prompts, 1, max_new, temperature=0)
    texts = [text for (text,) in out_of.texts]
    table = score_all(rewards, texts, [p.example for p in prompts], out_of.lengths[:, 0].tolist())
    names = [name for name, _, _ in rewards]
    marks = [marked([text], p.example) for p, text in zip(prompts, texts)]
    answers = [
        {
            "problem": p.example.problem, "solution": p.example.solution, "text": text,
            "images": save_images(out, p, f"probe_{i}"),
            "rewards": dict(zip(names, values)), **asked, **said,
        }
        for i, (p, text, (asked, [said]), *values) in enumerate(zip(prompts, texts, marks, *table))
    ]  # fmt: skip
    append(out / "probes.jsonl", {"step": step, "answers": answers})


# ------------------------------------------------------------------------------- time and memory


class Seconds(dict):
    """Wall-clock seconds by name: `with seconds("eval"): ...` adds; `last` has each's latest."""

    def __init__(self):
        super().__init__()
        self.start, self.last, self.laps = time.perf_counter(), {}, {}

    def __missing__(self, name):
        return 0.0

    @contextmanager
    def __call__(self, name: str):
        begin = time.perf_counter()
        yield
        self.last[name] = time.perf_counter() - begin
        self[name] += self.last[name]

    def each(self, name: str, items: Iterator) -> Iterator:
        """The same items; what it takes to make each counts as `name`."""
        end = object()
        while True:
            with self(name):
                item = next(items, end)
            if item is end:
                return
            yield item

    def since_start(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self.start

    def lap(self) -> dict[str, float]:
        """Seconds by name since the last call, and "all" that went by."""
        now = {**self, "all": self.since_start()}
        lap = {name: now[name] - self.laps.get(name, 0.0) for name in now}
        self.laps = now
        return lap


def peak_memory_gb() -> float:
    """Peak so far: of the device where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB; bytes on macOS
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
