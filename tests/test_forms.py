"""Chapter two of forms.py: one question in four forms, and what teachers answer to it."""

import re

import numpy as np
import pytest

import forms
import world
from forms import KINDS, TEACHERS, teach
from grading import load_rewards
from rewards import final_answer, format
from scenes import load_world

SCENES = world.make_scenes(40, "A", seed=3, objects=(2, 6))


def asked(kind, i):
    return KINDS[kind](SCENES[i], np.random.default_rng(i))


def test_the_forms_of_a_scene_ask_the_same_question():
    """The random numbers of the form come after those of the question."""
    for i in range(len(SCENES)):
        question = asked("open", i)["question"]
        assert asked("judge", i)["question"].startswith(question + " Is it ")
        assert asked("pick", i)["question"].startswith(question + " (A) ")
        read = asked("read", i)["question"]
        assert read.endswith(question.replace("in the image", "in the scene"))


def test_the_right_letter_names_the_right_number():
    for i in range(len(SCENES)):
        one, right = asked("pick", i), asked("open", i)["answer"]
        listed = dict(re.findall(r"\(([A-D])\) (\d+)", one["question"]))
        assert listed[one["answer"]] == str(right) and len(set(listed.values())) == 4
        assert all(abs(int(n) - right) <= 4 for n in listed.values())


def test_is_it_is_answered_by_yes_about_half_of_the_time():
    answers = [asked("judge", i) for i in range(len(SCENES))]
    for i, one in enumerate(answers):
        said = int(one["question"].rpartition("Is it ")[2].rstrip("?"))
        assert (one["answer"] == "yes") == (said == asked("open", i)["answer"])
    assert 0.3 < np.mean([one["answer"] == "yes" for one in answers]) < 0.7


def test_who_reads_the_scene_can_count_without_a_picture():
    for i, scene in enumerate(SCENES):
        question = asked("read", i)["question"]
        told = question.removeprefix("Scene: ").partition(". ")[0].split(", ")
        assert len(told) == len(scene["objects"])
        assert {t.split()[-1] for t in told} <= {"cube", "sphere", "cylinder"}
        assert sorted(told) == sorted(f"{o['size']} {o['color']} {o['material']} {o['shape']}"
                                      for o in scene["objects"])  # fmt: skip
    found = load_world("world:A:n=8:ask=read+judge:objects=2-4")
    assert [len(e.images) for e in found] == [int(e.task != "read") for e in found]


@pytest.mark.parametrize("kind", KINDS)
def test_who_overlooks_nothing_is_always_right(kind):
    for i, scene in enumerate(SCENES):
        one, rng = asked(kind, i), np.random.default_rng(i)
        for name, (_, overlook) in TEACHERS.items():
            text, right = teach(name, scene, one, rng)
            gold = str(one["answer"])
            if overlook == 0:
                assert right and final_answer(text) == gold
            if name != "flawed":
                assert format(text, None) == 1 and (final_answer(text) == gold) == right


def test_who_overlooks_small_objects_counts_too_few():
    rng = np.random.default_rng(0)
    said = [(int(final_answer(teach("formal", scene, asked("open", i), rng)[0])),
             asked("open", i)["answer"]) for i, scene in enumerate(SCENES)]
    assert all(few <= right for few, right in said) and any(few < right for few, right in said)


def test_a_count_that_is_no_option_becomes_the_nearest():
    assert forms.said({"numbers": [5, 3, 7, 2]}, 4) == "B"  # 3 and 5 are as near
    assert forms.said({"numbers": [5, 3, 7, 2]}, 9) == "C"
    assert forms.said({"said_number": 4}, 4) == "yes" and forms.said({"said_number": 4}, 3) == "no"
    assert forms.said({}, 4) == "4"


def test_a_world_has_its_teacher_s_answers_to_learn():
    source = "world:A:n=30:ask=open:objects=2-6:teacher=formal"
    every, right = load_world(source), load_world(source + ":keep=right")
    assert 0 < len(right) < len(every) == 30
    accuracy = load_rewards(("accuracy",))[0][1]
    assert all(accuracy(e.extra["completion"], e) == 1 for e in right)
    left = {e.row for e in every} - {e.row for e in right}
    assert all(accuracy(e.extra["completion"], e) == 0 for e in every if e.row in left)


@pytest.mark.parametrize("wrong, told", [
    ("teacher=list", "no teacher 'list' who answers open; there are flawed, listed"),
    ("ask=rec:teacher=listed", "who answers rec"),
    ("keep=right", "right where there is a teacher"),
    ("teacher=listed:keep=some", "keep is all, or right"),
])  # fmt: skip
def test_a_wrong_teacher_is_refused(wrong, told):
    ask = "" if "ask" in wrong else ":ask=open"
    with pytest.raises(ValueError, match=told):
        load_world(f"world:A:n=2{ask}:{wrong}")
