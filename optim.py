"""The optimizer step: AdamW or Muon, the schedule of the step size, clipping, non-finite gradients.

Sources: Loshchilov and Hutter 2017, "Decoupled weight decay regularization" (arXiv 1711.05101);
Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; torch.optim has both.
"""

import inspect
import itertools
import math

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from checkpoint import like
from lora import part_of
from parallel import full


def make_optimizers(model, kind: str, lr: float, weight_decay: float = 0.0) -> list:
    """kind adamw, or muon: Muon for the matrices between embedding and head, AdamW for the rest; of
    the weights that learn.

    Muon's step is scaled to the size of AdamW's, so that `lr` means the same for both.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    outer = ("embed_tokens", "lm_head")
    matrix = {n for n, p in named if p.ndim == 2 and not any(word in n for word in outer)}
    if kind == "adamw":
        matrix = set()
    rest = [p for n, p in named if n not in matrix]
    found = []
    if rest:
        found = [torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=True)]
    if matrix:
        inner = [p for n, p in named if n in matrix]
        found.append(Muon(
            inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ))  # fmt: skip
    return found


SETTINGS = inspect.signature(torch.optim.Muon).parameters.keys() - {"params"}


class Muon(torch.optim.Muon):
    """torch.optim.Muon, which needs whole matrices: one that is shared out among processes is
    gathered, with gradient and momentum, for its step. Each process then does all of that work."""

    @torch.no_grad()
    def step(self):
        """One step; a weight without a gradient stays."""
        for group in self.param_groups:
            if not any(isinstance(p, DTensor) for p in group["params"]):
                super().step()
                continue
            for p in (p for p in group["params"] if p.grad is not None):
                whole = torch.nn.Parameter(full(p))
                whole.grad = full(p.grad)
                one = torch.optim.Muon([whole], **{k: v for k, v in group.items() if k in SETTINGS})
                if self.state[p]:
                    one.state[whole]["momentum_buffer"] = full(self.state[p]["momentum_buffer"])
                one.step()
                p.copy_(like(whole.data, p))
                self.state[p]["momentum_buffer"] = like(one.state[whole]["momentum_buffer"], p)


def schedule(step: int, steps: int, warmup: int = 0, kind: str = "constant") -> float:
    """Share of the step size at step 1 ... steps: rises over `warmup`, then follows `kind`.

    linear and cosine start at 1 after the warm-up and would reach 0 one step after the last.
    """
    if step <= warmup:
        return step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    return {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[kind]


def set_lr(optimizers: list, lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def backward(loss) -> None:
    """loss.backward(), unless nothing that learns is in it: text, where only vision learns."""
    if loss.requires_grad:
        loss.backward()


def apply_gradients(model, optimizers: list, max_norm: float, loss: float) -> dict:
    """One optimizer step on the gradients there are, scaled down to `max_norm`; clears them.

    Returns the norms before scaling: grad_norm, and grad_norm/PART of the parts. grad_norm is None
    where loss or gradient is not finite: then the weights stay as they were.
    """
    parts: dict[str, list] = {"vision": [], "merger": [], "language": []}
    for name, p in model.named_parameters():
        if p.grad is not None:
            parts[part_of(name)].append(p.grad)
    norms = {k: float(full(torch.nn.utils.get_total_norm(v))) if v else 0.0
             for k, v in parts.items()}
    norm = math.hypot(*norms.values())
    if norm > max_norm:
        torch._foreach_mul_([*itertools.chain(*parts.values())], max_norm / (norm + 1e-6))
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for optimizer in optimizers:
            optimizer.step()
        torch.clear_autocast_cache()  # else the next bf16 forward may read the weights of before
    model.zero_grad(set_to_none=True)
    return {"grad_norm": norm if finite else None,
            **{f"grad_norm/{k}": v for k, v in norms.items()}}


def draw_rows(n_rows: int, seed: int, start: int, count: int) -> list[int]:
    """Rows number start ... start + count - 1 of an endless order: each epoch shuffled by seed."""
    at = range(start, start + count)
    shuffled = {e: np.random.default_rng((seed, e)).permutation(n_rows) for e in
                {i // n_rows for i in at}}
    return [int(shuffled[i // n_rows][i % n_rows]) for i in at]
