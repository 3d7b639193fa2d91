"""How a question is put to the model: system turn, picture, question, and what answer is asked for.

    find_template("r1v")                                     # by name, or a text of one's own:
    find_template("{Image}{Question} Answer in <answer> </answer>.", system="You count.")

Training and evaluation share the one object, and the tag words are those of the rewards: a model
that is trained under one wording and tested under another (as R1-V's is) is tested on something
else. Sources of the wordings: R1-V, src/r1-v/src/open_r1/{grpo,sft}.py and src/eval; VLM-R1,
open_r1/vlm_modules/qwen_module.py; Visual-RFT, its evaluation of COCO, LISA and classification, and
open_r1/grpo_lisa.py; VisualThinker, open_r1/grpo.py; Curr-ReFT, open_r1/Stage{1,2,3}_…_resize.py;
LMM-R1, examples/data; Vision-R1, inference.py; R1-Onevision's model card. The chat markup around
them is Qwen2-VL's (tokenizer_config.json).
"""

from dataclasses import dataclass, replace

from boxes import View
from config import nearest
from rewards import ANSWER, THINK

MARKS = ("{Question}", "{Image}", "{Frame}", "{Answer}", "{Base}")


@dataclass(frozen=True)
class Template:
    """user holds {Question}, {Image} where the pictures stand (without it: before the text), and
    where boxes are asked for {Frame}: in what numbers, see frame_words. What stands behind {Answer}
    opens every answer: it is read, not sampled, and belongs to the text that is scored and shown.
    A text that begins with {Base} is for a base model: no turns, so no system turn either.

    A row with a system message of its own has that instead of `system`.
    """

    user: str
    system: str = "You are a helpful assistant."

    @property
    def opening(self) -> str:
        return self.user.partition("{Answer}")[2]

    @property
    def end(self) -> str:
        """The special token with which a model that is taught ends its answers."""
        return "<|endoftext|>" if self.user.startswith("{Base}") else "<|im_end|>"

    def turns(self, problem: str, images: list, system=None, frame="") -> list[str | tuple]:
        """The prompt in pieces: ("<|im_start|>",) is a special token, a str is text that is encoded
        by itself, and what `images` holds stands for pictures. No two texts are neighbours.
        ValueError for a row's system message where there are no turns."""
        asked = self.user.removeprefix("{Base}").partition("{Answer}")[0]
        before, marked, after = asked.replace("{Frame}", frame).partition("{Image}")
        before, after = (before, after) if marked else ("", before)
        shown = [x for image in images for x in (("<|vision_start|>",), image, ("<|vision_end|>",))]
        before, after = (text.replace("{Question}", problem) for text in (before, after))
        said = [before, *shown, after]
        if self.user.startswith("{Base}"):
            if system:
                raise ValueError("it has a system message, and the {Base} template no place for it")
            return merged([*said, self.opening])
        opened, closed = ("<|im_start|>",), ("<|im_end|>",)
        turns = [opened, "system\n" + (system or self.system), closed, "\n", opened, "user\n",
                 *said, closed, "\n", opened, "assistant\n", self.opening]  # fmt: skip
        return merged(turns)


def merged(pieces: list[str | tuple]) -> list[str | tuple]:
    """The pieces with texts that are neighbours as one, and without empty ones."""
    found = []
    for piece in filter(None, pieces):
        if found and isinstance(piece, str) and isinstance(found[-1], str):
            found[-1] += piece
        else:
            found.append(piece)
    return found


def frame_words(view: View) -> str:
    """In what numbers boxes are asked for, in the words that stand for {Frame}."""
    if view.frame == "0-1000":
        return "as integers between 0 and 1000"
    at, seen = (0, "") if view.frame == "pixels" else (2, " you see")
    sizes = " and ".join(f"{size[at + 1]} x {size[at]}" for size in view.sizes)
    shown = f" of the {sizes} picture{'s' * (len(view.sizes) > 1)}{seen}" if sizes else ""
    return "in pixels" + shown


# ---------------------------------------------------------------------------------------- wordings

TAGS = "{} {} and final answer (number) in {} {} tags.".format(*THINK, *ANSWER)
# DeepSeek-R1's wording, which R1-V gives to supervised rows and to questions without a picture.
CONVERSATION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "{0} {1} and {2} {3} tags, respectively, i.e., "
    "{0} reasoning process here {1}{2} answer here {3}"
).format(*THINK, *ANSWER)
# VLM-R1's.
FIRST = (
    "First output the thinking process in {} {} tags and then output the final answer in {} {} "
    "tags."
).format(*THINK, *ANSWER)
MIND = (
    "First thinks about the reasoning process in the mind and then provides the user with the "
    "answer. The reasoning process and answer are enclosed within {0} {1} and {2} {3} tags, "
    "respectively, i.e., {0} reasoning process here {1}{2} WHAT answer here {3}"
).format(*THINK, *ANSWER)
# Visual-RFT's; no blank between the first two sentences is theirs, as is "grouding".
STRICT = (
    "Output the thinking process in {0} {1} and final answer in {2} {3} tags."
    "The output answer format should be as follows:\n{0} ... {1} {2}WHAT{3}\n"
    "Please strictly follow the format."
).format(*THINK, *ANSWER)
DETECT = (
    "Detect all objects belonging to the category '{Question}' in the image, and provide the "
    "bounding boxes (between 0 and 1000, integer) and confidence (between 0 and 1, with two "
    "decimal places).\nIf no object belonging to the category '{Question}' in the image, return "
    "'No Objects'.\n"
) + STRICT.replace("WHAT", "[{'Position': [x1, y1, x2, y2], 'Confidence': number}, ...]")
GROUND = (
    "Output the bounding box in the image corresponding to the instruction: {{Question}} "
    "Output the thinking process in {0} {1} and your grouding box. Following "
    '"{0} thinking process {1}\n{2}(x1,y1),(x2,y2){3})" format.'
).format(*THINK, *ANSWER)
# VisualThinker's for a base model; the words of MM-Eureka and LMM-R1 ("thinks" is theirs, and so is
# the missing blank); Curr-ReFT's three stages ask as VLM-R1 does, and say what an answer may be.
BASE = (
    "{Base}{Image}A conversation between User and Assistant. The user asks a question about the "
    "image, and the Assistant solves it. The assistant first thinks about the reasoning process in "
    "the mind and then provides the user with the answer.\nUser: {Question} \nAssistant: Let me "
    "solve this step by step.\n{Answer}" + THINK[0]
)
LATEX = (
    "You should first thinks about the reasoning process in the mind and then provides the user "
    "with the answer. Your answer must be in latex format and wrapped in $...$.The reasoning "
    "process and answer are enclosed within {0} {1} and {2} {3} tags, respectively, i.e., {0} "
    "Since $1+1=2$, so the answer is $2$. {1}{2} $2$ {3}, which means your output should start "
    "with {0} and end with {3}."
).format(*THINK, *ANSWER)
HELPFUL = "You are a helpful assistant good at solving math problems with step-by-step reasoning. "
ALL = (
    " Based on the given options, select all options that accurately describe what is shown in the "
    "image. Ensure your final answer is exactly one or more of the provided option letters without "
    "any additional text."
)
ONE = " Ensure your final answer is exactly one of the provided option letters without any"
JSON = " Output the final answer in JSON format in {} {} tags.".format(*ANSWER)
HINT = "Hint: Please answer the question and provide the final answer at the end. Question: "
TEMPLATES = {
    "r1v": Template("{Question}  Output the thinking process in " + TAGS),  # trains with two blanks
    "r1v_eval": Template("{Question} First output the thinking process in " + TAGS),  # SuperCLEVR
    "r1v_geoqa": Template("{Question} Output the thinking process in " + TAGS),  # its GeoQA test
    "r1v_sft": Template("{Question}{Image}", CONVERSATION),  # its supervised baseline: text first
    "system": Template("{Question}", CONVERSATION),
    # VLM-R1: by default, for referring expressions, captions and detection. For detection the words
    # stand before the question, with which its reward rose after 15 steps (blog of 2025-03-24).
    "vlm_r1": Template("{Question} " + FIRST),
    "rec": Template("{Question} " + FIRST + " Output the final answer in JSON format."),
    "ic": Template("{Question} " + MIND.replace("WHAT", "json format")),
    "od_length": Template(MIND.replace(" WHAT", "") + "\n{Question}"),
    # Visual-RFT: for a category ("dog"); for "This is an image containing a plant. Please identify
    # the species of the plant based on the image."; for what is to be found. The rows of its data
    # sets of detection and classification hold all these words already: "plain" is for them.
    "virft_detect": Template(DETECT),
    "virft_class": Template("{Question}\n" + STRICT.replace("WHAT", "species name")),
    "virft_ground": Template(GROUND, CONVERSATION),
    "visualthinker": Template(BASE),
    "visualthinker_instruct": Template(
        "{Question}  Output the thinking process in " + TAGS.replace("number", "option")),
    "vision_r1": Template("{Question}"),  # its cold start has taught the form
    "r1_onevision": Template(HINT + "{Question}"),  # likewise; its RL asks as vlm_r1
    "mm_eureka": Template(LATEX + "\nQuestion:\n{Question}"),  # if its rows do not say it
    "lmm_r1": Template("{Question}", HELPFUL + LATEX),
    "curr_reft_judge": Template(
        "{Question} " + FIRST + " Ensure your final answer is exactly 'yes' or 'no'."),
    "curr_reft_choice": Template("{Question} " + FIRST + ONE + " additional text."),
    "curr_reft_choices": Template("{Question} " + FIRST + ALL),  # of its task "classify"
    "curr_reft_detect": Template("{Question} " + FIRST + JSON),
    "curr_reft_open": Template("{Question} " + FIRST),
    # Ours, for one box and for many: the model is told in what numbers they are expected.
    "box": Template("{Question} " + FIRST + " The answer is a box [x1, y1, x2, y2] {Frame}."),
    "boxes": Template("{Question} " + FIRST + " The answer is None, or boxes {Frame} in JSON: "
                      '[{"bbox_2d": [x1, y1, x2, y2], "label": "name"}, ...].'),
    "direct": Template("{Question} Give only the final answer, in " + " ".join(ANSWER) + " tags."),
    "plain": Template("{Question}"),
}


def find_template(name: str, system: str | None = None) -> Template:
    """One of TEMPLATES by name, or a text with {Question}; `system` goes before the template's.
    ValueError for a text without {Question}, with marks that stand twice or where they say nothing,
    and for a system turn of a base model."""
    found = TEMPLATES.get(name) or Template(name)
    if "{Question}" not in found.user:
        raise ValueError(f"template {name!r}: neither a text with {{Question}} nor one of "
                         f"{', '.join(TEMPLATES)}{nearest(name, TEMPLATES)}")
    if found.user.count("{Image}") > 1:
        raise ValueError(f"template {name!r}: {{Image}} stands there twice; all pictures of a row "
                         "go to one place")
    if any(mark in found.opening for mark in MARKS):
        raise ValueError(f"template {name!r}: behind {{Answer}} stands how every answer opens, and "
                         f"none of {', '.join(MARKS)}")
    if "{Base}" in found.user.removeprefix("{Base}"):
        raise ValueError(f"template {name!r}: {{Base}} is to be its first word")
    if system is not None and found.user.startswith("{Base}"):
        raise ValueError(f"system {system!r:.80}: the template is a base model's, without turns")
    return found if system is None else replace(found, system=system)
