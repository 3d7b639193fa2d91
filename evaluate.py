"""Evaluation: answers of a checkpoint on a benchmark, greedy by default, scored and saved.

    python evaluate.py --model runs/tiny --data world:B:n=500 --out b.json
    python evaluate.py --model DIR --data superclevr.jsonl --images pictures --scorer count
    make eval GPUS=8 MODEL=DIR DATA=geoqa.jsonl IMAGES=DIR ARGS="--scorer geoqa --out geoqa.json"
    python evaluate.py --rescore b.json --scorer count       # a results file, ours or R1-V's

The rate that matters is accuracy under the prompt the model was trained with; unparsable answers
count as wrong and their share is reported beside it. Several processes answer a share each.

With --out, answers are kept beside it as they come, in OUT.part0, OUT.part1, … (one a process).
The same command, with as many processes or not, then goes on where it was stopped; once OUT is
written whole they are gone. Results of another evaluation are never replaced. The rows of OUT have
the fields of R1-V's logs; its rates are shares in [0, 1], where theirs is in percent. --rescore
loads no model; its last line is JSON, in percent.
"""

import glob
import json
import sys
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
import rewards
import scorers
import verify
from ahead import Ahead
from config import opt, parse
from data import Processor
from journal import append, newest_checkpoint, write_json
from model import Qwen2VL
from rewards import gold_answer
from rollout import sample
from rows import load_examples
from scorers import check_results, load_scorer, rescore, score_row, summary, told
from shards import digest

ASKED = ("data", "images", "bad_rows", "limit", "max_new", "temperature", "top_p", "top_k", "seed",
         "min_pixels", "max_pixels", "bf16")  # keys that say what is asked, and how


@dataclass(frozen=True)
class Config:
    """Keys of `python evaluate.py`."""

    model: str = opt("runs", "checkpoint: folder, run, folder of runs (the newest in it), hub id")
    data: str = opt("world:A:n=500", "questions: world:…, a file, a folder, a hub id")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    out: str | None = opt(None, "results file to write, JSON")
    scorer: str = opt("accuracy", "R1-V's count or geoqa, or a reward by name or file.py:function")
    rescore: str | None = opt(None, "results file to score anew, instead of asking a model")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    template: str | None = opt(None, "prompt template by name, or a text that holds {Question}; "
                               "default: that of the run the model comes from, else r1v")
    system: str | None = opt(None, "system prompt; default: the template's, or the run's")
    limit: int | None = opt(None, "questions at most", least=1)
    batch: int = opt(64, "questions per batch", least=1)
    max_new: int = opt(256, "tokens of an answer at most", least=1)
    temperature: float = opt(0.0, "0 is greedy", least=0)
    top_p: float = opt(1.0, "sample from the likeliest tokens that hold this much", above=0, most=1)
    top_k: int = opt(0, "sample from the k likeliest tokens; 0: from all", least=0)
    seed: int = opt(0, "fixes the samples, if any", least=0)
    min_pixels: int | None = opt(None, "pixels of an image at least; default: the checkpoint's")
    max_pixels: int | None = opt(None, "pixels of an image at most; default: the checkpoint's")
    workers: int | None = opt(None, "processes that prepare the next batch's prompts; default: 4 "
                              "beside a GPU, else 0", least=0)
    bf16: bool = opt(False, "compute in bfloat16")

    def check(self):
        """ValueError for keys that would do nothing."""
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError("top_p, top_k: need a temperature above 0; at 0 answers are greedy")
        idle = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        idle = [name for name in idle if name not in ("rescore", "scorer", "out")]
        if self.rescore and idle:
            raise ValueError(f"{', '.join(idle)}: would do nothing with --rescore, which asks no "
                             "model; it goes with --scorer and --out")


def evaluate(
    model: Qwen2VL,
    processor: Processor,
    examples,
    batch: int = 64,
    max_new: int = 256,
    title: str = "evaluate",
    scorer: str = "accuracy",
    kept: "Kept | None" = None,
    workers: int | None = 0,
    **sampling,
) -> dict:
    """Answers to all examples: {"accuracy", "low", "high", "format", ..., "results": [...]}.

    Greedy, unless `sampling` (temperature, top_p, top_k, seed of rollout.sample) says otherwise.
    scorer: a name as in scorers.load_scorer. kept: where answers are kept as they come, and those
    that are there already are not asked again. workers: processes that prepare the next batch.

    Several processes answer a share each, and all return the whole.
    accuracy (with its 95 % interval low, high), format and unparsable are shares in [0, 1].
    """
    score, done = load_scorer(scorer), dict(kept.rows) if kept else {}
    left = [i for i in range(len(examples)) if i not in done]
    first, count = parallel.share(len(left))
    left, new = left[first : first + count], {}
    bar = tqdm(total=count, desc=title, unit="question", leave=False, disable=parallel.rank() > 0)
    with closing(Ahead(processor, examples, workers=workers)) as ahead, bar:  # closed on Ctrl-C too
        several = batch * (4 if model.device.type == "cuda" else 1)  # come in as others end
        for at in range(0, count, several):
            numbers = left[at : at + several]
            prompts = ahead(numbers, expected=left[at + several : at + 2 * several])
            out = sample(model, processor, prompts, 1, max_new, uids=numbers, slots=batch,
                         **{"temperature": 0.0, **sampling})
            logps = (out.logp * out.mask).sum(-1)[:, 0].tolist()
            rows = {}
            for i, prompt, (text,), logp, (length,) in zip(
                numbers, prompts, out.texts, logps, out.lengths.tolist()
            ):
                example = prompt.example
                asked = {"problem": example.problem, "row": example.row, "task": example.task}
                rows[i] = {"question": asked, "prompt": prompt.text,
                           **score_row(text, example, score), "logp": logp, "length": length}
            if kept:
                kept.add(rows)
            new |= rows
            bar.update(len(numbers))
    for some in parallel.gathered(new):
        done |= some
    results = [done[i] for i in sorted(done)]
    return {**summary(results), "results": results}


def load_evals(sources: tuple[str, ...]) -> dict:
    """{NAME: held-out examples} of "NAME=SOURCE" items, as in the key `evals` of a run."""
    named = (item.split("=", 1) for item in sources)
    return {name: load_examples(source, part="test") for name, source in named}


def evaluate_all(model, processor, evals: dict, max_new: int, out: Path, when: str) -> dict:
    """Greedy results on every eval; details go to eval/NAME_WHEN.json, summaries are returned."""
    found = {}
    for name, examples in evals.items():
        full = evaluate(model, processor, examples, max_new=max_new, title=f"{when}: {name}")
        if parallel.rank() == 0:
            write_json(full, out / "eval" / f"{name}_{when}.json")
        found[name] = {k: v for k, v in full.items() if k != "results"}
    return found


def print_summary(found: dict, out: Path, page: Path) -> None:
    """The table of a run's results before and after, and where things lie."""
    if found["before"]:
        print(f"\n{'':10}  before              after               format        (95 % interval)")
    for name, b in found["before"].items():
        a = found["after"][name]
        cells = (f"{x['accuracy']:.3f} ({x['low']:.2f}-{x['high']:.2f})" for x in (b, a))
        print(f"{name:10}  {'  '.join(cells)}  {b['format']:.2f} -> {a['format']:.2f}")
    print(f"\ncheckpoint  {newest_checkpoint(str(out))}\nreport      {page}")


# -------------------------------------------------------------------- an interrupted evaluation


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


def about(cfg: Config, folder: str, processor: Processor, examples) -> dict:
    """What an evaluation is, JSON: if it differs, the answers of an interrupted one cannot stay.
    Neither batch size nor number of processes is in it; the code that scores is."""
    weights = sorted(Path(folder).glob("*.safetensors"))
    file = Path(cfg.scorer.rpartition(":")[0])
    code = [Path(module.__file__).read_bytes() for module in (scorers, rewards, verify)]
    code += [file.read_bytes()] if file.is_file() else []
    return {
        **{key: getattr(cfg, key) for key in ASKED},
        "model": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights],
        "template": processor.prompt(examples[0]).text,  # with the system turn
        "pixels": [processor.settings["min_pixels"], processor.settings["max_pixels"]],
        "scorer": f"{cfg.scorer} {digest(*code)}",
        "n": len(examples),
    }


# ---------------------------------------------------------------------------------- the command


def check_out(out: str, *inputs: str | None) -> None:
    """ValueError where `out` cannot be the file to write: it is a folder, lies below a file, or is
    one of the input files, which would be lost. To be called before the work."""
    path, part = Path(out), Path(f"{out}.tmp")
    if path.is_dir():
        raise ValueError(f"--out {out}: is a folder; a file is to be written")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {out}: {folder} is a file, not a folder")
    for name in (name for name in inputs if name and Path(name).exists()):
        if any(taken.exists() and taken.samefile(name) for taken in (path, part)):
            raise ValueError(f"--out {out}: {name} would be overwritten; give another --out")


def prompt_of(folder: str, template: str | None, system: str | None) -> dict:
    """{"template", "system"}: those asked for; without a template, those that the run of the
    checkpoint was trained with, or r1v for any other checkpoint."""
    config = Path(folder).parent / "config.json"
    run = json.loads(config.read_text()) if config.is_file() and template is None else {}
    return {"template": template or run.get("template", "r1v"),
            "system": run.get("system") if system is None else system}  # fmt: skip


def run(cfg: Config) -> dict:
    """Evaluates a checkpoint as cfg says, prints the rates, writes the results."""
    device, folder = parallel.start(), newest_checkpoint(cfg.model)
    load_scorer(cfg.scorer)  # refused before a model is read, as is an --out
    asked = prompt_of(folder, cfg.template, cfg.system)
    head = {"model": folder, **asked, **{key: getattr(cfg, key) for key in (*ASKED, "scorer")}}
    if cfg.out:
        check_out(cfg.out, cfg.data)
        check_results(cfg.out, head)
    model = Qwen2VL.from_pretrained(folder, device=device)
    model.frozen(torch.bfloat16 if cfg.bf16 else torch.float32)
    processor = Processor.from_pretrained(folder, min_pixels=cfg.min_pixels,
                                          max_pixels=cfg.max_pixels, **asked)
    examples = load_examples(cfg.data, cfg.images, "test", cfg.limit, cfg.bad_rows)
    kept = Kept(cfg.out, about(cfg, folder, processor, examples), examples) if cfg.out else None
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=cfg.bf16):
        found = evaluate(model, processor, examples, cfg.batch, cfg.max_new, scorer=cfg.scorer,
                         kept=kept, seed=cfg.seed, temperature=cfg.temperature, top_p=cfg.top_p,
                         top_k=cfg.top_k, workers=cfg.workers)
    if parallel.rank() == 0:
        if cfg.out:
            write_json({**head, **found}, cfg.out)
        print(f"{folder} on {cfg.data}, template {asked['template']!r}, scorer {cfg.scorer}: "
              f"{told(found)}")
    parallel.gathered(None)  # the results are written
    if kept:
        kept.remove()
    return found


def run_rescore(cfg: Config) -> dict:
    """Scores a results file anew, prints the rates, and the numbers as JSON in percent."""
    parallel.start()
    if parallel.rank() > 0:
        return {}
    head = {"rescored": cfg.rescore, "scorer": cfg.scorer}
    if cfg.out:
        check_out(cfg.out, cfg.rescore)
        check_results(cfg.out, head)
    found = rescore(cfg.rescore, load_scorer(cfg.scorer))
    if cfg.out:
        write_json({**head, **found}, cfg.out)
    missing = sum(row["extracted_answer"] is None for row in found["results"])
    print(f"{cfg.rescore}, scorer {cfg.scorer}: {told(found)}")
    print(json.dumps({"accuracy": found["correct"] / found["n"] * 100, "n": found["n"],
                      "correct": found["correct"], "unparsable": missing}))
    return found


def main(argv=None) -> dict:
    cfg = parse(Config, argv, __doc__)
    goes_on = "; the same command goes on where it was" if cfg.out and not cfg.rescore else ""
    with parallel.together():
        try:
            return run_rescore(cfg) if cfg.rescore else run(cfg)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error
        except KeyboardInterrupt:
            if parallel.rank() == 0:
                print(f"stopped{goes_on}", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
