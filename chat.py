"""One chat server that speaks OpenAI's protocol, asked many questions, politely.

    server = Server("http://127.0.0.1:8000/v1", "deepseek-reasoner", key_from("OPENAI_API_KEY"))
    failed = ask_all(server, [("q1", [{"role": "user", "content": "2 + 2?"}])], keep)
    # keep("q1", Answer(text="4", thoughts="…", finish="stop", tokens=1)) is called for each

Requests go through the `openai` package: DeepSeek's API, vLLM, SGLang and OpenAI are all such
servers. What we do differently from its own retries: they wait at most 60 s, each request for
itself. Here a server that says "too many" is left alone by all requests until the time it named.

A mistake that would meet every question (wrong address, key or model, no money left) stops at once
with a ValueError; what meets one question is tried again, then told at the end. The key is in no
message: servers like to repeat it in theirs, so it is cut out.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from tqdm import tqdm

LONGEST_WAIT = 600.0  # seconds; a server that asks for more is better asked another day
# Not worth another try: 401 and 403 are the key, 402 the account, 404 and 405 address or model.
HOPELESS = {401: "refuses the key", 402: "wants to be paid", 403: "refuses the key",
            404: "does not know this address or this model", 405: "is no chat server"}  # fmt: skip
AGAIN = (408, 409, 425, 429, *range(500, 600))  # other codes are the question's own fault
WORDS = 300  # characters of a server's message that are shown


@dataclass(frozen=True)
class Server:
    """A server, the model asked for, and how politely. ValueError for an address that is none."""

    base_url: str  # "http://127.0.0.1:8000/v1"
    model: str
    key: str = field(repr=False)
    concurrency: int = 8  # requests under way at a time
    per_minute: float | None = None  # requests at most, retries counted, evenly spaced
    timeout: float = 600.0  # seconds for one answer
    retries: int = 6  # of one question
    backoff: float = 1.0  # seconds before the first retry; doubled for each that follows
    give_up: int = 20  # questions in a row that fail; then the server is taken for broken
    max_tokens: int = 4096
    temperature: float | None = None  # None: the server's own
    extra: dict = field(default_factory=dict)  # keys of each request that OpenAI does not have

    def __post_init__(self):
        try:
            url = urlsplit(self.base_url)
            good = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # a port that is no number, half a bracket
            good = False
        if not good or "@" in url.netloc:
            raise ValueError("base_url: must be http://… or https://…, as in "
                             "http://127.0.0.1:8000/v1, and hold no password")

    def hide(self, text: str) -> str:
        """text, short, without the key. A key as short as "none" is a local server's, no secret."""
        text = text.replace(self.key, "[key]") if len(self.key) >= 8 else text
        return " ".join(text[:WORDS].split())


@dataclass(frozen=True)
class Answer:
    """What a server said. thoughts: DeepSeek's reasoning_content (newer vLLM: reasoning), or "".
    finish: "stop", or "length" where max_tokens cut it. tokens: of the answer, where told."""

    text: str
    thoughts: str
    finish: str | None
    tokens: int | None


class Failed(Exception):
    """One question got no answer."""


def key_from(variable: str) -> str:
    """The key in an environment variable; ValueError if it is not set."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"the environment variable {variable} holds no key; set it (a server that "
                         "needs no key takes any word), or name another one by --key_env")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {variable}: a key has no such characters")
    return key


def client_package():
    """The module openai, which only those need who ask a server. ValueError where it is missing."""
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ValueError("asking a server needs a package: pip install openai") from error
    return openai


def ask_all(
    server: Server,
    requests: Iterable[tuple[object, list[dict]]],
    keep: Callable[[object, Answer], None],
    total: int | None = None,
    title: str = "ask",
) -> dict:
    """Asks every (id, messages), and calls keep(id, answer) as soon as an answer is there, one at a
    time but in any order. Returns {id: reason} of those that failed.

    requests may be lazy: no more than `concurrency` are taken ahead. ValueError if the server
    cannot be used at all. Ctrl-C ends it by KeyboardInterrupt between two calls of keep; requests
    under way are dropped.
    """
    with tqdm(total=total, desc=title, unit="answer", disable=total == 0) as bar:
        return asyncio.run(Asking(server, keep, bar).all(requests))


class Asking:
    """One call of ask_all: what its workers share. They are coroutines of one thread, so that
    nothing needs a lock."""

    def __init__(self, server: Server, keep: Callable, bar: tqdm):
        self.server, self.keep, self.bar = server, keep, bar
        self.openai = client_package()
        self.next = 0.0  # when the next request may start, by time.monotonic
        self.heard = False  # whether the server has ever replied
        self.failed, self.in_a_row = {}, 0

    async def all(self, requests) -> dict:
        """Runs `concurrency` workers over the requests; the first ValueError stops all."""
        s, queue = self.server, iter(requests)
        timeout = self.openai.Timeout(s.timeout, connect=min(s.timeout, 10.0))
        async with self.openai.AsyncOpenAI(
            api_key=s.key, base_url=s.base_url, timeout=timeout, max_retries=0
        ) as client:
            workers = [asyncio.create_task(self.work(client, queue)) for _ in range(s.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return self.failed

    async def work(self, client, queue):
        """One question after another, until none is left."""
        for name, messages in queue:
            try:
                answer = await self.ask(client, messages)
            except Failed as error:
                self.failed[name] = str(error)
                self.in_a_row += 1
                self.bar.set_postfix_str(f"{len(self.failed)} failed")
                if self.in_a_row >= self.server.give_up:
                    raise ValueError(f"{self.server.base_url}: {self.in_a_row} questions in a row "
                                     f"failed, the last by: {error}") from None
            else:
                self.in_a_row = 0
                self.keep(name, answer)
            self.bar.update()

    async def ask(self, client, messages) -> Answer:
        """One question, with retries."""
        s = self.server
        options = {} if s.temperature is None else {"temperature": s.temperature}
        for attempt in range(s.retries + 1):
            await self.turn()
            try:
                reply = await client.chat.completions.with_raw_response.create(
                    model=s.model, messages=messages, max_tokens=s.max_tokens,
                    extra_body=s.extra or None, **options,
                )  # fmt: skip
                self.heard = True
                return read_answer(reply.content)
            except self.openai.APIStatusError as error:
                self.heard = True
                reason, wait = self.refused(error), told_wait(error.response.headers)
            except (self.openai.APIConnectionError, Failed) as error:
                reason, wait = self.unheard(error), None
            if attempt < s.retries:
                doubled = s.backoff * 2**attempt * random.uniform(0.75, 1.25)
                await asyncio.sleep(min(LONGEST_WAIT, doubled) if wait is None else wait)
        raise Failed(reason)

    async def turn(self):
        """Returns when a request may start."""
        while (wait := self.next - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        if self.server.per_minute:
            self.next = time.monotonic() + 60 / self.server.per_minute

    def refused(self, error) -> str:
        """What a code of 400 and above means, if another try may help; else Failed or ValueError.
        A "too many" (429) or "busy" (503) that names a time makes every request wait."""
        s, code = self.server, error.status_code
        told = s.hide(error.message)
        if code in HOPELESS or error.code == "insufficient_quota":
            why = HOPELESS.get(code, HOPELESS[402])
            raise ValueError(f"{s.base_url}, model {s.model}: the server {why} ({told})") from None
        if code not in AGAIN:
            raise Failed(told)
        wait = told_wait(error.response.headers)
        if wait is not None and wait > LONGEST_WAIT:
            raise ValueError(f"{s.base_url}: asks to be left alone for {wait:.0f} s; start again "
                             f"then ({told})") from None
        if wait is not None and code in (429, 503):
            self.next = max(self.next, time.monotonic() + wait)
        return told

    def unheard(self, error) -> str:
        """What went wrong on the way; ValueError if the server was never even reached."""
        if isinstance(error, Failed):
            return self.server.hide(str(error))
        reason = self.server.hide(f"{error} {error.__cause__ or ''}")
        # ConnectError, ConnectTimeout: names, since openai has changed its HTTP package before
        if not self.heard and type(error.__cause__).__name__.startswith("Connect"):
            raise ValueError(f"{self.server.base_url}: cannot be reached ({reason}); "
                             "is the address right, and the server running?") from None
        late = isinstance(error, self.openai.APITimeoutError)
        return f"no answer within {self.server.timeout:g} s" if late else reason


def read_answer(body: bytes) -> Answer:
    """The answer in the JSON of a chat completion. Failed if it holds none."""
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
        text, finish = message.get("content") or "", choice.get("finish_reason")
        tokens = (json.loads(body).get("usage") or {}).get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = body.decode(errors="replace")
        raise Failed(f"the server's reply is no chat completion: {shown}") from None
    if not (isinstance(text, str) and isinstance(thoughts, str)):
        raise Failed("the server's reply is not text")
    if not (text.strip() or thoughts.strip() or finish == "length"):
        raise Failed("the server's answer is empty")
    return Answer(text, thoughts, finish, tokens)


def told_wait(headers) -> float | None:
    """Seconds that a reply asks to wait (Retry-After: seconds or a date; RFC 9110, 10.2.3)."""
    told = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
