"""sampling.py, chapter two: the distribution that is drawn from, and prompts that come and go.

Whatever is done to save time, who shares the batch, who leaves it, who comes in, the tokens are the
same. On a GPU a step is recorded and played back: what that asks of it, that nothing waits and
nothing moves, is tested on any machine; that it draws the same, where there is a GPU.

Letters as in sampling.py: B prompts, N slots, G completions, T tokens at most, V vocabulary.
"""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prompts import INF, NEW, assert_same, completions, make, random, reference_logits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attention
import sampling
from attention import halved
from model import Qwen2VL
from rollout import sample
from sampling import (
    CHECK,
    LOWEST,
    Room,
    draw,
    ends,
    fitting,
    left,
    nucleus,
    ready,
    room_for,
    scaled_logits,
    span,
    uniforms,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(params=[512, 0], ids=["few", "many"])
def either(request, monkeypatch):
    """Own keys of a group behind its prompt's, and apart from them."""
    monkeypatch.setattr(attention, "FEW", request.param)


# ------------------------------------------------------------------------------ the distribution


def test_scaled_logits_divide_by_the_temperature_and_ban():
    hidden, head = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0], [0, 3], [1, 1]])
    found = scaled_logits(hidden, head, 0.5, torch.tensor([1]))
    assert found.tolist() == [[2.0, LOWEST, 6.0], [0.0, LOWEST, 2.0]]
    assert found.softmax(-1)[:, 1].tolist() == [0.0, 0.0]
    none = scaled_logits(hidden, head, 1.0, torch.tensor([], dtype=torch.int64))
    assert none.tolist() == [[1.0, 6.0, 3.0], [0.0, 3.0, 1.0]]


def test_scaled_logits_are_float32_whatever_the_hidden_states_are():
    hidden, head = random(3, 8).bfloat16(), random(5, 8, seed=1)
    found = scaled_logits(hidden, head, 1.0, torch.tensor([4]))
    assert found.dtype == torch.float32
    assert torch.equal(found[:, :4], (hidden @ head.bfloat16().T).float()[:, :4])


P = [0.1, 0.4, 0.2, 0.3]  # cumulative from the likeliest: 0.4, 0.7, 0.9, 1.0


@pytest.mark.parametrize(
    "top_p, top_k, kept",
    [
        (1.0, 0, [0, 1, 2, 3]),
        (1.0, 1, [1]),
        (1.0, 3, [1, 2, 3]),
        (1.0, 9, [0, 1, 2, 3]),
        (0.01, 0, [1]),
        (0.39, 0, [1]),
        (0.41, 0, [1, 3]),  # the token that crosses 0.41 stays
        (0.69, 0, [1, 3]),
        (0.71, 0, [1, 2, 3]),
        (0.95, 0, [0, 1, 2, 3]),
        (0.5, 2, [1]),  # of 4/7, 3/7: the shares are those of what top-k left
        (0.5, 3, [1, 3]),  # of 4/9, 3/9, 2/9
    ],
)
def test_nucleus_keeps_the_top_k_and_then_the_likeliest_that_hold_p(top_p, top_k, kept):
    logits = torch.tensor([P]).log()
    found = nucleus(logits, top_p, top_k)[0]
    assert found.isfinite().nonzero()[:, 0].tolist() == kept
    assert torch.equal(found[kept], logits[0, kept]), "what stays keeps its place and its logit"


def test_nucleus_at_exactly_p_does_not_take_one_more():
    """1/2, 1/4, 1/8, 1/8 are exact in binary: the first holds 1/2, the first two hold 3/4."""
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]]) * math.log(2)
    for top_p, n in ((0.5, 1), (0.75, 2), (0.51, 2), (0.76, 3)):
        assert int(nucleus(logits, top_p, 0).isfinite().sum()) == n, top_p


def test_nucleus_treats_ties_and_rows_each_by_itself():
    """Equal to the k-th: all stay, none is preferred. Top-p takes as many of equals as it needs."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [9.0, -INF, -INF, 9.0]])
    assert nucleus(logits, 1.0, 2).isfinite().sum(1).tolist() == [4, 4, 2]
    assert nucleus(logits, 0.5, 0).isfinite().sum(1).tolist() == [1, 2, 1]
    assert nucleus(logits, 0.99, 0)[2].isfinite().tolist() == [True, False, False, True]


def test_draw_inverts_the_cumulative_distribution():
    """p = 1/4, 1/2, 0, 1/4: [0, 1/4) is token 0, [1/4, 3/4) token 1, the rest token 3."""
    p = torch.tensor([0.25, 0.5, 0.0, 0.25])
    u = torch.tensor([0.0, 0.1, 0.24, 0.26, 0.5, 0.74, 0.76, 0.99])
    assert draw(p.expand(8, -1), u).tolist() == [0, 0, 0, 1, 1, 1, 3, 3]


def test_draw_reads_each_row_by_its_own_uniform():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    assert draw(p, torch.tensor([0.7, 0.9, 0.1])).tolist() == [1, 0, 1]


@pytest.mark.parametrize("vocabulary", [5, 398, 50_000])
def test_draw_never_takes_a_token_of_probability_zero(vocabulary):
    """The first and the last token banned, then all but one, at the smallest and largest u."""
    ends = torch.tensor([0, 1, vocabulary - 2, vocabulary - 1])
    p = random(20, vocabulary).index_fill(1, ends, LOWEST).softmax(-1)
    one = torch.zeros(1, vocabulary).index_fill(1, torch.tensor([vocabulary // 2]), 1.0)
    for u in (0.0, 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24):  # uniforms are multiples of 2^-24
        token = draw(p, torch.full((20,), u))
        assert p.gather(1, token[:, None]).gt(0).all(), u
        assert draw(one, torch.tensor([u])).tolist() == [vocabulary // 2], u
    assert draw(p, torch.zeros(20)).tolist() == [2] * 20
    assert draw(p, torch.full((20,), 1 - 2**-24)).min() > 1


def test_draw_of_probabilities_that_are_not_numbers_is_still_a_token():
    """It could index no embedding otherwise, and the run would end without saying why."""
    p = torch.full((2, 5), torch.nan)
    assert draw(p, torch.tensor([0.0, 0.9])).max() < 5


def test_draw_adds_up_in_float64():
    """A million tokens of 1e-6 each, which is 17 steps of a float32 near 1."""
    p = (0.1 * random(1, 1_000_000)).softmax(-1)
    u = uniforms(0, 0, 1, 16)[0]
    total = p[0].numpy().astype(np.float64).cumsum()
    expected = np.searchsorted(total, u.numpy() * total[-1], side="right")
    assert torch.cat([draw(p, one) for one in u.split(1)]).tolist() == expected.tolist()


def test_frequencies_of_draws_match_the_probabilities():
    """chi^2 = sum (n_i - n p_i)^2 / (n p_i) of 7 possible tokens: 6 degrees of freedom, 99.9 %
    are below 22.46."""
    logits = torch.tensor([0.0, -INF, 1.0, 2.0, -1.0, 0.5, 0.5, -2.0, -INF])
    n, p = 20_000, logits.softmax(0)
    found = draw(p.expand(n, -1), uniforms(0, 0, 1, n)[0]).bincount(minlength=9)
    assert found[1] == found[8] == 0
    expected = (n * p)[p > 0]
    assert ((found[p > 0] - expected) ** 2 / expected).sum() < 22.46


def test_uniforms_are_in_range_and_each_has_one_place():
    u = uniforms(3, 4, 5, 1000)
    assert u.shape == (5, 1000) and u.dtype == torch.float32
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02
    assert len(u.unique()) > 4990
    for other in (uniforms(4, 3, 5, 1000), uniforms(3, 5, 5, 1000), uniforms(2, 4, 5, 1000)):
        assert not (u == other).flatten()[:100].any()


# ----------------------------------------------------------------------------------------- slots


def room_of(made, prompts, slots: int, group=2, new=NEW) -> Room:
    return Room(made.model, len(prompts), slots, group, new, max(len(p.ids) for p in prompts))


@torch.no_grad()
def drawn(made, room: Room, prompts, slots: int, seed=0, temperature=1.0, stops=None) -> list:
    """ids, lengths, logp and finished of the prompts in a room that may have been used before."""
    processor = replace(made.processor, stop_ids=stops or made.processor.stop_ids)
    room.begin(processor, range(len(prompts)), seed, None, (temperature, 1.0, 0))
    room.run(made.model, prompts, slots)
    return room.drawn(len(prompts))


def short(made, every: int = 6) -> list[int]:
    """More tokens that end, so that completions are of many lengths."""
    return [*made.processor.stop_ids, *range(0, 384, every)]


@torch.no_grad()
def test_entering_and_ticking_equal_whole_forwards(made, either):
    """Hidden states after the prompt, and after each of three tokens given to its completions."""
    room, found = room_of(made, made.prompts, 4), []
    choose = room.choose

    def watched(model, hidden, at):
        found.append(hidden.clone())
        choose(model, hidden, at)

    room.choose = watched
    room.begin(made.processor, range(4), 0, None, (1.0, 1.0, 0))
    room.enter(made.model, made.prompts, range(4), range(4))
    tokens = torch.randint(384, (4, 2, 3), generator=torch.Generator().manual_seed(0))
    for t in range(3):
        room.token[:] = tokens[..., t]
        room.tick(made.model, 4, 2, t + 1)
    found = torch.stack(found, 2) @ made.model.head.T  # (B, G, 4, V)
    for b, prompt in enumerate(made.prompts):
        for g in range(2):
            expected = reference_logits(made.reference, prompt, tokens[b, g].tolist())
            assert (found[b, g] - expected).abs().max() < 1e-4


def test_ends_are_found_in_what_was_drawn_by_hand():
    """Of 5 tokens at most: 7 and 8 end, -1 is not yet drawn. In the last row 8 comes beyond what is
    allowed, in the one before nothing has come yet."""
    ids = torch.tensor([[1, 7, 2, 8, -1], [1, 2, 3, -1, -1], [1, 2, 3, 4, 8], [8, 1, 1, 1, 1],
                        [-1, -1, -1, -1, -1], [3, 3, 8, -1, -1]])  # fmt: skip
    lengths, finished = ends(ids, torch.tensor([7, 8]), torch.tensor([5, 5, 5, 5, 5, 2]))
    assert lengths.tolist() == [2, 3, 5, 1, 0, 2]
    assert finished.tolist() == [True, False, True, True, False, False]


def test_a_choice_is_written_where_its_completion_is_by_hand(made):
    """Hidden states that choose tokens 3, 5, 7, 1, of which 5 ends; one completion may have no more
    than one token. Those that are over are drawn on, and what comes is none of theirs."""
    room = Room(SimpleNamespace(cfg=made.model.cfg, device=torch.device("cpu")), 2, 2, 2, 4, 8)
    processor = SimpleNamespace(banned_ids=[0], stop_ids=[5, 6])
    limits = torch.tensor([[4, 4], [2, 1]])
    room.begin(processor, range(2), 0, limits, (0.0, 1.0, 0))
    choose = SimpleNamespace(head=torch.eye(8))  # a logit of 1 beside six of 0
    at = torch.tensor([1, 0])  # prompt 1 is in slot 0, prompt 0 in slot 1
    room.first[at] = torch.tensor([[0, 5], [10, 15]])  # 4 tokens each, and one for what is beyond
    room.choose(choose, choose.head[[3, 5, 7, 0]].view(2, 2, 8), at)
    ids, lengths, logp, finished = room.drawn(2)
    assert ids[..., 0].tolist() == [[3, 5], [7, 1]], "0 is banned, the next of equals is 1"
    assert finished.tolist() == [[False, True], [False, False]]
    assert lengths.tolist() == [[1, 1], [1, 1]]
    assert room.going(2, 2).tolist() == [[True, False], [True, False]], "slots 0 and 1"
    room.cache.lengths += 1
    room.choose(choose, choose.head[[6, 3, 4, 4]].view(2, 2, 8), at)
    ids, lengths, logp, finished = room.drawn(2)
    assert ids[..., :2].tolist() == [[[3, 6], [5, 0]], [[7, 4], [1, 0]]]
    assert finished.tolist() == [[True, True], [False, False]]
    assert lengths.tolist() == [[2, 1], [2, 1]] and not room.going(2, 2).any()
    assert room.token.tolist() == [[4, 4], [6, 3]], "by slots, what comes next in the cache"
    chosen = pytest.approx(1 - math.log(math.e + 6), abs=1e-6)
    assert logp[0, :, :2].tolist() == [[chosen, chosen], [chosen, 0]]
    assert not ids[..., 2:].any() and not logp[..., 2:].any()
    room.cache.lengths += 3  # a slot that is full and goes on
    room.choose(choose, choose.head[[2, 2, 2, 2]].view(2, 2, 8), at)
    assert all(torch.equal(a, b) for a, b in zip(room.drawn(2), (ids, lengths, logp, finished)))


def widths(monkeypatch) -> list[tuple[int, int]]:
    """Collects the shape (N', G') of every step from here on."""
    seen, real = [], Room.step

    def watched(self, model, N, G, span):
        seen.append((N, G))
        return real(self, model, N, G, span)

    monkeypatch.setattr(Room, "step", watched)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_completions_leave_the_batch_and_change_nothing(made, monkeypatch, temperature,
                                                                 either):  # fmt: skip
    """Against a run in which nothing leaves."""
    processor = replace(made.processor, stop_ids=short(made))
    args = made.model, processor, made.prompts, 6, 24, temperature
    seen = widths(monkeypatch)
    out, shapes = sample(*args, seed=4), list(seen)
    monkeypatch.setattr(sampling, "left", lambda live, few: (None, live))  # as large as it was
    seen.clear()
    assert_same(out, sample(*args, seed=4))
    assert set(seen) == {(4, 6)}
    assert len(set(shapes)) > (1 if temperature == 0 else 2) and shapes[-1] < (4, 6)
    assert sorted(shapes, reverse=True) == shapes, "the batch only ever gets smaller"
    assert len(shapes) <= len(seen) and out.lengths.unique().numel() > 1


def test_completions_leave_when_a_quarter_can_go(made, monkeypatch):
    """Not for less: a copy of the cache costs more than they do. A rectangle of 4 x 8 could lose
    1/8; now and then just about a quarter leaves."""
    seen, shares = widths(monkeypatch), []
    for seed in range(6):
        seen.clear()
        sample(made.model, replace(made.processor, stop_ids=short(made, 12)), made.prompts, 8, 24,
               seed=seed)  # fmt: skip
        sizes = [N * G for N, G in dict.fromkeys(seen)]
        shares += [b / a for a, b in itertools.pairwise([32, *sizes]) if b < a]
    assert max(shares) <= 0.75 and max(shares) > 0.6


def test_sampling_stops_when_all_completions_have_ended(made, monkeypatch):
    seen = widths(monkeypatch)
    everything = replace(made.processor, stop_ids=list(range(398)))
    out = sample(made.model, everything, made.prompts, 2, 40)
    assert out.lengths.eq(1).all() and out.finished.all() and not seen
    out = sample(made.model, replace(made.processor, stop_ids=short(made, 3)), made.prompts, 2, 40)
    assert 1 < out.lengths.max() < 30 and len(seen) < out.lengths.max() - 1 + CHECK


def test_one_token_needs_no_step_at_all(made, monkeypatch):
    seen = widths(monkeypatch)
    for slots in (4, 1):
        out = sample(made.model, made.processor, made.prompts, 2, 1, slots=slots)
        assert not seen and out.ids.shape == (4, 2, 1) and out.lengths.eq(1).all()


# ------------------------------------------------------------------------------- prompts that wait


def entries(monkeypatch) -> list[tuple]:
    """Collects (numbers of prompts, their slots, completions that were not over) at each entry."""
    seen, real = [], Room.enter

    def watched(self, model, prompts, numbers, slots):
        going = int(self.going(*self.first.shape).sum()) if seen else 0
        seen.append((list(numbers), list(slots), going))
        return real(self, model, prompts, numbers, slots)

    monkeypatch.setattr(Room, "enter", watched)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", range(1, 10))
def test_prompts_that_wait_come_in_and_nothing_changes(made, monkeypatch, slots, temperature):
    """Nine prompts, of four lengths and of 0, 1 or 2 images, k at a time: the same tokens, ends and
    texts as all at once. No more than k are in work, each enters once, in their order."""
    prompts = [made.prompts[i % 4] for i in (0, 1, 2, 3, 2, 1, 0, 3, 1)]
    processor = replace(made.processor, stop_ids=short(made))
    args = made.model, processor, prompts, 3, NEW, temperature
    whole = sample(*args, seed=1)
    assert whole.lengths.unique().numel() > 3
    seen = entries(monkeypatch)
    assert_same(sample(*args, seed=1, slots=slots), whole)
    assert [n for numbers, _, _ in seen for n in numbers] == list(range(9))
    assert seen[0][:2] == (list(range(slots)), list(range(slots)))
    assert all(set(at) <= set(range(slots)) and len(set(at)) == len(at) for _, at, _ in seen)
    if 2 < slots < 7:
        assert any(going for *_, going in seen), "in came some before the last was over"
    if 1 < slots < 4:
        assert {slot for _, at, _ in seen[1:] for slot in at} == set(range(slots))


def test_the_cache_has_a_place_for_those_in_work_alone(made, monkeypatch):
    made_rooms, real = [], Room.__init__

    def watched(self, *args):
        real(self, *args)
        made_rooms.append(self)

    monkeypatch.setattr(Room, "__init__", watched)
    sample(made.model, made.processor, made.prompts, 3, 4, slots=2)
    sample(made.model, made.processor, made.prompts, 3, 4, slots=9)
    assert [len(room.cache.lengths) for room in made_rooms] == [2, 4]
    assert {x.shape[0] for x in made_rooms[0].cache.layers[0]} == {2}


@pytest.mark.parametrize("slots", [None, 1, 2])
def test_limits_are_kept_for_each_completion(made, slots):
    """What is cut is the beginning of what would have been, and not finished."""
    limits = torch.randint(1, NEW + 1, (4, 3), generator=torch.Generator().manual_seed(1))
    processor = replace(made.processor, stop_ids=short(made, 20))
    args = made.model, processor, made.prompts, 3, NEW
    whole, out = sample(*args, seed=2), sample(*args, seed=2, slots=slots, limits=limits)
    cut = whole.lengths > limits
    assert 2 < cut.sum() < 10 and (whole.lengths == limits).any()
    assert torch.equal(out.lengths, torch.minimum(whole.lengths, limits))
    assert torch.equal(out.finished, whole.finished & ~cut)
    assert torch.equal(out.ids, whole.ids * out.mask)
    assert (out.logp - whole.logp * out.mask).abs().max() < 1e-4
    for row, texts in zip(completions(out), out.texts):
        assert texts == [processor.decode(ids) for ids in row]


def test_a_limit_is_one_token_at_least_and_no_more_than_there_is_room_for(made):
    limits = torch.tensor([[0], [9]] * 2)
    out = sample(made.model, made.processor, made.prompts, 2, 3, limits=limits)
    assert out.lengths.amax(1).tolist() == [1, 3, 1, 3]


def test_limits_may_be_told_once_for_a_group(made):
    limits = torch.tensor([[1], [7], [3], [NEW]])
    out = sample(made.model, made.processor, made.prompts, 3, NEW, seed=2, limits=limits)
    same = sample(made.model, made.processor, made.prompts, 3, NEW, seed=2,
                  limits=limits.expand(4, 3))  # fmt: skip
    assert_same(out, same)
    assert out.lengths.amax(1).tolist() == [1, 7, 3, NEW]


# ----------------------------------------------------------------------------- the room, used again


def test_a_room_that_has_been_used_gives_what_a_new_one_gives(made, either):
    """As on a GPU, where a room stays: other prompts, fewer of them, fewer in work, another seed,
    temperature and end tokens; and at first a cache full of what must not be read."""
    turned = made.prompts[::-1]
    calls = [
        (made.prompts, 3, 0, 1.0, None), (turned[:2], 2, 1, 1.0, short(made)),
        (turned, 1, 2, 0.0, None), ([made.prompts[2]], 1, 0, 0.7, short(made)),
        (made.prompts, 3, 0, 1.0, None),
    ]  # fmt: skip
    used = room_of(made, made.prompts, 3)
    for x in itertools.chain(*used.cache.layers):
        x.fill_(1e9)
    for prompts, slots, *how in calls:
        found = drawn(made, used, prompts, slots, *how)
        fresh = drawn(made, room_of(made, prompts, slots), prompts, slots, *how)
        for a, b in zip(found[:2] + found[3:], fresh[:2] + fresh[3:]):
            assert torch.equal(a, b)
        assert (found[2] - fresh[2]).abs().max() < 1e-4


def tensors_of(room: Room) -> dict[str, Tensor]:
    """Every tensor of a room and of its cache, by name."""
    named = {**vars(room), **{f"cache.{k}": v for k, v in vars(room.cache).items()}}
    return {f"{k}.{i}": x for k, tree in named.items()
            for i, x in enumerate(tree_leaves(tree)) if isinstance(x, Tensor)}  # fmt: skip


def test_every_tensor_of_a_room_stays_where_it_is(made):
    """What a CUDA graph has recorded reads and writes these places, weights too."""
    room, weights = room_of(made, made.prompts, 2), dict(made.model.named_parameters())
    drawn(made, room, made.prompts, 2)
    before = {k: (x, x.data_ptr()) for k, x in {**tensors_of(room), **weights}.items()}
    assert len(before) > 16 + len(weights)
    drawn(made, room, made.prompts[::-1], 2, seed=1, temperature=0.5)
    after = {**tensors_of(room), **dict(made.model.named_parameters())}
    assert {k: x.data_ptr() for k, x in after.items()} == {k: at for k, (_, at) in before.items()}


def test_other_end_tokens_are_not_those_of_what_has_been_recorded(made):
    """Graphs read the tensors of banned and end tokens, so they go when these change."""
    room = room_of(made, made.prompts, 2)
    drawn(made, room, made.prompts, 2)
    graphs = dict(room.graphs)
    drawn(made, room, made.prompts, 2)
    assert graphs and room.graphs.keys() >= graphs.keys()
    drawn(made, room, made.prompts[:1], 1, stops=short(made))
    assert not room.graphs.keys() & graphs.keys()


WAITS = {  # what asks a device for numbers, or hands it some: neither can be recorded
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select",
    "aten::lift_fresh", "aten::is_nonzero", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::bincount", "aten::repeat_interleave.Tensor", "aten::allclose",
}  # fmt: skip


class Recording(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in WAITS, f"{name} cannot be recorded"
        if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
            index = [x for x in args[1] if x is not None]
            assert all(x.dtype == torch.int64 for x in index), "a mask as index has no fixed shape"
        return func(*args, **kwargs or {})


@torch.no_grad()
@pytest.mark.parametrize("how", [(1.0, 1.0, 0), (0.0, 1.0, 0), (0.7, 0.9, 5)])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_can_be_recorded(made, how, bf16, either):
    """No step waits for the device, and none brings numbers from Python to it."""
    room = room_of(made, made.prompts, 3)
    room.begin(made.processor, range(4), 0, None, how)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        room.enter(made.model, made.prompts[:3], range(3), range(3))
        with Recording():
            room.tick(made.model, 3, 2, 1)
            room.tick(made.model, 2, 1, 2)
    with pytest.raises(AssertionError, match="cannot be recorded"), Recording():
        room.enter(made.model, made.prompts[:3], range(3), range(3))
    with pytest.raises(AssertionError, match="no fixed shape"), Recording():
        room.ids[room.ids < 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_played_back_draws_what_its_steps_would(made):
    """Four calls of one room: shapes come again, and are recorded; against steps that never are.
    What is banned and what ends stays right when the memory of others lies between."""
    on_gpu = SimpleNamespace(model=Qwen2VL.from_pretrained(made.folder, device="cuda"),
                             processor=made.processor, prompts=made.prompts)  # fmt: skip
    used, plain = (room_of(on_gpu, made.prompts, 3) for _ in range(2))
    plain.gpu = False
    for seed in range(4):
        found, expected = (drawn(on_gpu, room, made.prompts, 3, seed) for room in (used, plain))
        between = [torch.full((n,), 5, device="cuda") for n in range(1, 40)]
        for a, b in zip(found[:2] + found[3:], expected[:2] + expected[3:]):
            assert torch.equal(a, b)
        del between
    assert any(used.graphs.values())


# --------------------------------------------------------------------------- who comes, who leaves


def test_waiting_prompts_come_in_when_a_quarter_of_the_slots_is_free():
    """Slots with two completions each; a slot is free when both are over."""
    def free(going: str, waiting: int) -> list[int]:
        return ready(np.array([[x != "_", x == "2"] for x in going]), waiting)

    assert free("1211", 3) == [] and free("1_11", 3) == [1]
    assert free("12_111", 9) == [], "one of six is less than a quarter"
    assert free("1_2_11", 9) == [1, 3]
    assert free("1_2_11", 1) == [1], "no more than wait"
    assert free("12_111", 1) == [2], "one waits, and there is a place for it"
    assert free("________", 3) == [0, 1, 2]
    assert free("_", 4) == [0] and free("1", 4) == []


def test_left_keeps_a_rectangle_of_what_has_not_ended_by_hand():
    """3 x 4; the second prompt has ended, the first has completions 1 and 3 left, the third 0."""
    live = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    slots, rows = left(live, few=False)
    assert slots.tolist() == [0, 2]
    assert rows.tolist() == [[1, 3], [0, 1]], "what goes on first, then what fills the rectangle"
    slots, rows = left(live, few=True)  # of 3, 3, 2, 1 slots and 4, 3, 2, 1 completions
    assert slots.tolist() == [0, 2] and rows.tolist() == [[1, 3], [0, 1]]
    assert [x.shape for x in left(np.ones((3, 4), bool), False)] == [(3,), (3, 4)]
    one = np.zeros((3, 4), bool)
    one[2, 3] = True
    assert [x.tolist() for x in left(one, False)] == [[2], [[3]]]


def test_left_of_few_sizes_keeps_more_than_there_is():
    """5 of 8 slots go on, with 3 of 8 completions at most: 6 x 3 stay, 40 others go."""
    live = np.zeros((8, 8), bool)
    live[[1, 3, 4, 6, 7], :2] = True
    live[4, 5] = True
    slots, rows = left(live, few=True)
    assert slots.tolist() == [1, 3, 4, 6, 7, 0] and rows.shape == (6, 3)
    assert rows[2].tolist() == [0, 1, 5]
    assert [x.shape for x in left(live, few=False)] == [(5,), (5, 3)]


@pytest.mark.parametrize("few", [False, True])
def test_left_loses_nobody(few):
    rng = np.random.default_rng(0)
    for _ in range(200):
        live = rng.random((rng.integers(1, 9), rng.integers(1, 9))) < rng.random()
        live[0, 0] = True
        slots, rows = left(live, few)
        assert len(set(slots)) == len(slots)
        assert all(len(set(row)) == len(row) for row in rows.tolist())
        assert live[slots[:, None], rows].sum() == live.sum()


def test_keeping_moves_all_that_is_of_a_slot_by_hand(made, either):
    room = room_of(made, made.prompts, 3, group=2)
    room.position[:] = torch.tensor([20, 10, 30])
    room.first[:] = torch.tensor([[40, 50], [0, 10], [60, 70]])
    room.token[:] = torch.tensor([[1, 2], [3, 4], [5, 6]])
    room.cache.lengths[:] = torch.tensor([7, 8, 9])
    for x in room.cache.layers[1]:
        x[:] = torch.arange(3.0).view(3, *[1] * (x.dim() - 1))
    room.keep(np.array([2, 1]), np.array([[1], [0]]), 5)
    assert room.position[:2].tolist() == [30, 10]
    assert room.first[:2, :1].tolist() == [[70], [0]] and room.token[:2, :1].tolist() == [[6], [3]]
    assert room.cache.lengths[:2].tolist() == [9, 8]
    for x in room.cache.layers[1]:
        x = x[:2, :1, :, :5] if x.dim() == 5 else x[:2]
        assert x.flatten(1).amin(1).tolist() == x.flatten(1).amax(1).tolist() == [2, 1]


@pytest.mark.parametrize("most, sizes", [
    (8, [1, 2, 3, 4, 6, 6, 8, 8]), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]),
    (12, [1, 2, 3, 5, 5, 6, 9, 9, 9, 12, 12, 12]), (5, [1, 2, 3, 4, 5]),
])  # fmt: skip
def test_fitting_is_most_three_quarters_of_it_a_half_and_so_on_by_hand(most, sizes):
    assert [fitting(n, most) for n in range(1, most + 1)] == sizes


def test_fitting_is_never_too_small_and_of_few_sizes():
    for most in range(1, 300):
        sizes = [fitting(n, most) for n in range(1, most + 1)]
        assert all(n <= size <= most for n, size in enumerate(sizes, 1))
        assert len(set(sizes)) <= 2 * math.ceil(math.log2(most)) + 1
        assert all(size <= 1.5 * n + 1 for n, size in enumerate(sizes, 1))


def test_a_step_reads_what_there_is_or_a_multiple_of_64():
    assert [span(n, 300, few=False) for n in (1, 64, 299)] == [1, 64, 299]
    assert [span(n, 300, few=True) for n in (1, 64, 65, 256, 257)] == [64, 64, 128, 256, 300]
    assert span(np.int64(3), 10, few=True) == 10 and span(np.int64(3), 10, few=False) == 3


class Empty:
    """What room_for asks of a room on a GPU; `alive` at its making are the others."""

    alive = 0

    def __init__(self, model, *size):
        self.size, self.others, self.halved = size, Empty.alive, halved(model.device)
        Empty.alive += 1

    def __del__(self):
        Empty.alive -= 1


def test_a_gpu_takes_the_room_again_if_it_is_large_enough_and_never_has_two(monkeypatch):
    """Prompts of up to 64 tokens find place in a room made for one of 30; other groups and other
    lengths of completions do not."""
    class Model:
        device = torch.device("cuda")

    def prompts(*lengths):
        return [SimpleNamespace(ids=range(n)) for n in lengths]

    monkeypatch.setattr(sampling, "Room", Empty)
    model, other = Model(), Model()
    first = id(room_for(model, prompts(30, 20), 2, 4, 8))
    assert room_for(model, prompts(64), 1, 4, 8).size == (2, 2, 4, 8, 64)
    assert id(room_for(model, prompts(64), 1, 4, 8)) == first
    three = prompts(3, 3, 3)
    for asked in ((prompts(65), 1, 4, 8), (three, 1, 4, 8), (three, 3, 4, 8), (three, 3, 5, 8),
                  (prompts(3), 1, 5, 9), (prompts(3), 1, 3, 9)):  # fmt: skip
        room = room_for(model, *asked)
        longest = 128 if len(asked[0][0].ids) == 65 else 64
        assert room.size == (len(asked[0]), *asked[1:], longest)
        assert room is room_for(model, *asked) and room.others == 0
        del room
    torch.set_autocast_enabled("cuda", True)  # a cache of another type
    try:
        assert room_for(model, prompts(3), 1, 3, 9).halved and Empty.alive == 1
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert room_for(other, prompts(3), 1, 4, 9).others == 1
    del model, other
    assert Empty.alive == 0, "a room goes with its model"


def test_a_cpu_makes_a_room_for_each_call_as_small_as_it_may_be(made):
    a, b = (room_for(made.model, made.prompts[:2], 1, 3, 5) for _ in range(2))
    longest = max(len(p.ids) for p in made.prompts[:2])
    assert a is not b and a.size == (2, 1, 3, 5, longest) and not sampling.ROOMS
