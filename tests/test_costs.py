"""costs.py and scaling.py, chapter two: what is counted is what PyTorch counts, what is modelled
keeps its signs and limits, and docs/scaling.md holds what the code says today."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import trial
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attention
import scaling
from attention import exact_on
from checkpoint import ModelConfig, read_config
from costs import (
    SHAPES,
    collectives,
    decode_bytes,
    forward_flops,
    pixels_of,
    training_flops,
    vision_pairs,
    weights,
)
from data import Prompt
from model import Qwen2VL
from patches import mrope_positions
from rollout import as_rollout, score
from sampling import Room
from scaling import (
    DOC,
    H100,
    H200,
    Machine,
    Workload,
    decoding,
    filled,
    kernels,
    lengths,
    on_links,
    ring,
    step,
)

PUBLISHED = {"qwen2-vl-2b": 2_208_985_600, "qwen2-vl-7b": 8_291_375_616,
             "qwen2-vl-72b": 73_405_560_320, "qwen2.5-vl-3b": 3_754_622_976,
             "qwen2.5-vl-7b": 8_292_166_656}  # fmt: skip


# --------------------------------------------------------------------------------------- counted


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_weights_as_the_published_model(name):
    with torch.device("meta"):
        model = Qwen2VL(SHAPES[name])
    blocks = [*model.visual.blocks, *model.model.layers]
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    N = sum(p.numel() for p in model.parameters())
    assert PUBLISHED[name] == N
    assert weights(SHAPES[name]) == (N, N - inside, len(blocks))


@pytest.mark.parametrize("name", SHAPES)
def test_a_decode_step_reads_every_weight_of_decoder_and_head(name):
    with torch.device("meta"):
        model = Qwen2VL(SHAPES[name])
    decoder = sum(p.numel() for p in [*model.model.layers.parameters(), model.model.norm.weight])
    found = decode_bytes(SHAPES[name], 8, 2, 100, 10, width=4)
    assert found["weights"] == 4 * decoder
    assert found["head"] == 4 * model.head.numel()


def test_a_decode_step_reads_keys_of_a_prompt_once_per_group():
    """2B: 28 layers of 2 heads of 128 numbers, keys and values, 2 bytes each: 28,672 a token."""
    found = decode_bytes(SHAPES["qwen2-vl-2b"], 8, 2, 100, 10)
    assert found["prompt keys"] == 2 * 100 * 28_672
    assert found["own keys"] == 8 * (10 + 1) * 28_672


def tiny(family: str) -> ModelConfig:
    """Three layers and three vision blocks, the second one of full attention."""
    tower = {"depth": 3, "num_heads": 2}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 32, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 48,
                  "window_size": 56, "fullatt_block_indexes": [1]}  # fmt: skip
    return ModelConfig.from_dict({
        "model_type": family, "hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}, "vision_config": tower,
    })  # fmt: skip


def prompt_of(cfg: ModelConfig, text: int, grid: tuple) -> Prompt:
    """A prompt of some text tokens and a picture."""
    (t, h, w), P = grid, math.prod(grid)
    places = mrope_positions([1, (t, h // 2, w // 2), text - 1])
    return Prompt(torch.zeros(text + P // 4, dtype=torch.int64), torch.zeros(P, pixels_of(cfg)),
                  torch.tensor([grid]), places, torch.arange(P // 4) + 1, None, "")  # fmt: skip


RAGGED = (((1, 8, 12), (1, 6, 10)), (7, 11), [[5, 1, 9], [3, 3, 12]])
EVEN = (((1, 8, 12), (1, 8, 12)), (7, 7), [[6, 6], [6, 6]])


def counted(run) -> int:
    """FLOPs that PyTorch counts; it knows no attention of the CPU but the one made of products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("images, texts, own", [RAGGED, EVEN], ids=["ragged", "even"])
def test_flops_are_those_that_pytorch_counts(family, images, texts, own, monkeypatch):
    """Forward pass, both passes, both with recompute: exactly. The explicit attention of the CPU
    computes masked pairs too, so it is compared with `padded`."""
    monkeypatch.setattr("rollout.KEEP", 0)
    cfg = tiny(family)
    model = Qwen2VL(cfg).init_weights(0)
    prompts = [prompt_of(cfg, *pair) for pair in zip(texts, images)]
    rollout = as_rollout(prompts, [[[1] * n for n in row] for row in own])
    args = cfg, [len(p.ids) for p in prompts], own, list(images)

    def both():
        score(model, rollout)[0].sum().backward()

    with torch.no_grad():
        forward = counted(lambda: score(model, rollout))
    assert forward == sum(forward_flops(*args, padded=True).values())
    assert counted(both) == training_flops(*args, padded=True)
    model.prepare(recompute=True)
    assert counted(both) == training_flops(*args, recompute=True, padded=True)


def test_attention_counts_the_pairs_that_see_each_other():
    """A prompt of 4 tokens has 4 x 5 / 2 pairs; completions of 3 and 1 run 2 and 0 tokens, which
    see 2 x 4 of the prompt and 2 x 3 / 2 of their own: 21 pairs, 4 FLOPs for each of 3 x 48."""
    found = forward_flops(tiny("qwen2_vl"), [4], [[3, 1]], [])
    assert found["attention"] == 21 * 4 * 3 * 48
    assert found["head"] == 4 * 2 * 48 * 96  # 3 + 1 sampled tokens
    assert (found["vision"], found["merger"]) == (0, 0)
    dense = forward_flops(tiny("qwen2_vl"), [4], [[3, 1]], [], padded=True)
    assert dense["attention"] == (16 + 2 * 2 * (4 + 2)) * 4 * 3 * 48


def test_windows_at_an_edge_are_smaller():
    """6 x 10 patches in windows of 4 x 4: 4 + 2 rows, 4 + 4 + 2 columns."""
    windows = [4 * 4, 4 * 4, 4 * 2, 2 * 4, 2 * 4, 2 * 2]
    cfg = tiny("qwen2_5_vl")
    assert vision_pairs(cfg, (1, 6, 10)) == (60**2, sum(n * n for n in windows))
    assert vision_pairs(cfg, (2, 8, 8)) == (2 * 64**2, 2 * 64 * 16)
    assert vision_pairs(cfg, 64) == vision_pairs(cfg, (1, 8, 8))
    assert vision_pairs(tiny("qwen2_vl"), (1, 6, 10)) == (60**2, 60**2)


def test_a_group_has_its_prompt_and_its_picture_once():
    cfg = SHAPES["qwen2-vl-2b"]
    one, two, group = (forward_flops(cfg, [257], [[130] * n], [(1, 22, 34)]) for n in (1, 2, 8))
    assert (one["vision"], one["merger"]) == (group["vision"], group["merger"])
    assert group["head"] == 8 * one["head"]
    more = two["decoder"] - one["decoder"]
    assert group["decoder"] - one["decoder"] == 7 * more
    assert (one["decoder"] - more) / more == pytest.approx(257 / 130, rel=0.03)


def test_the_last_layer_goes_on_with_what_predicts_a_sampled_token_alone():
    """6 tokens run, 4 are sampled. A layer has 2 x 48 x 48 numbers for queries and output, 2 x 48 x
    24 for keys and values, 3 x 48 x 80 in its MLP; the last one's output and MLP have 4 rows."""
    out, mlp, others = 48 * 48, 3 * 48 * 80, 48 * 48 + 2 * 48 * 24
    found = forward_flops(tiny("qwen2_vl"), [4], [[3, 1]], [])
    assert found["decoder"] == 2 * (6 * 3 * others + (6 * 2 + 4) * (out + mlp))


@pytest.mark.slow
def test_processes_exchange_the_bytes_that_are_counted():
    """A real step of two gloo processes: sampling, reference, two micro-batches."""
    cfg, work = replace(read_config(trial.TINY), vocab_size=480), Workload(4, 2, max_new=4, micro=2)
    found = collectives(cfg, 2, True, shards=2, width=4)
    for real in trial.in_processes(trial.real_step, 2, cfg, work, 0):
        for kind, size in real["bytes"].items():
            assert size == sum(times * n for what, (times, n) in found.items() if kind in what)


def test_copies_add_a_sum_and_one_process_exchanges_nothing():
    cfg = SHAPES["qwen2-vl-2b"]
    N, root, _ = weights(cfg)
    alone, apart = collectives(cfg, 4, True, 8), collectives(cfg, 4, True, 8, copies=2)
    assert collectives(cfg, 4, True, 1) == {}
    assert apart == {**alone, "update: sum over copies": (4, N * 4 // 8)}
    assert alone["update: gather, backwards"] == (4, 2 * (N - root))
    assert alone["reference: gather the root"] == (1, 2 * root)  # it stays
    assert collectives(cfg, 4, False, 8)["reference: gather"][0] == 0


# -------------------------------------------------------------------------------------- modelled


def test_lengths_have_the_mean_and_a_tail_that_grows_with_their_number():
    work = replace(Workload(), max_new=2048)
    few, many = lengths(work, 128), lengths(work, 8 * 128)
    assert sum(few) / 128 == pytest.approx(work.mean, rel=0.02)
    assert few == sorted(few, reverse=True)
    assert 512 < few[0] < many[0] <= work.max_new
    assert lengths(Workload(), 8 * 128)[0] == 512
    assert lengths(replace(work, mean=1e9), 3) == [2048] * 3


def test_a_picture_of_clevr_is_22_by_34_patches():
    assert Workload().grid == (1, 22, 34)  # 308 x 476 pixels
    assert Workload().tokens == 70 + 187


def test_a_ring_is_as_slow_as_its_slowest_links():
    """8 GPUs of a node: 7/8 of the bytes through one link. 16: half of them between nodes, through
    the links of 8 GPUs."""
    machine = Machine("", 1, 1, 1, inside=200.0, between=10.0, price=0, links=1.0, hop=0.5)
    assert ring(machine, 1, 800, 1) == 0
    assert ring(machine, 8, 800, 2) == 700 / 200 + 2 * 7 * 0.5
    assert ring(machine, 16, 800, 0) == 400 / 80
    assert ring(replace(machine, links=0.5), 8, 800, 0) == 7


def test_one_gpu_waits_for_no_other():
    found = step(SHAPES["qwen2-vl-2b"], H200, 1, Workload())
    assert (found["gather"], found["deal"], found["links"]) == (0, 0, 0)


def test_passes_take_their_flops_at_the_share_that_is_reached():
    cfg, work = SHAPES["qwen2-vl-2b"], Workload(1, 8, spread=0.0)
    args = cfg, [work.tokens], [[130] * 8], [work.grid]
    found = step(cfg, H200, 1, work)
    assert found["update"] == pytest.approx(training_flops(*args, True) / (0.4 * 989e12))
    assert found["reference"] == pytest.approx(sum(forward_flops(*args).values()) / (0.4 * 989e12))
    assert step(cfg, H200, 1, replace(work, beta=0.0))["reference"] == 0


class Counter(TorchDispatchMode):
    """Counts the operations that are no views, of which each is a kernel."""

    number = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        free = op.is_view or op.overloadpacket.__name__ in ("detach", "empty", "_unsafe_view")
        self.number += not free
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_decode_step_has_about_as_many_kernels_as_are_counted(layers, monkeypatch):
    """sampling.Room.tick on a CPU, in what a GPU computes in: kernels there may differ by a few.
    Own keys apart from the prompt's, as where they are many."""
    monkeypatch.setattr(attention, "FEW", 0)
    cfg = replace(tiny("qwen2_vl"), num_hidden_layers=layers)
    processor = SimpleNamespace(banned_ids=[1], stop_ids=[2])
    model, counter = Qwen2VL(cfg).init_weights(0).twin(torch.bfloat16, torch.bfloat16), Counter()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), exact_on():
        room = Room(model, 2, 2, 3, 8, 5)
        room.begin(processor, range(2), 0, None, (1.0, 1.0, 0))
        with counter:
            room.tick(model, 2, 3, 8)
    assert counter.number == pytest.approx(kernels(cfg), rel=0.1)


def test_decoding_has_a_floor_and_takes_as_many_steps_as_the_longest_of_all():
    """Of equal lengths there is no tail; a machine with endless bandwidth still launches kernels;
    more GPUs have a longer longest."""
    cfg, work = SHAPES["qwen2-vl-2b"], Workload(spread=0.0)
    fast = replace(H200, bandwidth=1e30, flops=1e30)
    assert decoding(cfg, fast, 1, work) == pytest.approx((130 * kernels(cfg) * H200.kernel, 0.0))
    long = Workload(max_new=2048)
    one, many = (sum(decoding(cfg, fast, n, long)) for n in (1, 512))
    assert one / many == pytest.approx(lengths(long, 128)[0] / lengths(long, 512 * 128)[0]) != 1
    assert sum(decoding(cfg, H100, 1, work)) > sum(decoding(cfg, H200, 1, work))


def test_what_kernels_and_bytes_take_adds_up():
    cfg, work = SHAPES["qwen2-vl-2b"], Workload(spread=0.0)
    parts = {"kernel": 0.0}, {"bandwidth": 1e30, "flops": 1e30}
    apart = [decoding(cfg, replace(H200, **keys), 1, work)[0] for keys in parts]
    assert decoding(cfg, H200, 1, work)[0] == pytest.approx(sum(apart))
    eager = decoding(cfg, replace(H200, kernel=scaling.EAGER), 1, work)[0]
    assert eager - sum(apart) == pytest.approx(130 * kernels(cfg) * (scaling.EAGER - scaling.GRAPH))


def test_a_completion_that_has_ended_is_read_no_more():
    """8 completions of one prompt: 7 tokens, ..., 1 token; the last of 8 alone is a tail."""
    cfg, work = SHAPES["qwen2-vl-2b"], Workload(prompts=1, mean=3.5, spread=0.6)
    machine = replace(H200, bandwidth=1.0, traffic=1.0, flops=1e30, kernel=0.0)
    own, moved = lengths(work, 8), [0.0, 0.0]
    assert own[0] > own[1] > own[-1]
    for t in range(own[0]):
        rows = sum(n > t for n in own)
        found = decode_bytes(cfg, rows, 1 - (1 - rows / 8) ** 8, work.tokens, t)
        moved[rows < 2] += sum(found.values()) + rows * cfg.vocab_size * scaling.LOGIT
    assert decoding(cfg, machine, 1, work) == pytest.approx(moved)


def test_copies_add_up_their_gradients_by_their_own_links():
    """16 GPUs, 8 a copy: an eighth of 4 N bytes goes there and back, half of it by each hop."""
    cfg, work = SHAPES["qwen2-vl-2b"], Workload(micro=16, shard_group=8)
    machine = replace(H200, links=1.0, hop=0.0)
    alone, apart = (on_links(cfg, machine, n, work)["update"] for n in (8, 16))
    assert apart - alone == pytest.approx(2 * (4 * weights(cfg)[0] / 8) / 2 / machine.between)


def test_sampling_shared_out_reads_a_part_of_the_weights_and_has_more_rows():
    """One token of each completion, in bytes by hand: each GPU has the keys of an eighth of the
    rows, which are 8 times as many."""
    cfg, work = SHAPES["qwen2-vl-72b"], Workload(mean=1, spread=0.0, max_new=1, tensor=8)
    machine = replace(H200, bandwidth=1.0, traffic=1.0, flops=1e30, kernel=0.0, hop=0.0)
    read = decode_bytes(cfg, 128, 16, work.tokens, 0)
    whole, own = read["weights"] + read["head"], read["prompt keys"] + read["own keys"]
    own += 128 * cfg.vocab_size * scaling.LOGIT
    assert decoding(cfg, machine, 8, work) == pytest.approx((whole / 8 + own, 0.0))
    assert decoding(cfg, machine, 8, replace(work, tensor=1)) == pytest.approx((whole + own, 0.0))
    hops = decoding(cfg, replace(machine, hop=1.0), 8, work)[0]  # two sums a layer, there and back
    assert hops - whole / 8 - own == pytest.approx(80 * 2 * 2 * 7)


def test_links_cost_what_computing_does_not_hide():
    cfg, work = SHAPES["qwen2-vl-2b"], Workload(1, shard_group=64)
    slow = replace(H200, between=1e9)
    hidden, seen = (step(cfg, machine, 64, work)["links"] for machine in (H200, slow))
    assert seen > hidden
    bare = step(cfg, replace(slow, overlap=False), 64, work)
    assert bare["links"] == pytest.approx(seen + bare["reference"] + bare["update"])


# ------------------------------------------------------------------------------------ the document


def test_the_document_holds_what_the_code_says_today():
    """`python scaling.py --write` mends it."""
    text = DOC.read_text("utf-8")
    assert filled(text, scaling.tables()) == text
