"""bench.py, chapter two: figures checked against their rounds, and one run from words to JSON.

Nothing here asserts how fast anything is. That ours and the twin do the same work is
tests/test_rivals.py.
"""

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import make_checkpoint

import bench
import machine
from bench import (
    Config,
    alone,
    between,
    main,
    memory,
    over,
    resident,
    summary,
    take_turns,
    text,
    time_peer,
)
from config import parse
from rivals import KINDS, PHASES, setup

ROOT = Path(bench.__file__).parent
PEER_PYTHON = ROOT / Config().peer_python
SMALL = {"data": "world:A:n=4", "prompts": 2, "group": 2, "max_new": 3, "rounds": 2, "warmup": 1}


def words(**keys) -> list[str]:
    """The command line of such a config; float32 alone where it does not say."""
    keys |= {"bf16": keys.get("bf16", False)}
    said = {True: "true", False: "false"}
    return [word for k, v in keys.items()
            for word in (f"--{k}", said[v] if isinstance(v, bool) else str(v))]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What main gives, and what it wrote."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model"))
    out = folder / "found" / "cpu.json"
    given = main(words(**SMALL, model=folder, memory=False, out=out))
    return given, json.loads(out.read_text())


# ------------------------------------------------------------------------------------- measuring


class Runner:
    """Counts its steps; what it says about seconds is the number of the step."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def step(self, seed):
        self.calls.append((self.name, seed))
        return {"decode": 1.0 + seed, "reward": 0.5}


def test_rivals_take_turns_and_the_order_changes():
    calls = []
    found = take_turns({k: Runner(k, calls) for k in "ab"}, rounds=2, warmup=1)
    assert [name for name, _ in calls] == ["a", "b", "b", "a", "a", "b"]
    assert {seed for _, seed in calls} == {0, 1, 2}, "every round has samples of its own"
    assert [one["step"] for one in found["a"]] == [2.5, 3.5], "the warm-up does not count"
    assert [one["decode"] for one in found["b"]] == [2.0, 3.0]
    assert found["a"][0]["prefill"] == 0.0


SLACK = 2**20  # the kernel adds up its counters of resident pages now and then


def test_memory_is_what_the_steps_add_to_the_weights():
    spike = b"x" * 2**28
    del spike
    before = resident("VmHWM")
    found = memory(Config(**SMALL), "ours")
    assert 2**20 < found["loaded_bytes"] <= found["peak_bytes"]
    assert before - SLACK <= found["peak_bytes"] <= resident("VmHWM") + SLACK


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells")
def test_a_process_alone_inherits_no_peak():
    held = b"x" * 2**30  # so that this process has a high one
    assert resident("VmHWM") > 2**30
    assert alone(resident, "VmHWM") < 2**30
    del held


# --------------------------------------------------------------------------------------- the table


def rounds_of(*steps) -> list[dict]:
    """Rounds of which decoding takes all but 1 s, the reward 1 s, the rest nothing."""
    return [{**dict.fromkeys(PHASES, 0.0), "decode": s - 1.0, "reward": 1.0, "step": s}
            for s in steps]  # fmt: skip


def test_a_ratio_of_steps_is_that_of_each_round_and_a_phase_s_that_of_medians():
    """Ours 2, 4, 6 and the twin 8, 8, 30: 4, 2 and 5 times; decoding 7 over 3."""
    found = summary({"ours": rounds_of(2, 4, 6), "twin": rounds_of(8, 8, 30)})
    assert found["ratios"]["twin"]["step"] == {"median": 4.0, "low": 2.0, "high": 5.0}
    assert found["ratios"]["twin"]["decode"] == 7.0 / 3.0
    assert found["ratios"]["twin"]["reward"] == 1.0
    assert found["seconds"]["ours"]["step"] == {"median": 4.0, "low": 2.0, "high": 6.0}
    assert list(found["ratios"]) == ["twin"]


def test_a_phase_that_takes_no_time_has_no_ratio():
    assert math.isnan(over(1.0, 0.0))
    assert over(1.0, 4.0) == 0.25


def test_trl_is_set_against_ours_between_its_steps():
    """TRL 40, 20, 30 beside ours 5, 5, 5 at its nearest, though 18 beside 2 is less time. In
    bfloat16 10 beside 2."""
    rounds = {"ours": rounds_of(2, 4), "ours, bfloat16": rounds_of(1, 1), "twin": rounds_of(8, 8)}
    trl = [{"bf16": True, "seconds": [10], "ours": [2]},
           {"bf16": False, "seconds": [18, 18, 18], "ours": [2, 2, 2]},
           {"bf16": False, "seconds": [40, 20, 30], "ours": [5, 5, 5]}]  # fmt: skip
    found = summary(rounds, trl)["ratios"]
    assert found["TRL"] == {"of": "ours", "step": {"median": 6.0, "low": 4.0, "high": 8.0}}
    assert found["TRL, bfloat16"]["step"]["median"] == 5.0
    assert found["TRL, bfloat16"]["of"] == "ours, bfloat16"
    assert found["twin"]["of"] == found["ours, bfloat16"]["of"] == "ours"
    assert "TRL, bfloat16" not in summary(rounds, trl[1:])["ratios"]


def test_a_program_and_ours_take_turns(tmp_path):
    """It says what it has done and waits; other lines of it are its own."""
    file, log = tmp_path / "program.py", tmp_path / "log"
    file.write_text("import sys\nlog = open(sys.argv[1], 'a', buffering=1)\nfor i in range(3):\n"
                    "    print('loading', i)\n    log.write(f'theirs {i}\\n')\n"
                    "    print('step', flush=True)\n    sys.stdin.readline()\n")  # fmt: skip

    def step(i):
        with log.open("a") as out:
            out.write(f"ours {i}\n")
        return {"a": i, "b": 0.5}

    assert between([sys.executable, str(file), str(log)], step) == [0.5, 1.5, 2.5]
    assert log.read_text() == "".join(f"theirs {i}\nours {i}\n" for i in range(3))


def test_bfloat16_is_timed_where_the_cpu_has_it(monkeypatch):
    for known, expected in (({"avx512_bf16": True}, 1), ({"amx_bf16": False}, 0), ({}, 0)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert machine.multiplies_bf16() == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not machine.multiplies_bf16()


# -------------------------------------------------------------------------------- a run as a whole


def test_what_is_written_is_what_is_returned(result):
    given, written = result
    assert {k: v for k, v in written.items() if k not in ("found", "config")} == {
        k: v for k, v in given.items() if k not in ("found", "config")}  # fmt: skip
    assert written["found"]["seconds"] == given["found"]["seconds"]


def test_a_result_says_how_and_on_what_it_was_measured(result):
    _, told = result
    assert told["command"].startswith("python bench.py --data world:A:n=4 --prompts 2")
    assert told["config"]["max_new"] == 3 and told["config"]["beta"] == 0.04
    machine = told["machine"]
    assert machine["device"] and machine["cores"] >= 1 and machine["threads"] >= 1
    assert {"python", "torch", "transformers"} <= {*machine["versions"]}
    assert "commit" in machine


def test_every_round_has_every_phase_and_they_sum_to_the_step(result):
    _, told = result
    assert list(told["rounds"]) == ["ours", "twin"]
    for found in told["rounds"].values():
        assert len(found) == 2
        for one in found:
            assert {*one} == {*PHASES, "step"}
            assert sum(one[name] for name in PHASES) == pytest.approx(one["step"])
            assert all(one[name] > 0 for name in PHASES)


def test_the_table_shows_each_phase_and_the_ratio(result):
    given, _ = result
    lines = text(given).splitlines()
    for name in PHASES:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert any(line.startswith("twin: a step takes ") for line in lines)
    row = next(line for line in lines if line.startswith("whole step")).split()
    found = given["found"]
    ours, twin = (f"{1000 * found['seconds'][k]['step']['median']:.1f}" for k in ("ours", "twin"))
    assert row[2:] == [ours, twin, f"{found['ratios']['twin']['step']['median']:.1f}"]


def test_memory_and_trl_have_their_lines(result):
    given, _ = result
    bytes_ = {"loaded_bytes": 2 * 2**20, "peak_bytes": 5 * 2**20}
    trl = {"versions": {"trl": "9"}, "batch": 16, "bf16": False, "median": 1.25, "ours": [0.5],
           **bytes_}  # fmt: skip
    shown = text({**given, "trl": [trl], "memory": {"ours": bytes_}})
    tail = ", memory of the step 3 MiB, of the whole process 5"
    assert f"TRL 9, float32, 16 completions per forward: 1.250 s a step, ours 0.500{tail}" in shown
    assert f"ours{tail}" in shown


# ------------------------------------------------------------------------------------ the commands


def test_r1v_goes_to_workload(monkeypatch):
    seen = []
    workload = type(sys)("workload")
    workload.main = lambda argv: seen.append(argv) or "done"
    monkeypatch.setitem(sys.modules, "workload", workload)
    assert main(["r1v", "--steps", "3"]) == "done"
    assert seen == [["--steps", "3"]]


def test_without_a_peer_s_python_it_is_said_how_to_get_one(tmp_path):
    with pytest.raises(SystemExit, match=r"make bench PEERS=1.*\n?.*requirements-peers.txt"):
        main(words(peers=True, peer_python=tmp_path / "python"))


def test_too_few_rows_are_one_line():
    with pytest.raises(SystemExit, match="error: world:A:n=4: 4 rows"):
        main(words(data="world:A:n=4", prompts=5))


def test_a_step_that_no_peer_batch_divides_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(words(prompts=5, group=3, peers=True, peer_batches="2,4"))
    assert "none of them divides a step's 15 completions" in capsys.readouterr().err


def test_a_peer_that_fails_says_why(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such package >&2\nexit 3\n")
    python.chmod(0o755)
    run = setup(Config(**SMALL, peer_python=str(python), peer_batches=(3, 4)))
    with pytest.raises(SystemExit, match="no such package"):
        time_peer(run, {"ours": Runner("ours", [])})


def test_what_runs_in_the_peer_s_environment_imports_nothing_of_the_project():
    own = {path.stem for path in ROOT.glob("*.py")}
    for name in ("twin", "peer_trl"):
        tree = ast.parse((ROOT / "bench" / f"{name}.py").read_text("utf-8"))
        found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names}  # fmt: skip
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {module.split(".")[0] for module in found} & own


def test_the_peer_s_torch_and_transformers_are_ours():
    mine, theirs = (
        {line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()}
        for name in ("requirements.txt", "bench/requirements-peers.txt")
    )
    other = {line for line in theirs - mine if line}
    assert [line.split("==")[0] for line in other] == ["trl"]


@pytest.mark.slow
@pytest.mark.skipif(not PEER_PYTHON.is_file(), reason="no .venv-peers: make bench PEERS=1 makes it")
def test_trl_takes_the_same_step(tmp_path):
    """The peer itself refuses other prompts and other lengths of completions."""
    cfg = parse(Config, words(**SMALL, peers=True, bf16=True, peer_steps=1, peer_batches="2,4"))
    run = setup(cfg)
    found = time_peer(run, {kind: KINDS[kind](run) for kind in ("ours", "ours, bfloat16")})
    assert {(one["batch"], one["bf16"]) for one in found} == {(n, b) for n in (2, 4)
                                                             for b in (False, True)}
    assert all(len(one["seconds"]) == len(one["ours"]) == 1 for one in found)
    assert all(one["peak_bytes"] > one["loaded_bytes"] > 0 for one in found)
