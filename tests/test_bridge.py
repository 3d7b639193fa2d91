"""asking.py and bridge.py, chapter two: who was asked what, and the sets that come of it."""

import base64
import json
import multiprocessing
import re
import time
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer, Reply
from PIL import Image
from test_chat import no_proxy  # noqa: F401
from test_distill import folder, read, refused, write  # noqa: F401
from tiny_checkpoint import make_checkpoint, picture

import asking
import letters
import pack
import sft
from asking import named
from bridge import OPENINGS
from data import Processor
from distill import main
from images import open_image
from model import Qwen2VL
from rows import load_examples
from teachers import Reasons, check_key


def questions(n: int, size: int = 56) -> list[dict]:
    """n questions about pictures of their own, answered by 0, 1, 2, …"""
    Path("d").mkdir(exist_ok=True)
    for i in range(n):
        Image.fromarray(picture(i, size, size)).save(f"d/{i}.png")
    rows = [{"id": f"q{i}", "image": f"{i}.png", "problem": f"How many, {i}?", "solution": str(i)}
            for i in range(n)]  # fmt: skip
    write("d/questions.jsonl", rows)
    return rows


class Teachers:
    """Two servers: the eye, who must be shown pictures, and the reasoner, who must not. What they
    say is by the beginning of a prompt; `asked` has (who, prompt, places of the pictures)."""

    def __init__(self, eye: dict, reasoner: dict, delay: float = 0.0):
        self.asked = []
        self.servers = [ChatServer(self.speaker("eye", eye), delay),
                        ChatServer(self.speaker("reasoner", reasoner), delay)]  # fmt: skip

    def speaker(self, who: str, sayings: dict):
        def answer(n, body):
            content = body["messages"][0]["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = parts[-1]["text"]
            shown = [self.place(part["image_url"]["url"]) for part in parts[:-1]]
            self.asked.append((who, text, shown, body))
            said = next(said for begin, said in sayings.items() if begin in text)
            return said(int(re.search(r"How many, (\d+)", text)[1])) if callable(said) else said

        return answer

    def place(self, url: str) -> int:
        """Which of the pictures a data URL is."""
        pixels = open_image(base64.b64decode(url.partition(";base64,")[2]))
        return next(i for i in range(50) if np.array_equal(pixels, picture(i, *pixels.shape[:2])))

    def __enter__(self):
        for server in self.servers:
            server.__enter__()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.__exit__()

    @property
    def words(self) -> list[str]:
        eye, reasoner = (server.url for server in self.servers)
        return ["--teacher", f"eye@{eye}", "--reasoner", f"r1@{reasoner}"]

    def of(self, who: str) -> list[str]:
        return [text for name, text, *_ in self.asked if name == who]


def learn(checkpoint: str, rows: int):
    """Two steps of supervised training on the set d/sft of so many rows."""
    cfg = sft.Config(steps=2, batch=2)
    processor, examples = Processor.from_pretrained(checkpoint), load_examples("d/sft")
    done = list(sft.fit(Qwen2VL.from_pretrained(checkpoint), processor, examples, cfg))
    assert len(examples) == rows and [row["step"] for row in done] == [1, 2]
    assert all(np.isfinite(row["nll"]) and row["grad_norm"] > 0 for row in done)


def pack_and_learn(checkpoint: str):
    """The same of what a step has made, verified and packed."""
    main(["verify"])
    main(["pack", "--data", "d/verified.jsonl"])
    learn(checkpoint, len(read("d/verified.jsonl")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), width=32, layers=1, depth=1))


# ------------------------------------------------------------------------------------ Vision-R1


EYE = {"Look at the picture. First": lambda i: f"<caption>{i} cubes</caption> So {i}.",
       "A first attempt": lambda i: f"<think>hm</think>There are {i} cubes."}  # fmt: skip


def thinks(i: int) -> dict:
    wrong = i == 2
    return {"reasoning_content": f"Wait, the description says {i}. Hmm, wait.",
            "content": f"<answer>{i + wrong}</answer>"}  # fmt: skip


def test_what_is_seen_is_bridged_to_who_only_reads(checkpoint, capsys):
    """Vision-R1: pseudo thoughts, a description, and reasoning from that alone; the right ones are
    kept, and speak of an image."""
    rows = questions(3)
    with Teachers(EYE, {"The image, in words": thinks}) as teachers:
        main(["bridge", *teachers.words, "--n", "2"])
    assert len(teachers.asked) == 3 + 3 + 6  # described once, reasoned about twice
    for who, text, shown, _ in teachers.asked:
        i = int(re.search(r"How many, (\d+)", text)[1])
        assert shown == ([i] if who == "eye" else [])
    first, second = teachers.of("eye")[:3], teachers.of("eye")[3:]
    assert all(text.startswith("How many, ") and "Look at the picture" in text for text in first)
    assert all(f"<caption>{text[20]} cubes</caption> So {text[20]}." in text for text in second)
    for text in teachers.of("reasoner"):
        i = re.search(r"How many, (\d+)", text)[1]
        assert text.startswith(f"The image, in words:\nThere are {i} cubes.\n\nQuestion: ")
        assert "caption" not in text and "<think>" not in text  # not what was thought on the way
    found = read("d/answers.jsonl")
    due = [(f"q{i // 2}", i % 2) for i in range(6)]
    assert [(row["id"], row["sample"]) for row in found] == due
    for row in found:
        i = int(row["id"][1])
        assert {key: row[key] for key in rows[i]} == rows[i]
        assert (row["description"], row["teacher"]) == (f"There are {i} cubes.", "r1")
    capsys.readouterr()
    pack_and_learn(checkpoint)
    assert [row["id"] for row in read("d/verified.jsonl")] == ["q0", "q1"]
    out = capsys.readouterr().out
    assert "reflection in a kept thought: wait 2.00, hmm 1.00; 100.0% of them have one" in out
    learnt = read("d/sft/rows.jsonl")[1]
    assert learnt == {"image": "images/1.png", "problem": "How many, 1?",
                      "thinking": "<think>Wait, the image says 1. Hmm, wait.</think>",
                      "solution": "<answer> 1 </answer>"}  # fmt: skip


def test_a_killed_chain_goes_on_with_what_is_missing():
    """kill -9 while the descriptions are written; nothing that is on disk is asked for again."""
    questions(12)
    slow = {"Look at": "So.", "A first": lambda i: time.sleep(0.05) or f"{i} cubes"}
    with Teachers(slow, {"The image, in words": thinks}) as teachers:
        argv = ["bridge", *teachers.words, "--concurrency", "2"]
        process = multiprocessing.get_context("fork").Process(target=main, args=[argv])
        process.start()
        path = Path("d/answers_description.jsonl")
        begin = time.monotonic()
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            assert process.is_alive() and time.monotonic() - begin < 60
            time.sleep(0.005)
        process.kill()
        process.join()
        assert not Path("d/answers.jsonl").exists()
        path.write_bytes(path.read_bytes()[:-9])
        kept, before = path.read_bytes().count(b"\n"), len(teachers.asked)
        main(argv)
        assert 2 <= kept < 12 and before <= 12 + kept + 4
        asked = teachers.asked[before:]
        assert [who for who, *_ in asked].count("reasoner") == 12
        assert len(asked) - 12 <= 12 - kept + 2  # no pseudo thought, and no description twice
        assert not any("Look at the picture. First" in text for _, text, *_ in asked)
        main(argv)
        assert len(teachers.asked) == before + len(asked)
    assert [row["id"] for row in read("d/answers.jsonl")] == [f"q{i}" for i in range(12)]


def test_a_question_without_an_answer_is_told_and_the_others_go_on():
    questions(3)
    refusing = dict(EYE, **{"A first": lambda i: Reply(400) if i == 1 else f"{i} cubes"})
    refusing = {key: refusing[key] for key in ("A first", *refusing)}
    with Teachers(refusing, {"The image, in words": thinks}) as teachers:
        told = refused(["bridge", *teachers.words])
        assert "1 of 8 questions got no answer; the same command asks them again" in told
        assert "q1 (description 0): " in told
        assert [row["id"] for row in read("d/answers.jsonl")] == ["q0", "q2"]
    with Teachers(EYE, {"The image, in words": thinks}) as teachers:
        main(["bridge", *teachers.words])
        assert [who for who, *_ in teachers.asked] == ["eye", "reasoner"]
    assert [row["id"] for row in read("d/answers.jsonl")] == ["q0", "q1", "q2"]


def test_from_an_empty_description_nobody_reasons():
    """The eye's thoughts took all of its tokens, say: what is right all the same was a guess."""
    questions(2)
    thought = {"reasoning_content": "hm", "content": " ", "finish": "length"}
    eye = dict(EYE, **{"A first attempt": lambda i: thought if i == 0 else "1 cube"})
    with Teachers(eye, {"The image, in words": thinks}) as teachers:
        for _ in range(2):
            counts = main(["bridge", *teachers.words])
            assert counts == {None: 1, "empty description": 1}
        assert len(teachers.asked) == 2 + 2 + 1 and "How many, 1?" in teachers.of("reasoner")[0]
    (row,) = read("d/answers_rejected.jsonl")
    assert (row["id"], row["reason"]) == ("q0", "empty description")


def test_columns_of_other_meanings_are_no_answers():
    """"sample" that is no number, "text" that is none; an id may be 0."""
    rows = [{**row, "id": i, "sample": ["x"], "text": i} for i, row in enumerate(questions(2))]
    write("d/questions.jsonl", rows)
    with Teachers(EYE, {"The image, in words": thinks}) as teachers:
        main(["bridge", *teachers.words])
        assert [(row["id"], row["sample"]) for row in read("d/answers.jsonl")] == [
            ("0", 0), ("1", 0)]  # fmt: skip
        counts = main(["judge", "--teacher", teachers.words[1], "--data", "d/questions.jsonl"])
        assert counts == {"no answer to judge": 2} and len(teachers.asked) == 6


def test_a_server_that_refuses_the_key_stops_at_once():
    questions(9)
    with ChatServer(lambda n, body: Reply(401)) as server:
        told = refused(["bridge", "--teacher", f"e@{server.url}", "--concurrency", "2"])
    assert "model e: the server refuses the key" in told and len(server.asked) <= 2
    assert "cannot be reached" in refused(["bridge", "--teacher", f"e@{server.url}"])
    assert not Path("d/answers.jsonl").exists()


def test_answers_of_others_and_to_other_prompts_are_refused(monkeypatch):
    questions(1)
    with Teachers(EYE, {"The image, in words": thinks}) as teachers:
        main(["bridge", *teachers.words])
        asked = len(teachers.asked)
        words = [word.replace("eye@", "another@") for word in teachers.words]
        assert "answers of the teacher eye, not another" in refused(["bridge", *words])
        rows = read("d/answers_pseudo.jsonl")
        write("d/answers_pseudo.jsonl", [{**rows[0], "text": "changed by hand"}])
        told = refused(["bridge", *teachers.words])
        assert "answers_description.jsonl holds an answer for q0 to another prompt" in told
        assert len(teachers.asked) == asked


def test_other_words_are_refused_before_anything_is_asked():
    """One answer is missing; under another opening it would be mixed with those that are there."""
    questions(2)
    some = {"The image, in words": lambda i: Reply(400) if i == 1 else thinks(i)}
    with Teachers(EYE, some) as teachers:
        assert "1 of 6 questions" in refused(["bridge", *teachers.words])
        asked, kept = len(teachers.asked), Path("d/answers_text.jsonl").read_bytes()
        told = refused(["bridge", *teachers.words, "--opening", "<think>"])
        assert "answers_text.jsonl holds an answer for q0 to another prompt" in told
        assert len(teachers.asked) == asked and Path("d/answers_text.jsonl").read_bytes() == kept


@pytest.mark.parametrize("more", [["--temperature", ".5"], ["--max_new", "9"]])
def test_answers_given_in_another_way_are_not_mixed_with_new_ones(more):
    questions(2)
    with Teachers(EYE, {"The image, in words": thinks}) as teachers:
        main(["bridge", *teachers.words])
        asked = len(teachers.asked)
        told = refused(["bridge", *teachers.words, *more])
        assert "or of another temperature, max_new or seed" in told and len(teachers.asked) == asked
        main(["bridge", *teachers.words, "--seed", "1"])  # of which a server is told nothing


def test_no_machine_is_sent_the_key_of_another(monkeypatch):
    """Refused before a row is read. Two servers of one machine share a key, as long as none is
    named."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    words = ["bridge", "--teacher", "a@https://one.example/v1", "--reasoner"]
    told = refused([*words, "b@http://two.example:8000/v1"])
    assert "two.example is not sent the key of one.example" in told
    assert "--reasoner_key_env, or OPENAI_API_KEY again" in told
    for name, own in (("b@https://one.example:1/v1", None), ("b@http://two.example/v1", "MINE"),
                      ("runs/b", None)):  # fmt: skip
        check_key(Reasons(teacher="a@https://one.example/v1", reasoner=name, reasoner_key_env=own))
    check_key(Reasons(teacher="runs/a", reasoner="b@http://two.example/v1"))


@pytest.mark.parametrize("out, field", [
    ("d/answers.jsonl", "d/answers_text.jsonl"), ("d/v1.2", "d/v1.2_text.jsonl"),
    ("d/v1.3", "d/v1.3_text.jsonl"), ("a.b/c.d.jsonl", "a.b/c.d_text.jsonl"),
])  # fmt: skip
def test_what_stands_beside_a_file_has_its_whole_name(out, field):
    assert named(out, "text") == field
    image = Image.fromarray(picture(0, 28, 28))
    assert pack.picture(image, "a", Path(out)) == f"images/{Path(field).stem[:-5]}/a.png"


def test_a_text_in_a_place_opens_no_other_place():
    questions(1)
    write("d/questions.jsonl", [{"id": "a", "problem": "How many, 7? {pseudo} {answer} {x}",
                                 "solution": "42", "image": "0.png"}])  # fmt: skip
    with Teachers(EYE, {"The image, in words": thinks}) as teachers:
        main(["bridge", *teachers.words])
    assert all("How many, 7? {pseudo} {answer} {x}" in text for _, text, *_ in teachers.asked)
    assert not any("42" in text for _, text, *_ in teachers.asked)


def test_a_checkpoint_can_be_both(checkpoint):
    """It is sampled in batches; the reasoner's prompts hold no picture, and its answers open as
    they are told to. Batches and restarts change nothing."""
    questions(3)
    words = ["bridge", "--teacher", checkpoint, "--max_new", "5", "--n", "2", "--opening",
             "<think>", "--max_pixels", "3136"]  # fmt: skip
    main([*words, "--batch", "2"])
    found = read("d/answers.jsonl")
    assert len(found) == 6 and {row["teacher"] for row in found} == {checkpoint}
    assert all(row["text"].startswith("<think>") for row in found)
    assert len({row["text"] for row in found}) == 6
    described = Path("d/answers_description.jsonl").read_bytes()
    lines = Path("d/answers_text.jsonl").read_bytes().splitlines(keepends=True)
    Path("d/answers_text.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:-5])
    main([*words, "--batch", "5"])
    assert read("d/answers.jsonl") == found
    assert Path("d/answers_description.jsonl").read_bytes() == described


def test_a_checkpoint_that_reasons_does_not_see(checkpoint):
    """Other pictures under the same questions: an eye says something else, a reasoner that is told
    the same does not."""
    said = {}
    for i in range(2):
        rows = questions(2)
        Image.fromarray(picture(7, 56, 56)).save("d/7.png")
        write("d/questions.jsonl", [{**row, "image": "7.png"} for row in rows] if i else rows)
        words = ["--max_new", "8", "--out", f"d/{i}.jsonl", "--reasoner", checkpoint]
        with ChatServer(lambda n, body: "A cube.") as server:
            main(["caption", *words, "--teacher", f"e@{server.url}"])
        main(["caption", *words[:2], "--out", f"d/seen{i}.jsonl", "--teacher", checkpoint])
        said[i] = [[row["text"] for row in read(f"d/{name}.jsonl")]
                   for name in (f"{i}_text", f"seen{i}_caption")]  # fmt: skip
    assert said[0][0] == said[1][0]
    assert said[0][1] != said[1][1]
    begin = OPENINGS["en"].replace("{caption}", "A cube.")
    assert all(text.startswith(begin) and len(text) > len(begin) for text in said[0][0])


# -------------------------------------------------------------------------------- R1-Onevision


def test_a_formal_description_is_looked_at_again_and_judged(checkpoint):
    """Five asks; what the eye calls inconsistent is left out, with its reason."""
    rows = questions(4)
    eye = {"Translate the picture into formal": lambda i: f'{{"cubes": {i}}}',
           "Look at the picture again": lambda i: f"One cube was missed, so {i}.",
           "Does every step": lambda i: ["So. Consistent: yes", "**Consistent:** no", "Good.",
                                         "Consistent: no? No: Consistent: yes."][i]}  # fmt: skip
    def reasoner(i):
        return {"reasoning_content": f"first {i}", "content": f"<answer>{i}</answer>"}

    again = {"Then you looked": lambda i: {"reasoning_content": f"The description has {i}.",
                                           "content": f"<answer>{i}</answer>"},
             "The image, in words": reasoner}  # fmt: skip
    with Teachers(eye, again) as teachers:
        main(["formal", *teachers.words])
    assert [len(teachers.of(who)) for who in ("eye", "reasoner")] == [12, 8]
    assert all(bool(shown) == (who == "eye") for who, _, shown, _ in teachers.asked)
    look = next(text for text in teachers.of("eye") if "again" in text and "many, 0" in text)
    assert '{"cubes": 0}' in look and "<think>\nfirst 0\n</think>" in look
    last = next(text for text in teachers.of("reasoner") if "Then" in text and "many, 0" in text)
    assert "One cube was missed, so 0." in last and "first 0" in last
    judge = next(text for text in teachers.of("eye") if "Does every" in text and "many, 0" in text)
    assert "The description has 0." in judge and "True answer: 0" in judge
    assert [row["id"] for row in read("d/answers.jsonl")] == ["q0", "q3"]
    why = {row["id"]: row["reason"] for row in read("d/answers_rejected.jsonl")}
    assert why == {"q1": "inconsistent", "q2": "no verdict"}
    assert read("d/answers.jsonl")[0]["image"] == rows[0]["image"]
    pack_and_learn(checkpoint)
    assert read("d/sft/rows.jsonl")[0]["thinking"] == "<think>The image has 0.</think>"


# ------------------------------------------------------------------------------------ R1-Vision


def test_the_openings_are_r1_visions():
    assert OPENINGS["en"] == ("<think>\nHmm, to solve this problem, let's first take a look at the "
                              "image. {caption}\n\nNow")  # fmt: skip
    before, after = OPENINGS["zh"].split("{caption}")
    assert before == "<think>\n嗯，为了回答这个问题，让我先看一下图片。" and after.strip() == "首先"


@pytest.mark.parametrize(("words", "begin"), [
    ([], "Hmm, to solve this problem, let's first take a look at the image. A cube.\n\nNow"),
    (["--opening", "zh"], "嗯，为了回答这个问题，让我先看一下图片。A cube.\n\n首先"),
    (["--opening", "<think>I see: {caption} "], "I see: A cube. "),
])  # fmt: skip
def test_thoughts_open_with_the_caption(checkpoint, words, begin):
    questions(2)
    goes_on = lambda i: f", {i} of them.</think>\n\n\\boxed{{{i}}}"  # noqa: E731
    with Teachers({"Describe the picture": "A cube."}, {"How many": goes_on}) as teachers:
        main(["caption", *teachers.words, *words])
    (*_, body), = [asked for asked in teachers.asked if asked[0] == "reasoner"][:1]
    assert body["messages"][1]["role"] == "assistant" and body["continue_final_message"]
    assert body["messages"][1]["content"].endswith(begin)
    if words:
        return
    pack_and_learn(checkpoint)
    assert read("d/sft/rows.jsonl")[1]["thinking"] == f"<think>{begin}, 1 of them.</think>"


def test_an_opening_without_the_caption_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["caption", "--opening", "de"])
    assert "opening 'de': en, zh, or a text with {caption}" in capsys.readouterr().err


def test_questions_become_pictures(checkpoint, monkeypatch):
    """With the row's own picture below or none; what it teaches stays. Any order, the same page."""
    questions(1)
    said = "<think>2 + 2</think>4"
    rows = [{"id": "a", "problem": "What is 2 + 2?", "solution": "4", "text": said},
            {"id": "b", "problem": "How many?", "solution": "3", "image": "0.png", "text": said},
            {"id": "c", "problem": "\U0010fffe?", "solution": "3"},
            {"id": "d", "problem": "Which?", "solution": "3", "images": ["0.png", "0.png"]}]
    write("d/questions.jsonl", rows)
    counts = main(["letters", "--width", "150"])
    assert counts[None] == 2 and len(counts) == 3
    a, b = read("d/letters.jsonl")
    assert a == {"id": "a", "problem": "Answer the question in the image.", "solution": "4",
                 "letters": "What is 2 + 2?", "text": said, "image": a["image"]}  # fmt: skip
    page, seed = open_image(f"d/{a['image']}"), asking.zlib.crc32(b"0 a")
    assert np.array_equal(page, np.asarray(letters.letters("What is 2 + 2?", seed, 150)))
    own, shown = picture(0, 56, 56), open_image(f"d/{b['image']}")
    assert any(np.array_equal(shown[y : y + 56, 47:103], own) for y in range(len(shown) - 55))
    why = {row["id"]: row["reason"] for row in read("d/letters_rejected.jsonl")}
    assert why["d"] == "several pictures" and "no font" in why["c"]
    main(["pack", "--data", "d/letters.jsonl"])
    learn(checkpoint, 2)


# --------------------------------------------------------------------------- open-r1-multimodal


def anew(question: str, thought: str, answer: str) -> str:
    return (f"Sure:\n<question>{question}</question>\n<reasoning>{thought}</reasoning>\n"
            f"<answer>{answer}</answer>")  # fmt: skip


def test_questions_are_written_anew_or_dropped(checkpoint):
    """open-r1-multimodal's reasons: empty tags, "Answer:" in the problem, no or a tiny picture. A
    tag that is never opened is an empty one."""
    rows = questions(6)
    Image.fromarray(picture(0, 56, 27)).save("d/small.png")
    rows[3]["image"] = "small.png"
    del rows[4]["image"]
    write("d/questions.jsonl", rows)
    replies = {0: anew("How many cubes?", "I count.", "7"), 1: anew("How many?", " ", "1"),
               2: anew("How many? Answer: 2", "I count.", "2"),
               5: anew("How many?", "I count.", "2").replace("<question>", "")}
    with Teachers({"Write the question anew": replies.get}, {}) as teachers:
        main(["rewrite", "--teacher", teachers.words[1]])
    assert len(teachers.asked) == 4 and all(shown for _, _, shown, _ in teachers.asked)
    assert all(body["temperature"] == 0.2 for *_, body in teachers.asked)
    (row,) = read("d/answers.jsonl")
    assert row == {"id": "q0", "sample": 0, "problem": "How many cubes?", "solution": "7",
                   "image": "0.png", "text": "<think>I count.</think>\n\n<answer> 7 </answer>",
                   "teacher": "eye", "original_question": "How many, 0?",
                   "original_answer": "0"}  # fmt: skip
    why = [(row["id"], row["reason"]) for row in read("d/answers_rejected.jsonl")]
    assert why == [("q1", "empty tags"), ("q2", "Answer: in the question"),
                   ("q3", "below 28 pixels"), ("q4", "no picture"),
                   ("q5", "empty tags")]  # fmt: skip
    pack_and_learn(checkpoint)
    assert read("d/sft/rows.jsonl")[0]["thinking"] == "<think>I count.</think>"


# ------------------------------------------------------------------------------------ Curr-ReFT


def test_answers_are_judged_and_the_best_are_kept(checkpoint):
    """Above 85 of 100, as the last score says; several answers of one question have their own."""
    rows = [{**row, "sample": k, "text": f"<think>{k}</think><answer>{row['solution']}</answer>"}
            for row in questions(3) for k in range(2)]  # fmt: skip
    write("d/verified.jsonl", [*rows, {**rows[0], "id": "silent", "text": ""}])
    points = iter(["Score (0-100): 86", "Score: 20/100. No, I was wrong: **Score:** 100",
                   "Score: 85", "fine", "Score: 101", "score = 99.5"])  # fmt: skip
    with Teachers({"Judge it from 0 to 100": lambda i: next(points)}, {}) as teachers:
        words = ["--teacher", teachers.words[1], "--concurrency", "1"]
        main(["judge", *words])
        main(["judge", *words])
    assert len(teachers.asked) == 6
    text = teachers.asked[1][1]
    assert "<think>1</think><answer>0</answer>" in text and "True answer: 0" in text
    kept = read("d/judged.jsonl")
    assert [(row["id"], row["sample"], row["score"]) for row in kept] == [
        ("q0", 0, 86), ("q0", 1, 100), ("q2", 1, 99.5)]  # fmt: skip
    assert [row["reason"] for row in read("d/judged_rejected.jsonl")] == [
        "score up to 85", "no score", "no score", "no answer to judge"]  # fmt: skip
    main(["pack", "--data", "d/judged.jsonl", "--learn", "text"])
    assert read("d/sft/rows.jsonl")[1]["completion"] == rows[1]["text"]
    learn(checkpoint, 3)


def test_rows_of_any_source_can_be_asked_about_with_several_pictures_or_none():
    """A world, whose pictures are no files, and rows of two pictures and of none."""
    questions(2)
    rows = [{"id": "a", "problem": "How many, 1?", "solution": "1", "images": ["0.png", "1.png"]},
            {"id": "b", "problem": "How many, 2?", "solution": "2"}]  # fmt: skip
    write("d/questions.jsonl", rows)
    with Teachers({"Describe the picture": "A cube."}, {"How many": "</think>3"}) as teachers:
        main(["caption", *teachers.words])
        found = load_examples("d/answers.jsonl")
        assert [len(example.images) for example in found] == [2, 0]
        seen = [shown for who, _, shown, _ in teachers.asked if who == "eye"]
        assert sorted(seen) == [[], [0, 1]], "in any order: both are under way at a time"
    with ChatServer(lambda n, body: "So 3.") as server:
        main(["caption", "--teacher", f"e@{server.url}", "--data", "world:A:n=2", "--out",
              "e/answers.jsonl"])  # fmt: skip
    for row, example in zip(read("e/answers.jsonl"), load_examples("world:A:n=2")):
        assert np.array_equal(open_image(f"e/{row['image']}"), example.images[0])
        assert json.dumps(row["id"]) == json.dumps(example.row)
