"""Processes: one when started plainly, several under torchrun. On one, all this is the identity.

    torchrun --nproc_per_node=8 grpo.py recipes/r1v_clevr_2b.toml   # make train GPUS=8 RECIPE=...

Each process holds the whole model and a share of the prompts. A step's loss is a sum over all
processes divided by numbers that they agree on before the first backward (grpo.token_weights), so
the sum of their gradients is the gradient of one process, and their number changes nothing.
Sampling needs no communication at all.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> str:
    """Joins the processes of torchrun, if there are any; the name of this process's device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise SystemExit(f"error: process {local} has no GPU: this machine has "
                         f"{torch.cuda.device_count()}, start as many processes")
    device = f"cuda:{local}"
    torch.cuda.set_device(device)
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


def sum_gradients(model) -> None:
    """Adds up the gradients of all processes: one that a process has not is zero there, one that
    no process has (the vision tower's in a step without pictures) stays None, as on one process."""
    if size() == 1:
        return
    params = list(model.parameters())
    owners = torch.tensor([p.grad is not None for p in params], device=params[0].device).int()
    for p, n in zip(params, total(owners).tolist()):
        if n:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
