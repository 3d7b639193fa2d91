"""Evaluation: answers of a checkpoint on a benchmark, greedy by default, scored and saved.

    python evaluate.py --model runs/tiny --data world:B:n=500 --out b.json
    python evaluate.py --model DIR --data questions.jsonl --images pictures

The rate that matters is accuracy under the prompt the model was trained with; unparsable answers
count as wrong and their share is reported beside it. The interval is Wilson's, 95 % (Wilson 1927,
"Probable inference, the law of succession, and statistical inference").
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from config import opt, parse
from data import Example, Processor
from journal import newest_checkpoint, write_json
from model import Qwen2VL
from rewards import final_answer, gold_answer, load_rewards
from rollout import sample
from rows import load_examples


@dataclass(frozen=True)
class Config:
    """Keys of `python evaluate.py`."""

    model: str = opt("runs", "checkpoint folder, or a run, or a folder of runs: the newest in it")
    data: str = opt("world:A:n=500", "world:A, world:B, world:C (with options), or a .jsonl")
    images: str | None = opt(None, "folder of the images; default: beside the .jsonl")
    out: str | None = opt(None, "results file to write, JSON")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    template: str | None = opt(None, "prompt template by name, or a text that holds {Question}; "
                               "default: that of the run the model comes from, else r1v")
    limit: int | None = opt(None, "questions at most", least=1)
    batch: int = opt(64, "questions per batch", least=1)
    max_new: int = opt(256, "tokens of an answer at most", least=1)
    temperature: float = opt(0.0, "0 is greedy", least=0)
    top_p: float = opt(1.0, "sample from the likeliest tokens that hold this much", above=0, most=1)
    top_k: int = opt(0, "sample from the k likeliest tokens; 0: from all", least=0)
    seed: int = opt(0, "fixes the samples, if any", least=0)
    max_pixels: int | None = opt(None, "pixels of an image at most; default: the checkpoint's")
    bf16: bool = opt(False, "compute in bfloat16")

    def check(self):
        """ValueError for keys that would do nothing."""
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError("top_p, top_k: need a temperature above 0; at 0 answers are greedy")


def evaluate(
    model: Qwen2VL,
    processor: Processor,
    examples: list[Example],
    batch: int = 64,
    max_new: int = 256,
    title: str = "evaluate",
    **sampling,
) -> dict:
    """Answers to all examples: {"accuracy", "low", "high", "format", ..., "results": [...]}.

    Greedy, unless `sampling` (temperature, top_p, top_k, seed of rollout.sample) says otherwise.

    Several processes answer a share each, and all return the whole.
    accuracy (with its 95 % interval low, high), format and unparsable are shares in [0, 1].
    """
    score = {name: f for name, f, _ in load_rewards(("accuracy", "format"))}
    results = []
    first, count = parallel.share(len(examples))
    examples = examples[first : first + count]
    quiet = parallel.rank() > 0
    bar = tqdm(total=count, desc=title, unit="question", leave=False, disable=quiet)
    for at in range(0, len(examples), batch):
        some = examples[at : at + batch]
        prompts = [processor.prompt(example) for example in some]
        uids = list(range(first + at, first + at + len(some)))
        out = sample(model, processor, prompts, 1, max_new, uids=uids,
                     **{"temperature": 0.0, **sampling})
        logps = (out.logp * out.mask).sum(-1)[:, 0].tolist()
        for prompt, (text,), logp, length in zip(prompts, out.texts, logps, out.lengths.tolist()):
            example = prompt.example
            results.append({
                "question": {"problem": example.problem, "row": example.row, "task": example.task},
                "prompt": prompt.text,
                "ground_truth": gold_answer(example.solution),
                "model_output": text,
                "extracted_answer": final_answer(text),
                "logp": logp,
                "length": length[0],
                **{name: f(text, example) for name, f in score.items()},
            })
        bar.update(len(some))
    bar.close()
    results = [r for some in parallel.gathered(results) for r in some]
    return {**summary(results), "results": results}


def load_evals(sources: tuple[str, ...]) -> dict[str, list[Example]]:
    """{NAME: held-out examples} of "NAME=SOURCE" items, as in the key `evals` of a run."""
    named = (item.split("=", 1) for item in sources)
    return {name: load_examples(source, part="test") for name, source in named}


def summary(results: list[dict]) -> dict:
    """Shares over scored results: accuracy with its interval, format, unparsable, mean length."""
    n = len(results)
    right = sum(r["accuracy"] == 1 for r in results)
    low, high = wilson(right, n)
    return {
        "accuracy": right / n,
        "low": low,
        "high": high,
        "format": sum(r["format"] == 1 for r in results) / n,
        "unparsable": sum(r["extracted_answer"] is None for r in results) / n,
        "length": sum(r["length"] for r in results) / n,
        "n": n,
    }


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of k in n > 0: Wilson's, which stays inside [0, 1]."""
    p, z2 = k / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def template_of(folder: str) -> str:
    """The template that the run of a checkpoint was trained with; r1v for any other checkpoint."""
    config = Path(folder).parent / "config.json"
    run = json.loads(config.read_text()) if config.is_file() else {}
    return run.get("template", "r1v")


def main(argv=None) -> dict:
    cfg = parse(Config, argv, __doc__)
    try:
        folder = newest_checkpoint(cfg.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = Qwen2VL.from_pretrained(folder, device=device)
        template = cfg.template or template_of(folder)
        processor = Processor.from_pretrained(folder, template, max_pixels=cfg.max_pixels)
        examples = load_examples(cfg.data, cfg.images, "test", cfg.limit, cfg.bad_rows)
        if cfg.out:
            Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
            Path(cfg.out).touch()  # refused now if it cannot be written
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    with torch.autocast(device, torch.bfloat16, enabled=cfg.bf16):
        found = evaluate(model, processor, examples, cfg.batch, cfg.max_new, seed=cfg.seed,
                         temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k)
    print(f"{folder} on {cfg.data}, template {template!r}: accuracy {found['accuracy']:.3f} "
          f"({found['low']:.3f} to {found['high']:.3f}, n = {found['n']}), "
          f"format {found['format']:.3f}, unparsable {found['unparsable']:.3f}, "
          f"{found['length']:.1f} tokens")
    if cfg.out:
        write_json({"model": folder, "data": cfg.data, "template": template, **found}, cfg.out)
    return found


if __name__ == "__main__":
    main()
