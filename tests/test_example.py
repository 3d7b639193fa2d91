"""Chapter two of example.py: the columns of the field, and what a row may not say."""

import json

import pytest

from example import Example, to_example
from rewards import accuracy, gold_answer, math

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


# ------------------------------------------------------------------ rows of the systems of stages


@pytest.fixture
def pictures(tmp_path):
    """A folder, resolved, with two files that a row may name."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(DATA)
    return tmp_path.resolve()


def test_a_row_of_sat_as_visualthinker_packs_it(pictures):
    """process_dataset.py: the option's text, a number or a letter is what the assistant says."""
    asked = ("<image> Answer in natural language. Is the cup left or right of the hat? Choose "
             "between the following options: left, or right")  # fmt: skip
    for said in ("left", "3", "B"):
        chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        found = read({"messages": chat, "images": ["a.png"]}, pictures)
        assert found.problem == asked.removeprefix("<image> ") and found.solution == said
        assert found.images == (str(pictures / "a.png"),)
        assert accuracy(f"<think>so</think><answer>{said}</answer>", found) == 1
        assert accuracy("<think>so</think><answer>right</answer>", found) == 0


@pytest.mark.parametrize("where", ["file://{}/a.png", "{}/a.png", "a.png", "file://a.png"])
def test_a_row_of_mm_eureka(pictures, where):
    """README of its branch for InternVL; the pictures lie below --images."""
    row = {"id": "0", "conversations": [{"role": "system", "content": "Think."},
                                        {"role": "user", "content": "What is x?"}],
           "answer": "\\frac{1}{2}", "image_urls": [where.format(pictures)]}  # fmt: skip
    found = read(row, pictures)
    assert (found.problem, found.solution) == ("What is x?", "\\frac{1}{2}")
    assert found.images == (str(pictures / "a.png"),)
    assert found.extra == {"id": "0", "system": "Think."}


def test_a_chat_may_be_json_text_as_in_lmm_r1_and_mm_eureka(pictures):
    """{"message": "[{...}]", "question", "answer"}: with and without a picture."""
    part = {"type": "image", "image": f"file://{pictures}/b.png"}
    text = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 2?"}]
    seen = [{"role": "user", "content": [part, {"type": "text", "text": "How many?"}]}]
    found = read({"message": json.dumps(text), "question": "1 + 2?", "answer": "$3$"}, pictures)
    assert found == Example("1 + 2?", "$3$", (), "", "a.jsonl:1")
    assert found.extra == {"system": "Think."}
    found = read({"id": "7", "message": json.dumps(seen), "answer": "$3$"}, pictures)
    assert found == Example("How many?", "$3$", (str(pictures / "b.png"),), "", "a.jsonl:1")
    assert math("<think>so</think><answer> $3$ </answer>", found) == 1


def test_a_message_that_is_no_chat_is_another_column():
    assert read(GOOD | {"message": "was checked"}).extra == {"message": "was checked"}
    assert refused({"message": '[{"role": "user"', "answer": "3"}).startswith("message '[{")
    assert "no JSON" in refused({"message": "[" * 10**6, "answer": "3"})
    chat = json.dumps([{"role": "user", "content": "How many?"}])
    for name in ("problem", "prompt", "messages"):
        told = refused({"message": chat, name: "How high?", "answer": "3"})
        assert told == f"has {name} and message, which mean the same"
    assert read(GOOD | {"message": "[]"}).extra == {"message": "[]"}
    told = refused({"message": "[3]", "answer": "3"})
    assert told == "a message 3: expected a role and a content"


@pytest.mark.parametrize("solution, gold", [
    ("<answer>yes</answer>", "yes"), ("<answer>A, C</answer>", "A, C"),
    ("<answer>[10, 20, 30, 40]</answer>", "[10, 20, 30, 40]"),
    ("<thinking>Two\nhats.</thinking><answer>cat, dog</answer>", "cat, dog"),
])  # fmt: skip
def test_a_row_of_curr_reft(pictures, solution, gold):
    """Its reward asks for the column "task"; the thought of a solution is one to learn."""
    row = {"problem": "What is there?", "solution": solution, "task": "classify", "image": "a.png"}
    found = read(row, pictures)
    assert gold_answer(found.solution) == gold and found.task == found.extra["task"] == "classify"
    assert len(found.images) == 1
    thought = "<think>Two\nhats.</think>"
    thinks = {"thinking": thought, "completion": thought + "<answer>cat, dog</answer>"}
    assert found.extra == {"task": "classify"} | (thinks if "Two" in solution else {})


def test_a_row_of_open_r1_multimodal(pictures):
    """lmms-lab/multimodal-open-r1-8k-verified: what was rewritten is kept beside it."""
    told = "<think>It is\n12 / 4.</think>\n\n<answer>3</answer>"
    before = {"original_question": "Find x. (A) 3 (B) 4", "original_answer": "A"}
    image = {"bytes": DATA, "path": None}
    found = read({"image": image, "problem": "What is x?", "solution": told} | before, pictures)
    assert (found.problem, found.solution) == ("What is x?", "<answer>3</answer>")
    thought = "<think>It is\n12 / 4.</think>"
    assert found.extra == {"thinking": thought, "completion": told} | before


@pytest.mark.parametrize("roles, column, cell", [
    (("human", "gpt"), "image", "a.png"), (("user", "assistant"), "images", ["a.png"]),
])  # fmt: skip
def test_a_row_of_vision_r1s_cold_start(pictures, roles, column, cell):
    """vision_r1_llava_cot_full.json and vision_r1_mulberry_sft_full.json."""
    told = "<think>Wait, a cube.</think><answer> Final Answer:B </answer>"
    chat = [dict(zip(("from", "value"), turn)) for turn in zip(roles, ("<image>Which?", told))]
    found = read({"conversations": chat, column: cell}, pictures)
    assert found.problem == "Which?" and gold_answer(found.solution) == "B"
    assert found.extra == {"thinking": "<think>Wait, a cube.</think>", "completion": told}
    assert found.images == (str(pictures / "a.png"),)


def test_a_row_of_geometry3k():
    """hiyouga/geometry3k: pictures inside the rows."""
    found = read({"images": [{"bytes": DATA}], "problem": "<image>Find x.", "answer": "2 \\sqrt 3"})
    assert found == Example("Find x.", "2 \\sqrt 3", (DATA,), "", "a.jsonl:1")


@pytest.mark.parametrize("images", [["a.png"], []])
def test_a_row_of_r1_onevision(pictures, images):
    """LLaMA-Factory's sharegpt; what follows the thought is the answer, tagged or not."""
    told = "<think>The bar is at 7.</think>\n\nIt is 7."
    chat = [{"role": "user", "content": "<image>" * len(images) + "How high?"},
            {"role": "assistant", "content": told}]  # fmt: skip
    found = read({"messages": chat, "images": images}, pictures)
    assert (found.problem, found.solution) == ("How high?", "It is 7.")
    assert found.extra["completion"] == told and len(found.images) == len(images)
