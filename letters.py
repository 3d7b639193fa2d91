"""Letters: the text of a question as a picture, for models that are to read what they see.

    page = letters("If x + 3 = 5, what is x?", seed=7)             # PIL, black on white or the like
    page = letters("How many?", seed=7, below=open_image("a.png"))  # the row's picture under it

Source: R1-Vision renders questions of text-only sets (12.6k rows) into pictures, by a rewriting
model and LaTeX. Here lines are wrapped by their width in pixels and drawn by PIL: formulas stay as
they are written. Font, size, paper, margin and line spacing are drawn by the seed, within what
stays readable: letters of at least 18 pixels of height in their font, a contrast of at least 7 : 1
(WCAG's AAA). The fonts are those upright text fonts of the system that have all letters of the
text, else PIL's own; where no font has them, that is a ValueError.
"""

import os
import random
import re
import unicodedata
from bisect import bisect_right
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from images import check_size

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
           "/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts")  # fmt: skip
# Of these families, the first that are there: text fonts, Latin, Greek and signs, then Chinese.
FAMILIES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "LiberationSans", "LiberationSerif",
            "LiberationMono", "NotoSans", "NotoSerif", "FreeSans", "FreeSerif", "Arial", "Georgia",
            "Verdana", "Times New Roman", "Helvetica", "NotoSansCJK", "NotoSerifCJK", "wqy-zenhei",
            "wqy-microhei", "PingFang", "simsun", "msyh")  # fmt: skip
SIZES = (18, 28)  # pixels of a line's letters, on a page of WIDE pixels across at most
WIDE = 1000  # beyond it they grow with the page, which a model is to see smaller
INKS = ((0, 0, 0), (25, 25, 60), (60, 25, 25), (30, 50, 30))
PAPERS = ((255, 255, 255), (250, 246, 235), (235, 240, 250), (240, 240, 240))
LONGEST = 8000  # characters; more is no question


@cache
def fonts() -> tuple[str, ...]:
    """Files of the system's upright text fonts, by name; none where it has none."""
    wanted = {f"{family}{style}".lower().replace(" ", "") for family in FAMILIES
              for style in ("", "-Regular")}  # fmt: skip
    found = {}
    for folder in FOLDERS:
        for path in sorted(Path(os.path.expanduser(folder)).rglob("*.[tTo][tT][fFcC]")):
            if path.stem.lower().replace(" ", "") in wanted:
                found.setdefault(path.stem, str(path))
    return tuple(found[name] for name in sorted(found))


@cache
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of that size in pixels; "": PIL's own."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@cache
def missing(path: str) -> bytes:
    """What a font draws for a letter that it does not have."""
    return bytes(font(path, 24).getmask("\U0010fffe"))


@cache
def draws(path: str, letter: str) -> bool:
    """Whether a font has a letter: it draws another sign for it than for what no font has."""
    return letter.isspace() or bytes(font(path, 24).getmask(letter)) != missing(path)


def able(text: str) -> list[str]:
    """The fonts that have all letters of a text; ValueError, naming some, where none has."""
    letters = sorted(set(text))
    found = [path for path in (*fonts(), "") if all(draws(path, x) for x in letters)]
    found = [path for path in found if path] or found
    if not found:
        lacking = [x for x in letters if not any(draws(path, x) for path in (*fonts(), ""))]
        raise ValueError(f"no font of this machine has {''.join(lacking or letters)[:20]!r}; "
                         "install one (apt-get install fonts-noto)")
    return found


def wrap(text: str, face, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at blanks; a word, or a text without blanks as the
    Chinese write it, that is longer is broken where it must be. Line breaks of the text stay."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for piece in re.findall(r"\s*\S+", paragraph):
            joined = line + piece if line else piece.lstrip()
            if face.getlength(joined) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = piece.strip()
            while len(line) > 1 and face.getlength(line) > width:
                fits = bisect_right(range(2, len(line)), width,
                                    key=lambda n, line=line: face.getlength(line[:n])) + 1
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


def letters(text: str, seed: int, width: int = 448, below: np.ndarray | None = None) -> Image.Image:
    """A picture `width` pixels wide, or as wide as the picture (H, W, 3) uint8 to show below it,
    and as high as the text needs. ValueError for a text without letters, with letters of no font
    here, or too long to be a question, or for a page that open_image would refuse."""
    text = unicodedata.normalize("NFC", text).expandtabs(4).strip()
    if not text or len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters: a question has 1 to {LONGEST:,}")
    picture = None if below is None else Image.fromarray(below)
    width = max(width, picture.width if picture else 0)
    rng = random.Random(seed)
    face = font(rng.choice(able(text)), round(rng.randint(*SIZES) * max(1, width / WIDE)))
    ink, paper = rng.choice(INKS), rng.choice(PAPERS)
    margin = rng.randint(10, 28)
    lines = wrap(text, face, width - 2 * margin)
    up, down = face.getmetrics()
    step = round((up + down) * rng.uniform(1.0, 1.35))
    high = 2 * margin + step * (len(lines) - 1) + up + down
    size = width, high + (picture.height + margin if picture else 0)
    check_size("the page", *size)
    page = Image.new("RGB", size, paper)
    pen = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        pen.text((margin, margin + i * step), line, ink, face)
    if picture:
        page.paste(picture, ((width - picture.width) // 2, high))
    return page
