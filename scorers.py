"""Scorers of an evaluation: an answer and its example in, right or wrong out; and sums over them.

    scorer = load_scorer("count")          # geoqa, rec, detect, or any reward as in `rewards`
    found = rescore("results.json", scorer)                 # a saved results file, ours or R1-V's

`count` and `geoqa` are R1-V's rules (src/eval/test_qwen2vl_counting_superclevr.py and
test_qwen2vl_geoqa.py), so that its numbers can be compared. They look at less, or at more, than
the answer that a text commits to: `geoqa` takes the last number of the whole text, so it finds 40
in "… = 40. </think><answer>50</answer>". `rec` and `detect` are about boxes, see boxscores.py; any
reward is a scorer, too: right where it gives 1. The interval is Wilson's, 95 % (Wilson 1927,
"Probable inference, the law of succession, and statistical inference").
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from boxes import View
from boxscores import box_summary, detect, marked, rec
from config import nearest
from example import Example
from grading import KNOWN, fitting, load_rewards, score_all
from rewards import final_answer, format, gold_answer, plain
from verify import judge

# Reward (None: no verdict), the answer in the text, and, if any, what else the row gets, a dict.
Scored = tuple[float | None, str | int | list | None] | tuple[float | None, list | None, dict]
Scorer = Callable[..., Scored]  # of a text and its example
# Numbers beside accuracy, and what they are called. score: the mean reward.
NUMBERS = {"score": "Score", "iou": "Mean IoU", "giou": "Mean GIoU", "ap": "AP", "ap50": "AP@.5",
           "precision": "Precision", "recall": "Recall"}  # fmt: skip
COUNT = re.compile(r"<answer>\s*(\d+)\s*</answer>")


def count(text: str, example: Example) -> Scored:
    """R1-V on SuperCLEVR: the first answer that is a whole number, equal to the gold as a number.
    Of more than 40 digits it is no count."""
    match = COUNT.search(text)
    if match is None or len(match[1]) > 40:
        return 0.0, None
    number = int(match[1])
    return float(str(number) == plain(gold_answer(example.solution))), number


def geoqa(text: str, example: Example) -> Scored:
    """R1-V on GeoQA: math-verify's verdict on the whole text, see verify.judge. None if it had to
    be killed; R1-V's own limit of 5 s makes that a wrong answer, and so does `summary`."""
    verdict = judge(text, gold_answer(example.solution))
    return (None, None) if verdict is None else (float(verdict[0]), verdict[1])


TOLD = ("iou", "giou", "matched", "boxes", "gold_boxes")  # of a row, by scorers of boxes
SCORERS = {scorer.__name__: scorer for scorer in (count, geoqa, rec, detect)}


class Reward:
    """A reward as a scorer: its answer is that of final_answer. length: of the text, in tokens."""

    def __init__(self, name: str):
        self.loaded = load_rewards((name,))

    def __call__(self, text: str, example: Example, length: int | None = None) -> Scored:
        [[value]] = score_all(self.loaded, [text], [example], [length])
        return value, final_answer(text)


def load_scorer(name: str) -> Scorer:
    """The scorer of that name: of SCORERS, or a reward, as in the key `rewards`. ValueError for an
    unknown one."""
    if name in SCORERS:
        return SCORERS[name]
    known, word = [*SCORERS, *KNOWN], name.partition("(")[0].strip()
    if word not in known and ":" not in name:
        raise ValueError(f"scorer {name}: unknown{nearest(word, known)} (known are "
                         f"{', '.join(known)}, and your own as path/to/file.py:function)")
    return Reward(name)


def answerable(scorer: Scorer, examples, bad_rows: str = "refuse"):
    """The examples whose gold answer the scorer can read: grading.fitting, ValueError as told."""
    asks = {rec: "iou", detect: "detection"}.get(scorer)
    loaded = scorer.loaded if isinstance(scorer, Reward) else load_rewards((asks,)) if asks else []
    return fitting(loaded, examples, bad_rows)


def score_row(text: str, example: Example, scorer: Scorer, length: int | None = None) -> dict:
    """A row of the results: R1-V's fields, and the rewards accuracy (the scorer's) and format; what
    else the scorer tells; and boxes, said and true, with the view that their frames need."""
    words = (text, example, length) if isinstance(scorer, Reward) else (text, example)
    (reward, answer, *more), (asked, [said]) = scorer(*words), marked([text], example)
    return {
        "ground_truth": gold_answer(example.solution),
        "model_output": text,
        "extracted_answer": answer,
        "is_correct": reward == 1,
        "accuracy": reward,
        "format": format(text, example),
        **dict(*more),
        **asked,
        **said,
    }


def summary(results: list[dict]) -> dict:
    """Shares in [0, 1] over scored rows: accuracy with its interval low, high; format; unparsable,
    which are wrong; parsed, the accuracy among the others (None if there are none). Beside them
    score, the mean reward (0 for none), and what else the scorer has of NUMBERS; the mean length in
    tokens (None where the rows tell none) and in characters; n, correct."""
    n = len(results)
    right = sum(r["accuracy"] == 1 for r in results)
    parsed = [r for r in results if r["extracted_answer"] is not None]
    lengths = [r["length"] for r in results if r.get("length") is not None]
    low, high = wilson(right, n)
    return {
        "accuracy": right / n,
        "low": low,
        "high": high,
        "score": sum(r["accuracy"] or 0.0 for r in results) / n,
        **box_summary(results),
        "format": sum(r["format"] == 1 for r in results) / n,
        "unparsable": (n - len(parsed)) / n,
        "parsed": sum(r["accuracy"] == 1 for r in parsed) / len(parsed) if parsed else None,
        "length": sum(lengths) / len(lengths) if lengths else None,
        "characters": sum(len(r["model_output"]) for r in results) / n,
        "n": n,
        "correct": right,
    }


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of k in n > 0: Wilson's, which stays inside [0, 1]."""
    p, z2 = k / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def further(found: dict) -> dict:
    """Those of NUMBERS that a summary has and that accuracy does not say already."""
    there = {key: found[key] for key in NUMBERS if found.get(key) is not None}
    return {k: v for k, v in there.items() if k != "score" or v != found.get("accuracy")}


def evaluated(sets: dict) -> dict:
    """Summaries by name of the set as metrics: eval/NAME, the accuracy, and eval/NAME/NUMBER."""
    found = {f"eval/{name}": each.get("accuracy") for name, each in sets.items()}
    return found | {f"eval/{name}/{key}": value for name, each in sets.items()
                    for key, value in further(each).items()}  # fmt: skip


def told(found: dict) -> str:
    """A summary in a line."""
    parsed = "none" if found["parsed"] is None else f"{found['parsed']:.3f}"
    length = "" if found["length"] is None else f"{found['length']:.1f} tokens, "
    more = "".join(f"{NUMBERS[key]} {value:.3f}, " for key, value in further(found).items())
    return (f"accuracy {found['accuracy']:.3f} ({found['low']:.3f} to {found['high']:.3f}, "
            f"n = {found['n']}), {more}unparsable {found['unparsable']:.3f}, accuracy of the "
            f"parsed {parsed}, format {found['format']:.3f}, {length}{found['characters']:.0f} "
            "characters")  # fmt: skip


# ------------------------------------------------------------------------------ saved results


def rescore(path: str, scorer: Scorer, bad_rows: str = "refuse") -> dict:
    """A saved results file, scored anew: {**summary, "results": [...]}. Each row keeps what else
    it had, but for what another scorer told. ValueError, naming file and row, for what is none, and
    for gold answers that the scorer cannot read, unless bad_rows is skip."""
    rows, results = read_results(path), []
    fit = {id(e) for e in answerable(scorer, [example for example, _, _ in rows], bad_rows)}
    rows = [row for row in rows if id(row[0]) in fit]
    for example, text, row in tqdm(rows, "rescore", unit="answer", leave=False):
        row = {key: value for key, value in row.items() if key not in TOLD}
        results.append({**row, **score_row(text, example, scorer, row.get("length"))})
    return {**summary(results), "results": results}


def check_results(out: str, head: dict) -> None:
    """ValueError where `out` is there, unless it is a results file with all of `head` in it: those
    of the same evaluation may be replaced."""
    if not Path(out).exists():
        return
    try:
        there = json.loads(Path(out).read_bytes())
    except (ValueError, RecursionError):
        there = None
    held = there if isinstance(there, dict) else {}
    if other := [key for key in head if key not in held or held[key] != head[key]]:
        raise ValueError(f"--out {out}: holds the results of another evaluation; remove it or give "
                         f"another --out (not the same: {', '.join(other)})")


def read_results(path: str) -> list[tuple[Example, str, dict]]:
    """(example, model's text, the row as it was) of {"results": [{"ground_truth", "model_output",
    ...}]}. R1-V's logs: the gold may be a number, the text a list of one."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a results file, no JSON: {error}") from error
    rows = found.get("results") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{path}: not a results file: no {{"results": [...]}} with a row in it')
    return [read_result(row, f"{path}: result {n}") for n, row in enumerate(rows, 1)]


def read_result(row, place: str) -> tuple[Example, str, dict]:
    """One of them. ValueError opening with its place."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: not a JSON object")
    text, gold, asked = (row.get(key) for key in ("model_output", "ground_truth", "question"))
    text = text[0] if isinstance(text, list) and len(text) == 1 else text
    if not isinstance(text, str):
        raise ValueError(f"{place}: no model_output: a text is expected, or a list of one")
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise ValueError(f"{place}: no ground_truth: a text or a number is expected")
    asked = asked if isinstance(asked, dict) else {"problem": asked}
    problem, task = str(asked.get("problem") or asked.get("question")), str(asked.get("task") or "")
    try:
        view = row.get("view") and View(**row["view"])
        view = view and replace(view, sizes=tuple(map(tuple, view.sizes)))
        at = asked.get("box_image")  # of how many images: as many as are known of
        images = ("",) * (len(view.sizes) if view else 1 + at if at in range(999) else 1)
        return Example(problem, str(gold), images, task, str(asked.get("row") or ""), asked,
                       view or None), text, row  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: a view or a question that is none ({error})") from error
