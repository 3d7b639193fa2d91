"""saving.py, chapter two: a checkpoint is whole or it is none, and any number of processes read it.

A run goes on from it bit for bit: tests/test_grpo.py and tests/test_sft.py, on whole runs.
"""

import json
import os
import pickletools
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from groups import LAYOUTS, PROCESSOR, Net, fill, same, shared_out
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_checkpoint, picture
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

import saving
from data import Example, Processor
from journal import append, steps_of
from model import Qwen2VL
from optim import make_optimizers
from saving import damage, load_optimizers, moments_of, progress, save, save_checkpoint

ROOT = Path(__file__).parent.parent


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """What groups.py leaves: checkpoints of 1, 2, 3 and 2 x 2 processes, of killed ones and of
    those on a full disk, and what they said."""
    folder = tmp_path_factory.mktemp("groups")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(ROOT / "tests" / "groups.py"), str(folder)], env=env,
                   check=True, timeout=300)  # fmt: skip
    return folder


def save_steps(out: Path, *steps, keep=None, best=None) -> None:
    """Checkpoints of a small net whose numbers are those of the step."""
    net, optimizers = shared_out("1")
    for step in steps:
        fill(net, optimizers, step)
        save(net, PROCESSOR, optimizers, out, step, {"drawn": 10 * step}, keep, best)


def names(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir())


# -------------------------------------------------------------------------- a checkpoint as such


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A real, small model after two steps of Muon and AdamW, its processor, and its folder."""
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    model, processor = Qwen2VL.from_pretrained(folder), Processor.from_pretrained(folder)
    optimizers = make_optimizers(model, "muon", 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        learn(model, optimizers, generator)
    return SimpleNamespace(model=model, processor=processor, optimizers=optimizers)


def learn(model, optimizers, generator) -> None:
    """One step on gradients of noise; the vision tower has none, as in a step without pictures."""
    for name, p in model.named_parameters():
        p.grad = None if "visual" in name else torch.randn(p.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def test_a_saved_checkpoint_loads_here_and_in_transformers(made, tmp_path):
    for folder in (tmp_path / "plain", tmp_path / "step_000002"):
        if folder.name == "plain":
            save_checkpoint(made.model, made.processor, folder)
            assert not (folder / "state").exists()
        else:
            save(made.model, made.processor, made.optimizers, tmp_path, 2, {})
        ours, theirs = Qwen2VL.from_pretrained(folder), made.model.state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(v, theirs[k]) for k, v in ours.state_dict().items())
        image = picture(0, 56, 84)
        prompt = Processor.from_pretrained(folder).prompt(Example("How many?", "3", (image,)))
        reference = Qwen2VLForConditionalGeneration.from_pretrained(folder)
        assert torch.equal(reference.lm_head.weight, made.model.head)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.encode("How many items?") == made.processor.encode("How many items?")
        seen = AutoImageProcessor.from_pretrained(folder)(Image.fromarray(image),
                                                          return_tensors="pt")  # fmt: skip
        assert torch.allclose(seen["pixel_values"], prompt.patches, atol=1e-5)
        assert reference.generation_config.eos_token_id == made.processor.stop_ids
    assert names(tmp_path) == ["plain", "step_000002"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(made, tmp_path, kind):
    """Three steps, and two that are saved, loaded and followed by one: equal bit for bit. Weights
    that never had a gradient have no moments, saved or not."""
    model = Qwen2VL(made.model.cfg).init_weights(0)
    optimizers, generator = make_optimizers(model, kind, 1e-2), torch.Generator().manual_seed(1)
    for _ in range(2):
        learn(model, optimizers, generator)
    save(model, made.processor, optimizers, tmp_path, 2, {})
    state = generator.get_state()

    folder = tmp_path / "step_000002"
    other = Qwen2VL.from_pretrained(folder)
    theirs = make_optimizers(other, kind, 1e-2)
    load_optimizers(folder, other, theirs)
    assert not any("visual" in key for key in moments_of(other, theirs))
    learn(model, optimizers, generator)
    learn(other, theirs, generator.set_state(state))
    ours, found = moments_of(model, optimizers), moments_of(other, theirs)
    assert len(ours) > 20 and ours.keys() == found.keys()
    assert all(torch.equal(x, found[k]) and x.dtype == found[k].dtype for k, x in ours.items())
    weights = dict(other.named_parameters())
    assert all(torch.equal(p, weights[k]) for k, p in model.named_parameters())


def test_the_numbers_of_the_loop_come_back_as_they_were(made, tmp_path):
    append(tmp_path / "metrics.jsonl", {"step": 1})
    numbers = {"drawn": 48, "bad": 0, "best": 0.1 + 0.2, "start": "Qwen/Qwen2-VL-2B", "none": None}
    save_numbers = {**numbers, "nan": float("nan")}
    save(made.model, made.processor, made.optimizers, tmp_path, 12, save_numbers)
    found = progress(tmp_path / "step_000012")
    assert {k: found[k] for k in numbers} == numbers and found["nan"] is None
    assert found["step"] == 12 and found["processes"] == 1 and found["torch"] == torch.__version__
    assert found["journals"] == {"metrics.jsonl": (tmp_path / "metrics.jsonl").stat().st_size}


def test_a_checkpoint_is_safetensors_and_json_alone(made, tmp_path):
    """Nothing in it is a pickle, so nothing in it can run when it is loaded."""
    save(made.model, made.processor, made.optimizers, tmp_path, 1, {})
    files = everything(tmp_path / "step_000001")
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
    for content in files.values():
        with pytest.raises(ValueError):
            list(pickletools.genops(content))
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in tmp_path.rglob("*.*") if p.is_file())


def test_large_moments_are_spread_over_files(tmp_path, monkeypatch):
    """Files of 60 bytes, about: only so much is copied from the device at a time."""
    monkeypatch.setattr(saving, "FILE", 60)
    save_steps(tmp_path, 1)
    files = [load_file(p) for p in (tmp_path / "step_000001" / "state").glob("optimizer_0_*")]
    sizes = [sum(x.nbytes for x in file.values()) for file in files]
    assert len(sizes) == 4 and max(sizes) < 60 + 7 * 3 * 4  # the largest weight, 7 x 3 floats
    net, optimizers = shared_out("1")
    load_optimizers(tmp_path / "step_000001", net, optimizers)
    assert same(net, optimizers, 1) and not damage(tmp_path / "step_000001")


# ------------------------------------------------------------------------------- which ones stay


def test_the_newest_and_the_best_stay(tmp_path):
    save_steps(tmp_path, 1, 2, 3, keep=None)
    assert names(tmp_path) == [f"step_00000{n}" for n in (1, 2, 3)]
    save_steps(tmp_path, 4, keep=2, best=1)
    assert names(tmp_path) == [f"step_00000{n}" for n in (1, 3, 4)]
    save_steps(tmp_path, 5, 6, keep=1, best=5)
    assert names(tmp_path) == ["step_000005", "step_000006"]
    save_steps(tmp_path, 1000000, keep=1)  # counts by number, not by name
    assert names(tmp_path) == ["step_1000000"]


def test_only_checkpoints_with_a_state_are_ever_removed(tmp_path):
    """Not one that somebody stripped, a folder of the user's, or one that was set aside."""
    for name in ("step_000001", "step_000002_mine", "damaged_step_000003", "images"):
        (tmp_path / name).mkdir()
    save_steps(tmp_path, 4, 5, keep=1)
    assert names(tmp_path) == ["damaged_step_000003", "images", "step_000001", "step_000002_mine",
                               "step_000005"]  # fmt: skip


def test_one_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """NFS refuses while somebody reads in it. The new one is complete by then."""
    def busy(folder, **_):
        if folder.name == "step_000001.tmp":
            raise OSError(16, "Device or resource busy", str(folder))

    save_steps(tmp_path, 1)
    monkeypatch.setattr(saving.shutil, "rmtree", busy)
    save_steps(tmp_path, 2, keep=1)
    assert [p.name for p in steps_of(tmp_path)] == ["step_000002"]
    assert "step_000001 could not be removed" in capsys.readouterr().err


# ------------------------------------------------------------------------- what must not be saved


@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_never_saved(tmp_path, what, value):
    save_steps(tmp_path, 1)
    net, optimizers = shared_out("1")
    fill(net, optimizers, 2)
    bad = {"weight": net.up.weight, "moment": optimizers[0].state[net.one]}
    with torch.no_grad():
        (bad["weight"] if what == "weight" else bad["moment"]["exp_avg_sq"])[-1] = value
    name = {"weight": r"up\.weight", "moment": "one exp_avg_sq"}[what]
    with pytest.raises(ValueError, match=rf"step 2 is not saved: {name} .*/step_000001$"):
        save(net, PROCESSOR, optimizers, tmp_path, 2, {})
    with pytest.raises(ValueError, match="newest good checkpoint: none yet"):
        save(net, PROCESSOR, optimizers, tmp_path / "new", 2, {})
    assert names(tmp_path) == ["step_000001"]


# --------------------------------------------------------------------------- what hinders a save


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("saver", [
    lambda processor, out: save_checkpoint(Net(), processor, out / "step_000002"),
    lambda processor, out: save(Net(), processor, [], out, 2, {}),
])
def test_a_save_that_fails_leaves_nothing_behind(tmp_path, saver):
    """The older checkpoint stays the newest, and remains of a process that died do not hinder."""
    save_steps(tmp_path, 1)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"step_000002 could not be saved: .*No space"):
        saver(SimpleNamespace(save_pretrained=fail), tmp_path)
    assert everything(tmp_path) == before and names(tmp_path) == ["step_000001"]
    (tmp_path / "step_000002.tmp").mkdir()
    (tmp_path / "step_000002.tmp" / "stale.safetensors").write_text("of a process that died")
    saver(PROCESSOR, tmp_path)
    assert names(tmp_path) == ["step_000001", "step_000002"]
    assert not (tmp_path / "step_000002" / "stale.safetensors").exists()


def test_a_checkpoint_is_never_written_over_another(tmp_path):
    (tmp_path / "step_000001").mkdir()
    (tmp_path / "step_000001" / "model.safetensors").write_text("older")
    for saver in (lambda: save_steps(tmp_path, 1),
                  lambda: save_checkpoint(Net(), PROCESSOR, tmp_path / "step_000001")):
        with pytest.raises(ValueError, match="not empty"):
            saver()
        assert everything(tmp_path) == {"step_000001/model.safetensors": b"older"}


def test_a_full_disk_hurts_no_checkpoint_whichever_file_it_meets(groups):
    """Files of 0 bytes at most, of 200 ...: each time another one is the first that does not fit,
    moments and weights, which are written by safetensors, or a file of the tokenizer."""
    *failed, last = json.loads((groups / "fill_disk.json").read_text())
    assert last == [None, ["step_000001", "step_000002"]]
    assert all("could not be saved: " in error and left == ["step_000001"]
               for error, left in failed)  # fmt: skip
    assert all("File too large" in error for error, _ in failed)
    assert {"serializing" in error for error, _ in failed} == {True, False}
    assert not any(damage(p) for p in steps_of(groups / "fill_disk"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 kB, and a way to mount it again with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)],
                              capture_output=True).returncode  # fmt: skip

    if sys.platform != "linux" or os.geteuid() or mount("size=64k"):
        pytest.skip("needs to mount a disk")
    yield disk, mount
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_becomes_full_or_read_only(small_disk):
    disk, mount = small_disk
    save_steps(disk, 1)
    for step in range(2, 9):
        try:
            save_steps(disk, step)
        except ValueError as error:
            assert "No space left" in str(error)
            break
    assert 2 < step < 8 and names(disk) == [f"step_{n:06d}" for n in range(1, step)]
    assert not any(damage(p) for p in steps_of(disk))
    shutil.rmtree(disk / "step_000001")
    save_steps(disk, step)
    assert mount("remount,ro") == 0
    with pytest.raises(ValueError, match=r"could not be saved: .*Read-only"):
        save_steps(disk, 9)
    assert not any(damage(p) for p in steps_of(disk))


def test_a_kill_at_any_moment_of_a_save_leaves_a_newest_checkpoint_that_is_whole(groups):
    """SIGKILL before the first operation on a file, before the second, ... until none is left: all
    that has a name loads with the numbers of its step, the best and two others are always there."""
    left = json.loads((groups / "kill_everywhere.json").read_text())
    assert len(left) > 30 and left[-1][:3] == [1, True, 3]
    assert all(well and found in (3, 4) for _, well, found, _ in left)
    writing, named, removing = [0, True, 3, True], [1, True, 4, False], [1, True, 3, True]
    assert writing in left and named in left and removing in left


# ----------------------------------------------------------------------------------- what is read


def test_every_file_that_is_cut_or_gone_is_noticed(made, tmp_path):
    save(made.model, made.processor, made.optimizers, tmp_path, 1, {})
    folder = tmp_path / "step_000001"
    files = everything(folder)
    assert len(files) >= 7 and damage(folder) is None
    for name, content in files.items():
        for length in (0, 1, len(content) // 2, len(content) - 1):
            (folder / name).write_bytes(content[:length])
            assert damage(folder), (name, length)
        (folder / name).unlink()
        assert damage(folder) == f"{name} is missing"
        (folder / name).write_bytes(bytes(len(content)))  # zeros, as after a power cut
        assert damage(folder), name
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("mine")
    assert damage(folder) is None


def test_a_folder_without_a_state_says_so(made, tmp_path):
    save_checkpoint(made.model, made.processor, tmp_path / "step_000001")
    assert damage(tmp_path / "step_000001") == "state/progress.json is missing"


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    save_steps(tmp_path, 1)
    net, _ = shared_out("1")
    net.up = torch.nn.Linear(3, 8)
    with pytest.raises(ValueError, match=r"step_000001/state is of another model: up\..* is \(7"):
        load_optimizers(tmp_path / "step_000001", net, make_optimizers(net, "muon", 1e-2))
    del net.up
    with pytest.raises(ValueError, match=r"another model: up\.bias is not in this one"):
        load_optimizers(tmp_path / "step_000001", net, make_optimizers(net, "muon", 1e-2))


def test_rows_that_no_file_has_are_an_error(tmp_path):
    """torch.distributed.checkpoint's reader of safetensors would leave them as they are."""
    save_steps(tmp_path, 1)
    folder = tmp_path / "step_000001"
    file = folder / "state" / "optimizer_0_0.safetensors"
    state = load_file(file)
    with saving.open_weights(file) as f:
        places = f.metadata()
    state["up.weight momentum_buffer"] = state["up.weight momentum_buffer"][:4].clone()
    save_file(state, file, places)
    net, optimizers = shared_out("1")
    with pytest.raises(ValueError, match=r"3 rows of up\.weight momentum_buffer are in no file"):
        load_optimizers(folder, net, optimizers)


# ------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_any_number_of_processes_saved_one_loads_bit_for_bit(groups, layout):
    """Seven rows over 2 and 3 processes, one row, two rows: slices are uneven, or empty."""
    net, optimizers = shared_out("1")
    folder = groups / layout / "step_000001"
    load_optimizers(folder, net, optimizers)
    assert same(net, optimizers, 1) and damage(folder) is None
    fill(net, optimizers, 1)
    weights = load_file(folder / "model.safetensors")
    expected = {k: v for k, v in net.state_dict().items() if k != "lm_head.weight"}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[k], v) for k, v in expected.items())
    assert progress(folder)["processes"] == torch.Size(LAYOUTS[layout]).numel()


def test_what_one_or_several_saved_several_load_bit_for_bit(groups):
    """Each layout its own, and those before it; every process looks at its slices."""
    found = {p.stem: json.loads(p.read_text()) for p in groups.glob("loaded_*.json")}
    assert sorted(found) == sorted(f"loaded_{name}_{rank}" for name, shape in LAYOUTS.items()
                                   for rank in range(torch.Size(shape).numel()))  # fmt: skip
    assert list(found["loaded_2_1"]) == ["1", "3", "2x2", "2"]
    assert all(all(told.values()) for told in found.values())


def test_every_process_writes_its_own_rows_and_of_copies_only_one(groups):
    """No process needs the memory of all moments."""
    files = {name: sorted(p.name for p in (groups / name / "step_000001" / "state").glob("opt*"))
             for name in LAYOUTS}  # fmt: skip
    wrote = {"1": [0], "2": [0, 1], "3": [0, 1, 2], "2x2": [0, 1]}
    assert files == {name: [f"optimizer_{r}_0.safetensors" for r in ranks]
                     for name, ranks in wrote.items()}  # fmt: skip
    rows = [load_file(groups / "3" / "step_000001" / "state" / name)["up.bias exp_avg"].shape[0]
            for name in files["3"]]  # fmt: skip
    assert rows == [3, 3, 1]


def test_what_goes_wrong_in_one_process_all_are_told(groups):
    for told in (json.loads((groups / f"told_{rank}.json").read_text()) for rank in (0, 1)):
        assert "step 2 is not saved: up.weight " in told["nan"]
        assert told["nan"].endswith("step_000001")
        assert "step_000002 could not be saved" in told["full"] and "large" in told["full"]
        assert told["left"] == ["step_000001"]
