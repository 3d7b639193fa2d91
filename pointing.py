"""Where things are, and what has changed: questions about scenes whose answers are boxes, or words.

    rec         "Where is the small red thing behind the sphere?"        one box
    detect      "Find all metal cubes."                                  boxes with labels, or None
    difference  two pictures: "… added, removed or moved?"               one of four words
    choice      "What color is the large cube? (A) red (B) gray …"       a letter
    yes_no      "Is there a red cube to the left of the sphere?" …       yes or no

They are the tasks of VLM-R1 (referring expressions, open-vocabulary detection, defects between two
screenshots) and of visual question answering in general, with exact and free answers. Boxes are
[x1, y1, x2, y2] in pixels of the picture, lower and right edge one past the last pixel that shows
the object; what hides of it is not in its box. Programs are world.py's, on the same scenes.
"""

import json

import numpy as np

import draw
import world
from world import ATTRIBUTES, MATERIALS, WAYS, execute, filtered, phrase, pick, step

WHERE = ("Where is the {}?", "Point at the {}.", "Show me the {}.")
FIND = ("Find all {}.", "Detect all {}.", "Where are the {}?")
CHANGES = ("added", "removed", "moved", "nothing")
CHANGED = ("Here are two images. From the first to the second, was an object added, removed or "
           "moved, or is nothing different? Answer with added, removed, moved or nothing.")
WHAT = {"color": "What color is the {}?", "shape": "What shape is the {}?",
        "material": "What is the {} made of?", "size": "What size is the {}?"}
VALUES = {"color": tuple(draw.COLORS), "shape": world.SHAPES["known"], "material": MATERIALS,
          "size": tuple(draw.SIZES)}
LETTERS = "ABCD"


def rec(scene, rng):
    """One object, told by its attributes or, one time in three, by where it stands."""
    things, program = scene["objects"], []
    start = step(program, "scene", [])
    if rng.random() < 1 / 3 and (found := related(scene, rng)):
        wanted, way, anchor = found
        one = step(program, "unique", [filtered(program, start, anchor)])
        start = step(program, "relate", [one], way)
        words = f"{phrase(wanted, 'thing', False)} {WAYS[way]} the {phrase(anchor, 'thing', False)}"
    else:
        wanted = world.pick_anchor(scene, rng)
        words = phrase(wanted, "thing", plural=False)
    step(program, "unique", [filtered(program, start, wanted)])
    box = things[execute(program, scene)]["bbox"]
    return {"question": pick(WHERE, rng).format(words), "program": program,
            "answer": json.dumps(box), "said": words}


def related(scene, rng, tries=20):
    """(attributes, way, attributes of an anchor) that tell one object only by their sum, or None
    where some tries find nothing."""
    for _ in range(tries):
        anchor, way = world.pick_anchor(scene, rng), pick(WAYS, rng)
        wanted = {key: pick(scene["objects"], rng)[key] for key in [pick(ATTRIBUTES, rng)]}
        program = []
        one = step(program, "unique", [filtered(program, step(program, "scene", []), anchor)])
        last = filtered(program, step(program, "relate", [one], way), wanted)
        if len(execute(program[: last + 1], scene)) == 1:
            return wanted, way, anchor
    return None


def detect(scene, rng):
    """All objects of a kind, from left to right; one time in seven or so there is none."""
    wanted, program = world.pick_attributes(scene, rng), []
    filtered(program, step(program, "scene", []), wanted)
    found = sorted(scene["objects"][i]["bbox"] for i in execute(program, scene))
    label = phrase(wanted, "thing", plural=False)
    boxes = [{"bbox_2d": box, "label": label} for box in found]
    return {"question": pick(FIND, rng).format(phrase(wanted, "thing")), "program": program,
            "answer": json.dumps(boxes) if boxes else "None", "said": label}


def choice(scene, rng):
    """An attribute of one object, told by its others; the answer is the letter of an option."""
    key = pick(ATTRIBUTES, rng)
    thing, told = told_without(scene, key, rng)
    others = [v for v in rng.permutation(VALUES[key]).tolist() if v != thing[key]]
    options = rng.permutation([thing[key], *others[:len(LETTERS) - 1]]).tolist()
    listed = " ".join(f"({letter}) {value}" for letter, value in zip(LETTERS, options))
    words, program = phrase(told, "thing", plural=False), []
    one = step(program, "unique", [filtered(program, step(program, "scene", []), told)])
    step(program, f"query_{key}", [one])
    return {"question": f"{WHAT[key].format(words)} {listed}", "program": program,
            "answer": LETTERS[options.index(thing[key])], "said": words}


def told_without(scene, key, rng):
    """An object and attributes {key: value}, not the given one, that only it has. ValueError where
    there is none."""
    keys = [k for k in rng.permutation(ATTRIBUTES).tolist() if k != key]
    for n in (1, 2, 3):
        for thing in rng.permutation(scene["objects"]):
            if world.is_unique(thing, scene["objects"], keys[:n]):
                return thing, {k: thing[k] for k in ATTRIBUTES if k in keys[:n]}
    raise ValueError(f"choice: no object of the scene can be told without its {key}")


def yes_no(scene, rng):
    """Whether there is an object of a kind; yes and no equally often, as far as 20 tries go."""
    hoped = pick(("yes", "no"), rng)
    for _ in range(20):
        wanted, program = world.pick_attributes(scene, rng, invent=0.5), []
        step(program, "exist", [filtered(program, step(program, "scene", []), wanted)])
        if (answer := execute(program, scene)) == hoped:
            break
    words = phrase(wanted, "thing", plural=False)
    return {"question": f"Is there a {words} in the image?", "program": program, "answer": answer,
            "said": words}


def difference(scene, rng):
    """What happened between the two pictures of a scene that `changed` made."""
    return {"question": CHANGED, "program": [], "answer": scene["change"]["word"], "said": ""}


KINDS = {kind.__name__: kind for kind in (rec, detect, choice, yes_no, difference)}


# ---- two pictures ----

def changed(scene, rng):
    """The scene with an object added, removed or moved, or nothing: (before, after), both seen by
    one camera; before["change"] says the word and what it happened to. Each word is as likely; but
    a lonely object only moves, or does not."""
    word, things, size = pick(CHANGES, rng), scene["objects"], tuple(scene["size"])
    eye, k = scene["camera"]["eye"], int(rng.integers(len(things)))
    axes = draw.level_axes(np.array(eye))
    new = dict(things[k])
    if len(things) == 1 and word in ("added", "removed"):  # one picture would be empty
        word = "moved"
    if word == "moved":
        spot = free_spot(things, k, axes, rng)
        word = "nothing" if spot is None else word
        new["3d_coords"] = new["3d_coords"] if spot is None else [*spot, new["3d_coords"][2]]
    camera = draw.fit_camera(eye, [*things, new], size)
    rest = things[:k] + things[k + 1:]
    pair = {"added": (rest, things), "removed": (things, rest), "nothing": (things, things),
            "moved": (things, [*things[:k], new, *things[k + 1:]])}[word]
    before, after = ({**scene, **world.seen(some, camera, size, axes)} for some in pair)
    thing = {key: new[key] for key in ATTRIBUTES} if word != "nothing" else None
    return {**before, "change": {"word": word, "thing": thing}}, after


def free_spot(things, k, axes, rng, far=1.5):
    """Another place [x, y] on the plane for object k, at least `far` from its old one and as clear
    of the others as world.place keeps them; None if 400 tries find none."""
    at = np.array([thing["3d_coords"][:2] for thing in things])
    radii = np.array([draw.SIZES[thing["size"]] for thing in things])
    tries = rng.uniform(-world.AREA, world.AREA, (400, 2))
    apart = np.hypot(*(tries[:, None] - at).transpose(2, 0, 1))          # (400, K)
    aside = np.abs((tries[:, None] - at) @ axes[:2, :2]).min(-1)
    free = (apart - radii - radii[k] >= world.MIN_DIST) & (aside >= world.MARGIN)
    free[:, k] = apart[:, k] >= far
    good = np.flatnonzero(free.all(1))
    return tries[good[0]].tolist() if len(good) else None
