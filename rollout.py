"""Rollout: sampling G completions for each of B prompts, and gathering their log-probs.

What we do differently from Hugging Face's `generate` and from a separate engine such as vLLM:
- The vision tower and the prompt run once per group; all G completions read the same prompt keys
  and values (model.attend_shared).
- One distribution. A token is drawn from softmax(logits / temperature) over all tokens that are not
  banned, and `token_logp`, which the trainer uses, is the log-prob of exactly that distribution.
  Top-p and top-k exist for evaluation only.
- Vision special tokens are banned: a sampled image token would have no image
  (StarsfieldAI/R1-V#180, huggingface/trl#3847).
- Each completion has random numbers of its own, fixed by (seed, its prompt's uid, its place in the
  group). Which prompts share a batch changes nothing.

Letters: B prompts, G completions per prompt, T new tokens, S packed tokens, D width, V vocabulary.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data import Processor, Prompt, collate
from model import Cache, Layout, Qwen2VL

# ------------------------------------------------------------------------------ the distribution


def scaled_logits(hidden: Tensor, head: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """Logits (S, V) of the distribution that is sampled from and trained: float32, but for the
    product itself under bfloat16 autocast.

    hidden (S, D), head (V, D), banned (n,) token ids that get probability 0.
    """
    # A gathered bfloat16 head stays so: as float32 it would be copied for each token sampled.
    low = min(hidden.dtype, head.dtype, key=lambda dtype: dtype.itemsize)
    logits = F.linear(hidden.to(low), head.to(low)).float() / temperature
    return logits.index_fill(-1, banned, -torch.inf)


def token_logp(hidden, head, targets, temperature=1.0, banned=None, chunk=4096):
    """Log-probs and entropies (S,) of `targets` (S,) given the hidden states (S, D) before them.

    The head runs in chunks and is computed again in the backward pass, so that no (S, V) float32
    tensor ever exists for more than `chunk` tokens (V is 151,936 in the real model). Entropies are
    for the metrics and carry no gradient.
    """
    banned = targets.new_empty(0) if banned is None else banned

    def one(h, w, t):
        logp = scaled_logits(h, w, temperature, banned).log_softmax(-1)
        entropy = torch.special.entr(logp.detach().exp()).sum(-1)
        return logp.gather(-1, t[:, None])[:, 0], entropy

    parts = [
        checkpoint(one, h, head, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk))
    ]
    logp, entropy = (torch.cat(x) for x in zip(*parts))
    return logp, entropy


def nucleus(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Logits (N, V) with all but the top k at -inf, then all but the likeliest that hold `top_p`.

    Holtzman et al. 2019, arXiv 1904.09751. 1.0 and 0 change nothing.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        p = ranked.softmax(-1)
        ranked = ranked.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ranked)
    return logits


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Token ids (N,) by inverting the cumulative distribution at uniforms u (N,) in [0, 1)."""
    # float64: a parallel sum in float32 may rise by rounding where the probability is 0.
    total = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)  # beyond only if logits are NaN: the update tells


# -------------------------------------------------------------------------------------- sampling


TENSORS = ("ids", "lengths", "logp", "finished")


@dataclass
class Rollout:
    """B prompts with G completions each. `ids` beyond `lengths` are 0 and mean nothing.

    ids (B, G, T) int64, lengths (B, G) int64 (the end token included), logp (B, G, T) float32 of
    the sampled tokens, finished (B, G) bool (False: cut at max_new), texts B lists of G.
    """

    prompts: list[Prompt]
    ids: Tensor
    lengths: Tensor
    logp: Tensor
    finished: Tensor
    texts: list[list[str]]

    @property
    def mask(self) -> Tensor:
        """(B, G, T) True on the sampled tokens."""
        return torch.arange(self.ids.shape[2], device=self.ids.device) < self.lengths[..., None]

    def select(self, rows: list[int]) -> "Rollout":
        """The rollout of some of its prompts."""
        at = torch.tensor(rows, device=self.ids.device)
        tensors = (x[at] for x in (self.ids, self.lengths, self.logp, self.finished))
        prompts, texts = [self.prompts[i] for i in rows], [self.texts[i] for i in rows]
        return Rollout(prompts, *tensors, texts)

    def groups(self) -> list["Rollout"]:
        """A rollout for each of its prompts, its tensors on the CPU."""
        one = (self.select([b]) for b in range(len(self.prompts)))
        return [replace(r, **{k: getattr(r, k).cpu() for k in TENSORS}) for r in one]

    @classmethod
    def join(cls, parts: list["Rollout"], device) -> "Rollout":
        """The rollout of all their prompts."""
        tensors = [torch.cat([getattr(r, k) for r in parts]).to(device) for k in TENSORS]
        prompts, texts = ([x for r in parts for x in getattr(r, k)] for k in ("prompts", "texts"))
        return cls(prompts, *tensors, texts)

    def replace(self, rows: list[int], fresh: "Rollout") -> "Rollout":
        """A rollout with the prompts at `rows` replaced by those of `fresh`, in order."""
        at, tensors = torch.tensor(rows), [getattr(self, k).clone() for k in TENSORS]
        for x, k in zip(tensors, TENSORS):
            x[at.to(x.device)] = getattr(fresh, k)
        prompts, texts = list(self.prompts), list(self.texts)
        for i, prompt, text in zip(rows, fresh.prompts, fresh.texts):
            prompts[i], texts[i] = prompt, text
        return Rollout(prompts, *tensors, texts)


@torch.no_grad()
def sample(
    model: Qwen2VL,
    processor: Processor,
    prompts: list[Prompt],
    group: int = 1,
    max_new: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    uids: list[int] | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Rollout:
    """Sample `group` completions for each prompt; temperature 0 is greedy.

    uids (B,) name the prompts in the random numbers: a prompt with the same uid, seed and max_new
    gets the same completions in any batch. Default: its place in the list.
    """
    B, device = len(prompts), model.device
    u = torch.stack([uniforms(seed, i, group, max_new) for i in uids or range(B)]).to(device)
    hidden, cache, position = prefill(model, prompts, max_new)
    banned = torch.tensor(processor.banned_ids, device=device)
    stops = torch.tensor(processor.stop_ids, device=device)
    ids = torch.zeros(B, group, max_new, dtype=torch.int64, device=device)
    logp = torch.zeros(B, group, max_new, device=device)
    lengths = torch.full((B, group), max_new, device=device)
    finished = torch.zeros(B, group, dtype=torch.bool, device=device)

    groups = torch.arange(B, device=device)  # (B',) prompts still in the batch
    rows = torch.arange(group, device=device).expand(B, group)  # (B', G') completions still in it
    hidden = hidden[:, None].expand(B, group, -1)
    for t in range(max_new):
        at = (groups[:, None], rows)
        logits = scaled_logits(hidden.flatten(0, 1), model.head, temperature or 1.0, banned)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            token = draw(nucleus(logits, top_p, top_k), u[(*at, t)].flatten())
        logits = logits.log_softmax(-1).gather(-1, token[:, None])
        shape = (len(groups), -1)
        new = ~finished[at]  # finished completions that share a batch with others add nothing
        ids[(*at, t)] = token.view(shape) * new
        logp[(*at, t)] = logits.view(shape) * new
        ended = torch.isin(token, stops).view(shape) & new
        lengths[at] = torch.where(ended, t + 1, lengths[at])
        finished[at] |= ended
        token = token.view(shape)
        if t % 4 == 3:  # asking costs a device a wait, and leaving costs a copy of the cache
            if bool(finished.all()):
                break
            token, groups, rows, position = leave(finished, cache, token, groups, rows, position)
        if t + 1 < max_new:
            hidden = step(model, cache, token, position + t)
    pairs = zip(ids.tolist(), lengths.tolist())
    texts = [[processor.decode(x[:n]) for x, n in zip(*pair)] for pair in pairs]
    return Rollout(prompts, ids, lengths, logp, finished, texts)


def uniforms(seed: int, uid: int, group: int, max_new: int) -> Tensor:
    """Uniforms (G, T) in [0, 1), one for each token that a prompt's completions may have."""
    return torch.from_numpy(np.random.default_rng((seed, uid)).random((group, max_new), "float32"))


def prefill(model: Qwen2VL, prompts: list[Prompt], room: int) -> tuple[Tensor, Cache, Tensor]:
    """Vision tower and prompts, once: last hidden states (B, D), cache, next positions (B,)."""
    batch = collate(prompts).to(model.device)
    cache = Cache(model.cfg.num_hidden_layers, room)
    layout = Layout(batch.lengths, device=model.device)
    hidden = model.run(batch.ids, batch.positions, layout, batch, cache)
    return hidden[layout.prompt_lengths.cumsum(0) - 1], cache, batch.next_position


def step(model: Qwen2VL, cache: Cache, token: Tensor, position: Tensor) -> Tensor:
    """One token (B', G') of every completion at position (B',) -> hidden states (B', G', D)."""
    B, G = token.shape
    layout = Layout([], [[1] * G] * B, device=token.device)
    positions = position.repeat_interleave(G).expand(3, -1)
    return model(token.flatten(), positions, layout, cache=cache).view(B, G, -1)


def leave(finished, cache, token, groups, rows, position):
    """Drop finished completions from the batch when that makes it smaller by a quarter or more.

    The batch stays a (B', G') rectangle: prompts with no completion left go, and of the others the
    unfinished completions come first, G' being the most that any prompt still has.
    """
    live = ~finished[groups[:, None], rows]  # (B', G')
    stay = live.any(1).nonzero()[:, 0]
    width = int(live.sum(1).max())
    if len(stay) * width > 0.75 * live.numel():
        return token, groups, rows, position
    order = live[stay].int().argsort(dim=1, descending=True, stable=True)[:, :width]
    cache.keep(stay, order)
    token, rows = (x[stay].gather(1, order) for x in (token, rows))
    return token, groups[stay], rows, position[stay]


# ------------------------------------------------------------------------------------- log-probs


def score(model: Qwen2VL, rollout: Rollout, temperature=1.0, banned=()) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, G, T) of a rollout's tokens, with gradient; 0 beyond `lengths`.

    One packed forward: each prompt (and its image) once, then its completions, each without its
    last token, which predicts nothing. The head sees only positions that predict a sampled token.
    """
    device = model.device
    batch = collate(rollout.prompts).to(device)
    fed = (rollout.lengths - 1).clamp(min=0).tolist()  # (B, G) completion tokens to run
    layout = Layout(batch.lengths, fed, device=device)
    mask, t = rollout.mask, torch.arange(rollout.ids.shape[2], device=device)
    run = t < (rollout.lengths - 1)[..., None]  # (B, G, T)
    ids = torch.cat((batch.ids, rollout.ids[run]))
    after = (batch.next_position[:, None, None] + t).expand_as(run)[run]
    positions = torch.cat((batch.positions, after.expand(3, -1)), 1)
    hidden = model.run(ids, positions, layout, batch)

    # Token 0 is predicted by the prompt's last position, token t > 0 by the completion's token t-1.
    before = torch.empty_like(rollout.ids)
    before[..., 0] = (layout.prompt_lengths.cumsum(0) - 1)[:, None]
    before[..., 1:][run[..., :-1]] = torch.arange(layout.S_prompt, len(ids), device=device)
    banned = torch.tensor(banned, dtype=torch.int64, device=device)
    found = token_logp(hidden[before[mask]], model.head, rollout.ids[mask], temperature, banned)
    logp, entropy = (torch.zeros(mask.shape, device=device).masked_scatter(mask, x) for x in found)
    return logp, entropy


def as_rollout(prompts: list[Prompt], targets: list[list[list[int]]], device="cpu") -> Rollout:
    """Given token ids (B lists of G lists) in the form of a rollout, to be scored or learnt."""
    lengths = torch.tensor([[len(ids) for ids in row] for row in targets], device=device)
    ids = torch.zeros(*lengths.shape, int(lengths.max()), dtype=torch.int64, device=device)
    flat = [i for row in targets for one in row for i in one]
    texts = [[""] * lengths.shape[1]] * len(ids)
    out = Rollout(prompts, ids, lengths, ids.float(), lengths > 0, texts)
    ids[out.mask] = torch.tensor(flat, device=device)
    return out
