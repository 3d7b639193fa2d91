"""resume.py, chapter two: a command finds its run, no two write the same one, no end is a loss."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
from groups import PROCESSOR, fill, shared_out
from PIL import Image
from run_many import RunMany
from tiny_checkpoint import make_checkpoint, picture

import grpo
import resume
import sft
from config import opt
from journal import append, steps_of
from resume import FREE, Run, Stop, age_of_process, choose_run, open_run
from saving import save, save_checkpoint

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Config:
    steps: int = opt(4, "steps")
    lr: float = opt(0.5, "step size")
    names: tuple[str, ...] = opt(("a", "b"), "names")
    save_every: int = opt(2, "steps between checkpoints")
    note: str = opt("", "for the report")
    resume: str = opt("auto", "or never")
    out: str = opt("runs/x", "folder")


@pytest.fixture
def cfg(tmp_path) -> Config:
    return Config(out=str(tmp_path / "run"))


def start(cfg):
    return open_run(cfg, cfg.steps)


def steps(run, cfg, first: int, last: int, finish=True) -> None:
    """What a loop does in the steps first ... last, in a small way: lines, then checkpoints."""
    net, optimizers = shared_out("1")
    for step in range(first, last + 1):
        append(run.out / "probes.jsonl", {"step": step - 1})
        append(run.out / "metrics.jsonl", {"step": step})
        if step % cfg.save_every == 0:
            fill(net, optimizers, step)
            save(net, PROCESSOR, optimizers, run.out, step, {"drawn": 10 * step})
    if finish and last == cfg.steps:
        (run.out / "summary.json").write_text(json.dumps({"steps": cfg.steps}))


def logged(out: Path, name="metrics") -> list[int]:
    return [json.loads(line)["step"] for line in (out / f"{name}.jsonl").read_text().splitlines()]


def names(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir())


# -------------------------------------------------------------------------------------- which run


def test_a_new_run_holds_every_key_and_the_folder_it_really_went_to(cfg, capsys):
    run = start(replace(cfg, lr=0.25))
    assert (run.out, run.checkpoint, run.numbers) == (Path(cfg.out), None, None)
    assert names(run.out) == ["config.json", "run.lock"] and capsys.readouterr().err == ""
    assert json.loads((run.out / "config.json").read_text()) == {
        "steps": 4, "lr": 0.25, "names": ["a", "b"], "save_every": 2, "note": "",
        "resume": "auto", "out": cfg.out,
    }  # fmt: skip


def test_a_run_that_ended_early_goes_on_from_its_newest_checkpoint(cfg, capsys):
    """Killed in step 4, after its line: the line is written again."""
    steps(start(cfg), cfg, 1, 3)
    for _ in range(2):  # and killed again before it did anything
        run = start(cfg)
        assert run.out == Path(cfg.out) and run.checkpoint == run.out / "step_000002"
        assert run.numbers["step"] == 2 and run.numbers["drawn"] == 20
        assert "goes on from" in capsys.readouterr().err
    steps(run, cfg, 3, 4)
    assert logged(run.out) == [1, 2, 3, 4] and logged(run.out, "probes") == [0, 1, 2, 3]
    assert [p.name for p in steps_of(run.out)] == ["step_000002", "step_000004"]


def test_a_finished_run_is_left_alone(cfg, capsys):
    steps(start(cfg), cfg, 1, 4)
    before = {p: p.read_bytes() for p in Path(cfg.out).rglob("*") if p.is_file()}
    run = start(cfg)
    assert run.out == Path(f"{cfg.out}_2") and run.checkpoint is None
    told = capsys.readouterr().err
    assert "run is left alone: it is finished, 4 steps" in told and f"goes to {run.out}" in told
    assert json.loads((run.out / "config.json").read_text())["out"] == str(run.out)
    steps(run, cfg, 1, 2)
    run = start(cfg)  # of those that follow, too, the first unfinished one goes on
    assert run.out == Path(f"{cfg.out}_2") and run.numbers["step"] == 2
    assert {p: p.read_bytes() for p in before} == before


def test_more_steps_go_on_with_a_finished_run(cfg):
    """What it did after its last save, as answering the probes at the end, is taken back."""
    run = start(cfg)
    steps(run, cfg, 1, 4)
    append(run.out / "probes.jsonl", {"step": 4})
    more = replace(cfg, steps=6)
    run = start(more)
    assert run.out == Path(cfg.out) and run.numbers["step"] == 4
    assert json.loads((run.out / "config.json").read_text())["steps"] == 6
    steps(run, more, 5, 6)
    assert logged(run.out) == [1, 2, 3, 4, 5, 6] and logged(run.out, "probes") == [0, 1, 2, 3, 4, 5]
    assert start(replace(cfg, steps=5)).out == Path(f"{cfg.out}_2")  # fewer than were done


def test_a_run_that_did_all_steps_but_not_the_rest_goes_on(cfg, capsys):
    """Killed in its last evaluation: no step is done again."""
    steps(start(cfg), cfg, 1, 4, finish=False)
    run = start(cfg)
    assert run.out == Path(cfg.out) and run.numbers["step"] == 4
    assert start(replace(cfg, steps=3)).out == Path(f"{cfg.out}_2")
    assert "it has done 4 steps, more than 3" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_starts_over(cfg, capsys):
    run = start(cfg)
    steps(run, cfg, 1, 1)
    (run.out / "step_000002.tmp").mkdir()
    (run.out / "summary.json.tmp").write_text("{")
    (run.out / "images").mkdir()
    run = start(cfg)
    assert run.out == Path(cfg.out) and run.checkpoint is None and run.numbers is None
    assert logged(run.out) == logged(run.out, "probes") == []
    assert names(run.out) == ["config.json", "images", "metrics.jsonl", "probes.jsonl", "run.lock"]
    assert "it starts over" in capsys.readouterr().err


def test_another_config_is_another_run_and_the_keys_are_named(cfg, capsys):
    steps(start(cfg), cfg, 1, 2)
    run = start(replace(cfg, lr=0.25, names=("a",)))
    assert run.out == Path(f"{cfg.out}_2") and run.checkpoint is None
    told = capsys.readouterr().err
    assert 'another config: lr 0.5, not 0.25, names ["a", "b"], not ["a"]\n' in told
    run = start(replace(cfg, note="why", save_every=1))  # these change no result
    assert run.out == Path(cfg.out) and run.checkpoint
    assert json.loads((run.out / "config.json").read_text())["note"] == "why"


def test_a_key_that_an_older_version_did_not_know_had_its_default(cfg):
    steps(start(cfg), cfg, 1, 2)
    path = Path(cfg.out) / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in saved.items() if k != "lr"}))
    assert start(cfg).out == Path(cfg.out)
    path.write_text(json.dumps({k: v for k, v in saved.items() if k != "lr"}))
    assert start(replace(cfg, lr=0.25)).out == Path(f"{cfg.out}_2")
    path.write_text(json.dumps({**saved, "gone": 3}))
    assert start(cfg).out == Path(f"{cfg.out}_3")


def test_resume_never_is_always_a_new_run_but_for_torchruns_restart(cfg, monkeypatch, capsys):
    never = replace(cfg, resume="never")
    steps(start(cfg), cfg, 1, 2)
    run = start(never)
    assert run.out == Path(f"{cfg.out}_2") and run.checkpoint is None
    assert capsys.readouterr().err.endswith(f"holds a run already; this one goes to {run.out}\n")
    steps(run, cfg, 1, 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run = start(never)
    assert run.out == Path(f"{cfg.out}_2") and run.numbers["step"] == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert start(never).out == Path(f"{cfg.out}_3")


def test_what_is_no_run_is_not_mistaken_for_one(cfg, capsys):
    """A folder of the user's is used as it is; a broken config, or steps without one, are left."""
    out = Path(cfg.out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert start(cfg).out == out and capsys.readouterr().err == ""
    (out / "config.json").write_text("{")
    second = start(cfg).out
    assert second == Path(f"{cfg.out}_2") and "no readable config.json" in capsys.readouterr().err
    (second / "config.json").unlink()
    (second / "step_000001").mkdir()
    assert start(cfg).out == Path(f"{cfg.out}_3")
    assert (out / "notes.txt").read_text() == "mine"


def test_a_place_where_nothing_can_be_written_is_named(cfg):
    Path(cfg.out).write_text("a file")
    with pytest.raises(ValueError, match=r"File exists: '.*/run'"):
        start(cfg)
    if Path("/sys/kernel").is_dir():
        with pytest.raises(ValueError, match="/sys/nowhere"):
            start(replace(cfg, out="/sys/nowhere"))


def test_a_disk_that_not_all_machines_see_is_refused(cfg, monkeypatch):
    """The first process says where the run is; this one looks."""
    monkeypatch.setattr(resume, "choose_run", lambda *_: Run(Path(cfg.out)))
    with pytest.raises(ValueError, match=f"--out {cfg.out}: .* does not see .* must be on a disk"):
        start(cfg)


def test_the_keys_that_may_change_are_keys():
    assert {field.name for c in (grpo.Config, sft.Config) for field in fields(c)} >= FREE


# ---------------------------------------------------------------------------------------- damage


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_taken(cfg, capsys):
    more = replace(cfg, steps=6)
    steps(start(more), more, 1, 5)
    weights = Path(cfg.out) / "step_000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    run = start(more)
    assert run.checkpoint == run.out / "step_000002" and logged(run.out) == [1, 2]
    told = capsys.readouterr().err
    assert "step_000004 is set aside as damaged_step_000004: model.safetensors has" in told
    assert (run.out / "damaged_step_000004" / "state" / "progress.json").exists()
    steps(run, more, 3, 4)
    (run.out / "step_000004" / "tokenizer.json").unlink()
    run = start(more)
    assert run.checkpoint == run.out / "step_000002"
    assert "as damaged_step_000004_2: tokenizer.json is missing" in capsys.readouterr().err


def test_a_run_whose_checkpoints_cannot_be_gone_on_from_is_left_alone(cfg, capsys):
    """Weights alone, as older versions saved, or all damaged: told, with the mend; the new run
    beside it is the one that goes on next time."""
    run = start(cfg)
    append(run.out / "metrics.jsonl", {"step": 1})
    save_checkpoint(shared_out("1")[0], PROCESSOR, run.out / "step_000002")
    second = start(cfg)
    assert second.out == Path(f"{cfg.out}_2") and logged(run.out) == [1]
    told = capsys.readouterr().err
    assert "step_000002 cannot be gone on from (state/progress.json is missing)" in told
    assert f"--model {run.out / 'step_000002'}" in told
    steps(second, cfg, 1, 2)
    assert start(cfg).checkpoint == second.out / "step_000002"


def test_a_finished_run_whose_checkpoints_were_removed_is_not_started_over(cfg, capsys):
    run = start(cfg)
    append(run.out / "metrics.jsonl", {"step": 1})
    (run.out / "summary.json").write_text(json.dumps({"steps": 4}))
    assert start(replace(cfg, steps=8)).out == Path(f"{cfg.out}_2") and logged(run.out) == [1]
    assert "4 steps, and has no checkpoint" in capsys.readouterr().err


def test_a_line_that_was_half_written_goes(cfg):
    run = start(cfg)
    steps(run, cfg, 1, 2)
    with open(run.out / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "rew')
    (run.out / "later.jsonl").write_text('{"step": 3}\n')  # begun after the checkpoint
    start(cfg)
    assert logged(run.out) == [1, 2] and logged(run.out, "later") == []


def test_a_journal_that_is_shorter_than_it_was_is_told_and_ends_with_a_whole_line(cfg, capsys):
    run = start(cfg)
    steps(run, cfg, 1, 2)
    os.truncate(run.out / "metrics.jsonl", 15)
    start(cfg)
    assert logged(run.out) == [1]
    assert "metrics.jsonl has lost lines: 15 of" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- the lock


HOLD = """
import os, sys, time
from pathlib import Path
from resume import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held" if lock else "busy", flush=True)
if lock and not os.fork():
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    time.sleep(30)  # a worker that outlives its trainer
sys.stdin.read()
"""


@pytest.fixture
def holder(cfg):
    """Another process that writes the run, and a worker of its."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, cfg.out], env=env, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_two_processes_never_write_the_same_run(cfg, holder):
    """It is said who does. A run that is new, or never resumed, goes elsewhere; with the death of
    the writer the lock is gone, though a worker of its lives on."""
    assert start(cfg).out == Path(f"{cfg.out}_2")  # not even a config there: about to begin
    (Path(cfg.out) / "config.json").write_bytes(Path(f"{cfg.out}_2/config.json").read_bytes())
    with pytest.raises(ValueError, match=rf"is being written by process {holder.pid} on .*--out"):
        start(cfg)
    assert start(replace(cfg, resume="never")).out == Path(f"{cfg.out}_3")
    assert start(replace(cfg, lr=0.1)).out == Path(f"{cfg.out}_4")
    holder.kill()
    holder.wait()
    assert start(cfg).out == Path(cfg.out)


def test_commands_that_start_at_once_get_folders_of_their_own(cfg, monkeypatch):
    """Another one is as fast: it has the lock when this one asks, or even its config there."""
    asked, take = [], resume.take_lock

    def meanwhile(out):
        asked.append(out)
        if len(asked) == 1:
            return None
        if len(asked) == 2:
            out.mkdir(parents=True)
            (out / "config.json").write_text("{}")
        return take(out)

    monkeypatch.setattr(resume, "take_lock", meanwhile)
    assert choose_run(cfg, 4).out == Path(f"{cfg.out}_3")
    assert asked == [Path(cfg.out), Path(f"{cfg.out}_2"), Path(f"{cfg.out}_3")]


def test_a_disk_without_locks_is_no_hindrance(cfg, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(resume.fcntl, "lockf", none)
    assert start(cfg).out == Path(cfg.out)


# --------------------------------------------------------------------------------- ending in time


def ask(number: int) -> None:
    """A signal to this process, and the time to hear it."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def loop(stop: Stop, at: dict, n=5) -> list:
    """A loop of n steps of 0.02 s in which signals come: steps done, then saved."""
    done = []
    with stop.after_steps():
        for step in range(1, n + 1):
            for number in at.get(step, ()):
                ask(number)
            time.sleep(0.02)
            done.append(step)
            if stop.asked(0.0):
                done.append("saved")
                break
    return done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_and_exits_0(number, capfd):
    done = []
    with pytest.raises(SystemExit) as ended, Stop() as stop, stop.after_steps():
        for step in range(1, 6):
            if step == 3:
                ask(number)
            done.append(step)
            if stop.asked():
                break
    assert ended.value.code == 0 and done == [1, 2, 3]
    told = capfd.readouterr().err
    assert f"{number.name}: the run ends after this step" in told
    assert f"{number.name}: ended and saved; the same command goes on" in told


def test_without_a_signal_the_loop_runs_to_its_end():
    with Stop() as stop:
        assert loop(stop, {}) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_the_loop_a_signal_ends_the_run_at_once(number, capfd):
    with Stop() as stop:
        with pytest.raises(SystemExit) as ended:
            ask(number)
        assert ended.value.code == 0
    assert f"{number.name}: ended; the same command goes on" in capfd.readouterr().err
    with Stop() as stop:
        loop(stop, {})
        with pytest.raises(SystemExit) as ended:  # in the evaluation after it, too
            ask(number)


def test_a_signal_behind_the_last_question_is_not_forgotten():
    with pytest.raises(SystemExit) as ended, Stop() as stop, stop.after_steps():
        stop.asked()
        ask(signal.SIGTERM)
    assert ended.value.code == 0


def test_a_second_ctrl_c_ends_at_once(capfd):
    """But not one that torchrun passes on within the second, nor a second SIGTERM."""
    with pytest.raises(SystemExit) as ended, Stop() as stop:
        loop(stop, {2: [signal.SIGINT, signal.SIGINT, signal.SIGTERM]})
    assert ended.value.code == 0 and "again" not in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended, Stop() as stop, stop.after_steps():
        ask(signal.SIGTERM)
        stop.heard -= 2
        ask(signal.SIGTERM)
        ask(signal.SIGINT)
        raise AssertionError("it went on")
    assert ended.value.code == 130 and "SIGINT again: ended at once" in capfd.readouterr().err


def test_what_signals_did_before_they_do_again():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with Stop() as stop:
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == stop.hear
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    done = []
    thread = threading.Thread(target=lambda: done.append(Stop().__enter__().before))
    thread.start()
    thread.join()
    assert done == [{}]  # only the main thread may


def test_must_save_by_leaves_time_for_a_step_and_a_save(monkeypatch, capfd):
    """Steps of 10 s, once one of 25 s; a save takes 30 s. Of 300 s, 55 s must be left."""
    now = [1000.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(resume, "age_of_process", lambda: 7.0)
    done = []
    with pytest.raises(SystemExit) as ended, Stop(minutes=5) as stop, stop.after_steps():
        for step in range(100):
            now[0] += 25 if step == 3 else 10
            done.append(now[0] - 1000)
            if stop.asked(30.0):
                break
    assert ended.value.code == 0 and done[-2:] == [235, 245] and 245 + 7 + 25 + 30 > 300
    assert "must_save_by 5 minutes: ended and saved" in capfd.readouterr().err
    with Stop(minutes=5) as stop:  # before the first save it is taken to be as long as a step
        stop.last = now[0] - 140
        assert not stop.asked()
        stop.last = now[0] - 150
        assert stop.asked()


def test_the_clock_starts_with_the_process(monkeypatch):
    """Or with torchrun, which may have started others before."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    begin, old = time.monotonic(), age_of_process()
    with subprocess.Popen(["sleep", "30"]) as young:
        time.sleep(0.3)
        monkeypatch.setattr(resume.os, "getppid", lambda: young.pid)
        least = old + time.monotonic() - begin  # a busy machine may wait here
        age, most = age_of_process(), old + time.monotonic() - begin
        assert least - 0.1 < age < most + 0.1
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        assert 0.2 < age_of_process() < time.monotonic() - begin + 0.1 < old
        young.kill()


# ------------------------------------------------------------------------------- two processes


TWO = """
import json, os, signal, sys
from pathlib import Path
import parallel
from resume import Stop, open_run
sys.path.insert(0, sys.argv[1])
from test_resume import Config, error_of_start



def two(out):
    run = open_run(Config(out=out), 4)
    found = {"out": str(run.out), "lock": run.lock is not None}
    found["refused"] = error_of_start(Config(out=out + "/config.json"))
    found["done"] = []
    try:
        with Stop() as stop, stop.after_steps():
            for step in range(1, 100):
                if parallel.rank() == 1 and step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                found["done"].append(step)
                if stop.asked():
                    break
    except SystemExit as ended:
        found["status"] = ended.code
    Path(f"{out}_{parallel.rank()}.json").write_text(json.dumps(found))

parallel.start()
with parallel.together():
    two(sys.argv[2])
"""


def error_of_start(cfg) -> str | None:
    try:
        start(cfg)
    except ValueError as error:
        return str(error)


def test_two_processes_write_one_run_and_end_after_the_same_step(tmp_path):
    """Only the second one hears the signal; only the first cannot write."""
    (tmp_path / "two.py").write_text(TWO)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
           "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    out = tmp_path / "run"
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", "two.py", str(ROOT / "tests"), str(out)],
                   cwd=tmp_path, env=env, check=True, timeout=120)  # fmt: skip
    found = [json.loads((tmp_path / f"run_{rank}.json").read_text()) for rank in (0, 1)]
    assert [told.pop("lock") for told in found] == [True, False]
    assert found[0] == found[1]
    assert "File exists" in found[0].pop("refused")
    assert found[0] == {"out": str(out), "status": 0, "done": [1, 2, 3]}


# ---------------------------------------------------------------------------------- whole runs


REWARD = """
def vowels(text, example):
    "Share of vowels among the characters, in [0, 1]."
    return sum(c in "aeiou" for c in text) / max(1, len(text))
"""
CLOCK = ("time/", "seconds", "samples_per", "tokens_per", "memory_gb", "resumed")  # keys


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program on a small checkpoint and four rows: run(name of its folder, program, ...)."""
    folder = tmp_path_factory.mktemp("runs")
    make_checkpoint(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    lines = []
    for i in range(4):
        Image.fromarray(picture(i, 56, 56)).save(folder / f"{i}.png")
        lines.append({"images": [f"{i}.png"], "problem": f"How many? {'x' * i}", "solution": "3"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", folder / "model", "--data", folder / "rows.jsonl", "--steps", 4,
             "--lr", 1e-3, "--probes", 1, "--max_new", 6, "--keep", 2]  # fmt: skip
    grpo = [*words, "--rewards", f"{folder}/reward.py:vowels", "--prompts", 2, "--group", 2,
            "--probe_every", 1, "--optimizer", "muon", "--minibatches", 2, "--kl", "reward",
            "--advantage", "baseline"]  # fmt: skip
    own = {"grpo": grpo, "sft": [*words, "--batch", 2, "--eval_every", 1]}
    with RunMany() as many:
        yield lambda name, program, save_every=2, **when: (folder / name, *many(
            program, *own[program], "--out", folder / name, "--save_every", save_every, **when))


def result(out: Path) -> dict:
    """All that a run leaves which is not a time."""
    found = {p.name: p.read_bytes() for p in (out / "step_000004").rglob("*.safetensors")}
    for path in out.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = [{k: v for k, v in row.items() if not k.startswith(CLOCK)}
                            for row in rows]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def whole(run):
    """The results of runs that nothing disturbed."""
    found = {}
    for program in ("grpo", "sft"):
        out, status, said = run(f"{program}_whole", program)
        assert status == 0, said
        found[program] = result(out)
        assert [row["step"] for row in found[program]["metrics.jsonl"]] == [1, 2, 3, 4]
    return found


@pytest.mark.parametrize("program", ["grpo", "sft"])
def test_two_steps_and_two_are_four_bit_for_bit(run, whole, program):
    """Killed in step 3, before its line: weights, moments, metrics, samples and answers.

    Before that there are the lines of the steps 1 and 2, the first report, which reads them, and
    the save's wait for the disk.
    """
    name = f"{program}_killed"
    assert run(name, program, kill=4, at="metrics.jsonl")[1] == -signal.SIGKILL
    out, status, said = run(name, program)
    assert status == 0 and f"goes on from {out}/step_000002" in said
    assert result(out) == whole[program]
    logs = {"metrics.jsonl", "probes.jsonl"} | ({"rollouts.jsonl"} if program == "grpo" else set())
    weights = {"model.safetensors", "optimizer_0_0.safetensors"}
    assert whole[program].keys() == logs | weights


@pytest.mark.parametrize("program", ["grpo", "sft"])
def test_a_run_that_is_asked_to_stop_saves_and_its_command_goes_on(run, whole, program):
    name = f"{program}_asked"
    for stop, number in ((signal.SIGTERM, 0), (signal.SIGINT, 1)):  # the second cuts it, first
        out, status, said = run(name, program, signal=stop, at="metrics.jsonl", kill=number)
        assert status == 0 and f"{stop.name}: ended and saved" in said, said
    assert [p.name for p in steps_of(out)] == ["step_000001", "step_000002"]
    assert run(name, program)[1] == 0 and result(out) == whole[program]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["grpo", "sft"])
def test_a_run_that_is_killed_twenty_times_ends_as_one_that_was_not(run, whole, program):
    """At random moments: before an operation on a file, as in the middle of a save, or anywhere."""
    name, random, kills = f"{program}_twenty", np.random.default_rng(0), 0
    while kills < 20:
        when = {"kill": int(random.integers(60))}
        when = when if kills % 2 else {"after": random.uniform(0.1, 2)}
        out, status, said = run(name, program, 1, **when)
        assert status in (0, -signal.SIGKILL), said
        if status == 0:
            assert result(out) == whole[program]
            shutil.rmtree(out)
        kills += status != 0
    assert run(name, program, 1)[1] == 0
    assert result(out) == whole[program]
