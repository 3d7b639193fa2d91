"""sieve.py, chapter two: which rows are kept, and that neither a kill nor a batch changes it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoint import make_checkpoint

import sieve
from rows import load_examples
from sieve import Config, histogram, keeps


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("sieve")
    make_checkpoint(folder / "model")
    return Config(model=str(folder / "model"), data="world:A:n=6", n=4, batch=4, max_new=6,
                  max_pixels=3136, rewards=("length(per=1)",), above=4.0, below=6.0)


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory) -> Path:
    """The folder of a sieve that was never ended early."""
    out = tmp_path_factory.mktemp("whole")
    sieve.sift(replace(cfg, out=str(out)))
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_is_kept_strictly_between_the_bounds():
    cfg = Config(above=0.0, below=1.0)
    assert [keeps(mean, cfg) for mean in (0.0, 0.01, 0.99, 1.0, None)] == [
        False, True, True, False, False]  # fmt: skip
    assert not keeps(0.1, replace(cfg, above=0.1)) and keeps(1.5, replace(cfg, below=2.0))


def test_the_histogram_tells_never_and_always_from_seldom_and_mostly():
    found = histogram([0.0, 0.0, 0.05, 0.95, 1.0, 0.5, None, 1.25])
    assert {name: n for name, n in found.items() if n} == {
        "0": 2, "0.0 to 0.1": 1, "0.5 to 0.6": 1, "0.9 to 1.0": 1, "1": 1, "other": 2}  # fmt: skip
    assert "other" not in histogram([0.5]) and sum(histogram([0.3] * 7).values()) == 7


def test_rows_whose_mean_is_at_or_beyond_a_bound_go(cfg, whole):
    """Here of the length of n answers, of which 6 is the most that there is."""
    scored = lines(whole / "scored.jsonl")[1:]
    assert [line["row"] for line in scored] == [f"world:A#{i}" for i in range(6)]
    for line in scored:
        assert len(line["rewards"]) == 4 and line["mean"] == sum(line["rewards"]) / 4
    kept = lines(whole / "kept.jsonl")
    assert kept == [line for line in scored if 4 < line["mean"] < 6]
    assert 0 < len(kept) < 6 and 6 in [line["mean"] for line in scored]
    told = json.loads((whole / "summary.json").read_text())
    assert (told["rows"], told["kept"]) == (6, len(kept))
    chosen = load_examples(f"{cfg.data} only={whole}/kept.jsonl")
    assert [e.row for e in chosen] == [line["row"] for line in kept]


def test_a_sieve_that_was_killed_goes_on_to_the_same_lines(cfg, whole, tmp_path):
    """Two whole lines and a cut one were there, and the batch is another."""
    cut = (whole / "scored.jsonl").read_bytes()
    (tmp_path / "scored.jsonl").write_bytes(b"\n".join(cut.split(b"\n")[:4])[:-9])
    sieve.sift(replace(cfg, out=str(tmp_path), batch=3))
    for name in ("scored.jsonl", "kept.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_other_bounds_ask_nothing_again_and_another_sieve_is_refused(cfg, whole, tmp_path, capsys):
    (tmp_path / "scored.jsonl").write_bytes((whole / "scored.jsonl").read_bytes())
    cfg = replace(cfg, out=str(tmp_path))
    assert sieve.sift(replace(cfg, above=-1.0, below=7.0))["kept"] == 6
    for other, told in ((replace(cfg, seed=1), "another seed"),
                        (replace(cfg, data="world:A:n=5"), "another data, n_rows"),
                        (replace(cfg, rewards=("format",)), "another rewards")):  # fmt: skip
        with pytest.raises(SystemExit, match=f"answers of another sieve, with {told}"):
            sieve.sift(other)
    (tmp_path / "scored.jsonl").write_text("{}\n{\n")
    with pytest.raises(SystemExit, match="is damaged"):
        sieve.sift(cfg)


@pytest.mark.parametrize("change, told", [
    ({"below": 4.0}, "nothing is between them"),
    ({"data": "world:A:n=2 + world:A:n=2"}, "several rows are called world:A#0"),
    ({"rewards": ("rigth",)}, "rigth"),
])  # fmt: skip
def test_a_sieve_that_could_keep_nothing_is_refused_before_it_asks(cfg, tmp_path, change, told):
    with pytest.raises(SystemExit, match=told):
        sieve.sift(replace(cfg, out=str(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()


def test_where_nothing_is_kept_all_are_told(cfg, tmp_path, capsys):
    """Format is never right here, so that the mean is 0 throughout."""
    with pytest.raises(SystemExit, match="no row has a mean reward above 0 and below 6"):
        sieve.sift(replace(cfg, out=str(tmp_path), data="world:A:n=2", rewards=("format",),
                           above=0.0))
    assert "0       2  ####" in capsys.readouterr().out and not (tmp_path / "kept.jsonl").exists()
