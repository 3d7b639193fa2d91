"""Whole runs of grpo.py and sft.py, one after the other and killed where one likes, for tests.

    with RunMany() as run:
        run("grpo", "--steps", 4, ...)                       # (status, what it said)
        run("grpo", ..., kill=7)                             # SIGKILL before file operation 7
        run("grpo", ..., kill=2, at="metrics.jsonl")         # 2: the third one on that file
        run("grpo", ..., after=1.5, signal=signal.SIGTERM)   # a signal after 1.5 s
    run("run", "RECIPE.toml", "--out", ..., processes=2) # as torchrun would start two

A run takes 5 s to import what it needs, and 1 s until torch can make its first plan of the memory.
So one process does both and forks a child for each run. It starts no threads that a child would
miss, and has no GPU, which could not be used in one.
"""

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from signal import SIGKILL

ROOT = Path(__file__).parent.parent
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}


class RunMany:
    """A process that runs what it is told, see above."""

    def __enter__(self) -> "RunMany":
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
               "CUDA_VISIBLE_DEVICES": ""}
        self.server = subprocess.Popen([sys.executable, __file__], env=env, cwd=ROOT, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        return self

    def __exit__(self, *_) -> None:
        self.server.stdin.close()
        self.server.wait(60)

    def __call__(self, program: str, *words, kill=None, at="", after=None, signal=SIGKILL,
                 processes=1):  # fmt: skip
        """Status (negative: the signal that ended it) and output of `program words`. It gets the
        signal before operation number `kill` on a file under --out, of those whose path ends with
        `at`; or `after` so many seconds."""
        order = {"program": program, "words": [str(word) for word in words], "kill": kill,
                 "at": at, "after": after, "signal": int(signal),
                 "processes": processes}  # fmt: skip
        print(json.dumps(order), file=self.server.stdin, flush=True)
        status, said = json.loads(self.server.stdout.readline())
        return status, said


def child(order: dict, log) -> None:
    """Runs a program as its main() would be, and ends this process with its status."""
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    words, seen, status = order["words"], count(), 0
    out = words[words.index("--out") + 1]

    def hook(event, args):
        path = str(args[0]) if event in OPERATIONS else ""
        if path.startswith(out) and path.endswith(order["at"]) and next(seen) == order["kill"]:
            os.kill(os.getpid(), order["signal"])

    if order["kill"] is not None:
        sys.addaudithook(hook)
    try:
        PROGRAMS[order["program"]].main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    os._exit(status)


def join(rank: int, size: int, port: int) -> None:
    """Makes this process one of several, as torchrun does."""
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                       "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(port)}  # fmt: skip


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile() as log:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port, started = free.getsockname()[1], []
            for rank in range(order["processes"]):
                if not (pid := os.fork()):
                    with contextlib.suppress(BaseException):
                        join(rank, order["processes"], port)
                        child(order, log)
                    os._exit(1)
                started.append(pid)
            if order["after"] is not None:
                time.sleep(order["after"])
                for pid in started:
                    os.kill(pid, order["signal"])
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
            status = next(filter(None, statuses), 0)
            log.seek(0)
            print(json.dumps([status, log.read().decode(errors="replace")]), flush=True)


if __name__ == "__main__":
    import torch

    import grpo
    import plan
    import run
    import sft
    from checkpoint import read_config

    torch.set_num_threads(1)
    plan.of(read_config(ROOT / "tiny"), plan.Work(1, 2, max_new=2, tokens=8, patches=4, micro=1))
    PROGRAMS = {"grpo": grpo, "sft": sft, "run": run}
    gc.collect()
    gc.freeze()  # or each collection of a child goes through all that was imported: 0.3 s
    serve()
