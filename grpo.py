"""GRPO: reinforcement learning of a vision-language model with verifiable rewards.

    python grpo.py recipes/tiny.toml --steps 50 --group 4

Source: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), Algorithm 1; its formulae, and those of
DAPO, Dr. GRPO, GSPO, RLOO and REINFORCE++ beside it, are in estimators.py.

What the papers leave open, and our choice: denominators are those of the whole optimizer step, so
nothing that splits the work changes the gradient; log-probs are those of the sampled distribution,
temperature and banned tokens included.

What we do differently: a group shares one copy of prompt and image, in sampling and in training
(rollout.py). With one update per batch the old log-probs are the current ones: no extra pass.

Letters: B prompts, G completions per prompt, T completion tokens. logp, old, ref (B, G, T):
log-probs of the sampled tokens by the policy that trains, that sampled, and the reference.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch

import deal
import journal
import lora
import parallel
import plan
import trackers
import worker
from ahead import Ahead
from boxes import FRAMES
from checkpoint import read_config
from config import opt, parse
from data import Processor, without_long
from estimators import clipped, clipped_loss, importance_ratio, k3, token_weights
from evaluate import load_evals
from grading import fitting, load_rewards
from journal import Seconds
from logbook import Logbook, announce, check_room
from lora import PARTS, Learns
from optim import apply_gradients, backward, draw_rows, make_optimizers, schedule, set_lr
from resume import Stop, open_run, take_up
from rollout import Rollout, look, sample, score
from rows import left_out, load_examples
from tally import (
    advantages,
    has_signal,
    learnable,
    reward_table,
    step_metrics,
    token_advantages,
    total_reward,
)


@dataclass(frozen=True)
class Config:
    """Every key of a run. Defaults are R1-V's where it has one."""

    model: str = opt("tiny", "checkpoint to start from: folder, run, or hub id")
    data: str = opt("world:A:n=6400", "rows to train on: world:…, a file, a folder, a hub id; "
                    "several are joined by ' + ', see rows.py")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    template: str = opt("r1v", "prompt template by name, or a text that holds {Question}")
    system: str | None = opt(None, "system prompt; default: the template's")
    min_pixels: int | None = opt(None, "pixels of an image at least; default: the checkpoint's")
    max_pixels: int | None = opt(None, "pixels of an image at most; default: the checkpoint's")
    max_prompt: int | None = opt(None, "refuse rows of more tokens at the start, or skip them")
    frame: str | None = opt(None, "pixels, resized or 0-1000, in which the model says boxes; "
                            "default: that of its family", choices=FRAMES)
    gold_frame: str = opt("pixels", "that of the rows' boxes, if they name none", choices=FRAMES)
    workers: int | None = opt(None, "processes that prepare the next step's prompts; default: 4 "
                              "beside a GPU, else 0", least=0)
    out: str = opt("runs/grpo", "folder of the run")
    note: str = opt("", "a word to the reader of the report, at its head")
    seed: int = opt(0, "fixes data order and samples", least=0)

    steps: int = opt(100, "optimizer batches: sample, score, update", least=1)
    prompts: int = opt(16, "B, prompts per step", least=1)
    group: int = opt(8, "G, completions per prompt", least=2)
    max_new: int = opt(512, "T, tokens of a completion at most", least=1)
    temperature: float = opt(1.0, "of sampling, and of the log-probs that are trained", above=0)
    dynamic_sampling: int = opt(0, "times to replace groups without signal", least=0)

    rewards: tuple[str, ...] = opt(("accuracy", "format"), "names, or file.py:function")
    reward_weights: tuple[float, ...] = opt((), "one weight per reward; none: 1 for each")
    reward_seconds: float = opt(10.0, "a call of a reward of one's own may take", above=0)
    reward_memory: float = opt(4.0, "GB that a process of such a reward may have", above=0)
    least_right: float = opt(0.0, "groups whose first reward is below it on average have no signal "
                             "and do not train; 0: all may", least=0, below=1)
    most_right: float = opt(1.0, "the same for those above it; 1: all may", above=0, most=1)
    advantage: str = opt("group", "group: (r - mean)/std; center: r - mean (Dr. GRPO); loo: RLOO; "
                         "baseline: r - mean, whitened over all tokens (REINFORCE++)",
                         choices=("group", "center", "loo", "baseline"))
    adora: float = opt(1.0, "weight of the advantages of a group whose longest right answer is no "
                       "longer than its wrong ones on average (MM-Eureka: 0.1)", least=0)
    ratio: str = opt("token", "importance ratio per token, or per sequence (GSPO)",
                     choices=("token", "sequence"))
    ratio_cap: float | None = opt(None, "the ratio is at most this (MM-Eureka: 3)", above=1)
    mean: str = opt("sequence", "sequence: mean over tokens, then sequences; token: DAPO's; "
                    "constant: over sequences x max_new (Dr. GRPO)",
                    choices=("sequence", "token", "constant"))
    clip_low: float = opt(0.2, "the ratio is clipped below 1 - clip_low", above=0, most=1)
    clip_high: float = opt(0.2, "and above 1 + clip_high (DAPO: 0.28)", above=0)
    beta: float = opt(0.04, "weight of the KL to the start; 0 loads no reference", least=0)
    kl: str = opt("loss", "loss: k3 in the loss; reward: k1 of this token and those after it is "
                  "taken from its advantage", choices=("loss", "reward"))
    minibatches: int = opt(1, "parts of a batch, an update on each", least=1)
    updates_per_batch: int = opt(1, "times that each batch of samples is learnt", least=1)
    mask_truncated: bool = opt(False, "completions cut at max_new do not train (DAPO)")

    freeze: tuple[str, ...] = opt((), "parts that do not learn", choices=PARTS)
    lora: int = opt(0, "rank r of adapters, which learn instead of the weights; 0: none", least=0)
    lora_alpha: float | None = opt(None, "they count alpha / r times; default: 2 r", above=0)
    lora_dropout: float = opt(0.0, "share of their input that is left out", least=0, below=1)
    lora_targets: tuple[str, ...] = opt((), "layers that have one; none: all linear ones")
    lora_vision: bool = opt(False, "vision tower and merger have adapters, too")
    optimizer: str = opt("adamw", "adamw; muon: Muon for matrices, AdamW for the rest",
                         choices=("adamw", "muon"))
    lr: float = opt(1e-6, "step size", above=0)
    weight_decay: float = opt(0.0, "decoupled weight decay", least=0)
    schedule: str = opt("linear", "of the step size after warm-up, to zero for linear and cosine",
                        choices=("constant", "linear", "cosine"))
    warmup: int = opt(0, "steps over which the step size rises from 0", least=0)
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm", above=0)
    micro_prompts: int = opt(4, "prompts, with completions, per forward and backward", least=1)
    micro_tokens: int | None = opt(None, "tokens of these at most, a patch counting 0.4", least=1)
    bf16: bool = opt(False, "compute in bfloat16; weights and optimizer stay float32")
    shard_group: int | None = opt(None, "processes that share one copy of the weights (HSDP), as "
                                  "those of a machine; default: all", least=1)
    recompute: bool = opt(False, "keep only the inputs of blocks for the backward pass")
    compile: bool = opt(False, "fuse what blocks do by torch.compile: for a GPU")

    evals: tuple[str, ...] = opt((), "NAME=SOURCE, scored greedily before and after")
    scorer: str = opt("accuracy", "what scores the evals, as in evaluate.py")
    probes: int = opt(6, "questions of the first eval that the report follows", least=0)
    probe_every: int = opt(25, "steps between probes and logged samples", least=1)
    save_every: int = opt(100, "steps between checkpoints", least=1)
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
        names = [item.partition("=")[0] for item in self.evals]
        for item, name in zip(self.evals, names):
            if not item.startswith(f"{name}=") or ":" in name or names.count(name) > 1:
                raise ValueError(f"evals: {item!r} is not NAME=SOURCE, each name once")
        if self.prompts % self.minibatches:
            raise ValueError(f"prompts {self.prompts}: must be a multiple of minibatches "
                             f"{self.minibatches}, which are of one size")
        if self.least_right > self.most_right:
            raise ValueError(f"least_right {self.least_right}: is above most_right "
                             f"{self.most_right}, so no group would train")
        if self.ratio_cap and self.ratio_cap <= 1 + self.clip_high:
            raise ValueError(f"ratio_cap {self.ratio_cap}: must be above 1 + clip_high "
                             f"{self.clip_high}")
        if self.kl == "reward" and not self.beta:
            raise ValueError("kl reward: with beta 0 there is no KL to take from it")


# --------------------------------------------------------------- the steps of a run, in their order


def sample_groups(model, ahead: Ahead, drawn, count, cfg) -> Rollout:
    """The next `count` prompts of the data order with their completions (lines 5 and 7)."""
    rows, later = (draw_rows(len(ahead.examples), cfg.seed, start, count)
                   for start in (drawn, drawn + cfg.prompts))  # fmt: skip
    prompts = ahead(rows, expected=later)
    if Learns.of(cfg).looks_once:
        prompts = look(model, prompts)
    return sample(model, ahead.processor, prompts, cfg.group, cfg.max_new, cfg.temperature,
                  cfg.seed, uids=list(range(drawn, drawn + count)))


def sample_batch(model, ahead: Ahead, rewards, drawn, cfg):
    """This process's share of B groups, their rewards (R, B, G), and the prompts drawn by now.

    Dynamic sampling (DAPO, section 3.2): groups whose rewards are all equal, and those outside of
    least_right ... most_right, are replaced by fresh prompts, `dynamic_sampling` times at most;
    what is still without signal then stays in.
    """
    first, count = parallel.share(cfg.prompts)
    worker.counted()  # from here on
    rollout = sample_groups(model, ahead, drawn + first, count, cfg)
    drawn += cfg.prompts
    table = reward_table(rollout, rewards)
    for _ in range(cfg.dynamic_sampling):
        dull = (~has_signal(learnable(table, rewards, cfg))).nonzero()[:, 0].tolist()
        counts = parallel.gathered(len(dull))
        if dull:
            first = drawn + sum(counts[: parallel.rank()])
            fresh = sample_groups(model, ahead, first, len(dull), cfg)
            rollout = rollout.replace(dull, fresh)
            table[:, dull] = reward_table(fresh, rewards)
        drawn += sum(counts)
    return rollout, table, drawn


def micro_batches(rollout: Rollout, adv, cfg) -> list[deal.MicroBatch]:
    """Those of one optimizer step, whose numbers all processes add up to: sum(weights x token loss)
    over them is its loss."""
    trains = (rollout.finished | (not cfg.mask_truncated)) & ~adv.isnan()
    mask, adv = rollout.mask & trains[..., None], adv.masked_fill(adv.isnan(), 0.0)
    tokens, sequences = parallel.total(mask.sum()), cfg.prompts * cfg.group // cfg.minibatches
    weights = token_weights(mask, cfg.mean, sequences, cfg.max_new, tokens)
    return deal.micro_batches(rollout, adv, mask, weights, cfg.micro_prompts, cfg.micro_tokens)


def optimizer_step(model, optimizers, micros, banned, cfg) -> tuple[dict, dict]:
    """Loss, its gradient, a step. -> sums over all tokens, `tokens` their number; the norms of
    apply_gradients. A step whose loss or gradient is not finite is not done."""
    sums = defaultdict(float)  # of tensors: no wait for a device
    for m in micros:
        logp, entropy = score(model, m.rollout, cfg.temperature, banned)
        old = logp.detach() if m.old is None else m.old
        ratio = importance_ratio(logp, old, m.mask, cfg.ratio, cfg.ratio_cap)
        token_loss = clipped_loss(ratio, m.adv, cfg.clip_low, cfg.clip_high)
        told = {"entropy": entropy, "mismatch": (m.rollout.logp - old).abs().exp(), "clip_share":
                clipped(ratio, m.adv, cfg.clip_low, cfg.clip_high, cfg.ratio_cap)}  # fmt: skip
        if m.ref is not None:
            told["kl"] = k3(logp, m.ref)
            if cfg.kl == "loss":
                token_loss = token_loss + cfg.beta * told["kl"]
        loss = (m.weights * token_loss).sum()
        backward(loss)
        sums["loss"] += loss.detach()
        sums["tokens"] += m.counted.sum()
        for name, x in told.items():
            sums[name] += (x.detach() * m.counted).sum()
    found = torch.stack([x.double() for x in sums.values()])
    sums = dict(zip(sums, parallel.total(found).tolist()))
    return sums, apply_gradients(model, optimizers, cfg.max_grad_norm, sums["loss"])


def update(model, reference, optimizers, rollout, adv, banned, cfg) -> dict:
    """Lines 10 and 11: `updates_per_batch` times an optimizer step on each of the `minibatches` of
    one batch with advantages adv (B, G); NaN: does not train. The metrics of the last time.

    The gradient of a step is that of sum(weights x token loss) over its minibatch, whatever
    `micro_prompts` is. A step whose loss or gradient is not finite is skipped and counted.
    """
    parts, even = deal.deal_out(rollout, adv, cfg.minibatches)
    parts = [micro_batches(*part, cfg) for part in parts]
    every = [m for part in parts for m in part]

    def frozen(policy):  # (B', G, T) of each micro-batch, without gradient
        with torch.no_grad():
            return [score(policy, m.rollout, cfg.temperature, banned, False)[0] for m in every]

    with lora.adapter_off(reference):
        for m, ref in zip(every, frozen(reference) if reference else []):
            m.ref = ref
    parallel.release(reference)
    if cfg.updates_per_batch * cfg.minibatches > 1:
        for m, old in zip(every, frozen(model)):
            m.old = old
    token_advantages(every, cfg)
    skipped = 0
    for _ in range(cfg.updates_per_batch):
        done = [optimizer_step(model, optimizers, part, banned, cfg) for part in parts]
        skipped += sum(norms["grad_norm"] is None for _, norms in done)
    sums = {k: sum(one[k] for one, _ in done) for k in done[0][0]}
    loss, tokens = sums.pop("loss") / len(parts), sums.pop("tokens")
    norms = {k: None if any(one[k] is None for _, one in done) else
             sum(one[k] for _, one in done) / len(parts) for k in done[0][1]}  # fmt: skip
    means = {k: v / tokens for k, v in sums.items()}
    return {"loss": loss, **means, **norms, "skipped": skipped, "balance": even, "tokens": tokens}


# ---------------------------------------------------------------------------------------- the run


def memory_plan(cfg: Config, start, processor, examples, evals) -> plan.Plan:
    """What this run needs in memory and on disk, before it needs it."""
    asked = plan.lengths(processor, examples, *evals.values())
    return plan.of(read_config(Path(start)), plan.Work(
        prompts=cfg.prompts, group=cfg.group, max_new=cfg.max_new, micro=cfg.micro_prompts, **asked,
        processes=parallel.size(), shards=cfg.shard_group, optimizer=cfg.optimizer, bf16=cfg.bf16,
        recompute=cfg.recompute, beta=cfg.beta, eval_new=cfg.max_new if evals else 0,
        micro_tokens=cfg.micro_tokens, gpu=torch.cuda.is_available(), learns=Learns.of(cfg),
        minibatches=cfg.minibatches,
    ))  # fmt: skip


def setup(cfg: Config, device: str, seconds: Seconds, stop: Stop) -> SimpleNamespace:
    """All that a run reads, checked before anything is written: the memory that it will take, the
    run's folder (new, or one to go on with), policy, optimizers and reference (lines 1 and 3)."""
    shard = parallel.sharder(device, cfg.bf16, cfg.shard_group)
    with parallel.agreed():
        if (n := cfg.prompts // cfg.minibatches) < parallel.size():
            told = "" if cfg.minibatches == 1 else f" in each of {cfg.minibatches} minibatches"
            raise ValueError(f"prompts {n}{told}: fewer than the {parallel.size()} processes")
        trackers.check_installed(cfg.trackers)
        rewards = load_rewards(cfg.rewards, cfg.reward_weights, cfg.reward_seconds,
                               cfg.reward_memory)
        start = journal.newest_checkpoint(cfg.model)
        processor = Processor.from_pretrained(start, cfg.template, cfg.min_pixels, cfg.max_pixels,
                                              cfg.system, cfg.frame, cfg.gold_frame)
        loaded = load_examples(cfg.data, cfg.images, "train", bad_rows=cfg.bad_rows)
        evals = load_evals(cfg.evals, cfg.scorer)
        rows = fitting(rewards, loaded, cfg.bad_rows)
        rows = without_long(rows, processor.length, "max_prompt", cfg.max_prompt, cfg.bad_rows)
        needs = memory_plan(cfg, start, processor, rows, evals)
        announce(needs, device, cfg, len(rows), cfg.steps, cfg.prompts)
    run = open_run(cfg, cfg.steps)
    check_room(needs, run, cfg, cfg.steps)
    state = run.numbers or {"step": 0, "drawn": 0, "bad": 0, "rows": len(rows), "start": start}
    start = state["start"]
    with parallel.agreed():
        policy = lora.load(Learns.of(cfg), start, run.checkpoint, cfg.seed, device, shard)
        policy.prepare(cfg.compile, cfg.recompute)
        optimizers = make_optimizers(policy, cfg.optimizer, cfg.lr, cfg.weight_decay)
        take_up(run, policy, optimizers, len(rows))
        reference = lora.reference(policy, start, cfg.bf16, device, shard) if cfg.beta else None
        book = Logbook(cfg, run, seconds, stop, steps=cfg.steps, model=policy, evals=evals,
                       processor=processor, optimizers=optimizers, state=state,
                       shown=("reward", "length/mean"))
    ahead = Ahead(processor, rows, cfg.max_prompt, cfg.workers)
    first = next(iter(evals.values()), rows)
    return SimpleNamespace(
        policy=policy, reference=reference, optimizers=optimizers, rewards=rewards, book=book,
        processor=processor, ahead=ahead, skipped=left_out(loaded, rows),
        probes=[processor.prompt(e) for e in islice(first, cfg.probes)],
    )  # fmt: skip


def train(cfg: Config) -> dict:
    """The box of DeepSeekMath, Algorithm 1; its lines stand where they are done. -> the summary"""
    device, seconds = parallel.start(), Seconds()
    half = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=cfg.bf16)
    with Stop(cfg.must_save_by) as stop:
        # 1: initial policy model    3: reference model
        with seconds("setup"), parallel.told():
            run = setup(cfg, device, seconds, stop)
        policy, rewards, book, state = run.policy, run.rewards, run.book, run.book.state
        names, main_process = [name for name, _, _ in rewards], parallel.rank() == 0

        def probe(step, sampler):
            if main_process:
                journal.log_probes(book.out, step, sampler, run.processor, run.probes, rewards,
                                   cfg.max_new)

        book.open()
        for step in book.steps("grpo"):  # 4: for step = 1, ..., M
            lr = cfg.lr * schedule(step, cfg.steps, cfg.warmup, cfg.schedule)
            set_lr(run.optimizers, lr)
            with seconds("sample"), half(), parallel.told():
                sampler = parallel.copy(policy)
                if (step - 1) % cfg.probe_every == 0:
                    probe(step - 1, sampler)
                # 5: sample a batch    7: sample G outputs for each question    8: compute rewards
                rollout, table, state["drawn"] = sample_batch(sampler, run.ahead, rewards,
                                                              state["drawn"], cfg)
            # 9: compute the advantages through group relative estimation
            adv = advantages(rollout, table, rewards, cfg).to(device)
            lora.seed_dropout(policy, cfg.seed, step, parallel.rank())
            with seconds("update"), half():
                # 10: for GRPO iteration = 1, ..., mu    11: update by the GRPO objective
                found = update(policy, run.reference, run.optimizers, rollout, adv,
                               run.processor.banned_ids, cfg)
            with seconds("log"), parallel.told():
                if main_process and (step == 1 or step % cfg.probe_every == 0):
                    journal.log_rollout(book.out, step, rollout, names, table,
                                        total_reward(table, rewards), adv)
            tokens = found.pop("tokens")
            updates = cfg.updates_per_batch * cfg.minibatches
            state["bad"] = state["bad"] + 1 if found["skipped"] == updates else 0
            book.end(step, {"lr": lr, **step_metrics(rollout, table, rewards, cfg), **found,
                            "drawn": state["drawn"], "rows_skipped": run.skipped},
                     cfg.prompts * cfg.group, tokens)
            if state["bad"] == 5:  # steps in a row without an update
                raise SystemExit(f"step {step}: no finite update in 5 steps, all were skipped. "
                                 "Try a smaller --lr or --max_grad_norm, or --bf16 false.")
        run.ahead.close()
        with seconds("eval"), half():
            probe(cfg.steps, parallel.copy(policy))
        return book.close()


def main(argv=None) -> dict:
    cfg = parse(Config, argv, __doc__)
    with parallel.together(), parallel.told(OSError):
        return train(cfg)


if __name__ == "__main__":
    main()
