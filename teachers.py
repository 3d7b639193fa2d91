"""Teachers: who answers a question in words, with or without its pictures. One of two kinds:

    find_teacher("Qwen/Qwen2.5-VL-7B-Instruct", how)     # a checkpoint: folder, run or hub id
    find_teacher("R1@http://127.0.0.1:8000/v1", how)     # a server's model, as NAME@URL

    failed = teacher.ask([("q1", Question("How many?", ("a.png",)))], keep, 1, "title")
    # keep("q1", {"text": "<think>…", "finish": "stop", "tokens": 7}) is called for each

A server gets pictures as data URLs: it opens no path and fetches nothing. An answer may be opened
for the teacher (R1-Vision's forced thoughts). A checkpoint goes on from that in its own turn. To a
server it is sent as the assistant's last message, with the keys by which vLLM goes on with it
(add_generation_prompt, continue_final_message); OpenAI's own has none, DeepSeek's has another.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image
from tqdm import tqdm

import chat
from config import opt
from data import Processor
from example import Example
from images import FORMATS, open_image
from journal import newest_checkpoint
from model import Qwen2VL
from rollout import Rollout
from rollout import sample as sample_completions
from template import Template

PASSED = ("PNG", "JPEG", "WEBP")  # a file of these, in these modes, goes to a server as it is
MODES = ("RGB", "L", "P", "1")  # of others servers differ in what they see: see images.py
TURNED = 0x0112  # EXIF's orientation
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}


@dataclass(frozen=True)
class Question:
    """What a teacher is asked: a text, pictures (all that open_image takes), and how the answer
    opens, which is part of the answer. seed: fixes what a checkpoint samples."""

    text: str
    images: tuple = ()
    opening: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Reads:
    """Keys of the rows that a step reads."""

    data: str = opt("d/questions.jsonl", "rows of any source, with pictures or without")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    bad_rows: str = opt("refuse", "or skip: leave them out", choices=("refuse", "skip"))
    limit: int | None = opt(None, "rows at most", least=1)


@dataclass(frozen=True)
class Asks(Reads):
    """Keys of every step that asks."""

    out: str = opt("d/answers.jsonl", "file to write; answers on the way go to …_FIELD.jsonl "
                                      "beside it, what is not to be used to …_rejected.jsonl")
    teacher: str = opt("runs", "who sees the pictures: a checkpoint (folder, run, hub id), or a "
                               "server's model as NAME@http://127.0.0.1:8000/v1")
    max_new: int = opt(4096, "tokens of an answer at most, thoughts included", least=1)
    temperature: float | None = opt(None, "default: a server's own, 1 of a checkpoint", least=0)
    seed: int = opt(0, "fixes what checkpoints say", least=0)
    batch: int = opt(8, "questions that a checkpoint answers at a time", least=1)
    bf16: bool = opt(False, "checkpoints compute in bfloat16")
    min_pixels: int | None = opt(None, "of an image, for a checkpoint; default: its own")
    max_pixels: int | None = opt(None, "of an image, for a checkpoint; default: its own")
    key_env: str = opt("OPENAI_API_KEY", "environment variable that holds the server's key")
    concurrency: int = opt(8, "requests under way at a time", least=1)
    per_minute: float | None = opt(None, "requests a minute at most; default: no limit", above=0)
    timeout: float = opt(600.0, "seconds to wait for an answer", above=0)
    retries: int = opt(6, "of a question that got none", least=0)

    reasoner = reasoner_key_env = None  # keys of Reasons
    n = 1


@dataclass(frozen=True)
class Reasons(Asks):
    """Keys of those in which one sees and another thinks."""

    reasoner: str | None = opt(None, "who reads only, named as the teacher is; default: the "
                                     "teacher, without the pictures")
    reasoner_key_env: str | None = opt(None, "that of the reasoner's server; default: key_env, "
                                             "if both are on one machine")
    n: int = opt(1, "answers for each question", least=1)
    opening: str = opt("", "with which the reasoner's answers open: <think> for a model that does "
                           "not think by itself")


def check_key(how: Asks) -> None:
    """ValueError where the reasoner's machine would be sent the key of the teacher's."""
    hosts = [urlsplit(f"http{(name or '').partition('@http')[2]}").hostname
             for name in (how.teacher, how.reasoner)]  # fmt: skip
    if all(hosts) and hosts[0] != hosts[1] and not how.reasoner_key_env:
        raise ValueError(f"reasoner {how.reasoner}: {hosts[1]} is not sent the key of {hosts[0]}; "
                         "name the environment variable that holds its own by --reasoner_key_env, "
                         f"or {how.key_env} again if it is the same")  # fmt: skip


def find_teacher(name: str, how: Asks, key_env: str | None = None):
    """The teacher of that name, asked as the keys say; key_env goes before theirs. ValueError where
    there is no such checkpoint, or no key for a server: before anything is asked."""
    model, at, url = name.partition("@http")
    if not at:
        return Checkpoint(newest_checkpoint(name), how)
    if not model:
        raise ValueError(f"teacher {name}: a server's model is named before the @, as in R1@{name}")
    return Served(chat.Server(
        f"http{url}", model, chat.key_from(key_env or how.key_env), how.concurrency, how.per_minute,
        how.timeout, how.retries, max_tokens=how.max_new, temperature=how.temperature,
    ))  # fmt: skip


# ---------------------------------------------------------------------------------------- a server


@dataclass(frozen=True)
class Served:
    """A model behind an address, see chat.py for its patience."""

    server: chat.Server

    @property
    def name(self) -> str:
        """The model's: the same one may answer at another address tomorrow."""
        return self.server.model

    def ask(self, questions, keep: Callable, total: int, title: str) -> dict:
        """Calls keep(key, answer) for every (key, Question), in any order; {key: reason} of those
        that failed. Either all answers have an opening or none. questions may be lazy."""
        first = list(islice(questions := iter(questions), 1))
        extra = CONTINUE if first and first[0][1].opening else {}
        requests = (((key, question.opening), messages_of(question))
                    for key, question in chain(first, questions))  # fmt: skip

        def told(asked: tuple, answer: chat.Answer):
            keep(asked[0], {"text": joined(asked[1], answer), "finish": answer.finish,
                            "tokens": answer.tokens})  # fmt: skip

        failed = chat.ask_all(replace(self.server, extra=extra), requests, told, total, title)
        return {key: why for (key, _), why in failed.items()}


def messages_of(question: Question) -> list[dict]:
    """The chat that asks: a text, or where there are pictures these before it."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(x)}} for x in question.images]
    content = [*shown, {"type": "text", "text": question.text}] if shown else question.text
    opening = [{"role": "assistant", "content": question.opening}] if question.opening else []
    return [{"role": "user", "content": content}, *opening]


def data_url(source) -> str:
    """A picture as text: the bytes of a PNG, JPEG or WEBP file that is upright, opaque and of 8
    bits, of all else a PNG as open_image shows it."""
    if isinstance(source, str | Path | bytes):
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            plain = image.mode in MODES and "transparency" not in image.info
            upright = image.getexif().get(TURNED, 1) == 1
            if image.format in PASSED and plain and upright:
                return encoded(content, image.format)
    buffer = io.BytesIO()
    Image.fromarray(open_image(source)).save(buffer, "PNG")
    return encoded(buffer.getvalue(), "PNG")


def encoded(content: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"


def joined(opening: str, answer: chat.Answer) -> str:
    """An answer as one text: its opening first; thoughts that came apart from it stand in
    <think>…</think>, which the opening may have begun."""
    thoughts = answer.thoughts.strip()
    if not thoughts:
        return opening + answer.text
    begun = f"{opening} " if opening else "<think>\n"
    return f"{begun}{thoughts}\n</think>\n\n{answer.text.strip()}"


# ------------------------------------------------------------------------------------ a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """Weights in a folder, sampled here. They are read when they are asked, and then dropped: two
    teachers need not fit into memory together."""

    name: str  # the folder
    how: Asks

    def ask(self, questions, keep: Callable, total: int, title: str) -> dict:
        """As Served.ask, `batch` at a time in their order; nothing fails. An answer is fixed by its
        question and its seed, in whatever batch it comes."""
        how, questions = self.how, iter(questions)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        processor = Processor.from_pretrained(self.name, min_pixels=how.min_pixels,
                                              max_pixels=how.max_pixels)  # fmt: skip
        model = Qwen2VL.from_pretrained(self.name, device=device) if total else None
        model = model and model.frozen(torch.bfloat16 if how.bf16 else torch.float32)
        with tqdm(total=total, desc=title, unit="answer", disable=not total) as bar:
            while some := list(islice(questions, how.batch)):
                prompts = [prompt_of(processor, question) for _, question in some]
                with torch.autocast(device, torch.bfloat16, enabled=how.bf16):
                    out = sample_completions(
                        model, processor, prompts, 1, how.max_new,
                        1.0 if how.temperature is None else how.temperature,
                        uids=[question.seed for _, question in some],
                    )  # fmt: skip
                for (key, _), (answer,) in zip(some, completions(out)):
                    keep(key, answer)
                bar.update(len(some))
        return {}


def prompt_of(processor: Processor, question: Question):
    """The prompt of a question: its own words in the model's chat markup, nothing added."""
    opening = f"{{Answer}}{question.opening}" if question.opening else ""
    template = Template("{Question}" + opening)
    example = Example(question.text, "", question.images)
    return replace(processor, template=template).prompt(example)


def completions(out: Rollout) -> Sequence[list[dict]]:
    """The answers of a rollout, for each prompt and sample, as their part of an answer row."""
    pairs = zip(out.texts, out.finished.tolist(), out.lengths.tolist())
    return [[{"text": text, "finish": "stop" if ended else "length", "tokens": tokens}
             for text, ended, tokens in zip(*pair)] for pair in pairs]  # fmt: skip
