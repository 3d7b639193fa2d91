"""Any number of pictures in a row: each sample sees its own, and no other's.

What peers fell into: pictures of a batch in one list, told apart by a grid that has a row per
picture, not per sample (om-ai-lab/VLM-R1#263, #342); pixels repeated in another order than grids
(StarsfieldAI/R1-V#4); pictures dropped beside rows of text (huggingface/trl#4488). Two processes
with unequal pictures are in test_parallel.py, whole runs in test_recipes.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from prompts import completions, logp_of, reference_logits
from tiny_checkpoint import FAMILIES, make_checkpoint, picture

from data import Example, Processor
from model import Qwen2VL
from rollout import as_rollout, look, sample, score

SIZES = [  # (height, width) of the pictures of each row; resized up, down, and kept
    [(56, 84)],
    [(30, 20), (140, 56), (56, 56)],
    [],
    [(20, 90), (112, 84)],
    [(56, 56)] * 5,
    [],
]
ROWS = [
    Example(f"What has changed? {'x' * i}", "1", tuple(picture(10 * i + k, *size)
            for k, size in enumerate(sizes)), row=f"{i} pictures")
    for i, sizes in enumerate(SIZES)
]  # fmt: skip
GIVEN = [[[65 + 7 * i + g + t for t in range(3 + g)] for g in range(2)] for i in range(len(ROWS))]
NEAR = 1e-5


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """Ours, transformers' model and the prompts of the rows."""
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), family=request.param)
    processor = Processor.from_pretrained(folder, "vlm_r1", max_pixels=84 * 84)
    return SimpleNamespace(
        model=Qwen2VL.from_pretrained(folder), processor=processor,
        reference=FAMILIES[request.param][1].from_pretrained(folder).eval(),
        prompts=[processor.prompt(row) for row in ROWS],
    )  # fmt: skip


def logp(made, prompts, at) -> torch.Tensor:
    """Log-probs (B, G, T) of the given completions of the rows `at`."""
    with torch.no_grad():
        return score(made.model, as_rollout(prompts, [GIVEN[i] for i in at]))[0]


def drawn(made, prompts, at):
    """Two completions of each, by random numbers that belong to the row."""
    return sample(made.model, made.processor, prompts, 2, 5, seed=3, uids=list(at))


def test_the_rows_are_as_unequal_as_they_should_be(made):
    assert [len(p.grid) for p in made.prompts] == [1, 3, 0, 2, 5, 0]
    assert len({tuple(g) for p in made.prompts for g in p.grid.tolist()}) > 3
    assert all(len(p.example.view.sizes) == len(p.grid) for p in made.prompts)


def test_a_row_alone_and_among_others_has_the_same_log_probs(made):
    """In training and in sampling, with completions drawn token for token alike."""
    every = range(len(ROWS))
    scored, samples = logp(made, made.prompts, every), drawn(made, made.prompts, every)
    for i, prompt in enumerate(made.prompts):
        assert (logp(made, [prompt], [i]) - scored[[i]]).abs().max() < NEAR
        alone, among = drawn(made, [prompt], [i]), samples.select([i])
        assert completions(alone) == completions(among)
        assert (alone.logp - among.logp).abs().max() < NEAR
        assert (score(made.model, among)[0] - score(made.model, alone)[0]).abs().max() < NEAR


@pytest.mark.parametrize("row, nth", [(0, 0), (1, 0), (1, 2), (3, 1), (4, 3)])
def test_another_picture_moves_its_own_row_and_no_other(made, row, nth):
    images = [*ROWS[row].images]
    images[nth] = picture(999, *images[nth].shape[:2])
    prompts = [*made.prompts]
    prompts[row] = made.processor.prompt(replace(ROWS[row], images=tuple(images)))
    every, others = range(len(ROWS)), [i for i in range(len(ROWS)) if i != row]
    change = (logp(made, made.prompts, every) - logp(made, prompts, every)).abs().amax(-1)
    assert change[row].min() > 1e-3 and change[others].max() < NEAR
    before, after = (drawn(made, some, every) for some in (made.prompts, prompts))
    assert completions(before.select(others)) == completions(after.select(others))
    assert (before.select(others).logp - after.select(others).logp).abs().max() < NEAR
    first = (before.logp - after.logp)[row, :, 0].abs()  # of the first token, however it went on
    assert first.max() > 1e-3


def test_pictures_keep_their_order(made):
    """The same two pictures, turned round, are another question."""
    turned = made.processor.prompt(replace(ROWS[3], images=ROWS[3].images[::-1]))
    assert turned.grid.tolist() == made.prompts[3].grid.tolist()[::-1]
    assert (logp(made, [turned], [3]) - logp(made, [made.prompts[3]], [3])).abs().max() > 1e-3


def test_a_frozen_tower_that_looks_once_sees_the_same(made):
    """Its states travel in the place of the patches, row by row, none for a row without pictures;
    also where no row of a batch has one."""
    every = range(len(ROWS))
    seen = look(made.model, made.prompts)
    assert (logp(made, seen, every) - logp(made, made.prompts, every)).abs().max() < NEAR
    for some in ([2, 5], [4], [5, 1]):
        few = [made.prompts[i] for i in some]
        assert (logp(made, look(made.model, few), some) - logp(made, few, some)).abs().max() < NEAR
    with torch.autocast("cpu", torch.bfloat16):  # of one kind, where rows of several calls meet
        alike = [look(made.model, [made.prompts[i]])[0].states.dtype for i in (2, 4)]
    assert alike == [torch.bfloat16] * 2
    assert completions(drawn(made, seen, every)) == completions(drawn(made, made.prompts, every))


def test_the_log_probs_are_those_of_transformers(made):
    """One prompt and one completion at a time there, all at once here."""
    ours = logp(made, made.prompts, range(len(ROWS)))
    for i, prompt in enumerate(made.prompts):
        for g, given in enumerate(GIVEN[i]):
            with torch.no_grad():
                theirs = logp_of(reference_logits(made.reference, prompt, given), given, 1.0, [])
            assert (ours[i, g, : len(given)] - theirs).abs().max() < 1e-4
