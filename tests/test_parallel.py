"""parallel.py, chapter two: several processes are one process that is faster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import make_checkpoint

import parallel

ROOT = Path(__file__).parent.parent
REWARD = """
def vowels(text, example):
    "Share of vowels among the characters, in [0, 1]."
    return sum(c in "aeiou" for c in text) / max(1, len(text))
"""


def test_on_one_process_every_helper_is_the_identity():
    x = torch.tensor([1.0, 2.0])
    assert (parallel.rank(), parallel.size()) == (0, 1)
    assert parallel.share(7) == (0, 7)
    assert parallel.total(x) is x
    assert parallel.gathered("item") == ["item"]


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


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A checkpoint and six rows: unequal pictures, two pictures, none."""
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
    (folder / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def run(folder, name, processes, *extra):
    """Trains 3 steps in `processes` processes; metrics without times, final weights."""
    keys = {
        "model": folder / "model", "data": folder / "rows.jsonl", "out": folder / name, "steps": 3,
        "prompts": 5, "group": 3, "max_new": 6, "rewards": f"{folder / 'reward.py'}:vowels",
        "reward_weights": "1", "lr": 1e-3, "beta": 0.1, "micro_prompts": 2, "probes": 2,
        "evals": f"E={folder / 'rows.jsonl'}",
    }  # fmt: skip
    words = [w for k, v in keys.items() for w in (f"--{k}", str(v))] + list(extra)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "grpo.py", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
    drop = ("seconds", "time/sample", "time/update", "completions_per_second")
    lines = [{k: v for k, v in line.items() if k not in drop} for line in lines]
    return lines, load_file(folder / name / "step_000003" / "model.safetensors")


@pytest.mark.parametrize("extra", [(), ("--mean", "token", "--dynamic_sampling", "2")])
def test_two_processes_train_as_one_does(rows, extra):
    """5 prompts on 2 processes (3 and 2), pictures on some: same samples, gradients and weights."""
    name = "token" if extra else "sequence"
    one, weights_one = run(rows, f"{name}_1", 1, *extra)
    two, weights_two = run(rows, f"{name}_2", 2, *extra)
    start = load_file(rows / "model" / "model.safetensors")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for key, weight in weights_one.items():
        torch.testing.assert_close(weights_two[key], weight, rtol=0, atol=1e-5)
    assert max((weights_one[k] - start[k]).abs().max() for k in start) > 1e-4
    assert one[-1]["drawn"] >= 15
    summary = [json.loads((rows / f"{name}_{n}" / "summary.json").read_text()) for n in (1, 2)]
    assert summary[0]["after"] == summary[1]["after"]


def test_fewer_prompts_than_processes_are_refused(monkeypatch, rows):
    import grpo

    monkeypatch.setattr(parallel, "size", lambda: 4)
    cfg = grpo.Config(model=str(rows / "model"), data=str(rows / "rows.jsonl"), prompts=3)
    with pytest.raises(ValueError, match="prompts 3: fewer than the 4 processes"):
        grpo.setup(cfg, "cpu", None)
