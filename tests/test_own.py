"""Chapter two of own.py: a file of one's own is loaded, asked, and can hurt nobody."""
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rewards
import worker
from example import Example
from grading import load_rewards, score_all
from worker import counted


def gold(solution):
    return SimpleNamespace(solution=solution)


def say(answer, thought="so"):
    return f"<think>{thought}</think> <answer>{answer}</answer>"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """For each of one's own, since a start takes 0.1 s."""
    monkeypatch.setattr(worker, "MOST", 1)


def own(tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_text(source)
    return path


def test_one_s_own_reward_is_loaded_from_a_file_and_sees_text_and_example(tmp_path):
    path = own(tmp_path, "def short(text, example, limit=5):\n"
                         "    return None if example.solution == '' else len(text) < limit\n")
    [(name, function, weight)] = load_rewards((f"{path}:short",), (0.5,))
    assert (name, weight) == ("short", 0.5)
    assert [function("abc", gold("3")), function("abcdef", gold("3")), function("", gold(""))] == [
        1.0, 0.0, None]
    assert type(function("abc", gold("3"))) is float


def test_one_s_own_path_is_relative_to_the_working_folder(tmp_path, monkeypatch):
    own(tmp_path, "def f(text, example): return 1\n")
    monkeypatch.chdir(tmp_path)
    assert load_rewards(("mine.py:f", "accuracy"))[0][1]("", gold("3")) == 1.0


def test_a_file_may_hold_dataclasses_with_postponed_annotations(tmp_path):
    path = own(tmp_path, "from __future__ import annotations\nfrom dataclasses import dataclass\n"
                         "@dataclass\nclass A:\n    x: int = 2\n"
                         "def f(text, example): return A().x\n")
    assert load_rewards((f"{path}:f",))[0][1]("", gold("3")) == 2.0


@pytest.mark.parametrize("source, message", [
    ("def grade(text, example): return 1", "no function f in .*mine.py"),
    ("def ff(text, example): return 1", "no function f in .*mine.py; did you mean ff?"),
    ("f = 3", "no function f"),
    ("def f(text): return 1", r"callable as f\(text, example\), but is f\(text\): too many"),
    ("def f(text, example, more): return 1", r"but is f\(text, example, more\): missing"),
    ("def f(text, *, example): return 1", r"must be callable as f\(text, example\)"),
    ("def accuracy(text, example): return 1\nf = accuracy", None)])
def test_a_wrong_function_is_refused_at_start(source, message, tmp_path):
    name = f"{own(tmp_path, source)}:f"
    if message is None:
        assert load_rewards(("accuracy", name))[1][0] == "f"
    else:
        with pytest.raises(ValueError, match=message):
            load_rewards((name,))


@pytest.mark.parametrize("source, message", [
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("x = 1\nraise KeyError(x)", r'mine.py", line 2, in .*KeyError\(x\).*KeyError: 1'),
    ("def f(text, example: return 1", r"mine.py\", line 1\n.*SyntaxError"),
    ("import sys\nsys.exit(3)", "does not start, it ended")])
def test_an_error_in_one_s_own_file_is_shown_as_it_is(source, message, tmp_path):
    with pytest.raises(ValueError, match=rf"(?s)^reward .*mine.py:f: .*{message}"):
        load_rewards((f"{own(tmp_path, source)}:f",))


def test_a_file_that_hangs_while_it_is_loaded_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "START_SECONDS", 1.0)
    path, start = own(tmp_path, "while True: pass"), time.monotonic()
    with pytest.raises(ValueError, match=r"mine.py:f: .*not ready after 1 s"):
        load_rewards((f"{path}:f",))
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("value", ["'1'", "float('nan')", "float('inf')", "[1]", "1j", "10**400"])
def test_one_s_own_reward_must_give_a_finite_number(value, tmp_path):
    path = own(tmp_path, f"def f(text, example): return {value} if text else 1")
    [(_, function, _)] = load_rewards((f"{path}:f",))
    with pytest.raises(ValueError, match=r"(?s)mine.py:f: .*(gave .*; must be a finite number or "
                                         r"None|int too large)"):
        function("so", gold("3"))
    assert function("", gold("3")) == 1 and function("so", gold("3")) is None


def test_the_trainer_does_not_run_the_file(tmp_path, monkeypatch):
    path = own(tmp_path, "import os, signal, sys, rewards\nos.environ['HURT'] = '1'\n"
                         "os.chdir('/')\nsys.path.append('/')\nrewards.same = None\n"
                         "signal.signal(signal.SIGALRM, lambda *_: None)\n"
                         "def f(text, example):\n"
                         "    example.extra['seen'] = 1\n"
                         "    return os.getpid()\n")
    example, before = Example("", "3"), (os.getcwd(), [*sys.path], {*sys.modules})
    [(_, function, _)] = load_rewards((f"{path}:f",))
    assert function("", example) not in (os.getpid(), os.getppid())
    assert (os.getcwd(), sys.path) == before[:2] and "HURT" not in os.environ
    assert not {x for x in {*sys.modules} - before[2] if "mine" in x} and example.extra == {}
    assert rewards.same("3", "3.0") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_the_example_arrives_whole(tmp_path):
    path = own(tmp_path, "from example import Example\n"
                         "def f(text, example):\n"
                         "    a, b, c = example.images\n"
                         "    assert type(example) is Example and a.dtype == 'uint8'\n"
                         "    assert a.shape == (320, 480, 3) and str(b) == 'a.png' and c == b'x'\n"
                         "    assert example.extra == {'at': [(0.5, 2)], '\\ud800': None}\n"
                         "    e = example\n"
                         "    assert (e.problem, e.task, e.row) == ('q', 't', 'r')\n"
                         "    return int(a.sum()) + len(text + example.solution)\n")
    image = np.random.default_rng(0).integers(0, 255, (320, 480, 3), dtype=np.uint8)
    example = Example("q", "\ud800", (image, Path("a.png"), b"x"), "t", "r",
                      {"at": [(0.5, 2)], "\ud800": None})
    [(_, function, _)] = load_rewards((f"{path}:f",))
    assert function("\0\ud800", example) == image.sum() + 3


HARMFUL = """
import os, time
def f(text, example):
    if text == "hang":
        while True: pass
    if text == "tower": return 9**9**9**9
    if text == "die": os._exit(0)
    if text == "fill": return len(bytearray(6 * 10**8))
    if text == "raise": raise KeyError("odd")
    if text == "word": return "word"
    if text == "print": print('{"value": 7}')
    return len(text)
def g(text, example): return f(text, example)
"""


def test_what_hangs_dies_or_fills_the_memory_has_no_reward_and_is_counted(tmp_path, capsys):
    [(_, function, _)] = load_rewards((f"{own(tmp_path, HARMFUL)}:f",), (), 0.7, 0.5)
    counted()
    texts, start = ["a", "hang", "bb", "die", "print", "fill", "tower", "ccc"], time.monotonic()
    [values] = score_all([("f", function, 1.0)], texts, [gold("3")] * 8)
    assert values == [1.0, None, 2.0, None, 5.0, None, None, 3.0]
    assert counted() == {"killed": 4, "failed": 0} and time.monotonic() - start < 7
    told = capsys.readouterr().err
    assert told.count("no reward") == 1 and "mine.py:f: was killed or died" in told
    assert "0.7 s and 0.5 GB" in told
    assert function("hang", gold("3")) is None and capsys.readouterr().err == ""


def test_what_raises_has_no_reward_and_is_told_once(tmp_path, capsys):
    both = load_rewards([f"{own(tmp_path, HARMFUL)}:{name}" for name in "fg"])
    counted()
    texts = ["raise", "a", "word", "bb"]
    assert score_all(both, texts, [gold("3")] * 4) == [[None, 1.0, None, 2.0]] * 2
    assert counted() == {"killed": 0, "failed": 4}
    told = capsys.readouterr().err
    assert told.count("KeyError: 'odd'") == 2 and 'raise KeyError("odd")' in told
    assert told.count("said once") == 2
    assert score_all(both, texts, [gold("3")] * 4) == [[None, 1.0, None, 2.0]] * 2
    assert capsys.readouterr().err == ""


def test_one_that_has_never_worked_and_fails_for_all_texts_is_a_mistake(tmp_path, capsys):
    """Told in the first step, not after the night. Once it has worked, it may be the texts."""
    path = own(tmp_path, HARMFUL)
    both = load_rewards(("accuracy", f"{path}:f"), (), 0.7)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)mine.py:f: failed for every text so far; .*"
                                             r'raise KeyError\("odd"\)\n.*\nKeyError: .odd'):
            score_all(both, ["word", "raise"], [gold("3"), gold("3")])
    assert score_all(both, ["hang", "raise"], [gold("3")] * 2)[1] == [None, None]
    with pytest.raises(ValueError, match="failed for every text so far"):
        both[1][1]("raise", gold("3"))
    assert score_all(both, ["a", "raise"], [gold("3")] * 2)[1] == [1.0, None]
    assert score_all(both, ["word", "raise"], [gold("3")] * 2)[1] == [None, None]
    assert both[1][1]("raise", gold("3")) is None


def test_a_process_that_replaces_another_runs_what_the_first_one_ran(tmp_path):
    path = own(tmp_path, "import os, beside\n"
                         "def f(text, example): return beside.one if text else os._exit(0)\n")
    (tmp_path / "beside.py").write_text("one = 1")
    [(_, function, _)] = load_rewards((f"{path}:f",))
    path.write_text("this is no Python")
    assert [function(text, gold("3")) for text in ("a", "", "b")] == [1.0, None, 1.0]


def test_one_s_own_are_called_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "MOST", 4)
    monkeypatch.setattr(worker, "cores", lambda: 4)
    path = own(tmp_path, "import time\ndef f(text, example): time.sleep(0.25); return int(text)\n")
    loaded = load_rewards((f"{path}:f",))
    start = time.monotonic()
    assert score_all(loaded, [*"01234567"], [gold("3")] * 8) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert time.monotonic() - start < 1.5               # one after another they take 2 s


def test_no_alarm_is_set_in_the_trainer():
    """It works in the main thread only, ends no call into C, and a user's own code may set it."""
    rewards.math(say("6/2"), gold("3"))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    root = Path(rewards.__file__).parent
    assert [path.name for path in sorted(root.glob("*.py"))
            if "SIGALRM" in path.read_text(encoding="utf-8")] == ["worker.py"]


def test_a_bad_row_of_one_group_does_not_end_a_run(tmp_path):
    """A process that has one prompt a step sees nothing else in its first call."""
    path = tmp_path / "mine.py"
    path.write_text("def f(text, example):\n    return 1 / int(example.solution)\n")
    rewards = load_rewards((f"{path}:f",))
    bad, good = gold("0"), gold("2")
    assert score_all(rewards, ["a", "b"], [bad, bad]) == [[None, None]]
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        score_all(rewards, ["a", "b"], [bad, bad])
    assert score_all(rewards, ["a", "b"], [good, good]) == [[0.5, 0.5]]
    assert score_all(rewards, ["a", "b"], [bad, bad]) == [[None, None]]

