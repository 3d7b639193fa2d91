"""A chart as SVG: the dots of a metric, their local mean, and lines that belong beside it.

Nothing is drawn by a library or a script, so that a page holds it and any browser shows it. Spikes
neither flatten a chart nor bend its line: what lies beyond the 1st and 99th percentile is set on
the edge. Numbers, ticks and text are made short and harmless here.
"""

import functools
import html
import math
import re
from typing import NamedTuple

import numpy as np

W, H, LEFT, RIGHT, TOP, BOTTOM = 320, 150, 44, 308, 10, 126  # a chart and its frame, in pixels
# Control characters, those that turn the direction of a line, and halves of surrogate pairs.
HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
FAMILY = re.compile("^(?:eval/[^/]*/|[^/(]*/)")  # of a metric's name; what follows is shown


class Curve(NamedTuple):
    """A chart: a metric, what it means and what is healthy, and how it is drawn."""

    key: str
    title: str
    says: str
    share: bool = False  # in per cent
    axis: tuple = (0,)  # values that the axis shows in any case
    more: tuple = ()  # metrics whose lines stand beside it, those of them that there are


def spread(items, most: int) -> list:
    """At most `most` items at even distances, the first and the last among them."""
    at = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in at]


def number(x) -> float | None:
    """x if it is a finite number of a size that can be drawn, else None."""
    real = isinstance(x, int | float) and type(x) is not bool
    return float(x) if real and -1e30 < x < 1e30 else None


def show(x, share: bool = False) -> str:
    """A number in three or four digits, or a share in per cent; a dash where there is none."""
    if number(x) is None:
        return "–"
    short = f"{x:,.0f}" if 100 <= abs(x) < 1e6 else f"{x:.{4 if 1 <= abs(x) < 10 else 3}g}"
    return (f"{100 * x:.1f} %" if share else short).replace("e-0", "e-").replace("-", "−")


def esc(x) -> str:
    """Anything as text, also for inside an attribute."""
    return html.escape(HIDDEN.sub("\ufffd", str(x)))


def series(rows: list[dict], *keys: str) -> np.ndarray:
    """(len(keys), n): these metrics at the steps where all of them are finite."""
    values = [[number(row.get(key)) for key in keys] for row in rows]
    return np.array([v for v in values if None not in v]).reshape(-1, len(keys)).T


def smooth(values: np.ndarray) -> np.ndarray:
    """Local mean (n steps,): triangle weights over n // 20 neighbours each side, fewer at ends."""
    weights = np.bartlett(2 * (len(values) // 20) + 3)[1:-1]
    return np.convolve(values, weights, "same") / np.convolve(values * 0 + 1, weights, "same")


def ticks(lo: float, hi: float, most: int = 4) -> list[float]:
    """Numbers that enclose lo to hi, at 1, 2 or 5 times a power of ten, about `most` intervals."""
    span = max(hi - lo, 1e-30)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * most >= span * (1 - 1e-9))
    return [k * step for k in range(math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9) + 1)]


def place(value, lo: float, hi: float, start: float, end: float):
    """[lo, hi] to [start, end]; what lies beyond is set on the edge, and lo = hi in the middle."""
    share = (np.clip(value, lo, hi) - lo) / (hi - lo) if hi > lo else value * 0 + 0.5
    return start + share * (end - start)


def points(xs, ys, between: str = "L") -> str:
    """Data of an SVG path through points; between="h0M" and a last h0 make dots of them."""
    return "M" + between.join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys))


def draw(curve: Curve, data: np.ndarray, resumed=()) -> str:
    """A chart; data (2 + lines beside it, n): steps, values of curve.key, those of curve.more."""
    times, unit = (100, " %") if curve.share else (1, "")
    steps, values = data[0], times * data[1:]
    ends = [np.quantile(values[0], q, method=m) for q, m in ((0.01, "lower"), (0.99, "higher"))]
    lines = [smooth(v) for v in (np.clip(values[0], *ends), *values[1:])]  # spikes bend no line
    bounds = [*ends, *(times * v for v in curve.axis), *np.ravel(lines[1:])]
    rows, out = ticks(float(min(bounds)), float(max(bounds))), []
    right = functools.partial(place, lo=steps[0], hi=steps[-1], start=LEFT, end=RIGHT)
    up = functools.partial(place, lo=rows[0], hi=rows[-1], start=BOTTOM, end=TOP)
    for v in rows:
        out.append(f'<path class="grid" d="M{LEFT} {up(v):.1f}H{RIGHT}"/><text x="{LEFT - 6}" '
                   f'y="{up(v) + 4:.1f}" text-anchor="end">{show(v)}{unit}</text>')  # fmt: skip
    for v in ticks(steps[0], steps[-1], 6):
        if steps[0] <= v <= steps[-1] and v == int(v):
            out.append(f'<text x="{right(v):.1f}" y="{H - 6}" text-anchor="middle">{show(v)}'
                       "</text>")  # fmt: skip
    for v in resumed:
        out.append(f'<path class="resumed" d="M{right(v):.1f} {TOP}V{BOTTOM}"/>')
    at = spread(range(len(steps)), 400)
    xs = right(steps[at])
    out.append(f'<path class="dots" d="{points(xs, up(values[0, at]), "h0M")}h0"/>')
    for i, line in enumerate(lines):
        out.append(f'<path class="line l{i}" d="{points(xs, up(line[at]))}"/>')
    names = [esc(FAMILY.sub("", key)) for key in (curve.key, *curve.more)]
    wide = (RIGHT - LEFT) / max(1, min(len(at), 60) - 1)
    for i in spread(at, 60):
        now = ", ".join(f"{name} {show(v)}{unit}" for name, v in zip(names, values[:, i]))
        out.append(f'<rect x="{right(steps[i]) - wide / 2:.1f}" width="{wide:.1f}" height='
                   f'"{BOTTOM}"><title>step {show(steps[i])}: {now}</title></rect>')  # fmt: skip
    title, first, last = esc(curve.title), *(f"{show(lines[0][i])}{unit}" for i in (0, -1))
    legend = ", ".join(f'<b class="l{i}">{name} {show(line[-1])}{unit}</b>'
                       for i, (name, line) in enumerate(zip(names, lines)) if i)  # fmt: skip
    return (f'<figure><h3>{title} <b>{last}</b></h3><svg viewBox="0 0 {W} {H}" role="img" '
            f'aria-label="{title}: {first} at first, {last} at last">{"".join(out)}</svg>'
            f"<figcaption>{curve.says} {legend}</figcaption></figure>")  # fmt: skip
