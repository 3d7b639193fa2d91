"""Supervised fine-tuning: a model learns given completions. Cold starts, and the baseline of RL.

    python sft.py recipes/sft_clevr_r1.toml              # R1-V's settings
    python sft.py --model tiny --data d/sft --steps 50   # rows that distill.py packed

A row is image, problem, thinking and solution (MMInstruction/Clevr_CoGenT_TrainA_R1), or a chat.
The loss is the mean of -log p over the tokens that are learnt in the whole optimizer step, over all
processes. Learnt are the completions, end of turn included, and prompts only read; with mask="all"
prompts are learnt too, all but the image tokens. That is what R1-V's own baseline does
(src/r1-v/src/open_r1/sft.py, collate_fn); it also learns an opened next turn, which ours does not.

Tokens are packed, never padded: completions of a step run beside their prompts as in GRPO
(rollout.score), with one completion each.

Letters: B rows, S tokens of all rows, T tokens of a completion.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

import deal
import journal
import parallel
import report
from ahead import Ahead
from config import opt, parse
from data import Processor, Prompt, collate, with_picture, without_long
from evaluate import evaluate_all, load_evals, print_summary
from example import Example
from journal import Seconds
from model import Layout, Qwen2VL
from optim import apply_gradients, draw_rows, make_optimizers, schedule, set_lr
from rewards import load_rewards
from rollout import as_rollout, score, token_logp
from rows import load_examples


@dataclass(frozen=True)
class Config:
    """Every key of a supervised run."""

    model: str = opt("tiny", "checkpoint to start from: folder, run, or hub id")
    data: str = opt("", "rows to learn: file, folder or hub id, see rows.py")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    template: str = opt("r1v", "prompt template by name, or a text that holds {Question}")
    system: str | None = opt(None, "system prompt; default: the template's")
    min_pixels: int | None = opt(None, "pixels of an image at least; default: the checkpoint's")
    max_pixels: int | None = opt(None, "pixels of an image at most; default: the checkpoint's")
    max_length: int | None = opt(None, "refuse rows of more tokens at the start, or skip them")
    workers: int | None = opt(None, "processes that prepare the next step's prompts; default: 4 "
                              "beside a GPU, else 0", least=0)
    mask: str = opt("completion", "tokens that are learnt; all: prompts too, but no image tokens",
                    choices=("completion", "all"))
    out: str = opt("runs/sft", "folder of the run")
    note: str = opt("", "a word to the reader of the report, at its head")
    seed: int = opt(0, "fixes the order of the rows", least=0)

    steps: int | None = opt(None, "optimizer steps; default: as many as the epochs take", least=1)
    epochs: float = opt(1.0, "times that every row is seen, where steps is not given", above=0)
    batch: int = opt(16, "rows per step, over all processes", least=1)
    micro: int = opt(4, "rows per forward and backward", least=1)
    optimizer: str = opt("adamw", "as in grpo.py", choices=("adamw", "muon"))
    lr: float = opt(2e-5, "step size", above=0)
    weight_decay: float = opt(0.0, "decoupled weight decay", least=0)
    schedule: str = opt("cosine", "as in grpo.py", choices=("constant", "linear", "cosine"))
    warmup: float = opt(0, "steps over which the step size rises from 0; below 1: share of all",
                        least=0)
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm", above=0)
    bf16: bool = opt(False, "compute in bfloat16; weights and optimizer stay float32")
    shard_group: int | None = opt(None, "processes that share one copy of the weights (HSDP), as "
                                  "those of a machine; default: all", least=1)
    recompute: bool = opt(False, "keep only the inputs of blocks for the backward pass")

    held_out: str | None = opt(None, "rows whose loss is measured, never learnt")
    evals: tuple[str, ...] = opt((), "NAME=SOURCE, answered greedily and scored before and after")
    max_new: int = opt(256, "tokens of an answer in these at most", least=1)
    probes: int = opt(6, "questions of the first eval that the report follows", least=0)
    eval_every: int = opt(100, "steps between held-out losses and probes", least=1)
    save_every: int = opt(500, "steps between checkpoints", least=1)


# ---------------------------------------------------------------------------------------- the loss


def completion_of(example: Example) -> str:
    """The text to learn: the row's own completion (a chat, or a solution with its thoughts) letter
    by letter, else thinking, a blank line and solution, as R1-V joins them, else the solution."""
    thinking = example.extra.get("thinking")
    joined = f"{thinking}\n\n{example.solution}" if thinking else example.solution
    return example.extra.get("completion") or joined


def taught(example: Example, text: str) -> Example:
    """The example with `text` as the completion to learn."""
    return replace(example, extra={**example.extra, "completion": text})


def target_ids(processor: Processor, text: str) -> list[int]:
    """Token ids of a completion with the end of turn, as the model would have sampled it."""
    return [*processor.encode(text), processor.stop_ids[0]]


def learnt_tokens(prompt: Prompt, target: list[int], mask: str) -> int:
    """How many tokens of a row the loss counts; the first of a prompt is predicted by nothing."""
    return len(target) + (len(prompt.ids) - 1 - len(prompt.image_at)) * (mask == "all")


def sft_loss(model: Qwen2VL, prompts: list[Prompt], targets: list[list[int]], tokens: int,
             mask: str = "completion") -> Tensor:
    """Sum of -log p over the learnt tokens of some rows, divided by `tokens`, those of the step."""
    if mask == "all":
        return -text_logp(model, prompts, targets).sum() / tokens
    rollout = as_rollout(prompts, [[ids] for ids in targets], model.device)
    return -score(model, rollout)[0].sum() / tokens


def text_logp(model: Qwen2VL, prompts: list[Prompt], targets: list[list[int]]) -> Tensor:
    """Log-probs of all text tokens of prompts and targets but each row's first, packed."""
    whole = []
    for p, ids in zip(prompts, targets):
        after = (p.next_position + torch.arange(len(ids))).expand(3, -1)
        whole.append(replace(p, ids=torch.cat((p.ids, torch.tensor(ids))),
                             positions=torch.cat((p.positions, after), 1)))
    batch = collate(whole).to(model.device)
    layout = Layout(batch.lengths, device=model.device)
    hidden = model.run(batch.ids, batch.positions, layout, batch)  # (S, D)
    learnt = torch.ones_like(batch.ids, dtype=torch.bool)
    learnt[batch.image_at] = False
    learnt[layout.prompt_lengths.cumsum(0) - layout.prompt_lengths] = False
    at = learnt.nonzero()[:, 0]
    none = torch.empty(0, dtype=torch.int64, device=model.device)
    return token_logp(hidden[at - 1], model.head, batch.ids[at], 1.0, none)[0]


# ---------------------------------------------------------------------------------------- the steps


def targets_of(processor: Processor, prompts: list[Prompt], mask: str) -> tuple[list, int]:
    """The target ids of some prompts, and how many tokens of both the loss counts."""
    targets = [target_ids(processor, completion_of(p.example)) for p in prompts]
    return targets, sum(learnt_tokens(p, ids, mask) for p, ids in zip(prompts, targets))


def step_loss(model, processor, prompts: list[Prompt], cfg: Config) -> tuple[float, int, float]:
    """Loss of the rows of all processes together, whose gradient is left in the model whatever
    `micro` is; the tokens that it learns, and deal.balance's evenness."""
    even = 1.0

    def cost(prompt):
        return deal.cost(prompt, len(target_ids(processor, completion_of(prompt.example))))

    if parallel.size() > 1:
        prompts, even = deal.balance(prompts, [cost(p) for p in prompts])
        prompts = sorted(prompts, key=cost, reverse=True)  # processes in step do alike
    targets, count = targets_of(processor, prompts, cfg.mask)
    tokens = int(parallel.total(torch.tensor(count, device=model.device)))
    pictures = deal.pictured(prompts)
    found = torch.zeros((), dtype=torch.float64, device=model.device)
    for rows in deal.parts(len(prompts), cfg.micro):
        some = [prompts[i] for i in rows or [0]]
        some = with_picture(some) if pictures else some
        loss = sft_loss(model, some, [targets[i] for i in rows or [0]], tokens, cfg.mask)
        loss = loss if rows else 0 * loss  # as many backwards in every process
        loss.backward()
        found += loss.detach()
    return float(parallel.total(found)), tokens, even


def fit(model, processor, examples: Sequence[Example], cfg: Config, title="sft") -> Iterator[dict]:
    """Learns the examples in the order of cfg.seed; yields a row of metrics after each step.

    A step whose loss or gradient is not finite is skipped; ValueError after five in a row.
    """
    steps = number_of_steps(cfg, len(examples))
    warmup = round(cfg.warmup * steps) if cfg.warmup < 1 else int(cfg.warmup)
    optimizers = make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    ahead, bad = Ahead(processor, examples, workers=cfg.workers), 0
    first, count = parallel.share(cfg.batch)
    half = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=cfg.bf16)
    bar = tqdm(range(1, steps + 1), title, unit="step", leave=False, disable=parallel.rank() > 0)
    for step in bar:
        set_lr(optimizers, lr := cfg.lr * schedule(step, steps, warmup, cfg.schedule))
        now, then = (draw_rows(len(examples), cfg.seed, s * cfg.batch + first, count)
                     for s in (step - 1, step))  # fmt: skip
        with half():
            nll, _, even = step_loss(model, processor, ahead(now, expected=then), cfg)
        norms = apply_gradients(model, optimizers, cfg.max_grad_norm, nll)
        bar.set_postfix(nll=f"{nll:.3f}")
        bad = bad + 1 if norms["grad_norm"] is None else 0
        yield {"step": step, "lr": lr, "nll": nll, **norms, "skipped": int(bad > 0),
               "balance": even}
        if bad == 5:
            raise ValueError(f"{title}, step {step}: loss or gradient was not finite in five steps "
                             "in a row, all were skipped; try a smaller lr or max_grad_norm")
    ahead.close()


def number_of_steps(cfg: Config, rows: int) -> int:
    return cfg.steps or max(1, math.ceil(rows * cfg.epochs / cfg.batch))


@torch.no_grad()
def held_out_loss(model, processor, examples: Sequence[Example], cfg: Config) -> float:
    """Mean of -log p per learnt token, over all examples and processes."""
    first, count = parallel.share(len(examples))
    found = torch.zeros(2, dtype=torch.float64, device=model.device)  # sum, tokens
    for i in range(first, first + count, cfg.micro):
        rows = range(i, min(i + cfg.micro, first + count))
        prompts = [processor.prompt(examples[k]) for k in rows]
        targets, learnt = targets_of(processor, prompts, cfg.mask)
        found[0] += sft_loss(model, prompts, targets, 1, cfg.mask)
        found[1] += learnt
    total, tokens = parallel.total(found).tolist()
    return total / tokens


# ----------------------------------------------------------------------------------------- the run


def setup(cfg: Config, device: str) -> tuple:
    """All that a run reads, checked before anything is written: processor, rows, held-out rows,
    evals, model, and the run's folder."""
    if not cfg.data:
        raise ValueError("data: which rows? --data d/sft, rows.jsonl, or a hub id "
                         "(MMInstruction/Clevr_CoGenT_TrainA_R1)")
    folder = journal.newest_checkpoint(cfg.model)
    processor = Processor.from_pretrained(folder, cfg.template, cfg.min_pixels, cfg.max_pixels,
                                          cfg.system)
    examples = load_examples(cfg.data, cfg.images, "train", bad_rows=cfg.bad_rows)
    held_out = load_examples(cfg.held_out, cfg.images, "val") if cfg.held_out else ()
    evals = load_evals(cfg.evals)

    def length(example: Example) -> int:
        return processor.length(example) + len(target_ids(processor, completion_of(example)))

    examples = without_long(examples, length, "max_length", cfg.max_length, cfg.bad_rows)
    shard = partial(parallel.shard, device=device, bf16=cfg.bf16, group=cfg.shard_group)
    model = Qwen2VL.from_pretrained(folder, device=device, shard=shard)
    model = model.recompute_blocks() if cfg.recompute else model
    out = journal.run_folder(cfg.out, cfg) if parallel.rank() == 0 else None
    return processor, examples, held_out, evals, model, parallel.gathered(out)[0]


def train(cfg: Config) -> dict:
    """Setup, measure, learn, measure; returns the summary, which is also summary.json."""
    device, seconds = parallel.start(), Seconds()
    try:
        processor, examples, held_out, evals, model, out = setup(cfg, device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    half = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=cfg.bf16)
    steps, main_process = number_of_steps(cfg, len(examples)), parallel.rank() == 0
    probes = [processor.prompt(e) for e in islice(next(iter(evals.values()), examples), cfg.probes)]
    scored = load_rewards(("accuracy", "format"))

    def measure(step: int) -> dict:
        """Held-out loss; the main process also writes answers to the probes."""
        with seconds("eval"), half(), parallel.whole_weights(model):
            if main_process:
                journal.log_probes(out, step, model, processor, probes, scored, cfg.max_new)
            loss = held_out_loss(model, processor, held_out, cfg) if held_out else None
        return {} if loss is None else {"held_out_nll": loss}

    with seconds("eval"), half(), parallel.whole_weights(model):
        before = evaluate_all(model, processor, evals, cfg.max_new, out, "before")
    first = measure(0)
    try:
        for row in fit(model, processor, examples, cfg):
            step = row["step"]
            if step % cfg.eval_every == 0 or step == steps:
                row |= measure(step)
            if main_process:
                journal.append(out / "metrics.jsonl", {**row, "seconds": seconds.since_start()})
            if step % cfg.save_every == 0 or step == steps:
                journal.save_checkpoint(model, processor, out / f"step_{step:06d}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    with seconds("eval"), half(), parallel.whole_weights(model):
        after = evaluate_all(model, processor, evals, cfg.max_new, out, "after")
    summary = {"before": before, "after": after, "steps": steps, "rows": len(examples),
               "nll": row["nll"], "held_out_nll": [x.get("held_out_nll") for x in (first, row)],
               "seed": cfg.seed, "seconds": round(seconds.since_start(), 1),
               "peak_memory_gb": round(journal.peak_memory_gb(), 3)}  # fmt: skip
    if main_process:
        journal.write_json(summary, out / "summary.json")
        print_summary(summary, out, report.write(out))
    return summary


def main(argv=None) -> dict:
    cfg = parse(Config, argv, __doc__)
    with parallel.together():
        return train(cfg)


if __name__ == "__main__":
    main()
