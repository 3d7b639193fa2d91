"""worker.py, chapter two: what no code in a process can do to the one that asks."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import worker
from worker import MOST, Pool, cores, counted

ROOT = Path(__file__).resolve().parent.parent
MODULE = """
import ctypes, json, os, signal, subprocess, sys, threading, time

class Evil:
    def __reduce__(self):
        return os.system, ("touch unpickled",)

def prepare(kind="", word=None):
    print("prepare", kind, flush=True)
    if kind == "mistake":
        raise ValueError(f"no such word: {word}")
    if kind == "import":
        import no_such_module
    if kind == "exit":
        sys.exit(3)
    if kind == "hang":
        time.sleep(60)
    if kind == "alarm":
        signal.signal(signal.SIGALRM, late)
    if kind == "slow":
        time.sleep(0.6)
    return answer

def late(*_):
    raise TimeoutError("late")

def answer(kind, word=None):
    if kind == "own alarm":
        signal.alarm(1)
        time.sleep(60)
    if kind == "say":
        return word
    if kind == "change":
        word.append(len(word))
        return word
    if kind == "threads":
        return [os.environ["OMP_NUM_THREADS"], os.getcwd()]
    if kind == "pid":
        return os.getpid()
    if kind == "sleep":
        time.sleep(word)
        return word
    if kind == "spin":
        while True:
            pass
    if kind == "power":
        return 9**9**9**9
    if kind == "memory":
        return len(bytearray(word))
    if kind == "grow":
        some = []
        while True:
            some.append(bytearray(2**20))
    if kind == "die":
        os._exit(0)
    if kind == "signal":
        os.kill(os.getpid(), word)
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "exit":
        sys.exit(1)
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "raise":
        raise word
    if kind == "recurse":
        return answer("recurse")
    if kind == "object":
        return Evil()
    if kind == "print":
        print("x" * word, flush=True)
        os.write(1, b"y")
        json.dump({"value": "false"}, sys.stdout)
        return sys.stdin.read()
    if kind == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(0)
        time.sleep(60)
    if kind == "start":
        return subprocess.Popen(["sleep", "60"]).pid
    if kind == "start and hang":
        with open(word, "w") as file:
            file.write(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    (folder / "answers.py").write_text(MODULE)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def make(*arguments, seconds=20.0, memory=2**28, most=2) -> Pool:
    return Pool("the work", "answers", arguments, seconds, memory, most)


@pytest.fixture(scope="module")
def pool():
    """Two processes with a second and 256 MiB for a question."""
    return make(seconds=1.0)


@pytest.fixture(autouse=True)
def nothing_counted():
    counted()


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether a process that is not ours to wait for ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def says(pool: Pool, word="so") -> bool:
    """Whether all its processes answer, once they are there, and each the question it got."""
    n = 3 * len(pool.workers)
    while not all(w.ready for w in pool.workers):
        pool.ask([("sleep", 0.1)] * n)
    return pool.ask([("say", f"{word} {i}") for i in range(n)]) == [
        {"value": f"{word} {i}"} for i in range(n)
    ]


# --------------------------------------------------------------------------------------- answers


def test_answers_come_in_the_order_of_the_questions(pool):
    waits = [0.3, 0.0, 0.1, 0.2, 0.0]
    assert pool.ask([("sleep", w) for w in waits]) == [{"value": w} for w in waits]
    assert pool.ask([]) == [] and counted() == {"killed": 0, "failed": 0}


@pytest.mark.parametrize("word", [None, True, 0.1, "\0\ud800\n\u2028", "x" * 10**6, [1, {"a": 2}]],
                         ids=["none", "true", "number", "odd", "long", "nested"])  # fmt: skip
def test_what_is_said_arrives_as_it_is(pool, word):
    assert pool.ask([("say", word)]) == [{"value": word}]


class Heavy:
    """Notes how often it is pickled; arrives as a list of one."""

    def __init__(self):
        self.sent = 0

    def __reduce__(self):
        self.sent += 1
        return list, ((7,),)


def test_what_questions_have_in_common_is_sent_to_a_process_once():
    pool, one, two = make(seconds=0.4, most=1), Heavy(), Heavy()
    asked = [("say", one)] * 3 + [("say", two)] * 2 + [("say", one)]
    assert pool.ask(asked) == [{"value": [7]}] * 6 and (one.sent, two.sent) == (2, 1)
    assert pool.ask([("spin", one), ("say", one)]) == [None, {"value": [7]}]
    assert one.sent == 3  # a process in another's place has been sent nothing
    assert pool.ask([("say", [n]) for n in (7, 8, 7)]) == [{"value": [n]} for n in (7, 8, 7)]


def test_what_one_question_changes_is_not_changed_for_the_next():
    word = [5]
    assert make(most=1).ask([("change", word)] * 3) == [{"value": [5, 1]}] * 3 and word == [5]


def test_questions_are_answered_at_the_same_time():
    pool = make(most=4)
    pool.start()
    start = time.monotonic()
    assert len(pool.ask([("sleep", 0.5)] * 8)) == 8
    assert 1 <= time.monotonic() - start < 2  # one after another they take 4 s


def test_only_as_many_processes_start_as_there_are_questions():
    pool = make(most=3)
    assert [w.process for w in pool.workers] == [None] * 3
    pool.ask([("say", 1)])
    assert [bool(w.process) for w in pool.workers] == [True, False, False]
    pool.start()
    assert len({r["value"] for r in pool.ask([("pid",), ("sleep", 0.1), ("sleep", 0.1)])}) == 2
    assert all(w.process for w in pool.workers)


def test_processes_start_at_the_same_time_and_as_many_as_there_are_cores():
    pool, start = make("slow", most=6), time.monotonic()
    pool.start()
    assert time.monotonic() - start < 3  # one after another they take 3.6 s and more
    assert len(Pool("the work", "answers", (), 1.0, 2**28).workers) == min(MOST, cores())
    assert cores() == len(os.sched_getaffinity(0))


def test_a_question_that_raises_is_told_with_its_traceback_and_counted(pool):
    pids = pool.ask([("pid",)])
    value, error, deep = pool.ask([("say", 3), ("raise", ZeroDivisionError("\ud800 no")),
                                   ("recurse",)])  # fmt: skip
    assert value == {"value": 3} and counted() == {"killed": 0, "failed": 2}
    assert error["error"].endswith("ZeroDivisionError: \\ud800 no") or error["error"].endswith(
        "ZeroDivisionError: \ud800 no"
    )
    assert "raise word" in error["error"] and "worker.py" not in error["error"]
    assert "RecursionError" in deep["error"] and len(deep["error"]) <= worker.LONGEST
    long = pool.ask([("raise", ValueError("x" * 10**6))])[0]["error"]
    assert len(long) <= worker.LONGEST
    assert pool.ask([("pid",)]) == pids  # the same process goes on


def test_no_answer_is_unpickled(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [reply] = make().ask([("object",)])
    assert "Evil is not JSON serializable" in reply["error"] and not list(tmp_path.iterdir())


def test_it_works_in_the_same_folder_with_one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.chdir(tmp_path)
    assert make().ask([("threads", 0)]) == [{"value": ["1", str(tmp_path)]}]


def test_what_is_printed_goes_to_stderr_and_is_no_answer(capfd):
    pool = make(most=1)
    assert pool.ask([("print", 10**5), ("print", 3)]) == [{"value": ""}] * 2  # stdin is empty
    out, err = capfd.readouterr()
    assert out == "" and err == "prepare \n" + "".join(
        "x" * n + '\ny{"value": "false"}' for n in (10**5, 3)
    )


# ------------------------------------------------------------------------- what would never end


@pytest.mark.parametrize("question", [
    ("sleep", 60), ("spin",), ("power",), ("alarm",), ("grow",), ("memory", 2**40),
    ("memory", 2**28), ("die",), ("exit",), ("interrupt",), ("segfault",),
    ("signal", signal.SIGKILL), ("signal", signal.SIGSTOP), ("raise", MemoryError()),
], ids=lambda question: f"{question[0]}-{question[-1]!r:.10}")  # fmt: skip
def test_what_hangs_or_dies_is_killed_replaced_and_counted(pool, question):
    assert says(pool)
    before = {w.process.pid for w in pool.workers}
    start, cpu = time.monotonic(), time.process_time()
    replies = pool.ask([("say", 1), question, ("say", 2)])
    assert replies == [{"value": 1}, None, {"value": 2}]
    assert time.monotonic() - start < 4 and time.process_time() - cpu < 0.5
    assert counted() == {"killed": 1, "failed": 0} and counted() == {"killed": 0, "failed": 0}
    assert says(pool) and len(before & {w.process.pid for w in pool.workers}) == 1
    assert all(gone(pid) for pid in before - {w.process.pid for w in pool.workers})


def test_an_alarm_of_its_own_is_its_own():
    """As rewards have that limit their own time: a handler from the start, an alarm in the call."""
    [early, reply, later] = make("alarm", most=1).ask([("say", 1), ("own alarm",), ("say", 2)])
    assert (early, later) == ({"value": 1}, {"value": 2})
    assert reply["error"].endswith("TimeoutError: late")


def test_memory_below_the_limit_is_there_and_the_limit_is_that_of_the_pool():
    small, large = make(memory=2**28, most=1), make(memory=2**30, most=1)
    asked = [("memory", 2**27), ("memory", 2**29)]
    assert small.ask(asked) == [{"value": 2**27}, None]
    assert large.ask(asked) == [{"value": 2**27}, {"value": 2**29}]


def test_many_that_hang_do_not_stop_the_others():
    """verl's pool gives no score any more after as many of them as it has processes."""
    pool = make(seconds=0.5)
    asked = [("spin",) if i % 2 else ("say", i) for i in range(12)]
    assert pool.ask(asked) == [None if i % 2 else {"value": i} for i in range(12)]
    assert counted()["killed"] == 6 and says(pool)


def test_one_that_died_between_questions_is_replaced_and_nothing_is_lost(pool):
    assert says(pool)
    for w in pool.workers:
        os.kill(w.process.pid, signal.SIGKILL)
    assert all(w.pipe.poll(5) for w in pool.workers)
    assert says(pool) and counted() == {"killed": 0, "failed": 0}


def test_a_large_question_to_one_that_does_not_read_waits_no_longer_than_the_limit(pool):
    """A pipe holds about 200 kB; a picture is more."""
    assert says(pool)
    os.kill(pool.workers[0].process.pid, signal.SIGSTOP)
    start = time.monotonic()
    replies = pool.ask([("say", "x" * 2**24), ("say", "y" * 2**24)])
    assert replies == [None, {"value": "y" * 2**24}]
    assert time.monotonic() - start < 4 and says(pool)


def test_a_process_that_is_starting_is_not_waited_for_where_another_is_ready():
    pool = make("slow")
    pool.start()
    os.kill(pool.workers[0].process.pid, signal.SIGKILL)
    assert pool.workers[0].pipe.poll(5)
    start = time.monotonic()
    assert pool.ask([("say", 1)]) == [{"value": 1}] and time.monotonic() - start < 0.5
    assert pool.ask([("say", i) for i in range(5)]) == [{"value": i} for i in range(5)]
    assert time.monotonic() - start < 0.6  # it takes longer to be there, and that in the background
    assert says(pool)


def test_what_it_has_started_is_killed_with_it(pool, tmp_path):
    assert pool.ask([("start and hang", str(tmp_path / "pid"))]) == [None]
    assert gone(int((tmp_path / "pid").read_text()))


def test_an_interrupted_question_leaves_no_answer_for_the_next(pool):
    class Now(Exception):
        pass

    def interrupt(*_):
        raise Now

    assert says(pool)
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Now):
            pool.ask([("sleep", 0.3), ("sleep", 0.4), ("say", 5)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    time.sleep(0.5)
    assert says(pool)


def test_threads_get_their_own_answers(pool):
    found = {}

    def ask(i):
        found[i] = pool.ask([("say", i), ("say", -i)])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [{"value": i}, {"value": -i}] for i in range(10)}


def test_an_unpicklable_question_is_an_error_and_breaks_nothing(pool):
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        pool.ask([("say", 1), ("say", threading.Lock()), ("say", 2)])
    assert says(pool)


# ---------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("arguments, message", [
    (("mistake", "seven"), "^the work: no such word: seven$"),
    (("import",), "the work: its process does not start, it ended"),
    (("exit",), "the work: its process does not start, it ended"),
    (("too", "many", "words"), "the work: its process does not start, it ended"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["start", "ask"])
def test_one_that_cannot_start_is_an_error(arguments, message, how):
    pool = make(*arguments)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            pool.start() if how == "start" else pool.ask([("say", 1)] * 3)
    for w in pool.workers:  # both speak at once: the first is an error, the second is not lost
        w.begin()
    assert all(w.pipe.poll(20) for w in pool.workers)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            pool.ask([("say", 1)] * 2)
    pids = [w.process.pid for w in pool.workers]
    del pool
    assert all(gone(pid, 0.5) for pid in pids)


def test_one_that_hangs_while_it_starts_is_an_error_after_a_limit(monkeypatch):
    monkeypatch.setattr(worker, "START_SECONDS", 0.7)
    pool, start = make("hang"), time.monotonic()
    with pytest.raises(ValueError, match=r"does not start, it is not ready after 0\.7 s"):
        pool.start()
    assert time.monotonic() - start < 3
    assert all(gone(w.process.pid) for w in pool.workers)


def test_the_time_to_start_is_not_that_of_a_question():
    assert make("slow", seconds=0.3).ask([("say", 1), ("spin",)]) == [{"value": 1}, None]


def test_a_process_imports_no_torch_and_does_not_run_the_program_again(tmp_path, module):
    """Spawned processes of multiprocessing import the main program again, with all of torch."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(f"""
        print("runs", flush=True)
        import sys
        sys.path += [{str(ROOT)!r}, {str(module)!r}]
        from worker import Pool
        pool = Pool("the work", "answers", (), 5.0, 2**28)
        print(pool.ask([("pid",)])[0]["value"], pool.ask([("print", 1)]), flush=True)
        input()
    """))
    run = subprocess.Popen([sys.executable, str(program)], text=True, stdin=subprocess.PIPE,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    lines = [run.stdout.readline().strip() for _ in range(2)]
    pid, _, rest = lines[1].partition(" ")
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert lines[0] == "runs" and "python" in maps and rest == "[{'value': ''}]"  # its own stdin
    assert "torch" not in maps and "numpy" not in maps
    assert run.communicate("\n")[0] == "" and run.returncode == 0


# ------------------------------------------------------------------------------------------- ends


def parent(module: Path, then: str) -> tuple[subprocess.Popen, int]:
    """A program that asks for the number of its process, says it, and goes on; and that number."""
    code = textwrap.dedent(f"""
        import os, sys, time
        sys.path.append({str(module)!r})
        from worker import Pool
        pool = Pool("the work", "answers", (), 1.0, 2**28, 1)
        print(pool.ask([("pid",)])[0]["value"], flush=True)
    """)
    run = subprocess.Popen([sys.executable, "-c", code + then], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    return run, int(run.stdout.readline())


@pytest.mark.parametrize("then", [
    "time.sleep(60)", "pool.ask([('sleep', 60)])", "pool.ask([('spin',)])",
    "pool.ask([('power',)])", "pool.ask([('alarm',)])",
])  # fmt: skip
def test_it_ends_with_its_parent_whatever_it_does(module, then):
    run, pid = parent(module, then)
    time.sleep(0.3)
    run.kill()
    run.wait()
    assert gone(pid, 6)


def test_what_it_has_started_ends_with_its_parent_too(module):
    run, pid = parent(module, "print(pool.ask([('start',)])[0]['value'], flush=True)\n"
                              "pool.ask([('sleep', 60)])")  # fmt: skip
    started = int(run.stdout.readline())
    time.sleep(0.2)
    run.kill()
    run.wait()
    assert gone(pid) and gone(started)


@pytest.mark.parametrize("then, code", [
    ("", 0), ("sys.exit(3)", 3), ("1 / 0", 1),
    ("import threading\n"
     "threading.Thread(target=pool.ask, args=([('spin',)],), daemon=True).start()\n"
     "time.sleep(0.3)", 0),
])  # fmt: skip
def test_it_keeps_no_parent_from_its_end_and_ends_at_once(module, then, code):
    run, pid = parent(module, then)
    assert run.wait(5) == code and gone(pid, 0.2)


def test_a_pool_that_nobody_has_any_more_ends():
    pool = make()
    pids = [reply["value"] for reply in pool.ask([("pid",), ("sleep", 0.1), ("pid",)][::2])]
    del pool
    assert all(gone(pid, 0.5) for pid in pids)


def test_a_forked_copy_starts_its_own_and_leaves_its_parent_s_alone(module):
    run, pid = parent(module, textwrap.dedent("""
        if not os.fork():
            print(pool.ask([("pid",)])[0]["value"], flush=True)
            sys.exit()
        os.wait()
        print(pool.ask([("pid",)])[0]["value"], flush=True)
    """))
    lines = [int(line) for line in run.communicate(timeout=20)[0].splitlines()]
    assert len(lines) == 2 and lines[0] != pid == lines[1]
    assert gone(lines[0]) and gone(pid)


def test_a_signal_to_the_whole_run_does_not_reach_it(pool):
    """Ctrl-C in a terminal goes to every process of its group; the run may still finish a step."""
    assert says(pool)
    assert all(os.getpgid(w.process.pid) == w.process.pid for w in pool.workers)
