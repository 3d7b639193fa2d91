"""machine.py, chapter two: limits that are known or refused, phases that add up."""

import subprocess

import pytest
import torch

import machine
from machine import Phases, data_sheet, limits, spreads
from scaling import H200


def test_a_gpu_without_a_data_sheet_is_refused_with_what_to_say_instead():
    told = r"NVIDIA Abacus, torch.bfloat16: no data sheet.*--peak_flops.*--bandwidth"
    with pytest.raises(ValueError, match=told):
        data_sheet("NVIDIA Abacus")


def test_a_data_sheet_of_bfloat16_says_nothing_of_float32():
    with pytest.raises(ValueError, match=r"NVIDIA H200, torch.float32: .*--peak_flops"):
        data_sheet("NVIDIA H200", torch.float32)


def test_the_targets_gpu_is_known():
    assert data_sheet("NVIDIA H200") == (989e12, 4.8e12, "H200 Tensor Core GPU, SXM")
    assert (H200.flops, H200.bandwidth) == data_sheet("NVIDIA H200")[:2]  # and so is the model's


def test_limits_that_are_given_are_taken():
    found = limits("cpu", torch.float32, 2e12, 3e11)
    assert found == {"flops": 2e12, "bandwidth": 3e11, "source": "command line"}


def test_a_cpu_is_measured_and_it_is_said_so():
    found = limits("cpu", torch.float32, flops=2e12)
    assert found["flops"] == 2e12 and found["bandwidth"] > 0
    assert "measured here" in found["source"] and "float32" in found["source"]


def test_a_phase_inside_another_interrupts_it(monkeypatch):
    """Outside from 0 to 1 and from 3 to 7, inside from 1 to 3."""
    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0, 7.0, 7.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    phases = Phases("cpu")
    with phases("outside"), phases("inside"):
        pass
    assert dict(phases.seconds) == {"outside": 5.0, "inside": 2.0}
    assert phases.peak["outside"] >= phases.peak["inside"] > 0


def test_a_function_is_a_phase_named_by_its_first_argument():
    phases = Phases("cpu")
    double = phases.of(lambda x, times=2: x * times, lambda x: f"number {x}")
    assert (double(3), double(4, times=3)) == (6, 12)
    assert list(phases.seconds) == ["number 3", "number 4"]


def test_a_spread_is_median_lowest_and_highest():
    found = spreads([{"a": 3.0}, {"a": 1.0}, {"a": 7.0}])
    assert found == {"a": {"median": 3.0, "low": 1.0, "high": 7.0}}


def test_a_figure_says_what_it_was_measured_on():
    told = machine.told("cpu")
    assert told["device"] and told["cores"] >= 1
    assert told["versions"]["torch"] == torch.__version__ and told["versions"]["cuda"] is None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=machine.HERE, capture_output=True)
    commit = git.stdout.decode().strip()
    assert (told["commit"] or "").rstrip("+") == (commit if git.returncode == 0 else "")


def test_a_commit_that_git_cannot_tell_is_taken_as_given(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.told("cpu", "1234abc")["commit"] == "1234abc"
