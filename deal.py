"""How the work of a step is dealt out: to processes by tokens, then to micro-batches.

Prompts and completions of one step differ in length by factors, and all processes wait for the
fullest. So after sampling whole groups move from full processes to empty ones. Processes that share
their weights (parallel.py) must also run the model equally often, on text and on pictures: they
agree on the number of micro-batches, one that is empty repeats a row with weight 0, and where any
process has pictures the others run the vision tower on a blank one.

None of this changes loss or gradient: both are sums over the step, see grpo.token_weights.
"""

import math
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

import parallel
from data import Prompt, with_picture
from rollout import Rollout


def cost(prompt: Prompt, completion: int) -> float:
    """What it takes to learn a prompt with `completion` tokens, in tokens of the decoder. A patch
    counts 0.4: in Qwen2-VL-2B the tower does 1.6 times the work for the 4 of an image token."""
    return len(prompt.ids) + completion + 0.4 * len(prompt.patches)


def balance(items: list, costs: list[float]) -> tuple[list, float]:
    """This process's items after some have moved from full processes to empty ones, and how even
    the work is now: mean of the processes' costs over the largest. items: anything picklable."""
    if parallel.size() == 1:
        return items, 1.0
    costs = parallel.gathered(costs)
    loads, kept, received = [sum(c) for c in costs], dict(enumerate(items)), []
    for source, i, target in moves(costs):
        loads[source] -= costs[source][i]
        loads[target] += costs[source][i]
        if parallel.rank() == source:
            dist.send_object_list([kept.pop(i)], target)
        elif parallel.rank() == target:
            got = [None]
            dist.recv_object_list(got, source)
            received += got
    return [*kept.values(), *received], sum(loads) / len(loads) / max(1, *loads)


def moves(costs: list[list[float]]) -> list[tuple[int, int, int]]:
    """(from, item, to): which items go where to even out the costs of the processes, by few moves.
    The fullest gives the emptiest the item nearest to half their difference, while that helps."""
    loads, found = [sum(c) for c in costs], []
    left = [dict(enumerate(c)) for c in costs]  # an item moves once: what is received stays
    while True:
        high, low = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[high] - loads[low]
        fit = {i: abs(c - gap / 2) for i, c in left[high].items() if 0 < c < gap}
        if not fit or len(left[high]) == 1:
            return found
        best = min(fit, key=fit.get)
        moved = left[high].pop(best)
        loads[high], loads[low] = loads[high] - moved, loads[low] + moved
        found.append((high, best, low))


def parts(n: int, most: int) -> list[list[int]]:
    """Rows 0 ... n - 1 in parts of at most `most`, as many parts in every process; the parts of a
    process that has fewer rows may be empty."""
    count = max(math.ceil(k / most) for k in parallel.gathered(n))
    edges = [n * i // count for i in range(count + 1)]
    return [list(range(a, b)) for a, b in pairwise(edges)]


def pictured(prompts: list[Prompt]) -> bool:
    """Whether this step's micro-batches all need a picture, since some process has one."""
    if parallel.size() == 1:
        return False
    return any(parallel.gathered(any(len(p.grid) for p in prompts)))


# ------------------------------------------------------------------------------- groups of GRPO


def deal_out(rollout: Rollout, adv: Tensor) -> tuple[Rollout, Tensor, float]:
    """This process's groups, with advantages adv (B, G), after `balance`, and its evenness. The
    largest come first, so that processes that wait for each other work on like ones."""
    if parallel.size() == 1:
        return rollout, adv, 1.0

    def cost_of(item):
        group, _ = item
        return cost(group.prompts[0], int(group.lengths.sum()))

    items = list(zip(rollout.groups(), adv.cpu().split(1)))
    items, even = balance(items, [cost_of(item) for item in items])
    groups, advs = zip(*sorted(items, key=cost_of, reverse=True))
    return Rollout.join(groups, adv.device), torch.cat(advs).to(adv.device), even


def micro_batches(rollout: Rollout, adv: Tensor, mask: Tensor, weights: Tensor, most: int) -> list:
    """[(rollout, advantages (B', G, 1), mask, weights, counted (B', G, T))], `most` prompts in each
    at most. counted: the tokens that metrics count; none in a group that is only repeated."""
    pictures, found = pictured(rollout.prompts), []
    for rows in parts(len(rollout.prompts), most):
        at = rows or [0]
        part, real = rollout.select(at), bool(rows)
        part.prompts = with_picture(part.prompts) if pictures else part.prompts
        found.append((part, adv[at][..., None], mask[at], weights[at] * real, part.mask & real))
    return found
