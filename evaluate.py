"""Evaluation: answers of a checkpoint on a benchmark, greedy by default, scored and saved.

    python evaluate.py --model runs/tiny --data world:B:n=500 --out b.json
    python evaluate.py --model DIR --data superclevr.jsonl --images pictures --scorer count
    python evaluate.py --model DIR --data refcoco.jsonl --images coco --scorer rec     # or detect
    make eval GPUS=8 MODEL=DIR DATA=geoqa.jsonl IMAGES=DIR ARGS="--scorer geoqa --out geoqa.json"
    python evaluate.py --rescore b.json --scorer count       # a results file, ours or R1-V's
    python evaluate.py --model runs/tiny --out think.json                     # as it was trained
    python evaluate.py --model runs/tiny --out direct.json --template direct  # answers alone

The rate that matters is accuracy under the prompt the model was trained with; that of direct
answers says what its thoughts are worth. Unparsable answers count as wrong and their share is
reported beside it. Several processes answer a share each.

With --out, answers are kept beside it as they come, in OUT.part0, OUT.part1, … (one a process).
The same command, with as many processes or not, then goes on where it was stopped; once OUT is
written whole they are gone. Results of another evaluation are never replaced. The rows of OUT have
the fields of R1-V's logs; its rates are shares in [0, 1], where theirs is in percent. --rescore
loads no model; its last line is JSON, in percent.
"""

import json
import os
import sys
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from ahead import Ahead
from boxes import FRAMES
from config import opt, parse
from data import Processor
from journal import newest_checkpoint, write_json
from kept import ASKED, Kept, about
from model import Qwen2VL
from rollout import sample
from rows import load_examples
from scorers import (
    NUMBERS,
    Scorer,
    answerable,
    check_results,
    further,
    load_scorer,
    rescore,
    score_row,
    summary,
    told,
)


@dataclass(frozen=True)
class Config:
    """Keys of `python evaluate.py`."""

    model: str = opt("runs", "checkpoint: folder, run, folder of runs (the newest in it), hub id")
    data: str = opt("world:A:n=500", "questions: world:…, a file, a folder, a hub id; several with "
                    "' + ' between them")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    out: str | None = opt(None, "results file to write, JSON")
    scorer: str = opt("accuracy", "R1-V's count or geoqa, boxes: rec or detect, or any reward")
    rescore: str | None = opt(None, "results file to score anew, instead of asking a model")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    template: str | None = opt(None, "prompt template by name, or a text that holds {Question}; "
                               "default: that of the run the model comes from, else r1v")
    system: str | None = opt(None, "system prompt; default: the template's, or the run's")
    frame: str | None = opt(None, "coordinates of boxes that the model speaks of; default: the "
                            "run's, else by its family", choices=FRAMES)
    gold_frame: str | None = opt(None, "coordinates of the data's boxes; default: the run's, else "
                                 "pixels", choices=FRAMES)
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
        idle = [name for name in idle if name not in ("rescore", "scorer", "out", "bad_rows")]
        if self.rescore and idle:
            raise ValueError(f"{', '.join(idle)}: would do nothing with --rescore, which asks no "
                             "model; it goes with --scorer, --bad_rows and --out")


def evaluate(
    model: Qwen2VL,
    processor: Processor,
    examples,
    batch: int = 64,
    max_new: int = 256,
    title: str = "evaluate",
    scorer: str | Scorer = "accuracy",
    kept: Kept | None = None,
    workers: int | None = 0,
    **sampling,
) -> dict:
    """Answers to all examples: {"accuracy", "low", "high", "format", ..., "results": [...]}.

    Greedy, unless `sampling` (temperature, top_p, top_k, seed of rollout.sample) says otherwise.
    scorer: loaded, or a name as in scorers.load_scorer. kept: where answers are kept as they come,
    and those that are there are not asked again. workers: processes that prepare the next batch.

    Several processes answer a share each, and all return the whole.
    What the numbers are is told at scorers.summary and scorers.NUMBERS.
    """
    score = load_scorer(scorer) if isinstance(scorer, str) else scorer
    done = dict(kept.rows) if kept else {}
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
                rows[i] = {"question": question(example), "prompt": prompt.text,
                           **score_row(text, example, score, length),
                           "logp": logp, "length": length}
            if kept:
                kept.add(rows)
            new |= rows
            bar.update(len(numbers))
    for some in parallel.gathered(new):
        done |= some
    results = [done[i] for i in sorted(done)]
    return {**summary(results), "results": results}


def question(example) -> dict:
    """What a row of results holds of an example, for rewards that score it anew: its columns too,
    as far as they are texts or numbers, and no answers."""
    columns = {key: value for key, value in example.extra.items()
               if isinstance(value, str | int | float)
               and key not in ("completion", "thinking", "system")}  # fmt: skip
    return {**columns, "problem": example.problem, "row": example.row, "task": example.task}


def load_evals(sources: tuple[str, ...], scorer: str = "accuracy") -> dict:
    """{NAME: held-out examples} of "NAME=SOURCE" items, as in the key `evals` of a run. ValueError
    for an unknown scorer, or gold answers that it cannot read."""
    named, judge = (item.split("=", 1) for item in sources), load_scorer(scorer)
    return {name: answerable(judge, load_examples(source, part="test")) for name, source in named}


def evaluate_all(model, processor, evals: dict, max_new: int, out: Path, when: str,
                 scorer: str | Scorer = "accuracy") -> dict:  # fmt: skip
    """Greedy results on every eval; details go to eval/NAME_WHEN.json, summaries are returned."""
    found = {}
    for name, examples in evals.items():
        full = evaluate(model, processor, examples, max_new=max_new, title=f"{when}: {name}",
                        scorer=scorer)
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
        more = {key: (further(b).get(key), further(a).get(key)) for key in NUMBERS}
        more = {NUMBERS[key]: " -> ".join("none" if v is None else f"{v:.3f}" for v in pair)
                for key, pair in more.items() if pair != (None, None)}  # fmt: skip
        print(f"{name:10}  {'  '.join(cells)}  {b['format']:.2f} -> {a['format']:.2f}"
              + "".join(f"\n{'':10}  {key:10} {values}" for key, values in more.items()))
    print(f"\ncheckpoint  {newest_checkpoint(str(out))}\nreport      {page}")


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
    for name in (name for name in inputs if name and os.path.exists(name)):
        if any(taken.exists() and taken.samefile(name) for taken in (path, part)):
            raise ValueError(f"--out {out}: {name} would be overwritten; give another --out")


def prompt_of(folder: str, template: str | None, system: str | None, frame: str | None = None,
              gold_frame: str | None = None) -> dict:  # fmt: skip
    """Arguments of Processor.from_pretrained: those asked for; else those that the run of the
    checkpoint was trained with, or for any other r1v, its system turn, None (the model family's),
    pixels. Beside a template that is asked for, the run's system turn does not count."""
    config = Path(folder).parent / "config.json"
    run = json.loads(config.read_text()) if config.is_file() else {}
    told = run if template is None else {}
    return {"template": template or told.get("template", "r1v"),
            "system": told.get("system") if system is None else system,
            "frame": frame or run.get("frame"),
            "gold_frame": gold_frame or run.get("gold_frame") or "pixels"}  # fmt: skip


def run(cfg: Config) -> dict:
    """Evaluates a checkpoint as cfg says, prints the rates, writes the results."""
    device, folder = parallel.start(), newest_checkpoint(cfg.model)
    scorer = load_scorer(cfg.scorer)  # refused before a model is read, as is an --out
    asked = prompt_of(folder, cfg.template, cfg.system, cfg.frame, cfg.gold_frame)
    head = {"model": folder, **asked, **{key: getattr(cfg, key) for key in (*ASKED, "scorer")}}
    if cfg.out:
        check_out(cfg.out, cfg.data)
        check_results(cfg.out, head)
    model = Qwen2VL.from_pretrained(folder, device=device)
    model.frozen(torch.bfloat16 if cfg.bf16 else torch.float32)
    processor = Processor.from_pretrained(folder, min_pixels=cfg.min_pixels,
                                          max_pixels=cfg.max_pixels, **asked)
    examples = load_examples(cfg.data, cfg.images, "test", cfg.limit, cfg.bad_rows)
    examples = answerable(scorer, examples, cfg.bad_rows)
    kept = Kept(cfg.out, about(cfg, folder, processor, examples), examples) if cfg.out else None
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=cfg.bf16):
        found = evaluate(model, processor, examples, cfg.batch, cfg.max_new, scorer=scorer,
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
    found = rescore(cfg.rescore, load_scorer(cfg.scorer), cfg.bad_rows)
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
