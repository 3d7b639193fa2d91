"""sft.py, chapter two: the loss is transformers' cross-entropy, and learning it works.

Everything runs on a random checkpoint that transformers wrote (tests/tiny_checkpoint.py).
"""

import copy

import pytest
import torch
from tiny_checkpoint import make_checkpoint, picture
from transformers import Qwen2VLForConditionalGeneration

import sft
from data import Processor
from model import Qwen2VL, hub_name
from optim import draw_rows
from rollout import sample
from rows import Example
from sft import fit, sft_loss, target_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder, template="{Question}")


@pytest.fixture
def qwen(folder):
    return Qwen2VL.from_pretrained(folder)


ROWS = [  # unequal prompts, images and targets; one row without an image
    (Example("How many?", "3", (picture(0, 56, 84),)), "<answer> 3 </answer>"),
    (Example("What color is the cube?", "red", (picture(1, 56, 56),)), "red"),
    (Example("one, two,", "three"), "three, four"),
    (Example("Both?", "1", (picture(2, 56, 56), picture(3, 84, 56))), "<think> no </think> 1"),
]


def reference_loss(reference, processor, rows) -> torch.Tensor:
    """transformers' own loss on a padded batch, labels -100 on prompt and padding."""
    prompts = [processor.prompt(example) for example, _ in rows]
    texts = [target_ids(processor, text) for _, text in rows]
    width = max(len(p.ids) + len(t) for p, t in zip(prompts, texts))
    ids, real = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    labels = torch.full_like(ids, -100)
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        start, end = len(prompt.ids), len(prompt.ids) + len(text)
        ids[i, :end] = torch.cat((prompt.ids, torch.tensor(text)))
        real[i, :end], labels[i, start:end] = 1, torch.tensor(text)
    return reference(
        input_ids=ids, attention_mask=real.long(), labels=labels,
        pixel_values=torch.cat([p.patches for p in prompts]),
        image_grid_thw=torch.cat([p.grid for p in prompts]),
        mm_token_type_ids=(ids == processor.image_id).long(),
    ).loss  # fmt: skip


def count(processor, rows) -> int:
    return sum(len(target_ids(processor, text)) for _, text in rows)


# ---------------------------------------------------------------------------------------- the loss


def test_a_target_ends_with_the_end_of_turn(processor):
    ids = target_ids(processor, "red")
    assert ids[:-1] == processor.encode("red")
    assert processor.tokenizer.id_to_token(ids[-1]) == "<|im_end|>"


def test_the_loss_is_the_cross_entropy_of_transformers(qwen, folder, processor):
    """L = - sum over target tokens of log p(token | prompt, tokens before) / number of them."""
    reference = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    expected = reference_loss(reference, processor, ROWS)
    loss = sft_loss(qwen, processor, ROWS, count(processor, ROWS))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    naive = {hub_name(n): p.grad for n, p in reference.named_parameters()}
    for name, p in qwen.named_parameters():
        assert torch.allclose(p.grad, naive[name], atol=1e-5), name


def test_the_loss_is_divided_by_the_tokens_of_the_whole_step(qwen, processor):
    """The parts of a step add up to its loss: sum_1 / N + sum_2 / N, not the mean of two means."""
    N = count(processor, ROWS)
    with torch.no_grad():
        whole = sft_loss(qwen, processor, ROWS, N)
        parts = [sft_loss(qwen, processor, rows, N) for rows in (ROWS[:1], ROWS[1:])]
        means = [
            sft_loss(qwen, processor, rows, count(processor, rows)) for rows in (ROWS[:1], ROWS[1:])
        ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-5)
    assert abs(sum(means).item() / 2 - whole.item()) > 1e-3  # so the test could fail


# --------------------------------------------------------------------------------------- the stage


def quick(**keys) -> sft.Config:
    return sft.Config(**{"steps": 1, "batch": 4, "micro": 4, "lr": 1e-2, **keys})


@pytest.mark.parametrize("micro", [1, 3])
def test_a_run_does_not_depend_on_how_its_batches_are_split(qwen, processor, micro):
    """The first loss is the mean over all tokens of the rows; the others follow the same path."""
    N = count(processor, ROWS)
    with torch.no_grad():
        first = sft_loss(qwen, processor, ROWS, N).item()
    whole = fit(copy.deepcopy(qwen), processor, ROWS, quick(steps=4))
    split = fit(qwen, processor, ROWS, quick(steps=4, micro=micro))
    assert split == pytest.approx(whole, abs=1e-4)
    assert split[0] == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fit_learns_answers_word_for_word_and_where_to_stop(qwen, processor, optimizer):
    """After it, greedy decoding says each row's text and ends there; before, it did neither."""
    def answers():
        prompts = [processor.prompt(example) for example, _ in ROWS]
        out = sample(qwen, processor, prompts, max_new=16, temperature=0)
        return [text for (text,) in out.texts], out.finished[:, 0].tolist()

    wanted = [text for _, text in ROWS]
    said, ended = answers()
    assert not any(ended) and not set(said) & set(wanted)
    losses = fit(qwen, processor, ROWS, quick(steps=40, optimizer=optimizer))
    assert losses[0] > 4 and losses[-1] < 0.1
    assert answers() == (wanted, [True] * 4)


def test_the_optimizer_is_the_one_that_was_asked_for(folder, processor):
    """The first loss is before any step; after one, AdamW and Muon are at different places."""
    adamw, muon = (
        fit(Qwen2VL.from_pretrained(folder), processor, ROWS, quick(steps=2, optimizer=kind))
        for kind in ("adamw", "muon")
    )
    assert adamw[0] == muon[0] and abs(adamw[1] - muon[1]) > 1e-3


def test_the_step_size_follows_the_schedule(qwen, processor):
    """With a warm-up far longer than the run, a step size of 1e-2 moves almost nothing."""
    slow = fit(copy.deepcopy(qwen), processor, ROWS, quick(steps=5, warmup=10**6))
    fast = fit(qwen, processor, ROWS, quick(steps=5))
    assert slow[-1] == pytest.approx(slow[0], abs=1e-2)
    assert fast[-1] < fast[0] - 1


def test_a_seed_fixes_the_run(folder, processor):
    """Batches of 2 of 4 rows: another order of the rows gives other losses."""
    def losses(seed):
        model = Qwen2VL.from_pretrained(folder)
        return fit(model, processor, ROWS, quick(steps=4, batch=2, seed=seed))

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_rows_follow_one_another_through_the_epoch(qwen, processor):
    """Two steps of 2 rows see all 4 in the order of draw_rows (the step size is next to none)."""
    losses = fit(qwen, processor, ROWS, quick(steps=2, batch=2, lr=1e-12))
    a, b, c, d = (ROWS[i] for i in draw_rows(4, 0, 0, 4))
    with torch.no_grad():
        expected = [
            sft_loss(qwen, processor, two, count(processor, two)).item() for two in ([a, b], [c, d])
        ]
    assert losses == pytest.approx(expected, abs=1e-5)
