"""Traces: what a teacher wrote, kept line by line, checked, and made into rows to learn from.

    with resumed("answers.jsonl", wanted) as (done, append): ...    # goes on where it was killed
    thought, rest = split_thought(row["text"])                      # <think>…</think> and after it
    stated_answer("So **The answer is: ** 5")                       # "5"
    reason, stated = judged(row)                                    # "wrong answer", "5"

Source: R1-V (src/distill_r1, filter_r1.py and create_hf_dataset.py). Differently: R1-V takes the
first match of some twenty patterns anywhere in the text, the thoughts included, so that a count on
the way passes for the answer. Here only what stands after the last </think> can be the answer, and
the clearest statement in it wins. Its time is linear in the text's length.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewards import ANSWER, THINK, final_answer, format, gold_answer, same

# ------------------------------------------------------------------------------ files of rows


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(place in bytes, row) of each line of a .jsonl. A last line that was cut, by a kill or since
    it is still being written, is passed over; ValueError names any other bad one."""
    with open(path, "rb") as file:
        at = 0
        for n, line in enumerate(file, 1):
            row = parsed(line)
            if row is None and line.strip() and line.endswith(b"\n"):
                raise ValueError(f"{path}:{n}: not a JSON object")
            if row is not None:
                yield at, row
            at += len(line)


def parsed(line: bytes) -> dict | None:
    """The JSON object that a line is, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def line_at(path: str | Path, at: int) -> str:
    """FILE:12, from a place in bytes."""
    with open(path, "rb") as file:
        return f"{path}:{file.read(at).count(bytes([10])) + 1}"


def need(row: dict, path, at: int, *keys: str) -> dict:
    """row, or ValueError, naming its line, if a key is not there as text. at: see read_rows."""
    for key in keys:
        if not isinstance(row.get(key), str):
            raise ValueError(f"{line_at(path, at)}: has no text under {key!r}")
    return row


def name_of(out: Path) -> str:
    """NAME of NAME.jsonl, and of NAME, dots and all: of what stands beside a set."""
    return out.name.removesuffix(".jsonl")


@contextmanager
def whole(path: str | Path):
    """A text file to write, whose name appears when it is whole."""
    part = Path(f"{path}.tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "w", encoding="utf-8") as file:
        yield file
    part.replace(path)


def tell_reasons(counts: Counter) -> None:
    """Prints how many rows are left out for each reason, None being that there is none."""
    for reason, count in counts.most_common():
        if reason:
            print(f"  {count:6d}  {reason}")


def tell_failed(failed: dict[tuple, str], asked: int) -> None:
    """ValueError that names the first 20 of those that got no answer: {(id, which): reason}."""
    if failed:
        told = [f"{name} ({k}): {why}" for (name, k), why in list(failed.items())[:20]]
        told += [f"and {len(failed) - 20} more"] * (len(failed) > 20)
        raise ValueError("\n  ".join([f"{len(failed)} of {asked} questions got no answer; the "
                                      "same command asks them again", *told]))


@contextmanager
def resumed(path: str | Path, wanted: dict[str, tuple], teacher: str):
    """Opens a file of answers to go on with: (done, append).

    done: the (id, sample) pairs in it; append(row) writes a row and flushes it, so that a kill
    costs at most the line that is being written. A cut last line is taken off. wanted: {id:
    (problem, solution)}. ValueError if the file answers other questions under these ids, or has
    another teacher's answers: two sets would be mixed.
    """
    path, done = Path(path), set()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        mend(path)
        for at, row in read_rows(path):
            need(row, path, at, "id", "problem", "solution", "text")
            if row.get("teacher") != teacher:
                raise ValueError(f"{path} holds answers of the teacher {row.get('teacher')}, not "
                                 f"{teacher}; give another --out")
            if wanted.get(row["id"], (said := (row["problem"], row["solution"]))) != said:
                raise ValueError(f"{path} holds an answer to another question called "
                                 f"{row['id']}; give another --out")
            done.add((row["id"], row.get("sample", 0)))

        def append(row: dict):
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()

        yield done, append


def mend(path: Path):
    """Takes a cut last line off a file; ends a whole one that lacks its newline."""
    with open(path, "r+b") as file:
        lines = file.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            file.seek(-len(lines[-1]), 2)
            if parsed(lines[-1]) is None:
                file.truncate()
            else:
                file.seek(0, 2)
                file.write(b"\n")


# ------------------------------------------------------------------- the answer in a teacher's text

SHOWN = str.maketrans("", "", "*`#$")  # Markdown and LaTeX marks around an answer
# Spaces are single when these are used, so that no pattern can be tried in two ways at one place.
VALUE = r"([+\-−]?[0-9][0-9,]*(?:\.[0-9]+)?|yes\b|no\b)"
LABEL = re.compile(r"\banswer(?: is)? ?[:=]? ?")
IS = re.compile(r"\bis:? ?" + VALUE)
STATED = re.compile(
    r"\b(?:count|total|number of [a-z]+|total number of [a-z]+)(?: is)? ?[:=]? ?" + VALUE
    + r"|\bthere (?:is|are)(?: a total of| exactly| only)? " + VALUE
    + r"|\b(?:so|therefore|thus|hence),? (?:it is |it's )?" + VALUE
    + r"|\bshould be " + VALUE
)  # fmt: skip
BOLD = re.compile(r"\*\*[^*]*\*\*")
START = re.compile(VALUE)


def split_thought(text: str) -> tuple[str, str] | None:
    """(thought, what follows it), or None without tags. The opening tag may be missing: where it
    is part of the prompt, as in DeepSeek-R1's and QwQ's chat templates, servers do not send it."""
    before, closed, rest = text.rpartition(THINK[1])
    return (before.strip().removeprefix(THINK[0]).strip(), rest.strip()) if closed else None


def stated_answer(text: str) -> str | None:
    """The answer that a text (what follows the thought) states, or None.

    In this order: <answer>…</answer>; the last \\boxed{…}; "answer is: …" in the last line that has
    it, marks such as ** left out; then in the last three lines and the first, from the end, "there
    are 5", "total: 5", "so 5", a bold 5 or "**5 items**", a line that is nothing but a number.
    Of "the answer is 5 cubes" the number counts; of "3 or 4" nothing does.
    """
    found = final_answer(text) or boxed(text)
    if found or ANSWER[0] in text:
        return found
    lines = [line for line in text.splitlines() if line.strip()]
    for line, after in zip(reversed(lines), ["", *reversed(lines)]):
        if (found := labelled(line, after)) is not None:
            return found or None
    for line in [*reversed(lines[-3:]), *lines[:1]]:
        if found := counted(line):
            return found
    return None


def bare(line: str) -> str:
    """A line in lower case without marks, its white space single blanks."""
    return " ".join(line.translate(SHOWN).split()).lower()


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} of a text, braces in it balanced."""
    _, found, inside = text.rpartition("\\boxed{")
    depth = 1
    for i, letter in enumerate(inside if found else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            inside = inside[:i].strip()
            wrapped = inside.startswith("\\text{") and inside.endswith("}")
            return inside[6:-1].strip() if wrapped else inside or None
    return None


def labelled(line: str, after: str) -> str | None:
    """What follows the last "answer", "answer is", "answer:" of a line, or where nothing does, what
    stands in the next line: its number, yes or no, else its words. None without such a label, "" if
    it names two values."""
    line = bare(line)
    labels = list(LABEL.finditer(line))
    if not labels:
        return None
    rest = line[labels[-1].end():] or bare(after)
    value = START.match(rest) or IS.search(rest)
    if value:
        return alone(value, rest)
    firm = labels[-1].group().rstrip().endswith(("is", ":", "="))  # not "I hope this answer helps"
    return counted(rest) or (rest.rstrip(" .") if firm else None)


def counted(line: str) -> str | None:
    """The number (or yes, no) that a line without the word "answer" comes down to, or None."""
    said = bare(line)
    for match in reversed(list(STATED.finditer(said))):
        return alone(match, said) or None
    marked = [START.match(bare(part)) for part in BOLD.findall(line)]
    marked = [value.group(1) for value in marked if value]
    if marked:
        return tidy(marked[-1]) if len(set(marked)) == 1 else None
    value = START.fullmatch(said.rstrip(" .")) if len(said) < 40 else None
    return tidy(value.group(1)) if value else None


def alone(match: re.Match, line: str) -> str:
    """The value of a match, or "" if the line goes on with "or …"."""
    hedged = line[match.end():].startswith((" or ", "/", "-", "–"))
    return "" if hedged else tidy(match.group(match.lastindex))


def tidy(value: str) -> str:
    return value.rstrip(",")


# --------------------------------------------------------------------- verdicts, and rows to learn


def judged(row: dict) -> tuple[str | None, str | None]:
    """(why an answer row is not to be learnt from, or None; the answer that it states, if any)."""
    if row.get("finish") not in (None, "stop"):
        return f"cut off ({row['finish']})", None
    split = split_thought(row["text"])
    if split is None:
        return "no thought", None
    stated = stated_answer(split[1])
    if not split[0]:
        return "empty thought", stated
    if stated is None:
        return "no answer", None
    if not same(stated, gold_answer(row["solution"])):
        return "wrong answer", stated
    learnt = to_learn(row)
    whole = format(f"{learnt['thinking']} {learnt['solution']}", None)
    return (None if whole else "tags in the thought"), stated


def described(seen: str, more: str = "") -> re.Pattern:
    """What is said of a description of what is seen, and more."""
    return re.compile(rf"\b(a )?(?:{seen}['’]?s? descriptions?|described {seen}|descriptions? of "
                      rf"the {seen}{more})\b", re.IGNORECASE)  # fmt: skip


SCENE = described("scene")
READ = described("(?:scene|image|picture)",
                 r"|(?<=\bthe )(?:given |provided )?description(?! of)")  # fmt: skip


def of_image(text: str, pattern: re.Pattern = READ) -> str:
    """text with "scene description" and its like become "image", as in R1-V's set: who learns from
    it sees the picture. More than R1-V's: "the description" alone, "description of the image"; not
    in questions (SCENE), which may ask about a description that is in the picture."""
    def image(match: re.Match) -> str:
        start = text[max(0, match.start() - 20) : match.start()].rstrip(" *#\"'")
        opens = match.group()[0].isupper() and (not start or start[-1] in ".!?:\n")
        word = "images" if "descriptions" in match.group().lower() else "image"
        word = f"an {word}" if match.group(1) and word == "image" else word
        return word.capitalize() if opens else word

    return pattern.sub(image, text)


def to_learn(row: dict, learn: str = "gold") -> dict:
    """{"problem", "thinking", "solution"} of an answer row, as in MMInstruction/
    Clevr_CoGenT_TrainA_R1: "<think>…</think>" and "<answer> 5 </answer>". With learn="text"
    {"problem", "completion", "solution"}, whose completion is the answer letter by letter.
    ValueError where there is no thought, but for a text."""
    # Where there is a description the teacher read it; the pupil will look at the image.
    read = row.get("description")
    seen, problem = of_image if read else str, row["problem"]
    solution = f"{ANSWER[0]} {gold_answer(row['solution'])} {ANSWER[1]}"
    told = {"problem": of_image(problem, SCENE) if read else problem, "solution": solution}
    if learn == "text":
        return {**told, "completion": seen(row["text"].strip())}
    if not (split := split_thought(row["text"])):
        raise ValueError("the answer has no thought; is it verified? (--learn text needs none)")
    return {**told, "thinking": f"{THINK[0]}{seen(split[0])}{THINK[1]}"}


def tagged(thought: str, answer: str) -> str:
    """An answer as it is asked for: <think>…</think>, a blank line, <answer> … </answer>."""
    return f"{THINK[0]}{thought}{THINK[1]}\n\n{ANSWER[0]} {answer} {ANSWER[1]}"


def after_thought(text: str) -> str:
    """What was said after the thoughts, or all where there are none."""
    split = split_thought(text)
    return split[1] if split else text.strip()


# Words in which a thought turns back; Vision-R1 counts "wait" and its like. The list is ours.
BACK = re.compile(r"\b(wait|hmm+|alternatively|on second thought|let me (?:re)?check|"
                  r"let me verify|double-check|look again|mistake)\b", re.IGNORECASE)  # fmt: skip


def reflections(thought: str) -> Counter:
    """How often a thought turns back, by the words in which it does."""
    return Counter(re.sub("^hm+$", "hmm", word.lower()) for word in BACK.findall(thought))
