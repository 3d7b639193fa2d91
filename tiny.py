"""The tiny checkpoint: a Qwen2-VL of about a million parameters, made from nothing.

    python tiny.py --out tiny            # `make tiny`; 30 to 40 minutes on 2 cores

It stands in for the 2B that one would download, and comes about in the same order:

1. A tokenizer: byte-level BPE with Qwen2's pre-tokenizer and special tokens, learnt from the
   world's own questions.
2. An eye: the vision tower is pre-trained on dense facts of scenes (how many objects there are in
   each patch and cell, and of what kind), through linear heads that are thrown away. Colours are
   those of CoGenT A; grounds and lights vary, but are never those of the third world.
3. An instruct stage: the language model learns to answer from a teacher who overlooks each small
   object with probability 0.22 and answers in five ways, of which two have thoughts and three have
   the answer tags. So it miscounts and mis-formats in a systematic way, as the real 2B does under a
   think prompt, and neither greedy decoding nor a smaller step size averages that out.
"""

import math
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from tqdm import tqdm

import world
from config import opt, parse
from data import TEMPLATES, Processor
from journal import save_checkpoint, write_json
from model import ModelConfig, Qwen2VL
from optim import apply_gradients, make_optimizers, schedule, set_lr
from rewards import ANSWER, THINK
from rows import Example
from sft import Config as SFTConfig
from sft import fit


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
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, "resample": 3,
    "rescale_factor": 1 / 255, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
}  # fmt: skip


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


# --------------------------------------------------------------------------------------- the eye

SIZE, PATCH, CELL = 112, 14, 28  # pixels
CHUNK = 1024  # scenes rendered at a time
WORLDS = (("varied", "known"), ("wild", "more"))  # look and shapes of the eye's two stages


def values(shapes: str) -> tuple[str, ...]:
    """The attribute values of a world, in the order of `eye_chunk`'s facts."""
    return (*world.COLORS, *world.SHAPES[shapes], *world.MATERIALS, *world.SIZES)


def eye_chunk(seed: int, look: str, shapes: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes k CHUNK ... (k+1) CHUNK - 1 of the eye's world: images (n, H, W, 3) uint8 and facts
    (n, 64, 1 + values) int8: how many objects have their centre in a patch, and how many of each
    attribute value. Patches are in the order of data.patchify: 2 x 2 of a cell, then the next.
    """
    scenes = world.make_scenes(
        CHUNK, split="A", seed=seed, part="train", look=look, shapes=shapes, start=k * CHUNK
    )
    side, names = SIZE // PATCH, values(shapes)
    facts = np.zeros((CHUNK, side * side, 1 + len(names)), np.int8)
    for i, scene in enumerate(scenes):
        for o in scene["objects"]:
            x, y = (min(max(int(c // PATCH), 0), side - 1) for c in o["pixel_coords"][:2])
            patch = (y // 2 * side // 2 + x // 2) * 4 + y % 2 * 2 + x % 2
            kinds = [names.index(o[name]) for name in ("color", "shape", "material", "size")]
            facts[i, patch, [0, *(1 + v for v in kinds)]] += 1
    return world.render(scenes), facts


def eye_chunks(n: int, *world_of):
    """The chunks 0 ... n-1 in order, rendered ahead in a process of its own (spawned, not forked).
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead = [pool.submit(eye_chunk, *world_of, k) for k in range(min(4, n))]
        for k in range(n):
            yield ahead.pop(0).result()
            if k + 4 < n:
                ahead.append(pool.submit(eye_chunk, *world_of, k + 4))


def normalise(images: Tensor) -> Tensor:
    """uint8 (n, H, W, 3) -> patches (n P, C), as data.patchify makes them, for many at once."""
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
    for chunk in eye_chunks(math.ceil(steps * batch / CHUNK / 2), seed, look, shapes):
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
    seen = [o for o in found if o["size"] == "large" or rng.random() >= overlook]
    large = sum(o["size"] == "large" for o in seen)
    shares = np.array([share for share, _ in styles])
    form = styles[rng.choice(len(styles), p=shares / shares.sum())][1]
    return form.format(n=len(seen), large=large, small=len(seen) - large)


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
            template = TEMPLATES["r1v" if rng.random() < 0.75 else "direct"]
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
            lines += [t.replace("{Question}", question) for t in TEMPLATES.values()]
    return [*lines, *["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 50]


def main(argv=None) -> None:
    cfg = parse(Config, argv, __doc__)
    out = Path(cfg.out)
    if (out / "config.json").exists():
        raise SystemExit(f"error: --out {out}: a checkpoint is there already; remove it first")
    torch.set_num_threads(1)  # one core trains, one draws; and sums keep their order
    work = out.with_name(out.name + ".build")  # an eye that is there already is used again
    ids = make_tokenizer(work, corpus(cfg.seed))
    write_json(PREPROCESSOR, work / "preprocessor_config.json")
    ends = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}  # fmt: skip
    write_json({**ends, "do_sample": True, "temperature": 1.0}, work / "generation_config.json")
    vocab = Tokenizer.from_file(str(work / "tokenizer.json")).get_vocab_size()
    raw = model_config(ids, vocab)
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
    stage = SFTConfig(steps=cfg.instruct_steps, optimizer="muon", lr=cfg.instruct_lr, seed=cfg.seed)
    losses = fit(model, processor, rows, stage, title="instruct")
    print(f"instruct: loss {losses[0]:.3f} -> {np.mean(losses[-50:]):.3f}")
    save_checkpoint(model, processor, out)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
