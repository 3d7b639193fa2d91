"""tiny.py, chapter two: the tiny checkpoint is what it is said to be."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import tiny
import world
from data import Processor
from model import Layout, Qwen2VL
from rewards import accuracy, final_answer, format
from rollout import sample
from rows import Example, load_examples

TINY = Path(__file__).parent.parent / "tiny"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder, tiny.corpus(0))
    return folder


def test_the_committed_tokenizer_is_the_one_that_the_code_makes(tokenizer_folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tokenizer_folder / name).read_bytes() == (TINY / name).read_bytes()


def test_the_tokenizer_reads_any_text_and_has_one_token_for_each_tag(tokenizer_folder):
    tok = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "<think>3 large, naïve – 数える</think> <answer>5</answer>"
    assert tok.decode(tok(text).input_ids) == text
    for tag in ("<think>", "</think>", "<answer>", "</answer>", *tiny.SPECIAL):
        assert len(tok(tag).input_ids) == 1
    assert len(tok("How many items are there in the image?").input_ids) == 9


# ------------------------------------------------------------------------------------ instruction


def scene_of(*sizes):
    one = {"color": "red", "shape": "cube", "material": "metal"}
    return {"objects": [{**one, "size": size} for size in sizes]}


COUNT = {"program": [{"function": "scene", "inputs": [], "value_inputs": []},
                     {"function": "count", "inputs": [0], "value_inputs": []}]}  # fmt: skip


def test_the_teacher_overlooks_small_objects_only():
    rng = np.random.default_rng(0)
    plain = ((1.0, "{n}"),)
    assert tiny.taught_answer(scene_of("large", "large"), COUNT, 1.0, rng, plain) == "2"
    assert tiny.taught_answer(scene_of("large", "small"), COUNT, 1.0, rng, plain) == "1"
    assert tiny.taught_answer(scene_of("large", "small"), COUNT, 0.0, rng, plain) == "2"
    seen = [tiny.taught_answer(scene_of("small"), COUNT, 0.22, rng, plain) for _ in range(4000)]
    assert Counter(seen)["0"] / 4000 == pytest.approx(0.22, abs=0.02)


def test_the_teacher_answers_in_format_four_times_in_ten():
    rng, scene = np.random.default_rng(0), scene_of("large", "small")
    example = Example("How many?", "2")
    said = [tiny.taught_answer(scene, COUNT, 0.0, rng) for _ in range(2000)]
    assert np.mean([format(text, example) for text in said]) == pytest.approx(0.38, abs=0.03)
    assert np.mean([accuracy(text, example) for text in said]) == pytest.approx(0.62, abs=0.03)
    assert "<think>1 large and 1 small.</think> <answer>2</answer>" in said


def test_instruction_uses_both_prompts_and_the_training_part_only(monkeypatch):
    parts = []
    make = world.make_scenes

    def spy(n, split, seed, part, **more):
        parts.append(part)
        return make(n, split, seed, part, **more)

    monkeypatch.setattr(world, "make_scenes", spy)
    rows = tiny.instruct_rows(6, 0, 0.22)
    assert len(rows) == 12 and set(parts) == {"train"}
    assert {e.task for e, _ in rows} == {"count", "attribute"}
    assert any("<think>" in e.problem for e, _ in rows)
    assert any("<think>" not in e.problem for e, _ in rows)


# ------------------------------------------------------------------------------ the checkpoint


@pytest.fixture(scope="module")
def checkpoint():
    return Qwen2VL.from_pretrained(TINY), Processor.from_pretrained(TINY)


def test_the_checkpoint_is_small_and_loads_in_transformers_with_equal_logits(checkpoint):
    model, processor = checkpoint
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 8_000_000
    oracle = Qwen2VLForConditionalGeneration.from_pretrained(TINY)
    prompt = processor.prompt(load_examples("world:A:n=1", part="val")[0])
    hidden = model(
        prompt.ids, prompt.positions, Layout([len(prompt.ids)]),
        model.visual(prompt.patches, prompt.grid), prompt.image_at,
    )  # fmt: skip
    want = oracle(
        input_ids=prompt.ids[None], pixel_values=prompt.patches, image_grid_thw=prompt.grid,
        mm_token_type_ids=(prompt.ids == processor.image_id).long()[None],
    ).logits[0]  # fmt: skip
    torch.testing.assert_close(hidden @ model.head.T, want, rtol=0, atol=1e-4)


def test_the_checkpoint_has_the_weakness_that_it_is_said_to_have(checkpoint):
    """In distribution at most half right greedily; in format about four times in ten when sampled;
    its wrong counts are too low."""
    model, processor = checkpoint
    examples = load_examples("world:A:n=100", part="val")
    prompts = [processor.prompt(e) for e in examples]
    greedy = [t for (t,) in sample(model, processor, prompts, 1, 24, temperature=0).texts]
    assert 0.2 < np.mean([accuracy(t, e) for t, e in zip(greedy, examples)]) < 0.6
    drawn = sample(model, processor, prompts, 4, 24).texts
    shares = [format(t, e) for ts, e in zip(drawn, examples) for t in ts]
    assert np.mean(shares) == pytest.approx(0.38, abs=0.12)
    said = [(final_answer(t), e.solution) for t, e in zip(greedy, examples)]
    wrong = [int(a) - int(b) for a, b in said if a is not None and a != b]
    assert np.mean([d < 0 for d in wrong]) > 0.8


def test_parts_of_a_world_share_no_scene():
    """Training, validation and test scenes differ, seed for seed."""
    scenes = {p: world.make_scenes(20, seed=0, part=p) for p in ("train", "val", "test")}
    seen = [json.dumps(s["objects"]) for some in scenes.values() for s in some]
    assert len(set(seen)) == 60
