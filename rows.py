"""From a row of any data set to an example: .jsonl files, and scenes of the embedded worlds.

    load_examples("train.jsonl", images="pictures")            # {"problem", "solution", "images"}
    load_examples("world:A,n=500,seed=7,ask=count+relation")   # drawn once, then kept in .cache

A row that cannot be used is found before the run starts, not at step 400: every row is read and
every image decoded, and what is wrong is told with file and row. A row may name images below one
folder only; nothing is fetched, and only decoders that run no other program are used.
"""

import hashlib
import json
import multiprocessing
import os
import re
import struct
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

import world
from config import nearest
from rewards import gold_answer


@dataclass(frozen=True)
class Example:
    """A row of a data set. images: paths, PIL images or uint8 arrays (H, W, 3).

    extra holds what else the row has, for rewards of one's own: the other keys of a JSON row; the
    "scene" and the "program" of a world's question.
    """

    problem: str
    solution: str
    images: tuple = field(default=(), repr=False)
    task: str = ""
    row: str = ""  # where it came from: "train.jsonl:12", "world:A#7"
    extra: dict = field(default_factory=dict, repr=False, compare=False)


# ------------------------------------------------------------------------------------------- images

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS: it calls Ghostscript
LARGEST = 89_478_485  # pixels; where PIL begins to warn of a decompression bomb
SMALLEST = 4  # pixels a side; transformers would blow up a single pixel to 56 x 56
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)


def open_image(source) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a path, a PIL image or such an array.

    Transparency is laid on white and other modes are PIL's convert("RGB"), as in transformers 5.
    EXIF orientation is applied, which transformers does only to files that it opens itself.
    ValueError for a file that is damaged or no picture, and for a size above LARGEST, below
    SMALLEST, or with a side over 200 times the other (Qwen's rule).
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            found = f"{source.dtype} {source.shape}"
            raise ValueError(f"image array: expected uint8 (H, W, 3), found {found}")
        check_size("image array", source.shape[1], source.shape[0])
        return source
    is_file = isinstance(source, str | Path)
    try:
        with Image.open(source, formats=FORMATS) if is_file else source.copy() as image:
            check_size("it", *image.size)
            image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"image {source}: {error}") from error


def check_size(name: str, width: int, height: int) -> None:
    """Raises ValueError for a picture of `name` whose size is refused, see open_image."""
    if width * height > LARGEST or min(width, height) < SMALLEST:
        raise ValueError(f"{name} has {width} x {height} pixels; at least {SMALLEST} a side and at "
                         f"most {LARGEST:,} in all are accepted")
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"{name} has {width} x {height} pixels, an aspect ratio above 200")


# --------------------------------------------------------------------------------- rows of a .jsonl

ALIASES = {
    "problem": ("problem", "question"),
    "solution": ("solution", "ground_truth"),
    "images": ("images", "image", "image_path"),
}


def load_examples(
    source: str,
    images: str | None = None,
    part: str = "train",
    limit: int | None = None,
    bad_rows: str = "refuse",
) -> list[Example]:
    """The first `limit` rows of a .jsonl file, or of a world (see load_world; part is its part).

    A row is {"problem", "solution", "images"} or the aliases above; images is a path, a list of
    paths or missing, below the folder `images` (default: the file's). A solution is a text or a
    number. Bad rows raise one ValueError that names them; bad_rows="skip" leaves them out and says
    so on stderr.
    """
    if bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows {bad_rows!r}: must be refuse or skip")
    if str(source).startswith("world:"):
        return load_world(str(source), part, limit)
    path = Path(source)
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(f"{source}: neither a .jsonl file nor world:A, world:B or world:C")
    base = Path(images or path.parent).resolve()
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    lines = [(f"{path.name}:{n}", line) for n, line in lines if line.strip()][:limit]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        rows = pool.map(partial(read_row, base=base), lines)
        rows = list(tqdm(rows, f"check {path.name}", len(lines), disable=len(lines) < 1000))
    bad, good = ([row for row in rows if isinstance(row, kind)] for kind in (str, Example))
    told = [f"{path}: {len(bad)} of {len(rows)} rows are bad", *bad[:20]]
    told = "\n  ".join(told + [f"and {len(bad) - 20} more"] * (len(bad) > 20))
    if bad and (bad_rows == "refuse" or not good):
        raise ValueError(told)
    if not good:
        raise ValueError(f"{path}: no rows")
    if bad:
        print(f"{told}\n  and left out", file=sys.stderr)
    return good


def read_row(line: tuple[str, bytes], base: Path) -> Example | str:
    """The example of a (row, JSON) line, or what is wrong with it."""
    row, text = line
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        problem, solution, images = (pick(fields, names) for names in ALIASES.values())
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError("no problem (or question)")
        problem.encode()  # raises for half a surrogate pair, which no tokenizer takes
        if isinstance(solution, bool) or not isinstance(solution, str | int | float):
            raise ValueError("no solution (or ground_truth): a text or a number is expected")
        if solution != solution or not gold_answer(str(solution)):
            raise ValueError("the solution is empty")
        images = [] if images is None else images if isinstance(images, list) else [images]
        paths = tuple(find_image(name, base) for name in images)
        for path in paths:
            open_image(path)
        known = {name for names in ALIASES.values() for name in names}
        extra = {key: value for key, value in fields.items() if key not in known}
        return Example(problem, str(solution), paths, str(fields.get("task") or ""), row, extra)
    except (ValueError, OSError, RecursionError) as error:
        return f"{row}: {error}"


def pick(fields: dict, names: tuple[str, ...]):
    """The one field that has one of the names, or None."""
    there = [name for name in names if fields.get(name) is not None]
    if len(there) > 1:
        raise ValueError(f"has {' and '.join(there)}, which mean the same")
    return fields[there[0]] if there else None


def find_image(name, base: Path) -> str:
    """The file `name` below base. A row of a data set may open no other file of the machine."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"image {name!r}: a path is expected")
    if "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"image {name}: must be a path below {base}, no URL, without '..'")
    path = (base / name).resolve()
    if not path.is_relative_to(base):
        raise ValueError(f"image {name}: a link that leads out of {base}")
    if not path.is_file():
        raise ValueError(f"image {path}: no such file")
    return str(path)


# ------------------------------------------------------------------------------------------- worlds

CACHE = Path(__file__).resolve().parent / ".cache" / "world"
CHUNK = 64  # scenes that a worker draws at a time
FEW = 500  # scenes that are drawn before worker processes would have started
READ = {
    "n": int,
    "seed": int,
    "ask": lambda value: tuple(value.split("+")),
    "objects": lambda value: tuple(int(n) for n in value.split("-")),
    "size": lambda value: tuple(int(n) for n in value.split("x")),
}


def load_world(source: str, part: str = "train", limit: int | None = None) -> list[Example]:
    """Questions about the scenes of an embedded world, whose pictures are kept under CACHE.

    world:SPLIT and any of n=1000, seed=0, part=train, objects=3-10, size=112x112 (width x height),
    look=…, shapes=… (see world.make_scenes), ask=count, each after a comma or a colon. With
    ask=count+relation a kind is drawn for each scene; where it cannot be asked another one is, and
    a scene of which nothing can be asked is left out. B asks for attributes if ask is not given:
    its colours are what is new in it.
    """
    split, n, kinds, options = parse_world(source, part)
    scenes, images = draw_world(split, n if limit is None else min(n, limit), options)
    examples = []
    for i, (scene, image) in enumerate(zip(scenes, images)):
        rng = np.random.default_rng([options["seed"], i])
        for kind in rng.permutation(kinds).tolist():
            try:
                asked = world.ask(scene, kind, rng)
            except ValueError:  # "relation", and no object that can be told from the others
                continue
            row = f"world:{split}#{i}"
            extra = {"scene": scene, "program": asked["program"]}
            answer = str(asked["answer"])
            examples.append(Example(asked["question"], answer, (image,), kind, row, extra))
            break
    return examples


def parse_world(source: str, part: str) -> tuple[str, int, tuple[str, ...], dict]:
    """Split, n, kinds of question and options of make_scenes. "world:A,n=500,seed=7" and
    "world:A:n=500:seed=7" are the same; the second also fits where a comma ends a list item."""
    split, *words = re.split("[,:]", source.removeprefix("world:"))
    options = {"n": 1000, "ask": ("attribute" if split == "B" else "count",), "seed": 0}
    options |= {"part": part, "objects": (3, 10), "size": (112, 112), "look": None, "shapes": None}
    keys = [word.partition("=")[0] for word in words]
    for key, equals, value in (word.partition("=") for word in words):
        if keys.count(key) > 1:
            raise ValueError(f"{source}: {key} is given twice")
        if key not in options:
            raise ValueError(f"{source}: no option {key!r}{nearest(key, options)}")
        try:
            options[key] = READ.get(key, str)(value)
        except ValueError as error:
            raise ValueError(f"{source}: cannot read {key}{equals}{value}") from error
    for kind in options["ask"]:
        if kind not in world.ASK:
            raise ValueError(f"{source}: no question {kind!r}{nearest(kind, world.ASK)}")
    if options["n"] < 1 or len(options["objects"]) != 2 or len(options["size"]) != 2:
        raise ValueError(f"{source}: expected n of 1 or more, objects=3-10, size=112x112")
    check_size(source, *options["size"])
    return split, options.pop("n"), options.pop("ask"), options


def draw_world(split: str, n: int, options: dict) -> tuple[list[dict], np.ndarray]:
    """n scenes and their pictures (n, H, W, 3) uint8, mapped from a file that is drawn if missing.

    The file is named by a hash of the options, world.py and draw.py: a changed world is drawn anew.
    It is written in a temporary folder, so that it is whole where it is, and two runs do not
    collide.
    """
    said = [json.dumps([split, n, sorted(options.items())]).encode()]
    said += [Path(module.__file__).read_bytes() for module in (world, world.draw)]
    name = hashlib.sha256(b"\0".join(said)).hexdigest()[:16]
    path, told = CACHE / f"{name}.npy", CACHE / f"{name}.json"
    if not path.is_file():
        world.make_scenes(0, split, **options)  # a wrong option is told before any process starts
        CACHE.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=CACHE) as folder:
            new, text = Path(folder, path.name), Path(folder, told.name)
            shape = (n, options["size"][1], options["size"][0], 3)
            images, scenes = np.lib.format.open_memmap(new, "w+", np.uint8, shape), []
            for some, pictures in drawn(split, n, options):
                images[len(scenes) : len(scenes) + len(some)] = pictures
                scenes += some
            images.flush()
            text.write_text(json.dumps(scenes), encoding="utf-8")
            text.replace(told)
            new.replace(path)  # last, since it is what is looked for
    return json.loads(told.read_bytes()), np.asarray(np.load(path, mmap_mode="r"))


def drawn(split: str, n: int, options: dict):
    """Chunks of draw_chunk in order: from this process if n is small, else from worker processes
    (spawned: a fork after torch has run threads hangs)."""
    draw, starts = partial(draw_chunk, split, n, options), range(0, n, CHUNK)
    workers = os.cpu_count() or 1
    if n < FEW or workers == 1:
        yield from map(draw, starts)
        return
    with ProcessPoolExecutor(min(8, workers), multiprocessing.get_context("spawn")) as pool:
        chunks, title = pool.map(draw, starts), f"draw world {split}"
        yield from tqdm(chunks, title, len(starts), unit="scene", unit_scale=CHUNK, leave=False)


def draw_chunk(split: str, n: int, options: dict, start: int) -> tuple[list[dict], np.ndarray]:
    """Scenes start ... start + CHUNK - 1 of the n, and their pictures (CHUNK, H, W, 3) uint8."""
    scenes = world.make_scenes(min(CHUNK, n - start), split, **options, start=start)
    return scenes, world.render(scenes, options["size"])
