"""Asks: a row of a set is made by asking one thing after another, of teachers who see and who read.

    asks = (Ask("caption", "Describe the picture.", sees=True),
            Ask("text", "The picture: {caption}\\n\\n{problem}", each=True))
    counts = ask_all(cfg, asks, lambda known, answers: {"text": known["text"]})

An ask is a prompt with places for what is known: {problem}, {answer} (the gold one), {text} (what a
row that is itself an answer says) and the fields of the asks before it. Its answers are kept line
by line in OUT_FIELD.jsonl beside OUT: each ask can be killed and goes on. What another teacher
said, or what was said to another prompt, at another temperature or with another max_new (by a
checkpoint: or seed), is refused before more is asked. When all are there OUT is written from them,
and what is not to be used to OUT_rejected.jsonl with its reason, both whole. A question that gets
no answer is told at the end; the others go on without it. One whose answer is empty, from which no
later ask could go on, is rejected.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluate import check_out
from example import Example
from pack import pictures, question_of
from rewards import gold_answer
from rows import load_examples
from shards import digest
from teachers import Asks, Question, Served, check_key, find_teacher
from traces import after_thought, name_of, read_rows, resumed, tell_failed, tell_reasons, whole


class Ask(NamedTuple):
    """One question to one teacher, for every row.

    text, opening: prompt and how the answer opens, with {places}. sees: the pictures are shown, to
    cfg.teacher; else cfg.reasoner reads. each: it is asked for each of n answers, as are all after
    it. thoughts: asks after it read what was thought, too, not only what was said then.
    """

    field: str
    text: str
    sees: bool = False
    each: bool = False
    thoughts: bool = False
    opening: str = ""


class Unit(NamedTuple):
    """One row to be: the example's place in the data, its id, and which of its answers."""

    i: int
    id: str
    sample: int


# ---------------------------------------------------------------------------------------- the asks


class Said:
    """The answers to one ask on disk, found by (id, sample) without being held in memory."""

    def __init__(self, path: Path, ask: Ask):
        self.path, self.ask = path, ask
        self.places = {(row["id"], row["sample"]): at for at, row in read_rows(path)}

    def at(self, unit: Unit) -> tuple[str, int]:
        return unit.id, unit.sample if self.ask.each else 0

    def __contains__(self, unit: Unit) -> bool:
        return self.at(unit) in self.places

    def __getitem__(self, unit: Unit) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.places[self.at(unit)])
            return json.loads(file.readline())

    def text(self, unit: Unit) -> str:
        """The answer, as asks after it read it."""
        said = self[unit]["text"]
        return said.strip() if self.ask.thoughts else after_thought(said)


class Run:
    """The asks of a step on the rows of a source."""

    def __init__(self, cfg: Asks, asks: Sequence[Ask], unfit: Callable | None):
        self.cfg, self.said, self.count = cfg, {}, 0
        for path in (cfg.out, *(named(cfg.out, x) for x in ("rejected", *(a.field for a in asks)))):
            check_out(path, cfg.data)
        check_key(cfg)
        who = {True: (cfg.teacher, cfg.key_env)}  # whether pictures are shown: who is asked
        who[False] = who[True] if cfg.reasoner is None else (cfg.reasoner, cfg.reasoner_key_env)
        self.teachers = {a.sees: find_teacher(who[a.sees][0], cfg, who[a.sees][1]) for a in asks}
        self.examples = load_examples(cfg.data, cfg.images, "train", cfg.limit, cfg.bad_rows)
        self.asked = [question_of(example) for example in self.examples]  # id, problem, solution
        self.units = list(self.all_units())
        if len({unit[1:] for unit in self.units}) < len(self.units):
            raise ValueError(f"{cfg.data}: two rows have the same id")
        why = map(unfit, self.examples) if unfit else ()
        self.unfit = {i: reason for i, reason in enumerate(why) if reason}

    def all_units(self) -> Iterator[Unit]:
        """n for each row; of a row that is itself the answer number `sample`, the one."""
        for i, example in enumerate(self.examples):
            own = example.extra.get("sample")
            for k in [own] if type(own) is int else range(self.cfg.n):
                yield Unit(i, self.asked[i][0], k)

    def known(self, unit: Unit) -> dict[str, str]:
        """What may stand in the places of a prompt."""
        example, (_, problem, solution) = self.examples[unit.i], self.asked[unit.i]
        given = {"problem": problem, "answer": gold_answer(solution), "text": text_of(example)}
        return given | {field: said.text(unit) for field, said in self.said.items()}

    def question(self, ask: Ask, unit: Unit) -> Question:
        """An ask of a row, its places filled at once, so that no text smuggles one in."""
        known = self.known(unit)
        places = re.compile("|".join(f"{{{name}}}" for name in known))
        text, opening = (places.sub(lambda match: known[match.group()[1:-1]], said)
                         for said in (ask.text, ask.opening))  # fmt: skip
        seed = zlib.crc32(f"{self.cfg.seed} {ask.field} {unit.id} {unit.sample}".encode())
        images = self.examples[unit.i].images if ask.sees else ()
        return Question(text, images, opening, seed)

    def ask(self, ask: Ask) -> dict:
        """Asks what has no answer yet, of the rows that have all answers before; those that failed:
        {(id, "FIELD SAMPLE"): reason}. An answer that was cut goes on to the asks after it as it
        is, an empty one does not."""
        path, teacher = named(self.cfg.out, ask.field), self.teachers[ask.sees]
        ready = [unit if ask.each else unit._replace(sample=0) for unit in self.units
                 if unit.i not in self.unfit
                 and all(unit in x and x.text(unit) for x in self.said.values())]
        ready = list({unit[1:]: unit for unit in ready}.values())
        wanted = {name: tuple(said) for name, *said in self.asked}
        with resumed(path, wanted, teacher.name) as (_, append):
            there = Said(path, ask)
            for unit in filter(there.__contains__, ready):
                if there[unit].get("asked") != self.stamp(ask, unit):
                    raise ValueError(f"{path} holds an answer for {unit.id} to another prompt, "
                                     "or of another temperature, max_new or seed; remove it, or "
                                     "give another --out")  # fmt: skip
            left = [unit for unit in ready if unit not in there]
            self.count += len(left)
            print(f"{ask.field}: {len(ready) - len(left)} answers are there, {len(left)} are asked "
                  f"of {teacher.name}")

            def keep(unit: Unit, answer: dict):
                append({**self.head(unit), "teacher": teacher.name,
                        "asked": self.stamp(ask, unit), **answer})

            asked = ((unit, self.question(ask, unit)) for unit in left)
            failed = teacher.ask(asked, keep, len(left), ask.field)
        self.said[ask.field] = Said(path, ask)
        return {(unit.id, f"{ask.field} {unit.sample}"): why for unit, why in failed.items()}

    def stamp(self, ask: Ask, unit: Unit) -> str:
        """Short, and another one for another prompt, and for another way to answer it."""
        question, hot = self.question(ask, unit), self.cfg.temperature
        how = hot if hot is None else float(hot), self.cfg.max_new
        seed = None if isinstance(self.teachers[ask.sees], Served) else question.seed
        return digest(question.text, question.opening, json.dumps((*how, seed)))[:12]

    def head(self, unit: Unit) -> dict:
        name, problem, solution = self.asked[unit.i]
        return {"id": name, "sample": unit.sample, "problem": problem, "solution": solution}

    def verdict(self, unit: Unit, row: Callable) -> dict | str | None:
        """The columns of a row, why it is not to be used, or None where an answer is missing."""
        if unit.i in self.unfit:
            return self.unfit[unit.i]
        if not all(unit in said for said in self.said.values()):
            empty = (f for f, said in self.said.items() if unit in said and not said.text(unit))
            return next((f"empty {field}" for field in empty), None)
        return row(self.known(unit), {field: said[unit] for field, said in self.said.items()})

    def write(self, row: Callable) -> Counter:
        """OUT and the rejected, both whole, in the order of the data; returns the reasons."""
        out, counts = Path(self.cfg.out), Counter()
        with whole(out) as good, whole(named(out, "rejected")) as bad:
            for unit in self.units:
                if (found := self.verdict(unit, row)) is None:
                    continue
                example, reason = self.examples[unit.i], found if isinstance(found, str) else None
                line = {**self.head(unit), **carried(example)}
                if reason is None:
                    line |= pictures(example, f"{unit.i:06d}_{unit.id}", out) | found
                else:
                    line |= {"reason": reason}
                (bad if reason else good).write(json.dumps(line) + "\n")
                counts[reason] += 1
        print(f"{out}: {counts[None]} of {len(self.units)} rows")
        tell_reasons(counts)
        return counts


def ask_all(cfg: Asks, asks: Sequence[Ask], row: Callable, unfit: Callable | None = None
            ) -> Counter:  # fmt: skip
    """Asks all of it, and writes the rows. row(known, answers): the columns of a row, from texts by
    the names of their places and answers by their fields, or why it is not to be used.
    unfit(example): why it is not even to be asked about, or None. Returns how many rows there are
    of each reason, None for those to use; ValueError names at the end what got no answer."""
    run, failed = Run(cfg, asks, unfit), {}
    for ask in asks:
        failed |= run.ask(ask)
    counts = run.write(row)
    tell_failed(failed, run.count)
    return counts


def named(out: str, field: str) -> str:
    """OUT_FIELD.jsonl of OUT.jsonl, and of OUT."""
    return Path(out).with_name(f"{name_of(Path(out))}_{field}.jsonl").as_posix()


def text_of(example: Example) -> str:
    """What a row says that is itself an answer, or ""."""
    text = example.extra.get("text")
    return text.strip() and text if isinstance(text, str) else ""


def carried(example: Example, *more: str) -> dict:
    """Columns of a row that later steps and rewards read, and more."""
    names = ("text", "finish", "tokens", "teacher", "description", "stated", "view", "task",
             "frame", "box_image", *more)  # fmt: skip
    return {name: example.extra[name] for name in names if name in example.extra}
