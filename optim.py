"""The optimizer step: AdamW or Muon, the schedule of the step size, clipping, non-finite gradients.

Sources: Loshchilov and Hutter 2017, "Decoupled weight decay regularization" (arXiv 1711.05101);
Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; torch.optim has both.
"""

import math

import numpy as np
import torch


def make_optimizers(model, kind: str, lr: float, weight_decay: float = 0.0) -> list:
    """kind adamw, or muon: Muon for the matrices between embedding and head, AdamW for the rest.

    Muon's step is scaled to the size of AdamW's, so that `lr` means the same for both.
    """
    named = list(model.named_parameters())
    outer = ("embed_tokens", "lm_head")
    matrix = {n for n, p in named if p.ndim == 2 and not any(word in n for word in outer)}
    if kind == "adamw":
        matrix = set()
    rest = [p for n, p in named if n not in matrix]
    found = [torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay)]
    if matrix:
        inner = [p for n, p in named if n in matrix]
        found.append(torch.optim.Muon(
            inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ))  # fmt: skip
    return found


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


def apply_gradients(model, optimizers: list, max_norm: float, loss: float) -> float | None:
    """One optimizer step on the gradients there are, scaled down to `max_norm`; clears them.

    Returns the gradient's norm before scaling, or None where loss or gradient is not finite: then
    the weights stay as they were.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    finite = math.isfinite(loss) and bool(norm.isfinite())
    if finite:
        for optimizer in optimizers:
            optimizer.step()
        torch.clear_autocast_cache()  # else the next bf16 forward may read the weights of before
    model.zero_grad(set_to_none=True)
    return float(norm) if finite else None


def draw_rows(n_rows: int, seed: int, start: int, count: int) -> list[int]:
    """Rows number start ... start + count - 1 of an endless order: each epoch shuffled by seed."""
    at = range(start, start + count)
    shuffled = {e: np.random.default_rng((seed, e)).permutation(n_rows) for e in
                {i // n_rows for i in at}}
    return [int(shuffled[i // n_rows][i % n_rows]) for i in at]
