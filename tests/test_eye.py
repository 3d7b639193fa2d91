"""eye.py, chapter two: what the eye is asked, and that it is asked of the right patch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eye
import world
from checkpoint import ModelConfig
from data import Processor
from model import Qwen2VL

TINY = Path(__file__).parent.parent / "tiny"



def test_a_chunk_holds_the_facts_of_its_scenes(monkeypatch):
    monkeypatch.setattr(eye, "CHUNK", 4)
    images, facts = eye.eye_chunk(3, "varied", "known", 1)
    scenes = world.make_scenes(4, split="A", seed=3, part="train", look="varied", start=4)
    assert (images == world.render(scenes)).all()
    assert facts[..., 0].sum(1).tolist() == [len(s["objects"]) for s in scenes]
    first = scenes[0]["objects"][0]
    x, y = (int(c // 14) for c in first["pixel_coords"][:2])
    cell, inner = (y // 2) * 4 + x // 2, (y % 2) * 2 + x % 2
    at = facts[0, cell * 4 + inner]
    assert at[0] >= 1
    for name in ("color", "shape", "material", "size"):
        assert at[1 + eye.values("known").index(first[name])] >= 1
    assert (facts[..., 1:].sum(-1) == 4 * facts[..., 0]).all()


def test_the_eye_never_sees_the_third_world():
    """Neither its ground nor its shapes; and of A's shapes only A's colours."""
    for look, shapes in eye.WORLDS:
        scenes = world.make_scenes(200, split="A", look=look, shapes=shapes)
        assert {s["look"]["pattern"] for s in scenes}.isdisjoint({"tiles"})
        seen = {(o["shape"], o["color"]) for s in scenes for o in s["objects"]}
        assert not {shape for shape, _ in seen} & set(world.SHAPES["unseen"])
        for shape, colours in world.PALETTES["A"].items():
            assert {c for s, c in seen if s == shape} == set(colours)


def test_patches_are_those_of_the_processor():
    scenes = world.make_scenes(3, seed=5)
    images = world.render(scenes)
    processor = Processor.from_pretrained(TINY)
    want = np.concatenate([processor.read_image(image)[0] for image in images])
    found = eye.normalise(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)


def test_mirroring_moves_facts_with_the_picture():
    """An object in the left-most patch column is in the right-most one after."""
    images = np.zeros((1, 112, 112, 3), np.uint8)
    images[0, 30, 5] = 255
    facts = np.zeros((1, 64, 2), np.int8)
    row, column = 2, 0  # patch of pixel (5, 30)
    facts[0, (row // 2 * 4 + column // 2) * 4 + row % 2 * 2 + column % 2] = 1
    seen, moved = eye.mirrored(images, facts)
    assert seen[0, 30, 106].tolist() == [255] * 3
    column = 7
    assert moved[0, (row // 2 * 4 + column // 2) * 4 + row % 2 * 2 + column % 2].tolist() == [1, 1]
    assert moved.sum() == 2


def test_the_count_is_read_off_the_cells():
    heads = eye.EyeHeads(8, 8, 15)
    facts = torch.zeros(1, 64, 16, dtype=torch.int8)
    facts[0, [0, 9], 0] = 1
    with torch.no_grad():
        heads.cell.weight.zero_()
        heads.cell.bias.zero_()
        heads.cell.bias[0] = 1.0  # says 0 everywhere
        assert heads(torch.zeros(64, 8), torch.zeros(16, 8), facts)[1] == 0
        heads.cell.weight[1, 0] = 5.0  # says 1 where the first feature is on
        features = torch.zeros(16, 8)
        features[[0, 2], 0] = 1  # the cells of patches 0 and 9
        assert heads(torch.zeros(64, 8), features, facts)[1] == 1


@pytest.mark.slow
def test_the_eye_learns_and_a_seed_fixes_it():
    """600 steps of 32 pictures read a quarter of the scenes; the first 20 twice are the same."""
    raw = json.loads((TINY / "config.json").read_text())
    torch.set_num_threads(1)
    found = []
    for steps in (20, 20, 600):
        model = Qwen2VL(ModelConfig.from_dict(raw)).init_weights(0)
        share = eye.train_eye(model, steps, 1e-2, 0, "varied", "known")
        found.append((share, model.visual.merger.mlp[0].weight.detach().clone()))
    assert torch.equal(found[0][1], found[1][1])
    assert found[2][0] > 0.25
