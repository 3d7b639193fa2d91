"""Prompts made ahead of the trainer: while a step samples, workers decode the next step's pictures.

    prompts = Ahead(processor, examples, workers=4)
    batch = prompts([7, 3], expected=[5, 8])       # rows 7 and 3 now; 5 and 8 are begun meanwhile

A picture of 480 x 320 takes about 10 ms to read, resize and cut into patches, 16 of them as long as
a good part of a step. Each is done once per prompt, whatever the number of completions. With
workers=0 all is done at once, in this process; the prompts are the same.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import torch

from data import Processor, Prompt
from example import Example

BESIDE = 4  # workers that keep up with a GPU, see LOG.md


class Ahead:
    """Prompts of rows of a data set by their numbers, see above."""

    def __init__(self, processor: Processor, examples: Sequence, max_prompt=None, workers=0):
        """max_prompt: tokens of a prompt at most; workers: processes, 0 for none, None for BESIDE
        if there is a GPU that would wait for them, else none."""
        workers = (BESIDE if torch.cuda.is_available() else 0) if workers is None else workers
        self.processor, self.examples, self.max_prompt = processor, examples, max_prompt
        self.begun: dict[int, Future] = {}
        # Rows that are read on demand are read by the workers. A list is in memory here: its rows
        # are sent one by one. Spawned, because a fork after torch has run threads hangs.
        lazy = None if isinstance(examples, list) else examples
        self.pool = workers and ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), set_up, (processor, lazy, max_prompt)
        )

    def __call__(self, rows: list[int], expected: Sequence[int] = ()) -> list[Prompt]:
        """The prompts of `rows`, in order. Those of `expected`, of which the next call should be,
        are begun. Raises what Processor.prompt raises."""
        if not self.pool:
            return [self.processor.prompt(self.examples[i], self.max_prompt) for i in rows]
        try:
            for i in dict.fromkeys([*rows, *expected]):
                if i not in self.begun:
                    work = i if not isinstance(self.examples, list) else self.examples[i]
                    self.begun[i] = self.pool.submit(make, work)
            made = {i: as_tensors(self.begun[i].result()) for i in set(rows)}
        except BrokenProcessPool as error:
            raise SystemExit("error: a process that prepares prompts died, perhaps for want of "
                             "memory; --workers 0 prepares them in the trainer") from error
        for i in self.begun.keys() - set(expected):
            self.begun.pop(i).cancel()
        return [made[i] for i in rows]

    def close(self) -> None:
        """Ends the workers. What they had begun is lost."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------ in a worker

work_with: tuple = ()  # processor, rows or None, max_prompt: set in a worker when it starts


def set_up(processor: Processor, examples, max_prompt) -> None:
    """What a worker does first. Several of them share the cores, so each has one thread."""
    global work_with
    work_with = processor, examples, max_prompt
    os.setpgrp()  # Ctrl-C, and what torchrun sends, are for the trainer, which closes it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this worker when the trainer is gone, killed or not; else it would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def make(work: int | Example) -> Prompt:
    """The prompt of a row or an example, its tensors as numpy arrays: these travel as bytes, where
    tensors would each take a file descriptor or shared memory."""
    processor, examples, max_prompt = work_with
    prompt = processor.prompt(work if isinstance(work, Example) else examples[work], max_prompt)
    arrays = {k: v.numpy() for k, v in vars(prompt).items() if isinstance(v, torch.Tensor)}
    return replace(prompt, **arrays)


def as_tensors(prompt: Prompt) -> Prompt:
    """The same with its arrays as tensors again."""
    arrays = {k: v for k, v in vars(prompt).items() if isinstance(v, np.ndarray)}
    return replace(prompt, **{k: torch.from_numpy(v) for k, v in arrays.items()})
