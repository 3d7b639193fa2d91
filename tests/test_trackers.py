"""Chapter two of trackers.py. What wandb and TensorBoard themselves do is tested where they are."""

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import trackers

ROOT = Path(__file__).parent.parent
ROW = {"step": 1, "reward": 0.5, "length/mean": 3, "loss": math.nan, "kl": None, "note": "x",
       "resumed": True}  # fmt: skip
CONFIG = {"lr": 0.001, "rewards": ["accuracy", "own.py:f"], "note": None}


# ---- what is not installed ----


def test_without_trackers_nothing_is_opened_or_imported(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import trackers, pathlib\n"
            "trackers.log(trackers.open_trackers((), pathlib.Path('.'), {}, 0), {'step': 1})\n"
            "print({'wandb', 'tensorboard', 'torch'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code, ROOT], cwd=tmp_path, capture_output=True,
                          text=True)  # fmt: skip
    assert (done.stdout, done.stderr) == ("set()\n", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", trackers.OPEN)
def test_one_that_is_not_installed_is_told_with_what_installs_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for refuse in (lambda: trackers.check_installed((name,)),
                   lambda: trackers.open_trackers((name,), tmp_path, {}, 0)):  # fmt: skip
        with pytest.raises(ValueError, match=f"trackers {name} needs .* pip install {name}$"):
            refuse()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_wandbs_runs_is_not_taken_for_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", importlib.util.find_spec)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(ValueError, match="pip install wandb"):
        trackers.check_installed(("wandb",))


def test_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match="'mlflow' is none of wandb, tensorboard"):
        trackers.check_installed(("mlflow",))


# ---- log and close ----


def test_only_finite_numbers_are_logged_under_their_names_at_their_step():
    seen = []
    one = trackers.Tracker("one", lambda *told: seen.append(told), None)
    trackers.log([one, one], ROW)
    assert seen == [({"reward": 0.5, "length/mean": 3}, 1)] * 2


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(capsys):
    def gone(*_):
        raise ConnectionResetError("Connection lost")

    seen, closed = [], []
    both = [trackers.Tracker("bad", gone, gone), trackers.Tracker("good", lambda *told:
            seen.append(told[1]), lambda: closed.append(1))]  # fmt: skip
    bad = both[:1]
    for step in (1, 2):
        trackers.log(both, {**ROW, "step": step})
    assert seen == [1, 2] and [t.name for t in both] == ["good"]
    assert capsys.readouterr().err.count("bad is left out from now on (Connection lost)") == 1
    trackers.close([*bad, *both])
    assert closed == [1] and "bad was not closed" in capsys.readouterr().err


# ---- TensorBoard ----


def curves(folder):
    """{key: [(step, value)]} as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found, {key: [(e.step, e.value) for e in found.Scalars(key)]
                   for key in found.Tags()["scalars"]}  # fmt: skip


def test_tensorboard_reads_what_was_logged_without_a_close(tmp_path):
    pytest.importorskip("tensorboard")
    opened = trackers.open_trackers(("tensorboard",), tmp_path, CONFIG, 0)
    trackers.log(opened, ROW)  # and then, as after kill -9, no more
    found, told = curves(tmp_path / "tensorboard")
    assert told == {"reward": [(1, 0.5)], "length/mean": [(1, 3.0)]}
    (text,) = found.Tensors("config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == CONFIG
    trackers.close(opened)


def test_a_resumed_run_takes_later_steps_of_tensorboard_back(tmp_path):
    pytest.importorskip("tensorboard")
    for done, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        opened = trackers.open_trackers(("tensorboard",), tmp_path, CONFIG, done)
        for step in steps:
            trackers.log(opened, {"step": step, "reward": 10.0 * done + step})
        trackers.close(opened)
    assert curves(tmp_path / "tensorboard")[1] == {"reward": [(1, 1.0), (2, 2.0), (3, 23.0)]}


# ---- wandb ----


def records(path):
    """The records of a .wandb file, which is a log of LevelDB after 7 bytes: blocks of 32 kB; a
    piece has a sum, its length and its kind: 1 whole, 2 first, 3 middle, 4 last."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a head: the next block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def history(out):
    """[(run id, name, project, config, rows)] of the runs that wandb stored on disk."""
    from wandb.proto import wandb_internal_pb2 as pb

    found = []
    for path in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        rows, about = [], ()
        for data in records(path):
            record = pb.Record.FromString(data)
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json)
                         for i in record.history.item}  # fmt: skip
                rows.append({k: v for k, v in items.items() if k not in ("_runtime", "_timestamp")})
            if record.HasField("run"):
                run = record.run
                config = {i.key: json.loads(i.value_json) for i in run.config.update}
                config.pop("_wandb", None)
                about = (run.run_id, run.display_name, run.project, config)
        found.append((*about, rows))
    return found


def alone(code, out, **environment):
    """Runs code in a process of its own, since wandb reads its settings once: (stdout, stderr).
    HOME is a folder without anybody's login."""
    pytest.importorskip("wandb")
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import trackers; out = {str(out)!r}\n"
    known = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    done = subprocess.run([sys.executable, "-c", start + textwrap.dedent(code)], text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=120, cwd=out,
                          env={**known, "HOME": str(out), "WANDB_SILENT": "true", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture()
def offline(monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_gets_every_key_and_number_and_a_resumed_run_is_the_same_one_whole(offline, tmp_path):
    out = tmp_path / "a_run"
    out.mkdir()
    for done, config in ((0, CONFIG), (1, {**CONFIG, "lr": 0.5})):
        opened = trackers.open_trackers(("wandb",), out, config, done)
        trackers.log(opened, {**ROW, "step": done + 1})
        trackers.close(opened)
        (out / "metrics.jsonl").write_text(json.dumps({**ROW, "loss": None}) + "\n")
        time.sleep(1)  # wandb names its folders by the second
    first, second = history(out)
    name = (out / "wandb_id").read_text()
    assert first[:4] == (name, "a_run", "nanor1v", CONFIG)
    assert second[:4] == (name, "a_run", "nanor1v", {**CONFIG, "lr": 0.5})
    assert first[4] == [{"_step": 1, "reward": 0.5, "length/mean": 3}]
    assert second[4] == [{"_step": step, "reward": 0.5, "length/mean": 3} for step in (1, 2)]


def test_steps_that_wandb_has_already_are_not_sent_again(offline, tmp_path, monkeypatch):
    (opened,) = trackers.open_trackers(("wandb",), tmp_path, CONFIG, 0)
    run = opened.close.__self__
    monkeypatch.setattr(run, "_starting_step", 3)  # what its server tells when a run is resumed
    for step in (1, 2, 3, 4):
        opened.write({"reward": 1.0}, step)
    opened.close()
    assert [row["_step"] for row in history(tmp_path)[0][4]] == [3, 4]


OPENED = """
    opened = trackers.open_trackers(("wandb",), out, {"lr": 0.5}, 0)
"""
LOGGED = """
    for step in (1, 2):
        trackers.log(opened, {"step": step, "reward": 1.0})
    print([tracker.name for tracker in opened])
    trackers.close(opened)
"""


def test_when_its_process_is_killed_the_run_goes_on(tmp_path):
    killed = """
    import os, subprocess, time
    told = subprocess.run(["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "args="],
                          capture_output=True, text=True).stdout
    (own,) = [int(line.split()[0]) for line in told.splitlines()
              if line.split()[1] == str(os.getpid()) and "wandb-core" in line]
    os.kill(own, 9)
    time.sleep(0.5)
    """
    told, warned = alone(OPENED + killed + LOGGED, tmp_path, WANDB_MODE="offline")
    assert told == "[]\n" and warned.count("warning: wandb is left out from now on") == 1


def test_without_a_login_it_is_told_at_the_start(tmp_path):
    code = """
    try:
        trackers.open_trackers(("wandb",), out, {}, 0)
    except ValueError as error:
        print(error)
    """
    told, _ = alone(code, tmp_path)
    assert told.startswith("trackers wandb: ") and "`wandb login`" in told
    assert told.endswith("(or WANDB_MODE=offline)\n")


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_only_means_to_write_to_disk(tmp_path):
    told, warned = alone(OPENED + LOGGED, tmp_path, WANDB_BASE_URL="http://127.0.0.1:9",
                         WANDB_API_KEY="a" * 40)  # fmt: skip
    assert told == "['wandb']\n" and warned.count("warning: wandb writes to") == 1
    (rows,) = [run[4] for run in history(tmp_path) if run[4]]
    assert rows == [{"_step": step, "reward": 1.0} for step in (1, 2)]
