"""verify.py, chapter two: math-verify's verdicts, in bounded time. test_worker.py has the rest.

The oracle is math-verify itself, called in this process with texts that are known to be harmless.
"""

import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import verify
from verify import JUDGE, MEMORY, judge, judge_all, verify_all
from worker import Pool, counted

math_verify = pytest.importorskip("math_verify")  # the oracle

ENDLESS = "5^(5^(5^5))"  # Math-Verify issue 65: one power of integers, inside C


def oracle(text: str, gold: str) -> tuple[bool, str | None]:
    """As R1-V asks: src/r1-v/src/open_r1/grpo.py, src/eval/test_qwen2vl_geoqa.py."""
    found, wanted = math_verify.parse(text), math_verify.parse(gold)
    return math_verify.verify(found, wanted) > 0, str(found[0]) if found else None


# -------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("text, gold, equal, answer", [
    ("so 140", "140°", True, "140"),
    ("the angle is 40.0", "40°", True, "40.0000000000000"),
    (r"that is $\frac{1}{2}$", "0.5", True, "1/2"),
    (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", True, "2*sqrt(3)"),
    ("first 3, then 4", "3", False, "4"),  # the last number counts
    ("<think>= 25. </think><answer>65</answer>", "25", True, "25"),  # R1-V's log: behind a tag
    ("many", "3", False, None),
    ("", "", False, None),
    ("3 \ud800", "3", True, "3"),
])  # fmt: skip
def test_the_verdict_is_that_of_math_verify(text, gold, equal, answer):
    assert judge(text, gold) == (equal, answer) == oracle(text, gold)
    assert verify.verify(text, gold) is equal


def test_random_texts_get_the_verdict_of_math_verify_in_r1v_s_order():
    rng, seen = random.Random(0), set()
    pieces = ["3", "4.0", " ", " = ", "x", "$", r"\frac{1}{2}", "0.5", "<answer>", "</answer>", "%",
              r"\boxed{3}", "so", "°", "answer: ", ",", "\n", "x = 3", "{3, 4}"]  # fmt: skip
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randrange(6)))
        gold = rng.choice(["3", "$x = 3$", "0.5", "140°", "<answer> 3 </answer>", "{3, 4}"])
        assert judge(text, gold) == oracle(text, gold), (text, gold)
        seen.add(oracle(text, gold))
    assert len(seen) > 10 and {equal for equal, _ in seen} == {True, False}


def test_the_text_stands_where_math_verify_asks_for_the_gold():
    """R1-V's order. An inequality equals its interval in one of the two only."""
    a, b = "$1 < x < 2$", "$(1, 2)$"
    assert (judge(a, b)[0], judge(b, a)[0]) == (oracle(a, b)[0], oracle(b, a)[0]) == (True, False)


def test_where_formulas_alone_count_no_number_is_taken_out_of_one():
    assert judge(r"$2\sqrt{3}米$", "$2$")[0] and not judge(r"$2\sqrt{3}米$", "$2$", latex=True)[0]
    assert judge("2", "2", latex=True) == (False, None)
    assert judge(r"$\frac{4}{2}$", "$2$", latex=True) == (True, "2")


def test_of_a_long_text_the_end_is_read():
    assert judge("4 " + "." * verify.LONGEST, "4") == (False, None)
    assert judge("." * verify.LONGEST + " 4", "4") == (True, "4")


# ------------------------------------------------------------------------- what would never end


HOSTILE = [
    ENDLESS, "9**9**9**9", r"$\sqrt{9^{9^{9^9}}}$", "(10^(10^10))!",
    "$" + r"\frac{1}{" * 400 + "2" + "}" * 400 + "$", "$" + "{" * 9000 + "$", "(" * 9000,
    r"$\sqrt" * 3000, "9" * 9999, "1+" * 4999 + "1", r"\boxed{" * 1000 + "3" + "}" * 1000,
    "$x" + "^x" * 2000 + "$", "\0" * 9999, "\ud800" * 9999, r"$\int\sum\prod \lim_{x}$" * 400,
]  # fmt: skip


def test_whatever_is_asked_the_parent_only_waits_and_not_long(monkeypatch):
    monkeypatch.setattr(JUDGE, "seconds", 0.7)
    judge("3", "3")
    start, cpu = time.monotonic(), time.process_time()
    verdicts = verify_all([(text, "3", False) for text in HOSTILE])
    assert time.monotonic() - start < 2 * len(HOSTILE) and time.process_time() - cpu < 0.5
    assert verdicts[0] is None and {*verdicts} <= {None, True, False}
    assert verify_all([("3", "3", False)] * 8) == [True] * 8


def test_what_does_not_end_has_no_verdict_is_counted_and_the_next_question_is_answered():
    assert JUDGE.seconds == verify.SECONDS <= 5
    assert verify.verify("3", "3") is True and counted()
    start = time.monotonic()
    assert verify.verify(ENDLESS, "3") is None and judge("3", "3") == (True, "3")
    assert time.monotonic() - start < verify.SECONDS + 2
    assert counted() == {"killed": 1, "failed": 0}


def test_several_are_judged_at_a_time_and_those_that_do_not_end_stop_no_other(monkeypatch):
    monkeypatch.setattr(JUDGE, "seconds", 0.5)
    asked = [(ENDLESS if i % 3 == 0 else f"so {i}", "4", False) for i in range(9)]
    wanted = [None if i % 3 == 0 else (i == 4, str(i)) for i in range(9)]
    assert judge_all(asked) == wanted
    assert verify_all(asked) == [found and found[0] for found in wanted]
    assert judge_all([]) == []


def test_it_works_in_any_thread():
    """math-verify's own time limit, an alarm, raises outside the main one."""
    found = []
    thread = threading.Thread(target=lambda: found.append(verify.verify("so 3", "3")))
    thread.start()
    thread.join()
    assert found == [True]


def test_an_error_inside_is_no_verdict_and_is_counted():
    counted()
    neither = np.array([True, False])  # `if` refuses it
    assert verify_all([("3", "3", neither), ("3", "3", False)]) == [None, True]
    assert counted() == {"killed": 0, "failed": 1}


def test_its_memory_is_bounded():
    """10^11 bits would be 12 GB: math-verify fails or the process dies, and neither hurts."""
    assert judge("3", "3") == (True, "3")
    limits = Path(f"/proc/{JUDGE.workers[0].process.pid}/limits").read_text().splitlines()
    assert [x.split()[3:5] for x in limits if "data size" in x] == [[str(MEMORY)] * 2]
    assert judge("2^(10^11) + 1", "3") in (None, (False, "2**(10**11) + 1"))
    assert judge("3", "3") == (True, "3")


def test_it_imports_no_torch_and_no_numpy():
    assert judge("3", "3") == (True, "3")
    maps = Path(f"/proc/{JUDGE.workers[0].process.pid}/maps").read_text()
    assert "python" in maps and "torch" not in maps and "numpy" not in maps


def test_a_missing_math_verify_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # importing it now fails
    with pytest.raises(ValueError, match=r"does not load .*pip install math-verify"):
        verify.prepare()


def test_a_pool_of_its_own_has_limits_of_its_own():
    assert Pool("hasty", "verify", (), 0.3, MEMORY, 1).ask([(ENDLESS, "3", False)]) == [None]


def test_verdicts_are_quick():
    """Measured: 1 to 5 ms each; with a start of 0.5 s."""
    judge("3", "3")
    start = time.monotonic()
    for i in range(50):
        judge(f"<think>180.0 - {i} = {180 - i}.0 </think> <answer>{i}</answer>", f"{i}°")
    assert time.monotonic() - start < 2
