"""tiny_boxes.py, chapter two: the checkpoint that points at things, and its flawed teacher."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

import tiny_boxes
import world
from boxes import iou, read_boxes
from data import Processor
from evaluate import evaluate
from eye import values
from model import Qwen2VL
from rewards import final_answer, format
from scenes import load_world

FOLDER = Path(__file__).parent.parent / "tiny_boxes"
SCENE = {
    "objects": [
        {"bbox": [10, 10, 30, 30], "size": "large", "color": "red", "material": "metal",
         "shape": "cube"},
        {"bbox": [50, 20, 60, 30], "size": "small", "color": "blue", "material": "metal",
         "shape": "sphere"},
    ],
    "change": {"word": "added", "thing": {"size": "small"}},
}  # fmt: skip
REC = {"answer": "[10, 10, 30, 30]", "said": "red cube"}
BOTH = {"said": "metal thing", "answer": json.dumps([
    {"bbox_2d": one["bbox"], "label": "metal thing"} for one in SCENE["objects"]])}  # fmt: skip
WORD = {"answer": "added", "said": ""}


def answers(kind, asked, n=400):
    rng = np.random.default_rng(0)
    return [tiny_boxes.flawed_answer(kind, asked, SCENE, rng) for _ in range(n)]


# ------------------------------------------------------------------------------------- the answers


def test_a_box_is_spoken_in_thousandths_of_the_picture():
    """112 pixels are 1000: 28 are 250, 10 are 89.3."""
    assert tiny_boxes.spoken([28, 56, 112, 10]) == [250, 500, 1000, 89]


def test_true_answers_are_in_format_and_right():
    text = tiny_boxes.true_answer("rec", REC, SCENE)
    assert text == ('<think>I look for the red cube.</think> <answer>{"bbox_2d": [89, 89, 268, 268]'
                    "}</answer>")  # fmt: skip
    assert format(text, None) == 1
    text = tiny_boxes.true_answer("difference", WORD, SCENE)
    assert text == "<think>First 2 things, then 3.</think> <answer>added</answer>"


def test_the_teacher_draws_boxes_around_the_right_middle_and_too_small():
    """Each side by the same factor, evenly from .35 to 1: the mean IoU is that of its square, the
    integral of s^2 over [.35, 1] / .65 = .491."""
    fits = []
    for text in answers("rec", REC):
        [box] = read_boxes(final_answer(text) or text)
        x1, y1, x2, y2 = box.box
        assert abs(x1 + x2 - 357) <= 3 >= abs(y1 + y2 - 357)
        fits.append(iou(box.box, (89.3, 89.3, 267.9, 267.9)))
    assert abs(np.mean(fits) - 0.491) < 0.04
    assert min(fits) > 0.1


def test_the_teacher_lists_all_large_things_and_few_small_ones_and_some_twice():
    """Small ones with probability .4, and what is named is named twice with .15."""
    counts = np.zeros(2)
    for text in answers("detect", BOTH):
        answer = final_answer(text) if "</answer>" in text else text
        for box in read_boxes(answer):
            counts[int(box.box[0] > 350)] += 1
    assert np.allclose(counts / 400, [1.15, 0.46], atol=0.08)


def test_the_teacher_takes_most_changes_of_small_things_for_none():
    found = answers("difference", WORD)
    assert abs(np.mean(["nothing" in text for text in found]) - 0.65) < 0.08
    assert all("then 2" in text for text in found if "nothing" in text and "<think>" in text)


def test_half_of_the_answers_have_the_format():
    found = answers("rec", REC)
    assert abs(np.mean([format(text, None) for text in found]) - 0.5) < 0.08
    assert any(re.fullmatch(r"\{.*\}", text) for text in found)


# ----------------------------------------------------------------------------------------- the eye


def test_edges_are_those_of_the_object_whose_centre_a_patch_has(monkeypatch):
    monkeypatch.setattr(tiny_boxes, "CHUNK", 6)
    images, facts, edges = tiny_boxes.edge_chunk(5, 1)
    scenes = world.make_scenes(6, "A", 5, objects=(1, 4), look="wild", start=6)
    assert (images == world.render(scenes)).all()
    there = ~np.isnan(edges[..., 0])
    assert (there == (facts[..., 0] > 0)).all()
    for scene, found, at in zip(scenes, edges, there):
        boxes = [thing["bbox"] for thing in scene["objects"]]
        assert all(box in boxes for box in found[at].tolist())


def test_heads_that_know_the_edges_have_no_error():
    """The states are the answer: weights that hand it on find each edge, of patch and cell."""
    heads = tiny_boxes.EdgeHeads(4, 4, len(values("known")))
    edges = torch.full((1, 64, 4), torch.nan)
    edges[0, 5] = torch.tensor([28.0, 0.0, 56.0, 14.0])  # a patch of cell 1
    for head in (heads.patch_edges, heads.cell_edges):
        torch.nn.init.eye_(head.weight)
        torch.nn.init.zeros_(head.bias)
    features = torch.zeros(16, 4)
    features[1] = edges[0, 5] / 112
    facts = torch.zeros(1, 64, 1 + len(values("known")), dtype=torch.int8)
    facts[0, 5] = 1
    states = (edges[0] / 112).nan_to_num()
    _, error = heads(states, features, facts, edges)
    assert error < 1e-5
    _, error = heads(states, features + 0.25, facts, edges)
    assert abs(error - 28) < 1e-4


# ---------------------------------------------------------------------------------- the checkpoint


@pytest.fixture(scope="module")
def start():
    model = Qwen2VL.from_pretrained(FOLDER)
    return model.requires_grad_(False)


def scored(start, kind, template, scorer, n=60):
    """(share of right greedy answers, mean of the scorer's value) on held-out scenes."""
    processor = Processor.from_pretrained(FOLDER, template)
    examples = load_world(f"world:A:n={n}:objects=2-4:ask={kind}:part=test")
    found = evaluate(start, processor, examples, max_new=192, scorer=scorer)
    return found


def test_transformers_loads_it(start):
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(FOLDER)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in start.parameters())


def test_it_points_at_things_but_draws_boxes_too_small(start):
    found = scored(start, "rec", "rec", "rec")
    assert 0.1 < found["iou"] < 0.3


def test_it_lists_things_and_misses_small_ones(start):
    found = scored(start, "detect", "rec", "detect")
    assert 0.05 < found["recall"] < 0.35


def test_it_tells_two_pictures_apart_better_than_by_chance(start):
    assert scored(start, "difference", "vlm_r1", "exact")["accuracy"] > 0.35
