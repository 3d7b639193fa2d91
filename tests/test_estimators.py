"""estimators.py, chapter two: every formula on numbers done by hand.

Letters as there: B prompts, G completions per prompt, T completion tokens.
"""

import math

import pytest
import torch
from tensors import close, column
from torch import Tensor

from estimators import (
    adora_weights,
    clipped,
    clipped_loss,
    group_advantages,
    importance_ratio,
    in_band,
    k3,
    moments,
    penalized,
    to_go,
    token_weights,
    whiten,
)

NAN = math.nan
KINDS = ["group", "center", "loo", "baseline"]


# -------------------------------------------------------------------------------------- advantages


def test_advantage_is_the_distance_from_the_mean_in_standard_deviations():
    """A_i = (r_i - mean) / (std + 1e-4). Of 1, 2, 3, 6: mean 3, unbiased variance (4+1+0+9)/3."""
    std = math.sqrt(14 / 3)
    found = group_advantages(column([1, 2, 3, 6]))
    assert close(found, [[x / (std + 1e-4) for x in (-2, -1, 0, 3)]])


def test_the_standard_deviation_is_the_unbiased_one():
    """Of 0, 1 it is sqrt(1/2), not 1/2: the advantages are -+ 0.707, not -+ 1."""
    assert close(group_advantages(column([0, 1])), [[-math.sqrt(0.5), math.sqrt(0.5)]], 2e-4)


def test_1e_4_is_added_to_the_standard_deviation():
    """Rewards 0 and 0.0002: std 0.0001414, so A = 0.0001 / 0.0002414 = 0.414, not 0.707."""
    found = group_advantages(column([0, 2e-4]))
    assert close(found, [[-0.41421, 0.41421]], 1e-4)
    assert close(group_advantages(column([0, 2e-4]), eps=0.0), [[-0.70711, 0.70711]], 1e-4)


def test_center_does_not_divide():
    """Dr. GRPO: A_i = r_i - mean."""
    assert close(group_advantages(column([1, 2, 3, 6]), "center"), [[-2, -1, 0, 3]])


def test_loo_compares_with_the_mean_of_the_others():
    """RLOO: A_i = r_i - mean_{j != i} r_j. For 1 of 1, 2, 3, 6: 1 - 11/3."""
    found = group_advantages(column([1, 2, 3, 6]), "loo")
    assert close(found, [[1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3]])


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_has_a_baseline_of_its_own(kind):
    first, second = column([1, 2, 3, 6]), column([0, 0, 8, 0])
    both = group_advantages(torch.cat((first, second)), kind)
    assert close(both, torch.cat((group_advantages(first, kind), group_advantages(second, kind))))
    assert not close(both[:1], both[1:].tolist(), 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_zero_advantage(kind):
    assert close(group_advantages(column([1, 1, 1], [0.25, 0.25, 0.25], [0, 0, 0]), kind),
                 torch.zeros(3, 3).tolist())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group", [-1 / (math.sqrt(2) + 1e-4), NAN, 1 / (math.sqrt(2) + 1e-4), NAN]),
        ("center", [-1, NAN, 1, NAN]),
        ("baseline", [-1, NAN, 1, NAN]),
        ("loo", [-2, NAN, 2, NAN]),
    ],
)
def test_a_completion_without_reward_is_out_of_the_baseline_and_has_no_advantage(kind, expected):
    """1, NaN, 3, NaN is the group 1, 3: mean 2, unbiased std sqrt(2)."""
    assert close(group_advantages(column([1, NAN, 3, NAN]), kind), [expected])


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_is_alone_in_its_group_gives_zero(kind):
    """There is nothing to compare with, and no division by 0."""
    found = group_advantages(column([NAN, 5, NAN], [NAN, NAN, NAN]), kind)
    assert close(found, [[NAN, 0, NAN], [NAN, NAN, NAN]])


def test_advantages_leave_the_rewards_as_they_were():
    rewards = column([1, NAN, 3])
    group_advantages(rewards)
    assert close(rewards, [[1, NAN, 3]])


def test_loo_and_baseline_are_one_when_whitened():
    """RLOO's advantages are G / (G - 1) times r - mean, and whitening takes every factor away: what
    MM-Eureka calls RLOO, whitened as OpenRLHF does, is REINFORCE++-baseline."""
    rewards, mask = column([1, 2, 3, 6], [0, 0, 8, 0]), torch.ones(2, 4, 5, dtype=torch.bool)
    loo, baseline = (group_advantages(rewards, kind)[..., None] for kind in ("loo", "baseline"))
    assert close(loo, (baseline * 4 / 3).tolist())
    found = [whiten(adv, moments(adv, mask)) for adv in (loo, baseline)]
    assert close(found[0], found[1].tolist()) and found[0].abs().max() > 1


# ----------------------------------------------------------------- how hard a group is; its weight


def test_a_group_outside_of_the_band_is_too_hard_or_too_easy():
    """Means 0, 1/4, 3/4, 1; the bounds belong to the band."""
    right = column([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1])
    assert in_band(right, 0.1, 0.9).tolist() == [False, True, True, False]
    assert in_band(right, 0.25, 0.75).tolist() == [False, True, True, False]
    assert in_band(right, 0.3, 1.0).tolist() == [False, False, True, True]
    assert in_band(right, 0.0, 0.7).tolist() == [True, True, False, False]


def test_0_and_1_bound_nothing_whatever_a_reward_gives():
    assert in_band(column([-3, -1], [7, 9], [0, 0], [1, 1]), 0.0, 1.0).all()


def test_the_band_is_of_the_completions_that_have_the_reward():
    """1, 0, NaN: 1/2. A group of which nothing is known is not left out."""
    assert in_band(column([1, 0, NAN], [1, NAN, NAN], [NAN] * 3), 0.1, 0.9).tolist() == [
        True, False, True
    ]  # fmt: skip


ADORA = [  # rewards, lengths, which ended, weight: 0.1 where the longest right is no longer
    ([1, 1, 0, 0], [5, 3, 4, 8], [1, 1, 1, 1], 0.1),  # 5 of (4 + 8) / 2
    ([1, 1, 0, 0], [6, 3, 4, 8], [1, 1, 1, 1], 0.1),  # 6 of 6: no longer
    ([1, 1, 0, 0], [7, 3, 4, 8], [1, 1, 1, 1], 1.0),
    ([1, 1, 0, 0], [5, 3, 4, 8], [1, 1, 1, 0], 1.0),  # the wrong one of 8 was cut off: 5 of 4
    ([1, 1, 0, 0], [5, 3, 8, 8], [1, 1, 0, 0], 0.1),  # no wrong one ended
    ([0, 0, 0, 0], [5, 3, 4, 8], [1, 1, 1, 1], 1.0),  # none is right
    ([1, 1, 1, 1], [5, 3, 4, 8], [1, 1, 1, 1], 0.1),
    ([0.6, NAN, 0.5, NAN], [5, 90, 6, 1], [1, 1, 1, 1], 0.1),  # right is above 0.5; NaN is neither
]


@pytest.mark.parametrize(("right", "lengths", "finished", "weight"), ADORA)
def test_adora_weighs_a_group_by_the_lengths_of_its_right_and_wrong(
    right, lengths, finished, weight
):
    found = adora_weights(column(right), torch.tensor([lengths]), torch.tensor([finished]) > 0, 0.1)
    assert close(found, [[weight]])


def test_adora_by_a_loop_over_groups():
    """As MM-Eureka's weight_func says it, where 4094 stands for a length that was cut off."""
    gen = torch.Generator().manual_seed(0)
    right = torch.randint(0, 2, (200, 4), generator=gen).float()
    lengths = torch.randint(1, 9, (200, 4), generator=gen)
    expected = []
    for r, n in zip(right, lengths):
        good, bad = n[r > 0.5].tolist(), n[(r <= 0.5) & (n < 8)].tolist()
        longest, mean = max(good, default=-math.inf), sum(bad) / len(bad) if bad else math.inf
        expected.append([1.0 if longest > mean or not good else 0.1])
    assert close(adora_weights(right, lengths, lengths < 8, 0.1), expected)
    assert {x for (x,) in expected} == {0.1, 1.0}


# ------------------------------------------------------------------------ the advantage of a token


TWO = torch.tensor([[[True, True, True], [True, False, False]]])  # (1, 2, 3)


def test_to_go_sums_from_this_token_to_the_last():
    x = torch.tensor([[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]])
    assert close(to_go(x, TWO), [[[7, 6, 4], [8, 0, 0]]])


def test_the_kl_in_the_reward_is_taken_from_the_tokens_before_it():
    """A_t = A - 0.5 sum_{s >= t} (logp_s - ref_s): 2 - 0.5 (0.2 - 0.4 + 0.6), ...; -1 - 0.5 0.2."""
    logp = torch.tensor([[[-1.0, -1.0, -1.0], [-2.0, 9.0, 9.0]]])
    ref = torch.tensor([[[-1.2, -0.6, -1.6], [-2.2, 0.0, 0.0]]])
    found = penalized(torch.tensor([[[2.0], [-1.0]]]), logp, ref, TWO, beta=0.5)
    assert close(found[TWO], [1.8, 1.9, 1.7, -1.1])


def test_the_kl_in_the_reward_has_no_part_where_policy_and_reference_are_one():
    logp = torch.randn(1, 2, 3)
    found = penalized(torch.tensor([[[2.0], [-1.0]]]), logp, logp, TWO, beta=0.5)
    assert close(found, [[[2, 2, 2], [-1, -1, -1]]])


def test_whitened_advantages_have_mean_0_and_deviation_1_over_tokens():
    """3, 3, 3 and -1: mean 2, variance (1 + 1 + 1 + 9) / 4 = 3, the biased one. A completion counts
    as often as it has tokens."""
    adv = torch.tensor([[[3.0], [-1.0]]])
    found = moments(adv, TWO)
    assert found.tolist() == [4, 8, 28] and found.dtype == torch.float64
    assert close(whiten(adv, found), [[[1 / math.sqrt(3)], [-3 / math.sqrt(3)]]])
    each = adv.expand(1, 2, 3).clone()  # what is not in the mask counts for nothing
    each[~TWO] = 99
    assert torch.equal(moments(each, TWO), found)
    white = whiten(each, found)[TWO]
    assert close(torch.stack([white.mean(), white.std(correction=0)]), [0, 1])


def test_moments_of_parts_add_up():
    adv, mask = torch.randn(4, 2, 3), torch.rand(4, 2, 3) > 0.5
    parts = sum(moments(a, m) for a, m in zip(adv.split(1), mask.split(1)))
    torch.testing.assert_close(parts, moments(adv, mask))


def test_whitening_what_is_equal_or_empty_gives_zero():
    """The variance is at least 1e-8: equal advantages are 0 after it, not 0 / 0."""
    adv = torch.full((1, 2, 1), 0.7)
    assert close(whiten(adv, moments(adv, TWO)), [[[0], [0]]])
    assert whiten(torch.zeros(1, 2, 1), moments(adv, ~TWO & TWO)).tolist() == [[[0], [0]]]


# ----------------------------------------------------------------------------- ratio, clip, KL


LOGP = torch.tensor([[[0.3, -0.2, 0.5], [0.1, 9.0, 9.0]]])  # (1, 2, 3)
OLD = torch.tensor([[[0.1, 0.0, 0.2], [0.3, 0.0, 0.0]]])
MASK = torch.tensor([[[True, True, True], [True, False, False]]])


def test_the_ratio_of_a_token_is_pi_over_pi_old():
    """r_t = exp(logp_t - old_t); 1 where there is no token."""
    found = importance_ratio(LOGP, OLD, MASK, "token")
    expected = [[[math.exp(0.2), math.exp(-0.2), math.exp(0.3)], [math.exp(-0.2), 1, 1]]]
    assert close(found, expected)


def test_the_ratio_of_a_sequence_is_the_geometric_mean():
    """GSPO: r = exp(1/|o| sum_t (logp_t - old_t)); masked tokens are neither summed nor counted."""
    found = importance_ratio(LOGP, OLD, MASK, "sequence")
    assert close(found, [[[math.exp((0.2 - 0.2 + 0.3) / 3)], [math.exp(-0.2)]]])


def test_the_ratio_of_an_empty_sequence_is_one():
    none = torch.zeros_like(MASK)
    assert close(importance_ratio(LOGP, OLD, none, "sequence"), [[[1.0], [1.0]]])


# ratio, advantage, -min(r A, clip(r, 0.8, 1.3) A), its derivative by r
CLIP = [
    (1.0, 2.0, -2.0, -2.0),
    (1.2, 2.0, -2.4, -2.0),  # above 1.2 with clip_high 0.3: still inside
    (1.5, 2.0, -2.6, 0.0),  # 1.3 * 2: better than wanted already, no gradient
    (0.5, 2.0, -1.0, -2.0),  # a good one that got rare: not clipped
    (1.0, -2.0, 2.0, 2.0),
    (0.5, -2.0, 1.6, 0.0),  # 0.8 * 2: rare enough already, no gradient
    (1.5, -2.0, 3.0, 2.0),  # a bad one that got frequent: not clipped
    (0.75, -2.0, 1.6, 0.0),
    (0.85, -2.0, 1.7, 2.0),
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "adv", "loss", "slope"), CLIP)
def test_the_clipped_loss_by_hand(ratio, adv, loss, slope):
    """-min(r A, clip(r, 1 - 0.2, 1 + 0.3) A): the gradient is 0 exactly where the clip binds."""
    r = torch.tensor([[[ratio]]], requires_grad=True)
    found = clipped_loss(r, torch.tensor([[[adv]]]), clip_low=0.2, clip_high=0.3)
    (gradient,) = torch.autograd.grad(found.sum(), r)
    assert (found.item(), gradient.item()) == pytest.approx((loss, slope))


def test_one_advantage_serves_all_tokens_of_its_completion():
    ratio = torch.ones(2, 2, 3)
    adv = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[..., None]
    expected = [[[-1.0] * 3, [-2.0] * 3], [[-3.0] * 3, [-4.0] * 3]]
    assert close(clipped_loss(ratio, adv, 0.2, 0.2), expected)
    assert close(clipped_loss(ratio[..., :1], adv, 0.2, 0.2), [[[-1], [-2]], [[-3], [-4]]])


def test_the_ratio_is_at_most_its_cap():
    """MM-Eureka 2: min(exp(logp - old), 3)."""
    logp = torch.tensor([[[0.0, math.log(2), math.log(4)]]])
    found = importance_ratio(logp, torch.zeros(1, 1, 3), logp < 9, "token", cap=3.0)
    assert close(found, [[[1, 2, 3]]])
    found = importance_ratio(logp, torch.zeros(1, 1, 3), logp < 9, "sequence", cap=1.5)
    assert close(found, [[[1.5]]])


def test_beyond_the_cap_a_bad_token_has_no_gradient():
    """-min(min(r, 3) A, clip(r, 0.8, 1.2) A) for A = -2: 2 r up to r = 3, then 6; at A = 2 the clip
    binds before, and the cap changes nothing."""
    logp = torch.tensor([[[math.log(2.5), math.log(3.5)]]], requires_grad=True)
    ratio = importance_ratio(logp, torch.zeros(1, 1, 2), logp < 9, "token", cap=3.0)
    loss = clipped_loss(ratio, torch.tensor([[[-2.0]]]), 0.2, 0.2)
    assert close(loss, [[[5, 6]]])
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert close(gradient, [[[5, 0]]])
    good = clipped_loss(ratio.detach(), torch.tensor([[[2.0]]]), 0.2, 0.2)
    assert close(good, [[[-2.4, -2.4]]])


@pytest.mark.parametrize("cap", [None, 3.0])
def test_clipped_says_where_the_loss_has_no_gradient(cap):
    """Of all ratios and both signs; where the advantage is 0 nothing is clipped."""
    x = torch.linspace(-2, 2, 41)[None, None].expand(3, 1, 41).clone().requires_grad_()
    adv = torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    ratio = importance_ratio(x, torch.zeros_like(x), x < 9, "token", cap)
    (gradient,) = torch.autograd.grad(clipped_loss(ratio, adv, 0.2, 0.3).sum(), x)
    found = clipped(ratio, adv, 0.2, 0.3, cap)
    assert torch.equal(found[:2], gradient[:2] == 0) and not found[2].any()
    assert found[0].any() and found[1, 0, 0] and found[1, 0, -1] == (cap is not None)


def test_k3_by_hand():
    """k3 = ref/pi - log(ref/pi) - 1. For ref/pi = 2: 2 - 0.693 - 1; for 1/2: 0.5 + 0.693 - 1."""
    logp = torch.tensor([math.log(0.2), math.log(0.4), math.log(0.3)])
    ref = torch.tensor([math.log(0.4), math.log(0.2), math.log(0.3)])
    assert close(k3(logp, ref), [1 - math.log(2), math.log(2) - 0.5, 0.0])


def test_k3_is_never_negative():
    logp, ref = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    assert k3(logp, ref).min() >= 0
    assert k3(logp, ref).max() > 1


def test_k3_pulls_towards_the_reference():
    """d k3 / d logp = 1 - ref/pi: 0 at the reference, up (-) where too rare, down (+) where not."""
    logp = torch.tensor([math.log(0.2), math.log(0.4), math.log(0.3)], requires_grad=True)
    ref = torch.tensor([math.log(0.4), math.log(0.2), math.log(0.3)])
    (gradient,) = torch.autograd.grad(k3(logp, ref).sum(), logp)
    assert close(gradient, [1 - 2, 1 - 0.5, 0.0])


def test_k3_is_an_unbiased_estimate_of_the_kl():
    """E_pi[k3] = KL(pi || ref) = 0.5 log(0.5/0.2) + 0.3 log(0.3/0.3) + 0.2 log(0.2/0.5)."""
    pi, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    mean = (pi * k3(pi.log(), ref.log())).sum()
    assert mean.item() == pytest.approx(0.3 * math.log(2.5))


# ---------------------------------------------------------------------------------- token weights

LENGTHS = torch.tensor([[1, 3], [2, 0]])  # B = G = 2; the last is empty or masked
TOKENS = torch.arange(4) < LENGTHS[..., None]  # (2, 2, 4)


def weights_of(mean: str, mask: Tensor = TOKENS) -> list:
    return token_weights(mask, mean, sequences=4, max_new=4).tolist()


def test_sequence_mean_weighs_completions_alike():
    """GRPO: 1 / (|o_i| 4 sequences)."""
    assert weights_of("sequence") == [
        [[1 / 4, 0, 0, 0], pytest.approx([1 / 12, 1 / 12, 1 / 12, 0])],
        [[1 / 8, 1 / 8, 0, 0], [0, 0, 0, 0]],
    ]


def test_token_mean_weighs_tokens_alike():
    """DAPO: 1 / 6 tokens."""
    w = pytest.approx(1 / 6)
    assert weights_of("token") == [[[w, 0, 0, 0], [w, w, w, 0]], [[w, w, 0, 0], [0, 0, 0, 0]]]


def test_constant_mean_weighs_tokens_by_what_could_have_been():
    """Dr. GRPO: 1 / (4 sequences x 4 tokens at most)."""
    w = 1 / 16
    assert weights_of("constant") == [[[w, 0, 0, 0], [w, w, w, 0]], [[w, w, 0, 0], [0, 0, 0, 0]]]


@pytest.mark.parametrize(
    ("mean", "total"), [("sequence", 3 / 4), ("token", 1.0), ("constant", 6 / 16)]
)
def test_weights_sum_to_what_the_mean_says(mean, total):
    """A masked completion stays in the denominator of sequence and constant, not of token."""
    assert token_weights(TOKENS, mean, 4, 4).sum().item() == pytest.approx(total)


def test_the_token_mean_is_over_the_tokens_of_all_processes():
    """6 tokens here, 12 in all."""
    found = token_weights(TOKENS, "token", 8, 4, tokens=torch.tensor(12))
    assert found.sum().item() == pytest.approx(1 / 2)


@pytest.mark.parametrize("mean", ["sequence", "token", "constant"])
def test_nothing_to_learn_from_gives_zero_weights(mean):
    assert weights_of(mean, torch.zeros_like(TOKENS)) == torch.zeros(2, 2, 4).tolist()
