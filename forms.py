"""One counting question in four forms, and teachers who answer it: curricula and cold starts.

    open    "How many red cubes are there?"                                   3
    pick    "How many red cubes are there? (A) 4 (B) 3 (C) 2 (D) 5"           B
    judge   "How many red cubes are there? Is it 4?"                          no
    read    "Scene: small red rubber cube, large gray metal sphere.
             How many items are there in the scene?"                          2      no picture

The question itself is world.py's, about all objects of the scene or about those with some
attributes. Curr-ReFT learns judge, pick and open one after the other; LMM-R1 learns to read first.

A teacher's answer (`teach`) is what supervised training may learn. Some overlook small objects, and
so count too few. Their thoughts are those of the field's cold starts in a few words: a list (R1-V's
distilled set), one with a doubt and a second look (Vision-R1, whose thoughts are full of "Wait"), a
caption first (R1-Vision), a formal description (R1-Onevision).
"""

import numpy as np

import world
from rewards import ANSWER, THINK
from world import execute, pick

OVERLOOK = 0.22  # with which the flawed teachers miss a small object
# Share and words of the flawed teacher's answers, as tiny.STYLES: the last two are out of format.
STYLES = (
    (0.20, "{think}I count the items one by one.{end} {answer}"),
    (0.18, "{think}{large} large and {small} small.{end} {answer}"),
    (0.24, "{answer}"),
    (0.19, "{value}"),
    (0.19, "It is {value}."),
)  # fmt: skip


# ---- forms ----

def open_form(scene, rng):
    """How many, or how many of a kind; each half of the time."""
    return world.ask(scene, pick(("count", "attribute"), rng), rng)


def pick_form(scene, rng):
    """The same with four numbers to choose from, none farther from the right one than 4."""
    asked = open_form(scene, rng)
    right = asked["answer"]
    others = [n for n in range(max(0, right - 4), right + 5) if n != right]
    near = sorted(rng.permutation(others), key=lambda n: abs(n - right) + 2 * rng.random())[:3]
    numbers = rng.permutation([right, *near]).tolist()
    listed = " ".join(f"({letter}) {n}" for letter, n in zip("ABCD", numbers))
    return {**asked, "question": f"{asked['question']} {listed}", "numbers": numbers,
            "answer": "ABCD"[numbers.index(right)]}


def judge_form(scene, rng):
    """The same, and whether it is a number that is right every second time, else one or two off."""
    asked = open_form(scene, rng)
    right = asked["answer"]
    said = right if rng.random() < 0.5 else right + pick([d for d in (-2, -1, 1, 2)
                                                          if right + d >= 0], rng)
    return {**asked, "question": f"{asked['question']} Is it {said}?", "said_number": said,
            "answer": "yes" if said == right else "no"}


def read_form(scene, rng):
    """The same about a scene in words, which has no picture; objects from left to right."""
    asked = open_form(scene, rng)
    told = ", ".join(world.phrase(thing, "item", plural=False) for thing in in_order(scene))
    question = asked["question"].replace("in the image", "in the scene")
    return {**asked, "question": f"Scene: {told}. {question}"}


KINDS = {"open": open_form, "pick": pick_form, "judge": judge_form, "read": read_form}
TEXT_ONLY = ("read",)


def in_order(scene, numbers=None):
    """The scene's objects, or those of the numbers, from left to right."""
    things = [scene["objects"][i] for i in (range(len(scene["objects"])) if numbers is None
                                            else numbers)]
    return sorted(things, key=lambda thing: thing["pixel_coords"][0])


# ---- teachers ----

def flawed(scene, asked, seen, rng):
    """Answers in five ways, of which only two are in the asked format."""
    large = sum(thing["size"] == "large" for thing in seen)
    value = said(asked, len(seen))
    return style(STYLES, rng).format(think=THINK[0], end=THINK[1], answer=wrapped(value),
                                     value=value, large=large, small=len(seen) - large)


def listed(scene, asked, seen, rng):
    """Lists what is asked for, numbered."""
    return thought(items(seen), asked, seen)


def doubtful(scene, asked, seen, rng):
    """Lists what he saw at first, doubts it, and looks again; by then he sees all."""
    return thought(f"{items(noticed(seen, OVERLOOK, rng))}. Wait, {items(seen)}", asked, seen)


def captioned(scene, asked, seen, rng):
    """Tells what there is in the picture, then what is asked for."""
    told = ", ".join(world.phrase(thing, "item", plural=False)
                     for thing in in_order(scene) if thing in seen or rng.random() >= OVERLOOK / 2)
    return thought(f"First the image: {told}. Now {len(seen)}", asked, seen)


def formal(scene, asked, seen, rng):
    """Describes what is asked for as a numbered table, then counts its rows."""
    rows = "; ".join(f"{n}: {thing['shape']}, {thing['color']}" for n, thing in enumerate(seen, 1))
    return thought(f"{rows or 'none'}. So {len(seen)}", asked, seen)


# Name: (what he writes, with which probability he overlooks a small object).
TEACHERS = {"flawed": (flawed, OVERLOOK), "listed": (listed, 0.0), "doubtful": (doubtful, 0.0),
            "captioned": (captioned, OVERLOOK / 2), "formal": (formal, OVERLOOK)}


def teach(name, scene, asked, rng):
    """(what the teacher of that name answers, whether it is right). asked: a question of KINDS or
    world.ask, whose program ends with a count."""
    write, overlook = TEACHERS[name]
    things = in_order(scene, execute(asked["program"][:-1], scene))
    seen = noticed(things, overlook, rng)
    return write(scene, asked, seen, rng), said(asked, len(seen)) == str(asked["answer"])


def noticed(things, overlook, rng):
    """Those that are seen by who misses each small one with probability `overlook`."""
    return [thing for thing in things if thing["size"] == "large" or rng.random() >= overlook]


def style(styles, rng):
    """The words of one of (share, words), drawn by their shares."""
    shares = np.array([share for share, _ in styles])
    return styles[rng.choice(len(styles), p=shares / shares.sum())][1]


def said(asked, count):
    """The answer, in the form that is asked for, of who counts so many: of the numbers to choose
    from the nearest, and the smaller of two that are as near."""
    if "numbers" in asked:
        numbers = asked["numbers"]
        return "ABCD"[numbers.index(min(numbers, key=lambda n: (abs(n - count), n)))]
    if "said_number" in asked:
        return "yes" if asked["said_number"] == count else "no"
    return str(count)


def items(things):
    """"1 red cube, 2 gray sphere", or "none"."""
    return ", ".join(f"{n} {thing['color']} {thing['shape']}"
                     for n, thing in enumerate(things, 1)) or "none"


def thought(words, asked, seen):
    return f"{THINK[0]} {words}{THINK[1]} {wrapped(said(asked, len(seen)))}"


def wrapped(value):
    return f"{ANSWER[0]}{value}{ANSWER[1]}"
