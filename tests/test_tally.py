"""tally.py, chapter two: the table of rewards, and what a step's samples say, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from tensors import column
from tiny_checkpoint import make_checkpoint
from torch import Tensor

import worker
from data import Processor
from example import Example
from grading import load_rewards
from grpo import Config
from rollout import Rollout, as_rollout
from tally import (
    advantages,
    has_signal,
    learnable,
    reward_table,
    step_metrics,
    total_reward,
)

NAN = math.nan


def close(found: Tensor, expected) -> bool:
    return torch.allclose(found, torch.as_tensor(expected, dtype=found.dtype), equal_nan=True)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def words(text: str, example: Example) -> float:
    """1 if the text is the example's solution."""
    return float(text == example.solution)


def length(text: str, example: Example) -> float | None:
    """Characters; None for no text, so that there is a completion without reward."""
    return float(len(text)) or None


def texts_only(texts: list[list[str]], solutions: list[str], processor) -> Rollout:
    prompts = [processor.prompt(Example("What?", s)) for s in solutions]
    out = as_rollout(prompts, [[[1]] * len(row) for row in texts])
    return replace(out, texts=texts)


def test_each_text_meets_the_example_of_its_own_prompt(processor):
    """Rewards (R, B, G). Were the solutions shifted or repeated block-wise, row 2 would be 1, 0."""
    rollout = texts_only([["a", "b", "a"], ["b", "a", "b"]], ["a", "b"], processor)
    table = reward_table(rollout, [("words", words, 1.0), ("length", length, 1.0)])
    assert table.tolist() == [[[1, 0, 1], [1, 0, 1]], [[1, 1, 1], [1, 1, 1]]]


def test_a_reward_is_told_how_long_its_own_completion_is(processor):
    """In tokens: rows of 1 and 2, and of 3 and 1."""
    prompts = [processor.prompt(Example("What?", s)) for s in "ab"]
    rollout = as_rollout(prompts, [[[1], [1, 2]], [[1, 2, 3], [1]]])
    table = reward_table(rollout, load_rewards(("length(per=1)",)))
    assert table.tolist() == [[[1, 2], [3, 1]]]


def test_no_reward_is_nan_in_the_table(processor):
    rollout = texts_only([["abc", ""]], ["a"], processor)
    table = reward_table(rollout, [("words", words, 1.0), ("length", length, 1.0)])
    assert close(table, [[[0, 0]], [[3, NAN]]])


def test_total_reward_is_the_weighted_sum_of_the_rewards_there_are():
    """2 a + 0.5 b; b alone where a is missing; NaN, not 0, where both are."""
    table = torch.tensor([[[1.0, NAN, NAN, 3.0]], [[4.0, 4.0, NAN, NAN]]])
    rewards = [("a", words, 2.0), ("b", length, 0.5)]
    assert close(total_reward(table, rewards), [[4.0, 2.0, NAN, 6.0]])


def test_a_group_has_signal_if_two_of_its_rewards_differ():
    rewards = column([1, 1, 1], [1, 0, 1], [NAN, 2, 2], [NAN, 2, 3], [NAN, NAN, 5], [NAN] * 3)
    assert has_signal(rewards).tolist() == [False, True, False, True, False, False]


def test_step_metrics_by_hand(processor):
    rollout = texts_only([["a"] * 3, ["b"] * 3], ["a", "b"], processor)
    rollout.lengths = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rollout.finished = torch.tensor([[True, True, True], [True, True, False]])
    names = [("accuracy", None, 1.0), ("format", None, 0.5)]
    table = column([[1, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 1]])
    worker.counted()  # whatever other tests have left
    found = step_metrics(rollout, table, names, Config())
    # rewards 1.5, 0.5, 0 and 0.5, 0.5, 0.5: std of the first sqrt((0.694 + 0.028 + 0.444) / 2)
    assert found == pytest.approx({
        "reward": 3.5 / 6, "reward/accuracy": 1 / 6, "reward/format": 5 / 6,
        "reward_std": (math.sqrt(7 / 12) + 0) / 2, "no_signal": 1 / 2, "no_reward": 0,
        "out_of_band": 0,
        "reward_killed": 0, "reward_failed": 0,
        "format_only": 4 / 6, "length/mean": 3.5, "length/min": 1, "length/max": 6,
        "truncated": 1 / 6,
    })  # fmt: skip


BAND = Config(least_right=0.25, most_right=0.75)


def test_what_is_learnt_is_the_reward_of_groups_in_the_band(processor):
    """By the first reward alone: its means are 0, 1/2 and 1, though the second tells all apart."""
    table = column([[0, 0], [1, 0], [1, 1]], [[0, 1], [0, 1], [0, 1]])
    names = [("a", words, 1.0), ("b", length, 0.5)]
    assert close(learnable(table, names, BAND), [[NAN, NAN], [1, 0.5], [NAN, NAN]])
    assert has_signal(learnable(table, names, BAND)).tolist() == [False, True, False]
    assert close(learnable(table, names, Config()), total_reward(table, names))
    rollout = texts_only([["a", "b"]] * 3, ["a"] * 3, processor)
    worker.counted()
    assert step_metrics(rollout, table, names, BAND)["out_of_band"] == pytest.approx(2 / 3)


def test_advantages_are_weighted_by_adora_and_none_where_nothing_is_learnt(processor):
    """Lengths 1 and 2: the right one is the shorter in the first group, the longer in the second;
    the third is too easy, in the fourth one has no reward."""
    rollout = texts_only([["a", "b"]] * 4, ["a"] * 4, processor)
    rollout.lengths = torch.tensor([[1, 2]] * 4)
    table = column([[1, 0], [0, 1], [1, 1], [0.5, NAN]])
    cfg = replace(BAND, adora=0.1, advantage="center", most_right=0.9)
    found = advantages(rollout, table, [("a", words, 1.0)], cfg)
    assert close(found, [[0.05, -0.05], [-0.5, 0.5], [NAN, NAN], [0, NAN]])


def test_step_metrics_leave_out_what_has_no_reward(processor):
    rollout = texts_only([["a"] * 3, ["b"] * 3], ["a", "b"], processor)
    names, table = [("mine", None, 2.0)], column([[1, NAN, 3], [NAN, NAN, NAN]])
    found = step_metrics(rollout, table, names, Config())
    assert (found["reward"], found["reward/mine"]) == (4, 2)
    assert (found["no_reward"], found["no_signal"]) == (pytest.approx(4 / 6), 0.5)
    assert "format_only" not in found
