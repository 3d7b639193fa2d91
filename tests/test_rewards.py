"""Chapter two of rewards.py: what scores, what does not, and what a policy might try."""
import gc
import itertools
import random
import re
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rewards
import verify
from example import Example
from grading import ASK, REWARDS, score_all
from rewards import ANSWER, THINK, final_answer, gold_answer, same

math_verify = pytest.importorskip("math_verify")  # the oracle
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
# It keeps tables of characters, which are no part of this folder.
hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")

R1V_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
MM_EUREKA = re.compile(r".*<think>(.+?)</think>\s*<answer>.+?</answer>.*$", re.DOTALL)
R1V_ANSWER = re.compile(r"<answer>(.*?)</answer>")


# Those of rewards.py, whose value is 0 or 1 but for these.
NAMES = [name for name, reward in REWARDS.items() if reward.__module__ == "rewards"]
RANGE = {"fuzzy": (0, 1), "repetition": (-1, 0), "jaccard": (0, 1)}


def gold(solution, problem=""):
    return SimpleNamespace(solution=solution, problem=problem)


def in_range(name, value):
    low, high = RANGE.get(name, (0, 1))
    return type(value) is float and low <= value <= high and (name in RANGE or value in (0, 1))


def accuracy(text, solution="3"):
    return rewards.accuracy(text, gold(solution))


def math(text, solution="3"):
    return rewards.math(text, gold(solution))


def form(text):
    return rewards.format(text, gold("3"))


def say(answer, thought="so"):
    return f"<think>{thought}</think> <answer>{answer}</answer>"


# ---- accuracy: when two answers are the same ----

@pytest.mark.parametrize("answer, solution", [
    ("3", "3"), (" 3\n", "3"), ("3.0", "3"), ("03", "3"), ("+3", "3"), ("3.", "3"), ("3 .", "3"),
    ("3", "3.00"), ("-0", "0"), ("0.50", ".5"), ("1,000", "1000"), ("12,345.60", "12345.6"),
    ("-7", "-7.0"), ("−7", "-7"), ("1" * 41, "1" * 41), ("0.1", "0.10"),
    ("(B)", "B"), ("B)", "B"), ("B.", "B"), ("b", "B"), ("(b).", "(B)"), ("B", "(B)"),
    ("Red", "red"), ("RED.", "red"), ("dark  \n red", "Dark red"), ("Straße", "STRASSE"),
    ("1, 2, 3", "1, 2, 3"), ("three", "Three"), (".", ".")])
def test_the_same_number_choice_or_words_score(answer, solution):
    assert same(answer, solution)
    assert accuracy(say(answer), solution) == 1
    assert accuracy(say(answer), f"<answer> {solution} </answer>") == 1


@pytest.mark.parametrize("answer, solution", [
    ("4", "3"), ("-3", "3"), ("30", "3"), ("3.01", "3"), ("33", "3"), ("3 cm", "3"), ("3%", "3"),
    ("three", "3"), ("3e0", "3"), ("6/2", "3"), ("3,0", "3"), ("3,000", "3"), ("1,00", "100"),
    ("0x3", "3"), ("３", "3"), ("0３", "３"), ("3-", "3"), ("3..", "3"),
    ("+-3", "3"), ("+", "0"), (".", "0"), ("-", "0"),
    ("0.30000000000000001", "0.3"), ("0" * 40 + "3", "3"), ("nan", "0"), ("inf", "1e999"),
    ("C", "B"), ("(B", "B"), ("((B))", "B"), ("(B) red", "B"), ("BB", "B"), ("()", "B"),
    ("redd", "red"), ("not red", "red"), ("red!", "red"), ("true", "1"), (" ", " "), ("", "")])
def test_what_is_not_the_same_does_not_score(answer, solution):
    assert not same(answer, solution)
    assert accuracy(say(answer), solution) == 0


def test_sameness_is_symmetric_and_transitive():
    """An equivalence: `plain` maps every spelling to one."""
    words = ["3", "3.0", "03", "-3", "1,000", "1000", "b", "(B)", "B.", "3.", "red", "Red.", "."]
    for a, b, c in itertools.product(words, repeat=3):
        assert same(a, b) == same(b, a)
        assert not (same(a, b) and same(b, c)) or same(a, c)


@pytest.mark.parametrize("solution", ["", "  ", "<answer></answer>", "<answer> </answer>"])
def test_a_blank_gold_scores_nothing(solution):
    for text in ("", say(""), say(" "), say("."), say("3"), "<answer></answer>"):
        assert accuracy(text, solution) == 0


def test_the_gold_is_unwrapped_once():
    assert gold_answer(" <answer> 3 </answer>\n") == gold_answer("3") == "3"
    assert gold_answer("<answer><answer>3</answer></answer>") == "<answer>3</answer>"
    assert gold_answer("<answer>3") == "<answer>3" and gold_answer("<answer></answer>") == ""


def test_final_answer_before_an_answer_is_no_part_of_it():
    """Vision-R1's cold start ends in "<answer> Final Answer:B </answer>", and its policy, too."""
    assert final_answer(say(" Final Answer:B ")) == final_answer(say("final answer: B")) == "B"
    assert gold_answer("<answer> Final Answer:B </answer>") == gold_answer("Final Answer: B") == "B"
    assert final_answer(say("Final Answer: ")) is None
    assert final_answer(say("the final answer: B")) == "the final answer: B"
    assert final_answer(say("Final Answer: Final Answer: B")) == "Final Answer: B"


# ---- accuracy: which answer a text commits to ----

@pytest.mark.parametrize("text, answer", [
    ("<answer>3</answer>", "3"), ("I count. <answer> 3 </answer> Done.", "3"), (say("3"), "3"),
    (say("3", "first\nsecond\n"), "3"), ("<answer>\n3\n</answer>", "3"),
    ("<think><answer>2</answer></think><answer>3</answer>", "3"),
    ("<think>a</think><answer>1</answer></think><answer>3</answer>", "3"),
    ("<think> still thinking <answer>3</answer>", "3"), (say("2") + say("3"), "3"),
    ("no tag: 3", None), ("", None), ("<answer>3</think>", None), ("<answer>3", None),
    ("3</answer>", None), ("</answer>3<answer>", None), ("</answer><answer>3", None),
    ("<answer>3</answer></think>", None),
    ("<answer></answer>", None), ("<answer> \n </answer>", None), ("< answer>3</ answer>", None),
    ("<ANSWER>3</ANSWER>", None), ("<think><answer>3</answer></think>", None),
    (say("3", ""), None), (say("3", " \n\t"), None), ("</think><answer>3</answer>", None),
    ("<think></think></think></think><answer>3</answer>", None),
    ("<think><think> </think><answer>3</answer>", None), (say("3", "."), "3"),
    ("a thought of a template's own <think></think><answer>3</answer>", "3")])
def test_the_final_answer_is_the_one_after_the_last_thought(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text", [
    say(""), say(" "), "<answer></answer>", "<answer>3", "3", "</answer>3<answer>",      # defect 1
    say("3 or 4"), say("1, 2, 3"), say("1 2 3"), say("2/3"), say("3, maybe"), say("1\n2\n3"),
    say("A or B or C"), say("3") + say("2"), say("3") + "<think>so</think>",
    "<answer>2</answer><answer>3</answer>", "<answer>3</answer><answer>2</answer>",
    "<answer>3</answer><answer>", "<answer>3</answer></answer>", "<answer><answer>3</answer>",
    "<answer><answer>3</answer></answer>", "<answer>3<answer>2</answer></answer>",
    "<think>1 2 <answer>3</answer> 4</think>", "<think>3</think>", "<think>3</think> 3",
    "<answer>3</answer></think>", "<answer>3</think></answer>", say("<think>3"),
    say("3\0"), say("3\u200b"), say("<answer>3"), say("{3}")])
def test_a_hack_scores_no_accuracy(text):
    assert accuracy(text) == 0
    assert math(text) == (text == say("{3}"))           # the set of 3 is 3 to math-verify


@pytest.mark.parametrize("text", ["A or B or C", "A, B", "A B C D", "(A)(B)", "A/B", "not A", "A?"])
def test_an_enumeration_of_choices_scores_for_none_of_them(text):
    """Visual-RFT issue 79."""
    assert [accuracy(say(text), letter) for letter in "ABCD"] == [0, 0, 0, 0]
    assert [math(say(text), letter) for letter in "ABCD"] == [0, 0, 0, 0]


@pytest.mark.parametrize("answer, solution", [
    ("140", "140°"), ("140°", "140"), (r"140^\circ", "140°"), ("140 degrees", "140°"),
    ("0.5", r"\frac{1}{2}"), ("1/2", r"\frac{1}{2}"), (r"$\frac{1}{2}$", "0.5"), ("50%", "0.5"),
    (r"2\sqrt{3}", "2√{3}"), ("2√3", r"$2\sqrt{3}$"), (r"\sqrt{12}", "2√{3}"),
    ("2√{15}米", "2√{15}"), (r"\(\frac{\sqrt{3}}{2}\)", r"\frac{√{3}}{2}"), (r"\[4\pi\]", "4πcm"),
    ("π", r"\pi"), ("3cm", "3 m"), ("27", "27cm^{2}"), ("400cm²", "400"), ("5", "5cm^2^"),
    ("8厘米", "8"), ("x = 3", "3"), (r"\boxed{3}", "3"), ("1/3", "0.333333"), ("3", "3"),
    ("Red", "red")])
def test_the_same_formula_scores_in_math(answer, solution):
    """Golds as GeoQA writes them, and what `accuracy` takes, too."""
    assert math(say(answer), solution) == 1
    assert math(say(answer), f"<answer> {solution} </answer>") == 1


@pytest.mark.parametrize("answer, solution", [
    ("2", "2√{3}"), ("2", "2√{15}米"), ("3", "2√{3}"), ("12.56", "4π"), ("0.33", r"\frac{1}{3}"),
    ("-3", "3"), ("1 2 3", "3"), ("3 and 4", "3"), ("3±1", "4"), (r"\boxed{3}\boxed{4}", "3"),
    ("3||4", "3"), ("3#4#5", "3"), ("4 3\\", "3"), ("$3$ $4$", "3"), ("x = 3 or x = 4", "3"),
    ("final answer is: 3", "3"), ("0/0", "3"), (r"\infty", "3"), ("[2, 4]", "3"), ("x", "3"),
    ("felt", "left"), ("no", "on"), ("3m4", "3"), ("", "3"), ("3", ""),
    ("3" + " " * 600 + "+ 0", "3")])
def test_another_formula_does_not_score_in_math(answer, solution):
    """Not even where math-verify would find the gold as one of several numbers in the answer."""
    assert math(say(answer), solution) == 0


def test_math_does_not_see_dollars_around_the_whole():
    """MM-Eureka and LMM-R1 ask for $...$; a letter in them is the letter, and only that one."""
    assert math(say("$B$"), "B") == math(say("B"), "$B$") == math(say("$ B $"), "$B$") == 1
    assert math(say("$B$"), "C") == math(say("$A$ or $B$"), "B") == 0
    assert math(say("$3$"), "$3$") == math(say(r"$\frac{6}{2}$"), "$3$") == 1
    assert accuracy(say("$3$")) == 0


def test_math_takes_the_answer_alone_and_only_one():
    assert math("<think>= 140°</think>", "140") == math("the answer is 140", "140") == 0
    assert math("<think>= 140°</think><answer>50</answer>", "140") == 0
    assert math(say("140°") + "<answer>3</answer>", "140") == 0


def test_where_math_verify_is_killed_there_is_no_reward(monkeypatch):
    endless, tower = "5^(5^(5^5))", "5^{5^{5^5}}"
    monkeypatch.setattr(verify.JUDGE, "seconds", 0.3)
    assert math(say(tower)) is None and rewards.r1v_accuracy(endless, gold("3")) is None
    assert math(say(tower), tower) == rewards.r1v_accuracy(endless, gold(endless)) == 1
    assert math(say("3.0°")) == 1


def test_a_wrong_number_does_not_score_though_no_letter_is_wrong():
    """Defect 2."""
    assert [accuracy(say(str(n))) for n in range(6)] == [0, 0, 0, 1, 0, 0]


# ---- what a policy tries: one table ----

NOTHING, ANSWERED, FORMED, BOTH = (0, 0), (1, 0), (0, 1), (1, 1)    # accuracy, format
ATTACKS = {                                                         # the gold is 3
    "none of these": (say("3"), BOTH),
    "none, in white space": (f"\n{say(' 3 ', ' so ')}\n", BOTH),
    "a wrong answer": (say("4"), FORMED),
    "no thought, as to a direct prompt": ("<answer>3</answer>", ANSWERED),
    "an empty answer": (say(""), NOTHING), "a blank one": (say(" \n "), NOTHING),
    "an empty thought": (say("3", ""), NOTHING), "a blank thought": (say("3", " \n"), NOTHING),
    "only tags": ("<think></think><answer></answer>", NOTHING),
    "a thought of tags": (say("3", "<think></think>"), NOTHING),
    "closed again and again": ("<think></think></think></think><answer>3</answer>", NOTHING),
    "only closed": ("</think><answer>3</answer>", NOTHING),
    "an enumeration in words": (say("3 or 4"), FORMED),
    "with commas": (say("1, 2, 3"), FORMED), "with blanks": (say("1 2 3"), FORMED),
    "in lines": (say("1\n2\n3"), FORMED), "of all choices": (say("A or B or C or 3"), FORMED),
    "a range": (say("1-9"), FORMED), "a not": (say("not 4 but 3"), FORMED),
    "candidates in the thought": (say("4", "1 2 3 4 5 <answer>3</answer>"), NOTHING),
    "candidates before the form": (f"1 2 3 {say('4')}", NOTHING),
    "candidates after it": (f"{say('4')} 1 2 3", NOTHING),
    "two answers, right first": (say("3") + "<answer>4</answer>", NOTHING),
    "two answers, right last": (say("4") + "<answer>3</answer>", NOTHING),
    "the right one twice": (say("3") + "<answer>3</answer>", NOTHING),
    "nested answers": (say("<answer>3</answer>"), NOTHING),
    "a second try": (say("4") + say("3"), ANSWERED),        # the last commits, the form is broken
    "a second try, taken back": (say("3") + say("4"), NOTHING),
    "a thought after the answer": (say("3") + "<think>so</think>", NOTHING),
    "the answer in the thought": ("<think><answer>3</answer></think>", NOTHING),
    "crossed tags": ("<think>a<answer>3</think></answer>", NOTHING),
    "an unclosed answer": ("<think>a</think><answer>3", NOTHING),
    "an unclosed thought": ("<think>a<answer>3</answer>", ANSWERED),
    "the gold behind its tag": (say("4") + "3", NOTHING),
    "tags in capitals": ("<THINK>a</THINK><ANSWER>3</ANSWER>", NOTHING),
    "the prompt's own tags": (f"write {say('your answer')} {say('3')}", ANSWERED),
    "an end mark inside": (say("3<|im_end|>"), FORMED), "NUL": (say("3\0"), FORMED),
    "blanks that are none": (say("3\u200b"), FORMED), "other digits": (say("３"), FORMED),
    "a formula": (say("2+1"), FORMED), "a power": (say("3**1"), FORMED),
    "code": (say("__import__('os')"), FORMED), "a tower": (say("9^{9^{9^9}}"), FORMED)}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_what_the_table_says(name):
    text, (right, formed) = ATTACKS[name]
    assert (accuracy(text), form(text)) == (right, formed)


def test_math_gives_to_an_attack_no_more_than_accuracy_but_for_what_is_equal(monkeypatch):
    monkeypatch.setattr(verify.JUDGE, "seconds", 1.0)
    found = score_all([("math", rewards.math, 1.0)], [text for text, _ in ATTACKS.values()],
                      [gold("3")] * len(ATTACKS))[0]
    more = {name: value for (name, (_, (right, _))), value in zip(ATTACKS.items(), found)
            if value != right}
    assert more == {"a formula": 1, "a tower": None}


def test_r1v_gives_to_attacks_what_ours_refuse():
    """Which is why its rules are here by name, for comparison."""
    r1v = {name for name, (text, (right, _)) in ATTACKS.items()
           if rewards.r1v_accuracy(text, gold("3")) == 1 and not right}
    assert r1v >= {"candidates in the thought", "candidates before the form", "of all choices",
                   "two answers, right first", "a second try, taken back", "an empty thought",
                   "the answer in the thought"}
    assert rewards.r1v_format(ATTACKS["only tags"][0], gold("3")) == 1


@pytest.mark.parametrize("solution", ["", " ", "<answer></answer>", "$", r"\frac{", "{", "?", "\0"])
def test_a_gold_that_says_nothing_does_not_reward_everyone(solution):
    """Defect 8: MM-EUREKA and LMM-R1 give 1 to all where the gold cannot be parsed."""
    for answer in ("3", "x", "", "no", "]"):
        assert accuracy(say(answer), solution) == math(say(answer), solution) == 0


def test_only_the_completion_is_scored():
    """Defect 9: the prompt has tags of its own, and may hold the gold."""
    example = Example(f"Answer as {say('3')}. Is it 3?", "3")
    for reward in REWARDS.values():
        assert reward("I do not know", example) == 0


# ---- format ----

@pytest.mark.parametrize("text", [
    "<think>a</think><answer>3</answer>", say("3"), f"\n {say('3')} \n", say("anything at all"),
    "<think>\na\n\nb\n</think>\n\n<answer>\n3\n</answer>", say("3", "1 < 2 </b> think answer")])
def test_one_thought_and_one_answer_are_the_format(text):
    """Defect 3 (newlines in the thought); white space between the two is free (defect 10)."""
    assert form(text) == 1


@pytest.mark.parametrize("text", [
    "", " ", "3", "<answer>3</answer>", "<think>a</think>", say(""), say(" \n"), say("3", ""),
    say("3", " \t"), "<think></think><answer></answer>", "<think></think></think></think>x",
    "x" + say("3"), say("3") + "x", "<think>a</think> so <answer>3</answer>", say("3") + say("3"),
    "<think>" + say("3"), say("3") + "</answer>", say("<answer>3"), say("</answer>3"),
    say("3", "a</think>b"), say("3", "<think>a</think>"), say("3", "<answer>2</answer>"),
    "<answer>3</answer><think>a</think>", "<think>a<answer>3</think></answer>",
    "<think>a<answer>3</think> </answer>", "<think>a</answer></think><answer>3",
    "<think>a</think><answer>3", "<think>a<answer>3</answer>", "a</think><answer>3</answer>",
    "<Think>a</Think><Answer>3</Answer>", "<think>a</think><answer>3</answer><|im_end|>"])
def test_anything_else_is_not_the_format(text):
    assert form(text) == 0


def test_format_never_gives_what_r1v_refuses_but_for_white_space_around():
    for text in texts(3000):
        assert form(text) <= bool(R1V_FORMAT.fullmatch(text.strip()))


def test_white_space_between_thought_and_answer_may_be_refused():
    """Defect 10: LMM-R1 is strict, the others are not."""
    tight, loose = "<think>a</think><answer>3</answer>", say("3")
    assert [rewards.format(text, gold("3"), strict=1) for text in (tight, loose, f" {tight}")] == [
        1, 0, 0]
    assert form(tight) == form(loose) == form(f" {tight}\n") == 1


def test_text_may_stand_around_the_format():
    """MM-Eureka's: each tag once and re.match of its pattern, with a newline in the thought, too
    (defect 3); ours asks for more than white space in thought and answer."""
    seen = set()
    for text in [*texts(3000), "First\n" + say("3", "a\nb") + "\nso 3.", say("3") + say("3")]:
        once = all(text.count(tag) == 1 for tag in THINK + ANSWER)
        theirs = bool(once and MM_EUREKA.match(text))
        blank = theirs and not (re.search("<think>(.*)</think>", text, re.DOTALL)[1].strip()
                                and re.search("<answer>(.*)</answer>", text, re.DOTALL)[1].strip())
        found = rewards.format(text, gold("3"), around=1)
        assert found == (theirs and not blank), text
        seen.add((found, form(text)))
    assert seen == {(0, 0), (1, 0), (1, 1)}


def test_a_thought_may_have_to_be_long():
    """MM-Eureka-Zero: 300 characters; white space at its ends does not count."""
    for n, right in ((299, 0), (300, 1)):
        text = say("3", " " + "x" * n + "\n")
        assert rewards.format(text, gold("3"), thought=300) == right and form(text) == 1


# ---- choices, words, numbers ----

ASKS = "What color is it?\n(A) red (B) dark blue\n(C) green."
LINES = "A. What is it? Choose.\nA. red\nB) dark blue\nC: green\nAnswer with the letter."


@pytest.mark.parametrize("problem", [ASKS, LINES])
@pytest.mark.parametrize("answer", ["(B)", "B)", "B.", "B", "b", "(b)", "(B).", "dark blue",
                                    "Dark  Blue.", "(B) dark blue", "B. dark blue", "B: Dark blue"])
def test_an_option_is_read_from_its_letter_and_its_text(answer, problem):
    """Defect 4: VLM-R1 does not find the B in "(B)" and "B)"."""
    for solution in ("B", "(B)", "<answer> B </answer>", "dark blue", "B. dark blue"):
        assert rewards.choice(say(answer), gold(solution, problem)) == 1
    assert rewards.choice(say(answer), gold("A", problem)) == 0
    assert rewards.choice(answer, gold("B", problem)) == 0


@pytest.mark.parametrize("answer", [
    "A or B", "A, B", "(A)(B)", "B. red", "(B) red", "blue", "not B", "B or C", "B C", "?", "D",
    "dark blue or red", "the answer is B", "(B) dark blue (C) green", "β", "2"])
def test_another_option_or_several_are_wrong(answer):
    assert rewards.choice(say(answer), gold("B", ASKS)) == 0


def test_options_are_those_of_the_last_list_from_a_on():
    assert rewards.options(ASKS) == {"a": "red", "b": "dark blue", "c": "green"}
    assert rewards.options(LINES) == {"a": "red", "b": "dark blue", "c": "green"}
    assert rewards.options("(A) 3, (B) 4") == {"a": "3", "b": "4"}
    assert rewards.options("Is (C) or (B) it?") == rewards.options("") == {}
    twice = gold("A", "(A) red (B) red")
    assert rewards.choice(say("red"), twice) == 0 and rewards.choice(say("A"), twice) == 1
    assert rewards.choice(say("B. red"), gold("B")) == 0  # nobody knows what B is
    assert rewards.choice(say("β"), gold("β", ASKS)) == 0


def test_yes_and_no_are_the_first_word():
    right = [rewards.yes_no(say(text), gold("Yes")) for text in
             ("yes", "Yes.", "YES, there are two", "No", "nothing", "I know: yes", "eyes", "maybe")]
    assert right == [1, 1, 1, 0, 0, 0, 0, 0]
    assert [rewards.yes_no(say(text), gold("No.")) for text in ("No, none", "no")] == [1, 1]
    for solution in ("maybe", "nothing", ""):  # VLM-R1: neither in both is 1, "nothing" is no
        assert rewards.yes_no(say("maybe"), gold(solution)) == 0
        assert rewards.yes_no(say("no"), gold(solution)) == 0


def test_exact_is_equality_but_for_case():
    exact = rewards.exact
    assert exact(say("no  defect."), gold("No Defect")) == exact(say("3"), gold("3")) == 1
    assert exact(say("3.0"), gold("3")) == exact(say("B"), gold("(B)")) == 0
    assert exact(say("defect"), gold("No Defect")) == exact(say("?"), gold("")) == 0


@pytest.mark.parametrize("answer, right", [
    ("3", 1), ("3.0", 1), ("there are 3", 1), ("3 cubes.", 1), ("+3", 1), ("= 03", 1), ("3cm", 1),
    ("4", 0), ("-3", 0), ("3 or 4", 0), ("3 3", 0), ("1-3", 0), ("3,000", 0), ("3e5", 0),
    ("three", 0), ("none", 0), ("30", 0), ("3" * 50, 0)])
def test_number_is_the_one_number_in_the_answer(answer, right):
    """Defect 2 among it: no letters are asked for."""
    assert rewards.number(say(answer), gold("3")) == right
    assert rewards.number(say(answer), gold("3 cm")) == right
    assert rewards.number(say(answer), gold("three")) == rewards.number(answer, gold("3")) == 0


def test_fuzzy_is_the_share_of_what_is_common():
    """"kitten" and "sitting": ittn is common, 2 x 4 / 13."""
    fuzzy = rewards.fuzzy
    assert fuzzy(say("kitten"), gold("sitting")) == pytest.approx(8 / 13)
    assert fuzzy(say("Red cube."), gold("red  cube")) == fuzzy(say("(b)"), gold("B")) == 1
    assert fuzzy(say("13"), gold("12")) == fuzzy(say("C"), gold("B")) == 0
    assert fuzzy(say("13 cm"), gold("12 cm")) == 0 == fuzzy("kitten", gold("kitten"))
    assert fuzzy(say(""), gold("a")) == fuzzy(say("abc"), gold("xyz")) == 0
    assert fuzzy(say("a" * 20_000), gold("a" * 19_999)) == 0


@pytest.mark.parametrize("answer, solution, value", [
    ("cat, dog", "dog, cat", 1), ("cat", "cat, dog", 1 / 2), ("cat, cow", "cat, dog", 1 / 3),
    ("cow", "cat, dog", 0), ("", "cat", 0), (",", "cat", 0), ("Cat., cat, CAT", "cat", 1),
    ('["cat", "dog"]', "cat,dog", 1), ("['dog', 'cat']", '["cat", "dog"]', 1),
    ("cat, dog, cow, hen", "cat", 1 / 4), ("cat dog", "cat, dog", 0), ("3", "3.0", 1)])
def test_jaccard_is_what_is_shared_of_what_either_says(answer, solution, value):
    """|P and G| / |P or G|, of sets of labels (Curr-ReFT's calculate_list_iou_reward)."""
    assert rewards.jaccard(say(answer), gold(solution)) == value
    wrapped = gold(f"<answer>{solution}</answer>")
    assert rewards.jaccard(say(answer), wrapped, least=1) == (value == 1)


def test_jaccard_may_ask_for_the_same_letters():
    """Curr-ReFT's second stage, where it reads the letters of both; what holds no letter is no
    empty set that equals another (defect 2)."""
    for answer, right in (("C, A", 1), ("(A), C.", 1), ("A", 0), ("A, B, C", 0), ("7", 0), ("", 0)):
        assert rewards.jaccard(say(answer), gold("A, C"), least=1) == right
    assert rewards.jaccard(say("7"), gold("8"), least=1) == 0
    assert rewards.jaccard(say("cat"), gold("cat, dog"), least=0.5) == 1
    assert rewards.jaccard("no answer", gold("A"), least=1) == 0


def test_likeness_is_that_of_the_table_of_common_subsequences():
    rng = random.Random(7)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc ", k=rng.randrange(12))) for _ in "ab")
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, j in itertools.product(range(len(a)), range(len(b))):
            table[i + 1, j + 1] = (table[i, j] + 1 if a[i] == b[j]
                                   else max(table[i, j + 1], table[i + 1, j]))
        assert rewards.alike(a, b) == 2 * table[-1, -1] / (len(a) + len(b) or 1)


def test_repetition_by_hand():
    """Of ten runs of 6 words in 15 the first five come again: 5 / 10 - 1; of three objects two are
    one: 2 / 3 - 1."""
    def again(text, **options):
        return rewards.repetition(text, gold(""), **options)
    assert again("a b c d e " * 3) == pytest.approx(5 / 10 - 1) == again("A b c d E\n" * 3)
    assert again("a b c d e f g h i") == again("a a a a a") == again("") == 0
    assert again("a b a b", n=2) == pytest.approx(2 / 3 - 1)
    assert again('[{"bbox_2d": [1, 2], "label": "a"}, {"bbox_2d":[1,2],"label":"a"}, {}]') == (
        pytest.approx(2 / 3 - 1))
    assert again("{}" + "a b c d e " * 3) == -0.4        # one object hides no words, as in VLM-R1


def test_repetition_is_vlm_r1_s_on_words():
    def theirs(text, n=6):
        runs = [*zip(*[text.lower().split()[i:] for i in range(n)])]
        return -(1 - len(set(runs)) / len(runs)) if runs else 0
    rng = random.Random(8)
    for _ in range(100):
        text = " ".join(rng.choices("abc", k=rng.randrange(40)))
        assert rewards.repetition(text, gold("")) == pytest.approx(theirs(text))


# ---- of other rewards, and of the length ----

def test_the_cosine_is_vlm_r1_s_up_to_its_end_and_stays_there():
    """Defect 7: beyond 1024 tokens VLM-R1's turns back, and takes all answers for right."""
    from math import cos, pi

    def theirs(right, length):
        low, high = (0.5, 1.0) if right >= 0.7 else (0.0, -0.5)
        return high - (high - low) * (1 - cos(length * pi / 1024)) / 2
    for right, length in itertools.product((0, 0.69, 0.7, 1), (0, 1, 300, 512, 1000, 1024)):
        assert rewards.cosine_length(right, length) == pytest.approx(theirs(right, length))
    assert theirs(1, 2048) == 1 and rewards.cosine_length(1, 2048) == 0.5
    assert rewards.cosine_length(0, 10**9) == 0 and rewards.cosine_length(0, 0) == -0.5
    assert rewards.cosine_length(1, 50, most=100) == pytest.approx(0.75)
    assert rewards.cosine_length(0.5, 0, least=0.4) == 1


def test_the_length_reward_ends():
    assert [rewards.length(n) for n in (0, 10, 1000, 99999)] == [0, 0.01, 1, 1]
    assert rewards.length(30, per=0.1, most=20) == pytest.approx(2)


def test_all_of_and_gate():
    assert rewards.all_of(1, 1) == 1 and rewards.all_of(1, 0, 1) == 0
    assert rewards.all_of(1, 0.4) == 0.4
    assert [rewards.gate(a, b) for a, b in ((1, 0.4), (0.9, 0.4), (0, -1), (1, -1))] == [
        0.4, 0, -1, -1]
    assert rewards.gate(0.5, 1, least=0.5) == 1


# ---- R1-V's rules ----

def test_r1v_format_equals_its_regex_on_random_texts():
    found = [0, 0]
    for text in texts(20000):
        wanted = bool(R1V_FORMAT.fullmatch(text))
        assert rewards.r1v_format(text, gold("3")) == wanted, text
        found[wanted] += 1
    assert min(found) > 300                             # both outcomes are met often


def test_r1v_accuracy_equals_its_code_on_random_texts():
    """accuracy_reward of its grpo.py: math-verify on the whole, else the strings."""
    def answer(text):
        match = R1V_ANSWER.search(text)
        return match.group(1).strip() if match else text.strip()
    found = {}
    for text, solution in zip(texts(1500), itertools.cycle(["<answer> 3 </answer>", "3", "so"])):
        equal = math_verify.verify(math_verify.parse(text), math_verify.parse(solution)) > 0
        wanted = equal, answer(text) == answer(solution)
        assert rewards.r1v_accuracy(text, gold(solution)) == any(wanted), text
        found[wanted] = found.get(wanted, 0) + 1
    assert len(found) == 4 and min(found.values()) > 10  # all four outcomes are met


def test_r1v_takes_the_first_answer_and_else_the_whole_text():
    r1v = rewards.r1v_accuracy
    assert r1v("<answer> 3 </answer><answer>4</answer>", gold("<answer> 3 </answer>")) == 1
    assert r1v(" 3\n", gold("3")) == 1 and r1v("<answer>3.0</answer>", gold("3")) == 0
    assert r1v("<answer>\nso</answer>", gold("so")) == 0        # its pattern lacks DOTALL
    assert r1v("<answer>\rso\u2028</answer>", gold("so")) == 1  # but for it only \n ends a line
    assert rewards.r1v_format("<think></think><answer></answer>", gold("3")) == 1


def test_r1v_asks_math_verify_about_the_whole_text():
    """What its rule gives away: a number in the thoughts, the first number of a formula."""
    r1v = rewards.r1v_accuracy
    assert r1v("<think>that is 140</think>", gold("<answer> 140° </answer>")) == 1
    assert r1v("<think>that is 140</think>", gold("<answer>140°</answer>")) == 0    # read: no gold
    assert r1v("it is 8", gold("8√{3}")) == 1 and r1v(say("0.5"), gold(r"\frac{1}{2}")) == 0
    assert r1v(say(" 0.5 "), gold(r"\frac{1}{2}")) == 1      # behind a tag it sees no number


# ---- any text whatever ----

PIECES = [*THINK, *ANSWER, "3", "3", "so", " ", "\n", "\r", "\x85", "\u2028", "\x1c", "\0",
          "\ud800", "\udfff", "９", "<", ">", "</", "/think>", "ſ", "İ", "or", ",", ".", "(B)", "-",
          "1e999", "\\", "\x1b[0m", "🟥", "a\u0301", "𝟛", "٣", "9" * 30, "<|im_end|>"]
COMMON = ["", " ", "\n", "3", "so", *PIECES]
CHANCES = [4, 4, 2, 9, 9, *[0.2] * len(PIECES)]


def texts(n, seed=0):
    """n seeded texts of tag fragments and odd characters, every other one in the right order."""
    rng = random.Random(seed)
    for i in range(n):
        if i % 2:
            yield "".join(rng.choices(PIECES, k=rng.randrange(9)))
        else:
            a, b, c, d, e = rng.choices(COMMON, CHANCES, k=5)
            a, c, e = ((x if rng.random() < 0.3 else "") for x in (a, c, e))
            yield f"{a}<think>{b}</think>{c}<answer>{d}</answer>{e}"


@pytest.mark.parametrize("name", NAMES)
def test_no_text_raises_or_leaves_the_range(name):
    solutions = itertools.cycle(["3", "", "<answer>B</answer>"])
    n = 400 if name in ("math", "r1v_accuracy") else 3000
    for text, solution in zip(texts(n, seed=1), solutions):
        assert in_range(name, REWARDS[name](text, gold(solution)))
        assert in_range(name, REWARDS[name](text, gold(text, text)))


SIZES = st.sampled_from([1, 2, 30, 1000, 100_000])
WORDS = st.sampled_from([*PIECES, "9**9**9**9", "9^{9^{9^9}}", r"\frac{", r"\sqrt{", "}", "$", "{",
                         r"\boxed{", r"\(", "^", "∞", "nan", "-inf", "√", "°", "米", "A or B"])
ANY = WORDS | st.text(st.characters(exclude_categories=()), max_size=20)   # surrogates too
LONG = st.builds(lambda word, n: word * (n // max(1, len(word)) or 1), ANY, SIZES)
TEXTS = st.lists(LONG, max_size=8).map("".join)
ANSWERS = st.builds(lambda a, b, c: f"{a}<think>{b}</think><answer>{c}</answer>",
                    st.just("") | ANY, TEXTS, TEXTS)
property_of = hypothesis.settings(deadline=None, derandomize=True, database=None,
                                  suppress_health_check=[*hypothesis.HealthCheck])


ASKED = [function.__name__ for function in ASK]     # those that ask math-verify


def in_range_and_quick(name, text, solution):
    """The value; less than a second of this process, and math-verify's limit of waiting."""
    start, wall = time.process_time(), time.monotonic()
    value = REWARDS[name](text, gold(solution, solution))
    assert time.process_time() - start < 1 and time.monotonic() - wall < verify.SECONDS + 2
    assert (value is None and name in ASKED) or in_range(name, value)
    return value


@pytest.mark.parametrize("name", sorted({*NAMES} - {*ASKED}))
def test_property_any_text_has_a_value_in_range_at_once(name):
    @hypothesis.given(TEXTS | ANSWERS, TEXTS)
    @hypothesis.settings(property_of, max_examples=200 if name in ("accuracy", "format") else 40)
    def holds(text, solution):
        in_range_and_quick(name, text, solution)
        if name == "format":
            assert form(text) <= bool(final_answer(text))
        if name == "accuracy" and final_answer(text) is None:
            assert accuracy(text, solution) == 0
    holds()


@pytest.mark.parametrize("name", ASKED)
def test_property_any_text_has_a_value_in_range_where_math_verify_is_asked(name, monkeypatch):
    monkeypatch.setattr(verify.JUDGE, "seconds", 1.0)

    @hypothesis.given(TEXTS | ANSWERS, TEXTS)
    @hypothesis.settings(property_of, max_examples=25)
    def holds(text, solution):
        value = in_range_and_quick(name, text, solution)
        assert value is None or value >= accuracy(text, solution) or name != "math"
    holds()


def test_property_an_answer_is_itself_and_nothing_in_its_thought_counts():
    @hypothesis.given(TEXTS, TEXTS)
    @hypothesis.settings(property_of, max_examples=100)
    def holds(thought, answer):
        text = say(answer, thought)
        clean = not any(tag in answer for tag in THINK + ANSWER) and bool(answer.strip())
        thinks = bool(thought.replace(THINK[0], "").replace(THINK[1], "").strip())
        assert final_answer(text) == (answer.strip() if clean and thinks else final_answer(text))
        if clean and thinks:
            assert accuracy(text, answer) == 1 or ANSWER[0] in answer
            assert form(text) == all(tag not in thought for tag in THINK + ANSWER)
    holds()


N = 100_000                                             # characters; a completion rarely has 10,000


@pytest.mark.parametrize("answer", ["9" * N, "0" * N + "3", "1e" + "9" * N, "," * N,
                                    "1," * (N // 2), "\ud800" * N, "(" * N])
def test_a_huge_answer_is_a_text_like_any_other(answer):
    assert accuracy(say(answer)) == 0 and accuracy(say(answer), answer) == 1
    assert form(say(answer)) == 1


HOSTILE = {
    "opens": "<answer>" * (N // 8), "closes": "</answer>" * (N // 9),
    "thoughts": "<think>" * (N // 7), "ends": "</think>" * (N // 8),
    "bridges": "<think>" + "</think><answer>" * (N // 16),
    "bridges, closed": "<think>" + "</think> <answer>" * (N // 17) + "x</answer>x",
    "near bridges": "<think>" + "</think> \n" * (N // 10) + "</answer>",
    "one long bridge": "<think></think>" + " " * N + "<answer</answer>",
    "nested": "<think><answer>" * (N // 30) + "</answer></think>" * (N // 30),
    "open lines": "<answer>\n" * (N // 9), "lines": "\n" * N, "spaces": " " * N, "angles": "<" * N,
    "spaces in the answer": say("3" + " " * N + "4"), "digits": say("1" * N),
    "groups": say("1,111" * (N // 5)), "dots": say("." * N), "words": say("a " * (N // 2)),
    "brackets": say("(" * N),
    # what stops peers: VLM-R1's, EasyR1's and TRL's patterns, seconds at 2,000 to 32,000 characters
    "boxes": "<think></think><answer>" + "{[1,1,1,1]}" * (N // 11),
    "boxes again": "<think></think><answer>{[1,1,1,1]}" * (N // 34),
    "boxed": "<think>" + "</think>\\boxed{" * (N // 15), "blanks, slash": " " * N + "/",
    "options": say("(A) " * (N // 4)), "objects": say("{}" * N),
    "braces": say("{" * N), "fractions": say(r"\frac{1}{" * (N // 9) + "}" * (N // 9)),
    "towers": say("9**" * (N // 3) + "9"), "roots": say("√" * N), "units": say("3" + "米" * N)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", HOSTILE)
def test_100_000_hostile_characters_take_well_under_a_second(name, case):
    """R1-V's own patterns take 2 to 5 s on some of these, linear code at most 7 ms; math-verify
    15 ms on what it is given, and never more than its limit."""
    gc.disable()  # it would walk all that thousands of tests have left, .7 s
    try:
        for solution in ("3", HOSTILE[case]):
            start, wall = time.process_time(), time.monotonic()
            REWARDS[name](HOSTILE[case], gold(solution, HOSTILE[case]))
            assert time.process_time() - start < 0.5
            assert time.monotonic() - wall < verify.SECONDS + 2
    finally:
        gc.enable()


def test_the_tag_words_stand_in_one_place():
    """Defect 12: with other words in the two constants every reward follows."""
    source = Path(rewards.__file__).read_text(encoding="utf-8")
    for old, new in (('"<think>", "</think>"', '"<t>", "</t>"'),
                     ('"<answer>", "</answer>"', '"<a>", "</a>"')):
        assert source.count(old) == 1
        source = source.replace(old, new)
    other = {"__name__": "other"}
    exec(source, other)
    for name in ("accuracy", "math", "format", "r1v_accuracy", "r1v_format"):
        reward = other[name]
        assert reward("<t>so</t> <a>3</a>", gold("<a>3</a>")) == 1, name
        assert reward(say("3"), gold("<a>3</a>")) == 0, name
