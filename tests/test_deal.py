"""deal.py, chapter two: who learns what, and that nothing is lost or learnt twice."""

from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoint import make_checkpoint

import deal
import parallel
from data import Processor
from example import Example
from rollout import as_rollout


def dealt(costs):
    """What each process has after deal.moves(costs)."""
    found = [dict(enumerate(own)) for own in costs]
    for source, i, target in deal.moves(costs):
        assert source != target
        found[target][source, i] = found[source].pop(i)
    return [list(own.values()) for own in found]


def test_a_patch_costs_two_fifths_of_a_token():
    prompt = SimpleNamespace(ids=range(100), patches=range(50))
    assert deal.cost(prompt, 30) == 100 + 30 + 20


def test_items_are_dealt_out_in_rounds_the_largest_first():
    """9, 8 are the first round, 5, 4 the second, in which who has less gets more; 1 is left."""
    assert [sorted(own) for own in dealt([[1, 9, 5], [8, 4]])] == [[1, 4, 9], [5, 8]]
    assert deal.moves([[10], [1]]) == []
    assert deal.moves([[3, 3], [3, 3]]) == []


def test_dealing_evens_out_and_loses_nothing():
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        costs = [torch.randint(100, 900, (n,), generator=rng).tolist() for n in (4, 4, 3, 5)]
        found, every = dealt(costs), sorted(sum(costs, []))  # noqa: RUF017
        assert sorted(sum(found, [])) == every  # noqa: RUF017
        assert {len(own) for own in found} == {4}
        # Processes that wait for each other at every item: rounds of the largest, the next, …
        rounds = sum(max(each) for each in zip(*(sorted(own, reverse=True) for own in found)))
        assert rounds == sum(every[::-1][::4])
        loads = [sum(own) for own in found]
        assert max(loads) - min(loads) <= max(every) - min(every)


def test_every_row_is_in_one_part_and_parts_are_alike():
    assert deal.parts([1] * 16, 4) == [list(range(i, i + 4)) for i in (0, 4, 8, 12)]
    assert [len(rows) for rows in deal.parts([1] * 7, 3)] == [2, 2, 3]
    assert deal.parts([1] * 3, 8) == [[0, 1, 2]]


def test_parts_keep_to_a_budget_but_for_a_row_that_is_larger_by_itself():
    assert deal.parts([9, 4, 3, 3, 2, 1], 8, 7) == [[0], [1, 2], [3, 4, 5]]
    assert deal.parts([2, 2, 2, 2], 2, 100) == [[0, 1], [2, 3]]


def test_micro_batches_keep_to_a_budget_of_tokens_patches_and_prompts(rollout):
    costs = [deal.cost(p, int(n)) for p, n in zip(rollout.prompts, rollout.lengths.sum(1))]
    weights, adv = torch.rand(rollout.mask.shape), torch.ones(3, 2)

    def sizes(budget):
        found = deal.micro_batches(rollout, adv, rollout.mask, weights, 3, budget)
        return [len(m.rollout.prompts) for m in found]

    assert sizes(None) == sizes(int(sum(costs)) + 1) == [3] and sizes(1) == [1, 1, 1]
    assert sizes(int(sum(costs[:2])) + 1) == [2, 1]


def test_processes_agree_on_the_number_of_parts(monkeypatch):
    """5 rows here and 2 there, one at a time: five parts on both, three of them empty there."""
    monkeypatch.setattr(parallel, "gathered", lambda n: [5, 2])
    assert [len(rows) for rows in deal.parts([1] * 5, 1)] == [1] * 5
    assert [rows for rows in deal.parts([1] * 2, 1) if rows] == [[0], [1]]
    assert len(deal.parts([1] * 2, 1)) == 5
    assert deal.parts([3, 3], 8, 4) == [[0], [1], [], [], []]


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """Three prompts without pictures, two completions each."""
    processor = Processor.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))
    prompts = [processor.prompt(Example(f"How many? {'x' * i}", "1")) for i in range(3)]
    return as_rollout(prompts, [[[5, 6, 7], [8]], [[9], [5, 5]], [[6], [7]]])


def test_an_empty_micro_batch_runs_a_few_tokens_that_count_for_nothing(monkeypatch, rollout):
    monkeypatch.setattr(parallel, "gathered", lambda n: [n, 5] if type(n) is int else [n])
    weights = torch.rand(rollout.mask.shape)
    micros = deal.micro_batches(rollout, torch.ones(3, 2), rollout.mask, weights, 1, None)
    assert len(micros) == 5
    real = [m for m in micros if m.counted.any()]
    assert [m.rollout.prompts[0].text for m in real] == [p.text for p in rollout.prompts]
    for b, m in enumerate(real):
        assert torch.equal(m.rollout.ids[0], rollout.ids[b]) and m.adv.shape == (1, 2, 1)
        assert torch.equal(m.weights[0], weights[b]) and torch.equal(m.mask[0], rollout.mask[b])
        assert torch.equal(m.counted[0], rollout.mask[b])
    for m in (m for m in micros if not m.counted.any()):
        assert len(m.rollout.prompts) == 1 and not m.weights.any() and not m.mask.any()
        assert len(m.rollout.prompts[0].ids) == 4 and m.rollout.lengths.tolist() == [[1, 1]]


def test_minibatches_take_turns_at_the_prompts_of_a_step(rollout):
    """The prompts 0 and 2, and 1; with their advantages."""
    adv = torch.arange(6.0).view(3, 2)
    found, even = deal.deal_out(rollout, adv, minibatches=2)
    assert [[p.text for p in part.prompts] for part, _ in found] == [
        [rollout.prompts[i].text for i in rows] for rows in ((0, 2), (1,))
    ]  # fmt: skip
    for (part, own), rows in zip(found, ([0, 2], [1])):
        assert torch.equal(own, adv[rows]) and torch.equal(part.ids, rollout.ids[rows])
    ((whole, same),), even = deal.deal_out(rollout, adv)
    assert whole is rollout and same is adv and even == 1


def test_groups_and_join_are_inverse(rollout):
    groups = rollout.groups()
    assert [len(g.prompts) for g in groups] == [1, 1, 1]
    again = type(rollout).join(groups[::-1], "cpu")
    assert torch.equal(again.ids, rollout.ids.flip(0)) and again.texts == rollout.texts[::-1]
    assert torch.equal(again.lengths, rollout.lengths.flip(0))
    assert torch.equal(again.finished, rollout.finished.flip(0))


def test_a_blank_picture_is_read_by_no_token(rollout):
    first, *rest = deal.with_picture(rollout.prompts)
    assert first.grid.tolist() == [[1, 2, 2]] and first.patches.shape[0] == 4
    assert not first.patches.any() and len(first.image_at) == 0
    assert rest == rollout.prompts[1:] and len(rollout.prompts[0].grid) == 0
    assert deal.with_picture([first, *rest]) == [first, *rest]
