"""Small random Qwen2-VL and Qwen2.5-VL checkpoints in the Hugging Face layout, for every test file.

transformers makes the weights, so a test that compares with it compares with the real thing. The
tokenizer is a byte-level BPE with Qwen2's pre-tokenizer and Qwen2-VL's special tokens in their
published order; only the vocabulary is small.

    make_checkpoint(tmp_path / "model")          # weights, tokenizer, preprocessor, generation
    make_checkpoint(tmp_path / "odd", heads=6, kv_heads=3, width=96, tie=False, depth=3)
    make_checkpoint(tmp_path / "2.5", family="qwen2_5_vl", window_size=56, depth=3)
    make_tokenizer(tmp_path / "tokenizer")       # tokenizer alone
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

FAMILIES = {  # model_type: transformers' config and model
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}

# Qwen2-VL-2B-Instruct, tokenizer.json and tokenizer_config.json
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The merges are learned from these lines.
CORPUS = [
    "You are a helpful assistant. system user assistant",
    "How many items are there in the image? What color is the large metal sphere to the left?",
    "  Output the thinking process in <think> </think> and final answer (number) in <answer> "
    "</answer> tags. First output the thinking process",
    "<think> one, two, three, four, five red cubes and six brown cylinders </think>\n"
    "<answer> 3 </answer>",
]


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Random pixels (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_tokenizer(folder, vocab_size: int = 384, corpus=CORPUS) -> Path:
    """Writes tokenizer.json and tokenizer_config.json: vocab_size ordinary tokens (256 bytes, then
    merges; at most about 400), then the 14 special ones."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    assert tokenizer.get_vocab_size() == vocab_size, (
        f"the corpus gives {tokenizer.get_vocab_size()} tokens, {vocab_size} were asked for"
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "additional_special_tokens": SPECIAL[1:],
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    _write(folder / "tokenizer_config.json", config)
    return folder


def make_preprocessor(folder, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280) -> Path:
    """Writes preprocessor_config.json as transformers 5 does (sizes under `size`)."""
    config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    _write(Path(folder) / "preprocessor_config.json", config)
    return Path(folder)


def make_checkpoint(
    folder,
    *,
    family: str = "qwen2_vl",
    seed: int = 0,
    tie: bool = True,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 96,
    vision_width: int = 32,
    depth: int = 2,
    vision_heads: int = 2,
    vision_ffn: int = 64,
    window_size: int = 112,
    fullatt_block_indexes: tuple[int, ...] = (1,),
    vocab_size: int = 384,
    padded_vocab: int | None = None,
    mrope_section: tuple[int, int, int] | None = None,
    initializer_range: float = 0.1,
    dtype: torch.dtype = torch.float32,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 1280,
) -> Path:
    """Writes a random Qwen2-VL, or Qwen2.5-VL, with tokenizer and preprocessor; transformers loads
    it as it is. window_size (pixels) and fullatt_block_indexes are of Qwen2.5-VL.

    width / heads is the language model's head size (even), vision_width / vision_heads the vision
    tower's (a multiple of 4). tie: the head is the embedding. padded_vocab: rows of the embedding,
    at least vocab_size + 14 (Qwen2-VL-2B has 151,936 rows for 151,657 tokens). mrope_section: three
    numbers that sum to half the head size. The default initializer_range is five times the usual,
    so that answers depend clearly on every input; every bias and norm is random too, or a model
    that dropped them would pass.
    """
    folder = make_tokenizer(folder, vocab_size)
    make_preprocessor(folder, min_pixels, max_pixels)
    ids = {token: vocab_size + i for i, token in enumerate(SPECIAL)}
    half = width // heads // 2
    section = mrope_section or (half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8)
    text_config = {
        "vocab_size": padded_vocab or vocab_size + len(SPECIAL),
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": list(section),
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "initializer_range": initializer_range,
    }
    tower = {"depth": depth, "num_heads": vision_heads, "initializer_range": initializer_range}
    if family == "qwen2_vl":
        tower |= {"embed_dim": vision_width, "hidden_size": width}
        tower["mlp_ratio"] = vision_ffn // vision_width
    else:
        tower |= {"hidden_size": vision_width, "out_hidden_size": width}
        tower |= {"intermediate_size": vision_ffn, "window_size": window_size}
        tower["fullatt_block_indexes"] = list(fullatt_block_indexes)
    Config, Model = FAMILIES[family]
    config = Config(
        text_config=text_config,
        vision_config=tower,
        tie_word_embeddings=tie,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    _random_model(Model, config, seed).to(dtype).save_pretrained(folder)
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.001,
    }
    _write(folder / "generation_config.json", generation)
    return folder


def _random_model(Model, config, seed: int):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Model(config)
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(0.0, 0.1).add_(0.0 if name.endswith("bias") else 1.0)
    return model


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
