"""Draws CLEVR scenes with numpy: camera, ray casting, light.

CLEVR calls Blender (Johnson et al. 2017). We cast 2 x 2 rays a pixel, try each object only inside
its screen box, and shade in closed form: two lamps, soft shadows, and for metal a mirrored sky and
ground. That draws hundreds of 112 x 112 pictures a second on one core, the same bytes each time.

Letters: W, H picture width and height in pixels; w, h of a grid of rays; K objects; N rays.
Frames: world is CLEVR's (x, y ground, z up, origin at the middle). Level is what drawing uses: axes
right, behind, up as the camera sees them, origin at the eye. There the rays of one column share
x, those of one row y and z, so most of the arithmetic is on thin (1, w) and (h, 1) arrays.
"""
import math
from typing import NamedTuple

import numpy as np

COLORS = {"gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215),
          "green": (29, 105, 20), "brown": (129, 74, 25), "purple": (129, 38, 192),
          "cyan": (41, 208, 208), "yellow": (255, 238, 51)}      # CLEVR's properties.json
SIZES = {"large": 0.8, "small": 0.48}                            # radius; CLEVR 0.7 and 0.35
TARGET = 0.4                                                     # height the camera looks at
MAX_ZOOM, FRAME = 3.1, 0.97                                      # largest zoom; filled share
TUBE = 0.32                                                      # torus: tube over outer radius
ROUND = {"sphere": (1, 0, -1), "cylinder": (1, 0, 0), "cone": (0.25, -0.5, 0.25),
         "barrel": (1, 0, -0.55), "dome": (0.5, -0.5, 0), "bucket": (0.5625, -0.375, 0.0625)}
# (a, b, c): x^2 + y^2 = a + b z + c z^2 for |z| <= 1, in radii; each is as high as it is wide


# ---- camera ----

class Stage(NamedTuple):
    """Objects and camera as numbers, in the level frame."""
    shapes: list            # K names
    at: np.ndarray          # (K, 3) centres, from the eye
    radius: np.ndarray      # (K,)
    half: np.ndarray        # (K,) half the height
    turn: np.ndarray        # (K,) radians about the vertical; 0 for round shapes
    origin: tuple           # how far behind and how far below the eye the world's middle is
    pitch: tuple            # (cos, sin) of the camera's angle over the horizon; sin < 0
    scale: float            # pixels per unit of slope
    middle: tuple           # slopes right and up at the middle of the picture
    size: tuple             # (W, H)


def half_height(thing):
    """Half the height of an object, which is also the z of its centre. As CLEVR's, a cube is
    smaller than its radius: its corners, seen from above, lie on the circle."""
    return SIZES[thing["size"]] * {"cube": math.sqrt(0.5), "torus": TUBE}.get(thing["shape"], 1)


def level_axes(eye):
    """Rows right, behind, up of the level frame, in the world. (3, 3)"""
    x, y = -eye[0] / math.hypot(eye[0], eye[1]), -eye[1] / math.hypot(eye[0], eye[1])
    return np.array([[y, -x, 0.0], [x, y, 0.0], [0.0, 0.0, 1.0]])


def make_stage(things, camera, size):
    """The Stage of a scene's objects for a picture of that size."""
    eye, axes = camera["eye"], level_axes(camera["eye"])
    far = math.hypot(eye[0], eye[1])
    length, azimuth = math.hypot(far, eye[2] - TARGET), math.atan2(axes[0, 1], axes[0, 0])
    return Stage([thing["shape"] for thing in things],
                 (np.array([thing["3d_coords"] for thing in things]) - eye) @ axes.T,
                 np.array([SIZES[thing["size"]] for thing in things]),
                 np.array([half_height(thing) for thing in things]),
                 np.array([(math.radians(thing["rotation"]) - azimuth) * (thing["shape"] == "cube")
                           for thing in things]),
                 (far, eye[2]), (far / length, (TARGET - eye[2]) / length),
                 camera["zoom"] * min(size) / 2, camera["shift"], size)


def to_slopes(stage, points):
    """Slopes right and up (..., 2) and depth along the optical axis (...) of level points."""
    (c, s), (x, y, z) = stage.pitch, np.moveaxis(points, -1, 0)
    depth = c * y + s * z
    return np.stack([x / depth, (c * z - s * y) / depth], -1), depth


def to_pixels(stage, points):
    """Pixel x, pixel y and depth (..., 3) of level points (..., 3). (0, 0) is the upper left corner
    of the picture, so the centre of its first pixel is at (0.5, 0.5)."""
    slopes, depth = to_slopes(stage, points)
    x, y = np.moveaxis((slopes - stage.middle) * stage.scale, -1, 0)
    return np.stack([stage.size[0] / 2 + x, stage.size[1] / 2 - y, depth], -1)


def to_spans(stage, points, rays=1):
    """(rows, columns) slices of a grid of rays around the points (4 or 8 each) of K things."""
    at, grid = to_pixels(stage, points)[..., :2] * rays, np.array(stage.size) * rays
    low = np.clip(np.floor(at.min(1)), 0, grid).astype(int).tolist()
    high = np.clip(np.ceil(at.max(1)), 0, grid).astype(int).tolist()
    return [(slice(y0, y1), slice(x0, x1)) for (x0, y0), (x1, y1) in zip(low, high)]


def corners(stage):
    """Corners (K, 8, 3) of a box around each object, turned as a cube is."""
    side = np.where(np.array(stage.shapes) == "cube", stage.half, stage.radius)
    unit = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    x, y, z = unit.T[:, None] * np.array([side, side, stage.half])[..., None]          # (K, 8)
    c, s = np.cos(stage.turn)[:, None], np.sin(stage.turn)[:, None]
    return stage.at[:, None] + np.stack([c * x - s * y, s * x + c * y, z], -1)


def fit_camera(eye, things, size):
    """The camera at eye with the largest zoom, up to MAX_ZOOM, that keeps every object in the
    frame. zoom: half the shorter side of the picture spans a slope of 1 / zoom; shift: slopes at
    the middle of the picture (a shift lens: the picture moves, the perspective stays)."""
    stage = make_stage(things, {"eye": eye, "zoom": 1.0, "shift": (0, 0)}, size)
    slopes = to_slopes(stage, corners(stage))[0].reshape(-1, 2)
    low, high = slopes.min(0), slopes.max(0)
    zoom = 2 * FRAME * np.array(size) / min(size) / (high - low)
    return {"eye": eye, "zoom": float(min(MAX_ZOOM, *zoom)), "shift": ((low + high) / 2).tolist()}


# ---- rays ----

def directions(stage, rays):
    """Of rays x rays rays a pixel, level x (1, w), y (h, 1), z (h, 1), of depth 1. float32"""
    (W, H), (c, s) = stage.size, stage.pitch
    x = stage.middle[0] + ((np.arange(W * rays) + 0.5) / rays - W / 2) / stage.scale
    up = stage.middle[1] - ((np.arange(H * rays) + 0.5) / rays - H / 2)[:, None] / stage.scale
    return np.float32(x[None]), np.float32(c - s * up), np.float32(s + c * up)


def cast(stage, rays):
    """What each of rays x rays rays a pixel meets first: ids (h, w) int8, the object or -1 for
    ground; depth (h, w) along the optical axis; and in which part of the grid each object is."""
    (W, H), (dx, dy, dz) = stage.size, directions(stage, rays)
    ids = np.full((H * rays, W * rays), -1, np.int8)
    depth, spans = np.full(ids.shape, np.inf, np.float32), to_spans(stage, corners(stage), rays)
    for k, (rows, cols) in enumerate(spans):
        t = hit(stage, k, (dx[:, cols], dy[rows], dz[rows]))
        nearer = t < depth[rows, cols]            # False for nan, which is a miss
        np.copyto(depth[rows, cols], t, where=nearer)
        np.copyto(ids[rows, cols], np.int8(k), where=nearer)
    return ids, depth, spans


def hit(stage, k, d):
    """Depth (h, w) at which rays d enter object k; nan or inf where they miss. Rays start at the
    depth of its centre, not at the eye: float32 is then exact enough for any picture."""
    (c, s), (x, y, z) = stage.pitch, stage.at[k].tolist()
    radius, half, turn, start = *(float(v[k]) for v in stage[2:5]), c * y + s * z
    p = start * d[0] - x, start * d[1] - y, start * d[2] - z
    with np.errstate(invalid="ignore", divide="ignore"):                    # roots of misses
        if stage.shapes[k] == "cube":
            return start + enter_cube(turned(p, -turn), turned(d, -turn), half)
        if stage.shapes[k] == "torus":
            return start + enter_torus(p, d, radius - half, half)
        return start + radius * enter_round([v / radius for v in p], d, *ROUND[stage.shapes[k]])


def turned(v, angle):
    """x, y, z turned by angle about the vertical."""
    c, s = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return c * v[0] - s * v[1], s * v[0] + c * v[1], v[2]


def enter_cube(p, d, half):
    """p + t d is inside a cube while it is inside all three slabs."""
    middle, reach = zip(*((-a / b, np.abs(half / b)) for a, b in zip(p, d)))
    t = np.maximum(np.maximum(middle[0] - reach[0], middle[1] - reach[1]), middle[2] - reach[2])
    end = np.minimum(np.minimum(middle[0] + reach[0], middle[1] + reach[1]), middle[2] + reach[2])
    return np.where(t < end, t, np.float32(np.inf))


def enter_round(p, d, a, b, c):
    """First root t of x^2 + y^2 = a + b z + c z^2 on p + t d, if there |z| <= 1; else the flat top,
    if there is one. (Seen from as high as we do, no ray meets the mirror image of a cone.)"""
    square = d[0] * d[0] + (d[1] * d[1] - c * d[2] * d[2])
    linear = p[0] * d[0] + (p[1] * d[1] - (c * p[2] + b / 2) * d[2])
    start = p[0] * p[0] + (p[1] * p[1] - c * p[2] * p[2] - b * p[2] - a)
    t = (-linear - np.sqrt(linear * linear - square * start)) / square
    t = np.where(np.abs(p[2] + t * d[2]) <= 1.0001, t, np.float32(np.inf))
    if a + b + c == 0:
        return t
    top = (1 - p[2]) / d[2]
    x, y = p[0] + top * d[0], p[1] + top * d[1]
    return np.where(x * x + y * y <= a + b + c, top, t)


def enter_torus(p, d, ring, tube):
    """Sphere tracing: 32 steps, each as long as the tube is far, from in front of the box."""
    reach = np.sqrt(d[0] * d[0] + (d[1] * d[1] + d[2] * d[2]))
    t = -1.2 * (ring + tube) / reach
    for _ in range(32):
        x, y, z = (a + t * b for a, b in zip(p, d))
        gap = np.sqrt((np.sqrt(x * x + y * y) - ring) ** 2 + z * z) - tube
        t = t + gap / reach
    return np.where(gap < 0.01 * tube, t, np.float32(np.inf))


def visible(things, camera, size):
    """Pixels whose centre sees each object, and their exact boxes [x1, y1, x2, y2], x2 and y2 one
    past the last pixel (None for an object that is not seen)."""
    ids, _, spans = cast(make_stage(things, camera, size), 1)
    pixels, boxes = [], []
    for k, (rows, cols) in enumerate(spans):
        ys, xs = (ids[rows, cols] == k).nonzero()
        pixels.append(len(ys))
        boxes.append([int(xs.min()) + cols.start, int(ys[0]) + rows.start,
                      int(xs.max()) + cols.start + 1, int(ys[-1]) + rows.start + 1]
                     if len(ys) else None)
    return pixels, boxes


# ---- light ----

def render(scenes, size=(112, 112)):
    """Pictures (n, H, W, 3) uint8 of n scene dicts, by what their JSON says alone. size: (W, H);
    another aspect than the scene's shows all of its objects too, with more around them."""
    pictures = np.empty((len(scenes), size[1], size[0], 3), np.uint8)
    for picture, scene in zip(pictures, scenes):
        picture[:] = render_one(scene, size)
    return pictures


def render_one(scene, size, rays=2):
    """Ground at one ray a pixel (it is smooth), objects at rays x rays, laid over it."""
    things, look = scene["objects"], scene["look"]
    stage = make_stage(things, scene["camera"], size)
    ids, depth, _ = cast(stage, rays)
    rows, cols = (ids >= 0).nonzero()
    metal = np.array([thing["material"] == "metal" for thing in things])
    rank = (metal * 100 + np.arange(len(things))).astype(np.int8)           # metal comes last
    order = np.argsort(rank[ids[rows, cols]], kind="stable")                # object by object
    rows, cols = rows[order], cols[order]
    (dx, dy, dz), n = directions(stage, rays), np.empty((3, len(rows)), np.float32)
    d = np.stack([dx[0, cols], dy[rows, 0], dz[rows, 0]])                   # (3, N)
    p, counts = depth[rows, cols] * d, np.bincount(ids[rows, cols], minlength=len(things))
    end, by_rank = 0, np.argsort(rank)
    for k in by_rank:
        start, end = end, end + counts[k]
        n[:, start:end] = normals(stage, k, p[:, start:end])
    n = n / np.sqrt(dot(n, n))
    base = np.float32([COLORS[things[k]["color"]] for k in by_rank]).T / 255
    colors = shade(np.repeat(base, counts[by_rank], axis=1), n, d, counts[~metal].sum(), look)
    picture, pixels = ground(stage, look), rows // rays * size[0] + cols // rays
    for channel, color in zip(picture, colors):
        channel += np.bincount(pixels, color - channel[pixels], channel.size) / rays ** 2
    picture = np.sqrt(np.clip(picture * look["exposure"], 0, 1)) * 255 + 0.5           # gamma of 2
    return picture.astype(np.uint8).reshape(3, size[1], size[0]).transpose(1, 2, 0)


def normals(stage, k, p):
    """Outward normals (3, N) of any length of object k at level points p (3, N). High powers
    instead of flat faces round the edges of cubes and cylinders a little, as CLEVR's are."""
    shape, (x, y, z) = stage.shapes[k], stage.at[k].tolist()
    unit = float((stage.half if shape == "cube" else stage.radius)[k])
    x, y, z = (p[0] - x) / unit, (p[1] - y) / unit, (p[2] - z) / unit
    if shape == "cube":
        faces = [power(v * v, 3) * v for v in turned((x, y, z), -stage.turn[k])]
        return turned(faces, stage.turn[k])
    if shape == "cylinder":
        wall = power(x * x + y * y, 3)
        return x * wall, y * wall, power(z * z, 3) * z
    if shape == "torus":
        pull = 1 - (1 - TUBE) / np.sqrt(x * x + y * y)
        return x * pull, y * pull, z
    a, b, c = ROUND[shape]
    top = (z > 0.999) & (a + b + c > 0)           # flat
    return np.where(top, 0, x), np.where(top, 0, y), np.where(top, 1, -b / 2 - c * z)


def power(v, doublings):
    """v to the power of 2 ** doublings (numpy's own float32 power is ten times slower)."""
    for _ in range(doublings):
        v = v * v
    return v


def shade(base, n, d, metal, look):
    """Linear colours (3, N) of points of colour base (3, N) and normal n (3, N) seen along d
    (3, N). Rubber scatters the light of two lamps; metal, from point number metal on, also mirrors
    them, a sky that brightens upwards and the ground."""
    floor, lamp = np.float32(look["ground"])[:, None], look["light"]
    fill = np.array([-lamp[1], lamp[0], 0.6]) / math.hypot(lamp[0], lamp[1], 0.6)
    lamps = (lamp, 0.55, 1.2), (fill.tolist(), 0.2, 0.5)                    # scatter, mirror
    light = 0.2 + 0.08 * n[2]
    for way, strength, _ in lamps:
        light += strength * np.maximum(dot(n, way), 0)
    colors = base * (light + 0.12 * floor * (1 - n[2]))
    base, n, d, polished = base[:, metal:], n[:, metal:], d[:, metal:], colors[:, metal:]
    d = d / np.sqrt(dot(d, d))
    mirrored = d - 2 * dot(n, d) * n
    sky = np.clip(4 * mirrored[2] + 0.5, 0, 1)
    seen = sky * (0.1 + 1.1 * mirrored[2]) + (1 - sky) * floor * (0.9 + 0.9 * mirrored[2])
    polished *= 0.3
    polished += (0.9 * base + 0.1) * seen
    for way, _, strength in lamps:
        polished += strength * power(np.maximum(dot(mirrored, way), 0), 4)
    return colors


def dot(u, v):
    """Sum of products over the three axes, without BLAS: the same bytes on every machine."""
    return u[0] * v[0] + u[1] * v[1] + u[2] * v[2]


def ground(stage, look):
    """Linear colours (3, H W) of the ground with its pattern, lamp light and shadows."""
    dx, dy, dz = directions(stage, 1)
    depth = stage.origin[1] / np.maximum(-dz, 0.08)                         # flat past the horizon
    x, y = depth * dx, depth * dy - stage.origin[0]                         # (H, W), (H, 1)
    light = shadows(stage, look["light"], x, y) / (1 + 0.004 * (x * x + y * y))
    if look["pattern"] != "none":
        field = [kx * x + ky * y + shift for kx, ky, shift in look["waves"]]
        if look["pattern"] == "blotches":
            field = sum(np.cos(2 * math.pi * wave) for wave in field) / 2
        else:                                     # steep triangle waves: edges a few pixels wide
            field = [np.clip(12 * np.abs(wave % 2 - 1) - 6, -1, 1) for wave in field]
            field = sum(field) / 2 if look["pattern"] == "plaid" else math.prod(field)
        light = light * (1 + look["contrast"] * field)
    return np.float32(look["ground"])[:, None] * light.reshape(1, -1)


def shadows(stage, lamp, x, y):
    """Share of light (H, W) that reaches ground points x (H, W), y (H, 1), level but from the
    world's middle. An object shades a capsule from its foot to where the shadow of its top falls,
    softer along the way, and dims what is close to its foot."""
    light, far, radius = np.ones_like(x), -stage.origin[1], stage.radius[:, None]
    sphere = (np.array(stage.shapes) == "sphere")[:, None]
    away = np.outer(stage.half / lamp[2], lamp[:2]) * np.where(sphere, -1, -2)         # (K, 2)
    foot = stage.at[:, :2] + 0.5 * away * sphere
    low, high = np.minimum(foot, foot + away), np.maximum(foot, foot + away)
    low, high = (low - 1.8 * radius).T, (high + 1.8 * radius).T
    box = np.array([[a, b, np.full(len(foot), far)] for a in (low[0], high[0])
                    for b in (low[1], high[1])]).transpose(2, 0, 1)         # (K, 4, 3)
    for k, (rows, cols) in enumerate(to_spans(stage, box)):
        (fx, fy), (ax, ay), r = foot[k].tolist(), away[k].tolist(), float(stage.radius[k])
        qx, qy = x[rows, cols] - fx, y[rows] - (fy - stage.origin[0])
        along = np.clip((qx * ax + qy * ay) / (ax * ax + ay * ay), 0, 1)
        taper = {"cube": 0.78, "cone": 1 - along}.get(stage.shapes[k], 1)
        ex, ey = qx - along * ax, qy - along * ay
        dark = (r * taper - np.sqrt(ex * ex + ey * ey)) / ((0.5 + 1.1 * along) * r)
        dark = np.clip(dark + 0.5, 0, 1)
        near = np.maximum(1 - (qx * qx + qy * qy) / (1.8 * r) ** 2, 0)
        light[rows, cols] *= (1 - 0.45 * dark * dark * (3 - 2 * dark)) * (1 - 0.4 * near * near)
    return light
