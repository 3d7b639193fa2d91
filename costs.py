"""What a step of GRPO takes, counted: arithmetic, bytes of a decode step, bytes exchanged.

    forward = forward_flops(SHAPES["qwen2-vl-2b"], prompts=[257], completions=[[130] * 8],
                            patches=[(1, 22, 34)])

All is counted from the shapes of a model and is exact: tests/test_costs.py compares it with what
PyTorch counts in real passes and in a real step of two processes. scaling.py makes seconds of it,
for the Workload below.
A multiplication and an addition are 2 FLOPs; norms, softmax and the like are not counted.

Training takes 3 times the forward pass: the backward pass has a product for the inputs and one for
the weights. With `recompute` it takes nearly 4 times.

Letters: B prompts, G completions per prompt, L prompt tokens, T completion tokens, P patches, D
width, H heads, K key/value heads, d head width, V vocabulary, N weights.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

from checkpoint import ModelConfig
from model import Qwen2VL
from patches import smart_resize

TOWER = {
    "qwen2_vl": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4},
    "qwen2_5_vl": {"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420,
                   "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                   "tokens_per_second": 2},
}  # fmt: skip


def qwen(family: str, D: int, layers: int, heads: int, kv: int, inner: int, V: int, tied=False):
    """The ModelConfig of a published checkpoint, by the numbers of its config.json."""
    return ModelConfig.from_dict({
        "model_type": family, "hidden_size": D, "num_hidden_layers": layers, "vocab_size": V,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": inner,
        "tie_word_embeddings": tied, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": TOWER[family] | ({"out_hidden_size": D} if "5" in family else {}),
    })  # fmt: skip


SHAPES = {
    "qwen2-vl-2b": qwen("qwen2_vl", 1536, 28, 12, 2, 8960, 151936, tied=True),
    "qwen2-vl-7b": qwen("qwen2_vl", 3584, 28, 28, 4, 18944, 152064),
    "qwen2-vl-72b": qwen("qwen2_vl", 8192, 80, 64, 8, 29568, 152064),
    "qwen2.5-vl-3b": qwen("qwen2_5_vl", 2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-vl-7b": qwen("qwen2_5_vl", 3584, 28, 28, 4, 18944, 152064),
}

# ---------------------------------------------------------------------------------- the workload

SIGMA = 0.6  # of the logarithm of a completion's length: an assumption


@dataclass(frozen=True)
class Workload:
    """What a GPU does in a step. The default is R1-V's: CLEVR's pictures of 480 x 320 pixels,
    about 70 tokens of text around one, 8 completions of 130 tokens in the mean, 512 at most."""

    prompts: int = 16  # of one GPU
    group: int = 8
    text: int = 70  # tokens
    grid: tuple[int, int, int] = (1, *(n // 14 for n in smart_resize(320, 480)))  # of the picture
    mean: float = 130  # tokens of a completion
    spread: float = SIGMA  # standard deviation of their logarithm
    max_new: int = 512
    micro: int = 4  # prompts per forward and backward pass
    beta: float = 0.04
    bf16: bool = True
    recompute: bool = True
    shard_group: int | None = None  # as in grpo.Config
    tensor: int = 1  # GPUs over which sampling would share out each matrix; grpo.py has 1

    @property
    def tokens(self) -> int:
        """Tokens of a prompt; a token of a picture stands for 4 patches."""
        return self.text + math.prod(self.grid) // 4

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.bf16 else 4


def lengths(work: Workload, rows: int) -> list[int]:
    """Lengths of `rows` completions, the longest first: log-normal, at the middles of equal parts
    of the distribution, so that many have a longer longest one than few."""
    middle, normal = math.log(work.mean) - work.spread**2 / 2, NormalDist()
    found = (math.exp(middle - work.spread * normal.inv_cdf((i + 0.5) / rows)) for i in range(rows))
    return [max(1, min(work.max_new, round(n))) for n in found]


# ------------------------------------------------------------------------------ FLOPs and bytes


def layer_weights(cfg: ModelConfig) -> int:
    """Numbers in the matrices of a decoder layer: query and output, keys and values, the MLP."""
    D, kv = cfg.hidden_size, cfg.num_key_value_heads * cfg.head_dim
    return 2 * D * D + 2 * D * kv + 3 * D * cfg.intermediate_size


def rows_run(prompts: list[int], completions: list[list[int]]) -> tuple[int, int]:
    """Tokens that a decoder layer runs, and the rows that leave the last one, where nothing else
    has a query's output or an MLP: one for each sampled token, which it predicts."""
    flat = [n for row in completions for n in row]
    return sum(prompts) + sum(max(0, n - 1) for n in flat), sum(flat)


def patches_of(image) -> int:
    """Patches of an image: a number, or the product of its grid (moments, rows, columns)."""
    return image if isinstance(image, int) else math.prod(image)


def pixels_of(cfg: ModelConfig) -> int:
    """Numbers of a patch."""
    v = cfg.vision
    return v.in_channels * v.temporal_patch_size * v.patch_size**2


def vision_pairs(cfg: ModelConfig, image) -> tuple[int, int]:
    """Pairs of patches that attend to each other in an image, in a block of full attention and in
    one of windows. image: its grid (moments, rows, columns), or its patches alone, which then stand
    for one moment and for whole windows."""
    if isinstance(image, int):
        return image**2, image * cfg.vision.window**2
    (t, h, w), span = image, cfg.vision.window or max(image)
    across, down = ([min(span, n - i) for i in range(0, n, span)] for n in (w, h))
    return t * (h * w) ** 2, t * sum((a * b) ** 2 for a in across for b in down)


def vision_flops(cfg: ModelConfig, images: list) -> dict[str, int]:
    """FLOPs of the tower (its attention among them) and of the merger for images, see vision_pairs:
    {"vision", "merger"}."""
    v, blocks, P = cfg.vision, 0, sum(map(patches_of, images))
    E, inner = v.embed_dim, v.intermediate_size * (3 if v.family == "qwen2_5_vl" else 2)
    full = len(v.fullatt_block_indexes) if v.window else v.depth
    for image in images:
        everywhere, windows = vision_pairs(cfg, image)
        blocks += 4 * E * (full * everywhere + (v.depth - full) * windows)
    wide = v.spatial_merge_size**2
    blocks += 2 * P * E * (pixels_of(cfg) + v.depth * (4 * E + inner))
    merger = 2 * P * E * (wide * E + v.hidden_size)  # P / wide rows of wide * E numbers
    return {"vision": blocks, "merger": merger}


def forward_flops(
    cfg: ModelConfig,
    prompts: list[int],
    completions: list[list[int]],
    patches: list,
    padded: bool = False,
) -> dict[str, int]:
    """FLOPs of a forward pass of rollout.score: {"vision", "merger", "decoder", "attention",
    "head"}. "decoder" are its projections and MLPs, "attention" is the decoder's.

    prompts: B lengths, the tokens of images among them. completions: B rows of G lengths, the end
    token among them. patches: of each image, see vision_pairs. A group has its prompt and images
    once; the last token of a completion is not run; the head, and the last layer once it has
    attended, see only what predicts a sampled token.
    Attention counts the pairs that see each other, which are what flash attention on a GPU
    (attention.attend_packed) computes, but for the edges of its blocks. padded: all that a
    rectangle of the longest holds, masked ones too, as on a CPU (attention.attend_shared).
    """
    fed = [[max(0, n - 1) for n in row] for row in completions]
    flat, L, T = [n for row in fed for n in row], max(prompts), max(map(max, fed))
    if padded:
        pairs = len(prompts) * L * L + len(flat) * T * (L + T)
    else:
        pairs = sum(n * (n + 1) // 2 for n in (*prompts, *flat))
        pairs += sum(length * sum(row) for length, row in zip(prompts, fed))
    (tokens, rows), D = rows_run(prompts, completions), cfg.hidden_size
    layers = cfg.num_hidden_layers
    after = D * (D + 3 * cfg.intermediate_size)  # a query's output, and the MLP
    return {
        **vision_flops(cfg, patches),
        "decoder": 2 * (tokens * layers * layer_weights(cfg) + (rows - tokens) * after),
        "attention": 4 * pairs * layers * D,
        "head": 2 * rows * D * cfg.vocab_size,
    }


def training_flops(cfg, prompts, completions, patches, recompute=False, padded=False) -> int:
    """FLOPs of forward and backward pass, arguments as of forward_flops: 3 times the forward pass.
    The head runs once more, unless its logits are few (rollout.KEEP); pixels need no gradient. With
    recompute blocks run once more too, but for their last product, whose result the backward pass
    has no use for."""
    forward = forward_flops(cfg, prompts, completions, patches, padded)
    v, P = cfg.vision, sum(map(patches_of, patches))
    pixels = 2 * P * pixels_of(cfg) * v.embed_dim
    flops = 3 * sum(forward.values()) + forward["head"] - pixels
    if recompute:
        tokens, rows = rows_run(prompts, completions)
        last = 2 * (tokens * (cfg.num_hidden_layers - 1) + rows)
        last *= cfg.hidden_size * cfg.intermediate_size
        last += 2 * P * v.depth * v.embed_dim * v.intermediate_size
        flops += sum(forward[part] for part in ("vision", "decoder", "attention")) - pixels - last
    return flops


def decode_bytes(
    cfg: ModelConfig, rows: int, groups: int, prompt: float, own: float, width: int = 2
) -> dict[str, float]:
    """Bytes that a decode step moves at least: {"weights", "head", "prompt keys", "own keys"}.

    rows completions of `groups` prompts; prompt: tokens of a prompt, own: of a completion so far,
    both in the mean; width: bytes of a number. Weights are read once for all rows, the keys and
    values of a prompt once per group, each completion's own once, and one more is written.
    """
    D, layers = cfg.hidden_size, cfg.num_hidden_layers
    kv = cfg.num_key_value_heads * cfg.head_dim
    small = 2 * D + D + 2 * kv  # two norms, and the biases of queries, keys and values
    keys = 2 * layers * kv * width  # of a token
    return {
        "weights": (layers * (layer_weights(cfg) + small) + D) * width,
        "head": cfg.vocab_size * D * width,
        "prompt keys": groups * prompt * keys,
        "own keys": rows * (own + 1) * keys,
    }


# ------------------------------------------------------------------------------- collectives


def weights(cfg: ModelConfig) -> tuple[int, int, int]:
    """Numbers of weights, those of the root (what no block has), and the number of blocks."""
    with torch.device("meta"):  # of each kind of block one: all are alike
        model = Qwen2VL(replace(cfg, num_hidden_layers=1, vision=replace(cfg.vision, depth=1)))
    every, block, layer = (
        sum(p.numel() for p in module.parameters())
        for module in (model, model.visual.blocks[0], model.model.layers[0])
    )
    depth, layers, root = cfg.vision.depth, cfg.num_hidden_layers, every - block - layer
    return root + depth * block + layers * layer, root, depth + layers


def collectives(
    cfg: ModelConfig, micro: int, reference: bool, shards: int, copies: int = 1, width: int = 2
) -> dict[str, tuple[int, int]]:
    """What processes exchange in a step, see parallel.py: {what: (times, bytes)}, bytes being those
    of the whole weights or gradients; of each this process has its slice before, or after.

    micro: micro-batches of a process, each of which gathers the blocks anew. `shards` processes
    share a copy of the weights, `copies` times; width: bytes of a gathered weight. Gradients are
    float32. The root's weights stay from the forward pass to the backward pass, and in the
    reference, which has none, until it is done.
    """
    N, root, _ = weights(cfg)
    found = {
        "sampling: gather": (1, N * width),
        "reference: gather": (micro * reference, (N - root) * width),
        "reference: gather the root": (int(reference), root * width),
        "update: gather, forwards": (micro, N * width),
        "update: gather, backwards": (micro, (N - root) * width),
        "update: sum of gradients": (micro, N * 4),
    }
    if copies > 1:
        found["update: sum over copies"] = (micro, N * 4 // shards)
    return found if shards * copies > 1 else {}
