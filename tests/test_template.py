"""template.py, chapter two: the wordings are the published ones, to the letter, in every place.

What they become as tokens is in test_data.py, with the published chat template as the oracle.
"""

import itertools

import pytest

from boxes import View
from rewards import ANSWER, THINK
from template import TEMPLATES, Template, find_template, frame_words

START, END = ("<|im_start|>",), ("<|im_end|>",)
SYSTEM = "system\nYou are a helpful assistant."


def text_of(pieces) -> str:
    return "".join(piece if isinstance(piece, str) else piece[0] for piece in pieces)


def test_r1vs_prompts_are_its_own_to_the_letter():
    tail = "in <think> </think> and final answer (number) in <answer> </answer> tags."
    assert TEMPLATES["r1v"].user == "{Question}  Output the thinking process " + tail
    assert TEMPLATES["r1v_eval"].user == "{Question} First output the thinking process " + tail
    assert TEMPLATES["r1v_geoqa"].user == "{Question} Output the thinking process " + tail


def test_the_system_prompt_is_deepseeks_as_r1v_has_it():
    assert TEMPLATES["system"].system == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. The reasoning process and answer are enclosed within "
        "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
        "process here </think><answer> answer here </answer>"
    )
    assert TEMPLATES["r1v_sft"].system == TEMPLATES["system"].system


def test_the_tag_words_are_those_that_the_rewards_look_for():
    silent = {"direct", "plain", "vision_r1", "r1_onevision", "visualthinker"}
    for name in TEMPLATES.keys() - silent:
        said = TEMPLATES[name].user + TEMPLATES[name].system
        assert all(tag in said for tag in THINK + ANSWER)
    assert all(tag in TEMPLATES["direct"].user for tag in ANSWER)


def test_vlm_r1s_prompts_are_its_own_to_the_letter():
    """get_question_template of its Qwen2VLModule, for "default", "rec", "ic" and "odLength"."""
    first = ("{Question} First output the thinking process in <think> </think> tags and then "
             "output the final answer in <answer> </answer> tags.")  # fmt: skip
    assert TEMPLATES["vlm_r1"].user == first
    assert TEMPLATES["rec"].user == first + " Output the final answer in JSON format."
    mind = ("First thinks about the reasoning process in the mind and then provides the user with "
            "the answer. The reasoning process and answer are enclosed within <think> </think> and "
            "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>"
            "<answer> {}answer here </answer>")  # fmt: skip
    assert TEMPLATES["ic"].user == "{Question} " + mind.format("json format ")
    assert TEMPLATES["od_length"].user == mind.format("") + "\n{Question}"


def test_visual_rfts_prompts_are_its_own_to_the_letter():
    """Of its rows and evaluation: coco_evaluation, classification, lisa_evaluation."""
    strict = ("Output the thinking process in <think> </think> and final answer in <answer> "
              "</answer> tags.The output answer format should be as follows:\n<think> ... </think> "
              "<answer>{}</answer>\nPlease strictly follow the format.")  # fmt: skip
    assert text_of(TEMPLATES["virft_detect"].turns("dog", [])).split("user\n")[1] == (
        "Detect all objects belonging to the category 'dog' in the image, and provide the bounding "
        "boxes (between 0 and 1000, integer) and confidence (between 0 and 1, with two decimal "
        "places).\nIf no object belonging to the category 'dog' in the image, return 'No Objects'."
        "\n" + strict.format("[{'Position': [x1, y1, x2, y2], 'Confidence': number}, ...]")
        + "<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip
    assert TEMPLATES["virft_class"].user == "{Question}\n" + strict.format("species name")
    assert TEMPLATES["virft_ground"].user == (
        "Output the bounding box in the image corresponding to the instruction: {Question} Output "
        "the thinking process in <think> </think> and your grouding box. Following \"<think> "
        "thinking process </think>\n<answer>(x1,y1),(x2,y2)</answer>)\" format.")  # fmt: skip
    assert TEMPLATES["virft_ground"].system == TEMPLATES["system"].system


def test_visualthinkers_prompts_are_its_own_to_the_letter():
    """make_conversation_sat of its grpo.py: the base model's, whose answers it opens by <think>
    in the prompt and again in the reward, and the instructed model's."""
    [said] = TEMPLATES["visualthinker"].turns("What is left of the cup?", [])
    assert said == (
        "A conversation between User and Assistant. The user asks a question about the image, and "
        "the Assistant solves it. The assistant first thinks about the reasoning process in the "
        "mind and then provides the user with the answer.\nUser: What is left of the cup? \n"
        "Assistant: Let me solve this step by step.\n<think>"
    )
    assert TEMPLATES["visualthinker"].opening == "<think>"
    assert TEMPLATES["visualthinker_instruct"].user == (
        "{Question}  Output the thinking process in <think> </think> and final answer (option) in "
        "<answer> </answer> tags."
    )


def test_lmm_r1s_system_turn_is_its_own_to_the_letter():
    """Of its data, as of MM-Eureka's, which says it before the question."""
    latex = (
        "You should first thinks about the reasoning process in the mind and then provides the "
        "user with the answer. Your answer must be in latex format and wrapped in $...$.The "
        "reasoning process and answer are enclosed within <think> </think> and <answer> </answer> "
        "tags, respectively, i.e., <think> Since $1+1=2$, so the answer is $2$. </think><answer> "
        "$2$ </answer>, which means your output should start with <think> and end with </answer>."
    )
    assert TEMPLATES["lmm_r1"].system == (
        "You are a helpful assistant good at solving math problems with step-by-step reasoning. "
        + latex
    )
    assert TEMPLATES["mm_eureka"].user == latex + "\nQuestion:\n{Question}"


def test_curr_refts_stages_say_what_an_answer_may_be():
    """QUESTION_TEMPLATE_JUDGE, _others, _Classify, _DETECTION and _NORMAL of its three scripts."""
    first = ("{Question} First output the thinking process in <think> </think> tags and then "
             "output the final answer in <answer> </answer> tags.")  # fmt: skip
    said = {name: TEMPLATES[f"curr_reft_{name}"].user.removeprefix(first) for name in
            ("judge", "choice", "choices", "detect", "open")}  # fmt: skip
    assert said == {
        "judge": " Ensure your final answer is exactly 'yes' or 'no'.",
        "choice": " Ensure your final answer is exactly one of the provided option letters without "
                  "any additional text.",
        "choices": " Based on the given options, select all options that accurately describe what "
                   "is shown in the image. Ensure your final answer is exactly one or more of the "
                   "provided option letters without any additional text.",
        "detect": " Output the final answer in JSON format in <answer> </answer> tags.",
        "open": "",
    }  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_word_runs_into_the_question(name):
    """A blank that was missing there cost VLM-R1 60 steps (its blog of 2025-03-24)."""
    around = TEMPLATES[name].user.split("{Question}")
    assert all(not x or x.startswith((" ", "\n", "'", "{Image}")) for x in around[1:])
    assert all(not x or x.endswith((" ", "\n", "'")) for x in around[:-1])


@pytest.mark.parametrize("frame, words", [
    ("0-1000", "as integers between 0 and 1000"),
    ("resized", "in pixels of the 84 x 56 picture you see"),
    ("pixels", "in pixels of the 40 x 30 picture"),
])  # fmt: skip
def test_a_template_may_say_in_what_numbers_boxes_are(frame, words):
    view = View(frame, "pixels", ((30, 40, 56, 84),))
    found = find_template("{Question} As [x1, y1, x2, y2] {Frame}.")
    said = text_of(found.turns("Where is {Frame}?", [], frame=frame_words(view)))
    assert f"user\nWhere is {{Frame}}? As [x1, y1, x2, y2] {words}.<" in said
    assert all(words in text_of(TEMPLATES[name].turns("a", [], frame=frame_words(view)))
               for name in ("box", "boxes"))  # fmt: skip


def test_several_pictures_are_named_by_their_sizes():
    view = View("resized", "pixels", ((30, 40, 56, 84), (1, 1, 28, 112)))
    assert frame_words(view) == "in pixels of the 84 x 56 and 112 x 28 pictures you see"
    assert frame_words(View("resized", "pixels")) == "in pixels"


def test_pictures_stand_before_the_text_unless_the_template_says_where():
    image = (1, 2, 3)
    shown = [("<|vision_start|>",), image, ("<|vision_end|>",)]
    head, tail = [START, SYSTEM, END, "\n", START], [END, "\n", START, "assistant\n"]
    first = Template("{Question}!").turns("Why?", [image])
    assert first == [*head, "user\n", *shown, "Why?!", *tail]
    last = Template("{Question}{Image}").turns("Why?", [image, image])
    assert last == [*head, "user\nWhy?", *shown, *shown, *tail]
    amid = Template("See {Image}: {Question}").turns("Why?", [image])
    assert amid == [*head, "user\nSee ", *shown, ": Why?", *tail]


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_two_texts_are_neighbours(name):
    """Each is encoded by itself, and two would lose the merges across their border."""
    for images in ([], [(1, 2, 2)], [(1, 2, 2), (1, 4, 4)]):
        pieces = TEMPLATES[name].turns("Why?", images)
        pairs = itertools.pairwise(pieces)
        assert not [pair for pair in pairs if all(isinstance(x, str) for x in pair)]
        assert "" not in pieces


def test_marks_in_a_question_are_text():
    said = text_of(Template("{Question}{Image}.").turns("{Image} {Question}", []))
    assert "user\n{Image} {Question}." in said


def test_any_text_with_a_question_in_it_is_a_template():
    found = find_template("{Question} Answer in {one} word. ({Question})")
    assert "user\n{x}? Answer in {one} word. ({x}?)<|im_end|>" in text_of(found.turns("{x}?", []))


def test_a_system_prompt_goes_before_the_templates_and_a_rows_before_both():
    found = find_template("r1v", system="Be short.")
    assert found.user == TEMPLATES["r1v"].user
    assert "system\nBe short." in found.turns("x", [])
    assert "system\nBe kind." in found.turns("x", [], "Be kind.")
    assert find_template("r1v") is TEMPLATES["r1v"]


def test_a_template_may_open_the_answer():
    """What stands behind {Answer} is the model's turn, in one text with how that turn opens."""
    found = find_template("{Question}!{Answer}<think> I see", "Be short.")
    assert found.turns("Why?", [(1, 2, 2)]) == [
        START, "system\nBe short.", END, "\n", START, "user\n", ("<|vision_start|>",), (1, 2, 2),
        ("<|vision_end|>",), "Why?!", END, "\n", START, "assistant\n<think> I see",
    ]  # fmt: skip
    assert found.opening == "<think> I see" and found.end == "<|im_end|>"
    assert find_template("r1v").opening == ""


def test_a_base_models_prompt_has_no_turns():
    shown = [("<|vision_start|>",), (1, 2, 2), ("<|vision_end|>",)]
    text = "{Base}User: {Question}{Image}\nAssistant:{Answer} <think>"
    found = find_template(text)
    assert found.turns("Why?", []) == ["User: Why?\nAssistant: <think>"]
    assert found.turns("Why?", [(1, 2, 2)]) == ["User: Why?", *shown, "\nAssistant: <think>"]
    assert find_template("{Base}{Question}").turns("Why?", [(1, 2, 2)]) == [*shown, "Why?"]
    assert found.end == "<|endoftext|>"


def test_a_base_model_has_no_system_turn():
    with pytest.raises(ValueError, match="a base model's, without turns"):
        find_template("{Base}{Question}", system="Be short.")
    with pytest.raises(ValueError, match="no place for it"):
        find_template("{Base}{Question}").turns("Why?", [], "Be kind.")


@pytest.mark.parametrize("text", ["{Question}{Answer}{Image}", "{Question}{Answer}<b>{Answer}",
                                  "{Answer}{Question}", "{Question}{Answer}{Base}"])  # fmt: skip
def test_marks_do_not_stand_behind_the_opening_of_an_answer(text):
    with pytest.raises(ValueError, match=r"behind \{Answer\} stands how|neither a text with"):
        find_template(text)


def test_the_mark_of_a_base_model_is_the_first_word():
    with pytest.raises(ValueError, match=r"\{Base\} is to be its first word"):
        find_template("Hear: {Base}{Question}")


def test_an_unknown_template_is_refused_and_the_nearest_named():
    with pytest.raises(ValueError, match=r"'r1v_evl'.*did you mean r1v_eval"):
        find_template("r1v_evl")


def test_two_places_for_the_pictures_are_refused():
    with pytest.raises(ValueError, match=r"\{Image\} stands there twice"):
        find_template("{Image}{Question}{Image}")
