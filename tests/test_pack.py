"""pack.py, chapter two: the set on disk, read by pyarrow and by load_examples."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_checkpoint import picture

import shards
from example import Example
from images import open_image
from pack import bring, pictures, write_set
from rows import load_examples


@pytest.fixture
def verified(tmp_path, monkeypatch):
    """A folder with verified.jsonl: 230 answers on 3 images."""
    monkeypatch.setattr(shards, "CACHE", tmp_path / "cache")
    folder = tmp_path / "d"
    (folder / "images" / "q").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(picture(i, 56, 84)).save(folder / "images" / "q" / f"{i}.png")
    rows = [{"id": f"a#{i}", "image": f"images/q/{i % 3}.png", "problem": f"How many, {i}?",
             "solution": str(i), "text": f"<think>The scene description {i}</think>{i}",
             "description": "A cube"} for i in range(230)]  # fmt: skip
    (folder / "verified.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "verified.jsonl"


def expected(i: int) -> dict:
    return {"problem": f"How many, {i}?", "thinking": f"<think>The image {i}</think>",
            "solution": f"<answer> {i} </answer>"}  # fmt: skip


def test_rows_are_written_beside_their_images(verified):
    out = verified.parent / "sft"
    assert write_set(verified, verified.parent, out) == 230
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert rows == [{"image": f"images/q/{i % 3}.png", **expected(i)} for i in range(230)]
    for i in range(3):
        image = open_image(str(out / "images" / "q" / f"{i}.png"))
        assert np.array_equal(image, picture(i, 56, 84))
    assert sorted(path.name for path in out.iterdir()) == ["data", "images", "rows.jsonl"]


def test_parquet_is_what_the_hub_has(verified):
    """pyarrow reads bytes and path of the images, 100 rows a group, and the features."""
    out = verified.parent / "sft"
    write_set(verified, verified.parent, out, shard=150)
    files = sorted((out / "data").iterdir())
    assert [f.name for f in files] == ["train-00000-of-00002.parquet",
                                       "train-00001-of-00002.parquet"]  # fmt: skip
    told = [pq.read_metadata(file) for file in files]
    assert [[m.row_group(k).num_rows for k in range(m.num_row_groups)] for m in told] == [
        [100, 50], [80]]  # fmt: skip
    schema = pq.read_schema(files[0])
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"},
                        **{k: {"dtype": "string", "_type": "Value"}
                           for k in ("problem", "thinking", "solution")}}  # fmt: skip
    assert schema.names == list(features)
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    for i, row in enumerate(rows):
        image = row.pop("image")
        assert row == expected(i)
        assert image["path"] == f"{i % 3}.png"
        assert np.array_equal(Image.open(io.BytesIO(image["bytes"])), picture(i % 3, 56, 84))
    assert len(rows) == 230


@pytest.mark.parametrize("source", ["", "rows.jsonl", "data"])
def test_the_set_loads_as_any_other(verified, source):
    """The folder itself is read as the hub reads it: as its parquet files."""
    out = verified.parent / "sft"
    write_set(verified, verified.parent, out, shard=150)
    examples = load_examples(str(out / source))
    assert len(examples) == 230
    for i in (0, 149, 150, 229):
        example = examples[i]
        assert (example.problem, example.solution) == (expected(i)["problem"],
                                                       expected(i)["solution"])  # fmt: skip
        assert example.extra["thinking"] == expected(i)["thinking"]
        assert np.array_equal(open_image(example.images[0]), picture(i % 3, 56, 84))


def test_a_set_is_written_whole_or_not_at_all(verified):
    out = verified.parent / "sft"
    with open(verified, "a") as file:
        file.write(json.dumps({"id": "bad", "image": "images/q/9.png", "problem": "",
                               "text": "<think>a</think>", "solution": ""}) + "\n")  # fmt: skip
    for _ in range(2):  # a second time over what the first left
        with pytest.raises(ValueError, match=r"jsonl:231: image .*9.png: no such file .*--images"):
            write_set(verified, verified.parent, out)
        assert not out.exists()
    verified.write_text("".join(verified.read_text().splitlines(keepends=True)[:5]))
    assert write_set(verified, verified.parent, out) == 5
    assert not out.with_name("sft.tmp").exists()
    with pytest.raises(ValueError, match="sft is there already; remove it"):
        write_set(verified, verified.parent, out)


def test_a_row_can_take_no_file_from_elsewhere(verified):
    secret = verified.parent.parent / "secret.png"
    secret.write_bytes(b"x")
    for name in ("../secret.png", str(secret)):
        row = {"id": "a", "image": name, "problem": "", "text": "<think>a</think>", "solution": "1"}
        verified.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match="must be a path below"):
            write_set(verified, verified.parent, verified.parent / "sft")


def test_no_rows_are_no_set(verified):
    verified.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        write_set(verified, verified.parent, verified.parent / "sft")
    assert not (verified.parent / "sft").exists()


# ------------------------------------------------------------------------------- single pictures


def test_a_picture_that_is_no_file_is_written(tmp_path):
    pixels, out = picture(0, 30, 40), tmp_path / "d" / "answers.jsonl"
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    for i, source in enumerate((pixels, buffer.getvalue(), Image.fromarray(pixels))):
        name = pictures(Example("", "", (source,)), f"{i:06d}_a/b c#1", out)["image"]
        assert name == f"images/answers/{i:06d}_a_b_c_1.png"
        assert np.array_equal(open_image(str(tmp_path / "d" / name)), pixels)


def test_a_file_is_named_where_it_is_or_brought_here(tmp_path):
    out = tmp_path / "d" / "answers.jsonl"
    (tmp_path / "d" / "x").mkdir(parents=True)
    here, there = tmp_path / "d" / "x" / "a.png", tmp_path / "b.png"
    for path in (here, there):
        Image.fromarray(picture(0, 30, 40)).save(path)
    assert pictures(Example("", "", (str(here),)), "n", out) == {"image": "x/a.png"}
    name = pictures(Example("", "", (str(there),)), "n", out)["image"]
    assert name == "images/answers/n.png"
    assert (tmp_path / "d" / name).read_bytes() == there.read_bytes()


def test_a_copy_of_a_picture_is_no_link_and_takes_the_place_of_an_old_one(verified):
    """Who edits the user's picture does not change the set, nor the other way round."""
    here = verified.parent
    write_set(verified, here, here / "sft")
    old, new = here / "images" / "q" / "0.png", here / "images" / "q" / "1.png"
    assert not old.samefile(here / "sft" / "images" / "q" / "0.png")
    for path in (old, new):
        row = pictures(Example("", "", (str(path),)), "n", here.parent / "e" / "answers.jsonl")
        copy = here.parent / "e" / row["image"]
        assert copy.read_bytes() == path.read_bytes() and not copy.samefile(path)
        assert [p.name for p in copy.parent.iterdir()] == ["n.png"]


def test_two_pictures_never_become_one(verified):
    """a.png and images/a.png have one name in the set, which is fine if they are the same."""
    here = verified.parent
    row = {"problem": "", "text": "<think>a</think>1", "solution": "1"}
    names = ("images/q/0.png", "q/0.png")
    verified.write_text("".join(json.dumps({**row, "image": name}) + "\n" for name in names))
    (here / "q").mkdir()
    (here / "q" / "0.png").write_bytes((here / "images" / "q" / "1.png").read_bytes())
    with pytest.raises(ValueError, match=r"verified.jsonl:2: image q/0.png: another picture"):
        write_set(verified, here, here / "sft")
    assert not (here / "sft").exists()
    (here / "q" / "0.png").write_bytes((here / "images" / "q" / "0.png").read_bytes())
    assert write_set(verified, here, here / "sft") == 2


# --------------------------------------------------------------- several pictures, none, and texts


def test_rows_without_a_picture_and_with_several_are_one_set(verified):
    """A column "images" takes the place of "image"; the order in it is the row's."""
    here, text = verified.parent, "<think>a</think>1"
    names = ["images/q/2.png", "images/q/0.png"]
    rows = [{}, {"image": names[0]}, {"images": names}]
    rows = [{"problem": f"{len(row)}?", "solution": "1", "text": text, **row} for row in rows]
    verified.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_set(verified, here, here / "sft") == 3
    schema = pq.read_schema(next((here / "sft" / "data").iterdir()))
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert schema.names == ["images", "problem", "thinking", "solution"]
    assert features["images"] == {"feature": {"_type": "Image"}, "_type": "Sequence"}
    for source in ("sft", "sft/rows.jsonl"):
        found = load_examples(str(here / source))
        assert [len(example.images) for example in found] == [0, 1, 2]
        shown = [open_image(image) for image in found[2].images]
        assert [np.array_equal(a, picture(i, 56, 84)) for a, i in zip(shown, (2, 0))] == [True] * 2
        assert found[0].extra["thinking"] == "<think>a</think>"


def test_a_set_of_texts_holds_answers_to_the_letter(verified):
    here = verified.parent
    rows = [{"problem": "2 + 2?", "solution": "4", "text": "It is <answer>4.0</answer>"}]
    verified.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_set(verified, here, here / "sft", learn="text") == 1
    for source in ("sft", "sft/rows.jsonl"):
        (found,) = load_examples(str(here / source))
        assert found.extra["completion"] == "It is <answer>4.0</answer>"
        assert (found.problem, found.solution) == ("2 + 2?", "<answer> 4 </answer>")


def test_pictures_follow_rows_into_another_folder(verified):
    """By the same name, as copies; what is not there stays away, and no other is replaced."""
    here, there = verified.parent, verified.parent.parent / "e"
    row = {"images": ["images/q/0.png", "elsewhere/a.png"]}
    for _ in range(2):
        bring(row, str(verified), str(there / "out.jsonl"))
    files = [path for path in there.rglob("*") if path.is_file()]
    assert files == [there / "images" / "q" / "0.png"]
    assert files[0].read_bytes() == (here / "images" / "q" / "0.png").read_bytes()
    assert not files[0].samefile(here / "images" / "q" / "0.png")
    files[0].write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"0.png: another picture of that name is there"):
        bring(row, str(verified), str(there / "out.jsonl"))
    assert files[0].read_bytes() == b"mine"
    bring(row, str(verified), str(here / "out.jsonl"))  # the same folder: nothing to do
    with pytest.raises(ValueError, match="must be a path below"):
        bring({"image": str(files[0])}, str(verified), str(there / "x" / "out.jsonl"))
    with pytest.raises(ValueError, match="a path is expected"):
        bring({"image": {"path": "0.png"}}, str(verified), str(there / "out.jsonl"))


def test_a_copy_that_is_cut_off_is_none(verified, monkeypatch):
    """A step that is killed while it copies can be started again."""
    def half(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:9])
        raise KeyboardInterrupt

    row, out = {"image": "images/q/0.png"}, str(verified.parent.parent / "e" / "out.jsonl")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.copyfile", half)
        bring(row, str(verified), out)
    bring(row, str(verified), out)
    copy = verified.parent.parent / "e" / row["image"]
    assert copy.read_bytes() == (verified.parent / row["image"]).read_bytes()


def test_a_picture_that_is_named_by_its_whole_path_lies_in_the_set_like_others(verified):
    here = verified.parent
    rows = [{"problem": "?", "solution": "1", "text": "<think>a</think>1",
             "image": f"{head}{here}/images/q/0.png"} for head in ("", "file://")]  # fmt: skip
    verified.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_set(verified, here, here / "sft") == 2
    assert [row.images for row in load_examples(str(here / "sft" / "rows.jsonl"))] == [
        (str(here / "sft" / "images" / "q" / "0.png"),)] * 2  # fmt: skip
