"""Checkpoints that a run goes on from bit for bit: written whole, read by any number of processes.

    step_000100/            a Hugging Face checkpoint in float32: the weights exactly; of a run
                            with LoRA the factors alone, see adapter.py
    step_000100/state/      optimizer_R_0.safetensors …: the rows of the moments that process R has;
                            progress.json: numbers of the loop, sizes of all files and journals

There is no random state: seed, prompt and place fix a sample, seed and position a row of the data.

What we do differently: torch.distributed.checkpoint unpickles what it reads, and its safetensors
variant leaves rows as they were, in silence, where the file of a process is missing. Here each
process writes its own rows; any number of processes read them, without communication, each what it
needs, and rows that no file has are an error. A checkpoint gets its name when all of it is on the
disk, and loses it before any of it is removed. Several machines need a disk that all of them see.
"""

import json
import math
import os
import shutil
import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import lora
import parallel
from checkpoint import open_weights
from journal import steps_of, write_json

FILE = 4e9  # bytes of a file of moments, about; as much is copied from the device at a time


# ------------------------------------------------------------------------------------------ saving


def save_checkpoint(model, processor, folder: Path) -> None:
    """A Hugging Face checkpoint without a state: weights, config, tokenizer, settings. All
    processes call it. ValueError in all where it cannot be written; then none is there."""
    weights = parallel.full_state_dict(model, lora.kept(model))
    part = folder.with_name(folder.name + ".tmp")
    try:
        with writing(folder):
            if parallel.rank() == 0:
                shutil.rmtree(part, ignore_errors=True)
                write_checkpoint(weights, model, processor, part)
                settle(part, folder)
    finally:
        if parallel.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)


def save(model, processor, optimizers, out: Path, step: int, numbers: dict, keep=None, best=None):
    """Writes out/step_…, from which the run goes on with `numbers` (for JSON). All processes call
    it, when the step is in the journals. After that the `keep` newest checkpoints stay (None: all)
    and that of step `best`.

    ValueError in every process for weights or moments that are not finite, or where a process
    cannot write; then nothing is left behind, and the checkpoints of before are untouched.
    """
    folder = out / f"step_{step:06d}"
    part, first = folder.with_name(folder.name + ".tmp"), parallel.rank() == 0
    moments = moments_of(model, optimizers)
    refuse_not_finite({**dict(model.named_parameters()), **moments}, out, step)
    try:
        with writing(folder):
            if first:
                shutil.rmtree(part, ignore_errors=True)
                (part / "state").mkdir(parents=True)
        with writing(folder):
            sizes = write_moments(moments, part / "state")
        sizes = parallel.gathered(sizes)
        weights = parallel.full_state_dict(model, lora.kept(model))
        with writing(folder):
            if first:
                write_checkpoint(weights, model, processor, part)
                numbers = {**numbers, "step": step, "processes": parallel.size()}
                write_progress(numbers, sizes, part, out)
                settle(part, folder)
    finally:
        if first:
            shutil.rmtree(part, ignore_errors=True)
    if first and keep:
        remove_old(out, keep, best)


@contextmanager
def writing(folder: Path):
    """What cannot be written in one process is a ValueError in all."""
    with parallel.agreed():
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} could not be saved: {error}; what was saved before stays as "
                          "it was") from error


def moments_of(model, optimizers) -> dict[str, Tensor]:
    """All tensors of the optimizers' state by "PARAMETER MOMENT"."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]} {what}": x for optimizer in optimizers
            for p, state in optimizer.state.items() for what, x in state.items()}  # fmt: skip


@torch.no_grad()
def refuse_not_finite(tensors: dict[str, Tensor], out: Path, step: int) -> None:
    """ValueError in every process if a number of any of them is not finite."""
    mine = [name for name, x in tensors.items() if not piece(x)[0].isfinite().all()]
    bad = sorted(set().union(*parallel.gathered(mine)))
    if bad:
        good = next((p for p in reversed(steps_of(out)) if not damage(p)), "none yet")
        more = f" and {len(bad) - 1} more weights and moments" if len(bad) > 1 else ""
        raise ValueError(f"step {step} is not saved: {bad[0]}{more} have numbers that are not "
                         f"finite; the newest good checkpoint: {good}")


def piece(x: Tensor) -> tuple[Tensor, int, bool]:
    """The rows of x in this process, the number of the first, and if it is this process that
    writes them: FSDP2 deals out rows, to several groups of processes the same (HSDP)."""
    if not isinstance(x, DTensor):
        return x, 0, parallel.rank() == 0
    mesh, first, writes = x.device_mesh, 0, True
    for dim, (placement, at) in enumerate(zip(x.placements, mesh.get_coordinate())):
        if placement.is_shard():
            assert placement.dim == 0, "only rows are dealt out"
            first = min(len(x), at * math.ceil(len(x) / mesh.size(dim)))
        else:
            writes = writes and at == 0
    return x.to_local(), first, writes


def write_moments(moments: dict[str, Tensor], folder: Path) -> dict[str, int]:
    """The rows of this process; sizes of the files by their names. Which rows they are stands in
    the files: [first row, *shape of the whole]."""
    files, total, sizes = defaultdict(dict), 0, {}
    for key, x in moments.items():
        rows, first, writes = piece(x)
        if writes and rows.numel():
            files[int(total // FILE)][key] = rows, [first, *x.shape]
            total += rows.nbytes
    for n, items in files.items():
        path = folder / f"optimizer_{parallel.rank()}_{n}.safetensors"
        save_file({key: rows.cpu().contiguous() for key, (rows, _) in items.items()}, path,
                  {"places": json.dumps({key: place for key, (_, place) in items.items()})})
        fsync(path)
        sizes[f"state/{path.name}"] = path.stat().st_size
    return sizes


def write_checkpoint(weights: dict[str, Tensor], model, processor, part: Path) -> None:
    """What transformers and vLLM need of a checkpoint, or of a LoRA adapter."""
    lora.save(part, weights, model)
    processor.save_pretrained(part)


def write_progress(numbers: dict, written: list[dict], part: Path, out: Path) -> None:
    """numbers, with the size of each file (those of other machines may not be listed yet) and of
    each journal of the run, to which it is cut back when it goes on from here."""
    journals = list(out.glob("*.jsonl"))
    for path in journals:
        fsync(path)
    files = {str(p.relative_to(part)): p.stat().st_size for p in part.rglob("*") if p.is_file()}
    for sizes in written:
        files |= sizes
    journals = {p.name: p.stat().st_size for p in journals}
    more = {"torch": torch.__version__, "files": files, "journals": journals}
    write_json({**numbers, **more}, part / "state" / "progress.json")


def settle(part: Path, folder: Path) -> None:
    """Gives a folder its name when all of it is on the disk."""
    for path in part.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors' writer leaves 0o600
        fsync(path)
    fsync(part)
    part.rename(folder)
    fsync(folder.parent)


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    f = os.open(path, os.O_RDONLY)
    try:
        os.fsync(f)
    finally:
        os.close(f)


def remove_old(out: Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints with a state but the `keep` newest and that of step `best`."""
    for folder in [p for p in steps_of(out) if (p / "state").is_dir()][:-keep]:
        if int(folder.name[5:]) != best:
            gone = folder.with_name(folder.name + ".tmp")
            try:
                shutil.rmtree(folder.rename(gone))
            except OSError as error:  # NFS, with a reader: no reason to end the run
                print(f"{folder} could not be removed: {error}", file=sys.stderr)


# ----------------------------------------------------------------------------------------- loading


@torch.no_grad()
def load_optimizers(folder: Path, model, optimizers) -> None:
    """The optimizers' state of a checkpoint into them; each process reads the rows that it needs.
    ValueError for a state of another model, with names, and for rows that no file has."""
    names = {p: name for name, p in model.named_parameters()}
    parts, moments = defaultdict(list), defaultdict(list)
    with ExitStack() as stack:
        for file in progress(folder)["files"]:
            if file.startswith("state/optimizer_"):
                f = stack.enter_context(open_weights(folder / file))
                for key, (first, *shape) in json.loads(f.metadata()["places"]).items():
                    parts[key].append((f, first, tuple(shape)))
        for key in parts:
            name, _, moment = key.rpartition(" ")
            moments[name].append(moment)
        if other := sorted(moments.keys() - set(names.values())):
            raise ValueError(f"{folder}/state is of another model: {other[0]} is not in this one")
        for optimizer in optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            state = {i: {moment: read_rows(f"{names[p]} {moment}", p, parts, folder)
                         for moment in moments[names[p]]}
                     for i, p in enumerate(params) if names[p] in moments}  # fmt: skip
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def read_rows(key: str, p: Tensor, parts: dict, folder: Path) -> Tensor:
    """A moment of parameter p, or the number of its steps, dealt out as p is."""
    shape = parts[key][0][2]
    if shape == ():
        return parts[key][0][0].get_tensor(key).clone()
    if shape != tuple(p.shape):
        raise ValueError(f"{folder}/state is of another model: {key} is {shape}, the parameter "
                         f"{tuple(p.shape)}")
    value, found = torch.zeros_like(p), 0
    rows, start, _ = piece(value)
    for f, first, _ in parts[key]:
        part = f.get_slice(key)
        a, b = max(start, first), min(start + len(rows), first + part.get_shape()[0])
        if a < b:
            rows[a - start : b - start] = part[a - first : b - first]
            found += b - a
    if found != len(rows):
        raise ValueError(f"{folder}/state: {len(rows) - found} rows of {key} are in no file")
    return value


def progress(folder: Path) -> dict:
    """The numbers of a checkpoint, see save."""
    return json.loads((folder / "state" / "progress.json").read_bytes())


def damage(folder: Path) -> str | None:
    """What hinders that a run goes on from a checkpoint; None if nothing does."""
    try:
        for name, size in progress(folder)["files"].items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were written"
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            if path.suffix == ".safetensors":
                with open_weights(path):
                    pass  # its header fits its size
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (ValueError, KeyError) as error:
        return f"a file is damaged: {error}"
    return None
