"""Work that may hang, crash or fill the memory, in processes that can be killed.

    pool = Pool("math-verify", "verify", (), seconds=3.0, memory=2**30)
    pool.ask([("3", "3"), ("5^(5^(5^5))", "3")])       # [{"value": …}, None]: the second was killed

An alarm of Python cannot end `9**9**9**9`, which is one call into C; it works in the main thread
only, and code of a user's own may set it too. A pool of concurrent.futures cannot kill the one of
its processes that hangs: after as many such questions it answers no more. So a Pool has processes
of its own; one that takes longer than `seconds` for a question, or dies, is killed with all that
it has started, and replaced, and the question has no answer.

A process is a fresh interpreter (a fork after torch has run threads hangs). It imports a module of
this project, calls its `prepare(*arguments)`, and asks the function that this gives every question.
Questions go there pickled, answers come back as JSON: they were made by code that is not trusted.
What it prints goes to stderr. Ctrl-C in a terminal does not reach it: the run may still finish a
step. It ends with its parent, kill -9 included: at once when it waits, else within half a second,
or, in a call into C, by its alarm.
"""
import contextlib
import importlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait

START_SECONDS = 120.0           # to be ready: imports, on a cold disk
MOST = 4                        # processes of a pool, where there are as many cores
LONGEST = 4000                  # characters of a traceback; its end says what was wrong
COUNTS = {"killed": 0, "failed": 0}
NOTHING = object()


def counted() -> dict[str, int]:
    """How many questions of this process had no answer since the last call of this: "killed" for
    their time or memory, or died of; "failed", which raised."""
    found = dict(COUNTS)
    COUNTS.update(dict.fromkeys(COUNTS, 0))
    return found


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Processes that answer questions, each one at a time, and are replaced when they fail to.

    name: of the work, for messages. module: one of this project, whose prepare(*arguments) is
    called in the process; a ValueError of it is a person's mistake, and raised again here.
    seconds: wall clock for one question. memory: bytes a process may have of its own.
    Several threads may ask; a forked copy of this process starts processes of its own.
    """

    def __init__(self, name: str, module: str, arguments: tuple, seconds: float, memory: int,
                 most: int | None = None):
        self.seconds, self.lock = seconds, threading.Lock()
        order = (module, arguments, memory, seconds)
        self.workers = [Worker(name, order) for _ in range(most or min(MOST, cores()))]
        weakref.finalize(self, stop_all, self.workers)      # at the end of the interpreter, too

    def start(self) -> None:
        """Starts all processes, which the first questions would else wait for. Raises as ask."""
        with self.lock:
            try:
                for worker in self.workers:
                    worker.begin()
                while not all(worker.ready for worker in self.workers):
                    for worker, said in heard(self.workers):
                        worker.greet(said)
            finally:
                if not all(worker.ready for worker in self.workers):
                    stop_all(self.workers)

    def ask(self, questions: list[tuple]) -> list[dict | None]:
        """For each question {"value": what answer(*question) gave}, {"error": traceback} if it
        raised, or None: it was killed or died. ValueError: a process cannot start.

        The last part of a question may be one that several have in common, as those of a group
        have their example. A process is not sent what it was sent before: a picture of 480 x 320
        takes 1 ms, all else 0.1 ms.
        """
        replies, left = [None] * len(questions), deque(enumerate(questions))
        with self.lock:
            first = sorted(self.workers, key=lambda worker: not (worker.ready and worker.alive()))
            crew = first[:len(questions)]               # those that are starting come last
            try:
                for worker in crew:
                    if not worker.alive():
                        worker.begin()
                while left or any(worker.number is not None for worker in crew):
                    for worker in crew:
                        if left and worker.ready and worker.number is None:
                            worker.give(*left.popleft(), self.seconds)
                    for worker, said in heard(crew):
                        if worker.ready:
                            replies[worker.number], worker.number = said, None
                            COUNTS["killed"] += said is None
                            COUNTS["failed"] += said is not None and "error" in said
                            if said is None:
                                worker.begin()
                        else:
                            worker.greet(said)
            finally:                                    # on Ctrl-C too: a late answer would be
                stop_all(w for w in crew if w.number is not None)   # taken for the next question's
            return replies


class Worker:
    """One process of a pool. number: of the question that it has, None where it has none; last:
    the last part of the latest."""

    def __init__(self, name: str, order: tuple):
        self.name, self.order = name, order
        self.process, self.pipe, self.owner = None, None, None
        self.ready, self.number, self.deadline, self.last = False, None, 0.0, NOTHING

    def alive(self) -> bool:
        """Whether it is there to be asked. One that waits says nothing: what can be read is its
        end."""
        return self.owner == os.getpid() and not (self.ready and self.pipe.poll())

    def begin(self) -> None:
        """A new process in its place, which will say that it is ready."""
        self.stop()
        self.pipe, theirs = Pipe()
        limit_sending(self.pipe, self.order[-1])
        command = [sys.executable, "-Pu", os.path.abspath(__file__)]    # -P: see serve
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(os.getpid()), str(theirs.fileno())], pass_fds=[theirs.fileno()],
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=2,
                env={**os.environ, "OMP_NUM_THREADS": "1"})     # several share the cores
        self.owner, self.deadline = os.getpid(), time.monotonic() + START_SECONDS
        with contextlib.suppress(OSError):              # it died: greet will say so
            self.pipe.send_bytes(pickle.dumps((sys.path, START_SECONDS, *self.order)))

    def greet(self, said: dict | None) -> None:
        """Takes its first message. ValueError: it has a mistake to tell, died or is late."""
        self.ready = said is not None and "error" not in said
        if self.ready:
            return
        late = time.monotonic() >= self.deadline
        self.stop()
        if said:
            raise ValueError(f"{self.name}: {said['error']}")
        raise ValueError(f"{self.name}: its process does not start, " + (
            f"it is not ready after {START_SECONDS:g} s" if late else "it ended; see above"))

    def give(self, number: int, question: tuple, seconds: float) -> None:
        """Sends it a question. Where it does not take it, that will be known by its silence."""
        self.number, self.deadline = number, time.monotonic() + seconds
        *words, last = question
        message = pickle.dumps((words, b"" if last is self.last else pickle.dumps(last)))
        self.last = last
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(message)

    def read(self) -> dict | None:
        """The message that waits in its pipe; None is its end."""
        with contextlib.suppress(EOFError, OSError):
            return json.loads(self.pipe.recv_bytes())

    def stop(self) -> None:
        """Kills the process and what it has started, unless it belongs to another than this one."""
        if self.owner == os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):      # all of it is dead
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):    # it hangs in a network's disk
                self.process.wait(1)
            self.pipe.close()
        self.owner, self.ready, self.number, self.last = None, False, None, NOTHING


def stop_all(workers) -> None:
    for worker in workers:
        worker.stop()


def heard(crew: list[Worker]) -> Iterator[tuple[Worker, dict | None]]:
    """Waits until some of those that are starting or have a question speak or are late; what each
    says, None for one that is late or dead. Read one by one: where one is an error, what the others
    say is still there for the next time."""
    busy = {w.pipe: w for w in crew if w.number is not None or not w.ready}
    until = min(w.deadline for w in busy.values())
    spoke, now = wait(busy, max(0.0, until - time.monotonic())), time.monotonic()
    for pipe, worker in busy.items():
        if pipe in spoke or worker.deadline <= now:
            yield worker, worker.read() if pipe in spoke else None


def limit_sending(pipe: Connection, seconds: float) -> None:
    """A picture does not fit into a pipe: sending it waits for a reader, which may be stuck. After
    some seconds that is then a BlockingIOError."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as same:
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))     # a C timeval
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


# ---- in the process ----

def serve(parent: int, file: int) -> None:
    """Answers until the other end is closed. The path is the parent's, so that imports find what
    they find there; with -P, what lies beside this file is not put before it."""
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    pipe = Connection(file)
    path, patience, module, arguments, memory, seconds = pickle.loads(pipe.recv_bytes())
    sys.path[:] = path
    # Not RLIMIT_AS: CUDA and its libraries map many gigabytes that they never use.
    with contextlib.suppress(ValueError, OSError):      # systems without such a limit
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    limit(patience)
    try:
        answer = importlib.import_module(module).prepare(*arguments)
    except ValueError as error:
        pipe.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    reply, last = b"{}", b""
    while True:
        limit(0)
        try:
            pipe.send_bytes(reply)
            message = pipe.recv_bytes()
        except (EOFError, ConnectionError):             # the parent is gone
            return
        limit(seconds)
        words, new = pickle.loads(message)
        last = new or last                              # see Pool.ask; unpickled each time, since
        reply = answered(answer, words, last)           # whoever is asked may change it


def answered(answer, words: list, last: bytes) -> bytes:
    """The reply to a question. All that code of a user's own may raise is a reply too, but for want
    of memory: what that leaves behind is not to be used again."""
    try:
        return json.dumps({"value": answer(*words, pickle.loads(last))}).encode()
    except MemoryError:
        os._exit(1)
    except Exception as error:
        return json.dumps({"error": told(error)}).encode()


def told(error: Exception) -> str:
    """An error with its traceback, but for the line that caught it."""
    trace = error.__traceback__.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))[-LONGEST:].rstrip()


def limit(seconds: float) -> None:
    """Ends this process after so many seconds (0: no more), inside C too, should its parent be gone
    and not kill it. Code of a user's own may take the alarm for itself."""
    signal.setitimer(signal.ITIMER_REAL, seconds and seconds + 1)


def end_with(parent: int) -> None:
    """Ends this process, and what it has started, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
