"""Verifiable rewards: completion text and example in, number out.

    accuracy(text, example)                     # 1.0 if the answer in text is the example's

A reward is `f(text, example) -> float | None` (None: no signal, the completion is left out).
`text` is the completion alone, never the prompt; `example.solution` is the gold answer. Those of
boxes are in boxes.py; grading.py loads them by their names, with arguments, and runs them.
The rewards below give a number in the range that they name, 0.0 or 1.0 where they name none, for
any text whatever and never raise. They read the text with str.find and the like, so their time is
linear in its length: the patterns of peers backtrack, and a policy soon emits what makes them take
seconds. Two of them, `math` and `r1v_accuracy`, ask math-verify where comparing strings does not
settle it: in processes of its own that are killed after 3 s (verify.py), on 10,000 characters at
most. What kills one gets None, neither reward nor punishment: how long sympy takes says nothing
about the answer.

`r1v_*` are R1-V's (src/r1-v/src/open_r1/grpo.py), kept to the letter so that its runs can be
repeated; the others are ours, and say where they differ from VLM-R1's. R1-V's accuracy can be had
without an answer: the last number of the whole completion counts, thoughts too, and "8" is 8√3.

What a policy tries, and what it gets from `accuracy`, `math` and `format`:
  an empty answer, a blank one, an unclosed one        both 0
  "3 or 4", "1, 2, 3", "A or B or C" in one answer     accuracy 0: the whole must equal the gold;
                                                       math too: these are sets, or products
  several answers, one after another or nested         both 0: one answer after the last </think>
  the candidates listed in the thoughts                nothing: only text after </think> is read
  several thoughts, to move the last </think>          format 0, and the one answer left counts
  an empty thought                                     both 0; without any tag of a thought, as a
                                                       direct answer has none, accuracy counts
  tags in the wrong order or twice                     format 0
  100,000 digits, NUL, lone surrogates                 a text like any other; no int(), no eval
What these rules cannot see: a thought of one full stop has format 1, and a guess may be right.
"""
import re
from math import cos, pi

from verify import verify

# The tag words, here and nowhere else: prompt, reward and evaluation import them.
THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")

# Whole number or decimal, thousands in groups or not. [0-9]: \d also takes other scripts' digits.
NUMBER = re.compile(r"([+\-−]?)(?=\.?[0-9])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?")
TITLE = re.compile(r"^final answer:\s*", re.IGNORECASE)  # of an answer, in Vision-R1's data
LONGEST_NUMBER = 40                                     # characters; a longer one is a word
LONGEST_FORMULA = 500                                   # characters; a longer answer is no formula
CHOICE = re.compile(r"\(?[a-z]\)")                      # (b) and b); "b." has lost its full stop
FLAT = re.compile(r"\{[^{}]*\}")                         # a JSON object that holds no other
MARK = re.compile(r"(?:^|(?<=\s))(?:\(([A-Z])\)|([A-Z])[.):](?=\s))\s*")     # of an option
LONGEST_FUZZY = 10_000                                  # characters; a longer answer is equal, or 0
ROOT = re.compile(r"√(?:\{([^{}√]*)\}|([0-9]+|[a-z]))")    # √{…}, √3, √x
# A length, an area, ° or what is Chinese (米, 小时) at the end, behind a number: 27cm^{2}, 65π m.
UNIT = re.compile(r"(?<=[0-9})π])\s*(?:°|[\u4e00-\u9fff]+|[cdkm]?m(?:[²³]|\^\{?[23]\}?\^?)?)$")
BRIDGE = re.compile(rf"{THINK[1]}\s*{ANSWER[0]}")       # linear: every attempt starts at a "<"


def accuracy(text, example):
    """1 if the one answer after the last </think> equals the gold (see same), else 0."""
    answer = final_answer(text)
    return float(answer is not None and same(answer, gold_answer(example.solution)))


def math(text, example):
    """1 if the one answer after the last </think> equals the gold: as in accuracy, or as a formula
    to math-verify (0.5 and \\frac{1}{2}, 2√3 and 2\\sqrt{3}, x = 3 and 3), else 0. Units are not
    compared: 140° is 140, 3 cm is 3 m. A gold of letters alone is words (else "felt" would be
    "left", four factors), and one that math-verify cannot read is, too (to MM-Eureka and LMM-R1 all
    answers are right then). $…$ around all says nothing. None if math-verify had to be killed."""
    return settled(ask_math(text, example))


def ask_math(text, example):
    """The value of `math`, or the question to math-verify that is to settle it."""
    answer, gold = map(undollared, (final_answer(text) or "", gold_answer(example.solution)))
    if not answer or not gold:
        return 0.0
    words = gold.isascii() and "".join(gold.split()).isalpha()
    if same(answer, gold) or words or len(answer) > LONGEST_FORMULA:
        return float(same(answer, gold))
    return formula(answer), formula(gold), True


def format(text, example, strict=0.0, around=0.0, thought=1.0):
    """1 for `<think>…</think> <answer>…</answer>` and nothing else, each tag exactly once, neither
    thought nor answer blank; white space (newlines too) around and between is free. Else 0.
    strict=1 (LMM-R1's): there is none. around=1 (MM-Eureka's): any text may stand before and after.
    thought: characters of the thought at least (300: MM-Eureka-Zero's)."""
    before, opened, rest = text.partition(THINK[0])
    inside, _, rest = rest.partition(THINK[1])
    between, _, rest = rest.partition(ANSWER[0])
    answer, closed, after = rest.partition(ANSWER[1])
    outside = "" if around else before + after
    blank = not (outside + between if strict else (outside + between).strip())
    return float(blank and all(text.count(tag) == 1 for tag in THINK + ANSWER)
                 and bool(opened) and bool(closed)
                 and len(inside.strip()) >= thought and bool(answer.strip()))


def r1v_accuracy(text, example):
    """R1-V: 1 if math-verify takes the last formula or number of text for that of the solution, or
    if the first answer of text equals the first of the solution, as strings; where there is no
    answer tag the whole text, stripped, stands for it. The strings are compared first, since that
    costs nothing. None if they differ and math-verify had to be killed (R1-V: 0)."""
    return settled(ask_r1v(text, example))


def ask_r1v(text, example):
    """The value of `r1v_accuracy`, or the question to math-verify that is to settle it."""
    if r1v_answer(text) == r1v_answer(example.solution):
        return 1.0
    return text, example.solution, False


def settled(value):
    """The value of an ask_...: as it is, or what math-verify says to the question that it is."""
    value = verify(*value) if isinstance(value, tuple) else value
    return value if value is None else float(value)


def r1v_format(text, example):
    """R1-V: re.fullmatch("<think>.*?</think>\\s*<answer>.*?</answer>", text, re.DOTALL).

    Such a text starts with <think>, ends with </answer>, and somewhere between the two is a bridge
    from thought to answer. Unlike `format` this takes empty and repeated tags.
    """
    return float(text.startswith(THINK[0]) and text.endswith(ANSWER[1])
                 and BRIDGE.search(text) is not None)


def choice(text, example):
    """1 if the answer is the gold's option: by its letter, (B), B), B., B or b, by its letter and
    text, "(B) red", or by its text, as the question's options have it (see options). VLM-R1's mcq
    does not read "(B)" and "B)", and finds letters in the middle of a text."""
    listed, answer = options(example.problem), final_answer(text)
    gold = letter(gold_answer(example.solution), listed)
    return float(answer is not None and gold is not None and letter(answer, listed) == gold)


def yes_no(text, example):
    """1 if the answer's first word is the gold's, yes or no: "Yes", "No, there are two". VLM-R1's
    takes any "no", that of "nothing" too, and gives 1 where it finds neither in both."""
    gold = first_word(gold_answer(example.solution))
    return float(gold in ("yes", "no") and first_word(final_answer(text) or "") == gold)


def exact(text, example):
    """1 if the answer is the gold, letter by letter, but for case, runs of white space and a final
    full stop: VLM-R1's all_match. "3.0" is not "3", see `accuracy`."""
    gold = words(gold_answer(example.solution))
    return float(bool(gold) and words(final_answer(text) or "") == gold)


def number(text, example):
    """1 if the one number in the answer is the gold by value: "3", "3.0", "there are 3", "3 cm". An
    answer with two numbers has 0, whatever they are."""
    gold = one_number(gold_answer(example.solution))
    return float(bool(gold) and same(one_number(final_answer(text) or ""), gold))


def fuzzy(text, example):
    """In [0, 1]: 1 if the answer is the gold as in `accuracy`; else 0 if the gold opens with a
    number or is a choice; else how alike the two are, 2 x longest common subsequence / sum of
    lengths (the ratio of the package Levenshtein), but for case and white space. VLM-R1's default,
    which compares by likeness what opens with a number, too: 13 cm is nearly 12 cm."""
    answer, gold = final_answer(text), gold_answer(example.solution)
    if answer is None or not gold:
        return 0.0
    a, b = words(answer), words(gold)
    strict = NUMBER.match(b) or letter(gold, {}) or max(len(a), len(b)) > LONGEST_FUZZY
    return float(same(answer, gold)) if strict or same(answer, gold) else alike(a, b)


def jaccard(text, example, least=0.0):
    """In [0, 1]: labels that answer and gold share / labels of either, which are separated by
    commas, in brackets and quotes or not, in any order (Curr-ReFT's, of what a picture shows); with
    `least`, 1 where it is at least that, else 0: least=1 asks for the same letters, "A, C"."""
    said, gold = labels(final_answer(text) or ""), labels(gold_answer(example.solution))
    value = len(said & gold) / len(said | gold) if gold else 0.0
    return float(value >= least) if least else value


def repetition(text, example, n=6.0):
    """In [-1, 0]: different / all - 1, of the runs of n words of text, and of the flat JSON objects
    in it (boxes said again and again); the lower of the two. VLM-R1's, which looks at the words
    only where there is no JSON."""
    said, n = text.casefold().split(), int(n)
    objects = ["".join(found.split()) for found in FLAT.findall(text)]
    return min((len({*many}) / len(many) - 1.0
                for many in ([*zip(*(said[i:] for i in range(n)))], objects) if many), default=0.0)


# ---- rewards of what others gave, and of the length in tokens ----

def all_of(*values):
    """The lowest of several rewards: of 0s and 1s, whether all are 1 (Vision-R1's hard rule)."""
    return min(values)


def gate(condition, value, least=1.0):
    """A reward where another is at least `least`, else 0, or what it is if that is below 0."""
    return value if condition >= least else min(value, 0.0)


def cosine_length(right, length, most=1024.0, least=0.7):
    """In [-0.5, 1]: from 1 for no token to 0.5 for `most` where the reward `right` is at least
    `least`, from -0.5 to 0 where it is not, along half a cosine (arXiv 2502.03373), and as for
    `most` beyond. VLM-R1's, which takes every answer for right and turns back beyond `most`."""
    way = (1 + cos(pi * min(length / most, 1.0))) / 2   # 1 -> 0
    return 0.5 + way / 2 if right >= least else -way / 2


def length(length, per=0.001, most=1000.0):
    """per x tokens, of which at most `most` count. VisualThinker's has no such end, and its policy
    repeats a sentence up to the limit."""
    return per * min(length, most)


# ---- the answer in a text, and when two answers are the same ----

def final_answer(text):
    """The answer that text commits to, stripped, or None: what stands in <answer>…</answer> after
    the last </think> (in a text without </think>: anywhere). None if it is blank or unclosed, if
    either answer tag appears there more than once (several answers are no answer), or if nothing
    but tags and white space was thought before that </think>. A title is no part of it."""
    thought, thinks, after = text.rpartition(THINK[1])
    if after.count(ANSWER[0]) != 1 or after.count(ANSWER[1]) != 1:
        return None
    if thinks and not thought.replace(THINK[0], "").replace(THINK[1], "").strip():
        return None
    inside, closed, _ = after.partition(ANSWER[0])[2].partition(ANSWER[1])
    return (TITLE.sub("", inside.strip()) or None) if closed else None


def gold_answer(solution):
    """The gold answer, "3": of `<answer> 3 </answer>`, `Final Answer: 3`, `3`. Never raises."""
    text = solution.strip()
    if text.startswith(ANSWER[0]) and text.endswith(ANSWER[1]):
        text = text[len(ANSWER[0]):-len(ANSWER[1])].strip()
    return TITLE.sub("", text)


def undollared(answer):
    """What stands in $…$, where that is all."""
    inside = answer[1:-1].strip()
    return inside if f"${answer[1:-1]}$" == answer and "$" not in inside else answer


def labels(answer):
    """The labels that commas separate, plain; brackets and quotes around them say nothing."""
    return {plain(label.strip(" \n\"'[]")) for label in answer.split(",")} - {""}


def same(answer, gold):
    """Whether two answers say the same: equal as number, choice or words. A blank gold equals none.

    Numbers by value: 3, 3.0, 03, +3, "3." and 1,000 = 1000; they are compared digit by digit, so
    nothing is rounded. Choices: (B), B), B., B, b. Words: case, runs of white space and one final
    full stop do not matter. "three" is not 3, "3 cm" is not 3, "(B) red" is not B: a verifier that
    guesses what was meant can be talked into more.
    """
    return bool(gold.strip()) and plain(answer) == plain(gold)


def words(answer):
    """An answer but for case, runs of white space and a final full stop."""
    return " ".join(answer.split()).casefold().removesuffix(".").rstrip()


def plain(answer):
    """The one spelling that all spellings of an answer share."""
    text = words(answer)
    number = NUMBER.fullmatch(text) if len(text) <= LONGEST_NUMBER else None
    if number:
        sign, whole, part = number.groups("")
        whole, part = whole.replace(",", "").lstrip("0") or "0", part.rstrip("0")
        value = f"{whole}.{part}" if part else whole
        return value if sign in ("", "+") or value == "0" else f"-{value}"
    return text.strip("()") if CHOICE.fullmatch(text) else text


def one_number(answer):
    """The one number in an answer, as it stands there; "" for none or several."""
    found = [match[0] for match in NUMBER.finditer(answer)]
    return found[0] if len(found) == 1 else ""


def first_word(answer):
    """The first word without the signs around it, small; "" if there is none."""
    return next(iter(answer.casefold().split()), "").strip(".,;:!?\"'*")


def options(problem):
    """{letter: text, plain} of the options that a question lists, "(A) red (B) blue" or in lines,
    marked (A), A), A. or A:, from A on. Of several such lists the last."""
    marks, run = [*MARK.finditer(problem)], []
    for mark in marks:
        if (mark[1] or mark[2]) == "A":
            run = []
        if (mark[1] or mark[2]) == chr(ord("A") + len(run)):
            run.append(mark)
    ends = [mark.start() for mark in run[1:]] + [len(problem)]
    texts = [problem[mark.end():end].strip().partition("\n")[0] for mark, end in zip(run, ends)]
    return {chr(ord("a") + i): plain(text.rstrip(" ,;")) for i, text in enumerate(texts)}


def letter(answer, listed):
    """The letter, small, of the option that an answer says, or None; see `choice`."""
    text = plain(answer)
    if len(text) == 1 and text.isascii() and text.isalpha():
        return text
    mark = MARK.match(" ".join(answer.split()).upper())
    named = mark and (mark[1] or mark[2]).lower()
    if named:                                           # with its text, which must be that option's
        rest = " ".join(answer.split())[mark.end():]
        return named if listed.get(named) == plain(rest) else None
    found = [key for key, said in listed.items() if said == text]
    return found[0] if len(found) == 1 else None


def alike(a, b):
    """2 x length of the longest common subsequence / sum of lengths, in [0, 1]; in bits of a whole
    number, one for each character of a (Hyyrö 2004)."""
    places, left = {}, (1 << len(a)) - 1
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    full = left
    for letter in b:
        common = left & places.get(letter, 0)
        left = ((left + common) | (left - common)) & full
    return 2 * (len(a) - left.bit_count()) / (len(a) + len(b) or 1)


def formula(answer):
    """An answer as one formula for math-verify, in $…$, without its unit. GeoQA's √{3} (and √3),
    Chinese units and squares of units are what math-verify does not know."""
    text = " ".join(answer.split())
    for mark in ("$", "\\(", "\\)", "\\[", "\\]"):
        text = text.replace(mark, " ")
    text = ROOT.sub(r"\\sqrt{\1\2}", UNIT.sub("", text.strip()))
    return f"${text}$"


def r1v_answer(text):
    """re.search("<answer>(.*?)</answer>", text).group(1).strip(), else text.strip(). Without DOTALL
    an answer cannot cross a newline: the first line that holds a whole one has it."""
    for line in text.split("\n"):
        inside, closed, _ = line.partition(ANSWER[0])[2].partition(ANSWER[1])
        if closed:
            return inside.strip()
    return text.strip()
