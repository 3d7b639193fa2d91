"""Estimators: the algorithm's formulae as pure functions of tensors, which grpo.py puts together.

Sources: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), equations 3 and 4. Beside it: DAPO
(token mean, asymmetric clip; 2503.14476), Dr. GRPO (constant denominator; 2503.20783), GSPO
(sequence ratio; 2507.18071), RLOO (2402.14740), REINFORCE++-baseline (2501.03262) and its KL in the
reward as LMM-R1 has them (2503.07536), MM-Eureka (a band of difficulty, a cap on the ratio, ADORA's
weights; 2503.07365 and its code).

What the papers leave open, and our choice: the group's standard deviation is the unbiased one and
1e-4 is added to it (as R1-V does through TRL); that of whitening is the biased one, at least 1e-4
(as OpenRLHF does); denominators are those of the whole optimizer step.

NaN is "no reward". Such a completion is left out of its group's baseline, has no advantage (NaN),
and does not train.

Letters: B prompts, G completions per prompt, T completion tokens. logp, old, ref (B, G, T):
log-probs of the sampled tokens by the policy that trains, that sampled, and the reference.
"""

import math

import torch
from torch import Tensor

# ------------------------------------------------------------------- advantages, of a completion


def group_advantages(rewards: Tensor, kind: str = "group", eps: float = 1e-4) -> Tensor:
    """Advantages (B, G) of rewards (B, G) against their own group, NaN where there is no reward.

    group: (r_i - mean) / (std + eps), std unbiased: DeepSeekMath, section 4.1.2.
    center, baseline: r_i - mean: Dr. GRPO; REINFORCE++-baseline, which whitens it, see `whiten`.
    loo: r_i - mean of the others: RLOO.
    """
    n = (~rewards.isnan()).sum(1, keepdim=True)  # (B, 1)
    centred = rewards - rewards.nanmean(1, keepdim=True)
    if kind == "group":
        std = (centred.square().nansum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        return centred / (std + eps)
    return centred * (n / (n - 1).clamp(min=1)) if kind == "loo" else centred


def in_band(right: Tensor, least: float, most: float) -> Tensor:
    """(B,) False where the mean of a group's rewards (B, G) is below `least` or above `most`: too
    hard, too easy (MM-Eureka 2: 0.1, 0.9). 0 and 1 bound nothing; nor is a group out of the band
    of which nothing is known (NaN)."""
    mean = right.nanmean(1)
    return ~((mean < least) & (least > 0) | (mean > most) & (most < 1))


def adora_weights(right: Tensor, lengths: Tensor, finished: Tensor, weight: float) -> Tensor:
    """(B, 1): `weight` for a group whose longest right answer is no longer than its wrong ones are
    on average, else 1: ADORA as MM-Eureka 2 has it.

    right (B, G): rewards, above 0.5 is right. lengths (B, G) in tokens; finished (B, G): a wrong
    answer that was cut off does not count. Without a right one 1; with right ones alone `weight`.
    """
    yes, no = right > 0.5, (right <= 0.5) & finished
    longest = lengths.masked_fill(~yes, -1).amax(1, keepdim=True)
    wrong = (lengths * no).sum(1, keepdim=True) / no.sum(1, keepdim=True)  # 0 / 0: NaN
    short = yes.any(1, keepdim=True) & ~(longest > wrong)
    return torch.where(short, weight, 1.0)


# ------------------------------------------------------------------------ advantages, of a token


def to_go(x: Tensor, mask: Tensor) -> Tensor:
    """Sums (B, G, T) of x over the tokens from this one on, those of mask alone."""
    x = x * mask
    return x.flip(-1).cumsum(-1).flip(-1)


def penalized(adv: Tensor, logp: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Tensor:
    """A_t = A - beta sum_{s >= t} (logp_s - ref_s), (B, G, T): the KL in the reward (k1), as each
    token's return has it. adv (B, G, 1); logp is the sampler's: a reward has no gradient."""
    return adv - beta * to_go(logp - ref, mask)


def moments(adv: Tensor, mask: Tensor) -> Tensor:
    """(3,) float64: number of the tokens of mask (B, G, T), sum of their advantages (B, G, 1 or T),
    and of their squares. Those of micro-batches and processes add up."""
    adv = adv.double()
    return torch.stack([(x * mask).sum() for x in (torch.ones_like(adv), adv, adv.square())])


def whiten(adv: Tensor, found: Tensor) -> Tensor:
    """Advantages less their mean, divided by their standard deviation, of the `moments` found;
    REINFORCE++: over the tokens of a whole batch. The variance is at least 1e-8."""
    n = found[0].clamp(min=1)
    mean = found[1] / n
    variance = (found[2] / n - mean.square()).clamp(min=1e-8)
    return ((adv - mean) * variance.rsqrt()).to(adv.dtype)


# ---------------------------------------------------------------------------- the loss of a token


def importance_ratio(
    logp: Tensor, old: Tensor, mask: Tensor, kind: str = "token", cap: float | None = None
) -> Tensor:
    """pi / pi_old (B, G, T) per token; sequence: their geometric mean (B, G, 1) (GSPO, eq. 7). At
    most `cap` (MM-Eureka 2: 3): beyond it a token of negative advantage has no gradient."""
    log_ratio = (logp - old) * mask
    if kind == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio.exp().clamp(max=math.inf if cap is None else cap)


def clipped_loss(ratio: Tensor, adv: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), (B, G, T); adv (B, G, 1 or T).

    DeepSeekMath, equation 3, its first term; the two bounds are DAPO's.
    """
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)


def clipped(ratio: Tensor, adv: Tensor, clip_low: float, clip_high: float, cap=None) -> Tensor:
    """(B, G, 1 or T) True where `clipped_loss` has no gradient since the clip or the cap binds."""
    low = ratio < 1 - clip_low
    low = low if cap is None else low | (ratio >= cap)
    return (ratio > 1 + clip_high) & (adv > 0) | low & (adv < 0)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    """KL(pi || ref) per token, unbiased and never negative: DeepSeekMath, equation 4."""
    return (ref - logp).exp() - (ref - logp) - 1


def token_weights(mask: Tensor, mean: str, sequences: int, max_new: int, tokens=None) -> Tensor:
    """Weights (B, G, T), so that the loss of a step is sum(weights x token loss).

    `sequences` and `tokens` (default: those of mask) are numbers of the whole step, known before
    the first backward. sequence: 1 / (|o_i| sequences), GRPO. token: 1 / tokens, DAPO. constant:
    1 / (sequences max_new), Dr. GRPO.
    """
    if mean == "token":
        return mask / (mask.sum() if tokens is None else tokens).clamp(min=1)
    if mean == "constant":
        return mask / (sequences * max_new)
    return mask / mask.sum(-1, keepdim=True).clamp(min=1) / sequences
