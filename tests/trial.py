"""A real step of GRPO beside what costs.py and scaling.py say of it, for test_costs.py.

    python tests/trial.py     # predicted and measured, on one process and on two; half a minute
"""

import math
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
import parallel
from checkpoint import ModelConfig, read_config
from costs import collectives, weights
from data import Processor
from model import Qwen2VL
from optim import make_optimizers
from rollout import sample
from rows import load_examples
from scaling import Machine, Workload, kernels, markdown, step

TINY = Path(__file__).resolve().parent.parent / "tiny"
NAMES = (("all_gather_into_tensor", "all_gather_single"),  # before torch 2.13, since
         ("reduce_scatter_tensor", "reduce_scatter_single"))  # fmt: skip
EXCHANGES = {new if hasattr(dist, new) else old: kind
             for (old, new), kind in zip(NAMES, ("gather", "sum"))}  # fmt: skip


@contextmanager
def counting(found: Counter):
    """Adds up the bytes of whole tensors that are gathered and summed inside."""
    own = {name: getattr(dist, name) for name in EXCHANGES}

    def counted(name, *args, **keys):
        tensors = [x for x in (*args, *keys.values()) if isinstance(x, torch.Tensor)]
        found[EXCHANGES[name]] += max(x.nbytes for x in tensors)
        return own[name](*args, **keys)

    for name in own:
        setattr(dist, name, partial(counted, name))
    try:
        yield found
    finally:
        for name, function in own.items():
            setattr(dist, name, function)


def timed(run, times: int) -> float:
    """Seconds of run(), the least of some times, after one that does not count; processes start
    together."""
    found = []
    for _ in range(times + 1):
        parallel.gathered(None)
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def in_processes(run, processes: int, *args) -> list:
    """What run(*args) gives in each of some processes, which may talk to each other by gloo."""
    if processes == 1:
        return [run(*args)]
    with TemporaryDirectory() as folder:
        mp.spawn(joined, (processes, folder, run, args), processes)
        return [torch.load(f"{folder}/{i}", weights_only=False) for i in range(processes)]


def joined(rank: int, processes: int, folder: str, run, args: tuple) -> None:
    """One of the processes of in_processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=processes)
    torch.save(run(*args), f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def real_step(cfg: ModelConfig, work: Workload, times: int = 1) -> dict:
    """A step of grpo.py with random weights, as one of parallel.size() processes: {"seconds":
    {"sample", "update"}, "bytes": {"gather", "sum"}, "tokens": of each of its prompts}. All
    completions have max_new tokens."""
    processor, shard = Processor.from_pretrained(TINY), parallel.sharder("cpu")
    processor = replace(processor, stop_ids=[])
    policy, reference = (Qwen2VL(cfg).init_weights(0) for _ in range(2))
    policy, reference = map(shard, (policy, reference)) if shard else (policy, reference)
    policy.prepare(recompute=work.recompute)
    reference.requires_grad_(False)
    optimizers, number = make_optimizers(policy, "adamw", 1e-6), parallel.size() * work.prompts
    keys = grpo.Config(prompts=number, group=work.group, max_new=work.max_new, beta=work.beta,
                       micro_prompts=work.micro)  # fmt: skip
    first, count = parallel.share(number)
    examples = load_examples(f"world:A:n={number}")
    prompts = [processor.prompt(examples[i]) for i in range(first, first + count)]
    adv = torch.linspace(-1, 1, work.group).expand(count, -1)

    def sampled():
        return sample(parallel.copy(policy), processor, prompts, work.group, work.max_new, 1.0, 0)

    with counting(Counter()) as found:
        rollout = sampled()
        grpo.update(policy, reference, optimizers, rollout, adv, processor.banned_ids, keys)
    learn = partial(grpo.update, policy, reference, optimizers, rollout, adv,
                    processor.banned_ids, keys)  # fmt: skip
    seconds = {"sample": timed(sampled, times), "update": timed(learn, times)} if times else {}
    return {"seconds": seconds, "bytes": dict(found), "tokens": [len(p.ids) for p in prompts]}


def this_cpu(cfg: ModelConfig, work: Workload) -> Machine:
    """What one thread of this process reaches, while the others do the same."""
    x, w = torch.randn(1024, cfg.hidden_size), torch.randn(cfg.hidden_size, cfg.intermediate_size)
    flops = 2 * 1024 * w.numel() / timed(lambda: [x @ w for _ in range(20)], 3) * 20
    big, copy = torch.zeros(2**24), torch.zeros(2**24)
    copied = 2 * big.nbytes / timed(lambda: copy.copy_(big), 3)
    width = 2 * cfg.head_dim
    narrow = replace(cfg, hidden_size=width, intermediate_size=8, num_attention_heads=2,
                     num_key_value_heads=2, vision=replace(cfg.vision, hidden_size=width))
    processor = replace(Processor.from_pretrained(TINY), stop_ids=[])
    prompts, model = [processor.prompt(load_examples("world:A:n=1")[0])], Qwen2VL(narrow)
    model.init_weights(0)
    long, short = (timed(partial(sample, model, processor, prompts, 1, n), 3) for n in (24, 8))
    found = Machine("this CPU", flops, copied, 0, 1e12, 1e12, 0.0, compute=1.0, traffic=1.0,
                    links=1.0, kernel=(long - short) / 16 / kernels(cfg), hop=0.0,
                    overlap=False)  # fmt: skip
    if (n := parallel.size()) == 1:
        return found
    N, _, blocks = weights(cfg)
    gather, size = getattr(dist, next(iter(EXCHANGES))), N // blocks // n  # a slice of a block
    block, hop = (timed(partial(gather, torch.zeros(n * k), torch.zeros(k)), 5) for k in (size, 1))
    item = torch.zeros(2**20)
    sent = timed(partial(exchange, item), 3)
    rate = 4 * size * (n - 1) / max(1e-9, block - hop)
    return replace(found, inside=rate, hop=hop / (n - 1), objects=item.nbytes / sent)


def exchange(item) -> None:
    """The first process sends, the second receives, as deal.balance does."""
    if parallel.rank() == 0:
        dist.send_object_list([item], 1)
    else:
        dist.recv_object_list([None], 0)


def both(cfg: ModelConfig, work: Workload) -> tuple:
    """(this machine, a real step), measured in the same processes."""
    torch.set_num_threads(1)
    return this_cpu(cfg, work), real_step(cfg, work, 3)


def check() -> str:
    """A step of a model of a few million weights, predicted and measured, on one process and on
    two, each with the same work."""
    cfg = read_config(TINY)
    cfg = replace(cfg, hidden_size=256, num_attention_heads=8, num_key_value_heads=2,
                  intermediate_size=1024, num_hidden_layers=4, vocab_size=480,
                  vision=replace(cfg.vision, embed_dim=128, intermediate_size=512, hidden_size=256))
    work = Workload(8, 4, grid=(1, 8, 8), mean=1e9, max_new=24, bf16=False, recompute=False)
    rows = []
    for n in (1, 2):
        machine, real = in_processes(both, n, cfg, work)[0]
        own = replace(work, text=round(sum(real["tokens"]) / len(real["tokens"])) - 16)
        says = step(cfg, machine, n, own)
        early = sum(says[k] for k in ("gather", "prefill", "decode", "tail"))
        for part, s in (("sample", early), ("update", sum(says.values()) - early)):
            rows.append([str(n), part, f"{s:.2f} s", f"{real['seconds'][part]:.2f} s"])
        for kind in EXCHANGES.values() if n > 1 else ():
            found = collectives(cfg, math.ceil(work.prompts / work.micro), True, n, 1, 4)
            says = sum(times * size for what, (times, size) in found.items() if kind in what)
            rows.append([str(n), kind, f"{says:,} bytes", f"{real['bytes'][kind]:,} bytes"])
        own = {"GFLOP/s": machine.flops, "GB/s of memory": machine.bandwidth}
        own |= {"GB/s of gloo": machine.inside, "GB/s of objects": machine.objects} if n > 1 else {}
        rows += [[str(n), what, "", f"{x / 1e9:.1f}"] for what, x in own.items()]
        rows.append([str(n), "us of a kernel at least", "", f"{1e6 * machine.kernel:.1f}"])
    return markdown(["processes", "what", "predicted", "measured"], rows)


if __name__ == "__main__":
    print(check())
