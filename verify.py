"""Whether two answers are equal in mathematics: math-verify, in a process that can be killed.

    verify("… <answer> 0.5 </answer>", r"\\frac{1}{2}")    # True, False, or None: no verdict

math-verify (github.com/huggingface/Math-Verify, whose verdict R1-V's reward asks first) finds the
last formula or number of each text and compares the two with sympy. A policy finds what makes that
take for ever: `5^(5^(5^5))` is one call into C, which no alarm of Python interrupts, and the alarms
that math-verify sets itself work in the main thread only. So it runs without them in a process of
its own, which is started at the first question, answers one at a time, and is killed and replaced
when one takes longer than SECONDS. Its memory is bounded too.

The process is a fresh interpreter (a fork after torch has run threads hangs) that imports sympy
and no torch. It ends with its parent: at once when it waits, else by its own alarm.
"""
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe

SECONDS = 3.0                   # wall clock for one question; a usual one takes milliseconds
START_SECONDS = 120.0           # for the imports, on a cold disk
MEMORY = 2**30                  # bytes of address space; the imports take a fifth of it
LONGEST = 10_000                # characters; of a longer text the end is read, where answers stand


def verify(text: str, gold: str, latex: bool = False) -> bool | None:
    """Whether math-verify takes the last formula or number of text for that of gold. None is no
    verdict: it was killed after SECONDS, or died. latex: only formulas in $…$ and the like count,
    which a text of one formula wants: of $2\\sqrt{3} m!$ it could else take the 2."""
    verdict = judge(text, gold, latex)
    return verdict and verdict[0]


def judge(text: str, gold: str, latex: bool = False) -> tuple[bool, str | None] | None:
    """(what verify says, the answer that math-verify found in text or None), or None: no verdict.

    The order is R1-V's, verify(parse(text), parse(gold)), though math-verify asks for the gold
    first; it matters in equations only.
    """
    reply = JUDGE.ask(text[-LONGEST:], gold[-LONGEST:], latex)
    return reply and (reply[0], reply[1])


class Worker:
    """A process that answers questions one at a time, and is replaced when it fails to.

    command: what starts it; added are `seconds`, and the number of a file to open as a Connection.
    It says that it is ready by a first message, then answers each JSON list by a JSON list.
    Several threads may ask; a forked copy of this process starts one of its own.
    """

    def __init__(self, command: list[str], seconds: float):
        self.command, self.seconds = command, seconds
        self.process, self.pipe, self.owner = None, None, None
        self.lock = threading.Lock()

    def ask(self, *words) -> list | None:
        """The answer, or None if it died or took more than `seconds`. OSError: it cannot start."""
        with self.lock:
            if self.owner != os.getpid() or self.process.poll() is not None:
                self.start()
            reply = None
            try:
                self.pipe.send_bytes(json.dumps(words).encode())
                if self.pipe.poll(self.seconds):
                    reply = json.loads(self.pipe.recv_bytes())
            except (EOFError, ConnectionError):
                pass                                    # it died
            finally:                                    # on Ctrl-C too: a late answer would be
                if reply is None:                       # taken for that to the next question
                    self.stop()
            return reply

    def start(self) -> None:
        """A new process, once it is ready."""
        self.pipe, theirs = Pipe()
        with theirs:
            # Its own process group: Ctrl-C in a terminal is for the run, which may still ask it.
            self.process = subprocess.Popen(
                [*self.command, str(self.seconds), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.owner, ready = os.getpid(), False
        try:
            ready = self.pipe.poll(START_SECONDS) and bool(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            pass
        finally:
            if not ready:
                self.stop()
        if not ready:
            raise OSError(f"{self.command[-1]}: its process does not start, see above; is "
                          "math-verify installed? (pip install -r requirements.txt)")

    def stop(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()


# -P: without it this folder's files would stand before Python's own on the path.
JUDGE = Worker([sys.executable, "-P", os.path.abspath(__file__)], SECONDS)


# ---- in the process ----

def serve(seconds: float, file: int) -> None:
    """Answers until the other end is closed. Should the parent be gone and not kill it, its alarm
    does: nothing handles it, so it ends the process, inside C too."""
    with contextlib.suppress(ValueError, OSError):      # systems without such a limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    import logging

    import math_verify
    logging.disable()                                   # of what it could not parse
    compare(math_verify, r"$\frac{\sqrt{2}}{2}$", "1/2", False)         # builds its tables
    pipe = Connection(file)
    pipe.send_bytes(b"ready")
    while True:
        try:
            words = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        reply = compare(math_verify, *words)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(json.dumps(reply).encode())


def compare(math_verify, text: str, gold: str, latex: bool) -> tuple[bool, str | None]:
    """judge, here and now. math-verify takes an error of its own for "not equal"."""
    only = {"extraction_config": [math_verify.LatexExtractionConfig()]} if latex else {}
    found, wanted = (math_verify.parse(x, parsing_timeout=None, **only) for x in (text, gold))
    equal = bool(math_verify.verify(found, wanted, timeout_seconds=None))
    return equal, str(found[0]) if found else None


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
