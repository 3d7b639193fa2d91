"""standin.py, chapter two: what is made has the shapes, ids and lengths of what it stands for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import costs
import grpo
import rollout
import standin
from checkpoint import read_config
from data import Processor
from sampling import Room
from standin import (
    draw_lengths,
    imposed,
    make_examples,
    make_processor,
    random_model,
    rebound,
    unending,
)

TINY = standin.HERE / "tiny"


@pytest.fixture(scope="module")
def processor():
    return make_processor(costs.SHAPES["qwen2-vl-2b"])


# ------------------------------------------------------------------------------ prompts and weights


def test_special_tokens_have_their_published_ids(processor):
    """Qwen2-VL-2B-Instruct, config.json and generation_config.json: image_token_id 151655,
    eos_token_id [151645, 151643]."""
    assert processor.image_id == 151655
    assert processor.stop_ids == [151645, 151643]
    ids = {name: processor.tokenizer.token_to_id(name) for name in
           ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")}  # fmt: skip
    assert list(ids.values()) == [151644, 151652, 151653, 151656]


def test_as_many_ids_are_banned_as_of_the_real_tokenizer(processor):
    """6 special ones, and rows 151,657 to 151,935 of the embedding, which no token has."""
    assert len(processor.banned_ids) == 6 + 151_936 - 151_657
    assert set(range(151_657, 151_936)) < set(processor.banned_ids)


def test_a_prompt_has_as_many_tokens_as_r1vs(processor):
    """480 x 320 pixels become 34 x 22 patches, 17 x 11 tokens. The words of R1-V's prompt are 57
    tokens of Qwen2-VL, of which the question "How many items are there in the image?" has 9."""
    prompts = [processor.prompt(example) for example in make_examples(3, seed=0)]
    assert [p.grid.tolist() for p in prompts] == [[[1, 22, 34]]] * 3
    assert {len(p.image_at) for p in prompts} == {187}
    assert all(55 <= len(p.ids) - 187 <= 62 for p in prompts)
    assert all("Output the thinking process in <think> </think>" in p.text for p in prompts)


def test_whatever_is_sampled_can_be_read(processor):
    assert processor.decode([1000, 151_642, 5000]) == " word1000 word151642 word5000"
    assert processor.decode([1000, processor.stop_ids[0], 5000]) == " word1000"


def test_examples_are_fixed_by_their_seed():
    first, again, other = (make_examples(2, seed) for seed in (0, 0, 1))
    assert first == again and first[0].images != other[0].images
    assert first[0].images[0].startswith(b"\x89PNG") and first[0].solution.isdigit()


def test_random_weights_are_as_init_weights_makes_them():
    shape = read_config(TINY)
    model, again = (random_model(shape, "cpu", seed=3) for _ in range(2))
    naive = dict(random_model(shape, "cpu", seed=4).init_weights(seed=3).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == naive.keys() and model.head is model.model.embed_tokens.weight
    for name, p in found.items():
        assert torch.equal(p, again.get_parameter(name))
        if p.ndim == 1:
            assert torch.equal(p, naive[name]), name
        elif p.numel() > 10_000:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.05), name


# ----------------------------------------------------------------------------------------- lengths


def test_lengths_are_lognormal_with_a_tail_that_is_cut():
    """Mean 130 and sigma 0.6: the median is 130 exp(-0.18) = 108.6, and 512 tokens are reached by
    P(z > (ln 512 - ln 108.6) / 0.6 = 2.58) = 0.5 %."""
    drawn = np.concatenate([draw_lengths((16, 8), 130.0, 512, (0, step)) for step in range(100)])
    assert drawn.shape == (1600, 8) and drawn.min() >= 1 and drawn.max() == 512
    assert drawn.mean() == pytest.approx(129.3, abs=2)  # what is cut takes 0.7
    assert np.median(drawn) == pytest.approx(108.6, abs=2)
    assert (drawn == 512).mean() == pytest.approx(0.005, abs=0.002)


def test_lengths_are_those_that_the_model_of_gpus_is_of():
    """costs.lengths has 12,800 quantiles of the distribution that these are drawn from."""
    says = costs.lengths(costs.Workload(), 12_800)
    drawn = np.concatenate([draw_lengths((16, 8), 130.0, 512, (1, step)) for step in range(100)])
    assert np.mean(drawn) == pytest.approx(np.mean(says), rel=0.02)
    for share in (0.05, 0.5, 0.95, 0.99):
        assert np.quantile(drawn, share) == pytest.approx(np.quantile(says, share), rel=0.05)
    assert max(says) == drawn.max() == 512


def test_lengths_are_fixed_by_their_seed():
    first, again, other = (draw_lengths((2, 3), 9.0, 20, (0, step)) for step in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.fixture(scope="module")
def sampled():
    """grpo.sample on the tiny checkpoint's shape, four completions of three prompts, two prompts at
    a time; with the end tokens that there are, or with none."""
    there = Processor.from_pretrained(TINY, "r1v")
    prompts = [there.prompt(example) for example in make_examples(3, seed=0)]
    model = random_model(read_config(TINY), "cpu", seed=0)

    def run(processor=there, slots=2):
        return grpo.sample(model, processor, prompts, group=4, max_new=24, slots=slots)

    return run, there


LENGTHS = torch.tensor([[1, 24, 2, 9], [3, 3, 3, 3], [17, 1, 12, 5]])


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_lengths_are_imposed_exactly(sampled, slots):
    run, processor = sampled
    with imposed(LENGTHS):
        found = run(unending(processor), slots)
    assert torch.equal(found.lengths, LENGTHS) and not found.finished.any()
    beyond = ~found.mask
    assert not found.ids[beyond].any() and not found.logp[beyond].any()
    assert (found.logp[found.mask] < 0).all()
    assert not torch.isin(found.ids[found.mask], torch.tensor(processor.stop_ids)).any()


def test_imposed_lengths_change_nothing_else(sampled):
    """Tokens are those of a sampler that is left alone, as far as both go."""
    run, processor = sampled
    alone = run(unending(processor))
    assert (alone.lengths == 24).all()
    with imposed(LENGTHS):
        found = run(unending(processor))
    assert torch.equal(found.ids[found.mask], alone.ids[found.mask])
    assert grpo.sample is rollout.sample


def test_end_tokens_end_completions_where_they_are_not_banned(sampled):
    """Of lengths as they are imposed, none is longer; some are shorter."""
    run, processor = sampled
    short = run(replace(processor, stop_ids=list(range(300))))
    assert short.finished.any() and (short.lengths <= 24).all()
    with imposed(LENGTHS):
        found = run(replace(processor, stop_ids=list(range(300))))
    assert torch.equal(found.lengths, short.lengths.minimum(LENGTHS))


def test_an_unending_processor_bans_its_end_tokens_and_nothing_else(processor):
    found = unending(processor)
    assert set(found.banned_ids) - set(processor.banned_ids) == set(processor.stop_ids)
    assert replace(found, banned_ids=processor.banned_ids) == processor


def test_a_rebound_name_must_be_there_and_comes_back():
    before = Room.enter
    with pytest.raises(AttributeError, match="entre"), rebound(Room, entre=None):
        pass
    with pytest.raises(KeyError), rebound(Room, enter=None):
        assert Room.enter is None
        raise KeyError
    assert Room.enter is before
