"""Report: a run as a page, with curves, and pictures with what was said about them.

    python report.py runs/tiny        # reads the folder of a run, writes runs/tiny/report.html

The page is one file without script or network; its Content-Security-Policy forbids both. What a run
says is shown, never obeyed: every string passes through `esc`. A page can be written at any time:
what is not there is left out, broken lines are skipped, of a step logged twice the later counts.
"""

import base64
import contextlib
import functools
import html
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rewards import ANSWER, THINK, gold_answer

STEPS, GROUPS, COMPLETIONS, PROBES = 3, 3, 12, 9  # samples: steps, of each, of each; probed steps
TEXT, PICTURE = 2400, 2_000_000  # characters of a completion, bytes of a picture, at most
W, H, LEFT, RIGHT, TOP, BOTTOM = 320, 150, 44, 308, 10, 126  # a chart and its frame, in pixels


class Curve(NamedTuple):
    """A chart: a metric, what it means and what is healthy, and how it is drawn."""

    key: str
    title: str
    says: str
    share: bool = False  # in per cent
    axis: tuple = (0,)  # values that the axis shows in any case
    band: tuple = ()  # metrics of the lower and the upper edge


CURVES = (
    Curve("reward", "Reward", "Weighted sum, mean over completions. Should rise, then level off."),
    Curve("reward/accuracy", "Accuracy", "Sampled completions with the right answer. Should rise; "
          "greedy answers, as in the table above, are mostly better.", True, (0, 1)),
    Curve("reward/format", "Format", "Form as asked for. Should near 100 % early.", True, (0, 1)),
    Curve("nll", "Loss", "Nats per learnt token. Should fall."),
    Curve("held_out_nll", "Held-out loss", "Of rows not learnt. A rise: others are memorized."),
    Curve("format_only", "Format only", "Right form, wrong answer. Must fall again.", True, (0, 1)),
    Curve("no_signal", "Groups without signal", "All rewards equal, no gradient.", True, (0, 1)),
    Curve("entropy", "Entropy", "Nats per token. Should fall slowly; at 0 exploration has ended."),
    Curve("kl", "KL to the start", "Nats per token. A slow rise is learning, a jump is a warning."),
    Curve("length/mean", "Length", "Tokens of a completion: mean, shortest, longest.",
          band=("length/min", "length/max")),
    Curve("truncated", "Cut off", "Completions that the limit stopped. Should be near 0 %.", True),
    Curve("clip_share", "Clipped", "Tokens beyond the trust region: a few per cent at most.", True),
    Curve("grad_norm", "Gradient norm", "Unclipped. A spike is harmless, a climb: lr too large."),
    Curve("mismatch", "Sampler against trainer", "Mean of exp|difference of their log-probs|. 1 is "
          "exact agreement; must stay below 1.02.", axis=(1, 1.02)),
    Curve("completions_per_second", "Completions per second", "Of a whole step. Should be steady."),
)  # fmt: skip


def read(path: Path) -> list[dict]:
    """The object of a .json; of a .jsonl those with a step, in order. Broken ones are skipped."""
    kept, lines = {}, path.suffix == ".jsonl"
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    for part in text.split("\n") if lines else [text]:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(part)
            if isinstance(row, dict) and (not lines or number(row.get("step")) is not None):
                kept[tuple(str(row.get(k)) for k in ("step", "problem", "images"))] = row
    return sorted(kept.values(), key=lambda row: row["step"]) if lines else list(kept.values())


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


# Control characters, those that turn the direction of a line, and halves of surrogate pairs.
HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TAGS = re.compile("|".join(html.escape(tag) for tag in THINK + ANSWER))


def esc(x) -> str:
    """Anything as text, also for inside an attribute."""
    return html.escape(HIDDEN.sub("\ufffd", str(x)))


def said(x) -> str:
    """A completion: escaped, cut in the middle if it is long, its tags set apart."""
    text, half = str(x), TEXT // 2
    if len(text) > TEXT:
        text = f"{text[:half]}\n[… {len(text) - TEXT:,} characters …]\n{text[-half:]}"
    return "<pre>" + (TAGS.sub(r"<i>\g<0></i>", esc(text)) or "<i>(nothing)</i>") + "</pre>"


def marks(rewards: dict | None) -> str:
    """For each reward a sign and a word: 1 is a tick, 0 a cross, anything else its number."""
    out = []
    for name, value in (rewards or {}).items():
        kind, sign = {1: ("yes", "✓"), 0: ("no", "✗")}.get(number(value), ("", show(value)))
        word = {"yes": "right", "no": "wrong"}.get(kind, name) if name == "accuracy" else name
        out.append(f'<span class="{kind}">{sign} {esc(word)}</span>')
    return " ".join(out)


def picture(folder: Path, name, alt: str = "") -> str:
    """The picture at a path relative to the run, inlined; a note if it is missing or outside."""
    root, data, size = folder.resolve(), b"", ""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # unreadable, NUL, a loop of links
        path = (root / str(name)).resolve()
        if path.is_relative_to(root) and path.is_file() and path.stat().st_size <= PICTURE:
            data = path.read_bytes()
    kinds = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"RIFF": "webp"}
    kind = next((kinds[start] for start in kinds if data.startswith(start)), None)
    if kind is None:
        return f"<p>No picture: {esc(name)} is missing, outside the run, too large or no image.</p>"
    if kind == "png":  # its header holds the size; a small picture is enlarged by a whole number
        wide, high = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        times = max(1, 224 // max(1, wide))
        size = f'width="{wide * times}" height="{high * times}" class="{"pixels" * (times > 1)}"'
    code = base64.b64encode(data).decode()
    return f'<img alt="{esc(alt)}" {size} src="data:image/{kind};base64,{code}">'


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


def draw(curve: Curve, data: np.ndarray) -> str:
    """Heading and SVG of a chart; data (2 or 4, n): steps, values and, for a band, its edges."""
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
    at = spread(range(len(steps)), 400)
    xs, raw, (mean, *edges) = right(steps[at]), up(values[0, at]), [up(line[at]) for line in lines]
    if edges:
        around = points([*xs, *xs[::-1]], [*edges[0], *edges[1][::-1]])
        out.append(f'<path class="band" d="{around}Z"/>')
    out.append(f'<path class="dots" d="{points(xs, raw, "h0M")}h0"/>'
               f'<path class="line" d="{points(xs, mean)}"/>')  # fmt: skip
    wide = (RIGHT - LEFT) / max(1, min(len(at), 60) - 1)
    for i in spread(at, 60):
        now = f"<title>step {show(steps[i])}: {show(values[0, i])}{unit}</title>"
        x = right(steps[i]) - wide / 2
        out.append(f'<rect x="{x:.1f}" width="{wide:.1f}" height="{BOTTOM}">{now}</rect>')
    title, first, last = esc(curve.title), *(f"{show(lines[0][i])}{unit}" for i in (0, -1))
    return (f'<h3>{title} <b>{last}</b></h3><svg viewBox="0 0 {W} {H}" role="img" aria-label='
            f'"{title}: {first} at first, {last} at last">{"".join(out)}</svg>')  # fmt: skip


def curves(rows: list[dict]) -> str:
    """A chart for every metric that is there; those that are always 0 are only named."""
    own = {k for row in rows for k in row if k.startswith("reward/")} - {c.key for c in CURVES}
    own = [Curve(k, k.removeprefix("reward/"), "Mean of this reward.") for k in sorted(own)]
    out, zero = [], []
    for curve in (*CURVES[:3], *own, *CURVES[3:]):
        data = series(rows, "step", curve.key, *curve.band)
        if data.size and not data[1].any():
            zero.append(esc(curve.title))
        elif data.size:
            out.append(f"<figure>{draw(curve, data)}<figcaption>{curve.says}</figcaption></figure>")
    never = f"<p>Always 0, not drawn: {', '.join(zero)}.</p>" * bool(zero)
    return f'<div class="curves">{"".join(out)}</div>{never}' * bool(out or zero)


def results(summary: dict) -> str:
    """The evaluations before and after as a table; empty if there is none."""
    out, found = [], {when: summary.get(when) or {} for when in ("before", "after")}
    for name in dict.fromkeys(name for sets in found.values() for name in sets):
        for when, row in ((when, sets[name]) for when, sets in found.items() if name in sets):
            x, low, high = (100 * (number(row.get(k)) or 0) for k in ("accuracy", "low", "high"))
            shares = [show(row.get(k), True) for k in ("accuracy", "format", "unparsable")]
            shares[0] = (f"<b>{shares[0]}</b> <small>{low:.1f} to {high:.1f}</small></td><td><svg "
                         'viewBox="-4 0 108 10"><path class="grid" d="M0 5H100"/><path class="line"'
                         f' d="M{low:.1f} 5H{high:.1f}"/><circle cx="{x:.1f}" cy="5" r="3"/></svg>')
            cells = "</td><td>".join((*shares, show(row.get("length")), show(row.get("n"))))
            out.append(f'<tr class="{when}"><th scope="row">{esc(name)} <small>{when}</small></th>'
                       f"<td>{cells}</td></tr>")  # fmt: skip
    titles = ("Set", "Accuracy", "0 to 100 %", "Format", "Unparsable", "Tokens", "n")
    top = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(out)}</tbody></table>" * bool(out)


def asked(folder: Path, row: dict, lines: list[str]) -> str:
    """A question with its pictures and right answer, and beside it what was said, line by line."""
    problem, gold = str(row.get("problem", "")), gold_answer(str(row.get("solution", "")))
    images = [picture(folder, name, f"Picture for: {problem}") for name in row.get("images") or []]
    prompt = f"<details><summary>Prompt</summary><pre>{esc(row.get('prompt'))}</pre></details>"
    return (f"<article><div>{''.join(images)}<h3>{esc(problem)}</h3><p>Right answer: <b>{esc(gold)}"
            f"</b></p>{prompt * ('prompt' in row)}</div><ol>{''.join(lines)}</ol></article>")


def probes(folder: Path, rows: list[dict]) -> str:
    """Every question that was followed, with a line per probed step."""
    followed = {}
    for row in spread(rows, PROBES):
        for i, answer in enumerate(row.get("answers") or []):
            line = (f"<li><p>step {show(row['step'])} {marks(answer.get('rewards'))}</p>"
                    f"{said(answer.get('text', ''))}</li>")  # fmt: skip
            followed.setdefault((i, answer.get("problem")), (answer, []))[1].append(line)
    return "".join(asked(folder, answer, lines) for answer, lines in followed.values())


def group(folder: Path, row: dict) -> str:
    """A prompt with its completions, the highest advantage first."""
    lines, done = [], [(number(c.get("advantage")) or 0.0, c) for c in row.get("completions") or []]
    for adv, c in spread(sorted(done, key=lambda pair: -pair[0]), COMPLETIONS):
        kind, sign = ("up", "▲ +") if adv > 0 else ("down", "▼ ") if adv < 0 else ("", "")
        lines.append(f'<li class="{kind}"><p><b>{sign}{adv:.2f}</b> reward {show(c.get("reward"))} '
                     f"{marks(c.get('rewards'))} {show(c.get('length'))} tokens"
                     f"{', cut off' * (not c.get('finished', True))}</p>{said(c.get('text', ''))}"
                     "</li>")  # fmt: skip
    return asked(folder, row, lines)


def page(folder: Path) -> str:
    """The whole page of a run's folder."""
    config, summary = ((read(folder / f"{k}.json") or [{}])[0] for k in ("config", "summary"))
    metrics, probed = read(folder / "metrics.jsonl"), read(folder / "probes.jsonl")
    logged = read(folder / "rollouts.jsonl")
    keys = ("model", "data", "steps", "prompts", "group", "batch", "rewards", "beta", "lr", "seed")
    plain = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in config.items()}
    about = " · ".join(f"{k} <b>{esc(plain[k])}</b>" for k in keys if plain.get(k) is not None)
    late = f"Not finished: as of step {show(metrics[-1]['step'] if metrics else 0)}."
    notes = (about, esc(config.get("note") or ""), late * ("after" not in summary))
    parts = [("Curves", "A dot is a step, or lies beyond the edge that it is on; the line is their "
              "local mean, the number its last value.", curves(metrics)),
             ("The same questions as it learns", "Answered greedily.", probes(folder, probed))]
    for step in spread(list(dict.fromkeys(row["step"] for row in logged)), STEPS):
        groups = [group(folder, row) for row in logged if row["step"] == step][:GROUPS]
        parts.append((f"Samples of step {show(step)}", "By advantage: ▲ is made likelier, ▼ less "
                      "likely.", "".join(groups)))  # fmt: skip
    body = "".join(f"<section><h2>{title}</h2><p>{text}</p>{found or '<p>Nothing was logged.</p>'}"
                   "</section>" for title, text, found in parts)  # fmt: skip
    return PAGE.format(name=esc(folder.resolve().name), style=STYLE, body=body,
                       about="</p><p>".join(filter(None, notes)), table=results(summary),
                       config=esc(json.dumps(config, indent=1)))


def write(folder) -> Path:
    """Writes FOLDER/report.html, whole or not at all. FileNotFoundError if FOLDER holds no run."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
        raise FileNotFoundError(f"{folder}: neither config.json nor metrics.jsonl, so not a run")
    part = folder / "report.html.tmp"
    part.write_text(page(folder), encoding="utf-8")
    os.replace(part, folder / "report.html")
    return folder / "report.html"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src
'unsafe-inline'"><link rel="icon" href="data:,"><title>{name}</title><style>{style}</style></head>
<body><main><h1>{name}</h1><p>{about}</p>{table}{body}<section><details><summary>config.json
</summary><pre>{config}</pre></details></section></main></body></html>
"""
STYLE = """
:root {color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1c1a; --soft: #625d55; --rule: #e0dbd1;
--line: #1f5c99; --yes: #1b6b3a; --no: #a3341f} @media (prefers-color-scheme: dark) {:root {
--paper: #15161a; --ink: #e8e4dc; --soft: #a8a298; --rule: #34353c; --line: #7db4ec; --yes: #7fcf9b;
--no: #f0957f}} * {box-sizing: border-box; margin: 0} body {max-width: 72rem; padding: 3rem 1rem;
margin: auto; background: var(--paper); color: var(--ink); font: 16px/1.5 Charter, Georgia, serif;
overflow-wrap: anywhere} h1, h2, h3 {font-weight: 600; line-height: 1.25} h1 {font-size: 2rem} h2
{margin: 3rem 0 .4rem; padding-top: 1rem; border-top: 1px solid; font-size: 1.35rem} h3 {font-size:
1rem} p, small, figcaption, summary {color: var(--soft)} p b {color: var(--ink)} p, figcaption,
summary {font-size: 14px} pre i {color: var(--soft)} svg, table, pre, ol p {font: 13px/1.5
system-ui, sans-serif; font-variant-numeric: tabular-nums} pre {white-space: pre-wrap; font-family:
ui-monospace, monospace} table {width: 100%; margin: 1.5rem 0; border-collapse: collapse} td {
white-space: nowrap} th, td {padding: .25rem .5rem .25rem 0; text-align: left} td svg {width: 9rem}
thead {overflow-wrap: normal} thead th, .after td, .after th {border-bottom: 1px solid var(--rule)}
svg {display: block; overflow: visible; fill: var(--soft); font-size: 11px} circle, .band {fill:
var(--line)} path {fill: none} .grid {stroke: var(--rule)} .line, .dots, .before circle {stroke:
var(--line); stroke-width: 2} .before circle {fill: var(--paper); stroke-width: 1} .band {opacity:
.15} .dots { stroke-width: 3; stroke-linecap: round; opacity: .25} rect {opacity: 0} rect:hover
{opacity: .15} .curves {display: grid; gap: 2rem 2.5rem; margin: 1.5rem 0; grid-template-columns:
repeat(auto-fill, minmax(min(100%, 19rem), 1fr))} .curves h3 {display: flex; justify-content:
space-between} img {display: block; max-width: 100%; height: auto; margin-bottom: .6rem} article
{margin: 2rem 0} .pixels {image-rendering: pixelated} .yes {color: var(--yes)} .no {color:
var(--no)} ol {padding: 0} li {display: block; padding: .3rem .7rem; border-left: 3px solid
var(--rule); margin-bottom: 2px} .up {border-color: var(--yes)} .down {border-color: var(--no)}
@media (min-width: 52rem) {article, li {display: grid; grid-template-columns: 15rem 1fr; gap: 2rem}
li {gap: 1rem}} ol span {white-space: nowrap} @media (max-width: 40rem) {small {display: block} tr >
:nth-child(3), tr > :last-child {display: none} tbody th { min-width: 4.5rem}}
"""


def main() -> None:
    print(write(sys.argv[1]) if len(sys.argv) == 2 else __doc__)


if __name__ == "__main__":
    main()
