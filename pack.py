"""A set for supervised fine-tuning on disk: as .jsonl beside its images, and as the hub's parquet.

    d/sft/
      rows.jsonl                           {"image": "images/…", "problem", "thinking", "solution"}
      images/
      data/train-00000-of-00002.parquet    the same rows, images inside

Columns are those of MMInstruction/Clevr_CoGenT_TrainA_R1, R1-V's set; where not every row has just
one picture, "images", a list, takes the place of "image". The parquet files have what `datasets`
writes for them: images as {bytes, path}, row groups of 100, the features in the schema;
`load_dataset("d/sft")` and the hub's viewer show pictures.
"""

import filecmp
import json
import re
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from config import opt
from evaluate import check_out
from example import Example
from images import find_image, open_image
from traces import SCENE, line_at, name_of, need, of_image, read_rows, to_learn

# Columns, by what is learnt: a thought with the row's own solution, or an answer letter by letter.
TEXTS = {"gold": ("problem", "thinking", "solution"), "text": ("problem", "completion", "solution")}
GROUP = 100  # rows of a row group, as `datasets` writes images
ONE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Pack:
    """Keys of `distill.py pack`."""

    data: str = opt("d/verified.jsonl", "answers to learn from, as verify writes them")
    images: str | None = opt(None, "folder of the images; default: beside the data")
    out: str = opt("d/sft", "folder to write")
    learn: str = opt("gold", "the thought and the row's solution, as R1-V; text: the answer letter "
                             "by letter, with a thought or without", choices=tuple(TEXTS))
    shard: int = opt(10_000, "rows of a parquet file", least=1)


def pack(cfg: Pack) -> None:
    """Writes the set to learn: rows with one picture, several or none."""
    check_out(f"{cfg.out}/rows.jsonl", cfg.data)
    base = Path(cfg.images or Path(cfg.data).parent)
    print(f"{cfg.out}: {write_set(cfg.data, base, Path(cfg.out), cfg.shard, cfg.learn)} rows")


def write_set(data: str | Path, images: Path, out: Path, shard: int = 10_000,
              learn: str = "gold") -> int:  # fmt: skip
    """Writes the verified answers in `data`, whose images lie below `images`, to the new folder
    `out`, `shard` rows to a parquet file. Returns the number of rows. The folder appears when it is
    whole. ValueError if it is there already, or a row or its image is not as it must be."""
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or give another --out")
    counts = [len(names_of(row)) for _, row in read_rows(data)]
    count = len(counts)
    if not count:
        raise ValueError(f"{data}: no rows")
    schema = schema_of(set(counts) == {1}, learn)
    part = out.with_name(out.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    (part / "data").mkdir(parents=True)
    shards = -(-count // shard)
    rows = rows_to_learn(data, images.resolve(), part, schema.names[0], learn)
    rows = iter(tqdm(rows, "pack", count, unit="row"))
    with open(part / "rows.jsonl", "w", encoding="utf-8") as file:
        for k in range(shards):
            name = part / "data" / f"train-{k:05d}-of-{shards:05d}.parquet"
            with pq.ParquetWriter(name, schema) as writer:
                write_shard(rows, min(shard, count - k * shard), file, writer)
    part.rename(out)
    return count


def schema_of(single: bool, learn: str) -> pa.Schema:
    """That of the parquet files: a column "image" where every row has one, else "images"."""
    shown, one = {"_type": "Image"}, ("image", ONE)
    features = {"image": shown} if single else {"images": {"feature": shown, "_type": "Sequence"}}
    features |= {key: {"dtype": "string", "_type": "Value"} for key in TEXTS[learn]}
    return pa.schema([one if single else ("images", pa.list_(ONE)),
                      *((key, pa.string()) for key in TEXTS[learn])],
                     metadata={"huggingface": json.dumps({"info": {"features": features}})})


def names_of(row: dict) -> list[str]:
    """The paths of a row's images."""
    cell = row.get("images", row.get("image"))
    return cell if isinstance(cell, list) else [] if cell is None else [cell]


def rows_to_learn(data, base: Path, part: Path, column: str, learn: str):
    """(row of the .jsonl, row of the parquet) of each answer; copies its images to part/images."""
    for at, row in read_rows(data):
        need(row, data, at, "problem", "solution", "text")
        try:
            texts = to_learn(row, learn)
            found = [Path(find_image(name, base)) for name in names_of(row)]
        except ValueError as error:
            raise ValueError(f"{line_at(data, at)}: {error} (--data: rows of verify, --images: "
                             "where their images are)") from None
        names, packed = [], []
        for path in found:
            said, content = path.relative_to(base).as_posix(), path.read_bytes()
            name = f"images/{said.removeprefix('images/')}"
            if not (part / name).exists():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(content)
            elif (part / name).read_bytes() != content:  # a.png and images/a.png
                raise ValueError(f"{line_at(data, at)}: image {said}: another picture becomes "
                                 f"{name} of the set, too; rename one of them")
            names.append(name)
            packed.append({"bytes": content, "path": Path(name).name})
        names, packed = (names[0], packed[0]) if column == "image" else (names, packed)
        yield {column: names, **texts}, {column: packed, **texts}


def write_shard(rows, count: int, file, writer: pq.ParquetWriter):
    """The next `count` of rows, in groups, to the open .jsonl and parquet."""
    for start in range(0, count, GROUP):
        some = list(islice(rows, min(GROUP, count - start)))
        file.writelines(json.dumps(line) + "\n" for line, _ in some)
        writer.write_table(pa.Table.from_pylist([row for _, row in some], writer.schema))


# ------------------------------------------------------------- rows of a source, and their pictures


def question_of(example: Example) -> tuple[str, str, str]:
    """(id, problem, solution) of a row. A described scene is asked about as what is seen."""
    problem, name = example.problem, example.extra.get("id")
    problem = of_image(problem, SCENE) if example.extra.get("description") else problem
    return str(example.row if name in (None, "") else name), problem, example.solution


def pictures(example: Example, name: str, out: Path) -> dict:
    """A row's column of images, see picture: "image", or "images" where there are several, or
    none."""
    many = len(example.images) > 1
    found = [picture(source, f"{name}_{k}" if many else name, out)
             for k, source in enumerate(example.images)]  # fmt: skip
    return {"images": found} if many else {"image": found[0]} if found else {}


def picture(source, name: str, out: Path) -> str:
    """The path of an image, below the folder of `out`. One that lies elsewhere, or in no file of
    its own, is copied, or written as PNG, to images/NAME of NAME.jsonl; whole or not at all."""
    base = out.parent.resolve()
    is_path = isinstance(source, str | Path)
    if is_path and Path(source).is_relative_to(base):
        return Path(source).relative_to(base).as_posix()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100]
    target = base / "images" / name_of(out) / (name + (Path(source).suffix if is_path else ".png"))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".tmp")
    if is_path:
        shutil.copyfile(source, part)  # no link: who edits one must not change the other
    else:
        Image.fromarray(open_image(source)).save(part, "PNG")
    part.replace(target)
    return target.relative_to(base).as_posix()


def bring(row: dict, data: str, out: str) -> None:
    """Copies a row's images from beside `data` to beside `out`, under the same names, if these are
    two folders; what lies elsewhere (--images of a step) is left there. ValueError for another
    picture of that name."""
    base, here = Path(data).parent.resolve(), Path(out).parent.resolve()
    for name in names_of(row) if base != here else ():
        if not isinstance(name, str) or (base / name).is_file():
            source, target = find_image(name, base), here / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                part = target.with_name(target.name + ".tmp")  # whole or not at all
                shutil.copyfile(source, part)
                part.replace(target)
            elif not filecmp.cmp(source, target, shallow=False):
                raise ValueError(f"{target}: another picture of that name is there; give another "
                                 "--out")
