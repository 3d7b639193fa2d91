"""Chapter two of draw.py: camera, rays, light."""
import copy
import json
import math

import numpy as np
import pytest

import draw
import world


def thing(shape="sphere", at=(0, 0), size="large", color="red", material="rubber", rotation=0.0):
    """An object that stands on the ground at (x, y)."""
    one = {"shape": shape, "size": size, "color": color, "material": material,
           "rotation": rotation}
    return {**one, "3d_coords": [*at, draw.half_height(one)]}


def scene_of(things, eye=(3.0, -4.0, 12.4), zoom=4.0, shift=(0.0, 0.0)):
    """A scene lit from the left: what render reads of a scene's JSON, and no more."""
    look = {"ground": [0.36] * 3, "pattern": "none", "waves": [], "contrast": 0.0,
            "exposure": 1.0, "light": [-0.6, 0.0, 0.8]}
    return {"objects": things, "look": look,
            "camera": {"eye": list(eye), "zoom": zoom, "shift": list(shift)}}


def stage_of(things, size=(200, 100), **camera):
    return draw.make_stage(things, scene_of(things, **camera)["camera"], size)


# ---- camera ----

def test_level_axes_are_right_behind_up_as_the_eye_sees_them():
    np.testing.assert_allclose(draw.level_axes((0, -5, 3)), np.eye(3), atol=1e-12)
    right, behind, _ = draw.level_axes((3, -4, 1))
    np.testing.assert_allclose(behind, [-0.6, 0.8, 0])
    np.testing.assert_allclose(right, [0.8, 0.6, 0])


def test_projection_equals_numbers_done_by_hand():
    """The eye is 5 away and 12 above the target: a 5, 12, 13 triangle. With 200 x 100 pixels and
    zoom 2 a slope of 1 is 100 pixels; the picture's middle is (100, 50)."""
    stage = stage_of([thing()], zoom=2.0)
    level = np.array([[0, 5, -12], [1, 5, -12], [0, 5, -11], [0, 6, -12]])    # target and its sides
    x, y, depth = draw.to_pixels(stage, level).T
    np.testing.assert_allclose(depth, [13, 13, 13 - 12 / 13, 13 + 5 / 13])
    np.testing.assert_allclose(x, [100, 100 + 100 / 13, 100, 100])
    np.testing.assert_allclose(y[:3], [50, 50, 50 - 100 * (5 / 13) / (13 - 12 / 13)])
    np.testing.assert_allclose(y[3], 50 - 100 * (12 / 13) / (13 + 5 / 13))


def test_a_scenes_target_falls_on_the_middle_unless_the_lens_is_shifted():
    low = {**thing(), "3d_coords": [0, 0, draw.TARGET]}
    stage = stage_of([low], zoom=2.0)
    np.testing.assert_allclose(draw.to_pixels(stage, stage.at), [[100, 50, 13]])
    stage = stage_of([low], zoom=2.0, shift=(0.1, 0.2))
    np.testing.assert_allclose(draw.to_pixels(stage, stage.at), [[90, 70, 13]])


def test_a_cubes_corners_lie_on_the_circle_of_its_radius():
    box = draw.corners(stage_of([thing("cube", rotation=33.0)])) - stage_of([thing()]).at[:, None]
    np.testing.assert_allclose(np.hypot(box[..., 0], box[..., 1]), 0.8, rtol=1e-6)


@pytest.mark.parametrize("size", [(112, 112), (480, 320), (100, 300)])
def test_the_camera_is_as_near_as_the_frame_allows(size):
    """The rims of all boxes touch the frame on one axis, and stay inside on the other."""
    things = [thing("cube", (-5, 0)), thing("cylinder", (5, 0)), thing("sphere", (0, 5))]
    camera = draw.fit_camera([7.1, -6.7, 5.7], things, size)
    at = draw.to_pixels(stage := draw.make_stage(things, camera, size), draw.corners(stage))
    share = np.ptp(at.reshape(-1, 3)[:, :2], axis=0) / size
    assert camera["zoom"] < draw.MAX_ZOOM
    assert max(share) == pytest.approx(draw.FRAME) and min(share) <= draw.FRAME
    one = draw.fit_camera([7.1, -6.7, 5.7], things[:1], size)
    assert one["zoom"] == draw.MAX_ZOOM


# ---- rays ----

def test_a_spheres_silhouette_is_a_disc_of_the_size_done_by_hand():
    """On the axis at distance D the tangent cone has slope r / sqrt(D^2 - r^2)."""
    ball = {**thing(), "3d_coords": [0, 0, draw.TARGET]}
    ids, depth, _ = draw.cast(stage_of([ball], (400, 400)), 1)
    radius = 0.8 / math.sqrt(13 ** 2 - 0.8 ** 2) * 4 * 200
    assert (ids == 0).sum() == pytest.approx(math.pi * radius ** 2, rel=0.003)
    assert depth[200, 200] == pytest.approx(13 - 0.8, abs=1e-3)
    assert np.isinf(depth[ids < 0]).all()


def inside(shape, p, radius, half):
    """Whether points p (3, n) about its centre are inside the solid: its definition."""
    x, y, z = p
    flat = np.hypot(x, y)
    return {"sphere": lambda: flat ** 2 + z ** 2 < radius ** 2,
            "cube": lambda: np.maximum(np.maximum(abs(x), abs(y)), abs(z)) < half,
            "cylinder": lambda: (flat < radius) & (abs(z) < half),
            "cone": lambda: (flat < radius * (half - z) / (2 * half)) & (abs(z) < half),
            "torus": lambda: (flat - (radius - half)) ** 2 + z ** 2 < half ** 2}[shape]()


@pytest.mark.parametrize("shape", ["sphere", "cube", "cylinder", "cone", "torus"])
@pytest.mark.parametrize("eye", [(3.0, -4.0, 12.4), (7.1, -6.7, 5.2)])
def test_rays_meet_each_shape_where_small_steps_along_them_first_get_inside(shape, eye):
    one = thing(shape, (0.3, -0.2), rotation=25.0)
    stage = stage_of([one], (40, 40), eye=eye, zoom=10.0)
    ids, depth, _ = draw.cast(stage, 1)
    d = np.stack(np.broadcast_arrays(*draw.directions(stage, 1))).astype(float)       # (3, 40, 40)
    middle = draw.to_pixels(stage, stage.at)[0, 2]
    found = np.full(ids.shape, np.inf)
    turn = math.radians(one["rotation"])
    for t in np.arange(middle - 1.3, middle + 1.3, 0.002)[::-1]:
        level = (t * d - stage.at[0][:, None, None]).reshape(3, -1)
        world_at = draw.level_axes(eye).T @ level
        spun = np.array([[math.cos(turn), math.sin(turn), 0], [-math.sin(turn), math.cos(turn), 0],
                         [0, 0, 1]]) @ world_at
        found[inside(shape, spun, 0.8, draw.half_height(one)).reshape(ids.shape)] = t
    seen = np.isfinite(found)
    assert 100 < seen.sum() < 1500
    assert ((ids == 0) != seen).sum() <= 0.01 * seen.sum()        # grazing rays: a step is too long
    both = seen & (ids == 0)
    error = np.abs(depth[both] - found[both])
    assert error.max() < 0.02 and error.mean() < 0.004


def test_the_nearer_object_hides_the_farther_in_either_order():
    eye = (0.0, -9.0, 5.0)
    near, far = thing("cylinder", (0, -2)), thing("sphere", (0, 1))
    ids, depth, _ = draw.cast(stage_of([near, far], (60, 60), eye=eye), 1)
    swapped, again, _ = draw.cast(stage_of([far, near], (60, 60), eye=eye), 1)
    np.testing.assert_array_equal(np.where(ids < 0, ids, 1 - ids), swapped)
    np.testing.assert_array_equal(depth, again)
    alone = (draw.cast(stage_of([far], (60, 60), eye=eye), 1)[0] == 0).sum()
    assert 0 < (ids == 1).sum() < alone
    assert (ids == 0).sum() == (draw.cast(stage_of([near], (60, 60), eye=eye), 1)[0] == 0).sum()


def test_boxes_are_exact_and_end_one_past_the_last_pixel():
    things = world.make_scenes(1, objects=(10, 10))[0]
    ids, _, _ = draw.cast(draw.make_stage(things["objects"], things["camera"], (112, 112)), 1)
    for k, one in enumerate(things["objects"]):
        x1, y1, x2, y2 = one["bbox"]
        ys, xs = np.nonzero(ids == k)
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == [x1, y1, x2, y2]
        assert one["visible_pixels"] == len(ys)


def test_an_object_that_is_not_seen_has_no_box():
    hidden = [thing("cylinder", (0, -2)), thing("sphere", (0, 0), size="small")]
    camera = scene_of(hidden, eye=(0.0, -9.0, 1.5))["camera"]
    pixels, boxes = draw.visible(hidden, camera, (60, 60))
    assert pixels[1] == 0 and boxes[1] is None and pixels[0] > 0


# ---- light ----

def test_normals_stand_on_the_surface():
    stage = stage_of([thing("sphere"), thing("cube", rotation=20.0), thing("cylinder"),
                      thing("cone"), thing("torus")], eye=(0.0, -5.0, 3.0))
    def unit(k, point):
        level = np.float32(stage.at[k] + point)[:, None]
        n = np.stack([v * np.ones(1) for v in draw.normals(stage, k, level)])[:, 0]
        return n / np.linalg.norm(n)
    np.testing.assert_allclose(unit(0, [0.48, 0, 0.64]), [0.6, 0, 0.8], atol=1e-5)
    side, turn = 0.8 * math.sqrt(0.5), math.radians(20)
    out = np.array([math.cos(turn), math.sin(turn), 0])
    np.testing.assert_allclose(unit(1, out * side), out, atol=1e-5)
    np.testing.assert_allclose(unit(1, [0.1, 0.1, side]), [0, 0, 1], atol=1e-3)
    np.testing.assert_allclose(unit(2, [0, 0.8, 0.2]), [0, 1, 0], atol=1e-3)
    np.testing.assert_allclose(unit(2, [0.3, 0.1, 0.8]), [0, 0, 1], atol=1e-2)
    np.testing.assert_allclose(unit(3, [0.4, 0, 0]), np.array([2, 0, 1]) / math.sqrt(5), atol=1e-5)
    ring = 0.8 * (1 - draw.TUBE)
    np.testing.assert_allclose(unit(4, [ring, 0, 0.8 * draw.TUBE]), [0, 0, 1], atol=1e-3)
    np.testing.assert_allclose(unit(4, [0, 0.8, 0]), [0, 1, 0], atol=1e-3)


def test_power_doubles_the_exponent():
    assert draw.power(3, 0) == 3 and draw.power(3, 2) == 81


def test_rubber_is_brightest_towards_the_lamp_and_metal_also_mirrors():
    lamp, n = [-0.6, 0.0, 0.8], np.float32([[-0.6, 0.6], [0, 0], [0.8, 0.8]])
    base, d = np.full((3, 2), 0.5, np.float32), -n               # seen along the normal
    look = {"ground": [0.36] * 3, "light": lamp}
    rubber = draw.shade(base, n, d, 2, look)
    assert (rubber[:, 0] > 1.2 * rubber[:, 1]).all()
    metal = draw.shade(base, n, d, 0, look)
    assert (metal[:, 0] > 1.0).all()                              # the lamp's own image is white
    mixed = draw.shade(base, n, d, 1, look)
    np.testing.assert_array_equal(mixed, np.stack([rubber[:, 0], metal[:, 1]], 1))


def test_metal_changes_the_pixels_of_its_own_object_only():
    things = [thing("cube", (-0.5, 1)), thing("sphere", (1, 1)), thing("cylinder", (0, -1))]
    rubber = draw.render([scene_of(things)], (90, 90))[0].astype(int)
    ids, _, _ = draw.cast(stage_of(things, (90, 90)), 2)
    for k in range(3):
        polished = [{**one, "material": "metal"} if i == k else one for i, one in enumerate(things)]
        changed = (draw.render([scene_of(polished)], (90, 90))[0] != rubber).any(-1)
        own = (ids == k).reshape(90, 2, 90, 2).any((1, 3))
        assert not (changed & ~own).any() and changed[own].mean() > 0.9


def test_an_object_covers_the_ground():
    """The flat top of a rubber cylinder takes no light from the ground, so it looks the same."""
    scene = scene_of([thing("cylinder")])
    white = {**scene, "look": {**scene["look"], "ground": [0.9] * 3}}
    plain, bright = draw.render([scene, white], (101, 101)).astype(int)
    np.testing.assert_array_equal(plain[40:44, 46:55], bright[40:44, 46:55])
    assert (bright[:10] > plain[:10] + 20).all()


def test_the_shadow_falls_away_from_the_lamp_and_is_soft():
    """The lamp is on the left: on the row of the foot the ground on the right is darker."""
    picture = draw.render([scene_of([thing("cylinder")])], (101, 101))[0].astype(int)
    empty = draw.render([scene_of([thing("cylinder", (90, 90))])], (101, 101))[0].astype(int)
    loss = (empty - picture)[..., 0]
    right, left = loss[56, 80:95], loss[56, 6:21]                 # 15 pixels beside the object
    assert right[0] > 12 and right[-1] == 0 and left.max() < right[0] / 3
    assert (np.diff(right) <= 0).all() and np.diff(right).min() > -6          # no hard edge


def test_edges_are_smooth():
    """White ball on dark ground: a pixel on the rim is between the two."""
    ball = {**scene_of([thing(color="yellow")]), "look": {**scene_of([])["look"],
                                                          "ground": [0.01] * 3}}
    green = draw.render([ball], (60, 60))[0, :, :, 1].astype(int)
    row = green[30]
    ground, inner = row[2], row[30]
    between = ((row > ground + 15) & (row < 0.8 * row[24:36].min())).sum()
    assert inner > ground + 100 and between >= 1


@pytest.mark.parametrize("pattern", ["tiles", "stripes", "blotches"])
def test_patterns_lighten_and_darken_the_ground_around_the_plain_one(pattern):
    plain = scene_of([thing(at=(90, 90))])
    look = {**plain["look"], "pattern": pattern, "contrast": 0.4,
            "waves": [[1.0, 0.0, 0.25], [0.0, 1.0, 0.5]]}
    before, after = draw.render([plain, {**plain, "look": look}], (64, 64)).astype(int)
    assert (after > before + 15).mean() > 0.1 and (after < before - 15).mean() > 0.1


def test_the_same_scene_gives_the_same_bytes_alone_in_a_batch_and_from_json():
    scenes = world.make_scenes(3, look="varied", seed=5) + world.make_scenes(2, "C", seed=5)
    batch = draw.render(scenes)
    for scene, picture in zip(json.loads(json.dumps(scenes)), batch):
        np.testing.assert_array_equal(draw.render([scene])[0], picture)
    assert batch.shape == (5, 112, 112, 3) and batch.dtype == np.uint8


def test_render_leaves_its_scenes_as_they_were():
    scenes = world.make_scenes(2)
    before = copy.deepcopy(scenes)
    draw.render(scenes, (64, 48))
    assert scenes == before


def test_another_size_shows_the_same_view():
    scene = world.make_scenes(1, size=(112, 112))
    small, large = draw.render(scene), draw.render(scene, (224, 224))
    shrunk = large[0].reshape(112, 2, 112, 2, 3).mean((1, 3))
    assert np.abs(shrunk - small[0]).mean() < 2
