"""The tiny checkpoint: a Qwen2-VL of about a million parameters, made from nothing.

    python tiny.py --out tiny            # `make tiny`; about 35 minutes on 2 free cores

It stands in for the 2B that one would download, and comes about in the same order:

1. A tokenizer: byte-level BPE with Qwen2's pre-tokenizer and special tokens, learnt from the
   world's own questions.
2. An eye: the vision tower is pre-trained on dense facts of scenes (how many objects there are in
   each patch and cell, and of what kind), through linear heads that are thrown away: first on
   CLEVR's shapes, then on a wider world with more shapes and grounds. Cubes and cylinders have the
   colours of CoGenT A only, and the third world's grounds and shapes are never shown.
3. An instruct stage: with the eye frozen, the language model learns to answer from a teacher who
   overlooks each small object with probability 0.22 and answers in five ways: two in the asked
   format, one with the answer tags alone, two without. So it miscounts and mis-formats in a
   systematic way, as the real 2B does under a think prompt, and neither greedy decoding nor a
   smaller step size averages that out.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

import world
from checkpoint import ModelConfig
from config import opt, parse
from data import PREPROCESSOR, Processor
from example import Example
from eye import WORLDS, train_eye
from forms import noticed, style
from journal import write_json
from model import Qwen2VL
from rewards import ANSWER, THINK
from saving import save_checkpoint
from sft import Config as SFTConfig
from sft import fit, taught
from template import TEMPLATES


@dataclass(frozen=True)
class Config:
    """Keys of `python tiny.py`."""

    out: str = opt("tiny", "folder of the checkpoint")
    seed: int = opt(0, "fixes everything", least=0)
    eye_steps: int = opt(16000, "steps of the eye's pre-training, 32 images each", least=1)
    wide_steps: int = opt(6000, "further steps on more shapes and grounds", least=1)
    eye_lr: float = opt(1e-2, "step size (Muon, cosine; half of it for the further ones)", above=0)
    instruct_steps: int = opt(800, "steps of the instruct stage, 32 rows each", least=1)
    instruct_lr: float = opt(2e-3, "its step size (Muon, cosine)", above=0)
    overlook: float = opt(0.22, "the teacher misses a small object with this probability", least=0)
    replace: bool = opt(False, "a folder that is there gives way once the new one is whole")


# ------------------------------------------------------------------------------------- tokenizer

# Qwen2's pre-tokenizer and special tokens, in the order of the published tokenizer_config.json.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (  # noqa: SIM905
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDINGS = ("r1v", "r1v_eval", "direct")  # templates that the merges are learnt from
SETTINGS = {**PREPROCESSOR, "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}


def make_tokenizer(folder: Path, corpus: list[str], most: int = 1024) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json; returns the ids of the added tokens.

    256 bytes and the merges of `corpus` come first (at most `most`), then Qwen2-VL's special
    tokens, then the four tags as ordinary words of one token each, as Qwen3 has them.
    """
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        corpus, BpeTrainer(vocab_size=most, initial_alphabet=alphabet, show_progress=False)
    )
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK + ANSWER])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    write_json({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "bos_token": None, "model_max_length": 32768,
        "additional_special_tokens": SPECIAL[1:], "chat_template": CHAT_TEMPLATE,
    }, folder / "tokenizer_config.json")  # fmt: skip
    return {t: tok.token_to_id(t) for t in SPECIAL}


def model_config(ids: dict[str, int], vocab_size: int) -> dict:
    """config.json of the tiny Qwen2-VL."""
    return {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {
            "model_type": "qwen2_vl_text", "vocab_size": vocab_size, "hidden_size": 128,
            "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6],
            },
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision", "depth": 3, "embed_dim": 96, "num_heads": 4,
            "hidden_size": 128, "mlp_ratio": 4,
        },
    }  # fmt: skip


# ------------------------------------------------------------------------------- the instruct stage

# Share and form of the teacher's answers; {n} is the answer, {large} and {small} its parts.
STYLES = (
    (0.20, "<think>I count the items one by one.</think> <answer>{n}</answer>"),
    (0.18, "<think>{large} large and {small} small.</think> <answer>{n}</answer>"),
    (0.24, "<answer>{n}</answer>"),
    (0.19, "{n}"),
    (0.19, "There are {n}."),
)


def taught_answer(scene: dict, question: dict, overlook: float, rng, styles=STYLES) -> str:
    """What the teacher answers to a counting question: each small object is missed with
    probability `overlook` (0: a teacher who sees all), the form is drawn from `styles`."""
    found = [scene["objects"][i] for i in world.execute(question["program"][:-1], scene)]
    seen = noticed(found, overlook, rng)
    large = sum(o["size"] == "large" for o in seen)
    return style(styles, rng).format(n=len(seen), large=large, small=len(seen) - large)


def instruct_rows(n: int, seed: int, overlook: float) -> list[tuple[Example, str]]:
    """2 n rows (Example, answer) on n scenes of the eye's wider world: how many items, and an
    attribute question; three in four under the think prompt, the others under the direct one.
    """
    rng, rows = np.random.default_rng((seed, 2)), []
    look, shapes = WORLDS[-1]
    scenes = world.make_scenes(n, "A", seed + 1, "train", look=look, shapes=shapes)
    for scene, image in zip(scenes, world.render(scenes)):
        for kind in ("count", "attribute"):
            question = world.ask(scene, kind, rng)
            template = TEMPLATES["r1v" if rng.random() < 0.75 else "direct"].user
            problem = template.replace("{Question}", question["question"])
            example = Example(problem, str(question["answer"]), (image,), kind)
            rows.append((example, taught_answer(scene, question, overlook, rng)))
    return rows


def corpus(seed: int) -> list[str]:
    """What the tokenizer learns its merges from: questions of the world, prompts, answers."""
    rng = np.random.default_rng((seed, 3))
    scenes = world.make_scenes(200, seed=seed + 1, part="train")
    lines = [form.format(n=n, large=n, small=n) for _, form in STYLES for n in range(11)]
    for scene in scenes:
        for kind in world.ASK:
            try:
                question = world.ask(scene, kind, rng)["question"]
            except ValueError:  # no object that a relation could start from
                continue
            lines += [TEMPLATES[t].user.replace("{Question}", question) for t in WORDINGS]
    return [*lines, *["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 50]


def begin(work: Path, cfg) -> None:
    """Makes the folder of the stages. SystemExit where it was begun with other keys."""
    asked, told = json.dumps(vars(cfg)), work / "asked.json"
    if told.exists() and told.read_text() != asked:
        raise SystemExit(f"error: {work} was begun with other keys; remove it, or ask the same")
    work.mkdir(parents=True, exist_ok=True)
    told.write_text(asked)


def build(cfg: Config, work: Path) -> Path:
    """All stages, in the folder `work`; an eye that an earlier try left there is used again."""
    begin(work, cfg)
    ids = make_tokenizer(work, corpus(cfg.seed))
    write_json(SETTINGS, work / "preprocessor_config.json")
    ends = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}  # fmt: skip
    write_json({**ends, "do_sample": True, "temperature": 1.0}, work / "generation_config.json")
    raw = model_config(ids, Tokenizer.from_file(str(work / "tokenizer.json")).get_vocab_size())
    write_json(raw, work / "config.json")
    model = Qwen2VL(ModelConfig.from_dict(raw)).init_weights(cfg.seed)
    processor = Processor.from_pretrained(work, "{Question}")
    stages = ((cfg.eye_steps, cfg.eye_lr), (cfg.wide_steps, cfg.eye_lr / 2))
    for i, ((steps, lr), (look, shapes)) in enumerate(zip(stages, WORLDS)):
        if (work / f"eye_{look}").exists():
            model = Qwen2VL.from_pretrained(work / f"eye_{look}")
            continue
        right = train_eye(model, steps, lr, cfg.seed + 10 * i, look, shapes)
        print(f"eye: counts {right:.3f} of fresh {look} scenes right")
        save_checkpoint(model, processor, work / f"eye_{look}")
    model.visual.requires_grad_(False)  # the teacher's flaw is in what is said, not in the eye
    rows = instruct_rows(cfg.instruct_steps * 16, cfg.seed, cfg.overlook)
    stage = SFTConfig(steps=cfg.instruct_steps, batch=32, micro=32, optimizer="muon",
                      lr=cfg.instruct_lr, seed=cfg.seed)  # fmt: skip
    examples = [taught(example, answer) for example, answer in rows]
    losses = [row["nll"] for row in fit(model, processor, examples, stage, title="instruct")]
    print(f"instruct: loss {losses[0]:.3f} -> {np.mean(losses[-50:]):.3f}")
    save_checkpoint(model, processor, work / "whole")
    return work / "whole"


def make(cfg, build) -> None:
    """The checkpoint cfg.out by build(cfg, folder to work in), which gives the folder of it; an old
    one goes when the new one is whole. SystemExit if it is there and may not be replaced."""
    out = Path(cfg.out)
    if out.exists() and not cfg.replace:
        raise SystemExit(f"error: --out {out} is there already; remove it or say --replace")
    torch.set_num_threads(1)  # one core trains, one draws; and sums keep their order
    work = out.with_name(out.name + ".build")
    whole = build(cfg, work)
    shutil.rmtree(out, ignore_errors=True)
    whole.rename(out)
    shutil.rmtree(work)


def main(argv=None) -> None:
    make(parse(Config, argv, __doc__), build)


if __name__ == "__main__":
    main()
