"""CLEVR scenes as text: counting questions that a teacher who reads, but does not see, can answer.

    for row in counting_rows(*load_clevr("CLEVR_trainA_scenes.json", "CLEVR_trainA_questions.json"))
    {"id": "CLEVR_trainA_000000#all", "image": "CLEVR_trainA_000000.png", "solution": "5",
     "problem": "How many items are there in the described scene?",
     "description": "Scene Description:\\nA large red rubber cylinder rotated 291.3° located at …"}

Source: R1-V (src/distill_r1, generate_scene_qa_pairs.ipynb): the questions with "how many" or
"number" in them (also "Are there the same number …?", whose answer is yes or no), and the number of
all objects once for each image that has any. Differently: R1-V shuffles questions and, for each,
the objects; here both stay in the order of the files, so that a row is the same in every run.

`python distill.py describe` writes these rows.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from config import nearest, opt
from evaluate import check_out
from images import find_image, open_image
from rows import load_examples
from traces import name_of, whole

ALL = "How many items are there in the described scene?"
UNREAD = ("program", "relationships", "directions")  # most of what CLEVR's JSON holds
PROMPTS = {"v1": "Answer the question according to scene description.\n\n{Description}\n"
                 "Question:\n{Question}"}  # R1-V's words, as they are
PROMPTS["v2"] = PROMPTS["v1"] + (
    "\nInstructions:\n1. Carefully analyze the scene description\n2. Provide your reasoning if "
    "necessary\n3. For the final answer, start a new line with '**The answer is: **' followed by "
    "your answer\n")  # fmt: skip


def load_clevr(scenes: str, questions: str) -> tuple[dict[str, dict], list[dict]]:
    """({image file name: scene}, questions) of the two JSON files of a CLEVR split.

    ValueError, naming the file, where it is not CLEVR's. What is not read is dropped while the file
    is decoded: 70,000 scenes with 700,000 questions take 2 GB and 80 s, and else took over 4.7 GB.
    """
    found = load_list(scenes, "scenes", ("image_filename", "objects"))
    asked = load_list(questions, "questions", ("image_filename", "question", "answer"))
    return {scene["image_filename"]: scene for scene in found}, asked


def load_list(path: str, name: str, keys: tuple[str, ...]) -> list[dict]:
    """The list called `name` in a JSON file, each item of which must have the keys."""
    def slim(item):
        return {key: value for key, value in item.items() if key not in UNREAD}

    try:
        with open(path, encoding="utf-8") as file:
            items = json.load(file, object_hook=slim)[name]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not CLEVR's JSON, an object with a list {name!r} ({error!r:.99})"
                         ) from None  # fmt: skip
    for i, item in enumerate(items if isinstance(items, list) else [items]):
        lacking = [key for key in keys if not isinstance(item, dict) or key not in item]
        if lacking:
            raise ValueError(f"{path}: {name}[{i}] has no {' and no '.join(lacking)}"
                             + (" (CLEVR's test split has no answers)" * ("answer" in lacking)))
    return items


def load_drawn(source: str, folder: Path, prefix: str) -> tuple[dict[str, dict], list[dict]]:
    """The same of an embedded world ("world:A:n=1000"), whose pictures are written as
    folder/prefix/NAME.png. Its questions ask about "the image"; who only reads has none."""
    scenes, questions = {}, []
    (folder / prefix).mkdir(parents=True, exist_ok=True)
    for example in load_examples(source):
        scene = example.extra["scene"]
        if not example.images:
            raise ValueError(f"{source}: {example.row} has no picture to describe")
        name = f"{prefix}/{scene['image_filename']}"
        Image.fromarray(open_image(example.images[0])).save(folder / name)
        scenes[name] = scene
        problem = example.problem.replace("in the image", "in the described scene")
        asked = {"question": problem, "answer": example.solution}
        questions.append({**asked, "image_filename": name, "question_index": len(questions)})
    return scenes, questions


def describe(scene: dict) -> str:
    """R1-V's description of a scene: a line for each object. Lengths and angles are rounded."""
    return "\n".join(["Scene Description:", *map(describe_object, scene["objects"]), ""])


def describe_object(thing: dict) -> str:
    """One line: what it is, its rotation in degrees, where it stands in CLEVR's units and in
    pixels (the third pixel coordinate is the depth)."""
    x, y, z = thing["3d_coords"]
    column, row, depth = thing["pixel_coords"]
    return (f"A {thing['size']} {thing['color']} {thing['material']} {thing['shape']}"
            f" rotated {thing['rotation']:.1f}° located at 3D coordinates"
            f" ({x:.2f}, {y:.2f}, {z:.2f}) and pixel coordinates"
            f" ({column:.0f}, {row:.0f}, {depth:.2f})")  # fmt: skip


def counting_rows(scenes: dict[str, dict], questions: Iterable[dict]) -> Iterator[dict]:
    """{"id", "image", "problem", "solution", "description"} for each counting question, in order,
    and after the first of an image the number of its objects. ids: IMAGE#question_index (its place
    in the list where CLEVR gives none), IMAGE#all. ValueError for a question without its scene."""
    counted, text, of = set(), "", None
    for i, asked in enumerate(questions):
        problem, image = asked["question"], asked["image_filename"]
        if not ("how many" in problem.lower() or "number" in problem.lower()):
            continue
        if image not in scenes:
            raise ValueError(f"question {i} is about {image}, of which there is no scene; are "
                             "scenes and questions of the same split?")
        if image != of:  # questions of one image follow one another
            text, of = description_of(scenes, image), image
        stem = image.removesuffix(".png")
        rows = [(str(asked.get("question_index", i)), problem, asked["answer"])]
        if image not in counted:
            counted.add(image)
            rows.append(("all", ALL, len(scenes[image]["objects"])))
        for number, problem, answer in rows:
            yield {"id": f"{stem}#{number}", "image": image, "problem": problem,
                   "solution": str(answer), "description": text}  # fmt: skip


def description_of(scenes: dict[str, dict], image: str) -> str:
    """describe(), with a ValueError that names the image whose scene is not CLEVR's."""
    try:
        return describe(scenes[image])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the scene of {image} is not as CLEVR writes them: {error!r}") from None


def some(rows: Iterable[dict], count: int, limit: int | None, seed: int) -> Iterator[dict]:
    """All of `count` rows, or `limit` of them drawn by seed, in the same order."""
    places = range(count)
    if limit is not None and limit < count:
        places = set(random.Random(seed).sample(places, limit))
    return (row for i, row in enumerate(rows) if i in places)


def messages(row: dict, template: str, system: str | None = None) -> list[dict]:
    """The chat that asks a row: template is a name in PROMPTS or a text with {Question}, and may
    hold {Description}; ValueError for another. All are filled at once: no text smuggles one in."""
    text = PROMPTS.get(template, template)
    if "{Question}" not in text:
        raise ValueError(f"template {template!r}: neither a text with {{Question}} nor one of "
                         f"{', '.join(PROMPTS)}{nearest(template, PROMPTS)}")
    told = {"{Question}": row["problem"], "{Description}": row.get("description", "")}
    text = re.sub("|".join(told), lambda match: told[match.group()], text)
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


# ----------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class Describe:
    """Keys of `distill.py describe`."""

    scenes: str | None = opt(None, "CLEVR's scenes, CLEVR_…_scenes.json")
    questions: str | None = opt(None, "CLEVR's questions, CLEVR_…_questions.json")
    images: str | None = opt(None, "folder of CLEVR's images: each must be there")
    world: str | None = opt(None, "an embedded world instead, as world:A:n=1000")
    out: str = opt("d/questions.jsonl", "file to write; a world's pictures go beside it")
    limit: int | None = opt(None, "questions at most, drawn by seed (R1-V: 10,000)", least=1)
    seed: int = opt(0, "fixes which, if there is a limit", least=0)

    def check(self):
        """ValueError unless there is one source, whole."""
        if not ((self.scenes and self.questions) if self.world is None
                else not (self.scenes or self.questions or self.images)):
            raise ValueError("describe: give --scenes and --questions, or --world")


def describe_scenes(cfg: Describe) -> None:
    """Scenes to counting questions with a description in words."""
    out = Path(cfg.out)
    check_out(cfg.out, cfg.scenes, cfg.questions)
    if cfg.world:
        scenes, questions = load_drawn(cfg.world, out.parent, f"images/{name_of(out)}")
    else:
        scenes, questions = load_clevr(cfg.scenes, cfg.questions)
    count = sum(1 for _ in counting_rows(scenes, questions))
    if not count:
        raise ValueError(f"{cfg.world or cfg.questions}: no question has how many or number in it")
    rows = some(counting_rows(scenes, questions), count, cfg.limit, cfg.seed)
    with whole(out) as file:
        for row in tqdm(rows, "describe", min(count, cfg.limit or count), unit="question"):
            if cfg.images:
                find_image(row["image"], Path(cfg.images).resolve())
            file.write(json.dumps(row) + "\n")
    print(f"{out}: {min(count, cfg.limit or count)} of {count} counting questions on "
          f"{len(scenes)} images")
