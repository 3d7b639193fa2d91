"""What a step of GRPO would take on GPUs: the tables of docs/scaling.md, and how far to trust them.

    python scaling.py            # the tables
    python scaling.py --write    # puts them into docs/scaling.md
    python tests/trial.py        # the same model of this machine, beside what it takes

costs.py counts FLOPs and bytes exactly. Here they are divided by what a machine is taken to reach:
a share of its data sheet, which only a measurement can tell. What is said of GPUs is a model.

Letters: B prompts, G completions per prompt, P patches, N weights.
"""

import argparse
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import plan
from checkpoint import ModelConfig
from costs import (
    SHAPES,
    Workload,
    collectives,
    decode_bytes,
    forward_flops,
    lengths,
    pixels_of,
    training_flops,
    weights,
)

# -------------------------------------------------------------------------------------- machines

# Seconds that a kernel takes at least, of which a decode step is made one after the other: played
# back from a CUDA graph, as sampling.py does, and launched by Python. Assumptions, both.
GRAPH, EAGER = 2e-6, 5e-6

@dataclass(frozen=True)
class Machine:
    """A GPU by its data sheet, its links, and the shares of these that are taken to be reached."""

    name: str
    flops: float  # per second, dense, in the numbers that are computed with
    bandwidth: float  # bytes per second, of its memory
    memory: float  # bytes
    inside: float  # bytes per second that it receives from others of its node
    between: float  # and from other nodes
    price: float  # dollars per hour
    node: int = 8  # GPUs of a node
    compute: float = 0.4  # share of `flops` reached, in training and before sampling
    traffic: float = 0.5  # share of `bandwidth` reached, while decoding and in the optimizer
    links: float = 0.8
    hop: float = 3e-6  # seconds from a process to the next in a ring
    kernel: float = GRAPH  # seconds at least
    objects: float = 0.3e9  # bytes per second of pickled objects, by gloo
    overlap: bool = True  # links work while it computes


# NVIDIA's data sheets of H100 SXM and H200 SXM: FLOPs without sparsity; NVLink's 900 GB/s are both
# ways. Between nodes 400 Gbit/s for each GPU, as in a DGX H100. Prices are assumptions.
H200 = Machine("H200", 989e12, 4.8e12, 141e9, 450e9, 50e9, 3.0)
H100 = Machine("H100", 989e12, 3.35e12, 80e9, 450e9, 50e9, 2.5)
LOGIT = 44  # bytes moved for each logit, a kernel each: product, float32, softmax, sums of `draw`
ADAMW = 44  # bytes for each weight: AdamW reads 4 numbers and writes 3, clipping moves 4 more
DEALT = 2e-7  # seconds that deal.moves takes for each group and process that may get it, measured


# ---------------------------------------------------------------------------------------- a step


def ring(machine: Machine, n: int, size: float, calls: int) -> float:
    """Seconds in which each of n GPUs gets what it lacks of `size` bytes, in `calls` rings. Between
    nodes each GPU of a node fetches a part for all of them, so their links add up."""
    nodes, near = n / machine.node, min(n, machine.node)
    inside = size * (near - 1) / near / machine.inside
    between = size * (1 - 1 / nodes) / (machine.node * machine.between) if nodes > 1 else 0
    return max(inside, between) / machine.links + calls * (n - 1) * machine.hop


def on_links(cfg: ModelConfig, machine: Machine, gpus: int, work: Workload) -> Counter:
    """Seconds that the links of a GPU are busy: {"sampling", "reference", "update"}."""
    shards, parts = min(work.shard_group or gpus, gpus), math.ceil(work.prompts / work.micro)
    found = collectives(cfg, parts, work.beta > 0, shards, gpus // shards, work.width)
    seconds, blocks = Counter(), weights(cfg)[2]
    for what, (times, size) in found.items():
        calls = 1 if "root" in what else blocks
        if "copies" in what:  # there and back, each GPU by its own link
            one = 2 * ring(replace(machine, node=1), gpus // shards, size, calls)
        else:
            one = ring(machine, shards, size, calls)
        seconds[what.partition(":")[0]] += times * one
    return seconds


def kernels(cfg: ModelConfig) -> int:
    """Kernels of a decode step: operations of sampling.Room.tick that are no views, counted."""
    return 44 * cfg.num_hidden_layers + 36


def decoding(cfg: ModelConfig, machine: Machine, gpus: int, work: Workload) -> tuple[float, float]:
    """Seconds of decoding while at least a quarter of the rows are unfinished, and of the tail. It
    ends with the longest completion of all GPUs: what comes next needs all of them. What kernels
    take at least and what their bytes take add up: most kernels are small, and a few move all."""
    n, wide = work.prompts * work.group, work.tensor
    own, last = lengths(work, n), lengths(work, n * gpus)[0]
    seconds, rows = [0.0, 0.0], n
    for t in range(last):
        while rows > 1 and own[rows - 1] <= t:
            rows -= 1
        groups = work.prompts * (1 - (1 - rows / n) ** work.group)  # with a row that goes on
        moved = decode_bytes(cfg, rows * wide, groups * wide, work.tokens, t, work.width)
        drawn = rows * wide * cfg.vocab_size * LOGIT
        flops = 2 * rows * (moved["weights"] + moved["head"]) / work.width
        moved = (sum(moved.values()) + drawn) / wide
        sums = 2 * cfg.num_hidden_layers * 2 * (wide - 1) * machine.hop  # over `wide` GPUs
        works = max(moved / (machine.bandwidth * machine.traffic), flops / machine.flops)
        seconds[rows < n / 4] += kernels(cfg) * machine.kernel + works + sums
    return tuple(seconds)


def step(cfg: ModelConfig, machine: Machine, gpus: int, work: Workload) -> dict[str, float]:
    """Seconds of a step by part, each GPU doing `work`. What links do while the GPU computes costs
    nothing; "links" is what is left to wait for.

    Groups are taken to be alike on all GPUs once dealt out, and finished rows to leave at once.
    """
    B, rate = work.prompts, machine.flops * machine.compute
    rows, P = lengths(work, B * work.group), math.prod(work.grid)
    mixed = [rows[i::B] for i in range(B)]
    first = forward_flops(cfg, [work.tokens] * B, [[1]] * B, [work.grid] * B)
    whole = [cfg, [work.tokens] * B, mixed, [work.grid] * B]
    forward = sum(forward_flops(*whole).values()) / rate
    update = training_flops(*whole, work.recompute) / rate
    shards = min(work.shard_group or gpus, gpus)
    wires = on_links(cfg, machine, gpus, work)
    decode, tail = decoding(cfg, machine, gpus, work)
    dealt = B * (4 * P * pixels_of(cfg) / machine.objects + DEALT * gpus**2 / 2) * (gpus > 1)
    reference = forward if work.beta else 0.0
    wait = [max(0.0, wires[k] - n) if machine.overlap else wires[k]
            for k, n in (("reference", reference), ("update", update))]  # fmt: skip
    return {
        "gather": wires["sampling"],
        "prefill": sum(first.values()) / rate,
        "decode": decode,
        "tail": tail,
        "deal": dealt,
        "reference": reference,
        "update": update,
        "links": sum(wait),
        "optimizer": weights(cfg)[0] * ADAMW / shards / (machine.bandwidth * machine.traffic),
    }


def memory(cfg: ModelConfig, shards: int, work: Workload) -> dict[str, int]:
    """Bytes of each GPU at plan.MOMENTS, where `shards` of them share a copy of the weights."""
    found = plan.of(cfg, plan.Work(
        prompts=work.prompts * shards, group=work.group, max_new=work.max_new, tokens=work.tokens,
        patches=math.prod(work.grid), micro=work.micro, processes=shards, bf16=work.bf16,
        recompute=work.recompute, beta=work.beta, gpu=True,
    ))  # fmt: skip
    return found.sums


# ---------------------------------------------------------------------------------------- tables

DOC = Path(__file__).parent / "docs" / "scaling.md"
NAMES = {"2B": "qwen2-vl-2b", "7B": "qwen2-vl-7b", "72B": "qwen2-vl-72b"}
# (model, GPUs, GPUs that share a copy of the weights, GPUs that share out sampling)
RUNS = [
    ("2B", 1, 1, 1), ("2B", 8, 8, 1), ("2B", 64, 8, 1), ("2B", 512, 8, 1),
    ("7B", 1, 1, 1), ("7B", 8, 8, 1), ("7B", 64, 8, 1), ("7B", 512, 8, 1),
    ("72B", 8, 8, 1), ("72B", 64, 64, 1), ("72B", 64, 64, 8), ("72B", 512, 64, 8),
]  # fmt: skip


def markdown(head: list[str], rows: list[list]) -> str:
    """A table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def figure(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def flops_table() -> str:
    """TFLOPs for one group of the default workload, forwards, and what sharing the prompt saves."""
    work, rows = Workload(), []
    own = [lengths(work, work.group)]
    for name in SHAPES:
        args = SHAPES[name], [work.tokens], own, [work.grid]
        found = forward_flops(*args)
        alone = sum(sum(forward_flops(SHAPES[name], [work.tokens], [[n]], [work.grid]).values())
                    for n in own[0])  # fmt: skip
        rows.append([name, *(f"{n / 1e12:.2f}" for n in found.values()),
                     f"{sum(found.values()) / 1e12:.2f}", f"{alone / sum(found.values()):.1f}",
                     f"{training_flops(*args) / sum(found.values()):.2f}",
                     f"{training_flops(*args, recompute=True) / sum(found.values()):.2f}"])
    return markdown(["model", *found, "sum", "if repeated", "training", "and recompute"], rows)


def decode_table() -> str:
    """What the first, a middle and a late decode step move, and the least that they may take."""
    rows = []
    for name, config in NAMES.items():
        for n, groups, own in ((128, 16, 1), (128, 16, 100), (16, 10, 200), (1, 1, 400)):
            moved = decode_bytes(SHAPES[config], n, groups, Workload().tokens, own)
            least = sum(moved.values()) / H200.bandwidth
            floors = (kernels(SHAPES[config]) * each for each in (GRAPH, EAGER))
            rows.append([name, n, own, *(f"{x / 1e9:.2f}" for x in moved.values()),
                         f"{n * SHAPES[config].vocab_size * LOGIT / 1e9:.2f}",
                         *(f"{1e3 * x:.1f}" for x in (least, *floors))])
    return markdown(["model", "rows", "tokens so far", *moved, "logits", "ms at 4.8 TB/s",
                     "ms of kernels, graph", "ms of kernels, eager"], rows)  # fmt: skip


def workload(name: str, shards: int, tensor: int = 1) -> Workload:
    """What the model of that name does in the tables: the largest has smaller micro-batches."""
    return Workload(shard_group=shards, tensor=tensor, micro=2 if name == "72B" else 4)


def runs() -> list[tuple]:
    """RUNS on H200, each with its workload, its memory by moment, and its seconds by part."""
    found, plans = [], {}
    for name, gpus, shards, tensor in RUNS:
        cfg, work = SHAPES[NAMES[name]], workload(name, shards, tensor)
        if (name, shards) not in plans:
            plans[name, shards] = memory(cfg, shards, work)
        saved = int(weights(cfg)[0] * work.width * (1 - 1 / tensor))  # of what is sampled from
        needs = {k: n - saved for k, n in plans[name, shards].items()}
        title = f"{name}, {gpus} GPU{'s' * (gpus > 1)}{' †' * (tensor > 1)}"
        found.append((title, gpus, work, needs, step(cfg, H200, gpus, work)))
    return found


def seconds_table(found: list[tuple]) -> str:
    """Seconds of a step by part, of what fits."""
    fits = {title: parts for title, *_, needs, parts in found if max(needs.values()) <= H200.memory}
    eager = step(SHAPES[NAMES["2B"]], replace(H200, kernel=EAGER), 1, Workload())
    fits["2B, 1 GPU, eager"] = eager
    rows = [[title, *(f"{x:.2f}" for x in parts.values()), f"{sum(parts.values()):.1f}"]
            for title, parts in fits.items()]
    return markdown(["seconds", *found[0][-1], "sum"], rows)


def totals_table(found: list[tuple]) -> str:
    """Memory by moment, speed, price and what takes most."""
    rows = []
    for title, gpus, work, needs, parts in found:
        total, number = sum(parts.values()), gpus * work.prompts * work.group
        speed = [f"{number / total:,.0f}", f"{number / total / gpus:.1f}",
                 figure(100 * total / 3600 * H200.price * gpus),
                 f"{max(parts, key=parts.get)} {max(parts.values()) / total:.0%}"]
        over = max(needs.values()) > H200.memory
        rows.append([title, *(f"{n / 1e9:,.0f}" for n in needs.values()),
                     *(["-", "-", "-", "does not fit"] if over else speed)])
    return markdown(["", *(f"GB, {name}" for name in needs), "completions/s", "of each GPU",
                     "$ for 100 steps", "most time"], rows)  # fmt: skip


def memory_table() -> str:
    """GB of the 2B model on one GPU, by moment, as its passes are run."""
    rows = []
    for recompute, micro in ((True, 4), (False, 1), (False, 2), (False, 4)):
        needs = memory(SHAPES[NAMES["2B"]], 1, Workload(recompute=recompute, micro=micro))
        most = max(needs.values())
        fits = [next((m.name for m in (H100, H200) if most <= m.memory), "none")]
        rows.append(["yes" if recompute else "no", micro, *(f"{n / 1e9:.0f}" for n in
                                                            needs.values()), *fits])
    return markdown(["recompute", "micro-batch", *(f"GB, {name}" for name in needs), "fits"], rows)


def shared_table() -> str:
    """A step of a fixed number of prompts on more and more GPUs."""
    rows = []
    for name, prompts, gpus in (("2B", 16, 1), ("2B", 16, 8), ("2B", 16, 16), ("2B", 512, 8),
                                ("2B", 512, 64), ("2B", 512, 512), ("7B", 512, 8),
                                ("7B", 512, 64), ("7B", 512, 512)):  # fmt: skip
        work = Workload(prompts // gpus, shard_group=min(8, gpus))
        parts = step(SHAPES[NAMES[name]], H200, gpus, work)
        total = sum(parts.values())
        rows.append([f"{name}, {prompts} prompts", gpus, f"{total:.2f}",
                     f"{(parts['decode'] + parts['tail']) / total:.0%}",
                     f"{parts['links'] / total:.0%}", f"{prompts * 8 / total / gpus:.1f}",
                     figure(100 * total / 3600 * H200.price * gpus)])  # fmt: skip
    return markdown(["", "GPUs", "seconds", "decoding", "links", "completions/s of a GPU",
                     "$ for 100 steps"], rows)  # fmt: skip


def links_table() -> str:
    """Bytes that a GPU's collectives make whole in a step, and the time of links and of work."""
    rows = []
    for name, gpus, shards in (("2B", 8, 8), ("2B", 512, 512), ("2B", 512, 8), ("7B", 512, 512),
                               ("7B", 512, 8), ("72B", 64, 64), ("72B", 512, 512),
                               ("72B", 512, 64)):  # fmt: skip
        cfg, work = SHAPES[NAMES[name]], workload(name, shards)
        parts = math.ceil(work.prompts / work.micro)
        found = collectives(cfg, parts, True, shards, gpus // shards).items()
        size = {k: sum(t * n for what, (t, n) in found if k in what) for k in ("gather", "sum")}
        busy, works = on_links(cfg, H200, gpus, work), step(cfg, H200, gpus, work)
        rows.append([f"{name}, {gpus} GPUs", shards, *(f"{n / 1e9:,.0f}" for n in size.values()),
                     f"{busy['sampling']:.2f}", f"{busy['reference'] + busy['update']:.2f}",
                     f"{works['reference'] + works['update']:.2f}"])
    return markdown(["", "share a copy", "GB gathered", "GB summed", "links, before sampling",
                     "links, in passes", "passes"], rows)  # fmt: skip


def tables() -> dict[str, str]:
    """All tables of docs/scaling.md, by their names there."""
    found = runs()
    return {
        "flops": flops_table(), "decode": decode_table(), "seconds": seconds_table(found),
        "totals": totals_table(found), "memory": memory_table(), "shared": shared_table(),
        "links": links_table(),
    }  # fmt: skip


def filled(text: str, found: dict[str, str]) -> str:
    """The text with each table between its marks, <!-- NAME --> and <!-- end -->."""
    for name, table in found.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        assert mark, f"docs/scaling.md has no place for {name}"
        text = before + mark + table + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/scaling.md.")
    parser.add_argument("--write", action="store_true", help="put them into docs/scaling.md")
    write, found = parser.parse_args(argv).write, tables()
    if write:
        DOC.write_text(filled(DOC.read_text("utf-8"), found), "utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{table}" for name, table in found.items()))


if __name__ == "__main__":
    main()
