"""sft.py, chapter two: the loss is transformers' cross-entropy, and learning it works.

Everything runs on a random checkpoint that transformers wrote (tests/tiny_checkpoint.py).
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint, picture
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

import lora
import sft
from boxes import View
from checkpoint import hub_name
from data import Processor
from example import Example
from journal import newest_checkpoint
from model import Qwen2VL, VisionTower
from optim import draw_rows
from rollout import sample
from sft import (
    completion_of,
    fit,
    held_out_loss,
    learnt_tokens,
    number_of_steps,
    sft_loss,
    step_loss,
    taught,
)

ROOT = Path(__file__).resolve().parent.parent


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


ROWS = [taught(example, text) for example, text in ROWS]


def parts(processor, rows) -> tuple[list, list]:
    """Prompts and target ids."""
    prompts = [processor.prompt(example) for example in rows]
    return prompts, [processor.target(completion_of(example)) for example in rows]


def loss_of(qwen, processor, rows, tokens, mask="completion"):
    return sft_loss(qwen, *parts(processor, rows), tokens, mask)


def count(processor, rows, mask="completion") -> int:
    return sum(learnt_tokens(p, ids, mask) for p, ids in zip(*parts(processor, rows)))


def reference_loss(reference, processor, rows, mask) -> torch.Tensor:
    """transformers' own loss on a padded batch. Labels are -100 on padding, and on the prompt, or
    with mask="all" on its image tokens."""
    prompts, texts = parts(processor, rows)
    width = max(len(p.ids) + len(t) for p, t in zip(prompts, texts))
    ids, real = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    labels = torch.full_like(ids, -100)
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        start, end = len(prompt.ids), len(prompt.ids) + len(text)
        ids[i, :end] = torch.cat((prompt.ids, torch.tensor(text)))
        real[i, :end], labels[i, start:end] = 1, torch.tensor(text)
        if mask == "all":
            labels[i, :end] = ids[i, :end]
            labels[i, labels[i] == processor.image_id] = -100
    return reference(
        input_ids=ids, attention_mask=real.long(), labels=labels,
        pixel_values=torch.cat([p.patches for p in prompts]),
        image_grid_thw=torch.cat([p.grid for p in prompts]),
        mm_token_type_ids=(ids == processor.image_id).long(),
    ).loss  # fmt: skip


# ------------------------------------------------------------------------------- what is learnt


def test_a_row_with_thoughts_is_learnt_as_r1v_joins_them():
    """f"{thinking}\\n\\n{solution}" (src/r1-v/src/open_r1/sft.py, convert_example)."""
    thinking = {"thinking": "<think> two and one </think>"}
    row = Example("How many?", "<answer> 3 </answer>", extra=thinking)
    assert completion_of(row) == "<think> two and one </think>\n\n<answer> 3 </answer>"
    assert completion_of(Example("How many?", "<answer> 3 </answer>")) == "<answer> 3 </answer>"


def test_what_a_row_says_in_full_is_learnt_to_the_letter():
    row = Example("q", "3", extra={"thinking": "<think>x</think>", "completion": " so:\n3 "})
    assert completion_of(row) == " so:\n3 "
    again = taught(row, "four")
    assert completion_of(again) == "four" and again.extra["thinking"] == "<think>x</think>"
    assert completion_of(row) == " so:\n3 "  # the row itself is not touched


# ---------------------------------------------------------------------------------------- the loss


def test_boxes_are_learnt_in_the_frame_that_the_model_speaks():
    """Of a picture 200 wide and 100 high, in thousandths. A chat is learnt to the letter, and what
    is no box stays."""
    view = View("0-1000", "pixels", ((100, 200, 112, 196),))
    rec = Example("Where?", "[20, 10, 100, 60]", view=view)
    assert completion_of(rec) == "[100, 100, 500, 600]"
    assert completion_of(replace(rec, view=None)) == "[20, 10, 100, 60]"
    thought = replace(rec, extra={"thinking": "<think> left </think>"})
    assert completion_of(thought) == "<think> left </think>\n\n[100, 100, 500, 600]"
    assert completion_of(taught(rec, "[1, 2, 3, 4]")) == "[1, 2, 3, 4]"
    assert completion_of(replace(rec, solution="3 of [1, 2]")) == "3 of [1, 2]"


def test_a_target_ends_with_the_end_of_turn(processor):
    ids = processor.target("red")
    assert ids[:-1] == processor.encode("red")
    assert processor.tokenizer.id_to_token(ids[-1]) == "<|im_end|>"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("mask", ["completion", "all"])
def test_the_loss_is_the_cross_entropy_of_transformers(tmp_path, family, mask):
    """L = - sum over learnt tokens of log p(token | tokens before) / number of them."""
    folder = make_checkpoint(tmp_path / "model", family=family)
    processor = Processor.from_pretrained(folder, "{Question}")
    qwen = Qwen2VL.from_pretrained(folder)
    kind = {"qwen2_vl": Qwen2VLForConditionalGeneration}
    kind["qwen2_5_vl"] = Qwen2_5_VLForConditionalGeneration
    reference = kind[family].from_pretrained(folder).eval()
    expected = reference_loss(reference, processor, ROWS, mask)
    loss = loss_of(qwen, processor, ROWS, count(processor, ROWS, mask), mask)
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
        whole = loss_of(qwen, processor, ROWS, N)
        some = [loss_of(qwen, processor, rows, N) for rows in (ROWS[:1], ROWS[1:])]
        means = [
            loss_of(qwen, processor, rows, count(processor, rows)) for rows in (ROWS[:1], ROWS[1:])
        ]
    assert sum(some).item() == pytest.approx(whole.item(), abs=1e-5)
    assert abs(sum(means).item() / 2 - whole.item()) > 1e-3  # so the test could fail


@pytest.mark.parametrize("mask", ["completion", "all"])
def test_micro_batches_do_not_change_the_gradient(qwen, processor, mask):
    prompts, grads = parts(processor, ROWS)[0], []
    for micro in (1, 3, 4):
        qwen.zero_grad()
        loss = step_loss(qwen, processor, prompts, quick(micro=micro, mask=mask))
        grads.append((loss, [p.grad.clone() for p in qwen.parameters()]))
    for loss, some in grads[1:]:
        assert loss == pytest.approx(grads[0][0], abs=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(some, grads[0][1]))


# --------------------------------------------------------------------------------------- the steps


def quick(**keys) -> sft.Config:
    return sft.Config(**{"steps": 1, "batch": 4, "micro": 4, "lr": 1e-2, **keys})


def losses_of(model, processor, rows, cfg) -> list[float]:
    return [row["nll"] for row in fit(model, processor, rows, cfg)]


def test_an_epoch_sees_every_row_once():
    assert number_of_steps(quick(steps=None, epochs=1.0, batch=16), 160) == 10
    assert number_of_steps(quick(steps=None, epochs=2.5, batch=16), 161) == 26
    assert number_of_steps(quick(steps=None, epochs=0.001, batch=16), 16) == 1
    assert number_of_steps(quick(steps=7, epochs=3.0), 16) == 7


@pytest.mark.parametrize("micro", [1, 3])
def test_a_run_does_not_depend_on_how_its_batches_are_split(qwen, processor, micro):
    """The first loss is the mean over all tokens of the rows; the others follow the same path."""
    with torch.no_grad():
        first = loss_of(qwen, processor, ROWS, count(processor, ROWS)).item()
    whole = losses_of(copy.deepcopy(qwen), processor, ROWS, quick(steps=4))
    split = losses_of(qwen, processor, ROWS, quick(steps=4, micro=micro))
    assert split == pytest.approx(whole, abs=1e-4)
    assert split[0] == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fit_learns_answers_word_for_word_and_where_to_stop(qwen, processor, optimizer):
    """After it, greedy decoding says each row's text and ends there; before, it did neither."""
    def answers():
        prompts = [processor.prompt(example) for example in ROWS]
        out = sample(qwen, processor, prompts, max_new=16, temperature=0)
        return [text for (text,) in out.texts], out.finished[:, 0].tolist()

    wanted = [completion_of(example) for example in ROWS]
    said, ended = answers()
    assert not any(ended) and not set(said) & set(wanted)
    losses = losses_of(qwen, processor, ROWS, quick(steps=40, optimizer=optimizer))
    assert losses[0] > 4 and losses[-1] < 0.1
    assert answers() == (wanted, [True] * 4)


def test_the_optimizer_is_the_one_that_was_asked_for(folder, processor):
    """The first loss is before any step; after one, AdamW and Muon are at different places."""
    adamw, muon = (
        losses_of(Qwen2VL.from_pretrained(folder), processor, ROWS, quick(steps=2, optimizer=kind))
        for kind in ("adamw", "muon")
    )
    assert adamw[0] == muon[0] and abs(adamw[1] - muon[1]) > 1e-3


def test_the_step_size_follows_the_schedule(qwen, processor):
    """With a warm-up far longer than the run, a step size of 1e-2 moves almost nothing."""
    slow = losses_of(copy.deepcopy(qwen), processor, ROWS, quick(steps=5, warmup=10**6))
    fast = losses_of(qwen, processor, ROWS, quick(steps=5))
    assert slow[-1] == pytest.approx(slow[0], abs=1e-2)
    assert fast[-1] < fast[0] - 1


def test_a_seed_fixes_the_run(folder, processor):
    """Batches of 2 of 4 rows: another order of the rows gives other losses."""
    def losses(seed):
        model = Qwen2VL.from_pretrained(folder)
        return losses_of(model, processor, ROWS, quick(steps=4, batch=2, seed=seed))

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_rows_follow_one_another_through_the_epoch(qwen, processor):
    """Two steps of 2 rows see all 4 in the order of draw_rows (the step size is next to none)."""
    losses = losses_of(qwen, processor, ROWS, quick(steps=2, batch=2, lr=1e-12))
    a, b, c, d = (ROWS[i] for i in draw_rows(4, 0, 0, 4))
    with torch.no_grad():
        expected = [
            loss_of(qwen, processor, two, count(processor, two)).item() for two in ([a, b], [c, d])
        ]
    assert losses == pytest.approx(expected, abs=1e-5)


def test_warm_up_may_be_a_share_of_the_run(qwen, processor):
    """0.4 of 5 steps is 2: the step size rises over these, then falls to zero by the schedule."""
    cfg = quick(steps=5, warmup=0.4, schedule="linear", lr=0.03)
    rates = [row["lr"] for row in fit(qwen, processor, ROWS, cfg)]
    assert rates == pytest.approx([0.015, 0.03, 0.03, 0.02, 0.01])


def test_a_step_that_is_not_finite_is_skipped_and_five_end_the_run(qwen, processor):
    with torch.no_grad():
        qwen.model.norm.weight.fill_(float("nan"))
    seen = []
    with pytest.raises(ValueError, match="not finite in five steps"):
        for row in fit(qwen, processor, ROWS, quick(steps=9)):
            seen.append((row["step"], row["skipped"], row["grad_norm"]))
    assert seen == [(step, 1, None) for step in range(1, 6)]


def test_the_held_out_loss_is_the_mean_over_all_tokens_and_teaches_nothing(qwen, processor):
    with torch.no_grad():
        expected = loss_of(qwen, processor, ROWS, count(processor, ROWS)).item()
    for micro in (1, 3):
        found = held_out_loss(qwen, processor, ROWS, quick(micro=micro))
        assert found == pytest.approx(expected, abs=1e-5)
    assert all(p.grad is None for p in qwen.parameters())


# ----------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight rows with thoughts, as distill.py packs them."""
    folder = tmp_path_factory.mktemp("data")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as f:
        for i in range(8):
            Image.fromarray(picture(i, 56, 56 + 28 * (i % 2))).save(folder / f"{i}.png")
            row = {"image": f"{i}.png", "problem": "How many?", "thinking": f"<think> {i} </think>",
                   "solution": f"<answer> {i} </answer>"}  # fmt: skip
            f.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


def test_a_run_learns_measures_and_leaves_a_checkpoint(folder, data, tmp_path):
    """Greedy answers of the checkpoint on disk are the rows' own, thoughts and all."""
    words = ["--model", folder, "--data", data, "--held_out", data, "--evals", f"rows={data}"]
    words += ["--template", "plain", "--epochs", 30, "--batch", 8, "--lr", 1e-2, "--max_new", 40]
    words += ["--eval_every", 10, "--max_length", 120, "--out", tmp_path / "run", "--workers", 1]
    summary = sft.main([str(word) for word in words])
    assert (summary["steps"], summary["rows"]) == (30, 8)
    first, last = summary["held_out_nll"]
    assert first > 4 > 0.1 > last
    assert summary["before"]["rows"]["accuracy"] == 0 and summary["after"]["rows"]["accuracy"] == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert [row["step"] for row in rows if "held_out_nll" in row] == [10, 20, 30]
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    last = newest_checkpoint(str(tmp_path / "run"))
    again = Processor.from_pretrained(last, "plain")
    row = Example("How many?", "3", (str(data.parent / "3.png"),))
    out = sample(Qwen2VL.from_pretrained(last), again, [again.prompt(row)], 1, 40, temperature=0)
    assert out.texts == [["<think> 3 </think>\n\n<answer> 3 </answer>"]]


def test_lora_learns_beside_frozen_weights_whose_tower_runs_without_graph(
    folder, data, tmp_path, monkeypatch
):
    """And --freeze: what comes out of the tower asks for no gradient. The checkpoint has factors
    alone, and its answers are those of the run."""
    seen, run = [], VisionTower.patch_states
    monkeypatch.setattr(VisionTower, "patch_states",
                        lambda *a: seen.append(run(*a)) or seen[-1])
    losses = {}
    for name, keys in (("lora", {"lora": 4}), ("frozen", {"freeze": ("vision",)})):
        cfg = sft.Config(model=str(folder), data=str(data), out=str(tmp_path / name), steps=8,
                         batch=2, micro=1, lr=2e-2, template="{Question}", probes=0, **keys)
        losses[name] = sft.train(cfg)["nll"]
        rows = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["nll"] < 0.8 * rows[0]["nll"] and rows[0]["grad_norm/vision"] == 0
        assert (rows[0]["grad_norm/merger"] > 0) == (name == "frozen")
    assert seen and not any(x.requires_grad for x in seen)
    step = tmp_path / "lora" / "step_000008"
    start, end = (Qwen2VL.from_pretrained(x).state_dict() for x in (folder, step))
    moved = {lora.part_of(k) for k in start if not torch.equal(start[k], end[k])}
    assert moved == {"language"} and not (step / "model.safetensors").exists()


def test_recomputing_blocks_changes_nothing_but_memory(folder, data, tmp_path):
    """Also where rows that are too long are left out."""
    words = ["--model", folder, "--data", data, "--steps", 2, "--batch", 3, "--bad_rows", "skip"]
    losses = []
    for name in ("false", "true"):
        more = ["--recompute", name, "--max_length", 200, "--out", tmp_path / name]
        losses.append(sft.main([str(word) for word in (*words, *more)])["nll"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "data: which rows"),
        (["--data", "{data}", "--max_length", "20"], r"8 of 8 rows have .*rows.jsonl:1 with"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(folder, data, tmp_path, words, told):
    words = [word.format(data=data) for word in words]
    with pytest.raises(SystemExit, match=told):
        sft.main(["--model", str(folder), "--out", str(tmp_path / "run"), *words])
    assert not (tmp_path / "run").exists()
