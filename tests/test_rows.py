"""Chapter two of rows.py: rows of every source, read on demand, or refused by name."""

import concurrent.futures
import io
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import rows
import shards
from example import Example
from images import open_image
from rows import choose_split, find_files, load_examples
from shards import part_of, split_name


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of rows, which remembers small sets as it does large ones."""
    monkeypatch.setattr(shards, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(rows, "FEW", 0)
    return tmp_path / "cache"


def picture(width=40, height=30, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(seed=0) -> bytes:
    file = io.BytesIO()
    picture(seed=seed).save(file, "png")
    return file.getvalue()


def write(folder, *fields, name="train.jsonl"):
    lines = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in fields]
    Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
    Path(folder, name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(Path(folder, name))


def write_parquet(path, columns: dict, **options) -> str:
    """As Hugging Face's data sets write it: an image is a struct, and the schema says so."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = {name: pa.array(values, image if name == "image" else None)
              for name, values in columns.items()}  # fmt: skip
    kinds = {"image": {"_type": "Image"}}
    features = {name: kinds.get(name, {"dtype": "string", "_type": "Value"}) for name in columns}
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays).replace_schema_metadata(told), path, **options)
    return str(path)


def counted(seeds, **more) -> dict:
    """Columns of R1-V's sets; the answer is the seed of the picture."""
    return {
        "image": [{"bytes": encoded(seed), "path": None} for seed in seeds],
        "problem": ["How many items are there in the image?" for _ in seeds],
        "solution": [f"<answer> {seed} </answer>" for seed in seeds],
        **more,
    }


def seeds(found) -> list[int]:
    """The answers, where each is that of its picture."""
    answers = [int(e.solution.removeprefix("<answer>").removesuffix("</answer>")) for e in found]
    for example, seed in zip(found, answers):
        assert np.array_equal(open_image(example.images[0]), np.asarray(picture(seed=seed)))
    return answers


def refused(source, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_examples(source, **options)
    return str(caught.value)


GOOD = {"problem": "How many?", "solution": "3"}


# ---- several sources ----


def gui_row(n, *images):
    """As VLM-R1's multi-image rows."""
    turns = [{"from": "human", "value": "Which defect?"}, {"from": "gpt", "value": "No Defect"}]
    return {"id": n, "image": list(images), "conversations": turns}


def test_sources_are_joined_each_with_its_folder_and_its_columns(tmp_path):
    for folder, name, size in (("coco", "a.png", 60), ("screens", "a.png", 40),
                               ("screens", "b.png", 50)):  # fmt: skip
        (tmp_path / folder).mkdir(exist_ok=True)
        picture(size, 30).save(tmp_path / folder / name)
    box = {"image": "a.png", "problem": "Where?", "solution": [1, 2, 3, 4]}
    own = {"problem": "Why?", "solution": "so", "accu_reward_method": "math", "task": "text"}
    rec = write(tmp_path, box, own, box | {"accu_reward_method": None}, name="rec.jsonl")
    gui = write(tmp_path, gui_row(1, "a.png", "b.png"), name="gui.jsonl")
    source = (f"{rec} images={tmp_path}/coco accu_reward_method=iou(least=0.5) frame=0-1000 "
              f"task=rec\n + {gui}  images={tmp_path}/screens accu_reward_method=exact box_image=1")
    found = load_examples(source)
    assert [e.row for e in found] == ["rec.jsonl:1", "rec.jsonl:2", "rec.jsonl:3", "gui.jsonl:1"]
    widths = [[open_image(x).shape[1] for x in e.images] for e in found]
    assert widths == [[60], [], [60], [40, 50]]
    said = [e.extra["accu_reward_method"] for e in found]
    assert said == ["iou(least=0.5)", "math", "iou(least=0.5)", "exact"]
    assert [e.frame for e in found] == ["0-1000"] * 3 + [None]
    assert [e.task for e in found] == ["rec", "text", "rec", ""]
    assert found[-1].extra == {"id": 1, "completion": "No Defect", "accu_reward_method": "exact",
                               "box_image": 1}  # fmt: skip
    assert [e.row for e in found[2:]] == ["rec.jsonl:3", "gui.jsonl:1"]
    assert list(pickle.loads(pickle.dumps(found))) == list(found)


def test_many_sources_are_joined_though_no_file_may_have_so_long_a_name(tmp_path, monkeypatch):
    """A file's name has 255 bytes at most, and Path.exists raises beyond."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path, {"problem": "Why?", "solution": "so"}, name=name)
    column = f"accu_reward_method=all_of(exact,{'x' * 120})"
    found = load_examples(f"a.jsonl {column} + b.jsonl {column}")
    assert [e.row for e in found] == ["a.jsonl:1", "b.jsonl:1"]
    assert "no such file or folder" in refused(f"a.jsonl {'y' * 300}+ b.jsonl")
    assert "no source on one side of a +" in refused("a.jsonl + ")
    assert "no source on one side of a +" in refused(" + a.jsonl")
    assert "a.jsonl: a column is given twice: task=x, task=y" in refused("a.jsonl task=x task=y")


def test_a_limit_counts_over_the_sources_and_bad_rows_are_told_of_each(tmp_path, capsys):
    one, two = (write(tmp_path, GOOD, GOOD, "{", name=f"{n}.jsonl") for n in (1, 2))
    assert "1.jsonl: 1 of 3 rows are bad" in refused(f"{one} + {two}")
    found = load_examples(f"{one} + {two}", bad_rows="skip")
    assert len(found) == 4 and found.total == 6 and rows.left_out(found, found) == 2
    assert [e.row for e in load_examples(f"{one} + {two}", limit=2)] == ["1.jsonl:1", "1.jsonl:2"]
    some = load_examples(f"{one} + world:A:n=9:ask=count+relation", limit=4, bad_rows="skip")
    assert [e.row for e in some] == ["1.jsonl:1", "1.jsonl:2", "world:A#0", "world:A#1"]
    assert "1 of 3 rows are bad" in capsys.readouterr().err


def test_what_is_wrong_with_one_of_several_sources_is_told(tmp_path):
    good = write(tmp_path, GOOD)
    assert "gone.jsonl: no such file" in refused(f"{good} + {tmp_path}/gone.jsonl")
    for word in ("frame=pixel", "frame=7", "image=pictures"):  # of which the last would do nothing
        told = refused(f"{good} {word}")
        assert "a source has images=FOLDER, only=FILE, frame=pixels|resized|0-1000" in told
    assert "train.jsonl:1: box_image 0: must be the place" in refused(f"{good} box_image=0")
    there = write(tmp_path, GOOD, name="a + b=c.jsonl")  # a file of that very name
    assert len(load_examples(there)) == 1


def kept(folder, **rows) -> str:
    lines = [{"row": name.replace("_", ".jsonl:"), "problem": asks, "solution": GOOD["solution"]}
             for name, asks in rows.items()]  # fmt: skip
    return write(folder, *lines, name="kept/kept.jsonl")


def test_of_a_source_only_the_rows_that_a_sieve_kept_are_taken_in_their_order(tmp_path):
    """Of two sources that one sieve saw, each has its own; a limit counts what is kept."""
    one = write(tmp_path, *({**GOOD, "problem": f"{i}?"} for i in range(4)), name="one.jsonl")
    two = write(tmp_path, GOOD, GOOD, name="two.jsonl")
    only = f"only={kept(tmp_path, one_4='3?', two_2='How many?', one_2='1?')}"
    both = load_examples(f"{one} {only} + {two} {only} frame=resized")
    assert [e.row for e in both] == ["one.jsonl:2", "one.jsonl:4", "two.jsonl:2"]
    assert [e.frame for e in both] == [None, None, "resized"] and both[1].problem == "3?"
    assert [e.row for e in load_examples(f"{one} {only}", limit=1)] == ["one.jsonl:2"]
    second = load_examples("world:A:n=2")[1]
    said = {"row": second.row, "problem": second.problem, "solution": second.solution}
    drawn = write(tmp_path, said)
    assert [e.row for e in load_examples(f"world:A:n=3 only={drawn}")] == ["world:A#1"]


def test_kept_rows_of_another_source_are_refused(tmp_path):
    source = write(tmp_path, GOOD)
    for lines, told in (({"a_1": "How many?"}, "holds no row of this source, but a.jsonl:1"),
                        ({"train_1": "How many cubes?"}, "train.jsonl:1 asks something else"),
                        ):  # fmt: skip
        assert told in refused(f"{source} only={kept(tmp_path, **lines)}")
    only = f"only={kept(tmp_path, train_1='How many?')}"
    assert len(load_examples(f"{source} {only}")) == 1
    write(tmp_path, GOOD | {"solution": "7"})  # many sets ask the same of every picture
    assert "train.jsonl:1 asks something else" in refused(f"{source} {only}")
    assert "not a file of kept rows" in refused(f"{source} only={source}")
    assert "not a file of kept rows" in refused(f"{source} only=gone.jsonl")


# ---- rows of a file ----


def test_an_array_of_rows_in_a_json_is_read_by_places_too(tmp_path, cache):
    path = tmp_path / "all.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "problem": "Wie viele ü?"}], indent=1))
    found = load_examples(str(path))
    assert [(e.row, e.problem) for e in found] == [
        ("all.json:1", "How many?"), ("all.json:2", "Wie viele ü?")]  # fmt: skip
    assert len(list(cache.glob("*.lines"))) == 1
    path.write_text(json.dumps([GOOD]))  # another file, another copy
    assert len(load_examples(str(path))) == 1
    path.write_text(json.dumps([GOOD, 7]))
    assert "all.json:2" in refused(str(path))


def test_a_row_becomes_an_example_that_says_where_it_came_from(tmp_path):
    picture().save(tmp_path / "a.png")
    source = write(tmp_path, GOOD | {"image": "a.png", "task": "count", "else": 1}, GOOD)
    path = str((tmp_path / "a.png").resolve())
    assert list(load_examples(source)) == [
        Example("How many?", "3", (path,), "count", "train.jsonl:1"),
        Example("How many?", "3", (), "", "train.jsonl:2"),
    ]


def test_images_start_from_the_folder_that_is_given_or_the_files(tmp_path):
    (tmp_path / "pictures" / "images").mkdir(parents=True)
    picture().save(tmp_path / "pictures" / "images" / "a.png")
    row = {"image_path": "./images/a.png", "question": "How many items?", "ground_truth": 4}
    (example,) = load_examples(write(tmp_path, row), images=str(tmp_path / "pictures"))
    assert (example.problem, example.solution) == ("How many items?", "4")
    assert example.images == (str((tmp_path / "pictures/images/a.png").resolve()),)


def test_several_images_keep_their_order_and_none_is_legal(tmp_path):
    for name in "abc":
        picture().save(tmp_path / f"{name}.png")
    several = GOOD | {"images": ["c.png", "a.png", "c.png"]}
    found = load_examples(write(tmp_path, several, GOOD | {"image": None}, GOOD | {"images": []}))
    names = [[path.rsplit("/", 1)[1] for path in example.images] for example in found]
    assert names == [["c.png", "a.png", "c.png"], [], []]


def test_a_parquet_is_read_with_its_other_columns(tmp_path):
    columns = counted([3, 1, 2], boxes=[[1, 2], [], None], level=[0.5, 1.0, None])
    source = write_parquet(tmp_path / "a.parquet", columns, row_group_size=2)
    found = load_examples(source)
    assert seeds(found) == [3, 1, 2]
    assert [example.row for example in found] == ["a.parquet#0", "a.parquet#1", "a.parquet#2"]
    assert [list(e.extra) for e in found] == [["boxes", "level"]] * 3
    assert [[*e.extra.values()] for e in found] == [[[1, 2], 0.5], [[], 1.0], [None, None]]


def test_images_of_a_parquet_may_be_lists_of_structs_bytes_or_paths(tmp_path):
    picture(seed=2).save(tmp_path / "b.png")
    cells = {
        "list": [[{"bytes": encoded(1), "path": "a.png"}, {"bytes": None, "path": "b.png"}], []],
        "bytes": [encoded(1), None],
        "path": ["b.png", None],
    }
    for name, cell in cells.items():
        table = pa.table({"images": cell, "problem": ["a", "b"], "solution": ["1", "2"]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    found = {name: load_examples(str(tmp_path / f"{name}.parquet")) for name in cells}
    path = str(tmp_path.resolve() / "b.png")
    assert found["list"][0].images == (encoded(1), path)
    assert found["bytes"][0].images == (encoded(1),) and found["path"][0].images == (path,)
    assert [some[1].images for some in found.values()] == [(), (), ()]


def test_chats_in_a_parquet_are_read(tmp_path):
    """pyarrow gives every part all the keys that any part has."""
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]
    table = pa.table({
        "prompt": [[{"role": "user", "content": parts}]],
        "image": [{"bytes": encoded(4), "path": None}], "solution": ["4"],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    (found,) = load_examples(str(tmp_path / "a.parquet"))
    assert found.problem == "How many?" and seeds([found]) == [4]


def test_rows_are_a_sequence_that_reads_on_demand(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", counted(range(7)), row_group_size=3)
    found = load_examples(source)
    assert len(found) == 7 and seeds(found) == list(range(7))
    assert seeds([found[-1], found[np.int64(2)]]) == [6, 2]
    assert seeds(found[1:6:2]) == [1, 3, 5] and seeds(found[::-1][:2]) == [6, 5]
    assert len(found[9:]) == 0 and found[2:][1:][0] == found[3]
    for wrong in (7, -8):
        with pytest.raises(IndexError):
            found[wrong]
    os.remove(source)
    with pytest.raises(ValueError, match=r"a\.parquet#0: "):
        found[0]


def read_elsewhere(found, order):
    return [found[i].solution for i in order]


def test_rows_go_to_spawned_processes_as_places(tmp_path):
    parquet = load_examples(write_parquet(tmp_path / "a.parquet", counted(range(40))))
    lines = load_examples(write(tmp_path, *({"problem": "a", "solution": i} for i in range(40))))
    assert len(pickle.dumps(parquet)) < 3_000 and len(pickle.dumps(lines)) < 3_000
    order = np.random.default_rng(0).permutation(40).tolist()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
        for found in (parquet, lines):
            told = pool.submit(read_elsewhere, found, order).result()
            assert told == [found[i].solution for i in order]


def test_the_limit_takes_the_first_rows_and_looks_at_no_other(tmp_path):
    source = write(tmp_path, GOOD, GOOD, "broken")
    assert [e.row for e in load_examples(source, limit=2)] == ["train.jsonl:1", "train.jsonl:2"]
    folder = tmp_path / "set"
    for i, some in enumerate(([0, 1], [2, 3])):
        write_parquet(folder / f"train-0000{i}-of-00003.parquet", counted(some))
    (folder / "train-00002-of-00003.parquet").write_text("not looked at")
    assert seeds(load_examples(str(folder), limit=3)) == [0, 1, 2]
    assert "train-00002-of-00003.parquet: not a whole parquet" in refused(str(folder))


# ---- files of a source ----


def test_the_sets_of_r1v_are_read_from_the_hubs_cache_without_a_network(tmp_path, monkeypatch):
    """Their layout: snapshots/REVISION/data/train-0000x-of-0000y.parquet, a link to a blob."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    thoughts = {"thinking": ["<think>Hm.</think>"] * 2}
    sets = {
        "leonardPKU/clevr_cogen_a_train": {},
        "MMInstruction/Clevr_CoGenT_TrainA_70K_Complex": {},
        "leonardPKU/GEOQA_R1V_Train_8K": {},
        "MMInstruction/Clevr_CoGenT_TrainA_R1": thoughts,
    }
    for name, more in sets.items():
        home = tmp_path / "hub" / f"datasets--{name.replace('/', '--')}"
        for part, some in (("train-00000-of-00002", [4, 2]), ("train-00001-of-00002", [3, 1])):
            write_parquet(home / "blobs" / part[:11], counted(some, **more), row_group_size=100)
            link = home / "snapshots" / ("0" * 40) / "data" / f"{part}.parquet"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"../../../blobs/{part[:11]}")
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("0" * 40)
    for name, more in sets.items():
        for source in (name, f"{name}:train", f"{name}@{'0' * 40}", f"{name}@main:train"):
            found = load_examples(source, part="test" if source == name else "train")
            assert seeds(found) == [4, 2, 3, 1]
            assert found[2].row == "train-00001-of-00002.parquet#0"
            assert found[2].extra == {key: value[0] for key, value in more.items()}
    assert "has no one split 'test', but train" in refused("leonardPKU/GEOQA_R1V_Train_8K:test")
    assert "owner/name: no such file or folder" in refused("owner/name")
    told = refused("leonardPKU/GEOQA_R1V_Train_8K@gone")
    assert "leonardPKU/GEOQA_R1V_Train_8K@gone: no such file or folder" in told


def test_pictures_of_a_snapshot_are_links_to_its_blobs(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    home = tmp_path / "datasets--owner--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("f" * 40)
    (home / "blobs").mkdir()
    (home / "blobs" / "1").write_bytes(encoded(5))
    write(home / "blobs", GOOD | {"solution": "5", "file_name": "in/a.png"}, name="2")
    folder = home / "snapshots" / ("f" * 40) / "train"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a.png").symlink_to("../../../../blobs/1")
    (folder / "metadata.jsonl").symlink_to("../../../blobs/2")
    assert seeds(load_examples("owner/name")) == [5]


def test_an_image_folder_is_read_by_its_metadata_of_each_split(tmp_path):
    for part, seed in (("train", 1), ("validation", 2)):
        write(tmp_path / part, {"file_name": "a.png", "question": "a", "answer": seed},
              name="metadata.jsonl")  # fmt: skip
        write(tmp_path / part, "not looked at", name="other.jsonl")
        picture(seed=seed).save(tmp_path / part / "a.png")
    assert seeds(load_examples(str(tmp_path))) == [1]
    assert seeds(load_examples(str(tmp_path), part="val")) == [2]
    assert seeds(load_examples(f"{tmp_path}:validation")) == [2]
    assert seeds(load_examples(str(tmp_path / "train"), part="val")) == [1]
    told = refused(str(tmp_path), part="test")
    assert "has no one split 'test', but train, val; name one" in told


@pytest.mark.parametrize(
    "path, split",
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train-00000-of-00001-0123abc.parquet", "train"),
        ("data/test_sft-00000-of-00001.parquet", "test_sft"),
        ("data/testmini-00000-of-00001.parquet", "testmini"),
        ("train.jsonl", "train"),
        ("Train_8K.jsonl", "train"),
        ("geoqa_test_prompts.jsonl", "test"),
        ("dev.jsonl", "val"),
        ("validation/metadata.jsonl", "val"),
        ("default/train/0000.parquet", "train"),
        ("train/-00000-of-00001.parquet", "train"),
        ("test/train.jsonl", "train"),
        ("strain.jsonl", ""),
        ("data/0000.parquet", ""),
    ],
)
def test_the_split_of_a_file_is_read_from_its_name_or_its_folders(path, split):
    assert split_name(Path(path)) == split


def test_the_split_that_is_meant_is_found_or_asked_for():
    for splits, split, part, want in [
        (["train", "test"], "", "train", "train"),
        (["train", "test"], "test", "train", "test"),
        (["train", "validation"], "", "val", "validation"),
        (["train_sft", "test_sft"], "", "test", "test_sft"),
        (["train", "train_sft"], "", "train", "train"),
        (["train"], "", "test", "train"),
        ([""], "", "test", ""),
        (["testmini", "test"], "testmini", "train", "testmini"),
    ]:
        assert choose_split("s", dict.fromkeys(splits), split, part) == want
    for splits, split, part, told in [
        (["train", "val"], "", "test", "no one split 'test', but train, val; name one of these"),
        (["train_a", "train_b"], "", "train", "no one split 'train', but train_a, train_b"),
        (["train"], "test", "train", "no one split 'test', but train"),
        (["", "test"], "", "train", "no one split 'train', but one without a name, test"),
        ([""], "train", "train", "no one split 'train', but one without a name"),
        ([], "", "train", "holds no .parquet and no .jsonl; a data set whose rows or images are"),
    ]:
        with pytest.raises(ValueError) as caught:
            choose_split("s", dict.fromkeys(splits), split, part)
        assert told in str(caught.value)
    assert [part_of(name) for name in ("eval", "dev2", "my-training", "x")] == [
        "test", "val", "train", ""]  # fmt: skip


def test_where_another_split_is_taken_than_was_asked_for_it_is_told(tmp_path, capsys, monkeypatch):
    for name, source, part, told in [
        ("train", "", "test", "has no split 'test', but only 'train', which is taken"),
        ("testmini", "", "test", "has no split 'test', but only 'testmini', which is taken"),
        ("train", "", "train", ""), ("train_sft", "", "train", ""), ("validation", "", "val", ""),
        ("validation", ":val", "train", ""), ("testmini", ":testmini", "test", ""),
    ]:  # fmt: skip
        folder = tmp_path / f"{name}{part}{source[1:]}"
        write_parquet(folder / "data" / f"{name}-00000-of-00001.parquet", counted([1, 2]))
        assert seeds(load_examples(f"{folder}{source}", part=part)) == [1, 2]
        assert capsys.readouterr().err == (f"{folder}: {told}\n" if told else "")
    assert len(load_examples(write(tmp_path / "named", GOOD), part="test")) == 1  # a plain file
    assert len(load_examples(write(tmp_path / "any", GOOD, name="a.jsonl"), part="test")) == 1
    assert len(load_examples(str(tmp_path / "any"), part="test")) == 1  # nothing says what it is
    monkeypatch.setenv("RANK", "1")  # of torchrun's processes the first says it
    assert len(load_examples(str(tmp_path / "traintest"), part="test")) == 2
    assert capsys.readouterr().err == ""


def test_a_jsonl_that_names_no_split_is_left_out_beside_shards_that_do(tmp_path, capsys):
    """As pack.py writes a set: rows.jsonl has the rows of data/train-*.parquet once more."""
    write(tmp_path, GOOD, GOOD, GOOD, name="rows.jsonl")
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", counted([1, 2]))
    assert seeds(load_examples(str(tmp_path))) == [1, 2]
    assert seeds(load_examples(str(tmp_path), part="test")) == [1, 2]
    assert "has no split 'test', but only 'train'" in capsys.readouterr().err
    assert len(load_examples(str(tmp_path / "rows.jsonl"), part="test")) == 3
    write_parquet(tmp_path / "other.parquet", counted([3]))
    assert "but train, one without a name; name one" in refused(str(tmp_path), part="test")


def test_rows_that_may_not_belong_together_are_not_mixed(tmp_path):
    for name in ("en/train.jsonl", "fr/train.jsonl", "two/train.jsonl"):
        write(tmp_path, GOOD, name=name)
    told = refused(str(tmp_path))
    assert "several folders or kinds of file" in told and "en/train.jsonl, fr/train.jsonl" in told
    write_parquet(tmp_path / "two" / "train.parquet", counted([1]))
    assert "several folders or kinds of file" in refused(str(tmp_path / "two"))
    assert len(load_examples(str(tmp_path / "en"))) == 1


def test_a_set_of_which_a_file_is_missing_is_refused(tmp_path):
    write_parquet(tmp_path / "data" / "train-00001-of-00003.parquet", counted([1]))
    assert "1 of 3 files are there: data/train-00001-of-00003.parquet" in refused(str(tmp_path))


def test_hidden_folders_are_not_looked_into(tmp_path):
    write(tmp_path, "broken", name=".cache/train.jsonl")
    write(tmp_path, GOOD)
    assert [path.name for path in find_files(str(tmp_path), "train")] == ["train.jsonl"]


def test_a_source_that_is_nothing_of_all_this_is_refused(tmp_path):
    for source in (tmp_path / "no.jsonl", "data/no.parquet", "https://host/a.jsonl", "no"):
        told = f"{source}: no such file or folder; neither a .jsonl, .json or .parquet file"
        assert told in refused(str(source))
    for name, text, told in (
        ("a.csv", "[]", "neither"), ("a.json", "[]", "no rows"), ("b.json", "{", "not JSON"),
        ("c.json", "{}", "a .json is to hold an array of rows"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        assert f"{tmp_path / name}: {told}" in refused(str(tmp_path / name))
    (tmp_path / "metadata.csv").write_text("file_name,question,answer\n")
    told = refused(str(tmp_path))
    assert "holds no .parquet and no .jsonl" in told
    assert "a metadata.csv written as metadata.jsonl, which is read" in told
    assert "bad_rows 'ignore'" in refused(write(tmp_path, GOOD), bad_rows="ignore")
    assert "neither" in refused(write(tmp_path, GOOD) + ":train")


def test_a_world_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("scenes.CACHE", tmp_path)
    found = load_examples("world:A:n=3", limit=2)
    assert isinstance(found, list) and [e.row for e in found] == ["world:A#0", "world:A#1"]


# ---- rows that can be used ----


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"problem": "a", ', "Expecting property name"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "recursion"),
        ('{"problem": "a", "solution": NaN}', "the solution is empty"),
        ({"problem": " ", "solution": "3"}, "no problem"),
        (GOOD | {"image": "b.png"}, "b.png: no such file"),
        (GOOD | {"image": "folder"}, "folder: no such file"),
        (GOOD | {"image": "half.png"}, "half.png: "),
        (GOOD | {"image": "text.png"}, "cannot identify image file"),
        (GOOD | {"image": "point.png"}, "1 x 1 pixels"),
    ],
)
def test_a_bad_row_is_refused_with_file_line_and_reason(tmp_path, row, reason):
    picture().save(tmp_path / "a.png")
    picture(1, 1).save(tmp_path / "point.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    told = refused(write(tmp_path, GOOD | {"image": "a.png"}, row))
    assert "train.jsonl: 1 of 2 rows are bad" in told and told.count("train.jsonl:2: ") == 1
    assert reason in told.split("train.jsonl:2: ")[1]


def test_a_bad_picture_in_a_parquet_is_told_with_its_row(tmp_path):
    columns = counted(range(5))
    columns["image"][3] = {"bytes": encoded()[:900], "path": "c.png"}
    told = refused(write_parquet(tmp_path / "a.parquet", columns, row_group_size=2))
    assert "1 of 5 rows are bad\n  a.parquet#3: image of 900 bytes: " in told


def test_a_parquet_that_is_broken_inside_is_told_by_rows(tmp_path):
    path = Path(write_parquet(tmp_path / "a.parquet", counted(range(8)), row_group_size=4,
                              compression="zstd", use_dictionary=False))  # fmt: skip
    whole = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    whole[start : start + 400] = b"x" * 400
    path.write_bytes(whole)
    told = refused(str(path))
    assert "4 of 8 rows are bad" in told and "a.parquet#4: " in told and "a.parquet#3" not in told
    assert seeds(load_examples(str(path), bad_rows="skip")) == [0, 1, 2, 3]


def test_bad_rows_can_be_left_out_and_are_then_counted_and_listed(tmp_path, capsys):
    source = write(tmp_path, GOOD, "broken", GOOD, {"problem": "a"}, GOOD)
    found = load_examples(source, bad_rows="skip")
    assert [e.row for e in found] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:5"]
    told = capsys.readouterr().err
    assert "2 of 5 rows are bad" in told and "left out" in told
    assert "train.jsonl:2: " in told and "train.jsonl:4: no solution" in told
    assert len(load_examples(source, bad_rows="skip", limit=2)) == 1


def test_of_many_bad_rows_twenty_are_listed_and_all_are_counted(tmp_path):
    told = refused(write(tmp_path, *["broken"] * 25))
    assert "25 of 25" in told and told.endswith("\n  and 5 more")
    assert "train.jsonl:20: " in told and "train.jsonl:21: " not in told


def test_a_file_without_a_good_row_is_refused_even_when_bad_ones_are_left_out(tmp_path):
    assert "no rows" in refused(write(tmp_path, ""))
    assert "no rows" in refused(write_parquet(tmp_path / "a.parquet", counted([])))
    assert "1 of 1 rows are bad" in refused(write(tmp_path, "broken"), bad_rows="skip")


@pytest.fixture
def opened(monkeypatch):
    """How many images were decoded so far."""
    seen = []
    monkeypatch.setattr(rows, "open_image", lambda image: seen.append(image) or open_image(image))
    return seen


def test_a_set_that_was_checked_is_not_decoded_again(tmp_path, opened, cache):
    source = write_parquet(tmp_path / "a.parquet", counted(range(600)))
    assert len(load_examples(source)) == 600 and len(opened) == 600
    assert seeds(load_examples(source)[:2]) == [0, 1]
    assert len(load_examples(source, limit=5)) == 5 and len(opened) == 600
    os.utime(source, ns=(1, 1))
    load_examples(source)
    assert len(opened) == 1200
    assert not list(cache.glob("*.new"))


def test_what_was_checked_in_part_is_checked_when_all_is_wanted(tmp_path, opened, cache):
    """A part is not remembered, so that no process waits for another to check it."""
    source = write_parquet(tmp_path / "a.parquet", counted(range(5)))
    for _ in range(2):
        load_examples(source, limit=4)
    assert len(opened) == 8 and not cache.exists()
    load_examples(source)
    assert len(opened) == 13


def test_a_limit_at_the_end_of_a_file_is_not_the_whole_set(tmp_path):
    for i, cell in enumerate((encoded(0), b"no picture")):
        columns = counted([0]) | {"image": [{"bytes": cell, "path": None}]}
        write_parquet(tmp_path / f"train-0000{i}-of-00002.parquet", columns)
    assert len(load_examples(str(tmp_path), limit=1)) == 1
    assert "1 of 2 rows are bad" in refused(str(tmp_path))


def test_a_picture_that_changed_is_looked_at_again(tmp_path, opened):
    for name in "ab":
        picture().save(tmp_path / f"{name}.png")
    source = write(tmp_path, *(GOOD | {"image": f"{name}.png"} for name in "ab"))
    for _ in range(2):
        load_examples(source)
    assert len(opened) == 2
    (tmp_path / "b.png").write_text("no picture")
    assert "train.jsonl:2: image" in refused(source)
    (tmp_path / "b.png").unlink()
    assert "b.png: no such file" in refused(source)


def test_other_code_or_another_folder_of_images_checks_anew(tmp_path, opened, monkeypatch):
    for folder in ("in", "."):
        (tmp_path / folder).mkdir(exist_ok=True)
        picture().save(tmp_path / folder / "a.png")
    source = write(tmp_path, GOOD | {"image": "a.png"})
    load_examples(source)
    load_examples(source, images=str(tmp_path / "in"))
    assert len(opened) == 2
    (tmp_path / "changed.py").write_text("# another version\n")
    for count, module in enumerate((rows.example, rows.pictures, rows.rewards, shards), 3):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
        load_examples(source)
        assert len(opened) == count


def test_bad_rows_are_remembered_and_looked_at_again(tmp_path, opened, capsys):
    """Where one was mended, the set is whole from then on."""
    picture().save(tmp_path / "a.png")
    source = write(tmp_path, *(GOOD | {"image": f"{name}.png"} for name in "aba"))
    for _ in range(2):
        assert len(load_examples(source, bad_rows="skip")) == 2
        assert "1 of 3 rows are bad\n  train.jsonl:2: image" in capsys.readouterr().err
        assert "1 of 3 rows are bad" in refused(source)
    assert len(opened) == 2
    picture().save(tmp_path / "b.png")
    for _ in range(2):
        assert len(load_examples(source)) == 3
    assert len(opened) == 3
    (tmp_path / "a.png").write_text("no picture")
    assert "2 of 3 rows are bad" in refused(source)


def test_few_rows_are_checked_at_every_start_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(shards, "CACHE", tmp_path / "cache")
    picture().save(tmp_path / "a.png")
    source = write(tmp_path, *[GOOD | {"image": "a.png"}] * 99)
    assert len(load_examples(source)) == 99
    assert not (tmp_path / "cache").exists() and rows.FEW == 100
