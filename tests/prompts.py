"""Four prompts, a random checkpoint that completes them, and what transformers says of them.

For test_sampling.py and test_rollout.py. Comparisons with transformers are in float32 on the CPU, a
prompt and a completion at a time: nothing is shared, nothing is padded, there is no cache of ours.
The rows of the two end tokens in its head are doubled, so that completions end at different
lengths.
"""

import math
from types import SimpleNamespace

import torch
from tiny_checkpoint import make_checkpoint, picture
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from attention import Layout
from data import Example, Processor, collate
from model import Qwen2VL
from rollout import Rollout

INF = math.inf
NEW = 12  # tokens of a completion at most

EXAMPLES = [
    Example("How many items are there?", "3", (picture(0, 56, 84),), row="one"),
    Example("What is in both?", "cube", (picture(1, 84, 56), picture(2, 56, 56)), row="two"),
    Example("How many legs has a spider, and how many has an ant?", "8", row="none"),
    Example("What color is the large cube?", "red", (picture(3, 84, 84),), row="large"),
]


def make(folder) -> SimpleNamespace:
    """model (ours), reference (transformers'), processor of one checkpoint, and four prompts."""
    make_checkpoint(folder, tie=False)
    model, processor = Qwen2VL.from_pretrained(folder), Processor.from_pretrained(folder)
    with torch.no_grad():
        model.head[processor.stop_ids] *= torch.tensor([[-2.0], [2.0]])
    model.save_pretrained(folder)
    reference = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    prompts = [processor.prompt(example) for example in EXAMPLES]
    assert len({len(p.ids) for p in prompts}) == 4
    assert [len(p.grid) for p in prompts] == [1, 2, 0, 1]
    return SimpleNamespace(
        model=model, reference=reference, processor=processor, prompts=prompts, folder=folder
    )


def reference_logits(reference, prompt, completion=()) -> Tensor:
    """transformers' logits (T + 1, V): after the prompt, and after each completion token."""
    ids = torch.cat((prompt.ids, torch.tensor(completion, dtype=torch.int64)))[None]
    logits = reference(ids, attention_mask=torch.ones_like(ids), **pictures(prompt, ids)).logits[0]
    return logits[len(prompt.ids) - 1 :]


def pictures(prompt, ids) -> dict:
    if not len(prompt.grid):
        return {}
    kinds = torch.zeros_like(ids).index_fill(1, prompt.image_at, 1)
    return {
        "pixel_values": prompt.patches, "image_grid_thw": prompt.grid, "mm_token_type_ids": kinds,
    }  # fmt: skip


def our_hidden(model, prompt, completion=()) -> Tensor:
    """Our hidden states (T + 1, D) of one packed sequence: the completion is part of the prompt."""
    batch, n = collate([prompt]), len(completion)
    ids = torch.cat((batch.ids, torch.tensor(completion, dtype=torch.int64)))
    after = batch.next_position + torch.arange(n)
    positions = torch.cat((batch.positions, after.expand(3, -1)), 1)
    features = model.visual(batch.patches, batch.grid) if len(batch.grid) else None
    hidden = model(ids, positions, Layout([len(ids)]), features, batch.image_at)
    return hidden[len(prompt.ids) - 1 :]


def our_logits(model, prompt, completion=()) -> Tensor:
    """Our logits (T + 1, V)."""
    return our_hidden(model, prompt, completion) @ model.head.T


def logp_of(logits, completion, temperature, banned) -> Tensor:
    """(T,) of the completion's tokens by logits (T + 1, V), written out plainly."""
    logits = logits.clone() / temperature
    logits[:, banned] = -INF
    return torch.stack([row.log_softmax(0)[i] for row, i in zip(logits, completion)])


def completions(out: Rollout) -> list[list[list[int]]]:
    """B lists of G lists of token ids."""
    rows = zip(out.ids.tolist(), out.lengths.tolist())
    return [[ids[:n] for ids, n in zip(*row)] for row in rows]


def random(*shape, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same(a: Rollout, b: Rollout):
    """The same tokens and ends; log-probs up to rounding."""
    assert completions(a) == completions(b) and a.texts == b.texts
    assert torch.equal(a.finished, b.finished)
    assert (a.logp - b.logp).abs().max() < 1e-4
