"""Rollout: sampling G completions for each of B prompts, and gathering their log-probs.

- One distribution. A token is drawn from softmax(logits / temperature) over all tokens that are not
  banned, and `token_logp`, which the trainer uses, is the log-prob of exactly that distribution.
- Vision special tokens are banned: a sampled image token would have no image
  (StarsfieldAI/R1-V#180, huggingface/trl#3847).
- How tokens are drawn, and what of it is done once per group: sampling.py.

Letters: B prompts, G completions per prompt, T new tokens, S packed tokens, D width, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention import Layout, half
from data import Processor, Prompt, collate
from model import Qwen2VL, filled
from sampling import room_for, scaled_logits

# ------------------------------------------------------------------- log-probs of the distribution


def token_logp(hidden, head, targets, temperature=1.0, banned=None, chunk=1024, entropies=True):
    """Log-probs and entropies (S,) of `targets` (S,) given the hidden states (S, D) before them.
    entropies False: None in their place.

    The head (V, D) runs in chunks, and again in the backward pass, so that a (tokens, V) float32
    tensor exists for `chunk` tokens only (V is 151,936 in the real model). Of all tokens it does
    where they have no more than KEEP logits; the backward pass then finds their probabilities.
    Entropies are for the metrics and carry no gradient.
    """
    banned = targets.new_empty(0) if banned is None else banned
    n, hidden, head = len(targets), filled(half(hidden)), half(head)
    low = min(hidden.dtype, head.dtype, key=lambda dtype: dtype.itemsize)
    given = hidden.to(low), head.to(low), filled(targets), temperature, banned, chunk
    logp, entropy = TokenLogp.apply(*given, entropies)
    return logp[:n], entropy[:n] if entropies else None


KEEP = 2**22  # logits, 16 MB: those of 8,756 tokens of the tiny checkpoint, of 27 of the real model


class TokenLogp(torch.autograd.Function):
    """token_logp with its gradient by hand: of log p(t), the logits' is onehot(t) - p. Autograd
    would keep, or make anew, four tensors of a chunk's logits where this needs two."""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, banned, chunk, entropies):
        keep = any(ctx.needs_input_grad) and len(targets) * len(head) <= KEEP
        chunk = len(targets) if keep else chunk
        ctx.temperature, ctx.chunk = temperature, chunk
        found, kept = [], None
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = scaled_logits(h, head, temperature, banned)
            *one, p = TokenLogp.logp(logits, t, entropies or keep)
            found.append(one)
            kept = p if keep else None
            del logits, p  # before the next chunk's
        logp, entropy = map(torch.cat, zip(*found))
        ctx.save_for_backward(hidden, head, targets, banned, kept)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def logp(logits, targets, more):
        """By logits (S, V): log-probs of targets (S,), and if more is asked for entropies (S,) and
        probabilities (S, V), else as many zeros and None."""
        if not more:
            logp = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            return logp, torch.zeros_like(logp), None
        logits -= logits.amax(-1, keepdim=True)  # else what follows is rounded as they are large
        p = logits.softmax(-1)
        total = -p.amax(-1).log()  # log sum exp
        logp = logits.gather(-1, targets[:, None])[:, 0] - total
        return logp, total - logits.mul_(p).sum(-1), p

    @staticmethod
    def backward(ctx, grad, _):
        hidden, head, targets, banned, kept = ctx.saved_tensors
        to_hidden, to_head = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:  # else the head is frozen
            to_head = torch.zeros_like(head, dtype=torch.float32)
        parts = (x.split(ctx.chunk) for x in (hidden, targets, grad, to_hidden))
        for h, t, g, out in zip(*parts):
            p = kept
            if p is None:
                p = scaled_logits(h, head, ctx.temperature, banned).softmax(-1)
            g = g[:, None] / ctx.temperature
            p = (p * -g).scatter_add_(-1, t[:, None], g).to(h.dtype)
            torch.mm(p, head, out=out)
            if to_head is not None:
                to_head += p.mT @ h
            del p  # before the next chunk's
        to_head = to_head if to_head is None else to_head.to(head.dtype)
        return to_hidden, to_head, *[None] * 5


# -------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def look(model: Qwen2VL, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts with the states (P, E) that the vision tower makes of their patches, in place of
    these. Of a tower that does not learn they are made once in a step: the prompts are then sampled
    for, dealt out, learnt and given to the reference without the tower. The merger, which may
    learn, comes after."""
    batch, sizes = collate(prompts), [len(p.patches) for p in prompts]
    states = half(torch.empty(0, model.cfg.vision.embed_dim, device=model.device))
    if len(batch.grid):
        patches, grid = batch.patches.to(model.device), batch.grid.to(model.device)
        states = model.visual.patch_states(patches, grid)
    return [replace(p, patches=p.patches.new_empty(0, p.patches.shape[1]), states=x.clone())
            for p, x in zip(prompts, states.cpu().split(sizes))]  # fmt: skip


TENSORS = ("ids", "lengths", "logp", "finished")


@dataclass
class Rollout:
    """B prompts with G completions each. `ids` beyond `lengths` are 0 and mean nothing.

    ids (B, G, T) int64, lengths (B, G) int64 (the end token included), logp (B, G, T) float32 of
    the sampled tokens, finished (B, G) bool (False: cut at max_new), texts B lists of G: each with
    the opening of its prompt, which is none of the tokens.
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
    slots: int | None = None,
    limits: Tensor | None = None,
) -> Rollout:
    """Sample `group` completions for each prompt; temperature 0 is greedy.

    uids (B,) name the prompts in the random numbers: a prompt with the same uid, seed and max_new
    gets the same completions in any batch. Default: its place in the list. slots: prompts in work
    at a time, default all; when some have ended, the next ones come in. limits (B, G) or (B, 1):
    tokens of a completion at most, where fewer than max_new.
    """
    B = len(prompts)
    slots = min(slots or B, B)
    room = room_for(model, prompts, slots, group, max_new)
    room.begin(processor, uids or range(B), seed, limits, (temperature, top_p, top_k))
    room.run(model, prompts, slots)
    tensors = room.drawn(B)
    pairs = zip(*(x.tolist() for x in tensors[:2]))
    texts = [[prompt.opening + processor.decode(x[:n]) for x, n in zip(*pair)]
             for prompt, pair in zip(prompts, pairs)]  # fmt: skip
    return Rollout(prompts, *tensors, texts)


# ------------------------------------------------------------------------------------- log-probs


def score(model: Qwen2VL, rollout: Rollout, temperature=1.0, banned=(), entropies=True):
    """Log-probs, with gradient, and entropies (B, G, T) of a rollout's tokens; 0 beyond `lengths`.
    entropies False: None in their place.

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

    # Token 0 is predicted by the prompt's last position, token t > 0 by the completion's token t-1.
    before = torch.empty_like(rollout.ids)
    before[..., 0] = (layout.prompt_lengths.cumsum(0) - 1)[:, None]
    before[..., 1:][run[..., :-1]] = torch.arange(layout.S_prompt, len(ids), device=device)
    banned = torch.tensor(banned, dtype=torch.int64, device=device)
    hidden = model.run(ids, positions, layout, batch, wanted=before[mask])
    targets = rollout.ids[mask]
    found = token_logp(hidden, model.head, targets, temperature, banned, entropies=entropies)
    return tuple(None if x is None else torch.zeros(mask.shape, device=device).masked_scatter(
        mask, x) for x in found)  # fmt: skip


def text_logp(model: Qwen2VL, prompts: list[Prompt], targets: list[list[int]]) -> Tensor:
    """Log-probs of all text tokens of prompts and targets but each row's first, packed."""
    whole = []
    for p, ids in zip(prompts, targets):
        after = (p.next_position + torch.arange(len(ids))).expand(3, -1)
        whole.append(replace(p, ids=torch.cat((p.ids, torch.tensor(ids))),
                             positions=torch.cat((p.positions, after), 1)))
    batch = collate(whole).to(model.device)
    layout = Layout(batch.lengths, device=model.device)
    learnt = torch.ones_like(batch.ids, dtype=torch.bool)
    learnt[batch.image_at] = False
    learnt[layout.prompt_lengths.cumsum(0) - layout.prompt_lengths] = False
    at = learnt.nonzero()[:, 0]
    none = torch.empty(0, dtype=torch.int64, device=model.device)
    hidden = model.run(batch.ids, batch.positions, layout, batch, wanted=at - 1)
    return token_logp(hidden, model.head, batch.ids[at], 1.0, none, entropies=False)[0]


def as_rollout(prompts: list[Prompt], targets: list[list[list[int]]], device="cpu") -> Rollout:
    """Given token ids (B lists of G lists) in the form of a rollout, to be scored or learnt."""
    lengths = torch.tensor([[len(ids) for ids in row] for row in targets], device=device)
    ids = torch.zeros(*lengths.shape, int(lengths.max()), dtype=torch.int64, device=device)
    flat = [i for row in targets for one in row for i in one]
    texts = [[""] * lengths.shape[1]] * len(ids)
    out = Rollout(prompts, ids, lengths, ids.float(), lengths > 0, texts)
    ids[out.mask] = torch.tensor(flat, device=device)
    return out
