"""Chapter two of rows.py: rows of files and scenes of worlds, whole or refused by name."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import rows
import world
from rows import Example, load_examples, open_image


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of worlds."""
    monkeypatch.setattr(rows, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def picture(width=40, height=30, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(folder, *fields, name="train.jsonl"):
    lines = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in fields]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def refused(source, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_examples(source, **options)
    return str(caught.value)


GOOD = {"problem": "How many?", "solution": "3"}


# ---- images ----


def test_pixels_of_a_file_are_read_as_they_are(tmp_path):
    picture().save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), picture(), np.asarray(picture())):
        pixels = open_image(source)
        assert pixels.dtype == np.uint8 and np.array_equal(pixels, np.asarray(picture()))


def test_a_picture_that_is_given_open_stays_open(tmp_path):
    picture().save(tmp_path / "two.gif", save_all=True, append_images=[picture(seed=1)])
    with Image.open(tmp_path / "two.gif") as image:
        first = open_image(image)
        image.seek(1)
        assert not np.array_equal(open_image(image), first)


def test_transparent_pixels_become_white_and_half_transparent_ones_lighter():
    image = Image.new("RGBA", (8, 8), (200, 0, 100, 0))
    image.putpixel((1, 0), (200, 0, 100, 255))
    image.putpixel((2, 0), (200, 0, 100, 51))  # one fifth
    assert open_image(image)[0, :3].tolist() == [[255, 255, 255], [200, 0, 100], [244, 204, 224]]


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (50, 3)])
def test_a_picture_of_a_few_pixels_is_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels; at least 4 a side"):
        open_image(picture(*size))


def test_an_aspect_ratio_of_200_is_the_last_that_is_read():
    assert open_image(picture(800, 4)).shape == (4, 800, 3)
    for source in (picture(801, 4), np.asarray(picture(4, 801))):
        with pytest.raises(ValueError, match="aspect ratio above 200"):
            open_image(source)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 45_000])  # PIL by itself refuses the second only
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    """A PNG of 70 bytes that claims 10,000 x 10,000 pixels or more."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(ValueError, match=r"bomb\.png: .*pixels"):
        open_image(tmp_path / "bomb.png")


def test_formats_whose_decoder_runs_another_program_are_refused(tmp_path):
    picture().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match="cannot identify image file"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_file_cut_short_anywhere_is_refused_and_never_crashes(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    picture(60, 60).save(path)
    assert open_image(path).shape == (60, 60, 3)
    whole = path.read_bytes()
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"image .*a\.{kind}: "):
            open_image(path)


# ---- rows of a .jsonl ----


def test_a_row_becomes_an_example_that_says_where_it_came_from(tmp_path):
    picture().save(tmp_path / "a.png")
    source = write(tmp_path, GOOD | {"image": "a.png", "task": "count", "else": 1}, GOOD)
    path = str((tmp_path / "a.png").resolve())
    assert load_examples(source) == [
        Example("How many?", "3", (path,), "count", "train.jsonl:1"),
        Example("How many?", "3", (), "", "train.jsonl:2"),
    ]


def test_other_keys_of_a_row_are_kept_for_rewards_of_ones_own(tmp_path):
    (example,) = load_examples(write(tmp_path, GOOD | {"box": [1, 2], "image": None, "id": 7}))
    assert example.extra == {"box": [1, 2], "id": 7}


def test_the_names_of_r1vs_files_are_understood(tmp_path):
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


def test_text_is_kept_to_the_letter(tmp_path):
    problems = ["<image>How many <|image_pad|> are there?", "a\u2028b\x0b c\r\n", " {Question} \t"]
    found = load_examples(write(tmp_path, *(GOOD | {"problem": p} for p in problems)))
    assert [example.problem for example in found] == problems


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path):
    line = json.dumps(GOOD)
    (tmp_path / "t.jsonl").write_bytes(f"\ufeff{line}\r\n\r\n   \n{line}".encode())
    found = load_examples(str(tmp_path / "t.jsonl"))
    assert [example.row for example in found] == ["t.jsonl:1", "t.jsonl:4"]


def test_the_limit_takes_the_first_rows_and_looks_at_no_other(tmp_path):
    source = write(tmp_path, GOOD, GOOD, "broken")
    assert [e.row for e in load_examples(source, limit=2)] == ["train.jsonl:1", "train.jsonl:2"]


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"problem": "a", ', "Expecting property name"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "recursion"),
        ('{"problem": "\\ud800", "solution": "3"}', "surrogates not allowed"),
        ({"solution": "3"}, "no problem"),
        ({"problem": " ", "solution": "3"}, "no problem"),
        ({"problem": ["a"], "solution": "3"}, "no problem"),
        ({"problem": "a"}, "no solution"),
        ({"problem": "a", "solution": True}, "no solution"),
        ({"problem": "a", "solution": {"x": 1}}, "no solution"),
        ({"problem": "a", "solution": " "}, "the solution is empty"),
        ({"problem": "a", "solution": "<answer>  </answer>"}, "the solution is empty"),
        ('{"problem": "a", "solution": NaN}', "the solution is empty"),
        (GOOD | {"question": "b"}, "has problem and question"),
        (GOOD | {"image": "a.png", "images": ["a.png"]}, "has images and image"),
        (GOOD | {"image": 7}, "image 7: a path is expected"),
        (GOOD | {"images": ["a.png", ""]}, "image '': a path is expected"),
        (GOOD | {"image": "b.png"}, "b.png: no such file"),
        (GOOD | {"image": "folder"}, "folder: no such file"),
        (GOOD | {"image": "a\0.png"}, "null"),
        (GOOD | {"image": "x" * 5000}, "x"),
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
    assert "train.jsonl: 1 of 2 rows are bad" in told and "train.jsonl:2: " in told
    assert reason in told.split("train.jsonl:2: ")[1]


@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../secret.png", "a/../../secret.png", "in/../a.png", "link.png",
     "linked/secret.png", "http://host/a.png", "file:///etc/hostname", "https://host/../a.png"],
)  # fmt: skip
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    inside = tmp_path / "inside"
    (inside / "in").mkdir(parents=True)
    picture().save(tmp_path / "secret.png")
    picture().save(inside / "a.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "linked").symlink_to(tmp_path)
    told = refused(write(tmp_path, GOOD | {"image": name}), images=str(inside))
    assert f"train.jsonl:1: image {name}: " in told
    assert "leads out of" in told or "must be a path below" in told


def test_a_link_that_stays_in_the_folder_is_followed(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    (example,) = load_examples(write(tmp_path, GOOD | {"image": "link.png"}))
    assert example.images == (str((tmp_path / "a.png").resolve()),)


def test_bad_rows_can_be_left_out_and_are_then_counted_and_listed(tmp_path, capsys):
    source = write(tmp_path, GOOD, "broken", GOOD, {"problem": "a"})
    found = load_examples(source, bad_rows="skip")
    assert [example.row for example in found] == ["train.jsonl:1", "train.jsonl:3"]
    told = capsys.readouterr().err
    assert "2 of 4 rows are bad" in told and "left out" in told
    assert "train.jsonl:2: " in told and "train.jsonl:4: no solution" in told


def test_of_many_bad_rows_twenty_are_listed_and_all_are_counted(tmp_path):
    told = refused(write(tmp_path, *["broken"] * 25))
    assert "25 of 25" in told and told.endswith("\n  and 5 more")
    assert "train.jsonl:20: " in told and "train.jsonl:21: " not in told


def test_a_file_without_a_good_row_is_refused_even_when_bad_ones_are_left_out(tmp_path):
    assert "no rows" in refused(write(tmp_path, ""))
    assert "1 of 1 rows are bad" in refused(write(tmp_path, "broken"), bad_rows="skip")


def test_a_source_that_is_neither_a_file_nor_a_world_is_refused(tmp_path):
    assert "no.jsonl: neither a .jsonl file nor world:A" in refused(str(tmp_path / "no.jsonl"))
    assert "neither" in refused(str(tmp_path))
    assert "bad_rows 'ignore'" in refused(write(tmp_path, GOOD), bad_rows="ignore")


# ---- worlds ----


def test_a_world_gives_questions_with_their_exact_answers(cache):
    found = load_examples("world:A,n=12,seed=7,objects=2-4")
    scenes = world.make_scenes(12, "A", 7, objects=(2, 4))
    assert [e.solution for e in found] == [str(len(scene["objects"])) for scene in scenes]
    assert [e.row for e in found] == [f"world:A#{i}" for i in range(12)]
    assert {e.task for e in found} == {"count"}
    assert all(" are " in e.problem and e.problem.endswith(" image?") for e in found)
    pixels = world.render(scenes)
    assert all(np.array_equal(e.images[0], p) for e, p in zip(found, pixels))


def test_a_question_keeps_its_scene_and_the_program_that_answers_it(cache):
    found = load_examples("world:B:n=5:ask=compare+attribute")
    assert [e.extra["scene"] for e in found] == world.make_scenes(5, "B")
    answers = [str(world.execute(e.extra["program"], e.extra["scene"])) for e in found]
    assert answers == [e.solution for e in found]


def test_commas_and_colons_both_separate_options(cache):
    assert rows.parse_world("world:B,n=5,ask=count+compare,size=84x56", "val") == rows.parse_world(
        "world:B:n=5:ask=count+compare:size=84x56", "val"
    )


def test_every_option_reaches_the_world(cache):
    source = "world:C,seed=3,objects=2-6,size=140x84,look=plain,shapes=known,part=val,n=2"
    split, n, kinds, options = rows.parse_world(source + ",ask=count+relation", "train")
    assert (split, n, kinds) == ("C", 2, ("count", "relation"))
    assert options == {"seed": 3, "part": "val", "objects": (2, 6), "size": (140, 84),
                       "look": "plain", "shapes": "known"}  # fmt: skip
    scenes = world.make_scenes(2, "C", 3, "val", (2, 6), (140, 84), "plain", "known")
    pixels = np.stack([e.images[0] for e in load_examples(source)])
    assert np.array_equal(pixels, world.render(scenes, (140, 84)))


def test_b_asks_for_attributes_and_the_other_worlds_count(cache):
    tasks = [{e.task for e in load_examples(f"world:{split}:n=3")} for split in "ABC"]
    assert tasks == [{"count"}, {"attribute"}, {"count"}]


def test_the_part_of_the_call_holds_where_the_source_says_none(cache):
    train, test = (load_examples("world:A:n=3", part=part) for part in ("train", "test"))
    named = load_examples("world:A:n=3:part=test", part="train")
    assert not np.array_equal(train[0].images[0], test[0].images[0])
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(test, named))


def test_mixed_kinds_are_drawn_for_each_scene_and_always_the_same(cache):
    source = "world:A:n=60:ask=count+attribute+relation+compare"
    first, again = load_examples(source), load_examples(source)
    assert [(e.problem, e.solution) for e in first] == [(e.problem, e.solution) for e in again]
    assert {e.task for e in first} == {"count", "attribute", "relation", "compare"}


def test_a_scene_that_allows_no_question_of_the_kind_is_left_out(cache, monkeypatch):
    asked = world.ask

    def ask(scene, kind, rng):
        if kind == "relation" and len(scene["objects"]) > 3:
            raise ValueError("relation: no object can be told from the others")
        return asked(scene, kind, rng)

    monkeypatch.setattr(world, "ask", ask)
    few = {i for i, s in enumerate(world.make_scenes(20, objects=(3, 5))) if len(s["objects"]) == 3}
    assert 0 < len(few) < 20
    only = load_examples("world:A:n=20:objects=3-5:ask=relation")
    assert {int(e.row.split("#")[1]) for e in only} == few
    both = load_examples("world:A:n=20:objects=3-5:ask=relation+count")
    assert len(both) == 20 and all(e.task == "count" or len(few & {i}) for i, e in enumerate(both))


@pytest.mark.parametrize(
    "source, reason",
    [
        ("world:A,objcts=3-10", "no option 'objcts'; did you mean objects?"),
        ("world:A,n", "cannot read n"),
        ("world:A,n=many", "cannot read n=many"),
        ("world:A,n=0", "expected n of 1 or more"),
        ("world:A,objects=3", "expected"),
        ("world:A,size=112", "expected"),
        ("world:A,size=0x0", "pixels"),
        ("world:A,ask=cuont", "no question 'cuont'; did you mean count?"),
        ("world:A,ask=", "no question ''"),
        ("world:A,look=marble", "look 'marble': must be one of"),
        ("world:A,part=trial", "part 'trial': must be one of"),
        ("world:D", "split 'D': must be one of A, B, C"),
        ("world:A,objects=9-3", "fewest"),
    ],
)
def test_a_wrong_option_of_a_world_is_refused_before_anything_is_drawn(cache, source, reason):
    assert reason in refused(source)
    assert not cache.exists()


def test_the_limit_draws_no_more_scenes_than_it_gives(cache):
    assert len(load_examples("world:A:n=100000", limit=3)) == 3
    assert next(iter(cache.glob("*.npy"))).stat().st_size < 4 * 112 * 112 * 3


def test_pictures_are_drawn_once_and_then_mapped_from_the_file(cache, monkeypatch):
    first = load_examples("world:A:n=4")
    monkeypatch.setattr(world, "render", None)
    monkeypatch.setattr(world, "make_scenes", None)
    again = load_examples("world:A:n=4:ask=attribute")  # other questions, the same pictures
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(first, again))
    base = again[0].images[0].base
    assert base is again[1].images[0].base and isinstance(base, np.ndarray)
    assert not again[0].images[0].flags.writeable
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


def test_another_world_is_drawn_anew(cache, tmp_path, monkeypatch):
    for source in ("world:A:n=2", "world:A:n=3", "world:A:n=2:seed=1", "world:B:n=2"):
        load_examples(source)
    assert len(list(cache.glob("*.npy"))) == 4
    (tmp_path / "changed.py").write_text("# another version\n")
    for count, module in enumerate((world, world.draw), 5):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
        load_examples("world:A:n=2")
        assert len(list(cache.glob("*.npy"))) == count


def test_a_drawing_that_is_broken_off_leaves_nothing_behind(cache, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        load_examples("world:A:n=4")
    assert list(cache.iterdir()) == []


def test_worker_processes_draw_what_one_process_draws(cache, monkeypatch):
    """Three chunks, the last of them short."""
    alone = load_examples("world:A:n=140:objects=1-3:size=56x56")
    monkeypatch.setattr(rows, "CACHE", cache / "again")
    monkeypatch.setattr(rows, "FEW", 0)
    monkeypatch.setattr(rows.os, "cpu_count", lambda: 2)
    many = load_examples("world:A:n=140:objects=1-3:size=56x56")
    assert [(e.problem, e.solution) for e in many] == [(e.problem, e.solution) for e in alone]
    pixels = world.render(world.make_scenes(140, objects=(1, 3), size=(56, 56)), (56, 56))
    for found in (alone, many):
        assert np.array_equal(np.stack([e.images[0] for e in found]), pixels)
