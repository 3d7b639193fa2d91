"""The naive twin: the same GRPO step as ours with transformers' Qwen2-VL and nothing clever.

What is naive, as in R1-V and what is derived from it: prompt and picture are repeated for each of G
completions, so the vision tower and the prompt run G times; transformers' generate samples; the
log-probs come from the logits of every token of every sequence, (N, S, V) in float32, for policy
and reference. What is not: a picture is prepared once, and its patches are repeated.

It is loaded by rivals.py, needs transformers, and imports nothing of the project, so that it proves
something: tests/test_rivals.py holds its log-probs, loss and gradient against ours. peer_trl.py
takes the processor from here.

Letters: B prompts, G completions per prompt, N = B G sequences, T tokens of a completion, which
all completions have, S tokens of a sequence with its padding, V vocabulary.
"""

import json
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin


class ImageAndText(ProcessorMixin):
    """Qwen2-VL's processor without videos, the one part of it that needs torchvision. What it does
    with a batch is ProcessorMixin's code."""

    return_mm_token_type_ids = True
    image_token = "<|image_pad|>"
    replace_image_token = Qwen2VLProcessor.replace_image_token

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def check_argument_for_proper_class(self, name, value):
        """Nothing: the classes would be looked up in a table of known processors."""


def load_processor(folder) -> ImageAndText:
    """From the tokenizer and the preprocessor_config.json of a checkpoint."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    told = json.loads(Path(folder, "preprocessor_config.json").read_text("utf-8"))
    images = Qwen2VLImageProcessorPil(size=told["size"])
    return ImageAndText(images, tokenizer, chat_template=tokenizer.chat_template)


def load_model(folder) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def message(text: str, picture) -> list[dict]:
    """The conversation of a prompt; picture: a PIL image."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def prepare(processor, texts: list[str], pictures: list, group: int) -> dict[str, Tensor]:
    """What the model takes: each prompt G times in a row, padded on the left, with its picture."""
    found = processor.apply_chat_template(
        [message(*pair) for pair in zip(texts, pictures, strict=True)],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    grid = found["image_grid_thw"]
    patches = found["pixel_values"].split(grid.prod(-1).tolist())
    tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {
        **{name: found[name].repeat_interleave(group, 0) for name in tokens},
        "pixel_values": torch.cat([p.repeat(group, 1) for p in patches]),
        "image_grid_thw": grid.repeat_interleave(group, 0),
    }


@torch.no_grad()
def generate(model, inputs: dict, tokens: int, temperature: float, banned: list[int], phase):
    """Completions (N, T) by transformers' generate. phase: a context manager for its prefill."""
    told = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        suppress_tokens=banned, use_cache=True, pad_token_id=0,
    )  # fmt: skip
    with first_forward(model, phase):
        found = model.generate(**inputs, generation_config=told)
    return found[:, inputs["input_ids"].shape[1] :]


@contextmanager
def first_forward(model, phase):
    """Inside, the next forward of the model runs under the context manager `phase`."""
    stack, waiting = ExitStack(), [phase]

    def begin(*_):
        if waiting:
            stack.enter_context(waiting.pop())

    def end(*_):
        stack.close()

    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(inputs: dict, rows: slice) -> dict:
    """The inputs of some of the sequences."""
    patches = [0, *inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()]
    some = {name: x[rows] for name, x in inputs.items() if name != "pixel_values"}
    return some | {"pixel_values": inputs["pixel_values"][patches[rows.start] : patches[rows.stop]]}


def logps(model, inputs: dict, ids: Tensor, temperature: float, banned: list[int]) -> Tensor:
    """Log-probs (N, T) of the completions ids (N, T), from the logits of all tokens."""
    prompt, mask, kind = (inputs[k] for k in ("input_ids", "attention_mask", "mm_token_type_ids"))
    whole = torch.cat((prompt, ids), 1)  # (N, S)
    logits = model(
        input_ids=whole,
        attention_mask=torch.cat((mask, torch.ones_like(ids)), 1),
        mm_token_type_ids=torch.cat((kind, torch.zeros_like(ids)), 1),
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
        use_cache=False,
    ).logits.float()  # (N, S, V)
    logits = (logits[:, :-1] / temperature).index_fill(-1, torch.tensor(banned), -torch.inf)
    found = logits.log_softmax(-1).gather(-1, whole[:, 1:, None])[..., 0]
    return found[:, -ids.shape[1] :]


def advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) of rewards (B, G), in the shape (N, 1)."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return ((rewards - mean) / (std + 1e-4)).reshape(-1, 1)


def loss(logp: Tensor, ref: Tensor | None, adv: Tensor, beta: float, clip: float = 0.2) -> Tensor:
    """GRPO's loss summed over tokens, logp and ref (N, T), adv (N, 1); on policy. All completions
    have T tokens: divided by their number it is the mean over sequences of means over tokens."""
    ratio = (logp - logp.detach()).exp()
    token = -torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
    if ref is not None:
        token = token + beta * ((ref - logp).exp() - (ref - logp) - 1)
    return token.sum()
