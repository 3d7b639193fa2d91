"""A CLEVR world: scenes, and questions with exact answers. draw.py draws it.

Scenes follow CLEVR's generator (Johnson et al. 2017, image_generation/render_images.py): 3 to 10
objects on a plane, 3 shapes, 8 colours, 2 materials, 2 sizes, never too close, never hidden.
Ours, not CLEVR's: radii are 0.8 and 0.48 instead of 0.7 and 0.35, and the camera zooms until the
objects fill the frame, so that small objects can be told apart at 112 x 112 pixels.
Worlds: splits A and B are CoGenT's (the colours of cubes and cylinders are swapped); C has a
checkered ground and shapes that A and B never show. Questions are CLEVR's functional programs.

    python world.py --out clevr_b --n 100 --split B --size 480x320     # images, scenes, questions
    python world.py --sheet worlds.png                                 # examples of the 3 worlds

K: objects of a scene. Lengths are in CLEVR's units; the world is 6 of them wide.
"""
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import draw
from config import opt, parse
from draw import COLORS, SIZES, render

MATERIALS = ("rubber", "metal")
SHAPES = {"known": ("cube", "sphere", "cylinder"), "unseen": ("cone", "torus"),
          "more": ("cube", "sphere", "cylinder", "barrel", "dome", "bucket")}
ATTRIBUTES = ("size", "color", "material", "shape")
FIRST, SECOND = ("gray", "blue", "brown", "yellow"), ("red", "green", "purple", "cyan")
PALETTES = {"A": {"cube": FIRST, "cylinder": SECOND},            # shapes not named take any colour
            "B": {"cube": SECOND, "cylinder": FIRST}, "C": {}}
PARTS, SPLITS = ("train", "val", "test"), ("A", "B", "C")
LOOKS = ("plain", "varied", "wild", "checker", "tiles")

AREA, MIN_DIST, MARGIN, EPS = 3.0, 0.25, 0.4, 0.2                # as CLEVR
MIN_VISIBLE = 200 / (320 * 240)                                  # share of the picture, as CLEVR
EYE, JITTER = (7.1, -6.7, 5.7), 0.5                              # camera, about CLEVR's


# ---- scenes ----

def make_scenes(n, split="A", seed=0, part="train", objects=(3, 10), size=(112, 112),
                look=None, shapes=None, start=0):
    """n scenes as dicts in CLEVR's JSON, numbers start .. start + n - 1 of (part, seed, split).

    A scene depends on its own number only: not on n, start, or the process that makes it. Parts
    never share random numbers. objects: (fewest, most), each count equally likely. size: (W, H) in
    pixels, to which the camera is fitted and in which pixel_coords, bbox and visible_pixels are.
    look: "plain" (default of A and B), "varied", "wild" (with plaids too), "checker" (default of
    C), "tiles" (a hard checker: twice the contrast, squares as large as objects); the same objects
    stand in the same places under every look. shapes: "known" (default of A and B), "more" (and
    barrels, domes, buckets), "unseen" (C).
    ValueError for a choice that does not exist.
    """
    look = look or ("checker" if split == "C" else "plain")
    shapes = shapes or ("unseen" if split == "C" else "known")
    for name, value, choices in (("part", part, PARTS), ("split", split, SPLITS),
                                 ("look", look, LOOKS), ("shapes", shapes, SHAPES)):
        if value not in choices:
            raise ValueError(f"{name} {value!r}: must be one of {', '.join(choices)}")
    if not 1 <= objects[0] <= objects[1] <= 12:
        raise ValueError(f"objects {tuple(objects)}: needs 1 <= fewest <= most <= 12 (the room)")
    if not (0 <= seed < 2**32 and 0 <= start <= start + n <= 2**32):
        raise ValueError(f"seed {seed}, start {start}, n {n}: must be in 0 .. 2**32 - 1")
    return [make_scene(part, seed, split, index, objects, size, look, shapes)
            for index in range(start, start + n)]


def make_scene(part, seed, split, index, objects, size, look, shapes):
    """One scene; drawn again, as CLEVR does, until nothing collides and all can be seen."""
    words = [PARTS.index(part), seed, SPLITS.index(split), index]
    rng = np.random.default_rng([*words, 0])
    count = rng.integers(objects[0], objects[1] + 1)
    while True:
        eye = np.array(EYE) + rng.uniform(-JITTER, JITTER, 3)
        axes = draw.level_axes(eye)
        things = draw_objects(rng, count, split, shapes)
        spots = place(rng, [SIZES[thing["size"]] for thing in things], axes)
        if spots is None or not any(is_unique(thing, things) for thing in things):
            continue                              # unique: every kind of question can be asked
        for thing, (x, y) in zip(things, spots.tolist()):
            thing["3d_coords"] = [x, y, draw.half_height(thing)]
        camera = draw.fit_camera(eye.tolist(), things, size)
        found = seen(things, camera, size, axes)
        area = min(size[0] * size[1], 4 / 3 * min(size) ** 2)               # of the part in use
        if min(thing["visible_pixels"] for thing in found["objects"]) >= MIN_VISIBLE * area:
            break
    return {"split": split, "image_index": index, **found,
            "image_filename": f"CLEVR_{split}_{part}_{index:06d}.png",
            "look": draw_look(np.random.default_rng([*words, 1]), look),
            "size": list(size), "seed": {"part": part, "seed": seed}}


def seen(things, camera, size, axes):
    """What a camera sees of objects, as CLEVR's JSON has it: the objects with pixel_coords, bbox
    and visible_pixels, what stands where of what, and the camera. axes: of its eye."""
    pixels, boxes = draw.visible(things, camera, size)
    stage = draw.make_stage(things, camera, size)
    right, behind, _ = axes
    names = ("pixel_coords", "bbox", "visible_pixels")
    things = [thing | dict(zip(names, facts)) for thing, *facts in
              zip(things, draw.to_pixels(stage, stage.at).tolist(), boxes, pixels)]
    offset = stage.at[None] @ axes - stage.at[:, None] @ axes               # (K, K, 3): from i to j
    ways = {"left": -right, "right": right, "front": -behind, "behind": behind}
    return {"objects": things, "camera": camera,
            "relationships": {name: [np.flatnonzero(row).tolist() for row in offset @ way > EPS]
                              for name, way in ways.items()},
            "directions": {name: way.tolist() for name, way in ways.items()}}


def draw_objects(rng, count, split, shapes):
    """Shape, size, colour, material and rotation (degrees) of each object, not yet placed."""
    things = []
    for i, j, k, m, turn in rng.random((count, 5)).tolist():
        shape = SHAPES[shapes][int(i * len(SHAPES[shapes]))]
        palette = PALETTES[split].get(shape, tuple(COLORS))
        things.append({"shape": shape, "size": tuple(SIZES)[int(2 * j)],
                       "color": palette[int(k * len(palette))], "material": MATERIALS[int(2 * m)],
                       "rotation": 360 * turn})
    return things


def place(rng, radii, axes):
    """Centres (K, 2) in [-3, 3]^2 that keep MIN_DIST between rims and MARGIN along the camera's
    right and behind (so along all four directions), or None if 400 tries leave one without room."""
    tries = rng.uniform(-AREA, AREA, (400, 2))
    right, behind = np.ascontiguousarray((tries @ axes[:2, :2].T).T)
    room, chosen = np.full(400, np.inf), []       # room: from each try to the nearest rim
    for radius in radii:
        i = int((room >= radius + MIN_DIST).argmax())
        if room[i] < radius + MIN_DIST:
            return None
        chosen.append(i)
        dx, dy = np.abs(right - right[i]), np.abs(behind - behind[i])
        rim = np.where(np.minimum(dx, dy) < MARGIN, -1, np.sqrt(dx * dx + dy * dy) - radius)
        room = np.minimum(room, rim)
    return tries[chosen]


def draw_look(rng, name):
    """Ground, pattern and light, as JSON. light: unit vector to the lamp in the level frame."""
    azimuth, tilt = math.radians(225 + rng.uniform(-12, 12)), math.radians(rng.uniform(36, 44))
    look = {"name": name, "ground": [0.36 * rng.uniform(0.92, 1.08)] * 3, "pattern": "none",
            "waves": [], "contrast": 0.0, "exposure": rng.uniform(0.95, 1.05)}
    if name in ("checker", "tiles"):
        tone, turn, side = rng.uniform(0.9, 1.1), rng.uniform(0, math.pi), rng.uniform(1.1, 1.5)
        side, contrast = (2 * side, 0.22) if name == "checker" else (side, 0.45)
        look.update(ground=[0.50 * tone, 0.36 * tone, 0.22 * tone], pattern="tiles",
                    contrast=contrast,
                    waves=[[math.cos(turn) / side, math.sin(turn) / side, rng.random()],
                           [-math.sin(turn) / side, math.cos(turn) / side, rng.random()]])
    if name in ("varied", "wild"):
        azimuth, tilt = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(20, 55))
        kinds = (("none", 0), ("stripes", 1), ("blotches", 5), ("plaid", 2))
        pattern, count = kinds[rng.integers(3 + (name == "wild"))]
        look.update(ground=(rng.uniform(0.15, 0.6) * rng.uniform(0.7, 1.3, 3)).tolist(),
                    pattern=pattern, contrast=rng.uniform(0.1, 0.5), waves=[
                        [s * math.cos(a), s * math.sin(a), shift] for a, s, shift in
                        rng.uniform((0, 0.1, 0), (2 * math.pi, 0.7, 2), (count, 3)).tolist()],
                    exposure=rng.uniform(0.75, 1.25))
    across, up = math.sin(tilt), math.cos(tilt)
    return {**look, "light": [across * math.cos(azimuth), across * math.sin(azimuth), up]}


# ---- questions ----

COMPARE = {"greater_than": (lambda a, b: a > b, "more {} than {}"),
           "less_than": (lambda a, b: a < b, "fewer {} than {}"),
           "equal_integer": (lambda a, b: a == b, "as many {} as {}")}
WAYS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}
NOUNS = ("item", "object", "thing")
ASK = {"count": ("How many {} are there in the image?", "How many different {} are there in the "
                 "image?", "What number of {} are in the image?"),           # R1-V's, paraphrased
       "attribute": ("How many {} are there?", "How many {} are there in the image?",
                     "What number of {} are in the image?"),
       "relation": ("How many {} are {} the {}?", "What number of {} are {} the {}?"),
       "compare": ("Are there {}?", "Are there {} in the image?")}
KINDS = tuple(ASK)


def execute(program, scene):
    """The answer of a CLEVR program on a scene: an int, "yes" or "no", an attribute, an object's
    number or a list of them. Nodes are {"function", "inputs", "value_inputs"}; inputs are numbers
    of earlier nodes. ValueError if `unique` does not get exactly one object, or a function is
    unknown."""
    things, values = scene["objects"], []
    for node in program:
        name, args = node["function"], [values[i] for i in node["inputs"]]
        if name == "scene":
            value = list(range(len(things)))
        elif name.startswith("filter_"):
            key = name.removeprefix("filter_")
            value = [i for i in args[0] if things[i][key] == node["value_inputs"][0]]
        elif name == "unique":
            if len(args[0]) != 1:
                raise ValueError(f"unique: needs exactly one object, got {len(args[0])}")
            value = args[0][0]
        elif name == "relate":
            value = scene["relationships"][node["value_inputs"][0]][args[0]]
        elif name == "count":
            value = len(args[0])
        elif name == "exist":
            value = "yes" if args[0] else "no"
        elif name.startswith("query_"):
            value = things[args[0]][name.removeprefix("query_")]
        elif name in COMPARE:
            value = "yes" if COMPARE[name][0](*args) else "no"
        else:
            raise ValueError(f"unknown function {name!r}")
        values.append(value)
    return values[-1]


def ask(scene, kind, rng):
    """A question of that kind about the scene: {"question", "program", "answer", "kind"}, drawn
    with the numpy Generator rng. ValueError for an unknown kind, or for "relation" where no
    object of the scene can be told from the others by its attributes."""
    if kind not in ASK:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(ASK)}")
    text, noun, program = pick(ASK[kind], rng), pick(NOUNS, rng), []
    start = step(program, "scene", [])
    if kind == "compare":
        words = [compare(scene, program, noun, rng)]
    elif kind == "relation":
        anchor, way = pick_anchor(scene, rng), pick(WAYS, rng)
        one = step(program, "unique", [filtered(program, start, anchor)])
        wanted = pick_attributes(scene, rng) if rng.random() < 0.5 else {}
        start = step(program, "relate", [one], way)
        words = [phrase(wanted, noun), WAYS[way], phrase(anchor, noun, plural=False)]
    else:
        wanted = pick_attributes(scene, rng) if kind == "attribute" else {}
        words = [phrase(wanted, noun)]
    if kind != "compare":
        step(program, "count", [filtered(program, start, wanted)])
    return {"question": text.format(*words), "program": program,
            "answer": execute(program, scene), "kind": kind}


def compare(scene, program, noun, rng):
    """Append to a program of one node whether there are more, fewer or as many of one as of
    another; in words. Yes and no equally often, as far as 20 tries find them in the scene."""
    hoped, name = pick(("yes", "no"), rng), pick(COMPARE, rng)
    for _ in range(20):
        del program[1:]
        pair = [pick_attributes(scene, rng) for _ in range(2)]
        step(program, name, [step(program, "count", [filtered(program, 0, wanted)])
                             for wanted in pair])
        if pair[0] != pair[1] and execute(program, scene) == hoped:
            break
    return COMPARE[name][1].format(*(phrase(wanted, noun) for wanted in pair))


def step(program, function, inputs, *values):
    """Append a node to a program; its number."""
    program.append({"function": function, "inputs": inputs, "value_inputs": list(values)})
    return len(program) - 1


def filtered(program, start, wanted):
    """Append filters for {attribute: value} after node start; the last node's number."""
    for key, value in wanted.items():
        start = step(program, f"filter_{key}", [start], value)
    return start


def phrase(wanted, noun, plural=True):
    """{"size": "small", "shape": "cube"} in words: small cubes. noun stands in for a shape."""
    last = wanted.get("shape", noun)
    return " ".join([*(wanted[key] for key in ATTRIBUTES[:3] if key in wanted),
                     last + ("es" if last.endswith("s") else "s") * plural])


def pick(options, rng):
    return tuple(options)[rng.integers(len(options))]


def pick_attributes(scene, rng, invent=0.15):
    """One to three attributes {key: value} of an object of the scene or, with probability invent,
    of one that is made up, which mostly makes the answer 0."""
    thing = pick(scene["objects"], rng)
    if rng.random() < invent:
        thing = draw_objects(rng, 1, "C", "known")[0]
    keys = rng.permutation(4)[:1 + (rng.random() < 0.5) + (rng.random() < 0.2)]
    return {key: thing[key] for i, key in enumerate(ATTRIBUTES) if i in keys}


def pick_anchor(scene, rng):
    """Attributes, few, that only one object of the scene has."""
    told = [thing for thing in scene["objects"] if is_unique(thing, scene["objects"])]
    if not told:
        raise ValueError("relation: no object of the scene can be told from the others")
    thing, order = pick(told, rng), [ATTRIBUTES[i] for i in rng.permutation(4)]
    keys = next(order[:n] for n in range(1, 5) if is_unique(thing, scene["objects"], order[:n]))
    return {key: thing[key] for key in ATTRIBUTES if key in keys}


def is_unique(thing, things, keys=ATTRIBUTES):
    """Whether no other object has the same attributes."""
    return sum(all(other[key] == thing[key] for key in keys) for other in things) == 1


# ---- files ----

@dataclass(frozen=True)
class Config:
    """Keys of the command line."""

    out: str | None = opt(None, "folder for images/, scenes.json and questions.json")
    sheet: str | None = opt(None, "PNG file for a sheet of examples of the three worlds")
    n: int = opt(100, "number of scenes", least=1)
    split: str = opt("A", "CoGenT A or B, or the third world", choices=SPLITS)
    part: str = opt("train", "parts never share a scene", choices=PARTS)
    seed: int = opt(0, "another seed, other scenes", least=0, below=2**32)
    size: str = opt("112x112", "width x height of the pictures in pixels")
    objects: tuple[int, ...] = opt((3, 10), "fewest and most objects", least=1, most=12)
    look: str | None = opt(None, "ground and light; none: the split's own", choices=LOOKS)
    shapes: str | None = opt(None, "none: the split's own", choices=tuple(SHAPES))
    kinds: tuple[str, ...] = opt(KINDS, "kinds of questions, one of each per scene", choices=KINDS)

    def check(self):
        """Rules over several keys."""
        if not self.out and not self.sheet:
            raise ValueError("--out FOLDER or --sheet FILE: one of them is needed")
        if len(self.objects) != 2 or self.objects[0] > self.objects[1]:
            raise ValueError(f"--objects {self.objects}: two numbers, fewest,most")
        pixels = self.size.split("x")
        if len(pixels) != 2 or not all(p.isdecimal() and 16 <= int(p) <= 4096 for p in pixels):
            raise ValueError(f"--size {self.size}: WIDTHxHEIGHT, each 16 to 4096 pixels")


def write(cfg):
    """Write cfg.n pictures, their scenes and their questions under cfg.out, laid out as CLEVR."""
    out, size, scenes, questions = Path(cfg.out), tuple(map(int, cfg.size.split("x"))), [], []
    (out / "images").mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(cfg.n), desc=f"drawing to {out}"):
        scene, = make_scenes(1, cfg.split, cfg.seed, cfg.part, cfg.objects, size, cfg.look,
                             cfg.shapes, start=index)
        name = {key: scene[key] for key in ("split", "image_index", "image_filename")}
        Image.fromarray(render([scene], size)[0]).save(out / "images" / scene["image_filename"])
        rng = np.random.default_rng([cfg.seed, index])
        questions += [{"question_index": len(questions) + i, **name, **ask(scene, kind, rng)}
                      for i, kind in enumerate(cfg.kinds)]
        scenes.append(scene)
    for name, rows in (("scenes", scenes), ("questions", questions)):
        (out / f"{name}.json").write_text(json.dumps({name: rows}) + "\n")


def sheet(path, side=224, columns=6):
    """Save a PNG with a row of pictures for each split, a question and its answer under each."""
    page = Image.new("RGB", (columns * (side + 8) + 8, len(SPLITS) * (side + 62) + 8), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for row, split in enumerate(SPLITS):
        scenes, rng = make_scenes(columns, split, size=(side, side)), np.random.default_rng(row)
        for column, (scene, picture) in enumerate(zip(scenes, render(scenes, (side, side)))):
            x, y = 8 + column * (side + 8), 8 + row * (side + 62)
            asked = ask(scene, KINDS[column % len(KINDS)], rng)
            page.paste(Image.fromarray(picture), (x, y))
            lines = textwrap.wrap(f"{split}: {asked['question']} {asked['answer']}", 34)
            pen.multiline_text((x, y + side + 2), "\n".join(lines), "black", font, spacing=2)
    page.save(path)


def main():
    cfg = parse(Config, doc=__doc__)
    if cfg.sheet:
        sheet(cfg.sheet)
    if cfg.out:
        write(cfg)


if __name__ == "__main__":
    main()
