"""The memory plan: public numbers, sums by hand, and what real steps of small models take."""

import functools
import inspect
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoint import make_checkpoint, picture

import deal
import grpo
import lora
import parallel
import plan
import sft
from checkpoint import ModelConfig
from data import Processor
from evaluate import evaluate
from example import Example
from live import Live, memory_of, nbytes
from lora import Learns
from model import Qwen2VL
from optim import make_optimizers
from plan import Work, changes, check, check_disk, lengths, spread, text
from rollout import as_rollout, look, sample, score
from sft import text_logp

NEAR = 0.12  # how near a plan comes to what a step takes
SIZES = {"width": 128, "layers": 4, "heads": 4, "ffn": 256, "vision_width": 64, "depth": 4,
         "vision_ffn": 128}  # fmt: skip


def qwen(family: str, tower: dict, tie: bool = True, **text) -> ModelConfig:
    """A config.json by its public numbers."""
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    return ModelConfig.from_dict({"model_type": family, "tie_word_embeddings": tie,
                                  "rope_scaling": rope, "vision_config": tower, **text})


def decoder(width, layers, heads, kv_heads, inner, vocabulary) -> dict:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocabulary}


TOWER = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4}
TOWER_25 = {"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
QWEN_2B = qwen("qwen2_vl", TOWER, **decoder(1536, 28, 12, 2, 8960, 151936))
QWEN_7B = qwen("qwen2_vl", TOWER, False, **decoder(3584, 28, 28, 4, 18944, 152064))
QWEN_3B = qwen("qwen2_5_vl", TOWER_25 | {"out_hidden_size": 2048},
               **decoder(2048, 36, 16, 2, 11008, 151936))  # fmt: skip

# recipes/r1v_clevr_2b.toml on 8 processes, pictures of at most 401,408 pixels
CLEVR = Work(prompts=16, group=8, max_new=512, tokens=700, patches=2048, micro=1, processes=8,
             bf16=True, recompute=True, beta=0.04, gpu=True)  # fmt: skip


@functools.cache
def planned(work: Work) -> plan.Plan:
    return plan.of(QWEN_2B, work)


def of_2b(**keys) -> plan.Plan:
    """The plan of Qwen2-VL-2B for CLEVR with other keys."""
    return planned(replace(CLEVR, **keys))


def make(folder, family: str, **keys) -> SimpleNamespace:
    """A small checkpoint (folder, cfg, processor) and two prompts of one length, with a picture."""
    make_checkpoint(folder, family=family, **SIZES, **keys)
    processor = Processor.from_pretrained(folder)
    prompts = [processor.prompt(Example("How many?", "3", (picture(i, 224, 168),))) for i in (1, 2)]
    return SimpleNamespace(folder=folder, processor=processor, prompts=prompts,
                           cfg=Qwen2VL.from_pretrained(folder).cfg)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp("small"), "qwen2_vl")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("windowed"), "qwen2_5_vl")


@pytest.fixture(params=["small", "windowed"])
def made(request):
    """One of each family."""
    return request.getfixturevalue(request.param)


def work_of(prompts, group: int, max_new: int, **keys) -> Work:
    """That of one process whose micro-batch holds all of the prompts."""
    tokens, patches = max(len(p.ids) for p in prompts), max(len(p.patches) for p in prompts)
    return Work(len(prompts), group, max_new, tokens, patches, len(prompts), **keys)


def autocast(work: Work):
    return torch.autocast("cpu", torch.bfloat16, enabled=work.bf16)


def passes(folder, work: Work, loss) -> tuple[int, int, int]:
    """Bytes that forward and backward passes of loss(model) really take: what the forward pass
    keeps, autocast's copies of weights among it, the worst moment, and those copies alone. It is
    the second micro-batch of a step: gradients are there."""
    model = lora.load(work.learns, folder)
    model.prepare(recompute=work.recompute)
    with Live() as live, autocast(work):
        loss(model).backward()
        live.peak, before = 0, live.now
        value = loss(model)
        kept = live.now
        value.backward()
        del value
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        copies = live.now - gradients
    return kept - before + copies, live.peak, copies


def assert_near(planned: float, real: float, near: float = NEAR):
    assert abs(planned / real - 1) < near, f"planned {planned:,.0f}, really {real:,.0f}"


def passing(parts: dict) -> int:
    """Bytes that come while there are weights, and go."""
    stay = ("weights", "optimizer", "copy to sample from", "KV cache")
    return sum(found for name, found in parts.items() if name not in stay)


# ------------------------------------------------------------------------- weights and their kin


@pytest.mark.parametrize("cfg, weights", [(QWEN_2B, 2_208_985_600), (QWEN_7B, 8_291_375_616),
                                          (QWEN_3B, 3_754_622_976)])  # fmt: skip
def test_the_weights_are_as_many_as_those_of_the_public_checkpoints(cfg, weights):
    assert plan.of(cfg, CLEVR).weights == weights


def test_weights_gradients_and_moments_are_float32_and_shared_out_as_is_the_reference():
    """Which is of what is computed in: bfloat16 here. More processes than there are share none."""
    N = 2_208_985_600
    for processes, shards, share in ((1, 8, 4 * N), (8, None, N // 2), (16, 8, N // 2)):
        found = of_2b(processes=processes, shards=shards)
        for moment, parts in found.moments.items():
            assert parts["weights"] == share
            assert processes == 1 or parts["reference"] == share // 2
            assert parts["optimizer"] == 2 * share
            assert parts.get("gradients") == (None if moment == "sampling" else share)
        assert found.checkpoint == 12 * N  # of all processes
    assert of_2b(bf16=False).moments["step"]["reference"] == N // 2


@pytest.mark.parametrize("processes, bf16, tied", [
    (1, True, True), (1, True, False), (1, False, True), (2, True, True)])  # fmt: skip
def test_a_reference_and_weights_to_sample_with_are_of_what_is_computed_in(
        small, processes, bf16, tied):  # fmt: skip
    """As grpo.setup and parallel.copy make them: beside other processes all of bfloat16; in one
    linear layers alone, and a head that shares its weights no more. Embedding and norms stay."""
    cfg, low = replace(small.cfg, tie_word_embeddings=tied), torch.bfloat16
    low = low if bf16 else torch.float32
    model, rest = Qwen2VL(cfg), torch.float32 if processes == 1 else low
    reference = Qwen2VL(cfg).to(rest).frozen(low)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        twin = parallel.copy(model) if processes == 1 else model.twin(rest, low)
    found = plan.of(cfg, replace(CLEVR, processes=processes, bf16=bf16)).moments["step"]
    real = nbytes(*reference.parameters())
    assert real == nbytes(*twin.parameters()) == found["reference"] * processes
    for some in (reference, twin):
        linear = {p for m in some.modules() if isinstance(m, torch.nn.Linear)
                  for p in m.parameters()}  # fmt: skip
        assert {p.dtype for p in linear} == {low}
        assert {p.dtype for p in some.parameters() if p not in linear} == {rest}


def test_without_beta_there_is_no_reference():
    found = of_2b(beta=0.0)
    assert all(parts["reference"] == 0 for parts in found.moments.values())


def test_muon_keeps_one_moment_of_the_matrices_between_embedding_and_head(small):
    adamw, muon = (plan.of(small.cfg, replace(CLEVR, processes=1, optimizer=name))
                   for name in ("adamw", "muon"))  # fmt: skip
    model = Qwen2VL.from_pretrained(small.folder)
    matrices = sum(p.numel() for n, p in model.named_parameters()
                   if p.ndim == 2 and "embed_tokens" not in n)  # fmt: skip
    saved = 4 * matrices
    assert adamw.checkpoint - muon.checkpoint == saved
    for name in ("sampling", "update", "step"):
        assert adamw.moments[name]["optimizer"] - muon.moments[name]["optimizer"] == saved


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_temporaries_of_a_step_are_those_of_the_optimizer(small, kind):
    """The fused AdamW has none; Muon has some of one matrix at a time."""
    model = Qwen2VL.from_pretrained(small.folder)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers, peaks = make_optimizers(model, kind, 1e-3), []
    for optimizer in optimizers:
        optimizer.step()  # makes its moments
        with Live() as live:
            optimizer.step()
        peaks.append(live.peak)
    found = plan.of(small.cfg, work_of(small.prompts, 2, 4, optimizer=kind))
    temporary = found.moments["step"]["temporary"]
    if kind == "adamw":
        assert temporary == max(peaks) == 0
    else:
        assert_near(temporary, max(peaks))


# ------------------------------------------------------------------------------ gathered weights


def gathered(cfg, **keys) -> list[int]:
    """On a CPU, if not told otherwise."""
    found = plan.of(cfg, replace(CLEVR, **{"beta": 0.0, "gpu": False, **keys}))
    return [parts["gathered weights"] for parts in found.moments.values()]


def test_one_process_holds_copies_for_autocast_and_none_in_float32(small):
    work = work_of(small.prompts, 2, 4, bf16=True)
    rollout = as_rollout(small.prompts, [[[5] * 4] * 2] * 2)
    *_, copies = passes(small.folder, work, lambda model: score(model, rollout)[0].sum())
    assert gathered(small.cfg, processes=1) == [0, copies, copies]
    assert gathered(small.cfg, processes=1, beta=0.1) == [0, copies, copies]
    assert gathered(small.cfg, processes=1, bf16=False) == [0] * 3


@pytest.mark.parametrize("learns", [True, False])
def test_a_reference_leaves_no_copies_where_a_model_that_learns_does(small, learns):
    """Autocast keeps those of weights that require a gradient until it ends."""
    model = Qwen2VL.from_pretrained(small.folder).requires_grad_(learns)
    rollout = as_rollout(small.prompts, [[[5] * 4] * 2] * 2)
    with torch.no_grad(), Live() as live, torch.autocast("cpu", torch.bfloat16):
        score(model, rollout)
        held = live.now
        torch.clear_autocast_cache()
        copies = held - live.now
    assert copies == gathered(small.cfg, processes=1)[1] * learns


def test_many_processes_gather_all_to_sample_and_by_blocks_to_train(small):
    model = Qwen2VL.from_pretrained(small.folder)
    blocks = [sum(p.numel() for p in b.parameters())
              for b in (*model.visual.blocks, *model.model.layers)]  # fmt: skip
    N, block = sum(p.numel() for p in model.parameters()), max(blocks)
    root = N - sum(blocks)
    for bf16, c in ((True, 2), (False, 4)):
        # The root, its gradient; three blocks and the gradient of one, which is summed in float32.
        trains = 2 * root * c + 3 * block * c + block * c + 4 * block
        held = root * c  # by the reference, as by the policy after its last pass
        assert gathered(small.cfg, bf16=bf16) == [held, trains, held]
        with_reference = [2 * held, trains + held, 2 * held]
        assert gathered(small.cfg, bf16=bf16, beta=0.1) == with_reference


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_to_sample_with_stay_and_so_does_the_cache(small, processes):
    """Whole in each process, of what is computed in."""
    model = Qwen2VL.from_pretrained(small.folder)
    for bf16, low in ((True, torch.bfloat16), (False, torch.float32)):
        work = replace(CLEVR, processes=processes, beta=0.0, bf16=bf16)
        twin = model.twin(torch.float32 if processes == 1 else low, low)
        for found in (plan.of(small.cfg, replace(work, gpu=gpu)) for gpu in (False, True)):
            for parts in found.moments.values():
                assert parts["copy to sample from"] == nbytes(*twin.parameters())
                stays = found.work.gpu or parts is found.moments["sampling"]
                assert parts["KV cache"] == stays * found.moments["sampling"]["KV cache"]
    probed = plan.of(small.cfg, replace(CLEVR, sft=True)).moments  # and no evaluations
    assert probed["update"]["copy to sample from"] > 0


def test_the_roots_gradient_is_added_up_at_the_end_of_the_passes():
    """Where the shares are small it needs more than the optimizer: whole, and in float32."""
    found = plan.of(QWEN_7B, replace(CLEVR, processes=64))
    vocabulary = 2 * 152064 * 3584
    assert found.moments["step"]["temporary"] > (2 + 4) * vocabulary


# ------------------------------------------------------------------------------------- the passes


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_passes_of_grpo_take_what_is_planned(made, bf16, recompute):
    work = work_of(made.prompts, 4, 64, bf16=bf16, recompute=recompute)
    rollout = as_rollout(made.prompts, [[[5] * 64] * 4] * 2)
    kept, peak, _ = passes(made.folder, work, lambda model: score(model, rollout)[0].sum())
    parts = plan.of(made.cfg, work).moments["update"]
    assert_near(parts["kept for backward"] + parts["gathered weights"], kept)
    assert_near(passing(parts), peak)


LEARN = {
    "tower frozen": Learns(("vision",)), "eye frozen": Learns(("vision", "merger")),
    "language frozen": Learns(("language",)), "lora": Learns(rank=8),
    "lora, all, dropout": Learns(rank=8, vision=True, dropout=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARN)
def test_what_does_not_learn_has_no_gradient_no_moments_and_keeps_nothing(small, name):
    """Bytes of a real step of each kind; and a checkpoint with LoRA has no weights of the base."""
    work = work_of(small.prompts, 4, 64, learns=LEARN[name])
    prompts = small.prompts
    if work.learns.looks_once:
        prompts = look(Qwen2VL.from_pretrained(small.folder), prompts)
    rollout = as_rollout(prompts, [[[5] * 64] * 4] * 2)
    kept, peak, _ = passes(small.folder, work, lambda model: score(model, rollout)[0].sum())
    found, whole = (plan.of(small.cfg, w) for w in (work, replace(work, learns=lora.ALL)))
    parts, all_parts = found.moments["update"], whole.moments["update"]
    assert_near(parts["kept for backward"] + parts["gathered weights"], kept, 0.15)
    assert_near(passing(parts), peak, 0.15)
    model = lora.load(work.learns, small.folder)
    optimizers = make_optimizers(model, "adamw", 1e-3)
    score(model, rollout)[0].sum().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    for optimizer in optimizers:
        optimizer.step()
    moments = sum(x.nbytes for o in optimizers for s in o.state.values() for x in s.values()
                  if x.dim())  # fmt: skip
    assert parts["gradients"] == gradients < all_parts["gradients"]
    assert parts["optimizer"] == moments < all_parts["optimizer"]
    weights = gradients if work.learns.rank else parts["weights"]
    assert found.checkpoint == weights + moments


def test_with_lora_there_is_no_second_model():
    found = of_2b(learns=Learns(rank=64))
    assert all(parts["reference"] == 0 for parts in found.moments.values())
    assert found.checkpoint < of_2b().checkpoint / 20 and found.peak < 2 / 3 * of_2b().peak


def test_beside_other_processes_all_weights_are_bfloat16(made):
    """fully_shard gathers them so; what decoder layers add to is float32, see parallel.shard."""
    work = work_of(made.prompts, 4, 64, bf16=True, recompute=True)
    work = replace(work, prompts=4, processes=2)
    rollout = as_rollout(made.prompts, [[[5] * 64] * 4] * 2)
    model = Qwen2VL.from_pretrained(made.folder, dtype=torch.bfloat16).prepare(recompute=True)
    model.model.embed_tokens.register_forward_hook(lambda *call: call[-1].float())
    with Live() as live, autocast(work):
        value = score(model, rollout)[0].sum()
        kept = live.now
    assert value.requires_grad
    assert_near(plan.of(made.cfg, work).moments["update"]["kept for backward"], kept, 0.15)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_passes_of_sft_take_what_is_planned_also_where_prompts_are_learnt(small, bf16):
    work = work_of(small.prompts, 1, 400, bf16=bf16, sft=True)
    target = [5] * 400
    rollout = as_rollout(small.prompts, [[target]] * 2)
    whole = replace(work, max_new=0, tokens=work.tokens + 400)
    for shape, loss in ((work, lambda model: score(model, rollout)[0].sum()),
                        (whole, lambda model: text_logp(model, small.prompts, [target] * 2).sum())):
        _, peak, _ = passes(small.folder, shape, loss)
        parts = plan.of(small.cfg, shape).moments["update"]
        assert_near(passing(parts), peak)


def test_text_alone_needs_no_tower(small):
    prompts = [small.processor.prompt(Example("How many are there? " * 5, "3", ()))] * 2
    rollout = as_rollout(prompts, [[[5] * 64] * 4] * 2)
    work = work_of(prompts, 4, 64)
    assert work.patches == 0
    model = Qwen2VL.from_pretrained(small.folder)
    with Live() as live:
        value = score(model, rollout)[0].sum()
    parts = plan.of(small.cfg, work).moments["update"]
    assert value.requires_grad
    assert_near(parts["kept for backward"], live.now)


def test_a_large_vocabulary_is_planned_for(tmp_path):
    """Its logits are the worst moment; the passes run beside them."""
    folder = make_checkpoint(tmp_path / "m", padded_vocab=20_000, width=32, layers=2)
    processor = Processor.from_pretrained(folder)
    prompts = [processor.prompt(Example("How many?", "3", (picture(0, 112, 112),)))]
    work = work_of(prompts, 4, 64, recompute=True)
    rollout = as_rollout(prompts, [[[5] * 64] * 4])
    _, peak, _ = passes(folder, work, lambda model: score(model, rollout)[0].sum())
    parts = plan.of(Qwen2VL.from_pretrained(folder).cfg, work).moments["update"]
    assert parts["temporary"] > 0.5 * peak
    assert_near(passing(parts), peak)


def test_the_head_sees_all_that_is_learnt_and_has_a_gradient_of_its_own(small):
    cfg, few = replace(small.cfg, vocab_size=50_000), work_of(small.prompts, 2, 1)
    gradient = 4 * 50_000 * cfg.hidden_size
    assert plan.of(cfg, few).moments["update"]["temporary"] > gradient
    whole = replace(few, group=1, max_new=0, sft=True)
    logits = 4 * 50_000 * 2 * whole.tokens
    assert plan.of(cfg, whole).moments["update"]["temporary"] > gradient + logits


def test_what_the_decoder_kept_is_free_when_the_worst_moment_is_the_towers(small):
    work = work_of(small.prompts, 2, 1, recompute=True, bf16=True)
    work = replace(work, patches=16_384)  # of tokens there are few
    one, two = (plan.of(replace(small.cfg, num_hidden_layers=n), work).moments["update"]
                for n in (1, 2))  # fmt: skip
    assert one["kept for backward"] < two["kept for backward"]
    assert sum(one[k] for k in ("kept for backward", "temporary")) == sum(
        two[k] for k in ("kept for backward", "temporary"))  # fmt: skip


def test_rows_shorter_than_the_longest_need_less(made):
    work = work_of(made.prompts, 4, 64)
    rollout = as_rollout(made.prompts, [[[5] * n for n in (64, 20, 3, 40)], [[5] * 9] * 4])
    kept, peak, _ = passes(made.folder, work, lambda model: score(model, rollout)[0].sum())
    parts = plan.of(made.cfg, work).moments["update"]
    assert parts["kept for backward"] > kept
    assert passing(parts) > peak


def test_a_micro_batch_is_no_larger_than_the_prompts_of_a_process(small):
    work = replace(work_of(small.prompts, 2, 16), prompts=9)
    four, three = (replace(work, micro=n) for n in (4, 3))
    found = [plan.of(small.cfg, some).moments["update"] for some in (four, three)]
    assert found[0]["kept for backward"] > found[1]["kept for backward"]
    assert (four.rows, three.rows) == (4, 3)
    assert replace(four, processes=3).rows == replace(four, processes=4).rows == 3
    assert [replace(four, minibatches=n).rows for n in (1, 3, 9)] == [4, 3, 1]
    assert replace(four, minibatches=3, processes=2).rows == 2  # 5 prompts of a process in 3 parts


def test_a_micro_batch_has_no_more_tokens_than_it_may_but_one_prompt_in_any_case(small):
    """Counted as deal.py counts them, who deals out the work of a step."""
    work = replace(work_of(small.prompts, 2, 16), micro=4, prompts=9)
    row = deal.cost(small.prompts[0], 2 * 16)
    for tokens, rows in ((9 * row, 4), (3.5 * row, 3), (2 * row, 2), (1, 1)):
        dealt = deal.parts([row] * 9, 4, tokens)
        assert replace(work, micro_tokens=tokens).rows == max(map(len, dealt)) == rows
    assert work.rows == 4


# --------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind, bf16, group, side, max_new", [
    ("small", False, 2, 224, 8), ("windowed", False, 2, 224, 8), ("small", False, 16, 56, 32),
    ("small", True, 16, 56, 32)])  # fmt: skip
def test_sampling_takes_what_is_planned(request, kind, bf16, group, side, max_new):
    """The worst moment is that of the picture, or of the last token."""
    made = request.getfixturevalue(kind)
    examples = [Example("How many?", "3", (picture(i, side, side),)) for i in (1, 2)]
    prompts = [made.processor.prompt(example) for example in examples]
    model = Qwen2VL.from_pretrained(made.folder)
    with torch.no_grad():
        model.head[made.processor.stop_ids] = 0  # hardly any completion ends early
    work = work_of(prompts, group, max_new, bf16=bf16)
    with autocast(work):
        model = parallel.copy(model)
    with Live() as live, autocast(work):
        sample(model, made.processor, prompts, group, max_new)
    parts = plan.of(made.cfg, work).moments["sampling"]
    assert (parts["temporary"] > parts["KV cache"]) == (side == 224)
    # Planned, but not there: completions that leave, when a layer of the cache is copied.
    assert_near(passing(parts) + parts["KV cache"], live.peak, 0.2)


def sampled(made, prompts, group: int, max_new: int) -> int:
    """Bytes that sampling really takes."""
    model = Qwen2VL.from_pretrained(made.folder)
    with Live() as live:
        sample(model, made.processor, prompts, group, max_new)
    return live.peak


def test_long_prompts_take_what_is_planned_before_any_completion_is_there(small):
    prompts = [small.processor.prompt(Example("How many are there? " * 60, "3", ()))] * 4
    found = plan.of(small.cfg, work_of(prompts, 2, 2))
    parts = found.moments["sampling"]
    assert parts["temporary"] > parts["KV cache"]
    assert_near(parts["temporary"] + parts["KV cache"], sampled(small, prompts, 2, 2))


def test_the_logits_of_all_completions_are_planned_for(tmp_path):
    made = make(tmp_path, "qwen2_vl", padded_vocab=20_000)
    prompts = [made.processor.prompt(Example("How many?", "3", ()))]
    found = plan.of(made.cfg, work_of(prompts, 32, 2)).moments["sampling"]
    assert_near(found["temporary"] + found["KV cache"], sampled(made, prompts, 32, 2))


def test_the_cache_holds_a_prompt_once_and_each_completion():
    """Keys and values, 28 layers, 2 heads of 128 numbers, 2 bytes: 28,672 for a token."""
    parts = of_2b().moments["sampling"]
    assert parts["KV cache"] == 28_672 * 2 * (700 + 8 * 512)  # 2 of the 16 prompts
    parts = of_2b(bf16=False, processes=7).moments["sampling"]
    assert parts["KV cache"] == 2 * 28_672 * 3 * (700 + 8 * 512)


def test_evaluations_sample_64_questions_at_a_time():
    """On a GPU in a room beside that of the rollouts, which stays."""
    rollouts, evals = 28_672 * 2 * (700 + 8 * 512), 28_672 * 64 * (700 + 512)
    assert of_2b(eval_new=512).moments["sampling"]["KV cache"] == rollouts + evals
    assert of_2b(eval_new=512, gpu=False).moments["sampling"]["KV cache"] == 2 * evals  # float32
    less = of_2b(eval_new=1, prompts=512, patches=0, gpu=False).moments["sampling"]
    assert less["KV cache"] == 2 * 28_672 * 64 * (700 + 8 * 512)
    assert inspect.signature(evaluate).parameters["batch"].default == 64


def test_sft_samples_in_evaluations_alone():
    parts = of_2b(sft=True).moments["sampling"]
    assert parts["KV cache"] == parts["temporary"] == 0
    parts = of_2b(sft=True, eval_new=512).moments["sampling"]
    assert parts["KV cache"] == 28_672 * 64 * (700 + 512)


# ------------------------------------------------------------------------ what a plan is made from


def test_lengths_are_those_of_the_longest_prompt_and_of_the_most_patches(small):
    rows = [Example("How many?", "3", (picture(0, 112, 56),)),
            Example("How many? " * 30, "3", ()),
            Example("?", "3", (picture(0, 112, 112), picture(1, 56, 84)))]  # fmt: skip
    prompts = [small.processor.prompt(row) for row in rows]
    expected = {"tokens": max(len(p.ids) for p in prompts), "patches": len(prompts[2].patches)}
    assert lengths(small.processor, rows) == expected
    assert lengths(small.processor, rows[:1], (), rows[1:]) == expected
    assert lengths(small.processor, rows[1:2])["patches"] == 0


def test_rows_are_looked_at_from_the_first_to_the_last():
    assert list(spread(range(1000), 5)) == [0, 249, 499, 749, 999]
    assert list(spread("abc", 5)) == ["a", "b", "c"]
    assert list(spread("abc", 1)) == ["a"] and list(spread("", 5)) == []


def test_the_memory_of_a_machine_is_shared_by_its_processes(tmp_path):
    whole = memory_of("cpu", 1, tmp_path)
    assert 1e8 < whole < 1e14
    assert memory_of("cpu", 3, tmp_path) == whole // 3


@pytest.mark.parametrize("kind, file", [("", "memory.max"), ("memory", "memory.limit_in_bytes")])
def test_a_container_or_a_job_has_what_its_groups_allow(tmp_path, kind, file):
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = f"1:cpu:/other\n0:{kind}:/jobs/one\n"
    (tmp_path / "proc/self/cgroup").write_text(lines)
    base = tmp_path / "sys/fs/cgroup" / kind
    (base / "jobs/one").mkdir(parents=True)
    assert memory_of("cpu", 1, tmp_path) == memory_of("cpu", 1, tmp_path / "none")
    (base / "jobs/one" / file).write_text("40000000\n" if kind else "max\n")
    (base / "jobs" / file).write_text("30000000\n")
    assert memory_of("cpu", 2, tmp_path) == 15_000_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_memory_of_a_gpu_is_all_of_it():
    assert memory_of("cuda:0", 8) == torch.cuda.get_device_properties(0).total_memory


# ------------------------------------------------------------------------------------ what it says


def test_the_table_shows_each_part_and_the_sums_in_gb():
    found = of_2b()
    lines = text(found, int(80e9)).splitlines()
    assert lines[0].split() == ["memory", "of", "a", "process,", "GB", "sampling", "update", "step"]
    rows = {line[:26].strip(): line[26:].split() for line in lines[1:-1]}
    assert (rows["weights"], rows["reference"]) == (["1.1"] * 3, ["0.6"] * 3)
    assert rows["gradients"] == ["-", "1.1", "1.1"]
    assert rows["KV cache"] == ["0.3", "0.3", "0.3"]
    sums = [f"{n / 1e9:.1f}" for n in found.sums.values()]
    assert rows["sum"] == [*sums, "of", "80.0", "GB"]
    assert float(sums[1]) * 1e9 == pytest.approx(found.peak, abs=5e7)
    assert all(word in lines[-1] for word in ("2,208,985,600", "1/8", "700", "2048", "26.5 GB"))


def test_a_small_model_is_shown_in_mb_without_parts_that_are_not_there(small):
    told = text(plan.of(small.cfg, work_of(small.prompts, 2, 4)), int(2e9))
    assert ", MB" in told and "of 2.0 GB" in told and "1/" not in told
    assert "reference" not in told and "gathered" not in told


def test_a_run_that_does_not_fit_is_told_how_much_it_needs_and_what_would_help():
    start = {"prompts": 2, "processes": 1, "recompute": False}
    found = of_2b(**start)
    check(found, found.peak)
    with pytest.raises(ValueError, match="does not fit") as caught:
        check(found, found.peak - 1)
    told, needed = str(caught.value), found.peak / 1e9
    assert f"the update needs {needed:.1f} GB" in told and f"it has {needed:.1f} GB" in told
    for words, keys in (("--recompute true", {"recompute": True}),
                        ("--recompute true --beta 0", {"recompute": True, "beta": 0.0}),
                        ("2 processes with as much each", {"processes": 2})):  # fmt: skip
        assert f"{words} ({of_2b(**start | keys).peak / 1e9:.1f} GB)" in told
    assert ", --group 4 (" in told and ", --max_new 256 (" in told
    assert "--prompts" not in told  # the update does not depend on it
    figures = [float(part.rpartition("(")[2][:-4]) for part in told.split("then: ")[1].split(", ")]
    assert figures == sorted(figures) and max(figures) < needed


def test_what_nothing_helps_needs_a_smaller_model():
    work = Work(prompts=1, group=2, max_new=1, tokens=9, patches=0, micro=1, bf16=True,
                recompute=True)  # fmt: skip
    with pytest.raises(ValueError, match="then: a smaller model"):
        check(plan.of(QWEN_7B, work), int(24e9))


@pytest.mark.parametrize("script, is_sft", [(grpo, False), (sft, True)])
def test_what_helps_are_keys_of_the_command_line(script, is_sft):
    work = replace(CLEVR, bf16=False, recompute=False, micro=2, eval_new=9, sft=is_sft, shards=4)
    keys = {word[2:] for told in changes(work) for word in told.split() if word.startswith("--")}
    known = {field.name for field in fields(script.Config)}
    assert keys - known <= ({"beta"} if is_sft else set())
    assert {"bf16", "recompute", "max_new", "micro" if is_sft else "micro_prompts"} <= keys


def test_what_helps_never_asks_for_what_a_run_refuses():
    for work in (Work(1, 1, 1, 9, 0, 1, sft=True), replace(CLEVR, prompts=8, group=2, max_new=1),
                 replace(CLEVR, prompts=48, group=2, minibatches=3, processes=2)):  # fmt: skip
        for other in changes(work).values():
            assert other.prompts // other.minibatches >= other.processes
            assert other.prompts % other.minibatches == 0
            assert other.max_new >= 1 and other.group >= work.group


def test_a_disk_without_room_for_two_checkpoints_is_refused(tmp_path):
    found = of_2b()
    free = shutil.disk_usage(tmp_path).free
    small, large = (replace(found, checkpoint=int(free * x)) for x in (0.4, 0.6))
    out = str(tmp_path / "runs" / "new")
    check_disk(small, out, 2)
    check_disk(large, out, checkpoints=1)
    with pytest.raises(ValueError, match="2 checkpoints of") as caught:
        check_disk(large, out, 2)
    assert f"out {out}" in str(caught.value) and f"the disk of {tmp_path} has" in str(caught.value)
    assert not (tmp_path / "runs").exists()
