"""Boxes: coordinate frames, what a text says of boxes, and how well they fit the true ones.

A box is (x1, y1, x2, y2): left, top, right and lower edge. Qwen2-VL speaks of boxes in thousandths
of the picture (0-1000), Qwen2.5-VL in pixels of the resized picture that it sees; data sets give
them in pixels of the file, or in thousandths. So every box has a frame, and what is compared is
brought to pixels of the file first.
"""

from dataclasses import dataclass

# pixels: of the file. resized: of the picture that the model sees. 0-1000: thousandths of it.
FRAMES = ("pixels", "resized", "0-1000")


@dataclass(frozen=True)
class View:
    """How an example's boxes are to be read: set by data.Processor.prompt."""

    frame: str = "pixels"  # that the model speaks, and is asked for
    gold: str = "pixels"  # of the solution
    sizes: tuple[tuple[int, int, int, int], ...] = ()  # (height, width, resized height and width)


def convert(box, source: str, target: str, size) -> tuple[float, ...]:
    """A box from frame `source` to frame `target` in a picture of `size`: (height, width, resized
    height, resized width) in pixels. Nothing is rounded, so there and back is the same."""
    (h, w, rh, rw), scale = size, {}
    scale["pixels"], scale["resized"], scale["0-1000"] = (w, h), (rw, rh), (1000, 1000)
    (x, y), (u, v) = scale[source], scale[target]
    return box[0] * u / x, box[1] * v / y, box[2] * u / x, box[3] * v / y
