"""pack.py, chapter two: the set on disk, read by pyarrow and by load_examples."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_checkpoint import picture

import shards
from example import Example
from images import open_image
from pack import picture as keep_picture
from pack import write_set
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
        name = keep_picture(Example("", "", (source,)), f"{i:06d}_a/b c#1", out)
        assert name == f"images/answers/{i:06d}_a_b_c_1.png"
        assert np.array_equal(open_image(str(tmp_path / "d" / name)), pixels)


def test_a_file_is_named_where_it_is_or_brought_here(tmp_path):
    out = tmp_path / "d" / "answers.jsonl"
    (tmp_path / "d" / "x").mkdir(parents=True)
    here, there = tmp_path / "d" / "x" / "a.png", tmp_path / "b.png"
    for path in (here, there):
        Image.fromarray(picture(0, 30, 40)).save(path)
    assert keep_picture(Example("", "", (str(here),)), "n", out) == "x/a.png"
    name = keep_picture(Example("", "", (str(there),)), "n", out)
    assert name == "images/answers/n.png"
    assert (tmp_path / "d" / name).read_bytes() == there.read_bytes()


def test_a_copy_of_a_picture_is_no_link_and_takes_the_place_of_an_old_one(verified):
    """Who edits the user's picture does not change the set, nor the other way round."""
    here = verified.parent
    write_set(verified, here, here / "sft")
    old, new = here / "images" / "q" / "0.png", here / "images" / "q" / "1.png"
    assert not old.samefile(here / "sft" / "images" / "q" / "0.png")
    for path in (old, new):
        name = keep_picture(Example("", "", (str(path),)), "n", here.parent / "e" / "answers.jsonl")
        copy = here.parent / "e" / name
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
