"""traces.py, chapter two: files that survive a kill, and the answer that a text states."""

import json
import time

import pytest

from rewards import format
from traces import (
    after_thought,
    judged,
    need,
    of_image,
    read_rows,
    reflections,
    resumed,
    split_thought,
    stated_answer,
    tagged,
    tell_failed,
    to_learn,
    whole,
)

# ------------------------------------------------------------------------------------------ files


def write(path, *rows, end="\n"):
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


def test_rows_are_read_with_their_places(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "é"}, {"id": "b"})
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n", 1))
    (first, a), (second, b) = read_rows(path)
    assert (first, a, b) == (0, {"id": "é"}, {"id": "b"})
    assert json.loads(path.read_bytes()[second:]) == b


def test_a_cut_last_line_is_passed_over_and_another_bad_one_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "a"}, {"id": "b"}, end="")
    assert [row["id"] for _, row in read_rows(path)] == ["a", "b"]  # whole but for the newline
    path.write_text('{"id": "a"}\n{"id": "b')
    assert [row["id"] for _, row in read_rows(path)] == ["a"]
    for bad in ('{"id": "b', "[1]", "[" * 100_000):
        path.write_text(f'{{"id": "a"}}\n{bad}\n{{"id": "c"}}\n')
        with pytest.raises(ValueError, match=r"a.jsonl:2: not a JSON object"):
            list(read_rows(path))


def test_a_key_that_is_no_text_is_named_with_its_line(tmp_path):
    path = write(tmp_path / "f.jsonl", {"id": "a", "b": ""}, {"id": "a"}, {"b": 3})
    (at, first), *bad = read_rows(path)
    assert need(first, path, at, "id", "b")["id"] == "a"
    for line, (at, row) in enumerate(bad, 2):
        with pytest.raises(ValueError, match=rf"f.jsonl:{line}: has no text under 'b'"):
            need(row, path, at, "b")


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    with pytest.raises(KeyError), whole(path) as file:
        file.write("half")
        raise KeyError
    assert not path.exists()
    with whole(path) as file:
        file.write("all")
        assert not path.exists()
    assert path.read_text() == "all"
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


WANTED = {"a": ("How many?", "3"), "b": ("How many cubes?", "1")}


def answer(name, sample=0, **more) -> dict:
    problem, solution = WANTED[name]
    return {"id": name, "problem": problem, "solution": solution, "sample": sample, "teacher": "R1",
            "text": "5", **more}  # fmt: skip


def test_answers_are_added_line_by_line(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    with resumed(path, WANTED, "R1") as (done, append):
        assert done == set()
        append(answer("a"))
        assert [row for _, row in read_rows(path)] == [answer("a")]  # at once, not at the end
        append(answer("a", 1))
    with resumed(path, WANTED, "R1") as (done, append):
        assert done == {("a", 0), ("a", 1)}
        append(answer("b", text="\ud800 \u2028 °"))
    assert [row["id"] for _, row in read_rows(path)] == ["a", "a", "b"]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_kill_costs_the_line_that_was_being_written(tmp_path, cut):
    path = write(tmp_path / "a.jsonl", answer("a"), answer("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    with resumed(path, WANTED, "R1") as (done, append):
        assert done == ({("a", 0), ("b", 0)} if cut == 1 else {("a", 0)})
        append(answer("b"))
    assert [row for _, row in read_rows(path)][-1] == answer("b")
    assert path.read_bytes().startswith(json.dumps(answer("a")).encode() + b"\n")
    assert len(list(read_rows(path))) == (3 if cut == 1 else 2)


def test_answers_of_another_teacher_or_to_other_questions_are_not_mixed(tmp_path):
    path = write(tmp_path / "a.jsonl", answer("a"))
    with pytest.raises(ValueError, match=r"holds answers of the teacher R1, not V3; give another"):
        resumed(path, WANTED, "V3").__enter__()
    for other in (("How many?", "4"), ("How many balls?", "3")):
        with pytest.raises(ValueError, match="holds an answer to another question called a"):
            resumed(path, {"a": other}, "R1").__enter__()
    with resumed(path, {"b": WANTED["b"]}, "R1") as (done, _):  # more answers than are wanted
        assert done == {("a", 0)}


# ------------------------------------------------------------------- the answer in a teacher's text


@pytest.mark.parametrize(("text", "thought", "rest"), [
    ("<think>2 + 3</think>5", "2 + 3", "5"),
    (" <think>\n2 + 3\n</think>\n\n5 ", "2 + 3", "5"),
    ("2 + 3\n</think>5", "2 + 3", "5"),  # the opening tag was in the prompt
    ("<think>a</think> b <think>c</think> d", "a</think> b <think>c", "d"),
    ("<think></think>5", "", "5"),
])  # fmt: skip
def test_a_thought_ends_at_the_last_closing_tag(text, thought, rest):
    assert split_thought(text) == (thought, rest)


@pytest.mark.parametrize("text", ["5", "<think>5", ""])
def test_without_a_closing_tag_there_is_no_thought(text):
    assert split_thought(text) is None


@pytest.mark.parametrize(("text", "stated"), [
    # the forms of R1-V's filter_r1.py
    ("**The answer is: ** 5", "5"), ("**The answer is:** 5", "5"), ("**The answer is: 5**", "5"),
    ("**Answer: ** yes", "yes"), ("**Answer**: 5", "5"), ("**Answer:** There are 5 items", "5"),
    ("**Final Count:** 5 spheres", "5"), ("**Total:** 5", "5"), ("The answer is: No", "no"),
    ("So, the answer is **5**.", "5"), ("Therefore **5**", "5"), ("Thus, 5", "5"),
    ("Hence 5.", "5"), ("The final answer is **5**", "5"), ("It should be 5.", "5"),
    ("**5**", "5"), ("**5 items**", "5"), ("**5 big cubes**", "5"), ("$\\boxed{5}$", "5"),
    ("There are 5 cubes", "5"), ("There is 1 cube", "1"),
    # others that teachers use
    ("<answer> 5 </answer>", "5"), ("<answer>large red cube</answer>", "large red cube"),
    ("\\boxed{\\text{yes}}", "yes"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{3} no, \\boxed{4}", "4"), ("The answer to the question is 5.", "5"),
    ("**The answer is: **\n\n5", "5"), ("the answer is: red.", "red"), ("Answer: (B)", "(b)"),
    ("The answer is: 1,000.", "1,000"), ("The answer is -2", "-2"), ("answer = 5", "5"),
    ("The total number of cubes is 5.", "5"), ("There are a total of 5 cubes.", "5"),
    ("There are exactly **5** cubes.", "5"), ("5", "5"), (" 5. ", "5"), ("**Yes**", "yes"),
    ("# 5", "5"), ("The   answer\tis :  5", "5"), ("THE ANSWER IS: 5", "5"),
    # the last statement, the clearest form, and not what only looks like one
    ("The answer is 4. Wait, the answer is 5.", "5"), ("The answer is 4.\nThe answer is 5.", "5"),
    ("There are 3 cubes.\nThere are 2 balls.\nThe answer is: 5\nThere are no cones.", "5"),
    ("The answer is: 5\n\nI hope this answer helps!", "5"), ("There are 2, so 5", "5"),
    ("There are **7** things:\n1. a\n2. b\n3. c\n4. d", "7"), ("A: 1\nB: 2\nC: 3\nSo 6\nx", "6"),
    ("The answer is: 5 (3 cubes and 2 balls)", "5"), ("\\boxed{5} The answer is: 6", "5"),
    # several values, or none
    ("The answer is 3 or 4", None), ("Answer: 3/4", None), ("There are 3-4 cubes", None),
    ("**3** cubes and **4** balls", None), ("I see 3 cubes and 4 balls.", None), ("", None),
    ("The answer is", None), ("<answer>3</answer><answer>4</answer>", None), ("<answer>3", None),
    ("\\boxed{3", None), ("\\boxed{}", None), ("No idea", None), ("yesterday", None),
    ("The answer", None), ("**", None), ("A sofa of 5 seats", None),
])  # fmt: skip
def test_an_answer_is_found_in_every_form(text, stated):
    assert stated_answer(text) == stated


@pytest.mark.parametrize("piece", [
    "a", " ", "answer ", "answer\n", "answer is ", "is ", "**", "**a", "*a", "\\boxed{", "{",
    "there are ", "1,", "1", "so ", "number of ", "total ", "<answer>", "</think>", "a scene ",
    "scene description "])  # fmt: skip
def test_no_text_takes_long(piece):
    """200,000 characters; what is quadratic would take minutes."""
    text = piece * (200_000 // len(piece))
    begin = time.process_time()
    split_thought(text), stated_answer(text), of_image(text), reflections(text)
    judged({"text": f"<think>{text}</think>{text}", "solution": "5", "problem": "", "id": ""})
    assert time.process_time() - begin < 3


# ------------------------------------------------------------------------- verdicts, rows to learn


@pytest.mark.parametrize(("text", "reason", "stated"), [
    ("<think>2 + 3</think>The answer is: 5", None, "5"),
    ("2 + 3</think>The answer is: 5.0", None, "5.0"),
    ("The answer is: 5", "no thought", None),
    ("<think>The answer is: 5", "no thought", None),
    ("<think> \n</think>The answer is: 5", "empty thought", "5"),
    ("<think>The answer is: 5</think>", "no answer", None),
    ("<think>The answer is: 5</think>Sure!", "no answer", None),
    ("<think>The answer is: 5</think>The answer is: 4", "wrong answer", "4"),
    ("<think>a <think> b</think>5", "tags in the thought", "5"),
    ("<think>a</think> b</think>5", "tags in the thought", "5"),
    ("<think>say <answer>5</answer></think><answer>5</answer>", "tags in the thought", "5"),
])  # fmt: skip
def test_a_verdict_has_its_reason(text, reason, stated):
    row = {"id": "a", "problem": "How many?", "solution": "<answer> 5 </answer>", "text": text}
    assert judged(row) == (reason, stated)
    assert judged({**row, "finish": "stop"}) == judged({**row, "finish": None}) == (reason, stated)
    assert judged({**row, "finish": "length"}) == ("cut off (length)", None)


@pytest.mark.parametrize(("text", "image"), [
    ("Look at the scene description.", "Look at the image."),
    ("The Scene Description lists 5", "The image lists 5"),
    ("Scene Description:\nA cube", "Image:\nA cube"),
    ("OK.\nScene description says", "OK.\nImage says"),
    ("How many are there in the described scene?", "How many are there in the image?"),
    ("a scene description", "an image"), ("A SCENE DESCRIPTION", "An image"),
    ("the scene's description, the scene’s description", "the image, the image"),
    ("descriptions of the scene; two scene descriptions", "images; two images"),
    ("the description of the scene", "the image"),
    ("The image description; a description of the picture", "The image; an image"),
    ("From the description, and the given description: 5", "From the image, and the image: 5"),
    ("the description of the red cube", "the description of the red cube"),
    ("the scene", "the scene"), ("obscene description", "obscene description"), ("", ""),
])  # fmt: skip
def test_the_scene_description_becomes_the_image(text, image):
    assert of_image(text) == image


def test_a_row_to_learn_is_of_the_hubs_form():
    row = {"problem": "How many in the described scene?", "solution": "5", "description": "A cube",
           "text": "<think>\nThe scene description has 5.\n</think>\n**The answer is: ** 5"}
    learnt = to_learn(row)
    assert learnt == {"problem": "How many in the image?", "solution": "<answer> 5 </answer>",
                      "thinking": "<think>The image has 5.</think>"}  # fmt: skip
    assert format(f"{learnt['thinking']} {learnt['solution']}", None) == 1
    seen = {**row, "solution": "<answer>5</answer>"}
    del seen["description"]  # who has seen the image says what it says
    assert to_learn(seen) == {"problem": row["problem"], "solution": "<answer> 5 </answer>",
                              "thinking": "<think>The scene description has 5.</think>"}


def test_a_question_may_ask_about_a_description():
    """Only "the described scene" of CLEVR's rows is put in other words, not what a picture has."""
    row = {"problem": "Which bird in the image fits the description?", "solution": "2",
           "text": "<think>The description has two.</think>2", "description": "Two birds."}
    assert to_learn(row) == {"problem": row["problem"], "solution": "<answer> 2 </answer>",
                             "thinking": "<think>The image has two.</think>"}  # fmt: skip


def test_a_row_that_was_not_verified_is_refused():
    with pytest.raises(ValueError, match="has no thought; is it verified"):
        to_learn({"id": "a", "problem": "", "solution": "5", "text": "5"})


def test_an_answer_can_be_learnt_to_the_letter():
    """With a thought or without; who has read a description learns to speak of the image."""
    row = {"problem": "How many?", "solution": "5", "text": " <answer>5.0</answer>\n"}
    assert to_learn(row, "text") == {"problem": "How many?", "solution": "<answer> 5 </answer>",
                                     "completion": "<answer>5.0</answer>"}  # fmt: skip
    row |= {"text": "<think>The description says 5</think>5", "description": "A cube"}
    assert to_learn(row, "text")["completion"] == "<think>The image says 5</think>5"
    with pytest.raises(ValueError, match=r"no thought; is it verified. .--learn text needs none"):
        to_learn({**row, "text": "5"})


def test_thoughts_are_put_before_an_answer_and_taken_off():
    text = tagged("2 + 3", "5")
    assert text == "<think>2 + 3</think>\n\n<answer> 5 </answer>"
    assert format(text, None) == 1
    assert after_thought(text) == "<answer> 5 </answer>"
    assert after_thought(" a cube \n") == "a cube"


def test_words_of_reflection_are_counted():
    thought = ("Wait, 3? Hmm. Hmmm: let me recheck. Alternatively, on second thought 4; wait. "
               "Waiting for a waiter who shimmers.")  # fmt: skip
    assert reflections(thought) == {"wait": 2, "hmm": 2, "let me recheck": 1, "alternatively": 1,
                                    "on second thought": 1}  # fmt: skip
    assert not reflections("Three and two are five.")


def test_the_first_twenty_that_failed_are_named():
    tell_failed({}, 30)
    with pytest.raises(ValueError) as error:
        tell_failed({(f"q{i}", "caption 0"): "busy" for i in range(22)}, 30)
    lines = str(error.value).splitlines()
    assert lines[0] == "22 of 30 questions got no answer; the same command asks them again"
    assert lines[1] == "  q0 (caption 0): busy" and lines[-1] == "  and 2 more" and len(lines) == 22
