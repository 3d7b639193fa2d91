"""teachers.py, chapter two: what is sent to a server and to a checkpoint, and what comes back."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from chat_server import ChatServer, Reply
from PIL import Image
from test_chat import no_proxy  # noqa: F401
from tiny_checkpoint import make_checkpoint, picture

from chat import Answer
from data import Processor
from images import open_image
from teachers import Asks, Question, data_url, find_teacher, joined, messages_of, prompt_of

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), width=32, layers=1, depth=1))


def answers(teacher, *questions) -> tuple[dict, dict]:
    """(answers, failures) by the questions' places."""
    found = {}
    return found, teacher.ask(enumerate(questions), found.__setitem__, len(questions), "ask")


def shown(url: str) -> np.ndarray:
    """The pixels of a data URL."""
    head, _, content = url.partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg", "data:image/webp")
    return open_image(base64.b64decode(content))


# --------------------------------------------------------------------------------------- names


def test_a_name_says_which_kind_of_teacher_it_is(checkpoint, monkeypatch):
    monkeypatch.setenv("OTHER", "another-key")
    assert find_teacher(checkpoint, Asks()).name == checkpoint
    served = find_teacher("R1@http://127.0.0.1:8000/v1", Asks(max_new=9, temperature=0.5))
    assert (served.name, served.server.base_url) == ("R1", "http://127.0.0.1:8000/v1")
    assert (served.server.max_tokens, served.server.temperature, served.server.key) == (9, 0.5, KEY)
    assert find_teacher("a@b@https://host/v1", Asks()).name == "a@b"
    assert find_teacher("R1@http://host/v1", Asks(), "OTHER").server.key == "another-key"


@pytest.mark.parametrize(("name", "told"), [
    ("@http://host/v1", "named before the @"), ("R1@http://", "base_url: must be http"),
    ("nowhere", "neither a checkpoint folder"),
])  # fmt: skip
def test_a_name_that_is_none_is_refused(name, told):
    with pytest.raises(ValueError, match=told):
        find_teacher(name, Asks())


def test_a_server_without_a_key_is_refused(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="variable OPENAI_API_KEY holds no key"):
        find_teacher("R1@http://host/v1", Asks())


# ------------------------------------------------------------------------------------ a server


def test_pictures_go_to_a_server_as_they_are_before_the_text(tmp_path):
    pixels = [picture(i, 30, 40) for i in range(2)]
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    content = messages_of(Question("How many?", (str(tmp_path / "a.png"), pixels[1])))[0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[2]["text"] == "How many?"
    for part, due in zip(content, pixels):
        assert np.array_equal(shown(part["image_url"]["url"]), due)
    assert messages_of(Question("2 + 2?")) == [{"role": "user", "content": "2 + 2?"}]


def test_a_file_is_sent_as_it_lies_there_unless_a_server_may_misread_it(tmp_path):
    """A JPEG stays one; what lies on its side, is a BMP, can be seen through (a server may show
    black) or has 16 bits, becomes an upright PNG of 8."""
    image, turned = Image.fromarray(picture(0, 30, 40)), Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "b.jpg", exif=turned)
    image.save(tmp_path / "c.bmp")
    drawn = Image.new("RGBA", (40, 30))
    drawn.paste((255, 0, 0, 255), (5, 5, 20, 20))
    drawn.save(tmp_path / "d.png")
    drawn.convert("P").save(tmp_path / "e.png", transparency=0)
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(tmp_path / "f.png")
    kept = data_url(tmp_path / "a.jpg")
    assert kept.startswith("data:image/jpeg;base64,")
    assert base64.b64decode(kept.partition(",")[2]) == (tmp_path / "a.jpg").read_bytes()
    assert data_url((tmp_path / "a.jpg").read_bytes()) == kept
    for name in ("b.jpg", "c.bmp", "d.png", "e.png", "f.png"):
        url = data_url(str(tmp_path / name))
        assert url.startswith("data:image/png;base64,")
        assert np.array_equal(shown(url), open_image(str(tmp_path / name)))
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as sent:
            assert sent.mode == "RGB"
    assert shown(data_url(str(tmp_path / "b.jpg"))).shape == (40, 30, 3)


def test_a_server_goes_on_from_an_opening():
    """It is sent as the assistant's own last words, and stands before what comes back."""
    said = [" 3</think>3", {"reasoning_content": "so 3", "content": "3"}]
    with ChatServer(lambda n, body: said[n]) as server:
        teacher = find_teacher(f"R1@{server.url}", Asks(concurrency=1))
        found, failed = answers(teacher, *[Question("How many?", opening="<think>\nNow")] * 2)
    assert failed == {}
    assert found[0] == {"text": "<think>\nNow 3</think>3", "finish": "stop", "tokens": 7}
    assert found[1]["text"] == "<think>\nNow so 3\n</think>\n\n3"
    body = server.asked[0].body
    assert body["messages"][1:] == [{"role": "assistant", "content": "<think>\nNow"}]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False


def test_a_server_that_is_asked_plainly_gets_no_word_that_openai_does_not_know():
    with ChatServer(lambda n, body: "4") as server:
        found, _ = answers(find_teacher(f"R1@{server.url}", Asks(max_new=9)), Question("2 + 2?"))
    assert found[0]["text"] == "4"
    assert server.asked[0].body == {"model": "R1", "max_tokens": 9,
                                    "messages": [{"role": "user", "content": "2 + 2?"}]}
    assert server.asked[0].key == KEY


def test_what_failed_is_told_by_its_key():
    with ChatServer(lambda n, body: Reply(400) if n == 0 else "4") as server:
        teacher = find_teacher(f"R1@{server.url}", Asks(concurrency=1))
        found, failed = answers(teacher, Question("a"), Question("b"))
    assert list(found) == [1] and list(failed) == [0]


def test_thoughts_that_came_apart_are_put_before_the_answer():
    assert joined("", Answer("5", "2 + 3", "stop", 1)) == "<think>\n2 + 3\n</think>\n\n5"
    assert joined("", Answer(" 5\n", " ", "stop", 1)) == " 5\n"
    assert joined("<think>", Answer("a</think>5", "", "stop", 1)) == "<think>a</think>5"


# -------------------------------------------------------------------------------- a checkpoint


def test_a_checkpoint_reads_the_words_and_nothing_else(checkpoint):
    processor = Processor.from_pretrained(checkpoint)
    plain = prompt_of(processor, Question("2 + {Question} 2?"))
    assert plain.text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>"
                          "user\n2 + {Question} 2?<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip
    assert len(plain.grid) == len(plain.patches) == 0
    seen = prompt_of(processor, Question("How many?", (picture(0, 56, 56),) * 2, "<think>\n{a}"))
    assert seen.text.count("<|image_pad|>") == 2 and len(seen.grid) == 2
    assert seen.text.endswith("<|im_start|>assistant\n<think>\n{a}")


def test_a_checkpoints_answers_are_fixed_by_question_and_seed_in_any_batch(checkpoint):
    asked = [Question(f"How many, {i}?", (picture(i, 56, 56),) * (i % 2), "<think>" * (i > 2), i)
             for i in range(5)]  # fmt: skip
    found = {}
    for batch in (1, 3):
        teacher = find_teacher(checkpoint, Asks(max_new=6, batch=batch))
        found[batch], failed = answers(teacher, *asked)
        assert failed == {} and list(found[batch]) == list(range(5))
    assert found[1] == found[3]
    assert [answer["text"].startswith("<think>") for answer in found[1].values()] == [
        False, False, False, True, True]  # fmt: skip
    assert all(answer["tokens"] <= 6 for answer in found[1].values())
    other, _ = answers(teacher, *(replace(question, seed=99) for question in asked))
    assert other != found[1]


def test_a_checkpoint_that_is_asked_nothing_is_not_read(checkpoint, monkeypatch):
    monkeypatch.setattr("teachers.Qwen2VL", None)
    assert answers(find_teacher(checkpoint, Asks())) == ({}, {})


def test_a_picture_as_bytes_is_a_picture(checkpoint):
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 56, 56)).save(buffer, "PNG")
    processor = Processor.from_pretrained(checkpoint)
    ways = [Question("How many?", (source,)) for source in (buffer.getvalue(), picture(0, 56, 56))]
    first, second = (prompt_of(processor, question) for question in ways)
    assert np.array_equal(first.patches, second.patches)
