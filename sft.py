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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

import deal
import journal
import lora
import parallel
import plan
import trackers
from ahead import Ahead
from boxes import FRAMES, gold_boxes, respoken
from checkpoint import read_config
from config import opt, parse
from data import Processor, Prompt, without_long
from evaluate import load_evals
from example import Example
from grading import leave_out, load_rewards
from journal import Seconds
from logbook import Logbook, announce, check_room
from lora import PARTS, Learns
from model import Qwen2VL
from optim import apply_gradients, backward, draw_rows, make_optimizers, schedule, set_lr
from resume import Stop, open_run, take_up
from rollout import as_rollout, score, text_logp
from rows import left_out, load_examples


@dataclass(frozen=True)
class Config:
    """Every key of a supervised run."""

    model: str = opt("tiny", "checkpoint to start from: folder, run, or hub id")
    data: str = opt("", "rows to learn: file, folder or hub id; several joined by ' + '")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    template: str = opt("r1v", "prompt template by name, or a text that holds {Question}")
    system: str | None = opt(None, "system prompt; default: the template's")
    min_pixels: int | None = opt(None, "pixels of an image at least; default: the checkpoint's")
    max_pixels: int | None = opt(None, "pixels of an image at most; default: the checkpoint's")
    max_length: int | None = opt(None, "refuse rows of more tokens at the start, or skip them")
    frame: str | None = opt(None, "as in grpo.py", choices=FRAMES)
    gold_frame: str = opt("pixels", "as in grpo.py", choices=FRAMES)
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
    freeze: tuple[str, ...] = opt((), "as in grpo.py", choices=PARTS)
    lora: int = opt(0, "as in grpo.py, and so are the next four", least=0)
    lora_alpha: float | None = opt(None, "they count alpha / r times; default: 2 r", above=0)
    lora_dropout: float = opt(0.0, "share of their input that is left out", least=0, below=1)
    lora_targets: tuple[str, ...] = opt((), "layers that have one; none: all linear ones")
    lora_vision: bool = opt(False, "vision tower and merger have adapters, too")
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
    compile: bool = opt(False, "fuse what blocks do by torch.compile: for a GPU")

    held_out: str | None = opt(None, "rows whose loss is measured, never learnt")
    evals: tuple[str, ...] = opt((), "NAME=SOURCE, answered greedily and scored before and after")
    scorer: str = opt("accuracy", "what scores the evals, as in evaluate.py")
    max_new: int = opt(256, "tokens of an answer in these at most", least=1)
    probes: int = opt(6, "questions of the first eval that the report follows", least=0)
    eval_every: int = opt(100, "steps between held-out losses and probes", least=1)
    save_every: int = opt(500, "steps between checkpoints", least=1)
    eval_saves: bool = opt(False, "score the evals at each checkpoint too, and keep the best")
    keep: int | None = opt(2, "newest checkpoints that stay, beside the best; none: all", least=1)
    resume: str = opt("auto", "auto: go on with the unfinished run of this config in `out`; never",
                      choices=("auto", "never"))
    must_save_by: float | None = opt(None, "minutes after which the run is saved and ends", above=0)
    trackers: tuple[str, ...] = opt((), "wandb, tensorboard: where metrics go as well")
    dry_run: bool = opt(False, "only say what the run will take")
    check_memory: bool = opt(True, "refuse a run that the plan says does not fit; else only say so")

    def check(self):
        """ValueError for what no single key can say."""
        Learns.of(self)


# ---------------------------------------------------------------------------------------- the loss


def completion_of(example: Example) -> str:
    """The text to learn: the row's own completion (a chat, or a solution with its thoughts) letter
    by letter, else thinking, a blank line and solution, as R1-V joins them, else the solution; of
    these, boxes in the frame that the model speaks."""
    thinking = example.extra.get("thinking")
    joined = f"{thinking}\n\n{example.solution}" if thinking else example.solution
    joined = respoken(joined, example) if example.view and gold_boxes(example) else joined
    return example.extra.get("completion") or joined


def taught(example: Example, text: str) -> Example:
    """The example with `text` as the completion to learn."""
    return replace(example, extra={**example.extra, "completion": text})


def opened(processor: Processor, examples: Sequence, bad_rows: str = "refuse") -> Sequence:
    """The examples whose completions open as the template's answers do: what it opens is read, and
    only what follows is learnt. ValueError for others, unless bad_rows is skip."""
    opening = processor.template.opening
    bad = {i for i, example in enumerate(examples if opening else ())
           if not completion_of(example).startswith(opening)}  # fmt: skip
    if not bad:
        return examples
    told = (f"{len(bad)} of {len(examples)} completions do not open with the template's "
            f"{opening!r}, the first is {examples[min(bad)].row}")
    return leave_out(examples, bad, told, "take a template without {Answer}", bad_rows)


def learnt_tokens(prompt: Prompt, target: list[int], mask: str) -> int:
    """How many tokens of a row the loss counts; the first of a prompt is predicted by nothing."""
    return len(target) + (len(prompt.ids) - 1 - len(prompt.image_at)) * (mask == "all")


def sft_loss(model: Qwen2VL, prompts: list[Prompt], targets: list[list[int]], tokens: int,
             mask: str = "completion") -> Tensor:
    """Sum of -log p over the learnt tokens of some rows, divided by `tokens`, those of the step."""
    if mask == "all":
        return -text_logp(model, prompts, targets).sum() / tokens
    rollout = as_rollout(prompts, [[ids] for ids in targets], model.device)
    return -score(model, rollout, entropies=False)[0].sum() / tokens


# ---------------------------------------------------------------------------------------- the steps


def targets_of(processor: Processor, prompts: list[Prompt], mask: str) -> tuple[list, int]:
    """The target ids of some prompts, and how many tokens of both the loss counts."""
    targets = [processor.target(completion_of(p.example)) for p in prompts]
    return targets, sum(learnt_tokens(p, ids, mask) for p, ids in zip(prompts, targets))


def step_loss(model, processor, prompts: list[Prompt], cfg: Config) -> tuple[float, int, float]:
    """Loss of the rows of all processes together, whose gradient is left in the model whatever
    `micro` is; the tokens that it learns, and deal.balance's evenness."""

    lengths = [len(processor.target(completion_of(p.example))) for p in prompts]
    prompts, even = deal.balance(prompts, [*map(deal.cost, prompts, lengths)])
    targets, count = targets_of(processor, prompts, cfg.mask)
    tokens = int(parallel.total(torch.tensor(count, device=model.device)))
    found = torch.zeros((), dtype=torch.float64, device=model.device)
    for rows, some in deal.prompts_of_parts(prompts, cfg.micro):
        said = [targets[i] for i in rows] or [targets[0][:1]]
        loss = sft_loss(model, some, said, tokens, cfg.mask)
        loss = loss if rows else 0 * loss  # as many backwards in every process
        backward(loss)
        found += loss.detach()
    return float(parallel.total(found)), tokens, even


def fit(model, processor, examples: Sequence[Example], cfg: Config, title="sft", optimizers=None,
        numbers: Iterable[int] | None = None, bad: int = 0) -> Iterator[dict]:
    """Learns the examples in the order of cfg.seed; yields a row of metrics after each step.

    optimizers: default new ones. numbers of the steps to do: default all. A step whose loss or
    gradient is not finite is skipped; ValueError after five in a row, of which there were `bad`.
    """
    steps = number_of_steps(cfg, len(examples))
    warmup = round(cfg.warmup * steps) if cfg.warmup < 1 else int(cfg.warmup)
    optimizers = optimizers or make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    first, count = parallel.share(cfg.batch)
    half = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=cfg.bf16)
    with closing(Ahead(processor, examples, workers=cfg.workers)) as ahead:
        for step in numbers or tqdm(range(1, steps + 1), title, unit="step", leave=False):
            set_lr(optimizers, lr := cfg.lr * schedule(step, steps, warmup, cfg.schedule))
            now, then = (draw_rows(len(examples), cfg.seed, s * cfg.batch + first, count)
                         for s in (step - 1, step))  # fmt: skip
            lora.seed_dropout(model, cfg.seed, step, parallel.rank())
            with half():
                nll, tokens, even = step_loss(model, processor, ahead(now, expected=then), cfg)
            norms = apply_gradients(model, optimizers, cfg.max_grad_norm, nll)
            bad = bad + 1 if norms["grad_norm"] is None else 0
            yield {"step": step, "lr": lr, "nll": nll, **norms, "skipped": int(bad > 0),
                   "balance": even, "tokens": tokens}
            if bad == 5:
                raise ValueError(f"{title}, step {step}: loss or gradient was not finite in five "
                                 "steps in a row, all were skipped; try a smaller lr or "
                                 "max_grad_norm")


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


def memory_plan(cfg: Config, start, processor, rows, evals) -> plan.Plan:
    """What this run needs in memory and on disk, before it needs it."""
    asked = plan.lengths(processor, rows, *evals.values())
    new = max(len(processor.target(completion_of(e))) for e in plan.spread(rows))
    if cfg.mask == "all":
        asked, new = {**asked, "tokens": asked["tokens"] + new}, 0
    return plan.of(read_config(Path(start)), plan.Work(
        prompts=cfg.batch, group=1, max_new=new, micro=cfg.micro, **asked, sft=True,
        processes=parallel.size(), shards=cfg.shard_group, optimizer=cfg.optimizer, bf16=cfg.bf16,
        recompute=cfg.recompute, eval_new=cfg.max_new if evals else 0,
        gpu=torch.cuda.is_available(), learns=Learns.of(cfg),
    ))  # fmt: skip


def setup(cfg: Config, device: str, seconds: Seconds, stop: Stop) -> SimpleNamespace:
    """All that a run reads, checked before anything is written: the memory that it will take, the
    run's folder (new, or one to go on with), model and optimizers."""
    shard = parallel.sharder(device, cfg.bf16, cfg.shard_group)
    with parallel.agreed():
        if not cfg.data:
            raise ValueError("data: which rows? --data d/sft, rows.jsonl, or a hub id "
                             "(MMInstruction/Clevr_CoGenT_TrainA_R1)")
        if cfg.batch < parallel.size():
            raise ValueError(f"batch {cfg.batch}: fewer than the {parallel.size()} processes")
        trackers.check_installed(cfg.trackers)
        start = journal.newest_checkpoint(cfg.model)
        processor = Processor.from_pretrained(start, cfg.template, cfg.min_pixels, cfg.max_pixels,
                                              cfg.system, cfg.frame, cfg.gold_frame)
        loaded = load_examples(cfg.data, cfg.images, "train", bad_rows=cfg.bad_rows)
        held_out = load_examples(cfg.held_out, cfg.images, "val") if cfg.held_out else ()
        held_out, rows = opened(processor, held_out), opened(processor, loaded, cfg.bad_rows)
        evals = load_evals(cfg.evals, cfg.scorer)

        def length(example: Example) -> int:
            return processor.length(example) + len(processor.target(completion_of(example)))

        rows = without_long(rows, length, "max_length", cfg.max_length, cfg.bad_rows)
        steps = number_of_steps(cfg, len(rows))
        needs = memory_plan(cfg, start, processor, rows, evals)
        announce(needs, device, cfg, len(rows), steps, cfg.batch)
    run = open_run(cfg, steps)
    check_room(needs, run, cfg, steps)
    state = run.numbers or {"step": 0, "bad": 0, "rows": len(rows), "start": start}
    with parallel.agreed():
        model = lora.load(Learns.of(cfg), state.get("start", start), run.checkpoint, cfg.seed,
                          device, shard)
        model.prepare(cfg.compile, cfg.recompute)
        optimizers = make_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
        take_up(run, model, optimizers, len(rows))
        book = Logbook(cfg, run, seconds, stop, steps=steps, model=model, processor=processor,
                       optimizers=optimizers, evals=evals, state=state, shown=("nll",))
    first = next(iter(evals.values()), rows)
    return SimpleNamespace(
        model=model, processor=processor, rows=rows, held_out=held_out, optimizers=optimizers,
        book=book, steps=steps, skipped=left_out(loaded, rows),
        probes=[processor.prompt(e) for e in islice(first, cfg.probes)],
    )  # fmt: skip


def train(cfg: Config) -> dict:
    """Setup, measure, learn, measure; returns the summary, which is also summary.json."""
    device, seconds = parallel.start(), Seconds()
    half = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=cfg.bf16)
    scored = load_rewards(("accuracy", "format"))
    with Stop(cfg.must_save_by) as stop:
        with seconds("setup"), parallel.told():
            run = setup(cfg, device, seconds, stop)
        model, processor, book = run.model, run.processor, run.book

        def measure(step: int) -> dict:
            """Held-out loss; the main process also writes answers to the probes."""
            with seconds("eval"), half():
                sampler = parallel.copy(model)
                if parallel.rank() == 0:
                    journal.log_probes(book.out, step, sampler, processor, run.probes, scored,
                                       cfg.max_new)
                given = sampler, processor, run.held_out, cfg
                return {"held_out_nll": held_out_loss(*given)} if run.held_out else {}

        book.open()
        if "first" not in book.state:
            book.state["first"] = measure(0)
        learnt = fit(model, processor, run.rows, cfg, optimizers=run.optimizers,
                     numbers=book.steps("sft"), bad=book.state["bad"])  # fmt: skip
        with parallel.told():
            for row in seconds.each("update", learnt):
                step, tokens = row["step"], row.pop("tokens")
                book.state["bad"] = book.state["bad"] + 1 if row["skipped"] else 0
                if step % cfg.eval_every == 0 or step == run.steps:
                    row |= measure(step)
                book.state["end"] = {k: row.get(k) for k in ("nll", "held_out_nll")}
                book.end(step, {**row, "rows_skipped": run.skipped}, cfg.batch, tokens)
        end = book.state["end"]
        losses = [x.get("held_out_nll") for x in (book.state["first"], end)]
        return book.close(rows=len(run.rows), nll=end["nll"], held_out_nll=losses)


def main(argv=None) -> dict:
    cfg = parse(Config, argv, __doc__)
    with parallel.together(), parallel.told(OSError):
        return train(cfg)


if __name__ == "__main__":
    main()
