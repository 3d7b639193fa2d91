"""From a row of any data set of the field to an example, read when it is needed.

    load_examples("train.jsonl", images="pictures")    # or a .parquet, or a folder of either
    load_examples("leonardPKU/clevr_cogen_a_train")    # a data set of the hub; also NAME@REVISION
    load_examples("owner/name:validation")             # a split by its name; of a folder, too
    load_examples("world:A,n=500,seed=7")              # see scenes.py
    load_examples("rec.jsonl images=coco accu_reward_method=iou + gui.jsonl frame=0-1000")

Sources with " + " between them are joined, whose rows a run then mixes. NAME=VALUE after a source
is a column of all its rows that do not have it: what frame its boxes are in, which reward is
theirs; images=FOLDER is where its pictures are. (VLM-R1 has three lists for that, joined by ":".)
only=FILE are those of its rows that sieve.py kept in FILE.

A row that cannot be used is found before the run starts, not at step 400: every row is read and
every image decoded, and what is wrong is told with file and row. A set that was checked whole is
not decoded again at the next start: .cache/rows remembers it. What stays in memory are the places
of the rows, a few bytes each, and per process the few row groups of parquet that were read last.

A row may be R1-V's (problem, solution, image), VLM-R1's or LLaVA's (conversations), TRL's (prompt
or messages, with a solution or completion); of a chat, one question and one answer are read.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
from tqdm import tqdm

import example
import images as pictures
import rewards
import shards
from boxes import FRAMES
from example import ASKED, GOLD, IMAGES, Example, to_example
from hub import is_hub_id, snapshot
from images import open_image
from scenes import load_world
from shards import SHARD, SUFFIXES, alone, digest, file_stamps, find, part_of, rows_of, split_files

LISTED = 20  # bad rows that are told of at most
FEW = 100  # rows that are checked at every start, in a second or less


def load_examples(
    source: str,
    images: str | None = None,
    part: str = "train",
    limit: int | None = None,
    bad_rows: str = "refuse",
) -> Sequence[Example]:
    """The first `limit` rows of a file, a folder, a data set of the hub, a world, or several.

    part: train, test or val, where the source has several and does not say which. images: the
    folder that image paths start from (default: the file's). Bad rows raise one ValueError that
    names them; bad_rows="skip" leaves them out and says so on stderr.
    """
    if bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows {bad_rows!r}: must be refuse or skip")
    source = str(source)
    # os.path.exists, here and below: Path.exists raises where a name is longer than one may be.
    sources = apart(source)
    if len(sources) > 1 or with_columns(source)[1]:
        return load_joined(sources, images, part, limit, bad_rows)
    if source.startswith("world:"):
        return load_world(source, part, limit)
    files = find_files(source, part)
    base = Path(images or files[0].parent).resolve()
    parts, there = [], 0
    for path in files:
        if limit is None or there < limit:
            parts.append(rows_of(path))
            there += len(parts[-1])
    rows = Rows(parts, base, np.arange(there)[:limit])
    if not len(rows):
        raise ValueError(f"{source}: no rows")
    bad = checked(rows, files, whole=len(parts) == len(files) and len(rows) == there)
    told = [f"{source}: {len(bad)} of {len(rows)} rows are bad", *list(bad.values())[:LISTED]]
    told = "\n  ".join(told + [f"and {len(bad) - LISTED} more"] * (len(bad) > LISTED))
    if len(bad) == len(rows) or (bad and bad_rows == "refuse"):
        raise ValueError(told)
    if bad:
        tell(f"{told}\n  and left out")
    return Rows(parts, base, np.delete(rows.at, list(bad)))


def apart(source: str) -> list[str]:
    """The sources that are joined."""
    return [source] if os.path.exists(source) else re.split(r"\s\+(?:\s|$)", source)


def on_hub(place: str) -> bool:
    """Whether it may be the id of a data set of the hub."""
    return is_hub_id(place) and Path(place).suffix not in (*SUFFIXES, ".json")


def load_joined(sources, images, part, limit, bad_rows) -> "Joined":
    """The rows of several sources, each with its columns; the rest as of load_examples."""
    loaded, columns = [], []
    for place, more in map(with_columns, sources):
        rest = None if limit is None else limit - sum(map(len, loaded))
        if rest is None or rest > 0:
            folder, kept = more.pop("images", images), more.pop("only", None)
            if not place:
                raise ValueError(f"{' + '.join(sources)!r:.200}: no source on one side of a +")
            if more.keys() & {*ASKED, *GOLD, *IMAGES} or more.get("frame", FRAMES[0]) not in FRAMES:
                raise ValueError(f"{place} {more}: a source has images=FOLDER, only=FILE, frame="
                                 f"{'|'.join(FRAMES)}, and columns of one's own")
            found = load_examples(place, folder, part, None if kept else rest, bad_rows)
            loaded.append(only_kept(found, place, kept, rest) if kept else found)
            columns.append(more)
    joined = Joined(loaded, columns, np.arange(sum(map(len, loaded))))
    if any("box_image" in more for more in columns):
        for _ in joined:  # raises for a row without that picture
            pass
    return joined


def with_columns(source: str) -> tuple[str, dict]:
    """("a.jsonl", {"frame": "0-1000", "box_image": 1}) of "a.jsonl frame=0-1000 box_image=1"."""
    if os.path.exists(source):
        return source, {}
    place, *words = re.split(r"\s+(?=\w+=\S+(?:\s|$))", source.strip())
    pairs = [word.split("=", 1) for word in words]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{place}: a column is given twice: {', '.join(words)}")
    return place, {key: int(value) if value.isdecimal() else value for key, value in pairs}


def only_kept(rows: Sequence, source: str, path: str, limit: int | None) -> Sequence:
    """The first `limit` of those rows of a source that a file of sieve.py holds, in their order.
    ValueError if it holds none, or if a row is not what it was then."""
    try:
        lines = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        kept = {line["row"]: (line["problem"], line["solution"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} only={path}: not a file of kept rows: {error!r}") from error
    named = rows.name if isinstance(rows, Rows) else lambda i: rows[i].row
    at = [i for i in range(len(rows)) if named(i) in kept]
    if not at:
        raise ValueError(f"{source} only={path}: holds no row of this source, but "
                         f"{min(kept, default='none')}")
    for i in at:
        if ((found := rows[i]).problem, found.solution) != kept[named(i)]:
            raise ValueError(f"{source} only={path}: {named(i)} asks something else than the row "
                             "that was kept; the source has changed, or it is another")
    at = at[:limit]
    if isinstance(rows, Rows):
        return Rows(rows.parts, rows.base, rows.at[at])
    return [rows[i] for i in at]


def left_out(loaded: Sequence, used: Sequence) -> int:
    """How many rows of a source are not used: bad ones, and those that were left out later."""
    return getattr(loaded, "total", len(loaded)) - len(used)


def tell(text: str) -> None:
    """To stderr, by the first of torchrun's processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


class Rows(Sequence):
    """Examples that are read when they are asked for: rows[3], rows[:10], for example in rows.

    It holds no row and no open file, so it is small to send to another process, and several threads
    may read from it. parts: Lines and Tables; at (n,): its rows, counted over all parts.
    """

    def __init__(self, parts: list, base: Path, at: np.ndarray):
        self.parts, self.base, self.at = parts, base, at
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self):
        return len(self.at)

    def __getitem__(self, i):
        """The i-th example, or for a slice the Rows of it. ValueError names a row that is bad."""
        if isinstance(i, slice):
            return Rows(self.parts, self.base, self.at[i])
        k, n = find(self.ends, int(self.at[i]))
        try:
            return to_example(self.parts[k].fields(n), self.base, self.name(i))
        except (ValueError, OSError, RecursionError, pa.ArrowException) as error:
            raise ValueError(f"{self.name(i)}: {error}") from error

    @property
    def total(self) -> int:
        """How many rows there are, with those that are left out."""
        return int(self.ends[-1])

    def name(self, i: int) -> str:
        """Where the i-th example comes from: "train.jsonl:12"."""
        k, n = find(self.ends, int(self.at[i]))
        return self.parts[k].name(n)


class Joined(Sequence):
    """Rows of several sources, one after another, each with the columns of its source."""

    def __init__(self, sources: list[Sequence], columns: list[dict], at: np.ndarray):
        self.sources, self.columns, self.at = sources, columns, at
        self.ends = np.cumsum([len(source) for source in sources])

    def __len__(self):
        return len(self.at)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Joined(self.sources, self.columns, self.at[i])
        k, n = find(self.ends, int(self.at[i]))
        found = self.sources[k][n]
        more = {name: x for name, x in self.columns[k].items() if found.extra.get(name) is None}
        task = found.task or str(more.get("task", ""))
        try:
            return replace(found, task=task, extra={**found.extra, **more})
        except ValueError as error:
            raise ValueError(f"{found.row}: {error}") from error

    @property
    def total(self) -> int:
        """How many rows there are, with those that are left out."""
        return sum(getattr(source, "total", len(source)) for source in self.sources)


# -------------------------------------------------------------------------------- files of a source

KINDS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
PATTERNS = ("*.parquet", "*.jsonl", *(f"*.{s}" for kind in KINDS for s in (kind, kind.upper())))


def find_files(source: str, part: str) -> list[Path]:
    """The .jsonl or .parquet files of a source, all in one folder and of one split, in order."""
    place, _, split = source.rpartition(":") if not os.path.exists(source) else (source, "", "")
    place, split = (place, split) if place else (source, "")
    if os.path.isfile(place) and Path(place).suffix in (*SUFFIXES, ".json") and not split:
        return [Path(place)]
    if os.path.isdir(place):
        folder = Path(place)
    elif on_hub(place):
        folder = snapshot(place, "dataset", PATTERNS)
    else:
        found = "" if os.path.exists(place) else "no such file or folder; "
        raise ValueError(f"{source}: {found}neither a .jsonl, .json or .parquet file, a folder of "
                         "such, a data set of the hub (owner/name), nor world:A, B or C")
    splits = split_files(folder)
    files = splits[choose_split(source, splits, split, part)]
    described = [path.parent for path in files if path.name == "metadata.jsonl"]  # imagefolder
    files = [p for p in files if p.name == "metadata.jsonl" or p.parent not in described]
    names = ", ".join(str(path.relative_to(folder)) for path in files[:LISTED])
    if len({(path.parent, path.suffix) for path in files}) > 1:
        raise ValueError(f"{source}: its rows lie in several folders or kinds of file, which may "
                         f"not belong together; name one file or folder of {folder}: {names}")
    said = SHARD.search(files[0].stem)
    if said and int(said[1]) != len(files):
        raise ValueError(f"{source}: {len(files)} of {int(said[1])} files are there: {names}")
    return files


def choose_split(source: str, splits: dict, split: str, part: str) -> str:
    """The one of `splits` that is called `split`, or if none is asked for, is or must be `part`.
    Where the only one has another name it is taken, and stderr says so."""
    if not splits:
        raise ValueError(f"{source}: holds no .parquet and no .jsonl; a data set whose rows or "
                         "images are packed in .zip or .tar files has to be unpacked first, and a "
                         "metadata.csv written as metadata.jsonl, which is read")
    want = split or part
    if want in splits:
        return want
    fits = [name for name in splits if part_of(name) and part_of(name) == part_of(want)]
    fits = fits or (list(splits) if not split else [])
    if len(fits) != 1:
        names = ", ".join(name or "one without a name" for name in splits)
        raise ValueError(f"{source}: has no one split {want!r}, but {names}; name one of these "
                         "after a colon, as in owner/name:train")
    if fits[0] and part_of(fits[0]) != part_of(want):
        tell(f"{source}: has no split {want!r}, but only {fits[0]!r}, which is taken")
    return fits[0]


# --------------------------------------------------------------------------- rows that can be used


def checked(rows: Rows, files: list[Path], whole: bool) -> dict[int, str]:
    """{place in rows: what is wrong} of those that cannot be used.

    What was found of a whole set is remembered by paths, sizes and times of its files and pictures,
    and by the code that checks; then only the rows that were bad are looked at again.
    """
    if len(rows) < FEW:
        return check(rows, range(len(rows)))[0]
    code = [Path(m.__file__).read_bytes() for m in (example, pictures, rewards, shards)]
    name = digest(file_stamps(files), str(rows.base), PIL.__version__, *code)
    told = shards.CACHE / f"{name}.json"
    with alone(told) if whole else nullcontext():  # a part is not remembered: nothing to wait for
        known = json.loads(told.read_bytes()) if told.is_file() else None
        if known and known["stamp"] != digest(file_stamps(known["images"])):
            known = None
        todo = range(len(rows)) if known is None else [i for i in known["bad"] if i < len(rows)]
        bad, paths = check(rows, todo)
        if whole and (known is None or len(bad) < len(todo)):
            paths = sorted(paths.union(known["images"] if known else ()))
            found = {"bad": list(bad), "images": paths, "stamp": digest(file_stamps(paths))}
            told.with_suffix(".new").write_text(json.dumps(found), encoding="utf-8")
            told.with_suffix(".new").replace(told)
    return bad


def check(rows: Rows, todo: Sequence[int]) -> tuple[dict[int, str], set[str]]:
    """Reads rows and decodes their images: {row: what is wrong}, and the files of good images."""

    def look(i: int):
        try:
            found = rows[i].images
        except ValueError as error:  # names the row
            return str(error)
        try:
            for image in found:
                open_image(image)
        except ValueError as error:
            return f"{rows.name(i)}: {error}"
        return [image for image in found if isinstance(image, str)]

    bad, paths, some = {}, set(), 256  # rows at a time, so that few results wait in memory
    bar = tqdm(total=len(todo), desc="check rows", unit="row", disable=len(todo) < 1000)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:  # decoders release the GIL
        for start in range(0, len(todo), some):
            part = todo[start : start + some]
            for i, found in zip(part, pool.map(look, part)):
                if isinstance(found, str):
                    bad[i] = found
                else:
                    paths.update(found)
            bar.update(len(part))
    return bad, paths
