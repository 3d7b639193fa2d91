"""A small net with optimizers, and what becomes of its checkpoints in several processes, in killed
ones and on full disks, for test_saving.py.

    python tests/groups.py FOLDER

torch takes seconds to import. Here it is imported once, and all processes are forked from this one,
which runs nothing itself that would start threads.
"""

import json
import os
import resource
import signal
import sys
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import parallel
import saving
from journal import steps_of
from optim import make_optimizers

LAYOUTS = {"1": (1,), "3": (3,), "2x2": (2, 2), "2": (2,)}  # 2x2: two copies of two slices
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}  # audited
PROCESSOR = SimpleNamespace(save_pretrained=lambda f: (f / "tokenizer.json").write_text("{}"))


class Net(nn.Module):
    """Rows that no number of processes divides, fewer rows than processes, a tied head, and a
    weight that never has a gradient."""

    def __init__(self):
        super().__init__()
        self.cfg = SimpleNamespace(tie_word_embeddings=True, raw={})
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(5, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.up = nn.Linear(3, 7)
        self.one, self.two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2, 1))
        self.idle = nn.Parameter(torch.zeros(4))


def shared_out(layout: str):
    """The net, its weights dealt out over the processes, and its optimizers."""
    net, shape = Net(), LAYOUTS[layout]
    if shape != (1,):
        names = ("copy", "shard")[-len(shape):]
        fully_shard(net, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    return net, make_optimizers(net, "muon", 1e-2)


def deal(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements)


@torch.no_grad()
def fill(net, optimizers, step: int) -> None:
    """Weights and moments as of a step: random numbers, the same for every layout."""
    generator = torch.Generator().manual_seed(step)

    def noise(p):
        return deal(torch.randn(p.shape, generator=generator), p)

    names = {p: name for name, p in net.named_parameters()}
    for p in net.parameters():
        p.copy_(noise(p))
    for optimizer, moments in zip(optimizers, (("exp_avg", "exp_avg_sq"), ("momentum_buffer",))):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if names[p] != "idle":
                optimizer.state[p] = {moment: noise(p) for moment in moments}
                if "exp_avg" in moments:
                    optimizer.state[p]["step"] = torch.tensor(float(step))


def same(net, optimizers, step: int, layout="1") -> bool:
    """If the optimizers hold what fill() gives them, bit for bit, and are dealt out alike."""
    other, wanted = shared_out(layout)
    fill(other, wanted, step)
    mine, theirs = saving.moments_of(net, optimizers), saving.moments_of(other, wanted)
    return len(mine) == 11 and mine.keys() == theirs.keys() and all(
        type(x) is type(theirs[k]) and getattr(x, "placements", 0) == getattr(theirs[k],
        "placements", 0) and torch.equal(saving.piece(x)[0], saving.piece(theirs[k])[0])
        for k, x in mine.items()
    )  # fmt: skip


def error_of(act, *args) -> str | None:
    try:
        act(*args)
    except ValueError as error:
        return str(error)


# ------------------------------------------------------------------------- what a process does


def save_and_load(folder: Path, layout: str) -> None:
    """Saves a checkpoint; loads it, and those of the layouts before."""
    net, optimizers = shared_out(layout)
    fill(net, optimizers, 1)
    saving.save(net, PROCESSOR, optimizers, folder / layout, 1, {"drawn": 7})
    found = {}
    for other in (name for name in LAYOUTS if (folder / name).exists()):
        net, optimizers = shared_out(layout)
        saving.load_optimizers(folder / other / "step_000001", net, optimizers)
        found[other] = same(net, optimizers, 1, layout)
    (folder / f"loaded_{layout}_{parallel.rank()}.json").write_text(json.dumps(found))


def fail_in_one(folder: Path, layout: str) -> None:
    """One process has a NaN in a weight, then no room on its disk: all are told."""
    net, optimizers = shared_out(layout)
    fill(net, optimizers, 2)
    out, odd = folder / layout, parallel.rank() == 1
    with torch.no_grad():
        if odd:
            net.up.weight.to_local()[-1] = torch.nan
    found = {"nan": error_of(saving.save, net, PROCESSOR, optimizers, out, 2, {})}
    fill(net, optimizers, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 if odd else -1, -1))  # bytes of a file
    found["full"] = error_of(saving.save, net, PROCESSOR, optimizers, out, 2, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    parallel.gathered(None)
    found["left"] = sorted(p.name for p in out.iterdir())
    (folder / f"told_{parallel.rank()}.json").write_text(json.dumps(found))


def group(folder: Path, layout: str, *acts) -> None:
    """Forks the processes of a layout, which do the acts; SystemExit if one of them fails."""
    n, children = torch.Size(LAYOUTS[layout]).numel(), []
    for rank in range(n):
        if not (child := os.fork()):
            if n > 1:
                meet = f"file://{folder}/meet_{layout}"
                dist.init_process_group("gloo", meet, timedelta(seconds=60), n, rank)
            for act in acts:
                act(folder, layout)
            parallel.gathered(None)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit(f"failed with {layout} processes")


# -------------------------------------------------------------------------- one, killed or hindered


def forked(act, *args) -> int:
    """The status with which a child ends that does act(*args)."""
    if not (child := os.fork()):
        act(*args)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def save_one(out: Path, step: int, moment: int | None = None) -> None:
    """Saves the checkpoint of a step, or dies by SIGKILL before operation `moment` on a file."""
    net, optimizers = shared_out("1")
    fill(net, optimizers, step)
    seen = count()

    def hook(event, args):
        if event in OPERATIONS and next(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    saving.save(net, PROCESSOR, optimizers, out, step, {}, keep=2, best=1)


def kill_everywhere(out: Path) -> list:
    """Kills saves at one moment after the other, until one ends. -> what each of them left: steps
    that the newest checkpoint is ahead, if all is well, the number of checkpoints, remains."""
    for step in (1, 2, 3):
        forked(save_one, out, step)
    left = []
    for moment in count():
        last = int(steps_of(out)[-1].name[5:])
        status, found = forked(save_one, out, last + 1, moment), steps_of(out)
        net, optimizers = shared_out("1")
        saving.load_optimizers(found[-1], net, optimizers)
        step = int(found[-1].name[5:])
        well = same(net, optimizers, step) and not any(saving.damage(p) for p in found)
        well = well and found[0].name == "step_000001"  # the best
        left.append([step - last, well, len(found), any(out.glob("*.tmp"))])
        if status == 0:
            return left


def fill_disk(out: Path) -> list:
    """Saves with files of 0 bytes at most, of 200 ..., until one fits. -> the errors, and what was
    there after each."""
    (net, optimizers), told = shared_out("1"), []
    large = SimpleNamespace(save_pretrained=lambda f: (f / "tokenizer.json").write_text("9" * 4000))
    fill(net, optimizers, 1)
    saving.save(net, large, optimizers, out, 1, {})
    for limit in count(0, 200):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        error = error_of(saving.save, net, large, optimizers, out, 2, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        told.append([error, sorted(p.name for p in out.iterdir())])
        if not error:
            return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for layout in LAYOUTS:
        acts = (save_and_load, fail_in_one) if layout == "2" else (save_and_load,)
        group(folder, layout, *acts)
    for act in (kill_everywhere, fill_disk):
        (folder / f"{act.__name__}.json").write_text(json.dumps(act(folder / act.__name__)))
