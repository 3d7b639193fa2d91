"""journal.py, chapter two: what a run leaves on disk is whole, or is not there under its name."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint

import journal
from data import Example, Processor
from grading import load_rewards
from journal import (
    Seconds,
    append,
    log_probes,
    log_rollout,
    newest_checkpoint,
    peak_memory_gb,
    save_images,
    steps_of,
    write_json,
)
from model import Qwen2VL
from rollout import as_rollout, sample


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model and processor of a checkpoint, and three prompts: one image, two images, none."""
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    model, processor = Qwen2VL.from_pretrained(folder), Processor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (56, 84, 3), np.uint8) for _ in range(3)]
    examples = [
        Example("How many?", "3", (images[0],), row="x.jsonl:1"),
        Example("In both?", "<answer> a cube </answer>", (images[1], images[2]), row="x.jsonl:2"),
        Example("Legs?", "8", row="x.jsonl:3"),
    ]
    prompts = [processor.prompt(example) for example in examples]
    return SimpleNamespace(model=model, processor=processor, prompts=prompts, images=images)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------ checkpoints, JSON


def fail(*_):
    raise OSError("No space left on device")


def checkpoint_like(folder: Path, *names) -> str:
    folder.mkdir(parents=True)
    for name in names or ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return str(folder)


def test_the_newest_checkpoint_is_the_folder_itself_or_its_last_whole_step(tmp_path):
    alone = checkpoint_like(tmp_path / "model")
    assert newest_checkpoint(alone) == alone
    run = tmp_path / "run"
    checkpoint_like(run, "config.json")  # the run's own keys
    checkpoint_like(run / "step_000900")
    newest = checkpoint_like(run / "step_001000")
    checkpoint_like(run / "step_000100")
    assert [p.name for p in steps_of(run)] == ["step_000100", "step_000900", "step_001000"]
    assert newest_checkpoint(str(run)) == newest
    checkpoint_like(run / "step_002000.tmp")
    checkpoint_like(run / "step_003000", "config.json")
    checkpoint_like(run / "step_004000", "tokenizer.json")
    (run / "step_005000").write_text("a file")
    checkpoint_like(run / "step_006000_mine")
    checkpoint_like(run / "damaged_step_007000")
    assert newest_checkpoint(str(run)) == newest
    assert newest_checkpoint(newest) == newest
    last = checkpoint_like(run / "step_1000000")  # by number, not by name
    assert newest_checkpoint(str(run)) == last


def test_of_a_folder_of_runs_the_newest_run_counts_at_its_last_step(tmp_path):
    """Newest by time, not by name; and a step of the folder's own goes before those of runs."""
    last = checkpoint_like(tmp_path / "a" / "step_000200")
    times = {"a/step_000100": 300, "a/step_000200": 200, "b/step_000900": 250, "b/step_000950": 150}
    for name, seconds in times.items():
        folder = tmp_path / name
        if not folder.exists():
            checkpoint_like(folder)
        os.utime(folder, (seconds, seconds))
    assert newest_checkpoint(str(tmp_path)) == last
    checkpoint_like(tmp_path / "c" / "step_001000.tmp")
    checkpoint_like(tmp_path / "c" / "step_001000", "config.json")
    assert newest_checkpoint(str(tmp_path)) == last
    own = checkpoint_like(tmp_path / "step_000001")
    assert newest_checkpoint(str(tmp_path)) == own


def test_of_a_recipe_of_stages_the_last_one_that_trained_counts_at_what_it_chose(tmp_path):
    """Neither the newest of all, nor of a stage that chooses the best its newest."""
    out = tmp_path / "run"
    for name in ("1_cold/step_000001", "1_cold/step_000002", "2_rl/step_000003",
                 "2_rl/step_000004"):  # fmt: skip
        checkpoint_like(out / name)
    stages = [{"folder": "1_cold", "choose": "best"}, {"folder": "2_rl", "choose": "best"},
              {"folder": "3_kept", "choose": "last"}]  # fmt: skip
    (out / "recipe.json").write_text(json.dumps({"stages": stages}))
    os.utime(out / "1_cold" / "step_000001", (9e9, 9e9))
    assert newest_checkpoint(str(out)) == str(out / "2_rl" / "step_000004")  # has not ended
    for name, step in (("1_cold", 1), ("2_rl", 3)):
        (out / name / "summary.json").write_text(json.dumps({"best": {"step": step}}))
    assert newest_checkpoint(str(out)) == str(out / "2_rl" / "step_000003")
    assert newest_checkpoint(str(out / "1_cold")) == str(out / "1_cold" / "step_000001")
    assert newest_checkpoint(str(tmp_path)) == str(out / "1_cold" / "step_000001")
    stages[1]["choose"] = "last"
    (out / "recipe.json").write_text(json.dumps({"stages": stages}))
    assert newest_checkpoint(str(out)) == str(out / "2_rl" / "step_000004")


@pytest.mark.parametrize("there", [None, (), ("config.json",), ("tokenizer.json",)])
def test_a_folder_without_a_checkpoint_is_refused_by_name(tmp_path, there):
    folder = tmp_path / "nothing here"
    if there is not None:
        checkpoint_like(folder, *there or ("notes.txt",))
    with pytest.raises(ValueError, match=r"nothing here: neither a checkpoint .* nor a run"):
        newest_checkpoint(str(folder))


def test_json_is_written_with_its_folder(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json({"x": [1, 2.5, None]}, path)
    assert json.loads(path.read_text()) == {"x": [1, 2.5, None]}
    write_json([1], str(path))
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_json_is_whole_or_not_there(tmp_path, monkeypatch):
    """An object that is no JSON, and a disk that fails at the last moment."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    write_json({"old": True}, old)
    for path in (old, new):
        with pytest.raises(TypeError):
            write_json({"fine": 1, "not": {1, 2}}, path)
    monkeypatch.setattr(journal.os, "fsync", fail)
    for path in (old, new):
        with pytest.raises(OSError):
            write_json({"new": True}, path)
    assert json.loads(old.read_text()) == {"old": True} and not new.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """What was there before stays, and no remains."""
    old, full = tmp_path / "old.json", tmp_path / "full.jsonl"
    write_json({"old": True}, old)
    for path in (tmp_path / "old.json.tmp", full):
        path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/old\.json'"):
        write_json({"new": True}, old)
    with pytest.raises(OSError, match=r"No space left on device: '.*/full\.jsonl'"):
        append(full, {"step": 1})
    assert json.loads(old.read_text()) == {"old": True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full.jsonl", "old.json"]


def test_append_adds_one_line_each_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "text": "two\nlines é"}, {"step": 2, "kl": None}]
    for i, row in enumerate(rows):
        append(path, row)
        assert lines(path) == rows[: i + 1]


# ------------------------------------------------------------------------------ samples and probes


def test_pictures_are_saved_as_the_model_was_given_them(made, tmp_path):
    assert save_images(tmp_path, made.prompts[1], "a") == ["images/a_0.png", "images/a_1.png"]
    for name, pixels in zip(("a_0", "a_1"), made.images[1:]):
        found = np.asarray(Image.open(tmp_path / "images" / f"{name}.png"))
        assert np.array_equal(found, pixels)
    assert save_images(tmp_path, made.prompts[2], "b") == []
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_a_logged_group_is_its_own_prompt_completions_and_numbers(made, tmp_path):
    """R = 2 rewards of weight 1 and 0.5, B = 3, G = 2; the first two prompts are logged."""
    rollout = as_rollout(made.prompts, [[[5], [6, 7]], [[8, 9, 10], [11]], [[12], [13]]])
    rollout.texts = [["a", "b"], ["c", "d"], ["e", "f"]]
    rollout.finished[1, 0] = False
    table = torch.tensor([[[1.0, 0], [0, 1], [1, 1]], [[0, 0], [1, 1], [0, 1]]])
    adv = torch.tensor([[0.5, -0.5], [-1.5, 1.5], [0, 0]])
    reward = table[0] + 0.5 * table[1]
    log_rollout(tmp_path, 10, rollout, ("accuracy", "format"), table, reward, adv, most=2)
    found = lines(tmp_path / "rollouts.jsonl")
    assert len(found) == 2
    completions = [
        {"text": "c", "rewards": {"accuracy": 0.0, "format": 1.0}, "reward": 0.5,
         "advantage": -1.5, "length": 3, "finished": False},
        {"text": "d", "rewards": {"accuracy": 1.0, "format": 1.0}, "reward": 1.5,
         "advantage": 1.5, "length": 1, "finished": True},
    ]  # fmt: skip
    assert found[1] == {
        "step": 10, "prompt": made.prompts[1].text, "problem": "In both?", "row": "x.jsonl:2",
        "solution": "<answer> a cube </answer>", "completions": completions,
        "images": ["images/rollout_000010_1_0.png", "images/rollout_000010_1_1.png"],
    }  # fmt: skip
    assert found[0]["prompt"].count("<|image_pad|>") == 1
    assert [c["length"] for c in found[0]["completions"]] == [1, 2]
    for row, pictures in zip(found, (made.images[:1], made.images[1:])):
        for path, pixels in zip(row["images"], pictures):
            assert np.array_equal(np.asarray(Image.open(tmp_path / path)), pixels)


def test_later_steps_are_added_with_pictures_of_their_own(made, tmp_path):
    rollout = as_rollout(made.prompts, [[[5]], [[8]], [[12]]])
    table, adv = torch.zeros(1, 3, 1), torch.zeros(3, 1)
    for step in (1, 25):
        log_rollout(tmp_path, step, rollout, ("accuracy",), table, table[0], adv)
    found = lines(tmp_path / "rollouts.jsonl")
    assert [row["step"] for row in found] == [1, 1, 1, 25, 25, 25]
    assert [len(row["images"]) for row in found] == [1, 2, 0] * 2
    assert len({path for row in found for path in row["images"]}) == 6
    assert all((tmp_path / path).is_file() for row in found for path in row["images"])


def test_what_is_not_finite_is_null_in_a_line(made, tmp_path):
    """JSON knows no NaN; the reward is the one that was trained on."""
    rollout = as_rollout(made.prompts[:1], [[[5], [8]]])
    table, reward = torch.tensor([[[1.0, np.nan]], [[1.0, 1.0]]]), torch.tensor([[1.5, 0.5]])
    log_rollout(tmp_path, 1, rollout, ("x", "y"), table, reward, torch.zeros(1, 2))
    journal.append(tmp_path / "rollouts.jsonl", {"loss": float("inf"), "lengths": [1.0, np.nan]})
    text = (tmp_path / "rollouts.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (group, row) = lines(tmp_path / "rollouts.jsonl")
    assert [c["rewards"] for c in group["completions"]] == [{"x": 1, "y": 1}, {"x": None, "y": 1}]
    assert [c["reward"] for c in group["completions"]] == [1.5, 0.5]
    assert row == {"loss": None, "lengths": [1.0, None]}


def test_probes_are_greedy_answers_to_the_same_questions(made, tmp_path):
    rewards = [("same", lambda text, _: float(len(text)), 1.0), ("none", lambda *_: None, 1.0)]
    for step in (0, 5):
        log_probes(tmp_path, step, made.model, made.processor, made.prompts, rewards, 6)
    found = lines(tmp_path / "probes.jsonl")
    assert [row["step"] for row in found] == [0, 5]
    assert found[0]["answers"] == found[1]["answers"]
    texts = sample(made.model, made.processor, made.prompts, 1, 6, temperature=0).texts
    expected = [
        {"problem": p.example.problem, "solution": p.example.solution, "text": text,
         "images": images, "rewards": {"same": float(len(text)), "none": None}}
        for p, (text,), images in zip(made.prompts, texts, (
            ["images/probe_0_0.png"], ["images/probe_1_0.png", "images/probe_1_1.png"], [],
        ))
    ]  # fmt: skip
    assert found[0]["answers"] == expected
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [
        "probe_0_0.png", "probe_1_0.png", "probe_1_1.png",
    ]  # fmt: skip


def test_boxes_are_written_in_pixels_of_the_file_said_and_true(made, tmp_path):
    """A picture of 84 x 56; the model speaks of thousandths. The second group is about no boxes."""
    example = Example("Where?", "[21, 14, 42, 28]", (made.images[0],), row="x.jsonl:4")
    prompts = [made.processor.prompt(example), made.prompts[0]]
    rollout = as_rollout(prompts, [[[5], [6]], [[7], [8]]])
    rollout.texts = [["<answer>[250, 250, 500, 500]</answer>", "there"], ["3", "4"]]
    table, adv = torch.zeros(1, 2, 2), torch.zeros(2, 2)
    log_rollout(tmp_path, 1, rollout, ("iou",), table, table[0], adv)
    first, second = lines(tmp_path / "rollouts.jsonl")
    box = {"box": [21, 14, 42, 28], "label": "", "score": 1}
    assert first["gold_boxes"] == [box]
    assert [c["boxes"] for c in first["completions"]] == [[box], None]
    assert first["view"] == {"frame": "0-1000", "gold": "pixels", "sizes": [[56, 84, 56, 84]]}
    assert {"gold_boxes", "view"}.isdisjoint(second)
    assert all("boxes" not in c for c in second["completions"])
    rewards = [("any", lambda *_: 0.5, 1.0)]
    log_probes(tmp_path, 2, made.model, made.processor, prompts, rewards, 2)
    first, second = lines(tmp_path / "probes.jsonl")[0]["answers"]
    assert (first["gold_boxes"], first["boxes"]) == ([box], None) and "boxes" not in second


def test_probes_tell_rewards_how_long_an_answer_is(made, tmp_path):
    rewards = load_rewards(("length(per=1)",))
    log_probes(tmp_path, 0, made.model, made.processor, made.prompts[:2], rewards, 3)
    out = sample(made.model, made.processor, made.prompts[:2], 1, 3, temperature=0)
    found = [a["rewards"] for a in lines(tmp_path / "probes.jsonl")[0]["answers"]]
    assert found == [{"length(per=1)": float(n)} for n in out.lengths[:, 0]]


def test_no_probes_leave_no_file(made, tmp_path):
    log_probes(tmp_path, 0, made.model, made.processor, [], [], 6)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- time and memory


def test_seconds_add_up_by_name(monkeypatch):
    """A clock that shows 4 (start), then 10 to 13 for "a", 20 to 24 for "b", 30 to 35 for "a"."""
    clock = iter([4.0, 10.0, 13.0, 20.0, 24.0, 30.0, 35.0, 50.0])
    monkeypatch.setattr(journal, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    seconds = Seconds()
    assert seconds["a"] == 0.0 and seconds == {}
    for name in "aba":
        with seconds(name):
            pass
    assert seconds == {"a": 8.0, "b": 4.0} and seconds.last == {"a": 5.0, "b": 4.0}
    assert seconds.since_start() == 46.0


PEAK = Path("/proc/self/status")


@pytest.mark.skipif(torch.cuda.is_available() or not PEAK.exists(), reason="needs Linux, no GPU")
def test_peak_memory_is_that_of_the_process_in_gigabytes():
    kilobytes = next(line for line in PEAK.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory_gb() == pytest.approx(int(kilobytes.split()[1]) * 1024 / 1e9, rel=0.05)


def test_each_counts_what_it_takes_to_make_an_item_and_not_what_is_done_with_it():
    seconds = Seconds()

    def items():
        for i in range(3):
            time.sleep(0.01)
            yield i

    found = []
    for item in seconds.each("make", items()):
        time.sleep(0.05)
        found.append(item)
    assert found == [0, 1, 2] and 0.03 <= seconds["make"] < 0.15 < seconds.since_start()
