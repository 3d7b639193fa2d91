"""A set for supervised fine-tuning on disk: as .jsonl beside its images, and as the hub's parquet.

    d/sft/
      rows.jsonl                           {"image": "images/…", "problem", "thinking", "solution"}
      images/
      data/train-00000-of-00002.parquet    the same rows, images inside

Columns are those of MMInstruction/Clevr_CoGenT_TrainA_R1, R1-V's set. The parquet files have what
`datasets` writes for them: image as {bytes, path}, row groups of 100, the features in the schema;
`load_dataset("d/sft")` and the hub's viewer show pictures.
"""

import json
import re
import shutil
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from example import Example
from images import find_image, open_image
from traces import line_at, need, read_rows, to_learn

TEXTS = ("problem", "thinking", "solution")
GROUP = 100  # rows of a row group, as `datasets` writes images
FEATURES = {"image": {"_type": "Image"}} | {k: {"dtype": "string", "_type": "Value"} for k in TEXTS}
SCHEMA = pa.schema(
    [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
     *((key, pa.string()) for key in TEXTS)],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)  # fmt: skip


def write_set(data: str | Path, images: Path, out: Path, shard: int = 10_000) -> int:
    """Writes the verified answers in `data`, whose images lie below `images`, to the new folder
    `out`, `shard` rows to a parquet file. Returns the number of rows. The folder appears when it is
    whole. ValueError if it is there already, or a row or its image is not as it must be."""
    if out.exists():
        raise ValueError(f"{out} is there already; remove it, or give another --out")
    count = sum(1 for _ in read_rows(data))
    if not count:
        raise ValueError(f"{data}: no rows")
    part = out.with_name(out.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    (part / "data").mkdir(parents=True)
    shards = -(-count // shard)
    rows = iter(tqdm(rows_to_learn(data, images.resolve(), part), "pack", count, unit="row"))
    with open(part / "rows.jsonl", "w", encoding="utf-8") as file:
        for k in range(shards):
            name = part / "data" / f"train-{k:05d}-of-{shards:05d}.parquet"
            with pq.ParquetWriter(name, SCHEMA) as writer:
                write_shard(rows, min(shard, count - k * shard), file, writer)
    part.rename(out)
    return count


def rows_to_learn(data, base: Path, part: Path):
    """(row of the .jsonl, row of the parquet) of each answer; copies its image to part/images."""
    for at, row in read_rows(data):
        need(row, data, at, "image", "problem", "solution", "text")
        try:
            texts = to_learn(row)
            content = Path(find_image(row["image"], base)).read_bytes()
        except ValueError as error:
            raise ValueError(f"{line_at(data, at)}: {error} (--data: rows of verify, --images: "
                             "where their images are)") from None
        name = f"images/{row['image'].removeprefix('images/')}"
        if not (part / name).exists():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
        elif (part / name).read_bytes() != content:  # a.png and images/a.png
            raise ValueError(f"{line_at(data, at)}: image {row['image']}: another picture becomes "
                             f"{name} of the set, too; rename one of them")
        image = {"bytes": content, "path": Path(name).name}
        yield {"image": name, **texts}, {"image": image, **texts}


def write_shard(rows, count: int, file, writer: pq.ParquetWriter):
    """The next `count` of rows, in groups, to the open .jsonl and parquet."""
    for start in range(0, count, GROUP):
        some = list(islice(rows, min(GROUP, count - start)))
        file.writelines(json.dumps(line) + "\n" for line, _ in some)
        writer.write_table(pa.Table.from_pylist([row for _, row in some], SCHEMA))


def picture(example: Example, name: str, out: Path) -> str:
    """The path of a row's image, below the folder of `out`. One that lies elsewhere, or in no file
    of its own, is copied, or written as PNG, to images/STEM of out/; whole or not at all."""
    source, base = example.images[0], out.parent.resolve()
    is_path = isinstance(source, str | Path)
    if is_path and Path(source).is_relative_to(base):
        return Path(source).relative_to(base).as_posix()
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100]
    target = base / "images" / out.stem / (name + (Path(source).suffix if is_path else ".png"))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".tmp")
    if is_path:
        shutil.copyfile(source, part)  # no link: who edits one must not change the other
    else:
        Image.fromarray(open_image(source)).save(part, "PNG")
    part.replace(target)
    return target.relative_to(base).as_posix()
