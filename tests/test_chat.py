"""chat.py, chapter two: real HTTP on the loopback, with every way in which a server can fail."""

import json
import logging
import os
import signal
import threading
import time
from email.utils import formatdate
from itertools import pairwise

import pytest
from chat_server import CUT, ChatServer, Reply

from chat import Answer, Failed, Server, ask_all, key_from, read_answer, told_wait

pytest.importorskip("openai")

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """The loopback is asked directly, whatever this machine is set to."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def interruptible():
    """Python's own answer to Ctrl-C, which a shell takes from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def a_server(server: ChatServer, **options) -> Server:
    options = {"backoff": 0.01, "timeout": 5.0, "retries": 5, **options}
    return Server(server.url, "teacher", KEY, **options)


def questions(n: int) -> list:
    return [(f"q{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(n)]


def echo(n: int, body: dict) -> str:
    return "to " + body["messages"][-1]["content"]


def ask(server: Server, requests) -> tuple[dict, dict]:
    """(answers, failures) by id."""
    found = {}
    return found, ask_all(server, requests, found.__setitem__)


# --------------------------------------------------------------------------- server, key, answers


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000/v1", "ftp://a/v1", "http://", "http://me:word@host/v1", "http://[x",
            "http://host:port/v1"]
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="base_url: must be http") as error:
        Server(url, "m", KEY)
    assert "word" not in str(error.value).replace("password", "")


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    assert key_from("MY_KEY") == KEY
    monkeypatch.setenv("MY_KEY", " ")
    with pytest.raises(ValueError, match="variable MY_KEY holds no key"):
        key_from("MY_KEY")
    monkeypatch.setenv("MY_KEY", "sk-é")
    with pytest.raises(ValueError, match="no such characters") as error:
        key_from("MY_KEY")
    assert "sk-" not in str(error.value)


def test_nothing_shows_the_key():
    server = Server("http://host/v1", "m", KEY)
    assert KEY not in repr(server)
    assert server.hide(f"wrong key {KEY}!") == "wrong key [key]!"
    assert server.hide("x" * 290 + KEY) == "x" * 290 + "[key]"  # not a part of it, either
    assert len(server.hide("x" * 1000)) == 300
    assert Server("http://host/v1", "m", "none").hide("none given") == "none given"


def body(**message) -> bytes:
    finish = message.pop("finish", "stop")
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


def test_an_answer_is_read_with_its_thoughts():
    assert read_answer(body(content="5")) == Answer("5", "", "stop", None)
    assert read_answer(body(content="5", reasoning_content="2 + 3")).thoughts == "2 + 3"
    assert read_answer(body(content="5", reasoning="2 + 3")).thoughts == "2 + 3"
    assert read_answer(body(content=None, reasoning_content="2 +", finish="length")) == Answer(
        "", "2 +", "length", None
    )
    told = b'{"choices": [{"message": {"content": "5"}}], "usage": {"completion_tokens": 3}}'
    assert read_answer(told) == Answer("5", "", None, 3)
    assert read_answer(body(content="", finish="length")).finish == "length"


@pytest.mark.parametrize(
    "reply",
    [b"", b"<html>hello</html>", b'{"choices": [', b"[1]", b'"x"', b"null", b"{}",
     b'{"choices": []}', b'{"choices": null}', b'{"choices": [{}]}',
     b'{"choices": [{"message": 3}]}', b"[" * 100_000, b"\xff\xfe", body(content=""),
     body(content=None), body(content=["x"]), body(content="x", reasoning_content=[1])],
)  # fmt: skip
def test_what_is_no_answer_is_told_as_such(reply):
    with pytest.raises(Failed, match=r"the server's (reply|answer) is (no|empty)"):
        read_answer(reply)


def test_a_time_to_wait_is_seconds_or_a_date():
    assert told_wait({"retry-after": "3"}) == 3.0
    assert told_wait({"retry-after": " 0.5 "}) == 0.5
    assert told_wait({"retry-after": "-3"}) == 0.0
    assert 28 < told_wait({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30
    assert told_wait({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0.0
    for nonsense in ({}, {"retry-after": ""}, {"retry-after": "soon"}):
        assert told_wait(nonsense) is None


# ------------------------------------------------------------------------------ asking, politely


def test_every_question_gets_its_own_answer():
    """Answers come in another order than questions: the first ones take longest."""
    with ChatServer(lambda n, body: (time.sleep(0.05 * (n < 4)), echo(n, body))[1]) as server:
        order = []
        keep = lambda name, answer: order.append((name, answer.text))  # noqa: E731
        failed = ask_all(a_server(server, concurrency=4), questions(20), keep, total=20)
    assert failed == {}
    assert sorted(order) == sorted((f"q{i}", f"to question {i}") for i in range(20))
    assert [name for name, _ in order] != [f"q{i}" for i in range(20)]
    assert len(server.asked) == 20


def test_a_request_says_what_the_server_is_told_to():
    with ChatServer(echo) as server:
        ask(a_server(server, max_tokens=4096), questions(1))
        ask(a_server(server, max_tokens=9, temperature=0.0), questions(1))
    first, second = (asked.body for asked in server.asked)
    assert first == {"model": "teacher", "max_tokens": 4096,
                     "messages": [{"role": "user", "content": "question 0"}]}  # fmt: skip
    assert second == {**first, "max_tokens": 9, "temperature": 0.0}
    assert {(asked.key, asked.path) for asked in server.asked} == {(KEY, "/v1/chat/completions")}


def test_no_more_requests_are_under_way_than_allowed():
    for most in (1, 3):
        with ChatServer(echo, delay=0.03) as server:
            answers, failed = ask(a_server(server, concurrency=most), questions(12))
        assert (len(answers), failed, server.most) == (12, {}, most)


def test_questions_are_taken_only_when_they_are_asked():
    taken = []
    requests = ((taken.append(name), (name, messages))[1] for name, messages in questions(50))
    with ChatServer(echo) as server:
        keep = lambda name, answer: seen.append(len(taken) - len(seen))  # noqa: E731
        seen = []
        ask_all(a_server(server, concurrency=4), requests, keep)
    assert len(taken) == 50
    assert max(seen) <= 4


def test_requests_keep_the_rate_retries_too():
    """1,200 a minute is one every 50 ms. Every third request fails and is asked again."""
    fails = lambda n, body: Reply(500) if n % 3 == 0 else echo(n, body)  # noqa: E731
    with ChatServer(fails) as server:
        answers, _ = ask(a_server(server, concurrency=8, per_minute=1200), questions(8))
    assert len(answers) == 8
    assert len(server.asked) == 12
    times = [asked.time for asked in server.asked]
    assert times[-1] - times[0] >= 11 * 0.05 - 0.1
    assert min(b - a for a, b in zip(times, times[3:])) > 0.05  # no bursts


def test_a_server_that_says_too_many_is_left_alone_by_all():
    """One 429 that names 0.4 s: nothing starts in that time, of no worker."""
    def busy(n, body):
        return Reply(429, headers={"Retry-After": "0.4"}) if n == 6 else echo(n, body)

    with ChatServer(busy, delay=0.02) as server:
        answers, failed = ask(a_server(server, concurrency=4), questions(30))
    assert (len(answers), failed, len(server.asked)) == (30, {}, 31)
    told = server.asked[6].time + 0.02
    started = [asked.time - told for asked in server.asked[7:]]
    under_way = [t for t in started if t < 0.15]  # were sent before the reply was there
    assert len(under_way) <= 10
    assert min(t for t in started if t >= 0.15) >= 0.35


def test_a_server_that_asks_for_an_hour_is_not_waited_for():
    reply = Reply(429, headers={"Retry-After": "3600"})
    stops = pytest.raises(ValueError, match="asks to be left alone for 3600 s")
    with ChatServer(lambda n, body: reply) as server, stops:
        ask(a_server(server, concurrency=1), questions(5))
    assert len(server.asked) == 1


def test_what_may_go_better_next_time_is_tried_again():
    """Six faults, one after another, then the answer."""
    faults = [Reply(500), Reply(200, b'{"choices": ['), CUT, Reply(200, {"choices": []}),
              Reply(503), Reply(200, b"<html>", {"content-type": "text/html"})]  # fmt: skip
    with ChatServer(lambda n, body: [*faults, "5"][n]) as server:
        answers, failed = ask(a_server(server, retries=6), questions(1))
    assert (answers["q0"].text, failed) == ("5", {})
    assert len(server.asked) == 7


def test_waits_between_retries_are_doubled():
    with ChatServer(lambda n, body: Reply(500)) as server:
        _, failed = ask(a_server(server, retries=3, backoff=0.1), questions(1))
    times = [asked.time for asked in server.asked]
    waits = [b - a for a, b in pairwise(times)]
    assert len(waits) == 3 and list(failed) == ["q0"]
    for wait, due in zip(waits, (0.1, 0.2, 0.4)):
        assert 0.75 * due <= wait < 1.25 * due + 0.3


def test_a_slow_answer_is_given_up_after_its_time():
    with ChatServer(echo, delay=0.5) as server:
        begin = time.monotonic()
        answers, failed = ask(a_server(server, timeout=0.1, retries=1), questions(2))
    assert time.monotonic() - begin < 2
    assert (answers, failed) == ({}, dict.fromkeys(("q0", "q1"), "no answer within 0.1 s"))
    assert len(server.asked) == 4


def test_a_question_that_the_server_refuses_is_not_asked_again():
    """A 400 is about this question, too long for example; the others have their answers."""
    def choosy(n, body):
        long = body["messages"][0]["content"] == "question 3"
        return Reply(400, {"error": {"message": "too long"}}) if long else echo(n, body)

    with ChatServer(choosy) as server:
        answers, failed = ask(a_server(server, concurrency=2), questions(6))
    assert set(answers) == {"q0", "q1", "q2", "q4", "q5"}
    assert list(failed) == ["q3"] and "too long" in failed["q3"]
    assert len(server.asked) == 6


# -------------------------------------------------------------------------- stopping at once


@pytest.mark.parametrize(("code", "told"), [
    (401, "refuses the key"), (403, "refuses the key"), (402, "wants to be paid"),
    (404, "does not know this address or this model"), (405, "is no chat server"),
])  # fmt: skip
def test_what_meets_every_question_stops_at_once(code, told):
    error = {"error": {"message": f"no: {KEY} is not known here"}}
    stops = pytest.raises(ValueError, match=f"model teacher: the server {told}")
    with ChatServer(lambda n, body: Reply(code, error), 0.02) as server, stops as stopped:
        ask(a_server(server, concurrency=2), questions(1000))
    assert len(server.asked) <= 2
    assert KEY not in str(stopped.value) and "[key] is not known here" in str(stopped.value)


def test_an_account_without_money_stops_at_once():
    """OpenAI says 429 to that, and no patience helps."""
    error = {"error": {"message": "exceeded", "code": "insufficient_quota"}}
    stops = pytest.raises(ValueError, match="wants to be paid")
    with ChatServer(lambda n, body: Reply(429, error)) as server, stops:
        ask(a_server(server, concurrency=1), questions(10))
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_stops_at_once():
    with ChatServer(echo) as server:
        pass
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be reached .*is the address right"):
        ask(a_server(server, backoff=10.0), questions(10))
    assert time.monotonic() - begin < 3


def test_a_connection_that_is_cut_does_not_mean_that_there_is_no_server():
    with ChatServer(lambda n, body: CUT if n == 0 else echo(n, body)) as server:
        answers, failed = ask(a_server(server), questions(1))
    assert (len(answers), failed) == (1, {})


def test_a_server_that_goes_and_comes_back_is_waited_for():
    """One that has answered once may be started anew; what failed meanwhile is tried again."""
    found = {}
    with ChatServer(echo) as server:
        worker = threading.Thread(target=lambda: found.update(
            failed=ask_all(a_server(server, concurrency=2, retries=8, per_minute=1200),
                           questions(20), found.__setitem__)))
        worker.start()
        while len(found) < 3:
            time.sleep(0.01)
    time.sleep(0.2)
    with ChatServer(echo, port=server.port) as again:
        worker.join()
    assert found.pop("failed") == {} and len(found) == 20
    assert 3 <= len(server.asked) < 20 and len(again.asked) >= 20 - len(server.asked)


def test_many_failures_in_a_row_stop_and_one_answer_between_does_not():
    sometimes = lambda n, body: echo(n, body) if n % 3 == 2 else Reply(400)  # noqa: E731
    with ChatServer(sometimes) as server:
        answers, failed = ask(a_server(server, give_up=3, concurrency=1), questions(12))
    assert (len(answers), len(failed)) == (4, 8)
    error = {"error": {"message": "bad model"}}
    stops = pytest.raises(ValueError, match=r"3 questions in a row failed.*bad model")
    with ChatServer(lambda n, body: Reply(400, error)) as server, stops:
        ask(a_server(server, give_up=3, concurrency=1), questions(100))
    assert len(server.asked) == 3


def test_the_key_is_in_no_message_and_no_log(caplog, capfd):
    """The server repeats the key wherever it can."""
    def rude(n, body):
        text = f"you said {KEY}"
        page = Reply(200, f"<html>{text}</html>".encode(), {"content-type": "text/html"})
        return [Reply(400, {"error": {"message": text}}), page, Reply(500, text.encode())][n % 3]

    with caplog.at_level(logging.DEBUG), ChatServer(rude) as server:
        _, failed = ask(a_server(server, retries=1, concurrency=1), questions(5))
    assert len(failed) == 5 and "[key]" in str(failed)
    out = capfd.readouterr()
    assert KEY not in str(failed) + caplog.text + out.out + out.err
    assert server.asked[0].key == KEY


def test_ctrl_c_ends_it_and_keeps_what_is_there(interruptible):
    """The fourth answer never comes; the interrupt does."""
    stop = threading.Event()

    def stuck(n, body):
        if n >= 3:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start() if n == 3 else None
            stop.wait(5)
        return echo(n, body)

    found = {}
    with ChatServer(stuck) as server:
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ask_all(a_server(server, concurrency=1), questions(9), found.__setitem__)
        assert time.monotonic() - begin < 3
        stop.set()
    assert list(found) == ["q0", "q1", "q2"]
    assert len(server.asked) == 4


def test_an_error_of_ones_own_ends_it():
    def keep(name, answer):
        raise OSError("disk full")

    with ChatServer(echo) as server, pytest.raises(OSError, match="disk full"):
        ask_all(a_server(server), questions(3), keep)


def test_nothing_to_ask_asks_nothing():
    with ChatServer(echo) as server:
        assert ask_all(a_server(server), [], print, total=0) == {}
    assert not server.asked
