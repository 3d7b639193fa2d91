"""rollout.py, chapter two: what is sampled, what is trained, and that the two are one distribution.

Comparisons with transformers are on a random checkpoint, in float32 on the CPU, a prompt and a
completion at a time: nothing is shared, nothing is padded, there is no cache of ours. The rows of
the two end tokens in its head are doubled, so that completions end at different lengths.

Letters as in rollout.py: B prompts, G completions, T new tokens, D width, V vocabulary.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint, picture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

import rollout as rollout_file
from data import Example, Processor, collate
from model import Cache, Layout, Qwen2VL
from rollout import (
    Rollout,
    as_rollout,
    draw,
    leave,
    nucleus,
    prefill,
    sample,
    scaled_logits,
    score,
    step,
    token_logp,
    uniforms,
)

INF = math.inf
NEW = 12  # tokens of a completion at most


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model (ours), reference (transformers'), processor of one checkpoint, and four prompts."""
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tie=False)
    model, processor = Qwen2VL.from_pretrained(folder), Processor.from_pretrained(folder)
    with torch.no_grad():
        model.head[processor.stop_ids] *= torch.tensor([[-2.0], [2.0]])
    model.save_pretrained(folder)
    reference = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    prompts = [processor.prompt(example) for example in EXAMPLES]
    assert len({len(p.ids) for p in prompts}) == 4
    assert [len(p.grid) for p in prompts] == [1, 2, 0, 1]
    return SimpleNamespace(
        model=model, reference=reference, processor=processor, prompts=prompts, folder=folder
    )


EXAMPLES = [
    Example("How many items are there?", "3", (picture(0, 56, 84),), row="one"),
    Example("What is in both?", "cube", (picture(1, 84, 56), picture(2, 56, 56)), row="two"),
    Example("How many legs has a spider, and how many has an ant?", "8", row="none"),
    Example("What color is the large cube?", "red", (picture(3, 84, 84),), row="large"),
]


def reference_logits(reference, prompt, completion=()) -> Tensor:
    """transformers' logits (T + 1, V): after the prompt, and after each completion token."""
    ids = torch.cat((prompt.ids, torch.tensor(completion, dtype=torch.int64)))[None]
    logits = reference(ids, attention_mask=torch.ones_like(ids), **pictures(prompt, ids)).logits[0]
    return logits[len(prompt.ids) - 1 :]


def pictures(prompt, ids) -> dict:
    if not len(prompt.grid):
        return {}
    kinds = torch.zeros_like(ids).index_fill(1, prompt.image_at, 1)
    return {
        "pixel_values": prompt.patches, "image_grid_thw": prompt.grid, "mm_token_type_ids": kinds,
    }  # fmt: skip


def our_logits(model, prompt, completion=()) -> Tensor:
    """Our logits (T + 1, V) of one packed sequence: the completion is part of the prompt here."""
    batch, n = collate([prompt]), len(completion)
    ids = torch.cat((batch.ids, torch.tensor(completion, dtype=torch.int64)))
    after = batch.next_position + torch.arange(n)
    positions = torch.cat((batch.positions, after.expand(3, -1)), 1)
    features = model.visual(batch.patches, batch.grid) if len(batch.grid) else None
    hidden = model(ids, positions, Layout([len(ids)]), features, batch.image_at)
    return hidden[len(prompt.ids) - 1 :] @ model.head.T


def logp_of(logits, completion, temperature, banned) -> Tensor:
    """(T,) of the completion's tokens by logits (T + 1, V), written out plainly."""
    logits = logits.clone() / temperature
    logits[:, banned] = -INF
    return torch.stack([row.log_softmax(0)[i] for row, i in zip(logits, completion)])


def completions(out: Rollout) -> list[list[list[int]]]:
    """B lists of G lists of token ids."""
    rows = zip(out.ids.tolist(), out.lengths.tolist())
    return [[ids[:n] for ids, n in zip(*row)] for row in rows]


def random(*shape, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(a: Rollout, b: Rollout):
    """The same tokens and ends; log-probs up to rounding."""
    assert completions(a) == completions(b) and a.texts == b.texts
    assert torch.equal(a.finished, b.finished)
    assert (a.logp - b.logp).abs().max() < 1e-4


# ------------------------------------------------------------------------------ the distribution


def test_scaled_logits_divide_by_the_temperature_and_ban():
    hidden, head = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0], [0, 3], [1, 1]])
    found = scaled_logits(hidden, head, 0.5, torch.tensor([1]))
    assert found.tolist() == [[2.0, -INF, 6.0], [0.0, -INF, 2.0]]
    none = scaled_logits(hidden, head, 1.0, torch.tensor([], dtype=torch.int64))
    assert none.tolist() == [[1.0, 6.0, 3.0], [0.0, 3.0, 1.0]]


def test_scaled_logits_are_float32_whatever_the_hidden_states_are():
    hidden, head = random(3, 8).bfloat16(), random(5, 8, seed=1)
    found = scaled_logits(hidden, head, 1.0, torch.tensor([4]))
    assert found.dtype == torch.float32
    assert torch.equal(found[:, :4], (hidden @ head.bfloat16().T).float()[:, :4])


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 4096])
def test_token_logp_equals_plain_log_softmax_whatever_the_chunk(chunk):
    """log p_t = z_t / temperature - log sum_v exp(z_v / temperature); value and gradient."""
    hidden, head = random(10, 8).requires_grad_(), random(20, 8, seed=1).requires_grad_()
    targets, banned, weight = torch.arange(10), torch.tensor([17, 19]), random(10, seed=2)
    found, _ = token_logp(hidden, head, targets, 0.7, banned, chunk)
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


def test_token_logp_never_holds_more_than_a_chunk_of_logits():
    """S = 12, V = 50, chunk 4: no tensor of more than 4 x 50 is made, or kept for the backward."""
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
    logits = torch.tensor([0.25, 0.5, 0.0, 0.25]).log()
    u = torch.tensor([0.0, 0.1, 0.24, 0.26, 0.5, 0.74, 0.76, 0.99])
    assert draw(logits.expand(8, -1), u).tolist() == [0, 0, 0, 1, 1, 1, 3, 3]


def test_draw_reads_each_row_by_its_own_uniform():
    logits = torch.tensor([[0.0, 0.0], [0.0, -INF], [-INF, 0.0]])
    assert draw(logits, torch.tensor([0.7, 0.9, 0.1])).tolist() == [1, 0, 1]


@pytest.mark.parametrize("vocabulary", [5, 398, 50_000])
def test_draw_never_takes_a_token_of_probability_zero(vocabulary):
    """The first and the last token banned, then all but one, at the smallest and largest u."""
    logits = random(20, vocabulary)
    logits[:, [0, 1, -2, -1]] = -INF
    one = torch.full((1, vocabulary), -INF).index_fill(1, torch.tensor([vocabulary // 2]), 3.0)
    for u in (0.0, 2**-24, 0.5, 1 - 2**-23, 1 - 2**-24):  # uniforms are multiples of 2^-24
        token = draw(logits, torch.full((20,), u))
        assert logits.gather(1, token[:, None]).isfinite().all(), u
        assert draw(one, torch.tensor([u])).tolist() == [vocabulary // 2], u
    assert draw(logits, torch.zeros(20)).tolist() == [2] * 20
    assert draw(logits, torch.full((20,), 1 - 2**-24)).min() > 1


def test_draw_of_logits_that_are_not_numbers_is_still_a_token():
    """It could index no embedding otherwise, and the run would end without saying why."""
    logits = torch.full((2, 5), torch.nan)
    assert draw(logits, torch.tensor([0.0, 0.9])).max() < 5


def test_draw_adds_up_in_float64():
    """A million tokens of 1e-6 each, which is 17 steps of a float32 near 1."""
    logits = 0.1 * random(1, 1_000_000)
    u = uniforms(0, 0, 1, 16)[0]
    total = logits.softmax(-1)[0].numpy().astype(np.float64).cumsum()
    expected = np.searchsorted(total, u.numpy() * total[-1], side="right")
    assert torch.cat([draw(logits, one) for one in u.split(1)]).tolist() == expected.tolist()


def test_frequencies_of_draws_match_the_probabilities():
    """chi^2 = sum (n_i - n p_i)^2 / (n p_i) of 7 possible tokens: 6 degrees of freedom, 99.9 %
    are below 22.46."""
    logits = torch.tensor([0.0, -INF, 1.0, 2.0, -1.0, 0.5, 0.5, -2.0, -INF])
    n, p = 20_000, logits.softmax(0)
    found = draw(logits.expand(n, -1), uniforms(0, 0, 1, n)[0]).bincount(minlength=9)
    assert found[1] == found[8] == 0
    expected = (n * p)[p > 0]
    assert ((found[p > 0] - expected) ** 2 / expected).sum() < 22.46


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


def test_uniforms_are_in_range_and_each_has_one_place():
    u = uniforms(3, 4, 5, 1000)
    assert u.shape == (5, 1000) and u.dtype == torch.float32
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02
    assert len(u.unique()) > 4990
    for other in (uniforms(4, 3, 5, 1000), uniforms(3, 5, 5, 1000), uniforms(2, 4, 5, 1000)):
        assert not (u == other).flatten()[:100].any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_special_tokens_are_never_sampled(made, temperature):
    """Their rows of the head are made so that their logits are the largest, by far."""
    changed = Qwen2VL.from_pretrained(made.folder)
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    ids = [made.processor.tokenizer.token_to_id(f"<|{name}|>") for name in names]
    assert set(ids) <= set(made.processor.banned_ids)
    with torch.no_grad():
        hidden, _, _ = prefill(changed, made.prompts, 1)
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


# ----------------------------------------------------------------------------- leaving the batch


def widths(monkeypatch) -> list[tuple[int, int]]:
    """Collects the shape (B', G') of every step from here on."""
    seen, real = [], rollout_file.step

    def watched(model, cache, token, position):
        seen.append(tuple(token.shape))
        return real(model, cache, token, position)

    monkeypatch.setattr(rollout_file, "step", watched)
    return seen


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_completions_leave_the_batch_and_change_nothing(made, monkeypatch, temperature):
    """Against a run in which nothing leaves. More tokens that end make completions short."""
    ends = [*made.processor.stop_ids, *range(0, 384, 6)]
    args = made.model, replace(made.processor, stop_ids=ends), made.prompts, 6, 24, temperature
    seen = widths(monkeypatch)
    out, shapes = sample(*args, seed=4), list(seen)
    monkeypatch.setattr(rollout_file, "leave", lambda finished, cache, *batch: batch)
    seen.clear()
    assert_same(out, sample(*args, seed=4))
    assert set(seen) == {(4, 6)}
    assert len(set(shapes)) > (1 if temperature == 0 else 2) and shapes[-1] < (4, 6)
    assert sorted(shapes, reverse=True) == shapes, "the batch only ever gets smaller"
    assert len(shapes) <= len(seen) and out.lengths.unique().numel() > 1


def test_sampling_stops_when_all_completions_have_ended(made, monkeypatch):
    seen = widths(monkeypatch)
    everything = replace(made.processor, stop_ids=list(range(398)))
    out = sample(made.model, everything, made.prompts, 2, 40)
    assert out.lengths.eq(1).all() and out.finished.all() and len(seen) < 4


def test_one_token_needs_no_step_at_all(made, monkeypatch):
    seen = widths(monkeypatch)
    out = sample(made.model, made.processor, made.prompts, 2, 1)
    assert not seen and out.ids.shape == (4, 2, 1) and out.lengths.eq(1).all()


def filled_cache(B: int, G: int) -> Cache:
    """One layer, L = 1, K = 1, d = 1, one token so far; keys say which row they are of."""
    cache = Cache(1, room=2)
    cache.prompt[0] = (torch.arange(B).view(B, 1, 1, 1), -torch.arange(B).view(B, 1, 1, 1))
    cache.prompt_mask = torch.arange(B).view(B, 1)
    names = torch.arange(B * G).view(B, G, 1, 1, 1)
    cache.extend(0, names, -names)
    cache.length = 1
    return cache


def test_leave_keeps_a_rectangle_of_the_unfinished_by_hand():
    """3 x 4; the second prompt has ended, the first has completions 1 and 3 left, the third 0."""
    finished = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    rows, token = torch.arange(4).expand(3, 4), torch.arange(12).view(3, 4) + 50
    cache = filled_cache(3, 4)
    token, groups, rows, position = leave(
        finished, cache, token, torch.arange(3), rows, torch.tensor([10, 20, 30])
    )
    assert groups.tolist() == [0, 2] and position.tolist() == [10, 30]
    assert rows.tolist() == [[1, 3], [0, 1]], "unfinished first, then what fills the rectangle"
    assert token.tolist() == [[51, 53], [58, 59]]
    for own, sign in zip(cache.own[0], (1, -1)):
        assert (sign * own[:, :, 0, 0, 0]).tolist() == [[1, 3], [8, 9]]
    for shared, sign in zip(cache.prompt[0], (1, -1)):
        assert (sign * shared.flatten()).tolist() == [0, 2]
    assert cache.prompt_mask.flatten().tolist() == [0, 2]


def test_leave_goes_on_from_a_batch_that_has_become_smaller():
    """`finished` is of all; in the batch are prompts 0 and 2, completions (1, 3) and (0, 1)."""
    finished = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    groups, rows = torch.tensor([0, 2]), torch.tensor([[1, 3], [0, 1]])
    token, position = torch.tensor([[51, 53], [58, 59]]), torch.tensor([10, 30])
    found = leave(finished, filled_cache(2, 2), token, groups, rows, position)
    assert [x.tolist() for x in found] == [[[53]], [0], [[3]], [10]]


@pytest.mark.parametrize(
    "width, live, shape",
    [
        (4, 8, (2, 4)), (4, 7, (2, 4)), (4, 6, (2, 3)), (4, 1, (1, 1)), (5, 8, (2, 5)),
        (5, 6, (2, 3)),
    ],
)
def test_leave_waits_until_a_quarter_can_go(width, live, shape):
    """Two prompts, of which the last completions have ended, one in each by turns. 2 x 4 of 2 x 5
    would be a fifth."""
    finished = torch.ones(2, width).bool()
    for i in range(live):
        finished[i % 2, i // 2] = False
    rows, groups = torch.arange(width).expand(2, width), torch.arange(2)
    token, cache = torch.zeros(2, width), filled_cache(2, width)
    token, groups, rows, position = leave(finished, cache, token, groups, rows, groups)
    assert token.shape == rows.shape == cache.own[0][0].shape[:2] == shape
    assert len(groups) == len(position) == len(cache.prompt[0][0]) == shape[0]


@torch.no_grad()
def test_prefill_and_steps_equal_whole_forwards(made):
    """Hidden states after the prompt, and after each of three tokens given to its completions."""
    hidden, cache, position = prefill(made.model, made.prompts, 3)
    tokens = torch.randint(384, (4, 2, 3), generator=torch.Generator().manual_seed(0))
    found = [hidden[:, None].expand(4, 2, -1)]
    for t in range(3):
        found.append(step(made.model, cache, tokens[..., t], position + t))
    found = torch.stack(found, 2) @ made.model.head.T  # (B, G, 4, V)
    for b, prompt in enumerate(made.prompts):
        for g in range(2):
            expected = reference_logits(made.reference, prompt, tokens[b, g].tolist())
            assert (found[b, g] - expected).abs().max() < 1e-4


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
