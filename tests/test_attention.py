"""attention.py, chapter two: however tokens are laid out, each attends as if it stood alone.

The naive twin of everything here is `plain`: one sequence, one softmax, every head by itself. The
kernel of variable-length flash attention runs on a GPU alone: elsewhere `segment_by_segment` stands
in its place, so that what is handed to it is tested on any machine, and one test, which a CPU
skips, compares the two. That a model so laid out gives what transformers gives: test_model.py.

Letters as in attention.py: B prompts, G completions per prompt, L prompt tokens, T completion
tokens, S packed tokens, H heads, K key/value heads, d head width.
"""

import itertools
import math

import pytest
import torch
from prompts import INF
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attention
from attention import (
    Cache,
    Layout,
    Packed,
    Step,
    attend,
    attend_packed,
    attend_shared,
    core,
    exact_on,
    half,
    places,
    repack,
    unpack,
    unseen,
)

H, K, D = 6, 2, 8  # heads, key heads, head width
RAGGED = [3, 5, 2], [[4, 1, 6], [3, 5, 2], [1, 6, 3]]
WITH_EMPTY = [3, 5, 2], [[0, 2, 5], [3, 0, 0], [0, 0, 0]]  # the last prompt has no completion
EQUAL = [4, 4], [[3, 3], [3, 3]]
ONE_TOKEN = [1, 1], [[1], [2]]
NONE = [3, 5, 2], [[0, 0], [0, 0], [0, 0]]
PROMPTS = [3, 5, 2], []
every_layout = pytest.mark.parametrize(
    "prompts, completions", [RAGGED, WITH_EMPTY, EQUAL, ONE_TOKEN, NONE, PROMPTS, ([4], [])],
    ids=["ragged", "with empty", "equal", "one token", "none", "prompts", "one prompt"],
)  # fmt: skip


def random(*shape, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, expected: Tensor, most: float = 1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < most


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (T, H, d), k and v (S, K, d) of one sequence, the queries being its last -> (T, H, d)."""
    T, S, R = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(R, 1).transpose(0, 1) for x in (k, v))  # (H, S, d)
    scores = q.transpose(0, 1) @ k.mT / math.sqrt(q.shape[-1])
    later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def segment_by_segment(q, k, v, cu_q, cu_k, most_q, most_k) -> Tensor:
    """What is asked of the kernel: `plain` for each sequence between two starts."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert int(cu_q.diff().max()) == most_q and int(cu_k.diff().max()) == most_k
    assert (int(cu_q[-1]), int(cu_k[-1]), cu_q[0], cu_k[0]) == (len(q), len(k), 0, 0)
    assert int(cu_q.diff().min()) > 0, "the kernel is given no empty sequence"
    starts = zip(*(itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k)))
    return torch.cat([plain(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in starts])


@pytest.fixture
def standing_in(monkeypatch):
    """`segment_by_segment` in the place of the kernel; the calls that it has had."""
    calls = []

    def kernel(*args):
        calls.append(args)
        return segment_by_segment(*args)

    monkeypatch.setattr(attention, "flash", lambda: kernel)
    return calls


def tokens(prompts, completions, seed=0) -> list[Tensor]:
    """q (S, H, d), k and v (S, K, d) of packed tokens."""
    S = sum(prompts) + sum(map(sum, completions))
    return [random(S, heads, D, seed=seed + i) for i, heads in enumerate((H, K, K))]


def alone(prompts, completions, q, k, v) -> Tensor:
    """(S, H, d): each prompt alone, and each completion after a copy of its prompt."""
    spans = [*prompts, *itertools.chain(*completions)]
    q, k, v = (x.split(spans) for x in (q, k, v))
    B, G = len(prompts), len(completions[0]) if completions else 0
    out = [plain(q[b], k[b], v[b]) for b in range(B)]
    for i in range(B, B + B * G):
        b = (i - B) // G
        out.append(plain(q[i], torch.cat((k[b], k[i])), torch.cat((v[b], v[i]))))
    return torch.cat(out)


# ------------------------------------------------------------------------------------- precision


def test_half_is_what_autocast_computes_in():
    x = torch.ones(2)
    assert half(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert half(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert half(x).dtype == torch.float16


def test_attention_computes_in_float32_on_a_cpu_and_as_autocast_says_elsewhere():
    x, y = torch.ones(2), torch.ones(2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert [z.dtype for z in core(x, y)] == [torch.float32] * 2
        with exact_on():
            assert [z.dtype for z in core(x, y)] == [torch.bfloat16] * 2
        assert attend(*(y.view(1, 1, 1, 2),) * 3).dtype == torch.float32
    with exact_on():
        assert core(x)[0].dtype == torch.float32, "without autocast"


def test_what_is_exact_comes_back_whatever_happens_inside():
    with pytest.raises(KeyError), exact_on("cuda", "mps"):
        assert attention.EXACT == ["cuda", "mps"]
        raise KeyError
    assert attention.EXACT == ["cpu"]


# --------------------------------------------------------------------------------- attend_shared


def test_completions_average_what_they_may_see():
    """Queries of zero attend equally, so the output is the mean of the visible values.

    Prompt values 1, 3; own values 5, 7. Token 0 sees 1, 3, 5; token 1 sees all four.
    """
    q, k = torch.zeros(1, 1, 2, 1, 1), torch.randn(1, 1, 1, 2, 1)
    v = torch.tensor([5.0, 7.0]).view(1, 1, 1, 2, 1)
    prompt_k, prompt_v = torch.randn(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1)
    causal = torch.tensor([[[0, 0, 0, -INF], [0, 0, 0, 0]]])
    y = attend_shared(q, k, v, prompt_k, prompt_v, causal)
    assert_near(y.flatten(), torch.tensor([3.0, 4.0]), 1e-6)
    short = torch.tensor([[[0, -INF, 0, -INF], [0, -INF, 0, 0]]])  # the prompt is one token long
    y = attend_shared(q, k, v, prompt_k, prompt_v, short)
    assert_near(y.flatten(), torch.tensor([3.0, 13 / 3]), 1e-6)
    y = attend_shared(q, k, v, prompt_k, prompt_v)  # nothing is hidden
    assert_near(y.flatten(), torch.tensor([4.0, 4.0]), 1e-6)


@pytest.mark.parametrize("mask_of", [(2, 2), (1, 2), (2, 1), (1, 1)])
def test_attend_shared_is_one_softmax_over_prompt_and_own_keys(mask_of):
    """Naive twin: each completion, each head, alone; query head h reads key head h // R. The mask
    may be told once for all prompts, and once for all tokens."""
    B, G, T, S, L, d = 2, 3, 2, 4, 5, 4
    q, k, v = (random(B, G, *x, d, seed=i) for i, x in enumerate(((T, H), (K, S), (K, S))))
    prompt_k, prompt_v = (random(B, K, L, d, seed=i) for i in (3, 4))
    seen = random(*mask_of, L + S, seed=5) < 0.5
    seen[..., [0, L]] = True
    y = attend_shared(q, k, v, prompt_k, prompt_v, unseen(seen))
    seen = seen.expand(B, T, L + S)
    assert 0 < seen.float().mean() < 1
    for b, g, t, h in torch.cartesian_prod(*map(torch.arange, (B, G, T, H))).tolist():
        j, keep = h // (H // K), seen[b, t]
        keys = torch.cat((prompt_k[b, j], k[b, g, j]))[keep]
        values = torch.cat((prompt_v[b, j], v[b, g, j]))[keep]
        p = (keys @ q[b, g, t, h] / math.sqrt(d)).softmax(0)
        assert_near(y[b, g, t, h], p @ values)


# --------------------------------------------------------------------------------- attend_packed


def test_packed_gives_a_completion_its_prompts_keys_before_its_own_by_hand(standing_in):
    """Prompts of 2 and 1 tokens (0 1, 2); completions of 1 and 2 (3, 4 5), and of 0 and 1 (6). The
    empty one is no sequence."""
    packed = Packed([2, 1], [[1, 2], [0, 1]], "cpu")
    assert packed.keys.tolist() == [0, 1, 2, 0, 1, 3, 0, 1, 4, 5, 2, 6]
    assert packed.cu_q.tolist() == [0, 2, 3, 4, 6, 7]
    assert packed.cu_k.tolist() == [0, 2, 3, 6, 10, 12]
    assert (packed.most_q, packed.most_k) == (2, 4)
    assert packed.cu_q.dtype == packed.cu_k.dtype == torch.int32


def test_packed_prompts_alone_read_their_own_keys(standing_in):
    packed = Packed([2, 3], [], "cpu")
    assert packed.keys.tolist() == [0, 1, 2, 3, 4]
    assert packed.cu_q.tolist() == packed.cu_k.tolist() == [0, 2, 5]
    assert packed.most_q == packed.most_k == 3


def attended(prompts, completions, packed, kept=None, slots=None):
    """What Layout.attend gives, and the gradients of a weighted sum of it."""
    layout = Layout(prompts, completions, slots=slots, packed=packed)
    q, k, v = (x.requires_grad_() for x in tokens(prompts, completions))
    y = layout.attend(q, k, v, kept)
    return y, torch.autograd.grad((y * random(*y.shape, seed=9)).sum(), (q, k, v))


@every_layout
def test_padded_and_packed_attention_are_those_of_each_sequence_alone(
    standing_in, prompts, completions
):
    """Outputs, and gradients of queries, keys and values: a prompt's keys gather those of all of
    its completions."""
    padded, packed = (attended(prompts, completions, way) for way in (False, True))
    assert len(standing_in) == 1
    q, k, v = (x.requires_grad_() for x in tokens(prompts, completions))
    y = alone(prompts, completions, q, k, v)
    gradients = torch.autograd.grad((y * random(*y.shape, seed=9)).sum(), (q, k, v))
    for found, found_gradients in (padded, packed):
        assert_near(found, y)
        for a, b in zip(found_gradients, gradients):
            assert b.norm() > 0.1
            assert_near(a, b)


class Sums(TorchDispatchMode):
    """Collects the types in which gradients of gathered tensors are added up."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("aten::index_add"):
            self.found.append(args[0].dtype)
        return func(*args, **kwargs or {})


def test_what_is_packed_is_as_autocast_says_and_gradients_of_keys_add_up_in_float32(standing_in):
    """A prompt's gradient is a sum over its completions. A CPU adds bfloat16 in float32 in any case
    and rounds once; a GPU would lose what is less than 1/256 of the sum so far."""
    layout = Layout([1], [[1] * 65], packed=True)
    q, k, v = (torch.zeros(66, 1, 8, requires_grad=True) for _ in range(3))
    weight = torch.full((66, 1, 8), 2.0**-7).index_fill(0, torch.tensor([1]), 2.0)
    weight[0] = 0  # the prompt's own output
    with torch.autocast("cpu", torch.bfloat16), exact_on():
        y = layout.attend(q, k, v.bfloat16())  # as v_proj gives it
    assert {x.dtype for x in (y, *standing_in[0][:3])} == {torch.bfloat16}
    with Sums() as sums:
        (found,) = torch.autograd.grad(y, v, weight.bfloat16())
    assert sums.found == [torch.float32]
    assert found[0].unique().tolist() == [1 + 64 * 2.0**-8]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_layout
def test_the_kernel_of_a_gpu_does_what_stands_in_for_it_here(prompts, completions):
    """In bfloat16, forward and backward. The causal mask is aligned with the last key, which the
    documentation of varlen_attn leaves open; and key heads are fewer than query heads."""
    packed = Packed(prompts, completions, "cuda")
    q, k, v = (
        random(len(x), x.shape[1], 64, seed=i).cuda().requires_grad_()
        for i, x in enumerate(tokens(prompts, completions))
    )
    weight, found = random(len(q), H, 64, seed=9).cuda(), []
    for kernel in (packed.flash, segment_by_segment):
        packed.flash = kernel
        with torch.autocast("cuda", torch.bfloat16):
            y = attend_packed(q, k, v, packed).float()
        found.append((y, *torch.autograd.grad((y * weight).sum(), (q, k, v))))
    for a, b in zip(*found):
        assert (a - b).norm() < 0.02 * b.norm()


# ------------------------------------------------------------------------------- packed sequences


def test_packed_tokens_go_to_their_rows_and_back():
    layout = Layout([2, 3], [[0, 2], [1, 1]])
    x = torch.arange(1.0, 6)
    padded = unpack(x, layout.prompt_at, layout.B, layout.L)
    assert padded.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert repack(padded, layout.prompt_at).tolist() == x.tolist()
    assert layout.prompt_seen.tolist() == [[True, True, False], [True, True, True]]
    assert layout.prompt_lengths.tolist() == [2, 3]
    own = unpack(torch.arange(1.0, 5), layout.completion_at, 4, layout.T)
    assert own.tolist() == [[0, 0], [1, 2], [3, 0], [4, 0]]
    assert (layout.B, layout.G, layout.L, layout.T, layout.S_prompt) == (2, 2, 3, 2, 5)


def test_packed_completions_need_no_mask(standing_in):
    assert Layout(*RAGGED, packed=True).mask is None


def test_what_is_hidden_from_completions_by_hand():
    """The end of a shorter prompt, and a completion's own later tokens."""
    mask = Layout([2, 3], [[0, 2], [1, 1]]).mask
    assert (mask < 0).int().tolist() == [[[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]],
                                         [[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]]  # fmt: skip
    assert set(mask.unique().tolist()) == {0, -INF}


def test_equal_lengths_are_not_copied_and_hide_the_same_from_all():
    layout = Layout([3, 3], [[2], [2]])
    assert layout.prompt_at is layout.completion_at is None
    assert layout.mask.tolist() == [[[0, 0, 0, 0, -INF], [0, 0, 0, 0, 0]]]
    x = torch.arange(6.0)
    assert unpack(x, None, 2, 3).data_ptr() == x.data_ptr()
    assert repack(x.view(2, 3), None).data_ptr() == x.data_ptr()
    assert places([], "cpu") is None and places([2, 0], "cpu").tolist() == [0, 1]


def test_a_cpu_pads_unless_it_is_told_to_pack(standing_in):
    with torch.autocast("cpu", torch.bfloat16):
        assert Layout([2], [[1]]).packed is None
    assert Layout([2], [[1]], packed=True).packed is not None
    assert not attention.halved("cuda"), "float32 is no half precision"
    torch.set_autocast_enabled("cuda", True)
    try:
        assert attention.halved("cuda") and not attention.halved("cpu")
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_what_fills_the_padding_reaches_no_token(monkeypatch):
    """The zeros of `unpack` become 50s: no real token may notice."""
    q, k, v = tokens(*RAGGED)
    clean, filled = Layout(*RAGGED).attend(q, k, v), []

    def unpack_with_noise(x, at, rows, width):
        filled.append(rows * width - len(at))
        out = x.new_full((rows * width, *x.shape[1:]), 50.0).index_copy(0, at, x)
        return out.view(rows, width, *x.shape[1:])

    monkeypatch.setattr(attention, "unpack", unpack_with_noise)
    assert torch.equal(Layout(*RAGGED).attend(q, k, v), clean)
    assert sum(filled) > 0


def test_a_group_of_a_ragged_batch_is_as_it_is_alone():
    prompts, completions = RAGGED
    q, k, v = tokens(*RAGGED)
    spans = [*prompts, *itertools.chain(*completions)]
    together = Layout(*RAGGED).attend(q, k, v).split(spans)
    parts = [x.split(spans) for x in (q, k, v)]
    for b in range(3):
        own = [b, *range(3 + 3 * b, 6 + 3 * b)]
        y = Layout(prompts[b : b + 1], completions[b : b + 1]).attend(
            *(torch.cat([x[i] for i in own]) for x in parts)
        )
        assert_near(y, torch.cat([together[i] for i in own]))


def test_prompts_with_unequal_numbers_of_completions_are_refused():
    with pytest.raises(AssertionError, match="G completions"):
        Layout([1, 1], [[1, 1, 1], [1]])


# ---------------------------------------------------------------------------------------- sampling


@pytest.fixture(params=[512, 0], ids=["few", "many"])
def either(request, monkeypatch):
    """Own keys of a group behind its prompt's, and apart from them."""
    monkeypatch.setattr(attention, "FEW", request.param)


def make_cache(B=3, G=2, longest=6, room=5, fill=0.0, layers=1) -> Cache:
    """Its memory filled with `fill`, as if others had been there."""
    cache = Cache(layers, (B, G, K, D), longest, room, torch.float32, "cpu")
    for x in itertools.chain(*cache.layers):
        x.fill_(fill)
    return cache


def enter(cache: Cache, prompts: list[int], slots: list[int], seed=0, packed=False):
    """Prompts come into slots; their k and v (L, K, d)."""
    layout = Layout(prompts, slots=torch.tensor(slots), packed=packed)
    cache.enter(layout)
    q, k, v = tokens(prompts, [], seed)
    layout.attend(q, k, v, cache.layers[0])
    return [list(pair) for pair in zip(k.split(prompts), v.split(prompts))]


def advance(cache: Cache, B: int, G: int, span: int, seed: int):
    """One token of each completion: q (B, G, H, d), k and v (B, G, K, d), and y (B, G, H, d)."""
    q, k, v = (random(B * G, n, D, seed=seed + i) for i, n in enumerate((H, K, K)))
    y = Step(cache, B, G, span).attend(q, k, v, cache.layers[0])
    cache.lengths[:B] += 1
    return [x.view(B, G, *x.shape[1:]) for x in (q, k, v, y)]


@pytest.mark.parametrize("packed", [False, True])
def test_prompts_come_into_their_slots_and_others_stay(standing_in, packed, either):
    """Into slots 2 and 0, the second of 2 tokens where one of 4 has been."""
    cache = make_cache(fill=7.0)
    enter(cache, [4, 3, 1], [0, 1, 2])
    cache.lengths[:] = torch.tensor([3, 4, 5])
    before = [x[1].clone() for x in cache.layers[0]]
    new = enter(cache, [3, 2], [2, 0], seed=50, packed=packed)
    assert cache.lengths.tolist() == [0, 4, 0]
    assert (cache.mask == 0).sum(-1).tolist() == [[n] * cache.every for n in (2, 3, 3)]
    assert cache.mask[0, 0].tolist()[:3] == [0, 0, -INF]
    for (k, v), slot in zip(new, (2, 0)):
        for x, own in zip((k, v), cache.layers[0]):
            assert torch.equal(own[slot, :, : len(x)], x.transpose(0, 1))
    assert all(torch.equal(x[1], y) for x, y in zip(cache.layers[0], before))


@pytest.mark.parametrize("fill", [0.0, 1e9])
def test_steps_of_slots_at_different_lengths_are_those_of_each_completion_alone(fill, either):
    """Three prompts; after two steps the middle slot gets a new one. What fills the unused places
    of the cache, and what the old prompt and its completions left there, reaches no token."""
    cache, G = make_cache(fill=fill), 2
    names = enter(cache, [4, 6, 1], [0, 1, 2])
    own = [[([], []) for _ in range(G)] for _ in range(3)]
    for t in range(4):
        if t == 2:
            (names[1],), own[1] = enter(cache, [3], [1], seed=70), [([], []) for _ in range(G)]
        q, k, v, y = advance(cache, 3, G, t + 1, seed=10 * t + 100)
        for b, g in itertools.product(range(3), range(G)):
            keys, values = own[b][g]
            keys.append(k[b, g])
            values.append(v[b, g])
            every = [torch.cat((p, torch.stack(x))) for p, x in zip(names[b], (keys, values))]
            assert_near(y[b, g], plain(q[b, g][None], *every)[0])
    assert cache.lengths.tolist() == [4, 2, 4]


def own_of(cache: Cache) -> list[Tensor]:
    """Own keys and values, each (B, G, room, K, d)."""
    if not cache.few:
        return [x.transpose(2, 3) for x in cache.layers[0][2:]]
    own = (x[:, :, cache.longest :] for x in cache.layers[0])
    return [x.unflatten(2, (-1, cache.every)).permute(0, 3, 2, 1, 4) for x in own]


def test_a_step_reads_and_writes_the_first_slots_and_completions_alone(either):
    cache = make_cache(B=3, G=2)
    enter(cache, [4, 6, 1], [0, 1, 2])
    before = [x.clone() for x in (*cache.layers[0], *own_of(cache))]
    advance(cache, 2, 1, 3, seed=5)
    for x, old in zip(own_of(cache), before[-2:]):
        changed = (x != old).any(-1).any(-1)  # (B, G, room)
        assert changed.nonzero().tolist() == [[0, 0, 0], [1, 0, 0]]
    for x, old in zip(cache.layers[0][:2], before):
        assert torch.equal(x[:, :, : cache.longest], old[:, :, : cache.longest])


def test_a_full_slot_goes_on_and_writes_only_its_own_last_place(either):
    """Slot 0 has 5 tokens of 5, slot 1 three. What a full slot gives is not read."""
    cache = make_cache(B=2)
    names = enter(cache, [4, 6], [0, 1])
    seen = [advance(cache, 2, 2, 5, seed=20 * t) for t in range(3)]
    cache.lengths[0] = 5
    before = [x.clone() for x in own_of(cache)]
    q, k, v, y = advance(cache, 2, 2, 5, seed=90)
    for x, old in zip(own_of(cache), before):
        places = (x != old).any(-1).any(-1).nonzero()
        assert {(b, t) for b, _, t in places.tolist()} == {(0, 4), (1, 3)}
    for g in range(2):
        own = [torch.stack([*(s[i][1, g] for s in seen), new[1, g]]) for i, new in ((1, k), (2, v))]
        every = [torch.cat(pair) for pair in zip(names[1], own)]
        assert_near(y[1, g], plain(q[1, g][None], *every)[0])
    assert y.isfinite().all()


@pytest.mark.parametrize("span", [3, 4, 5])
def test_how_far_a_step_looks_changes_nothing_if_it_is_far_enough(span, either):
    cache = make_cache(fill=1e9)
    enter(cache, [4, 6, 1], [0, 1, 2])
    for t in range(2):
        advance(cache, 3, 2, 5, seed=t)
    other = make_cache(fill=1e9)
    for x, y in zip(other.layers[0], cache.layers[0]):
        x.copy_(y)
    for key in ("lengths", "mask", "place"):
        setattr(other, key, getattr(cache, key).clone())
    assert_near(advance(cache, 3, 2, span, 9)[3], advance(other, 3, 2, 5, 9)[3])
    shape = (3, 2, 6 + 4 * 2) if cache.few else (3, 1, 6 + 4)
    assert Step(other, 3, 2, 4).mask.shape == shape


def test_few_own_keys_stand_behind_the_prompts_and_each_sees_its_own_by_hand():
    """A prompt of 2 tokens in a place for 3; two completions with 2 tokens each, then one of them
    alone with a third: columns 3 + 2 t and, of the second, 4 + 2 t."""
    cache = make_cache(B=1, G=2, longest=3, room=4)
    assert cache.few and [x.shape for x in cache.layers[0]] == [(1, K, 3 + 8, D)] * 2
    enter(cache, [2], [0])
    first = Step(cache, 1, 2, 1)
    assert first.column.tolist() == [[3, 4]]
    assert first.mask.tolist() == [[[0, 0, -INF, 0, -INF], [0, 0, -INF, -INF, 0]]]
    cache.lengths += 1
    assert Step(cache, 1, 2, 2).mask[0, 1].tolist() == [0, 0, -INF, -INF, 0, -INF, 0]
    cache.lengths += 1
    cache.keep(torch.tensor([0]), torch.tensor([[1]]), 2)
    alone = Step(cache, 1, 1, 3)
    assert alone.column.tolist() == [[8]]
    assert alone.mask.tolist() == [[[0, 0, -INF, -INF, 0, -INF, 0, -INF, 0]]]
    enter(cache, [3], [0])
    assert Step(cache, 1, 2, 1).mask.tolist() == [[[0, 0, 0, 0, -INF], [0, 0, 0, -INF, 0]]]


def test_own_keys_stand_apart_where_a_group_has_many(monkeypatch):
    monkeypatch.setattr(attention, "FEW", 9)
    assert make_cache(G=3, room=3).few and not make_cache(G=2, room=5).few


def test_keep_moves_slots_and_completions_and_what_is_theirs_by_hand(monkeypatch):
    """Of 3 x 3 stay slots 2 and 0, with completions (2, 0) and (1, 2); of 4 own places 2 count."""
    monkeypatch.setattr(attention, "FEW", 0)
    cache = Cache(1, (3, 3, 1, 1), 2, 4, torch.float32, "cpu")
    k, v, own_k, own_v = cache.layers[0]
    k[:, 0, :, 0] = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    own_k[..., 0, 0, 0] = torch.arange(9.0).view(3, 3)
    own_k[..., 0, 1, 0] = 10 + torch.arange(9.0).view(3, 3)
    own_k[..., 0, 2, 0] = -1
    v.copy_(-k)
    own_v.copy_(-own_k)
    cache.lengths[:] = torch.tensor([7, 8, 9])
    cache.mask[..., :2] = torch.tensor([[0, -INF], [-INF, -INF], [0, 0]])[:, None]
    at = [x.data_ptr() for x in (*cache.layers[0], cache.lengths, cache.mask)]
    cache.keep(torch.tensor([2, 0]), torch.tensor([[2, 0], [1, 2]]), 2)
    for x, sign in ((k, 1), (v, -1)):
        assert (sign * x[:2].flatten()).tolist() == [5, 6, 1, 2]
    for x, sign in ((own_k, 1), (own_v, -1)):
        assert (sign * x[:2, :2, 0, 0, 0]).tolist() == [[8, 6], [1, 2]]
        assert (sign * x[:2, :2, 0, 1, 0]).tolist() == [[18, 16], [11, 12]]
    assert cache.lengths[:2].tolist() == [9, 7]
    assert cache.mask[:2, 0, :2].tolist() == [[0, 0], [0, -INF]]
    now = (*cache.layers[0], cache.lengths, cache.mask)
    assert [x.data_ptr() for x in now] == at, "a CUDA graph reads them where they were"


@pytest.mark.parametrize("stay", [1, 2])
def test_those_who_stay_go_on_as_if_nobody_had_left(stay, either):
    cache = make_cache(fill=1e9)
    names = enter(cache, [4, 6, 1], [0, 1, 2])
    seen = [advance(cache, 3, 2, 5, seed=20 * t) for t in range(3)]
    slots, rows = torch.tensor([2, 0])[:stay], torch.tensor([[1], [0]])[:stay]
    cache.keep(slots, rows, 3)
    q, k, v, y = advance(cache, stay, 1, 4, seed=90)
    for i, (b, g) in enumerate(zip(slots.tolist(), rows[:, 0].tolist())):
        own = [torch.stack([*(s[j][b, g] for s in seen), new[i, 0]]) for j, new in ((1, k), (2, v))]
        every = [torch.cat(pair) for pair in zip(names[b], own)]
        assert_near(y[i, 0], plain(q[i, 0][None], *every)[0])
