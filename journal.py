"""What a run writes to disk: its folder, checkpoints, metrics, samples and probes.

    runs/NAME/
      config.json     every key, after recipe and command line
      metrics.jsonl   a line per step
      rollouts.jsonl  samples: prompt, pictures, completions with their rewards and advantages
      probes.jsonl    the same held-out questions, answered greedily as training goes
      images/         the pictures of both
      eval/           answers of the evaluations before and after
      step_000100/    a Hugging Face checkpoint
      summary.json    before and after, seconds, memory
      report.html     all of it as one page (report.py)

Whatever a reader may find half written gets a temporary name first and is renamed when whole.
"""

import json
import math
import os
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from checkpoint import checkpoint_folder
from config import save_json
from data import Prompt
from hub import is_hub_id
from images import open_image
from rollout import Rollout, sample


def run_folder(name: str, cfg) -> Path:
    """A new folder with config.json: `name`, or name_2, ... where a run lies already."""
    out, n = Path(name), 1
    while (out / "config.json").exists():
        n += 1
        out = Path(f"{name}_{n}")
    if n > 1:
        print(f"{name} holds a run already; this one goes to {out}", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    save_json(replace(cfg, out=str(out)), out / "config.json")
    return out


def save_checkpoint(model, processor, folder: Path) -> None:
    """A complete Hugging Face checkpoint: weights, config, tokenizer, preprocessor."""
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.save_pretrained(part)
    for path in part.iterdir():
        path.chmod(0o644)  # safetensors' writer leaves 0o600
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    part.rename(folder)


def newest_checkpoint(folder: str) -> str:
    """`folder` if it is a checkpoint, else the newest step_… of the run that it is, else that of
    the newest run in it; where there is no such folder, the hub's checkpoint of that id, downloaded
    if need be. ValueError if there is none."""

    def whole(p):  # a folder step_….tmp is one that was never finished
        return all((p / name).is_file() for name in ("config.json", "tokenizer.json"))

    if whole(Path(folder)):
        return folder
    if is_hub_id(folder):
        return str(checkpoint_folder(folder))
    steps = sorted(p for p in Path(folder).glob("step_*[0-9]") if whole(p))
    runs = [p for p in Path(folder).glob("*/step_*[0-9]") if whole(p)]
    if not steps and runs:
        newest = max(runs, key=lambda p: p.stat().st_mtime).parent
        steps = sorted(p for p in newest.glob("step_*[0-9]") if whole(p))
    if not steps:
        raise ValueError(f"model {folder}: neither a checkpoint folder (config.json and "
                         "tokenizer.json), nor a run that has one (step_…), nor a folder of runs, "
                         "nor the id of one on the hub (owner/name)")
    return str(steps[-1])


def write_json(obj, path) -> None:
    """Writes obj as JSON, whole or not at all; what stood at path before stays until then."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        json.dump(jsonable(obj), f, indent=1, allow_nan=False)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def append(path: Path, row: dict) -> None:
    """One line of JSON. A number that is not finite, which JSON does not know, is null."""
    with open(path, "a", encoding="utf-8") as f:
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
            Image.fromarray(open_image(image)).save(out / paths[-1])
    return paths


def log_rollout(out: Path, step: int, rollout: Rollout, names, table, reward, adv, most=4):
    """The first `most` groups of a step to rollouts.jsonl. names of the R reward functions, their
    table (R, B, G), the weighted sum reward (B, G) that was trained on, adv (B, G)."""
    for b, prompt in enumerate(rollout.prompts[:most]):
        completions = [
            {
                "text": text,
                "rewards": dict(zip(names, table[:, b, g].tolist())),
                "reward": float(reward[b, g]),
                "advantage": float(adv[b, g]),
                "length": int(rollout.lengths[b, g]),
                "finished": bool(rollout.finished[b, g]),
            }
            for g, text in enumerate(rollout.texts[b])
        ]
        append(out / "rollouts.jsonl", {
            "step": step, "prompt": prompt.text, "problem": prompt.example.problem,
            "solution": prompt.example.solution, "row": prompt.example.row,
            "images": save_images(out, prompt, f"rollout_{step:06d}_{b}"),
            "completions": completions,
        })  # fmt: skip


def log_probes(out: Path, step: int, model, processor, prompts: list[Prompt], rewards, max_new):
    """Greedy answers to the same few questions, to probes.jsonl."""
    if not prompts:
        return
    texts = sample(model, processor, prompts, 1, max_new, temperature=0).texts
    answers = [
        {
            "problem": p.example.problem, "solution": p.example.solution, "text": text,
            "images": save_images(out, p, f"probe_{i}"),
            "rewards": {n: f(text, p.example) for n, f, _ in rewards},
        }
        for i, (p, (text,)) in enumerate(zip(prompts, texts))
    ]  # fmt: skip
    append(out / "probes.jsonl", {"step": step, "answers": answers})


# ------------------------------------------------------------------------------- time and memory


class Seconds(dict):
    """Wall-clock seconds by name: `with seconds("eval"): ...` adds; `last` has each's latest."""

    def __init__(self):
        super().__init__()
        self.start, self.last = time.perf_counter(), {}

    def __missing__(self, name):
        return 0.0

    @contextmanager
    def __call__(self, name: str):
        begin = time.perf_counter()
        yield
        self.last[name] = time.perf_counter() - begin
        self[name] += self.last[name]

    def since_start(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self.start


def peak_memory_gb() -> float:
    """Peak so far: of the device where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB; bytes on macOS
    return peak / (1e9 if sys.platform == "darwin" else 1e6)
