"""optim.py, chapter two: which optimizer moves which weight, by how much, and when none does."""

import math

import pytest
import torch
from tiny_checkpoint import make_checkpoint

from model import Qwen2VL
from optim import Muon, apply_gradients, draw_rows, make_optimizers, part_of, schedule, set_lr


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Qwen2VL.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("model"), tie=False))


def names_of(model, optimizer) -> set[str]:
    name = {id(p): n for n, p in model.named_parameters()}
    return {name[id(p)] for group in optimizer.param_groups for p in group["params"]}


# ----------------------------------------------------------------------------------- which weights


def test_adamw_has_every_weight_once(qwen):
    (adamw,) = make_optimizers(qwen, "adamw", 1e-3)
    assert type(adamw) is torch.optim.AdamW
    assert names_of(qwen, adamw) == {n for n, _ in qwen.named_parameters()}
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(qwen.parameters()))


def test_muon_and_adamw_share_the_weights_out_between_them(qwen):
    adamw, muon = make_optimizers(qwen, "muon", 1e-3)
    assert (type(adamw), type(muon)) == (torch.optim.AdamW, Muon)
    assert not names_of(qwen, adamw) & names_of(qwen, muon)
    both = names_of(qwen, adamw) | names_of(qwen, muon)
    assert both == {n for n, _ in qwen.named_parameters()}


def test_muon_has_the_inner_matrices_and_nothing_else(qwen):
    """The embedding, the head, the patch filter (5-D), norms and biases stay with AdamW."""
    adamw, muon = make_optimizers(qwen, "muon", 1e-3)
    shape = {n: p.ndim for n, p in qwen.named_parameters()}
    assert {shape[n] for n in names_of(qwen, muon)} == {2}
    outer = {n for n in names_of(qwen, adamw) if shape[n] > 1}
    assert outer == {
        "model.embed_tokens.weight", "lm_head.weight", "visual.patch_embed.proj.weight",
    }  # fmt: skip
    assert "visual.blocks.0.attn.qkv.weight" in names_of(qwen, muon)
    assert "visual.merger.mlp.0.weight" in names_of(qwen, muon)
    assert "model.layers.1.mlp.down_proj.weight" in names_of(qwen, muon)


def test_a_tied_head_is_trained_once_and_not_by_muon(tmp_path):
    model = Qwen2VL.from_pretrained(make_checkpoint(tmp_path / "tied", tie=True))
    adamw, muon = make_optimizers(model, "muon", 1e-3)
    held = [p for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert any(p is model.head for g in adamw.param_groups for p in g["params"])


def test_step_size_and_weight_decay_reach_both_optimizers(qwen):
    for optimizer in make_optimizers(qwen, "muon", 3e-3, weight_decay=0.25):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (3e-3, 0.25)


def test_no_weight_decay_unless_asked_for(qwen):
    """torch's own default is 0.01 for AdamW and 0.1 for Muon."""
    for optimizer in make_optimizers(qwen, "muon", 3e-3):
        assert optimizer.param_groups[0]["weight_decay"] == 0


def test_muon_steps_about_as_far_as_adamw():
    """Keller Jordan's step is orthogonal; x 0.2 sqrt(max side) it has AdamW's size, 0.2 lr."""
    layer = torch.nn.Linear(64, 64)
    _, muon = make_optimizers(layer, "muon", 1e-2)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    muon.step()
    rms = (layer.weight.detach() - before).square().mean().sqrt().item()
    assert rms == pytest.approx(0.2 * 1e-2, rel=0.25)


# ------------------------------------------------------------------------------------ step sizes


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),  # and 0 at a step 5 that is not taken
        ("cosine", [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedule_without_warm_up(kind, expected):
    assert [schedule(s, 4, 0, kind) for s in (1, 2, 3, 4)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedule_rises_over_the_warm_up_and_then_follows_its_kind(kind, expected):
    assert [schedule(s, 6, 2, kind) for s in range(1, 7)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_every_step_of_a_run_has_a_step_size(kind):
    """Also where the run ends inside the warm-up: no step is wasted on a step size of 0."""
    for steps, warmup in [(1, 0), (1, 1), (3, 3), (3, 10), (50, 5)]:
        assert all(0 < schedule(s, steps, warmup, kind) <= 1 for s in range(1, steps + 1))


def test_set_lr_reaches_every_group(qwen):
    optimizers = make_optimizers(qwen, "muon", 1e-3)
    set_lr(optimizers, 0.125)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.125, 0.125]


# ------------------------------------------------------------------------------ the optimizer step


def two_weights(*gradients):
    """A model with weights (2,) and (1,), all 1, and SGD with step size 1: moves by -gradient."""
    model = torch.nn.ParameterList([torch.ones(2), torch.ones(1)])
    for p, g in zip(model, gradients):
        p.grad = torch.tensor(g)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def test_clipping_is_that_of_torch():
    torch.manual_seed(0)
    model, other = (torch.nn.Linear(5, 3) for _ in range(2))
    for p, q in zip(model.parameters(), other.parameters()):
        p.grad = 7 * torch.randn_like(p)
        q.grad = p.grad.clone()
    grads = [p.grad for p in model.parameters()]
    found = apply_gradients(model, [], 0.5, 0.0)["grad_norm"]
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    assert found == pytest.approx(float(expected), rel=1e-6)
    assert all(torch.allclose(g, q.grad) for g, q in zip(grads, other.parameters()))


def test_a_long_gradient_is_scaled_down_to_max_norm_over_all_weights():
    """|(3, 0, 4)| = 5 over both weights; with max_norm 1 the step is (0.6, 0, 0.8)."""
    model, sgd = two_weights([3.0, 0.0], [4.0])
    assert apply_gradients(model, [sgd], 1.0, loss=0.5)["grad_norm"] == pytest.approx(5.0)
    assert model[0].tolist() == pytest.approx([0.4, 1.0], abs=1e-5)
    assert model[1].tolist() == pytest.approx([0.2], abs=1e-5)


def test_a_short_gradient_is_left_as_it_is():
    model, sgd = two_weights([0.3, 0.0], [0.4])
    assert apply_gradients(model, [sgd], 1.0, loss=0.5)["grad_norm"] == pytest.approx(0.5)
    assert model[0].tolist() == pytest.approx([0.7, 1.0])
    assert model[1].tolist() == pytest.approx([0.6])


def test_norms_are_told_by_part(qwen):
    """1 in one weight of the tower, 2 in one of the merger, 2 in one of the decoder: 3 in all."""
    named = dict(qwen.named_parameters())
    parts = {"visual.blocks.0.norm1.weight": 1.0, "visual.merger.ln_q.weight": 2.0,
             "model.norm.weight": 2.0}  # fmt: skip
    for name, value in parts.items():
        named[name].grad = torch.zeros_like(named[name])
        named[name].grad[0] = value
    assert apply_gradients(qwen, [], 1.0, loss=0.5) == {
        "grad_norm": 3.0, "grad_norm/vision": 1.0, "grad_norm/merger": 2.0,
        "grad_norm/language": 2.0,
    }  # fmt: skip
    assert {part_of(n) for n in named if n.startswith("visual.b")} == {"vision"}
    assert part_of("visual.patch_embed.proj.weight") == "vision"
    assert part_of("lm_head.weight") == "language"


def test_every_optimizer_steps():
    model, _ = two_weights([0.5, 0.0], [0.25])
    halves = [torch.optim.SGD([p], lr=1.0) for p in model]
    apply_gradients(model, halves, 10.0, loss=0.0)
    assert (model[0].tolist(), model[1].tolist()) == ([0.5, 1.0], [0.75])


def test_gradients_are_cleared_after_a_step():
    """They would be added to those of the next."""
    model, sgd = two_weights([3.0, 0.0], [4.0])
    apply_gradients(model, [sgd], 1.0, loss=0.5)
    assert [p.grad for p in model] == [None, None]


@pytest.mark.parametrize(
    ("loss", "gradient"),
    [(math.nan, 0.5), (math.inf, 0.5), (0.5, math.nan), (0.5, math.inf), (0.5, -math.inf)],
)
def test_a_step_that_is_not_finite_is_skipped(loss, gradient):
    """Neither weights nor the optimizer's averages change, and nothing is left for the next."""
    model, _ = two_weights([0.5, 0.0], [0.5])
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    apply_gradients(model, [adamw], 1.0, loss=0.5)
    weights = [p.detach().clone() for p in model]
    averages = [adamw.state[p]["exp_avg"].clone() for p in model]
    for p in model:
        p.grad = torch.full_like(p, gradient)
    assert apply_gradients(model, [adamw], 1.0, loss)["grad_norm"] is None
    assert all(torch.equal(p, w) for p, w in zip(model, weights))
    assert all(torch.equal(adamw.state[p]["exp_avg"], a) for p, a in zip(model, averages))
    assert [int(adamw.state[p]["step"]) for p in model] == [1, 1]
    assert [p.grad for p in model] == [None, None]


def test_a_bfloat16_forward_after_a_step_reads_the_new_weights():
    """autocast keeps the bfloat16 copy of a weight until its context ends, and a step does not
    change the copy. Weight 1 moves to -1, so the sum of two inputs of 1 moves from 2 to -2."""
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    sgd = torch.optim.SGD(layer.parameters(), lr=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(torch.ones(1, 2))
        before.sum().backward()
        apply_gradients(layer, [sgd], 10.0, loss=0.0)
        after = layer(torch.ones(1, 2))
    assert (before.item(), after.item()) == (2.0, -2.0)


# -------------------------------------------------------------------------------------- data order


def test_each_row_is_drawn_once_per_epoch():
    drawn = draw_rows(7, seed=3, start=0, count=21)
    epochs = [drawn[:7], drawn[7:14], drawn[14:]]
    assert [sorted(e) for e in epochs] == [list(range(7))] * 3


def test_epochs_and_seeds_are_shuffled_differently():
    drawn = draw_rows(50, seed=3, start=0, count=100)
    assert drawn[:50] != drawn[50:]
    assert drawn[:50] != list(range(50))
    assert drawn[:50] != draw_rows(50, seed=4, start=0, count=50)


def test_the_order_depends_on_seed_and_place_only():
    """In batches of any size, begun anywhere, across the end of an epoch: the same rows."""
    whole = draw_rows(5, seed=1, start=0, count=17)
    assert draw_rows(5, seed=1, start=0, count=17) == whole
    for size in (1, 3, 8):
        parts = [draw_rows(5, 1, at, min(size, 17 - at)) for at in range(0, 17, size)]
        assert [row for part in parts for row in part] == whole


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(draw_rows(2, seed=0, start=0, count=6)) == [0, 0, 0, 1, 1, 1]
