"""Chapter two of grading.py: how the rewards of a run are named, loaded and run."""
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

import grading
import rewards
import verify
import worker
from boxes import View
from config import apart
from example import Example
from grading import REWARDS, fitting, load_rewards, score, score_all
from worker import counted

SOME = ["", "3", "<think>so", "3</answer><answer>3</answer>", "\0", "\ud800<think>", "9" * 30]


def gold(solution):
    return SimpleNamespace(solution=solution)


def say(answer, thought="so"):
    return f"<think>{thought}</think> <answer>{answer}</answer>"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """For each of one's own, since a start takes 0.1 s."""
    monkeypatch.setattr(worker, "MOST", 1)


def own(tmp_path, source):
    path = tmp_path / "mine.py"
    path.write_text(source)
    return path


def test_rewards_are_loaded_in_order_with_weight_one_each():
    assert load_rewards(("format", "accuracy")) == [("format", rewards.format, 1.0),
                                                    ("accuracy", rewards.accuracy, 1.0)]


def test_weights_go_with_their_rewards():
    loaded = load_rewards(("accuracy", "format"), (2, 0.5))
    assert [(name, weight) for name, _, weight in loaded] == [("accuracy", 2.0), ("format", 0.5)]


@pytest.mark.parametrize("names, weights, message", [
    ((), (), "rewards: none given; known are accuracy, math, format"),
    (("acuracy",), (), "reward acuracy: unknown; did you mean accuracy?"),
    (("mine.py",), (), "reward mine.py: unknown .*your own as path/to/file.py:function"),
    (("accuracy", "accuracy"), (), "a reward called accuracy is there already"),
    (("accuracy", "format"), (1.0,), "reward weights: 1 for 2 rewards"),
    (("accuracy",), (1.0, 2.0), "reward weights: 2 for 1 rewards"),
    (("nowhere/mine.py:f",), (), "reward nowhere/mine.py:f: no Python file at /"),
    (("accuracy:f",), (), "reward accuracy:f: no Python file at /"),
    (("iou(least=0.5",), (), r"reward iou\(least=0.5: a bracket is open"),
    (("iou(last=0.5)",), (), "reward iou: has no argument last; did you mean least?.*it has least"),
    (("accuracy(least=1)",), (), r"reward accuracy: has no argument least \(it has none\)"),
    (("iou(least=2)",), (), "reward iou: least=2: must be a number from 0 to 1"),
    (("iou(least=half)",), (), "least=half: must be a number"),
    (("iou(least=nan)",), (), "least=nan: must be a number"),
    (("length(most=inf)",), (), "most=inf: must be a number"),
    (("iou(least=.5, least=.6)",), (), "least is given twice"),
    (("iou(0.5)",), (), "iou takes only numbers, by their names, not 0.5"),
    (("iou(format)",), (), "iou takes only numbers, by their names, not format"),
    (("gate(format)",), (), "gate takes 2 rewards, not format"),
    (("all_of",), (), "all_of takes 2 to 9 rewards"),
    (("gate(format, acuracy)",), (), "reward acuracy: unknown; did you mean accuracy"),
    (("gate(format, iou(least=3))",), (), "reward iou: least=3"),
    (("gate(format, nowhere/mine.py:f)",), (), "reward nowhere/mine.py:f: no Python file at /"),
    (("per_row",), (), "per_row takes the name of a column"),
    (("iou(least=.5)", "iou( least = .5 )"), (), r"called iou\(least=.5\) is there already"),
    (("gate(" * 201,), (), "longer than 1000 characters"),
    (("__import__('os').system('true')",), (), "unknown"), (("(accuracy)",), (), "unknown")])
def test_a_wrong_name_or_weight_is_refused_at_start(names, weights, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(names, weights)


# ---- names with arguments ----

def box(answer="[0, 0, 10, 8]", thought="so"):
    return say(answer, thought)


BOX = Example("Where?", "[0, 0, 10, 10]", ("a.png",))


def one(name, text, example=BOX, length=None):
    [(_, function, _)] = load_rewards((name,))
    return score(function, [text], [example], [length])[0]


def test_a_reward_is_called_by_its_text_without_blanks():
    names = ("iou( least = 0.5 )", " gate(format,  iou)", "iou(least=.9)", "iou")
    loaded = load_rewards(names, (1, 2, 3, 4))
    assert [name for name, _, _ in loaded] == ["iou(least=0.5)", "gate(format,iou)",
                                               "iou(least=.9)", "iou"]
    assert [row[0] for row in score_all(loaded, [box()], [BOX])] == [1, 0.8, 0, 0.8]
    assert loaded[1][1](box(), BOX) == 0.8 and loaded[0][1](box(), BOX) == 1


def test_a_config_splits_them_at_commas_outside_of_brackets():
    """As `--rewards` does; see test_config.py."""
    assert len(load_rewards(apart("gate(format,iou(least=0.5)), accuracy"))) == 2


def test_rewards_nest():
    assert one("all_of(format, iou)", box()) == 0.8 == one("all_of(iou, iou, format)", box())
    assert one("all_of(format, iou)", "<answer>[0, 0, 10, 8]</answer>") == 0
    assert one("gate(format, iou)", "<answer>[0, 0, 10, 8]</answer>") == 0
    assert one("gate(iou, format, least=0.8)", box()) == 1 != one("gate(iou, format)", box())
    deep = "all_of(gate(format, all_of(iou, giou)), detection(ap=0.5, penalty=0))"
    assert one(deep, box()) == 0.8


def test_a_gate_rewards_nobody_for_failing():
    """A punishment stays one."""
    again = "a b c d e f " * 9
    assert one("gate(accuracy, repetition)", again) == one("repetition", again) < -0.5


def test_math_verify_and_one_s_own_are_asked_in_brackets_too(tmp_path):
    path = own(tmp_path, "def f(text, example): return None if 'x' in text else 0.25\n")
    three = gold("3")
    [(name, function, _)] = load_rewards((f"all_of(math, {path}:f)",))
    assert name == f"all_of(math,{path}:f)"
    texts = [say("6/2"), say("6/2 x"), say("4")]
    assert score(function, texts, [three] * 3) == [0.25, None, 0.0]


def test_a_path_may_hold_brackets_and_commas(tmp_path):
    folder = tmp_path / "mine (1), old"
    folder.mkdir()
    path = own(folder, "def f(text, example): return 1\n")
    [(name, function, _)] = load_rewards((f"{path}:f",))
    assert name == "f" and function("", gold("3")) == 1


# ---- lengths ----

def test_a_length_goes_to_those_that_ask_for_it(tmp_path):
    path = own(tmp_path, "def f(text, example, length): return length and length / 10\n"
                         "def g(text, *, length=7, example=None): return 1\n")
    loaded = load_rewards((f"{path}:f", "cosine_length(most=100)", "length", "accuracy"))
    texts, examples = [say("3"), say("4")], [gold("3")] * 2
    assert score_all(loaded, texts, examples, [50, 100]) == [
        [5.0, 10.0], [pytest.approx(0.75), 0.0], [0.05, 0.1], [1.0, 0.0]]
    assert score_all(loaded, texts, examples) == [[None] * 2, [None] * 2, [None] * 2, [1.0, 0.0]]
    with pytest.raises(ValueError, match=r"must be callable as g\(text, example\)"):
        load_rewards((f"{path}:g",))


# ---- a reward for each row ----

METHOD = "per_row(accu_reward_method)"


def row(solution, method, problem="Which? (A) red (B) blue"):
    extra = {} if method is None else {"accu_reward_method": method}
    return Example(problem, solution, ("a.png",), "", "t.jsonl:7", extra)


@pytest.mark.parametrize("method, solution, right, wrong", [
    (None, "red cube", "Red cube", "blue"), ("default", "3", "3.0", "4"),
    ("mcq", "(B)", "blue", "(A)"), ("yes_no", "yes", "Yes, it is", "No"),
    ("all_match", "No Defect", "no defect", "Defect"), ("math", "0.5", r"\frac{1}{2}", "0.6"),
    ("map", "[1, 2, 3, 4]", "[1, 2, 3, 4]", "[9, 9, 12, 12]"),
    ("od_ap", "[1, 2, 3, 4]", "[1, 2, 3, 4]", "None"), ("od_ap50", "None", "None", "[1, 2, 3, 4]"),
    ("odLength", "[1, 2, 3, 4]", "[1, 2, 3, 4]", "[9, 9, 12, 12]"),
    ("weighted_sum", "[1, 2, 3, 4]", "[1, 2, 3, 4]", "[9, 9, 12, 12]"),
    ("rec", "[1, 2, 3, 4]", "[1, 2, 3, 4]", "[9, 9, 12, 12]"),
    ("all_of(format, number)", "3", "it is 3", "3 or 4"), ("iou(least=0.5)", "None", "None", "x")])
def test_a_row_s_column_names_its_reward(method, solution, right, wrong):
    """VLM-R1's accu_reward_method, and any name of the config."""
    example = row(solution, method)
    assert one(METHOD, say(right), example) == 1
    assert one(METHOD, say(wrong), example) < 0.4
    assert fitting(load_rewards((METHOD,)), [example, row("3", "number")])


def test_rows_of_several_kinds_are_scored_side_by_side():
    rows = [row("3", "number"), row("yes", "yes_no"), row("3", "number"), row("A", "mcq")]
    [(_, function, _)] = load_rewards((METHOD,))
    texts = [say("3 cm"), say("no"), say("4"), say("red")]
    assert score(function, texts, rows) == [1, 0, 0, 1]
    assert score(function, texts[:1], rows[:1]) == [1]


def test_the_config_may_say_the_reward_of_a_columns_value():
    """Curr-ReFT's stage of open answers: the column "task" names what is asked, no reward."""
    name = "per_row(task, detection=iou(least=0.5), classify=jaccard, math=math, default=yes_no)"
    [(short, function, _)] = loaded = load_rewards((name,))
    assert short == name.replace(", ", ",")
    view = View("pixels", "pixels", ((100, 100, 112, 112),))
    rows = [Example("q", solution, ("a.png",), extra={"task": task} if task else {}, view=view)
            for solution, task in (("[0, 0, 40, 40]", "detection"), ("cat, dog", "classify"),
                                   ("0.5", "math"), ("yes", None), ("yes", "yes_no"))]
    right = ["[0, 0, 40, 40]", "dog, cat", r"\frac{1}{2}", "yes", "yes"]
    part = ["[0, 0, 40, 30]", "dog", "0.6", "no", "no"]
    assert score(function, [*map(say, right)], rows) == [1] * 5
    assert score(function, [*map(say, part)], rows) == [1, 0.5, 0, 0, 0]
    assert fitting(loaded, rows) is rows
    rows[1] = replace(rows[1], extra={"task": "coco_vqa"})
    with pytest.raises(ValueError, match="task 'coco_vqa': reward coco_vqa: unknown"):
        fitting(loaded, rows)
    with pytest.raises(ValueError, match=r"reward jacard: unknown; did you mean jaccard"):
        load_rewards(("per_row(task, classify=jacard)",))
    other = load_rewards(("per_row(task, classify=jaccard)",))
    with pytest.raises(ValueError, match="it has no column task, and per_row no default="):
        fitting(other, rows[3:])


@pytest.mark.parametrize("method, message", [
    ("llm", "t.jsonl:7: accu_reward_method 'llm': a judge of words is none of the verifiable"),
    ("nubmer", "accu_reward_method 'nubmer': reward nubmer: unknown; did you mean number"),
    ("iou(least=7)", "reward iou: least=7"), ("all_of", "all_of takes 2 to 9"),
    ("per_row(accu_reward_method)", "a row names no file and no column"),
    ("evil.py:f", "a row names no file"), ("all_of(format, evil.py:f)", "a row names no file"),
    ("all_of(" * 99, "a bracket is open"), ("x" * 2000, "longer than"), (3, "reward 3: unknown")])
def test_a_row_that_names_no_reward_is_told_at_the_start(method, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fitting(load_rewards((METHOD,)), [row("3", method)])


def test_a_column_that_no_row_has_is_told_at_the_start():
    """Else a misspelt one would make all rows `fuzzy` in silence."""
    with pytest.raises(ValueError, match=r"per_row\(acu_reward\): no row has such a column"):
        fitting(load_rewards(("all_of(format, per_row(acu_reward))",)), [row("3", "number")])
    rows = [row("3", None), row("3", "number")]
    assert fitting(load_rewards((METHOD,)), rows) is rows


# ---- rows that fit ----

@pytest.mark.parametrize("name, good, bad", [
    ("iou", "[1, 2, 3, 4]", "[[1, 2, 3, 4], [5, 6, 7, 8]]"), ("giou", "None", "a cube"),
    ("gate(format, iou(least=.5))", "[1, 2, 3, 4]", "[3, 4, 1, 2]"),
    ("detection", "[[1, 2, 3, 4], [5, 6, 7, 8]]", "[1, 2, 1, 4]"), ("weighted", "[]", "[1, 2]"),
    ("mean_iou", "(1,2),(3,4)", "7"), ("confidence", "No Objects", "(1,2)"),
    ("choice", "(B)", "green"), ("choice", "blue", "C or D"), ("number", "3 cm", "three"),
    ("yes_no", "Yes.", "perhaps"), ("jaccard", "cat, dog", ", []"), (METHOD, "3", "three")])
def test_a_gold_that_a_reward_cannot_read_is_refused_or_left_out(name, good, bad, capsys):
    """Defect 8: elsewhere such a prompt rewards all or nobody, in silence."""
    loaded = load_rewards((name, "format"))
    rows = [row(solution, "number") for solution in (good, bad, good, bad)]
    with pytest.raises(ValueError, match=r"2 of 4 rows do not fit .*t.jsonl:7: the solution .* is "
                                         r"to be .*; mend them, or leave them out by --bad_rows"):
        fitting(loaded, rows)
    assert fitting(loaded, rows, "skip") == [rows[0], rows[2]]
    assert "2 of 4 rows do not fit" in capsys.readouterr().err
    assert fitting(loaded, rows[:1]) == rows[:1]
    with pytest.raises(ValueError, match="2 of 2 rows"):
        fitting(loaded, rows[1::2], "skip")


def test_a_box_needs_a_picture():
    rows = [Example("q", "[1, 2, 3, 4]", (), row="t:1")]
    with pytest.raises(ValueError, match=r"t:1: .* and a picture"):
        fitting(load_rewards(("iou",)), rows)


def test_rows_are_read_only_where_a_reward_asks_for_it():
    class Rows(list):
        def __iter__(self):
            raise AssertionError("read")
    rows = Rows([row("3", None)])
    assert fitting(load_rewards(("accuracy", "format", "fuzzy", "box_format")), rows) is rows
    with pytest.raises(AssertionError):
        fitting(load_rewards(("number",)), rows)


# ---- many at a time ----

def test_score_all_gives_what_a_loop_gives(tmp_path):
    path = own(tmp_path, "def size(text, example):\n"
                         "    return None if not text else len(text) + len(example.solution)\n")
    names = (*REWARDS, f"all_of(math,format,{path}:size)", f"{path}:size")
    loaded, n = load_rewards(names, range(len(names))), len(names)
    some = [*SOME, say("1/2"), say(r"\frac{2}{4}"), say("0.5"), say("x"), say("x")]
    examples = [row(solution, None) for _, solution in zip(some, itertools.cycle(["3", "1/2"]))]
    table = score_all(loaded, some, examples)
    assert table == [[f(*row) for row in zip(some, examples)] for _, f, _ in loaded]
    assert [len(values) for values in table] == [len(some)] * n and None in table[-1]
    assert all(value is None or type(value) is float for row in table for value in row)
    assert score_all(loaded, [], []) == [[]] * n and score_all([], ["a"], [gold("3")]) == []


def test_a_plain_function_is_a_reward_too():
    assert score_all([("n", lambda text, example: len(text), 1.0)], ["a", "bb"], [None] * 2) == [
        [1.0, 2.0]]


def test_math_verify_is_asked_once_about_what_several_texts_say(monkeypatch):
    monkeypatch.setattr(verify.JUDGE, "seconds", 0.4)
    tower = say("5^{5^{5^5}}")
    counted()
    some = [tower, say("6/2"), tower, say("4"), tower, say("$6/2$", "well")]
    [values] = score_all([("math", rewards.math, 1.0)], some, [gold("3")] * 6)
    assert values == [None, 1.0, None, 0.0, None, 1.0]
    assert counted() == {"killed": 1, "failed": 0}


@pytest.mark.parametrize("name", ["math", "r1v_accuracy"])
def test_a_missing_math_verify_is_told_before_a_run_starts(name, monkeypatch):
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        load_rewards(("format", name))
    assert load_rewards(("format", "accuracy"))

