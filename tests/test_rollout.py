"""rollout.py, chapter two: what is sampled, what is trained, and that the two are one distribution.

Comparisons with transformers: see prompts.py. How tokens are drawn: test_sampling.py.

Letters as in rollout.py: B prompts, G completions, T new tokens, D width, V vocabulary.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from prompts import (
    EXAMPLES,
    INF,
    NEW,
    assert_same,
    completions,
    logp_of,
    make,
    our_hidden,
    our_logits,
    pictures,
    random,
    reference_logits,
)
from tiny_checkpoint import picture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig

import model
from attention import spare
from data import Example
from live import Live
from model import Qwen2VL
from rollout import Rollout, as_rollout, sample, score, token_logp


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("checkpoint"))


# ------------------------------------------------------------------- log-probs of the distribution


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 4096, None])
def test_token_logp_equals_plain_log_softmax_whatever_the_chunk(monkeypatch, chunk):
    """log p_t = z_t / temperature - log sum_v exp(z_v / temperature); value and gradient. None: all
    at once, and kept for the backward pass."""
    monkeypatch.setattr("rollout.KEEP", 10 * 20 - (chunk is not None))
    hidden, head = random(10, 8).requires_grad_(), random(20, 8, seed=1).requires_grad_()
    targets, banned, weight = torch.arange(10), torch.tensor([17, 19]), random(10, seed=2)
    found, _ = token_logp(hidden, head, targets, 0.7, banned, chunk or 1)
    logits = hidden @ head.T / 0.7
    logits = torch.cat((logits[:, :17], logits[:, [18]]), 1)  # banned tokens do not exist
    expected = logits.log_softmax(-1)[torch.arange(10), targets]
    assert (found - expected).abs().max() < 1e-5
    ours = torch.autograd.grad((found * weight).sum(), (hidden, head))
    for a, b in zip(ours, torch.autograd.grad((expected * weight).sum(), (hidden, head))):
        assert b.norm() > 0.1 and (a - b).abs().max() < 1e-5


def test_token_logp_defaults_to_temperature_one_and_bans_nothing():
    hidden, head, targets = random(4, 8), random(6, 8, seed=1), torch.tensor([5, 0, 3, 3])
    found, _ = token_logp(hidden, head, targets)
    expected = (hidden @ head.T).log_softmax(-1)[torch.arange(4), targets]
    assert (found - expected).abs().max() < 1e-6


def test_token_logp_never_holds_more_than_a_chunk_of_logits(monkeypatch):
    """S = 12, V = 50, chunk 4: no tensor of more than 4 x 50 is made, or kept for the backward."""
    monkeypatch.setattr("rollout.KEEP", 12 * 50 - 1)
    made, kept = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    def keep(x):
        kept.append(x.numel())
        return x

    hidden, head = random(12, 3).requires_grad_(), random(50, 3, seed=1).requires_grad_()
    with Watch():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logp, _ = token_logp(hidden, head, torch.arange(12), chunk=4)
        logp.sum().backward()
    assert max(made) == 4 * 50, "a chunk's logits, and nothing larger"
    # Between forward and backward only the inputs (50 x 3 at most) are kept, no chunk's logits.
    assert max(kept, default=0) <= 50 * 3
    assert hidden.grad.abs().sum() > 0 and head.grad.abs().sum() > 0


@pytest.mark.parametrize("keep, entropies", [(0, True), (2**22, True), (0, False)])
@pytest.mark.parametrize("offset", [0, 1e4, -1e6])
def test_large_logits_lose_no_digits(monkeypatch, keep, entropies, offset):
    """An offset that all logits share changes nothing but how they are rounded; against float64."""
    monkeypatch.setattr("rollout.KEEP", keep)
    head = torch.cat((3 * random(90, 6), torch.full((90, 1), float(offset))), 1).requires_grad_()
    hidden, targets = torch.cat((random(40, 6, seed=1), torch.ones(40, 1)), 1), torch.arange(40)
    banned = torch.tensor([80, 81])
    logp, entropy = token_logp(hidden, head, targets, 1.0, banned, entropies=entropies)
    logits = torch.nn.functional.linear(hidden, head).double()
    logits = logits.index_fill(1, banned, -torch.inf).log_softmax(-1)
    assert (logp - logits[torch.arange(40), targets]).abs().max() < 4e-6
    if entropies:
        expected = -(logits.exp() * logits.clamp(min=-1e9)).sum(-1)
        assert (entropy - expected).abs().max() < 4e-6


def test_entropy_by_hand():
    """p = (1/2, 1/4, 1/4): 1.5 log 2; a certain token: 0; a banned one counts for nothing."""
    head = torch.tensor([[2.0, 50, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]) * math.log(2)
    hidden = torch.eye(3).requires_grad_()
    _, entropy = token_logp(hidden, head, torch.tensor([0, 0, 0]), banned=torch.tensor([3]))
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2), 0.0, math.log(3)], abs=1e-6)
    assert not entropy.requires_grad
    _, hot = token_logp(hidden, head, torch.tensor([0, 0, 0]), 0.5, banned=torch.tensor([3]))
    p = torch.tensor([4.0, 1, 1]) / 6  # 2^(2/0.5) : 2^(1/0.5) is 4 : 1
    assert hot[0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)


def plain_logp(hidden, head, targets, temperature, banned) -> Tensor:
    """The formula as it is read, for autograd."""
    logits = (hidden @ head.T / temperature).index_fill(1, banned, -INF)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("autocast, near", [(False, 1e-5), (True, 0.02)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_the_gradient_by_hand_is_that_of_autograd(temperature, autocast, near):
    """In float32; and under bfloat16 autocast, where it may be 2 % of its length away. (It computes
    in float32 whatever it is given, so there is nothing for gradcheck, which needs float64.)"""
    hidden, head = random(40, 16).requires_grad_(), random(30, 16, seed=1).requires_grad_()
    targets, banned = torch.arange(40) % 27, torch.tensor([28, 29, 27])
    weight = random(40, seed=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = token_logp(hidden, head, targets, temperature, banned, 7)
    assert found.dtype == torch.float32
    expected = plain_logp(hidden, head, targets, temperature, banned)
    assert (found - expected).abs().max() < (0.2 if autocast else 1e-5)
    ours = torch.autograd.grad((found * weight).sum(), (hidden, head))
    for a, b in zip(ours, torch.autograd.grad((expected * weight).sum(), (hidden, head))):
        assert a.dtype == torch.float32
        assert b.norm() > 1 and (a - b).norm() < near * b.norm()
    assert ours[1][banned].eq(0).all(), "what is banned learns nothing"


def test_the_gradient_of_the_head_adds_up_in_float32():
    """300 chunks, each of which adds 2^-9: in bfloat16 the sum would stop at 1/2."""
    hidden, head = torch.ones(300, 1), torch.zeros(2, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = token_logp(hidden, head, torch.zeros(300, dtype=torch.int64), chunk=1)
    (found,) = torch.autograd.grad(logp.sum(), head, retain_graph=True)
    assert found.flatten().tolist() == [150, -150]
    (found,) = torch.autograd.grad(logp.sum() * 2**-8, head)
    assert found.flatten().tolist() == pytest.approx([150 / 256, -150 / 256], rel=2**-8)


def test_no_tokens_have_no_log_probs_and_a_gradient_of_zeros():
    hidden, head = torch.zeros(0, 4).requires_grad_(), random(6, 4).requires_grad_()
    logp, entropy = token_logp(hidden, head, torch.zeros(0, dtype=torch.int64))
    assert logp.shape == entropy.shape == (0,)
    a, b = torch.autograd.grad(logp.sum(), (hidden, head))
    assert a.shape == (0, 4) and b.eq(0).all()


@pytest.mark.parametrize("kept", [False, True])
def test_token_logp_has_few_tensors_of_a_chunks_logits_at_a_time(monkeypatch, kept):
    """At the worst moment the bytes of two of them, forward and backward, beside hidden states,
    head and their gradients. Kept: a chunk is all, and one of the two stays between."""
    monkeypatch.setattr("rollout.KEEP", 60 * 5000 - 1 + kept)
    hidden, head = random(60, 2).requires_grad_(), random(5000, 2, seed=1).requires_grad_()
    logits, small = 4 * (60 if kept else 20) * 5000, 4 * 3 * (5000 * 2 + 60 * 2)
    with Live() as live:
        logp, _ = token_logp(hidden, head, torch.arange(60), chunk=20)
        assert 2 * logits < live.peak < 2 * logits + small
        assert kept * logits <= live.now < kept * logits + small
        live.peak = 0
        logp.sum().backward()
    assert 2 * logits < live.peak < 2 * logits + small


# -------------------------------------------------------------------------------------- sampling


def generate(made, prompt, new=NEW) -> list[int]:
    """transformers' greedy completion of one prompt, the end token included."""
    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, pad_token_id=made.processor.stop_ids[1],
        eos_token_id=made.processor.stop_ids, suppress_tokens=made.processor.banned_ids,
    )  # fmt: skip
    ids = prompt.ids[None]
    out = made.reference.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config, **pictures(prompt, ids)
    )
    return out[0, len(prompt.ids) :].tolist()


def test_greedy_samples_equal_transformers_generate_token_for_token(made):
    """Unequal prompts; one image, two images, none. Both end tokens end a completion."""
    many = [
        made.processor.prompt(Example(f"{n} items?", "", EXAMPLES[n % 4].images)) for n in range(24)
    ]
    prompts = made.prompts + many
    out = sample(made.model, made.processor, prompts, 1, NEW, temperature=0)
    theirs = [generate(made, prompt) for prompt in prompts]
    assert [row[0] for row in completions(out)] == theirs
    assert {ids[-1] for ids in theirs if len(ids) < NEW} == set(made.processor.stop_ids)
    assert any(len(ids) == NEW for ids in theirs) and len({len(ids) for ids in theirs}) > 3
    assert len({tuple(ids) for ids in theirs}) > 8, "answers that depend on the question"


def test_greedy_group_members_are_all_alike(made):
    out = sample(made.model, made.processor, made.prompts, 3, NEW, temperature=0)
    one = sample(made.model, made.processor, made.prompts, 1, NEW, temperature=0)
    assert [[row[0]] * 3 for row in completions(one)] == completions(out)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_sampled_log_probs_are_those_of_a_plain_forward_and_of_transformers(made, temperature):
    """log softmax(z / temperature) without the banned tokens; greedy ones at temperature 1."""
    out = sample(made.model, made.processor, made.prompts, 3, NEW, temperature, seed=1)
    banned, divide = made.processor.banned_ids, temperature or 1.0
    scored, _ = score(made.model, out, divide, banned)
    for b, (prompt, row) in enumerate(zip(made.prompts, completions(out))):
        for g, ids in enumerate(row):
            ours = logp_of(our_logits(made.model, prompt, ids), ids, divide, banned)
            theirs = logp_of(reference_logits(made.reference, prompt, ids), ids, divide, banned)
            for found in (out.logp[b, g, : len(ids)], scored[b, g, : len(ids)]):
                assert (found - ours).abs().max() < 1e-4
                assert (found - theirs).abs().max() < 1e-4
    assert out.logp[~out.mask].eq(0).all() and scored[~out.mask].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("slots", [None, 2])
def test_under_bfloat16_autocast_the_two_stay_near_each_other(made, slots):
    """As a run of --bf16 does it: each within 0.03 of the other (on the machine where this was
    written 1e-6: a CPU attends in float32), and within 0.1 of what float32 would say."""
    with torch.autocast("cpu", torch.bfloat16):
        out = sample(made.model, made.processor, made.prompts, 6, NEW, seed=1, slots=slots)
        scored, _ = score(made.model, out, 1.0, made.processor.banned_ids)
    assert out.logp.dtype == scored.dtype == torch.float32
    far = (out.logp - scored).abs()[out.mask]
    assert far.max() < 0.03 and far.exp().mean() < 1.003, "the mismatch of grpo.update"
    exact, _ = score(made.model, out, 1.0, made.processor.banned_ids)
    assert 0 < (exact - scored).abs().max() < 0.1


def test_nothing_need_be_banned(made):
    out = sample(made.model, replace(made.processor, banned_ids=[]), made.prompts, 2, 4, seed=1)
    again, _ = score(made.model, out)
    assert (again - out.logp).abs().max() < 1e-4


def test_spare_rows_change_no_log_prob_and_no_gradient(made, monkeypatch):
    """On a CPU in bfloat16 packed rows are filled up to a multiple of 16: against none spared."""
    rollout = sample(made.model, made.processor, made.prompts, 3, 5, seed=2)
    shapes, product = [], F.linear

    def watched(x, *rest):
        shapes.append(len(x))
        return product(x, *rest)

    def scored():
        made.model.zero_grad()
        shapes.clear()
        with torch.autocast("cpu", torch.bfloat16):
            logp, entropy = score(made.model, rollout)
        logp.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in made.model.parameters()])
        return logp.detach(), entropy, gradient, {n for n in shapes if n % 16}

    monkeypatch.setattr(F, "linear", watched)
    *filled, odd = scored()
    monkeypatch.setattr(model, "spare", lambda x: 0)
    *plain, more = scored()
    made.model.zero_grad()
    assert len(odd) < len(more), "what is left is the vision tower's"
    for a, b in zip(filled, plain):
        assert (a - b).norm() < 1e-3 * b.norm()


def test_spare_rows_make_few_numbers_of_rows_and_none_in_float32():
    lengths = range(5000)
    assert not any(spare(torch.empty(n, 1)) for n in lengths)
    with torch.autocast("cpu", torch.bfloat16):
        filled = [n + spare(torch.empty(n, 1)) for n in lengths]
    assert all(n <= m < n + 128 for n, m in zip(lengths, filled)) and len({*filled}) == 65 + 32
    assert [filled[n] for n in (0, 1, 16, 17, 1024, 1025)] == [0, 16, 16, 32, 1024, 1152]


def test_frequencies_of_samples_match_the_models_probabilities(made):
    """The first token of 4,000 completions against softmax(z / 0.5), in 10 bins of equal mass of
    the tokens as their ids go: 9 degrees of freedom, 99.9 % are below 27.88."""
    prompt, banned = made.prompts[0], made.processor.banned_ids
    out = sample(made.model, made.processor, [prompt], 4000, 1, 0.5, seed=3)
    with torch.no_grad():
        logits = reference_logits(made.reference, prompt)[0] / 0.5
    logits[banned] = -INF
    p = logits.softmax(0)
    bins = (p.cumsum(0) * 9.999).long()
    expected = 4000 * torch.zeros(10).index_add(0, bins, p)
    found = bins[out.ids.flatten()].bincount(minlength=10)
    assert ((found - expected) ** 2 / expected).sum() < 27.88
    assert len(set(out.ids.flatten().tolist())) > 50


def test_top_k_and_top_p_limit_what_is_sampled_but_not_its_log_prob(made):
    """Samples come from the nucleus; the log-probs are of the whole distribution, as greedy's."""
    greedy = sample(made.model, made.processor, made.prompts, 2, NEW, temperature=0)
    for limit in ({"top_k": 1}, {"top_p": 1e-6}):
        assert_same(sample(made.model, made.processor, made.prompts, 2, NEW, **limit), greedy)
    out = sample(made.model, made.processor, made.prompts, 64, 1, 1.0, 0, top_k=3)
    for prompt, tokens, logp in zip(made.prompts, out.ids[..., 0], out.logp[..., 0]):
        with torch.no_grad():
            logits = reference_logits(made.reference, prompt)[0]
        logits[made.processor.banned_ids] = -INF
        assert set(tokens.tolist()) == set(logits.topk(3).indices.tolist())
        assert (logp - logits.log_softmax(0)[tokens]).abs().max() < 1e-4


def test_a_seed_fixes_the_samples_whatever_shares_the_batch(made):
    """Backwards, one at a time and all at once: uids, not places, name the random numbers."""
    whole = sample(made.model, made.processor, made.prompts, 3, NEW, seed=5, uids=[7, 8, 9, 10])
    turned = sample(
        made.model, made.processor, made.prompts[::-1], 3, NEW, seed=5, uids=[10, 9, 8, 7]
    )
    assert_same(turned.select([3, 2, 1, 0]), whole)
    for i, prompt in enumerate(made.prompts):
        alone = sample(made.model, made.processor, [prompt], 3, NEW, seed=5, uids=[7 + i])
        assert_same(alone, whole.select([i]))
    torch.manual_seed(1)  # torch's own generator is neither read nor moved
    state = torch.get_rng_state()
    again = sample(made.model, made.processor, made.prompts, 3, NEW, seed=5, uids=[7, 8, 9, 10])
    assert_same(again, whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_uids_are_the_places_in_the_list_if_not_given(made):
    found = sample(made.model, made.processor, made.prompts, 2, 4, seed=5)
    assert_same(found, sample(made.model, made.processor, made.prompts, 2, 4, 1.0, 5, [0, 1, 2, 3]))


def test_group_members_seeds_and_equal_prompts_differ(made):
    prompts = [made.prompts[0]] * 2
    a = completions(sample(made.model, made.processor, prompts, 4, 4, 1.5, seed=0))
    b = completions(sample(made.model, made.processor, prompts, 4, 4, 1.5, seed=1))
    every = [tuple(ids) for row in (*a, *b) for ids in row]
    assert len(set(every)) == len(every) == 16


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_special_tokens_are_never_sampled(made, temperature):
    """Their rows of the head are made so that their logits are the largest, by far."""
    changed = Qwen2VL.from_pretrained(made.folder)
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    ids = [made.processor.tokenizer.token_to_id(f"<|{name}|>") for name in names]
    assert set(ids) <= set(made.processor.banned_ids)
    with torch.no_grad():
        hidden = torch.cat([our_hidden(changed, prompt) for prompt in made.prompts])
        changed.head[ids] = 100 * torch.cat((hidden, -hidden[:1]))
        for prompt, best in zip(made.prompts, ids):
            assert our_logits(changed, prompt)[0].argmax() == best
    out = sample(changed, made.processor, made.prompts, 8, NEW, temperature)
    assert not torch.isin(out.ids[out.mask], torch.tensor(ids)).any()
    assert_same(out, sample(made.model, made.processor, made.prompts, 8, NEW, temperature))


def test_lengths_count_the_end_token_and_cut_completions_are_not_finished(made):
    out = sample(made.model, made.processor, made.prompts, 24, NEW, seed=2)
    stops = set(made.processor.stop_ids)
    assert out.lengths.unique().numel() > 6 and len(out.finished.unique()) == 2
    ends = set()
    flat = [ids for row in completions(out) for ids in row]
    for ids, finished in zip(flat, out.finished.flatten().tolist()):
        assert (ids[-1] in stops) == finished and not stops & set(ids[:-1])
        assert finished or len(ids) == NEW
        ends |= {ids[-1]} & stops
    assert ends == stops
    assert out.ids[~out.mask].eq(0).all()


@pytest.mark.parametrize("most", range(1, 8))
def test_a_greedy_completion_cut_earlier_is_the_beginning_of_the_longer_one(made, most):
    """An end token at the very last place is an end all the same."""
    args = made.model, made.processor, made.prompts, 1
    few, more = sample(*args, most, temperature=0), sample(*args, NEW, temperature=0)
    assert [row[0][:most] for row in completions(more)] == [row[0] for row in completions(few)]
    assert torch.equal(few.finished, more.finished & (more.lengths <= most))
    assert few.ids.shape == (4, 1, most)


def test_texts_are_the_completions_without_their_end_token(made):
    out = sample(made.model, made.processor, made.prompts, 24, NEW, seed=2)
    tokenizer = made.processor.tokenizer
    for row, texts, ended in zip(completions(out), out.texts, out.finished.tolist()):
        for ids, text, end in zip(row, texts, ended):
            assert text == tokenizer.decode(ids[:-1] if end else ids, skip_special_tokens=False)
    assert not any("<|im_end|>" in text for row in out.texts for text in row)


def by_hand() -> Rollout:
    """B = 3, G = 2, T = 4."""
    ids = torch.arange(24).view(3, 2, 4)
    lengths = torch.tensor([[4, 1], [2, 3], [1, 1]])
    finished = torch.tensor([[False, True], [True, True], [True, False]])
    texts = [["a", "b"], ["c", "d"], ["e", "f"]]
    return Rollout(["p", "q", "r"], ids, lengths, ids / 10, finished, texts)


def test_the_mask_is_true_on_the_first_lengths_tokens():
    assert by_hand().mask.int().tolist() == [
        [[1, 1, 1, 1], [1, 0, 0, 0]], [[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]],
    ]  # fmt: skip


def test_select_takes_prompts_in_the_order_asked_for():
    out, found = by_hand(), by_hand().select([2, 0])
    assert found.prompts == ["r", "p"] and found.texts == [["e", "f"], ["a", "b"]]
    for name in ("ids", "lengths", "logp", "finished"):
        expected = torch.stack([getattr(out, name)[2], getattr(out, name)[0]])
        assert torch.equal(getattr(found, name), expected), name


def test_replace_puts_fresh_prompts_in_their_place_and_leaves_both_rollouts_alone():
    out, fresh = by_hand(), by_hand().select([1, 0])
    fresh.ids += 100
    fresh.logp += 100
    fresh.prompts, fresh.texts = ["x", "y"], [["k", "l"], ["m", "n"]]
    found = out.replace([2, 1], fresh)
    assert found.prompts == ["p", "y", "x"] and found.texts == [["a", "b"], ["m", "n"], ["k", "l"]]
    assert found.ids[:, 0, 0].tolist() == [0, 100, 108]
    assert found.logp[:, 1, 0].tolist() == pytest.approx([0.4, 100.4, 101.2])
    assert found.lengths.tolist() == [[4, 1], [4, 1], [2, 3]]
    assert found.finished.tolist() == [[False, True], [False, True], [True, True]]
    untouched = by_hand()
    assert torch.equal(out.ids, untouched.ids) and out.prompts == untouched.prompts
    assert torch.equal(out.lengths, untouched.lengths) and out.texts == untouched.texts
    assert fresh.prompts == ["x", "y"] and fresh.ids[0, 0, 0] == 108


# ------------------------------------------------------------------------------------- log-probs

TARGETS = [  # B = 4, G = 3, unequal lengths, some of one token
    [[5], [6, 7, 8, 9], [10, 11]],
    [[20, 21, 22], [23], [24]],
    [[30], [31], [32]],
    [[40, 41], [42, 43, 44, 45, 46], [47, 48]],
]


def test_as_rollout_holds_the_given_tokens(made):
    out = as_rollout(made.prompts, TARGETS)
    assert completions(out) == TARGETS and out.prompts is made.prompts
    assert out.lengths.tolist() == [[1, 4, 2], [3, 1, 1], [1, 1, 1], [2, 5, 2]]
    assert out.ids.dtype == torch.int64 and out.ids.shape == out.logp.shape == (4, 3, 5)
    assert out.finished.all() and len(out.texts) == 4 and {len(row) for row in out.texts} == {3}
    assert out.ids[~out.mask].eq(0).all() and out.logp.eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("targets", [TARGETS, [row[:1] for row in TARGETS]], ids=["G 3", "G 1"])
def test_score_equals_the_log_softmax_of_transformers(made, targets, temperature):
    banned = made.processor.banned_ids
    logp, entropy = score(made.model, as_rollout(made.prompts, targets), temperature, banned)
    for b, (prompt, row) in enumerate(zip(made.prompts, targets)):
        for g, ids in enumerate(row):
            logits = reference_logits(made.reference, prompt, ids)
            expected = logp_of(logits, ids, temperature, banned)
            assert (logp[b, g, : len(ids)] - expected).abs().max() < 1e-4
            logits[:, banned] = -1e9
            p = (logits[: len(ids)] / temperature).softmax(-1)
            plain = -(p * p.clamp(min=1e-30).log()).sum(-1)
            assert (entropy[b, g, : len(ids)] - plain).abs().max() < 1e-4
            assert logp[b, g, len(ids) :].eq(0).all() and entropy[b, g, len(ids) :].eq(0).all()


def test_score_bans_nothing_and_does_not_scale_by_default(made):
    targets = [[[7, 8]]]
    logp, _ = score(made.model, as_rollout(made.prompts[:1], targets))
    logits = reference_logits(made.reference, made.prompts[0], [7, 8])
    assert (logp[0, 0] - logp_of(logits, [7, 8], 1.0, [])).abs().max() < 1e-4


def test_the_gradient_of_score_is_that_of_transformers_down_to_the_patches(made):
    """sum of weight x log p over all groups: head, decoder, vision tower, patch embedding."""
    banned, weight = made.processor.banned_ids, random(4, 3, 5, seed=9)
    logp, _ = score(made.model, as_rollout(made.prompts, TARGETS), 0.8, banned)
    loss = (weight * logp).sum()
    expected = 0.0
    for b, (prompt, row) in enumerate(zip(made.prompts, TARGETS)):
        for g, ids in enumerate(row):
            logits = reference_logits(made.reference, prompt, ids)
            expected = expected + weight[b, g, : len(ids)] @ logp_of(logits, ids, 0.8, banned)
    vision = made.model.visual, made.reference.model.visual
    pairs = {
        "patches": [m.patch_embed.proj.weight for m in vision],
        "vision": [m.blocks[0].attn.qkv.weight for m in vision],
        "merger": [m.merger.mlp[0].weight for m in vision],
        "decoder": [
            m.layers[0].self_attn.k_proj.weight
            for m in (made.model.model, made.reference.model.language_model)
        ],
        "head": [made.model.head, made.reference.lm_head.weight],
    }
    ours = torch.autograd.grad(loss, [a for a, _ in pairs.values()])
    theirs = torch.autograd.grad(expected, [b for _, b in pairs.values()])
    for name, a, b in zip(pairs, ours, theirs):
        assert b.norm() > 1e-3, name
        assert (a - b).norm() < 1e-3 * b.norm(), name


@torch.no_grad()
def test_changing_one_image_changes_only_the_log_probs_of_its_group(made):
    before, _ = score(made.model, as_rollout(made.prompts, TARGETS))
    other = replace(EXAMPLES[1], images=(EXAMPLES[1].images[0], picture(77, 56, 56)))
    prompts = [*made.prompts]
    prompts[1] = made.processor.prompt(other)
    after, _ = score(made.model, as_rollout(prompts, TARGETS))
    change = (before - after).abs().amax(-1)  # (B, G)
    assert change[1].min() > 1e-3, "the second image of its two reaches every completion"
    assert change[[0, 2, 3]].max() < 1e-5


@torch.no_grad()
def test_a_completion_does_not_see_the_others_of_its_group(made):
    before, _ = score(made.model, as_rollout(made.prompts, TARGETS))
    changed = [[list(ids) for ids in row] for row in TARGETS]
    changed[0][1] = [300, 301, 302]  # another text, and another length
    after, _ = score(made.model, as_rollout(made.prompts, changed))
    change = (before - after).abs().amax(-1)
    assert change[0, 1] > 1e-2
    change[0, 1] = 0
    assert change.max() < 1e-5


def test_score_runs_prompt_and_image_once_per_group(made, monkeypatch):
    """Tokens of the packed forward: each prompt once, completions without their last token."""
    seen, real = [], Qwen2VL.forward

    def watched(self, ids, *args):
        seen.append(len(ids))
        return real(self, ids, *args)

    monkeypatch.setattr(Qwen2VL, "forward", watched)
    score(made.model, as_rollout(made.prompts, TARGETS))
    tokens = sum(len(ids) - 1 for row in TARGETS for ids in row)
    assert seen == [sum(len(p.ids) for p in made.prompts) + tokens]
