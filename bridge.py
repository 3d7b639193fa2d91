"""Sets as other systems make them: who sees tells who thinks. Each is a short list of asks.

    bridge   Vision-R1 (arXiv 2503.06749): an eye writes a pseudo chain of thought, and from it a
             description; a reasoner answers from the description alone
    formal   R1-Onevision (arXiv 2503.10615): a formal description, reasoning over it, a second look
             at the picture, the thoughts once more with it, and whether they agree with the picture
    caption  R1-Vision (yuyq96): a caption, with which the reasoner's thoughts are made to open
    rewrite  open-r1-multimodal: question and answer written anew, with a thought between them
    judge    Curr-ReFT (arXiv 2503.07065): answers are scored from 0 to 100, those above 85 kept
    letters  R1-Vision again, which asks nobody: the text of a question becomes a picture

Published are what each ask is for, R1-Vision's opening (here to the letter; the line breaks of the
Chinese one are those of the English), open-r1-multimodal's reasons to drop a row and Curr-ReFT's
85. All prompts are worded by us: theirs are not in their papers' texts as we have them.
"""

import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from asking import Ask, ask_all, carried, named, text_of
from config import opt
from evaluate import check_out
from example import Example
from images import image_size, open_image
from letters import letters as page_of
from pack import picture, question_of
from rewards import ANSWER, THINK
from rows import load_examples
from teachers import Asks, Reads, Reasons
from traces import tagged, tell_reasons, whole

ANSWERED = "End with the final answer in {} {} tags.".format(*ANSWER)
OPENINGS = {  # R1-Vision's
    "en": f"{THINK[0]}\nHmm, to solve this problem, let's first take a look at the image. "
          "{caption}\n\nNow",
    "zh": f"{THINK[0]}\n嗯，为了回答这个问题，让我先看一下图片。{{caption}}\n\n首先",
}  # fmt: skip
PSEUDO = Ask("pseudo", "{problem}\n\nLook at the picture. First write a caption of it that is to "
             "the point of the question, then reason step by step, then give the answer.",
             sees=True, thoughts=True)  # fmt: skip
DESCRIPTION = Ask("description", "Question: {problem}\n\nA first attempt:\n{pseudo}\n\nDescribe "
                  "the picture for someone who cannot see it and has to answer the question from "
                  "your words alone. Give every detail that the question or the attempt depends "
                  "on: objects, how many of each, sizes, colors, places, numbers, labels, texts, "
                  "and how they stand to each other. Only describe; do not answer the question.",
                  sees=True)  # fmt: skip
BLIND = ("The image, in words:\n{description}\n\nQuestion: {problem}\n\nThink as one who looks at "
         "the image, and speak of the image, not of its description. " + ANSWERED)
FORMAL = Ask("description", "Translate the picture into formal language, completely: a chart as "
             "CSV or JSON with all its values, a diagram as PlantUML, a circuit as SPICE, a page "
             "as HTML, a figure of geometry as a list of points, lengths, angles and relations, a "
             "photograph or a scene as a JSON list of objects with their boxes and properties. "
             "Copy every text that can be read. Question that it will be used for: {problem}",
             sees=True)  # fmt: skip
REASONING = Ask("reasoning", BLIND, each=True, thoughts=True)
LOOK = Ask("look", "Question: {problem}\n\nSomeone described the picture:\n{description}\n\nand "
           "reasoned so:\n{reasoning}\n\nLook at the picture again. Say what in it the description "
           "or the reasoning missed or got wrong, as far as the answer depends on it, or that "
           "nothing is.", sees=True, each=True)  # fmt: skip
AGAIN = ("The image, in words:\n{description}\n\nQuestion: {problem}\n\nYou thought:\n{reasoning}"
         "\n\nThen you looked at the image again and saw:\n{look}\n\nThink it through once more as "
         "one who sees the image all the time and looks again where it matters; speak of the "
         "image, not of its description. " + ANSWERED)
AGREES = Ask("verdict", "Question: {problem}\nTrue answer: {answer}\n\nReasoning:\n{text}\n\nDoes "
             "every step of the reasoning agree with the picture, with the other steps and with "
             "the answer that it gives? Say why in a sentence, then end with one line: "
             "Consistent: yes, or Consistent: no.", sees=True, each=True)  # fmt: skip
CAPTION = Ask("caption", "Describe the picture in one paragraph, with all texts and numbers in it. "
              "Someone who cannot see it will be asked: {problem}\nDo not answer that.", sees=True)
REWRITE = Ask("rewrite", "Question: {problem}\nTrue answer: {answer}\n\nWrite the question anew so "
              "that its answer can be checked by a program: one number, expression, letter or "
              "short text, without the choice if it has one that is not needed. Then reason step "
              "by step about the picture to that answer. Reply in this form and with nothing "
              "else:\n<question>…</question>\n<reasoning>…</reasoning>\n<answer>…</answer>",
              sees=True)  # fmt: skip
SCORE = Ask("score", "Question: {problem}\nTrue answer: {answer}\n\nAnswer to judge:\n{text}\n\n"
            "Judge it from 0 to 100 by whether it is right, whether its reasoning is sound and "
            "agrees with the picture, and whether it is complete and well formed. Give a reason "
            "in a sentence, then end with one line: Score: NUMBER", sees=True, each=True)
VERDICT = re.compile(r"consistent\W{0,9}(yes|no)\b", re.IGNORECASE)
POINTS = re.compile(r"score(?: ?\([^()]{0,20}\))?\W{0,9}([0-9]{1,3}(?:\.[0-9]{1,3})?)\b",
                    re.IGNORECASE)  # fmt: skip


def answered(known: dict, answers: dict) -> dict:
    """A row of the answer "text", with the description it was reasoned over, if any."""
    seen = {"description": known["description"]} if "description" in known else {}
    told = {key: answers["text"][key] for key in ("text", "finish", "tokens", "teacher")}
    return told | seen


def consistent(known: dict, answers: dict) -> dict | str:
    """The same, or why not: the last verdict counts."""
    said = VERDICT.findall(known["verdict"])
    if not said:
        return "no verdict"
    return answered(known, answers) if said[-1].lower() == "yes" else "inconsistent"


def rewritten(known: dict, answers: dict) -> dict | str:
    """A row of a question written anew, or open-r1-multimodal's reasons to drop it."""
    parts = [last_in(known["rewrite"], tag) for tag in ("question", "reasoning", "answer")]
    if not all(parts):
        return "empty tags"
    question, thought, answer = parts
    if "Answer:" in question:
        return "Answer: in the question"
    return {"problem": question, "solution": answer, "text": tagged(thought, answer),
            "teacher": answers["rewrite"]["teacher"], "original_question": known["problem"],
            "original_answer": known["answer"]}  # fmt: skip


def last_in(text: str, tag: str) -> str:
    """What stands in the last <tag>…</tag> of a text, or ""."""
    _, opened, rest = text.rpartition(f"<{tag}>")
    inside, closed, _ = rest.partition(f"</{tag}>")
    return inside.strip() if opened and closed else ""


def too_small(example: Example) -> str | None:
    """Why open-r1-multimodal drops a row before it is asked about. A picture that is named and not
    there is a bad row of the source."""
    if not example.images:
        return "no picture"
    return "below 28 pixels" if min(map(min, map(image_size, example.images))) < 28 else None


def bridge(cfg: Reasons) -> Counter:
    """Vision-R1's modality bridging: a reasoner answers from a description that an eye wrote by way
    of a pseudo chain of thought; `verify` then keeps what is right."""
    text = Ask("text", BLIND, each=True, opening=cfg.opening)
    return ask_all(cfg, (PSEUDO, DESCRIPTION, text), answered)


def formal(cfg: Reasons) -> Counter:
    """R1-Onevision's: a formal description, reasoning over it, a second look, the thoughts once
    more; what an eye finds inconsistent is left out, and what is wrong by `verify`."""
    text = Ask("text", AGAIN, each=True, thoughts=True, opening=cfg.opening)
    return ask_all(cfg, (FORMAL, REASONING, LOOK, text, AGREES), consistent)


@dataclass(frozen=True)
class Caption(Reasons):
    """Keys of `distill.py caption`."""

    opening: str = opt("en", "en or zh, R1-Vision's, or a text: with which the reasoner's thoughts "
                             "are made to open; it holds {caption}")

    def check(self):
        """ValueError for an opening without the caption."""
        if "{caption}" not in OPENINGS.get(self.opening, self.opening):
            raise ValueError(f"opening {self.opening!r:.80}: en, zh, or a text with {{caption}}")


def caption(cfg: Caption) -> Counter:
    """R1-Vision's caption-first thoughts: a reasoner that sees nothing goes on from a thought that
    begins by looking at the picture, in the words of an eye."""
    opening = OPENINGS.get(cfg.opening, cfg.opening)
    text = Ask("text", "{problem}\n\n" + ANSWERED, each=True, opening=opening)
    return ask_all(cfg, (CAPTION, text), answered)


@dataclass(frozen=True)
class Rewrite(Asks):
    """Keys of `distill.py rewrite`."""

    temperature: float | None = opt(0.2, "none: a server's own, 1 of a checkpoint", least=0)


def rewrite(cfg: Rewrite) -> Counter:
    """open-r1-multimodal's: questions written anew, with a thought and an answer that can be
    verified; without empty tags, "Answer:" in the question, and pictures below 28 pixels."""
    return ask_all(cfg, (REWRITE,), rewritten, too_small)


@dataclass(frozen=True)
class Judge(Asks):
    """Keys of `distill.py judge`."""

    data: str = opt("d/verified.jsonl", "answers, as sample, the steps that ask, and verify write")
    out: str = opt("d/judged.jsonl", "file to write; scores on the way go to …_score.jsonl beside "
                                     "it, what is not kept to …_rejected.jsonl")
    above: float = opt(85.0, "answers with a higher score, of 100, are kept", least=0, below=100)


def judge(cfg: Judge) -> Counter:
    """Curr-ReFT's: a teacher scores answers from 0 to 100; the last score it gives counts. (By a
    reward instead of a teacher: `verify --rewards`.)"""
    def scored(known: dict, answers: dict) -> dict | str:
        said = [float(number) for number in POINTS.findall(known["score"])]
        if not said or said[-1] > 100:
            return "no score"
        return {"score": said[-1]} if said[-1] > cfg.above else f"score up to {cfg.above:g}"

    def silent(example: Example) -> str | None:
        return None if text_of(example) else "no answer to judge"

    return ask_all(cfg, (SCORE,), scored, silent)


# ----------------------------------------------------------------------------------------- letters


@dataclass(frozen=True)
class Letters(Reads):
    """Keys of `distill.py letters`."""

    out: str = opt("d/letters.jsonl", "file to write; its pictures go beside it, what cannot be "
                                      "written in letters to …_rejected.jsonl")
    problem: str = opt("Answer the question in the image.", "what is asked instead of the question")
    width: int = opt(448, "pixels of a picture across, unless the row's own is wider", least=112,
                     most=4096)
    seed: int = opt(0, "fixes fonts, sizes and colors", least=0)


def letters(cfg: Letters) -> Counter:
    """R1-Vision's: the text of a question becomes a picture, above the row's own if it has one;
    what the row has to learn stays. Returns how many rows there are of each reason."""
    out, counts = Path(cfg.out), Counter()
    for path in (cfg.out, named(cfg.out, "rejected")):
        check_out(path, cfg.data)
    rows = load_examples(cfg.data, cfg.images, "train", cfg.limit, cfg.bad_rows)
    with whole(out) as good, whole(named(cfg.out, "rejected")) as bad:
        for i, example in enumerate(tqdm(rows, "letters", unit="picture")):
            name, problem, solution = question_of(example)
            row = {"id": name, "problem": cfg.problem, "solution": solution, "letters": problem,
                   **carried(example, "sample", "thinking", "completion", "system")}  # fmt: skip
            try:
                if len(example.images) > 1:
                    raise ValueError("several pictures")
                own = open_image(example.images[0]) if example.images else None
                page = page_of(problem, zlib.crc32(f"{cfg.seed} {name}".encode()), cfg.width, own)
            except ValueError as error:
                reason = str(error)
                bad.write(json.dumps({**row, "reason": reason}) + "\n")
            else:
                reason = None
                row["image"] = picture(page, f"{i:06d}_{name}", out)
                good.write(json.dumps(row) + "\n")
            counts[reason] += 1
    print(f"{out}: {counts[None]} of {len(rows)} rows")
    tell_reasons(counts)
    return counts


STEPS = {"bridge": (Reasons, bridge), "formal": (Reasons, formal), "caption": (Caption, caption),
         "rewrite": (Rewrite, rewrite), "judge": (Judge, judge), "letters": (Letters, letters)}
