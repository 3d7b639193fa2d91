"""Report: a run as a page, with curves, and pictures with what was said about them.

    python report.py runs/tiny        # reads the folder of a run, writes runs/tiny/report.html

Of a recipe of several stages (run.py) each has its page, and all have one in the folder above them.

The page is one file without script or network; its Content-Security-Policy forbids both. What a run
says is shown, never obeyed: every string passes through `esc`. A page can be written at any time:
what is not there is left out, broken lines are skipped, of a step logged twice the later counts.
That of a running run says so and is loaded again every minute.
"""

import contextlib
import html
import json
import os
import re
import sys
import time
from pathlib import Path

import overlay
from chart import Curve, draw, esc, number, series, show, spread
from overlay import inlined, load, overlaid
from rewards import ANSWER, THINK, gold_answer
from scorers import NUMBERS, evaluated, further

STEPS, GROUPS, COMPLETIONS, PROBES = 3, 3, 12, 9  # samples: steps, of each, of each; probed steps
TEXT = 2400  # characters of a completion at most
PHASES = ("sample", "update", "log", "save", "eval")  # of a step
TAGS = re.compile("|".join(html.escape(tag) for tag in THINK + ANSWER))

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
          more=("length/min", "length/max")),
    Curve("truncated", "Cut off", "Completions that the limit stopped. Should be near 0 %.", True),
    Curve("clip_share", "Clipped", "Tokens beyond the trust region: a few per cent at most.", True),
    Curve("grad_norm", "Gradient norm", "Unclipped. A spike is harmless, a climb: lr too large.",
          more=("grad_norm/vision", "grad_norm/merger", "grad_norm/language")),
    Curve("mismatch", "Sampler against trainer", "Mean of exp|difference of their log-probs|. 1 is "
          "exact agreement; must stay below 1.02.", axis=(1, 1.02)),
    Curve("reward_killed", "Killed rewards", "Completions without a reward: it took too long, or "
          "too much memory, or crashed.", True),
    Curve("reward_failed", "Failed rewards", "Completions without a reward: its function raised.",
          True),
    Curve("tokens_per_second", "Tokens per second", "Of a whole step. Should be steady."),
    Curve("share/sample", "Time for sampling", "Share of a step's time, and the other phases'.",
          True, (0, 1), tuple(f"share/{phase}" for phase in PHASES[1:])),
    Curve("memory_gb", "Memory", "GB at the peak, of the fullest process. Should level off."),
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


def pictures(folder: Path, row: dict) -> str:
    """Those of a question, side by side, with its true boxes; a note for what cannot be shown."""
    out, alt = [], f"Picture for: {row.get('problem', '')}"
    for i, name in enumerate(row.get("images") or []):
        if (picture := load(folder, name)) is None:
            out.append(f"<p>No picture: {esc(name)} is missing, outside the run, too large or no "
                       "image.</p>")  # fmt: skip
        elif "gold_boxes" in row and i == row.get("box_image", 0) and picture.size:
            out.append(overlaid(picture, alt, row["gold_boxes"]))
        else:
            out.append(inlined(picture, alt))
    key = overlay.LEGEND if "gold_boxes" in row else ""
    return f'<div class="pictures">{"".join(out)}</div>{key}' * bool(out)


def pointed(folder: Path, row: dict, answer: dict) -> str:
    """The picture of a question again, with its true boxes and those that an answer says."""
    names, at = row.get("images") or [], row.get("box_image", 0)
    known = answer.get("boxes") and "gold_boxes" in row and at in range(len(names))
    picture = load(folder, names[at]) if known else None
    if picture is None or picture.size is None:
        return ""
    alt = "The same, with the boxes of this answer"
    return overlaid(picture, alt, row["gold_boxes"], answer["boxes"], again=True)


def curves(rows: list[dict], summary: dict) -> str:
    """A chart for every metric that is there; those that are always 0 are only named. Evaluations
    begin and end with those before and after, of the summary."""
    resumed = [row["step"] for row in rows if row.get("resumed") is True]
    for row in rows:
        spent = {phase: number(row.get(f"time/{phase}")) or 0.0 for phase in PHASES}
        if spent["sample"]:
            row |= {f"share/{phase}": v / sum(spent.values()) for phase, v in spent.items()}
    found = {key for row in rows for key in row}
    own = [Curve(k, k[7:], "Mean of this reward.") for k in sorted(found - {c.key for c in CURVES})
           if k.startswith("reward/")]  # fmt: skip
    for k in sorted(k for k in found if k.startswith("eval/") and k.count("/") == 1):
        own.append(Curve(k, f"{k[5:]}, greedy", "Right answers to all questions of this set. "
                         "Should rise.", True, (0, 1)))  # fmt: skip
        if also := [f"{k}/{key}" for key in NUMBERS if f"{k}/{key}" in found]:
            said = ", ".join(NUMBERS[key.rpartition("/")[2]] for key in also)
            own.append(Curve(also[0], f"{k[5:]}: {said}", "Over all questions of this set.",
                             False, (0, 1), tuple(also[1:])))  # fmt: skip
    for when, at in (("before", 0), ("after", rows[-1]["step"] if rows else 0)):
        rows = [*rows, {"step": at, **evaluated(summary.get(when) or {})}]
    rows.sort(key=lambda row: row["step"])
    out, zero = [], []
    for curve in (*CURVES[:3], *own, *CURVES[3:]):
        some = (key for key in curve.more if any(number(row.get(key)) for row in rows))
        curve = curve._replace(more=tuple(some))
        data = series(rows, "step", curve.key, *curve.more)
        if data.size and not data[1:].any():
            zero.append(esc(curve.title))
        elif data.size:
            inside = [v for v in resumed if data[0, 0] <= v <= data[0, -1]]
            out.append(draw(curve, data, inside))
    never = f"<p>Always 0, not drawn: {', '.join(zero)}.</p>" * bool(zero)
    return f'<div class="curves">{"".join(out)}</div>{never}' * bool(out or zero)


def phases(rows: list[dict]) -> str:
    """A sentence: which share of all steps' time each phase had. SFT does not say all of them."""
    spent = {k: sum(number(row.get(f"time/{k}")) or 0.0 for row in rows) for k in PHASES}
    whole = sum(spent.values())
    shares = ", ".join(f"{k} <b>{show(v / whole, True)}</b>" for k, v in spent.items() if v)
    return f" Of the steps' time: {shares}." * bool(spent["sample"])


def results(summary: dict) -> str:
    """The evaluations before and after as a table; empty if there is none."""
    out, found = [], {when: summary.get(when) or {} for when in ("before", "after")}
    there = {key for sets in found.values() for row in sets.values() for key in further(row)}
    more = [key for key in NUMBERS if key in there]
    for name in dict.fromkeys(name for sets in found.values() for name in sets):
        for when, row in ((when, sets[name]) for when, sets in found.items() if name in sets):
            x, low, high = (100 * (number(row.get(k)) or 0) for k in ("accuracy", "low", "high"))
            cells = [f"<b>{show(row.get('accuracy'), True)}</b> <small>{low:.1f} to {high:.1f}"
                     '</small></td><td><svg viewBox="-4 0 108 10"><path class="grid" d="M0 5H100"/>'
                     f'<path class="line" d="M{low:.1f} 5H{high:.1f}"/><circle cx="{x:.1f}" cy="5" '
                     'r="3"/></svg>']  # fmt: skip
            cells += [show(row.get(key)) for key in more]
            cells += [show(row.get(key), True) for key in ("format", "unparsable")]
            cells += [show(row.get(key)) for key in ("length", "n")]
            out.append(f'<tr class="{when}"><th scope="row">{esc(name)} <small>{when}</small></th>'
                       f"<td>{'</td><td>'.join(cells)}</td></tr>")  # fmt: skip
    titles = ("Set", "Accuracy", "0 to 100 %", *(NUMBERS[key] for key in more), "Format",
              "Unparsable", "Tokens", "n")  # fmt: skip
    top = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(out)}</tbody></table>" * bool(out)


def asked(folder: Path, row: dict, lines: list[str]) -> str:
    """A question with its pictures and right answer, and beside it what was said, line by line."""
    problem, gold = str(row.get("problem", "")), gold_answer(str(row.get("solution", "")))
    prompt = f"<details><summary>Prompt</summary><pre>{esc(row.get('prompt'))}</pre></details>"
    return (f"<article><div>{pictures(folder, row)}<h3>{esc(problem)}</h3><p>Right answer: "
            f"<b>{esc(gold)}</b></p>{prompt * ('prompt' in row)}</div><ol>{''.join(lines)}</ol>"
            "</article>")  # fmt: skip


def probes(folder: Path, rows: list[dict]) -> str:
    """Every question that was followed, with a line per probed step."""
    followed = {}
    for row in spread(rows, PROBES):
        for i, answer in enumerate(row.get("answers") or []):
            line = (f"<li><div><p>step {show(row['step'])} {marks(answer.get('rewards'))}</p>"
                    f"{pointed(folder, answer, answer)}</div>{said(answer.get('text', ''))}</li>")
            shown = followed.setdefault((i, answer.get("problem")), [answer, []])
            shown[1].append(line)
            if "gold_boxes" in answer:  # has the picture that those of `pointed` refer to
                shown[0] = answer
    return "".join(asked(folder, answer, lines) for answer, lines in followed.values())


def group(folder: Path, row: dict) -> str:
    """A prompt with its completions, the highest advantage first."""
    lines, done = [], [(number(c.get("advantage")) or 0.0, c) for c in row.get("completions") or []]
    for adv, c in spread(sorted(done, key=lambda pair: -pair[0]), COMPLETIONS):
        kind, sign = ("up", "▲ +") if adv > 0 else ("down", "▼ ") if adv < 0 else ("", "")
        lines.append(f'<li class="{kind}"><div><p><b>{sign}{adv:.2f}</b> reward '
                     f"{show(c.get('reward'))} {marks(c.get('rewards'))} {show(c.get('length'))} "
                     f"tokens{', cut off' * (not c.get('finished', True))}</p>"
                     f"{pointed(folder, row, c)}</div>{said(c.get('text', ''))}</li>")
    return asked(folder, row, lines)


def about_of(config: dict) -> str:
    """The keys of a config that tell most."""
    keys = ("model", "data", "steps", "prompts", "group", "batch", "rewards", "beta", "lr", "seed")
    plain = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in config.items()}
    return " · ".join(f"{k} <b>{esc(plain[k])}</b>" for k in keys if plain.get(k) is not None)


def page(folder: Path, running: bool = False) -> str:
    """The whole page of a run's folder."""
    config, summary = ((read(folder / f"{k}.json") or [{}])[0] for k in ("config", "summary"))
    metrics, probed = read(folder / "metrics.jsonl"), read(folder / "probes.jsonl")
    logged = read(folder / "rollouts.jsonl")
    about = about_of(config)
    late = f"Not finished: as of step {show(metrics[-1]['step'] if metrics else 0)}."
    if running:
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        summary.pop("after", None)  # if there is one, the run was done and got more steps
        late += f" It ran at {now}; until it ends, this page loads itself again every minute."
    notes = (about, esc(config.get("note") or ""), late * (running or "after" not in summary))
    parts = [("Curves", "A dot is a step, or lies beyond the edge that it is on; the line is their "
              "local mean, the number its last value. Upright lines: the run was resumed."
              + phases(metrics), curves(metrics, summary)),
             ("The same questions as it learns", "Answered greedily.", probes(folder, probed))]
    for step in spread(list(dict.fromkeys(row["step"] for row in logged)), STEPS):
        groups = [group(folder, row) for row in logged if row["step"] == step][:GROUPS]
        parts.append((f"Samples of step {show(step)}", "By advantage: ▲ is made likelier, ▼ less "
                      "likely.", "".join(groups)))  # fmt: skip
    body = "".join(f"<section><h2>{title}</h2><p>{text}</p>{found or '<p>Nothing was logged.</p>'}"
                   "</section>" for title, text, found in parts)  # fmt: skip
    return PAGE.format(name=esc(folder.resolve().name), style=STYLE + overlay.STYLE, body=body,
                       about="</p><p>".join(filter(None, notes)), table=results(summary),
                       reload=RELOAD * running, config=esc(json.dumps(config, indent=1)))


def whole_page(folder: Path, running: bool = False) -> str:
    """The page of a recipe of several stages: of each what it is, its results and its curves."""
    recipe, body, left = (read(folder / "recipe.json") or [{}])[0], [], 0
    for stage in recipe.get("stages") or []:
        place = folder / Path(str(stage.get("folder"))).name
        config, summary = ((read(place / f"{k}.json") or [{}])[0] for k in ("config", "summary"))
        metrics, left = read(place / "metrics.jsonl"), left + (not summary)
        began = f"has not ended, {len(metrics)} steps are done" if config else "has not begun"
        spent = number((summary.get("seconds") or {}).get("all"))
        notes = [f"{show(spent)} seconds" if summary else began]
        if "best" in summary:
            notes += [f"best step {show(summary['best'].get('step'))}"]
        if "kept" in summary:
            notes += [f"{show(summary['kept'])} of {show(summary.get('rows'))} rows kept"]
        if (place / "report.html").is_file():
            notes += [f'<a href="{esc(place.name)}/report.html">its own page, with samples</a>']
        share = [f"<tr><th scope=\"row\">{esc(name)}</th><td>{show(n)}</td></tr>"
                 for name, n in (summary.get("histogram") or {}).items()]  # fmt: skip
        table = ('<table><thead><tr><th scope="col">Mean reward</th><th scope="col">Rows</th></tr>'
                 f"</thead><tbody>{''.join(share)}</tbody></table>")  # fmt: skip
        body.append(f"<section><h2>{esc(stage.get('what'))}</h2><p>{about_of(config)}</p><p>"
                    f"{', '.join(notes)}</p>{table * bool(share)}{results(summary)}"
                    f"{curves(metrics, summary)}</section>")  # fmt: skip
    note = f"{left} of {len(body)} stages have not ended." if left else "All stages have ended."
    return PAGE.format(name=esc(folder.resolve().name), style=STYLE + overlay.STYLE, table="",
                       about=f"{esc(recipe.get('recipe'))}</p><p>{note}", body="".join(body),
                       reload=RELOAD * running, config=esc(json.dumps(recipe, indent=1)))


def write(folder, running: bool = False) -> Path:
    """Writes FOLDER/report.html, whole or not at all, and that of the recipe whose stage it is, if
    it is one. The page of a running run loads itself again, until one is written that is not.
    FileNotFoundError if FOLDER holds no run."""
    folder, make = Path(folder), page
    if (folder / "recipe.json").is_file():
        make = whole_page
    elif not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
        raise FileNotFoundError(f"{folder}: neither config.json nor metrics.jsonl, so not a run")
    part = folder / "report.html.tmp"
    part.write_text(make(folder, running), encoding="utf-8")
    os.replace(part, folder / "report.html")
    if (folder.parent / "recipe.json").is_file():
        write(folder.parent, running)
    return folder / "report.html"


RELOAD = '<meta http-equiv="refresh" content="60">'
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src
'unsafe-inline'">{reload}<link rel="icon" href="data:,"><title>{name}</title><style>{style}</style>
</head><body><main><h1>{name}</h1><p>{about}</p>{table}{body}<section><details><summary>config.json
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
svg {display: block; overflow: visible; fill: var(--soft); font-size: 11px} circle {fill:
var(--line)} path {fill: none} .grid {stroke: var(--rule)} .line, .dots, .before circle {stroke:
var(--line); stroke-width: 2} .before circle {fill: var(--paper); stroke-width: 1} .l1 {--line:
#c47f17} .l2 {--line: #8a63c9} .l3 {--line: #2f9e8f} .l4 {--line: #8b8780} figcaption b {color:
var(--line)} .resumed {stroke: var(--soft); stroke-dasharray: 2 3} .dots { stroke-width: 3;
stroke-linecap: round; opacity: .25} rect {opacity: 0} rect:hover {opacity: .15} .curves {display:
grid; gap: 2rem 2.5rem; margin: 1.5rem 0; grid-template-columns: repeat(auto-fill, minmax(min(100%,
19rem), 1fr))} .curves h3 {display: flex; justify-content: space-between} img {display: block;
max-width: 100%; height: auto; margin-bottom: .6rem} article {margin: 2rem 0} .pixels
{image-rendering: pixelated} .yes {color: var(--yes)} .no {color: var(--no)} ol {padding: 0} li
{display: block; padding: .3rem .7rem; border-left: 3px solid var(--rule); margin-bottom: 2px} .up
{border-color: var(--yes)} .down {border-color: var(--no)} @media (min-width: 52rem) {article, li
{display: grid; grid-template-columns: 15rem 1fr; gap: 2rem} li {gap: 1rem}} ol span {white-space:
nowrap} @media (max-width: 40rem) {table {display: block; overflow: auto} small {display: block}
tr > :nth-child(3), tr > :last-child {display: none} tbody th { min-width: 4.5rem}}
"""


def main() -> None:
    print(write(sys.argv[1]) if len(sys.argv) == 2 else __doc__)


if __name__ == "__main__":
    main()
