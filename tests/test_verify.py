"""verify.py, chapter two: math-verify's verdicts, and what no text can do to the process that asks.

The oracle is math-verify itself, called in this process with texts that are known to be harmless.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import verify
from verify import JUDGE, MEMORY, Worker, judge

math_verify = pytest.importorskip("math_verify")  # the oracle

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = "5^(5^(5^5))"  # Math-Verify issue 65: one power of integers, inside C


def oracle(text: str, gold: str) -> tuple[bool, str | None]:
    """As R1-V asks: src/r1-v/src/open_r1/grpo.py, src/eval/test_qwen2vl_geoqa.py."""
    found, wanted = math_verify.parse(text), math_verify.parse(gold)
    return math_verify.verify(found, wanted) > 0, str(found[0]) if found else None


@pytest.fixture(scope="module")
def hasty():
    """A worker of its own that gives up after half a second."""
    worker = Worker(JUDGE.command, 0.5)
    yield worker
    worker.stop()


def gone(pid: int, seconds: float) -> bool:
    """Whether a process that is not ours to wait for ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


# -------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("text, gold, equal, answer", [
    ("so 140", "140°", True, "140"),
    ("the angle is 40.0", "40°", True, "40.0000000000000"),
    (r"that is $\frac{1}{2}$", "0.5", True, "1/2"),
    (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", True, "2*sqrt(3)"),
    ("first 3, then 4", "3", False, "4"),  # the last number counts
    ("<think>= 25. </think><answer>65</answer>", "25", True, "25"),  # R1-V's log: behind a tag
    ("many", "3", False, None),
    ("", "", False, None),
    ("3 \ud800", "3", True, "3"),
])  # fmt: skip
def test_the_verdict_is_that_of_math_verify(text, gold, equal, answer):
    assert judge(text, gold) == (equal, answer) == oracle(text, gold)
    assert verify.verify(text, gold) is equal


def test_random_texts_get_the_verdict_of_math_verify_in_r1v_s_order():
    rng, seen = random.Random(0), set()
    pieces = ["3", "4.0", " ", " = ", "x", "$", r"\frac{1}{2}", "0.5", "<answer>", "</answer>", "%",
              r"\boxed{3}", "so", "°", "answer: ", ",", "\n", "x = 3", "{3, 4}"]  # fmt: skip
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randrange(6)))
        gold = rng.choice(["3", "$x = 3$", "0.5", "140°", "<answer> 3 </answer>", "{3, 4}"])
        assert judge(text, gold) == oracle(text, gold), (text, gold)
        seen.add(oracle(text, gold))
    assert len(seen) > 10 and {equal for equal, _ in seen} == {True, False}


def test_the_text_stands_where_math_verify_asks_for_the_gold():
    """R1-V's order. An inequality equals its interval in one of the two only."""
    a, b = "$1 < x < 2$", "$(1, 2)$"
    assert (judge(a, b)[0], judge(b, a)[0]) == (oracle(a, b)[0], oracle(b, a)[0]) == (True, False)


def test_where_formulas_alone_count_no_number_is_taken_out_of_one():
    assert judge(r"$2\sqrt{3}米$", "$2$")[0] and not judge(r"$2\sqrt{3}米$", "$2$", latex=True)[0]
    assert judge("2", "2", latex=True) == (False, None)
    assert judge(r"$\frac{4}{2}$", "$2$", latex=True) == (True, "2")


def test_of_a_long_text_the_end_is_read():
    assert judge("4 " + "." * verify.LONGEST, "4") == (False, None)
    assert judge("." * verify.LONGEST + " 4", "4") == (True, "4")


# ------------------------------------------------------------------------- what would never end


def test_what_does_not_end_is_killed_and_the_next_question_is_answered(hasty):
    assert hasty.ask("3", "3", False) == [True, "3"]
    first, start = hasty.process, time.monotonic()
    assert hasty.ask(ENDLESS, "3", False) is None
    assert 0.5 <= time.monotonic() - start < 2
    assert first.returncode == -signal.SIGKILL
    assert hasty.ask("4", "3", False) == [False, "4"]
    assert hasty.process.pid != first.pid


def test_the_public_function_has_the_limit_and_says_none():
    assert JUDGE.seconds == verify.SECONDS <= 5
    start = time.monotonic()
    assert verify.verify(ENDLESS, "3") is None
    assert time.monotonic() - start < verify.SECONDS + 2
    assert verify.verify("3", "3") is True


def test_memory_is_bounded(hasty):
    """10^11 bits would be 12 GB: math-verify fails or the process dies, and neither hurts."""
    assert hasty.ask("3", "3", False) == [True, "3"]
    limits = Path(f"/proc/{hasty.process.pid}/limits").read_text().splitlines()
    assert [x.split()[3:5] for x in limits if "address space" in x] == [[str(MEMORY)] * 2]
    assert hasty.ask("2^(10^11) + 1", "3", False) in (None, [False, "2**(10**11) + 1"])
    assert hasty.ask("3", "3", False) == [True, "3"]


def test_a_process_that_died_is_replaced(hasty):
    assert hasty.ask("3", "3", False) == [True, "3"]
    os.kill(hasty.process.pid, signal.SIGKILL)
    hasty.process.wait()
    assert hasty.ask("4", "4", False) == [True, "4"]
    hasty.seconds, start = 60, time.monotonic()
    threading.Timer(0.2, hasty.process.kill).start()  # dies in the middle of a question
    assert hasty.ask(ENDLESS, "3", False) is None and time.monotonic() - start < 5
    hasty.seconds = 0.5
    assert hasty.ask("5", "5", False) == [True, "5"]


def test_an_interrupted_question_leaves_no_answer_for_the_next(hasty):
    class Now(Exception):
        pass

    def interrupt(*_):
        raise Now

    assert hasty.ask("3", "3", False) == [True, "3"]
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        os.kill(hasty.process.pid, signal.SIGSTOP)  # it will answer later
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Now):
            hasty.ask("7", "7", False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert hasty.ask("4", "3", False) == [False, "4"]


def test_threads_get_their_own_answers():
    found = {}
    ask = lambda i: found.update({i: judge(f"so {i}", str(i + i % 2))})  # noqa: E731
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: (i % 2 == 0, str(i)) for i in range(20)}


# ------------------------------------------------------------------------------ the two processes


def python(code: str, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, **more)  # fmt: skip


ASK = "import verify; print(verify.verify('3', '3'), verify.JUDGE.process.pid, flush=True)\n"


def test_it_imports_no_torch_and_does_not_run_the_program_again(tmp_path):
    """Spawned processes of multiprocessing import the main program again, with all of torch."""
    program = tmp_path / "program.py"
    program.write_text("print('runs', flush=True)\nimport sys; sys.path.insert(0, sys.argv[1])\n"
                       + ASK + "input()\n")  # fmt: skip
    done = subprocess.Popen([sys.executable, str(program), str(ROOT)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    lines = [done.stdout.readline().split() for _ in range(2)]
    assert lines[0] == ["runs"] and lines[1][0] == "True"
    maps = Path(f"/proc/{lines[1][1]}/maps").read_text()
    assert "python" in maps and "torch" not in maps and "numpy" not in maps
    assert done.communicate("\n")[0] == "" and done.returncode == 0


def test_it_ends_with_its_parent_whether_it_waits_or_works():
    waits = python(ASK + "input()", stdin=subprocess.PIPE)
    works = python("import threading, verify\nverify.JUDGE.seconds = 0.5\n" + ASK
                   + f"threading.Thread(target=verify.verify, args=({ENDLESS!r}, '3')).start()\n"
                   + "import time; time.sleep(60)", stdin=subprocess.PIPE)  # fmt: skip
    pids = [int(parent.stdout.readline().split()[1]) for parent in (waits, works)]
    time.sleep(0.3)
    for parent in (waits, works):
        parent.kill()
        parent.wait()
    assert gone(pids[0], 2) and gone(pids[1], 4)


def test_a_forked_copy_starts_its_own():
    done = python(ASK + "import os\nif not os.fork():\n    " + ASK.partition("; ")[2]
                  + "    os._exit(0)\nos.wait()\n" + ASK.partition("; ")[2])  # fmt: skip
    lines = [line.split() for line in done.communicate(timeout=60)[0].splitlines()]
    assert [line[0] for line in lines] == ["True"] * 3
    assert lines[0][1] == lines[2][1] != lines[1][1]


def test_a_signal_to_the_whole_run_does_not_reach_it():
    """Ctrl-C in a terminal goes to every process of its group; the run may still finish a step."""
    assert judge("3", "3") == (True, "3")
    assert os.getpgid(JUDGE.process.pid) != os.getpgid(0)


def test_one_that_cannot_start_is_an_error():
    worker = Worker([sys.executable, "-c", "import no_such_module", "judge.py"], 1)
    with pytest.raises(OSError, match=r"judge.py: its process does not start, .*math-verify"):
        worker.ask("3", "3", False)
    with pytest.raises(OSError, match="does not start"):
        worker.ask("3", "3", False)


def test_verdicts_are_quick():
    """Measured: 1 to 5 ms each; with a start of 0.5 s."""
    judge("3", "3")
    start = time.monotonic()
    for i in range(50):
        judge(f"<think>180.0 - {i} = {180 - i}.0 </think> <answer>{i}</answer>", f"{i}°")
    assert time.monotonic() - start < 2
