"""Kept answers: an evaluation that was interrupted goes on where it was.

    kept = Kept("b.json", about(cfg, folder, processor, examples), examples)
    kept.rows                              # {number of an example: its row}, of before
    kept.add({7: row})                     # to b.json.part0, b.json.part1, … (one a process)
    kept.remove()                          # once b.json is written whole
"""

import glob
import json
import re
from pathlib import Path

import boxes
import boxscores
import grading
import own
import parallel
import rewards
import scorers
import verify
from data import Processor
from journal import append
from rewards import gold_answer
from shards import digest

ASKED = ("data", "images", "bad_rows", "limit", "max_new", "temperature", "top_p", "top_k", "seed",
         "min_pixels", "max_pixels", "bf16")  # keys that say what is asked, and how
CODE = (scorers, boxscores, boxes, grading, own, rewards, verify)  # what scores



class Kept:
    """Answers that are kept as they come, beside a results file: OUT.part0, OUT.part1, …

    A process writes one of them: a line that says what is evaluated (`about`, JSON), then a line
    for each answer. rows: {number of the example: its row} of what lies there already. What a kill
    cut short is left out. ValueError if it is of another evaluation. Made by all processes at once.
    """

    def __init__(self, out: str, about: dict, examples):
        self.out, self.about, wrong = out, about, None
        self.rows, self.path = {}, Path(f"{out}.part{parallel.rank()}")
        if parallel.rank() == 0:
            try:
                self.gather(examples)
            except (ValueError, OSError) as error:
                wrong = str(error)
        self.rows, wrong = parallel.gathered((self.rows, wrong))[0]
        if wrong:
            raise ValueError(wrong)
        if parallel.rank() > 0:
            append(self.path, {"about": about})

    def paths(self) -> list[Path]:
        """The files there are, of any number of processes."""
        return [Path(p) for p in sorted(glob.glob(f"{glob.escape(self.out)}.part[0-9]*"))
                if p.rpartition(".part")[2].isdigit()]

    def gather(self, examples) -> None:
        """Reads all files, and makes them the one of the first process: whole before any goes."""
        Path(self.out).parent.mkdir(parents=True, exist_ok=True)
        for path in self.paths():
            self.rows |= self.read(path, examples)
        whole = self.path.with_name(self.path.name + ".tmp")
        whole.unlink(missing_ok=True)
        append(whole, {"about": self.about})
        for i, row in self.rows.items():
            append(whole, {"i": i, "row": row})
        whole.replace(self.path)
        for path in self.paths():
            if path != self.path:
                path.unlink()

    def read(self, path: Path, examples) -> dict[int, dict]:
        """The rows of one file. What stands behind its last newline was cut short."""
        try:
            lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
            about = lines[0]["about"] if lines else self.about
            rows = {line["i"]: line["row"] for line in lines[1:]}
            asked = {i: (row["question"]["problem"], row["question"]["row"], row["ground_truth"])
                     for i, row in rows.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is damaged ({error!r}); remove it to start anew") from error
        differ = [key for key in self.about if about.get(key) != self.about[key]]
        if not differ and any(i >= len(examples) or said(examples[i]) != asked[i] for i in rows):
            differ = ["data"]
        if differ:
            raise ValueError(f"{path}: answers of another evaluation, which was interrupted: "
                             f"another {', '.join(differ)}. Remove it, or give another --out")
        return rows

    def add(self, rows: dict[int, dict]) -> None:
        """Keeps some more, at once."""
        for i, row in rows.items():
            append(self.path, {"i": i, "row": row})

    def remove(self) -> None:
        """All gone; the results are written."""
        for path in {self.path, *(self.paths() if parallel.rank() == 0 else ())}:
            path.unlink(missing_ok=True)


def said(example) -> tuple[str, str, str]:
    return example.problem, example.row, gold_answer(example.solution)


def about(cfg, folder: str, processor: Processor, examples) -> dict:
    """What an evaluation is, JSON: if it differs, the answers of an interrupted one cannot stay.
    Neither batch size nor number of processes is in it; the code that scores is."""
    weights = sorted(Path(folder).glob("*.safetensors"))
    files = [Path(part.rpartition(":")[0].strip()) for part in re.split("[(),=]", cfg.scorer)]
    code = [Path(module.__file__).read_bytes() for module in CODE]
    code += [file.read_bytes() for file in files if file.is_file()]
    return {
        **{key: getattr(cfg, key) for key in ASKED},
        "model": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights],
        "template": processor.prompt(examples[0]).text,  # with the system turn
        "pixels": [processor.settings["min_pixels"], processor.settings["max_pixels"]],
        "frames": [processor.frame, processor.gold_frame],
        "scorer": f"{cfg.scorer} {digest(*code)}",
        "n": len(examples),
    }
