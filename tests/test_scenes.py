"""Chapter two of scenes.py: questions about scenes, drawn once and the same for ever."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import scenes
import world
from scenes import draw_chunk, load_world, parse_world
from shards import alone


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of worlds."""
    monkeypatch.setattr(scenes, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def refused(source, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_world(source, **options)
    return str(caught.value)


def test_a_world_gives_questions_with_their_exact_answers(cache):
    found = load_world("world:A,n=12,seed=7,objects=2-4")
    scenes = world.make_scenes(12, "A", 7, objects=(2, 4))
    assert [e.solution for e in found] == [str(len(scene["objects"])) for scene in scenes]
    assert [e.row for e in found] == [f"world:A#{i}" for i in range(12)]
    assert {e.task for e in found} == {"count"}
    assert all(" are " in e.problem and e.problem.endswith(" image?") for e in found)
    pixels = world.render(scenes)
    assert all(np.array_equal(e.images[0], p) for e, p in zip(found, pixels))


def test_a_question_keeps_its_scene_and_the_program_that_answers_it(cache):
    found = load_world("world:B:n=5:ask=compare+attribute")
    assert [e.extra["scene"] for e in found] == world.make_scenes(5, "B")
    answers = [str(world.execute(e.extra["program"], e.extra["scene"])) for e in found]
    assert answers == [e.solution for e in found]


def test_boxes_and_choices_are_asked_about_the_same_pictures(cache):
    found = load_world("world:A:n=20:ask=rec+detect+choice+yes_no:objects=2-5")
    assert {e.task for e in found} == {"rec", "detect", "choice", "yes_no"}
    pixels = world.render([e.extra["scene"] for e in found])
    assert all(np.array_equal(e.images[0], p) for e, p in zip(found, pixels))
    assert {len(e.images) for e in found} == {1}


def test_a_difference_has_two_pictures_and_other_questions_the_first(cache):
    found = load_world("world:A:n=30:seed=2:ask=difference+rec:objects=2-4")
    assert {(e.task, len(e.images)) for e in found} == {("difference", 2), ("rec", 1)}
    for e in found:
        first = world.render([e.extra["scene"]])[0]
        assert np.array_equal(e.images[0], first)
        if e.task == "difference":
            same = np.array_equal(*e.images)
            assert same == (e.solution == "nothing")
    again = load_world("world:A:n=30:seed=2:ask=difference+rec:objects=2-4")
    assert [(e.problem, e.solution) for e in found] == [(e.problem, e.solution) for e in again]


def test_commas_and_colons_both_separate_options(cache):
    assert parse_world("world:B,n=5,ask=count+compare,size=84x56", "val") == parse_world(
        "world:B:n=5:ask=count+compare:size=84x56", "val"
    )


def test_every_option_reaches_the_world(cache):
    source = "world:C,seed=3,objects=2-6,size=140x84,look=plain,shapes=known,part=val,n=2"
    split, n, kinds, _, _, options = parse_world(source + ",ask=count+relation", "train")
    assert (split, n, kinds) == ("C", 2, ("count", "relation"))
    assert options == {"seed": 3, "part": "val", "objects": (2, 6), "size": (140, 84),
                       "look": "plain", "shapes": "known"}  # fmt: skip
    scenes = world.make_scenes(2, "C", 3, "val", (2, 6), (140, 84), "plain", "known")
    pixels = np.stack([e.images[0] for e in load_world(source)])
    assert np.array_equal(pixels, world.render(scenes, (140, 84)))


def test_b_asks_for_attributes_and_the_other_worlds_count(cache):
    tasks = [{e.task for e in load_world(f"world:{split}:n=3")} for split in "ABC"]
    assert tasks == [{"count"}, {"attribute"}, {"count"}]


def test_the_part_of_the_call_holds_where_the_source_says_none(cache):
    train, test = (load_world("world:A:n=3", part=part) for part in ("train", "test"))
    named = load_world("world:A:n=3:part=test", part="train")
    assert not np.array_equal(train[0].images[0], test[0].images[0])
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(test, named))


def test_mixed_kinds_are_drawn_for_each_scene_and_always_the_same(cache):
    source = "world:A:n=60:ask=count+attribute+relation+compare"
    first, again = load_world(source), load_world(source)
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
    only = load_world("world:A:n=20:objects=3-5:ask=relation")
    assert {int(e.row.split("#")[1]) for e in only} == few
    both = load_world("world:A:n=20:objects=3-5:ask=relation+count")
    assert len(both) == 20 and all(e.task == "count" or len(few & {i}) for i, e in enumerate(both))


@pytest.mark.parametrize(
    "source, reason",
    [
        ("world:A,objcts=3-10", "teacher, keep; did you mean objects?"),
        ("world:A:m=2", "no option 'm' among n, ask, seed, part, objects, size, look, shapes"),
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
    assert len(load_world("world:A:n=100000", limit=3)) == 3
    assert next(iter(cache.glob("*.npy"))).stat().st_size < 4 * 112 * 112 * 3


def test_pictures_are_drawn_once_and_then_mapped_from_the_file(cache, monkeypatch):
    first = load_world("world:A:n=4")
    monkeypatch.setattr(world, "render", None)
    monkeypatch.setattr(world, "make_scenes", None)
    again = load_world("world:A:n=4:ask=attribute")  # other questions, the same pictures
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(first, again))
    base = again[0].images[0].base
    assert base is again[1].images[0].base and isinstance(base, np.ndarray)
    assert not again[0].images[0].flags.writeable
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".npy"]


def test_of_several_that_start_at_once_one_draws_and_the_others_wait(cache, monkeypatch):
    drawn, start = [], threading.Barrier(4)

    def slow(split, n, options, pairs, first):
        drawn.append(first)
        time.sleep(0.05)
        return draw_chunk(split, n, options, pairs, first)

    def load(_):
        start.wait()
        return [e.images[0] for e in load_world("world:A:n=3")]

    monkeypatch.setattr(scenes, "draw_chunk", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load, range(4)))
    assert drawn == [0]
    pixels = world.render(world.make_scenes(3))
    assert all(np.array_equal(images, pixels) for images in found)


def test_a_world_that_is_there_is_read_while_its_lock_is_held(cache):
    first = load_world("world:A:n=2")
    with alone(next(cache.glob("*.npy"))):
        assert load_world("world:A:n=2")[0].problem == first[0].problem


def test_another_world_is_drawn_anew(cache, tmp_path, monkeypatch):
    for source in ("world:A:n=2", "world:A:n=3", "world:A:n=2:seed=1", "world:B:n=2"):
        load_world(source)
    assert len(list(cache.glob("*.npy"))) == 4
    (tmp_path / "changed.py").write_text("# another version\n")
    for count, module in enumerate((world, world.draw), 5):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
        load_world("world:A:n=2")
        assert len(list(cache.glob("*.npy"))) == count


def test_a_drawing_that_is_broken_off_leaves_nothing_behind(cache, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "render", stop)
    with pytest.raises(KeyboardInterrupt):
        load_world("world:A:n=4")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_worker_processes_draw_what_one_process_draws(cache, monkeypatch):
    """Three chunks, the last of them short."""
    alone = load_world("world:A:n=140:objects=1-3:size=56x56")
    monkeypatch.setattr(scenes, "CACHE", cache / "again")
    monkeypatch.setattr(scenes, "FEW", 0)
    monkeypatch.setattr(scenes.os, "cpu_count", lambda: 2)
    many = load_world("world:A:n=140:objects=1-3:size=56x56")
    assert [(e.problem, e.solution) for e in many] == [(e.problem, e.solution) for e in alone]
    pixels = world.render(world.make_scenes(140, objects=(1, 3), size=(56, 56)), (56, 56))
    for found in (alone, many):
        assert np.array_equal(np.stack([e.images[0] for e in found]), pixels)
