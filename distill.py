"""Distillation: a teacher's verified reasoning becomes a set for supervised fine-tuning.

    python distill.py describe --scenes CLEVR_trainA_scenes.json \\
        --questions CLEVR_trainA_questions.json --images DIR --out d/questions.jsonl
    python distill.py describe --world world:A:n=1000 --out d/questions.jsonl
    python distill.py query --data d/questions.jsonl --out d/answers.jsonl \\
        --base_url https://api.deepseek.com/v1 --teacher deepseek-reasoner
    python distill.py sample --data d/questions.jsonl --out d/answers.jsonl --teacher tiny --n 8
    python distill.py bridge --data d/questions.jsonl --out d/answers.jsonl \\
        --teacher qwen@http://127.0.0.1:8000/v1 --reasoner r1@http://127.0.0.1:8001/v1
    python distill.py verify --data d/answers.jsonl --out d/verified.jsonl
    python distill.py pack --data d/verified.jsonl --out d/sft

Source: R1-V (src/distill_r1), which made MMInstruction/Clevr_CoGenT_TrainA_R1 so: DeepSeek-R1 reads
the description of a scene and counts; what is right is kept, and "scene description" becomes
"image". `sample` is rejection sampling instead (STaR, Zelikman et al. 2022, arXiv 2203.14465): a
checkpoint looks at the images itself, several times. How other systems make their sets (`bridge`,
`formal`, `caption`, `rewrite`, `judge`, `letters`) is in bridge.py. Each step can be killed and
started again: those that ask go on where they were, the others write whole files or none.

`python distill.py STEP --help` lists the keys of a step.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import bridge
import chat
from asking import named
from boxes import View, gold_boxes
from config import nearest, opt, parse
from data import Processor
from describe import PROMPTS, Describe, describe_scenes, messages
from evaluate import check_out, prompt_of
from example import Example
from grading import load_rewards, score_all, unfit
from journal import newest_checkpoint
from model import Qwen2VL
from pack import Pack, bring, names_of, pack, pictures, question_of
from rewards import final_answer
from rollout import sample as sample_completions
from rows import load_examples
from teachers import completions, joined
from traces import (
    judged,
    need,
    read_rows,
    reflections,
    resumed,
    split_thought,
    tell_failed,
    tell_reasons,
    whole,
)

# ---------------------------------------------------------------------------------------- query


@dataclass(frozen=True)
class Query:
    """Keys of `distill.py query`."""

    data: str = opt("d/questions.jsonl", "questions, as describe writes them")
    out: str = opt("d/answers.jsonl", "answers are added to this file")
    base_url: str = opt("http://127.0.0.1:8000/v1", "a server that speaks OpenAI's protocol")
    teacher: str = opt("deepseek-reasoner", "the server's name of the model")
    key_env: str = opt("OPENAI_API_KEY", "environment variable that holds the key")
    template: str = opt("v2", "v1 or v2, R1-V's prompts, or a text that holds {Question} (and "
                              "{Description})")
    system: str | None = opt(None, "system prompt; DeepSeek advises against one for R1")
    n: int = opt(1, "answers for each question", least=1)
    max_tokens: int = opt(4096, "tokens of an answer at most, thoughts included", least=1)
    temperature: float | None = opt(None, "default: the server's own", least=0)
    concurrency: int = opt(8, "requests under way at a time", least=1)
    per_minute: float | None = opt(None, "requests a minute at most; default: no limit", above=0)
    timeout: float = opt(600.0, "seconds to wait for an answer", above=0)
    retries: int = opt(6, "of a question that got none", least=0)

    def check(self):
        """ValueError for a template that asks nothing."""
        messages({"problem": ""}, self.template)


def query(cfg: Query) -> None:
    """Asks a server every question that has no answer yet, n times each."""
    check_out(cfg.out, cfg.data)
    server = chat.Server(
        cfg.base_url, cfg.teacher, chat.key_from(cfg.key_env), cfg.concurrency, cfg.per_minute,
        cfg.timeout, cfg.retries, max_tokens=cfg.max_tokens, temperature=cfg.temperature,
    )  # fmt: skip
    rows = {row["id"]: row for row in load_questions(cfg)}
    wanted = {name: (row["problem"], row["solution"]) for name, row in rows.items()}
    with resumed(cfg.out, wanted, cfg.teacher) as (done, append):
        left = [(name, k) for name in rows for k in range(cfg.n) if (name, k) not in done]
        print(f"{len(done)} answers are there, {len(left)} are asked for")

        def keep(asked: tuple[str, int], answer: chat.Answer):
            name, k = asked
            bring(rows[name], cfg.data, cfg.out)
            append({**rows[name], "sample": k, "teacher": cfg.teacher, "text": joined("", answer),
                    "finish": answer.finish, "tokens": answer.tokens})  # fmt: skip

        requests = ((at, messages(rows[at[0]], cfg.template, cfg.system)) for at in left)
        failed = chat.ask_all(server, requests, keep, len(left), "query")
    tell_failed(failed, len(left))
    print(f"{cfg.out}: complete")


def load_questions(cfg: Query) -> Iterator[dict]:
    """The rows of cfg.data, each with what the template speaks of; ValueError if not."""
    seen = set()
    described = "{Description}" in PROMPTS.get(cfg.template, cfg.template)
    keys = ("id", "problem", "solution", *["description"] * described)
    for at, row in read_rows(cfg.data):
        need(row, cfg.data, at, *keys)
        if row["id"] in seen:
            raise ValueError(f"{cfg.data}: two rows are called {row['id']}")
        seen.add(row["id"])
        yield row
    if not seen:
        raise ValueError(f"{cfg.data}: no rows")


# --------------------------------------------------------------------------------------- sample


@dataclass(frozen=True)
class Sample:
    """Keys of `distill.py sample`."""

    teacher: str = opt("runs", "checkpoint folder, or a run, or a folder of runs: the newest in it")
    data: str = opt("d/questions.jsonl", "questions of describe, or any rows")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    out: str = opt("d/answers.jsonl", "answers are added to this file; pictures that are no files "
                                      "go beside it")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    template: str | None = opt(None, "prompt template by name, or a text that holds {Question}; "
                                     "default: that of the run the teacher comes from, else r1v")
    system: str | None = opt(None, "system prompt; default: the template's, or the run's")
    limit: int | None = opt(None, "questions at most", least=1)
    n: int = opt(4, "answers for each question", least=1)
    batch: int = opt(32, "questions per batch", least=1)
    max_new: int = opt(256, "tokens of an answer at most", least=1)
    temperature: float = opt(1.0, "of the distribution that is sampled", above=0)
    top_p: float = opt(1.0, "sample from the likeliest tokens that hold this much", above=0, most=1)
    seed: int = opt(0, "fixes the samples", least=0)
    min_pixels: int | None = opt(None, "pixels of an image at least; default: the checkpoint's")
    max_pixels: int | None = opt(None, "pixels of an image at most; default: the checkpoint's")
    bf16: bool = opt(False, "compute in bfloat16")


def sample(cfg: Sample) -> None:
    """A checkpoint answers every question that has not n answers yet. A question's answers are
    fixed by the seed and its place in the data, whatever was there before."""
    check_out(cfg.out, cfg.data)
    folder = newest_checkpoint(cfg.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = Processor.from_pretrained(folder, min_pixels=cfg.min_pixels,
                                          max_pixels=cfg.max_pixels,
                                          **prompt_of(folder, cfg.template, cfg.system))
    examples = load_examples(cfg.data, cfg.images, "train", cfg.limit, cfg.bad_rows)
    asked = [question_of(example) for example in examples]
    if len(wanted := {name: said for name, *said in asked}) < len(asked):
        raise ValueError(f"{cfg.data}: two rows have the same id")
    wanted = {name: tuple(said) for name, said in wanted.items()}
    with resumed(cfg.out, wanted, folder) as (done, append):
        left = [i for i, (name, *_) in enumerate(asked)
                if any((name, k) not in done for k in range(cfg.n))]
        print(f"{len(done)} answers are there, {len(left)} questions are asked {cfg.n} times each")
        model = Qwen2VL.from_pretrained(folder, device=device) if left else None
        model = model and model.frozen(torch.bfloat16 if cfg.bf16 else torch.float32)
        for start in tqdm(range(0, len(left), cfg.batch), "sample", unit="batch"):
            uids = left[start : start + cfg.batch]
            some = [replace(examples[i], problem=asked[i][1]) for i in uids]
            with torch.autocast(device, torch.bfloat16, enabled=cfg.bf16):
                out = sample_completions(
                    model, processor, [processor.prompt(example) for example in some], cfg.n,
                    cfg.max_new, cfg.temperature, cfg.seed, uids, cfg.top_p,
                )  # fmt: skip
            for i, prompt, answers in zip(uids, out.prompts, completions(out)):
                row = dict(zip(("id", "problem", "solution"), asked[i]), teacher=folder)
                row |= pictures(prompt.example, f"{i:06d}_{asked[i][0]}", Path(cfg.out))
                row |= said_of(prompt.example)
                for k, answer in enumerate(answers):
                    if (row["id"], k) not in done:
                        append({**row, "sample": k, **answer})
    print(f"{cfg.out}: complete")


# --------------------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verify:
    """Keys of `distill.py verify`."""

    data: str = opt("d/answers.jsonl", "answers, as all steps before it write them")
    out: str = opt("d/verified.jsonl", "file to write; the rest goes to …_rejected.jsonl beside it")
    keep: int | None = opt(1, "answers of a question at most, the first that hold; none: all",
                           least=1)
    rewards: tuple[str, ...] = opt((), "rewards as in grpo.py, each of which is to be at least "
                                       "`least`; default: what a text states after its thought is "
                                       "compared with the solution")
    least: float = opt(1.0, "of each of the rewards")

    def check(self):
        """ValueError for a key that would do nothing."""
        if self.least != 1 and not self.rewards:
            raise ValueError(f"least {self.least:g}: is of --rewards, and none is given")


def verify(cfg: Verify) -> Counter:
    """Sorts answers into those to learn from and the rest, which is told why. Both files are in the
    order of the questions' ids, in whatever order the answers came. Returns the counts."""
    out, rest = Path(cfg.out), named(cfg.out, "rejected")
    for name in (cfg.out, rest):
        check_out(name, cfg.data)
    loaded, found = load_rewards(cfg.rewards) if cfg.rewards else [], []
    rows = iter(tqdm(read_rows(cfg.data), "verify", unit="answer"))
    while some := list(islice(rows, 256)):
        for place, row in some:
            need(row, cfg.data, place, "id", "problem", "solution", "text")
        said = [row for _, row in some]
        verdicts = rewarded(said, loaded, cfg.least) if loaded else map(judged, said)
        for (place, row), (reason, stated) in zip(some, verdicts):
            thought = hash(" ".join((split_thought(row["text"]) or (row["text"],))[0].split()))
            found.append((natural(row["id"]), row.get("sample", 0), place, thought, stated, reason))
    if not found:
        raise ValueError(f"{cfg.data}: no answers")
    counts, kept, said, back = Counter(), Counter(), set(), []
    with open(cfg.data, "rb") as answers, whole(out) as good, whole(rest) as bad:
        for name, _, place, thought, stated, reason in sorted(found, key=lambda item: item[:3]):
            if reason is None and (name, thought) in said:
                reason = "thought before"
            elif reason is None and cfg.keep is not None and kept[name] >= cfg.keep:
                reason = "more than --keep"
            counts[reason] += 1
            answers.seek(place)
            row = {**json.loads(answers.readline()), "stated": stated}
            row |= {"reason": reason} if reason else {}
            (bad if reason else good).write(json.dumps(row) + "\n")
            if reason is None:
                bring(row, cfg.data, cfg.out)
                kept[name] += 1
                said.add((name, thought))
                back.append(reflections((split_thought(row["text"]) or ("",))[0]))
    print(f"{out}: {counts[None]} of {len(found)} answers hold ({counts[None] / len(found):.1%}), "
          f"for {len(kept)} of {len({name for name, *_ in found})} questions")
    tell_reasons(counts)
    if back:
        words = [f"{word} {n / len(back):.2f}" for word, n in sum(back, Counter()).most_common()]
        print(f"  words of reflection in a kept thought: {', '.join(words) or 'none'}; "
              f"{sum(map(bool, back)) / len(back):.1%} of them have one")
    return counts


def rewarded(rows: list[dict], loaded: list, least: float) -> list[tuple[str | None, str | None]]:
    """As judged for each row, but by rewards of the whole text. Boxes are read in the frames of
    their row (see said_of)."""
    examples = []
    for row in rows:
        frame, gold, sizes = row.get("view") or ("pixels", "pixels", ())
        view = View(frame, gold, tuple(map(tuple, sizes)))
        extra = {key: value for key, value in row.items() if key != "frame"}
        asked = row["problem"], row["solution"], tuple(names_of(row)), str(row.get("task") or "")
        examples.append(Example(*asked, row["id"], extra, view))
    texts, lengths = [row["text"] for row in rows], [row.get("tokens") for row in rows]
    verdicts = []
    for row, example, *values in zip(rows, examples, *score_all(loaded, texts, examples, lengths)):
        reason = f"a reward below {least:g}" if None in values or min(values) < least else None
        if any(unfit(function, example) for _, function, _ in loaded):
            reason = "a solution that the rewards cannot read"
        if row.get("finish") not in (None, "stop"):
            reason = f"cut off ({row['finish']})"
        verdicts.append((reason, final_answer(row["text"])))
    return verdicts


def said_of(example: Example) -> dict:
    """Columns of a sampled row without which rewards could not read its boxes: the frames that were
    spoken and asked for, the sizes of the pictures; and what names the reward of a row."""
    names = ("task", "accu_reward_method", "box_image")
    found = {key: example.extra[key] for key in names if key in example.extra}
    if gold_boxes(example):
        found["view"] = [example.view.frame, example.view.gold, example.view.sizes]
    return found


def natural(name: str) -> tuple:
    """A key that sorts a9 before a10."""
    parts = re.split("([0-9]+)", name)  # words and numbers in turn
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))


STEPS = {"describe": (Describe, describe_scenes), "query": (Query, query),
         "sample": (Sample, sample), **bridge.STEPS, "verify": (Verify, verify),
         "pack": (Pack, pack)}  # fmt: skip


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit(0 if words else 2)
    if words[0] not in STEPS:
        raise SystemExit(f"error: {words[0]}: no step of distillation{nearest(words[0], STEPS)}; "
                         f"they are {', '.join(STEPS)}")
    Config, step = STEPS[words[0]]
    cfg = parse(Config, words[1:], f"distill.py {words[0]}: {step.__doc__}")
    try:
        return step(cfg)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("stopped; what was answered is kept, and the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
