"""Counting the bytes of tensors that come and go: of a real run, or of one on fake tensors.

    with FakeTensorMode():                       # shapes without memory: any size, in milliseconds
        layer = DecoderLayer(cfg, 0)
        kept, extra = trained(lambda x: layer(x, cos, sin, layout, None), x)

What we do differently from a formula for activations: the code itself is asked, so the answer stays
true when the code changes. What a device's allocator adds is not seen.
"""

import ctypes
import os
import weakref
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside: `now`, and `peak` at the worst moment."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {id(s) for s in storages((args, kwargs))}  # a view, or written to: nothing is new
        out = func(*args, **kwargs)
        for storage in storages(out):
            if id(storage) not in given | self.known.keys():
                self.made(storage)
        self.peak = max(self.peak, self.now)
        return out

    def made(self, storage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_):
            self.now -= size
            del self.known[key]

        self.now += size
        self.known[key] = weakref.ref(storage, freed)


def storages(tree) -> list:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def nbytes(*tensors: Tensor) -> int:
    """Of their memory; of what they share once."""
    return sum({id(storage): storage.nbytes() for storage in storages(tensors)}.values())


def trained(run, x: Tensor, recompute: bool = False, also: tuple = ()) -> tuple[int, int]:
    """Bytes that run(x) keeps for the backward pass, result included (with recompute: that alone),
    and those that both passes need beyond them. The gradients counted are x's and `also`'s."""
    x = x.requires_grad_()
    with Live() as live:
        y = run(x)
        kept = nbytes(y) if recompute else live.now
        torch.autograd.grad(y, (x, *also), torch.empty_like(y))
    return kept, live.peak - kept


def passing(run, *args) -> int:
    """Bytes that run(*args) needs at its worst moment, without gradient."""
    with torch.no_grad(), Live() as live:
        run(*args)
    return live.peak


def keep_memory() -> None:
    """What tensors free stays with this process. Else glibc gives it back, and the kernel clears
    its pages when they are touched anew: a tenth of an update."""
    with suppress(OSError, AttributeError):  # no glibc
        for threshold in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: bytes
            ctypes.CDLL(None).mallopt(threshold, 1 << 30)


def memory_of(device: str, processes: int = 1, root: str = "/") -> int:
    """Bytes of memory of a GPU; of a CPU, the share of one of the `processes` on this machine, of
    which a container or a job may have a part (cgroups below `root`)."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[1]
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = Path(root, "proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, kind, name = line.split(":", 2)
        folder = Path(root, "sys/fs/cgroup", kind, name.strip("/"))
        file = "memory.limit_in_bytes" if kind == "memory" else "memory.max"  # version 1; 2
        limits = [p / file for p in (folder, *folder.parents) if (p / file).is_file()]
        found += [int(told) for p in limits if (told := p.read_text().strip()) != "max"]
    return min(found) // processes
