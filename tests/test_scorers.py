"""scorers.py, chapter two: R1-V's rules, sums over scored rows, and saved results scored anew."""

import json
import random
import re
from itertools import cycle

import pytest

import verify
from example import Example
from scorers import (
    count,
    geoqa,
    load_scorer,
    read_results,
    rescore,
    score_row,
    summary,
    told,
    wilson,
)

math_verify = pytest.importorskip("math_verify")  # the oracle


def gold(solution: str) -> Example:
    return Example("How many?", solution)


# ------------------------------------------------------------------------------------------ rules


def r1v_count(text: str):
    """extract_number_answer of R1-V's src/eval/test_qwen2vl_counting_superclevr.py."""
    match = re.search(r"<answer>\s*(\d+)\s*</answer>", text)
    return int(match.group(1)) if match else None


@pytest.mark.parametrize("text, answer", [
    ("<answer>4</answer>", 4),
    ("<think>\nA. 10\n</think>\n<answer>\n    4\n    </answer>", 4),  # R1-V's log
    ("<answer>Q</answer>", None),
    ("<answer>Q</answer> <answer>4</answer> <answer>5</answer>", 4),  # the first that is a number
    ("<answer>04</answer>", 4),
    ("<answer>4.0</answer>", None),
    ("<answer>-4</answer>", None),
    ("<answer>4", None),
    ("4", None),
    ("<answer>٤</answer>", 4),
])  # fmt: skip
def test_count_is_the_first_whole_number_in_answer_tags(text, answer):
    assert count(text, gold("4")) == (float(answer == 4), answer)
    assert r1v_count(text) == answer


def test_count_compares_with_a_gold_of_any_spelling():
    for spelt in ("4", "4.0", " 04 ", "<answer> 4 </answer>"):
        assert count("<answer>4</answer>", gold(spelt)) == (1.0, 4)
    assert count("<answer>4</answer>", gold("four")) == (0.0, 4)
    assert count("<answer>" + "9" * 10_000 + "</answer>", gold("9")) == (0.0, None)


def test_count_equals_r1v_on_random_texts():
    rng, seen = random.Random(0), set()
    for wanted in cycle(range(3)):
        pieces = ["<answer>", "</answer>", "1", "2", " ", "\n", "x", "<think>"]
        text = "".join(rng.choices(pieces, [6, 6, 4, 4, 2, 1, 1, 1], k=rng.randrange(12)))
        answer = r1v_count(text)
        assert count(text, gold(str(wanted))) == (float(answer == wanted), answer), text
        seen.add((answer is None, answer == wanted))
        if len(seen) == 3 and rng.random() < 0.001:
            break


@pytest.mark.parametrize("text, solution, right, answer", [
    # After R1-V's log geoqa_test_qwen2vl_7b_grpo_2epochs_legacy.json, as its file scored them.
    ("is 180.0 - 60.0 = 40.0. </think>\n<answer>40.0</answer>", "140°", 0, "40.0000000000000"),
    ("<think> = 180 - 50 = 130. </think> <answer>130</answer>", "130°", 1, "130"),
    ("is 80.0 - 35.0 = 45.0. </think> <answer>45.0</answer>", "45°", 1, "45.0000000000000"),
    ("BC + BE = AB = 6.0. </think>\n<answer>6.0</answer>", "6cm", 1, "6.00000000000000"),
    ("angle 3 = 50 - 22 = 28. </think> <answer>28.0</answer>", "70°", 0, "28"),
    ("(35.0 + angle OBA) / 2. However, </think>\n<answer>0</answer>", "55°", 0, "2"),
    ("I cannot tell", "55°", 0, None),
])  # fmt: skip
def test_geoqa_is_math_verify_on_the_whole_text(text, solution, right, answer):
    assert geoqa(text, gold(solution)) == (right, answer)
    found = math_verify.parse(text)
    assert math_verify.verify(found, math_verify.parse(solution)) == right


def test_geoqa_says_nothing_where_math_verify_is_killed(monkeypatch):
    monkeypatch.setattr(verify.JUDGE, "seconds", 0.3)
    assert geoqa("5^(5^(5^5))", gold("3")) == (None, None)
    row = score_row("5^(5^(5^5))", gold("3"), geoqa)
    assert row["accuracy"] is None and row["is_correct"] is False
    found = summary([row, score_row("it is 3", gold("3"), geoqa)])
    assert found["accuracy"] == found["unparsable"] == 0.5 and found["parsed"] == 1


def test_any_reward_is_a_scorer_and_its_answer_is_the_final_one(tmp_path):
    text = "<think>so</think> <answer> 140° </answer>"
    for name, right in (("accuracy", 0), ("math", 1), ("r1v_accuracy", 1), ("format", 1)):
        assert load_scorer(name)(text, gold("140")) == (right, "140°"), name
    (tmp_path / "mine.py").write_text("def half(text, example): return 0.5\n")
    half = load_scorer(f"{tmp_path}/mine.py:half")
    assert half("many", gold("3")) == (0.5, None)
    assert score_row("many", gold("3"), half)["is_correct"] is False


@pytest.mark.parametrize("name, message", [
    ("cuont", "scorer cuont: unknown; did you mean count.*geoqa, rec, detect, .*file.py:function"),
    ("nowhere.py:f", "nowhere.py:f: no Python file"),
    ("", "scorer : unknown"),
])  # fmt: skip
def test_an_unknown_scorer_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_scorer(name)


# ------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_known_intervals(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_by_hand():
    """(p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n), p = 1/2, n = 2, z = 2:
    (1/2 + 1 -+ 2 sqrt(1/8 + 1/4)) / 3."""
    assert wilson(1, 2, 2.0) == pytest.approx((0.5 - 0.375**0.5 * 2 / 3, 0.5 + 0.375**0.5 * 2 / 3))


def test_wilson_stays_between_0_and_1_and_around_the_share():
    for n in (1, 2, 3, 5, 10, 19, 50, 1000):  # 5, 10 and 19 round to below 0 or above 1
        for k in range(n + 1):
            low, high = wilson(k, n)
            assert 0 <= low <= k / n <= high <= 1 and low < high
            assert (1 - high, 1 - low) == pytest.approx(wilson(n - k, n), abs=1e-12)


def test_summary_by_hand():
    rows = [(1, 1, "3", 10), (1, 0, "4", 20), (0, 1, "5", 30), (0, 0, None, 40)]
    results = [
        {"accuracy": float(a), "format": float(f), "extracted_answer": x, "length": n,
         "model_output": "x" * (n + 1)}
        for a, f, x, n in rows
    ]  # fmt: skip
    found = summary(results + results[1:2])
    low, high = wilson(3, 5)
    assert found == {
        "accuracy": 3 / 5, "low": low, "high": high, "score": 3 / 5, "format": 2 / 5,
        "unparsable": 1 / 5, "parsed": 3 / 4, "length": 24.0, "characters": 25.0, "n": 5,
        "correct": 3,
    }  # fmt: skip
    odd = {**results[0], "extracted_answer": None}  # right by another rule, but not parsed
    assert summary([odd, results[2]])["parsed"] == 0
    assert "accuracy 0.600 (" in told(found) and "24.0 tokens, 25 characters" in told(found)
    for row in results:
        row.pop("length")
    none = summary(results[3:])
    assert none["parsed"] is None and none["length"] is None and none["unparsable"] == 1
    assert "accuracy of the parsed none" in told(none) and "tokens" not in told(none)


# ---------------------------------------------------------------------------------- saved results


def r1v_log(tmp_path, rows: list[dict]) -> str:
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"accuracy": 12.0, "results": rows}))
    return str(path)


def test_a_log_of_r1v_is_scored_anew_whatever_its_rows_hold(tmp_path):
    path = r1v_log(tmp_path, [
        {"question": {"image_path": "a.png", "question": "How many?", "ground_truth": 4},
         "ground_truth": 4, "model_output": "<answer>\n 4 </answer>", "extracted_answer": 4},
        {"question": "How many?", "ground_truth": "4", "model_output": ["<answer>4</answer>"],
         "extracted_answer": None, "is_correct": False, "more": [1]},
        {"ground_truth": 4.0, "model_output": "<answer>5</answer>"},
        {"ground_truth": 4, "model_output": ""},
    ])  # fmt: skip
    found = rescore(path, load_scorer("count"))
    assert [r["extracted_answer"] for r in found["results"]] == [4, 4, 5, None]
    assert [r["is_correct"] for r in found["results"]] == [True, True, False, False]
    assert (found["n"], found["correct"], found["unparsable"]) == (4, 2, 1 / 4)
    assert found["parsed"] == 2 / 3
    assert found["length"] is None and found["characters"] == (21 + 18 + 18 + 0) / 4
    assert found["results"][1]["more"] == [1]
    examples = [example for example, _, _ in read_results(path)]
    assert [e.problem for e in examples[:2]] == ["How many?", "How many?"]
    assert examples[0].extra["image_path"] == "a.png"


@pytest.mark.parametrize("text, message", [
    ("", "not a results file, no JSON"),
    ("[" * 100_000, "not a results file, no JSON"),
    ("[1]", "not a results file: no .*results"),
    ('{"results": []}', "not a results file: no .*results"),
    ('{"results": {"a": 1}}', "not a results file: no .*results"),
    ('{"results": [3]}', "result 1: not a JSON object"),
    ('{"results": [{"model_output": "4", "ground_truth": 4}, {"ground_truth": 4}]}',
     "result 2: no model_output"),
    ('{"results": [{"ground_truth": 4, "model_output": ["4", "5"]}]}', "result 1: no model_output"),
    ('{"results": [{"model_output": "4"}]}', "result 1: no ground_truth"),
    ('{"results": [{"model_output": "4", "ground_truth": true}]}', "result 1: no ground_truth"),
    ('{"results": [{"model_output": "4", "ground_truth": [4]}]}', "result 1: no ground_truth"),
])  # fmt: skip
def test_what_is_no_results_file_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"log.json: {message}"):
        rescore(str(path), count)


def test_bytes_that_are_no_text_are_refused_too(tmp_path):
    path = tmp_path / "log.json"
    path.write_bytes(b"\x80\x02}q\x00")
    with pytest.raises(ValueError, match=r"log\.json: not a results file"):
        rescore(str(path), count)
