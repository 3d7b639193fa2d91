"""parallel.py, chapter two: several processes are one process that is faster."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import make_checkpoint

import parallel
from model import Qwen2VL
from optim import draw_rows

ROOT = Path(__file__).parent.parent
REWARD = """
def vowels(text, example):
    "Share of vowels among the characters, in [0, 1]."
    return sum(c in "aeiou" for c in text) / max(1, len(text))

def late(text, example):
    "The same for the rows 3 to 5, else 0: in a step a process may have no group with a signal."
    return vowels(text, example) * (int(example.solution) >= 3)

def some(text, example):
    "The same; none for every fifth length of a text."
    return None if len(text) % 5 == 0 else vowels(text, example)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # gloo, on the CPU


def test_on_one_process_every_function_is_the_identity():
    x, model = torch.tensor([1.0, 2.0]), torch.nn.Linear(2, 2)
    assert (parallel.rank(), parallel.size()) == (0, 1)
    assert parallel.share(7) == (0, 7)
    assert parallel.total(x) is x
    assert parallel.gathered("item") == ["item"]
    assert parallel.sharder("cpu") is None
    assert parallel.full(x) is x
    assert parallel.full_state_dict(model)["weight"].data_ptr() == model.weight.data_ptr()


def test_shares_are_contiguous_and_cover_every_item_once(monkeypatch):
    for n, size in ((7, 2), (16, 3), (5, 5), (2, 4)):
        monkeypatch.setattr(parallel, "size", lambda size=size: size)
        seen = []
        for rank in range(size):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            first, count = parallel.share(n)
            assert count in (n // size, n // size + 1)
            seen += range(first, first + count)
        assert seen == list(range(n))


def test_what_goes_wrong_in_one_process_is_said():
    with pytest.raises(ValueError, match="no such row"), parallel.agreed():
        raise ValueError("no such row")
    with pytest.raises(ValueError, match="read-only"), parallel.agreed():
        raise OSError("read-only")
    with pytest.raises(SystemExit, match="error: no such row"), parallel.told():
        raise ValueError("no such row")


# ------------------------------------------------------------------ two processes equal one

RUNS = {  # name: program, keys
    "plain": ("grpo", {}),
    "dapo": ("grpo", {"mean": "token", "dynamic_sampling": 2, "clip_high": 0.28, "beta": 0}),
    "one by one": ("grpo", {"micro_prompts": 1, "updates_per_batch": 2}),
    "copies": ("grpo", {"shard_group": 1, "recompute": "true"}),
    "muon": ("grpo", {"optimizer": "muon"}),
    "reinforce": ("grpo", {"advantage": "baseline", "kl": "reward", "prompts": 4, "minibatches": 2,
                           "mean": "token", "rewards": "some", "most_right": 0.2, "adora": 0.5}),
    "no signal": ("grpo", {"rewards": "late", "prompts": 6, "beta": 0}),
    "text": ("grpo", {"data": "text.jsonl", "prompts": 3, "micro_prompts": 1}),
    "one pictured": ("grpo", {"data": "one.jsonl", "prompts": 2, "micro_prompts": 1}),
    "one looked at": ("grpo", {"data": "one.jsonl", "prompts": 2, "freeze": "vision"}),
    "lora": ("grpo", {"lora": 4, "lora_vision": "true", "recompute": "true", "optimizer": "muon"}),
    "tower frozen": ("grpo", {"freeze": "vision", "dynamic_sampling": 1, "updates_per_batch": 2}),
    "sft": ("sft", {}),
    "sft frozen": ("sft", {"freeze": "vision,language"}),
    "sft prompts": ("sft", {"mask": "all", "micro": 1, "optimizer": "muon"}),
    "sft text": ("sft", {"data": "text.jsonl", "batch": 3}),
}
ON = {"optimizer": "muon", "schedule": "constant", "save_every": 1}
RUNS["to be gone on with"] = ("grpo", ON)
HALF = {"bfloat16": ("grpo", {"bf16": "true"}), "sft bfloat16": ("sft", {"bf16": "true"})}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A checkpoint and six rows: unequal pictures, two pictures, none; the rows without; and these
    with one more, so that of two processes one at most has a picture."""
    folder = tmp_path_factory.mktemp("rows")
    make_checkpoint(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rng, lines = np.random.default_rng(0), []
    for i, sizes in enumerate([[(56, 56)], [(84, 56)], [], [(56, 84), (112, 56)], [(56, 56)], []]):
        names = [f"{i}_{k}.png" for k in range(len(sizes))]
        for name, (w, h) in zip(names, sizes):
            pixels = rng.integers(0, 255, (h, w, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        lines.append({"images": names, "problem": f"How many? {'x' * i}", "solution": str(i)})
    text = [x for x in lines if not x["images"]]
    for name, kept in (("rows", lines), ("text", text), ("one", [lines[0], *text])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
    return folder


def words(folder, name, number, **more):
    """Program and command line of a run of three steps in `number` processes."""
    program, keys = {**RUNS, **HALF, "gone on with": ("grpo", ON)}[name]
    keys = {"data": "rows.jsonl", "steps": 3, "lr": 3e-4, "probes": 2, **keys,
            "model": folder / "model", "out": folder / f"{name}_{number}",
            "evals": f"E={folder / 'rows.jsonl'}"}  # fmt: skip
    keys["data"] = folder / keys["data"]
    if program == "grpo":
        keys = {"prompts": 5, "group": 3, "max_new": 6, "beta": 0.1, "micro_prompts": 2, **keys}
        keys["rewards"] = f"{folder / 'reward.py'}:{keys.get('rewards', 'vowels')}"
    else:
        keys = {"batch": 5, "micro": 2, "max_new": 6, "held_out": folder / "rows.jsonl", **keys}
    return program, [w for k, v in {**keys, **more}.items() for w in (f"--{k}", str(v))]


@pytest.fixture(scope="module")
def done(rows):
    """All runs on one process and on two, and some that go on; the folder they are in. "gone on
    with_21" does two steps on two processes and the third on one."""
    def on(places, steps):
        return [words(rows, "gone on with", place, steps=steps) for place in places]

    first, second = ([words(rows, name, n) for name in (*RUNS, *HALF)] for n in (1, 2))
    two = [*TORCHRUN, "--nproc_per_node=2"]
    for start, lines in (([sys.executable], first + on([12], 2)),
                         (two, second + on([12], 3) + on([21, 22], 2) + on([22], 3)),
                         ([sys.executable], on([21], 3))):  # fmt: skip
        (rows / "runs.json").write_text(json.dumps(lines))
        ran = subprocess.run([*start, "tests/gradients.py", rows / "runs.json"], cwd=ROOT, env=ENV,
                             capture_output=True, text=True, timeout=400)  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
    return rows


def metrics(folder):
    """The lines of metrics.jsonl, without times and what depends on the number of processes."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    drop = ("seconds", "balance", "memory_gb", "samples_per_second", "tokens_per_second",
            "resumed")  # fmt: skip
    return [{k: v for k, v in line.items() if k not in drop and not k.startswith("time/")}
            for line in lines]  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(done, name):
    """5 prompts on 2 processes (3 and 2), pictures on some, none, or two: the same order of data,
    the same samples, and losses and gradients that are equal to 1e-5 in each of 3 steps. Adam
    divides small gradients by their size, noise too: weights are compared as a whole."""
    folders = [done / f"{name}_{n}" for n in (1, 2)]
    one, two = (metrics(folder) for folder in folders)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    gradients = [load_file(f"{folder}.gradients") for folder in folders]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-5)
    start, *ends = (Qwen2VL.from_pretrained(f).state_dict() for f in
                    (done / "model", *(f / "step_000003" for f in folders)))  # fmt: skip
    moved, apart = (torch.cat([(x[k] - y[k]).flatten() for k in start]).norm()
                    for x, y in ((ends[0], start), ends))  # fmt: skip
    assert moved > 1e-3 and apart < 5e-3 * moved
    after = [json.loads((folder / "summary.json").read_text())["after"] for folder in folders]
    assert after[0] == after[1]


@pytest.mark.parametrize("places", ["12", "21", "22"])
def test_a_run_goes_on_with_another_number_of_processes(done, places):
    """Two steps on one or two processes and the third on two or one, with Muon."""
    folders = [done / "to be gone on with_1", done / f"gone on with_{places}"]
    one, other = (metrics(folder) for folder in folders)
    assert len(one) == len(other) == 3
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    start, *ends = (Qwen2VL.from_pretrained(f).state_dict() for f in
                    (done / "model", *(f / "step_000003" for f in folders)))  # fmt: skip
    moved, apart = (torch.cat([(x[k] - y[k]).flatten() for k in start]).norm()
                    for x, y in ((ends[0], start), ends))  # fmt: skip
    assert moved > 1e-3 and apart < 5e-3 * moved


@pytest.mark.parametrize("name", ["plain", "copies", "bfloat16", "sft", "lora"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_copy_to_sample_from_has_the_weights_as_they_are_at_each_step(done, name, number):
    """Gathered block by block, or cast; it is made once and written anew."""
    found = load_file(f"{done / name}_{number}.gradients")
    far = {key: x for key, x in found.items() if key.startswith("copy ")}
    assert {key.split()[1] for key in far} == {"0", "1", "2"}
    assert not any(x.any() for x in far.values())


def test_in_bfloat16_they_differ_by_its_rounding_only(done):
    """One process rounds weights where they are used, two round all of them when they are gathered.
    Samples differ then, but those of SFT are given: gradients are 1 % apart, and mismatch is small
    in both, so sampler and trainer are one distribution."""
    first, second = (load_file(done / f"sft bfloat16_{n}.gradients") for n in (1, 2))
    one, two = (torch.cat([x[k].flatten() for k in first if k.startswith("0 ")])
                for x in (first, second))  # fmt: skip
    assert 0 < (one - two).norm() < 0.03 * one.norm()
    for n in (1, 2):
        assert max(x["mismatch"] for x in metrics(done / f"bfloat16_{n}")) < 1.005


def test_the_cases_are_what_they_say(done):
    """A vision tower without pictures stays; groups are without signal where they should be."""
    start = load_file(done / "model" / "model.safetensors")
    for name in ("text_2", "sft text_2"):
        end = load_file(done / name / "step_000003" / "model.safetensors")
        still = {k for k in start if torch.equal(start[k], end[k])}
        assert still >= {k for k in start if k.startswith("visual.")} and len(still) < len(start)
    pictured = [draw_rows(3, 0, 2 * step, 2).count(0) for step in range(3)]  # of "one pictured"
    assert sorted(pictured) == [0, 1, 1]
    assert min(x["no_signal"] for x in metrics(done / "no signal_2")) >= 0.5
    assert 0 < metrics(done / "plain_2")[0]["reward"] < 1
    for key in ("out_of_band", "no_reward", "kl"):
        assert sum(x[key] for x in metrics(done / "reinforce_2")) > 0, key


def test_a_mistake_is_told_once_and_ends_all_processes(rows):
    keys = ("--model", rows / "model", "--data", rows / "rows.jsonl", "--prompts", "1")
    done = subprocess.run([*TORCHRUN, "--nproc_per_node=2", "grpo.py", *keys], cwd=ROOT, env=ENV,
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("error: prompts 1: fewer than the 2 processes") == 1
    assert "Traceback (most recent call last):\n  File \"grpo.py" not in done.stderr


# ------------------------------------------------------------------------------- life and death

ALONE = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import parallel
parallel.BEAT, parallel.SILENT = 0.2, 3

def start_both(way, port):
    "Forks two processes, whose errors go to files: statuses of both in the parent, None in each."
    children = []
    for rank in (0, 1):
        if not (child := os.fork()):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=port)
            os.dup2(os.open(f"{way}_{rank}", os.O_WRONLY | os.O_CREAT), 2)
            return None
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

statuses = {}
for word in sys.argv[2:]:
    way, port = word.split(":")
    statuses[way] = start_both(way, port)
    if not statuses[way]:
        break
else:
    print(json.dumps(statuses))
    sys.exit()
with parallel.together():
    parallel.start()
    parallel.gathered("here")
    if parallel.rank() == 1:
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "fail":
            raise ValueError("row 7 is no row")
    if way != "end":
        time.sleep(100)
"""
ENDS = {"kill": ("process 1 gave no sign of life for 3 s", [1, -9]),
        "fail": ("process 1 failed: ValueError('row 7 is no row')", [1, 1]),
        "end": ("", [0, 0])}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{way: (what the first of two processes said, statuses of both)}, for the ways of ENDS. One
    interpreter imports torch, and all are forked from it."""
    folder, words = tmp_path_factory.mktemp("alone"), []
    for way in ENDS:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            words.append(f"{way}:{s.getsockname()[1]}")
    env = {**ENV, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    ran = subprocess.run([sys.executable, "-c", ALONE, ROOT, *words], cwd=folder, env=env,
                         stdout=subprocess.PIPE, text=True, check=True, timeout=300)  # fmt: skip
    statuses = json.loads(ran.stdout)
    return {way: ((folder / f"{way}_0").read_text(), statuses[way]) for way in ENDS}


@pytest.mark.parametrize("way", ENDS)
def test_the_end_of_one_process_is_soon_the_end_of_all(alone, way):
    """Two processes that nobody watches from outside; the first waits for something else."""
    said, statuses = alone[way]
    told, wanted = ENDS[way]
    assert told in said and statuses == wanted, said


def test_each_start_has_a_name_of_its_own_whatever_lies_in_the_store():
    """Three processes as threads, started three times; the store keeps all that was said."""
    place, names = dist.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            late = [2, 0, 1]  # the first is not the first to come
            found = list(pool.map(lambda me: parallel.agree_on_name(place, me, 3, 0.2), late))
        assert len(set(found)) == 1
        names += found[:1]
    assert len(set(names)) == 3
    with pytest.raises(SystemExit, match=r"process 1 waited 0\.001 minutes in vain for the first"):
        parallel.agree_on_name(place, 1, 3, 0.001)
    with pytest.raises(SystemExit, match=r"process 0 waited 0\.001 minutes in vain for \[1, 2\]"):
        parallel.agree_on_name(dist.HashStore(), 0, 3, 0.001)
    assert parallel.agree_on_name(dist.HashStore(), 0, 1)


@pytest.mark.slow
def test_torchrun_starts_a_run_again_whose_process_died_and_it_goes_on(rows, tmp_path):
    """kill -9 of one of two processes: the other ends within a minute, torchrun starts both again,
    and they go on from the newest checkpoint, to the weights of a run that nothing happened to."""
    _, line = words(rows, "plain", 2)
    ends, more = [], ("--steps", "30", "--save_every", "1", "--probes", "0", "--keep", "3")
    line = [w for k, v in zip(line[::2], line[1::2]) if k not in more for w in (k, v)]
    for name in ("killed", "whole"):
        at = line.index("--out") + 1
        line[at] = str(tmp_path / name)
        run = subprocess.Popen([*TORCHRUN, "--nproc_per_node=2", "--max_restarts=1", "grpo.py",
                                *line, *more], cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
        if name == "killed":
            while not (tmp_path / name / "step_000003").exists():
                time.sleep(0.05)
            found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
            os.kill(int(found.stdout.split()[1]), signal.SIGKILL)
            killed = time.monotonic()
        said = run.communicate(timeout=200)[1]
        assert run.returncode == 0, said[-2000:]
        assert ("goes on from" in said) == (name == "killed")
        ends.append(load_file(tmp_path / name / "step_000030" / "model.safetensors"))
        assert time.monotonic() - killed < 150
    for key, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][key], rtol=0, atol=1e-5)
