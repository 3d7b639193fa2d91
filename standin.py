"""Stand-ins for what R1-V's run reads: pictures, tokenizer, weights, and lengths of its answers.

What a checkpoint and a data set would bring is made here, in the real shapes, so that a machine
without either can be measured (workload.py). Speed does not depend on what a model knows, but for
the end of its answers, which random weights never find: lengths are imposed.

Letters: B prompts, G completions per prompt.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import draw
import grpo
import world
from checkpoint import ModelConfig
from costs import SIGMA
from data import Processor
from example import Example
from model import Qwen2VL

HERE = Path(__file__).resolve().parent
WORDS = 151_643  # ordinary tokens of Qwen2-VL's tokenizer
SPECIAL = 14  # of its special ones, which follow them: <|endoftext|> ... <|video_pad|>


def make_processor(shape: ModelConfig) -> Processor:
    """A processor of Qwen2-VL's size where its tokenizer cannot be had: the tiny checkpoint's,
    filled up with words, so that whatever is sampled can be read. Prompts have about as many
    tokens, special ones their published ids. Pictures as in R1-V (max_pixels 401,408)."""
    told = json.loads((HERE / "tiny" / "tokenizer.json").read_text("utf-8"))
    vocab = told["model"]["vocab"]
    vocab |= {f"Ġword{i}": i for i in range(len(vocab), WORDS)}
    told["added_tokens"] = [{**token, "id": WORDS + i}
                            for i, token in enumerate(told["added_tokens"][:SPECIAL])]
    with TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(told), "utf-8")
        Path(folder, "config.json").write_text(json.dumps(shape.raw), "utf-8")
        return Processor.from_pretrained(folder, "r1v", min_pixels=3136, max_pixels=401_408)


def make_examples(n: int, seed: int) -> list[Example]:
    """Counting questions about n scenes, their pictures as PNG files of 480 x 320 pixels, as
    CLEVR's: reading them is part of the work."""
    scenes, examples = world.make_scenes(n, "A", seed, size=(480, 320)), []
    for i, (scene, image) in enumerate(zip(scenes, draw.render(scenes, (480, 320)))):
        asked = world.ask(scene, "count", np.random.default_rng((seed, i)))
        Image.fromarray(image).save(file := BytesIO(), "png")
        examples.append(Example(asked["question"], str(asked["answer"]), (file.getvalue(),),
                                "count", f"world:A#{i}", {}))  # fmt: skip
    return examples


@torch.no_grad()
def random_model(shape: ModelConfig, device: str, seed: int) -> Qwen2VL:
    """Qwen2VL.init_weights by the device's own random numbers: no weight is ever on the CPU."""
    with torch.device(device):
        model = Qwen2VL(shape)
    gen = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0.0, 0.02, generator=gen)
        elif name.endswith("bias"):
            p.zero_()  # the others belong to norms, and are 1
    return model


def draw_lengths(shape: tuple[int, int], mean: float, most: int, seed: tuple) -> Tensor:
    """Tokens (B, G) of completions: lognormal with that mean and SIGMA, rounded, within 1 .. most,
    as those of costs.lengths. Of mean 130 and most 512 the median is 109, one in 200 is cut."""
    normal = math.log(mean) - SIGMA**2 / 2, SIGMA
    drawn = np.random.default_rng(seed).lognormal(*normal, shape)
    return torch.from_numpy(drawn.round().clip(1, most)).long()


@contextmanager
def rebound(module, **names):
    """The module with other things under these names, which it must have. Inside, that is."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, thing in names.items():
            setattr(module, name, thing)
        yield
    finally:
        for name, thing in before.items():
            setattr(module, name, thing)


def unending(processor: Processor) -> Processor:
    """The processor with its end tokens banned too: completions go on until they are cut."""
    banned = sorted({*processor.banned_ids, *processor.stop_ids})
    return replace(processor, banned_ids=banned)


def imposed(lengths: Tensor):
    """Inside, grpo.sample cuts the completions of its prompts at lengths (B, G) tokens; with an
    unending processor they have exactly as many."""
    return rebound(grpo, sample=partial(grpo.sample, limits=lengths))
