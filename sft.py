"""Supervised fine-tuning: a model learns given completions. Cold starts, and the baseline of RL.

The loss is the mean of -log p over the tokens of the completions (the end token included) of the
whole optimizer step; prompts are read, not learnt. It runs through the same packed forward as GRPO
(rollout.score), with one completion per prompt and temperature 1.

tiny.py teaches the tiny checkpoint with it, controls.py draws the supervised baselines.
"""

from dataclasses import dataclass

from tqdm import tqdm

from config import opt
from data import Processor
from model import Qwen2VL
from optim import apply_gradients, draw_rows, make_optimizers, schedule, set_lr
from rollout import as_rollout, score


@dataclass(frozen=True)
class Config:
    """Keys of a supervised stage."""

    steps: int = opt(100, "optimizer steps", least=1)
    batch: int = opt(32, "rows per step", least=1)
    micro: int = opt(32, "rows per forward and backward", least=1)
    optimizer: str = opt("adamw", "as in grpo.py", choices=("adamw", "muon"))
    lr: float = opt(2e-5, "step size", above=0)
    weight_decay: float = opt(0.0, "decoupled weight decay", least=0)
    schedule: str = opt("cosine", "as in grpo.py", choices=("constant", "linear", "cosine"))
    warmup: int = opt(0, "steps over which the step size rises from 0", least=0)
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm", above=0)
    seed: int = opt(0, "fixes the order of the rows", least=0)


def sft_loss(model: Qwen2VL, processor: Processor, rows: list, tokens: int):
    """Sum of -log p over the target tokens of `rows`, divided by `tokens`, those of the whole step.

    rows: pairs of an Example and the text to learn; the end token is added.
    """
    prompts = [processor.prompt(example) for example, _ in rows]
    targets = [[target_ids(processor, text)] for _, text in rows]
    logp, _ = score(model, as_rollout(prompts, targets, model.device))
    return -logp.sum() / tokens


def target_ids(processor: Processor, text: str) -> list[int]:
    """Token ids of a completion with the end of turn, as the model would have sampled it."""
    return [*processor.encode(text), processor.stop_ids[0]]


def fit(model: Qwen2VL, processor: Processor, rows: list, cfg: Config, title="sft") -> list[float]:
    """Train on (Example, text) rows in the order of cfg.seed; returns the loss of each step."""
    optimizers = make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    losses = []
    for step in tqdm(range(1, cfg.steps + 1), desc=title, unit="step", leave=False):
        set_lr(optimizers, cfg.lr * schedule(step, cfg.steps, cfg.warmup, cfg.schedule))
        at = draw_rows(len(rows), cfg.seed, (step - 1) * cfg.batch, cfg.batch)
        some = [rows[i] for i in at]
        tokens = sum(len(target_ids(processor, text)) for _, text in some)
        total = 0.0
        for i in range(0, cfg.batch, cfg.micro):
            loss = sft_loss(model, processor, some[i : i + cfg.micro], tokens)
            loss.backward()
            total += float(loss.detach())
        if apply_gradients(model, optimizers, cfg.max_grad_norm, total) is None:
            raise ValueError(f"{title}, step {step}: loss or gradient is not finite; "
                             "try a smaller lr")
        losses.append(total)
    return losses
