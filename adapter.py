"""LoRA checkpoints: a few factors in PEFT's layout, and the base that they belong to.

    step_000100/adapter_model.safetensors   factors A and B of each layer, float32, by its name
    step_000100/adapter_config.json         rank, alpha, layers, and where the base is
    step_000100/config.json, tokenizer …    those of the base, so that the folder is a checkpoint

Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685): the weight of a layer is W + (alpha / r) B A.
Whoever reads the weights of such a folder (`read_weights`) gets those of its base with B A added.
peft.PeftModel.from_pretrained(base, folder) reads it too: layers have the names that transformers
gives them since 4.52, and adapters of before, with the names of the hub, are read here as well.

What we do differently: the file of factors remembers the weights of its base (`fingerprint`). An
adapter on another base gives no error elsewhere, only wrong answers. A base may be a LoRA
checkpoint in its turn, where a run started from one; peft wants that merged (lora.py) first.
"""

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

import checkpoint
from checkpoint import checkpoint_folder, hub_name, open_weights, weight_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of peft, before a layer's name
# Keys of adapter_config.json that say more than plain LoRA, unless they are as here or empty.
PLAIN = {"peft_type": "LORA", "bias": "none"}
# Where layers of each part of a model are, in names of any age.
PLACES = {"vision": r"visual\.blocks\.", "merger": r"visual\.merger\.", "language": r"layers\."}
MORE = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern",
        "alpha_pattern", "trainable_token_indices", "target_parameters", "layer_replication")


def is_adapter(folder) -> bool:
    return (Path(folder) / CONFIG).is_file()


# ---------------------------------------------------------------------------------------- reading


def read_weights(folder: Path, wanted: dict[str, Tensor], tied: bool, dtype, device) -> dict:
    """checkpoint.read_weights; of a LoRA checkpoint those of its base with the adapter added, in
    float32 and then rounded to dtype. ValueError for a base that is gone or another, and for
    factors that do not fit it."""
    added, base = defaultdict(list), Path(folder)
    while is_adapter(base):
        scale = scale_of(base)
        for layer, (A, B) in read_factors(base).items():
            weight = wanted.get(f"{layer}.weight")
            tied_head = tied and layer == "lm_head"  # which is the embedding: it cannot differ
            shape = None if weight is None or tied_head else tuple(weight.shape)
            if shape != (len(B), A.shape[1]):
                raise ValueError(f"{base}/{WEIGHTS}: {layer} is {(len(B), A.shape[1])} there, and "
                                 f"{shape or 'no layer'} in the model")
            added[f"{layer}.weight"].insert(0, (scale, B, A))  # the base's own come first
        base = base_of(base)
    return checkpoint.read_weights(base, wanted, tied, dtype, device, added)


def read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer, by the hub's name: (A (r, in), B (out, r))}, float32, of a LoRA checkpoint."""
    found = defaultdict(dict)
    with open_weights(folder / WEIGHTS) as f:
        for key in f.keys():  # noqa: SIM118 (safe_open is no dict)
            layer, _, factor = key.removesuffix(".weight").rpartition(".lora_")
            found[hub_name(layer.removeprefix(PREFIX))][factor] = f.get_tensor(key).clone().float()
    if odd := [layer for layer, factors in found.items() if set(factors) != {"A", "B"}]:
        raise ValueError(f"{folder}/{WEIGHTS}: {odd[0]} has not the factors lora_A and lora_B")
    return {layer: (factors["A"], factors["B"]) for layer, factors in found.items()}


def scale_of(folder: Path) -> float:
    """alpha / r of a LoRA checkpoint. ValueError for an adapter that is not plain LoRA."""
    told = read_adapter(folder)
    odd = [k for k in MORE if told.get(k)] + [k for k, v in PLAIN.items() if told.get(k, v) != v]
    if odd:
        raise ValueError(f"{folder}/{CONFIG}: {odd[0]} {told[odd[0]]!r}: only plain LoRA is read")
    return told["lora_alpha"] / told["r"]


def read_adapter(folder: Path) -> dict:
    """adapter_config.json. ValueError names a broken one."""
    try:
        return json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/{CONFIG}: {error}") from error


def base_of(folder: Path) -> Path:
    """The folder of the base of a LoRA checkpoint. ValueError where it is gone or another."""
    told = read_adapter(folder)
    name, revision = told["base_model_name_or_path"], told.get("revision")
    mend = f"put it back, or say in {folder}/{CONFIG} where it is (base_model_name_or_path)"
    try:
        base = checkpoint_folder(f"{name}@{revision}" if revision else name)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder} is a LoRA checkpoint, and its base is gone: {error}; "
                         f"{mend}") from error
    with open_weights(folder / WEIGHTS) as f:
        known = (f.metadata() or {}).get("base")
    if known and known != fingerprint(base):
        raise ValueError(f"{folder} is a LoRA checkpoint, and {base} is not the base that it was "
                         f"trained on: its weights are others; {mend}")
    return base


def fingerprint(folder: Path) -> str:
    """A hash of the first rows of each weight of a checkpoint, whatever files they are in: another
    one differs, and it takes a fraction of a second. bfloat16 and float32 of the same are alike."""
    files, found = weight_files(folder) if not is_adapter(folder) else [folder / WEIGHTS], []
    for file in files:
        with open_weights(file) as f:
            for key in set(f.keys()) - {"lm_head.weight"}:  # which is not there where it is tied
                part = f.get_slice(key)
                rows = (part[:4] if part.get_shape() else f.get_tensor(key)).float().contiguous()
                found.append(f"{hub_name(key)} {hashlib.sha256(rows.numpy()).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- writing


def name_of_base(folder: Path) -> dict:
    """How adapter_config.json tells of a base: by its id, where it lies in the hub's cache."""
    path = str(Path(folder).resolve())
    if found := re.search(r"models--(.+?)--([^/]+)/snapshots/(\w+)/?$", path):
        return {"base_model_name_or_path": f"{found[1]}/{found[2]}", "revision": found[3]}
    return {"base_model_name_or_path": path, "revision": None}


def save_adapter(folder: Path, factors: dict[str, Tensor], cfg, told: dict) -> None:
    """Writes a LoRA checkpoint without its tokenizer. factors: {"LAYER.lora_A": …}, by the hub's
    names; told: "rank", "alpha", "dropout", "base" (folder), "fingerprint" of the base."""
    layers = sorted({name.rpartition(".")[0] for name in factors})
    bare = [at for at in PLACES.values() if not any(re.search(at, layer) for layer in layers)]
    config = {
        **PLAIN, "task_type": None, "r": told["rank"], "lora_alpha": told["alpha"],
        "lora_dropout": told["dropout"], "init_lora_weights": True, "inference_mode": True,
        # peft takes every layer whose name ends so, but for those excluded.
        "target_modules": sorted({".".join(layer.split(".")[-2:]) for layer in layers}),
        "exclude_modules": f".*({'|'.join(bare)}).*" if bare else None,
        **name_of_base(told["base"]),
    }  # fmt: skip
    state = {f"{PREFIX}{long_name(name)}.weight": x.detach().float().cpu().contiguous()
             for name, x in factors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, {"format": "pt", "base": told["fingerprint"]})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / "config.json").write_text(json.dumps(cfg.raw, indent=2) + "\n", "utf-8")


def long_name(key: str) -> str:
    """The name that transformers has had since 4.52 for a layer of the hub's name."""
    return f"model.{key}" if key.startswith("visual.") else key.replace(
        "model.", "model.language_model.", 1)
