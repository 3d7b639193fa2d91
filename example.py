"""What a row of a data set says: question, gold answer and pictures, in the columns of the field.

    to_example({"problem": "How many?", "solution": "<answer> 3 </answer>", "image": "a.png"}, base)

Read are R1-V's columns (problem, solution, image), VLM-R1's and LLaVA's (conversations of human and
gpt), TRL's (prompt or messages, with a solution or a completion), LMM-R1's and MM-Eureka's (a chat
as JSON text in "message"; image_urls), and their usual other names.
Of a chat one question and one answer are read, with a system message before them; more turns are
refused. Images go before the text of the question, in their order and whatever place "<image>" had
in it, as VLM-R1 does (grpo_jsonl.py); the template may put them elsewhere.

The gold answer is the solution, or where there is none what the assistant said: a text, a number,
or boxes as lists and dicts, which become JSON. A thought that it
opens with, <think>...</think>, is no part of the gold answer: it is kept in extra["thinking"], and
the whole in extra["completion"], from which supervised training learns to the letter.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from boxes import FRAMES, View
from images import find_images
from rewards import THINK, gold_answer


@dataclass(frozen=True)
class Example:
    """A row of a data set. images: paths, encoded bytes, PIL images or uint8 arrays (H, W, 3).

    extra holds what else the row has, for rewards and training of one's own: its other columns; the
    "scene" and the "program" of a world's question; and, where the row has them, "thinking" (with
    its tags), "completion" (all that the assistant said) and "system". Of boxes: "frame", in which
    the solution gives them, and "box_image", the place of the picture they lie in (default: 0).
    """

    problem: str
    solution: str
    images: tuple = field(default=(), repr=False)
    task: str = ""
    row: str = ""  # where it came from: "train.jsonl:12", "train-00000-of-00002.parquet#3"
    extra: dict = field(default_factory=dict, repr=False, compare=False)
    view: View | None = field(default=None, repr=False, compare=False)  # set by Processor.prompt

    def __post_init__(self):
        if self.frame is not None and self.frame not in FRAMES:
            raise ValueError(f"frame {self.frame!r:.80}: must be one of {', '.join(FRAMES)}")
        at, there = self.extra.get("box_image"), range(len(self.images))
        if at is not None and (isinstance(at, bool) or at not in there):
            raise ValueError(f"box_image {at!r:.80}: must be the place of one of its "
                             f"{len(there)} images, from 0")

    @property
    def frame(self) -> str | None:
        """In which its gold boxes are given, if a column "frame" of text says so."""
        said = self.extra.get("frame")
        return said if isinstance(said, str) else None


# Names that mean the same. A row has one of each line, or an error says which two it has.
ASKED = ("problem", "question", "prompt", "messages", "conversations", "message")
GOLD = ("solution", "ground_truth", "answer")
IMAGES = ("images", "image", "image_path", "image_urls")  # else file_name
TOLD = ("completion", "messages", "conversations")  # hold an answer, too, where there is no gold
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}  # fmt: skip
ANCHOR = "<image>"
LONGER = ("<thinking>", "</thinking>")  # THINK in solutions of Curr-ReFT


def to_example(fields: dict, base: Path, row: str = "") -> Example:
    """The example of a row's columns; image paths start from the folder `base`, which is resolved.
    ValueError for what is missing, empty, ambiguous, or no file."""
    chat = chat_of(fields.get("message"))  # a "question" beside it is a part of it
    named = {**fields, "message": chat, "question": None if chat else fields.get("question")}
    asked = pick(named, ASKED)
    gold, cell = (pick(fields, names) for names in (GOLD, IMAGES))
    used = {*ASKED[:-1], *GOLD, *IMAGES, "completion", *(["message"] if chat else ())}
    if cell is None and fields.get("file_name") is not None:
        cell, used = fields["file_name"], used | {"file_name"}
    extra = {key: value for key, value in fields.items() if key not in used}
    said, held = read_turns(asked, fields.get("completion"))
    told = said.get("assistant")
    if not isinstance(extra.get("thinking"), str | None):
        raise ValueError(f"thinking {extra['thinking']!r:.80}: a text is expected")
    if "system" in said:
        if extra.get("system") is not None:
            raise ValueError("has a system column and a system message, which mean the same")
        extra["system"] = said["system"]
    if held and cell is not None:
        raise ValueError("has images in a column and in a message")
    images = find_images(held or cell, base)
    problem = without_anchors(said.get("user", ""), len(images), isinstance(asked, str))
    if not problem.strip():
        raise ValueError(f"no problem ({', '.join(ASKED[1:])}): a text is expected")
    gold = told if gold is None else gold
    if isinstance(gold, str) and gold.lstrip().startswith(LONGER[0]):
        for longer, word in zip(LONGER, THINK):
            gold = gold.replace(longer, word, 1)
    if isinstance(gold, bool) or not isinstance(gold, str | int | float | list | dict):
        raise ValueError(f"no solution ({', '.join(GOLD[1:])}): a text, a number or boxes are "
                         "expected")
    thought, solution = split_thought(as_text(gold))
    if told is None and thought:
        told = gold
    if told is not None:
        extra["completion"] = told
        thought = split_thought(told)[0]
        if thought and extra.get("thinking") is None:
            extra["thinking"] = thought
    if gold != gold or not gold_answer(solution):
        raise ValueError("the solution is empty")
    for text in (problem, solution, *said.values()):
        text.encode()  # raises for half a surrogate pair, which no tokenizer takes
    return Example(problem, solution, images, str(fields.get("task") or ""), row, extra)


def pick(fields: dict, names: tuple[str, ...]):
    """The one field that has one of the names, or None."""
    there = [name for name in names if fields.get(name) is not None]
    if len(there) > 1:
        raise ValueError(f"has {' and '.join(there)}, which mean the same")
    return fields[there[0]] if there else None


def chat_of(message) -> list | None:
    """The messages of a column "message": a list, as JSON text or not; None for anything else."""
    if not isinstance(message, str) or not message.lstrip().startswith("["):
        return (message or None) if isinstance(message, list) else None
    try:
        return json.loads(message) or None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"message {message!r:.80}: no JSON ({error})") from error


def read_turns(asked, completion) -> tuple[dict[str, str], list]:
    """({"system", "user", "assistant": text}, as far as said; images that the parts hold) of a
    question and a completion, each None, a text or a list of messages."""
    said, held = {}, []
    for role, turns in (("user", asked), ("assistant", completion)):
        if turns is None:
            continue
        for turn in turns if isinstance(turns, list) else [{"role": role, "content": turns}]:
            if not isinstance(turn, dict):
                raise ValueError(f"a message {turn!r:.80}: expected a role and a content")
            name = turn.get("role", turn.get("from"))
            content = turn.get("content", turn.get("value"))
            role = ROLES.get(name) if isinstance(name, str) else None
            if role is None:
                raise ValueError(f"a message of the role {name!r:.80}: must be one of "
                                 f"{', '.join(ROLES)}")
            if role in said or (role == "user" and "assistant" in said):
                raise ValueError(f"several {role} turns: one question and one answer are read")
            if role == "system" and said:
                raise ValueError("a system message after another: it must be the first")
            said[role], images = read_content(content, role)
            held += images
    return said, held


def read_content(content, role: str) -> tuple[str, list]:
    """Text of a message, with an anchor for each image part, and the images that the parts hold."""
    first = content[0] if isinstance(content, list) and content else None
    parts = isinstance(first, dict) and "type" in first
    told = role == "assistant" and not parts and type(content) in (int, float, list, dict)
    if isinstance(content, str) or told:
        return as_text(content), []
    if not isinstance(content, list):
        raise ValueError(f"the {role}'s content {content!r:.80}: expected a text or parts")
    texts, held = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image" and role == "user":
            texts.append(ANCHOR)
            held += [part[k] for k in ("image", "path", "url") if part.get(k) is not None][:1]
        else:
            raise ValueError(f"a part {part!r:.80} of the {role}'s content: only text is read, and "
                             "images of the user")
    return "".join(texts), held


def as_text(gold: str | float | list | dict) -> str:
    """A gold answer as text: boxes, in lists and dicts, as JSON."""
    try:
        return gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"the solution {gold!r:.80}: {error}") from error


def without_anchors(text: str, images: int, plain: bool) -> str:
    """The text without "<image>", of which there must be none or one for each image. In a plain
    text that comes with no image the word is a word."""
    anchors = text.count(ANCHOR)
    if not anchors or (plain and not images):
        return text
    if anchors != images:
        raise ValueError(f"the question has {anchors} {ANCHOR} for {images} images")
    return text.replace(ANCHOR, "").strip()


def split_thought(text: str) -> tuple[str, str]:
    """(<think>...</think>, what follows it) of a text that opens so, else ("", the text)."""
    if not text.lstrip().startswith(THINK[0]):
        return "", text
    thought, closed, rest = text.lstrip().partition(THINK[1])
    if not closed:
        raise ValueError(f"the solution opens {THINK[0]} and never closes it")
    return thought + closed, rest.strip()
