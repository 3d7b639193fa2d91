"""Chapter two of world.py: scenes, questions, files."""
import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import world

FIRST, SECOND = {"gray", "blue", "brown", "yellow"}, {"red", "green", "purple", "cyan"}


def colors_of(scenes, shape):
    return {thing["color"] for scene in scenes for thing in scene["objects"]
            if thing["shape"] == shape}


def layout(scene):
    """What stands where: all that is drawn from the first random stream."""
    return json.dumps([scene["objects"], scene["camera"]])


# ---- scenes ----

def test_the_splits_are_cogents_and_c_is_a_world_of_its_own():
    a, b, c = (world.make_scenes(60, split) for split in "ABC")
    assert colors_of(a, "cube") == colors_of(b, "cylinder") == FIRST
    assert colors_of(a, "cylinder") == colors_of(b, "cube") == SECOND
    assert colors_of(a, "sphere") == colors_of(b, "sphere") == FIRST | SECOND
    assert {thing["shape"] for scene in c for thing in scene["objects"]} == {"cone", "torus"}
    assert colors_of(c, "cone") == colors_of(c, "torus") == FIRST | SECOND
    assert {scene["look"]["name"] for scene in a + b} == {"plain"}
    assert {scene["look"]["name"] for scene in c} == {"checker"}


def test_look_and_shapes_are_chosen_apart_from_the_split():
    plain, tiles = world.make_scenes(5, "A"), world.make_scenes(5, "A", look="tiles")
    assert [layout(one) for one in plain] == [layout(one) for one in tiles]
    assert all(scene["look"]["pattern"] == "tiles" for scene in tiles)
    unseen = world.make_scenes(5, "A", shapes="unseen")
    assert {t["shape"] for s in unseen for t in s["objects"]} == {"cone", "torus"}
    assert {scene["look"]["name"] for scene in unseen} == {"plain"}
    varied = world.make_scenes(60, look="varied")
    assert {s["look"]["pattern"] for s in varied} == {"none", "stripes", "blotches"}


def test_every_count_is_equally_likely():
    """400 scenes over 8 counts: 50 each, with standard deviation 6.6."""
    found = Counter(len(scene["objects"]) for scene in world.make_scenes(400))
    assert sorted(found) == list(range(3, 11))
    assert max(abs(n - 50) for n in found.values()) < 23


def test_sizes_materials_and_rotations_are_drawn_evenly():
    """Few objects, so that no crowd favours small ones: 600, with standard deviation 12."""
    things = [one for scene in world.make_scenes(200, objects=(3, 3)) for one in scene["objects"]]
    for key, value in (("size", "large"), ("material", "metal")):
        assert abs(sum(one[key] == value for one in things) - 300) < 45
    assert np.histogram([one["rotation"] for one in things], 4, (0, 360))[0].min() > 110


def test_objects_keep_clevrs_distance_and_margin_on_clevrs_ground():
    for scene in world.make_scenes(30, objects=(8, 10)):
        for one in scene["objects"]:
            assert max(abs(v) for v in one["3d_coords"][:2]) <= 3
        for one, two in itertools.combinations(scene["objects"], 2):
            gap = np.subtract(one["3d_coords"], two["3d_coords"])
            rims = world.SIZES[one["size"]] + world.SIZES[two["size"]]
            assert np.hypot(gap[0], gap[1]) - rims >= 0.25
            assert all(abs(gap[:2] @ way[:2]) >= 0.4 for way in scene["directions"].values())


@pytest.mark.parametrize("size", [(112, 112), (320, 240)])
def test_all_objects_can_be_seen_and_lie_in_the_frame(size):
    """CLEVR asks for 200 of 320 x 240 pixels, the same share of any other picture."""
    for split in "AC":
        for scene in world.make_scenes(15, split, size=size):
            for one in scene["objects"]:
                assert one["visible_pixels"] >= 200 * size[0] * size[1] / (320 * 240)
                x1, y1, x2, y2 = one["bbox"]
                assert 0 < x1 < x2 < size[0] and 0 < y1 < y2 < size[1]
                x, y, depth = one["pixel_coords"]
                assert 0 < x < size[0] and 0 < y < size[1] and depth > 4
                assert one["visible_pixels"] <= (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("size", [(300, 60), (60, 300)])
def test_long_pictures_ask_for_no_more_than_their_middle(size):
    """200 of 320 x 240 is 12.5 of the 80 x 60 in use, but 47 of all 300 x 60."""
    seen = [one["visible_pixels"] for scene in world.make_scenes(20, size=size, objects=(8, 10))
            for one in scene["objects"]]
    assert 12.5 <= min(seen) < 47


def test_relationships_are_clevrs():
    """j is left of i where the way from i to j, along left, is over 0.2."""
    for scene in world.make_scenes(5):
        at = [np.array(one["3d_coords"]) for one in scene["objects"]]
        for name, way in scene["directions"].items():
            for i, found in enumerate(scene["relationships"][name]):
                assert found == [j for j in range(len(at)) if (at[j] - at[i]) @ way > 0.2]
        x = [one["pixel_coords"][0] for one in scene["objects"]]
        assert scene["directions"]["left"] == [-v for v in scene["directions"]["right"]]
        leftmost, rightmost = int(np.argmin(x)), int(np.argmax(x))
        assert rightmost in scene["relationships"]["right"][leftmost]


def test_a_scene_depends_on_its_own_number_only():
    whole = world.make_scenes(6, seed=3)
    assert world.make_scenes(2, seed=3, start=4) == whole[4:]
    assert world.make_scenes(1, seed=3, start=2) == whole[2:3]
    assert [scene["image_index"] for scene in whole] == list(range(6))


def test_parts_seeds_and_splits_are_apart():
    """The place of the eye is the first thing drawn, whatever the split."""
    seen = [tuple(scene["camera"]["eye"]) for part in world.PARTS for seed in (0, 1)
            for split in "ABC" for scene in world.make_scenes(10, split, seed, part)]
    assert len(set(seen)) == len(seen) == 180


def test_another_process_draws_the_same_bytes():
    code = ("import hashlib, json, world; s = world.make_scenes(3, 'A', 7, look='varied'); "
            "print(hashlib.sha256(json.dumps(s).encode() + world.render(s).tobytes()).hexdigest())")
    scenes = world.make_scenes(3, "A", 7, look="varied")
    here = json.dumps(scenes).encode() + world.render(scenes).tobytes()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           cwd=world.Path(world.__file__).parent, check=True)
    assert there.stdout.strip() == hashlib.sha256(here).hexdigest()


@pytest.mark.parametrize("options, named", [
    ({"split": "D"}, "split 'D'"), ({"part": "dev"}, "part 'dev'"), ({"look": "sea"}, "look 'sea'"),
    ({"shapes": "all"}, "shapes 'all'"), ({"objects": (5, 4)}, r"objects \(5, 4\)"),
    ({"objects": (0, 4)}, "objects"), ({"objects": (3, 13)}, "objects"), ({"seed": -1}, "seed -1"),
    ({"seed": 2**32}, "seed"), ({"start": -1}, "start -1"), ({"n": -1}, "n -1")])
def test_a_choice_that_does_not_exist_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        world.make_scenes(**{"n": 1, **options})


# ---- questions ----

def hand_made():
    """Seen along y: a blue cube in the middle, a red ball to its left and behind it, a red cylinder
    to its right and behind it, a large blue cube to its right and in front."""
    rows = [("cube", "small", "blue", "metal", (0, 0)),
            ("sphere", "large", "red", "rubber", (-2, 1)),
            ("cylinder", "small", "red", "metal", (1, 2)),
            ("cube", "large", "blue", "rubber", (2, -2))]
    at = np.array([place for *_, place in rows], float)
    ways = {"left": (-1, 0), "right": (1, 0), "front": (0, -1), "behind": (0, 1)}
    return {"objects": [dict(zip(("shape", "size", "color", "material"), row)) for row in rows],
            "relationships": {name: [[j for j in range(4) if (at[j] - at[i]) @ way > 0.2]
                                     for i in range(4)] for name, way in ways.items()}}


def program(*nodes):
    return [{"function": name, "inputs": inputs, "value_inputs": values}
            for name, inputs, values in nodes]


@pytest.mark.parametrize("way, answer", [("left", 1), ("right", 2), ("front", 1), ("behind", 2)])
def test_a_relation_on_a_hand_made_scene(way, answer):
    nodes = program(("scene", [], []), ("filter_size", [0], ["small"]),
                    ("filter_shape", [1], ["cube"]), ("unique", [2], []), ("relate", [3], [way]),
                    ("count", [4], []))
    assert world.execute(nodes, hand_made()) == answer
    red = [*nodes[:-1], *program(("filter_color", [4], ["red"]), ("count", [5], []))]
    assert world.execute(red, hand_made()) == {"left": 1, "right": 1, "front": 0, "behind": 2}[way]


@pytest.mark.parametrize("name, answer", [("greater_than", "no"), ("less_than", "no"),
                                          ("equal_integer", "yes")])
def test_comparing_as_many_red_as_blue_things(name, answer):
    nodes = program(("scene", [], []), ("filter_color", [0], ["red"]), ("count", [1], []),
                    ("filter_color", [0], ["blue"]), ("count", [3], []), (name, [2, 4], []))
    assert world.execute(nodes, hand_made()) == answer
    less = [*nodes[:3], *program(("filter_material", [1], ["metal"]), ("count", [3], []),
                                 (name, [4, 2], []))]
    assert world.execute(less, hand_made()) == ("yes" if name == "less_than" else "no")


def test_a_program_without_an_answer_is_refused():
    scene = hand_made()
    with pytest.raises(ValueError, match="exactly one object, got 2"):
        world.execute(program(("scene", [], []), ("filter_color", [0], ["red"]),
                              ("unique", [1], [])), scene)
    with pytest.raises(ValueError, match="unknown function 'intersect'"):
        world.execute(program(("scene", [], []), ("intersect", [0], [])), scene)


def words_to_things(words, scene):
    """The objects that English words describe, found without any program."""
    kinds = {"size": world.SIZES, "color": world.COLORS, "material": world.MATERIALS,
             "shape": sum(world.SHAPES.values(), ())}
    wanted = {}
    for word in words.split():
        word = {"toruses": "torus"}.get(word, word.removesuffix("s") if word != "torus" else word)
        key = next((key for key, values in kinds.items() if word in values), None)
        assert key or word in world.NOUNS, word
        if key:
            wanted[key] = word
    return [i for i, one in enumerate(scene["objects"])
            if all(one[key] == value for key, value in wanted.items())]


def answer_by_reading(question, scene):
    """The answer from the English of a question and the 3-D coordinates alone."""
    text = question.removesuffix("?").removesuffix(" in the image").removesuffix(" are there")
    text = text.removesuffix(" are")
    if text.startswith("Are there "):
        text = text.removeprefix("Are there ")
        first, second = text.replace(" as ", " than ").split(" than ")
        how, first = first.removeprefix("as ").split(" ", 1)
        a, b = len(words_to_things(first, scene)), len(words_to_things(second, scene))
        return "yes" if {"more": a > b, "fewer": a < b, "many": a == b}[how] else "no"
    text = text.removeprefix("How many ").removeprefix("What number of ").removeprefix("different ")
    if " the " not in text:
        return len(words_to_things(text, scene))
    wanted, where = text.split(" are ")
    way, anchor = where.split(" the ")
    anchor, = words_to_things(anchor, scene)
    along = np.array(scene["directions"][{"left of": "left", "right of": "right",
                                          "in front of": "front", "behind": "behind"}[way]])
    at = [np.array(one["3d_coords"]) for one in scene["objects"]]
    return sum((at[i] - at[anchor]) @ along > 0.2 for i in words_to_things(wanted, scene))


@pytest.mark.parametrize("kind", world.KINDS)
@pytest.mark.parametrize("split", ["A", "C"])
def test_answers_are_those_of_a_reader_who_sees_no_program(kind, split):
    rng, kinds = np.random.default_rng(0), set()
    for scene in world.make_scenes(40, split, objects=(1, 10)):
        for _ in range(6):
            asked = world.ask(scene, kind, rng)
            assert asked["answer"] == answer_by_reading(asked["question"], scene), asked
            assert asked["kind"] == kind and json.loads(json.dumps(asked)) == asked
            assert world.execute(asked["program"], scene) == asked["answer"]
            kinds.add(type(asked["answer"]))
    assert kinds == ({str} if kind == "compare" else {int})


def test_phrases_are_english():
    wanted = {"shape": "torus", "material": "metal", "size": "small"}
    assert world.phrase(wanted, "item") == "small metal toruses"
    assert world.phrase(wanted, "item", plural=False) == "small metal torus"
    assert world.phrase({"color": "red"}, "item") == "red items"


def test_the_same_generator_asks_the_same_questions():
    scene = world.make_scenes(1)[0]
    one, two = ([world.ask(scene, kind, rng) for kind in world.KINDS]
                for rng in (np.random.default_rng(4), np.random.default_rng(4)))
    assert one == two


def test_answers_are_a_useful_mix():
    """Few zeros for attributes; yes and no about equally often."""
    rng, scenes = np.random.default_rng(0), world.make_scenes(200)
    attribute = [world.ask(scene, "attribute", rng)["answer"] for scene in scenes]
    assert 0.02 < np.mean(np.array(attribute) == 0) < 0.25
    compare = Counter(world.ask(scene, "compare", rng)["answer"] for scene in scenes)
    assert 70 < compare["yes"] < 130 and compare.total() == 200


def test_an_anchor_is_told_apart_by_few_words():
    scene = hand_made()
    for seed in range(20):
        wanted = world.pick_anchor(scene, np.random.default_rng(seed))
        matching = [one for one in scene["objects"]
                    if all(one[key] == value for key, value in wanted.items())]
        assert len(matching) == 1


def test_what_cannot_be_asked_is_refused():
    scene, rng = hand_made(), np.random.default_rng(0)
    with pytest.raises(ValueError, match="kind 'colour'"):
        world.ask(scene, "colour", rng)
    twins = {**scene, "objects": [scene["objects"][0]] * 4}
    with pytest.raises(ValueError, match="told from the others"):
        world.ask(twins, "relation", rng)
    for made in world.make_scenes(30, objects=(2, 2)):            # made scenes always can be asked
        world.ask(made, "relation", rng)


# ---- files ----

def test_the_command_line_writes_pictures_scenes_and_questions(tmp_path, monkeypatch, capsys):
    out = tmp_path / "b"
    monkeypatch.setattr(sys, "argv", ["world.py", "--out", str(out), "--n", "2", "--split", "B",
                                      "--size", "96x64", "--kinds", "count,compare"])
    world.main()
    scenes = json.loads((out / "scenes.json").read_text())["scenes"]
    questions = json.loads((out / "questions.json").read_text())["questions"]
    assert scenes == world.make_scenes(2, "B", size=(96, 64))
    assert [q["kind"] for q in questions] == ["count", "compare"] * 2
    assert [q["question_index"] for q in questions] == [0, 1, 2, 3]
    for question in questions:
        scene = scenes[question["image_index"]]
        assert world.execute(question["program"], scene) == question["answer"]
        assert question["image_filename"] == scene["image_filename"]
    for scene in scenes:
        picture = np.asarray(Image.open(out / "images" / scene["image_filename"]))
        np.testing.assert_array_equal(picture, world.render([scene], (96, 64))[0])


def test_the_sheet_shows_the_three_worlds(tmp_path):
    world.sheet(tmp_path / "sheet.png", side=64, columns=2)
    page = np.asarray(Image.open(tmp_path / "sheet.png"))
    for row, split in enumerate(world.SPLITS):
        drawn = world.render(world.make_scenes(1, split, size=(64, 64)), (64, 64))[0]
        y = 8 + row * (64 + 62)
        np.testing.assert_array_equal(page[y:y + 64, 8:72], drawn)
        assert page[y + 64:y + 126].min() < 100                   # words under the picture


@pytest.mark.parametrize("argv", [[], ["--out", "x", "--size", "112"], ["--out", "x", "--objects",
                                  "5,4"], ["--out", "x", "--objects", "5"],
                                  ["--out", "x", "--size", "0x9"]])
def test_a_wrong_command_line_is_refused(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["world.py", *argv])
    with pytest.raises(SystemExit) as left:
        world.main()
    assert left.value.code == 2
