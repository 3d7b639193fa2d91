"""Chapter two of images.py: pictures of every kind, right or refused; paths that stay in."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from images import find_image, find_images, image_size, open_image


def picture(width=40, height=30, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind="png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


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




def test_the_bytes_of_a_file_are_a_picture(tmp_path):
    assert np.array_equal(open_image(encoded(picture())), np.asarray(picture()))
    with pytest.raises(ValueError, match=r"^image of 5 bytes: cannot identify image file$"):
        open_image(b"hello")
    with pytest.raises(ValueError, match="image of 800 bytes: "):
        open_image(encoded(picture())[:800])


def test_sixteen_bit_greys_are_scaled_where_pil_and_transformers_clip_them_to_white(tmp_path):
    """White is 65,535 = 255 * 257. PIL's own scaling of a 16-bit PPM is the oracle."""
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    expected = np.rint(deep / 257).astype(np.uint8)
    for kind in ("png", "tiff", "ppm"):
        pixels = open_image(encoded(image, kind))
        assert pixels.shape == (64, 64, 3) and np.array_equal(pixels[..., 1], expected), kind
        assert np.array_equal(pixels[..., 0], pixels[..., 2])
    ppm = b"P6 64 64 65535\n" + np.repeat(deep[..., None], 3, -1).astype(">u2").tobytes()
    scaled = np.asarray(Image.open(io.BytesIO(ppm)))
    assert np.abs(scaled[..., 0].astype(int) - expected).max() == 0
    image.save(tmp_path / "deep.png")
    clipped = np.asarray(load_image(str(tmp_path / "deep.png")).convert("RGB"))
    assert (clipped == 255).mean() > 0.9 > (expected == 255).mean()


def test_the_clear_grey_of_a_sixteen_bit_png_is_white():
    """PNG's tRNS chunk of a grey picture: one value stands for nothing."""
    deep = np.full((8, 8), 1000, np.uint16)
    deep[0] = 30_000
    whole = encoded(Image.fromarray(deep))
    at = whole.index(b"IDAT") - 4
    pixels = open_image(whole[:at] + chunk(b"tRNS", struct.pack(">H", 30_000)) + whole[at:])
    assert pixels[0].min() == 255 and pixels[1:].max() == 4


def test_sixteen_bit_colours_keep_their_upper_byte():
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(open_image(b"\x89PNG\r\n\x1a\n" + body), deep >> 8)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_32_bits_are_refused_since_nobody_says_what_is_white(kind):
    with pytest.raises(ValueError, match="32 bits"):
        open_image(encoded(Image.fromarray(np.ones((8, 8), kind)), "tiff"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_what_transformers_makes_of_them(tmp_path, mode):
    kind = {"CMYK": "jpeg", "YCbCr": "jpeg"}.get(mode, "png")
    picture().convert(mode).save(tmp_path / f"a.{kind}")
    expected = np.asarray(load_image(str(tmp_path / f"a.{kind}")).convert("RGB"))
    assert np.array_equal(open_image(tmp_path / f"a.{kind}"), expected)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photograph_is_turned_as_its_exif_says(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    picture(40, 20).save(tmp_path / "a.png", exif=exif)
    pixels = open_image(tmp_path / "a.png")
    assert pixels.shape == ((20, 40, 3) if turn < 5 else (40, 20, 3))
    assert np.array_equal(pixels, np.asarray(load_image(str(tmp_path / "a.png"))))
    assert np.array_equal(pixels, np.asarray(picture(40, 20))) == (turn == 1)
    assert np.array_equal(open_image((tmp_path / "a.png").read_bytes()), pixels)


def test_of_an_animation_the_first_frame_is_read():
    both = encoded(picture(), "gif", save_all=True, append_images=[picture(seed=1)])
    assert Image.open(io.BytesIO(both)).n_frames == 2
    assert np.array_equal(open_image(both), open_image(encoded(picture(), "gif")))
    assert not np.array_equal(open_image(both), open_image(encoded(picture(seed=1), "gif")))


def test_a_transparent_palette_is_laid_on_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 0, 100])
    image.putpixel((0, 0), 0)
    pixels = open_image(encoded(image, transparency=0))
    assert pixels[0, 0].tolist() == [255] * 3 and pixels[1, 1].tolist() == [200, 0, 100]


def test_a_strip_of_10_000_pixels_is_refused():
    with pytest.raises(ValueError, match="10000 x 10 pixels, an aspect ratio above 200"):
        open_image(encoded(Image.new("RGB", (10_000, 10))))


def test_the_size_is_read_without_the_pixels(tmp_path):
    picture(40, 30).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    image = picture(40, 30)
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), whole, whole[:200], image]
    assert [image_size(source) for source in [*sources, np.asarray(image)]] == [(30, 40)] * 6
    assert open_image(image).shape == (30, 40, 3)  # it is still open


# ---- cells ----


def test_every_kind_of_cell_becomes_paths_or_bytes(tmp_path):
    picture().save(tmp_path / "a.png")
    path, data = str(tmp_path.resolve() / "a.png"), encoded(picture())
    base = tmp_path.resolve()
    cells = {None: (), "a.png": (path,), data: (data,)}
    assert {cell: find_images(cell, base) for cell in cells} == cells
    assert find_images([], base) == ()
    assert find_images(["a.png", data, "./a.png"], base) == (path, data, path)
    assert find_images({"bytes": data, "path": "/gone/b.png"}, base) == (data,)
    assert find_images({"bytes": None, "path": "a.png"}, base) == (path,)
    assert find_images([{"bytes": data, "path": None}, {"path": "a.png"}], base) == (data, path)


@pytest.mark.parametrize(
    "cell, reason",
    [
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({}, "neither bytes nor a path"),
        ([None], "image None: a path is expected"),
        ([""], "image '': a path is expected"),
        (7, "image 7: a path is expected"),
        ({"bytes": [1, 2]}, "a path is expected"),
        ("x" * 5000, "a path is expected"),
        ("a\0.png", "null"),
        ("b.png", "b.png: no such file"),
        ({"bytes": None, "path": "../a.png"}, "must be a path below"),
    ],
)
def test_a_cell_that_holds_no_image_is_refused_shortly(tmp_path, cell, reason):
    picture().save(tmp_path / "a.png")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=reason) as caught:
        find_images(cell, (tmp_path / "in").resolve())
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../secret.png", "a/../../secret.png", "in/../a.png", "link.png",
     "linked/secret.png", "http://host/a.png", "file:///etc/hostname", "https://host/../a.png",
     "{}/link.png", "{}/in/../a.png", "{}/../secret.png", "{}/linked/secret.png", "{}-/a.png"],
)  # fmt: skip
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    inside = tmp_path.resolve() / "inside"
    (inside / "in").mkdir(parents=True)
    picture().save(tmp_path / "secret.png")
    picture().save(inside / "a.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "linked").symlink_to(tmp_path)
    (tmp_path / "inside-").mkdir()
    picture().save(tmp_path / "inside-" / "a.png")
    name = name.format(inside)
    with pytest.raises(ValueError, match=r"leads out of|must be a path below") as caught:
        find_image(name, inside)
    assert f"image {name}: " in str(caught.value)


def test_an_absolute_path_below_the_folder_is_read(tmp_path):
    """Also by another name of the folder, for it is the file that has to lie below."""
    inside = tmp_path.resolve() / "inside"
    (inside / "in").mkdir(parents=True)
    picture().save(inside / "in" / "a.png")
    (tmp_path / "other").symlink_to(inside)
    for name in (inside / "in" / "a.png", tmp_path / "other" / "in" / "a.png"):
        assert find_image(str(name), inside) == str(inside / "in" / "a.png")
    with pytest.raises(ValueError, match=r"inside/gone\.png: no such file$"):
        find_image(str(inside / "gone.png"), inside)
    with pytest.raises(ValueError, match=r"must be a path below .*/in \(--images names that fold"):
        find_image(str(inside / "a.png"), inside / "in")


def test_what_separates_folders_is_said_where_a_path_has_backslashes(tmp_path):
    picture().save(tmp_path / "a\\b.png")
    assert find_image("a\\b.png", tmp_path.resolve()) == str(tmp_path.resolve() / "a\\b.png")
    for name in (".\\a.png", "C:\\data\\a.png", "in\\a.png"):
        with pytest.raises(ValueError, match=r"a\.png: no such file; folders are separated by /"):
            find_image(name, tmp_path.resolve())


def test_a_link_that_stays_in_the_folder_is_followed(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    assert find_image("link.png", tmp_path.resolve()) == str(tmp_path.resolve() / "a.png")


def test_the_links_of_a_snapshot_of_the_hub_lead_to_its_blobs_and_nowhere_else(tmp_path):
    home = tmp_path.resolve() / "datasets--owner--name"
    base = home / "snapshots" / "abc" / "data"
    base.mkdir(parents=True)
    (home / "blobs").mkdir()
    picture().save(home / "blobs" / "123", "png")
    picture().save(tmp_path / "other.png")
    (base / "a.png").symlink_to("../../../blobs/123")
    (base / "out.png").symlink_to("../../../../other.png")
    assert find_image("a.png", base) == str(base / "a.png")
    assert find_image(str(base / "a.png"), base) == str(base / "a.png")
    for name in ("out.png", str(base / "out.png")):
        with pytest.raises(ValueError, match=r"out\.png: a link that leads out of"):
            find_image(name, base)
    with pytest.raises(ValueError, match="must be a path below"):
        find_image(str(home / "blobs" / "123"), base)
    with pytest.raises(ValueError, match=r"gone\.png: no such file; if it is packed in a \.zip"):
        find_image("gone.png", base)
    plain = tmp_path.resolve() / "snapshots" / "abc"  # named so by chance
    plain.mkdir(parents=True)
    (home / "blobs").rename(tmp_path / "blobs")
    (plain / "a.png").symlink_to("../../blobs/123")
    assert (plain / "a.png").is_file()
    with pytest.raises(ValueError, match="leads out of"):
        find_image("a.png", plain)
