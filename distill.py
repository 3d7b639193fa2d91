"""Distillation: a teacher's verified reasoning becomes a set for supervised fine-tuning.

    python distill.py describe --scenes CLEVR_trainA_scenes.json \\
        --questions CLEVR_trainA_questions.json --images DIR --out d/questions.jsonl
    python distill.py describe --world world:A:n=1000 --out d/questions.jsonl
    python distill.py query --data d/questions.jsonl --out d/answers.jsonl \\
        --base_url https://api.deepseek.com/v1 --teacher deepseek-reasoner
    python distill.py sample --data d/questions.jsonl --out d/answers.jsonl --teacher tiny --n 8
    python distill.py verify --data d/answers.jsonl --out d/verified.jsonl
    python distill.py pack --data d/verified.jsonl --out d/sft

Source: R1-V (src/distill_r1), which made MMInstruction/Clevr_CoGenT_TrainA_R1 so: DeepSeek-R1 reads
the description of a scene and counts; what is right is kept, and "scene description" becomes
"image". `sample` is rejection sampling instead (STaR, Zelikman et al. 2022, arXiv 2203.14465): a
checkpoint looks at the images itself, several times. Each step can be killed and started again:
`query` and `sample` go on where they were, the others write whole files or none.

`python distill.py STEP --help` lists the keys of a step.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import chat
from config import nearest, opt, parse
from data import Processor
from describe import PROMPTS, counting_rows, load_clevr, load_drawn, messages, some
from evaluate import check_out, prompt_of
from example import Example
from images import find_image
from journal import newest_checkpoint
from model import Qwen2VL
from pack import picture, write_set
from rollout import Rollout
from rollout import sample as sample_completions
from rows import load_examples
from traces import judged, need, of_image, read_rows, resumed, split_thought, whole

# ------------------------------------------------------------------------------------- describe


@dataclass(frozen=True)
class Describe:
    """Keys of `distill.py describe`."""

    scenes: str | None = opt(None, "CLEVR's scenes, CLEVR_…_scenes.json")
    questions: str | None = opt(None, "CLEVR's questions, CLEVR_…_questions.json")
    images: str | None = opt(None, "folder of CLEVR's images: each must be there")
    world: str | None = opt(None, "an embedded world instead, as world:A:n=1000")
    out: str = opt("d/questions.jsonl", "file to write; a world's pictures go beside it")
    limit: int | None = opt(None, "questions at most, drawn by seed (R1-V: 10,000)", least=1)
    seed: int = opt(0, "fixes which, if there is a limit", least=0)

    def check(self):
        """ValueError unless there is one source, whole."""
        if not ((self.scenes and self.questions) if self.world is None
                else not (self.scenes or self.questions or self.images)):
            raise ValueError("describe: give --scenes and --questions, or --world")


def describe(cfg: Describe) -> None:
    """Scenes to counting questions with a description in words, see describe.py."""
    out = Path(cfg.out)
    check_out(cfg.out, cfg.scenes, cfg.questions)
    if cfg.world:
        scenes, questions = load_drawn(cfg.world, out.parent, f"images/{out.stem}")
    else:
        scenes, questions = load_clevr(cfg.scenes, cfg.questions)
    count = sum(1 for _ in counting_rows(scenes, questions))
    if not count:
        raise ValueError(f"{cfg.world or cfg.questions}: no question has how many or number in it")
    rows = some(counting_rows(scenes, questions), count, cfg.limit, cfg.seed)
    with whole(out) as file:
        for row in tqdm(rows, "describe", min(count, cfg.limit or count), unit="question"):
            if cfg.images:
                find_image(row["image"], Path(cfg.images).resolve())
            file.write(json.dumps(row) + "\n")
    print(f"{out}: {min(count, cfg.limit or count)} of {count} counting questions on "
          f"{len(scenes)} images")


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
            append({**rows[name], "sample": k, "teacher": cfg.teacher, "text": written(answer),
                    "finish": answer.finish, "tokens": answer.tokens})  # fmt: skip

        requests = ((at, messages(rows[at[0]], cfg.template, cfg.system)) for at in left)
        failed = chat.ask_all(server, requests, keep, len(left), "query")
    if failed:
        told = [f"{name} ({k}): {why}" for (name, k), why in list(failed.items())[:20]]
        told += [f"and {len(failed) - 20} more"] * (len(failed) > 20)
        raise ValueError("\n  ".join([f"{len(failed)} of {len(left)} questions got no answer; the "
                                      "same command asks them again", *told]))
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


def written(answer: chat.Answer) -> str:
    """An answer as one text: thoughts that came apart from it stand in <think>…</think>."""
    if not answer.thoughts.strip():
        return answer.text
    return f"<think>\n{answer.thoughts.strip()}\n</think>\n\n{answer.text.strip()}"


# --------------------------------------------------------------------------------------- sample


@dataclass(frozen=True)
class Sample:
    """Keys of `distill.py sample`."""

    teacher: str = opt("runs", "checkpoint folder, or a run, or a folder of runs: the newest in it")
    data: str = opt("d/questions.jsonl", "questions of describe, or any rows with one image each")
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
            for i, example, answers in zip(uids, some, completions(out)):
                row = dict(zip(("id", "problem", "solution"), asked[i]), teacher=folder)
                row["image"] = picture(example, f"{i:06d}_{asked[i][0]}", Path(cfg.out))
                for k, answer in enumerate(answers):
                    if (row["id"], k) not in done:
                        append({**row, "sample": k, **answer})
    print(f"{cfg.out}: complete")


def question_of(example: Example) -> tuple[str, str, str]:
    """(id, problem, solution) of a row. A described scene is asked about as what is seen.
    ValueError unless it has one image, which is what the set to learn holds."""
    if len(example.images) != 1:
        raise ValueError(f"{example.row}: has {len(example.images)} images; distillation takes "
                         "rows with one")
    problem = of_image(example.problem) if "description" in example.extra else example.problem
    return str(example.extra.get("id") or example.row), problem, example.solution


def completions(out: Rollout) -> list[list[dict]]:
    """The answers of a rollout, for each prompt and sample, as their part of an answer row."""
    pairs = zip(out.texts, out.finished.tolist(), out.lengths.tolist())
    return [[{"text": text, "finish": "stop" if ended else "length", "tokens": tokens}
             for text, ended, tokens in zip(*pair)] for pair in pairs]  # fmt: skip


# --------------------------------------------------------------------------------- verify, pack


@dataclass(frozen=True)
class Verify:
    """Keys of `distill.py verify`."""

    data: str = opt("d/answers.jsonl", "answers, as query and sample write them")
    out: str = opt("d/verified.jsonl", "file to write; the rest goes to …_rejected.jsonl beside it")
    keep: int | None = opt(1, "answers of a question at most, the first that hold; none: all",
                           least=1)


def verify(cfg: Verify) -> Counter:
    """Sorts answers into those to learn from and the rest, which is told why. Both files are in the
    order of the questions' ids, in whatever order the answers came. Returns the counts."""
    out, rest = Path(cfg.out), Path(cfg.out).with_suffix("").as_posix() + "_rejected.jsonl"
    for name in (cfg.out, rest):
        check_out(name, cfg.data)
    found = []
    for place, row in tqdm(read_rows(cfg.data), "verify", unit="answer"):
        need(row, cfg.data, place, "id", "problem", "solution", "text", "image")
        reason, stated = judged(row)
        thought = hash(" ".join((split_thought(row["text"]) or ("",))[0].split()))
        found.append((natural(row["id"]), row.get("sample", 0), place, thought, stated, reason))
    if not found:
        raise ValueError(f"{cfg.data}: no answers")
    counts, kept, said = Counter(), Counter(), set()
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
                kept[name] += 1
                said.add((name, thought))
    print(f"{out}: {counts[None]} of {len(found)} answers hold ({counts[None] / len(found):.1%}), "
          f"for {len(kept)} of {len({name for name, *_ in found})} questions")
    for reason, count in counts.most_common():
        if reason:
            print(f"  {count:6d}  {reason}")
    return counts


def natural(name: str) -> tuple:
    """A key that sorts a9 before a10."""
    parts = re.split("([0-9]+)", name)  # words and numbers in turn
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts))


@dataclass(frozen=True)
class Pack:
    """Keys of `distill.py pack`."""

    data: str = opt("d/verified.jsonl", "answers to learn from, as verify writes them")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    out: str = opt("d/sft", "folder to write")
    shard: int = opt(10_000, "rows of a parquet file", least=1)


def pack(cfg: Pack) -> None:
    """Writes the set to learn, see pack.py."""
    check_out(f"{cfg.out}/rows.jsonl", cfg.data)
    base = Path(cfg.images or Path(cfg.data).parent)
    print(f"{cfg.out}: {write_set(cfg.data, base, Path(cfg.out), cfg.shard)} rows")


STEPS = {"describe": (Describe, describe), "query": (Query, query), "sample": (Sample, sample),
         "verify": (Verify, verify), "pack": (Pack, pack)}  # fmt: skip


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
