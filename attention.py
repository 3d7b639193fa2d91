"""Attention over packed tokens: who attends to whom, and the keys and values of sampling.

A prompt with G completions is one prompt here, where R1-V and its peers repeat it G times. Its
completions attend to the one copy of its keys and values, in sampling and in training, with
gradient. It is exact; tests/test_model.py compares it with the repeated batch.

What attention computes in: bfloat16 on a GPU, where autocast says so; float32 on a CPU in any case,
since bfloat16 attention takes twice as long in its backward pass there (LOG.md).

Four ways to run it, one softmax:
- `attend_packed`, a GPU in half precision: one call of variable-length flash attention for prompts
  and completions, without padding; the keys of a prompt are gathered for each completion.
- `attend_shared`, anywhere: padded rows; the keys of a prompt are read once per group.
- `Step.attend_few`, a token of each completion where a group has few of them: its keys are one row.
- `attend`: PyTorch's own, for prompts and for the frames of the vision tower; of short ones, on a
  CPU, products and a softmax.

Letters: B prompts, G completions per prompt, L prompt tokens, T completion tokens, S packed tokens,
N sequences, H heads, K key/value heads, R = H/K, d head width.
"""

import functools
import inspect
import itertools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def half(x: Tensor) -> Tensor:
    """x as autocast computes with it: cast once, not by each linear layer that reads it."""
    kind = device_of(x)
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def device_of(x: Tensor) -> str:
    """The kind of x's device, for autocast, which does not know "meta"."""
    kind = x.device.type
    return kind if torch.amp.is_autocast_available(kind) else "cpu"


EXACT = ["cpu"]  # kinds of devices on which attention computes in float32


@contextmanager
def exact_on(*kinds: str):
    """Inside, these are the kinds. plan.py looks at a GPU's memory with tensors of a CPU."""
    before, EXACT[:] = list(EXACT), kinds
    try:
        yield
    finally:
        EXACT[:] = before


def core(*tensors: Tensor) -> list[Tensor]:
    """The tensors in what attention computes in."""
    return [x.float() if x.device.type in EXACT else half(x) for x in tensors]


def spare(x: Tensor) -> int:
    """Rows to be added to x so that few numbers of rows occur: on a CPU in half precision, where
    oneDNN makes, and keeps, a kernel for each number that it meets."""
    few = x.device.type == "cpu" and "cpu" in EXACT and torch.is_autocast_enabled("cpu")
    return -len(x) % (128 if len(x) > 1024 else 16) if few else 0


SHORT = 128  # tokens up to which products and a softmax take less time on a CPU than PyTorch's own


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q (N, H, L, d), k and v (N, K, L, d) -> (N, H, L, d), all of a sequence to all, or to what is
    not later."""
    q, k, v = core(q, k, v)
    (N, H, L, d), K = q.shape, k.shape[1]
    with torch.autocast(device_of(q), enabled=False):
        if q.device.type not in EXACT or L > SHORT:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=H > K)
        scores = ((q * d**-0.5).reshape(N, K, H // K * L, d) @ k.mT).view(N, H, L, L)
        if causal:
            scores += unseen(torch.ones(L, L, dtype=torch.bool, device=q.device).tril())
        return (scores.softmax(-1).view(N, K, H // K * L, L) @ v).view(N, H, L, d)


def attend_shared(q, k, v, prompt_k, prompt_v, mask=None) -> Tensor:
    """Completions attend to their group's one prompt and to themselves, in one softmax.

    q (B, G, T, H, d); own k, v (B, G, K, S, d); prompt_k, prompt_v (B, K, L, d); mask (B or 1, T or
    1, L + S), see `unseen` -> (B, G, T, H, d). The prompt's keys are read once per group: all
    queries of a group are rows of one product.
    """
    (B, G, T, H, d), (K, S), L = q.shape, k.shape[2:4], prompt_k.shape[2]
    R = H // K
    q = q.view(B, G, T, K, R, d).permute(0, 3, 1, 4, 2, 5) * d**-0.5  # (B, K, G, R, T, d)
    to_prompt = (q.reshape(B, K, -1, d) @ prompt_k.mT).view(B, K, G, R, T, L)
    q = q.transpose(1, 2).reshape(B, G, K, R * T, d)
    to_own = (q @ k.mT).view(B, G, K, R, T, S)
    scores = torch.cat((to_prompt.transpose(1, 2), to_own), -1)  # (B, G, K, R, T, L + S)
    if mask is not None:
        scores += mask[:, None, None, None]
    p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    on_prompt, on_own = p.split((L, S), -1)
    y = on_own.reshape(B, G, K, R * T, S) @ v
    z = on_prompt.transpose(1, 2).reshape(B, K, -1, L) @ prompt_v
    y = y.view(B, G, K, R, T, d) + z.view(B, K, G, R, T, d).transpose(1, 2)
    return y.permute(0, 1, 4, 2, 3, 5).reshape(B, G, T, H, d)


def unseen(seen: Tensor) -> Tensor:
    """What is added to scores, float32: 0 where a key is seen, -inf where it is not. Added, since
    that has no backward pass, and is a tenth of the work of writing where a mask says so."""
    return torch.full(seen.shape, -torch.inf, device=seen.device).masked_fill_(seen, 0.0)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packed: "Packed") -> Tensor:
    """The same for q (S, H, d), k and v (S, K, d) without padding -> (S, H, d)."""
    # Gathered in float32: so are the gradients added up that a prompt gets from its completions.
    k, v = (x.float().index_select(0, packed.keys) for x in (k, v))
    q, k, v = core(q, k, v)
    return packed.flash(q, k, v, packed.cu_q, packed.cu_k, packed.most_q, packed.most_k)


@functools.cache
def flash():
    """Causal variable-length flash attention (q, k, v, cu_q, cu_k, most_q, most_k) of PyTorch. What
    it imports sets up torch.compile, so it is imported when it is needed."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}  # torch 2.11 need not be told
    return functools.partial(varlen_attn, window_size=(-1, 0), **grouped)


class Packed:
    """The sequences of a Layout for variable-length attention: prompts, then completions, each of
    which has its prompt's keys before its own. Flash attention aligns the last query with the last
    key, so its causal mask is right for both.

    keys: index (all keys,) of packed tokens; cu_q, cu_k (N + 1,) int32: where sequences start.
    """

    def __init__(self, prompts: list[int], completions, device):
        starts = list(itertools.accumulate((*prompts, *itertools.chain(*completions)), initial=0))
        first = [range(a, a + n) for a, n in zip(starts, prompts)]
        keys, queries, at = [[r] for r in first], list(prompts), len(prompts)
        for prompt, row in zip(first, completions):
            for n in row:
                if n:
                    keys.append([prompt, range(starts[at], starts[at] + n)])
                    queries.append(n)
                at += 1
        self.flash = flash()
        lengths = [sum(map(len, ranges)) for ranges in keys]
        self.most_q, self.most_k = max(queries), max(lengths)
        flat = [torch.arange(r.start, r.stop) for ranges in keys for r in ranges]
        self.keys = torch.cat(flat).to(device)
        self.cu_q, self.cu_k = (
            torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device)
            for x in (queries, lengths)
        )


# ------------------------------------------------------------------------------- packed sequences


class Layout:
    """Where packed tokens stand: prompt 1, ..., prompt B, then the completions of prompt 1, ..., of
    prompt B; and in the padded inputs of attention. Padding is on the right.

    prompts: B lengths. completions: B rows of G lengths. slots (B,): the places of the prompts in
    a Cache that they are to be written to. packed: whether by attend_packed; None: if it can be.
    """

    def __init__(self, prompts: list[int], completions=(), device="cpu", slots=None, packed=None):
        self.B, self.L = len(prompts), max(prompts, default=0)
        self.prompt_at = places(prompts, device)
        self.prompt_lengths = torch.tensor(prompts, device=device)
        self.S_prompt, self.slots = sum(prompts), slots
        assert len({len(row) for row in completions}) <= 1, "every prompt has G completions"
        flat = [n for row in completions for n in row]
        self.T, self.G = max(flat, default=0), len(flat) // max(1, len(completions))
        self.S_own = sum(flat)
        self.completion_at = places(flat, device)
        self.prompt_seen = torch.arange(self.L, device=device) < self.prompt_lengths[:, None]
        packed = halved(device) if packed is None else packed
        self.packed = Packed(prompts, completions, device) if packed else None
        self.mask = None if packed else self.seen_by_completions()

    def seen_by_completions(self) -> Tensor:
        """The mask (B or 1, T, L + T) of `attend_shared`; 1 where prompts are of equal length."""
        ragged, T = self.S_prompt != self.B * self.L, self.T
        prompt = (self.prompt_seen if ragged else self.prompt_seen[:1])[:, None]  # (B or 1, 1, L)
        own = torch.ones(T, T, dtype=torch.bool, device=prompt.device).tril()
        parts = prompt.expand(-1, T, -1), own.expand(len(prompt), -1, -1)
        return unseen(torch.cat(parts, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kept=None) -> Tensor:
        """q (S, H, d), k, v (S, K, d) -> (S, H, d); of rows beyond its own, see `spare`, zeros.
        kept: a layer of a Cache, which then holds the keys and values of the prompts."""
        if self.packed and kept is None:
            return attend_packed(q, k, v, self.packed)
        S, d = (self.S_prompt, self.S_own), q.shape[-1]
        prompt, own, spare = zip(*(x.split((*S, len(x) - sum(S))) for x in (q, k, v)))
        qp, kp, vp = (unpack(x, self.prompt_at, self.B, self.L).transpose(1, 2) for x in prompt)
        if kept is not None:
            for x, new in zip(kept, (kp, vp)):
                x[self.slots, :, : self.L] = new.to(x.dtype)
        if self.packed:
            return attend_packed(q, k, v, self.packed)
        y = attend(qp, kp, vp, causal=True)
        out = [repack(y.transpose(1, 2), self.prompt_at)]
        if self.T:
            rows, shape = self.B * self.G, (self.B, self.G, self.T, -1, d)
            qc, kc, vc = (unpack(x, self.completion_at, rows, self.T).view(shape) for x in own)
            kc, vc = kc.transpose(2, 3), vc.transpose(2, 3)  # (B, G, K, T, d)
            qc, kc, vc, kp, vp = core(qc, kc, vc, kp, vp)
            with torch.autocast(device_of(q), enabled=False):
                y = attend_shared(qc, kc, vc, kp, vp, self.mask)
            out.append(repack(y.flatten(0, 1), self.completion_at))
        return torch.cat((*out, torch.zeros_like(spare[0], dtype=out[0].dtype)))


def halved(device) -> bool:
    """Whether a GPU computes in half precision now, which flash attention asks for."""
    return torch.device(device).type == "cuda" and torch.is_autocast_enabled("cuda")


def places(lengths: list[int], device) -> Tensor | None:
    """Flat index (S,) of packed tokens in a (rows, max length) grid; None if all are equal."""
    width = max(lengths, default=0)
    if all(n == width for n in lengths):
        return None
    n = torch.tensor(lengths, device=device)
    return (torch.arange(width, device=device) < n[:, None]).flatten().nonzero()[:, 0]


def unpack(x: Tensor, at: Tensor | None, rows: int, width: int) -> Tensor:
    """Packed (S, ...) -> padded with zeros (rows, width, ...)."""
    if at is None:
        return x.view(rows, width, *x.shape[1:])
    out = x.new_zeros(rows * width, *x.shape[1:]).index_copy(0, at, x)
    return out.view(rows, width, *x.shape[1:])


def repack(x: Tensor, at: Tensor | None) -> Tensor:
    """Padded (rows, width, ...) -> packed (S, ...)."""
    x = x.flatten(0, 1)
    return x if at is None else x.index_select(0, at)


# ---------------------------------------------------------------------------------------- sampling

FEW = 512  # own keys of a group up to which they stand behind its prompt's


class Cache:
    """Keys and values while sampling, in B slots: of each a prompt's (once) and its G completions'.

    layers: [prompt k, v (B, K, L, d), own k, v (B, G, K, room, d)], so that no completion's keys
    meet another's queries. Where a group's own keys are few, to multiply them all costs less than
    to keep them apart: then layers: [k, v (B, K, L + room G, d)], the prompt's and behind them,
    token by token, those of all completions; two products do for four (`Step.attend_few`).

    lengths (B,): own tokens that a slot holds. mask (B, 1, L + room), few: (B, G, L + room G), see
    `unseen`: a key is seen once it is there. place (B, G): the number in its group of each
    completion that is still here. Its memory stays where it is: a CUDA graph reads it.
    """

    def __init__(self, layers: int, shape: tuple, longest: int, room: int, dtype, device):
        """shape: (B, G, K, d); longest: L."""
        B, G, K, d = shape
        self.longest, self.room, self.few = longest, room, room * G <= FEW
        self.every = G if self.few else 1  # completions whose own keys stand side by side
        own = [] if self.few else [(G, K, room)] * 2
        every = [(K, longest + room * G * self.few)] * 2 + own
        self.layers = [
            [torch.zeros(B, *rest, d, dtype=dtype, device=device)  # zeros: hidden must be finite
             for rest in every] for _ in range(layers)
        ]  # fmt: skip
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.mask = torch.zeros(B, self.every, longest + room * self.every, device=device)
        self.place = torch.zeros(B, self.every, dtype=torch.int64, device=device)

    def enter(self, layout: Layout) -> None:
        """Prompts come into layout.slots; their keys and values follow, layer by layer."""
        self.mask[layout.slots] = -torch.inf
        self.mask[layout.slots, :, : layout.L] = unseen(layout.prompt_seen)[:, None]
        self.lengths[layout.slots] = 0
        self.place[layout.slots] = torch.arange(self.every, device=self.place.device)

    def keep(self, slots: Tensor, rows: Tensor, span: int) -> None:
        """Slots (B',) with their completions `rows` (B', G') become the first ones. span: own
        tokens at most."""
        B, G = rows.shape
        for layer in self.layers:
            for x in layer[:2]:
                x[:B] = x[slots]
            for x in layer[2:]:
                x[:B, :G, :, :span] = x[slots[:, None], rows, :, :span]
        self.lengths[:B] = self.lengths[slots]
        rows = rows if self.few else rows[:, :1] * 0
        for x in (self.mask, self.place):
            x[:B, : rows.shape[1]] = x[slots[:, None], rows]


class Step:
    """The layout of sampling: one token of each of G completions in the first B slots of a cache.
    span: own tokens at most, the new one included."""

    def __init__(self, cache: Cache, B: int, G: int, span: int):
        self.B, self.G, self.span = B, G, span
        self.at = torch.arange(B, device=cache.lengths.device)
        # A slot whose completions have all ended may be full; it goes on, and is not read.
        self.lengths = cache.lengths[:B].clamp(max=cache.room - 1)
        rows, place = cache.mask[:B, :G], cache.place[:B, :G]
        # Of the new keys, (B, G) or (B, 1): they are seen from now on.
        self.column = cache.longest + self.lengths[:, None] * cache.every + place
        rows.scatter_(2, self.column[..., None], 0.0)
        self.mask = rows[..., : cache.longest + span * cache.every]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kept: list) -> Tensor:
        """q (B G, H, d), k, v (B G, K, d) of the new tokens -> (B G, H, d); of spare rows zeros."""
        B, G, (S, _, d) = self.B, self.G, q.shape
        if S > B * G:
            y = self.attend(*(x[: B * G] for x in (q, k, v)), kept)
            return F.pad(y, (0, 0, 0, 0, 0, S - B * G))
        q, k, v = core(q, k, v)
        if len(kept) == 2:
            for every, new in zip(kept, (k, v)):
                every[self.at[:, None], :, self.column] = new.view(B, G, -1, d)
            with torch.autocast(device_of(q), enabled=False):
                return self.attend_few(q, *(x[:B, :, : self.mask.shape[2]] for x in kept))
        for own, new in zip(kept[2:], (k, v)):
            own[:B, :G][self.at, :, :, self.lengths] = new.view(B, G, -1, d)
        prompt_k, prompt_v = kept[0][:B], kept[1][:B]
        own_k, own_v = (own[:B, :G, :, : self.span] for own in kept[2:])
        with torch.autocast(device_of(q), enabled=False):
            y = attend_shared(q.view(B, G, 1, -1, d), own_k, own_v, prompt_k, prompt_v, self.mask)
        return y.view(B * G, -1, d)

    def attend_few(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B G, H, d) to all keys of its group, k and v (B, K, L + span G, d) -> (B G, H, d)."""
        d = q.shape[-1]
        q = (q * d**-0.5).view(self.B, self.G, k.shape[1], -1, d).transpose(1, 2)  # (B, K, G, R, d)
        scores = (q.flatten(2, 3) @ k.mT).view(*q.shape[:4], -1)
        scores += self.mask[:, None, :, None]
        p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        y = (p.flatten(2, 3) @ v).view(q.shape).transpose(1, 2)
        return y.reshape(self.B * self.G, -1, d)
