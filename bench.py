"""How fast a GRPO step is on this CPU, phase by phase, beside a naive twin and beside TRL.

    python bench.py                  # `make bench`: ours and the twin, about 2 minutes
    python bench.py --peers true     # `make bench PEERS=1`: TRL's GRPOTrainer too
    python bench.py r1v --help       # R1-V's workload on a GPU: workload.py

A step is what training repeats: prepare the prompts, sample G completions of exactly max_new tokens
for each, score them, ask the reference, learn. Ours is what grpo.train calls: rollout.sample,
tally.reward_table, grpo.update. The twin (bench/twin.py) is transformers' Qwen2-VL with prompt and
picture repeated G times, its generate, and the logits of all tokens; tests/test_rivals.py proves
that it computes the same log-probs, loss and gradient. rivals.py has both.

How it is measured: ours and the twin take turns in one process, and the order changes each round;
the figure is the median of the rounds, lowest and highest beside it; a ratio of whole steps is the
median of the rounds' ratios. Phases are timed from outside, by rebinding names. Memory is that of a
process of its own for each: its highest resident size less what it had once the weights of policy
and reference were loaded. TRL runs in an environment of its own (bench/peer_trl.py says with which
settings, and why TRL), and takes turns with ours as well, a step of each at a time.
"""

import json
import math
import multiprocessing
import os
import resource
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import machine
from config import opt, parse, to_dict
from journal import write_json
from machine import spread
from rivals import KINDS, PHASES, setup, write_inputs

HERE = Path(__file__).resolve().parent
PEER = "bench/peer_trl.py"


@dataclass(frozen=True)
class Config:
    """Every key of `python bench.py`. Those that grpo.py has mean what they mean there."""

    model: str = opt("tiny", "folder of a checkpoint")
    data: str = opt("world:A:n=64:look=wild", "rows; the first `prompts` of them are used")
    prompts: int = opt(16, "B, prompts per step", least=1)
    group: int = opt(8, "G, completions per prompt", least=2)
    max_new: int = opt(24, "T, tokens of each completion", least=2)
    temperature: float = opt(1.0, "of sampling, and of the log-probs", above=0)
    beta: float = opt(0.04, "weight of the KL; 0: no reference", least=0)
    lr: float = opt(1e-6, "step size of AdamW", above=0)
    micro_prompts: int = opt(16, "prompts, with completions, per forward and backward", least=1)
    bf16: bool | None = opt(None, "time ours, and TRL, under bfloat16 autocast as well; default: "
                            "if this CPU multiplies it in hardware")
    rounds: int = opt(10, "steps of each that count", least=1)
    warmup: int = opt(2, "steps of each before them", least=0)
    memory: bool = opt(True, "measure memory, in processes of their own")
    threads: int | None = opt(None, "threads of torch; default: its own choice", least=1)
    seed: int = opt(0, "fixes the samples", least=0)
    peers: bool = opt(False, "time TRL as well")
    peer_python: str = opt(".venv-peers/bin/python", "Python that has TRL")
    peer_batches: tuple[int, ...] = opt((128, 32, 16), "completions per forward of TRL; that "
                                        "which comes nearest to ours counts", least=1)
    peer_steps: int = opt(8, "steps of TRL that count", least=1)
    out: str = opt("bench/results/cpu.json", "results")

    def check(self):
        """ValueError for what no single key can say."""
        count = self.prompts * self.group
        if self.peers and all(count % batch for batch in self.peer_batches):
            raise ValueError(f"peer_batches: none of them divides a step's {count} completions")


# ------------------------------------------------------------------------------- how it is measured


def take_turns(runners: dict, rounds: int, warmup: int, first: int = 0) -> dict[str, list[dict]]:
    """{kind: seconds of the phases of each round}, after steps that do not count."""
    found = {kind: [] for kind in runners}
    for i in range(first - warmup, first + rounds):
        order = list(runners) if i % 2 else list(runners)[::-1]
        for kind in order:
            seconds = runners[kind].step(i + warmup)
            if i >= first:
                found[kind].append({**{name: seconds.get(name, 0.0) for name in PHASES},
                                    "step": sum(seconds.values())})  # fmt: skip
    return found


def memory(cfg: Config, kind: str) -> dict[str, int]:
    """Bytes of this process, which does nothing else: once the weights are loaded, and at the
    highest while it does three steps."""
    runner = KINDS[kind](setup(cfg))
    loaded = resident("VmRSS")
    for seed in range(3):
        runner.step(seed)
    return {"loaded_bytes": loaded, "peak_bytes": resident("VmHWM")}


def resident(key: str) -> int:
    """VmRSS: bytes of memory that this process has; VmHWM: had at the highest. Not ru_maxrss,
    which a process takes over from the one that started it. Where the system is not Linux, that
    is all there is."""
    file = Path("/proc/self/status")
    if not file.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in file.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def alone(function, *args):
    """The result of the function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def time_peer(run, runners: dict) -> list[dict]:
    """What TRL took, in float32 (with `bf16` in bfloat16 too), for each of the batch sizes that
    divide a step, and what ours took between its steps: "ours". SystemExit with what TRL said if it
    fails."""
    cfg, found = run.cfg, []
    ways = [(batch, kind) for kind in runners if kind != "twin" for batch in cfg.peer_batches
            if cfg.prompts * cfg.group % batch == 0]  # fmt: skip
    with TemporaryDirectory() as folder:
        write_inputs(run, Path(folder))
        out = Path(folder, "trl.json")
        for batch, kind in ways:
            words = [cfg.peer_python, HERE / PEER, folder, "--batch", batch, "--out", out,
                     "--steps", cfg.peer_steps, *["--bf16"] * (kind != "ours")]  # fmt: skip
            steps = between([*map(str, words)], runners[kind].step)
            found.append({**json.loads(out.read_text()), "ours": steps[-cfg.peer_steps :]})
    return found


def between(words: list[str], step) -> list[float]:
    """Runs a program that says "step" for each step that it has done, and waits for a line before
    the next: meanwhile step(0), step(1), ..., whose seconds come back."""
    seconds = []
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with TemporaryFile("w+") as said, subprocess.Popen(
        words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
    ) as program:
        for line in program.stdout:
            if line == "step\n":
                seconds.append(sum(step(len(seconds)).values()))
                program.stdin.write("\n")
                program.stdin.flush()
        if program.wait():
            said.seek(0)
            raise SystemExit(f"error: {PEER}: {said.read()[-2000:]}")
    return seconds


def measure(cfg: Config) -> dict:
    """All that was measured, and on what."""
    if cfg.bf16 is None:
        cfg = replace(cfg, bf16=machine.multiplies_bf16())
    run = setup(cfg)
    kinds = [kind for kind in KINDS if cfg.bf16 or kind != "ours, bfloat16"]
    runners = {kind: KINDS[kind](run) for kind in kinds}
    rounds = take_turns(runners, cfg.rounds, cfg.warmup)
    trl = time_peer(run, runners) if cfg.peers else []
    told = machine.told("cpu")
    told["versions"]["transformers"] = sys.modules["transformers"].__version__
    return {
        "machine": told, "config": to_dict(cfg), "rounds": rounds, "trl": trl,
        "memory": {kind: alone(memory, cfg, kind) for kind in kinds} if cfg.memory else {},
        "found": summary(rounds, trl),
    }  # fmt: skip


# ---------------------------------------------------------------------------------- what comes out


def summary(rounds: dict[str, list[dict]], trl: list[dict] = ()) -> dict:
    """Median, lowest and highest seconds of every phase; and how many times ours the others take:
    of phases the ratio of medians, of whole steps the median, lowest and highest of the rounds'
    ratios. TRL is set against ours between its steps, float32 against float32 and bfloat16 against
    bfloat16, with the batch size of the least ratio."""
    seconds = {
        kind: {name: spread([one[name] for one in found]) for name in found[0]}
        for kind, found in rounds.items()
    }
    ratios = {}
    for kind in (kind for kind in rounds if kind != "ours"):
        ratios[kind] = {name: over(seconds[kind][name]["median"], seconds["ours"][name]["median"])
                        for name in PHASES}  # fmt: skip
        steps = [a["step"] / b["step"] for a, b in zip(rounds[kind], rounds["ours"])]
        ratios[kind] |= {"of": "ours", "step": spread(steps)}
    for end, bf16 in (("", False), (", bfloat16", True)):
        steps = [spread([a / b for a, b in zip(one["seconds"], one["ours"])]) for one in trl
                 if one["bf16"] == bf16]  # fmt: skip
        if steps:
            nearest = min(steps, key=lambda one: one["median"])
            ratios[f"TRL{end}"] = {"of": f"ours{end}", "step": nearest}
    return {"seconds": seconds, "ratios": ratios}


def over(a: float, b: float) -> float:
    return a / b if b else math.nan


def text(result: dict) -> str:
    """The results as they are printed."""
    found, told, cfg = result["found"], result["machine"], result["config"]
    seconds, ratios, kinds = found["seconds"], found["ratios"], list(found["seconds"])
    lines = [
        f"{told['device']}, {told['threads']} threads, torch {told['versions']['torch']}, "
        f"transformers {told['versions']['transformers']}, commit {told['commit']}",
        f"{cfg['prompts']} prompts x {cfg['group']} completions x {cfg['max_new']} tokens, beta "
        f"{cfg['beta']}, AdamW; ms, median of {cfg['rounds']} rounds",
        f"{'phase':18}" + "".join(f"{kind:>18}" for kind in kinds) + f"{'twin / ours':>14}",
    ]
    for name in PHASES:
        cells = "".join(f"{1000 * seconds[kind][name]['median']:18.1f}" for kind in kinds)
        lines.append(f"{name:18}{cells}{ratios['twin'][name]:14.1f}")
    cells = "".join(f"{1000 * seconds[kind]['step']['median']:18.1f}" for kind in kinds)
    lines.append(f"{'whole step':18}{cells}{ratios['twin']['step']['median']:14.1f}")
    steps = [seconds[kind]["step"] for kind in kinds]
    ends = [f"{1000 * one['low']:.0f} - {1000 * one['high']:.0f}" for one in steps]
    cells = "".join(f"{pair:>18}" for pair in ends)
    lines.append(f"{'  low - high':18}{cells}")
    for kind, ratio in ratios.items():
        low, middle, high = (f"{ratio['step'][k]:.2f}" for k in ("low", "median", "high"))
        lines.append(f"{kind}: a step takes {middle} times as long as with {ratio['of']} "
                     f"({low} to {high})")  # fmt: skip
    for one in result["trl"]:
        kind = "bfloat16" if one["bf16"] else "float32"
        lines.append(f"TRL {one['versions']['trl']}, {kind}, {one['batch']} completions per "
                     f"forward: {one['median']:.3f} s a step, ours "
                     f"{statistics.median(one['ours']):.3f}{mib(one)}")  # fmt: skip
    return "\n".join(lines + [f"{kind}{mib(one)}" for kind, one in result["memory"].items()])


def mib(one: dict) -> str:
    """', peak memory ...' of what was measured."""
    more, peak = one["peak_bytes"] - one["loaded_bytes"], one["peak_bytes"]
    return f", memory of the step {more / 2**20:.0f} MiB, of the whole process {peak / 2**20:.0f}"


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["r1v"]:
        import workload

        return workload.main(words[1:])
    cfg = parse(Config, words, __doc__)
    if cfg.peers and not Path(cfg.peer_python).is_file():
        raise SystemExit(f"error: {cfg.peer_python} is not there: `make bench PEERS=1` makes it, "
                         "or python3 -m venv .venv-peers and its pip install -r "
                         "bench/requirements-peers.txt")  # fmt: skip
    try:
        result = {"command": shlex.join(["python", "bench.py", *words]), **measure(cfg)}
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    write_json(result, cfg.out)
    print(text(result), f"written to {cfg.out}", sep="\n")
    return result


if __name__ == "__main__":
    main()
