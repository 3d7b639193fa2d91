"""R1-V's workload on one machine: how fast it samples and trains, what share of its limits that is.

    python bench.py r1v --shape qwen2-vl-2b --price 3.5        # one GPU; so does python workload.py
    python bench.py r1v --shape tiny --max_new 32 --mean_length 12 --bf16 false          # a laptop

Source of the workload: R1-V's CLEVR run (recipes/r1v_clevr_2b.toml): pictures of 480 x 320 pixels,
16 prompts x 8 completions per step, beta 0.04, AdamW. What runs is what a training run runs,
grpo.sample_batch and grpo.update. Weights, pictures, tokenizer and lengths of completions are
stand-ins (standin.py). Rewards are computed and timed, then replaced by those of a coin: random
weights earn none.

Steps are timed as a whole, sampling and update. Others (`phase_steps`) are taken apart by waiting
for the device wherever a phase ends, which would slow the timed ones down. Inside decoding nothing
waits that does not wait in a run.

Letters: B prompts, G completions per prompt.
"""

import shlex
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import costs
import estimators
import grpo
import machine
import parallel
import plan
from checkpoint import read_config
from config import opt, parse, to_dict
from data import Processor
from grading import load_rewards
from journal import write_json
from logbook import announce
from machine import Awaited, Phases, peak_bytes, reset_peak, spreads, synchronize
from optim import make_optimizers
from plan import gb
from rollout import Rollout
from sampling import Room
from standin import (
    SIGMA,
    draw_lengths,
    imposed,
    make_examples,
    make_processor,
    random_model,
    rebound,
    unending,
)

HERE = Path(__file__).resolve().parent
PICTURES = 64  # that are drawn; later steps see them again
A100_PRICE = 0.655  # dollars per hour: R1-V's README has 8 A100 for 30 minutes at $2.62


@dataclass(frozen=True)
class Config:
    """Every key of a measurement. Those that grpo.py has mean what they mean there."""

    shape: str = opt("qwen2-vl-2b", "of the weights; tiny: the checkpoint in tiny/",
                     choices=("tiny", *costs.SHAPES))
    model: str | None = opt(None, "folder with a checkpoint's config.json and tokenizer, instead "
                            "of `shape`; weights are random all the same")
    prompts: int = opt(16, "B, prompts per step", least=1)
    group: int = opt(8, "G, completions per prompt", least=2)
    max_new: int = opt(512, "tokens of a completion at most", least=1)
    mean_length: float = opt(130.0, "tokens of a completion, in the mean", least=1)
    steps: int = opt(5, "steps that are timed", least=1)
    warmup: int = opt(2, "steps before them that are not", least=0)
    phase_steps: int = opt(2, "steps after them that are taken apart", least=1)
    beta: float = opt(0.04, "weight of the KL; 0: no reference", least=0)
    rewards: tuple[str, ...] = opt(("r1v_accuracy", "r1v_format"), "names, or file.py:function")
    optimizer: str = opt("adamw", "adamw or muon", choices=("adamw", "muon"))
    bf16: bool = opt(True, "compute in bfloat16")
    recompute: bool = opt(False, "keep only the inputs of blocks for the backward pass")
    compile: bool = opt(False, "fuse what blocks do by torch.compile: for a GPU")
    check_memory: bool = opt(True, "refuse what the plan says does not fit; else only say so")
    micro_prompts: int = opt(4, "prompts, with completions, per forward and backward", least=1)
    workers: int | None = opt(None, "processes that prepare prompts; default: 4 beside a GPU, "
                              "else 0", least=0)
    seed: int = opt(0, "fixes pictures, weights, lengths and samples", least=0)
    price: float | None = opt(None, f"dollars per hour of this machine; default on an A100: "
                              f"{A100_PRICE}, what R1-V paid, elsewhere none", above=0)
    peak_flops: float | None = opt(None, "FLOP/s that MFU is a share of; default: the GPU's data "
                                   "sheet, on a CPU a product of matrices", above=0)
    bandwidth: float | None = opt(None, "bytes/s of memory; default: as before, a copy", above=0)
    profile: str | None = opt(None, "folder for a trace of one more step (torch.profiler)")
    commit: str | None = opt(None, "of the code, where git cannot tell it")
    out: str | None = opt(None, "result; default: bench/results/r1v-SHAPE-DEVICE.json")


# --------------------------------------------------------------------------------------- the steps


def setup(cfg: Config, device: str) -> SimpleNamespace:
    """Weights, pictures and all else that steps take. ValueError, before a weight is made, for a
    GPU that is not known and for what does not fit on it."""
    known = grpo.Config.__dataclass_fields__.keys() & Config.__dataclass_fields__.keys()
    known -= {"model", "out"}
    run = grpo.Config(**{k: getattr(cfg, k) for k in known})
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    bounds = machine.limits(device, dtype, cfg.peak_flops, cfg.bandwidth)
    rewards = load_rewards(cfg.rewards)
    folder = HERE / "tiny" if cfg.model is None and cfg.shape == "tiny" else cfg.model
    shape = read_config(Path(folder)) if folder else costs.SHAPES[cfg.shape]
    processor = Processor.from_pretrained(folder, "r1v") if folder else make_processor(shape)
    processor, steps = unending(processor), cfg.warmup + cfg.steps + cfg.phase_steps
    examples = make_examples(min(PICTURES, cfg.prompts * (steps + 2)), cfg.seed)
    needs = memory_plan(cfg, device, shape, plan.lengths(processor, examples))
    announce(needs, device, run, len(examples), steps, cfg.prompts)
    make = partial(random_model, shape, device, cfg.seed)
    policy = make().prepare(cfg.compile, cfg.recompute)  # both as in grpo.setup
    reference = make().frozen(dtype).prepare(cfg.compile) if cfg.beta else None
    ahead = Awaited(processor, examples, workers=cfg.workers)
    return SimpleNamespace(
        cfg=cfg, grpo=run, device=device, shape=shape, limits=bounds, rewards=rewards,
        processor=processor, policy=policy, reference=reference, ahead=ahead,
        optimizers=make_optimizers(policy, cfg.optimizer, run.lr),
        half=partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=cfg.bf16),
    )  # fmt: skip


def memory_plan(cfg: Config, device: str, shape, longest: dict) -> plan.Plan:
    """What the steps need. longest: tokens and patches of the longest prompt."""
    same = ("prompts", "group", "max_new", "optimizer", "bf16", "recompute", "beta")
    work = {k: getattr(cfg, k) for k in same} | longest
    return plan.of(shape, plan.Work(**work, micro=cfg.micro_prompts, gpu="cuda" in device))


def sample_step(run, step: int) -> Rollout:
    """Step `step`, from 0, up to its rewards, as in grpo.train. RuntimeError for other lengths."""
    cfg, first = run.cfg, step * run.cfg.prompts
    lengths = draw_lengths((cfg.prompts, cfg.group), cfg.mean_length, cfg.max_new, (cfg.seed, step))
    with run.half(), imposed(lengths):
        batch, *_ = grpo.sample_batch(parallel.copy(run.policy), run.ahead, run.rewards, first,
                                      run.grpo)  # fmt: skip
    if not torch.equal(batch.lengths.cpu(), lengths):
        raise RuntimeError("rollout.sample did not keep the lengths that it was told to")
    return batch


def update_step(run, step: int, batch) -> dict:
    """The rest of it, with rewards of 0 or 1 by a coin; grpo.update's metrics."""
    coins = torch.from_numpy(np.random.default_rng((run.cfg.seed, step, 1)).integers(
        0, 2, batch.lengths.shape).astype(np.float32))  # fmt: skip
    adv = estimators.group_advantages(coins, run.grpo.advantage).to(run.device)
    with run.half():
        return grpo.update(run.policy, run.reference, run.optimizers, batch, adv,
                           run.processor.banned_ids, run.grpo)  # fmt: skip


def timed_step(run, step: int) -> dict:
    """Seconds of sampling, with waits for prompts, and of the update; what was done in them."""
    before = run.ahead.waited
    synchronize(run.device)
    begin = time.perf_counter()
    batch = sample_step(run, step)
    synchronize(run.device)
    sampled = time.perf_counter()
    found = update_step(run, step, batch)
    synchronize(run.device)
    seconds = {"sample": sampled - begin, "update": time.perf_counter() - sampled}
    told = {k: found[k] for k in ("loss", "kl", "mismatch", "grad_norm") if k in found}
    return {**seconds, "waited": run.ahead.waited - before, **work_of(run, batch), **told}


def phased_step(run, step: int) -> dict:
    """A step taken apart: seconds and peak memory of each phase, and what was done. What sampling
    does beside its phases (weights to sample with, random numbers, texts) is "around"."""
    phases, shapes, one = Phases(run.device), [], Room.step

    def scored(model):
        return "reference" if model is run.reference else "forward/backward"

    def counted(room, model, *shape):
        shapes.append(shape)
        one(room, model, *shape)

    with ExitStack() as stack:
        stack.enter_context(rebound(Room, step=counted))
        for module, name, phase in (
            (Room, "enter", "prefill"), (Room, "run", "decode"), (grpo, "reward_table", "reward"),
            (grpo, "score", scored), (grpo, "apply_gradients", "optimizer"),
            (Awaited, "__call__", "preprocess"),
        ):  # fmt: skip
            function = phases.of(getattr(module, name), phase)
            stack.enter_context(rebound(module, **{name: function}))
        with phases("around"):
            batch = sample_step(run, step)
        with phases("forward/backward"):
            update_step(run, step, batch)
    return {"seconds": dict(phases.seconds), "peak_bytes": dict(phases.peak), **work_of(run, batch),
            "decode_steps": len(shapes), "decode_bytes": bytes_of(run, batch, shapes)}  # fmt: skip


def work_of(run, batch: Rollout) -> dict:
    """What a step had to do, by costs.py: tokens, and FLOPs of the update (both passes of the
    policy, and the reference's), without those of what is computed a second time."""
    lengths, prompts = batch.lengths.tolist(), [len(p.ids) for p in batch.prompts]
    images = [tuple(grid) for p in batch.prompts for grid in p.grid.tolist()]
    args, flat = (run.shape, prompts, lengths, images), [n for row in lengths for n in row]
    forward = costs.forward_flops(*args)
    flops = costs.training_flops(*args) - forward["head"]  # the backward pass makes logits anew
    return {
        "completions": len(flat), "sampled_tokens": sum(flat), "longest": max(flat),
        "decoded_tokens": sum(flat) - len(flat),  # a completion's first comes from the prompt
        "trained_tokens": sum(prompts) + sum(flat) - len(flat),
        "update_flops": flops + (run.cfg.beta > 0) * sum(forward.values()),
    }  # fmt: skip


def bytes_of(run, batch: Rollout, shapes: list[tuple[int, int, int]]) -> float:
    """Bytes that decode steps of those shapes (slots, completions of each, tokens that each has at
    most) have to move. What has ended counts until it leaves."""
    prompt, width = statistics.mean(len(p.ids) for p in batch.prompts), 2 if run.cfg.bf16 else 4
    return sum(
        sum(costs.decode_bytes(run.shape, N * G, N, prompt, span - 1, width).values())
        for N, G, span in shapes
    )


# ---------------------------------------------------------------------------------- what comes out


def rates(run, found: dict) -> dict:
    """Figures of a timed step. waiting: share of it in which the device waited for prompts."""
    return {
        "step_seconds": (seconds := found["sample"] + found["update"]),
        "completions_per_second": found["completions"] / seconds,
        "training_tokens_per_second": found["trained_tokens"] / found["update"],
        "mfu": found["update_flops"] / found["update"] / run.limits["flops"],
        "waiting": found["waited"] / seconds,
    }


def decode_rates(run, found: dict) -> dict:
    """Figures of decoding in a step that was taken apart. A decode step gives a token to each
    completion that goes on. bandwidth_share: of the time, what moving the bytes would take."""
    seconds = found["seconds"]["decode"]
    return {
        "decode_tokens_per_second": found["decoded_tokens"] / seconds,
        "decode_ms_per_step": 1000 * seconds / max(1, found["decode_steps"]),
        "bandwidth_share": found["decode_bytes"] / run.limits["bandwidth"] / seconds,
    }


def measure(cfg: Config, device: str) -> dict:
    """All of it: warm-up, timed steps, steps taken apart, perhaps a trace; rounds and summary."""
    if parallel.size() > 1:
        raise ValueError("this measures one device: start it without torchrun")
    run, steps = setup(cfg, device), iter(range(10**9))
    for _ in range(cfg.warmup):
        timed_step(run, next(steps))
    reset_peak(device)
    rounds = [timed_step(run, next(steps)) for _ in range(cfg.steps)]
    rounds, peak = [{**found, **rates(run, found)} for found in rounds], peak_bytes()
    apart = [phased_step(run, next(steps)) for _ in range(cfg.phase_steps)]
    apart = [{**found, **decode_rates(run, found)} for found in apart]
    if cfg.profile:
        machine.traced(lambda: timed_step(run, next(steps)), cfg.profile)
    prompts = run.ahead(range(min(cfg.prompts, len(run.ahead.examples))))
    run.ahead.close()
    told = machine.told(device, cfg.commit)
    price = cfg.price or (A100_PRICE if "A100" in told["device"] else None)
    hundred = 100 * statistics.median(found["step_seconds"] for found in rounds)
    return {
        "machine": told, "limits": run.limits, "config": to_dict(cfg),
        "workload": {
            "lengths": f"lognormal of mean {cfg.mean_length:g} and sigma {SIGMA}, rounded, within "
                       f"1 .. {cfg.max_new}",
            "prompt_tokens": statistics.mean(len(p.ids) for p in prompts),
            "image_tokens": statistics.mean(len(p.image_at) for p in prompts),
            "patches": statistics.mean(len(p.patches) for p in prompts),
            "weights": sum(p.numel() for p in run.policy.parameters()),
        },
        "rounds": rounds, "phase_rounds": apart, "memory": machine.MEMORY[device.split(":")[0]],
        "found": {
            **spreads([rates(run, found) for found in rounds]),
            **spreads([decode_rates(run, found) for found in apart]),
            "phases": spreads([found["seconds"] for found in apart]),
            "phase_peak_bytes": {k: max(found["peak_bytes"][k] for found in apart)
                                 for k in apart[0]["peak_bytes"]},
            "peak_bytes": peak, "seconds_per_100_steps": hundred, "price_per_hour": price,
            "dollars_per_100_steps": price and hundred / 3600 * price,
        },
    }  # fmt: skip


def text(result: dict) -> str:
    """The result as it is printed: what was found, median (lowest to highest)."""
    found, told, cfg, work, bound = (
        result[name] for name in ("found", "machine", "config", "workload", "limits")
    )

    def row(name, key, scale=1.0, unit=""):
        low, middle, high = (f"{found[key][k] * scale:.4g}" for k in ("low", "median", "high"))
        return f"  {name:28}{middle:>10}{unit} ({low} to {high})"

    price = found["price_per_hour"]
    dollars = (f"${found['dollars_per_100_steps']:.2f} at ${price:g} an hour" if price else
               "--price says what they cost")  # fmt: skip
    lines = [
        f"{cfg['model'] or cfg['shape']}, {work['weights']:,} weights, on {told['device']}, torch "
        f"{told['versions']['torch']}, commit {told['commit']}",
        f"{cfg['prompts']} prompts of {work['prompt_tokens']:.0f} tokens "
        f"({work['image_tokens']:.0f} of the image) x {cfg['group']} completions; {cfg['steps']} "
        f"steps; lengths {work['lengths']}",
        row("completions/s", "completions_per_second"),
        row("decode tokens/s", "decode_tokens_per_second"),
        row("ms per decode step", "decode_ms_per_step"),
        row("  of the bandwidth limit", "bandwidth_share", 100, "%"),
        row("training tokens/s", "training_tokens_per_second"),
        row("  MFU", "mfu", 100, "%"),
        row("waiting for prompts", "waiting", 100, "%"),
        f"  100 steps: {found['seconds_per_100_steps']:.0f} s, {dollars}",
        f"  limits: {bound['flops']:.3g} FLOP/s, {bound['bandwidth']:.3g} bytes/s "
        f"({bound['source']}); peak memory {gb(found['peak_bytes'])}",
        f"{'phase':20}{'seconds':>10}{'peak':>12}   (steps taken apart; memory: "
        f"{result['memory']})",
    ]  # fmt: skip
    for name, seconds in found["phases"].items():
        peak = gb(found["phase_peak_bytes"][name])
        lines.append(f"{name:20}{seconds['median']:>10.4f}{peak:>12}")
    return "\n".join(lines)


def main(argv=None) -> dict:
    cfg = parse(Config, argv, __doc__)
    words = sys.argv[1:] if argv is None else argv
    with parallel.together(), parallel.told():
        command = shlex.join(["python", "bench.py", "r1v", *words])
        result = {"command": command, **measure(cfg, parallel.start())}
        name = f"r1v-{cfg.shape}-{result['machine']['device']}".replace(" ", "_")
        out = Path(cfg.out or HERE / "bench" / "results" / f"{name}.json")
        write_json(result, out)
    print(text(result), f"written to {out}", sep="\n")
    return result


if __name__ == "__main__":
    main()
