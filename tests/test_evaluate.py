"""evaluate.py, chapter two: what is counted, of what was said, and what is written down.

A random model says nothing that could be scored, so one is taught five answers by heart first:
right and well formed, right only, well formed only, neither, and two answers at once.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint

import rows
from data import Example, Processor, collate
from evaluate import evaluate, main, summary, template_of, wilson
from journal import save_checkpoint
from model import Layout, Qwen2VL
from rollout import as_rollout, score
from rows import load_examples

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
EXTRACTED = ["3", "4", "2", None, None]
ACCURACY, FORMAT = [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]
NEW = 48


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """model, processor, prompts and folder of a checkpoint that says SAID to EXAMPLES."""
    folder = make_checkpoint(tmp_path_factory.mktemp("random"), tie=False)
    model, processor = Qwen2VL.from_pretrained(folder), Processor.from_pretrained(folder)
    prompts = [processor.prompt(example) for example in EXAMPLES]
    ids = [[*processor.encode(text), processor.stop_ids[0]] for text in SAID]
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
        model=model, processor=processor, prompts=prompts, folder=folder, ids=ids
    )


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_known_intervals(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_by_hand():
    """(p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n), p = 1/2, n = 2, z = 2:
    (1/2 + 1 -+ 2 sqrt(1/8 + 1/4)) / 3."""
    assert wilson(1, 2, 2.0) == pytest.approx((0.5 - 0.375**0.5 * 2 / 3, 0.5 + 0.375**0.5 * 2 / 3))


def test_wilson_stays_between_0_and_1_and_around_the_share():
    for n in (1, 2, 3, 5, 10, 19, 50, 1000):  # 5, 10 and 19 round to below 0 or above 1
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1 and low < high
            assert (1 - high, 1 - low) == pytest.approx(wilson(n - k, n), abs=1e-12)


def test_summary_by_hand():
    rows = [(1, 1, "3", 10), (1, 0, "4", 20), (0, 1, "5", 30), (0, 0, None, 40)]
    results = [
        {"accuracy": float(a), "format": float(f), "extracted_answer": x, "length": n}
        for a, f, x, n in rows
    ]
    found = summary(results + results[1:2])
    low, high = wilson(3, 5)
    assert found == {
        "accuracy": 3 / 5, "low": low, "high": high, "format": 2 / 5, "unparsable": 1 / 5,
        "length": 24.0, "n": 5,
    }  # fmt: skip


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
    monkeypatch.setattr(rows, "CACHE", tmp_path)
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
    (run_folder / "config.json").write_text('{"template": "Say: {Question}"}')
    assert template_of(str(run_folder / "step_000003")) == "Say: {Question}"
    assert template_of(str(tmp_path / "elsewhere")) == "r1v"
    data = write_rows(tmp_path, EXAMPLES[:1])
    common = ["--model", str(run_folder), "--data", data, "--images", str(tmp_path / "pictures")]
    prompts = [main([*common, *more])["results"][0]["prompt"]
               for more in ([], ["--template", "r1v"])]  # fmt: skip
    assert "Say: " in prompts[0] and "Say: " not in prompts[1]


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
