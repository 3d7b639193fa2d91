"""Rows without a picture: alone, in whole batches, beside rows with some, for every part of a run.

What peers fell into: a batch must be all pictures or all text (VLM-R1's reader), text rows need a
blank picture (MM-Eureka), processes whose batch is all text leave out the vision tower, and the
others wait for it (hiyouga/EasyR1#12, #468). Two processes of which one has no picture are in
test_parallel.py ("one pictured", "one looked at", "text"), log-probs beside transformers' in
test_several_images.py.
"""

from types import SimpleNamespace

import pytest
import torch
from prompts import completions
from tiny_checkpoint import FAMILIES, make_checkpoint, picture

from data import Processor
from evaluate import evaluate
from example import Example
from model import Qwen2VL
from optim import make_optimizers
from rollout import look, sample, score
from sft import completion_of, sft_loss, taught

TEXT = [taught(Example(f"one, two, {'three, ' * i}", "3"), "three red cubes") for i in range(3)]
SEEN = [taught(Example("How many?", "3", (picture(i, 56, 28 + 28 * i),)), "3 red") for i in (1, 2)]
MIXED = [TEXT[0], SEEN[0], TEXT[1], SEEN[1], TEXT[2]]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), family=request.param)
    processor = Processor.from_pretrained(folder, "{Question}")
    return SimpleNamespace(folder=folder, processor=processor,
                           model=Qwen2VL.from_pretrained(folder))  # fmt: skip


def loss_of(made, rows, tokens=100):
    prompts = [made.processor.prompt(row) for row in rows]
    targets = [made.processor.target(completion_of(row)) for row in rows]
    return sft_loss(made.model, prompts, targets, tokens)


def gradients(made, rows) -> dict:
    """By name; None where the rows do not reach a weight."""
    made.model.zero_grad()
    loss_of(made, rows).backward()
    return {name: p.grad for name, p in made.model.named_parameters()}


def test_the_gradient_of_a_mixed_batch_is_the_sum_of_its_rows(made):
    """Text gives the vision tower none, and the rest what it gives alone."""
    mixed, text, seen = (gradients(made, rows) for rows in (MIXED, TEXT, SEEN))
    tower = {name for name in mixed if name.startswith("visual.")}
    assert {name for name, grad in text.items() if grad is None} == tower
    assert seen["visual.patch_embed.proj.weight"].abs().max() > 1e-4
    for name, grad in mixed.items():
        parts = seen[name] + (0 if name in tower else text[name])
        torch.testing.assert_close(grad, parts, rtol=1e-4, atol=1e-6)


def test_a_step_on_text_alone_leaves_the_vision_tower_as_it_is(made):
    """Weight decay, too: where nothing was learnt nothing is forgotten."""
    model = Qwen2VL.from_pretrained(made.folder)
    other = SimpleNamespace(model=model, processor=made.processor)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for optimizer in make_optimizers(model, "adamw", 1e-2, 0.1):
        loss_of(other, TEXT).backward()
        optimizer.step()
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved and not any(name.startswith("visual.") for name in moved)


@torch.no_grad()
@pytest.mark.parametrize("rows", [TEXT, MIXED, SEEN], ids=["text", "mixed", "pictures"])
def test_what_is_seen_before_is_seen_alike(made, rows):
    """A tower that does not learn runs once in a step, or not at all: the samples are the same."""
    prompts = [made.processor.prompt(row) for row in rows]
    seen = look(made.model, prompts)
    assert [len(p.states) for p in seen] == [len(p.patches) for p in prompts]
    assert not any(len(p.patches) for p in seen)
    a, b = (sample(made.model, made.processor, some, 2, 6, seed=4) for some in (prompts, seen))
    assert completions(a) == completions(b)
    assert (score(made.model, a)[0] - score(made.model, b)[0]).abs().max() < 1e-5


def test_an_answer_does_not_depend_on_what_else_is_asked(made):
    """In an evaluation of text alone, of pictures alone and of both, in batches of any size."""
    whole = evaluate(made.model, made.processor, MIXED, batch=5, max_new=6)["results"]
    for rows, at in ((TEXT, (0, 2, 4)), (SEEN, (1, 3))):
        for batch in (1, 5):
            alone = evaluate(made.model, made.processor, rows, batch=batch, max_new=6)["results"]
            assert [r["model_output"] for r in alone] == [whole[i]["model_output"] for i in at]
            assert [r["logp"] for r in alone] == pytest.approx([whole[i]["logp"] for i in at], 1e-4)
