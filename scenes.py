"""The embedded worlds as data sets: questions about scenes that are drawn once and kept.

    load_world("world:A,n=500,seed=7,ask=count+relation")   # drawn once, then kept in .cache/world
    load_world("world:A,ask=rec+detect+difference")         # boxes, and two pictures
    load_world("world:A,ask=judge+read,teacher=listed")     # with an answer to learn

world.py, pointing.py and forms.py make scenes, pictures and questions; here they become examples.
The pictures are mapped from a file, so that a world of many thousands takes no memory.
"""

import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

import forms
import pointing
import world
from config import nearest
from example import Example
from images import check_size
from shards import alone, digest

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
    its colours are what is new in it. Of "difference" a row has two pictures, of "read" none.
    teacher=… (forms.TEACHERS) adds what he answers, which supervised training then learns; with
    keep=right rows that he answers wrongly are left out.
    """
    split, n, kinds, teacher, keep, options = parse_world(source, part)
    pairs = "difference" in kinds
    scenes, images = draw_world(split, n if limit is None else min(n, limit), options, pairs)
    examples = []
    for i, (scene, shown) in enumerate(zip(scenes, images)):
        rng = np.random.default_rng([options["seed"], i])
        for kind in rng.permutation(kinds).tolist():
            try:
                asked = question(scene, kind, rng)
            except ValueError:  # "relation", and no object that can be told from the others
                continue
            row, pictures = f"world:{split}#{i}", 2 if kind == "difference" else 1
            shown = () if kind in forms.TEXT_ONLY else tuple(shown[:pictures])
            extra = {"scene": scene, **{k: asked[k] for k in ("program", "said") if k in asked}}
            right = True
            if teacher:
                extra["completion"], right = forms.teach(teacher, scene, asked, rng)
            if right or keep == "all":
                answer = str(asked["answer"])
                examples.append(Example(asked["question"], answer, shown, kind, row, extra))
            break
    return examples


def question(scene: dict, kind: str, rng) -> dict:
    """{"question", "answer", "program"} of any file; ValueError where it cannot be asked."""
    asks = {**pointing.KINDS, **forms.KINDS}
    return asks[kind](scene, rng) if kind in asks else world.ask(scene, kind, rng)


def parse_world(source: str, part: str) -> tuple:
    """Split, n, kinds of question, teacher, keep, and a dict of make_scenes' options.
    "world:A,n=500,seed=7" and "world:A:n=500:seed=7" are the same; the second also fits where a
    comma ends a list item."""
    split, *words = re.split("[,:]", source.removeprefix("world:"))
    options = {"n": 1000, "ask": ("attribute" if split == "B" else "count",), "seed": 0}
    options |= {"part": part, "objects": (3, 10), "size": (112, 112), "look": None, "shapes": None}
    options |= {"teacher": None, "keep": "all"}
    keys = [word.partition("=")[0] for word in words]
    for key, equals, value in (word.partition("=") for word in words):
        if keys.count(key) > 1:
            raise ValueError(f"{source}: {key} is given twice")
        if key not in options:
            raise ValueError(f"{source}: no option {key!r} among {', '.join(options)}"
                             f"{nearest(key, options)}")
        try:
            options[key] = READ.get(key, str)(value)
        except ValueError as error:
            raise ValueError(f"{source}: cannot read {key}{equals}{value}") from error
    for kind in options["ask"]:
        if kind not in (known := (*world.ASK, *pointing.KINDS, *forms.KINDS)):
            raise ValueError(f"{source}: no question {kind!r}{nearest(kind, known)}")
    teacher, keep, kinds = (options.pop(key) for key in ("teacher", "keep", "ask"))
    taught = ("count", "attribute", *forms.KINDS)
    if teacher and (teacher not in forms.TEACHERS or {*kinds} - {*taught}):
        raise ValueError(f"{source}: no teacher {teacher!r} who answers {'+'.join(kinds)}; there "
                         f"are {', '.join(forms.TEACHERS)}, for {', '.join(taught)}")
    if keep not in ("all", "right") or (keep == "right" and not teacher):
        raise ValueError(f"{source}: keep is all, or right where there is a teacher")
    if options["n"] < 1 or len(options["objects"]) != 2 or len(options["size"]) != 2:
        raise ValueError(f"{source}: expected n of 1 or more, objects=3-10, size=112x112")
    check_size(source, *options["size"])
    return split, options.pop("n"), kinds, teacher, keep, options


def draw_world(split: str, n: int, options: dict, pairs=False) -> tuple[list[dict], np.ndarray]:
    """n scenes and their pictures (n, 1, H, W, 3) uint8, mapped from a file that is drawn if
    missing. pairs: two pictures each, before and after something has changed, or not.

    The file is named by a hash of the options, world.py and draw.py, with pairs also pointing.py: a
    changed world is drawn anew. Of several processes that want it one draws it, the others wait.
    """
    code = [Path(module.__file__).read_bytes()
            for module in (world, world.draw, *[pointing] * pairs)]  # fmt: skip
    name = digest(json.dumps([split, n, sorted(options.items()), pairs]), *code)
    path, told = CACHE / f"{name}.npy", CACHE / f"{name}.json"
    if not path.is_file():
        world.make_scenes(0, split, **options)  # a wrong option is told before any process starts
        with alone(path):
            if not path.is_file():
                write_world(path, told, split, n, options, pairs)
    return json.loads(told.read_bytes()), np.asarray(np.load(path, mmap_mode="r"))


def write_world(path: Path, told: Path, split: str, n: int, options: dict, pairs: bool) -> None:
    """Draws a world to `path`, its scenes to `told`; in a temporary folder first, so that they are
    whole where they are."""
    with TemporaryDirectory(dir=CACHE) as folder:
        new, text = Path(folder, path.name), Path(folder, told.name)
        shape = (n, 1 + pairs, options["size"][1], options["size"][0], 3)
        images, scenes = np.lib.format.open_memmap(new, "w+", np.uint8, shape), []
        for some, pictures in drawn(split, n, options, pairs):
            images[len(scenes) : len(scenes) + len(some)] = pictures
            scenes += some
        images.flush()
        text.write_text(json.dumps(scenes), encoding="utf-8")
        text.replace(told)
        new.replace(path)  # last, since it is what is looked for


def drawn(split: str, n: int, options: dict, pairs: bool):
    """Chunks of draw_chunk in order: from this process if n is small, else from worker processes
    (spawned: a fork after torch has run threads hangs)."""
    draw, starts = partial(draw_chunk, split, n, options, pairs), range(0, n, CHUNK)
    workers = os.cpu_count() or 1
    if n < FEW or workers == 1:
        yield from map(draw, starts)
        return
    with ProcessPoolExecutor(min(8, workers), multiprocessing.get_context("spawn")) as pool:
        chunks, title = pool.map(draw, starts), f"draw world {split}"
        yield from tqdm(chunks, title, len(starts), unit="scene", unit_scale=CHUNK, leave=False)


def draw_chunk(split: str, n: int, options: dict, pairs: bool, start: int):
    """Scenes start ... start + CHUNK - 1 of the n, and their pictures (CHUNK, 1, H, W, 3) uint8, or
    (CHUNK, 2, H, W, 3) of pairs."""
    scenes = world.make_scenes(min(CHUNK, n - start), split, **options, start=start)
    if not pairs:
        return scenes, world.render(scenes, options["size"])[:, None]
    both = [pointing.changed(scene, np.random.default_rng([options["seed"], start + i, 2]))
            for i, scene in enumerate(scenes)]  # fmt: skip
    pictures = [world.render(some, options["size"]) for some in zip(*both)]
    return [before for before, _ in both], np.stack(pictures, 1)
