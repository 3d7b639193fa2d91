"""Whether two answers are equal in mathematics: math-verify, in processes that can be killed.

    verify("… <answer> 0.5 </answer>", r"\\frac{1}{2}")    # True, False, or None: no verdict

math-verify (github.com/huggingface/Math-Verify, whose verdict R1-V's reward asks first) finds the
last formula or number of each text and compares the two with sympy. A policy finds what makes that
take for ever: `5^(5^(5^5))` is one call into C, which no alarm of Python interrupts, and the alarms
that math-verify sets itself work in the main thread only. So it runs without them in processes of
its own (worker.py), which are started at the first questions, import sympy and no torch, and are
killed and replaced when a question takes longer than SECONDS or needs more than MEMORY.
"""
import functools
import logging

from worker import Pool

SECONDS = 3.0                   # wall clock for one question; a usual one takes milliseconds
MEMORY = 2**30                  # bytes; the imports take a tenth of it
LONGEST = 10_000                # characters; of a longer text the end is read, where answers stand
JUDGE = Pool("math-verify", "verify", (), SECONDS, MEMORY)


def verify(text: str, gold: str, latex: bool = False) -> bool | None:
    """Whether math-verify takes the last formula or number of text for that of gold. None is no
    verdict: it was killed after SECONDS, or died. latex: only formulas in $…$ and the like count,
    which a text of one formula wants: of $2\\sqrt{3} m!$ it could else take the 2."""
    return verify_all([(text, gold, latex)])[0]


def verify_all(questions: list[tuple[str, str, bool]]) -> list[bool | None]:
    """verify(text, gold, latex) of each, several at a time."""
    return [found and found[0] for found in judge_all(questions)]


def judge(text: str, gold: str, latex: bool = False) -> tuple[bool, str | None] | None:
    """(what verify says, the answer that math-verify found in text or None), or None: no verdict.

    The order is R1-V's, verify(parse(text), parse(gold)), though math-verify asks for the gold
    first; it matters in equations only.
    """
    return judge_all([(text, gold, latex)])[0]


def judge_all(questions: list[tuple[str, str, bool]]) -> list[tuple[bool, str | None] | None]:
    """judge(text, gold, latex) of each, several at a time."""
    replies = JUDGE.ask([(text[-LONGEST:], gold[-LONGEST:], latex)
                         for text, gold, latex in questions])
    return [tuple(reply["value"]) if reply and "value" in reply else None for reply in replies]


# ---- in the process ----

def prepare():
    """compare, with all that it needs imported and built."""
    try:
        import math_verify
    except ImportError as error:
        raise ValueError(f"does not load ({error}); pip install math-verify") from None
    logging.disable()                                   # of what it could not parse
    compare(math_verify, r"$\frac{\sqrt{2}}{2}$", "1/2", False)         # builds its tables
    return functools.partial(compare, math_verify)


def compare(math_verify, text: str, gold: str, latex: bool) -> tuple[bool, str | None]:
    """judge, here and now. math-verify takes an error of its own for "not equal"."""
    only = {"extraction_config": [math_verify.LatexExtractionConfig()]} if latex else {}
    found, wanted = (math_verify.parse(x, parsing_timeout=None, **only) for x in (text, gold))
    equal = bool(math_verify.verify(found, wanted, timeout_seconds=None))
    return equal, str(found[0]) if found else None
