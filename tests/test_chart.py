"""Chapter two of chart.py: numbers to text, and where a line goes."""

import math
import re

import numpy as np
import pytest

import chart
from chart import Curve

EVIL = "</script></pre><img src=x onerror=alert(1)>'\"&"
SHOWN = "&lt;/script&gt;&lt;/pre&gt;&lt;img src=x onerror=alert(1)&gt;&#x27;&quot;&amp;"


def test_a_line_is_called_by_what_follows_the_family_of_its_metric():
    keys = ("reward/iou(least=0.5)", "reward/gate(format,a/b.py:f)", "eval/A", "eval/A/iou",
            "length/min", "kl")  # fmt: skip
    text = chart.draw(Curve(keys[0], "t", "s", more=keys[1:]), np.ones((7, 2)))
    names = re.findall('<b class="l.">(.*?) 1</b>', text)
    assert names == ["gate(format,a/b.py:f)", "A", "iou", "min", "kl"]
    assert "<title>step 1: iou(least=0.5) 1, gate(" in text


def test_spread_takes_the_first_and_the_last():
    assert chart.spread(range(9), 3) == [0, 4, 8]
    assert chart.spread("ab", 3) == ["a", "b"] and chart.spread([], 3) == []


def test_only_finite_numbers_of_a_sane_size_are_numbers():
    assert chart.number(2) == 2.0 and chart.number(np.float64(0.5)) == 0.5
    bad = (math.nan, math.inf, -math.inf, 1e300, 10**400, True, None, "1", [1])
    assert [chart.number(x) for x in bad] == [None] * len(bad)


def test_numbers_are_short():
    shown = [chart.show(x) for x in (0, 0.12345, 1.0004, 12.345, 12345.6, 1e-6, -2.5, math.nan)]
    assert shown == ["0", "0.123", "1", "12.3", "12,346", "1e-6".replace("-", "−"), "−2.5", "–"]
    assert chart.show(0.3456, share=True) == "34.6 %" and chart.show(None, share=True) == "–"


def test_markup_nul_surrogates_and_direction_marks_become_harmless_text():
    assert chart.esc(EVIL) == SHOWN
    assert chart.esc("a\0b\ud800c\u202ed\n\te") == "a\ufffdb\ufffdc\ufffdd\n\te"


def test_a_series_leaves_out_steps_whose_metric_is_missing_or_not_finite():
    rows = [{"step": 1, "x": 5}, {"step": 2, "x": math.nan}, {"step": 3}, {"step": 4, "x": "6"},
            {"step": 5, "x": 7.0}]
    assert chart.series(rows, "step", "x").tolist() == [[1, 5], [5, 7]]
    assert chart.series(rows, "step", "y").size == 0


def test_a_smoothed_line_keeps_constants_and_means_neighbours():
    assert np.allclose(chart.smooth(np.full(100, 3.0)), 3)
    few = np.array([1.0, 5.0, 2.0])
    assert np.allclose(chart.smooth(few), few)
    spike = np.zeros(20)
    spike[10] = 4.0  # n // 20 = 1 neighbour each side: weights 1/4, 1/2, 1/4
    assert np.allclose(chart.smooth(spike)[9:12], [1, 2, 1])
    assert np.allclose(chart.smooth(spike[::-1])[8:11], [1, 2, 1])


@pytest.mark.parametrize(("lo", "hi", "want"), [
    (0, 1, [0, 0.5, 1]), (0, 1.9, [0, 0.5, 1, 1.5, 2]), (-3, 30, [-10, 0, 10, 20, 30]),
    (0, 0.0003, [0, 0.0001, 0.0002, 0.0003]), (5, 5, [5]), (0, 5e-324, [0]),
])  # fmt: skip
def test_ticks_are_round_and_enclose_the_range(lo, hi, want):
    assert np.allclose(chart.ticks(lo, hi), want, rtol=1e-9, atol=1e-12)


def test_a_value_is_placed_in_proportion_and_never_beyond_the_frame():
    assert chart.place(3, 1, 5, 10, 30) == 20
    assert chart.place(np.array([1, 5, 99]), 1, 5, 126, 10).tolist() == [126, 10, 10]
    assert chart.place(7, 7, 7, 0, 10) == 5


def numbers(svg, kind):
    """The points of the path of a kind: (n, 2)."""
    data = re.search(f'class="{kind}" d="([^"]*)"', svg)[1]
    return np.array([float(x) for x in re.findall(r"-?\d+\.\d", data)]).reshape(-1, 2)


def test_a_curve_goes_from_corner_to_corner():
    data = np.array([[1, 2, 3], [0.0, 2, 4]])
    svg = chart.draw(Curve("x", "X", ""), data)
    middle = ((chart.LEFT + chart.RIGHT) / 2, (chart.BOTTOM + chart.TOP) / 2)
    want = [(chart.LEFT, chart.BOTTOM), middle, (chart.RIGHT, chart.TOP)]
    assert np.allclose(numbers(svg, "line l0"), want) and np.allclose(numbers(svg, "dots"), want)
    assert "<h3>X <b>4</b></h3>" in svg and "<title>step 2: x 2</title>" in svg
    assert re.findall(r"<text[^>]*>([^<]*)", svg) == [*"01234", *"123"]


def test_a_share_is_drawn_in_per_cent_on_its_whole_axis():
    svg = chart.draw(Curve("x", "X", "", True, (0, 1)), np.array([[1, 2], [0.5, 0.25]]))
    assert np.allclose(numbers(svg, "line l0")[:, 1], [68, 97])  # 10 is 100 %, 126 is 0 %
    assert "<b>25 %</b>" in svg and ">100 %<" in svg


def test_the_lines_beside_have_colours_of_their_own_and_a_legend_with_their_last_values():
    curve = Curve("norm", "Norm", "All.", more=("norm/a", "norm/<b>"))
    svg = chart.draw(curve, np.array([[1, 2], [4.0, 4], [1, 1], [2, 3]]))
    heights = [numbers(svg, f"line l{i}")[:, 1].tolist() for i in range(3)]
    assert heights == [[10, 10], [97, 97], [68, 39]]  # of an axis from 0 to 4
    assert ('<figcaption>All. <b class="l1">a 1</b>, <b class="l2">&lt;b&gt; 3</b></figcaption>'
            in svg)  # fmt: skip
    assert "<title>step 2: norm 4, a 1, &lt;b&gt; 3</title>" in svg
    assert np.allclose(numbers(svg, "dots")[:, 1], 10)  # of the first metric only


def test_a_line_beside_that_reaches_further_stretches_the_axis():
    svg = chart.draw(Curve("x", "X", "", more=("y",)), np.array([[1, 2], [1.0, 1], [5, 9]]))
    assert re.findall(r"<text[^>]*>([^<]*)", svg)[:3] == ["0", "5", "10"]


def test_an_upright_line_stands_where_the_run_was_resumed():
    svg = chart.draw(Curve("x", "X", ""), np.array([[1, 2, 3], [0.0, 2, 4]]), [2])
    middle = (chart.LEFT + chart.RIGHT) / 2
    assert f'<path class="resumed" d="M{middle:.1f} {chart.TOP}V{chart.BOTTOM}"/>' in svg
    assert "resumed" not in chart.draw(Curve("x", "X", ""), np.array([[1, 2], [0.0, 2]]))


def test_one_spike_neither_flattens_the_chart_nor_bends_the_line():
    flat = np.array([np.arange(300), np.repeat([1.0, 2.0], 150)])
    data = flat.copy()
    data[1, 75] = 1e6
    bare, svg = (chart.draw(Curve("x", "X", ""), d) for d in (flat, data))
    heights = numbers(svg, "line l0")[:, 1]
    assert np.allclose(heights[[0, -1]], [68, 10])  # 1 and 2 on an axis from 0 to 2
    assert np.abs(heights - numbers(bare, "line l0")[:, 1]).max() < 5  # of 116
    assert numbers(svg, "dots")[75, 1] == 10 and "1e" not in svg


def test_a_single_step_and_huge_or_tiny_values_can_be_drawn():
    for v in (3.0, -1e29, 1e-300, 5e-324):
        assert "nan" not in chart.draw(Curve("x", "X", ""), np.array([[7.0], [v]]))


def test_a_long_run_is_thinned():
    n = 20_000
    svg = chart.draw(Curve("x", "X", ""), np.array([np.arange(n), np.sin(np.arange(n))]))
    assert len(numbers(svg, "line l0")) == len(numbers(svg, "dots")) == 400 and len(svg) < 30_000
