"""The rewards of a run: loaded by their names, run on many completions at a time.

    rewards = load_rewards(("accuracy", "format"), (1.0, 0.5))      # [(name, function, weight)]
    total = sum(weight * function(text, example) for name, function, weight in rewards)
    table = score_all(rewards, texts, examples, lengths)            # R lists of N, in parallel

A reward is named in a config as it is called: `iou`, `iou(least=0.5)`, `gate(format, iou)`. What
has a name in the brackets is a number, what has none a reward, so they nest; nothing is evaluated.

    all_of(accuracy, format)        the lowest: whether both are 1
    gate(format, detection)         detection where format is 1, else 0
    cosine_length(iou, most=512)    by the length in tokens: short where iou is .7, long where not
    per_row(accu_reward_method)     that which the row's column of this name names, or which stands
    per_row(task, math=math, detection=iou(least=0.5))      for the column's value in the brackets
    gate(format, my_rewards.py:f)   one's own

One's own runs in processes of its own, see own.py. A row of a data set names no file.
"""
import functools
import importlib.util
import inspect
import re
import sys
from math import inf, isfinite, nan

from torch.utils.data import Subset
from tqdm import tqdm

import boxes
import rewards
from config import apart, nearest
from own import Own
from verify import verify_all

REWARDS = {reward.__name__: reward for reward in (
    rewards.accuracy, rewards.math, rewards.format, rewards.r1v_accuracy, rewards.r1v_format,
    rewards.choice, rewards.yes_no, rewards.exact, rewards.number, rewards.fuzzy, rewards.jaccard,
    rewards.repetition, boxes.detection, boxes.weighted, boxes.mean_iou, boxes.confidence,
    boxes.box_format)} | {"iou": boxes.box_iou, "giou": boxes.box_giou}
# Of the values of other rewards: the fewest and the most of these, and those if none is named.
JOINED = {"all_of": (rewards.all_of, 2, 9, ()), "gate": (rewards.gate, 2, 2, ()),
          "cosine_length": (rewards.cosine_length, 1, 1, ("accuracy",)),
          "length": (rewards.length, 0, 0, ())}
KNOWN = (*REWARDS, *JOINED, "per_row")
ASK = {rewards.math: rewards.ask_math, rewards.r1v_accuracy: rewards.ask_r1v}   # math-verify's
RANGES = {"least": (0, 1), "ap": (0, 1), "iou": (0, 1), "strict": (0, 1), "around": (0, 1),
          "thought": (1, inf), "most": (1, inf), "n": (1, 100), "penalty": (0, 9), "per": (-1, 1)}
# VLM-R1's names in a row's accu_reward_method, and ours.
METHODS = {"default": "fuzzy", "mcq": "choice", "all_match": "exact", "rec": "iou",
           "map": "detection(penalty=0)", "od_ap": "detection(penalty=0)",
           "od_ap50": "detection(ap=0.5,penalty=0)", "odLength": "detection",
           "weighted_sum": "weighted"}
LONGEST = 1000                                          # characters of a name


def load_rewards(names, weights=(), seconds=10.0, memory=4.0):
    """[(name, function, weight)] for names as in the config (its text without blanks; for one's
    own, "path/to/file.py:function", the function's name). Weights default to 1 each.

    seconds and memory (in GB) limit a call of one's own. ValueError if a name is unknown or given
    twice, an argument is wrong, a file, a function or a package is missing, a file fails or hangs
    while it is loaded, a function cannot be called as f(text, example), or weights are not as many
    as rewards.
    """
    if not names:
        raise ValueError(f"rewards: none given; known are {', '.join(KNOWN)}")
    if weights and len(weights) != len(names):
        raise ValueError(f"reward weights: {len(weights)} for {len(names)} rewards "
                         f"({', '.join(names)}); give one each, or none for 1 each")
    loaded = {}
    for name, weight in zip(names, weights or [1.0] * len(names)):
        short = name.rpartition(":")[2] if own(name) else spelled(name)
        if short in loaded:
            raise ValueError(f"reward {name}: a reward called {short} is there already; "
                             "name each once, or rename the function")
        loaded[short] = (short, load(name, seconds, memory), float(weight))
    return list(loaded.values())


def own(name):
    """Whether it names a function of a file. All other names with brackets end in one."""
    return ":" in name and not name.rstrip().endswith(")")


def spelled(name):
    """A name without the blanks that say nothing."""
    return re.sub(r"\s*([(),=])\s*", r"\1", name.strip())


def load(name, seconds=10.0, memory=4.0, files=True):
    """The reward of a name: a function (text, example), to be run by `score`. files: whether one's
    own may be in it, which a row may not name. ValueError says what is wrong with the name."""
    if len(name) > LONGEST:
        raise ValueError(f"reward {name:.80}…: longer than {LONGEST} characters")
    if own(name) and files:
        return Own(name.strip(), seconds, memory)
    word, opened, rest = spelled(name).partition("(")
    if opened and not rest.endswith(")"):
        raise ValueError(f"reward {name}: a bracket is open")
    if not files and (own(name) or word == "per_row"):
        raise ValueError("a row names no file and no column of its own")
    if word not in KNOWN:
        raise ValueError(f"reward {word}: unknown{nearest(word, KNOWN)} (known are "
                         f"{', '.join(KNOWN)}, and your own as path/to/file.py:function)")
    parts, options = [], {}
    for item in apart(rest[:-1]):
        key, equals, value = item.partition("=")
        if key in options:
            raise ValueError(f"reward {name}: {key} is given twice")
        if equals and key.isidentifier():
            options[key] = value
        else:
            parts.append(item)
    if word == "per_row":
        if len(parts) != 1:
            raise ValueError(f"reward {name}: per_row takes the name of a column of the rows")
        return PerRow(parts[0], {value: load(options[value], seconds, memory, files)
                                  for value in options})
    function, least, most, default = JOINED.get(word, (REWARDS.get(word), 0, 0, ()))
    if function in ASK and importlib.util.find_spec("math_verify") is None:
        raise ValueError("rewards math and r1v_accuracy need a package: pip install math-verify")
    function = with_options(function, word, options)
    if not least <= len(parts or default) <= most:
        wanted = (f"{least} to {most} rewards" if least < most else
                  f"{most} rewards" if most else "only numbers, by their names")
        raise ValueError(f"reward {name}: in its brackets {word} takes {wanted}"
                         f"{', not ' if parts else ''}{', '.join(parts)}")
    if word in REWARDS:
        return function
    return Joined(function, [load(part, seconds, memory, files) for part in parts or default])


def with_options(function, word, options):
    """The function with its numbers, given as texts."""
    known = [key for key, parameter in inspect.signature(function).parameters.items()
             if parameter.default is not parameter.empty]
    found = {}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"reward {word}: has no argument {key}{nearest(key, known)} (it has "
                             f"{', '.join(known) or 'none'})")
        try:
            found[key] = float(value)
        except ValueError:
            found[key] = nan
        low, high = RANGES[key]
        if not low <= found[key] <= high or not isfinite(found[key]):
            raise ValueError(f"reward {word}: {key}={value}: must be a number from {low} to {high}")
    return functools.partial(function, **found) if found else function


# ---- many at a time ----

def score_all(loaded, texts, examples, lengths=None):
    """The values (R lists of N numbers or None) of R rewards for N texts, each with its example and
    its length in tokens. ValueError if one of a user's own has never yet worked, see Own."""
    return [score(function, texts, examples, lengths) for _, function, _ in loaded]


def score(function, texts, examples, lengths=None):
    """One of them. math-verify is asked once about what several texts say, as those of a group
    often do, and about several things at a time."""
    if isinstance(function, Own | Joined | PerRow):
        return function.all(texts, examples, lengths or [None] * len(texts))
    found = [ASK.get(function, function)(*row) for row in zip(texts, examples)]
    asked = list(dict.fromkeys(value for value in found if isinstance(value, tuple)))
    settled = dict(zip(asked, verify_all(asked)))
    found = [settled.get(value, value) for value in found]
    return [value if value is None else float(value) for value in found]


class Joined:
    """A reward made of the values of others, and of the length if it asks for one. None where one
    of these is None."""

    def __init__(self, function, parts):
        self.function, self.parts = function, parts
        self.long = "length" in inspect.signature(function).parameters

    def __call__(self, text, example, length=None):
        return self.all([text], [example], [length])[0]

    def all(self, texts, examples, lengths):
        columns = [score(part, texts, examples, lengths) for part in self.parts]
        columns += [lengths] * self.long
        return [None if None in row else float(self.function(*row)) for row in zip(*columns)]


class PerRow:
    """The reward that a row's column names: one of those given for its values, a name as in the
    config, no file, or VLM-R1's. Where a row has no such column it is the one given for `default`;
    or `fuzzy`, VLM-R1's, where none is given for any value."""

    def __init__(self, column, given=()):
        self.column, self.known, self.found = column, dict(given), False    # found: some row has it
        self.all_named = bool(given) and "default" not in given

    def __call__(self, text, example, length=None):
        return self.all([text], [example], [length])[0]

    def of(self, example):
        """The reward of a row. ValueError names column and value."""
        name = (getattr(example, "extra", None) or {}).get(self.column)
        self.found |= name is not None
        if name is None and self.all_named:
            raise ValueError(f"it has no column {self.column}, and per_row no default=")
        name = "default" if name is None else str(name)
        if name not in self.known:
            try:
                if name == "llm":
                    raise ValueError("a judge of words is none of the verifiable rewards; name "
                                     "another, fuzzy or exact")
                self.known[name] = load(METHODS.get(name, name), files=False)
            except ValueError as error:
                raise ValueError(f"{self.column} {name!r:.80}: {error}") from None
        return self.known[name]

    def all(self, texts, examples, lengths):
        found, places = [None] * len(texts), {}
        for i, example in enumerate(examples):
            places.setdefault(self.of(example), []).append(i)
        for function, mine in places.items():
            rows = ([column[i] for i in mine] for column in (texts, examples, lengths))
            for i, value in zip(mine, score(function, *rows)):
                found[i] = value
        return found


# ---- whether rows fit the rewards ----

def boxed(most=None):
    """Whether an example has true boxes, at most so many, and the picture that they lie in."""
    def fits(example):
        found, at = boxes.gold_boxes(example), example.extra.get("box_image") or 0
        return (found is not None and (most is None or len(found) <= most)
                and type(at) is int and 0 <= at < len(example.images))
    return fits


NEEDS = {
    rewards.choice: (lambda e: rewards.letter(rewards.gold_answer(e.solution),
                                              rewards.options(e.problem)),
                     "a letter, or the text of one of the question's options"),
    rewards.yes_no: (lambda e: rewards.first_word(rewards.gold_answer(e.solution))
                     in ("yes", "no"), "yes or no"),
    rewards.number: (lambda e: rewards.one_number(rewards.gold_answer(e.solution)), "one number"),
    rewards.jaccard: (lambda e: rewards.labels(rewards.gold_answer(e.solution)),
                      "labels with commas between them"),
    **dict.fromkeys((boxes.box_iou, boxes.box_giou), (
        boxed(1), "[x1, y1, x2, y2], or None, and a picture")),
    **dict.fromkeys((boxes.detection, boxes.weighted, boxes.mean_iou, boxes.confidence), (
        boxed(), '[{"bbox_2d": [x1, y1, x2, y2], "label": "…"}, …], or None, and a picture'))}


def fitting(loaded, examples, bad_rows="refuse"):
    """The examples whose gold answer the loaded rewards can read: with another no text could ever
    have the reward. ValueError says how many are unfit, and the first; bad_rows="skip" leaves them
    out and says so on stderr. Nothing is read if no reward needs it."""
    functions = [function for _, function, _ in loaded if needy(function)]
    found = (next(filter(None, (unfit(f, e) for f in functions)), "")
             for e in tqdm(examples if functions else (), "fit rows", leave=False))
    bad = {i: why for i, why in enumerate(found) if why}
    for function in functions:
        if (absent := columns(function)) and len(bad) < len(examples):
            raise ValueError(f"reward per_row({absent[0]}): no row has such a column"
                             f"{nearest(absent[0], examples[0].extra)} (all rows of a source have "
                             f"one by `data = \"FILE {absent[0]}=default\"`)")
    if not bad:
        return examples
    first = next(iter(bad))
    message = (f"{len(bad)} of {len(examples)} rows do not fit the rewards, the first is "
               f"{examples[first].row}: {bad[first]}")
    return leave_out(examples, bad, message, "mend them", bad_rows)


def leave_out(examples, bad, message, mend, bad_rows):
    """The examples but those of the places in bad, of which stderr is told; ValueError with what
    mends it where bad_rows is refuse, or none would be left."""
    if bad_rows == "refuse" or len(bad) == len(examples):
        raise ValueError(f"{message}; {mend}, or leave them out by --bad_rows skip")
    print(f"{message}; they are left out", file=sys.stderr)
    fits = [i for i in range(len(examples)) if i not in bad]
    return [examples[i] for i in fits] if isinstance(examples, list) else Subset(examples, fits)


def needy(function):
    """Whether a reward asks anything of a row."""
    if isinstance(function, Joined):
        return any(map(needy, function.parts))
    return isinstance(function, PerRow) or getattr(function, "func", function) in NEEDS


def columns(function):
    """Those that it asks for, of which no row was found to have one."""
    if isinstance(function, Joined):
        return [name for part in function.parts for name in columns(part)]
    return [function.column] if isinstance(function, PerRow) and not function.found else []


def unfit(function, example):
    """What is wrong with an example for a reward, or ""."""
    if isinstance(function, Joined):
        return next(filter(None, (unfit(part, example) for part in function.parts)), "")
    if isinstance(function, PerRow):
        try:
            return unfit(function.of(example), example)
        except ValueError as error:
            return str(error)
    fits, wanted = NEEDS.get(getattr(function, "func", function), (None, ""))
    if fits is None or fits(example):
        return ""
    return f"the solution {example.solution!r:.80} is to be {wanted}"
