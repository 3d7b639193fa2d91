"""Verifiable rewards: completion text and example in, number out.

    rewards = load_rewards(("accuracy", "format"), (1.0, 0.5))      # [(name, function, weight)]
    total = sum(weight * function(text, example) for name, function, weight in rewards)

A reward is `f(text, example) -> float | None` (None: no signal, the completion is left out).
`text` is the completion alone, never the prompt; `example.solution` is the gold answer.
The rewards below give 0.0 or 1.0 for any text whatever and never raise. They read the text with
str.find and the like, so their time is linear in its length: the patterns of peers backtrack, and
a policy soon emits what makes them take seconds.

`accuracy` and `format` are ours, `r1v_*` are R1-V's rules (src/r1-v/src/open_r1/grpo.py), kept to
the letter so that its runs can be repeated; R1-V also asks math-verify first, which is not here.

What a policy tries, and what it gets from `accuracy` and `format`:
  an empty answer, a blank one, an unclosed one        both 0
  "3 or 4", "1, 2, 3", "A or B or C" in one answer     accuracy 0: the whole must equal the gold
  several answers, one after another or nested         both 0: one answer after the last </think>
  the candidates listed in the thoughts                nothing: only text after </think> is read
  several thoughts, to move the last </think>          format 0, and the one answer left counts
  an empty thought, tags in the wrong order or twice   format 0
  100,000 digits, NUL, lone surrogates                 a text like any other; no int(), no eval
What these rules cannot see: a thought of one full stop has format 1, and a guess may be right.
"""
import functools
import importlib.util
import inspect
import math
import numbers
import re
import sys
from pathlib import Path

from config import nearest

# The tag words, here and nowhere else: prompt, reward and evaluation import them.
THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")

# Whole number or decimal, thousands in groups or not. [0-9]: \d also takes other scripts' digits.
NUMBER = re.compile(r"([+\-−]?)(?=\.?[0-9])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?")
LONGEST_NUMBER = 40                                     # characters; a longer one is a word
CHOICE = re.compile(r"\(?[a-z]\)")                      # (b) and b); "b." has lost its full stop
BRIDGE = re.compile(rf"{THINK[1]}\s*{ANSWER[0]}")       # linear: every attempt starts at a "<"


def accuracy(text, example):
    """1 if the one answer after the last </think> equals the gold (see same), else 0."""
    answer = final_answer(text)
    return float(answer is not None and same(answer, gold_answer(example.solution)))


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
    """R1-V: 1 if the first answer of text equals the first answer of the solution, as strings;
    where there is no answer tag the whole text, stripped, stands for it."""
    return float(r1v_answer(text) == r1v_answer(example.solution))


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
    the last </think> (in a text without </think>: anywhere). None if it is blank or unclosed, or
    if either answer tag appears there more than once: several answers are no answer."""
    after = text[text.rfind(THINK[1]) + len(THINK[1]):] if THINK[1] in text else text
    if after.count(ANSWER[0]) != 1 or after.count(ANSWER[1]) != 1:
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


def r1v_answer(text):
    """re.search("<answer>(.*?)</answer>", text).group(1).strip(), else text.strip(). Without DOTALL
    an answer cannot cross a newline: the first line that holds a whole one has it."""
    for line in text.split("\n"):
        inside, closed, _ = line.partition(ANSWER[0])[2].partition(ANSWER[1])
        if closed:
            return inside.strip()
    return text.strip()


# ---- the rewards of a run ----

REWARDS = {reward.__name__: reward for reward in (accuracy, format, r1v_accuracy, r1v_format)}


def load_rewards(names, weights=()):
    """[(name, function, weight)] for names as in the config: one of REWARDS, or one's own as
    "path/to/file.py:function" (its name is then the function's). Weights default to 1 each.

    ValueError if a name is unknown or given twice, a file or function is missing, a function
    cannot be called as f(text, example), or weights are not as many as rewards. The file is run
    with the rights of this process; an error in it is shown as it is.
    """
    if not names:
        raise ValueError(f"rewards: none given; known are {', '.join(REWARDS)}")
    if weights and len(weights) != len(names):
        raise ValueError(f"reward weights: {len(weights)} for {len(names)} rewards "
                         f"({', '.join(names)}); give one each, or none for 1 each")
    loaded = {}
    for name, weight in zip(names, weights or [1.0] * len(names)):
        short, function = (name, REWARDS[name]) if name in REWARDS else load_own(name)
        if short in loaded:
            raise ValueError(f"reward {name}: a reward called {short} is there already; "
                             "name each once, or rename the function")
        loaded[short] = (short, function, float(weight))
    return list(loaded.values())


def load_own(name):
    """(name of the function, function) of "path/to/file.py:function"."""
    file, colon, short = name.rpartition(":")
    if not colon:
        raise ValueError(f"reward {name}: unknown{nearest(name, REWARDS)} (known are "
                         f"{', '.join(REWARDS)}, and your own as path/to/file.py:function)")
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"reward {name}: no Python file at {path}")
    spec = importlib.util.spec_from_file_location(f"reward file {path}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, short, None)
    if not callable(function):
        own = [key for key in vars(module) if callable(vars(module)[key])]
        raise ValueError(f"reward {name}: no function {short} in {path}{nearest(short, own)}")
    try:
        inspect.signature(function).bind("text", "example")
    except TypeError as error:
        raise ValueError(f"reward {name}: must be callable as {short}(text, example), but is "
                         f"{short}{inspect.signature(function)}: {error}") from None
    return short, functools.partial(checked, name, function)


def checked(name, function, text, example):
    """function(text, example), which must be a finite number or None."""
    value = function(text, example)
    if value is None or (isinstance(value, numbers.Real) and math.isfinite(value)):
        return value if value is None else float(value)
    raise ValueError(f"reward {name}: gave {value!r:.80}; must be a finite number or None")
