"""lora.py and adapter.py, chapter two: factors beside weights, and PEFT as their oracle."""

import copy
import json
import shutil

import pytest
import torch
from PIL import Image
from prompts import EXAMPLES, our_logits, reference_logits
from safetensors.torch import load_file
from tiny_checkpoint import make_checkpoint, picture
from transformers import AutoModelForImageTextToText

import adapter
import grpo
import lora
import parallel
import sft
from data import Processor
from lora import Learns, LoRALinear, adapter_off
from model import Qwen2VL
from optim import make_optimizers

FAMILIES = {"qwen2_vl": {}, "qwen2_5_vl": {"family": "qwen2_5_vl", "window_size": 56, "depth": 2}}
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of both families, by name."""
    where = tmp_path_factory.mktemp("models")
    return {name: make_checkpoint(where / name, **kind) for name, kind in FAMILIES.items()}


@pytest.fixture(scope="module")
def prompts(folders):
    """With one, two and no pictures."""
    processor = Processor.from_pretrained(folders["qwen2_vl"])
    return [processor.prompt(e) for e in EXAMPLES[:3]]


def learnt(folder, learns, seed=3) -> Qwen2VL:
    """A model with factors that are not zero, as after some steps."""
    model, gen = lora.load(learns, folder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora.adapted(model):
            layer.lora_B.copy_(0.2 * torch.randn(layer.lora_B.shape, generator=gen))
    return model


def saved(model, source, folder):
    """A LoRA checkpoint with all its files."""
    lora.save(folder, parallel.full_state_dict(model, lora.kept(model)), model)
    Processor.from_pretrained(source).save_pretrained(folder)
    return folder


def logits_of(model, prompts) -> list:
    with torch.no_grad():
        return [our_logits(model, p) for p in prompts]


def apart(a: list, b: list) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b))


# ------------------------------------------------------------------------------------- the layer


def test_the_layer_by_hand():
    """y = W x + b + (alpha / r) B A x (arXiv 2106.09685, equation 3)."""
    layer = LoRALinear(torch.nn.Linear(3, 2), rank=1, scale=2.0, dropout=0.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        layer.bias.copy_(torch.tensor([10.0, 20]))
        layer.lora_A.copy_(torch.tensor([[1.0, 1, 1]]))
        layer.lora_B.copy_(torch.tensor([[0.5], [-1.0]]))
    x = torch.tensor([[1.0, 2, 3]])
    assert layer(x).tolist() == [[1 + 10 + 2 * 0.5 * 6, 2 + 20 - 2 * 6]]
    assert layer.merged().tolist() == [[2.0, 1, 1], [-2, -1, -2]]
    layer.on = False
    assert layer(x).tolist() == [[11.0, 22]]


def test_dropout_is_of_the_input_and_only_where_there_is_a_gradient():
    """Kept inputs count 1 / (1 - p) times, so that the mean stays."""
    layer = LoRALinear(torch.nn.Linear(1000, 1, bias=False), 1, scale=1.0, dropout=0.25)
    with torch.no_grad():
        for p, value in ((layer.weight, 0.0), (layer.lora_A, 1.0), (layer.lora_B, 1.0)):
            p.fill_(value)
    x = torch.ones(64, 1000)
    torch.manual_seed(0)
    y = layer(x).detach()
    assert y.mean() == pytest.approx(1000, rel=0.01) and y.std() > 10
    with torch.no_grad():
        assert (layer(x) == 1000).all()


def test_dropout_draws_the_same_for_the_same_step_and_process_alone():
    model = torch.nn.Sequential(LoRALinear(torch.nn.Linear(8, 8), 2, 1.0, 0.5))
    torch.nn.init.ones_(model[0].lora_A), torch.nn.init.ones_(model[0].lora_B)
    torch.nn.init.ones_(model[0].weight), torch.nn.init.ones_(model[0].bias)

    def drawn(*place):
        lora.seed_dropout(model, *place)
        return model(torch.arange(8.0)[None]).tolist()

    places = [(seed, step, process) for seed in (0, 1) for step in (1, 2) for process in (0, 1)]
    torch.rand(5)
    found = [drawn(*place) for place in places]
    assert found == [drawn(*place) for place in places]
    assert len({str(y) for y in found}) > 4
    lora.seed_dropout(model, 10**15, 1)  # any seed that the data order takes


def test_blocks_that_run_twice_drop_the_same_inputs(folders, prompts):
    """Recomputing changes no gradient; another draw would."""
    found = []
    for seed, recompute in ((1, False), (1, True), (2, False)):
        model = learnt(folders["qwen2_vl"], Learns(rank=4, dropout=0.5, vision=True))
        model.prepare(recompute=recompute)
        lora.seed_dropout(model, 0, seed)
        our_logits(model, prompts[0]).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert apart(found[0], found[1]) == 0 < apart(found[0], found[2])


def test_factors_start_as_pefts_do_and_the_seed_fixes_them(folders):
    """B is 0, so the model is its base. A is uniform in +-1/sqrt(in), which is PEFT's
    kaiming_uniform with a = sqrt 5."""
    one, same, other = (lora.load(Learns(rank=4), folders["qwen2_vl"], seed=s) for s in (0, 0, 1))
    for a, b, c in zip(*(lora.adapted(m) for m in (one, same, other))):
        assert not a.lora_B.any() and torch.equal(a.lora_A, b.lora_A)
        assert not torch.equal(a.lora_A, c.lora_A)
        bound = a.in_features**-0.5
        assert 0.8 * bound < a.lora_A.abs().max() <= bound and abs(a.lora_A.mean()) < 0.3 * bound


# -------------------------------------------------------------------------------- PEFT as oracle


@each_family
@pytest.mark.parametrize("how", [{}, {"vision": True}, {"targets": ("q_proj", "mlp.up_proj")}])
def test_peft_loads_what_is_saved_and_computes_the_same(family, how, folders, prompts, tmp_path):
    """And has no factor that is not ours: all of its keys are in the file, and the other way."""
    peft = pytest.importorskip("peft")
    learns = Learns(rank=3, alpha=5.0, dropout=0.1, **how)
    model = learnt(folders[family], learns)
    folder = saved(model, folders[family], tmp_path / "step_000001")
    base = AutoModelForImageTextToText.from_pretrained(folders[family])
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    ours = logits_of(model, prompts)
    with torch.no_grad():
        assert apart(ours, [reference_logits(theirs, p) for p in prompts]) < 1e-4
    factors = [name for name, _ in theirs.named_parameters() if ".lora_" in name]
    assert len(factors) == 2 * len(lora.adapted(model)) == len(load_file(folder / adapter.WEIGHTS))
    with adapter_off(model):
        plain = logits_of(model, prompts)
    assert apart(plain, logits_of(Qwen2VL.from_pretrained(folders[family]), prompts)) == 0
    assert apart(plain, ours) > 1e-2


@each_family
def test_a_lora_checkpoint_is_read_merged_and_merge_makes_it_plain(
    family, folders, prompts, tmp_path
):
    """Three ways to the same logits: factors beside weights, read as a checkpoint, merged on disk
    and read by transformers."""
    model = learnt(folders[family], Learns(rank=4, vision=True))
    folder = saved(model, folders[family], tmp_path / "step_000001")
    read = Qwen2VL.from_pretrained(folder)
    lora.main(["merge", str(folder), "--out", str(tmp_path / "plain")])
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain").eval()
    ours = logits_of(model, prompts)
    assert not lora.adapted(read) and apart(ours, logits_of(read, prompts)) < 1e-4
    with torch.no_grad():
        assert apart(ours, [reference_logits(theirs, p) for p in prompts]) < 1e-4
    assert not list((tmp_path / "plain").glob("adapter*"))
    names = {p.name for p in folders[family].iterdir() if not p.name.startswith("model")}
    assert names <= {p.name for p in (tmp_path / "plain").iterdir()} | {"processor_config.json"}
    for words, told in ((["merge", str(folder), "--out", str(tmp_path / "plain")], "holds some"),
                        (["merge", str(folders[family]), "--out", str(tmp_path / "x")], "no LoRA"),
                        (["merge"], "usage")):  # fmt: skip
        with pytest.raises(SystemExit, match=told):
            lora.main(words)


def test_an_adapter_that_peft_trained_is_read(folders, prompts, tmp_path):
    """With names of transformers before 4.52, too."""
    peft = pytest.importorskip("peft")
    source = folders["qwen2_vl"]
    base = AutoModelForImageTextToText.from_pretrained(source)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"],
                             init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path)
    shutil.copy(source / "config.json", tmp_path)
    with torch.no_grad():
        wanted = [reference_logits(theirs, p) for p in prompts]
    assert apart(wanted, logits_of(Qwen2VL.from_pretrained(tmp_path), prompts)) < 1e-4
    factors = load_file(tmp_path / adapter.WEIGHTS)
    old = {k.replace("model.language_model.", "model."): v for k, v in factors.items()}
    adapter.save_file(old, tmp_path / adapter.WEIGHTS)
    assert apart(wanted, logits_of(Qwen2VL.from_pretrained(tmp_path), prompts)) < 1e-4
    head = {f"{adapter.PREFIX}lm_head.lora_{x}.weight": torch.ones(n) for x, n in
            (("A", (4, base.config.text_config.hidden_size)),
             ("B", (base.config.text_config.vocab_size, 4)))}  # fmt: skip
    adapter.save_file({**old, **head}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(ValueError, match=r"lm_head is .*, and no layer in the mod"):
        Qwen2VL.from_pretrained(tmp_path)  # its head is the embedding
    told = json.loads((tmp_path / adapter.CONFIG).read_text())
    (tmp_path / adapter.CONFIG).write_text(json.dumps({**told, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora True: only plain LoRA is read"):
        Qwen2VL.from_pretrained(tmp_path)


def test_the_copy_to_sample_from_is_plain_and_merged(folders, prompts):
    """Under autocast too, which would round the product of the factors."""
    model = learnt(folders["qwen2_vl"], Learns(rank=4, vision=True))
    copied = parallel.copy(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = parallel.copy(copy.deepcopy(model))
    for name, p in low.state_dict().items():
        assert torch.equal(copied.state_dict()[name].to(p.dtype), p)
    assert not lora.adapted(copied) and set(copied.state_dict()) == set(
        Qwen2VL.from_pretrained(folders["qwen2_vl"]).state_dict())  # fmt: skip
    assert apart(logits_of(model, prompts), logits_of(copied, prompts)) < 1e-4


# --------------------------------------------------------------------------- base gone, or another


def test_a_base_that_is_gone_or_another_is_refused(folders, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folders["qwen2_vl"], base)
    folder = saved(learnt(base, Learns(rank=2)), base, tmp_path / "step_000001")
    told = json.loads((folder / adapter.CONFIG).read_text())
    assert told["base_model_name_or_path"] == str(base)
    Qwen2VL.from_pretrained(folder)
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"LoRA checkpoint, and its base is gone.*adapter_con"):
        Qwen2VL.from_pretrained(folder)
    told["base_model_name_or_path"] = str(tmp_path / "moved")
    (folder / adapter.CONFIG).write_text(json.dumps(told))
    Qwen2VL.from_pretrained(folder)
    other = make_checkpoint(tmp_path / "other", seed=1)
    told["base_model_name_or_path"] = str(other)
    (folder / adapter.CONFIG).write_text(json.dumps(told))
    for read in (Qwen2VL.from_pretrained, lambda saved: lora.load(Learns(rank=2), other, saved)):
        with pytest.raises(ValueError, match="is not the base that it was trained on"):
            read(folder)


def test_a_base_in_bfloat16_is_the_same_base_and_files_do_not_matter(folders, tmp_path):
    whole = Qwen2VL.from_pretrained(folders["qwen2_vl"], torch.bfloat16)
    for name, dtype, size in (("low", torch.bfloat16, "5GB"), ("high", torch.float32, "100KB")):
        lora.save_weights(tmp_path / name, whole.to(dtype).state_dict(), whole.cfg, size)
    assert len(list((tmp_path / "high").glob("*.safetensors"))) > 1
    low, high = (adapter.fingerprint(tmp_path / name) for name in ("low", "high"))
    assert low == high != adapter.fingerprint(folders["qwen2_vl"])


def test_the_hubs_cache_is_named_by_its_id():
    path = "/cache/hub/models--Qwen--Qwen2-VL-2B-Instruct/snapshots/0123abc"
    assert adapter.name_of_base(path) == {
        "base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "revision": "0123abc",
    }  # fmt: skip


# ------------------------------------------------------------------------------------ what learns


def learning(model) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("freeze", [(), ("vision",), ("vision", "merger"), ("language",)])
def test_what_is_frozen_does_not_learn(freeze, folders):
    model = lora.load(Learns(freeze), folders["qwen2_vl"])
    names = {n for n, _ in model.named_parameters()}
    assert {lora.part_of(n) for n in names - learning(model)} == {*freeze}
    assert {lora.part_of(n) for n in learning(model)} == {*lora.PARTS} - {*freeze}


@pytest.mark.parametrize(
    ("learns", "layers"),
    [
        (Learns(rank=2), {"language": 14}),
        (Learns(rank=2, vision=True), {"language": 14, "vision": 8, "merger": 2}),
        (Learns(rank=2, vision=True, freeze=("language", "merger")), {"vision": 8}),
        (Learns(rank=2, targets=("q_proj", "mlp.up_proj")), {"language": 4}),
        (Learns(rank=2, vision=True, targets=("proj", "model.layers.1.mlp.up_proj")),
         {"language": 1, "vision": 2}),
    ],
)  # fmt: skip
def test_which_layers_have_factors(learns, layers, folders):
    """Two blocks of each kind. The patch filter is no linear layer; the head has no adapter."""
    model = lora.load(learns, folders["qwen2_vl"])
    assert all(n.endswith((".lora_A", ".lora_B")) for n in learning(model))
    parts = [lora.part_of(n) for n in learning(model)]
    assert {p: parts.count(p) // 2 for p in parts} == layers


def test_targets_that_are_no_layer_are_refused(folders):
    for target in ("nonsense", "lm_head", "qkv"):  # which is of vision, that has no adapter
        with pytest.raises(ValueError, match=f"lora_targets {target}: no linear layer of language"):
            lora.load(Learns(rank=2, targets=("q_proj", target)), folders["qwen2_vl"])


@pytest.mark.parametrize("Config", [grpo.Config, sft.Config])
def test_keys_that_would_do_nothing_are_refused(Config):
    for keys, told in (({"freeze": lora.PARTS}, "nothing is left to learn"),
                       ({"freeze": ("language",), "lora": 8}, "a part that is frozen has no adapt"),
                       ({"lora_alpha": 8.0}, "need --lora"), ({"lora_vision": True}, "need --lora"),
                       ({"lora": 8, "lora_vision": True, "freeze": ("vision", "merger")}, "both"),
                       ({"lora_dropout": 0.1}, "need --lora")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            Config(**keys).check()
    assert Learns.of(Config(lora=8)).scale == 2 and Learns.of(Config()).parts == lora.PARTS
    assert Learns.of(Config(lora=64, lora_alpha=128.0)).scale == 2
    once = [Learns.of(Config(**keys)).looks_once for keys in
            ({"lora": 8}, {"freeze": ("vision",)}, {"freeze": ("merger",)}, {})]  # fmt: skip
    assert once == [True, True, False, False]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimizer_has_the_factors_alone(kind, folders):
    model = lora.load(Learns(rank=2), folders["qwen2_vl"])
    held = [p for o in make_optimizers(model, kind, 1e-3) for g in o.param_groups
            for p in g["params"]]  # fmt: skip
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}


# ----------------------------------------------------------------------------------------- the run

REWARD = '''
def lower(text, example):
    "Share of the characters that are small letters."
    return sum("a" <= c <= "z" for c in text) / max(1, len(text))
'''


@pytest.fixture(scope="module")
def keys(folders, tmp_path_factory):
    """Of a GRPO run of 3 steps with LoRA; pictures for two rows of three."""
    data = tmp_path_factory.mktemp("data")
    (data / "mine.py").write_text(REWARD)
    lines = []
    for i in range(3):
        images = [f"{i}.png"][: i < 2]
        for name in images:
            Image.fromarray(picture(i, 56, 84)).save(data / name)
        lines.append(json.dumps({"images": images, "problem": f"{i}?", "solution": str(i)}) + "\n")
    (data / "rows.jsonl").write_text("".join(lines))
    return {
        "model": str(folders["qwen2_vl"]), "data": f"{data}/rows.jsonl", "steps": 3, "prompts": 2,
        "rewards": (f"{data}/mine.py:lower",), "group": 3, "max_new": 5, "micro_prompts": 1,
        "beta": 0.1, "lr": 1e-2, "probes": 0, "template": "{Question}", "save_every": 1,
        "keep": None, "lora": 4, "lora_dropout": 0.2, "lora_vision": True, "recompute": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(keys, tmp_path_factory):
    """The folder of a run that was not ended."""
    out = tmp_path_factory.mktemp("run") / "whole"
    grpo.train(grpo.Config(**keys, out=str(out)))
    return out


def metrics(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "time/", "samples_per", "tokens_per", "memory_gb", "resumed")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def test_a_checkpoint_of_a_run_holds_factors_alone(done, folders):
    """No weight of the base; moments of the factors; all that makes the folder a checkpoint."""
    step = done / "step_000003"
    assert [p.name for p in step.glob("*.safetensors")] == [adapter.WEIGHTS]
    numbers = sum(x.numel() for x in load_file(step / adapter.WEIGHTS).values())
    moments = load_file(step / "state" / "optimizer_0_0.safetensors")
    assert sum(x.numel() for x in moments.values() if x.dim()) == 2 * numbers
    assert {"config.json", "tokenizer.json"} <= {p.name for p in step.iterdir()}
    start, end = (Qwen2VL.from_pretrained(p).state_dict() for p in (folders["qwen2_vl"], step))
    moved = {k for k in start if not torch.equal(start[k], end[k])}
    assert moved and all(".bias" not in k and "norm" not in k for k in moved)


def test_a_run_that_was_ended_goes_on_bit_for_bit(done, keys, tmp_path):
    """With dropout, whose numbers are of the seed and the step, and blocks that run twice."""
    out = tmp_path / "ended"
    grpo.train(grpo.Config(**{**keys, "steps": 1}, out=str(out)))
    torch.manual_seed(123)
    grpo.train(grpo.Config(**keys, out=str(out)))
    assert metrics(out) == metrics(done)
    for step in ("step_000002", "step_000003"):
        one, other = (load_file(x / step / adapter.WEIGHTS) for x in (done, out))
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_reference_is_the_policy_with_its_adapter_off(done, keys, tmp_path, monkeypatch):
    """One model is loaded, and at the start it is the reference but for dropout; the KL of later
    steps is to the base."""
    loads, load = [], Qwen2VL.from_pretrained.__func__
    monkeypatch.setattr(Qwen2VL, "from_pretrained",
                        classmethod(lambda cls, *a, **k: loads.append(a) or load(cls, *a, **k)))
    changes = {"lora_dropout": 0.0, "recompute": False, "steps": 2}
    grpo.train(grpo.Config(**{**keys, **changes}, out=str(tmp_path / "run")))
    first, second = metrics(tmp_path / "run")
    assert len(loads) == 1 and abs(first["kl"]) < 1e-6 < 1e-4 < second["kl"]
    assert abs(second["mismatch"] - 1) < 1e-5 < 1e-4 < abs(metrics(done)[1]["mismatch"] - 1)


def test_a_run_may_start_from_a_lora_checkpoint(done, keys, prompts, tmp_path):
    """Its base is then that checkpoint, merged, and so is its reference: at the start there is no
    distance to it, and nothing is lost at the end."""
    changes = {"model": str(done), "steps": 1, "lora_dropout": 0.0, "recompute": False, "lora": 2}
    grpo.train(grpo.Config(**{**keys, **changes}, out=str(tmp_path / "second")))
    assert abs(metrics(tmp_path / "second")[0]["kl"]) < 1e-6
    told = json.loads((tmp_path / "second" / "step_000001" / adapter.CONFIG).read_text())
    assert told["base_model_name_or_path"] == str(done / "step_000003")
    again = lora.load(Learns(rank=2, vision=True), str(done / "step_000003"),
                      tmp_path / "second" / "step_000001")  # fmt: skip
    read = Qwen2VL.from_pretrained(tmp_path / "second" / "step_000001")
    assert apart(logits_of(again, prompts), logits_of(read, prompts)) < 1e-4
    before = Qwen2VL.from_pretrained(done / "step_000003")
    assert apart(logits_of(read, prompts), logits_of(before, prompts)) > 1e-5
