"""GRPO: reinforcement learning of a vision-language model with verifiable rewards.

    python grpo.py recipes/tiny.toml --steps 50 --group 4

Source: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), Algorithm 1, equations 3 and 4. Beside
it: DAPO (token mean, asymmetric clip, dynamic sampling; 2503.14476), Dr. GRPO (constant
denominator; 2503.20783), GSPO (sequence ratio; 2507.18071), RLOO (2402.14740).

What the papers leave open, and our choice: the group's standard deviation is the unbiased one and
1e-4 is added to it (as R1-V does through TRL); denominators are those of the whole optimizer step,
so nothing that splits the work changes the gradient; log-probs are those of the sampled
distribution, temperature and banned tokens included.

What we do differently: a group shares one copy of prompt and image, in sampling and in training
(rollout.py). With one update per batch the old log-probs are the current ones: no extra pass.

Letters: B prompts, G completions per prompt, T completion tokens. logp, old, ref (B, G, T):
log-probs of the sampled tokens by the policy that trains, that sampled, and the reference.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
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
from data import Processor, without_long
from evaluate import evaluate_all, load_evals, print_summary
from journal import Seconds
from model import Qwen2VL
from optim import apply_gradients, draw_rows, make_optimizers, schedule, set_lr
from rewards import load_rewards
from rollout import Rollout, sample, score
from rows import load_examples


@dataclass(frozen=True)
class Config:
    """Every key of a run. Defaults are R1-V's where it has one."""

    model: str = opt("tiny", "checkpoint to start from: folder, run, or hub id")
    data: str = opt("world:A:n=6400", "rows to train on: world:…, a file, a folder, a hub id")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    template: str = opt("r1v", "prompt template by name, or a text that holds {Question}")
    system: str | None = opt(None, "system prompt; default: the template's")
    min_pixels: int | None = opt(None, "pixels of an image at least; default: the checkpoint's")
    max_pixels: int | None = opt(None, "pixels of an image at most; default: the checkpoint's")
    max_prompt: int | None = opt(None, "refuse rows of more tokens at the start, or skip them")
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
    advantage: str = opt("group", "group: (r - mean)/std; center: r - mean (Dr. GRPO); loo: RLOO",
                         choices=("group", "center", "loo"))
    ratio: str = opt("token", "importance ratio per token, or per sequence (GSPO)",
                     choices=("token", "sequence"))
    mean: str = opt("sequence", "sequence: mean over tokens, then sequences; token: DAPO's; "
                    "constant: over sequences x max_new (Dr. GRPO)",
                    choices=("sequence", "token", "constant"))
    clip_low: float = opt(0.2, "the ratio is clipped below 1 - clip_low", above=0, most=1)
    clip_high: float = opt(0.2, "and above 1 + clip_high (DAPO: 0.28)", above=0)
    beta: float = opt(0.04, "weight of the KL to the start; 0 loads no reference", least=0)
    updates_per_batch: int = opt(1, "updates on each batch of samples", least=1)
    mask_truncated: bool = opt(False, "completions cut at max_new do not train (DAPO)")

    optimizer: str = opt("adamw", "adamw; muon: Muon for matrices, AdamW for the rest",
                         choices=("adamw", "muon"))
    lr: float = opt(1e-6, "step size", above=0)
    weight_decay: float = opt(0.0, "decoupled weight decay", least=0)
    schedule: str = opt("linear", "of the step size after warm-up, to zero for linear and cosine",
                        choices=("constant", "linear", "cosine"))
    warmup: int = opt(0, "steps over which the step size rises from 0", least=0)
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm", above=0)
    micro_prompts: int = opt(4, "prompts, with completions, per forward and backward", least=1)
    bf16: bool = opt(False, "compute in bfloat16; weights and optimizer stay float32")
    shard_group: int | None = opt(None, "processes that share one copy of the weights (HSDP), as "
                                  "those of a machine; default: all", least=1)
    recompute: bool = opt(False, "keep only the inputs of blocks for the backward pass")

    evals: tuple[str, ...] = opt((), "NAME=SOURCE, scored greedily before and after")
    probes: int = opt(6, "questions of the first eval that the report follows", least=0)
    probe_every: int = opt(25, "steps between probes and logged samples", least=1)
    save_every: int = opt(100, "steps between checkpoints", least=1)

    def check(self):
        """ValueError for what no single key can say."""
        names = [item.partition("=")[0] for item in self.evals]
        for item, name in zip(self.evals, names):
            if not item.startswith(f"{name}=") or ":" in name or names.count(name) > 1:
                raise ValueError(f"evals: {item!r} is not NAME=SOURCE, each name once")


# --------------------------------------------------------------------- the algorithm, as functions


def group_advantages(rewards: Tensor, kind: str = "group", eps: float = 1e-4) -> Tensor:
    """Advantages (B, G) of rewards (B, G) against their own group; NaN is 'no reward'.

    group: (r_i - mean) / (std + eps), std unbiased: DeepSeekMath, section 4.1.2.
    center: r_i - mean: Dr. GRPO. loo: r_i - mean of the others: RLOO.
    A completion without a reward is left out of its group's baseline and gets advantage 0.
    """
    n = (~rewards.isnan()).sum(1, keepdim=True)  # (B, 1)
    centred = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(0.0)
    if kind == "group":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        return centred / (std + eps)
    return centred * (n / (n - 1).clamp(min=1)) if kind == "loo" else centred


def importance_ratio(logp: Tensor, old: Tensor, mask: Tensor, kind: str = "token") -> Tensor:
    """pi / pi_old (B, G, T) per token; sequence: their geometric mean (B, G, 1) (GSPO, eq. 7)."""
    log_ratio = (logp - old) * mask
    if kind == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def clipped_loss(ratio: Tensor, adv: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), (B, G, T); adv (B, G, 1).

    DeepSeekMath, equation 3, its first term; the two bounds are DAPO's.
    """
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """KL(pi || ref) per token, unbiased and never negative: DeepSeekMath, equation 4."""
    return (ref - logp).exp() - (ref - logp) - 1


def token_weights(mask: Tensor, mean: str, sequences: int, max_new: int, tokens=None) -> Tensor:
    """Weights (B, G, T), so that the loss of a step is sum(weights x token loss).

    `sequences` and `tokens` (default: those of mask) are numbers of the whole step, known before
    the first backward. sequence: 1 / (|o_i| sequences), GRPO. token: 1 / tokens, DAPO. constant:
    1 / (sequences max_new), Dr. GRPO.
    """
    if mean == "token":
        return mask / (mask.sum() if tokens is None else tokens).clamp(min=1)
    if mean == "constant":
        return mask / (sequences * max_new)
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / sequences


# --------------------------------------------------------------- the steps of a run, in their order


def sample_groups(model, ahead: Ahead, drawn, count, cfg) -> Rollout:
    """The next `count` prompts of the data order with their completions (lines 5 and 7)."""
    rows, later = (draw_rows(len(ahead.examples), cfg.seed, start, count)
                   for start in (drawn, drawn + cfg.prompts))  # fmt: skip
    return sample(model, ahead.processor, ahead(rows, expected=later), cfg.group, cfg.max_new,
                  cfg.temperature, cfg.seed, uids=list(range(drawn, drawn + count)))


def reward_table(rollout: Rollout, rewards: list) -> Tensor:
    """Rewards (R, B, G) of R functions, NaN for None; each text meets its own prompt's example."""
    def one(f, text, example):
        value = f(text, example)
        return math.nan if value is None else float(value)

    return torch.tensor([
        [[one(f, text, prompt.example) for text in texts]
         for prompt, texts in zip(rollout.prompts, rollout.texts)]
        for _, f, _ in rewards
    ])  # fmt: skip


def total_reward(table: Tensor, rewards: list) -> Tensor:
    """Weighted sum (B, G) over the functions; NaN where none of them gave a reward."""
    weights = torch.tensor([w for _, _, w in rewards])[:, None, None]
    return (table * weights).nansum(0).masked_fill(table.isnan().all(0), math.nan)


def has_signal(reward: Tensor) -> Tensor:
    """(B,) True where the rewards (B, G) of a group are not all equal."""
    return reward.nan_to_num(math.inf).amin(1) < reward.nan_to_num(-math.inf).amax(1)


def sample_batch(model, ahead: Ahead, rewards, drawn, cfg):
    """This process's share of B groups, their rewards (R, B, G), and the prompts drawn by now.

    Dynamic sampling (DAPO, section 3.2): groups whose rewards are all equal are replaced by fresh
    prompts, `dynamic_sampling` times at most; what is still without signal then stays in.
    """
    first, count = parallel.share(cfg.prompts)
    rollout = sample_groups(model, ahead, drawn + first, count, cfg)
    drawn += cfg.prompts
    table = reward_table(rollout, rewards)
    for _ in range(cfg.dynamic_sampling):
        dull = (~has_signal(total_reward(table, rewards))).nonzero()[:, 0].tolist()
        counts = parallel.gathered(len(dull))
        if dull:
            first = drawn + sum(counts[: parallel.rank()])
            fresh = sample_groups(model, ahead, first, len(dull), cfg)
            rollout = rollout.replace(dull, fresh)
            table[:, dull] = reward_table(fresh, rewards)
        drawn += sum(counts)
    return rollout, table, drawn


def update(model, reference, optimizers, rollout, adv, banned, cfg) -> dict:
    """Lines 10 and 11: `updates_per_batch` optimizer steps on one batch; the metrics of the last.

    The gradient of a step is that of sum(weights x token loss) over the whole batch, whatever
    `micro_prompts` is. A step whose loss or gradient is not finite is skipped and counted.
    """
    rollout, adv, even = deal.deal_out(rollout, adv)
    mask = rollout.mask & (rollout.finished[..., None] | (not cfg.mask_truncated))
    tokens = parallel.total(mask.sum())
    weights = token_weights(mask, cfg.mean, cfg.prompts * cfg.group, cfg.max_new, tokens)
    parts = deal.micro_batches(rollout, adv, mask, weights, cfg.micro_prompts)

    def frozen(policy):  # (B, G, T) of each micro-batch, without gradient
        with torch.no_grad():
            return [score(policy, p[0], cfg.temperature, banned)[0] for p in parts]

    refs = frozen(reference) if reference else [None] * len(parts)
    olds = frozen(model) if cfg.updates_per_batch > 1 else [None] * len(parts)
    skipped = 0
    for _ in range(cfg.updates_per_batch):
        sums = defaultdict(float, tokens=float(rollout.mask.sum()))
        for (part, a, m, w, counted), ref, old in zip(parts, refs, olds):
            logp, entropy = score(model, part, cfg.temperature, banned)
            old = logp.detach() if old is None else old
            ratio = importance_ratio(logp, old, m, cfg.ratio)
            token_loss = clipped_loss(ratio, a, cfg.clip_low, cfg.clip_high)
            if reference:
                kl = k3(logp, ref)
                token_loss = token_loss + cfg.beta * kl
                sums["kl"] += float((kl.detach() * counted).sum())
            loss = (w * token_loss).sum()
            loss.backward()
            sums["loss"] += float(loss.detach())
            sums["entropy"] += float((entropy * counted).sum())
            high, low = (ratio > 1 + cfg.clip_high) & (a > 0), (ratio < 1 - cfg.clip_low) & (a < 0)
            sums["clip_share"] += float(((high | low) & counted).sum())
            sums["mismatch"] += float(((part.logp - old).abs().exp() * counted).sum())
        found = torch.tensor(list(sums.values()), dtype=torch.float64, device=adv.device)
        sums = dict(zip(sums, parallel.total(found).tolist()))
        norms = apply_gradients(model, optimizers, cfg.max_grad_norm, sums["loss"])
        skipped += norms["grad_norm"] is None
    loss, tokens = sums.pop("loss"), sums.pop("tokens")
    means = {k: v / tokens for k, v in sums.items()}
    return {"loss": loss, **means, **norms, "skipped": skipped, "balance": even}


# ---------------------------------------------------------------------------------------- the run


def step_metrics(rollout: Rollout, table: Tensor, rewards: list) -> dict:
    """What the samples of all processes say; shares are over completions, no_signal over groups."""
    mine = (table.transpose(0, 1), rollout.lengths.cpu().float(), rollout.finished.cpu())
    table, lengths, finished = (torch.cat(x) for x in zip(*parallel.gathered(mine)))
    table = table.transpose(0, 1)  # (R, B, G)
    reward = total_reward(table, rewards)
    found = {"reward": float(reward.nanmean())}
    names = [name for name, _, _ in rewards]
    found |= {f"reward/{name}": float(t.nanmean()) for name, t in zip(names, table)}
    if {"accuracy", "format"} <= set(names):
        right, form = (table[names.index(k)] for k in ("accuracy", "format"))
        found["format_only"] = float(((form == 1) & (right == 0)).float().mean())
    return found | {
        "reward_std": float(reward.std(1).nanmean()),
        "no_signal": float((~has_signal(reward)).float().mean()),
        "no_reward": float(reward.isnan().float().mean()),
        "length/mean": float(lengths.mean()),
        "length/min": float(lengths.min()),
        "length/max": float(lengths.max()),
        "truncated": float((~finished).float().mean()),
    }


def setup(cfg: Config, device: str, seconds: Seconds) -> tuple:
    """All that a run reads, checked before anything is written: processor, rewards, rows, evals,
    policy and reference (lines 1 and 3), and the run's folder."""
    if cfg.prompts < parallel.size():
        raise ValueError(f"prompts {cfg.prompts}: fewer than the {parallel.size()} processes")
    rewards = load_rewards(cfg.rewards, cfg.reward_weights)
    folder = journal.newest_checkpoint(cfg.model)
    processor = Processor.from_pretrained(folder, cfg.template, cfg.min_pixels, cfg.max_pixels,
                                          cfg.system)
    with seconds("render"):
        examples = load_examples(cfg.data, cfg.images, "train", bad_rows=cfg.bad_rows)
        evals = load_evals(cfg.evals)
    examples = without_long(examples, processor.length, "max_prompt", cfg.max_prompt, cfg.bad_rows)
    with seconds("tiny"):
        shard = partial(parallel.shard, device=device, bf16=cfg.bf16, group=cfg.shard_group)
        load = partial(Qwen2VL.from_pretrained, folder, device=device, shard=shard)
        policy = load().recompute_blocks() if cfg.recompute else load()
        reference = load() if cfg.beta else None
    out = journal.run_folder(cfg.out, cfg) if parallel.rank() == 0 else None
    return processor, rewards, examples, evals, policy, reference, parallel.gathered(out)[0]


def train(cfg: Config) -> dict:
    """The box of DeepSeekMath, Algorithm 1; its lines stand where they are done. -> the summary"""
    device, seconds = parallel.start(), Seconds()
    # 1: initial policy model    3: reference model
    try:
        processor, rewards, examples, evals, policy, reference, out = setup(cfg, device, seconds)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    optimizers = make_optimizers(policy, cfg.optimizer, cfg.lr, cfg.weight_decay)
    half = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=cfg.bf16)
    ahead = Ahead(processor, examples, cfg.max_prompt, cfg.workers)
    probes = [processor.prompt(e) for e in islice(next(iter(evals.values()), examples), cfg.probes)]
    with seconds("eval"), half(), parallel.whole_weights(policy):
        before = evaluate_all(policy, processor, evals, cfg.max_new, out, "before")

    names, main_process = [name for name, _, _ in rewards], parallel.rank() == 0
    drawn, bad = 0, 0  # prompts drawn so far; steps in a row without an update
    bar = tqdm(range(1, cfg.steps + 1), desc="grpo", unit="step", disable=not main_process)
    for step in bar:  # 4: for step = 1, ..., M
        set_lr(optimizers, lr := cfg.lr * schedule(step, cfg.steps, cfg.warmup, cfg.schedule))
        with seconds("sample"), half(), parallel.whole_weights(policy):
            if main_process and (step - 1) % cfg.probe_every == 0:
                journal.log_probes(out, step - 1, policy, processor, probes, rewards, cfg.max_new)
            # 5: sample a batch    7: sample G outputs for each question    8: compute rewards
            rollout, table, drawn = sample_batch(policy, ahead, rewards, drawn, cfg)
        # 9: compute the advantages through group relative estimation
        adv = group_advantages(reward := total_reward(table, rewards), cfg.advantage).to(device)
        with seconds("update"), half():
            # 10: for GRPO iteration = 1, ..., mu    11: update by maximizing the GRPO objective
            found = update(policy, reference, optimizers, rollout, adv, processor.banned_ids, cfg)
        row = {"step": step, "lr": lr, **step_metrics(rollout, table, rewards), **found}
        row |= {f"time/{k}": seconds.last[k] for k in ("sample", "update")}
        row |= {"seconds": seconds.since_start(), "drawn": drawn, "completions_per_second":
                cfg.prompts * cfg.group / (row["time/sample"] + row["time/update"])}
        bad = bad + 1 if found["skipped"] == cfg.updates_per_batch else 0
        bar.set_postfix({k: f"{row[k]:.2f}" for k in ("reward", "length/mean")})
        with seconds("log"):
            if main_process:
                journal.append(out / "metrics.jsonl", row)
                if step == 1 or step % cfg.probe_every == 0:
                    journal.log_rollout(out, step, rollout, names, table, reward, adv)
            if step == cfg.steps or step % cfg.save_every == 0:
                journal.save_checkpoint(policy, processor, out / f"step_{step:06d}")
        if bad == 5:
            raise SystemExit(f"step {step}: no finite update in 5 steps, all were skipped. "
                             "Try a smaller --lr or --max_grad_norm, or --bf16 false.")
    ahead.close()
    with seconds("eval"), half(), parallel.whole_weights(policy):
        if main_process:
            journal.log_probes(out, cfg.steps, policy, processor, probes, rewards, cfg.max_new)
        after = evaluate_all(policy, processor, evals, cfg.max_new, out, "after")
    seconds["grpo"] = seconds["sample"] + seconds["update"] + seconds["log"]
    shown = {k: round(seconds[k], 1) for k in ("render", "tiny", "grpo", "eval")}
    summary = {"before": before, "after": after, "seconds": shown, "steps": cfg.steps,
               "seed": cfg.seed, "peak_memory_gb": round(journal.peak_memory_gb(), 3)}
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
