"""evaluate.py, chapter two: what is counted, of what was said, and what is written down.

A random model says nothing that could be scored, so one is taught five answers by heart first:
right and well formed, right only, well formed only, neither, and two answers at once.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint

import kept
import rewards
import scenes
from data import Example, Processor, collate
from evaluate import Config, evaluate, evaluate_all, main, print_summary, prompt_of
from model import Layout, Qwen2VL
from rollout import as_rollout, score
from rows import load_examples
from saving import save_checkpoint
from scorers import wilson

COLOURS = np.array([[250, 250, 250], [200, 30, 30], [20, 40, 220], [10, 10, 10]], np.uint8)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Blocks of 14 x 14 pixels in four colours."""
    blocks = np.random.default_rng(seed).integers(0, 4, (height // 14, width // 14))
    return COLOURS[blocks.repeat(14, 0).repeat(14, 1)]


EXAMPLES = [  # the first and the third differ in their picture alone
    Example("How many?", "3", (picture(0, 56, 56),), "count", "x:1"),
    Example("Which?", "<answer> 4 </answer>", (picture(1, 56, 84),), "count", "x:2"),
    Example("How many?", "5", (picture(2, 56, 56),), "count", "x:3"),
    Example("How many legs?", "7", (), "", "x:4"),
    Example("What is in both?", "8", (picture(3, 84, 56), picture(4, 56, 56)), "relation", "x:5"),
]
SAID = [
    "<think> one </think> <answer> 3 </answer>",
    "<answer> 4 </answer>",
    "<think> two </think>\n<answer> 2 </answer>",
    "many",
    "<answer> 8 </answer> <answer> 8 </answer>",
]
# Boxes in thousandths of pictures of 56 x 56 and 84 x 56: (14, 0, 28, 28) is half of the true one.
BOXES = [
    Example("Where?", "[14, 0, 28, 56]", (picture(5, 56, 56),), "rec", "x:6"),
    Example("Find all.", '[{"bbox_2d": [42, 28, 84, 56], "label": "cube"}]',
            (picture(6, 56, 84),), "detect", "x:7"),
]  # fmt: skip
SAID_BOXES = [
    "<answer> [250, 0, 500, 500] </answer>",
    '<answer> [{"bbox_2d": [500, 500, 1000, 1000], "label": "cube"}] </answer>',
]
EXTRACTED = ["3", "4", "2", None, None]
ACCURACY, FORMAT = [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]
NEW = 48
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """model, processor, prompts and folder of a checkpoint that says SAID to EXAMPLES, and
    SAID_BOXES to BOXES."""
    folder = make_checkpoint(tmp_path_factory.mktemp("random"), tie=False)
    model, processor = Qwen2VL.from_pretrained(folder), Processor.from_pretrained(folder)
    prompts = [processor.prompt(example) for example in EXAMPLES + BOXES]
    ids = [[*processor.encode(text), processor.stop_ids[0]] for text in SAID + SAID_BOXES]
    lesson = as_rollout(prompts, [[row] for row in ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        logp, _ = score(model, lesson)
        if logp.sum() > -0.3:
            break
        (-logp.sum() / 50).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("run") / "step_000001"
    save_checkpoint(model, processor, folder)
    return SimpleNamespace(
        model=model, processor=processor, prompts=prompts[:5], folder=folder, ids=ids[:5]
    )


# ------------------------------------------------------------------------------------- the model


def plain_logp(model, processor, prompt, ids) -> float:
    """Sum of the log-probs of a completion by one whole forward, banned tokens left out."""
    batch = collate([prompt])
    after = batch.next_position + torch.arange(len(ids))
    positions = torch.cat((batch.positions, after.expand(3, -1)), 1)
    features = model.visual(batch.patches, batch.grid) if len(batch.grid) else None
    every = torch.cat((batch.ids, torch.tensor(ids)))
    hidden = model(every, positions, Layout([len(every)]), features, batch.image_at)
    logits = hidden[len(prompt.ids) - 1 : -1] @ model.head.T
    logits[:, processor.banned_ids] = -torch.inf
    return float(logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum())


@torch.no_grad()
def test_evaluate_says_what_was_asked_answered_and_scored(taught):
    found = evaluate(taught.model, taught.processor, EXAMPLES, max_new=NEW)
    assert len(found["results"]) == found["n"] == 5
    for i, (row, example) in enumerate(zip(found["results"], EXAMPLES)):
        assert row["question"] == {
            "problem": example.problem, "row": f"x:{i + 1}", "task": example.task,
        }  # fmt: skip
        assert row["is_correct"] is bool(ACCURACY[i])
        assert row["prompt"] == taught.prompts[i].text
        assert row["prompt"].startswith("<|im_start|>system\n")
        assert row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert row["prompt"].count("<|vision_start|><|image_pad|><|vision_end|>") == len(
            example.images
        )
        assert row["ground_truth"] == ["3", "4", "5", "7", "8"][i]
        assert row["model_output"] == SAID[i]
        assert row["extracted_answer"] == EXTRACTED[i]
        assert (row["accuracy"], row["format"]) == (ACCURACY[i], FORMAT[i])
        assert row["length"] == len(taught.ids[i])
        expected = plain_logp(taught.model, taught.processor, taught.prompts[i], taught.ids[i])
        assert row["logp"] == pytest.approx(expected, abs=1e-4) and row["logp"] < 0
    assert found["accuracy"] == found["format"] == found["unparsable"] == 2 / 5
    assert (found["low"], found["high"]) == wilson(2, 5)
    assert found["length"] == sum(map(len, taught.ids)) / 5
    assert found["parsed"] == 2 / 3 and found["correct"] == 2


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 64])
def test_the_batch_size_does_not_change_the_results(taught, batch):
    whole = evaluate(taught.model, taught.processor, EXAMPLES, 5, NEW)
    found = evaluate(taught.model, taught.processor, EXAMPLES, batch, NEW)
    for a, b in zip(found.pop("results"), whole.pop("results"), strict=True):
        assert a.pop("logp") == pytest.approx(b.pop("logp"), abs=1e-4)
        assert a == b
    assert found == whole


def test_sampled_answers_are_fixed_by_the_seed_and_not_by_the_batch(taught):
    hot = {"temperature": 5.0, "top_k": 50}
    ask = lambda batch, seed: [  # noqa: E731
        r["model_output"]
        for r in evaluate(
            taught.model, taught.processor, EXAMPLES, batch, NEW, seed=seed, **hot
        )["results"]
    ]
    assert ask(5, 1) == ask(2, 1) != ask(5, 2)
    greedy = evaluate(taught.model, taught.processor, EXAMPLES, 5, NEW)["results"]
    narrow = evaluate(taught.model, taught.processor, EXAMPLES, 5, NEW, temperature=5.0, top_k=1)
    assert [r["model_output"] for r in narrow["results"]] == [r["model_output"] for r in greedy]


def test_an_answer_cut_at_max_new_is_unparsable_and_wrong(taught):
    found = evaluate(taught.model, taught.processor, EXAMPLES[:1], max_new=4)
    assert found["unparsable"] == 1 and found["accuracy"] == found["format"] == 0
    assert found["length"] == 4 and SAID[0].startswith(found["results"][0]["model_output"])


# ----------------------------------------------------------------------------------- the command


def write_rows(folder, examples) -> str:
    """rows.jsonl, its pictures as PNG under folder/pictures; returns the path of the .jsonl."""
    (folder / "pictures").mkdir()
    lines = []
    for i, example in enumerate(examples):
        names = [f"{i}_{j}.png" for j in range(len(example.images))]
        for name, image in zip(names, example.images):
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            image.save(folder / "pictures" / name)
        lines.append({"problem": example.problem, "solution": example.solution, "images": names})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run(taught, folder, examples, *more) -> dict:
    """What the command writes for these examples."""
    data, out = write_rows(folder, examples), folder / "results" / "out.json"
    main([
        "--model", str(taught.folder), "--data", data, "--images", str(folder / "pictures"),
        "--out", str(out), "--max_new", str(NEW), *more,
    ])  # fmt: skip
    return json.loads(out.read_text())


def test_the_command_writes_what_evaluate_finds(taught, tmp_path, capsys):
    found = run(taught, tmp_path, EXAMPLES, "--batch", "2")
    expected = evaluate(taught.model, taught.processor, EXAMPLES, max_new=NEW)
    assert found["model"] == str(taught.folder) and found["data"].endswith("rows.jsonl")
    assert found["template"] == "r1v"
    for key in ("accuracy", "low", "high", "format", "unparsable", "length", "n"):
        assert found[key] == expected[key], key
    for i, (a, b) in enumerate(zip(found["results"], expected["results"], strict=True)):
        assert a["question"]["row"] == f"rows.jsonl:{i + 1}"
        for key in ("prompt", "ground_truth", "model_output", "extracted_answer", "accuracy"):
            assert a[key] == b[key], key
        assert a["logp"] == pytest.approx(b["logp"], abs=1e-3)
    said = capsys.readouterr().out
    assert "accuracy 0.400 (" in said and "n = 5" in said and "unparsable 0.400" in said


def test_a_run_is_evaluated_at_its_newest_checkpoint_and_limit_takes_the_first_rows(
    taught, tmp_path
):
    data = write_rows(tmp_path, EXAMPLES[3:])
    found = main(["--model", str(taught.folder.parent), "--data", data, "--limit", "1",
                  "--images", str(tmp_path / "pictures"), "--max_new", "2"])  # fmt: skip
    assert [(r["model_output"], r["length"]) for r in found["results"]] == [("many", 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "rows.jsonl"]


def test_the_template_asks_the_question(taught, tmp_path):
    found = run(taught, tmp_path, EXAMPLES[3:4], "--template", "Say: {Question}")
    assert "<|im_start|>user\nSay: How many legs?<|im_end|>" in found["results"][0]["prompt"]
    assert found["template"] == "Say: {Question}"


def test_image_files_of_other_sizes_and_modes_are_read_as_they_look(taught, tmp_path):
    """Against the pixels worked out by hand: white behind transparency, gray in three channels."""
    rgb, gray = picture(0, 56, 56), picture(5, 70, 56)[..., 0]
    clear = np.dstack((rgb, np.full((56, 56), 255, np.uint8)))
    clear[:28, :, 3] = 0
    half = rgb.copy()
    half[:28] = 255
    places = (rgb[:, :, None] == COLOURS).all(-1).argmax(-1).astype(np.uint8)
    palette = Image.fromarray(places, "P")
    palette.putpalette(COLOURS.tobytes())
    long = picture(6, 28, 280)
    files = [Image.fromarray(clear), palette, Image.fromarray(gray), Image.fromarray(long)]
    assert [f.mode for f in files] == ["RGBA", "P", "L", "RGB"]
    seen = [half, rgb, np.repeat(gray[..., None], 3, 2), long]

    found = run(taught, tmp_path, [Example("How many?", "3", (f,)) for f in files])
    expected = evaluate(
        taught.model, taught.processor, [Example("How many?", "3", (x,)) for x in seen], max_new=NEW
    )
    assert found["results"][1]["model_output"] == SAID[0]
    logps = [row["logp"] for row in found["results"]]
    assert logps == pytest.approx([row["logp"] for row in expected["results"]], abs=1e-3)
    assert len({round(x, 2) for x in logps}) == 4, "each picture is seen"


def test_a_world_is_asked_about_its_held_out_scenes(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "CACHE", tmp_path)
    source = "world:A:n=8:size=56x56"
    found = main(["--model", str(taught.folder), "--data", source, "--max_new", "1"])
    golds = {
        part: [e.solution for e in load_examples(source, part=part)] for part in ("train", "test")
    }
    assert [r["ground_truth"] for r in found["results"]] == golds["test"] != golds["train"]


def test_what_is_missing_is_named_and_nothing_is_written(taught, tmp_path):
    model, data = str(taught.folder), write_rows(tmp_path, EXAMPLES[:1])
    out, nowhere = tmp_path / "out.json", str(tmp_path / "nowhere")
    given = {"--model": model, "--data": data, "--images": str(tmp_path / "pictures")}
    wrong = {
        "nowhere: neither a checkpoint": {"--model": nowhere},
        "nowhere.jsonl": {"--data": f"{nowhere}.jsonl"},
        "split 'Z'": {"--data": "world:Z:n=2"},
        r"rows.jsonl:1: image .*nowhere.*0_0.png": {"--images": nowhere},
        "template 'r1w'.*r1v": {"--template": "r1w"},
    }
    for named, change in wrong.items():
        words = [word for pair in {**given, **change}.items() for word in pair]
        with pytest.raises(SystemExit) as refused:
            main([*words, "--out", str(out)])
        assert refused.value.code not in (0, None)
        assert refused.match(f"(?s)error: .*{named}"), named
    assert not out.exists()


def test_the_template_is_that_of_the_run_unless_another_is_named(taught, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(taught.folder, run_folder / "step_000003")
    trained = {"template": "Say: {Question}", "system": "Be short."}
    (run_folder / "config.json").write_text(json.dumps(trained))
    step = str(run_folder / "step_000003")
    frames = {"frame": None, "gold_frame": "pixels"}
    assert prompt_of(step, None, None) == {**trained, **frames}
    assert prompt_of(step, None, "Be long.")["system"] == "Be long."
    other = {"template": "r1v", "system": None, **frames}
    assert prompt_of(step, "r1v", None) == prompt_of(str(tmp_path / "x"), None, None) == other
    spoken = {"frame": "resized", "gold_frame": "0-1000"}
    (run_folder / "config.json").write_text(json.dumps({**trained, **spoken}))
    assert prompt_of(step, None, None) == {**trained, **spoken}
    assert prompt_of(step, "r1v", None) == {**other, **spoken}
    assert prompt_of(step, None, None, "pixels")["frame"] == "pixels"
    assert prompt_of(step, None, None, None, "pixels")["gold_frame"] == "pixels"
    data = write_rows(tmp_path, EXAMPLES[:1])
    common = ["--model", str(run_folder), "--data", data, "--images", str(tmp_path / "pictures")]
    prompts = [main([*common, *more])["results"][0]["prompt"]
               for more in ([], ["--template", "r1v"])]  # fmt: skip
    assert "Say: " in prompts[0] and "Say: " not in prompts[1]


def test_results_of_another_evaluation_are_not_replaced(taught, tmp_path):
    run(taught, tmp_path, EXAMPLES[:2])
    out = tmp_path / "results" / "out.json"
    words = ["--model", str(taught.folder), "--data", str(tmp_path / "rows.jsonl"), "--images",
             str(tmp_path / "pictures"), "--max_new", str(NEW), "--out", str(out)]  # fmt: skip
    before = out.read_bytes()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "more.jsonl")
    shutil.copytree(taught.folder, tmp_path / "model")
    changes = {"model": tmp_path / "model", "data": tmp_path / "more.jsonl", "limit": 1,
               "template": "direct", "system": "Hm.", "scorer": "count"}  # fmt: skip
    told = "out.json: holds the results of another evaluation; remove it or give another --out"
    for key, word in changes.items():
        other = [*words]
        if f"--{key}" in other:
            at = other.index(f"--{key}")
            del other[at : at + 2]
        with pytest.raises(SystemExit, match=rf"{told} \(not the same: {key}\)"):
            main([*other, f"--{key}", str(word)])
    with pytest.raises(SystemExit, match=r"another evaluation.*\(not the same: rescored\)"):
        main(["--rescore", str(shutil.copy(out, tmp_path / "o.json")), "--out", str(out)])
    assert out.read_bytes() == before
    main(words)
    found, again = json.loads(before), json.loads(out.read_bytes())
    assert found["results"] == again["results"] and found["limit"] is None
    for text in ("mine", "[1]", "{}"):
        out.write_text(text)
        with pytest.raises(SystemExit, match="holds the results of another evaluation"):
            main(words)
        assert out.read_text() == text


def test_an_out_that_cannot_be_written_is_refused_before_the_work(taught, tmp_path):
    data = write_rows(tmp_path, EXAMPLES[:1])
    (tmp_path / "folder").mkdir()
    results = tmp_path / "a.json"
    results.write_text('{"results": [{"ground_truth": 1, "model_output": ""}]}')
    files = {path: path.read_bytes() for path in (results, Path(data))}
    ask = ["--model", str(taught.folder), "--data", data]
    for words, taken in ((ask, data), (["--rescore", str(results)], str(results))):
        for out, why in ((str(tmp_path / "folder"), "is a folder"),
                         (f"{data}/x/b.json", "is a file"), (taken, "would be overwritten")):
            with pytest.raises(SystemExit, match=rf"error: --out {out}: .*{why}"):
                main([*words, "--out", out])
    (tmp_path / "link.json").symlink_to(results)
    part = shutil.copy(results, tmp_path / "b.json.tmp")  # where b.json would be written first
    for name, out in ((results, "link.json"), (part, "b.json")):
        with pytest.raises(SystemExit, match="would be overwritten"):
            main(["--rescore", str(name), "--out", str(tmp_path / out)])
    assert {path: path.read_bytes() for path in files} == files and part.read_bytes()
    there = ["a.json", "b.json.tmp", "folder", "link.json", "pictures", "rows.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_options_that_would_do_nothing_are_refused(capsys):
    for words in (["--top_p", "0.9"], ["--top_k", "5"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "need a temperature above 0" in capsys.readouterr().err


def test_bad_rows_are_left_out_only_if_asked(taught, tmp_path, capsys):
    data = write_rows(tmp_path, EXAMPLES[:2])
    with open(data, "a") as f:
        f.write('{"problem": "no solution"}\n')
    words = ["--model", str(taught.folder), "--data", data, "--images", str(tmp_path / "pictures")]
    with pytest.raises(SystemExit, match=r"1 of 3 rows are bad"):
        main(words)
    assert main([*words, "--bad_rows", "skip"])["n"] == 2
    assert "1 of 3 rows are bad" in capsys.readouterr().err


def test_where_there_is_no_run_a_model_must_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"error: model runs: neither a checkpoint"):
        main(["--data", "world:A:n=2"])


def test_the_scorer_says_what_is_right(taught, tmp_path):
    pytest.importorskip("math_verify")
    found = {name: evaluate(taught.model, taught.processor, EXAMPLES, 5, NEW, scorer=name)
             for name in ("count", "geoqa", "math", "r1v_format")}  # fmt: skip
    right = {name: [r["accuracy"] for r in x["results"]] for name, x in found.items()}
    assert right["count"] == [1, 1, 0, 0, 1]  # R1-V takes the first of two answers
    assert right["math"] == ACCURACY and right["r1v_format"] == FORMAT
    assert [r["extracted_answer"] for r in found["count"]["results"]] == [3, 4, 2, None, 8]
    assert found["geoqa"]["results"][0]["extracted_answer"] == "3"
    written = run(taught, tmp_path, EXAMPLES, "--scorer", "count")
    assert written["scorer"] == "count" and written["accuracy"] == 3 / 5


def test_a_scorer_is_told_the_length_in_tokens(taught, tmp_path):
    name = "length(per=1)"
    found = evaluate(taught.model, taught.processor, EXAMPLES, 5, NEW, scorer=name)
    lengths = [len(ids) for ids in taught.ids]
    assert [r["accuracy"] for r in found["results"]] == lengths == [
        r["length"] for r in found["results"]
    ]
    (tmp_path / "a.json").write_text(json.dumps(found))
    again = main(["--rescore", str(tmp_path / "a.json"), "--scorer", "length(per=0.5)"])
    assert again["score"] == sum(lengths) / 5 / 2


def boxes_in(folder) -> list[str]:
    """Words that evaluate the boxes."""
    return ["--data", write_rows(folder, BOXES), "--images", str(folder / "pictures")]


def test_boxes_are_scored_in_pixels_whatever_the_model_speaks(taught, tmp_path, capsys):
    """The first box said has half the area of the true one, inside it; the second is the true one.
    As pixels what is said lies far outside."""
    words = ["--model", str(taught.folder), "--max_new", "80", *boxes_in(tmp_path)]
    found = main([*words, "--scorer", "rec", "--out", str(tmp_path / "rec.json")])
    assert [r["model_output"] for r in found["results"]] == SAID_BOXES
    assert found["accuracy"] == found["iou"] - 1 / 4 == 1 / 2 and found["giou"] == 3 / 4
    assert "accuracy 0.500 (" in (told := capsys.readouterr().out)
    assert ", Mean IoU 0.750, Mean GIoU 0.750, unparsable 0.000" in told
    first, second = (r["boxes"][0] for r in found["results"])
    assert first == {"box": [14, 0, 28, 28], "label": "", "score": 1}
    assert second == {"box": [42, 28, 84, 56], "label": "cube", "score": 1}
    far = main([*words, "--scorer", "rec", "--frame", "pixels"])
    assert far["accuracy"] == far["iou"] == 0 and far["giou"] < 0
    wrong = main([*words, "--scorer", "rec", "--gold_frame", "0-1000"])
    assert wrong["accuracy"] == 0
    main(["--rescore", str(tmp_path / "rec.json"), "--scorer", "detect"])
    told = capsys.readouterr().out
    # An IoU of .5 is enough here; AP is the mean of 1 / 10 of thresholds, and all of them.
    assert "AP 0.550, AP@.5 1.000, Precision 1.000, Recall 1.000" in told
    main(["--rescore", str(tmp_path / "rec.json"), "--scorer", "iou"])
    assert "Score 0.750, " in capsys.readouterr().out


def test_gold_answers_that_hold_no_boxes_are_refused_or_left_out(taught, tmp_path, capsys):
    words = ["--model", str(taught.folder), "--data", write_rows(tmp_path, [*BOXES, EXAMPLES[0]]),
             "--images", str(tmp_path / "pictures"), "--max_new", "80"]  # fmt: skip
    for scorer in ("rec", "detect", "iou(least=0.5)"):
        with pytest.raises(SystemExit, match=r"error: 1 of 3 rows do not .*rows.jsonl:3: .*'3' is"):
            main([*words, "--scorer", scorer])
    assert main([*words, "--scorer", "rec", "--bad_rows", "skip"])["n"] == 2
    assert "they are left out" in capsys.readouterr().err
    main([*words, "--out", str(tmp_path / "all.json")])
    rescored = ["--rescore", str(tmp_path / "all.json"), "--scorer", "rec"]
    with pytest.raises(SystemExit, match=r"error: 1 of 3 rows do not fit"):
        main(rescored)
    assert main([*rescored, "--bad_rows", "skip"])["n"] == 2


def test_the_table_of_a_run_shows_what_its_scorer_tells(taught, tmp_path, capsys):
    found = {when: evaluate_all(taught.model, taught.processor, {"where": BOXES[at:]}, 80, tmp_path,
                                when, "rec") for when, at in (("before", 0), ("after", 1))}
    print_summary(found, taught.folder.parent, tmp_path / "report.html")
    said = capsys.readouterr().out
    assert "where       0.500 (0.09-0.91)  1.000 (0.21-1.00)  0.00 -> 0.00\n" in said
    assert "            Mean IoU   0.750 -> 1.000\n" in said and "Score" not in said
    assert json.loads((tmp_path / "eval" / "where_after.json").read_text())["giou"] == 1


def test_pictures_keep_within_the_limits_in_pixels(taught, tmp_path):
    pads = lambda found: len(found["results"][0]["prompt"].split("image_pad"))  # noqa: E731
    few = run(taught, tmp_path, EXAMPLES[:1])
    shutil.rmtree(tmp_path / "pictures")
    (tmp_path / "results" / "out.json").unlink()
    many = run(taught, tmp_path, EXAMPLES[:1], "--min_pixels", str(112 * 112))
    assert few["results"][0]["logp"] != many["results"][0]["logp"] and pads(few) == pads(many)
    shutil.rmtree(tmp_path / "pictures")
    (tmp_path / "results" / "out.json").unlink()
    with pytest.raises(SystemExit, match="0 < min_pixels <= max_pixels"):
        run(taught, tmp_path, EXAMPLES[:1], "--min_pixels", "9000", "--max_pixels", "4000")


# -------------------------------------------------------------------- an interrupted evaluation

STOPS = """
import os, signal, time
from pathlib import Path

HERE = Path(__file__).parent


def mine(text, example):
    "1 if 3 is in the text. Notes the row; stops the evaluation at the one that `stop` names."
    with open(HERE / "asked", "a") as f:
        f.write(example.row.partition(":")[2] + " ")
    row, how = (HERE / "stop").read_text().split()
    if example.row.endswith(f":{row}"):
        os.kill(os.getppid(), signal.SIGKILL if how == "kill" else signal.SIGINT)
        time.sleep(60)
    return float("3" in text)
"""


class Stopped:
    """The command on EXAMPLES, one question a batch, with a scorer that can stop it at a row."""

    def __init__(self, taught, folder):
        self.folder, self.out = folder, folder / "results" / "out.json"
        (folder / "mine.py").write_text(STOPS)
        self.words = ["--model", str(taught.folder), "--data", write_rows(folder, EXAMPLES),
                      "--images", str(folder / "pictures"), "--out", str(self.out), "--batch", "1",
                      "--max_new", str(NEW), "--scorer", f"{folder}/mine.py:mine"]  # fmt: skip

    def stop(self, row: str, how: str = "interrupt"):
        (self.folder / "stop").write_text(f"{row} {how}")
        (self.folder / "asked").write_text("")

    def asked(self) -> list[int]:
        return sorted(map(int, (self.folder / "asked").read_text().split()))

    def parts(self) -> list[str]:
        return sorted(p.name for p in self.out.parent.iterdir())

    def processes(self, n: int, *launcher: str) -> list[int]:
        """Exit codes of n processes at once, which find each other as torchrun's do."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        several = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run = [
            subprocess.Popen([sys.executable, *launcher, "evaluate.py", *self.words], cwd=ROOT,
                             env=env if n == 1 else {**env, **several, "RANK": str(rank)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for rank in range(n)
        ]  # fmt: skip
        return [process.wait(120) for process in run]

    def check(self, taught):
        """The results are those of an evaluation that was never stopped, and all else is gone."""
        self.stop("none")
        whole = evaluate(taught.model, taught.processor, EXAMPLES, 1, NEW, scorer=self.words[-1])
        found = json.loads(self.out.read_text())
        assert [r["question"]["row"] for r in found["results"]] == [
            f"rows.jsonl:{i}" for i in range(1, 6)
        ]
        for a, b in zip(found["results"], whole["results"], strict=True):
            assert a.pop("logp") == pytest.approx(b.pop("logp"), abs=1e-3)
            assert {**a, "question": 0} == {**b, "question": 0}
        assert {k: found[k] for k in whole if k != "results"} == {
            k: v for k, v in whole.items() if k != "results"
        }
        assert self.parts() == ["out.json"]


@pytest.fixture
def stopped(taught, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    yield Stopped(taught, tmp_path)
    signal.signal(signal.SIGINT, before)


def test_a_killed_evaluation_goes_on_where_it_was(taught, stopped):
    stopped.stop("4", "kill")
    assert stopped.processes(1) == [-9] and stopped.parts() == ["out.json.part0"]
    stopped.stop("none")
    main(stopped.words)
    assert stopped.asked() == [4, 5]
    stopped.check(taught)


@pytest.mark.slow
def test_two_processes_killed_half_way_are_finished_by_one(taught, stopped):
    """Rows 1 and 2 are the first process's, 3 to 5 the second's, which dies at 4."""
    stopped.stop("4", "kill")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert stopped.processes(1, *launcher) != [0] and not stopped.out.exists()
    assert "out.json.part1" in stopped.parts() and 3 in stopped.asked()
    stopped.stop("none")
    main(stopped.words)
    assert {4, 5} <= set(stopped.asked()) <= {1, 2, 4, 5}
    stopped.check(taught)


def test_one_process_stopped_half_way_is_finished_by_two(taught, stopped):
    stopped.stop("3")
    with pytest.raises(SystemExit, match="130"):
        main(stopped.words)
    assert stopped.parts() == ["out.json.part0"] and stopped.asked() == [1, 2, 3]
    stopped.stop("none")
    assert stopped.processes(2) == [0, 0]
    assert stopped.asked() == [3, 4, 5]
    stopped.check(taught)


def test_ctrl_c_says_whether_the_same_command_goes_on(stopped, capsys):
    stopped.stop("1")
    at = stopped.words.index("--out")
    for words, said in ((stopped.words, "stopped; the same command goes on where it was\n"),
                        (stopped.words[:at] + stopped.words[at + 2 :], "stopped\n")):
        with pytest.raises(SystemExit, match="130"):
            main(words)
        assert capsys.readouterr().err.endswith(f"\r{said}")  # the bar is gone


def test_a_line_that_a_kill_cut_short_is_asked_again(taught, stopped):
    stopped.stop("4")
    with pytest.raises(SystemExit, match="130"):
        main(stopped.words)
    part = stopped.out.parent / "out.json.part0"
    about, first, second, third, _ = part.read_bytes().split(b"\n")
    other = part.parent / "out.json.part7"  # of another process
    other.write_bytes(b"\n".join((about, third, first, second[:-20])))
    part.unlink()
    stopped.stop("5")
    with pytest.raises(SystemExit, match="130"):
        main(stopped.words)
    assert stopped.asked() == [2, 4, 5] and stopped.parts() == ["out.json.part0"]
    stopped.stop("none")
    main(stopped.words)
    assert stopped.asked() == [5]
    stopped.check(taught)


def test_where_all_is_answered_only_the_results_are_written(taught, stopped):
    stopped.stop("5")
    with pytest.raises(SystemExit, match="130"):
        main([*stopped.words, "--limit", "5"])
    part = stopped.out.parent / "out.json.part0"
    kept = part.read_bytes()
    stopped.stop("none")
    main([*stopped.words, "--limit", "5"])
    last = json.loads(stopped.out.read_text())["results"][-1]
    part.write_bytes(kept + json.dumps({"i": 4, "row": last}).encode() + b"\n")
    stopped.stop("none")
    main([*stopped.words, "--limit", "5"])
    assert stopped.asked() == []
    stopped.check(taught)


def test_answers_of_another_evaluation_are_refused_and_kept(taught, stopped, tmp_path, monkeypatch):
    stopped.stop("3")
    with pytest.raises(SystemExit, match="130"):
        main(stopped.words)
    part = stopped.out.parent / "out.json.part0"
    kept = part.read_bytes()
    (tmp_path / "other.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    copy = tmp_path / "model"
    shutil.copytree(taught.folder, copy)
    place = {key: stopped.words.index(f"--{key}") + 1 for key in ("data", "max_new", "model")}
    place["scorer"] = len(stopped.words) - 1
    changes = {
        "data": (place["data"], str(tmp_path / "other.jsonl")),
        "max_new": (place["max_new"], "40"), "scorer": (place["scorer"], "accuracy"),
        "model": (place["model"], str(copy)),
    }  # fmt: skip
    (copy / "model.safetensors").touch()
    for named, (at, word) in changes.items():
        words = [*stopped.words]
        words[at] = word
        with pytest.raises(SystemExit, match=rf"part0: .*another {named}.*Remove it, or give"):
            main(words)
    for more in (["--template", "direct"], ["--limit", "4"], ["--seed", "1"],
                 ["--max_pixels", "20000"], ["--frame", "pixels"]):  # fmt: skip
        with pytest.raises(SystemExit, match="answers of another evaluation"):
            main([*stopped.words, *more])
    (tmp_path / "mine.py").write_text(STOPS + "\n# changed")
    with pytest.raises(SystemExit, match="another scorer"):
        main(stopped.words)
    (tmp_path / "mine.py").write_text(STOPS)
    (tmp_path / "rewards.py").write_text("# changed")
    monkeypatch.setattr(rewards, "__file__", str(tmp_path / "rewards.py"))
    with pytest.raises(SystemExit, match="another scorer"):
        main(stopped.words)
    assert part.read_bytes() == kept and stopped.parts() == ["out.json.part0"]


def test_one_s_own_code_counts_inside_brackets_too(taught, tmp_path):
    """A reward of one's own that is part of another is code that scores, and may change."""
    mine = tmp_path / "mine.py"
    cfg = Config(scorer=f"all_of(format, {mine}:mine)")
    told = []
    for code in (STOPS, STOPS, STOPS + "# changed"):
        mine.write_text(code)
        told.append(kept.about(cfg, str(tmp_path), taught.processor, EXAMPLES))
    assert told[0] == told[1] and {k for k in told[0] if told[0][k] != told[2][k]} == {"scorer"}


def test_rows_that_changed_below_the_same_name_are_refused(stopped, tmp_path):
    stopped.stop("3")
    with pytest.raises(SystemExit, match="130"):
        main(stopped.words)
    text = (tmp_path / "rows.jsonl").read_text()
    for old, new in (("Which?", "What?"), ("<answer> 4 </answer>", "9")):
        assert old in text
        (tmp_path / "rows.jsonl").write_text(text.replace(old, new))
        with pytest.raises(SystemExit, match=r"another evaluation.*another data"):
            main(stopped.words)


def test_a_damaged_file_and_a_folder_in_the_way_are_named(stopped):
    stopped.out.parent.mkdir()
    part = stopped.out.parent / "out.json.part3"
    for text in ("x\n", "[1]\n", "{}\n", '{"about": {}}\n{"i": 1}\n', "\0\0\n"):
        part.write_text(text)
        with pytest.raises(SystemExit, match=r"out.json.part3: is damaged .*remove it"):
            main(stopped.words)
    part.unlink()
    stopped.out.mkdir()
    with pytest.raises(SystemExit, match=r"out.json: is a folder"):
        main(stopped.words)


# ------------------------------------------------------------------------------ saved results


def test_a_results_file_is_scored_anew_without_a_model(taught, tmp_path, capsys):
    run(taught, tmp_path, EXAMPLES)
    out, new = tmp_path / "results" / "out.json", tmp_path / "new" / "count.json"
    capsys.readouterr()
    main(["--rescore", str(out), "--scorer", "count", "--out", str(new)])
    *_, said, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"accuracy": 60.0, "n": 5, "correct": 3, "unparsable": 1}
    assert "accuracy 0.600 (" in said and "scorer count" in said
    found = json.loads(new.read_text())
    assert found["accuracy"] == 3 / 5 and found["scorer"] == "count"
    assert found["length"] == sum(map(len, taught.ids)) / 5
    main(["--rescore", str(new)])
    again = capsys.readouterr().out.splitlines()
    assert json.loads(again[-1]) == {"accuracy": 40.0, "n": 5, "correct": 2, "unparsable": 2}


def test_the_percentage_is_r1v_s_to_the_last_digit(tmp_path, capsys):
    """292 of 754, its GeoQA result of a 7B after two epochs: 38.726790450928384 in its log."""
    rows = [{"question": {}, "ground_truth": 1, "model_output": f"<answer>{int(i < 292)}</answer>"}
            for i in range(754)]  # fmt: skip
    (tmp_path / "log.json").write_text(json.dumps({"accuracy": 0, "results": rows}))
    main(["--rescore", str(tmp_path / "log.json"), "--scorer", "count"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["accuracy"] == 38.726790450928384


def test_keys_that_would_do_nothing_beside_rescore_are_refused(tmp_path, capsys):
    for words in (["--model", "x"], ["--limit", "3"], ["--bf16"], ["--temperature", "1"]):
        with pytest.raises(SystemExit):
            main(["--rescore", "x.json", *words])
        assert f"{words[0][2:]}: would do nothing with --rescore" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: .*nowhere\.json"):
        main(["--rescore", str(tmp_path / "nowhere.json")])
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"error: .*a.json: not a results file"):
        main(["--rescore", str(tmp_path / "a.json")])
