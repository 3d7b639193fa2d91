"""Chapter two of pointing.py: boxes, lists of them, and what has changed between two pictures."""

import json
from collections import Counter

import numpy as np
import pytest

import pointing
import world

SCENES = world.make_scenes(150, "A", seed=3, objects=(2, 6))


def asked(kind, scenes=SCENES, seed=0):
    """(scene, question) of every scene of which it can be asked."""
    rng, found = np.random.default_rng(seed), []
    for scene in scenes:
        try:
            found.append((scene, pointing.KINDS[kind](scene, rng)))
        except ValueError:
            continue
    return found


def thing_at(scene, box):
    [one] = [thing for thing in scene["objects"] if thing["bbox"] == box]
    return one


def test_a_referring_expression_fits_one_object_and_its_box_is_the_answer():
    found = asked("rec")
    assert len(found) == len(SCENES)
    for scene, one in found:
        last = one["program"][-1]
        assert last["function"] == "unique"
        inner = world.execute(one["program"][:-1], scene)
        assert [scene["objects"][i]["bbox"] for i in inner] == [json.loads(one["answer"])]
        assert one["said"] in one["question"]


def test_one_expression_in_three_says_where_the_object_stands():
    """One in three is tried (150 x 1/3 = 50, standard deviation 5.8); a few have no such words."""
    placed = [one for _, one in asked("rec") if any(n["function"] == "relate"
                                                    for n in one["program"])]  # fmt: skip
    assert 30 < len(placed) < 68
    assert all(any(way in one["question"] for way in world.WAYS.values()) for one in placed)


def test_a_list_has_a_box_for_each_object_of_the_kind_from_left_to_right():
    none = 0
    for scene, one in asked("detect"):
        wanted = {n["function"][7:]: n["value_inputs"][0] for n in one["program"][1:]}
        fits = [t for t in scene["objects"] if all(t[k] == v for k, v in wanted.items())]
        none += not fits
        if not fits:
            assert one["answer"] == "None"
            continue
        boxes = [item["bbox_2d"] for item in json.loads(one["answer"])]
        assert boxes == sorted(thing["bbox"] for thing in fits)
        assert {item["label"] for item in json.loads(one["answer"])} == {one["said"]}
    assert 5 < none < 40


def test_a_choice_has_one_right_option_and_the_letter_is_no_hint():
    letters = Counter()
    for scene, one in asked("choice"):
        letters[one["answer"]] += 1
        text, _, listed = one["question"].partition("? ")
        options = dict(item.split(") ") for item in listed[1:].split(" ("))
        assert len(set(options.values())) == len(options) >= 2
        assert options[one["answer"]] == world.execute(one["program"], scene)
        assert not any(f" {value} " in f"{text} " for value in options.values())
    assert letters["A"] < letters.total() / 2 > letters["B"]
    assert len(letters) == 4


def test_yes_and_no_are_about_as_frequent():
    answers = Counter(one["answer"] for _, one in asked("yes_no"))
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] - 75) < 25
    for scene, one in asked("yes_no"):
        assert world.execute(one["program"], scene) == one["answer"]


# ---- two pictures ----

@pytest.fixture(scope="module")
def pairs():
    return [pointing.changed(scene, np.random.default_rng(i)) for i, scene in enumerate(SCENES)]


def names(scene):
    return [tuple(thing[key] for key in world.ATTRIBUTES) for thing in scene["objects"]]


def test_each_change_is_as_likely_and_is_what_happened(pairs):
    words = Counter(before["change"]["word"] for before, _ in pairs)
    assert set(words) == set(pointing.CHANGES)
    assert all(15 < n < 65 for n in words.values())  # 37.5, standard deviation 5.3
    for before, after in pairs:
        word, gone = before["change"]["word"], Counter(names(before)) - Counter(names(after))
        new, places = Counter(names(after)) - Counter(names(before)), (
            [thing["3d_coords"] for thing in scene["objects"]] for scene in (before, after))
        thing = before["change"]["thing"]
        changed = Counter([tuple(thing.values())] if thing else [])
        assert gone == (changed if word == "removed" else Counter())
        assert new == (changed if word == "added" else Counter())
        moved = [a != b for a, b in zip(*places)] if word in ("moved", "nothing") else []
        assert sum(moved) == (word == "moved")


def test_both_pictures_have_one_camera_and_nothing_else_differs(pairs):
    for before, after in pairs[:40]:
        assert before["camera"] == after["camera"]
        assert before["look"] == after["look"]
        same = before["change"]["word"] == "nothing"
        first, second = world.render([before, after])
        assert (first == second).all() == same
        for scene in (before, after):
            for thing in scene["objects"]:
                x, y, _ = thing["pixel_coords"]
                assert 0 <= x <= 112 and 0 <= y <= 112


def test_an_object_that_moves_goes_far_and_collides_with_nothing(pairs):
    seen = 0
    for before, after in pairs:
        if before["change"]["word"] != "moved":
            continue
        seen += 1
        at, radii = (np.array(x) for x in zip(*(
            (t["3d_coords"][:2], world.SIZES[t["size"]]) for t in after["objects"])))
        gaps = np.hypot(*(at[:, None] - at).transpose(2, 0, 1)) - radii[:, None] - radii
        assert gaps[~np.eye(len(at), dtype=bool)].min() >= world.MIN_DIST - 1e-9
        was = np.array([t["3d_coords"][:2] for t in before["objects"]])
        assert np.hypot(*(at - was).T).max() >= 1.5
    assert seen > 15


def test_the_question_is_the_same_whatever_has_changed(pairs):
    found = {pointing.difference(before, None)["question"] for before, _ in pairs}
    assert found == {pointing.CHANGED}
    assert pointing.difference(pairs[0][0], None)["answer"] == pairs[0][0]["change"]["word"]
