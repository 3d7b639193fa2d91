"""The pictures of a row: found where its data set says, and decoded to RGB.

    open_image("a.png"), open_image(b"\\x89PNG..."), open_image(pil_image)   # (H, W, 3) uint8

A row may name images below one folder only; nothing is fetched, and only decoders that run no other
program are used. What cannot be shown as it was meant is refused: pixels of 32 bits, for example,
have no agreed white. What differs from PIL's convert("RGB"), which transformers 5 uses: 16-bit
greys are scaled (white is 65,535), where PIL makes white of all above 255; transparency is laid on
white; EXIF orientation is always applied, where transformers does so only to files that it opens.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# ------------------------------------------------------------------------------------------- pixels

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS: it calls Ghostscript
LARGEST = 89_478_485  # pixels; where PIL begins to warn of a decompression bomb
SMALLEST = 4  # pixels a side; transformers would blow up a single pixel to 56 x 56
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)


def open_image(source) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a path, an encoded file's bytes, a PIL image or such an array.

    Of several frames the first is taken; see above for transparency, 16 bits and orientation.
    ValueError for a file that is damaged or no picture, and for a size above LARGEST, below
    SMALLEST, or with a side over 200 times the other (Qwen's rule).
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            found = f"{source.dtype} {source.shape}"
            raise ValueError(f"image array: expected uint8 (H, W, 3), found {found}")
        check_size("image array", source.shape[1], source.shape[0])
        return source
    is_bytes, is_path = isinstance(source, bytes), isinstance(source, str | Path)
    name = f"of {len(source):,} bytes" if is_bytes else source
    file = io.BytesIO(source) if is_bytes else source
    try:
        with Image.open(file, formats=FORMATS) if is_bytes or is_path else source.copy() as image:
            check_size("it", *image.size)
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"image {name}: cannot identify image file") from error
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise ValueError(f"image {name}: {error}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of a PIL image of any mode, upright and on white."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not deep and image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of which nobody says what is white; 8 or 16 are "
                         "read")
    image = ImageOps.exif_transpose(image)
    clear = image.info.get("transparency")
    if deep:
        grey = np.asarray(image).astype(np.uint32)
        grey = grey if clear is None else np.where(grey == clear, 65535, grey)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if "A" in image.getbands() or clear is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def image_size(source) -> tuple[int, int]:
    """(height, width) of what open_image takes, from the head of the file, before EXIF turns it."""
    if isinstance(source, np.ndarray):
        return source.shape[:2]
    if isinstance(source, Image.Image):
        return source.size[::-1]
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=FORMATS) as image:
        return image.size[::-1]


def check_size(name: str, width: int, height: int) -> None:
    """Raises ValueError for a picture of `name` whose size is refused, see open_image."""
    if width * height > LARGEST or min(width, height) < SMALLEST:
        raise ValueError(f"{name} has {width} x {height} pixels; at least {SMALLEST} a side and at "
                         f"most {LARGEST:,} in all are accepted")
    if max(width, height) > 200 * min(width, height):
        raise ValueError(f"{name} has {width} x {height} pixels, an aspect ratio above 200")


# -------------------------------------------------------------------------------------------- cells


def find_images(cell, base: Path) -> tuple[str | bytes, ...]:
    """The images of a row's cell: None, one image or a list of them.

    An image is a path below `base`, an encoded file's bytes, or Hugging Face's {"bytes", "path"},
    of which the bytes go first. ValueError for anything else.
    """
    cells = [] if cell is None else cell if isinstance(cell, list) else [cell]
    found = []
    for one in cells:
        if isinstance(one, dict):
            one = one.get("path") if one.get("bytes") is None else one["bytes"]
            if one is None:
                raise ValueError("an image that has neither bytes nor a path")
        found.append(one if isinstance(one, bytes) else find_image(one, base))
    return tuple(found)


def find_image(name, base: Path) -> str:
    """The file `name`: a path from the folder `base`, which is resolved, or an absolute path below
    it, also as file:///path. A row of a data set may open no other file of the machine. In a
    snapshot of the hub's cache the files are links to its blobs."""
    if not isinstance(name, str) or not name or len(name) > 4096:
        raise ValueError(f"image {name!r:.80}: a path is expected")
    place = name.removeprefix("file://")
    said, path, blobs = base / place, (base / place).resolve(), blobs_of(base)
    inside = path.is_relative_to(base)
    if "://" in place or ".." in Path(name).parts or not (inside or said.is_relative_to(base)):
        raise ValueError(f"image {name}: must be a path below {base} (--images names that folder), "
                         "no URL, without '..'")
    if not (inside or any(map(path.is_relative_to, blobs))):
        raise ValueError(f"image {name}: a link that leads out of {base}")
    if not path.is_file():
        hint = "; if it is packed in a .zip or .tar file, unpack that and name its folder"
        hint = "; folders are separated by /, not \\" if "\\" in name else hint if blobs else ""
        raise ValueError(f"image {path}: no such file{hint}")
    return str(path if inside else said)


def blobs_of(base: Path) -> list[Path]:
    """The folder of blobs if base lies in a snapshot of the hub's cache, which has the layout
    datasets--owner--name/{blobs/HASH, snapshots/REVISION/FILE -> ../../blobs/HASH}."""
    around = [path.parent for path in (base, *base.parents) if path.parent.name == "snapshots"]
    return [path.parent / "blobs" for path in around if path.parent.name.startswith("datasets--")]
