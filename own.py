"""A reward of one's own: f(text, example), or f(text, example, length), of a file of one's own.

    own = Own("my_rewards.py:f", seconds=10.0, memory=4.0)
    own(text, example)                              # its number, or None: no signal

The trainer never runs that file: processes with a limit of time and of memory do (worker.py), which
import this file and no torch. length is the completion's, in tokens; None where nobody knows it.
"""
import functools
import importlib.util
import inspect
import numbers
import sys
from math import isfinite
from pathlib import Path

from config import nearest
from worker import Pool, told


class Own:
    """A reward of a user's own, "path/to/file.py:function", in processes that load the file.

    Called as f(text, example), or for several at a time by `all`. Where it is killed, for its time
    or memory, or dies, the completion has no reward, None; where it raises, or gives what is no
    finite number, too. The first of each is told. As long as it has never worked, to raise for
    all texts of a call is a mistake in it: ValueError with the traceback; but of one group, whose
    row may be bad, only the second time. The file is read once: a process that replaces another
    runs what the first one ran, though the file has changed.
    """

    def __init__(self, name, seconds, memory):
        file, _, short = name.rpartition(":")
        path = Path(file).resolve()
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"reward {name}: no Python file at {path}")
        self.name, self.worked, self.silent = name, False, {"killed", "failed"}
        self.failed = 0                                 # calls in which it raised for all texts
        self.limits = f"{seconds:g} s and {memory:g} GB"
        self.pool = Pool(f"reward {name}", "own", (short, str(path), path.read_bytes()),
                         seconds, int(memory * 2**30))
        self.pool.start()

    def __call__(self, text, example, length=None):
        return self.all([text], [example], [length])[0]

    def all(self, texts, examples, lengths):
        replies = self.pool.ask(list(zip(texts, lengths, examples)))
        errors = [reply["error"] for reply in replies if reply and "error" in reply]
        self.worked |= any(reply and "value" in reply for reply in replies)
        if errors and len(errors) == len(replies) and not self.worked:
            self.failed += 1
            if self.failed > 1 or len(texts) == 1 or len({id(e) for e in examples}) > 1:
                raise ValueError(f"reward {self.name}: failed for every text so far; for the "
                                 f"last:\n{errors[-1]}")
        if errors:
            self.tell("failed", f"failed for a text, which has no reward:\n{errors[0]}")
        if None in replies:
            self.tell("killed", f"was killed or died, with its limits of {self.limits}, on a text, "
                                "which has no reward")
        return [reply.get("value") if reply else None for reply in replies]

    def tell(self, kind, message):
        """The first of its kind on stderr; all are counted, see worker.counted."""
        if kind in self.silent:
            print(f"reward {self.name}: {message}\n(said once; more are counted)", file=sys.stderr)
        self.silent -= {kind}


# ---- in the process of one's own reward ----

def prepare(short, path, source):
    """The function called `short` of a file, whose source is loaded as a module of its own; what
    lies beside it can be imported. ValueError where there is no such function f(text, example), or
    f(text, example, length)."""
    sys.path.append(str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(f"reward file {path}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        exec(compile(source, path, "exec"), vars(module))
    except Exception as error:
        raise ValueError(f"{path} fails while it is loaded:\n{told(error)}") from None
    function = getattr(module, short, None)
    if not callable(function):
        own = [key for key in vars(module) if callable(vars(module)[key])]
        raise ValueError(f"no function {short} in {path}{nearest(short, own)}")
    signature = inspect.signature(function)
    long = {"length": None} if "length" in signature.parameters else {}
    try:
        signature.bind("text", "example", **long)
    except TypeError as error:
        raise ValueError(f"must be callable as {short}(text, example), but is "
                         f"{short}{signature}: {error}") from None
    return functools.partial(checked, function, bool(long))


def checked(function, long, text, length, example):
    """function(text, example), with length=length if it is long, which must be a finite number or
    None."""
    value = function(text, example, **{"length": length} if long else {})
    if value is None or (isinstance(value, numbers.Real) and isfinite(value)):
        return value if value is None else float(value)
    raise ValueError(f"gave {value!r:.80}; must be a finite number or None")
