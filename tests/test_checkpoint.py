"""checkpoint.py, chapter two: real configs are read, weights come and go as transformers has them.

Checkpoints are random ones that transformers wrote itself (tests/tiny_checkpoint.py). REAL holds
config.json of the hub's checkpoints, without keys that no model reads.
"""

import copy
import json
import pickle
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import (
    assert_near,
    awkward,
    load_reference,
    logits,
    pair,
    reference_logits,
)
from tiny_checkpoint import FAMILIES, picture
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig

from checkpoint import ModelConfig, hub_name, read_weight, save_weights
from data import Processor
from model import Layout, Qwen2VL
from patches import mrope_positions
from rows import Example

__all__ = ["pair"]  # a fixture
each_family = pytest.mark.parametrize("shape", ["ratio 2, tied", "2.5, ratio 3, untied"])

# ---------------------------------------------------------------------------------------- config

COMMON = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "use_cache": True, "use_sliding_window": False,
    "torch_dtype": "bfloat16", "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
SIZE_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "tie_word_embeddings": False, "max_window_layers": 28,
}  # fmt: skip
TOWER = {
    "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
}  # fmt: skip
TOWER_2_5 = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
    "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2,
    "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
REAL = {
    "Qwen/Qwen2-VL-2B-Instruct": {
        **COMMON, "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 32768,
        "max_window_layers": 28, "num_attention_heads": 12, "num_hidden_layers": 28,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936,
        "vision_config": {**TOWER, "hidden_size": 1536},
    },
    "Qwen/Qwen2-VL-7B-Instruct": {
        **COMMON, **SIZE_7B, "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl", "max_position_embeddings": 32768,
        "vision_config": {**TOWER, "hidden_size": 3584},
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        **COMMON, "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008,
        "max_position_embeddings": 128000, "max_window_layers": 70, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "vocab_size": 151936, "vision_config": {**TOWER_2_5, "out_hidden_size": 2048},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        **COMMON, **SIZE_7B, "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl", "max_position_embeddings": 128000,
        "vision_config": {**TOWER_2_5, "out_hidden_size": 3584},
    },
}  # fmt: skip
PARAMETERS = {  # as the hub's pages of these checkpoints count them
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600, "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976, "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
}  # fmt: skip


def as_transformers_writes(raw: dict, folder: Path) -> dict:
    """config.json after transformers read and wrote it: text_config and rope_parameters."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", REAL)
def test_the_hubs_configs_make_the_hubs_models(name, tmp_path):
    """Every weight has transformers' name and shape, their number is the published one, and the
    layout in which transformers writes a config says the same."""
    cfg = ModelConfig.from_dict(REAL[name])
    nested = as_transformers_writes(REAL[name], tmp_path)
    assert "text_config" in nested and "hidden_size" not in nested
    assert replace(ModelConfig.from_dict(nested), raw={}) == replace(cfg, raw={})
    with torch.device("meta"):
        model = Qwen2VL(cfg)
        reference = FAMILIES[cfg.vision.family][1](AutoConfig.from_pretrained(tmp_path))
    expected = {hub_name(k): v.shape for k, v in reference.named_parameters()}
    assert {k: v.shape for k, v in model.named_parameters()} == expected
    assert sum(shape.numel() for shape in expected.values()) == PARAMETERS[name]


def test_a_real_config_is_read_key_by_key():
    cfg = ModelConfig.from_dict(REAL["Qwen/Qwen2.5-VL-3B-Instruct"])
    assert (cfg.head_dim, cfg.mrope_section, cfg.rope_theta) == (128, (16, 24, 24), 1e6)
    assert (cfg.rms_norm_eps, cfg.tie_word_embeddings, cfg.num_key_value_heads) == (1e-6, True, 2)
    v = cfg.vision
    assert (v.embed_dim, v.hidden_size, v.intermediate_size, v.depth) == (1280, 2048, 3420, 32)
    assert (v.window_size, v.window, v.fullatt_block_indexes) == (112, 8, (7, 15, 23, 31))
    assert v.tokens_per_second == 2
    v = ModelConfig.from_dict(REAL["Qwen/Qwen2-VL-2B-Instruct"]).vision
    assert (v.embed_dim, v.hidden_size, v.intermediate_size, v.window) == (1280, 1536, 5120, 0)


@pytest.mark.parametrize("name", REAL)
def test_keys_that_a_config_does_not_have_mean_what_they_do_in_transformers(name, tmp_path):
    raw = copy.deepcopy(REAL[name])
    widths = "embed_dim", "hidden_size", "out_hidden_size"
    raw["vision_config"] = {k: v for k, v in raw["vision_config"].items() if k in widths}
    del raw["tie_word_embeddings"]
    found = ModelConfig.from_dict(raw)
    expected = ModelConfig.from_dict(as_transformers_writes(raw, tmp_path))
    assert replace(found, raw={}) == replace(expected, raw={})


def test_older_names_of_the_towers_sizes_are_read():
    tower = {k: v for k, v in TOWER.items() if k not in ("in_chans", "patch_size")}
    old = {**tower, "hidden_size": 48, "in_chans": 1, "spatial_patch_size": 16}
    cfg = ModelConfig.from_dict({**FLAT, "vision_config": old})
    assert (cfg.vision.in_channels, cfg.vision.patch_size) == (1, 16)
    new = {**old, "in_channels": 3, "patch_size": 14}
    cfg = ModelConfig.from_dict({**FLAT, "vision_config": new})
    assert (cfg.vision.in_channels, cfg.vision.patch_size) == (3, 14)


SIZES = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
VISION = {"depth": 3, "embed_dim": 32, "num_heads": 2, "hidden_size": 48, "mlp_ratio": 2}
FLAT = {  # as the checkpoints on the hub
    **SIZES, "model_type": "qwen2_vl", "rope_theta": 5e5, "tie_word_embeddings": True,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "vision_config": VISION,
    "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 1, 1]}
NESTED = {  # as transformers 5 writes
    "model_type": "qwen2_vl", "tie_word_embeddings": True, "vision_config": VISION,
    "text_config": {**SIZES, "model_type": "qwen2_vl_text", "rope_parameters": ROPE},
}  # fmt: skip


def test_both_layouts_of_config_json_read_equally():
    flat, nested = ModelConfig.from_dict(FLAT), ModelConfig.from_dict(NESTED)
    assert replace(flat, raw={}) == replace(nested, raw={})
    for name, value in SIZES.items():
        assert getattr(flat, name) == value
    for name in ("depth", "embed_dim", "num_heads", "hidden_size"):
        assert getattr(flat.vision, name) == VISION[name]
    assert flat.vision.intermediate_size == 64
    assert (flat.rope_theta, flat.mrope_section, flat.head_dim) == (5e5, (2, 1, 1), 8)
    assert flat.tie_word_embeddings is True


def test_a_head_is_tied_only_where_the_config_says_so():
    for raw in (FLAT, NESTED):
        assert not ModelConfig.from_dict({**raw, "tie_word_embeddings": False}).tie_word_embeddings
        silent = {k: v for k, v in raw.items() if k != "tie_word_embeddings"}
        assert not ModelConfig.from_dict(silent).tie_word_embeddings


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"model_type": "qwen3_vl"}, "'qwen3_vl': only qwen2_vl and qwen2_5_vl"),
        ({"model_type": None}, "model_type"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vision_config": {**VISION, "hidden_act": "relu"}}, "relu"),
        ({"vision_config": {**VISION, "hidden_act": "silu"}}, "must be 'quick_gelu'"),
        ({"vision_config": {**VISION, "hidden_size": 64}}, "width of 64, .* hidden_size is 48"),
        ({"vision_config": {**VISION, "num_heads": 3}}, "4 x num_heads, 4 x 3"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads, 4"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict({**FLAT, **wrong})


@pytest.mark.parametrize("wrong, named", [
    ({"window_size": 14}, "window_size 14: .* 28 pixels"),
    ({"hidden_act": "quick_gelu"}, "must be 'silu'"),
    ({"hidden_size": None}, r"no vision_config\.hidden_size"),
    ({"out_hidden_size": 3584}, "width of 3584, .* 2048"),
])  # fmt: skip
def test_a_tower_of_qwen2_5_that_does_not_fit_is_refused(wrong, named):
    raw = REAL["Qwen/Qwen2.5-VL-3B-Instruct"]
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict({**raw, "vision_config": {**raw["vision_config"], **wrong}})


# ---------------------------------------------------------------------------- reading and writing


def copy_checkpoint(folder, new, change=lambda weights: weights, config=None):
    """A checkpoint with changed weights (dict name -> tensor) or another config.json."""
    new.mkdir()
    config = config or json.loads((folder / "config.json").read_text())
    (new / "config.json").write_text(json.dumps(config))
    weights = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in weights.items()}, new / "model.safetensors")
    return new


def assert_equal_weights(found: Qwen2VL, expected: Qwen2VL):
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, weight in found.state_dict().items():
        assert weight.dtype == state[name].dtype and torch.equal(weight, state[name]), name


@torch.no_grad()
@pytest.mark.parametrize("shape", ["ratio 2, tied", "ratio 3, untied", "one key head, tied",
                                   "2.5, ratio 2, tied", "2.5, ratio 3, untied"])  # fmt: skip
def test_what_we_save_loads_in_transformers_and_back(pair, shape, tmp_path):
    """With changed weights, or an unchanged file in the folder would pass."""
    model = copy.deepcopy(pair(shape)[1])
    for p in model.parameters():
        p.mul_(1.01)
    model.save_pretrained(tmp_path / "new")
    reference = load_reference(tmp_path / "new")
    prompts = awkward(reference)
    assert_near(logits(model, prompts), reference_logits(reference, prompts))
    again = Qwen2VL.from_pretrained(tmp_path / "new")
    assert_equal_weights(again, model)
    assert replace(again.cfg, raw={}) == replace(model.cfg, raw={})
    reference.save_pretrained(tmp_path / "theirs")
    assert_equal_weights(Qwen2VL.from_pretrained(tmp_path / "theirs"), model)
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not model.cfg.tie_word_embeddings


def test_a_tied_head_stays_the_embedding_after_loading(pair):
    _, tied, _ = pair()
    _, untied, _ = pair("ratio 3, untied")
    assert tied.head is tied.model.embed_tokens.weight
    assert untied.head is not untied.model.embed_tokens.weight


def test_sharded_checkpoints_are_read(pair, tmp_path):
    _, model, reference = pair("ratio 3, untied")
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_equal_weights(Qwen2VL.from_pretrained(tmp_path), model)


def test_saving_over_a_sharded_checkpoint_leaves_nothing_of_it(pair, tmp_path):
    _, model, reference = pair("ratio 3, untied")
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(2)
    changed.save_pretrained(tmp_path)
    assert_equal_weights(Qwen2VL.from_pretrained(tmp_path), changed)
    assert torch.equal(load_reference(tmp_path).lm_head.weight, changed.lm_head.weight)


def flat_config(folder) -> dict:
    """The checkpoint's config.json in the layout of the hub."""
    raw = json.loads((folder / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return {**text, **raw, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


@torch.no_grad()
@pytest.mark.parametrize("shape", ["ratio 2, tied", "ratio 3, untied", "2.5, ratio 2, tied",
                                   "2.5, ratio 3, untied"])  # fmt: skip
def test_both_layouts_of_names_are_read(pair, shape, tmp_path):
    """visual.*, model.* with a flat config.json, and model.visual.*, model.language_model.*"""
    folder, model, reference = pair(shape)

    def outer(weights):
        return {hub_name(k): v for k, v in weights.items()}

    def inner(weights):
        nested = {}
        for name, weight in outer(weights).items():
            if name.startswith("model."):
                name = name.replace("model.", "model.language_model.", 1)
            nested[f"model.{name}" if name.startswith("visual.") else name] = weight
        return nested

    hub = copy_checkpoint(folder, tmp_path / "hub", outer, flat_config(folder))
    assert {k.split(".")[0] for k in load_file(hub / "model.safetensors")} >= {"visual", "model"}
    assert "model.layers.0.mlp.up_proj.weight" in load_file(hub / "model.safetensors")
    assert_equal_weights(Qwen2VL.from_pretrained(hub), model)
    deep = copy_checkpoint(folder, tmp_path / "deep", inner)
    assert "model.visual.merger.ln_q.weight" in load_file(deep / "model.safetensors")
    assert "model.language_model.norm.weight" in load_file(deep / "model.safetensors")
    assert_equal_weights(Qwen2VL.from_pretrained(deep), model)

    hub_model, hub_reference = Qwen2VL.from_pretrained(hub), load_reference(hub)
    prompts = awkward(reference)
    expected = reference_logits(hub_reference, prompts)
    assert_near(logits(hub_model, prompts), expected)
    hub_model.save_pretrained(tmp_path / "again")
    assert_near(reference_logits(load_reference(tmp_path / "again"), prompts), expected)


@torch.no_grad()
def test_a_bfloat16_file_loads_as_float32_or_as_asked(pair, tmp_path):
    folder, model, _ = pair()
    small = copy_checkpoint(
        folder, tmp_path / "bf16", lambda w: {k: v.bfloat16() for k, v in w.items()}
    )
    rounded = copy.deepcopy(model).bfloat16()
    assert_equal_weights(Qwen2VL.from_pretrained(small), rounded.float())
    assert_equal_weights(Qwen2VL.from_pretrained(small, dtype=torch.bfloat16), rounded.bfloat16())


@torch.no_grad()
def test_a_model_in_bfloat16_is_saved_as_such(pair, tmp_path):
    model = copy.deepcopy(pair()[1]).bfloat16()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal_weights(Qwen2VL.from_pretrained(tmp_path, dtype=torch.bfloat16), model)
    theirs = FAMILIES["qwen2_vl"][1].from_pretrained(tmp_path, dtype="auto")
    assert theirs.lm_head.weight.dtype == torch.bfloat16


def test_weights_that_do_not_fit_are_refused_with_name_expected_and_found(pair, tmp_path):
    """All that is wrong in one message, under the names on the hub."""
    folder, _, _ = pair()

    def spoil(weights):
        weights = {hub_name(k): v for k, v in weights.items()}
        del weights["visual.blocks.1.norm2.bias"]
        weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(95, 64)
        weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(96, 64)
        return weights

    with pytest.raises(ValueError) as error:
        Qwen2VL.from_pretrained(copy_checkpoint(folder, tmp_path / "spoilt", spoil))
    message = str(error.value)
    assert str(tmp_path / "spoilt") in message
    assert "visual.blocks.1.norm2.bias: missing" in message
    assert "model.layers.0.mlp.up_proj.weight: expected (96, 64), found (95, 64)" in message
    assert "model.layers.7.mlp.up_proj.weight: not expected" in message
    # A weight of another shape counts once as that, and the others not at all.
    assert "blocks.0" not in message and "layers.1" not in message


@pytest.mark.parametrize("shape, name", [
    ("ratio 2, tied", "model.embed_tokens.weight"), ("ratio 3, untied", "lm_head.weight"),
])  # fmt: skip
def test_a_missing_head_is_refused(pair, tmp_path, shape, name):
    def without(weights):
        return {k: v for k, v in weights.items() if hub_name(k) != name}

    folder = copy_checkpoint(pair(shape)[0], tmp_path / "headless", without)
    with pytest.raises(ValueError, match=f"{name}: missing"):
        Qwen2VL.from_pretrained(folder)


def test_missing_files_are_named(pair, tmp_path):
    _, _, reference = pair()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Qwen2VL.from_pretrained(tmp_path)
    reference.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        Qwen2VL.from_pretrained(tmp_path)
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        Qwen2VL.from_pretrained(tmp_path)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_loading_executes_no_pickle(pair, tmp_path):
    """Pickles beside the weights are not looked at; one in place of the weights is refused."""
    folder, model, _ = pair()
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap).close()
    assert sprung.exists()  # the trap works
    sprung.unlink()
    beside = copy_checkpoint(folder, tmp_path / "beside")
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (beside / name).write_bytes(trap)
    assert_equal_weights(Qwen2VL.from_pretrained(beside), model)
    (beside / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Qwen2VL.from_pretrained(beside)
    (beside / "model.safetensors").write_bytes(trap)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole"):
        Qwen2VL.from_pretrained(beside)
    assert not sprung.exists()

@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_in_the_file_must_be_the_embedding(pair, tmp_path, same):
    """As some trainers save it; other numbers mean that the config is wrong."""
    folder, model, _ = pair()

    def with_head(weights):
        named = {hub_name(k): v for k, v in weights.items()}
        head = named["model.embed_tokens.weight"].clone()
        head[7, 3] += 0.0 if same else 1e-3
        return {**weights, "lm_head.weight": head}

    doubled = copy_checkpoint(folder, tmp_path / "doubled", with_head)
    if same:
        again = Qwen2VL.from_pretrained(doubled)
        assert_equal_weights(again, model)
        assert again.head is again.model.embed_tokens.weight
    else:
        with pytest.raises(ValueError, match=r"tie_word_embeddings true, but lm_head\.weight"):
            Qwen2VL.from_pretrained(doubled)


@torch.no_grad()
@each_family
def test_float16_is_read_and_written(pair, tmp_path, shape):
    model = copy.deepcopy(pair(shape)[1]).half()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["visual.merger.ln_q.weight"].dtype == (
        torch.float16
    )
    assert_equal_weights(Qwen2VL.from_pretrained(tmp_path), copy.deepcopy(model).float())


@each_family
def test_what_we_save_in_shards_loads_here_and_there(pair, tmp_path, shape):
    _, model, reference = pair(shape)
    save_weights(tmp_path, model.state_dict(), model.cfg, shard="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_equal_weights(Qwen2VL.from_pretrained(tmp_path), model)
    theirs = load_reference(tmp_path).state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in reference.state_dict().items())


def test_the_dtype_of_the_hubs_config_follows_the_weights(pair, tmp_path):
    """One that says bfloat16 beside weights in float32 would be halved when it is read."""
    folder, _, _ = pair()
    hub = copy_checkpoint(folder, tmp_path / "hub", config={
        **flat_config(folder), "torch_dtype": "bfloat16", "dtype": None})  # fmt: skip
    Qwen2VL.from_pretrained(hub).save_pretrained(tmp_path / "new")
    raw = json.loads((tmp_path / "new" / "config.json").read_text())
    assert raw["torch_dtype"] == raw["dtype"] == "float32"
    theirs = FAMILIES["qwen2_vl"][1].from_pretrained(tmp_path / "new", dtype="auto")
    assert theirs.lm_head.weight.dtype == torch.float32
    raw = {**flat_config(folder), "dtype": None}
    silent = copy_checkpoint(folder, tmp_path / "silent", config=raw)
    Qwen2VL.from_pretrained(silent).bfloat16().save_pretrained(tmp_path / "told")
    theirs = FAMILIES["qwen2_vl"][1].from_pretrained(tmp_path / "told", dtype="auto")
    assert theirs.lm_head.weight.dtype == torch.bfloat16


@each_family
def test_a_saved_checkpoint_is_complete_for_transformers(pair, tmp_path, shape):
    """Weights, tokenizer with its chat template, image processor and generation config."""
    folder, model, _ = pair(shape)
    processor = Processor.from_pretrained(folder, "{Question}")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    prompt = processor.prompt(Example("How many?", "3", (picture(0, 90, 60),)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "How many?"}]}]  # fmt: skip
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == prompt.text
    seen = AutoImageProcessor.from_pretrained(tmp_path)([picture(0, 90, 60)], return_tensors="pt")
    assert torch.equal(seen["image_grid_thw"], prompt.grid)
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id
    assert_equal_weights(Qwen2VL.from_pretrained(tmp_path), model)


def test_a_model_does_not_read_its_file_again(pair, tmp_path):
    """It may be overwritten, by a save of this very model for one."""
    folder, model, _ = pair()
    own = copy_checkpoint(folder, tmp_path / "own")
    again = Qwen2VL.from_pretrained(own)
    path = own / "model.safetensors"
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2)
        f.write(bytes(path.stat().st_size // 2))
    assert_equal_weights(again, model)


MEASURE = """
import sys
import torch
from model import Qwen2VL

def status(key):  # MB
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x for x in lines if x.startswith(key)).split()[1]) / 1024

torch.set_num_threads(1)
for dtype in (torch.bfloat16, torch.float32):  # the smaller first: VmHWM is the peak so far
    model = None
    before = status("VmRSS:")
    model = Qwen2VL.from_pretrained(sys.argv[1], dtype=dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(size, status("VmHWM:") - before, status("VmRSS:") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 300 MB in bfloat16; its largest weight, the embedding, has a tenth of it."""
    folder = tmp_path_factory.mktemp("large")
    raw = {
        **SIZES, "vocab_size": 16_000, "hidden_size": 960, "intermediate_size": 4800,
        "num_hidden_layers": 8, "num_attention_heads": 15, "num_key_value_heads": 5,
    }  # fmt: skip
    tower = {"depth": 2, "embed_dim": 64, "num_heads": 4, "hidden_size": 960}
    cfg = ModelConfig.from_dict({
        **FLAT, **raw, "vision_config": tower,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    })  # fmt: skip
    with torch.device("meta"):
        model = Qwen2VL(cfg)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    state = {k: torch.full(shape, 0.02, dtype=torch.bfloat16) for k, shape in shapes.items()}
    save_weights(folder, state, cfg)
    assert 290e6 < (folder / "model.safetensors").stat().st_size < 330e6
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_never_holds_the_weights_twice(large):
    """Peak memory of a new process grows by the model and one weight, in the dtype of the file
    (where a mapped file would grow nothing, and be read later) and in another."""
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, large], cwd=root, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    for line in out.stdout.splitlines():
        size, peak, after = map(float, line.split())  # MB
        assert after > 0.9 * size
        assert peak < 1.15 * size + 100  # libraries that are first used; twice would be 2.0


def test_a_weight_is_read_as_asked(tmp_path):
    x = torch.tensor([[1.0, 2.5], [-3.0, 1e-3]])
    save_file({"x": x, "y": x + 1}, tmp_path / "w.safetensors")
    assert torch.equal(read_weight(tmp_path / "w.safetensors", "x", torch.float32, "cpu"), x)
    found = read_weight(tmp_path / "w.safetensors", "y", torch.bfloat16, torch.device("cpu"))
    assert torch.equal(found, (x + 1).bfloat16())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_attention_heads": 5}, "num_attention_heads x head width"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 1]}}, "mrope_section"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused_by_name(pair, tmp_path, change, told):
    folder = copy_checkpoint(pair()[0], tmp_path / "odd")
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=rf"config\.json: .*{told}"):
        Qwen2VL.from_pretrained(folder)


@pytest.mark.slow
@torch.no_grad()
def test_the_real_2b_is_saved_loaded_and_computed_as_by_transformers(tmp_path):
    """Qwen2-VL-2B's sizes, random weights: 4.4 GB on disk, 18 in memory. bfloat16 has 8 bits, each
    implementation rounds at other places, so the measure is float32: there both agree to 1e-3, and
    in bfloat16 ours lies no further from it than theirs (distances in spreads of the logits)."""
    cfg = ModelConfig.from_dict(REAL["Qwen/Qwen2-VL-2B-Instruct"])
    with torch.device("meta"):
        model = Qwen2VL(cfg).bfloat16()
    model = model.to_empty(device="cpu")
    model.lm_head.weight = model.model.embed_tokens.weight
    gen = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        around = 1.0 if p.dim() == 1 and not key.endswith("bias") else 0.0
        p.normal_(around, 0.02, generator=gen)
    save_weights(tmp_path, model.state_dict(), cfg, shard="2GB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 3
    del model, p
    ids, grid = torch.randint(150_000, (40,), generator=gen), torch.tensor([[1, 8, 12]])
    ids[5:29] = cfg.raw["image_token_id"]
    patches, kinds = torch.randn(96, 1176, generator=gen), (ids == ids[5]).long()[None]
    positions = mrope_positions([5, (1, 4, 6), 11])

    def run(kind, dtype):
        model = kind.from_pretrained(tmp_path, dtype=dtype)
        x, begin = patches.to(dtype), time.perf_counter()
        if kind is Qwen2VL:
            layout, image_at = Layout([len(ids)]), kinds[0].nonzero()[:, 0]
            hidden = model(ids, positions, layout, model.visual(x, grid), image_at)
            found = hidden @ model.head.T
        else:
            found = model.eval()(
                input_ids=ids[None], pixel_values=x, image_grid_thw=grid, mm_token_type_ids=kinds
            ).logits[0]  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{kind.__name__} {dtype}: {time.perf_counter() - begin:.1f} s, {peak:.1f} GB peak")
        return found.float()

    def distance(a, b):
        return float((a - b).pow(2).mean().sqrt() / b.std())

    theirs, (half, single) = FAMILIES["qwen2_vl"][1], (torch.bfloat16, torch.float32)
    ours_half, theirs_half, ours = run(Qwen2VL, half), run(theirs, half), run(Qwen2VL, single)
    found, expected = distance(ours_half, ours), distance(theirs_half, ours)
    exact = (ours - run(theirs, single)).abs().max() / ours.std()
    print(f"bfloat16 to float32: ours {found:.4f}, theirs {expected:.4f}; float32: {exact:.1e}")
    assert exact < 1e-3 and found < 1.1 * expected and expected < 0.1
