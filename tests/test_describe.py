"""describe.py, chapter two: CLEVR's JSON becomes text and questions, the same in every run."""

import json

import numpy as np
import pytest
from PIL import Image

from describe import (
    ALL,
    PROMPTS,
    counting_rows,
    describe,
    load_clevr,
    load_drawn,
    messages,
    some,
)
from rows import load_examples

# An object as in CLEVR_trainA_scenes.json, and R1-V's line for it.
THING = {
    "size": "large", "color": "red", "material": "rubber", "shape": "cylinder",
    "rotation": 291.3258, "3d_coords": [-0.8904, -2.7311, 0.6999],
    "pixel_coords": [101, 152, 10.04],
}  # fmt: skip
LINE = ("A large red rubber cylinder rotated 291.3° located at 3D coordinates (-0.89, -2.73, 0.70) "
        "and pixel coordinates (101, 152, 10.04)")  # fmt: skip
CUBE = {**THING, "shape": "cube", "color": "gray", "3d_coords": [1, 0, -0.001]}


def clevr(folder, **change) -> tuple[str, str]:
    """The two files of a split with two images and six questions."""
    def scene(i, *things):
        return {"image_index": i, "image_filename": f"CLEVR_trainA_00000{i}.png", "split": "trainA",
                "objects": things, "relationships": {"left": [[1], []]}, "directions": {}}

    def asked(n, i, question, answer):
        return {"question_index": n, "image_index": i, "question": question, "answer": answer,
                "image_filename": f"CLEVR_trainA_00000{i}.png",
                "program": [{"function": "scene", "inputs": [], "value_inputs": []}]}  # fmt: skip

    scenes = {"info": {}, "scenes": [scene(0, THING), scene(1, THING, CUBE)]}
    questions = {"info": {}, "questions": [
        asked(0, 0, "How many big things are there?", "1"),
        asked(1, 0, "What color is the cylinder?", "red"),
        asked(2, 0, "What NUMBER of cubes are there?", "0"),
        asked(3, 1, "Are there the same number of cubes and cylinders?", "yes"),
        asked(4, 1, "Is there a cube?", "yes"),
        asked(5, 0, "How many small things are there?", "0"),
    ]}  # fmt: skip
    for name, content in {"scenes": scenes, "questions": questions}.items():
        (folder / f"{name}.json").write_text(json.dumps(change.get(name, content)))
    return str(folder / "scenes.json"), str(folder / "questions.json")


# ------------------------------------------------------------------------------------------ files


def test_a_split_is_read_without_what_is_not_needed(tmp_path):
    scenes, questions = load_clevr(*clevr(tmp_path))
    assert list(scenes) == ["CLEVR_trainA_000000.png", "CLEVR_trainA_000001.png"]
    assert scenes["CLEVR_trainA_000000.png"]["objects"] == [THING]
    assert len(questions) == 6
    assert not {"program", "relationships", "directions"} & {*scenes["CLEVR_trainA_000000.png"],
                                                             *questions[0]}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), [
    ({"scenes": {"questions": []}}, r"scenes.json: not CLEVR's JSON, an object with a list 'scene"),
    ({"scenes": [1]}, r"scenes.json: not CLEVR's JSON"),
    ({"scenes": {"scenes": [{"objects": []}]}}, r"scenes\[0\] has no image_filename"),
    ({"scenes": {"scenes": {"a": 1}}}, r"scenes\[0\] has no image_filename and no objects"),
    ({"scenes": {"scenes": [3]}}, r"scenes\[0\] has no image_filename and no objects"),
    ({"questions": {"questions": [{"image_filename": "a", "question": "How many?"}]}},
     r"questions\[0\] has no answer \(CLEVR's test split has no answers\)"),
])  # fmt: skip
def test_a_file_that_is_not_clevrs_is_named(tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        load_clevr(*clevr(tmp_path, **change))


def test_a_broken_file_is_named(tmp_path):
    scenes, questions = clevr(tmp_path)
    (tmp_path / "scenes.json").write_text('{"scenes": [')
    with pytest.raises(ValueError, match=r"scenes.json: not CLEVR's JSON"):
        load_clevr(scenes, questions)


def test_a_world_is_read_with_its_pictures(tmp_path):
    scenes, questions = load_drawn("world:A:n=3:seed=5", tmp_path, "images/q")
    examples = load_examples("world:A:n=3:seed=5")
    assert list(scenes) == [f"images/q/CLEVR_A_train_00000{i}.png" for i in range(3)]
    for name, asked, example in zip(scenes, questions, examples):
        assert scenes[name] == example.extra["scene"]
        assert asked["image_filename"] == name and asked["answer"] == example.solution
        assert "in the described scene" in asked["question"] and "image" in example.problem
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), example.images[0])


# ------------------------------------------------------------------------------------------- rows


def test_a_scene_is_described_in_r1vs_words():
    """The example of src/distill_r1/README.md."""
    assert describe({"objects": [THING, CUBE]}) == (
        f"Scene Description:\n{LINE}\nA large gray rubber cube rotated 291.3° located at 3D "
        "coordinates (1.00, 0.00, -0.00) and pixel coordinates (101, 152, 10.04)\n"
    )


def test_counting_questions_are_kept_and_each_image_is_counted_once(tmp_path):
    scenes, questions = load_clevr(*clevr(tmp_path))
    rows = list(counting_rows(scenes, questions))
    a, b = "CLEVR_trainA_000000", "CLEVR_trainA_000001"
    assert [(row["id"], row["problem"], row["solution"]) for row in rows] == [
        (f"{a}#0", "How many big things are there?", "1"),
        (f"{a}#all", ALL, "1"),
        (f"{a}#2", "What NUMBER of cubes are there?", "0"),
        (f"{b}#3", "Are there the same number of cubes and cylinders?", "yes"),
        (f"{b}#all", ALL, "2"),
        (f"{a}#5", "How many small things are there?", "0"),
    ]
    assert [row["image"] for row in rows] == [f"{row['id'].split('#')[0]}.png" for row in rows]
    for row in rows:
        assert row["description"] == describe(scenes[row["image"]])
    assert list(counting_rows(scenes, questions)) == rows


def test_a_question_without_a_number_of_its_own_has_its_place(tmp_path):
    scenes, questions = load_clevr(*clevr(tmp_path))
    for asked in questions:
        del asked["question_index"]
    ids = [row["id"].split("#")[1] for row in counting_rows(scenes, questions)]
    assert ids == ["0", "all", "2", "3", "all", "5"]


def test_a_question_about_no_scene_and_a_scene_that_is_not_clevrs_are_named(tmp_path):
    scenes, questions = load_clevr(*clevr(tmp_path))
    lost = scenes.pop("CLEVR_trainA_000001.png")
    with pytest.raises(ValueError, match=r"question 3 is about CLEVR_trainA_000001.png, of which"):
        list(counting_rows(scenes, questions))
    del lost["objects"][0]["rotation"]
    scenes["CLEVR_trainA_000001.png"] = lost
    with pytest.raises(ValueError, match=r"scene of CLEVR_trainA_000001.png is not.*'rotation'"):
        list(counting_rows(scenes, questions))


def test_a_limit_draws_by_seed_and_keeps_the_order():
    rows = [{"id": i} for i in range(100)]
    assert list(some(rows, 100, None, 0)) == list(some(rows, 100, 100, 0)) == rows
    few = [row["id"] for row in some(rows, 100, 10, 0)]
    assert few == sorted(few) and len(few) == 10
    assert few == [row["id"] for row in some(rows, 100, 10, 0)]
    assert few != [row["id"] for row in some(rows, 100, 10, 1)] and few[-1] > 10


# ---------------------------------------------------------------------------------------- prompts


def test_a_question_is_asked_in_r1vs_words():
    row = {"problem": ALL, "description": "Scene Description:\nA cube\n"}
    asked = "Answer the question according to scene description.\n\nScene Description:\nA cube\n\n"
    asked += f"Question:\n{ALL}"
    assert messages(row, "v1") == [{"role": "user", "content": asked}]
    (v2,) = messages(row, "v2")
    assert v2["content"].startswith(asked + "\nInstructions:\n1. ")
    assert "'**The answer is: **' followed by your answer" in v2["content"]
    assert list(PROMPTS) == ["v1", "v2"]


def test_a_template_of_ones_own_and_a_system_prompt():
    row = {"problem": "{Description}?", "description": "{Question}!"}
    assert messages(row, "{Description} {Question}", "Be kind.") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "{Question}! {Description}?"},
    ]
    with pytest.raises(ValueError, match=r"'v3': neither a text with .Question. nor one of v1,"):
        messages(row, "v3")
