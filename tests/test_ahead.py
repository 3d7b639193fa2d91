"""ahead.py, chapter two: what workers prepare is what the trainer would have, row by row."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint, picture

from ahead import BESIDE, Ahead
from data import Processor
from example import Example

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("model"))
    return Processor.from_pretrained(folder, "{Question} <|image_pad|>")  # which must stay text


EXAMPLES = [
    Example(f"How many {'many ' * i}items?", str(i), (picture(i, 56, 56 + 28 * i),) * (i % 3))
    for i in range(6)
]


class OnDemand:
    """Rows that exist only when they are asked for; bad.png is damaged."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return Example("q", f"read by {os.getpid()}", (f"{self.folder}/{i}.png",), row=f"r#{i}")


def same(prompt, other) -> bool:
    pairs = [(vars(prompt)[k], vars(other)[k]) for k in vars(prompt) if k != "example"]
    equal = [torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs]
    return all(equal) and prompt.example.solution == other.example.solution


@pytest.fixture(scope="module")
def two_workers(processor):
    ahead = Ahead(processor, EXAMPLES, workers=2)
    yield ahead
    ahead.close()


def test_workers_prepare_what_the_trainer_would(processor, two_workers):
    """Tensor by tensor, in the order that was asked for, a row that is asked for twice too."""
    here = Ahead(processor, EXAMPLES)
    for rows, expected in [([3, 0, 5], [1, 1, 4]), ([1, 4], []), ([2, 2, 0], [5])]:
        made, wanted = two_workers(rows, expected), here(rows, expected)
        assert len(made) == len(rows)
        assert all(same(a, b) for a, b in zip(made, wanted))
        assert made[0].ids.dtype == torch.int64 and made[0].patches.dtype == torch.float32


def test_there_are_workers_by_default_where_there_is_a_gpu(processor, monkeypatch):
    for gpu, number in ((False, 0), (True, BESIDE)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        ahead = Ahead(processor, EXAMPLES, workers=None)
        assert (ahead.pool._max_workers if ahead.pool else 0) == number
        ahead.close()


def test_what_is_expected_is_ready_when_it_is_asked_for_and_the_rest_is_dropped(two_workers):
    two_workers([0], expected=[1, 2])
    assert two_workers.begun.keys() == {1, 2}
    end = time.monotonic() + 30
    while not all(f.done() for f in two_workers.begun.values()) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(f.done() for f in two_workers.begun.values())
    two_workers([1], expected=[3])
    assert two_workers.begun.keys() == {3}


def test_rows_that_are_read_on_demand_are_read_by_the_workers(processor, tmp_path):
    """And what is wrong with one is told in the trainer, by its row."""
    for i in range(2):
        Image.fromarray(picture(i, 56, 56)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    ahead = Ahead(processor, OnDemand(tmp_path), workers=1)
    try:
        (prompt,) = ahead([1], expected=[2])
        assert prompt.example.solution != f"read by {os.getpid()}"
        with pytest.raises(ValueError, match=r"r#2: image .*2\.png"):
            ahead([2])
    finally:
        ahead.close()


def test_a_prompt_that_is_too_long_is_refused_by_a_worker_as_by_the_trainer(processor):
    for workers in (0, 1):
        ahead = Ahead(processor, EXAMPLES, max_prompt=10, workers=workers)
        with pytest.raises(ValueError, match="at most 10 are allowed"):
            ahead([0])
        ahead.close()


def test_ctrl_c_is_left_to_the_trainer(processor, two_workers):
    """In a terminal it is sent to all; a worker would print where it was, and die."""
    two_workers([0, 1])
    for process in two_workers.pool._processes:
        os.kill(process, signal.SIGINT)
    assert same(two_workers([2])[0], processor.prompt(EXAMPLES[2]))


def test_a_worker_that_dies_ends_the_run_with_a_word_about_it(processor):
    ahead = Ahead(processor, EXAMPLES, workers=1)
    ahead([0])
    for process in ahead.pool._processes.values():
        process.kill()
    with pytest.raises(SystemExit, match=r"prepares prompts died.*--workers 0"):
        ahead([1, 2, 3])


def test_workers_end_when_the_trainer_is_killed():
    """Killed, not asked to end: nothing is left that would hold a pipe of the trainer open."""
    code = """
import sys, time
from ahead import Ahead
from data import Processor
from example import Example
if __name__ == "__main__":
    ahead = Ahead(Processor.from_pretrained("tiny"), [Example("q", "1")], workers=1)
    ahead([0])
    print(*ahead.pool._processes, flush=True)
    time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    (worker,) = map(int, trainer.stdout.readline().split())
    os.kill(worker, 0)
    trainer.kill()
    trainer.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(worker, 9)
    raise AssertionError("the worker outlived its trainer")
