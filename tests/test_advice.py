"""Chapter two of advice.py: when it speaks, how often, and of what."""

import math
import re
from collections import deque
from pathlib import Path

import pytest

import grpo
from advice import STEPS, TROUBLES, advice, begins

GOOD = {"no_signal": 0.2, "truncated": 0.0, "mismatch": 1.0, "entropy": 0.5, "reward_killed": 0.0,
        "no_reward": 0.0, "reward": 1.2, "reward/accuracy": 0.4, "reward/format": 0.8}


def told(*rows, keep=100):
    """What is said at which step, of rows that come one by one."""
    found, latest = {}, deque(maxlen=keep)
    for step, row in enumerate(rows, 1):
        latest.append({"step": step, **GOOD, **row})
        if said := advice(list(latest)):
            found[step] = said
    return found


CUT = {"truncated": 0.6}


def test_nothing_is_said_of_a_run_that_goes_well():
    assert told(*[{}] * 30) == {}


def test_a_trouble_is_told_when_it_has_lasted_five_steps():
    assert list(told(*[CUT] * 4, {}, *[CUT] * 4, {})) == []
    assert list(told({}, *[CUT] * 5)) == [6]
    assert list(told(*[CUT] * 5)) == [5]


def test_it_is_told_once_until_it_has_been_away_for_five_steps():
    assert list(told(*[CUT] * 50, keep=20)) == [5]
    assert list(told(*[CUT] * 7, *[{}] * 4, *[CUT] * 9)) == [5]
    assert list(told(*[CUT] * 7, *[{}] * 5, *[CUT] * 9)) == [5, 17]


def test_it_begins_with_the_last_of_the_steps_only():
    on, off = [True] * STEPS, [False] * STEPS
    assert begins(on) and begins(off + on) and begins([*on, *off, *on])
    assert not (begins([]) or begins(on[1:]) or begins([*on, True]) or begins([*on, False]))


def test_two_troubles_are_told_each_for_itself_and_name_the_step():
    both = {**CUT, "mismatch": 1.05}
    found = told(CUT, CUT, *[both] * 5)
    assert list(found) == [5, 7]
    assert found[5].startswith("step 5, for 5 steps now: more than half of the completions")
    assert found[7].startswith("step 7") and "mismatch" in found[7] and "cut" not in found[7]
    together = told(*[both] * 5)[5]
    assert len(together.splitlines()) == 4 and "cut" in together and "mismatch" in together


@pytest.mark.parametrize(("row", "says"), [
    ({"no_signal": 1.0}, "larger --group"),
    ({"no_signal": 1, "reward/format": 0.0, "reward/accuracy": 0.0}, "sft.py"),
    ({"no_signal": 1.0, "reward/accuracy": 1.0, "reward/format": 1.0}, "too easy"),
    ({"no_signal": 1.0, "no_reward": 1.0, "reward/format": None}, "No reward function gives"),
    ({"truncated": 0.51}, "--max_new"),
    ({"mismatch": 1.021}, "--bf16 false"),
    ({"entropy": 0.019}, "no longer explores"),
    ({"entropy": 0.019, "reward/format": 1.0, "reward/accuracy": 0.94}, "no longer explores"),
    ({"reward_killed": 0.11}, "too long or too much memory"),
])  # fmt: skip
def test_each_trouble_has_what_to_try(row, says):
    (said,) = told(*[row] * 5).values()
    assert says in said and len(said.splitlines()) == 2
    assert all(len(line) < 220 for line in said.splitlines())


@pytest.mark.parametrize("row", [
    {"no_signal": 0.99}, {"truncated": 0.5}, {"mismatch": 1.02}, {"reward_killed": 0.1},
    {"entropy": 0.02}, {"entropy": 0.0, "reward/format": 0.95, "reward/accuracy": 1.0},
])  # fmt: skip
def test_on_the_border_there_is_no_trouble(row):
    assert told(*[row] * 9) == {}


def test_one_good_step_among_five_makes_no_cause_certain():
    some = [{"no_signal": 1.0, "reward/format": float(s == 2), "reward/accuracy": 0.0}
            for s in range(5)]
    assert "larger --group" in told(*some)[5]


def test_a_row_without_the_metrics_or_with_nothing_finite_in_them_is_no_trouble():
    """Of SFT; of a step whose numbers were null or NaN."""
    assert advice([{"step": s, "nll": 2.0} for s in range(9)]) is None
    for nothing in (None, math.nan):
        assert told(*[dict.fromkeys(GOOD, nothing)] * 9) == {}


def test_every_key_that_it_names_is_one_of_a_run():
    """Of a config where it stands after two dashes, else of a row of metrics."""
    text = (Path(__file__).parent.parent / "advice.py").read_text()
    assert set(re.findall(r"--(\w+)", text)) <= set(grpo.Config.__dataclass_fields__)
    assert set(re.findall(r'(?:value\(row, |always\()"([\w/]+)"', text)) == GOOD.keys() - {"reward"}
    assert len({name for name, *_ in TROUBLES}) == len(TROUBLES)
