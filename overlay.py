"""Overlay: pictures of a page, inlined, and boxes drawn on them as SVG.

True boxes are green and solid, predicted ones purple and dashed, both on a white rim: told apart by
any eyes and on any picture. The bytes of a picture stand on the page once: where
it is shown again with other boxes, an SVG `use` refers to it. No script, nothing from elsewhere.
"""

import base64
import contextlib
import re
from pathlib import Path
from typing import NamedTuple

from chart import esc, number, show

PICTURE, BOXES = 2_000_000, 60  # bytes of a picture, boxes drawn of a kind on one, at most
WIDE, COLUMN, TEXT = 224, 240, 12  # pixels on the page: a small picture, the most, a label
FAR = 10  # see corners
KINDS = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp"}


class Picture(NamedTuple):
    """A file of a run. size: (width, height) in pixels where it is a PNG, as a run's are."""

    name: str
    kind: str
    data: bytes
    size: tuple[int, int] | None

    @property
    def source(self) -> str:
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"

    @property
    def frame(self) -> str:
        """Attributes of width and height: a small picture is enlarged by a whole number."""
        times = max(1, WIDE // max(1, self.size[0]))
        wide, high = (times * n for n in self.size)
        return f'width="{wide}" height="{high}" class="{"pixels" * (times > 1)}"'


def load(folder: Path, name) -> Picture | None:
    """The picture at a path relative to the run; None if it is missing, outside, or none."""
    root, data = folder.resolve(), b""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # unreadable, NUL, a loop of links
        path = (root / str(name)).resolve()
        if path.is_relative_to(root) and path.is_file() and path.stat().st_size <= PICTURE:
            data = path.read_bytes()
    kind = next((KINDS[start] for start in KINDS if data.startswith(start)), None)
    if kind is None:
        return None
    size = tuple(int.from_bytes(data[i : i + 4], "big") for i in (16, 20))  # in a PNG's header
    return Picture(str(name), kind, data, size if kind == "png" and min(size) > 0 else None)


def inlined(picture: Picture, alt: str = "") -> str:
    """The picture alone."""
    frame = picture.frame if picture.size else ""
    return f'<img alt="{esc(alt)}" {frame} src="{picture.source}">'


def overlaid(picture: Picture, alt: str, true, said=(), again: bool = False) -> str:
    """The picture, of known size, with true and predicted boxes as in a run's files: {"box": four
    pixels, "label", ...}. again: it stands on the page already, and is only referred to."""
    (wide, high), name = picture.size, "p-" + re.sub(r"\W", "-", picture.name)
    shown = (f'<use href="#{name}"/>' if again else
             f'<image id="{name}" width="{wide}" height="{high}" href="{picture.source}"/>')
    small = TEXT * wide / min(COLUMN, wide * max(1, WIDE // wide))
    labels = {b.get("label") for b in true if isinstance(b, dict)}
    usual = labels.pop() if len(labels) == 1 else None
    found = "".join(drawn(kind, boxes, picture.size, small, usual)
                    for kind, boxes in (("true", true), ("said", said)))  # fmt: skip
    frame = picture.frame.replace('class="', 'class="boxes ')
    return (f'<svg {frame} viewBox="0 0 {wide} {high}" role="img" aria-label="{esc(alt)}">{shown}'
            f'<g font-size="{small:.2f}">{found}</g></svg>')  # fmt: skip


def drawn(kind: str, boxes, size: tuple[int, int], text: float, usual=None) -> str:
    """Boxes and their labels, `text` pixels high, but for the `usual` one, which would hide what it
    is about; kind: true or said. What is no box is left out. Labels of true boxes stand above them,
    those of predicted ones, with their confidence, below."""
    out, (wide, high) = [], size
    for item in boxes[:BOXES]:
        if (box := corners(item, size)) is None:
            continue
        x1, y1, x2, y2 = box
        place = f'x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}"'
        label, sure = str(item.get("label") or ""), confidence(item)
        name = f"{label * (label != usual)} {sure}".strip()
        told = " ".join(filter(None, (label, sure, "at", ", ".join(map(show, box)))))
        word = "true" if kind == "true" else "predicted"
        out.append(f'<rect class="rim" {place}/><rect class="{kind}" {place}><title>{word}: '
                   f"{esc(told)}</title></rect>")  # fmt: skip
        x, end = (x2, "end") if x1 > wide / 2 else (x1, "start")
        y = max(text, y1 - text / 4) if kind == "true" else min(high - text / 4, y2 + text)
        if name:
            out.append(f'<text class="{kind}" x="{min(max(x, 0), wide):.1f}" y="{y:.1f}" '
                       f'text-anchor="{end}">{esc(name[:40])}</text>')  # fmt: skip
    return "".join(out)


def confidence(item: dict) -> str:
    """The score of a predicted box, where it is not the 1 of those that say none."""
    return "" if number(item.get("score")) in (None, 1) else show(item["score"])


def corners(item, size: tuple[int, int]) -> tuple | None:
    """(left, top, right, bottom) of a box as a run's files have it; None for what is none or has
    no area. What lies many pictures outside is brought nearer, where no browser fails at it."""
    box = item.get("box") if isinstance(item, dict) else None
    if not isinstance(box, list) or len(box) != 4 or None in (box := [*map(number, box)]):
        return None
    x1, y1, x2, y2 = (min(max(v, -FAR * n), FAR * n) for v, n in zip(box, (*size, *size)))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


LEGEND = '<p class="key"><b class="true">true</b> <b class="said">predicted</b></p>'
STYLE = """
.pictures {display: flex; flex-wrap: wrap; gap: .5rem} .pictures > * {min-width: 0; flex: 0 1 auto}
.pictures > :not(:only-child) {flex: 1 1 6rem} .boxes {--true: #1a7f1a; --said: #b000e0; max-width:
100%; height: auto; overflow: hidden; margin-bottom: .6rem} .boxes rect, .boxes rect:hover {fill:
none; opacity: 1; stroke-width: 2.5px; vector-effect: non-scaling-stroke} .boxes rect.rim {stroke:
#fff; stroke-width: 5px; opacity: .75} rect.true {stroke: var(--true)} rect.said {stroke:
var(--said); stroke-dasharray: 6 4} .boxes text {font-weight: 600; paint-order: stroke; stroke:
#fff; stroke-width: .25em; stroke-linejoin: round} text.true {fill: var(--true)} text.said {fill:
var(--said)} .key {margin-bottom: .3rem} .key b {padding: 0 .4em; border: 2px solid #1a7f1a} .key
b.said {border: 2px dashed #b000e0}
"""
