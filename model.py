"""Qwen2-VL and Qwen2.5-VL in pure PyTorch; the completions of a group share their prompt.

Sources: Wang et al. 2024, "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at
Any Resolution" (arXiv 2409.12191); Bai et al. 2025, "Qwen2.5-VL Technical Report" (arXiv
2502.13923). A vision tower turns patches of 14 x 14 pixels into features, a merger joins 2 x 2 of
them into one token, and a Qwen2 decoder with multimodal rotary positions (M-RoPE: time, height,
width) reads image tokens and text tokens as one sequence. Qwen2.5-VL changes the tower alone: most
blocks attend inside windows, norms are RMSNorm, MLPs are gated (section 2.1.1).

What we do differently from the reference implementation, and why:
- Tokens are packed, (S, D) without padding, through every norm, projection and MLP. Padding exists
  only inside attention.
- Frames, and windows, of equal length attend in one call: a 448 x 448 image is one call of 16
  windows, not 16 calls.
- A prompt with G completions is one prompt, not G: the completions attend to the one copy of its
  keys and values, in sampling and in training, with gradient (attention.py).
- Parameters keep the Hugging Face names, so checkpoints load and save without a map.

Letters: B prompts, G completions per prompt, L prompt tokens, T completion tokens, S packed tokens,
P patches, D width, H heads, K key/value heads, R = H/K, d head width, V vocabulary.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapter import read_weights
from attention import Cache, Layout, Step, attend, half, spare
from checkpoint import (
    ModelConfig,
    VisionConfig,
    checkpoint_folder,
    read_config,
    save_weights,
)

# ------------------------------------------------------------------------------------- positions


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (S, heads, d) by cos, sin (S, d); halves are paired as in GPT-NeoX."""
    x = x.float()
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos[:, None], torch.cat((-b, a), -1), sin[:, None])


def mrope(positions: Tensor, head_dim: int, theta: float, section: tuple[int, ...]):
    """cos, sin (S, d) of M-RoPE for positions (3, S): time, height, width.

    The first section[0] frequencies turn by time, the next section[1] by height, the last by width
    (arXiv 2409.12191, section 2.1). For text the three are equal, and M-RoPE is RoPE.
    """
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() / theta ** (steps / head_dim)  # (3, S, d/2)
    angles = torch.cat([a[i] for i, a in enumerate(angles.split(section, -1))], -1)
    angles = torch.cat((angles, angles), -1)  # (S, d)
    return angles.cos(), angles.sin()


def patch_places(grid: list[list[int]], merge: int) -> Tensor:
    """Frame, row and column (P, 3) of patches, in the order of `patches.patchify`: the patches of a
    merge x merge block follow one another. Frames count through all images, so that each is one.
    """
    places, frames = [], 0
    for (h, w), images in itertools.groupby(grid, lambda thw: thw[1:]):  # equal ones in one go
        t = sum(image[0] for image in images)
        axes = torch.arange(frames, frames + t), torch.arange(h), torch.arange(w)
        at = torch.cartesian_prod(*axes).view(t, h // merge, merge, w // merge, merge, 3)
        places.append(at.transpose(2, 3).reshape(-1, 3))
        frames += t
    return torch.cat(places)


def vision_rope(places: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos, sin (P, d) of the 2-D rotary positions of patches at rows and columns `places` (P, 2):
    half of the frequencies turn by the row of a patch, half by its column."""
    steps = torch.arange(0, head_dim // 2, 2, device=places.device, dtype=torch.float32)
    angles = places[..., None] / 10_000.0 ** (steps / (head_dim // 2))  # (P, 2, d/4)
    angles = angles.flatten(1).repeat(1, 2)  # (P, d)
    return angles.cos(), angles.sin()


def window_order(places: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Patches (P, 3), see `patch_places`, in an order that makes each window of span x span patches
    contiguous, and windows of equal length neighbours; the window (P,) of each patch in that order.

    Windows at the right and lower edge of a frame hold what is left of it; nothing is padded.
    """
    frame, row, column = (places // torch.tensor([1, span, span])).unbind(1)
    name = (frame * (row.max() + 1) + row) * (column.max() + 1) + column
    _, window = name.unique(return_inverse=True)  # counted from 0
    length = window.bincount()
    order = (length[window] * len(length) + window).argsort(stable=True)
    return order, window[order]


def segments(ids: Tensor, device) -> list[tuple]:
    """Who attends to whom: the patches of equal ids (P,). One call of attention for each length:
    [(index of the patches, segments, length), ...]. The index is a slice, and nothing is copied,
    where the patches stand in order (frames of equal length; windows after `window_order`).
    """
    length, calls = ids.bincount()[ids], []
    for n in length.unique().tolist():
        at = (length == n).nonzero()[:, 0]
        at = at[ids[at].argsort(stable=True)]
        count, first, last = len(at) // n, int(at[0]), int(at[-1])
        in_order = bool((at.diff() == 1).all())
        calls.append((slice(first, last + 1) if in_order else at.to(device), count, n))
    return calls


# --------------------------------------------------------------------------- norm and MLP


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Joined(nn.Module):
    """Of linear layers that read the same, the weights side by side: one product does for all. The
    layers' own weights become slices of it. For a model that learns nothing, see `Qwen2VL.twin`."""

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        sizes = [layer.out_features for layer in layers]
        for name in dict(layers[0].named_parameters()):
            whole = torch.cat([getattr(layer, name) for layer in layers]).detach()
            for layer, part in zip(layers, whole.split(sizes)):
                setattr(layer, name, nn.Parameter(part, requires_grad=False))
            self.register_buffer(name, whole, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, getattr(self, "bias", None))


class MLP(nn.Module):
    """Gated (SwiGLU): the decoder's, and with biases that of Qwen2.5-VL's vision tower."""

    def __init__(self, width: int, inner: int, bias: bool = False):
        super().__init__()
        self.joined = None
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def join(self) -> None:
        self.joined = Joined(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        x = half(x)
        if self.joined:
            gate, up = self.joined(x).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)


# ---------------------------------------------------------------------------------- vision tower


class PatchEmbed(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        kernel = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(cfg.in_channels, cfg.embed_dim, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:  # (P, C) -> (P, D)
        # Kernel and stride are equal, so the convolution is one matrix product.
        return F.linear(patches, self.proj.weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.embed_dim, 3 * cfg.embed_dim)
        self.proj = nn.Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, calls: list) -> Tensor:
        """Full attention inside each segment of `calls`, which is from `segments`."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # (P, heads, d)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = torch.empty_like(q)
        for at, n, length in calls:
            qkv = (t[at].view(n, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
            y = attend(*qkv).transpose(1, 2).flatten(0, 1)
            if len(calls) == 1 and isinstance(at, slice):
                out = y
            else:
                out[at] = y
        return self.proj(out.flatten(1))


class VisionMLP(nn.Module):
    """Qwen2-VL's."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(cfg.embed_dim, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick GELU


def vision_norm(cfg: VisionConfig) -> nn.Module:
    """LayerNorm in Qwen2-VL, RMSNorm in Qwen2.5-VL."""
    norm = RMSNorm if cfg.family == "qwen2_5_vl" else nn.LayerNorm
    return norm(cfg.embed_dim, eps=1e-6)


class VisionBlock(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        gated = cfg.family == "qwen2_5_vl"
        self.norm1, self.norm2 = vision_norm(cfg), vision_norm(cfg)
        self.attn = VisionAttention(cfg)
        self.mlp = (
            MLP(cfg.embed_dim, cfg.intermediate_size, bias=True) if gated else VisionMLP(cfg)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, calls: list) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, calls)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.width = cfg.embed_dim * cfg.spatial_merge_size**2
        self.ln_q = vision_norm(cfg)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, cfg.hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:  # (P, D_vision) -> (P/4, D)
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTower(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))
        self.merger = PatchMerger(cfg)

    def patch_states(self, patches: Tensor, grid: Tensor) -> Tensor:
        """patches (P, C), grid (n, 3) in patches -> states (P, D_vision) before the merger."""
        cfg, device, windows = self.cfg, patches.device, None
        places = patch_places(grid.tolist(), cfg.spatial_merge_size)
        if cfg.window:  # once for all blocks, patches go to the order of windows
            order, window = window_order(places, cfg.window)
            windows, places, order = segments(window, device), places[order], order.to(device)
            patches = patches[order]
        frames = segments(places[:, 0], device)
        cos, sin = vision_rope(places[:, 1:].to(device), cfg.embed_dim // cfg.num_heads)
        x = self.patch_embed(patches)
        for i, block in enumerate(self.blocks):
            full = windows is None or i in cfg.fullatt_block_indexes
            x = block(x, cos, sin, frames if full else windows)
        return x if windows is None else torch.empty_like(x).index_copy(0, order, x)  # and back

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        """patches (P, C), grid (n, 3) -> image features (P/4, D), a row per image token."""
        return self.merger(self.patch_states(patches, grid))


# --------------------------------------------------------------------------------------- decoder


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.joined = None
        D, d, H, K = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
        self.d, self.H, self.K = d, H, K
        self.q_proj = nn.Linear(D, H * d)
        self.k_proj = nn.Linear(D, K * d)
        self.v_proj = nn.Linear(D, K * d)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def join(self) -> None:
        self.joined = Joined(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: Tensor, cos, sin, lay: Layout | Step, kept=None, wanted=None):
        """x (S, D) -> (S, D), or (W, D) of the rows wanted (W,). kept: this layer of a Cache."""
        x = half(x)
        if self.joined:
            qkv, turned = self.joined(x).view(len(x), -1, self.d), self.H + self.K
            q, k = rotate(qkv[:, :turned], cos, sin).split((self.H, self.K), 1)
            v = qkv[:, turned:]
        else:
            layers = self.q_proj, self.k_proj, self.v_proj
            q, k, v = (p(x).view(len(x), -1, self.d) for p in layers)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(rows_of(lay.attend(q, k, v, kept).flatten(1), wanted))


def filled(x: Tensor) -> Tensor:
    """x (S, ...) with its spare rows behind it, see `spare`."""
    n = spare(x)
    return F.pad(x, (0,) * (2 * x.ndim - 1) + (n,)) if n else x


def rows_of(x: Tensor, wanted: Tensor | None) -> Tensor:
    return x if wanted is None else x.index_select(0, wanted)


class DecoderLayer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x, cos, sin, lay, kept=None, wanted=None):
        y = self.self_attn(self.input_layernorm(x), cos, sin, lay, kept, wanted)
        x = rows_of(x, wanted) + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, x: Tensor, positions, lay, cache: Cache | None, wanted=None) -> Tensor:
        cfg, last = self.cfg, self.layers[-1]
        how = cfg.head_dim, cfg.rope_theta, cfg.mrope_section
        cos, sin = mrope(positions, *how) if isinstance(positions, Tensor) else positions
        n = len(x if wanted is None else wanted)
        x, cos, sin = map(filled, (x, cos, sin))
        wanted = wanted if wanted is None else filled(wanted)
        for layer, kept in zip(self.layers, cache.layers if cache else itertools.repeat(None)):
            x = layer(x, cos, sin, lay, kept, wanted if layer is last else None)
        return self.norm(x if n == len(x) else x[:n])  # a slice is a copy in the backward pass


class Qwen2VL(nn.Module):
    """Qwen2-VL or Qwen2.5-VL. `forward` gives hidden states; `head` turns them into logits."""

    compiled = False  # see `prepare`
    adapter = None  # lora.Learns of a model with factors beside its weights

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.visual = VisionTower(cfg.vision)
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def head(self) -> Tensor:
        return self.lm_head.weight  # (V, D)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in now: as autocast says, else in what weights are kept."""
        return half(torch.empty(0, dtype=self.head.dtype, device=self.device)).dtype

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        layout: Layout | Step,
        features: Tensor | None = None,
        image_at: Tensor | None = None,
        cache: Cache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (S, D) after the last norm; of the rows wanted (W,) alone, if given: of the
        others the last layer then computes keys and values, which is all that is read of them.

        ids (S,) packed as `layout` says, positions (3, S) or their cos and sin, see `mrope`,
        features (I, D) from `visual` for the image tokens that stand at image_at (I,) of the packed
        ids. With a cache, a Layout holds prompts that come into it, and a Step the next token of
        every completion.
        """
        x = self.model.embed_tokens(ids)
        # Of bfloat16 weights the embedding would make a bfloat16 residual stream; under autocast,
        # which casts no embeddings, it is float32.
        x = x.float() if torch.is_autocast_enabled(x.device.type) else x
        if features is not None:
            assert features.shape[0] == image_at.shape[0], "image tokens and features differ"
            x = x.index_copy(0, image_at, features.to(x.dtype))
        return self.model(x, positions, layout, cache, wanted)

    def run(self, ids, positions, layout: Layout, batch, cache=None, wanted=None) -> Tensor:
        """`forward` with the pictures of a batch (data.Batch), if any: patches (P, C) or the states
        (P, E) that the tower made of them, grid (n, 3) and places image_at (I,). Where it has
        pictures but no places, they are a dummy that gives the tower something to run, and a
        gradient of zeros."""
        if not len(batch.grid):
            return self.forward(ids, positions, layout, cache=cache, wanted=wanted)
        states = batch.states
        if states is None:
            states = self.visual.patch_states(batch.patches, batch.grid)
        features = self.visual.merger(states)
        features = features if len(batch.image_at) else features[:0]
        return self.forward(ids, positions, layout, features, batch.image_at, cache, wanted)

    def frozen(self, dtype: torch.dtype) -> "Qwen2VL":
        """For a model that learns nothing: linear layers, the head too, keep their weights in
        `dtype`. That is what autocast would cast them to each time; the rest stays as it is."""
        self.requires_grad_(False)
        if dtype != self.head.dtype:
            self.lm_head.weight = nn.Parameter(self.head.clone(), requires_grad=False)  # not tied
            for part in self.modules():
                if isinstance(part, nn.Linear):
                    part.to(dtype)
        return self

    def twin(self, dtype: torch.dtype, linear: torch.dtype) -> "Qwen2VL":
        """A frozen model of the same shape, on the same device, to be run, not saved; its weights,
        linear layers' and others', are yet to be written in their places, see `Joined`."""
        with torch.device("meta"):
            twin = type(self)(self.cfg).to(dtype).frozen(linear)
        twin.to_empty(device=self.device)
        for part in list(twin.modules()):
            if isinstance(part, Attention | MLP):
                part.join()
        if self.cfg.tie_word_embeddings and linear == dtype:
            twin.lm_head.weight = twin.model.embed_tokens.weight
        return twin.prepare(self.compiled)

    def prepare(self, compiled: bool = False, recompute: bool = False) -> "Qwen2VL":
        """How blocks run; what they compute stays the same.

        compiled: by torch.compile, which fuses norms, rotary positions and gates into few kernels;
        blocks of a kind share what was compiled, for any length. recompute: activation
        checkpointing. A block keeps only its input for the backward pass, which runs it once more:
        a third more arithmetic, the same gradient (tests/test_model.py).
        """
        self.compiled = compiled
        if compiled:  # training, reference, prompts, one token, and the last layer of each
            torch._dynamo.config.recompile_limit = 64
        for block in (*self.visual.blocks, *self.model.layers):
            if compiled:
                block.forward = torch.compile(block.forward, dynamic=True)
            if recompute:
                block.forward = partial(  # dropout must be the same twice
                    checkpoint, block.forward, use_reentrant=False,
                    preserve_rng_state=bool(self.adapter and self.adapter.dropout),
                )  # fmt: skip
        return self

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> "Qwen2VL":
        """Random weights: normal(0, std), biases 0, norms 1. A seed fixes them."""
        gen = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name or "ln_q" in name:
                p.fill_(1.0)
            else:
                p.copy_(torch.randn(p.shape, generator=gen) * std)
        return self

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, device="cpu", shard=None) -> "Qwen2VL":
        """A checkpoint of either family: a folder, or its id on the hub. Runs no code of it. Of a
        LoRA checkpoint: its base with the adapter merged into it.

        shard: what becomes of the model on the meta device, such as parallel.shard, after which
        this process keeps its slice of each weight that is read; and lora.set_learning.
        Errors: FileNotFoundError, ValueError, see checkpoint.checkpoint_folder and read_weights.
        """
        folder = checkpoint_folder(name)
        cfg = read_config(folder)
        with torch.device("meta"):
            model = cls(cfg)
        model = shard(model) if shard else model
        tied, state = cfg.tie_word_embeddings, model.state_dict()
        wanted = {name: p for name, p in state.items() if ".lora_" not in name}  # lora.load's
        found = read_weights(folder, wanted, tied, dtype, device)
        model.load_state_dict(found, strict=False, assign=True)
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    def save_pretrained(self, folder) -> None:
        """Writes config.json and safetensors (shards of 5 GB) under the Hugging Face names."""
        save_weights(folder, self.state_dict(), self.cfg)
