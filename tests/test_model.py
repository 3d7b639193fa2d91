"""model.py, chapter two: both families equal transformers, and sharing a prompt changes nothing.

Every comparison with transformers is on random checkpoints that transformers wrote itself
(tests/tiny_checkpoint.py), in float32 on the CPU. Sharing and caching are compared with the naive
way: each completion after a prompt and an image of its own, in a forward of its own.

Letters as in model.py: B prompts, G completions per prompt, L prompt tokens, T completion tokens,
S packed tokens, P patches, C numbers per patch, V vocabulary.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_checkpoint import make_checkpoint, picture
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.vision_utils import get_vision_window_index

import attention
from attention import Cache, Layout, Step
from checkpoint import ModelConfig, hub_name
from data import Processor
from model import (
    Joined,
    Qwen2VL,
    mrope,
    patch_places,
    rotate,
    segments,
    vision_rope,
    window_order,
)
from parallel import copy
from rollout import sample
from rows import Example

TEXT, PAD, START, END, IMAGE = 384, 384, 393, 394, 396  # token ids of make_checkpoint's tokenizer
SHAPES = {  # heads per key head, head tied to the embedding or not
    "ratio 2, tied": {},
    "ratio 3, untied": {"heads": 6, "kv_heads": 2, "width": 96, "tie": False},
    "ratio 1, untied": {"kv_heads": 4, "tie": False, "mrope_section": (4, 2, 2)},
    "one key head, tied": {"kv_heads": 1, "layers": 3, "padded_vocab": 416},
    # Windows of 4 x 4 and 6 x 6 patches, which divide few of the grids below.
    "2.5, ratio 2, tied": {"family": "qwen2_5_vl", "window_size": 56, "depth": 3},
    "2.5, ratio 3, untied": {
        "family": "qwen2_5_vl", "window_size": 84, "depth": 4, "fullatt_block_indexes": (0, 3),
        "vision_width": 48, "vision_heads": 4, "vision_ffn": 56,
        "heads": 6, "kv_heads": 2, "width": 96, "tie": False,
    },
}  # fmt: skip
every_shape = pytest.mark.parametrize("shape", SHAPES)
each_family = pytest.mark.parametrize("shape", ["ratio 2, tied", "2.5, ratio 3, untied"])


@dataclass
class Prompt:
    """ids (L,), positions (3, L) as transformers counts them, patches (P, C), grid (n, 3)."""

    ids: Tensor
    positions: Tensor
    patches: Tensor
    grid: Tensor

    def then(self, completion: Tensor) -> "Prompt":
        after = self.positions.max() + 1 + torch.arange(len(completion)).expand(3, -1)
        positions = torch.cat((self.positions, after), 1)
        return replace(self, ids=torch.cat((self.ids, completion)), positions=positions)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """pair(shape) -> folder of a checkpoint, our model of it, transformers' model of it."""

    @functools.cache
    def make(shape: str = "ratio 2, tied"):
        folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **SHAPES[shape])
        return folder, Qwen2VL.from_pretrained(folder), load_reference(folder)

    return make


def load_reference(folder):
    """transformers' model of a checkpoint of either family."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def make_prompt(reference, seed: int, *grids, words: int = 3) -> Prompt:
    """`words` random text tokens, then for each grid an image and `words` more."""
    gen = torch.Generator().manual_seed(seed)
    parts = [torch.randint(TEXT, (words,), generator=gen)]
    for t, h, w in grids:
        parts += [torch.tensor([START] + [IMAGE] * (t * h * w // 4) + [END])]
        parts += [torch.randint(TEXT, (words,), generator=gen)]
    ids = torch.cat(parts)
    grid = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, generator=gen)
    kinds = (ids == IMAGE).long()[None]
    positions = reference.model.get_rope_index(ids[None], kinds, grid)[0][:, 0]
    return Prompt(ids, positions, patches, grid)


def make_text(seed: int, n: int) -> Tensor:
    return torch.randint(TEXT, (n,), generator=torch.Generator().manual_seed(seed))


def pack(prompts: list[Prompt], completions=()):
    """ids (S,), positions (3, S), layout, image_at (I,) of B prompts, B rows of G completions."""
    ids, positions = [p.ids for p in prompts], [p.positions for p in prompts]
    for prompt, row in zip(prompts, completions):
        ids += row
        positions += [prompt.then(c).positions[:, len(prompt.ids) :] for c in row]
    layout = Layout([len(p.ids) for p in prompts], [[len(c) for c in row] for row in completions])
    ids = torch.cat(ids)
    return ids, torch.cat(positions, 1), layout, (ids == IMAGE).nonzero()[:, 0]


def run(model, prompts: list[Prompt], completions=(), cache=None):
    """Hidden states, vision tower included: B of (L, D), and B rows of G of (T, D)."""
    ids, positions, layout, image_at = pack(prompts, completions)
    if cache is not None:
        layout.slots = torch.arange(len(prompts))
        cache.enter(layout)
    patches, grid = (torch.cat([getattr(p, k) for p in prompts]) for k in ("patches", "grid"))
    features = model.visual(patches, grid) if len(grid) else None
    hidden = model(ids, positions, layout, features, image_at, cache)
    texts = [p.ids for p in prompts] + [c for row in completions for c in row]
    parts = iter(hidden.split([len(text) for text in texts]))
    return [next(parts) for _ in prompts], [[next(parts) for _ in row] for row in completions]


def prefill(model, prompts: list[Prompt], G: int, room: int):
    """Last hidden states (B, D) of prompts, a cache with them in it, their next positions (B,)."""
    cfg, longest = model.cfg, max(len(p.ids) for p in prompts)
    shape = (len(prompts), G, cfg.num_key_value_heads, cfg.head_dim)
    cache = Cache(cfg.num_hidden_layers, shape, longest, room, torch.float32, "cpu")
    hidden = torch.stack([h[-1] for h in run(model, prompts, cache=cache)[0]])
    return hidden, cache, torch.stack([p.positions.max() + 1 for p in prompts])


def step(model, cache: Cache, token: Tensor, position: Tensor, span: int) -> Tensor:
    """Hidden states (B', G', D) after one more token (B', G') at position (B',)."""
    B, G = token.shape
    positions = position.repeat_interleave(G).expand(3, -1)
    hidden = model(token.flatten(), positions, Step(cache, B, G, span), cache=cache)
    cache.lengths[:B] += 1
    return hidden.view(B, G, -1)


def logits(model, prompts: list[Prompt]) -> Tensor:
    return torch.cat(run(model, prompts)[0]) @ model.head.T  # (S, V)


def reference_logits(reference, prompts: list[Prompt], side: str = "right") -> Tensor:
    """transformers' logits of a padded batch at the real tokens, (S, V)."""
    width = max(len(p.ids) for p in prompts)
    ids, real = torch.full((len(prompts), width), PAD), torch.zeros(len(prompts), width).bool()
    for i, p in enumerate(prompts):
        at = slice(0, len(p.ids)) if side == "right" else slice(width - len(p.ids), width)
        ids[i, at], real[i, at] = p.ids, True
    images = {}
    if any(len(p.grid) for p in prompts):
        images["pixel_values"] = torch.cat([p.patches for p in prompts])
        images["image_grid_thw"] = torch.cat([p.grid for p in prompts])
        images["mm_token_type_ids"] = (ids == IMAGE).long()
    return reference(input_ids=ids, attention_mask=real.long(), **images).logits[real]


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter, under its name on the hub."""
    names, weights = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, weights)
    return {hub_name(k): g for k, g in zip(names, found)}


def assert_near(found: Tensor, expected: Tensor, most: float = 1e-4):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < most


def assert_same_gradients(found: dict, expected: dict, most: float):
    """The distance is at most `most` of the length, parameter by parameter."""
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert g.norm() > 1e-3, f"{name}: too small a gradient to compare"
        assert (found[name] - g).norm() < most * g.norm(), name


# ------------------------------------------------------------------------------------- positions


def test_rotate_turns_the_first_half_against_the_second():
    """(a, b) -> (a cos - b sin, b cos + a sin), where b stands half of d after a."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4)
    cos, sin = torch.tensor([[0.0, 0.6, 0.0, 0.6]]), torch.tensor([[1.0, 0.8, 1.0, 0.8]])
    expected = [-3.0, 2 * 0.6 - 4 * 0.8, 1.0, 4 * 0.6 + 2 * 0.8]
    assert_near(rotate(x, cos, sin).flatten(), torch.tensor(expected), 1e-6)


def test_mrope_gives_each_section_its_axis():
    """theta 8, d 6: frequencies 1, 1/2, 1/4; time 1, height 4, width 12: angles 1, 2, 3."""
    cos, sin = mrope(torch.tensor([[1], [4], [12]]), 6, 8.0, (1, 1, 1))
    angles = torch.tensor([[1.0, 2.0, 3.0, 1.0, 2.0, 3.0]])
    assert_near(cos, angles.cos(), 1e-6)
    assert_near(sin, angles.sin(), 1e-6)


def test_mrope_of_text_is_plain_rope():
    """All three positions equal n: angle n / theta^(2i/d), whatever the sections."""
    plain = [[n / 100.0 ** (2 * i / 16) for i in range(8)] * 2 for n in (0, 1, 7)]
    for section in ((2, 3, 3), (4, 2, 2)):
        cos, sin = mrope(torch.tensor([0, 1, 7]).expand(3, -1), 16, 100.0, section)
        assert_near(cos, torch.tensor(plain).cos(), 1e-6)
        assert_near(sin, torch.tensor(plain).sin(), 1e-6)


def test_vision_rope_follows_the_merge_blocks():
    """d 4: one frequency, angles row, column, row, column; 2 x 4 patches are two 2 x 2 blocks."""
    cos, sin = vision_rope(patch_places([[1, 2, 4]], 2)[:, 1:], 4)
    blocks = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    angles = torch.tensor([2 * place for place in blocks]).float()
    assert_near(cos, angles.cos(), 1e-6)
    assert_near(sin, angles.sin(), 1e-6)


@each_family
def test_vision_rope_equals_transformers(pair, shape):
    """In the order of windows, where there are any."""
    _, model, reference = pair(shape)
    prompt, seen = make_prompt(reference, 0, (1, 4, 6), (2, 8, 2)), []
    rope = reference.model.visual.rotary_pos_emb
    hook = rope.register_forward_hook(lambda module, args, output: seen.append(output))
    reference.model.visual(prompt.patches, grid_thw=prompt.grid)
    hook.remove()
    cfg, places = model.cfg.vision, patch_places(prompt.grid.tolist(), 2)
    for found, expected in zip(vision_rope(places[:, 1:], cfg.embed_dim // cfg.num_heads), seen[0]):
        assert_near(found, expected.view_as(found), 1e-6)


def test_places_count_frames_through_all_images():
    """An image of two frames of 2 x 2 patches, one of 2 x 4: two merge blocks."""
    assert patch_places([[2, 2, 2], [1, 2, 4]], 2).tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1],
        [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1],
        [2, 0, 0], [2, 0, 1], [2, 1, 0], [2, 1, 1], [2, 0, 2], [2, 0, 3], [2, 1, 2], [2, 1, 3],
    ]  # fmt: skip


def naive_windows(places: Tensor, span: int) -> list[list[int]]:
    """The patches of each window of span x span, by looking at every patch."""
    found = {}
    for i, (frame, row, column) in enumerate(places.tolist()):
        found.setdefault((frame, row // span, column // span), []).append(i)
    return list(found.values())


@pytest.mark.parametrize("span", [2, 4, 6, 8])
@pytest.mark.parametrize("grid", [
    [[1, 2, 2]], [[1, 8, 8]], [[1, 10, 6]], [[3, 4, 10]], [[1, 4, 6], [2, 6, 4], [1, 14, 2]],
])  # fmt: skip
def test_windows_are_contiguous_and_those_of_equal_length_neighbours(grid, span):
    places = patch_places(grid, 2)
    order, window = window_order(places, span)
    runs = torch.cat((torch.tensor([True]), window.diff() != 0)).nonzero()[:, 0].tolist()
    found = [order[a:b].tolist() for a, b in zip(runs, [*runs[1:], len(order)])]
    assert sorted(found) == sorted(naive_windows(places, span))
    lengths = [len(w) for w in found]
    assert lengths == sorted(lengths)
    calls = segments(window, "cpu")
    assert [(at.stop - at.start, n) for at, _, n in calls] == [
        (lengths.count(n) * n, n) for n in sorted(set(lengths))
    ]
    assert [count for _, count, _ in calls] == [lengths.count(n) for n in sorted(set(lengths))]


@pytest.mark.parametrize("size", [28, 56, 112])
@pytest.mark.parametrize("grid", [[[1, 10, 6]], [[2, 4, 10], [1, 8, 8]], [[1, 2, 2], [1, 18, 4]]])
def test_windows_are_those_of_transformers(grid, size):
    """As sets of merged tokens: ours come in another order, sorted by length."""
    index, ends = get_vision_window_index(torch.tensor(grid), 2, size, 14)
    expected = [set(x.tolist()) for x in index.split((ends.diff() // 4).tolist())]
    found = [{i // 4 for i in w} for w in naive_windows(patch_places(grid, 2), size // 14)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


# ---------------------------------------------------------------------------------- vision tower


@torch.no_grad()
@pytest.mark.parametrize(
    "grids",
    [
        [(1, 4, 6)],
        [(1, 2, 2)],  # one token
        [(1, 4, 6), (1, 8, 4), (1, 2, 14), (1, 6, 4)],  # unequal, two of them equally long
        [(1, 4, 4)] * 3,
        [(1, 4, 6), (1, 6, 4)],  # equally long, not equal
        [(3, 4, 2), (1, 4, 4), (2, 2, 4)],  # several frames
        [(3, 4, 4)],
        [(1, 6, 10), (3, 12, 4), (1, 18, 14)],  # windows whole and cut on either side
    ],
)
@pytest.mark.parametrize("shape", ["ratio 2, tied", "2.5, ratio 2, tied", "2.5, ratio 3, untied"])
def test_vision_tower_equals_transformers(pair, shape, grids):
    """transformers leaves the states before the merger in its own order of windows."""
    _, model, reference = pair(shape)
    p, size = make_prompt(reference, 1, *grids), model.cfg.vision.window_size
    expected = reference.model.visual(p.patches, grid_thw=p.grid)
    assert_near(model.visual(p.patches, p.grid), expected.pooler_output)
    states = model.visual.patch_states(p.patches, p.grid)
    if size:
        index, _ = get_vision_window_index(p.grid, 2, size, 14)
        states = states.view(len(index), 4, -1)[index].flatten(0, 1)
    assert_near(states, expected.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("full", [(), (0, 1, 2), (7, 15)])
def test_blocks_without_full_attention_and_with_nothing_else_equal_transformers(tmp_path, full):
    folder = make_checkpoint(
        tmp_path, family="qwen2_5_vl", window_size=56, depth=3, fullatt_block_indexes=full
    )
    model, reference = Qwen2VL.from_pretrained(folder), load_reference(folder)
    p = make_prompt(reference, 1, (1, 6, 10), (2, 4, 6))
    expected = reference.model.visual(p.patches, grid_thw=p.grid)
    assert_near(model.visual(p.patches, p.grid), expected.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("full, reach", [((), {0, 1, 4, 5}), ((1,), set(range(8)))])
def test_a_patch_reaches_its_own_window_unless_a_block_is_full(tmp_path, full, reach):
    """2 x 4 tokens, windows of 2 x 2 (4 x 4 patches): token 0 sees 0, 1, 4, 5 of both rows."""
    model = Qwen2VL.from_pretrained(make_checkpoint(
        tmp_path, family="qwen2_5_vl", window_size=56, depth=2, fullatt_block_indexes=full
    ))  # fmt: skip
    patches, grid = torch.randn(32, 1176), torch.tensor([[1, 4, 8]])
    changed = patches.clone()
    changed[0] += 1
    moved = (model.visual(changed, grid) - model.visual(patches, grid)).abs().amax(1) > 1e-6
    assert set(moved.nonzero()[:, 0].tolist()) == reach


def test_segments_of_equal_length_attend_in_one_call():
    def calls(*ids):
        found = segments(torch.tensor(ids), "cpu")
        return [(at if isinstance(at, slice) else at.tolist(), n, size) for at, n, size in found]

    assert calls(0, 0, 1, 1, 2, 2) == [(slice(0, 6), 3, 2)]
    assert calls(0, 1, 1, 2, 2) == [(slice(0, 1), 1, 1), (slice(1, 5), 2, 2)]
    assert calls(0, 0, 1, 2, 2) == [(slice(2, 3), 1, 1), ([0, 1, 3, 4], 2, 2)]
    assert calls(1, 0, 0, 1) == [([1, 2, 0, 3], 2, 2)]  # a segment's patches come together
    assert segments(torch.tensor([1, 0, 0, 1]), "meta")[0][0].is_meta


@torch.no_grad()
@pytest.mark.parametrize("other", [(1, 4, 4), (1, 6, 2)])  # one call of attention, or two
@each_family
def test_features_of_an_image_do_not_depend_on_its_neighbours(pair, other, shape):
    _, model, reference = pair(shape)
    p = make_prompt(reference, 2, (1, 4, 4), other)
    alone = model.visual(p.patches[:16], p.grid[:1])
    together = model.visual(p.patches, p.grid)
    changed = p.patches.clone()
    changed[16:] += 1
    beside = model.visual(changed, p.grid)
    assert_near(together[:4], alone, 1e-5)
    assert torch.equal(beside[:4], together[:4])
    assert (beside[4:] - together[4:]).abs().amin(0).max() > 1e-3


@each_family
def test_a_tower_leaves_nothing_on_another_device(pair, shape):
    """Weights and patches on "meta", a device without numbers: what stayed on the CPU is refused.
    The grid alone is read as numbers."""
    with torch.device("meta"):
        model = Qwen2VL(pair(shape)[1].cfg)
    grid = torch.tensor([[1, 10, 6], [2, 8, 8], [1, 10, 6]])
    features = model.visual(torch.empty(248, 1176, device="meta"), grid)
    assert features.shape == (62, model.cfg.hidden_size) and features.is_meta


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_family
def test_a_gpu_computes_what_the_cpu_does(pair, shape):
    folder, model, reference = pair(shape)
    on_gpu = Qwen2VL.from_pretrained(folder, device="cuda")
    assert {p.device.type for p in on_gpu.parameters()} == {"cuda"}
    p = make_prompt(reference, 1, (1, 6, 10), (3, 12, 4), (1, 18, 14))
    found = on_gpu.visual(p.patches.cuda(), p.grid.cuda())
    assert_near(found.cpu(), model.visual(p.patches, p.grid), 1e-3)


# --------------------------------------------------------------------------------------- decoder


def awkward(reference) -> list[Prompt]:
    """Unequal lengths; several unequal images, none, one, one of two frames."""
    return [
        make_prompt(reference, 3, (1, 4, 6), (1, 8, 4), (1, 2, 2)),
        make_prompt(reference, 4, words=5),
        make_prompt(reference, 5, (1, 2, 6), words=1),
        make_prompt(reference, 6, (2, 4, 4)),
    ]


@torch.no_grad()
@every_shape
def test_logits_equal_transformers(pair, shape):
    """Packed here, padded on the right or on the left there."""
    _, model, reference = pair(shape)
    prompts = awkward(reference)
    found = logits(model, prompts)
    for side in ("right", "left"):
        assert_near(found, reference_logits(reference, prompts, side))
    for part, p in zip(found.split([len(p.ids) for p in prompts]), prompts):
        assert_near(part, reference_logits(reference, [p]))


@torch.no_grad()
@pytest.mark.parametrize("shape", ["ratio 3, untied", "2.5, ratio 3, untied"])
def test_logits_of_prompts_without_an_image_equal_transformers(pair, shape):
    _, model, reference = pair(shape)
    prompts = [make_prompt(reference, i, words=n) for i, n in enumerate((1, 9, 4))]
    for side in ("right", "left"):
        assert_near(logits(model, prompts), reference_logits(reference, prompts, side))
    assert_near(logits(model, prompts[:1]), reference_logits(reference, prompts[:1]))


@every_shape
def test_gradients_equal_transformers(pair, shape):
    """Of a weighted sum of log-probs, for every parameter of both towers."""
    _, model, reference = pair(shape)
    prompts = awkward(reference)
    targets = make_text(7, sum(len(p.ids) for p in prompts))
    weight = torch.randn(len(targets), generator=torch.Generator().manual_seed(8))

    def loss(scores: Tensor) -> Tensor:
        return (weight * scores.log_softmax(-1).gather(-1, targets[:, None])[:, 0]).sum()

    found = gradients(model, loss(logits(model, prompts)))
    expected = gradients(reference, loss(reference_logits(reference, prompts)))
    if model.cfg.tie_word_embeddings:
        assert "lm_head.weight" not in found
    assert_same_gradients(found, expected, 1e-3)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_recomputed_blocks_give_the_same_gradient_and_keep_less(tmp_path, family):
    """What a block saves for the backward pass is gone after its forward; each runs once more."""
    folder = make_checkpoint(tmp_path / "model", family=family)
    qwen, again = (Qwen2VL.from_pretrained(folder) for _ in range(2))
    again.prepare(recompute=True)
    prompts = awkward(load_reference(folder))
    kept, found = [], []
    for model in (qwen, again):
        runs, sizes = [], []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        ):
            loss = logits(model, prompts).square().sum()
        found.append(gradients(model, loss))
        kept.append(sum(sizes))
        assert len(runs) == (1 if model is qwen else 2)
    assert kept[1] < kept[0] / 2
    assert_same_gradients(found[1], found[0], 1e-6)


@pytest.mark.slow
def test_blocks_are_compiled_once_for_all_lengths(pair, monkeypatch):
    """Without a graph break, by a backend that runs the graphs as they are: with gradient, without,
    and the last layer of each, which has fewer rows. The kernels of a GPU are not here."""
    folder, model, reference = pair()
    graphs, plain = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, backend=backend, **how))
    fused = Qwen2VL.from_pretrained(folder).prepare(compiled=True)
    prompts = [make_prompt(reference, i, (1, 4, 6), words=i) for i in range(2, 6)]
    assert torch._dynamo.config.recompile_limit == 64
    counts = []
    for some in (prompts, prompts[:3], prompts[1:]):
        ids, positions, layout, image_at = pack(some)
        patches, grid = (torch.cat([getattr(p, k) for p in some]) for k in ("patches", "grid"))
        ends, found = layout.prompt_lengths.cumsum(0) - 1, []
        for qwen in (model, fused):
            hidden = qwen(ids, positions, layout, qwen.visual(patches, grid), image_at, None, ends)
            found.append(gradients(qwen, hidden.square().sum()))
        assert_same_gradients(found[1], found[0], 1e-5)
        counts.append(len(graphs))
    assert counts[0] == counts[1] == counts[2] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_rows_that_are_wanted_are_those_of_the_whole_forward(pair):
    """Values and gradients; a row may be asked for twice."""
    _, model, reference = pair()
    prompts, found = awkward(reference), []
    ids, positions, layout, image_at = pack(prompts)
    patches, grid = (torch.cat([getattr(p, k) for p in prompts]) for k in ("patches", "grid"))
    wanted = torch.tensor([5, 0, 5, len(ids) - 1])
    for rows in (wanted, None):
        features = model.visual(patches, grid)
        hidden = model(ids, positions, layout, features, image_at, wanted=rows)
        hidden = hidden if rows is not None else hidden[wanted]
        found.append((hidden, gradients(model, hidden.square().sum())))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-5
    assert_same_gradients(found[0][1], found[1][1], 1e-5)


@torch.no_grad()
@each_family
def test_a_frozen_model_computes_what_autocast_computes(pair, shape):
    """Its linear layers are in bfloat16, an embedding that was tied to the head is not."""
    folder, model, reference = pair(shape)
    frozen = Qwen2VL.from_pretrained(folder).frozen(torch.bfloat16)
    assert frozen.head.dtype == frozen.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert frozen.model.embed_tokens.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in frozen.parameters())
    prompts = awkward(reference)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(run(model, prompts)[0], run(frozen, prompts)[0]):
            assert torch.equal(a, b)
    same = Qwen2VL.from_pretrained(folder).frozen(torch.float32)
    assert same.head is same.lm_head.weight and same.head.dtype == torch.float32


@torch.no_grad()
@every_shape
def test_a_copy_has_weights_side_by_side_and_computes_the_same(pair, shape):
    """Those of q, k, v and of gate, up, in the tower too where its MLPs are gated; what is written
    to a layer's own weight is what is computed with."""
    folder, model, reference = pair(shape)
    model, prompts = Qwen2VL.from_pretrained(folder), awkward(reference)
    joined = [m for m in copy(model).modules() if isinstance(m, Joined)]
    gated = model.cfg.vision.depth * (model.cfg.vision.family == "qwen2_5_vl")
    assert len(joined) == 2 * model.cfg.num_hidden_layers + gated
    for seed in range(2):
        noise = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.add_(0.01 * seed * torch.randn(p.shape, generator=noise))
        other = copy(model)
        assert other.state_dict().keys() == model.state_dict().keys()
        for name, p in model.state_dict().items():
            assert torch.equal(p, other.state_dict()[name])
        for a, b in zip(run(model, prompts)[0], run(other, prompts)[0]):
            assert (a - b).abs().max() < 1e-5
    one = other.model.layers[0].self_attn
    before = run(other, prompts)[0][0].clone()
    one.k_proj.weight.mul_(-1)
    assert (run(other, prompts)[0][0] - before).abs().max() > 1e-3


@torch.no_grad()
@every_shape
def test_greedy_continuation_equals_transformers_token_for_token(pair, shape):
    _, model, reference = pair(shape)
    prompts, new = awkward(reference)[:3], 12
    hidden, cache, position = prefill(model, prompts, 1, new)
    tokens = []
    for t in range(new):
        tokens.append((hidden @ model.head.T).argmax(-1))  # (B,)
        hidden = step(model, cache, tokens[-1][:, None], position + t, t + 1)[:, 0]
    for p, ours in zip(prompts, torch.stack(tokens, 1)):
        images = {"pixel_values": p.patches, "image_grid_thw": p.grid} if len(p.grid) else {}
        config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=PAD)
        theirs = reference.generate(
            p.ids[None], mm_token_type_ids=(p.ids == IMAGE).long()[None], generation_config=config,
            attention_mask=torch.ones(1, len(p.ids)), **images,
        )  # fmt: skip
        assert ours.tolist() == theirs[0, len(p.ids) :].tolist()
        # A random model with a tied head likes to repeat its last token.
        assert model.cfg.tie_word_embeddings or len(set(ours.tolist())) > 2


@each_family
def test_random_weights_are_fixed_by_their_seed(pair, shape):
    cfg = ModelConfig.from_dict(pair(shape)[1].cfg.raw)
    a, b, other = (Qwen2VL(cfg).init_weights(s) for s in (0, 0, 1))
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), other.parameters()):
        assert torch.equal(x, y)
        if x.dim() == 1:
            assert x.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
        else:
            assert not torch.equal(x, z) and abs(x.std() / 0.02 - 1) < 0.1, name


@each_family
def test_sampling_greedily_from_pictures_equals_generate(pair, shape):
    """From a processor's prompts to text: pictures of several sizes, one prompt without, a batch of
    unequal lengths here and one prompt at a time there."""
    folder, model, reference = pair(shape)
    processor = Processor.from_pretrained(folder, "{Question}")
    sizes = [(90, 60), (150, 120)], [], [(56, 140)], [(200, 84)]
    prompts = [
        processor.prompt(Example(f"How many {i}?", "1", tuple(picture(i, *s) for s in row)))
        for i, row in enumerate(sizes)
    ]
    out = sample(model, processor, prompts, 1, 10, temperature=0)
    for i, p in enumerate(prompts):
        images = {"pixel_values": p.patches, "image_grid_thw": p.grid} if len(p.grid) else {}
        config = GenerationConfig(
            max_new_tokens=10, do_sample=False, pad_token_id=PAD, eos_token_id=processor.stop_ids,
            suppress_tokens=processor.banned_ids,
        )  # fmt: skip
        theirs = reference.generate(
            p.ids[None], mm_token_type_ids=(p.ids == IMAGE).long()[None], generation_config=config,
            attention_mask=torch.ones(1, len(p.ids)), **images,
        )[0, len(p.ids) :]  # fmt: skip
        n = int(out.lengths[i, 0])
        assert out.ids[i, 0, :n].tolist() == theirs.tolist()


# ----------------------------------------------------------------------------------- shared prompt


def groups_of(reference, lengths) -> tuple[list[Prompt], list[list[Tensor]]]:
    """Three prompts of unequal lengths, two of them with images, and completions of `lengths`."""
    prompts = [
        make_prompt(reference, 10, (1, 4, 6), (1, 4, 4)),
        make_prompt(reference, 11, (1, 2, 8), words=2),
        make_prompt(reference, 12, words=7),
    ]
    seeds = iter(range(100))
    return prompts, [[make_text(next(seeds), n) for n in row] for row in lengths]


RAGGED = [[4, 1, 6], [3, 5, 2], [1, 6, 3]]
WITH_EMPTY = [[0, 2, 5], [3, 0, 0], [0, 0, 0]]
every_length = pytest.mark.parametrize("lengths", [RAGGED, WITH_EMPTY, [[4, 4]] * 3, [[3]] * 3])


@torch.no_grad()
@every_length
@pytest.mark.parametrize("shape", [*[*SHAPES][:3], "2.5, ratio 3, untied"])
def test_a_shared_prompt_gives_the_hidden_states_of_repeated_prompts(pair, shape, lengths):
    _, model, reference = pair(shape)
    prompts, completions = groups_of(reference, lengths)
    of_prompts, of_completions = run(model, prompts, completions)
    for p, row, shared, owns in zip(prompts, completions, of_prompts, of_completions):
        for completion, own in zip(row, owns):
            ((alone,), _) = run(model, [p.then(completion)])
            assert_near(torch.cat((shared, own)), alone, 1e-5)


def completion_loss(head: Tensor, before: Tensor, completion: Tensor, seed: int) -> Tensor:
    """Weighted log-probs of a completion (T,), given hidden states `before` (T, D) its tokens."""
    weight = torch.randn(len(completion), generator=torch.Generator().manual_seed(seed))
    logp = (before @ head.T).log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    return (weight * logp).sum()


@pytest.mark.parametrize("lengths", [RAGGED, WITH_EMPTY])
@pytest.mark.parametrize("shape", [*[*SHAPES][:2], "2.5, ratio 3, untied"])
def test_a_shared_prompt_gives_the_gradients_of_repeated_prompts(pair, shape, lengths):
    _, model, reference = pair(shape)
    prompts, completions = groups_of(reference, lengths)
    of_prompts, of_completions = run(model, prompts, completions)
    shared, repeated = 0.0, 0.0
    for b, (p, row) in enumerate(zip(prompts, completions)):
        L = len(p.ids)
        for g, completion in enumerate(row):
            before = torch.cat((of_prompts[b][-1:], of_completions[b][g]))[:-1]
            shared += completion_loss(model.head, before, completion, 7 * b + g)
            ((alone,), _) = run(model, [p.then(completion)])
            repeated += completion_loss(model.head, alone[L - 1 : -1], completion, 7 * b + g)
    assert_same_gradients(gradients(model, shared), gradients(model, repeated), 1e-5)


@torch.no_grad()
@each_family
def test_changing_an_image_moves_only_its_own_group(pair, shape):
    _, model, reference = pair(shape)
    prompts, completions = groups_of(reference, RAGGED)
    before = run(model, prompts, completions)
    changed = prompts[0].patches.clone()
    changed[24:] += 1  # the second image of the first prompt
    after = run(model, [replace(prompts[0], patches=changed), *prompts[1:]], completions)
    for b in (1, 2):
        assert torch.equal(before[0][b], after[0][b])
        assert all(torch.equal(x, y) for x, y in zip(before[1][b], after[1][b]))
    first = int((prompts[0].ids == END).nonzero()[0])  # the first image's end
    assert torch.equal(before[0][0][: first + 1], after[0][0][: first + 1])
    assert (before[0][0][-1] - after[0][0][-1]).abs().max() > 1e-3
    for x, y in zip(before[1][0], after[1][0]):
        assert (x - y).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_what_fills_the_padding_reaches_no_token(pair, monkeypatch):
    """The zeros of `unpack` become 50s: no real token may notice, in training or decoding."""
    _, model, reference = pair()
    prompts, completions = groups_of(reference, RAGGED)
    filled = []

    def unpack_with_noise(x, at, rows, width):
        if at is None:
            return x.view(rows, width, *x.shape[1:])
        filled.append(rows * width - len(at))
        out = x.new_full((rows * width, *x.shape[1:]), 50.0).index_copy(0, at, x)
        return out.view(rows, width, *x.shape[1:])

    def everything():
        of_prompts, of_completions = run(model, prompts, completions)
        _, cache, position = prefill(model, prompts, 1, 1)
        after = step(model, cache, torch.tensor([[1], [2], [3]]), position, 1)[:, 0]
        return torch.cat([*of_prompts, *(own for row in of_completions for own in row), after])

    clean = everything()
    monkeypatch.setattr(attention, "unpack", unpack_with_noise)
    assert torch.equal(everything(), clean)
    assert sum(filled) > 0


@torch.no_grad()
def test_a_ragged_batch_equals_its_prompts_alone(pair):
    _, model, reference = pair("ratio 3, untied")
    prompts, completions = groups_of(reference, RAGGED)
    together = run(model, prompts, completions)
    for b, p in enumerate(prompts):
        alone = run(model, [p], [completions[b]])
        assert_near(together[0][b], alone[0][0], 1e-5)
        for x, y in zip(together[1][b], alone[1][0]):
            assert_near(x, y, 1e-5)


# ------------------------------------------------------------------------------------------ cache


def decode(model, prompts, ids: Tensor, keep=None) -> Tensor:
    """Hidden states (B, G, T, D) of completions `ids` (B, G, T), a token at a time after a prefill.

    keep: (step, groups, rows): before that step all others leave; the result is (B', G', T', D) of
    the tokens from there on.
    """
    _, cache, position = prefill(model, prompts, *ids.shape[1:])
    out = []
    for t in range(ids.shape[2]):
        if keep is not None and t == keep[0]:
            cache.keep(*keep[1:], t)
            ids, position, out = ids[keep[1][:, None], keep[2]], position[keep[1]], []
        out.append(step(model, cache, ids[:, :, t], position + t, t + 1))
    return torch.stack(out, 2)


@torch.no_grad()
@pytest.mark.parametrize("shape", [*[*SHAPES][:2], "2.5, ratio 2, tied"])
def test_prefill_and_steps_equal_one_forward(pair, shape):
    _, model, reference = pair(shape)
    prompts, completions = groups_of(reference, [[6, 6]] * 3)
    ids = torch.stack([torch.stack(row) for row in completions])
    found = decode(model, prompts, ids)
    for b, p in enumerate(prompts):
        for g in range(2):
            ((alone,), _) = run(model, [p.then(ids[b, g])])
            assert_near(found[b, g], alone[len(p.ids) :], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [3, 1])  # prompts of unequal lengths, or a single one
def test_keep_leaves_the_results_of_those_who_stay_unchanged(pair, size):
    _, model, reference = pair()
    prompts, completions = groups_of(reference, [[6, 6, 6]] * 3)
    prompts, completions = prompts[:size], completions[:size]
    ids = torch.stack([torch.stack(row) for row in completions])
    groups = torch.tensor([2, 0] if size == 3 else [0])  # the middle prompt leaves, order turns
    rows = torch.tensor([[2, 0], [1, 2]] if size == 3 else [[2, 0]])
    all_of_them = decode(model, prompts, ids)
    kept = decode(model, prompts, ids, (3, groups, rows))
    assert_near(kept, all_of_them[groups[:, None], rows][:, :, 3:], 1e-5)
