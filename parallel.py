"""Processes: one when started plainly, several under torchrun. On one, all this is the identity.

    torchrun --nproc_per_node=8 grpo.py recipes/r1v_clevr_2b.toml   # make train GPUS=8 RECIPE=...

Source: FSDP2, torch.distributed.fsdp.fully_shard. Each process keeps a slice of every weight, of
its gradient and of the optimizer's moments, in float32; model, loss and optimizer do not know. A
block is gathered when it runs, in bfloat16 if that is what is computed in, and its gradients are
added up in float32. For sampling all is gathered once, and each process samples alone. `group`
(HSDP) bounds the processes that share one copy to those of a machine, say, so that between machines
nothing but gradients travels.

A step's loss is a sum over all processes divided by numbers that they agree on before the first
backward (grpo.token_weights), so gradients are summed, never averaged, and the number of processes
changes nothing. What must not differ among processes is how often they run the model forwards and
backwards; deal.py sees to that.
"""

import os
import threading
import time
import uuid
import weakref
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from live import keep_memory
from lora import merged

BEAT, SILENT = 3, 30  # seconds between signs of life; without one a process is taken for dead


def start() -> str:
    """Joins the processes of torchrun, if there are any; the name of this process's device."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise SystemExit(f"error: process {local} has no GPU: this machine has "
                         f"{torch.cuda.device_count()}, start as many processes")
    device = f"cuda:{local}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        # Python objects go by gloo, from memory to memory, and wait for no GPU. The time is the
        # longest that one process may keep the others waiting: it writes a checkpoint.
        me, others = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        keeps = me == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        START["name"] = agree_on_name(place := connect(keeps), me, others)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=30),
            store=dist.PrefixStore(START["name"], place), rank=me, world_size=others,
        )  # fmt: skip
        if size() > 1:
            START["watch"] = threading.Thread(target=watch, args=(store(),), daemon=True)
            START["watch"].start()
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n: int) -> tuple[int, int]:
    """First and number of this process's items of n: contiguous, as equal as can be."""
    first = n * rank() // size()
    return first, n * (rank() + 1) // size() - first


def total(x: Tensor) -> Tensor:
    """Sum of a tensor over the processes."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def gathered(item) -> list:
    """What every process calls `item`, in the order of their ranks. Any small picklable thing."""
    if size() == 1:
        return [item]
    items = [None] * size()
    dist.all_gather_object(items, item)
    return items


class Agreed(ValueError):
    """An error that all processes know of."""


def agree(error: str | None = None) -> None:
    """Agreed in every process, with all that went wrong, if any of them says an error. To be
    called by all at once; what one of them cannot do, the others need not wait for."""
    found = dict.fromkeys(e for e in gathered(error) if e)
    if found:
        raise Agreed("; ".join(found))


@contextmanager
def agreed():
    """What goes wrong inside (ValueError, OSError) in one process goes wrong in all, as Agreed.
    Inside, processes do not wait for each other."""
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = str(caught)
    agree(error)


@contextmanager
def told(*kinds):
    """Where a person's mistake or a disk ends the run (default ValueError and OSError), its message
    is said instead of a traceback; once, if all processes know of it."""
    kinds = kinds or (ValueError, OSError)
    try:
        yield
    except kinds as error:
        silent = isinstance(error, Agreed) and rank() > 0
        raise SystemExit(1 if silent else f"error: {error}") from error


# ---------------------------------------------------------------------------------------- weights


def sharder(device: str, bf16: bool = False, group: int | None = None):
    """What shares out the weights of a model among the processes; None on one process. group:
    processes that share a copy, default all (HSDP if fewer); ValueError, in all processes, for one
    that does not divide them. All call it, since groups are made by all; what it gives waits for
    no other process."""
    if size() == 1:
        return None
    group = group or size()
    if size() % group:
        raise Agreed(f"shard_group {group}: must divide the {size()} processes")
    kind, shape = device.split(":")[0], (size() // group, group)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("copy", "shard"))
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32,
                                  cast_forward_inputs=False)
    return partial(shard, mesh=mesh if shape[0] > 1 else mesh["shard"], mp_policy=policy)


def shard(model, **how):
    """The model with its weights shared out: fully_shard over vision blocks, decoder layers and the
    root. One on the meta device stays there; Qwen2VL.from_pretrained then reads each weight and
    keeps a slice."""
    for block in (*model.visual.blocks, *model.model.layers):
        fully_shard(block, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, "run")
    for part in fsdp_parts(model):  # gradients are summed, by plain sums: gloo knows no others
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


def fsdp_parts(model) -> list:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def full(x: Tensor) -> Tensor:
    """The whole of a tensor that is shared out, in every process. All call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def full_state_dict(model, names=None) -> dict[str, Tensor]:
    """The whole weights, by name, on the CPU of the first process; {} elsewhere. All call it.
    names: of these weights only."""
    state, found = model.state_dict(), {}
    state = {name: p for name, p in state.items() if names is None or name in names}
    if size() == 1:
        return state
    for name, weight in state.items():
        whole = full(weight)
        if rank() == 0:
            found[name] = whole.to("cpu", copy=True)  # a gathered one is padded, in part
    return found


def release(model) -> None:
    """Lets go of the root's gathered weights, which a forward without a backward keeps."""
    if isinstance(model, FSDPModule):
        model.reshard()


COPIES = weakref.WeakKeyDictionary()  # of models that learn: those that are sampled from


def copy(model):
    """The model once more, to sample from, which each process does without the others: with whole
    weights as they are computed with now, an adapter merged into them. It is made once, then
    overwritten: a CUDA graph wants weights to stay where they are, and autocast would cast all of
    them for each token."""
    low, parts = model.dtype, fsdp_parts(model)
    if model not in COPIES or COPIES[model].head.dtype != low:
        # fully_shard gathers all in it, autocast casts linear layers.
        COPIES[model] = model.twin(low if parts else torch.float32, low)
    into = dict(COPIES[model].named_parameters(remove_duplicate=False))
    gather_first(model)
    with torch.no_grad():
        for prefix, part in list(model.named_modules()):
            if part in parts:  # gathered a block at a time
                part.unshard()
            if part in (model, *parts):
                for name, p in merged(part, prefix):
                    into[name].copy_(p)
            if part in parts:
                part.reshard()
    return COPIES[model]


def gather_first(model) -> None:
    """What a sharded model's first forward would do, too late for who gathers it before."""
    if isinstance(model, FSDPModule):
        fully_shard.state(model)._lazy_init()


# ------------------------------------------------------------------------------- life and death

FINISHED, START = threading.Event(), {"name": ""}


@contextmanager
def together():
    """What main() runs inside: when this process fails, the others are told why; at the end of all
    of them their connections are closed."""
    try:
        yield
        gathered(None)
    except BaseException as error:
        done = isinstance(error, SystemExit) and not error.code
        if size() > 1 and not done:
            with suppress(RuntimeError):
                store().compare_set("died", "", f"process {rank()} failed: {error!r:.2000}")
        raise
    finally:
        FINISHED.set()
        if "watch" in START:  # which must not be in the store while the interpreter ends
            START.pop("watch").join(5)
        if dist.is_initialized():
            dist.destroy_process_group()


def connect(keeps: bool = False) -> dist.TCPStore:
    """A connection to the store at which the processes meet. torchrun keeps it, else the first
    process (`keeps`)."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=keeps, timeout=timedelta(minutes=5),
                         wait_for_workers=False)  # fmt: skip


def store() -> dist.Store:
    """A connection of its own, to tell that one is alive, and what ended it."""
    return dist.PrefixStore(START["name"], connect())


def agree_on_name(place: dist.Store, me: int, others: int, minutes: float = 10) -> str:
    """A name that the processes of this start agree on, and no earlier start had: torchrun 2.13
    leaves what was in the store there when it starts them again, addresses at which nobody answers
    too, and the machines do not count starts alike. The first process answers what each of the
    others asks with a word of its own, until each says that it has heard."""
    mine, until = uuid.uuid4().hex, time.monotonic() + 60 * minutes

    def read(key: str) -> str:
        return place.get(key).decode() if place.check([key]) else ""

    waits = set(range(1, others)) if me == 0 else {me}
    if me > 0:
        place.set(f"asks {me}", mine)
    while waits and time.monotonic() < until:
        for p in list(waits):
            answer = read(f"answer {p}")
            if me > 0 and answer.startswith(mine):
                place.set(f"heard {p}", answer)
                return answer.removeprefix(mine)
            if me == 0 and (word := read(f"asks {p}")) and answer != word + mine:
                place.set(f"answer {p}", word + mine)
            if me == 0 and word and read(f"heard {p}") == word + mine:
                waits.remove(p)
        time.sleep(0.05)
    if waits:
        raise SystemExit(f"error: process {me} waited {minutes:g} minutes in vain for "
                         f"{sorted(waits) if me == 0 else 'the first one'}")
    return mine


def watch(store: dist.Store) -> None:
    """Ends this process when another has died: it would wait half an hour for the other's part of a
    sum. Each looks after the next one, and tells all; torchrun does so inside a machine only."""
    me, other, beats, last, at = rank(), (rank() + 1) % size(), 0, None, time.monotonic()
    try:
        while not FINISHED.wait(BEAT):
            store.set(f"alive {me}", str(beats := beats + 1))
            now = store.get(f"alive {other}") if store.check([f"alive {other}"]) else None
            if now != last:
                last, at = now, time.monotonic()
            if time.monotonic() - at > SILENT:
                store.compare_set("died", "", f"process {other} gave no sign of life for "
                                  f"{SILENT} s")  # the first to say why is right
            if store.check(["died"]):
                end(store.get("died").decode())
    except RuntimeError as error:  # its machine has gone
        end(f"the process that keeps them together is gone: {error}")


def end(why: str) -> None:
    """Ends this process at once, whatever its main thread waits for, unless it has finished."""
    if not FINISHED.wait(1):
        os.write(2, f"error: process {rank()} ends with the others: {why}\n".encode())
        os._exit(1)
