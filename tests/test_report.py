"""Chapter two of report.py: what a reader sees of a run, and what a run can not do to the page."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

import report
from report import CURVES

EVIL = "</script></pre><img src=x onerror=alert(1)>'\"&"
SHOWN = "&lt;/script&gt;&lt;/pre&gt;&lt;img src=x onerror=alert(1)&gt;&#x27;&quot;&amp;"
COMPLETION = {"text": "<think> two </think> <answer> 2 </answer>", "reward": 1.5, "advantage": 0.7,
              "rewards": {"accuracy": 1.0, "format": 0.0}, "length": 9, "finished": True}


class Page(HTMLParser):
    """Parses a page, checks that every tag is closed in order, and keeps tags, attributes, text."""

    void = frozenset(("meta", "link", "img", "br"))

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def a_run(folder, word="two", steps=3):
    """A small complete run whose every string is `word`."""
    (folder / "images").mkdir()
    Image.new("RGB", (56, 28)).save(folder / "images" / "a.png")
    (folder / "config.json").write_text(json.dumps({"model": word, "rewards": [word], "seed": 1}))
    row = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "format": 1.0, "unparsable": 0.25, "n": 4}
    (folder / "summary.json").write_text(json.dumps({"before": {word: row}, "after": {word: row}}))
    lines(folder / "metrics.jsonl", *(
        {"step": s, "reward": s / 4, f"reward/{word}": 0.5, "kl": 0.0, word: word, "entropy": 0.5,
         "length/mean": 5.0, "length/min": 2.0, "length/max": 9.0} for s in range(1, steps + 1)))
    asked = {"problem": word, "solution": word, "images": ["images/a.png", word]}
    lines(folder / "probes.jsonl", *(
        {"step": s, "answers": [{**asked, "text": word, "rewards": {"accuracy": 1.0, word: 0.5}}]}
        for s in (0, steps)))
    lines(folder / "rollouts.jsonl", *(
        {"step": s, **asked, "prompt": word, "completions": [{**COMPLETION, "text": word}] * 2}
        for s in (1, steps)))
    return folder


# ---- reading a run ----

def test_a_broken_line_is_skipped_and_the_others_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'{"step": 1}\n\xff{"st\n' + deep + b'\n7\n{"step": 2}\n{"step": 3, "re')
    assert report.read(path) == [{"step": 1}, {"step": 2}]


def test_of_a_step_logged_twice_the_later_line_counts(tmp_path):
    rows = [{"step": 2, "x": 0}, {"step": 3, "x": 0}, {"step": 1}, {"step": 2, "x": 1}]
    lines(tmp_path / "m.jsonl", *rows)
    assert report.read(tmp_path / "m.jsonl") == [rows[2], rows[3], rows[1]]
    groups = [{"step": 1, "problem": p, "images": [p]} for p in "ab"]
    lines(tmp_path / "r.jsonl", *groups)
    assert report.read(tmp_path / "r.jsonl") == groups


# ---- text and pictures ----

def test_a_completion_shows_its_tags_apart_and_is_cut_in_the_middle():
    assert report.said("<answer> 2 </answer>") == (
        "<pre><i>&lt;answer&gt;</i> 2 <i>&lt;/answer&gt;</i></pre>")
    long = report.said("a" * 5000 + "the end")
    assert "2,607 characters" in long and long.endswith("the end</pre>") and len(long) < 2500
    assert report.said("") == "<pre><i>(nothing)</i></pre>"


def test_right_and_wrong_have_a_sign_and_a_word():
    text = report.marks({"accuracy": 0.0, "format": 1.0, "own": 0.25, "none": math.nan})
    words = [re.sub("<[^>]*>", "", part) for part in text.split("</span>")]
    assert [w.strip() for w in words] == ["✗ wrong", "✓ format", "0.25 own", "– none", ""]


# ---- curves ----

def test_only_metrics_that_are_there_are_drawn_and_those_always_zero_are_named():
    rows = [{"step": s, "kl": 0.0, "entropy": 1.0, "reward/own": 0.3, "odd": 1} for s in (1, 2)]
    text = report.curves(rows, {})
    assert re.findall("<h3>(.*?) <b>", text) == ["own", "Entropy"]
    assert "Always 0, not drawn: KL to the start." in text and "odd" not in text
    assert report.curves([{"step": 1, "other": 2}], {}) == ""
    assert report.curves([], {"before": {"A": {"accuracy": 1.0}}}) == ""


def test_an_evaluation_is_a_curve_from_what_it_gave_before_to_what_it_gave_after():
    rows = [{"step": 1, "reward": 1.0}, {"step": 2, "eval/A": 0.75, "reward": 1.0}]
    before = {"A": {"accuracy": 0.25}, "only_before": {"accuracy": 1.0}}
    text = report.curves(rows, {"before": before})
    assert re.findall("<h3>(.*?) <b>", text) == ["Reward", "A, greedy"]
    assert "A, greedy: 25 % at first, 75 % at last" in text
    assert "<title>step 0: A 25 %</title>" in text and "<title>step 2: A 75 %</title>" in text
    after = {"A": {"accuracy": 1.0}}
    text = report.curves([*rows, {"step": 3}], {"before": before, "after": after})
    assert "A, greedy: 25 % at first, 100 % at last" in text
    assert re.findall("<title>step (.): A", text) == ["0", "2", "3"]


def test_what_a_scorer_tells_beside_accuracy_is_one_chart_of_lines():
    each = {"accuracy": 0.5, "score": 0.5, "iou": 0.625, "giou": -0.25}
    summary = {"before": {"A": {**each, "iou": 0.5}}, "after": {"A": each}}
    rows = [{"step": 1, "reward": 1.0}, {"step": 2, "eval/A": 0.5, "eval/A/iou": 0.75,
                                         "eval/A/giou": 0.5}, {"step": 3}]  # fmt: skip
    text = report.curves(rows, summary)
    assert re.findall("<h3>(.*?) <b>", text) == ["Reward", "A, greedy", "A: Mean IoU, Mean GIoU"]
    assert re.findall('<b class="l1">(.*?)</b>', text) == ["giou −0.25"]
    assert [f"<title>step {s}: iou {v}, giou" in text
            for s, v in ((0, 0.5), (2, 0.75), (3, 0.625))] == [True] * 3  # fmt: skip


def test_a_reward_with_arguments_keeps_its_name():
    name = "gate(format,my/rewards.py:f)"
    text = report.curves([{"step": s, f"reward/{name}": s / 2} for s in (0, 1)], {})
    assert f"<h3>{name} <b>0.5</b>" in text and f"<title>step 1: {name} 0.5<" in text
    assert report.marks({"iou(least=0.5)": 1.0}) == '<span class="yes">✓ iou(least=0.5)</span>'


def test_of_the_lines_beside_a_curve_only_those_that_there_are_and_are_not_zero_are_drawn():
    rows = [{"step": s, "grad_norm": 2.0, "grad_norm/vision": 0.0, "grad_norm/language": float(s)}
            for s in (0, 1)]
    rows += [{"step": 2, "grad_norm": None, "grad_norm/language": 9.0}]  # not finite: left out
    text = report.curves(rows, {})
    assert re.findall('<b class="l.">(.*?)</b>', text) == ["language 1"]


def test_the_time_of_a_step_is_shared_out_among_its_phases():
    """Steps of SFT, which does not time what a step consists of, have no such shares."""
    rows = [{"step": 1, "time/sample": 1.0, "time/update": 2.0, "time/save": 1.0, "time/x": 9.0},
            {"step": 2, "time/sample": 3.0, "time/update": 1.0}]
    told = report.phases(rows)
    assert "sample <b>50.0 %</b>, update <b>37.5 %</b>, save <b>12.5 %</b>." in told
    text = report.curves(rows, {})
    assert "Time for sampling: 25 % at first, 75 % at last" in text
    assert re.findall('<b class="l.">(.*?)</b>', text) == ["update 25 %", "save 0 %"]
    sft = [{"step": 1, "time/log": 1.0, "time/save": 2.0}]
    assert report.phases(sft) == report.curves(sft, {}) == ""


def test_upright_lines_stand_where_it_was_resumed_within_a_chart():
    rows = [{"step": s, "reward": 1.0, "resumed": s in (3, 5)} for s in range(1, 7)]
    rows[1] |= {"entropy": 1.0}
    rows[3] |= {"entropy": 1.0}
    charts = report.curves(rows, {}).split("<figure>")[1:]
    assert [c.count('class="resumed"') for c in charts] == [2, 1]


def test_every_curve_says_what_it_means():
    assert all(curve.says.endswith(".") and curve.title for curve in CURVES)
    assert len({curve.key for curve in CURVES}) == len(CURVES)


# ---- the parts and the page ----

def test_the_table_shows_before_and_after_with_interval():
    row = {"accuracy": 0.445, "low": 0.4, "high": 0.49, "format": 0.5, "n": 400, "length": 18.25}
    words = "".join(Page(report.results({"before": {"A": row}, "after": {"B": row}})).words)
    assert "A before44.5 % 40.0 to 49.050.0 %–18.2400" in words and "B after44.5 %" in words
    assert report.results({}) == ""


def test_the_table_has_a_column_for_what_some_scorer_tells():
    row = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "format": 1.0, "n": 4, "unparsable": 0.25}
    before, after = {**row, "score": 0.5, "iou": 0.625}, {**row, "score": 0.5, "iou": 0.75}
    text = report.results({"before": {"A": before, "B": row}, "after": {"A": after, "B": row}})
    assert re.findall('<th scope="col">(.*?)<', text) == [
        "Set", "Accuracy", "0 to 100 %", "Mean IoU", "Format", "Unparsable", "Tokens", "n",
    ]  # fmt: skip
    cells = [re.findall("<td>([^<]+)<", line) for line in text.split("<tr class")[1:]]
    assert [line[0] for line in cells] == ["0.625", "0.75", "–", "–"]


def test_several_pictures_of_a_question_stand_side_by_side(tmp_path):
    for name in "ab":
        Image.new("RGB", (56, 28)).save(tmp_path / f"{name}.png")
    text = report.group(tmp_path, {"problem": "q", "images": ["a.png", "b.png"]})
    assert re.search('<div class="pictures"><img [^>]*><img [^>]*></div><h3>', text)
    assert ".pictures {display: flex" in report.page(tmp_path)


def test_a_probe_has_a_line_per_step_in_order(tmp_path):
    rows = [{"step": s, "answers": [{"problem": "q", "text": f"said {s}", "rewards": {}}]}
            for s in range(0, 100, 5)]
    text = report.probes(tmp_path, rows)
    assert text.count("<article>") == 1 and text.count("<li>") == report.PROBES
    assert text.index("said 0<") < text.index("said 50<") < text.index("said 95<")


def test_a_group_is_shown_from_the_highest_advantage_to_the_lowest(tmp_path):
    done = [{**COMPLETION, "advantage": a, "text": t, "finished": a > 0}
            for a, t in ((-1.2, "low"), (0.0, "middle"), (math.nan, "none"), (1.2, "high"))]
    text = report.group(tmp_path, {"problem": "q", "solution": "<answer> 2 </answer>",
                                   "completions": done})  # fmt: skip
    assert text.index("high") < text.index("middle") < text.index("low")
    assert "▲ +1.20" in text and "▼ -1.20" in text and "<b>0.00</b>" in text
    assert text.count("cut off") == 3 and "Right answer: <b>2</b>" in text


def test_samples_are_of_the_first_the_middle_and_the_last_step(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    lines(tmp_path / "rollouts.jsonl", *(
        {"step": s, "problem": f"q{i}", "completions": [COMPLETION] * 40}
        for s in range(1, 8) for i in range(5)))
    text = report.page(tmp_path)
    assert re.findall(r"Samples of step (\d)", text) == ["1", "4", "7"]
    assert text.count("<article>") == 9 and text.count('<li class="up">') == 9 * report.COMPLETIONS


def test_every_string_of_a_run_is_escaped(tmp_path):
    folder = tmp_path / "<b>run"
    folder.mkdir()
    text = report.write(a_run(folder, EVIL + "\0\ud800")).read_text(encoding="utf-8")
    assert text.count("&lt;b&gt;run") == 2
    assert EVIL not in text and text.count(SHOWN) > 15
    tags = Page(text).tags
    assert {tag for tag, _ in tags}.isdisjoint(("script", "iframe", "object"))
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert [attrs["alt"] != "" for tag, attrs in tags if tag == "img"] == [True] * 3


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    text = report.page(a_run(tmp_path))
    names = ("src", "href", "srcset", "action")
    links = [a[name] for _, a in Page(text).tags for name in names if name in a]
    assert len(links) == 4 and all(link.startswith("data:") for link in links)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert "default-src 'none'; img-src data:; style-src" in text


def test_the_page_has_its_parts_in_order_and_a_language(tmp_path):
    text = report.page(a_run(tmp_path))
    assert Page(text).tags[0] == ("html", {"lang": "en"}) and text.startswith("<!DOCTYPE html>")
    parts = ("<h1>", "<table>", "<h2>Curves", "<h2>The same", "<h2>Samples of step 1<",
             "<h2>Samples of step 3<", "<summary>config.json")  # fmt: skip
    assert sorted(parts, key=text.index) == list(parts) and "Not finished" not in text


def test_the_note_of_the_run_stands_at_its_head_escaped(tmp_path):
    folder = a_run(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "flawed <on> purpose"}))
    text = report.page(folder)
    assert text.index("<h1>") < text.index("flawed &lt;on&gt; purpose") < text.index("<table>")


def test_the_page_of_a_running_run_says_so_and_loads_itself_again_until_it_has_ended(tmp_path):
    folder = a_run(tmp_path)

    def reloads():
        tags = Page((folder / "report.html").read_text()).tags
        return [a["content"] for _, a in tags if a.get("http-equiv") == "refresh"]

    report.write(folder, running=True)  # one that was done, and now gets more steps
    assert reloads() == ["60"] and '<tr class="after">' not in report.page(folder, True)
    now = r"as of step 3\. It ran at 20\d\d-\d\d-\d\d \d\d:\d\d UTC"
    assert re.search(now, (folder / "report.html").read_text())
    report.write(folder)
    assert '<tr class="after">' in report.page(folder)
    assert reloads() == [] and "It ran at" not in report.page(folder)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "probes.jsonl",
                                  "rollouts.jsonl", "images/a.png"])
def test_a_page_is_written_without_any_one_of_the_files(tmp_path, name):
    folder = a_run(tmp_path)
    (folder / name).unlink()
    text = report.write(folder).read_text()
    assert Page(text).tags
    assert ("Not finished" in text and "as of step 3" in text) == (name == "summary.json")


def test_a_page_is_written_of_files_that_are_broken(tmp_path):
    folder = a_run(tmp_path)
    for path in folder.glob("*.json*"):
        path.write_text('{"step": 1, "re')
    assert "Nothing was logged" in report.write(folder).read_text()


def test_writing_replaces_the_old_page_and_leaves_nothing_behind(tmp_path):
    folder = a_run(tmp_path)
    (folder / "report.html").write_text("old")
    before = {path.name for path in folder.iterdir()}
    page = report.write(str(folder))
    assert page == folder / "report.html" and page.read_text().startswith("<!DOCTYPE")
    assert {path.name for path in folder.iterdir()} == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config.json nor metrics.jsonl"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []
