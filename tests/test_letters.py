"""letters.py, chapter two: what is written can be read, stays inside, and is in several fonts."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

import letters as module
from letters import FAMILIES, INKS, PAPERS, SIZES, able, draws, font, fonts, letters, wrap

TEXT = ("If x² + 3 = 5√2 and ∠ABC = 90°, how long is AB?\n(A) 6 cm\n(B) 8 cm " + "w" * 90
        + " and a last word")  # fmt: skip
FACES = [font(path, size) for path in (*fonts(), "") for size in SIZES]


@pytest.fixture
def no_fonts(monkeypatch):
    """A machine on which only PIL's own font is."""
    monkeypatch.setattr(module, "fonts", tuple)


def ink(page: Image.Image) -> np.ndarray:
    """(rows, columns) True where something is written: unlike the paper of the corner."""
    pixels = np.asarray(page).astype(int)
    return (np.abs(pixels - pixels[0, 0]) > 8).any(-1)


@pytest.mark.parametrize("width", [60, 200, 400])
def test_lines_are_no_wider_than_allowed_and_say_all(width):
    for face in FACES:
        lines = wrap(TEXT, face, width)
        assert max(map(face.getlength, lines)) <= width
        assert "".join("".join(lines).split()) == "".join(TEXT.split())
        assert any(line.startswith("(A)") for line in lines)  # where the text begins a line


def test_lines_are_broken_at_blanks_and_as_late_as_can_be():
    for face in FACES:
        lines = wrap("one two  three four", face, face.getlength("one two") + 1)
        assert lines[0] == "one two"
        assert not {line for line in lines if line != line.strip()}
        words = wrap("a b c d e f g h " * 9, face, 150)
        for line, after in pairwise(words):
            assert face.getlength(f"{line} {after.split()[0]}") > 150
    assert wrap("a\n\n b", FACES[0], 100) == ["a", "", "b"]


def test_a_text_without_blanks_is_broken_where_it_must_be_in_no_time():
    """8,000 letters, as a Chinese text has them, and a page too narrow for a single one."""
    face = FACES[0]
    lines = wrap("ab" * 4000, face, 400)
    assert "".join(lines) == "ab" * 4000 and len({len(line) for line in lines}) <= 3
    assert wrap("WWW", face, 3) == ["W", "W", "W"]


def test_letters_stay_inside_and_can_be_read():
    """Of 40 pages: a margin on all sides, at least 18 pixels a line, much ink against paper."""
    for seed in range(40):
        page = letters(TEXT, seed, width=300)
        there = ink(page)
        assert page.width == 300
        rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        assert rows[0] >= 8 and rows[-1] < page.height - 8
        assert columns[0] >= 8 and columns[-1] < page.width - 8
        lines = np.diff(np.flatnonzero(np.diff(np.pad(there.any(1), 1).astype(int))))[::2]
        assert lines.max() >= 0.7 * SIZES[0]


def test_letters_grow_with_a_wide_page():
    """A model sees a page of 3,000 pixels across on a third of them, say."""
    heights = [letters("How many?", 5, width).height for width in (500, 1000, 3000)]
    rows = [ink(letters("How many?", 5, width)).any(1).sum() for width in (1000, 3000)]
    assert heights[0] == heights[1] < heights[2] and rows[1] == pytest.approx(3 * rows[0], abs=3)


def contrast(a, b) -> float:
    """WCAG 2: of relative luminances."""
    def light(color):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (x / 255 for x in color)]  # fmt: skip
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    return max(light(a), light(b)) / min(light(a), light(b))


def test_every_ink_stands_out_from_every_paper():
    assert min(contrast(a, b) for a in INKS for b in PAPERS) >= 7
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)


def test_pages_differ_in_font_size_and_color_and_are_fixed_by_their_seed():
    pages = [letters("How many?", seed) for seed in range(30)]
    assert len({page.getpixel((0, 0)) for page in pages}) == len(PAPERS)
    assert len({page.height for page in pages}) > 8
    assert len({page.tobytes() for page in pages}) == 30
    assert letters("How many?", 3).tobytes() == pages[3].tobytes()
    if len(fonts()) > 1:
        assert len({tuple(wrap(TEXT, font(path, 24), 400)) for path in fonts()}) > 1


def test_fonts_are_known_upright_families():
    for path in fonts():
        name = path.rpartition("/")[2].rpartition(".")[0].removesuffix("-Regular").replace(" ", "")
        assert name.lower() in {family.lower().replace(" ", "") for family in FAMILIES}
    assert list(fonts()) == sorted(fonts(), key=lambda path: path.rpartition("/")[2])


def test_without_fonts_pils_own_is_taken(no_fonts):
    assert able("How many?") == [""]
    assert ink(letters("How many?", 0)).any()


def test_only_fonts_that_have_the_letters_are_taken():
    assert draws("", "a") and draws("", " ") and not draws("", "\U0010fffe")
    found = able("∠ABC")
    assert found and all(draws(path, "∠") for path in found)
    with pytest.raises(ValueError, match=r"no font of this machine has '.U0010fffe'; install one"):
        letters("a \U0010fffe", 0)


@pytest.mark.parametrize("text", ["", " \n", "a" * 8001])
def test_what_is_no_question_is_refused(text):
    with pytest.raises(ValueError, match="a question has 1 to 8,000"):
        letters(text, 0)


def test_a_page_that_could_not_be_opened_is_refused():
    """3,999 lines on 448 pixels: 200 times as high as wide and more."""
    with pytest.raises(ValueError, match=r"the page has 448 x .* an aspect ratio above 200"):
        letters("a\n" * 3999, 0)


def test_the_rows_own_picture_stands_whole_below():
    own = np.full((40, 500, 3), (200, 30, 30), np.uint8)
    page = np.asarray(letters("How many?", 0, width=300, below=own))
    red = (page == (200, 30, 30)).all(-1)
    assert page.shape[1] == 500 and red.sum() == 40 * 500
    top = np.flatnonzero(red.any(1))[0]
    assert red[top : top + 40].all() and (page[:top] != page[0, 0]).any()
    small = np.asarray(letters("How many?", 0, width=300, below=own[:, :100]))
    assert small.shape[1] == 300 and (small == (200, 30, 30)).all(-1).sum() == 40 * 100
