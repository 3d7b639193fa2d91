"""Chapter two of example.py: the columns of the field, and what a row may not say."""

import pytest

from example import Example, to_example

DATA = b"the bytes of a picture"  # to_example does not decode it
GOOD = {"problem": "How many?", "solution": "3"}
ASK = {"from": "human", "value": "<image>How many?"}
TOLD = "<think>One, two.</think>\n<answer>2</answer>"


def read(fields, base="") -> Example:
    return to_example(fields, base, "a.jsonl:1")


def refused(fields) -> str:
    with pytest.raises(ValueError) as caught:
        read(fields)
    return str(caught.value)


def test_r1vs_rows_are_read_as_they_are():
    """leonardPKU/clevr_cogen_a_train, MMInstruction/Clevr_CoGenT_TrainA_70K_Complex and
    leonardPKU/GEOQA_R1V_Train_8K."""
    image = {"bytes": DATA, "path": None}
    row = {"image": image, "problem": "How many?", "solution": "<answer> 3 </answer>"}
    found = read(row)
    assert found == Example("How many?", "<answer> 3 </answer>", (DATA,), "", "a.jsonl:1")
    assert found.extra == {}


def test_the_thoughts_of_the_distilled_set_are_kept_with_their_tags():
    """MMInstruction/Clevr_CoGenT_TrainA_R1"""
    row = {"image": {"bytes": DATA}, "thinking": "<think>Hm.</think>", "problem": "How many?",
           "solution": "<answer> 3 </answer>"}  # fmt: skip
    found = read(row)
    assert found.extra == {"thinking": "<think>Hm.</think>"}
    assert found.solution == "<answer> 3 </answer>"


@pytest.mark.parametrize("thinking", [["One.", "Two."], 7, {"text": "Hm."}, float("nan")])
def test_a_thought_that_is_no_text_is_refused(thinking):
    assert read(GOOD | {"thinking": None}).extra == {"thinking": None}
    told = refused(GOOD | {"thinking": thinking})
    assert told == f"thinking {thinking!r}: a text is expected"


@pytest.mark.parametrize("ask", ["problem", "question", "prompt"])
@pytest.mark.parametrize("gold", ["solution", "ground_truth", "answer"])
@pytest.mark.parametrize("image", ["image", "images", "image_path", "file_name"])
def test_the_names_of_peers_mean_the_same(ask, gold, image):
    found = read({ask: "How many?", gold: 4, image: [DATA]})
    assert (found.problem, found.solution, found.images) == ("How many?", "4", (DATA,))
    assert found.extra == {}


def test_a_file_name_beside_the_image_is_just_another_column():
    found = read(GOOD | {"image": DATA, "file_name": "gone.png"})
    assert found.images == (DATA,) and found.extra == {"file_name": "gone.png"}


def test_other_columns_are_kept_for_rewards_of_ones_own():
    found = read(GOOD | {"box": [1, 2], "image": None, "id": 7, "task": "count", "none": None})
    assert found.extra == {"box": [1, 2], "id": 7, "task": "count", "none": None}
    assert found.task == "count"


@pytest.mark.parametrize(
    "problem", ["<image>How many <|image_pad|> are there?", "a\u2028b\x0b c\r\n", " {Question} \t"]
)
def test_text_is_kept_to_the_letter(problem):
    assert read(GOOD | {"problem": problem}).problem == problem


def test_anchors_of_images_leave_the_text():
    two = {"images": [DATA, DATA]}
    for problem in ("<image><image>\nWhich?", "<image> Which?<image>", "Which?"):
        assert read(GOOD | two | {"problem": problem}).problem == "Which?"
    told = refused(GOOD | two | {"problem": "<image>Which?"})
    assert told == "the question has 1 <image> for 2 images"


# ---- conversations ----


def test_a_row_of_vlm_r1():
    row = {"id": 1, "image": [DATA], "conversations": [ASK, {"from": "gpt", "value": "0"}]}
    found = read(row)
    assert (found.problem, found.solution, found.images) == ("How many?", "0", (DATA,))
    assert found.extra == {"id": 1, "completion": "0"}
    number = row | {"conversations": [ASK, {"from": "gpt", "value": 7}]}
    assert read(number).solution == "7"


BOXES = [{"bbox_2d": [10, 20, 30, 40], "label": "café"}, {"bbox_2d": [1, 2, 3, 4], "label": "b"}]


@pytest.mark.parametrize("gold, said", [
    ([10, 20, 30, 40], "[10, 20, 30, 40]"),
    ([0.5, 0.25, 1.0, 1.0], "[0.5, 0.25, 1.0, 1.0]"),
    (BOXES, '[{"bbox_2d": [10, 20, 30, 40], "label": "café"}, '
            '{"bbox_2d": [1, 2, 3, 4], "label": "b"}]'),
    ({"Position": [1, 2, 3, 4], "Confidence": 1}, '{"Position": [1, 2, 3, 4], "Confidence": 1}'),
    ([], "[]"),
])  # fmt: skip
def test_boxes_are_a_gold_answer_in_a_column_and_in_a_chat(gold, said):
    """VLM-R1's referring expressions have a list, its detection a list of dicts."""
    assert read({"problem": "Where?", "solution": gold, "image": DATA}).solution == said
    turns = [ASK, {"from": "gpt", "value": gold}]
    found = read({"image": "a.png", "conversations": turns} | {"image": DATA})
    assert (found.solution, found.extra["completion"]) == (said, said)


def test_a_row_of_visual_rft():
    """laolao77/ViRFT_COCO: boxes in thousandths, single-quoted as they are."""
    gold = "<answer>[{'Position': [166, 12, 612, 998], 'Confidence': 1}]</answer>"
    image = {"bytes": DATA, "path": "a.jpg"}
    found = read({"image": image, "problem": "Detect …", "solution": gold})
    assert found == Example("Detect …", gold, (DATA,), "", "a.jsonl:1")


def test_the_reward_of_a_row_is_kept_for_rewards_that_ask_for_it():
    row = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No"}],
           "accu_reward_method": "yes_no"}  # fmt: skip
    found = read(row)
    assert found.extra["accu_reward_method"] == "yes_no" and found.images == ()


def test_a_row_may_say_in_which_frame_its_boxes_are():
    assert read(GOOD).frame is None and read(GOOD | {"frame": "0-1000"}).frame == "0-1000"
    assert read(GOOD | {"frame": 17}).frame is None  # of a film
    told = refused(GOOD | {"frame": "pixel"})
    assert told == "frame 'pixel': must be one of pixels, resized, 0-1000"


def test_a_row_may_say_in_which_of_its_pictures_its_boxes_are():
    two = GOOD | {"images": [DATA, DATA]}
    assert read(two | {"box_image": 1}).extra == {"box_image": 1}
    for row in (two | {"box_image": 2}, two | {"box_image": -1}, GOOD | {"box_image": 0},
                two | {"box_image": "1"}, two | {"box_image": True}):  # fmt: skip
        assert "must be the place of one of its" in refused(row)


def test_an_anchor_without_its_image_is_refused_in_a_chat():
    turns = [ASK, {"from": "gpt", "value": "0"}]
    assert refused({"conversations": turns}) == "the question has 1 <image> for 0 images"


@pytest.mark.parametrize("content", [
    "How many?", "<image>How many?",
    [{"type": "image"}, {"type": "text", "text": "How many?"}],
    [{"type": "text", "text": "How ", "image": None}, {"type": "text", "text": "many?"}],
])  # fmt: skip
def test_trls_prompts_are_read(content):
    """A text or parts; parquet writes None into the keys that a part does not have."""
    system = {"role": "system", "content": "Be brief."}
    found = read({"prompt": [system, {"role": "user", "content": content}], "solution": "3",
                  "image": DATA})  # fmt: skip
    assert (found.problem, found.solution, found.images) == ("How many?", "3", (DATA,))
    assert found.extra == {"system": "Be brief."}


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_a_part_may_hold_its_image(tmp_path, key):
    (tmp_path / "a.png").write_bytes(b"")
    part = {"type": "image", "text": None, key: "a.png"}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "How many?"}]}
    found = read({"prompt": [turn], "solution": "3"}, tmp_path.resolve())
    assert found.images == (str(tmp_path.resolve() / "a.png"),) and found.problem == "How many?"


def test_messages_with_an_answer_and_prompts_with_a_completion_teach_the_same():
    user, told = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": TOLD}
    rows = [{"messages": [user, told]}, {"prompt": [user], "completion": [told]},
            {"prompt": "How many?", "completion": TOLD}, {"prompt": [user], "completion": TOLD},
            {"problem": "How many?", "solution": TOLD}]  # fmt: skip
    for row in rows:
        found = read(row)
        assert (found.problem, found.solution) == ("How many?", "<answer>2</answer>")
        assert found.extra == {"completion": TOLD, "thinking": "<think>One, two.</think>"}


def test_a_solution_beside_a_chat_is_the_gold_answer():
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": TOLD}]
    for gold in (2, "<think>Else.</think>2"):
        found = read({"messages": turns, "answer": gold})
        assert found.solution == "2"
        assert found.extra == {"completion": TOLD, "thinking": "<think>One, two.</think>"}


def test_a_column_of_thoughts_goes_before_those_of_the_answer():
    found = read({"problem": "a", "solution": TOLD, "thinking": "Mine."})
    assert found.extra == {"completion": TOLD, "thinking": "Mine."}
    assert found.solution == "<answer>2</answer>"
    assert read({"problem": "a", "solution": TOLD, "thinking": None}).extra["thinking"]


def test_a_completion_is_kept_to_the_letter():
    told = " \n<think>\nHm.\n</think>\n\n 3 \n"
    found = read({"problem": "a", "completion": told})
    assert found.solution == "3" and found.extra["completion"] == told
    assert found.extra["thinking"] == "<think>\nHm.\n</think>"
    plain = read({"problem": "a", "completion": " 3 \n"})
    assert plain.solution == plain.extra["completion"] == " 3 \n"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"solution": "3"}, "no problem"),
        ({"problem": " ", "solution": "3"}, "no problem"),
        ({"problem": "\ud800", "solution": "3"}, "surrogates not allowed"),
        ({"problem": "a", "solution": "\ud800"}, "surrogates not allowed"),
        ({"problem": "a", "completion": "<think>\ud800</think>3"}, "surrogates not allowed"),
        ({"problem": "a"}, "no solution"),
        ({"problem": "a", "solution": None}, "no solution"),
        ({"problem": "a", "solution": True}, "no solution"),
        ({"problem": "a", "solution": {"x": b"1"}}, "the solution {'x': b'1'}: "),
        ({"problem": "a", "solution": " "}, "the solution is empty"),
        ({"problem": "a", "solution": "<answer>  </answer>"}, "the solution is empty"),
        ({"problem": "a", "solution": float("nan")}, "the solution is empty"),
        ({"problem": "a", "solution": "<think>b</think> "}, "the solution is empty"),
        ({"problem": "a", "solution": "<think>b"}, "opens <think> and never closes it"),
        (GOOD | {"question": "b"}, "has problem and question, which mean the same"),
        (GOOD | {"answer": "3"}, "has solution and answer, which mean the same"),
        (GOOD | {"image": DATA, "images": [DATA]}, "has images and image"),
        (GOOD | {"image": 7}, "image 7: a path is expected"),
    ],
)
def test_what_a_row_lacks_or_says_twice_is_told(row, reason):
    assert reason in refused(row)


USER, GPT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [USER, GPT, USER, GPT]}, "several user turns: one question and one answer"),
        ({"messages": [USER, GPT, GPT]}, "several assistant turns"),
        ({"messages": [GPT, USER]}, "several user turns"),
        ({"messages": [USER, SYSTEM, GPT]}, "a system message after another"),
        ({"messages": [SYSTEM, SYSTEM, USER, GPT]}, "several system turns"),
        ({"messages": [SYSTEM, USER, GPT], "system": "t"}, "a system column and a system message"),
        ({"messages": [GPT]}, "no problem"),
        ({"messages": []}, "no problem"),
        ({"messages": [USER]}, "no solution"),
        ({"messages": [USER, GPT], "completion": "3"}, "several assistant turns"),
        ({"messages": ["a", "b"]}, "a message 'a': expected a role"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, GPT]}, "a message of the role 'to"),
        ({"messages": [USER, {"role": ["user"], "content": "x"}]}, "a message of the role ['us"),
        ({"messages": [{"role": "user", "content": None}, GPT]}, "content None: expected a text"),
        ({"messages": [{"role": "user", "content": 7}, GPT]}, "content 7: expected a text"),
        ({"prompt": 7, "solution": "3"}, "content 7: expected a text"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "a part {'type': 'video'"),
        ({"prompt": [{"role": "user", "content": ["a"]}]}, "a part 'a' of the user's"),
        ({"prompt": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "only text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "image": DATA}]}],
          "solution": "3"}, "no problem"),
        ({"prompt": [{"role": "user", "content": [
            {"type": "image", "image": DATA}, {"type": "text", "text": "a"}]}],
          "solution": "3", "image": "b.png"}, "has images in a column and in a message"),
        ({"prompt": [{"role": "user", "content": [
            {"type": "image", "url": "http://host/a.png"}, {"type": "text", "text": "a"}]}],
          "solution": "3"}, "no URL"),
    ],
)  # fmt: skip
def test_a_chat_of_another_form_is_refused(tmp_path, row, reason):
    with pytest.raises(ValueError) as caught:
        read(row, tmp_path)
    assert reason in str(caught.value)
