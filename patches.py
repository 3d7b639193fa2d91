"""What an image becomes for Qwen2-VL: its size, its patches, the positions of its tokens.

Source: Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1): naive dynamic resolution and
M-RoPE; Qwen2.5-VL (arXiv 2502.13923) for the time of videos. Patches and positions equal those of
transformers bit for bit (tests/test_data.py).

Letters: L tokens of a prompt, P patches (14 x 14 pixels at 2 moments), C = 3 * 2 * 14 * 14 numbers
of a patch.
"""

import math

import numpy as np
import torch
from torch import Tensor


def smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280):
    """(height, width) as multiples of factor, with a product within the limits and nearly the old
    aspect ratio. Source: smart_resize of qwen_vl_utils and transformers."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return h, w


def patchify(image, table, patch=14, merge=2, moments=2) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches (P, C) float32 of an image (H, W, 3) uint8, and its grid (1, rows, columns).

    H and W are multiples of patch * merge. Patches that become one token (merge x merge) follow one
    another; a patch holds channel, moment, row, column, and a still image is the same at each
    moment. table (3, 256) float32: what a byte of each channel becomes. Looking that up is exact,
    and takes 0.04 ms for 112 x 112 pixels where transformers takes 0.24.
    """
    h, w = image.shape[0] // patch, image.shape[1] // patch
    blocks = image.reshape(h // merge, merge, patch, w // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, 1, patch * patch)
    index = blocks + np.arange(0, 3 * 256, 256, dtype=np.uint16)[:, None, None]
    return np.repeat(table.take(index), moments, axis=2).reshape(h * w, -1), (1, h, w)


def mrope_positions(layout: list[int | tuple]) -> Tensor:
    """M-RoPE positions (3, L): time, height and width of each token (Qwen2-VL, section 2.1).

    layout: in order, n for n text tokens and (moments, rows, columns) for the tokens of an image.
    Text counts on all three axes alike; an image starts where text would have gone on and counts
    each axis by itself; what follows goes on from the largest position so far, plus one (as in the
    paper, vLLM and transformers to 5.2; since, it overlaps with videos longer than high and wide).
    A video of Qwen2.5-VL has a fourth number, the positions from a moment to the next:
    tokens_per_second x seconds per moment, rounded down once multiplied (arXiv 2502.13923, 2.1.2).
    """
    sizes = [part if isinstance(part, int) else math.prod(part[:3]) for part in layout]
    out, start, first = np.empty((3, sum(sizes)), np.int64), 0, 0
    for part, size in zip(layout, sizes):
        place, first = out[:, first : first + size], first + size
        if isinstance(part, int):
            place[:] = np.arange(start, start + part)
            start += part
        else:
            at = np.indices(part[:3]).reshape(3, -1)
            if len(part) == 4:
                at[0] = at[0].astype(np.float32) * np.float32(part[3])
            place[:] = start + at
            start += int(at.max()) + 1
    return torch.from_numpy(out)
