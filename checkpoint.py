"""Hugging Face checkpoints of Qwen2-VL and Qwen2.5-VL: config.json and safetensors.

Sources: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923), the configs of the hub's
checkpoints and of those that transformers writes. Both have had two layouts, and all are read:
keys of the decoder at the top of config.json or under text_config; weights called visual.* and
model.* (the hub, transformers before 4.52) or model.visual.* and model.language_model.*.

What we do differently: weights are checked by name and shape before any is read, and are read one
at a time, so the memory that loading needs is that of the model and of one weight. Loading runs no
code of a checkpoint.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from hub import is_hub_id, snapshot

# Files of a hub repository that make a checkpoint; its root's weights only, since some repositories
# keep those of earlier steps in folders.
FILES = ("*.json", "*.txt", "*.jinja", "model*.safetensors", "adapter_model.safetensors")

# ---------------------------------------------------------------------------------------- config

# What transformers takes for keys that vision_config does not have.
VISION_DEFAULTS = {
    "qwen2_vl": {"embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu"},
    "qwen2_5_vl": {
        "intermediate_size": 3420, "hidden_act": "silu", "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31), "tokens_per_second": 4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower's part of config.json, under the names of Qwen2-VL."""

    family: str  # qwen2_vl or qwen2_5_vl
    embed_dim: int  # the tower's width
    hidden_size: int  # the decoder's, for which the merger writes
    intermediate_size: int  # of the MLP
    hidden_act: str
    depth: int = 32
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches a side that become one token
    # Qwen2.5-VL alone: blocks attend inside windows of this many pixels a side, but for those of
    # fullatt_block_indexes; a second of video is tokens_per_second positions of M-RoPE.
    window_size: int = 0
    fullatt_block_indexes: tuple[int, ...] = ()
    tokens_per_second: float = 0

    @property
    def window(self) -> int:
        """Patches a side of a window: a whole number of merged tokens. 0: there are none."""
        return self.window_size // self.patch_size // self.spatial_merge_size * (
            self.spatial_merge_size
        )

    @classmethod
    def from_dict(cls, raw: dict, family: str, width: int) -> "VisionConfig":
        """From vision_config of a config.json whose decoder is `width` wide.

        Qwen2-VL calls the tower's width embed_dim and the decoder's hidden_size; Qwen2.5-VL calls
        them hidden_size and out_hidden_size.
        """
        got = {**VISION_DEFAULTS[family], **{k: v for k, v in raw.items() if v is not None}}
        if family == "qwen2_5_vl":
            if "hidden_size" not in got:
                raise ValueError("config.json has no vision_config.hidden_size")
            got |= {"embed_dim": got["hidden_size"], "hidden_size": got.get("out_hidden_size")}
        else:
            got["intermediate_size"] = int(got["embed_dim"] * got["mlp_ratio"])
        got.setdefault("in_channels", got.get("in_chans", 3))
        got.setdefault("patch_size", got.get("spatial_patch_size", 14))
        got["hidden_size"] = got.get("hidden_size") or width
        got["fullatt_block_indexes"] = tuple(got.get("fullatt_block_indexes", ()))
        names = cls.__dataclass_fields__.keys() - {"family"}
        return cls(family, **{k: got[k] for k in names if k in got})

    def check(self, width: int) -> None:
        """ValueError for sizes that do not fit together and activations that are not here."""
        act = VISION_DEFAULTS[self.family]["hidden_act"]
        if self.hidden_act != act:
            raise ValueError(f"vision_config.hidden_act {self.hidden_act!r}: must be {act!r}")
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(f"the vision tower's width {self.embed_dim}: must be a multiple of "
                             f"4 x num_heads, 4 x {self.num_heads}")
        if self.hidden_size != width:
            raise ValueError(f"the vision tower writes for a width of {self.hidden_size}, the "
                             f"decoder's hidden_size is {width}")
        if self.window_size and not self.window:
            raise ValueError(f"window_size {self.window_size}: must hold at least one token, "
                             f"{self.patch_size * self.spatial_merge_size} pixels a side")


@dataclass(frozen=True)
class ModelConfig:
    """config.json of a checkpoint; `raw` is the file as read, and is what is written.

    Reads both layouts of transformers: flat keys with `rope_theta` and `rope_scaling` (the hub's
    checkpoints), and `text_config` with `rope_parameters` (transformers 5).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    raw: dict = field(default_factory=dict, repr=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
        """From the parsed config.json. ValueError for what is missing or not implemented."""
        family = raw.get("model_type")
        if family not in VISION_DEFAULTS:
            raise ValueError(f"model_type {family!r}: only {' and '.join(VISION_DEFAULTS)} are "
                             "implemented")
        text = {**raw, **(raw.get("text_config") or {})}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
            raise ValueError(f"rope type {rope}: only 'default' and 'mrope' are implemented")
        if text.get("use_sliding_window"):
            raise ValueError("use_sliding_window: sliding window attention is not implemented")
        names = cls.__dataclass_fields__.keys() - {"vision", "raw"}
        known = {k: text[k] for k in names if text.get(k) is not None}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads"):  # fmt: skip
            if name not in known:
                raise ValueError(f"config.json has no {name}")
        known["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", 1_000_000.0))
        known["mrope_section"] = tuple(rope.get("mrope_section", (16, 24, 24)))
        tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")
        known["tie_word_embeddings"] = bool(tied)
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        vision = raw.get("vision_config") or {}
        vision = VisionConfig.from_dict(vision, family, known["hidden_size"])
        cfg = cls(**known, vision=vision, raw=raw)
        cfg.check(text.get("head_dim"))
        return cfg

    def check(self, head_dim: int | None) -> None:
        """ValueError for sizes that do not fit together and activations that are not here."""
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r}: must be 'silu'")
        d, heads = head_dim or self.head_dim, self.num_attention_heads
        if heads * d != self.hidden_size:
            raise ValueError(f"hidden_size {self.hidden_size}: must be num_attention_heads x head "
                             f"width, {heads} x {d}")
        if heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {heads}: must be a multiple of "
                             f"num_key_value_heads, {self.num_key_value_heads}")
        if 2 * sum(self.mrope_section) != d:
            raise ValueError(f"mrope_section {self.mrope_section}: must sum to half the head "
                             f"width, {d} / 2")
        self.vision.check(self.hidden_size)


# ---------------------------------------------------------------------------------------- reading


def checkpoint_folder(name) -> Path:
    """The folder of a checkpoint: a local one, or the hub's of that id, downloaded where the hub's
    cache has it not. FileNotFoundError for a folder that is none; ValueError, see hub.snapshot."""
    if is_hub_id(str(name)):
        return snapshot(str(name), "model", FILES)
    if not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name}: no config.json, so no Hugging Face checkpoint, and not "
                                "the id of one on the hub (owner/name)")
    return Path(name)


def read_config(folder: Path) -> ModelConfig:
    """config.json of a checkpoint. ValueError, naming the file, for one that is not usable."""
    try:
        return ModelConfig.from_dict(json.loads((folder / "config.json").read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from error


def read_weights(folder: Path, wanted: dict, tied: bool, dtype, device, added=None) -> dict:
    """The weights called `wanted`, of those shapes, from the safetensors of a folder; of one that
    is shared out among processes (DTensor) the slice that is this process's. added: {name: [(scale,
    B, A), ...]}, to which scale x B A is added, see adapter.read_weights.

    tied: lm_head.weight is model.embed_tokens.weight, and need not be there. FileNotFoundError for
    a missing file; ValueError with the names and shapes of weights that are missing, not expected
    or of another shape, and for a head that should be tied and has other numbers.
    """
    found, problems, shapes = {}, [], {k: tuple(v.shape) for k, v in wanted.items()}
    for file in weight_files(folder):
        with open_weights(file) as f:
            for key in f.keys():  # noqa: SIM118 (safe_open is no dict)
                name, shape = hub_name(key), tuple(f.get_slice(key).get_shape())
                found[name] = file, key
                if name not in shapes:
                    problems.append(f"{name}: not expected")
                elif shape != shapes[name]:
                    problems.append(f"{name}: expected {shapes[name]}, found {shape}")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    missing = [f"{k}: missing" for k in shapes if k not in found and not (tied and k == head)]
    if problems + missing:
        told = missing + problems
        more = [f"and {len(told) - 20} more"] if len(told) > 20 else []
        raise ValueError(f"{folder}: weights do not fit config.json\n  " +
                         "\n  ".join(told[:20] + more))
    added = added or {}
    state = {k: like(read_weight(*place, dtype, device, added.get(k, ())), wanted[k])
             for k, place in found.items()}
    if tied and not torch.equal(*map(local, (state.setdefault(head, state[embedding]),
                                             state[embedding]))):
        raise ValueError(f"{folder}: config.json has tie_word_embeddings true, but {head} is not "
                         f"{embedding}: set it to false")
    return state


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards of its index. FileNotFoundError names a missing one."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: {name} is missing")
    return [folder / name for name in names]


def open_weights(file: Path, device="cpu"):
    """safe_open with an error that names the file."""
    try:
        return safe_open(file, framework="pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from error


def read_weight(file: Path, key: str, dtype, device, added=()) -> Tensor:
    """One tensor in memory of its own. safe_open maps the file: pages that were read stay in memory
    as long as it is open, and a tensor that is not copied reads what the file holds later. So it is
    opened for each; tests/test_checkpoint.py measures the memory."""
    with open_weights(file, device) as f:
        weight = f.get_tensor(key)
        for scale, B, A in added:
            weight = torch.addmm(weight.float(), B.to(device), A.to(device), alpha=scale)
        return weight.to(dtype, copy=True)


def like(whole: Tensor, weight: Tensor) -> Tensor:
    """Of a whole tensor the slice that this process has of `weight`; all of it if it has all."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)


def local(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def hub_name(key: str) -> str:
    """The name on the hub of a weight that a later transformers nested one level deeper."""
    key = key.replace("model.language_model.", "model.", 1)
    return key.removeprefix("model.") if key.startswith("model.visual.") else key


# ---------------------------------------------------------------------------------------- writing


def save_weights(folder, state: dict[str, Tensor], cfg: ModelConfig, shard: str = "5GB") -> None:
    """Writes config.json, with the dtype of the weights, and safetensors under the hub's names, in
    files of at most `shard`. A head that is tied is left out, as transformers does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().contiguous() for k, v in state.items()}
    if cfg.tie_word_embeddings:
        del state["lm_head.weight"]
    save_torch_state_dict(state, folder, max_shard_size=shard)
    dtype = str(state["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    raw = {**with_dtype(cfg.raw, dtype), "dtype": dtype}
    (Path(folder) / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")


def with_dtype(raw: dict, dtype: str) -> dict:
    """config.json with that dtype, wherever it names one: "torch_dtype" on the hub and before
    transformers 4.56, "dtype" since."""
    parts = {k: with_dtype(v, dtype) for k, v in raw.items() if isinstance(v, dict)}
    names = {k: dtype for k in ("dtype", "torch_dtype") if raw.get(k)}
    return {**raw, **parts, **names}
