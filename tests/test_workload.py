"""workload.py, chapter two: a whole measurement in seconds, its figures checked against its rounds.

Nothing here asserts how fast anything is.
"""

import json
import math
import statistics
import tomllib
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

import costs
import grpo
import live
import plan
import rollout
import sampling
import standin
import workload
from checkpoint import ModelConfig, read_config
from rollout import as_rollout
from standin import draw_lengths
from workload import Config, bytes_of, main, measure, phased_step, setup, timed_step, work_of

KEYS = {"shape": "tiny", "prompts": 2, "group": 3, "max_new": 12, "mean_length": 6.0,
        "rewards": ("accuracy", "format"), "bf16": False, "peak_flops": 1e12, "bandwidth": 1e10,
        "steps": 3, "warmup": 1, "phase_steps": 2, "price": 1.5}  # fmt: skip


def words(**keys) -> list[str]:
    """The command line of such a config."""
    values = {k: ",".join(v) if isinstance(v, tuple) else str(v).lower() for k, v in keys.items()}
    return [word for pair in values.items() for word in (f"--{pair[0]}", pair[1])]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What main gives, and what it wrote."""
    out = tmp_path_factory.mktemp("results") / "deep" / "r1v.json"
    found = main(words(**KEYS, out=out))
    return found, json.loads(out.read_text())


# ------------------------------------------------------------------------------------- the workload


def test_the_defaults_are_r1vs_run():
    recipe = tomllib.loads((workload.HERE / "recipes" / "r1v_clevr_2b.toml").read_text())
    ours = asdict(Config())
    same = ("prompts", "group", "max_new", "beta", "optimizer", "bf16")
    assert {k: ours[k] for k in same} == {k: recipe[k] for k in same}
    assert list(ours["rewards"]) == recipe["rewards"] and ours["shape"] == "qwen2-vl-2b"


def test_what_ran_had_the_lengths_that_were_drawn(result):
    """Step 0 was the warm-up; 1 to 3 were timed, 4 and 5 taken apart."""
    rounds = result[0]["rounds"] + result[0]["phase_rounds"]
    drawn = [draw_lengths((2, 3), 6.0, 12, (0, step)) for step in range(1, 6)]
    assert [found["sampled_tokens"] for found in rounds] == [int(n.sum()) for n in drawn]
    assert [found["longest"] for found in rounds] == [int(n.max()) for n in drawn]


def test_a_sampler_that_ends_elsewhere_is_noticed(monkeypatch):
    run = setup(Config(**KEYS), "cpu")
    monkeypatch.setattr(workload, "imposed", nullcontext)
    with pytest.raises(RuntimeError, match="did not keep the lengths"):
        timed_step(run, 0)


def test_the_real_update_runs():
    """The weights move, the reference stays; the first KL is that of equal models, later ones not;
    and sampler and trainer agree on every log-prob, banned end tokens included."""
    run = setup(Config(**KEYS), "cpu")
    before = [p.clone() for p in run.policy.parameters()]
    reference = [p.clone() for p in run.reference.parameters()]
    assert all(map(torch.equal, before, reference))
    first, second = timed_step(run, 0), timed_step(run, 1)
    assert not any(map(torch.equal, before[:4], run.policy.parameters()))
    assert all(map(torch.equal, reference, run.reference.parameters()))
    assert first["kl"] == pytest.approx(0, abs=1e-9) and second["kl"] > 1e-9
    assert all(math.isfinite(found["grad_norm"]) for found in (first, second))
    assert first["grad_norm"] > 0 and first["mismatch"] == pytest.approx(1, abs=1e-5)


def test_the_reference_has_the_policys_weights_in_what_is_computed_in():
    """As grpo.setup has them: linear layers in bfloat16, the head too, embedding and norms not."""
    run = setup(Config(**KEYS | {"bf16": True}), "cpu")
    of_linear = {p for m in run.reference.modules() if isinstance(m, torch.nn.Linear)
                 for p in m.parameters()}  # fmt: skip
    policy, reference = (dict(model.named_parameters(remove_duplicate=False))
                         for model in (run.policy, run.reference))  # fmt: skip
    assert policy.keys() == reference.keys()
    for name, p in reference.items():
        assert p.dtype == (torch.bfloat16 if p in of_linear else torch.float32)
        assert torch.equal(p, policy[name].to(p.dtype)) and not p.requires_grad


def test_real_vocabulary_real_pictures_and_no_checkpoint(monkeypatch, tmp_path, capsys):
    """The way of the real shapes: one small layer, but 151,936 tokens and pictures of 748 patches.
    In bfloat16, without a reference, and without a price: then there are no dollars."""
    shape = ModelConfig.from_dict({
        "model_type": "qwen2_vl", "hidden_size": 128, "num_hidden_layers": 1, "vocab_size": 151_936,
        "num_attention_heads": 1, "intermediate_size": 64, "tie_word_embeddings": True,
        "vision_config": {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_size": 128},
    })  # fmt: skip
    monkeypatch.setitem(costs.SHAPES, "qwen2-vl-2b", shape)
    keys = KEYS | {"shape": "qwen2-vl-2b", "prompts": 1, "group": 2, "max_new": 4, "steps": 1,
                   "warmup": 0, "phase_steps": 1, "beta": 0.0, "bf16": True}  # fmt: skip
    del keys["price"]
    found = main(words(**keys, out=tmp_path / "x.json", profile=tmp_path / "p"))
    assert found["workload"]["image_tokens"] == 187 and found["workload"]["patches"] == 748
    assert found["workload"]["weights"] == sum(
        p.numel() for p in standin.random_model(shape, "cpu", 0).parameters()
    )
    assert "kl" not in found["rounds"][0] and "reference" not in found["found"]["phases"]
    assert found["found"]["dollars_per_100_steps"] is None
    assert "--price says what they cost" in capsys.readouterr().out
    assert "traceEvents" in json.loads((tmp_path / "p" / "step.json").read_text())


# ------------------------------------------------------------------------------- what it had to do


@pytest.fixture(scope="module")
def counted():
    """work_of two completions, of 1 and of 3 tokens, of one prompt of L tokens."""
    run = setup(Config(**KEYS), "cpu")
    prompt = run.ahead([0])
    batch = as_rollout(prompt, [[[5], [5, 6, 7]]])

    def count(beta: float, bf16: bool = True) -> tuple[dict, ModelConfig, int]:
        cfg = SimpleNamespace(beta=beta, bf16=bf16)
        told = work_of(SimpleNamespace(shape=run.shape, cfg=cfg), batch)
        return told, run.shape, len(prompt[0].ids)

    return count


def test_tokens_and_flops_of_a_step_by_hand(counted):
    """Of 4 sampled tokens the prompt gives each completion its first. Both passes of the policy, of
    which the head's second run is no work, and the reference's."""
    told, shape, L = counted(beta=0.04)
    assert (told["completions"], told["sampled_tokens"], told["longest"]) == (2, 4, 3)
    assert told["decoded_tokens"] == 2 and told["trained_tokens"] == L + 2
    args = shape, [L], [[1, 3]], [(1, 6, 8)]
    forward = costs.forward_flops(*args)
    both = costs.training_flops(*args) - forward["head"]
    assert told["update_flops"] == both + sum(forward.values())
    assert 2.8 < both / sum(forward.values()) < 3  # pixels need no gradient
    assert counted(beta=0.0)[0]["update_flops"] == both


@pytest.mark.parametrize(("bf16", "width"), [(True, 2), (False, 4)])
def test_bytes_of_decode_steps_by_hand(counted, bf16, width):
    """A step of 2 slots with 4 completions of at most 5 tokens, the new one included, then one of
    a single completion."""
    _, shape, L = counted(beta=0.0)
    run = SimpleNamespace(shape=shape, cfg=SimpleNamespace(bf16=bf16))
    batch = SimpleNamespace(prompts=[SimpleNamespace(ids=range(n)) for n in (L - 1, L + 1)])
    steps = [costs.decode_bytes(shape, 8, 2, L, 4, width),
             costs.decode_bytes(shape, 1, 1, L, 6, width)]  # fmt: skip
    by_hand = sum(sum(step.values()) for step in steps)
    assert bytes_of(run, batch, [(2, 4, 5), (1, 1, 7)]) == by_hand


def test_a_decode_step_is_a_call_of_the_sampler(monkeypatch):
    """Rows that leave and the steps that are taken are the sampler's own: it is asked, not
    modelled. Without waiting prompts there is one for each token of the longest, but its first;
    there may be a few more until it is seen that all have ended."""
    run, tick, seen = setup(Config(**KEYS), "cpu"), sampling.Room.tick, []

    def watched(room, model, *shape):
        seen.append(shape)
        tick(room, model, *shape)

    monkeypatch.setattr(sampling.Room, "tick", watched)
    found = phased_step(run, 0)
    assert found["decode_steps"] == len(seen)
    assert found["longest"] - 1 <= len(seen) < found["longest"] - 1 + sampling.CHECK
    assert len({shape[:2] for shape in seen}) > 1  # some completions left
    asked = SimpleNamespace(prompts=[run.processor.prompt(e) for e in run.ahead.examples[:2]])
    assert found["decode_bytes"] == pytest.approx(bytes_of(run, asked, seen), rel=0.01)


# ----------------------------------------------------------------------------------- what comes out


def test_what_is_written_is_what_is_found(result):
    found, written = result
    assert written == json.loads(json.dumps(found))
    told = words(**KEYS, out=written["config"]["out"])
    assert written["command"] == " ".join(["python bench.py r1v", *told])
    assert written["config"]["seed"] == 0 and written["machine"]["versions"]["torch"]
    assert written["limits"] == {"flops": 1e12, "bandwidth": 1e10, "source": "command line"}
    assert len(written["rounds"]) == 3 and len(written["phase_rounds"]) == 2


def test_figures_of_a_round_follow_from_its_seconds(result):
    for found in result[1]["rounds"]:
        seconds = found["sample"] + found["update"]
        assert found["completions"] == 2 * 3 and found["step_seconds"] == seconds
        assert found["completions_per_second"] == 6 / seconds
        assert found["training_tokens_per_second"] == found["trained_tokens"] / found["update"]
        assert found["mfu"] == found["update_flops"] / found["update"] / 1e12
        assert 0 < found["waiting"] == found["waited"] / seconds < 1


def test_figures_of_decoding_follow_from_the_steps_taken_apart(result):
    for found in result[1]["phase_rounds"]:
        seconds = found["seconds"]["decode"]
        assert found["decode_tokens_per_second"] == found["decoded_tokens"] / seconds
        assert found["decode_ms_per_step"] == 1000 * seconds / found["decode_steps"]
        assert found["bandwidth_share"] == pytest.approx(found["decode_bytes"] / 1e10 / seconds)


def test_the_summary_is_median_and_range_of_the_rounds(result):
    found = result[1]["found"]
    for name, rounds in (("completions_per_second", "rounds"), ("mfu", "rounds"),
                         ("decode_ms_per_step", "phase_rounds")):  # fmt: skip
        values = [one[name] for one in result[1][rounds]]
        assert found[name] == {"median": statistics.median(values), "low": min(values),
                               "high": max(values)}  # fmt: skip


def test_dollars_are_hours_times_price(result):
    found = result[1]["found"]
    assert found["seconds_per_100_steps"] == 100 * found["step_seconds"]["median"]
    assert found["dollars_per_100_steps"] == pytest.approx(
        found["seconds_per_100_steps"] / 3600 * 1.5
    )


def test_r1vs_price_is_what_its_run_cost():
    """8 A100 for half an hour at $2.62."""
    assert pytest.approx(2.62) == 8 * 0.5 * workload.A100_PRICE


PHASES = {"preprocess", "prefill", "decode", "reward", "around", "reference", "forward/backward",
          "optimizer"}  # fmt: skip


def test_every_phase_of_a_step_has_its_seconds_and_memory(result):
    found = result[1]["found"]
    assert found["phases"].keys() == found["phase_peak_bytes"].keys() == PHASES
    assert all(x["low"] > 0 for x in found["phases"].values())
    assert all(n > 1e6 for n in found["phase_peak_bytes"].values())
    assert grpo.sample is rollout.sample and grpo.score is rollout.score  # as before
    assert sampling.Room.step.__module__ == "sampling"


def test_the_table_says_the_same(result, capsys):
    lines = workload.text(result[1]).splitlines()
    shown = next(line for line in lines if "completions/s" in line)
    assert f"{result[1]['found']['completions_per_second']['median']:.4g}" in shown
    assert any(line.strip().startswith("100 steps:") and "$1.5 an hour" in line for line in lines)
    assert sum(line.split(" ")[0] in PHASES for line in lines) == len(PHASES)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("line", "told"), [
    ("--shape qwen3", "--shape qwen3: must be one of tiny, qwen2-vl-2b"),
    ("--group 1", "must be at least 2"),
    ("--price 0", "must be above 0"),
    ("--colour red", "colour"),
])  # fmt: skip
def test_a_wrong_word_is_refused(line, told, capsys):
    with pytest.raises(SystemExit) as left:
        main(line.split())
    assert left.value.code == 2 and told in capsys.readouterr().err


def test_a_reward_that_is_unknown_and_a_folder_that_is_none_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="error: reward accurate: unknown"):
        main(words(**KEYS | {"rewards": ("accurate",)}))
    with pytest.raises(SystemExit, match=r"error: .*config.json"):
        main(words(**KEYS, model=tmp_path))


def test_what_does_not_fit_is_refused_before_a_weight_is_made(monkeypatch, capsys):
    monkeypatch.setattr(live, "memory_of", lambda *_: 2_000_000)
    monkeypatch.setattr(plan, "changes", lambda work: {})  # what would help takes seconds to find
    with pytest.raises(ValueError, match=r"does not fit: .* 2.0 MB.*--check_memory false"):
        setup(Config(**KEYS), "cpu")
    setup(Config(**KEYS, check_memory=False), "cpu")
    assert "warning: this run does not fit" in capsys.readouterr().err


def test_a_gpus_plan_is_that_of_a_gpu(monkeypatch):
    """R1-V's run on an 80 GB GPU, as it stands: the plan is made without a GPU."""
    shape, longest = costs.SHAPES["qwen2-vl-2b"], {"tokens": 257, "patches": 748}
    cpu, gpu = (workload.memory_plan(Config(), name, shape, longest) for name in ("cpu", "cuda:0"))
    assert gpu.work == replace(cpu.work, gpu=True) and gpu.work.packed
    assert (gpu.work.prompts, gpu.work.group, gpu.work.max_new, gpu.work.micro) == (16, 8, 512, 4)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(workload.parallel, "size", lambda: 2)
    with pytest.raises(ValueError, match="one device: start it without torchrun"):
        measure(Config(**KEYS), "cpu")


def test_a_checkpoints_folder_gives_shapes_and_tokenizer():
    run = setup(Config(**{**KEYS, "shape": "qwen2-vl-2b", "model": "tiny"}), "cpu")
    assert run.shape == read_config(standin.HERE / "tiny")
    assert run.processor.vocab_size == run.shape.vocab_size
