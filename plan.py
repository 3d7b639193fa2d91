"""The memory plan of a run before it starts: what each process needs, and a refusal if it has less.

    found = plan.of(read_config(folder), plan.Work(prompts=16, group=8, processes=8, ...))
    print(plan.text(found, limit := live.memory_of("cuda:0")))
    plan.check(found, limit)                      # ValueError says how much, and what would help

Three moments are planned: sampling, the passes over the largest micro-batch, the optimizer's step.
Weights, gradients and moments are counted. Activations are no formula, which would age: a decoder
layer, a vision block and the head of model.py run on fake tensors, which have shapes and no memory,
while the bytes of tensors that come and go are counted (live.py). tests/test_plan.py compares with
what real steps of small models take. All rows count as long as the longest: a real step needs less.
Not counted: what CUDA and NCCL take for themselves (1 to 2 GB) and fragmentation.

Letters: B prompts of this process, G completions of each, T tokens of a completion, S packed
tokens, D width, P patches of a prompt, E width of the vision tower, N weights.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import attention
from attention import Cache, Layout, Step
from checkpoint import ModelConfig
from images import image_size
from live import nbytes, passing, trained
from lora import ALL, Learns, set_learning
from model import DecoderLayer, PatchMerger, Qwen2VL, RMSNorm, VisionBlock
from optim import make_optimizers
from rollout import token_logp
from sampling import draw, scaled_logits

EVAL_BATCH = 64  # questions that evaluate.evaluate answers at a time
MOMENTS = {"sampling": "sampling", "update": "the update", "step": "the optimizer's step"}
EYE = (VisionBlock, "visual.blocks.0."), (PatchMerger, "visual.merger.")
PARTS = ("weights", "reference", "optimizer", "copy to sample from", "gradients",
         "gathered weights", "KV cache", "kept for backward", "temporary")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a run does, as far as memory goes. Of SFT: group 1, max_new the longest completion; or
    0, and `tokens` those of prompt and completion, where prompts are learnt too."""

    prompts: int  # of a step, over all processes
    group: int
    max_new: int
    tokens: int  # of the longest prompt, those of its images included
    patches: int  # of the images of a prompt
    micro: int  # prompts per forward and backward
    micro_tokens: int | None = None  # of these at most, as deal.cost counts them
    minibatches: int = 1  # parts of a step's prompts, micro-batches being of one of them
    processes: int = 1
    shards: int | None = None  # processes that share one copy of the weights; default: all
    optimizer: str = "adamw"
    bf16: bool = False
    recompute: bool = False
    beta: float = 0.0
    eval_new: int = 0  # tokens of an answer in the evaluations; 0: there are none
    sft: bool = False  # nothing is sampled but in evaluations
    gpu: bool = False  # attention is flash attention; a cache to sample with stays
    learns: Learns = ALL

    @property
    def packed(self) -> bool:
        return self.gpu and self.bf16

    @property
    def copy(self) -> int:
        """Processes that share one copy of the weights."""
        return min(self.shards or self.processes, self.processes)

    @property
    def own(self) -> int:
        """B, prompts of a process at most."""
        return math.ceil(self.prompts / self.processes)

    @property
    def rows(self) -> int:
        """Prompts of a micro-batch, all as long as the longest."""
        looked = 0 if self.learns.looks_once else 0.4 * self.patches  # as deal.cost counts
        row = self.tokens + self.group * self.max_new + looked
        own = math.ceil(self.own / self.minibatches)
        return max(1, int(min(self.micro, own, (self.micro_tokens or math.inf) / row)))


@dataclass(frozen=True)
class Plan:
    """Bytes of one process at each of MOMENTS: {moment: {part: bytes}}, parts being of PARTS."""

    cfg: ModelConfig
    work: Work
    weights: int  # their number, N
    moments: dict[str, dict[str, int]]
    checkpoint: int  # bytes of weights and optimizer on disk, of all processes

    @property
    def sums(self) -> dict[str, int]:
        return {name: sum(parts.values()) for name, parts in self.moments.items()}

    @property
    def peak(self) -> int:
        return max(self.sums.values())


# --------------------------------------------------------------------------------------- the plan


def computing(module: nn.Module, work: Work, prefix: str = "layers.0.") -> nn.Module:
    """The module with its weights as they are computed with: fully_shard gathers all in bfloat16,
    autocast copies those of linear layers. prefix: of its names, which tell what of it learns."""
    set_learning(module, work.learns, prefix)
    for part in module.modules() if work.bf16 else ():
        if work.processes > 1 or isinstance(part, nn.Linear):
            for name, p in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(p.bfloat16(), requires_grad=p.requires_grad))
    return module


def of(cfg: ModelConfig, work: Work) -> Plan:
    """The plan of a run, in about a second; no weight is read."""
    with torch.device("meta"):
        model = set_learning(Qwen2VL(cfg), work.learns)
    parts = (model, *model.visual.blocks, *model.model.layers)
    (N, *blocks), (L, *learnt) = map(size, parts), map(learning, parts)
    root, root_learnt = N - sum(blocks), L - sum(learnt)
    adam, muon = ([p.numel() for o in make_optimizers(model, work.optimizer, 1.0)
                   if isinstance(o, torch.optim.AdamW) == kind
                   for group in o.param_groups for p in group["params"]]
                  for kind in (True, False))  # fmt: skip
    adam, beside = sum(adam), 12 * max(muon, default=0)  # AdamW's step needs nothing beside
    c, head = 2 if work.bf16 else 4, model.head.numel()
    models = 2 if work.beta and not work.learns.rank else 1
    linear = sum(size(m) for m in model.modules() if isinstance(m, nn.Linear))
    whole = c * N  # bytes of weights to sample with, and of a reference: see Qwen2VL.frozen
    if work.processes == 1 and work.bf16:
        whole = 2 * linear + 4 * (N - linear + head * cfg.tie_word_embeddings)
    if work.processes > 1:
        # Roots stay. A block runs, one comes, and so does the buffer that it comes in. Gradients
        # are whole, then float32, until they are shared out: of a block at once, of the root last.
        held = models * root * c
        block = 3 * c * max(blocks) + (c + 4) * max(learnt)
        gathered = held, held + root_learnt * c + block, held
        beside = max(root_learnt * (c + 4), beside)
    else:  # autocast keeps copies of linear layers, of the model that learns; not of the head there
        copies = 2 * (linear - head) * work.bf16
        gathered = 0, copies, copies
    share = 4 * L // work.copy
    fixed = {"weights": 4 * N // work.copy, "reference": whole // work.copy * (models - 1),
             "optimizer": 4 * (L + adam) // work.copy, "copy to sample from": whole}  # fmt: skip
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=work.bf16), \
            attention.exact_on(*() if work.gpu else ("cpu",)):
        kept, extra = training(cfg, work)
        sampled = [sampling(cfg, work, *batch) for batch in batches(work)]
    cache, during = max(sampled, key=sum, default=(0, 0))
    stays = sum(cache for cache, _ in sampled) if work.gpu else 0  # a room each
    parts = ({"KV cache": max(cache, stays), "temporary": during},
             {"KV cache": stays, "gradients": share, "kept for backward": kept, "temporary": extra},
             {"KV cache": stays, "gradients": share, "temporary": beside})  # fmt: skip
    moments = {name: {**fixed, "gathered weights": held, **part}
               for name, held, part in zip(MOMENTS, gathered, parts)}
    return Plan(cfg, work, N, moments, 4 * ((L if work.learns.rank else N) + L + adam))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def learning(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def batches(work: Work) -> list[tuple[int, int, int]]:
    """(prompts, completions of each, their tokens) that one process samples at a time."""
    own = (work.own, work.group, work.max_new)
    return [own] * (not work.sft) + [(EVAL_BATCH, 1, work.eval_new)] * (work.eval_new > 0)


def states(cfg: ModelConfig, work: Work, B: int, S: int) -> tuple:
    """Hidden states (S, D), those of patches (B P, E), the cos of both, and the pixels' bytes.
    What decoder layers add to is float32 always, what blocks of the tower add to is not."""
    half, vision = torch.bfloat16 if work.bf16 else torch.float32, cfg.vision
    x = torch.empty(S, cfg.hidden_size)
    v = torch.empty(B * work.patches, vision.embed_dim, dtype=half)
    turns = (S, cfg.head_dim), (len(v), vision.embed_dim // vision.num_heads)
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return x, v, *map(torch.empty, turns), 4 * pixels * len(v)


def training(cfg: ModelConfig, work: Work) -> tuple[int, int]:
    """Bytes that the forward pass of a micro-batch keeps, and those beyond at the worst moment."""
    B, G, T = work.rows, work.group, work.max_new
    x, v, turn, vturn, pixels = states(cfg, work, B, B * (work.tokens + G * T))
    layout = Layout([work.tokens] * B, [[T] * G] * B if T else [], packed=work.packed)
    layer, norm = (computing(m, work) for m in (DecoderLayer(cfg), RMSNorm(x.shape[1], 1e-6)))
    wanted = torch.empty(B * G * T or len(x), dtype=torch.int64)  # rows, of the last layer alone
    layer, final = (trained(partial(layer, cos=turn, sin=turn, lay=layout, wanted=rows), x,
                            work.recompute) for rows in (None, wanted))  # fmt: skip
    learnt = x.new_empty(len(wanted), x.shape[1])  # what the head reads
    kind = v.dtype if work.processes > 1 else torch.float32  # one process casts the head
    heads = "language" in work.learns.parts and not work.learns.rank  # it learns
    head = torch.empty(cfg.vocab_size, x.shape[1], dtype=kind, requires_grad=heads)
    last = trained(lambda h: token_logp(h, head, wanted)[0], learnt.to(v.dtype),
                   also=(head,) * heads)
    text = (cfg.num_hidden_layers - 1) * layer[0] + final[0] + trained(norm, learnt)[0] + last[0]
    text += nbytes(x, turn, turn, wanted, layout.mask)
    if not work.patches:
        return text, max(layer[1], last[1])
    block, merger = (computing(m(cfg.vision), work, at) for m, at in EYE)
    calls = [(slice(0, len(v)), B, work.patches)]
    block = partial(block, cos=vturn, sin=vturn, calls=calls)
    learnt = {"vision", "merger"} & {*work.learns.parts}
    block = trained(block, v, work.recompute) if "vision" in learnt else (0, passing(block, v))
    merger = trained(merger, v) if learnt else (0, passing(merger, v))
    pixels //= 2 if work.bf16 else 1
    tower = cfg.vision.depth * block[0] + merger[0] + nbytes(v, vturn, vturn) + pixels
    # When the tower's turn comes, backwards, what the decoder kept is free again.
    return text + tower, max(layer[1], last[1], max(block[1], merger[1]) - text)


def sampling(cfg: ModelConfig, work: Work, B: int, G: int, T: int) -> tuple[int, int]:
    """Bytes of the KV cache for B prompts with G completions of T tokens, and what the worst moment
    needs beyond them: that of the tower, of the prompts, or of the last token."""
    x, v, turn, vturn, pixels = states(cfg, work, B, B * work.tokens)
    layer, layers = computing(DecoderLayer(cfg), work), cfg.num_hidden_layers
    (like,), shape = attention.core(x[:0]), (B, G, cfg.num_key_value_heads, cfg.head_dim)
    cache = Cache(1, shape, work.tokens, T, like.dtype, "cpu")
    (kept,), slots = cache.layers, torch.arange(B)
    layout = Layout([work.tokens] * B, slots=slots, packed=work.packed)
    read = passing(layer, x, turn, turn, layout, kept) + 2 * nbytes(x) + pixels
    y, _, turn, *_ = states(cfg, work, B, B * G)
    write = passing(layer, y, turn, turn, Step(cache, B, G, T), kept)
    head = torch.empty(cfg.vocab_size, cfg.hidden_size, dtype=v.dtype)

    def choose(hidden):
        logits = scaled_logits(hidden, head, 1.0, torch.empty(0, dtype=torch.int64))
        return draw(logits.softmax(-1), torch.empty(len(logits)))

    whole = layers * nbytes(*kept)
    # Beside the last token: one part of a layer, which is copied when completions leave.
    last = max(write, passing(choose, y.to(v.dtype)), max(map(nbytes, kept)))
    worst = [whole + last, whole + read]
    if work.patches:
        block, merger = (computing(m(cfg.vision), work, at) for m, at in EYE)
        calls = [(slice(0, len(v)), B, work.patches)]
        tower = max(passing(block, v, vturn, vturn, calls), passing(merger, v)) + nbytes(v)
        pixels *= 2 if cfg.vision.window else 1  # windows: in their order
        worst.append(whole + tower + pixels)
    return whole, max(worst) - whole


# ------------------------------------------------------------------------ what a plan is made from


def lengths(processor, *row_sets: Sequence, most: int = 64) -> dict[str, int]:
    """{"tokens", "patches"} of the longest prompt, as in Work, among `most` examples spread over
    each set. Of images only the size is read."""
    patch, tokens, patches = processor.settings["patch_size"], 0, 0
    for example in (example for rows in row_sets for example in spread(rows, most)):
        sizes = [processor.resized(*image_size(source)) for source in example.images]
        tokens = max(tokens, processor.length(example))
        patches = max(patches, sum((h // patch) * (w // patch) for h, w in sizes))
    return {"tokens": tokens, "patches": patches}


def spread(rows: Sequence, most: int = 64) -> Iterator:
    """At most `most` of the rows, evenly spread, the first and the last among them."""
    count = min(most, len(rows))
    return (rows[i * (len(rows) - 1) // max(1, count - 1)] for i in range(count))


# ------------------------------------------------------------------------------------ what it says


def gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def text(plan: Plan, limit: int) -> str:
    """The plan as a table, beside the `limit` bytes that there are."""
    (unit, name), work = (1e9, "GB") if plan.peak >= 1e9 else (1e6, "MB"), plan.work
    rows = {part: [parts.get(part, 0) for parts in plan.moments.values()] for part in PARTS}
    rows = {part: row for part, row in rows.items() if any(row)} | {"sum": plan.sums.values()}
    lines = [f"{'memory of a process, ' + name:26}" + "".join(f"{m:>10}" for m in plan.moments)]
    for part, row in rows.items():
        cells = (f"{n / unit:.1f}" if n else "-" for n in row)
        lines.append(f"  {part:24}" + "".join(f"{cell:>10}" for cell in cells))
    lines[-1] += f"   of {gb(limit)}"
    told = (f"{plan.weights:,} weights, 1/{work.copy} of them in each process" if work.copy > 1 else
            f"{plan.weights:,} weights")  # fmt: skip
    return "\n".join([*lines, f"{told}; prompts of {work.tokens} tokens, {work.patches} patches; "
                      f"a checkpoint takes {gb(plan.checkpoint)} of disk"])  # fmt: skip


def check(plan: Plan, limit: int) -> None:
    """ValueError where a process needs more than `limit` bytes: how much, and what would help."""
    if plan.peak <= limit:
        return
    smaller = [(of(plan.cfg, work).peak, told) for told, work in changes(plan.work).items()]
    helps = [f"{told} ({gb(n)})" for n, told in sorted(smaller) if n < 0.98 * plan.peak]
    moment = max(plan.sums, key=plan.sums.get)
    raise ValueError(f"this run does not fit: {MOMENTS[moment]} needs {gb(plan.peak)} in each "
                     f"process, and it has {gb(limit)}. What helps, and what it needs then: "
                     f"{', '.join(helps) or 'a smaller model'}")  # fmt: skip


def changes(work: Work) -> dict[str, Work]:
    """What may make a run smaller: {what to say on the command line: the work then}."""
    prompts, micro = ("batch", "micro") if work.sft else ("prompts", "micro_prompts")
    switches = {
        "--bf16 true": {"bf16": True},
        "--recompute true": {"recompute": True},
        f"--{micro} 1": {"micro": 1},
        "--beta 0": {"beta": 0.0},
    }
    switches = {told: keys for told, keys in switches.items() if replace(work, **keys) != work}
    together = {k: v for keys in switches.values() for k, v in keys.items()}
    found = {**switches, " ".join(switches): together, "--shard_group none": {"shards": None}}
    part = work.prompts // work.minibatches
    fewer = work.minibatches * max(work.processes, part // 2)
    found[f"--{prompts} {fewer}"] = {"prompts": fewer}
    for n in (k * work.processes for k in (2, 4, 8) if k * work.processes <= part):
        found[f"{n} processes with as much each"] = {"processes": n, "shards": None}
    group, new, asked = max(2, work.group // 2), (work.max_new + 1) // 2, (work.eval_new + 1) // 2
    if work.sft:
        found[f"--max_new {asked}"] = {"eval_new": asked}
    else:
        found[f"--group {group}"] = {"group": group}
        found[f"--max_new {new}"] = {"max_new": new, "eval_new": asked}
    return {told: other for told, keys in found.items() if (other := replace(work, **keys)) != work}


def check_disk(plan: Plan, out: str, checkpoints: int) -> None:
    """ValueError where the disk of the folder `out`, which need not be there yet, has no room for
    so many checkpoints: an old one goes when the new one is whole."""
    there = next(p for p in (Path(out).resolve(), *Path(out).resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < checkpoints * plan.checkpoint:
        raise ValueError(f"out {out}: {checkpoints} checkpoints of {gb(plan.checkpoint)} must fit, "
                         f"and the disk of {there} has {gb(free)} free; make room, or give a "
                         "folder on another disk")  # fmt: skip
