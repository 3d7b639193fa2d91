"""How the work of a step is dealt out: to processes by tokens, then to micro-batches.

Prompts and completions of one step differ in length by factors, and processes that share weights
(parallel.py) wait for each other at every block. So after sampling groups are dealt out anew, by
their tokens. Such processes must also run the model equally often, on text and on pictures: they
agree on the number of micro-batches, one that is empty runs a few tokens with weight 0, and where
any process has pictures the others run the vision tower on a blank one.

None of this changes loss or gradient: both are sums over the step, see grpo.update.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

import parallel
from data import Prompt
from rollout import Rollout


def cost(prompt: Prompt, completion: int) -> float:
    """What it takes to learn a prompt with `completion` tokens, in tokens of the decoder. A patch
    counts 0.4: in Qwen2-VL-2B the tower does 1.6 times the work for the 4 of an image token."""
    return len(prompt.ids) + completion + 0.4 * len(prompt.patches)


def balance(items: list, costs: list[float]) -> tuple[list, float]:
    """This process's items after they were dealt out by their costs, the largest first, and how
    even the work is now: mean of the processes' costs over the largest. items: anything picklable.
    """
    if parallel.size() == 1:
        return items, 1.0
    mine = {(parallel.rank(), i): item for i, item in enumerate(items)}
    costs = parallel.gathered(costs)
    loads = [sum(c) for c in costs]
    for source, i, target in moves(costs):
        loads[source] -= costs[source][i]
        loads[target] += costs[source][i]
        if parallel.rank() == source:
            dist.send_object_list([mine.pop((source, i))], target)
        elif parallel.rank() == target:
            got = [None]
            dist.recv_object_list(got, source)
            mine[source, i] = got[0]
    order = sorted(mine, key=lambda at: (-costs[at[0]][at[1]], at))
    return [mine[at] for at in order], sum(loads) / len(loads) / max(1, *loads)


def moves(costs: list[list[float]]) -> list[tuple[int, int, int]]:
    """(from, item, to) of the items that change their process. They are dealt out in rounds, the
    largest first, each round one to every process, and in it the larger to the one that has less:
    so processes have alike in sum, and at any time work on alike."""
    items = sorted(((c, p, i) for p, own in enumerate(costs) for i, c in enumerate(own)),
                   key=lambda item: (-item[0], item[2], item[1]))  # fmt: skip
    loads, found = [0.0] * len(costs), []
    for start in range(0, len(items), len(costs)):
        free = set(range(len(costs)))
        for cost, source, i in items[start : start + len(costs)]:
            target = min(free, key=lambda p: (loads[p], p != source, p))
            free.remove(target)
            loads[target] += cost
            if target != source:
                found.append((source, i, target))
    return found


def parts(costs: list[float], most: int, budget: float = math.inf) -> list[list[int]]:
    """Rows of these costs in parts of at most `most` rows, and of `budget` where more than one row;
    as many parts in every process, of which those that have fewer rows may be empty."""
    n, found, load = len(costs), [[]], 0.0
    for i, cost in enumerate(costs):
        if found[-1] and (len(found[-1]) == most or load + cost > budget):
            found, load = [*found, []], 0.0
        found[-1].append(i)
        load += cost
    count = max(parallel.gathered(len(found)))
    if budget < math.inf:
        return found + [[]] * (count - len(found))
    edges = [n * i // count for i in range(count + 1)]  # alike
    return [list(range(a, b)) for a, b in pairwise(edges)]


def pictured(prompts: list[Prompt]) -> bool:
    """Whether this step's micro-batches all need a picture, since some process has one."""
    if parallel.size() == 1:
        return False
    return any(parallel.gathered(any(len(p.grid) for p in prompts)))


def with_picture(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts; if none has a picture, the first gets a blank one that no token stands for: what
    the vision tower runs on where other processes have pictures, and wait for its gradients."""
    if any(len(p.grid) for p in prompts):
        return prompts
    of = "patches" if prompts[0].states is None else "states"
    like = getattr(prompts[0], of)
    blank = {of: like.new_zeros(4, like.shape[1]), "grid": torch.tensor([[1, 2, 2]])}
    return [replace(prompts[0], **blank), *prompts[1:]]


def few_tokens(p: Prompt) -> Prompt:
    """The first four tokens of a prompt: something to run in a micro-batch that is empty."""
    return replace(p, ids=p.ids[:4], positions=p.positions[:, :4], patches=p.patches[:0],
                   grid=p.grid[:0], image_at=p.image_at[:0],
                   states=None if p.states is None else p.states[:0])  # fmt: skip


def prompts_of_parts(
    prompts: list[Prompt], most: int, costs=(), budget: float = math.inf
) -> list[tuple[list[int], list[Prompt]]]:
    """[(rows, what to run)] of `parts`: the prompts of the rows, or a few tokens where there are
    none; with a blank picture where other processes have one. costs: of the prompts, for a budget.
    """
    pictures, found = pictured(prompts), []
    for rows in parts(costs or [0.0] * len(prompts), most, budget):
        some = [prompts[i] for i in rows] or [few_tokens(prompts[0])]
        found.append((rows, with_picture(some) if pictures else some))
    return found


# ------------------------------------------------------------------------------- groups of GRPO


def deal_out(rollout: Rollout, adv: Tensor, minibatches: int = 1) -> tuple[list, float]:
    """[(rollout, adv (B', G))] for each minibatch: this process's groups of it after `balance`; and
    how even the work is. The i-th prompt of the step is of minibatch i mod minibatches, whichever
    process has sampled for it: each of these has some of all."""
    counts = parallel.gathered(len(rollout.prompts))
    first, found, even = sum(counts[: parallel.rank()]), [], []
    for k in range(minibatches):
        rows = [i for i in range(len(adv)) if (first + i) % minibatches == k]
        if parallel.size() == 1:
            found.append((rollout.select(rows), adv[rows]) if minibatches > 1 else (rollout, adv))
            even.append(1.0)
            continue
        groups = rollout.select(rows).groups()
        costs = [cost(group.prompts[0], int(group.lengths.sum())) for group in groups]
        items, evenness = balance(list(zip(groups, adv[rows].cpu().split(1))), costs)
        groups, advs = zip(*items)
        found.append((Rollout.join(groups, adv.device), torch.cat(advs).to(adv.device)))
        even.append(evenness)
    return found, sum(even) / len(even)


@dataclass
class MicroBatch:
    """B' groups that go through the model together; (B', G, T) where nothing else is said."""

    rollout: Rollout
    adv: Tensor  # advantages (B', G, 1), or of each token
    mask: Tensor  # tokens that train
    weights: Tensor  # of the loss of each token
    counted: Tensor  # tokens that metrics count; none in a group that is there to be run
    ref: Tensor | None = None  # log-probs of the reference
    old: Tensor | None = None  # and of the policy before the first update; None: as it is now


def micro_batches(
    rollout: Rollout, adv, mask, weights, most: int, budget: int | None
) -> list[MicroBatch]:
    """Groups with advantages adv (B, G) in micro-batches of at most `most` prompts, and of `budget`
    tokens as `cost` counts them."""
    found, lengths = [], rollout.lengths.sum(1).tolist()
    costs = [cost(prompt, n) for prompt, n in zip(rollout.prompts, lengths)]
    for rows, prompts in prompts_of_parts(rollout.prompts, most, costs, budget or math.inf):
        at, real = rows or [0], bool(rows)
        part = rollout.select(at)
        part.prompts = prompts
        part.lengths = part.lengths if real else part.lengths.clamp(max=1)
        found.append(MicroBatch(part, adv[at][..., None], mask[at] & real, weights[at] * real,
                                part.mask & real))  # fmt: skip
    return found
