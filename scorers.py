"""Scorers of an evaluation: an answer and its example in, right or wrong out; and sums over them.

    scorer = load_scorer("count")          # or geoqa, or any reward by its name or file.py:function
    found = rescore("results.json", scorer)                 # a saved results file, ours or R1-V's

`count` and `geoqa` are R1-V's rules (src/eval/test_qwen2vl_counting_superclevr.py and
test_qwen2vl_geoqa.py), so that its numbers can be compared. They look at less, or at more, than
the answer that a text commits to: `geoqa` takes the last number of the whole text, so it finds 40
in "… = 40. </think><answer>50</answer>". The interval is Wilson's, 95 % (Wilson 1927, "Probable
inference, the law of succession, and statistical inference").
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from config import nearest
from example import Example
from rewards import REWARDS, final_answer, format, gold_answer, load_rewards, plain
from verify import judge

Scored = tuple[float | None, str | int | None]  # reward (None: no verdict), the answer in the text
Scorer = Callable[[str, Example], Scored]
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


SCORERS = {scorer.__name__: scorer for scorer in (count, geoqa)}


def load_scorer(name: str) -> Scorer:
    """The scorer of that name: of SCORERS, or a reward, whose answer is that of final_answer.
    ValueError for an unknown one."""
    if name in SCORERS:
        return SCORERS[name]
    known = [*SCORERS, *REWARDS]
    if name not in known and ":" not in name:
        raise ValueError(f"scorer {name}: unknown{nearest(name, known)} (known are "
                         f"{', '.join(known)}, and your own as path/to/file.py:function)")
    [(_, reward, _)] = load_rewards((name,))
    return lambda text, example: (reward(text, example), final_answer(text))


def score_row(text: str, example: Example, scorer: Scorer) -> dict:
    """A row of the results: R1-V's fields, and the rewards accuracy (the scorer's) and format."""
    reward, answer = scorer(text, example)
    return {
        "ground_truth": gold_answer(example.solution),
        "model_output": text,
        "extracted_answer": answer,
        "is_correct": reward == 1,
        "accuracy": reward,
        "format": format(text, example),
    }


def summary(results: list[dict]) -> dict:
    """Shares in [0, 1] over scored rows: accuracy with its interval low, high; format; unparsable,
    which are wrong; parsed, the accuracy among the others (None if there are none). Beside them
    the mean length in tokens (None where the rows tell none) and in characters; n, correct."""
    n = len(results)
    right = sum(r["accuracy"] == 1 for r in results)
    parsed = [r for r in results if r["extracted_answer"] is not None]
    lengths = [r["length"] for r in results if r.get("length") is not None]
    low, high = wilson(right, n)
    return {
        "accuracy": right / n,
        "low": low,
        "high": high,
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


def told(found: dict) -> str:
    """A summary in a line."""
    parsed = "none" if found["parsed"] is None else f"{found['parsed']:.3f}"
    length = "" if found["length"] is None else f"{found['length']:.1f} tokens, "
    return (f"accuracy {found['accuracy']:.3f} ({found['low']:.3f} to {found['high']:.3f}, "
            f"n = {found['n']}), unparsable {found['unparsable']:.3f}, accuracy of the parsed "
            f"{parsed}, format {found['format']:.3f}, {length}{found['characters']:.0f} characters")


# ------------------------------------------------------------------------------ saved results


def rescore(path: str, scorer: Scorer) -> dict:
    """A saved results file, scored anew: {**summary, "results": [...]}. Each row keeps what else
    it had. ValueError, naming file and row, for what is no results file."""
    results = []
    for example, text, row in tqdm(read_results(path), "rescore", unit="answer", leave=False):
        results.append({**row, **score_row(text, example, scorer)})
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
    return Example(problem, str(gold), (), task, str(asked.get("row") or ""), asked), text, row
