"""A CLEVR world: scenes, a renderer and questions with exact answers, in numpy.

Scenes follow CLEVR's generator (Johnson et al. 2017, image_generation/render_images.py): 3 to 10
objects on a plane, 3 shapes, 8 colours, 2 materials, 2 sizes, never too close, never hidden. Where
CLEVR calls Blender we cast rays ourselves: 2 x 2 rays a pixel, each object tried only inside its
screen box, soft shadows in closed form. That draws hundreds of pictures a second on one core.

Ours, not CLEVR's: radii are 0.8 and 0.48 instead of 0.7 and 0.35, and the camera zooms until the
objects fill the frame, so that small objects can still be told apart at 112 x 112 pixels. No two
sizes of picture share a frame: `make_scenes(size=...)` fits the camera to that size's aspect.

Worlds: splits A and B are CoGenT's (the colours of cubes and cylinders are swapped); C has
checkered ground and shapes that A and B never show. Questions are CLEVR's functional programs.

    python world.py --out clevr_b --n 100 --split B --size 480x320     # images, scenes, questions
    python world.py --sheet worlds.png                                 # examples of the 3 worlds

Letters: H, W picture height and width; N rays; K objects. Axes: x, y ground, z up, as in CLEVR.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from config import opt, parse

COLORS = {"gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215),
          "green": (29, 105, 20), "brown": (129, 74, 25), "purple": (129, 38, 192),
          "cyan": (41, 208, 208), "yellow": (255, 238, 51)}      # CLEVR's properties.json
SIZES = {"large": 0.8, "small": 0.48}                            # radius; CLEVR 0.7 and 0.35
MATERIALS = ("rubber", "metal")
SHAPES = {"known": ("cube", "sphere", "cylinder"), "unseen": ("cone", "torus")}
FIRST, SECOND = ("gray", "blue", "brown", "yellow"), ("red", "green", "purple", "cyan")
PALETTES = {"A": {"cube": FIRST, "cylinder": SECOND},            # shapes not named take any colour
            "B": {"cube": SECOND, "cylinder": FIRST}, "C": {}}
PARTS, SPLITS, LOOKS = ("train", "val", "test"), ("A", "B", "C"), ("plain", "varied", "tiles")
KINDS = ("count", "attribute", "relation", "compare")

AREA, MIN_DIST, MARGIN, EPS = 3.0, 0.25, 0.4, 0.2                # as CLEVR, in its units
MIN_VISIBLE = 200 / (320 * 240)                                  # share of the picture, as CLEVR
EYE, TARGET, JITTER = (7.1, -6.7, 5.7), (0.0, 0.0, 0.4), 0.5     # camera
MAX_ZOOM, FRAME = 3.1, 0.97                                      # 1 / tan(half view); filled share
MINOR = 0.32                                                     # torus: tube radius / outer radius
F = np.float32


# ---- scenes ----

def make_scenes(n, split="A", seed=0, part="train", objects=(3, 10), size=(112, 112),
                look=None, shapes=None, start=0):
    """n scenes as dicts in CLEVR's JSON, numbers start .. start + n - 1 of (part, seed, split).

    A scene depends on its own number only: not on n, start, or the process that makes it. Parts
    never share random numbers. objects: (fewest, most), each count equally likely. size: (W, H) in
    pixels, to which the camera is fitted and in which pixel_coords, bbox and visible_pixels are.
    look: "plain" (default of A and B), "varied", "tiles" (default of C); the same objects stand
    in the same places under every look. shapes: "known" (default of A and B), "unseen" (C).
    ValueError for a choice that does not exist.
    """
    look = look or ("tiles" if split == "C" else "plain")
    shapes = shapes or ("unseen" if split == "C" else "known")
    for name, value, choices in (("part", part, PARTS), ("split", split, SPLITS),
                                 ("look", look, LOOKS), ("shapes", shapes, SHAPES)):
        if value not in choices:
            raise ValueError(f"{name} {value!r}: must be one of {', '.join(choices)}")
    if not 1 <= objects[0] <= objects[1] <= 12:
        raise ValueError(f"objects {tuple(objects)}: needs 1 <= fewest <= most <= 12 (the room)")
    if not (0 <= seed < 2**32 and 0 <= start <= start + n < 2**32):
        raise ValueError(f"seed {seed}, start {start}, n {n}: must be in 0 .. 2**32 - 1")
    return [make_scene(part, seed, split, index, objects, size, look, shapes)
            for index in range(start, start + n)]


def make_scene(part, seed, split, index, objects, size, look, shapes):
    """One scene; tries again, as CLEVR does, until nothing collides and all can be seen."""
    words = [PARTS.index(part), seed, SPLITS.index(split), index]
    rng = np.random.default_rng([*words, 0])
    count = rng.integers(objects[0], objects[1] + 1)
    while True:
        eye = np.array(EYE) + rng.uniform(-JITTER, JITTER, 3)
        things = draw_objects(rng, count, split, shapes)
        if not any(is_unique(thing, things) for thing in things):
            continue                              # every kind of question can be asked
        spots = place(rng, np.array([SIZES[thing["size"]] for thing in things]), axes_of(eye))
        if spots is None:
            continue
        for thing, (x, y) in zip(things, spots.tolist()):
            thing["3d_coords"] = [x, y, height(thing) / 2]
        camera = fit_camera(eye, things, size)
        pixels, boxes = visible(things, camera, size)
        if pixels.min() >= MIN_VISIBLE * size[0] * size[1]:
            break
    at = project(camera, np.array([thing["3d_coords"] for thing in things]), size)
    for thing, where, box, seen in zip(things, at.tolist(), boxes, pixels.tolist()):
        thing.update(pixel_coords=where, bbox=box, visible_pixels=seen)
    directions = {name: [*way, 0.0] for name, way in ways(eye).items()}
    return {"split": split, "image_index": index,
            "image_filename": f"CLEVR_{split}_{part}_{index:06d}.png", "objects": things,
            "relationships": relationships(things, directions), "directions": directions,
            "size": list(size), "camera": camera, "seed": {"part": part, "seed": seed},
            "look": draw_look(np.random.default_rng([*words, 1]), look)}


def draw_objects(rng, count, split, shapes):
    """Shape, colour, material, size and rotation (degrees) of each object, not yet placed."""
    things = []
    for _ in range(count):
        shape = SHAPES[shapes][rng.integers(len(SHAPES[shapes]))]
        palette = PALETTES[split].get(shape, tuple(COLORS))
        things.append({"shape": shape, "size": tuple(SIZES)[rng.integers(2)],
                       "color": palette[rng.integers(len(palette))],
                       "material": MATERIALS[rng.integers(2)], "rotation": 360 * rng.random()})
    return things


def place(rng, radii, axes):
    """Centres (K, 2) in [-3, 3]^2 that keep MIN_DIST between rims and MARGIN along the camera's
    right and behind (so along all four directions), or None if 50 tries find no room for one."""
    at = np.zeros((0, 2))
    for k, radius in enumerate(radii):
        tries = rng.uniform(-AREA, AREA, (50, 2))
        gap = tries[:, None] - at                                           # (50, k, 2)
        apart = (gap ** 2).sum(-1) >= (radius + radii[:k] + MIN_DIST) ** 2
        clear = (np.abs(gap @ axes[:2, :2].T) >= MARGIN).all(-1)
        good = np.flatnonzero((apart & clear).all(1))
        if not len(good):
            return None
        at = np.concatenate([at, tries[good[:1]]])
    return at


def ways(eye):
    """Unit vectors in the ground plane, as CLEVR: left, right, front, behind, seen from eye."""
    (rx, ry, _), (bx, by, _) = axes_of(eye).tolist()[:2]
    return {"left": [-rx, -ry], "right": [rx, ry], "front": [-bx, -by], "behind": [bx, by]}


def axes_of(eye):
    """Rows right, behind, up of the level frame whose behind points away from eye. (3, 3)"""
    behind = -(np.asarray(eye[:2]) - TARGET[:2]) / math.hypot(*(np.asarray(eye[:2]) - TARGET[:2]))
    return np.array([[behind[1], -behind[0], 0], [behind[0], behind[1], 0], [0, 0, 1]])


def relationships(things, directions):
    """CLEVR's: relationships[way][i] lists the objects that lie that way from object i."""
    at = np.array([thing["3d_coords"] for thing in things])
    offset = at[None] - at[:, None]                                         # (K, K, 3): j - i
    return {name: [np.flatnonzero(row).tolist() for row in offset @ np.array(way) > EPS]
            for name, way in directions.items()}


def draw_look(rng, name):
    """Ground, pattern and light. light: towards the lamp, in the camera's right, behind, up."""
    azimuth, tilt = math.radians(225 + rng.uniform(-12, 12)), math.radians(rng.uniform(36, 44))
    look = {"name": name, "ground": [0.36 * rng.uniform(0.92, 1.08)] * 3, "pattern": "none",
            "waves": [], "contrast": 0.0, "exposure": rng.uniform(0.95, 1.05)}
    if name == "tiles":
        tone = np.array([0.50, 0.36, 0.22]) * rng.uniform(0.9, 1.1)
        turn, pitch = rng.uniform(0, math.pi), rng.uniform(1.1, 1.5)        # tile side, in units
        look.update(ground=tone.tolist(), pattern="tiles", contrast=0.45, waves=[
            [math.cos(a) / pitch, math.sin(a) / pitch, rng.random()] for a in (turn, turn + math.pi / 2)])
    if name == "varied":
        azimuth, tilt = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(20, 55))
        tone = rng.uniform(0.15, 0.6) * rng.uniform(0.7, 1.3, 3)
        pattern = ("none", "stripes", "blotches")[rng.integers(3)]
        waves = [[s * math.cos(a), s * math.sin(a), rng.random()] for a, s in zip(
            rng.uniform(0, 2 * math.pi, 5), rng.uniform(0.1, 0.7, 5))]
        look.update(ground=tone.tolist(), pattern=pattern, contrast=rng.uniform(0.1, 0.5),
                    waves=waves[:{"none": 0, "stripes": 1, "blotches": 5}[pattern]],
                    exposure=rng.uniform(0.75, 1.25))
    side = math.sin(tilt)
    look["light"] = [side * math.cos(azimuth), side * math.sin(azimuth), math.cos(tilt)]
    return look


# ---- camera ----

def height(thing):
    """Height of an object that stands on the ground; its 3d_coords are half as high."""
    radius = SIZES[thing["size"]]
    return {"cube": math.sqrt(2) * radius, "torus": 2 * MINOR * radius}.get(thing["shape"], 2 * radius)


def view_axes(eye):
    """Rows right, up, forward of the camera at eye that looks at TARGET. (3, 3)"""
    right = axes_of(eye)[0]
    forward = np.subtract(TARGET, eye) / np.linalg.norm(np.subtract(TARGET, eye))
    return np.array([right, np.cross(right, forward), forward])


def project(camera, points, size):
    """Pixel x, pixel y and depth along the optical axis of world points (..., 3). A pixel's
    centre is at +0.5; (0, 0) is the picture's upper left corner."""
    x, y, depth = np.moveaxis((points - np.array(camera["eye"])) @ view_axes(camera["eye"]).T, -1, 0)
    scale, (sx, sy) = camera["zoom"] * min(size) / 2, camera["shift"]
    return np.stack([size[0] / 2 + scale * (x / depth - sx),
                     size[1] / 2 - scale * (y / depth - sy), depth], -1)


def corners(things, eye):
    """Corners (K, 8, 3) of a box around each object, turned with a cube, else to the camera."""
    level, unit = axes_of(eye), np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    boxes = []
    for thing in things:
        turn, half = level, [SIZES[thing["size"]]] * 2
        if thing["shape"] == "cube":
            turn, half = turned(thing["rotation"]), [height(thing) / 2] * 2
        boxes.append(thing["3d_coords"] + (unit * [*half, height(thing) / 2]) @ turn)
    return np.array(boxes)


def turned(degrees):
    """Rows: the x, y, z axes of an object that was turned about the vertical. (3, 3)"""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])


def fit_camera(eye, things, size):
    """The camera at eye with the largest zoom, up to MAX_ZOOM, that keeps every object in the
    frame. zoom: half the shorter side of the picture spans 1 / zoom at depth 1; shift: what lies
    at the picture's middle, in the same unit (a shift lens)."""
    local = (corners(things, eye) - eye) @ view_axes(eye).T
    spans = (local[..., :2] / local[..., 2:]).reshape(-1, 2)
    low, high = spans.min(0), spans.max(0)
    room = FRAME * np.array(size) / min(size)
    return {"eye": eye.tolist(), "zoom": float(min(MAX_ZOOM, *(2 * room / (high - low)))),
            "shift": ((low + high) / 2).tolist()}


# ---- rays ----

def cast(things, camera, size, rays):
    """What each of rays x rays rays a pixel meets first. With h = H * rays, w = W * rays:
    ids (h, w) int8, the object or -1 for ground; depth (h, w) along the optical axis;
    tx (w,), ty (h,) the ray's slopes right and up; spans, each object's box in the grid."""
    W, H = size
    grid = (W * rays, H * rays)
    scale, (sx, sy) = camera["zoom"] * min(size) / 2, camera["shift"]
    tx = F(((np.arange(grid[0]) + 0.5) / rays - W / 2) / scale + sx)
    ty = F((H / 2 - (np.arange(grid[1]) + 0.5) / rays) / scale + sy)
    edges = project(camera, corners(things, camera["eye"]), size)[..., :2] * rays
    low = np.clip(np.floor(edges.min(1)).astype(int), 0, grid).tolist()
    high = np.clip(np.ceil(edges.max(1)).astype(int) + 1, 0, grid).tolist()
    spans = [(slice(y0, y1), slice(x0, x1)) for (x0, y0), (x1, y1) in zip(low, high)]
    depth, ids = np.full(grid[::-1], np.inf, F), np.full(grid[::-1], -1, np.int8)
    eye, view = np.array(camera["eye"]), view_axes(camera["eye"])
    for k, (thing, span) in enumerate(zip(things, spans)):
        t = hit(thing, eye, view, tx[span[1]], ty[span[0], None])
        nearer = t < depth[span]
        np.copyto(depth[span], t, where=nearer)
        np.copyto(ids[span], np.int8(k), where=nearer)
    return ids, depth, tx, ty, spans


def hit(thing, eye, view, tx, ty):
    """Depth (h, w) at which rays of slopes tx (w,), ty (h, 1) enter the object; inf where they
    miss. Rays start at the depth of the centre: float32 is then exact enough for any picture."""
    radius, half = SIZES[thing["size"]], height(thing) / 2
    frame = view if thing["shape"] == "sphere" else turned(thing["rotation"])
    offset = eye - thing["3d_coords"]
    middle = -offset @ view[2]                                              # depth of the centre
    p, d = [], []                                 # ray: p + t d in the object's frame
    for axis in frame:
        r, u, f = (float(axis @ row) if abs(axis @ row) > 1e-9 else 0 for row in view)
        rows, cols = F(u) * ty if u else F(0), F(r) * tx if r else F(0)     # stay thin if they can
        d.append(rows + F(f) + cols)
        p.append(F(middle) * rows + F(offset @ axis + middle * f) + F(middle) * cols)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = ENTER[thing["shape"]](p, d, F(radius), F(half))
    return t + F(middle)


def roots(a, b, c):
    """Both t of a t^2 + 2 b t + c = 0, smaller first where a > 0; nan where there is none."""
    root, over = np.sqrt(b * b - a * c), 1 / a
    return (-b - root) * over, (root - b) * over


def slab(p, d, half):
    """Where the ray is between -half and half of one axis: from t, to t."""
    over = 1 / d
    middle, reach = -p * over, np.abs(half * over)
    return middle - reach, middle + reach


def enter_sphere(p, d, radius, half):
    """Smaller root of |p + t d| = radius."""
    t, _ = roots(d[0] * d[0] + d[1] * d[1] + d[2] * d[2], p[0] * d[0] + p[1] * d[1] + p[2] * d[2],
                 p[0] * p[0] + p[1] * p[1] + p[2] * p[2] - radius * radius)
    return np.where(t == t, t, F(np.inf))


def enter_cube(p, d, radius, half):
    """Inside all three slabs at once."""
    (x0, x1), (y0, y1), (z0, z1) = (slab(p[i], d[i], half) for i in range(3))
    t = np.maximum(np.maximum(x0, y0), z0)
    return np.where(t < np.minimum(np.minimum(x1, y1), z1), t, F(np.inf))


def enter_cylinder(p, d, radius, half):
    """Inside the round wall and between bottom and top."""
    t0, t1 = roots(d[0] * d[0] + d[1] * d[1], p[0] * d[0] + p[1] * d[1],
                   p[0] * p[0] + p[1] * p[1] - radius * radius)
    z0, z1 = slab(p[2], d[2], half)
    t = np.maximum(t0, z0)
    return np.where(t < np.minimum(t1, z1), t, F(np.inf))


def enter_cone(p, d, radius, half):
    """First root on x^2 + y^2 = (radius (half - z) / 2 half)^2 between base and tip."""
    k = radius / (2 * half)
    q, e = k * (half - p[2]), -k * d[2]
    ts = roots(d[0] * d[0] + d[1] * d[1] - e * e, p[0] * d[0] + p[1] * d[1] - q * e,
               p[0] * p[0] + p[1] * p[1] - q * q)
    ts = [np.where(np.abs(p[2] + t * d[2]) <= half, t, F(np.inf)) for t in ts]
    return np.minimum(*ts)


def enter_torus(p, d, radius, half):
    """Sphere tracing: steps of the distance to the tube, from the box's near side."""
    reach = np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
    t = -F(1.1) * radius / reach
    for _ in range(24):
        across = np.sqrt((p[0] + t * d[0]) ** 2 + (p[1] + t * d[1]) ** 2) - (radius - half)
        gap = np.sqrt(across ** 2 + (p[2] + t * d[2]) ** 2) - half
        t = t + gap / reach
    return np.where(gap < 0.01 * half, t, F(np.inf))


ENTER = {"sphere": enter_sphere, "cube": enter_cube, "cylinder": enter_cylinder,
         "cone": enter_cone, "torus": enter_torus}


def normal(thing, p):
    """Outward unit normals of the object's surface at points p (3, N) about its centre. (3, N)"""
    radius, half = F(SIZES[thing["size"]]), F(height(thing) / 2)
    if thing["shape"] == "sphere":
        return p / radius
    if thing["shape"] == "cube":
        turn = F(turned(thing["rotation"]))
        local = [row[0] * p[0] + row[1] * p[1] + row[2] * p[2] for row in turn]
        face = np.abs(np.stack(local)).argmax(0)
        sign = np.sign(np.take_along_axis(np.stack(local), face[None], 0)[0])
        return turn.T[:, face] * sign
    flat = np.sqrt(p[0] * p[0] + p[1] * p[1]) + F(1e-6)
    if thing["shape"] == "torus":
        pull = 1 - (radius - half) / flat
        return np.stack([p[0] * pull, p[1] * pull, p[2]]) / half
    if thing["shape"] == "cone":
        slope = F(radius / (2 * half))
        return np.stack([p[0] / flat, p[1] / flat, np.full_like(flat, slope)]) / np.sqrt(1 + slope ** 2)
    top = p[2] > half * F(0.9999)
    return np.stack([np.where(top, 0, p[0] / flat), np.where(top, 0, p[1] / flat), top.astype(F)])


def visible(things, camera, size):
    """Pixels whose centre sees each object, (K,), and their exact boxes [x1, y1, x2, y2] with x2
    and y2 one past the last pixel (None for an object that is not seen)."""
    ids, *_, spans = cast(things, camera, size, 1)
    pixels, boxes = [], []
    for k, span in enumerate(spans):
        mine = ids[span] == k
        ys, xs = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        pixels.append(int(np.count_nonzero(mine)))
        y, x = span[0].start, span[1].start
        boxes.append([int(x + xs[0]), int(y + ys[0]), int(x + xs[-1]) + 1, int(y + ys[-1]) + 1]
                     if len(xs) else None)
    return np.array(pixels), boxes


# ---- light ----

def render(scenes, size=(112, 112)):
    """Pictures (n, H, W, 3) uint8 of n scene dicts, by what their JSON says alone. size: (W, H)."""
    pictures = np.empty((len(scenes), size[1], size[0], 3), np.uint8)
    for picture, scene in zip(pictures, scenes):
        picture[:] = render_one(scene, size)
    return pictures


def render_one(scene, size, rays=2):
    """Ground at one ray a pixel (it is smooth), objects at rays x rays, laid over each other."""
    W, H = size
    things, camera, look = scene["objects"], scene["camera"], scene["look"]
    ids, depth, tx, ty, spans = cast(things, camera, size, rays)
    eye, view, lamp = F(camera["eye"]), F(view_axes(camera["eye"])), F(light_of(scene))
    colors, pixels = [], []
    for k, (thing, (rows, cols)) in enumerate(zip(things, spans)):
        y, x = np.nonzero(ids[rows, cols] == k)
        y, x = y + rows.start, x + cols.start
        d = view[2][:, None] + view[0][:, None] * tx[x] + view[1][:, None] * ty[y]     # (3, N)
        p = (eye - F(thing["3d_coords"]))[:, None] + depth[y, x] * d
        colors.append(shade(thing, normal(thing, p), d, F(look["ground"]), lamp))
        pixels.append(y // rays * W + x // rays)
    colors, pixels = np.concatenate(colors, 1), np.concatenate(pixels)
    cover = np.bincount(pixels, minlength=H * W)
    picture = ground(scene, size, tx[rays // 2::rays], ty[rays // 2::rays])
    for channel, color in zip(picture, colors):
        over = np.bincount(pixels, color, minlength=H * W) - cover * channel.ravel()
        channel += (over / rays ** 2).reshape(H, W)
    picture = np.sqrt(np.clip(picture * F(look["exposure"]), 0, 1))         # display gamma of 2
    return (picture * 255 + F(0.5)).astype(np.uint8).transpose(1, 2, 0)


def light_of(scene):
    """Unit vector towards the lamp in world axes. (3,)"""
    return np.array(scene["look"]["light"]) @ axes_of(scene["camera"]["eye"])


def shade(thing, n, d, ground, lamp):
    """Linear colours (3, N) at normals n seen along d. Rubber scatters; metal also mirrors a sky
    that brightens upwards, the ground and two lamps."""
    base = F(COLORS[thing["color"]])[:, None] / 255
    fill = F([-lamp[1], lamp[0], 0.6]) / F(math.hypot(lamp[0], lamp[1], 0.6))
    key = np.maximum(n[0] * lamp[0] + n[1] * lamp[1] + n[2] * lamp[2], 0)
    side = np.maximum(n[0] * fill[0] + n[1] * fill[1] + n[2] * fill[2], 0)
    bounce = (1 - n[2]) * F(0.12)
    scattered = F(0.2) + F(0.08) * n[2] + F(0.55) * key + F(0.2) * side
    if thing["material"] == "rubber":
        return base * scattered + base * ground[:, None] * bounce
    d = d / np.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
    facing = n[0] * d[0] + n[1] * d[1] + n[2] * d[2]
    m = d - 2 * facing * n                                                  # mirrored ray
    up = np.clip(m[2] * 4 + F(0.5), 0, 1)                                   # ground 0, sky 1
    sky = F(0.25) + F(0.55) * np.maximum(m[2], 0)
    mirror = up * sky + (1 - up) * ground[:, None] * F(0.7)
    shine = np.maximum(m[0] * lamp[0] + m[1] * lamp[1] + m[2] * lamp[2], 0) ** 32
    glint = np.maximum(m[0] * fill[0] + m[1] * fill[1] + m[2] * fill[2], 0) ** 32
    return base * (F(0.45) * scattered + F(0.9) * mirror) + F(1.2) * shine + F(0.5) * glint


def ground(scene, size, tx, ty):
    """Linear colours (3, H, W) of the ground with its pattern, lamp light and shadows."""
    look, camera = scene["look"], scene["camera"]
    eye, view = F(camera["eye"]), F(view_axes(camera["eye"]))
    tx, ty = tx[None], ty[:, None]
    depth = eye[2] / np.maximum(-(view[2, 2] + view[1, 2] * ty), F(0.04))   # flat past horizon
    x = eye[0] + depth * (view[2, 0] + view[1, 0] * ty) + depth * view[0, 0] * tx
    y = eye[1] + depth * (view[2, 1] + view[1, 1] * ty) + depth * view[0, 1] * tx
    light = 1 / (1 + (x * x + y * y) * F(0.006))                            # a pool of light
    light = light * shadows(scene, size, x, y)
    return F(look["ground"])[:, None, None] * (light * pattern(look, x, y))


def pattern(look, x, y):
    """Factor around 1 on the ground's colour: tiles, stripes, blotches or none."""
    if look["pattern"] == "none":
        return F(1)
    field = [F(kx) * x + F(ky) * y + F(shift) for kx, ky, shift in look["waves"]]
    if look["pattern"] == "blotches":
        field = sum(np.cos(F(2 * math.pi) * wave) for wave in field) / F(2)
    else:                                          # triangle waves, steep: edges a pixel or two wide
        field = math.prod(np.clip((np.abs(wave % 2 - 1) - F(0.5)) * 12, -1, 1) for wave in field)
    return 1 + F(look["contrast"]) * field


def shadows(scene, size, x, y):
    """Share of light (H, W) that reaches ground points x, y. Each object shades a capsule from its
    foot to where the shadow of its top falls, softer along the way, and dims what is close."""
    camera, lamp = scene["camera"], light_of(scene)
    light = np.ones_like(x)
    for thing in scene["objects"]:
        radius, tall, foot = SIZES[thing["size"]], height(thing), np.array(thing["3d_coords"][:2])
        away = -lamp[:2] / lamp[2] * tall
        if thing["shape"] == "sphere":                                      # leaves the foot free
            foot, away = foot + away * 0.25, away * 0.5
        ends = np.array([foot, foot + away])
        low, high = ends.min(0) - 2 * radius, ends.max(0) + 2 * radius
        box = np.array([[u, v, 0] for u in (low[0], high[0]) for v in (low[1], high[1])])
        at = project(camera, box, size)[:, :2]
        (x0, y0), (x1, y1) = np.clip([at.min(0), at.max(0) + 1], 0, size).astype(int).tolist()
        span = slice(y0, y1), slice(x0, x1)
        qx, qy = x[span] - F(foot[0]), y[span] - F(foot[1])
        along = np.clip((qx * F(away[0]) + qy * F(away[1])) / F(away @ away), 0, 1)
        taper = {"cube": 0.78, "cone": 1 - along}.get(thing["shape"], F(1))
        gap = np.sqrt((qx - along * F(away[0])) ** 2 + (qy - along * F(away[1])) ** 2)
        soft = F(radius) * (F(0.25) + F(0.55) * along)
        dark = np.clip((F(radius) * taper - gap) / (2 * soft) + F(0.5), 0, 1)
        near = np.maximum(1 - (qx * qx + qy * qy) / F(4 * radius ** 2), 0)
        light[span] *= (1 - F(0.45) * dark * dark * (3 - 2 * dark)) * (1 - F(0.35) * near * near)
    return light


# ---- questions ----

def is_unique(thing, things):
    """Whether no other object has the same four attributes."""
    return sum(all(other[key] == thing[key] for key in ATTRIBUTES) for other in things) == 1


ATTRIBUTES = ("size", "color", "material", "shape")


def execute(program, scene):
    """The answer of a CLEVR program on a scene: an int, or "yes" or "no". Nodes are
    {"function", "inputs", "value_inputs"}; inputs are numbers of earlier nodes.
    ValueError if `unique` does not get exactly one object, or a function is unknown."""
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
        elif name in COMPARE:
            value = "yes" if COMPARE[name][0](*args) else "no"
        else:
            raise ValueError(f"unknown function {name!r}")
        values.append(value)
    return values[-1]


COMPARE = {"greater_than": (lambda a, b: a > b, "more {} than {}"),
           "less_than": (lambda a, b: a < b, "fewer {} than {}"),
           "equal_integer": (lambda a, b: a == b, "as many {} as {}")}
WAYS = {"left": "left of", "right": "right of", "front": "in front of", "behind": "behind"}


def ask(scene, kind, rng):
    """A question of that kind about the scene: {"question", "program", "answer", "kind"}, drawn
    with the numpy Generator rng. ValueError for an unknown kind, or for "relation" where no
    object of the scene can be told from the others by its attributes."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    question, program = {"count": ask_count, "attribute": ask_attribute,
                         "relation": ask_relation, "compare": ask_compare}[kind](scene, rng)
    return {"question": question, "program": program, "answer": execute(program, scene),
            "kind": kind}


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
    words = [wanted[key] for key in ATTRIBUTES[:3] if key in wanted]
    last = wanted.get("shape", noun)
    return " ".join([*words, last + ("es" if last.endswith("s") else "s") * plural])


def some_attributes(scene, rng, invent=0.15):
    """One or two, seldom three attributes {key: value}: of an object of the scene, or with
    probability invent of any object whatever, which mostly makes the answer 0."""
    things = scene["objects"]
    thing = things[rng.integers(len(things))]
    if rng.random() < invent:
        thing = draw_objects(rng, 1, "C", "known")[0]
    keys = rng.permutation(4)[:1 + (rng.random() < 0.5) + (rng.random() < 0.2)]
    return {key: thing[key] for i, key in enumerate(ATTRIBUTES) if i in keys}


def a_noun(rng):
    return ("item", "object", "thing")[rng.integers(3)]


def ask_count(scene, rng):
    """How many objects there are. R1-V's wording and two paraphrases."""
    program = []
    step(program, "count", [step(program, "scene", [])])
    text = ("How many {} are there in the image?", "How many different {} are there in the image?",
            "What number of {} are in the image?")[rng.integers(3)]
    return text.format(phrase({}, a_noun(rng))), program


def ask_attribute(scene, rng):
    """How many objects have one to three attributes."""
    program, wanted = [], some_attributes(scene, rng)
    step(program, "count", [filtered(program, step(program, "scene", []), wanted)])
    text = ("How many {} are there?", "How many {} are there in the image?",
            "What number of {} are in the image?")[rng.integers(3)]
    return text.format(phrase(wanted, a_noun(rng))), program


def ask_relation(scene, rng):
    """How many objects, of an attribute half of the time, lie some way from a unique one."""
    things = scene["objects"]
    told = [thing for thing in things if is_unique(thing, things)]
    if not told:
        raise ValueError("relation: no object of the scene can be told from the others")
    thing, anchor = told[rng.integers(len(told))], {}
    keys = [ATTRIBUTES[i] for i in rng.permutation(4)]
    for size in range(1, 5):                       # as few attributes as make it unique
        anchor = {key: thing[key] for key in ATTRIBUTES if key in keys[:size]}
        if sum(all(other[key] == anchor[key] for key in anchor) for other in things) == 1:
            break
    way, noun = tuple(WAYS)[rng.integers(4)], a_noun(rng)
    wanted = some_attributes(scene, rng) if rng.random() < 0.5 else {}
    program = []
    one = step(program, "unique", [filtered(program, step(program, "scene", []), anchor)])
    step(program, "count", [filtered(program, step(program, "relate", [one], way), wanted)])
    return (f"How many {phrase(wanted, noun)} are {WAYS[way]} the {phrase(anchor, noun, False)}?",
            program)


def ask_compare(scene, rng):
    """Whether there are more, fewer or as many of one as of another; yes and no equally often
    where the scene allows."""
    hoped = ("yes", "no")[rng.integers(2)]
    name, noun = tuple(COMPARE)[rng.integers(3)], a_noun(rng)
    for _ in range(20):
        first, second = some_attributes(scene, rng), some_attributes(scene, rng)
        program = []
        start = step(program, "scene", [])
        counts = [step(program, "count", [filtered(program, start, wanted)])
                  for wanted in (first, second)]
        step(program, name, counts)
        if first != second and execute(program, scene) == hoped:
            break
    words = COMPARE[name][1].format(phrase(first, noun), phrase(second, noun))
    return f"Are there {words}?", program
