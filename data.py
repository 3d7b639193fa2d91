"""From an example to a prompt: chat template, image patches, M-RoPE positions.

    processor = Processor.from_pretrained("Qwen2-VL-2B-Instruct", template="r1v")
    examples = load_examples("world:A,n=8")                    # or "train.jsonl", see rows.py
    batch = collate([processor.prompt(example) for example in examples])

Source: Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1): naive dynamic resolution and
M-RoPE. Patches, token ids and positions equal those of transformers bit for bit. Otherwise:
- Special tokens in a question stay plain text. Only the chat template makes image tokens, and
  their places come from the layout of the prompt, not from a search for their id.
- A prompt is never cut, a batch never padded, an image never repeated: prompts are packed.

Letters: B prompts, L tokens of a prompt, S tokens of all prompts, I image tokens, n images,
P patches (14 x 14 pixels at 2 moments), C = 3 * 2 * 14 * 14 numbers of a patch.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from boxes import FRAMES, View
from example import Example
from grading import leave_out
from images import image_size, open_image
from patches import mrope_positions, patchify, smart_resize
from template import Template, find_template, frame_words

# ------------------------------------------------------------------------------------ prompt, batch


@dataclass
class Prompt:
    """An example as the model reads it."""

    ids: Tensor  # (L,) int64
    patches: Tensor  # (P, C) float32
    grid: Tensor  # (n, 3) int64: moments, rows and columns of each image, in patches
    positions: Tensor  # (3, L) int64: time, height, width
    image_at: Tensor  # (I,) int64: places of the image tokens in ids
    example: Example
    text: str  # the whole prompt, with one <|image_pad|> for each image
    opening: str = ""  # of the answer, with which ids and text end, see template.Template
    states: Tensor | None = None  # (P, E): what rollout.look made of the patches, which are gone

    @property
    def next_position(self) -> int:
        """The position, on all three axes, of the first token of a completion."""
        return int(self.positions.max()) + 1


@dataclass
class Batch:
    """Prompts one after another, without padding."""

    ids: Tensor  # (S,) int64
    positions: Tensor  # (3, S) int64
    lengths: list[int]  # (B,) tokens of each prompt
    patches: Tensor  # (P, C) float32
    grid: Tensor  # (n, 3) int64
    image_at: Tensor  # (I,) int64: places in the packed ids
    next_position: Tensor  # (B,) int64
    states: Tensor | None  # (P, E) in place of patches

    def to(self, device) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(prompts: list[Prompt]) -> Batch:
    """Packs prompts, with their images in the same order."""
    lengths = [len(p.ids) for p in prompts]
    starts = np.cumsum([0, *lengths])
    return Batch(
        ids=torch.cat([p.ids for p in prompts]),
        positions=torch.cat([p.positions for p in prompts], dim=1),
        lengths=lengths,
        patches=torch.cat([p.patches for p in prompts]),
        grid=torch.cat([p.grid for p in prompts]),
        image_at=torch.cat([p.image_at + int(start) for p, start in zip(prompts, starts)]),
        next_position=torch.tensor([p.next_position for p in prompts]),
        states=None if prompts[0].states is None else torch.cat([p.states for p in prompts]),
    )


# ---------------------------------------------------------------------------------------- processor

MARKUP = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# No completion may hold these: they open a turn, or stand for an image that is not there. Other
# special tokens may be sampled, since Qwen2-VL grounds its answers with box and object tokens.
BANNED = ("<|im_start|>", *MARKUP[2:], "<|vision_pad|>", "<|video_pad|>")
# Files that say how text and images become tokens; they are saved as they were read.
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
         "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
         "preprocessor_config.json", "processor_config.json", "generation_config.json")  # fmt: skip
# The frame in which each family was taught to speak of boxes (arXiv 2409.12191 and 2502.13923).
SPOKEN = {"qwen2_vl": "0-1000", "qwen2_5_vl": "resized"}
# Qwen2-VL's preprocessor_config.json, for what a checkpoint's own does not say.
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor", "do_convert_rgb": True, "do_resize": True,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},  # pixels
    "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,  # bicubic
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "patch_size": 14, "merge_size": 2,
    "image_std": [0.26862954, 0.26130258, 0.27577711], "temporal_patch_size": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """How a checkpoint reads text and images. Made by Processor.from_pretrained."""

    tokenizer: Tokenizer  # special tokens in a text that it encodes stay text
    template: Template
    settings: dict  # preprocessor_config.json, completed
    table: np.ndarray = field(repr=False)  # (3, 256) float32, see patchify
    stop_ids: list[int]  # end a completion; the first is the chat template's <|im_end|>
    banned_ids: list[int]  # never sampled
    image_id: int
    vocab_size: int  # tokens with a meaning; the model's embedding may have more rows
    files: dict[str, bytes] = field(repr=False)
    frame: str = SPOKEN["qwen2_vl"]  # of the boxes that the model speaks of, see boxes.FRAMES
    gold_frame: str = "pixels"  # of the boxes of rows that have no column "frame"

    @classmethod
    def from_pretrained(cls, folder, template="r1v", min_pixels=None, max_pixels=None, system=None,
                        frame=None, gold_frame="pixels"):  # fmt: skip
        """Reads a Hugging Face folder. template, system: see template.find_template.

        min_pixels, max_pixels (of an image, after resizing) go before the folder's; frame: None for
        SPOKEN's. ValueError, naming the folder, for what is missing or does not fit together.
        """
        folder = Path(folder)
        spoken = SPOKEN.get(read_json(folder / "config.json").get("model_type"), cls.frame)
        frames = {"frame": frame or spoken, "gold_frame": gold_frame}
        if not set(frames.values()) <= set(FRAMES):
            raise ValueError(f"{frames}: must be of {', '.join(FRAMES)}")
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        tokenizer = load_tokenizer(folder)
        settings = image_settings(folder, min_pixels, max_pixels)
        if (min_pixels, max_pixels) != (None, None) or "preprocessor_config.json" not in files:
            files["preprocessor_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
            files.pop("processor_config.json", None)  # its settings would go before these
        return cls(
            tokenizer=tokenizer,
            template=find_template(template, system),
            settings=settings,
            table=byte_table(settings),
            stop_ids=end_tokens(folder, tokenizer),
            banned_ids=banned_tokens(folder, tokenizer),
            image_id=tokenizer.token_to_id("<|image_pad|>"),
            vocab_size=tokenizer.get_vocab_size(),
            files=files,
            **frames,
        )

    def save_pretrained(self, folder) -> None:
        """Writes the files that were read, byte for byte, but for pixel limits that were given.
        transformers loads tokenizer and image processor from them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which an image of that size is read."""
        factor = self.settings["patch_size"] * self.settings["merge_size"]
        limits = self.settings["min_pixels"], self.settings["max_pixels"]
        return smart_resize(height, width, factor, *limits)

    def __setstate__(self, state: dict) -> None:
        """For worker processes: a pickled tokenizer forgets its encode_special_tokens."""
        vars(self).update(state)
        self.tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text: "<|im_end|>" in it is text, not the end of a turn."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def target(self, text: str) -> list[int]:
        """Ids of an answer with its end, as if sampled: without the template's opening, with which
        it is to open (ValueError)."""
        opening, end = self.template.opening, self.tokenizer.token_to_id(self.template.end)
        if not text.startswith(opening):
            raise ValueError(f"an answer opens with {text!r:.40}, the template's with {opening!r}")
        return [*self.encode(text.removeprefix(opening)), end]

    def decode(self, ids: list[int]) -> str:
        """Text of a completion, up to its first stop token."""
        end = next((at for at, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False)

    def read_image(self, source) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Patches (P, C) float32 and grid (1, rows, columns) of a path, PIL image or array."""
        image, settings = open_image(source), self.settings
        patch, merge = settings["patch_size"], settings["merge_size"]
        size = self.resized(*image.shape[:2])
        if size != image.shape[:2]:
            image = np.asarray(Image.fromarray(image).resize(size[::-1], settings["resample"]))
        return patchify(image, self.table, patch, merge, settings["temporal_patch_size"])

    def seen(self, example: Example, sizes) -> Example:
        """The example with its view, by (height, width) of its images."""
        sizes = tuple((*size, *self.resized(*size)) for size in sizes)
        return replace(example, view=View(self.frame, example.frame or self.gold_frame, sizes))

    def tokens(self, example: Example) -> tuple[list, list, list, str]:
        """Ids, layout (see mrope_positions), places of image tokens and text of the prompt of an
        example with a view. Each text is encoded by itself."""
        factor = self.settings["patch_size"] * self.settings["merge_size"]
        grids = [(1, h // factor, w // factor) for _, _, h, w in example.view.sizes]
        ids, layout, image_at, text = [], [], [], ""
        asked = example.problem, grids, example.extra.get("system"), frame_words(example.view)
        for piece in self.template.turns(*asked):
            is_image = isinstance(piece, tuple) and len(piece) == 3
            if is_image:
                new, shown = [self.image_id] * math.prod(piece), "<|image_pad|>"
                image_at += range(len(ids), len(ids) + len(new))
            elif isinstance(piece, tuple):
                new, shown = [self.tokenizer.token_to_id(*piece)], piece[0]
            else:
                new, shown = self.encode(piece), piece
            ids, text = ids + new, text + shown
            layout.append(piece if is_image else len(new))
        return ids, layout, image_at, text

    def length(self, example: Example) -> int:
        """Tokens of its prompt, from the sizes of its images: no pixel is decoded."""
        return len(self.tokens(self.seen(example, map(image_size, example.images)))[0])

    def prompt(self, example: Example, max_length: int | None = None) -> Prompt:
        """System turn, user turn and the start of an answer, as the template says; its example has
        a view. ValueError, naming the row, for an image that cannot be read and for a prompt of
        more than max_length tokens, which is never cut."""
        try:
            images = [open_image(source) for source in example.images]
            read = [self.read_image(image) for image in images]
            example = self.seen(example, [image.shape[:2] for image in images])
            ids, layout, image_at, text = self.tokens(example)
        except ValueError as error:
            raise ValueError(f"{example.row}: {error}") from error
        C = self.settings["patch_size"] ** 2 * 3 * self.settings["temporal_patch_size"]
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"{example.row}: the prompt has {len(ids)} tokens ({len(image_at)} of "
                             f"images), at most {max_length} are allowed; none is cut")
        patches = np.concatenate([np.empty((0, C), np.float32), *(patches for patches, _ in read)])
        grid = torch.tensor([grid for _, grid in read], dtype=torch.int64).view(-1, 3)
        tensors = torch.tensor(ids), torch.from_numpy(patches), grid, mrope_positions(layout)
        image_at = torch.tensor(image_at, dtype=torch.int64)
        return Prompt(*tensors, image_at, example, text, self.template.opening)


def without_long(examples: Sequence, length, key: str, most: int | None, bad_rows: str) -> Sequence:
    """The examples of at most `most` tokens, as length(example) tells; all if `most` is None.

    None is ever cut, which would cut the image too. ValueError says how many are longer, and the
    first; bad_rows="skip" leaves them out and says so on stderr. key: what `most` is called.
    """
    if most is None:
        return examples
    lengths = [length(example) for example in tqdm(examples, "measure rows", leave=False)]
    bad = {i for i, n in enumerate(lengths) if n > most}
    if not bad:
        return examples
    first = min(bad)
    told = (f"{len(bad)} of {len(lengths)} rows have more than {most} tokens, the "
            f"first is {examples[first].row} with {lengths[first]}")
    return leave_out(examples, bad, told, f"raise --{key}", bad_rows)


# ---------------------------------------------------------------------------- files of a checkpoint


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, set so that special tokens in a text stay text."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: no tokenizer.json. transformers writes one: "
                         "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for name in MARKUP:
        if tokenizer.token_to_id(name) is None:
            raise ValueError(f"{folder}/tokenizer.json has no {name}: not Qwen2-VL's tokenizer")
    told = read_json(folder / "config.json").get("image_token_id")
    if told not in (None, ours := tokenizer.token_to_id("<|image_pad|>")):
        raise ValueError(f"{folder}: config.json's image token is {told}, the tokenizer's {ours}")
    return tokenizer


def read_json(path: Path) -> dict:
    """A JSON file, or {} where there is none. ValueError names a broken one."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def image_settings(folder: Path, min_pixels: int | None, max_pixels: int | None) -> dict:
    """The folder's preprocessor_config.json, or what transformers 5 writes instead, completed.
    Pixel limits are read, and returned, under old names (min_pixels, max_pixels) and new (size)."""
    found = read_json(folder / "processor_config.json").get("image_processor")
    found = found or read_json(folder / "preprocessor_config.json")
    size, default = found.get("size") or {}, PREPROCESSOR["size"]
    low = min_pixels, found.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")
    high = max_pixels, found.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")
    low = next((n for n in low if n is not None), default["shortest_edge"])
    high = next((n for n in high if n is not None), default["longest_edge"])
    if not 0 < low <= high:
        raise ValueError(f"{folder}: needs 0 < min_pixels <= max_pixels, found {low} and {high}")
    limits = {"size": {"shortest_edge": low, "longest_edge": high}}
    return {**PREPROCESSOR, **found, **limits, "min_pixels": low, "max_pixels": high}


def byte_table(settings: dict) -> np.ndarray:
    """(3, 256) float32: what a byte of each channel becomes, rounded where transformers rounds."""
    scale = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    table = np.tile((np.arange(256) * scale).astype(np.float32), (3, 1))
    if settings["do_normalize"]:
        mean, std = (np.float32(settings[name])[:, None] for name in ("image_mean", "image_std"))
        table = (table - mean) / std
    return table


def banned_tokens(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Ids of BANNED, and of the rows that an embedding has beyond the tokenizer's last token
    (Qwen2-VL-2B: 151,936 rows for 151,657 tokens): nothing could be read from those."""
    config = read_json(folder / "config.json")
    rows = (config.get("text_config") or config).get("vocab_size") or 0
    ids = [*map(tokenizer.token_to_id, BANNED), *range(tokenizer.get_vocab_size(), rows)]
    return [i for i in ids if i is not None]


def end_tokens(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Ids that end a completion: <|im_end|>, <|endoftext|>, then what else the folder's files call
    an end. Ids that the tokenizer does not have are left out."""
    eos = read_json(folder / "tokenizer_config.json").get("eos_token")
    names = ["<|im_end|>", "<|endoftext|>", eos["content"] if isinstance(eos, dict) else eos]
    ids = [tokenizer.token_to_id(name) for name in names if name]
    generation, config = (read_json(folder / f"{x}.json") for x in ("generation_config", "config"))
    for place in (generation, config, config.get("text_config") or {}):
        told = place.get("eos_token_id")
        ids += told if isinstance(told, list) else [told]
    known = (i for i in ids if i is not None and tokenizer.id_to_token(i) is not None)
    return list(dict.fromkeys(known))
