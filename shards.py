"""The rows of one file by their places: lines of a .jsonl, rows of a parquet.

    table = Table(Path("train-00000-of-00002.parquet"))
    len(table), table.name(3), table.fields(3)     # "train-00000-of-00002.parquet#3", {...}

Nothing is read before it is asked for, and no file stays open, so that both can be sent to other
processes and read by several threads.

A random row of a parquet costs the row group it is in. Measured for pictures of 150 kB: 6 ms from
groups of 100 rows (what the hub writes), 60 ms and 150 MB from groups of 1,000. A file with groups
above GROUP bytes is therefore copied once to .cache/rows in groups of about SMALL bytes, from which
a row takes 0.4 ms; the copy of 445 MB takes half a second.
"""

import fcntl
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from example import ASKED, GOLD, TOLD

CACHE = Path(__file__).resolve().parent / ".cache" / "rows"


class Lines:
    """The lines of a .jsonl file that are not blank, by their places. called: its name."""

    def __init__(self, path: Path, called: str | None = None):
        self.path, self.called, self.at, start = path, called or path.name, [], 0
        with open(path, "rb") as file:
            for n, line in enumerate(file, 1):
                if line.strip():
                    self.at.append((start, n))
                start += len(line)
        self.at = np.array(self.at, np.int64).reshape(-1, 2)  # (rows, 2): first byte, line number

    def __len__(self):
        return len(self.at)

    def name(self, i: int) -> str:
        return f"{self.called}:{self.at[i, 1]}"

    def fields(self, i: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.at[i, 0])
            line = file.readline()
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 ({error.reason}): save it as UTF-8") from error
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        return fields


GROUP = 32 << 20  # bytes; a file with a larger row group is copied in groups of SMALL bytes
SMALL = 2 << 20
GROUPS = 2  # row groups in memory, of each process
LOCK = threading.Lock()


class Table:
    """The rows of a parquet file. A random row costs its row group, so that a file with large ones
    is copied once: for 480 x 320 pixels a row takes 6 ms from groups of 100 rows (what the hub
    writes), 60 ms and 150 MB from groups of 1,000, and 0.4 ms from the copy."""

    def __init__(self, path: Path):
        self.path = self.file = path
        try:
            found, sizes = pq.read_schema(path).names, group_sizes(path)
            if not (set(found) & set(ASKED) and set(found) & {*GOLD, *TOLD}):
                raise ValueError(f"{path}: has the columns {', '.join(found)}; expected are one of "
                                 f"{', '.join(ASKED)} and one of {', '.join((*GOLD, *TOLD))}")
            if max((size for _, size in sizes), default=0) > GROUP:
                self.file = regrouped(path, sizes)
                sizes = group_sizes(self.file)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # a full disk: the system says it best
                raise
            raise ValueError(f"{path}: not a whole parquet file: {error}") from error
        self.ends = np.cumsum([rows for rows, _ in sizes], dtype=np.int64)
        self.stamp = os.stat(self.file).st_mtime_ns

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def name(self, i: int) -> str:
        return f"{self.path.name}#{i}"

    def fields(self, i: int) -> dict:
        k, n = find(self.ends, i)
        with LOCK:  # or several threads would read the same group
            group = read_group(self.file, self.stamp, k)
        return group.slice(n, 1).to_pylist()[0]


def rows_of(path: Path) -> Lines | Table:
    """The rows of a .jsonl, a .parquet, or a .json that is an array of them; such a one, which can
    only be read whole, is copied once to .cache/rows as lines."""
    if path.suffix != ".json":
        return Lines(path) if path.suffix == ".jsonl" else Table(path)
    copy = CACHE / f"{digest(file_stamps([path]))}.lines"
    with alone(copy):
        if not copy.is_file():
            try:
                found = json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: not JSON: {error}") from error
            if not isinstance(found, list):
                raise ValueError(f"{path}: a .json is to hold an array of rows (and a .jsonl one "
                                 "JSON object per line)")
            new = copy.with_suffix(".new")
            new.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
            new.replace(copy)
    return Lines(copy, path.name)


def group_sizes(path: Path) -> list[tuple[int, int]]:
    """(rows, bytes in memory) of each row group. Where many rows have the same picture the file may
    hold it once, so that the first rows are asked what one row takes."""
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        groups = [file.metadata.row_group(k) for k in range(file.num_row_groups)]
        first = next(file.iter_batches(16, [0][: len(groups)], use_threads=False), ())
        each = first.nbytes // len(first) if len(first) else 0
    return [(g.num_rows, max(g.total_byte_size, g.num_rows * each)) for g in groups]


@lru_cache(maxsize=GROUPS)
def read_group(path: Path, stamp: int, k: int) -> pa.Table:
    """Row group k of a parquet file; the stamp tells a file that was written anew."""
    with pq.ParquetFile(path, metadata=footer(path, stamp)) as file:
        return file.read_row_group(k, use_threads=False)


@cache
def footer(path: Path, stamp: int) -> pq.FileMetaData:
    """Where the row groups of a parquet file are, read once per process."""
    return pq.read_metadata(path)


def regrouped(path: Path, sizes: list[tuple[int, int]]) -> Path:
    """A copy of a parquet file under CACHE in groups of about SMALL bytes, written if missing."""
    copy = CACHE / f"{digest(file_stamps([path]), SMALL)}.parquet"
    total = sum(rows for rows, _ in sizes)
    rows = max(1, SMALL * total // sum(size for _, size in sizes))
    with alone(copy), TemporaryDirectory(dir=CACHE) as folder:
        if copy.is_file():
            return copy
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            options = {"compression": "none", "write_statistics": False}
            with (pq.ParquetWriter(Path(folder, "new"), file.schema_arrow, **options) as new,
                  tqdm(total=total, desc=f"copy {path.name}", unit="row") as bar):  # fmt: skip
                for batch in file.iter_batches(rows, use_threads=False):
                    new.write_batch(batch)
                    bar.update(len(batch))
        Path(folder, "new").replace(copy)
    return copy


# --------------------------------------------------------------------------- the splits of a folder

SUFFIXES = (".jsonl", ".parquet")
SHARD = re.compile(r"(?<=.)-\d+-of-(\d+)")  # of "train-00000-of-00002"
PARTS = {  # what the hub's file names call them
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "val": ("val", "valid", "validation", "dev"),
}


def split_files(folder: Path) -> dict[str, list[Path]]:
    """{split: its files} of a folder. Beside shards, which name their split, a .jsonl that names
    none is left out: in pack.py's sets rows.jsonl has the same rows once more."""
    splits = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix in SUFFIXES and path.is_file() and not inside.as_posix().startswith("."):
            splits.setdefault(split_name(inside), []).append(path)
    sharded = any(SHARD.search(path.stem) for files in splits.values() for path in files)
    if sharded and all(path.suffix == ".jsonl" for path in splits.get("", ())):
        splits.pop("", None)
    return splits


def split_name(path: Path) -> str:
    """The split that a file of a data set holds, from its name or else the folders it is in: train,
    test, val, another name before "-00000-of-00002", or "" if nothing says."""
    shard = SHARD.search(path.stem)
    names = (path.stem, *(folder.name for folder in path.parents))
    return path.stem[: shard.start()] if shard else next(filter(None, map(part_of, names)), "")


def part_of(name: str) -> str:
    """train, test or val, whichever word the name holds first, or ""."""
    words = re.split("[^a-z]+", name.lower())
    return next((part for word in words for part in PARTS if word in PARTS[part]), "")


# ---------------------------------------------------------------------------------- places, names


def find(ends: np.ndarray, n: int) -> tuple[int, int]:
    """(k, place in k) of item n of things that follow one another and end before ends (k,)."""
    k = int(np.searchsorted(ends, n, side="right"))
    return k, n - int(ends[k - 1]) if k else n


def file_stamps(paths: Iterable[str | Path]) -> str:
    """Paths with their sizes and times of change; a file that is gone has none."""
    there = {os.path.abspath(path): os.stat(path) for path in paths if os.path.isfile(path)}
    return json.dumps([[path, stat.st_size, stat.st_mtime_ns] for path, stat in there.items()])


def digest(*said) -> str:
    """A name for all of it, of 16 characters."""
    said = [item if isinstance(item, bytes) else str(item).encode() for item in said]
    return hashlib.sha256(b"\0".join(said)).hexdigest()[:16]


@contextmanager
def alone(path: Path):
    """Only one process of this machine is at work on a file of the cache; the others wait, and find
    it there. Its .lock stays behind, as does the temporary folder of a process that was killed:
    while nothing runs, .cache may be removed at any time, and is then made anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
