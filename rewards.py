"""Verifiable rewards: completion text and example in, number out.

    rewards = load_rewards(("accuracy", "format"), (1.0, 0.5))      # [(name, function, weight)]
    total = sum(weight * function(text, example) for name, function, weight in rewards)
    table = score_all(rewards, texts, examples)                     # R lists of N, in parallel

A reward is `f(text, example) -> float | None` (None: no signal, the completion is left out).
`text` is the completion alone, never the prompt; `example.solution` is the gold answer.
The rewards below give 0.0 or 1.0 for any text whatever and never raise. They read the text with
str.find and the like, so their time is linear in its length: the patterns of peers backtrack, and
a policy soon emits what makes them take seconds. Two of them, `math` and `r1v_accuracy`, ask
math-verify where comparing strings does not settle it: in processes of its own that are killed
after 3 s (verify.py), on 10,000 characters at most. What kills one gets None, neither reward nor
punishment: how long sympy takes says nothing about the answer. So do rewards of a user's own: the
trainer never runs that file, processes with a limit of time and of memory do (worker.py).

`accuracy`, `math` and `format` are ours, `r1v_*` are R1-V's (src/r1-v/src/open_r1/grpo.py), kept
to the letter so that its runs can be repeated. Its accuracy can be had without an answer: the last
number of the whole completion counts, thoughts too, and "8" is 8√3 to it.

What a policy tries, and what it gets from `accuracy`, `math` and `format`:
  an empty answer, a blank one, an unclosed one        both 0
  "3 or 4", "1, 2, 3", "A or B or C" in one answer     accuracy 0: the whole must equal the gold;
                                                       math too: these are sets, or products
  several answers, one after another or nested         both 0: one answer after the last </think>
  the candidates listed in the thoughts                nothing: only text after </think> is read
  several thoughts, to move the last </think>          format 0, and the one answer left counts
  an empty thought                                     both 0; without any tag of a thought, as a
                                                       direct answer has none, accuracy counts
  tags in the wrong order or twice                     format 0
  100,000 digits, NUL, lone surrogates                 a text like any other; no int(), no eval
What these rules cannot see: a thought of one full stop has format 1, and a guess may be right.
"""
import functools
import importlib.util
import inspect
import numbers
import re
import sys
from math import isfinite
from pathlib import Path

from config import nearest
from verify import verify_all
from worker import Pool, told

# The tag words, here and nowhere else: prompt, reward and evaluation import them.
THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")

# Whole number or decimal, thousands in groups or not. [0-9]: \d also takes other scripts' digits.
NUMBER = re.compile(r"([+\-−]?)(?=\.?[0-9])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?")
LONGEST_NUMBER = 40                                     # characters; a longer one is a word
LONGEST_FORMULA = 500                                   # characters; a longer answer is no formula
CHOICE = re.compile(r"\(?[a-z]\)")                      # (b) and b); "b." has lost its full stop
ROOT = re.compile(r"√(?:\{([^{}√]*)\}|([0-9]+|[a-z]))")    # √{…}, √3, √x
# A length, an area, ° or what is Chinese (米, 小时) at the end, behind a number: 27cm^{2}, 65π m.
UNIT = re.compile(r"(?<=[0-9})π])\s*(?:°|[\u4e00-\u9fff]+|[cdkm]?m(?:[²³]|\^\{?[23]\}?\^?)?)$")
BRIDGE = re.compile(rf"{THINK[1]}\s*{ANSWER[0]}")       # linear: every attempt starts at a "<"


def accuracy(text, example):
    """1 if the one answer after the last </think> equals the gold (see same), else 0."""
    answer = final_answer(text)
    return float(answer is not None and same(answer, gold_answer(example.solution)))


def math(text, example):
    """1 if the one answer after the last </think> equals the gold: as in accuracy, or as a formula
    to math-verify (0.5 and \\frac{1}{2}, 2√3 and 2\\sqrt{3}, x = 3 and 3), else 0. Units are not
    compared: 140° is 140, 3 cm is 3 m. A gold of letters alone is words (else "felt" would be
    "left", four factors). None if math-verify had to be killed."""
    return score(math, [text], [example])[0]


def ask_math(text, example):
    """The value of `math`, or the question to math-verify that is to settle it."""
    answer, gold = final_answer(text), gold_answer(example.solution)
    if answer is None or not gold:
        return 0.0
    words = gold.isascii() and "".join(gold.split()).isalpha()
    if same(answer, gold) or words or len(answer) > LONGEST_FORMULA:
        return float(same(answer, gold))
    return formula(answer), formula(gold), True


def format(text, example):
    """1 for `<think>…</think> <answer>…</answer>` and nothing else, each tag exactly once, neither
    thought nor answer blank; white space (newlines too) around and between is free. Else 0."""
    text = text.strip()
    thought, _, rest = text.removeprefix(THINK[0]).partition(THINK[1])
    between, _, answer = rest.removesuffix(ANSWER[1]).partition(ANSWER[0])
    return float(text.startswith(THINK[0]) and text.endswith(ANSWER[1])
                 and all(text.count(tag) == 1 for tag in THINK + ANSWER)
                 and not between.strip() and bool(thought.strip()) and bool(answer.strip()))


def r1v_accuracy(text, example):
    """R1-V: 1 if math-verify takes the last formula or number of text for that of the solution, or
    if the first answer of text equals the first of the solution, as strings; where there is no
    answer tag the whole text, stripped, stands for it. The strings are compared first, since that
    costs nothing. None if they differ and math-verify had to be killed (R1-V: 0)."""
    return score(r1v_accuracy, [text], [example])[0]


def ask_r1v(text, example):
    """The value of `r1v_accuracy`, or the question to math-verify that is to settle it."""
    if r1v_answer(text) == r1v_answer(example.solution):
        return 1.0
    return text, example.solution, False


def r1v_format(text, example):
    """R1-V: re.fullmatch("<think>.*?</think>\\s*<answer>.*?</answer>", text, re.DOTALL).

    Such a text starts with <think>, ends with </answer>, and somewhere between the two is a bridge
    from thought to answer. Unlike `format` this takes empty and repeated tags.
    """
    return float(text.startswith(THINK[0]) and text.endswith(ANSWER[1])
                 and BRIDGE.search(text) is not None)


# ---- the answer in a text, and when two answers are the same ----

def final_answer(text):
    """The answer that text commits to, stripped, or None: what stands in <answer>…</answer> after
    the last </think> (in a text without </think>: anywhere). None if it is blank or unclosed, if
    either answer tag appears there more than once (several answers are no answer), or if nothing
    but tags and white space was thought before that </think>."""
    thought, thinks, after = text.rpartition(THINK[1])
    if after.count(ANSWER[0]) != 1 or after.count(ANSWER[1]) != 1:
        return None
    if thinks and not thought.replace(THINK[0], "").replace(THINK[1], "").strip():
        return None
    inside, closed, _ = after.partition(ANSWER[0])[2].partition(ANSWER[1])
    return (inside.strip() or None) if closed else None


def gold_answer(solution):
    """The gold answer: "3" for `<answer> 3 </answer>` and for `3`. Unwrapped once, never raises."""
    text = solution.strip()
    if text.startswith(ANSWER[0]) and text.endswith(ANSWER[1]):
        text = text[len(ANSWER[0]):-len(ANSWER[1])].strip()
    return text


def same(answer, gold):
    """Whether two answers say the same: equal as number, choice or words. A blank gold equals none.

    Numbers by value: 3, 3.0, 03, +3, "3." and 1,000 = 1000; they are compared digit by digit, so
    nothing is rounded. Choices: (B), B), B., B, b. Words: case, runs of white space and one final
    full stop do not matter. "three" is not 3, "3 cm" is not 3, "(B) red" is not B: a verifier that
    guesses what was meant can be talked into more.
    """
    return bool(gold.strip()) and plain(answer) == plain(gold)


def plain(answer):
    """The one spelling that all spellings of an answer share."""
    text = " ".join(answer.split()).casefold()
    text = text.removesuffix(".").rstrip()
    number = NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if number:
        sign, whole, part = number.groups("")
        whole, part = whole.replace(",", "").lstrip("0") or "0", part.rstrip("0")
        value = f"{whole}.{part}" if part else whole
        return value if sign in ("", "+") or value == "0" else f"-{value}"
    return text.strip("()") if CHOICE.fullmatch(text) else text


def formula(answer):
    """An answer as one formula for math-verify, in $…$, without its unit. GeoQA's √{3} (and √3),
    Chinese units and squares of units are what math-verify does not know."""
    text = " ".join(answer.split())
    for mark in ("$", "\\(", "\\)", "\\[", "\\]"):
        text = text.replace(mark, " ")
    text = ROOT.sub(r"\\sqrt{\1\2}", UNIT.sub("", text.strip()))
    return f"${text}$"


def r1v_answer(text):
    """re.search("<answer>(.*?)</answer>", text).group(1).strip(), else text.strip(). Without DOTALL
    an answer cannot cross a newline: the first line that holds a whole one has it."""
    for line in text.split("\n"):
        inside, closed, _ = line.partition(ANSWER[0])[2].partition(ANSWER[1])
        if closed:
            return inside.strip()
    return text.strip()


# ---- the rewards of a run ----

REWARDS = {reward.__name__: reward
           for reward in (accuracy, math, format, r1v_accuracy, r1v_format)}
ASK = {math: ask_math, r1v_accuracy: ask_r1v}           # those that math-verify settles


def load_rewards(names, weights=(), seconds=10.0, memory=4.0):
    """[(name, function, weight)] for names as in the config: one of REWARDS, or one's own as
    "path/to/file.py:function" (its name is then the function's). Weights default to 1 each.

    seconds and memory (in GB) limit a call of one's own. ValueError if a name is unknown or given
    twice, a file, a function or a package is missing, a file fails or hangs while it is loaded, a
    function cannot be called as f(text, example), or weights are not as many as rewards.
    """
    if not names:
        raise ValueError(f"rewards: none given; known are {', '.join(REWARDS)}")
    if weights and len(weights) != len(names):
        raise ValueError(f"reward weights: {len(weights)} for {len(names)} rewards "
                         f"({', '.join(names)}); give one each, or none for 1 each")
    loaded = {}
    if {"math", "r1v_accuracy"} & {*names} and importlib.util.find_spec("math_verify") is None:
        raise ValueError("rewards math and r1v_accuracy need a package: pip install math-verify")
    for name, weight in zip(names, weights or [1.0] * len(names)):
        short = name if name in REWARDS else name.rpartition(":")[2]
        if short in loaded:
            raise ValueError(f"reward {name}: a reward called {short} is there already; "
                             "name each once, or rename the function")
        function = REWARDS[name] if name in REWARDS else Own(name, seconds, memory)
        loaded[short] = (short, function, float(weight))
    return list(loaded.values())


def score_all(rewards, texts, examples):
    """The values (R lists of N numbers or None) of R loaded rewards for N texts, each with its
    example. ValueError if one of a user's own has never yet worked, see Own."""
    return [score(function, texts, examples) for _, function, _ in rewards]


def score(function, texts, examples):
    """One of them. math-verify is asked once about what several texts say, as those of a group
    often do, and about several things at a time."""
    if isinstance(function, Own):
        return function.all(texts, examples)
    found = [ASK.get(function, function)(*row) for row in zip(texts, examples)]
    asked = list(dict.fromkeys(value for value in found if isinstance(value, tuple)))
    settled = dict(zip(asked, verify_all(asked)))
    found = [settled.get(value, value) for value in found]
    return [value if value is None else float(value) for value in found]


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
        file, colon, short = name.rpartition(":")
        if not colon:
            raise ValueError(f"reward {name}: unknown{nearest(name, REWARDS)} (known are "
                             f"{', '.join(REWARDS)}, and your own as path/to/file.py:function)")
        path = Path(file).resolve()
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"reward {name}: no Python file at {path}")
        self.name, self.worked, self.silent = name, False, {"killed", "failed"}
        self.failed = 0                                 # calls in which it raised for all texts
        self.limits = f"{seconds:g} s and {memory:g} GB"
        self.pool = Pool(f"reward {name}", "rewards", (short, str(path), path.read_bytes()),
                         seconds, int(memory * 2**30))
        self.pool.start()

    def __call__(self, text, example):
        return self.all([text], [example])[0]

    def all(self, texts, examples):
        replies = self.pool.ask(list(zip(texts, examples)))
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
    lies beside it can be imported. ValueError where there is no such function f(text, example)."""
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
    try:
        inspect.signature(function).bind("text", "example")
    except TypeError as error:
        raise ValueError(f"must be callable as {short}(text, example), but is "
                         f"{short}{inspect.signature(function)}: {error}") from None
    return functools.partial(checked, function)


def checked(function, text, example):
    """function(text, example), which must be a finite number or None."""
    value = function(text, example)
    if value is None or (isinstance(value, numbers.Real) and isfinite(value)):
        return value if value is None else float(value)
    raise ValueError(f"gave {value!r:.80}; must be a finite number or None")
