"""The eye: pre-training a vision tower on dense facts of scenes, drawn as it goes.

From answers alone, counting comes too slowly: perception is the bottleneck. So each 14 x 14 patch
and each image token is asked, through linear heads that are thrown away, how many objects have
their centre in it and of what kind they are. tiny.py calls it for two worlds in turn.

Letters: n images, P = 64 patches and 16 image tokens of each, D width.
"""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import world
from data import PREPROCESSOR
from model import Qwen2VL
from optim import apply_gradients, make_optimizers, schedule, set_lr

SIZE, PATCH, CELL = 112, 14, 28  # pixels
CHUNK = 1024  # scenes rendered at a time
WORLDS = (("varied", "known"), ("wild", "more"))  # look and shapes of the eye's two stages


def values(shapes: str) -> tuple[str, ...]:
    """The attribute values of a world, in the order of `eye_chunk`'s facts."""
    return (*world.COLORS, *world.SHAPES[shapes], *world.MATERIALS, *world.SIZES)


def eye_chunk(seed: int, look: str, shapes: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes k CHUNK ... (k+1) CHUNK - 1 of the eye's world: images (n, H, W, 3) uint8, and the
    facts of them."""
    scenes = world.make_scenes(
        CHUNK, split="A", seed=seed, part="train", look=look, shapes=shapes, start=k * CHUNK
    )
    return world.render(scenes), facts_of(scenes, shapes)


def facts_of(scenes: list[dict], shapes: str) -> np.ndarray:
    """(n, 64, 1 + values) int8: how many objects have their centre in a patch, and how many of each
    attribute value. Patches are in the order of patches.patchify: 2 x 2 of a cell, then the next.
    """
    side, names = SIZE // PATCH, values(shapes)
    facts = np.zeros((len(scenes), side * side, 1 + len(names)), np.int8)
    for i, scene in enumerate(scenes):
        for o in scene["objects"]:
            kinds = [names.index(o[name]) for name in ("color", "shape", "material", "size")]
            facts[i, patch_of(o), [0, *(1 + v for v in kinds)]] += 1
    return facts


def patch_of(thing: dict) -> int:
    """The patch in which an object has its centre."""
    side = SIZE // PATCH
    x, y = (min(max(int(c // PATCH), 0), side - 1) for c in thing["pixel_coords"][:2])
    return (y // 2 * side // 2 + x // 2) * 4 + y % 2 * 2 + x % 2


def chunks_ahead(chunk, n: int, *how):
    """chunk(*how, k) for k = 0 ... n-1 in order, made ahead in a process of its own (spawned, not
    forked)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead = [pool.submit(chunk, *how, k) for k in range(min(4, n))]
        for k in range(n):
            yield ahead.pop(0).result()
            if k + 4 < n:
                ahead.append(pool.submit(chunk, *how, k + 4))


def normalise(images: Tensor) -> Tensor:
    """uint8 (n, H, W, 3) -> patches (n P, C), as patches.patchify makes them, for many at once."""
    n, side = len(images), SIZE // CELL
    mean, std = (torch.tensor(PREPROCESSOR[k]) for k in ("image_mean", "image_std"))
    x = (images.float() / 255 - mean) / std
    x = x.view(n, side, 2, PATCH, side, 2, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    x = x.reshape(n * side * side * 4, 3, 1, PATCH * PATCH)
    return x.expand(-1, -1, 2, -1).flatten(1)


class EyeHeads(nn.Module):
    """What the pre-training asks of patches and of image tokens; thrown away afterwards."""

    def __init__(self, patch_width: int, width: int, values: int):
        super().__init__()
        self.patch = nn.Linear(patch_width, 3 + values)  # 0, 1, 2 centres; which values
        self.cell = nn.Linear(width, 5 + values)  # 0, ..., 4 objects; which values

    def forward(self, states: Tensor, features: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        """states (n 64, D_vision), features (n 16, D), facts (n, 64, 1 + values) -> loss, and the
        share of the n images whose objects are counted right by adding up the cells."""
        cells = facts.view(len(facts), -1, 4, facts.shape[-1]).sum(2)  # (n, 16, ...)
        count = cells[..., 0]
        loss_patch, _ = self.read(self.patch(states).float(), facts.flatten(0, 1), 3)
        loss_cell, logits = self.read(self.cell(features).float(), cells.flatten(0, 1), 5)
        expected = (logits.softmax(-1) @ torch.arange(5.0)).view(count.shape).sum(1)
        loss_sum = F.smooth_l1_loss(expected, count.sum(1).float())
        right = logits.argmax(-1).view(count.shape).sum(1) == count.sum(1)
        return 3 * loss_patch + loss_cell + 0.1 * loss_sum, right.float().mean()

    def read(self, said: Tensor, facts: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Loss of the count (the first `most` outputs, as classes) and, where there is an object,
        of which values are there (the other outputs); the logits of the count."""
        count, there = facts[:, 0].long(), facts[:, 0] > 0
        loss = F.cross_entropy(said[:, :most], count.clamp(max=most - 1))
        values = F.binary_cross_entropy_with_logits(
            said[there, most:], (facts[there, 1:] > 0).float()
        )
        return loss + values / 3, said[:, :most]


def mirrored(images: np.ndarray, facts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left and right swapped, in pictures (n, H, W, 3) and in facts (n, 64, ...)."""
    side = SIZE // CELL
    blocks = facts.reshape(len(facts), side, side, 2, 2, -1)
    return images[:, :, ::-1], blocks[:, :, ::-1, :, ::-1].reshape(facts.shape)


def train_eye(model: Qwen2VL, steps: int, lr: float, seed: int, look: str, shapes: str) -> float:
    """Pre-trains model.visual on fresh scenes, each seen once as it is and once mirrored; returns
    the share of the last 3,200 pictures whose objects are counted right by adding up the cells."""
    batch, side = 32, SIZE // CELL
    torch.manual_seed(seed)
    heads = EyeHeads(model.cfg.vision.embed_dim, model.cfg.hidden_size, len(values(shapes)))
    both = nn.ModuleList((model.visual, heads))
    optimizers = make_optimizers(both, "muon", lr)
    grid = torch.tensor([[1, 2 * side, 2 * side]]).expand(batch, 3)
    rng, right, step = np.random.default_rng(seed), [], 0
    bar = tqdm(total=steps, desc=f"eye, {look}", unit="step")
    chunks = math.ceil(steps * batch / CHUNK / 2)
    for chunk in chunks_ahead(eye_chunk, chunks, seed, look, shapes):
        for images, facts in (chunk, mirrored(*chunk)):
            for at in rng.permutation(CHUNK).reshape(-1, batch)[: steps - step]:
                step += 1
                rate = 0.01 + 0.99 * schedule(step, steps, kind="cosine")
                set_lr(optimizers, lr * min(1.0, step / 50) * rate)
                with torch.autocast("cpu", torch.bfloat16):
                    patches = normalise(torch.from_numpy(images[at]))
                    states = model.visual.patch_states(patches, grid)
                    loss, share = heads(
                        states, model.visual.merger(states), torch.from_numpy(facts[at])
                    )
                loss.backward()
                apply_gradients(both, optimizers, 1.0, float(loss.detach()))
                right.append(float(share))
                bar.update()
                if step % 100 == 0:
                    bar.set_postfix(right=f"{np.mean(right[-100:]):.3f}")
    bar.close()
    return float(np.mean(right[-100:]))
