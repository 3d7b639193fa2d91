"""Estimators: the algorithm's formulae as pure functions of tensors, which grpo.py puts together.

Sources: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), equations 3 and 4. Beside it: DAPO
(token mean, asymmetric clip; 2503.14476), Dr. GRPO (constant denominator; 2503.20783), GSPO
(sequence ratio; 2507.18071), RLOO (2402.14740).

What the papers leave open, and our choice: the group's standard deviation is the unbiased one and
1e-4 is added to it (as R1-V does through TRL); denominators are those of the whole optimizer step.

Letters: B prompts, G completions per prompt, T completion tokens. logp, old, ref (B, G, T):
log-probs of the sampled tokens by the policy that trains, that sampled, and the reference.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, kind: str = "group", eps: float = 1e-4) -> Tensor:
    """Advantages (B, G) of rewards (B, G) against their own group; NaN is 'no reward'.

    group: (r_i - mean) / (std + eps), std unbiased: DeepSeekMath, section 4.1.2.
    center: r_i - mean: Dr. GRPO. loo: r_i - mean of the others: RLOO.
    A completion without a reward is left out of its group's baseline and gets advantage 0.
    """
    n = (~rewards.isnan()).sum(1, keepdim=True)  # (B, 1)
    centred = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num(0.0)
    if kind == "group":
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        return centred / (std + eps)
    return centred * (n / (n - 1).clamp(min=1)) if kind == "loo" else centred


def importance_ratio(logp: Tensor, old: Tensor, mask: Tensor, kind: str = "token") -> Tensor:
    """pi / pi_old (B, G, T) per token; sequence: their geometric mean (B, G, 1) (GSPO, eq. 7)."""
    log_ratio = (logp - old) * mask
    if kind == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def clipped_loss(ratio: Tensor, adv: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), (B, G, T); adv (B, G, 1).

    DeepSeekMath, equation 3, its first term; the two bounds are DAPO's.
    """
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)


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
