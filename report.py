"""Report: a run as a page: curves, and pictures with what was said about them.

    python report.py runs/tiny        # reads the run's folder, writes runs/tiny/report.html

The page is one file without script, network or font of its own; a Content-Security-Policy forbids
them too. Strings of a run are shown and never obeyed: all of them pass through `esc`. It can be
written at any time, also while the run goes on or after it was killed: what is missing is left out,
and a line that is broken is skipped. Of steps logged twice (a resumed run) the later line counts.
"""

import base64
import html
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rewards import gold_answer

STEPS, PROMPTS, COMPLETIONS, ROWS = 3, 3, 12, 9  # samples and probe rows at most
TEXT, PICTURE = 2400, 2_000_000  # characters of a text, bytes of a picture at most
W, H, LEFT, RIGHT, TOP, BOTTOM = 320, 150, 42, 310, 10, 128  # a chart and its frame, pixels


@dataclass(frozen=True)
class Curve:
    """One chart: the metric, and a sentence on what it means and what is healthy."""

    key: str
    title: str
    says: str
    share: bool = False  # drawn in per cent
    include: tuple = ()  # values that the axis shows in any case
    band: tuple = ()  # metrics of a lower and an upper edge
    limit: float | None = None  # a dashed line


CURVES = (
    Curve("reward", "Reward", "Weighted sum of the rewards, mean over the completions of a step. "
          "Should rise, then level off."),
    Curve("reward/accuracy", "Accuracy", "Share of sampled completions with the right answer. "
          "Should rise; greedy answers are usually better than sampled ones.", True, (0, 1)),
    Curve("reward/format", "Format", "Share in the form that was asked for. Should come close to "
          "100 % early and stay.", True, (0, 1)),
    Curve("format_only", "Format only", "Right in form, wrong in answer. Often rises first; should "
          "then fall: a high plateau means that only the form was learnt.", True, (0, 1)),
    Curve("no_signal", "Groups without signal", "Groups whose rewards are all equal: they give no "
          "gradient. Near 100 % the questions are too easy or too hard to learn from.", True, (0, 1)),
    Curve("reward_std", "Spread in a group", "Standard deviation of the reward inside a group, the "
          "source of all gradient. Shrinks as answers agree; 0 is the end of learning.", False, (0,)),
    Curve("entropy", "Entropy", "Nats per sampled token. Should fall slowly; a drop to 0 in a few "
          "steps ends exploration, a rise is a model coming apart.", False, (0,)),
    Curve("kl", "KL to the start", "Nats per token that the policy has moved from where it started. "
          "A slow rise is learning; a jump is a warning.", False, (0,)),
    Curve("length/mean", "Length", "Tokens of a completion: the mean, and the band from shortest to "
          "longest. A band that touches the limit of the run means answers are cut.", False, (0,),
          ("length/min", "length/max")),
    Curve("truncated", "Cut off", "Completions that reached the longest length without an end. "
          "Should be near 0 %: they rarely hold an answer.", True, (0,)),
    Curve("clip_share", "Clipped", "Tokens whose ratio is outside the trust region, so that they do "
          "not train. 0 with one update per batch, else a few per cent.", True, (0,)),
    Curve("grad_norm", "Gradient norm", "Before it is scaled down. Single spikes are harmless; a "
          "steady climb says that the step size is too large.", False, (0,)),
    Curve("mismatch", "Sampler against trainer", "Mean of exp|log-prob when sampled - log-prob when "
          "trained|. 1 is exact agreement; must stay below the dashed 1.02.", False, (1, 1.02),
          limit=1.02),
    Curve("no_reward", "Without a reward", "Completions that no reward function could score. "
          "Should be 0 %.", True, (0,)),
    Curve("skipped", "Skipped updates", "Updates left out because loss or gradient was not finite. "
          "Should be 0.", False, (0,)),
    Curve("lr", "Step size", "What the optimizer used, after warm-up and schedule.", False, (0,)),
    Curve("completions_per_second", "Completions per second", "Speed of the whole step, sampling "
          "and update. Should be steady; falls when completions grow.", False, (0,)),
)  # fmt: skip

# ------------------------------------------------------------------------------ reading a run


def read_json(path: Path) -> dict:
    """A JSON object; empty where the file is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a .jsonl that have a step, in order of steps; broken lines are skipped."""
    rows = []
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict) and number(row.get("step")) is not None:
                    rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


def number(x) -> float | None:
    """x if it is a finite number of a size that can be drawn, else None."""
    fine = isinstance(x, int | float) and not isinstance(x, bool) and -1e30 < x < 1e30
    return float(x) if fine else None


def objects(row: dict, key: str) -> list[dict]:
    """row[key] as a list of objects; empty where it is anything else."""
    found = row.get(key)
    return [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []


def series(rows: list[dict], *keys: str) -> np.ndarray:
    """(1 + keys, n): step and metrics of the steps where all keys are finite; the later line wins."""
    found = {}
    for row in rows:
        values = [number(row.get(key)) for key in ("step", *keys)]
        if None not in values:
            found[values[0]] = values
    return np.array(list(found.values())).reshape(-1, 1 + len(keys)).T


def spread(items: list, most: int) -> list:
    """`most` items at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


# ---------------------------------------------------------------------------- text for a page

VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys([*range(0xD800, 0xE000), *range(0x80, 0xA0)], 0xFFFD)  # no characters
VISIBLE |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)  # turn lines round


def esc(x) -> str:
    """Any value as text of a page, also inside an attribute; control characters become visible."""
    return html.escape(str(x).translate(VISIBLE))


def said(x) -> str:
    """A text of the model, escaped, cut in the middle if it is long, its tags set apart."""
    text = x if isinstance(x, str) else ""
    if len(text) > TEXT:
        half = TEXT // 2
        text = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
    tags = re.sub(r"&lt;/?(think|answer)&gt;", r'<span class="tag">\g<0></span>', esc(text))
    return f'<pre class="said">{tags or "(nothing)"}</pre>'


def show(x, share: bool = False) -> str:
    """A number with three digits, or a share in per cent; a dash where there is none."""
    x = number(x)
    if x is None:
        return "–"
    if share:
        return f"{100 * x:.1f} %"
    big = abs(x) >= 100
    return (f"{x:,.0f}" if big and abs(x) < 1e6 else f"{x:.3g}").replace("-", "−")


def verdicts(rewards) -> str:
    """A mark, a word and a colour per reward function: 1 is a tick, 0 a cross, else the number."""
    words = {("accuracy", 1): "right", ("accuracy", 0): "wrong"}
    marks = []
    for name, value in (rewards if isinstance(rewards, dict) else {}).items():
        value = number(value)
        word = esc(words.get((name, value), name))
        if value in (0, 1):
            kind, sign = ("yes", "✓") if value else ("no", "✗")
            marks.append(f'<span class="{kind}">{sign} {word}</span>')
        else:
            marks.append(f"<span>{word} {show(value)}</span>")
    return " ".join(marks)


def picture(folder: Path, name, alt: str) -> str:
    """The picture at a path relative to the run, inlined; a note where it may or can not be read."""
    root = Path(folder).resolve()
    try:
        path = (root / str(name)).resolve()
        if not path.is_relative_to(root):
            return f'<p class="note">picture {esc(name)} lies outside the run</p>'
        if path.stat().st_size > PICTURE:
            return f'<p class="note">picture {esc(name)} is too large to be shown here</p>'
        data = path.read_bytes()
    except (OSError, ValueError, RuntimeError):  # missing; NUL in the name; a loop of links
        return f'<p class="note">picture {esc(name)} is missing</p>'
    starts = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
    kind = next((kind for start, kind in starts.items() if data.startswith(start)), None)
    if kind is None:
        return f'<p class="note">{esc(name)} is not a PNG, JPEG, WebP or GIF</p>'
    size = ""
    if kind == "png":  # width and height stand in the header
        wide, high = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        times = max(1, 224 // max(1, wide))  # small pictures are enlarged by a whole number
        size = f' width="{wide * times}" height="{high * times}"'
        size += ' class="pixels"' if times > 1 else ""
    code = base64.b64encode(data).decode()
    return f'<img alt="{esc(alt)}"{size} src="data:image/{kind};base64,{code}">'


def pictures(folder: Path, row: dict) -> str:
    """All pictures of a row, beside each other."""
    names = row.get("images")
    names = names if isinstance(names, list) else []
    alt = f"picture for the question: {str(row.get('problem', ''))[:200]}"
    return f'<div class="pictures">{"".join(picture(folder, n, alt) for n in names)}</div>'


def question(row: dict) -> str:
    """The question and its right answer."""
    gold = gold_answer(str(row.get("solution", "")))
    return (f'<h3 class="question">{esc(row.get("problem", ""))}</h3>'
            f'<p class="soft">right answer: <strong>{esc(gold)}</strong></p>')  # fmt: skip


# -------------------------------------------------------------------------------------- curves


def smooth(values: np.ndarray) -> np.ndarray:
    """Local mean (n,): triangle weights over n // 20 neighbours on each side, fewer at the ends."""
    weights = np.bartlett(2 * (len(values) // 20) + 3)[1:-1]
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


def thin(values: np.ndarray, most: int = 400) -> list[int]:
    """At most `most` indices: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(values) <= most:
        return list(range(len(values)))
    kept = set()
    for part in np.array_split(np.arange(len(values)), most // 2):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    return sorted(kept)


def ticks(lo: float, hi: float, most: int = 4) -> tuple[list[float], float]:
    """Round numbers that enclose lo to hi, and their distance: 1, 2 or 5 times a power of ten."""
    if hi - lo < 1e-9 * max(abs(lo), abs(hi), 1e-9):
        lo, hi = lo - (abs(lo) / 2 or 0.5), hi + (abs(hi) / 2 or 0.5)
    power = 10.0 ** math.floor(math.log10((hi - lo) / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * most >= (hi - lo) * (1 - 1e-9))
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return [k * step for k in range(first, last + 1)], step


def label(value: float, step: float) -> str:
    """A tick as short as its distance to the next allows."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits > 4 or abs(value) >= 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("-", "−")
    return f"{value:,.{digits}f}".replace("-", "−")


def place(value, lo: float, hi: float, start: float, end: float):
    """value in [lo, hi] to [start, end]; values beyond are set on the edge, lo = hi on the middle."""
    if lo == hi:
        return value * 0 + (start + end) / 2
    return start + (np.clip(value, lo, hi) - lo) / (hi - lo) * (end - start)


def path(xs, ys, between: str = "L", end: str = "") -> str:
    """Data of an SVG path through points; with between='M', end='h0' a dot on each."""
    points = (f"{x:.1f} {y:.1f}{end}" for x, y in zip(xs, ys))
    return "M" + between.join(points)


def draw(curve: Curve, data: np.ndarray) -> str:
    """The SVG of a chart. data (2 or 4, n): steps, values, and the edges of a band."""
    data = data.copy()
    data[1:] *= 100 if curve.share else 1
    unit = " %" if curve.share else ""
    steps, values, line = data[0], data[1], smooth(data[1])
    edges = [smooth(edge) for edge in data[2:]]
    lo, hi = np.quantile(values, 0.01, method="lower"), np.quantile(values, 0.99, method="higher")
    need = [100 * v if curve.share else v for v in curve.include]
    need += [f(edge) for edge in edges for f in (min, max)]
    rows, step = ticks(float(min(lo, *need)) if need else lo, float(max(hi, *need)) if need else hi)
    xs = place(steps, steps[0], steps[-1], LEFT, RIGHT)
    ys, mean = (place(v, rows[0], rows[-1], BOTTOM, TOP) for v in (values, line))
    heights = [place(v, rows[0], rows[-1], BOTTOM, TOP) for v in rows]
    out = [f'<path class="grid" d="{"".join(f"M{LEFT} {y:.1f}H{RIGHT}" for y in heights)}"/>']
    out += [f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label(v, step)}{unit}</text>'
            for v, y in zip(rows, heights)]
    columns, distance = ticks(steps[0], steps[-1], 5)
    for v in columns if distance >= 1 else steps[:1]:
        if steps[0] <= v <= steps[-1]:
            x = place(v, steps[0], steps[-1], LEFT, RIGHT)
            out.append(f'<text x="{x:.1f}" y="{H - 6}" text-anchor="middle">{label(v, 1)}</text>')
    some = spread(range(len(steps)), 200)
    if edges:
        low, high = (place(e, rows[0], rows[-1], BOTTOM, TOP)[some] for e in edges)
        around = path([*xs[some], *xs[some][::-1]], [*high, *low[::-1]])
        out.append(f'<path class="band" d="{around}Z"/>')
    if curve.limit is not None:
        y = place(curve.limit, rows[0], rows[-1], BOTTOM, TOP)
        out.append(f'<path class="limit" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
    dots = thin(values)
    out.append(f'<path class="dots" d="{path(xs[dots], ys[dots], "M", "h0")}"/>')
    out.append(f'<path class="line" d="{path(xs[some], mean[some])}"/>')
    hover = spread(range(len(steps)), 60)
    wide = (RIGHT - LEFT) / max(1, len(hover) - 1)
    for i in hover:
        more = "".join(f", {name} {show(v)}" for name, v in zip(("min", "max"), data[2:, i]))
        out.append(f'<rect x="{xs[i] - wide / 2:.1f}" y="{TOP}" width="{wide:.1f}" height="118">'
                   f"<title>step {steps[i]:.0f}: {show(values[i])}{unit}{more}</title></rect>")
    text = f"{curve.title}: {show(line[0])}{unit} at first, {show(line[-1])}{unit} at last"
    return f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(text)}">{"".join(out)}</svg>'
