"""From a row of any data set to a prompt: chat template, image patches, M-RoPE positions.

    processor = Processor.from_pretrained("Qwen2-VL-2B-Instruct", template="r1v")
    examples = load_examples("world:A,n=8")                    # or "train.jsonl"
    batch = collate([processor.prompt(example) for example in examples])

Source: Qwen2-VL (Wang et al. 2024, arXiv 2409.12191, section 2.1): naive dynamic resolution and
M-RoPE. Patches, token ids and positions equal those of transformers bit for bit. Otherwise:
- Special tokens in a question stay plain text. Only the chat template makes image tokens, and
  their places come from the layout of the prompt, not from a search for their id.
- A prompt is never cut, a batch never padded, an image never repeated: prompts are packed.
- EXIF orientation is applied, so the model sees what a viewer shows. transformers does so when it
  opens a file itself, but not with a PIL image that it is given.

Letters: B prompts, L tokens of a prompt, S tokens of all prompts, I image tokens, n images,
P patches (14 x 14 pixels at 2 moments), C = 3 * 2 * 14 * 14 numbers of a patch.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import struct
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import world
from config import nearest
from rewards import ANSWER, THINK, gold_answer

# --------------------------------------------------------------------------- example, prompt, batch


@dataclass(frozen=True)
class Example:
    """A row of a data set. images: paths, PIL images or uint8 arrays (H, W, 3)."""

    problem: str
    solution: str
    images: tuple = ()
    task: str = ""
    row: str = ""  # where it came from: "train.jsonl:12", "world:A#7"


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

    def to(self, device) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(prompts: list[Prompt]) -> Batch:
    """Packs prompts, with their images in the same order."""
    lengths = [len(p.ids) for p in prompts]
    starts = np.cumsum([0, *lengths]).tolist()
    return Batch(
        ids=torch.cat([p.ids for p in prompts]),
        positions=torch.cat([p.positions for p in prompts], dim=1),
        lengths=lengths,
        patches=torch.cat([p.patches for p in prompts]),
        grid=torch.cat([p.grid for p in prompts]),
        image_at=torch.cat([p.image_at + start for p, start in zip(prompts, starts)]),
        next_position=torch.tensor([p.next_position for p in prompts]),
    )


# ------------------------------------------------------------------------------------------- images

# Formats whose decoders run no other program (EPS calls Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LARGEST = 89_478_485  # pixels; where PIL begins to warn of a decompression bomb
SMALLEST = 4  # pixels a side; transformers would blow up a single pixel to 56 x 56
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)


def open_image(source) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a path, a PIL image or such an array.

    As transformers 5: transparency is laid on white, other modes are PIL's convert("RGB").
    Raises ValueError for a file that is missing, damaged, too large or too small.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"image array: expected uint8 (H, W, 3), found {source.dtype} "
                             f"{source.shape}")  # fmt: skip
        return source
    path = source if isinstance(source, str | Path) else None
    try:
        with Image.open(path, formats=FORMATS) if path else source.copy() as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {LARGEST:,}")
            if min(image.size) < SMALLEST:
                raise ValueError(f"{image.width} x {image.height} pixels, a side has at least "
                                 f"{SMALLEST}")  # fmt: skip
            image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path or source}: {error}") from error


def smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280):
    """(height, width) nearest to the given ones that are multiples of factor and whose product is
    within the limits, at nearly the same aspect ratio. Source: qwen_vl_utils and transformers,
    image_processing_qwen2_vl.smart_resize. ValueError for an aspect ratio above 200."""
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"{width} x {height} pixels: the aspect ratio is above 200")
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
    """Patches (P, C) float32 of an image (H, W, 3) uint8, and its grid (moments, rows, columns).

    H and W are multiples of patch * merge. Patches that become one token (merge x merge) follow one
    another; a patch holds channel, moment, row, column, and a still image is the same at every
    moment. table (3, 256) float32 holds the normalised value of each byte. Looking it up is exact,
    and 0.04 ms for 112 x 112 pixels where transformers takes 0.24.
    """
    h, w = image.shape[0] // patch, image.shape[1] // patch
    blocks = image.reshape(h // merge, merge, patch, w // merge, merge, patch, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, 3, 1, patch * patch)
    index = blocks + np.arange(0, 3 * 256, 256, dtype=np.uint16)[:, None, None]
    return np.repeat(table.take(index), moments, axis=2).reshape(h * w, -1), (1, h, w)


# ---------------------------------------------------------------------------- text and positions

SYSTEM = "You are a helpful assistant."
TAGS = "{} {} and final answer (number) in {} {} tags.".format(*THINK, *ANSWER)
TEMPLATES = {
    "r1v": "{Question}  Output the thinking process in " + TAGS,  # R-1V trains with two blanks
    "r1v_eval": "{Question} First output the thinking process in " + TAGS,  # and evaluates so
    "direct": "{Question} Give only the final answer, in " + " ".join(ANSWER) + " tags.",
}


def mrope_positions(layout: list[int | tuple[int, int, int]]) -> Tensor:
    """M-RoPE positions (3, L): time, height and width of each token (Qwen2-VL, section 2.1).

    layout: in order, n for n text tokens and (moments, rows, columns) for the tokens of an image.
    Text counts on all three axes alike; an image starts where text would have gone on and counts
    each axis by itself; what follows goes on from the largest position so far, plus one.
    """
    blocks, start = [], 0
    for part in layout:
        if isinstance(part, int):
            block = np.broadcast_to(np.arange(part), (3, part))
        else:
            block = np.indices(part).reshape(3, -1)
        blocks.append(block + start)
        start += part if isinstance(part, int) else max(part)
    return torch.from_numpy(np.concatenate(blocks, axis=1))


# ---------------------------------------------------------------------------------------- processor

# Files of a checkpoint that say how text and images become tokens; saved as they were read.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip
# Qwen2-VL's preprocessor_config.json; a checkpoint's own values go before these.
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},  # pixels of an image
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
MARKUP = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# No completion may hold these: they open a turn, or stand for an image that is not there. Other
# special tokens may be sampled, since Qwen2-VL grounds its answers with box and object tokens.
BANNED = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
          "<|video_pad|>")  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """How a checkpoint reads text and images. Make it with Processor.from_pretrained."""

    tokenizer: Tokenizer  # special tokens in the text that it encodes stay text
    template: str  # holds {Question}
    settings: dict  # of preprocessor_config.json, complete
    min_pixels: int
    max_pixels: int
    table: np.ndarray  # (3, 256) float32, see patchify
    stop_ids: list[int]  # end a completion; the first is the chat template's <|im_end|>
    banned_ids: list[int]  # never sampled
    image_id: int
    vocab_size: int  # tokens with a meaning; the model's embedding may have more rows
    files: dict[str, bytes]

    @classmethod
    def from_pretrained(cls, folder, template="r1v", min_pixels=None, max_pixels=None):
        """Reads a Hugging Face folder. template: a name in TEMPLATES, or a text with {Question}.

        min_pixels, max_pixels (of an image, after resizing) go before the folder's. Raises
        ValueError, naming the file, for what is missing or does not fit together.
        """
        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if "tokenizer.json" not in files:
            raise ValueError(f"{folder}: no tokenizer.json; save the tokenizer there with "
                             "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)")
        if "{Question}" not in TEMPLATES.get(template, template):
            raise ValueError(f"template {template!r}: neither a text with {{Question}} nor one of "
                             f"{', '.join(TEMPLATES)}{nearest(template, TEMPLATES)}")
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        tokenizer.encode_special_tokens = True
        for name in MARKUP:
            if tokenizer.token_to_id(name) is None:
                raise ValueError(f"{folder}/tokenizer.json has no {name}: not a Qwen2-VL tokenizer")
        config, image_id = read_json(folder / "config.json"), tokenizer.token_to_id(MARKUP[-1])
        if config.get("image_token_id", image_id) != image_id:
            raise ValueError(f"{folder}: image_token_id is {config['image_token_id']} in "
                             f"config.json, <|image_pad|> is {image_id} in tokenizer.json")
        settings = image_settings(folder, min_pixels, max_pixels)
        if (min_pixels, max_pixels) != (None, None) or "preprocessor_config.json" not in files:
            files["preprocessor_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
            files.pop("processor_config.json", None)  # its copy of the settings would go first
        banned = [tokenizer.token_to_id(name) for name in BANNED]
        return cls(
            tokenizer=tokenizer,
            template=TEMPLATES.get(template, template),
            settings=settings,
            min_pixels=settings["size"]["shortest_edge"],
            max_pixels=settings["size"]["longest_edge"],
            table=byte_table(settings),
            stop_ids=end_tokens(folder, tokenizer, config),
            banned_ids=[i for i in banned if i is not None],
            image_id=image_id,
            vocab_size=tokenizer.get_vocab_size(),
            files=files,
        )

    def save_pretrained(self, folder) -> None:
        """Writes the files that were read, byte for byte; only other pixel limits are written anew.
        transformers loads tokenizer and image processor from them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text: "<|im_end|>" in it is text, not the end of a turn."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of a completion, up to its first stop token."""
        end = next((at for at, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False)

    def read_image(self, source) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Patches (P, C) float32 and grid (1, rows, columns) of a path, PIL image or array."""
        names = "patch_size", "merge_size", "temporal_patch_size"
        patch, merge, moments = (self.settings[name] for name in names)
        image = open_image(source)
        size = smart_resize(*image.shape[:2], patch * merge, self.min_pixels, self.max_pixels)
        if size != image.shape[:2]:
            resized = Image.fromarray(image).resize(size[::-1], self.settings["resample"])
            image = np.asarray(resized)
        return patchify(image, self.table, patch, merge, moments)

    def chat(self, problem: str, images: list[tuple[int, int, int]]) -> list:
        """Qwen2-VL's chat template in pieces: an int is a special token, a str is text and a tuple
        (moments, rows, columns) the tokens of an image. No two texts are neighbours, since they are
        encoded one by one."""
        start, end, before, after = (self.tokenizer.token_to_id(name) for name in MARKUP[:4])
        user = ["user\n" + self.template.replace("{Question}", problem)]
        if images:
            user = ["user\n", *(x for grid in images for x in (before, grid, after))]
            user.append(self.template.replace("{Question}", problem))
        system = [start, f"system\n{SYSTEM}", end, "\n"]
        return [*system, start, *user, end, "\n", start, "assistant\n"]

    def prompt(self, example: Example, max_length: int | None = None) -> Prompt:
        """The prompt of an example: system turn, user turn (images, then text), generation prompt.

        Raises ValueError with the example's row for an image that cannot be read and for a prompt
        of more than max_length tokens, which is never cut.
        """
        try:
            read = [self.read_image(source) for source in example.images]
        except ValueError as error:
            raise ValueError(f"{example.row}: {error}") from error
        merge = self.settings["merge_size"]
        ids, layout, image_at, text = [], [], [], ""
        for piece in self.chat(example.problem, [(t, h // merge, w // merge) for _, (t, h, w) in read]):
            if isinstance(piece, tuple):
                new, shown = [self.image_id] * math.prod(piece), MARKUP[-1]
                image_at += range(len(ids), len(ids) + len(new))
            elif isinstance(piece, int):
                new, shown = [piece], self.tokenizer.id_to_token(piece)
            else:
                new, shown = self.encode(piece), piece
            ids, text = ids + new, text + shown
            layout.append(piece if isinstance(piece, tuple) else len(new))
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"{example.row}: the prompt has {len(ids)} tokens ({len(image_at)} of "
                             f"images), more than {max_length}; it is never cut: allow longer "
                             "prompts or fewer pixels")  # fmt: skip
        none = np.zeros((0, 3 * self.settings["temporal_patch_size"] * self.settings["patch_size"] ** 2))
        return Prompt(
            ids=torch.tensor(ids),
            patches=torch.from_numpy(np.concatenate([p for p, _ in read] or [none.astype(np.float32)])),
            grid=torch.tensor([grid for _, grid in read], dtype=torch.int64).reshape(-1, 3),
            positions=mrope_positions(layout),
            image_at=torch.tensor(image_at, dtype=torch.int64),
            example=example,
            text=text,
        )


def read_json(path: Path) -> dict:
    """A JSON file, or {} where there is none. ValueError names a broken one."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def image_settings(folder: Path, min_pixels: int | None, max_pixels: int | None) -> dict:
    """The folder's preprocessor_config.json, completed. Pixel limits are read under their old names
    (min_pixels, max_pixels) and their new ones (size), and stand under both in what is returned."""
    found = read_json(folder / "preprocessor_config.json")
    found = found or read_json(folder / "processor_config.json").get("image_processor", {})
    size, default = found.get("size") or {}, PREPROCESSOR["size"]
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        told = [found.get(name), size.get(edge), size.get(name), default[edge]]
        given = min_pixels if name == "min_pixels" else max_pixels
        found[name] = next(n for n in [given, *told] if n is not None)
    if not 0 < found["min_pixels"] <= found["max_pixels"]:
        raise ValueError(f"{folder}: min_pixels {found['min_pixels']} must be positive and at most "
                         f"max_pixels {found['max_pixels']}")  # fmt: skip
    limits = {"shortest_edge": found["min_pixels"], "longest_edge": found["max_pixels"]}
    return {**PREPROCESSOR, **found, "size": limits}


def byte_table(settings: dict) -> np.ndarray:
    """(3, 256) float32: what a byte of each channel becomes, rounded where transformers rounds."""
    scale = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    table = np.tile((np.arange(256) * scale).astype(np.float32), (3, 1))
    if settings["do_normalize"]:
        mean, std = (np.float32(settings[name])[:, None] for name in ("image_mean", "image_std"))
        table = (table - mean) / std
    return table


def end_tokens(folder: Path, tokenizer: Tokenizer, config: dict) -> list[int]:
    """Ids that end a completion: <|im_end|>, <|endoftext|>, then any other that the folder's files
    name as eos. Ids that the tokenizer does not have are left out."""
    eos = read_json(folder / "tokenizer_config.json").get("eos_token") or "<|im_end|>"
    names = ["<|im_end|>", "<|endoftext|>", eos["content"] if isinstance(eos, dict) else eos]
    ids = [tokenizer.token_to_id(name) for name in names]
    generation = read_json(folder / "generation_config.json")
    for place in (generation, config, config.get("text_config", {})):
        told = place.get("eos_token_id")
        ids += told if isinstance(told, list) else [told]
    known = [i for i in ids if i is not None and tokenizer.id_to_token(i) is not None]
    return list(dict.fromkeys(known))


# --------------------------------------------------------------------------------- rows of a .jsonl

ALIASES = {
    "problem": ("problem", "question"),
    "solution": ("solution", "ground_truth"),
    "images": ("images", "image", "image_path"),
}


def load_examples(source, images=None, part="train", limit=None, bad_rows="refuse") -> list[Example]:
    """Rows of a .jsonl file, or of an embedded world: the first `limit` of them.

    A row is {"problem", "solution", "images"} or the aliases above; images is a path, a list of
    paths or missing, below the folder `images` (default: the file's). "world:B:n=500:seed=7" is a
    world, see load_world; part is its part where the source does not say. Every row is checked,
    images decoded; bad ones are named with file and row, and refused (ValueError) or with
    bad_rows="skip" left out.
    """
    if str(source).startswith("world:"):
        return load_world(source, part, limit)
    path = Path(source)
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(f"{source}: neither a .jsonl file nor world:A, world:B or world:C")
    base = Path(images or path.parent).resolve()
    lines = path.read_bytes().split(b"\n")
    lines = [(f"{path.name}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()][:limit]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        rows = pool.map(partial(read_row, base=base), lines)
        rows = list(tqdm(rows, f"check {path.name}", len(lines), disable=len(lines) < 1000))
    bad, good = ([r for r in rows if isinstance(r, kind)] for kind in (str, Example))
    told = [*bad[:20], *([f"and {len(bad) - 20} more"] if len(bad) > 20 else [])]
    told = "\n  ".join([f"{path}: {len(bad)} of {len(rows)} rows are bad", *told])
    if not good or bad and bad_rows != "skip":
        raise ValueError(told if bad else f"{path}: no rows")
    if bad:
        print(f"{told}\n  left out", file=sys.stderr)
    return good


def read_row(line: tuple[str, bytes], base: Path) -> Example | str:
    """The example of a (name, JSON) line, or what is wrong with it."""
    row, text = line
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        values = {}
        for key, names in ALIASES.items():
            there = [name for name in names if fields.get(name) is not None]
            if len(there) > 1:
                raise ValueError(f"has {' and '.join(there)}, which mean the same")
            values[key] = fields[there[0]] if there else None
        problem, solution, images = values.values()
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError("no problem (or question)")
        problem.encode()  # a lone surrogate cannot be written in UTF-8
        if isinstance(solution, bool) or not isinstance(solution, str | int | float):
            raise ValueError("no solution (or ground_truth): a text or a number is expected")
        if solution != solution or not gold_answer(str(solution)):
            raise ValueError("the solution is empty")
        images = [] if images is None else images if isinstance(images, list) else [images]
        paths = [find_image(name, base) for name in images]
        for path in paths:
            smart_resize(*open_image(path).shape[:2])
        return Example(problem, str(solution), tuple(paths), str(fields.get("task") or ""), row)
    except (ValueError, OSError, RecursionError) as error:
        return f"{row}: {error}"


def find_image(name, base: Path) -> str:
    """The file `name` below base. A row of a data set may name no other file of the machine."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"image {name!r}: a path is expected")
    if "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"image {name}: must be a path below {base}, no URL, without '..'")
    path = (base / name).resolve()
    if not path.is_relative_to(base):
        raise ValueError(f"image {name}: leads out of {base}")
    if not path.is_file():
        raise ValueError(f"image {path}: no such file")
    return str(path)


# ------------------------------------------------------------------------------------------- worlds

CACHE = Path(__file__).parent / ".cache" / "world"
CHUNK = 64  # scenes that a worker draws at a time
READ = {
    "n": int,
    "seed": int,
    "ask": lambda value: tuple(value.split("+")),
    "objects": lambda value: tuple(int(n) for n in value.split("-", 1)),
    "size": lambda value: tuple(int(n) for n in value.split("x", 1)),
}


def load_world(source: str, part="train", limit=None) -> list[Example]:
    """Questions about the scenes of an embedded world, drawn once and kept under CACHE.

    world:SPLIT, then any of n=1000, seed=0, part=train, objects=3-10, size=112x112 (width x
    height), look=…, shapes=… (see world.make_scenes) and ask=count, each after a comma or a colon.
    ask=count+relation draws a kind for each scene; a kind that a scene does not allow gives way to
    another, and the scene is left out if there is none. B asks for attributes by default: its
    colours are what is new in it.
    """
    split, options = parse_world(source, part)
    kinds, n = options.pop("ask"), options.pop("n")
    scenes, images = draw_world(split, n if limit is None else min(n, limit), options)
    examples = []
    for i, (scene, image) in enumerate(zip(scenes, images)):
        rng = np.random.default_rng([options["seed"], i])
        for kind in rng.permutation(kinds).tolist():
            try:
                asked = world.ask(scene, kind, rng)
            except ValueError:  # nothing in this scene can be asked for so
                continue
            row = f"world:{split}#{i}"
            examples.append(Example(asked["question"], str(asked["answer"]), (image,), kind, row))
            break
    return examples


def parse_world(source: str, part: str) -> tuple[str, dict]:
    """Split and options of "world:A,n=500,seed=7" ("world:A:n=500:seed=7" is the same)."""
    split, *words = re.split("[,:]", source.removeprefix("world:"))
    options = {"n": 1000, "seed": 0, "part": part, "objects": (3, 10), "size": (112, 112),
               "look": None, "shapes": None, "ask": ("attribute" if split == "B" else "count",)}  # fmt: skip
    for word in words:
        key, _, value = word.partition("=")
        if key not in options:
            raise ValueError(f"{source}: no option {key!r}{nearest(key, options)}")
        try:
            options[key] = READ.get(key, str)(value)
        except ValueError as error:
            raise ValueError(f"{source}: {key}={value} cannot be read") from error
    for kind in options["ask"]:
        if kind not in world.KINDS:
            raise ValueError(f"{source}: no question {kind!r}{nearest(kind, world.KINDS)}")
    if options["n"] < 1 or len(options["objects"]) != 2 or len(options["size"]) != 2:
        raise ValueError(f"{source}: needs n of at least 1, objects=3-10, size=112x112")
    return split, options


def draw_world(split: str, n: int, options: dict) -> tuple[list[dict], np.ndarray]:
    """n scenes and their pictures (n, H, W, 3) uint8, mapped from a file that is made when missing.

    The file's name is a hash of the options and of world.py, so a changed world is drawn anew.
    """
    said = json.dumps([split, n, sorted(options.items())]).encode()
    digest = hashlib.sha256(said + Path(world.__file__).read_bytes()).hexdigest()[:16]
    path, told = CACHE / f"{digest}.npy", CACHE / f"{digest}.json"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = CACHE / f"{digest}.{os.getpid()}.part"
        shape = (n, options["size"][1], options["size"][0], 3)
        images = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        scenes = []
        draw = partial(draw_chunk, split=split, n=n, options=options)
        for some, pictures in progress(draw, range(0, n, CHUNK), n):
            images[len(scenes) : len(scenes) + len(some)] = pictures
            scenes += some
        images.flush()
        part.with_suffix(".text").write_text(json.dumps(scenes))
        part.with_suffix(".text").replace(told)
        part.replace(path)  # last: where it is, all is
    return json.loads(told.read_text()), np.asarray(np.load(path, mmap_mode="r"))
