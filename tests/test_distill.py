"""distill.py, chapter two: each step alone, killed and started again, then all of them in a row."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer, Reply
from PIL import Image
from test_chat import interruptible, no_proxy  # noqa: F401
from test_describe import clevr
from tiny_checkpoint import make_checkpoint, picture

import distill
import shards
from distill import main, natural
from images import open_image
from rewards import format
from rows import load_examples

KEY = "sk-very-secret-0123456789"
ROOT = Path(distill.__file__).parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with a key in the environment."""
    monkeypatch.setattr(shards, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path, content: list[dict]):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in content))


def refused(argv: list[str]) -> str:
    """The message that main ends with."""
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert str(error.value).startswith("error: ")
    return str(error.value)


# --------------------------------------------------------------------------------------- describe


def test_clevr_is_described(folder):
    scenes, questions = clevr(folder)
    argv = ["describe", "--scenes", scenes, "--questions", questions, "--images", str(folder)]
    told = refused(argv)
    assert "CLEVR_trainA_000000.png: no such file" in told
    assert not Path("d/questions.jsonl").exists()
    for i in range(2):
        Image.fromarray(picture(i, 56, 56)).save(folder / f"CLEVR_trainA_00000{i}.png")
    main(argv)
    found = read("d/questions.jsonl")
    assert [row["id"].split("#")[1] for row in found] == ["0", "all", "2", "3", "all", "5"]
    main([*argv, "--limit", "2", "--seed", "3", "--out", "few.jsonl"])
    few = read("few.jsonl")
    assert len(few) == 2 and all(row in found for row in few)


@pytest.mark.parametrize("argv", [[], ["--scenes", "a"], ["--questions", "a"],
                                  ["--world", "world:A", "--scenes", "a"],
                                  ["--world", "world:A", "--images", "a"]])  # fmt: skip
def test_one_source_is_described_and_whole(argv, capsys):
    with pytest.raises(SystemExit):
        main(["describe", *argv])
    assert "give --scenes and --questions, or --world" in capsys.readouterr().err


def test_nothing_to_count_is_told():
    assert "no question has how many" in refused(["describe", "--world", "world:A:n=2:ask=compare"])


# ------------------------------------------------------------------------------------------ query


def asked_for(n: int) -> list[dict]:
    """n questions, whose answers are 0, 1, 2, …"""
    return [{"id": f"q{i}", "image": f"{i}.png", "problem": f"How many, {i}?", "solution": str(i),
             "description": f"Scene Description:\n{i} cubes\n"} for i in range(n)]  # fmt: skip


def number_in(body: dict) -> int:
    return int(body["messages"][-1]["content"].split("How many, ")[1].split("?")[0])


def right(n: int, body: dict) -> dict:
    i = number_in(body)
    return {"reasoning_content": f"The scene description has {i}.", "content": f"So **{i}**"}


def query(server: ChatServer, *argv: str):
    main(["query", "--base_url", server.url, "--teacher", "R1", *argv])


def test_answers_hold_the_question_and_the_thoughts(folder):
    write("d/questions.jsonl", asked_for(3))
    with ChatServer(right) as server:
        query(server)
    found = sorted(read("d/answers.jsonl"), key=lambda row: row["id"])
    for i, (asked, row) in enumerate(zip(asked_for(3), found)):
        text = f"<think>\nThe scene description has {i}.\n</think>\n\nSo **{i}**"
        assert row == {**asked, "sample": 0, "teacher": "R1", "text": text, "finish": "stop",
                       "tokens": 7}  # fmt: skip
    sent = server.asked[0].body
    assert sent["model"] == "R1" and sent["max_tokens"] == 4096 and "temperature" not in sent
    assert sent["messages"][0]["content"].startswith("Answer the question according to scene desc")
    assert "'**The answer is: **'" in sent["messages"][0]["content"]


def test_a_text_with_its_own_tags_stays_as_it_is():
    write("d/questions.jsonl", asked_for(1))
    with ChatServer(lambda n, body: " <think>hm</think>0\n") as server:
        query(server, "--template", "{Question}", "--system", "Count.", "--n", "3",
              "--temperature", "0.6", "--max_tokens", "99")  # fmt: skip
    assert [row["text"] for row in read("d/answers.jsonl")] == [" <think>hm</think>0\n"] * 3
    assert {row["sample"] for row in read("d/answers.jsonl")} == {0, 1, 2}
    body = server.asked[0].body
    assert body["messages"] == [{"role": "system", "content": "Count."},
                                {"role": "user", "content": "How many, 0?"}]  # fmt: skip
    assert (body["temperature"], body["max_tokens"], len(server.asked)) == (0.6, 99, 3)


def test_what_failed_is_told_and_asked_again(capsys):
    write("d/questions.jsonl", asked_for(6))
    with ChatServer(lambda n, body: Reply(400) if number_in(body) in (2, 4) else right(n, body)
                    ) as server:
        told = refused(["query", "--base_url", server.url, "--teacher", "R1"])
    assert "2 of 6 questions got no answer; the same command asks them again" in told
    assert "q2 (0)" in told and "q4 (0)" in told
    assert {row["id"] for row in read("d/answers.jsonl")} == {"q0", "q1", "q3", "q5"}
    with ChatServer(right) as server:
        query(server)
        assert {number_in(asked.body) for asked in server.asked} == {2, 4}
        assert len(server.asked) == 2
        query(server)
        query(server, "--n", "2")
        assert len(server.asked) == 2 + 6
    pairs = [(row["id"], row["sample"]) for row in read("d/answers.jsonl")]
    assert sorted(pairs) == sorted((f"q{i}", k) for i in range(6) for k in range(2))


def test_a_killed_run_goes_on_with_what_is_missing():
    """kill -9 in the middle, with a line half written; no answer is asked for twice but those that
    were under way."""
    write("d/questions.jsonl", asked_for(40))
    out = Path("d/answers.jsonl")
    with ChatServer(right, delay=0.1) as server:
        argv = ["query", "--base_url", server.url, "--teacher", "R1", "--concurrency", "2"]
        process = multiprocessing.get_context("fork").Process(target=main, args=[argv])
        process.start()
        begin = time.monotonic()
        while not out.exists() or out.read_bytes().count(b"\n") < 3:
            assert process.is_alive() and time.monotonic() - begin < 60
            time.sleep(0.01)
        process.kill()
        process.join()
        time.sleep(0.15)
        there = out.read_bytes()
        kept = there.count(b"\n")
        out.write_bytes(there[:-20])
        server.delay, before = 0, len(server.asked)
        assert kept - 1 < 40 and before <= kept + 2
        main(argv)
        assert len(server.asked) - before == 40 - (kept - 1)
    assert sorted(row["id"] for row in read(out)) == sorted(row["id"] for row in asked_for(40))


def test_ctrl_c_leaves_by_130_with_every_answer_on_disk(interruptible, capsys):  # noqa: F811
    write("d/questions.jsonl", asked_for(9))
    stop = threading.Event()

    def stuck(n, body):
        if n == 4:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        if n >= 4:
            stop.wait(5)
        return right(n, body)

    with ChatServer(stuck) as server:
        with pytest.raises(SystemExit) as left:
            query(server, "--concurrency", "1")
        stop.set()
    assert left.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [row["id"] for row in read("d/answers.jsonl")] == ["q0", "q1", "q2", "q3"]


def test_a_wrong_key_address_or_model_stops_at_once():
    write("d/questions.jsonl", asked_for(100))
    with ChatServer(lambda n, body: Reply(401, {"error": {"message": f"bad key {KEY}"}})) as server:
        told = refused(["query", "--base_url", server.url, "--concurrency", "2"])
    assert "refuses the key" in told and KEY not in told and len(server.asked) <= 2
    assert "cannot be reached" in refused(["query", "--base_url", server.url])


def test_the_key_is_in_no_file_and_no_message(folder, capfd):
    """The server repeats it in an error; a debug log of the package is on."""
    write("d/questions.jsonl", asked_for(4))
    def rude(n, body):
        return Reply(400, {"error": {"message": KEY}}) if n % 2 else right(n, body)

    with ChatServer(rude) as server:
        told = refused(["query", "--base_url", server.url])
    out = capfd.readouterr()
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert server.asked[0].key == KEY and len(written) == 2
    assert KEY not in told + out.out + out.err and "[key]" in told
    assert not any(KEY.encode() in content for content in written)


def test_another_key_can_be_named(monkeypatch, capsys):
    write("d/questions.jsonl", asked_for(1))
    assert "OTHER_KEY holds no key" in refused(["query", "--key_env", "OTHER_KEY"])
    monkeypatch.setenv("OTHER_KEY", "another-key")
    with ChatServer(right) as server:
        query(server, "--key_env", "OTHER_KEY")
    assert server.asked[0].key == "another-key"


@pytest.mark.parametrize(("content", "told"), [
    ([], "no rows"), ([{"problem": "a"}], "d/questions.jsonl:1: has no text under 'id'"),
    ([{"id": "a", "problem": "", "solution": ""}], "no text under 'description'"),
    (asked_for(1) * 2, "two rows are called q0"),
])  # fmt: skip
def test_questions_that_cannot_be_asked_are_named(content, told):
    write("d/questions.jsonl", content)
    assert told in refused(["query"])


def test_a_template_that_asks_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["query", "--template", "v3"])
    assert "template 'v3': neither a text with {Question}" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- sample


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), width=32, layers=1, depth=1))


def sample(checkpoint, *argv):
    main(["sample", "--teacher", checkpoint, "--max_new", "12", *argv])


def test_samples_are_the_same_after_a_restart(checkpoint):
    """Half of a file is taken away, a line cut; other batches, and n raised: the same answers."""
    main(["describe", "--world", "world:A:n=5"])
    sample(checkpoint, "--n", "3", "--batch", "4")
    whole = read("d/answers.jsonl")
    ids = [row["id"] for row in read("d/questions.jsonl")]
    assert [(row["id"], row["sample"]) for row in whole] == [(i, k) for i in ids for k in range(3)]
    assert len({row["text"] for row in whole}) > 20  # samples, not one answer
    text = Path("d/answers.jsonl").read_bytes().splitlines(keepends=True)
    Path("d/answers.jsonl").write_bytes(b"".join(text[:13]) + text[13][:-9])
    sample(checkpoint, "--n", "3", "--batch", "3")
    key = lambda row: (row["id"], row["sample"])  # noqa: E731
    assert sorted(read("d/answers.jsonl"), key=key) == sorted(whole, key=key)
    sample(checkpoint, "--n", "2", "--out", "d/raised.jsonl")
    sample(checkpoint, "--n", "3", "--out", "d/raised.jsonl")
    assert sorted(read("d/raised.jsonl"), key=key) == sorted(whole, key=key)
    sample(checkpoint, "--n", "3", "--seed", "1", "--out", "d/other.jsonl")
    assert [row["text"] for row in read("d/other.jsonl")] != [row["text"] for row in whole]


def test_samples_are_about_the_image(checkpoint):
    main(["describe", "--world", "world:A:n=2"])
    sample(checkpoint, "--n", "1", "--limit", "3")
    asked, found = read("d/questions.jsonl"), read("d/answers.jsonl")
    assert len(found) == 3
    for question, row in zip(asked, found):
        assert "in the described scene" in question["problem"]
        assert row["problem"] == question["problem"].replace("in the described scene",
                                                             "in the image")  # fmt: skip
        assert row["image"] == question["image"] and "description" not in row
        assert row["finish"] == ("stop" if row["tokens"] < 12 else "length")
    plain = [{key: row[key] for key in ("problem", "solution", "image")} for row in found]
    write("d/plain.jsonl", plain)  # the same questions, never described
    sample(checkpoint, "--n", "1", "--data", "d/plain.jsonl", "--out", "d/again.jsonl")
    assert [row["text"] for row in read("d/again.jsonl")] == [row["text"] for row in found]


def test_any_rows_can_be_sampled(checkpoint, folder):
    """A world, whose pictures are no files; rows of a .jsonl elsewhere, whose pictures are."""
    sample(checkpoint, "--data", "world:A:n=3", "--n", "1")
    examples = load_examples("world:A:n=3")
    for row, example in zip(read("d/answers.jsonl"), examples):
        assert (row["id"], row["problem"]) == (example.row, example.problem)
        assert np.array_equal(open_image(f"d/{row['image']}"), example.images[0])
    (folder / "elsewhere").mkdir()
    Image.fromarray(picture(0, 56, 56)).save("elsewhere/a.png")
    write("elsewhere/x.jsonl", [{"problem": "How?", "solution": 3, "image": "a.png"}])
    sample(checkpoint, "--data", "elsewhere/x.jsonl", "--out", "e/answers.jsonl", "--n", "1")
    (row,) = read("e/answers.jsonl")
    assert (row["id"], row["solution"]) == ("x.jsonl:1", "3")
    assert np.array_equal(open_image(f"e/{row['image']}"), picture(0, 56, 56))


def test_rows_with_several_pictures_or_none_are_sampled(checkpoint):
    for i in range(2):
        Image.fromarray(picture(i, 56, 56)).save(f"{i}.png")
    rows = [{"problem": "How?", "solution": "3", "images": ["0.png", "1.png"]},
            {"problem": "2 + 2?", "solution": "4", "system": "Count."}]  # fmt: skip
    write("x.jsonl", rows)
    sample(checkpoint, "--data", "x.jsonl", "--out", "e/a.jsonl", "--n", "1")
    several, none = read("e/a.jsonl")
    assert several["images"] == [f"images/a/000000_x.jsonl_1_{i}.png" for i in range(2)]
    for i, name in enumerate(several["images"]):
        assert np.array_equal(open_image(f"e/{name}"), picture(i, 56, 56))
    assert not {"image", "images"} & none.keys() and none["solution"] == "4"


def test_two_rows_of_one_name_are_refused(checkpoint):
    write("x.jsonl", [{"problem": "How?", "solution": "3", "id": "same"}] * 2)
    argv = ["sample", "--teacher", checkpoint, "--data", "x.jsonl"]
    assert "two rows have the same id" in refused(argv)


# ------------------------------------------------------------------------------------------ verify


def answers() -> list[dict]:
    """Question 2 has answers of every kind, 10 a good one, 3 none."""
    texts = {
        2: ["<think>a</think>2", "<think>b</think>3", "no", "<think> a </think> So 2",
            "<think>c</think>2", "<think>d</think>2"],
        10: ["<think>a</think>10"], 3: ["<think>a</think>?"],
    }  # fmt: skip
    return [{"id": f"q{i}", "image": f"{i}.png", "problem": "How many?", "solution": str(i),
             "sample": k, "text": text} for i in texts for k, text in enumerate(texts[i])
            ]  # fmt: skip


@pytest.mark.parametrize(("keep", "kept", "more"), [
    ("1", ["a", "a"], 2), ("2", ["a", "c", "a"], 1), ("none", ["a", "c", "d", "a"], 0),
])  # fmt: skip
def test_answers_are_sorted_into_those_that_hold_and_the_rest(keep, kept, more, capsys):
    write("d/answers.jsonl", answers())
    counts = main(["verify", "--keep", keep])
    found, rest = read("d/verified.jsonl"), read("d/verified_rejected.jsonl")
    assert [row["text"][7] for row in found] == kept
    assert [row["id"] for row in found] == ["q2"] * (len(kept) - 1) + ["q10"]
    assert all(row["stated"] == row["solution"] and "reason" not in row for row in found)
    assert len(found) + len(rest) == 8
    due = {None: len(kept), "wrong answer": 1, "no thought": 1, "no answer": 1}
    due["thought before"] = 1
    assert counts == due | ({"more than --keep": more} if more else {})
    wrong = next(row for row in rest if row["reason"] == "wrong answer")
    assert (wrong["stated"], wrong["sample"]) == ("3", 1)
    told = capsys.readouterr().out
    assert f"{len(kept)} of 8 answers hold ({len(kept) / 8:.1%}), for 2 of 3 questions" in told
    assert "1  wrong answer" in told


def test_the_order_in_which_answers_came_does_not_matter():
    write("d/answers.jsonl", answers())
    main(["verify"])
    first = [Path(name).read_bytes() for name in ("d/verified.jsonl", "d/verified_rejected.jsonl")]
    for seed in range(3):
        shuffled = answers()
        random.Random(seed).shuffle(shuffled)
        write("d/answers.jsonl", shuffled)
        main(["verify"])
        assert first == [Path(name).read_bytes() for name in ("d/verified.jsonl",
                                                              "d/verified_rejected.jsonl")]


def test_answers_that_cannot_be_read_are_named_and_nothing_is_written():
    write("d/answers.jsonl", [*answers(), {"id": "x"}])
    assert "answers.jsonl:9: has no text under 'problem'" in refused(["verify"])
    write("d/answers.jsonl", [])
    assert "no answers" in refused(["verify"])
    assert "No such file" in refused(["verify", "--data", "nowhere.jsonl"])
    write("d/answers.jsonl", answers())
    for data in ("d/x.jsonl", "d/x_rejected.jsonl"):
        write(data, answers())
        assert "would be overwritten" in refused(["verify", "--data", data, "--out", "d/x.jsonl"])
        assert read(data) == answers()
        Path(data).unlink()
    assert sorted(path.name for path in Path("d").iterdir()) == ["answers.jsonl"]


def test_rewards_can_say_what_holds(capsys):
    """Each of them must be at least --least; boxes are read in the frames that were spoken. A
    direct answer may hold, too, and is learnt to the letter."""
    box = {"id": "b", "problem": "Where?", "solution": "[10, 10, 50, 50]", "image": "0.png",
           "view": ["0-1000", "pixels", [[100, 200, 100, 200]]]}  # fmt: skip
    said = {"a": "<think>hm</think><answer>1/2</answer>", "b": "<answer>0.5</answer>",
            "c": "<think>hm</think><answer>0.6</answer>"}  # fmt: skip
    rows = [{"id": "m", "sample": k, "problem": "2x = 1?", "solution": "0.5", "text": text}
            for k, text in enumerate(said.values())]  # fmt: skip
    rows.append({**rows[0], "sample": 3, "finish": "length"})
    write("d/answers.jsonl", rows)
    counts = main(["verify", "--rewards", "math,gate(format,math)", "--keep", "none"])
    assert counts == {None: 1, "a reward below 1": 2, "cut off (length)": 1}
    counts = main(["verify", "--rewards", "math", "--keep", "none"])
    assert counts[None] == 2 and [row["stated"] for row in read("d/verified.jsonl")] == ["1/2",
                                                                                         "0.5"]
    main(["pack", "--learn", "text"])
    assert [row["completion"] for row in read("d/sft/rows.jsonl")] == [said["a"], said["b"]]
    write("d/answers.jsonl", [
        {**box, "sample": 0, "text": "<answer>[50, 100, 250, 500]</answer>"},  # thousandths
        {**box, "sample": 1, "text": "<answer>[10, 10, 50, 50]</answer>"},
        {**box, "sample": 2, "text": "<answer>[70, 100, 250, 500]</answer>"},  # IoU .9
        {**box, "sample": 3, "text": "<answer>[1, 2, 3, 4]</answer>", "solution": "a box"}])
    counts = main(["verify", "--rewards", "iou", "--least", "0.5", "--keep", "none"])
    assert [row["sample"] for row in read("d/verified.jsonl")] == [0, 2]
    assert counts["a solution that the rewards cannot read"] == 1
    assert "reward rigth" in refused(["verify", "--rewards", "rigth"])
    with pytest.raises(SystemExit):
        main(["verify", "--least", "0.5"])
    assert "least 0.5: is of --rewards, and none is given" in capsys.readouterr().err


def test_a_sampled_row_says_how_its_boxes_are_to_be_read(checkpoint):
    Image.fromarray(picture(0, 56, 112)).save("a.png")
    write("x.jsonl", [{"problem": "Where?", "solution": [1, 2, 30, 40], "image": "a.png",
                       "task": "detection"}])  # fmt: skip
    sample(checkpoint, "--data", "x.jsonl", "--out", "x/a.jsonl", "--n", "1")
    (row,) = read("x/a.jsonl")
    assert row["view"] == ["0-1000", "pixels", [[56, 112, 56, 112]]]
    assert (row["task"], row["solution"]) == ("detection", "[1, 2, 30, 40]")


def test_a_world_of_texts_has_no_scene_to_describe():
    told = refused(["describe", "--world", "world:A:n=2:ask=read"])
    assert "world:A:n=2:ask=read: " in told and "has no picture to describe" in told


def test_pictures_follow_the_answers_from_folder_to_folder(checkpoint):
    """As a recipe of stages has them: each step in a folder of its own, each of which is whole."""
    main(["describe", "--world", "world:A:n=1", "--out", "1/questions.jsonl"])
    def teacher(n, body):
        count = body["messages"][0]["content"].count("located at")
        return {"reasoning_content": "I count.", "content": f"**The answer is: ** {count}"}

    with ChatServer(teacher) as server:
        query(server, "--data", "1/questions.jsonl", "--out", "2/rows.jsonl")
    main(["verify", "--data", "2/rows.jsonl", "--out", "3/rows.jsonl"])
    main(["pack", "--data", "3/rows.jsonl", "--out", "4/set"])
    first, (last, *_) = read("1/questions.jsonl")[0], load_examples("4/set/rows.jsonl")
    assert np.array_equal(open_image(last.images[0]), open_image(f"1/{first['image']}"))


def test_names_are_sorted_as_people_do():
    names = ["a10#2", "a9#all", "a9#10", "a9#9", "b", "7", "²"]
    assert sorted(names, key=natural) == ["7", "a9#9", "a9#10", "a9#all", "a10#2", "b", "²"]


# ------------------------------------------------------------------------------- all steps, main


def test_from_a_world_to_a_set_that_loads(capsys):
    """A teacher that reads the description counts right, but for every third question."""
    def teacher(n, body):
        text = body["messages"][0]["content"]
        things = text.count("located at")
        wrong = int(text.split("3D coordinates (")[1][0] == "-")  # of some scenes, always the same
        thought = f"The scene description lists {things} things."
        return {"reasoning_content": thought, "content": f"**The answer is: ** {things + wrong}"}

    main(["describe", "--world", "world:A:n=30"])
    with ChatServer(teacher) as server:
        query(server)
    counts = main(["verify"])
    main(["pack"])
    asked = {row["id"]: row for row in read("d/questions.jsonl")}
    assert sum(counts.values()) == len(asked) == 60
    assert 10 < counts[None] < 50 and counts["wrong answer"] == 60 - counts[None]
    for source in ("d/sft", "d/sft/rows.jsonl"):
        examples = load_examples(source)
        assert len(examples) == counts[None]
        for row, example in zip(read("d/verified.jsonl"), examples):
            question = asked[row["id"]]
            count = question["description"].count("located at")
            assert example.solution == f"<answer> {count} </answer>"
            assert example.extra["thinking"] == f"<think>The image lists {count} things.</think>"
            assert "in the image?" in example.problem
            assert format(f"{example.extra['thinking']} {example.solution}", None) == 1
            shown = open_image(example.images[0])
            assert np.array_equal(shown, open_image(f"d/{question['image']}"))


def test_an_out_that_is_an_input_a_folder_or_below_a_file_is_refused(checkpoint, folder):
    """Before any work: no server, no checkpoint and no other file is looked for."""
    scenes, questions = clevr(folder)
    write("q.jsonl", asked_for(1))
    asked = ["--data", "q.jsonl"]
    steps = {"describe": (["--scenes", scenes, "--questions", questions], questions),
             "query": (asked, "q.jsonl"), "sample": ([*asked, "--teacher", "nowhere"], "q.jsonl"),
             "verify": (asked, "q.jsonl")}  # fmt: skip
    Path("f").mkdir()
    Path("v_rejected.jsonl").mkdir()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for step, (argv, taken) in steps.items():
        for out, why in ((taken, "would be overwritten; give another --out"), ("f", "is a folder"),
                         ("q.jsonl/x/y.jsonl", "q.jsonl is a file, not a folder")):  # fmt: skip
            told = refused([step, *argv, "--out", out])
            assert told.startswith(f"error: --out {out}: ") and why in told
    assert "scenes.json would be" in refused(["describe", *steps["describe"][0], "--out", scenes])
    assert "v_rejected.jsonl: is a f" in refused(["verify", *asked, "--out", "v.jsonl"])
    assert "--out q.jsonl/x/rows.jsonl: q.jsonl is a file" in refused(["pack", *asked, "--out",
                                                                       "q.jsonl/x"])  # fmt: skip
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_make_hands_its_variables_to_a_step():
    words = ["make", "-n", "--no-print-directory", "distill", "VENV=", "PYTHON=py", "STEP=sample"]
    given = {"MODEL=a b": '--teacher "a b"', "DATA=x": '--data "x"', "IMAGES=i": '--images "i"'}
    for some in ([], list(given)):
        done = subprocess.run([*words, *some, "ARGS=--n 2"], cwd=ROOT, capture_output=True,
                              text=True, check=True)  # fmt: skip
        due = ["py distill.py sample", *(given[word] for word in some), "--n 2"]
        assert " ".join(done.stdout.split()) == " ".join(due)


def test_steps_are_named_and_helped(capsys):
    with pytest.raises(SystemExit) as error:
        main(["verfy"])
    assert str(error.value).startswith("error: verfy: no step of distillation; did you mean verify")
    for argv, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == code
        assert "python distill.py describe --world" in capsys.readouterr().out
    for step in distill.STEPS:
        with pytest.raises(SystemExit) as error:
            main([step, "--help"])
        out = capsys.readouterr().out
        assert error.value.code == 0 and f"distill.py {step}: " in out and "  --out  str" in out
