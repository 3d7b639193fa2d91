"""Tally: the rewards of a step as a table, their advantages, what a step's samples say in numbers.

Letters: R reward functions, B prompts, G completions per prompt.
"""

import math

import torch
from torch import Tensor

import parallel
import worker
from deal import MicroBatch
from estimators import adora_weights, group_advantages, in_band, moments, penalized, whiten
from grading import score_all
from rollout import Rollout


def reward_table(rollout: Rollout, rewards: list) -> Tensor:
    """Rewards (R, B, G) of R functions, NaN for None; each text meets its own prompt's example."""
    texts = [text for row in rollout.texts for text in row]
    examples = [p.example for p, row in zip(rollout.prompts, rollout.texts) for _ in row]
    lengths = rollout.lengths.flatten().tolist()
    values = [[math.nan if v is None else v for v in row]
              for row in score_all(rewards, texts, examples, lengths)]  # fmt: skip
    return torch.tensor(values, dtype=torch.float32).view(len(rewards), *rollout.lengths.shape)


def total_reward(table: Tensor, rewards: list) -> Tensor:
    """Weighted sum (B, G) over the functions; NaN where none of them gave a reward."""
    weights = torch.tensor([w for _, _, w in rewards])[:, None, None]
    return (table * weights).nansum(0).masked_fill(table.isnan().all(0), math.nan)


def has_signal(reward: Tensor) -> Tensor:
    """(B,) True where the rewards (B, G) of a group are not all equal."""
    return reward.nan_to_num(math.inf).amin(1) < reward.nan_to_num(-math.inf).amax(1)


def learnable(table: Tensor, rewards: list, cfg) -> Tensor:
    """total_reward (B, G), NaN in groups whose first reward is on average not in cfg.least_right
    ... cfg.most_right."""
    outside = ~in_band(table[0], cfg.least_right, cfg.most_right)
    return total_reward(table, rewards).masked_fill(outside[:, None], math.nan)


def advantages(rollout: Rollout, table: Tensor, rewards: list, cfg) -> Tensor:
    """A_i (B, G); NaN of completions that do not train, as `learnable` has no reward of them."""
    lengths, finished = rollout.lengths.cpu(), rollout.finished.cpu()
    weights = adora_weights(table[0], lengths, finished, cfg.adora)
    return weights * group_advantages(learnable(table, rewards, cfg), cfg.advantage)


def token_advantages(micros: list[MicroBatch], cfg) -> None:
    """Turns the advantages of completions (B', G, 1) into those that train: less the KL, where it
    is in the reward (B', G, T); whitened over the tokens of a step, those of all processes."""
    for m in micros:
        if m.ref is not None and cfg.kl == "reward":
            m.adv = penalized(m.adv, m.rollout.logp, m.ref, m.mask, cfg.beta)
    if cfg.advantage == "baseline":
        found = parallel.total(sum(moments(m.adv, m.mask) for m in micros))
        for m in micros:
            m.adv = whiten(m.adv, found)


def step_metrics(rollout: Rollout, table: Tensor, rewards: list, cfg) -> dict:
    """What the samples of all processes say; shares are over completions, no_signal and out_of_band
    over groups. reward_killed and reward_failed are over completions and functions, since
    worker.counted()."""
    mine = (table.transpose(0, 1), rollout.lengths.cpu().float(), rollout.finished.cpu())
    everyone = parallel.gathered((*mine, worker.counted()))
    table, lengths, finished = (torch.cat(x) for x in list(zip(*everyone))[:3])
    table = table.transpose(0, 1)  # (R, B, G)
    reward = total_reward(table, rewards)
    found = {"reward": float(reward.nanmean())}
    names = [name for name, _, _ in rewards]
    found |= {f"reward/{name}": float(t.nanmean()) for name, t in zip(names, table)}
    if {"accuracy", "format"} <= set(names):
        right, form = (table[names.index(k)] for k in ("accuracy", "format"))
        found["format_only"] = float(((form == 1) & (right == 0)).float().mean())
    return found | {
        "reward_std": float(reward.std(1).nanmean()),
        "no_signal": float((~has_signal(reward)).float().mean()),
        "out_of_band": float((~in_band(table[0], cfg.least_right, cfg.most_right)).float().mean()),
        "no_reward": float(reward.isnan().float().mean()),
        "reward_killed": sum(counts["killed"] for *_, counts in everyone) / table.numel(),
        "reward_failed": sum(counts["failed"] for *_, counts in everyone) / table.numel(),
        "length/mean": float(lengths.mean()),
        "length/min": float(lengths.min()),
        "length/max": float(lengths.max()),
        "truncated": float((~finished).float().mean()),
    }
