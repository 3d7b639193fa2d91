"""How a question is put to the model: system turn, picture, question, and what answer is asked for.

    find_template("r1v")                                     # by name, or a text of one's own:
    find_template("{Image}{Question} Answer in <answer> </answer>.", system="You count.")

Training and evaluation share the one object, and the tag words are those of the rewards: a model
that is trained under one wording and tested under another (as R1-V's is) is tested on something
else. Sources of the wordings: R1-V, src/r1-v/src/open_r1/{grpo,sft}.py and src/eval; the chat
markup around them is Qwen2-VL's (tokenizer_config.json).
"""

from dataclasses import dataclass, replace

from config import nearest
from rewards import ANSWER, THINK


@dataclass(frozen=True)
class Template:
    """user holds {Question}, and {Image} where the pictures stand (without it: before the text).

    A row with a system message of its own has that instead of `system`.
    """

    user: str
    system: str = "You are a helpful assistant."

    def turns(self, problem: str, images: list, system: str | None = None) -> list[str | tuple]:
        """The prompt in pieces: ("<|im_start|>",) is a special token, a str is text that is encoded
        by itself, and what `images` holds stands for pictures. No two texts are neighbours."""
        before, marked, after = self.user.partition("{Image}")
        before, after = (before, after) if marked else ("", before)
        shown = [x for image in images for x in (("<|vision_start|>",), image, ("<|vision_end|>",))]
        before, after = (text.replace("{Question}", problem) for text in (before, after))
        user = ["user\n" + before, *shown, after] if images else ["user\n" + before + after]
        opened, closed = ("<|im_start|>",), ("<|im_end|>",)
        turns = [opened, "system\n" + (system or self.system), closed, "\n", opened, *user, closed,
                 "\n", opened, "assistant\n"]  # fmt: skip
        return [piece for piece in turns if piece]


TAGS = "{} {} and final answer (number) in {} {} tags.".format(*THINK, *ANSWER)
# DeepSeek-R1's wording, which R1-V gives to supervised rows and to questions without a picture.
CONVERSATION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "{0} {1} and {2} {3} tags, respectively, i.e., "
    "{0} reasoning process here {1}{2} answer here {3}"
).format(*THINK, *ANSWER)
TEMPLATES = {
    "r1v": Template("{Question}  Output the thinking process in " + TAGS),  # trains with two blanks
    "r1v_eval": Template("{Question} First output the thinking process in " + TAGS),  # SuperCLEVR
    "r1v_geoqa": Template("{Question} Output the thinking process in " + TAGS),  # its GeoQA test
    "r1v_sft": Template("{Question}{Image}", CONVERSATION),  # its supervised baseline: text first
    "system": Template("{Question}", CONVERSATION),
    "direct": Template("{Question} Give only the final answer, in " + " ".join(ANSWER) + " tags."),
    "plain": Template("{Question}"),
}


def find_template(name: str, system: str | None = None) -> Template:
    """One of TEMPLATES by name, or a text with {Question}; `system` goes before the template's.
    ValueError for a text without {Question}, or with two places for the pictures."""
    found = TEMPLATES.get(name) or Template(name)
    if "{Question}" not in found.user:
        raise ValueError(f"template {name!r}: neither a text with {{Question}} nor one of "
                         f"{', '.join(TEMPLATES)}{nearest(name, TEMPLATES)}")
    if found.user.count("{Image}") > 1:
        raise ValueError(f"template {name!r}: {{Image}} stands there twice; all pictures of a row "
                         "go to one place")
    return found if system is None else replace(found, system=system)
