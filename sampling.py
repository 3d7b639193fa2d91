"""Drawing tokens: prompts in slots, and one token of every completion at each step.

What we do differently from Hugging Face's `generate` and from a separate engine such as vLLM:
- The vision tower and the prompt run once per group; all G completions read the same prompt keys
  and values (attention.py).
- The distribution is the one that is trained (`scaled_logits`, rollout.token_logp). Top-p and top-k
  exist for evaluation only.
- Each completion has random numbers of its own, fixed by (seed, its prompt's uid, its place in the
  group). Which prompts share a batch changes nothing.
- Completions that have ended leave the batch; where prompts are waiting, these come in instead.
- A step is a function of tensors that stay where they are. On a GPU it is recorded once for each
  shape and played back as a CUDA graph: a 2B model's step is 1,300 kernels of a few microseconds.

Letters: B prompts, N slots, G completions per prompt, T tokens of a completion at most, D width,
V vocabulary.
"""

import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention import Cache, Layout, Step, core, halved
from data import Prompt, collate
from model import Qwen2VL, mrope

CHECK = 4  # steps between two looks at what has ended; a look is a wait for the device
LOWEST = torch.finfo(torch.float32).min  # the logit of what is banned; -inf x 0 would be no number

# ------------------------------------------------------------------------------ the distribution


def scaled_logits(hidden: Tensor, head: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """Logits (S, V) of the distribution that is sampled from and trained: float32, but for the
    product itself under bfloat16 autocast.

    hidden (S, D), head (V, D), banned (n,) token ids that get probability 0.
    """
    # A gathered bfloat16 head stays so: as float32 it would be copied for each token sampled.
    low = min(hidden.dtype, head.dtype, key=lambda dtype: dtype.itemsize)
    logits = F.linear(hidden.to(low), head.to(low)).float()
    logits = logits if temperature == 1 else logits / temperature
    return logits.index_fill_(-1, banned, LOWEST)


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


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Token ids (N,) by inverting the distribution p (N, V) at uniforms u (N,) in [0, 1)."""
    # float64: a parallel sum in float32 may rise by rounding where the probability is 0.
    total = p.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(total, u[:, None] * total[:, -1:], right=True)[:, 0]
    return found.clamp(max=p.shape[-1] - 1)  # beyond only if logits are NaN: the update tells


def uniforms(seed: int, uid: int, group: int, max_new: int) -> Tensor:
    """Uniforms (G, T) in [0, 1), one for each token that a prompt's completions may have."""
    return torch.from_numpy(np.random.default_rng((seed, uid)).random((group, max_new), "float32"))


# ----------------------------------------------------------------------------------------- slots


class Room:
    """The state of sampling: what has been drawn, of all B prompts, and what is in the N slots.

    ids, p and u (B, G, T + 1): tokens, -1 where none has been drawn; their probabilities; the
    uniforms that draw them. A completion in a slot is drawn on after its end, until it leaves, and
    nobody reads that (`ends`), so a step need not know who has ended. Column T is for what would be
    beyond. limits (B, G): tokens at most. Of the slots, of which the first ones are in use: first
    (N, G), the place of the completions' first tokens in ids as one row; token (N, G), the last
    ones; position (N,), the prompt's next. turns: cos and sin of all positions, of which a prompt
    has no more than tokens.
    """

    def __init__(self, model, B: int, N: int, G: int, T: int, longest: int):
        cfg, device = model.cfg, model.device
        self.size, self.device, self.gpu = (B, N, G, T, longest), device, device.type == "cuda"
        whole = {"dtype": torch.int64, "device": device}
        self.ids, self.limits = torch.zeros(B, G, T + 1, **whole), torch.zeros(B, G, **whole)
        self.p, self.u = (torch.zeros(B, G, T + 1, device=device) for _ in range(2))
        self.first, self.token = (torch.zeros(N, G, **whole) for _ in range(2))
        self.position = torch.zeros(N, **whole)
        self.turns = mrope(torch.arange(longest + T, device=device).expand(3, -1), cfg.head_dim,
                           cfg.rope_theta, cfg.mrope_section)
        (like,) = core(torch.empty(0, device=device))
        shape = (N, G, cfg.num_key_value_heads, cfg.head_dim)
        self.cache = Cache(cfg.num_hidden_layers, shape, longest, T, like.dtype, device)
        self.halved = halved(device)
        self.graphs, self.pool, self.told = {}, None, None

    def begin(self, processor, uids, seed: int, limits, how: tuple) -> None:
        """Makes the room empty for the prompts `uids`. how: temperature, top_p, top_k."""
        _, _, G, T, _ = self.size
        self.how, n = how, len(uids)
        if self.told != (told := (list(processor.banned_ids), list(processor.stop_ids))):
            self.told, self.graphs, self.pool = told, {}, None  # graphs read `banned`
            self.banned, self.stops = (
                torch.tensor(x, dtype=torch.int64, device=self.device) for x in told
            )
        self.u[:n, :, :T] = torch.stack([uniforms(seed, i, G, T) for i in uids]).to(self.device)
        self.limits.fill_(T)
        if limits is not None:
            self.limits[:n] = limits.to(self.device).clamp(1, T)
        self.ids.fill_(-1)

    def enter(self, model, prompts: list[Prompt], numbers: range, slots: list[int]) -> None:
        """Prompts, which are `numbers` of all, come into slots: vision tower and prompt, once; and
        the first token of each completion."""
        batch = collate(prompts).to(self.device)
        at = torch.tensor(slots, device=self.device)
        layout = Layout(batch.lengths, device=self.device, slots=at)
        self.cache.enter(layout)
        ends = layout.prompt_lengths.cumsum(0) - 1
        last = model.run(batch.ids, batch.positions, layout, batch, self.cache, ends)
        self.position[at] = batch.next_position
        G, columns = self.ids.shape[1:]
        rows = torch.arange(numbers[0] * G, (numbers[-1] + 1) * G, device=self.device)
        self.first[at] = rows.view(-1, G) * columns
        self.choose(model, last[:, None].expand(-1, G, -1), at)

    def choose(self, model, hidden: Tensor, at: Tensor | slice) -> None:
        """The next token of the completions in slots `at` (n,), of hidden states (n, G', D) after
        the last ones."""
        n, G = hidden.shape[:2]
        temperature, top_p, top_k = self.how
        t = self.cache.lengths[at].clamp(max=self.size[3])[:, None]
        where = (self.first[at, :G] + t).flatten()
        logits = scaled_logits(hidden.flatten(0, 1), model.head, temperature or 1.0, self.banned)
        p = logits.softmax(-1)
        if temperature == 0:
            token = p.argmax(-1)
        else:
            cut = top_p < 1 or top_k
            q = nucleus(logits, top_p, top_k).softmax(-1) if cut else p
            token = draw(q, self.u.view(-1)[where])
        self.ids.view(-1)[where] = token
        self.p.view(-1)[where] = p.gather(-1, token[:, None])[:, 0]
        self.token[at, :G] = token.view(n, G)

    def tick(self, model, N: int, G: int, span: int) -> None:
        """One more token of the first G completions in the first N slots. span: tokens that a
        completion will have in the cache at most."""
        layout = Step(self.cache, N, G, span)
        position = (self.position[:N] + layout.lengths).repeat_interleave(G)
        turns = [x.index_select(0, position) for x in self.turns]
        token = self.token[:N, :G].flatten()
        hidden = model(token, turns, layout, cache=self.cache)
        self.cache.lengths[:N] += 1
        self.choose(model, hidden.view(N, G, -1), slice(N))

    def step(self, model, *shape: int) -> None:
        """`tick`; on a GPU, from the second time of a shape on, as a CUDA graph: the first time
        loads kernels, the second records them. Weights that autocast casts cannot be recorded:
        their casts would be gone with the cache that holds them."""
        key, head = (*shape, *self.how), model.head
        cast = halved(self.device) and head.dtype != torch.get_autocast_dtype(self.device.type)
        if not self.gpu or cast or key not in self.graphs:
            self.graphs[key] = None
            self.tick(model, *shape)
            return
        if self.graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.tick(model, *shape)
            self.graphs[key], self.pool = graph, self.pool or graph.pool()
        self.graphs[key].replay()

    def run(self, model, prompts: list[Prompt], N: int) -> None:
        """Completions of all prompts, N of them at a time at most."""
        _, _, G, T, _ = self.size
        N = entered = min(N, len(prompts))
        self.enter(model, prompts[:N], range(N), range(N))
        counts = np.zeros(N, int)  # tokens in the cache of each slot, as the device has them
        while True:
            live = self.going(N, G).cpu().numpy()
            waiting = prompts[entered:]
            if waiting and (free := ready(live, len(waiting))):
                numbers = range(entered, entered + len(free))
                self.enter(model, [prompts[i] for i in numbers], numbers, free)
                counts[free], entered = 0, numbers.stop
                continue
            if not live.any():
                break
            if not waiting:
                slots, rows = left(live, self.gpu)
                if rows.size <= 0.75 * live.size:
                    self.keep(slots, rows, int(counts.max()))
                    (N, G), counts, live = rows.shape, counts[slots], live[slots[:, None], rows]
            alive = live.any(1)
            for _ in range(min(CHECK, T - 1 - counts[alive].min())):
                counts += 1
                self.step(model, N, G, span(min(T, counts[alive].max()), T, self.gpu))

    def going(self, N: int, G: int) -> Tensor:
        """Which of the first G completions in the first N slots have not ended: (N, G)."""
        rows = self.first[:N, :G] // self.ids.shape[2]
        ids, limits = self.ids.flatten(0, 1)[rows], self.limits.flatten()[rows]
        lengths, finished = ends(ids, self.stops, limits)
        return ~finished & (lengths < limits)

    def drawn(self, B: int) -> list[Tensor]:
        """ids, lengths, logp and finished of the first B prompts, as rollout.Rollout has them."""
        ids, p = self.ids[:B, :, :-1], self.p[:B, :, :-1]
        lengths, finished = ends(ids, self.stops, self.limits[:B])
        mask = torch.arange(ids.shape[2], device=self.device) < lengths[..., None]
        return [ids * mask, lengths, p.log().where(mask, 0.0), finished]

    def keep(self, slots, rows, span: int) -> None:
        """Slots (N',) with their completions `rows` (N', G') become the first ones."""
        slots, rows = (torch.from_numpy(x).to(self.device) for x in (slots, rows))
        N, G = rows.shape
        self.cache.keep(slots, rows, span)
        for x in (self.first, self.token):
            x[:N, :G] = x[slots[:, None], rows]
        self.position[:N] = self.position[slots]


def ends(ids: Tensor, stops: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens (...,) of completions drawn so far, ids (..., T), -1 where there is none yet,
    belong to them: up to the first of `stops` (n,), and at most limits (...,); and whether that
    token was found among them."""
    stop = (ids[..., None] == stops).any(-1)
    lengths = (ids >= 0).sum(-1).minimum(limits)
    at = torch.where(stop.any(-1), stop.int().argmax(-1) + 1, ids.shape[-1] + 1)
    return lengths.minimum(at), at <= lengths


def ready(live: np.ndarray, waiting: int) -> list[int]:
    """The slots that waiting prompts come into now; none until a quarter of the slots is free, or
    there is one for each. live (N, G): completions that have not ended."""
    free = (~live.any(1)).nonzero()[0]
    return free[:waiting].tolist() if len(free) >= min(len(live) / 4, waiting) else []


def left(live: np.ndarray, few: bool) -> tuple[np.ndarray, np.ndarray]:
    """Slots (N',) and completions (N', G') of a batch without those that have ended, of live (N,
    G): it stays a rectangle, slots with any left first, and in each what has not ended first.
    few: of sizes that are a power of two, or 3/4 of one, so that there are few of them."""
    N, G = int(live.any(1).sum()), int(live.sum(1).max())
    N, G = (fitting(n, most) if few else n for n, most in zip((N, G), live.shape))
    slots = np.argsort(~live.any(1), kind="stable")[:N]
    return slots, np.argsort(~live[slots], axis=1, kind="stable")[:, :G]


def fitting(n: int, most: int) -> int:
    """The least of most, 3/4 of most, 1/2, 3/8, ... (rounded up) that is n or more."""
    size = most
    while size > 1:
        smaller = [-(-size * 3 // 4), -(-size // 2)]
        if smaller[0] < n:
            return size
        if smaller[1] < n:
            return smaller[0]
        size = smaller[1]
    return size


def span(tokens: int, most: int, few: bool) -> int:
    """Own tokens that a step reads: all there are; if few, in multiples of 64."""
    return min(most, -(-int(tokens) // 64) * 64) if few else int(tokens)


# On a GPU: a model's rooms with their graphs for the next call, one of groups, one of evaluations.
ROOMS = weakref.WeakKeyDictionary()


def room_for(model: Qwen2VL, prompts: list[Prompt], N: int, G: int, T: int) -> Room:
    """A room for the prompts, N at a time; on a GPU that which the model has, if it is as large."""
    B, longest = len(prompts), max(len(p.ids) for p in prompts)
    if model.device.type != "cuda":
        return Room(model, B, N, G, T, longest)
    rooms, single = ROOMS.setdefault(model, {}), G == 1
    room = rooms.get(single)
    if (room is None or room.size[2:4] != (G, T) or room.halved != halved(model.device)
            or any(has < asked for has, asked in zip(room.size, (B, N, G, T, longest)))):
        room = None  # its memory goes before the new one's comes
        rooms.pop(single, None)
        room = rooms[single] = Room(model, B, N, G, T, -(-longest // 64) * 64)
    return room
