"""Stages: a recipe becomes the list of runs that it describes, each with every key of its config.

    model = "Qwen/Qwen2.5-VL-7B-Instruct"    # keys above go to all stages that know them
    out = "runs/two"                         # stage N writes to runs/two/N_NAME

    [[stage]]
    name = "cold"                            # default: the method
    method = "sft"                           # sft, grpo, distill (with its step), filter
    choose = "best"                          # default: last; best by the mean over the evals
    data = "cold.jsonl"

    [[stage]]
    method = "grpo"
    data = "rows.jsonl"

A stage starts from the model that the training stage before it left, unless it names one. In text,
{NAME} is what the stage NAME left: its checkpoint, rows, kept rows or set; {model} is the model at
this place. On the command line --key goes to all stages that know it, but not in place of what an
earlier stage leaves; --NAME.key to one; --model is where the first one starts.

A recipe without stages is a single run, of grpo.py if it names no method.
"""

import json
import re
from dataclasses import dataclass, fields, replace
from itertools import count, islice
from pathlib import Path

import distill
import grpo
import sft
import sieve
from config import (
    cut,
    kind_of,
    load_toml,
    nearest,
    opt,
    said_value,
    show,
    split_words,
    told_value,
    validate,
)

CONFIGS = {"sft": sft.Config, "grpo": grpo.Config, "filter": sieve.Config}
TRAINS = ("sft", "grpo")
WHOLE = ("out", "resume", "dry_run", "first")  # keys that no stage has of its own
OWN = ("name", "method", "step", "choose")  # keys of a stage that no Config has
# Keys whose braces are all ours.
SOURCES = ("model", "teacher", "reasoner", "data", "images", "held_out", "evals")
NAME, BRACED = re.compile(r"[a-z0-9_]+"), re.compile(r"\{([a-z0-9_]+)\}")


@dataclass(frozen=True)
class Whole:
    """Keys of the whole."""

    out: str | None = opt(None, "folder of the whole; default: runs/RECIPE")
    resume: str = opt("auto", "auto: go on in `out` where it was; never", choices=("auto", "never"))
    dry_run: bool = opt(False, "only print the stages; nothing is read")
    model: str = opt("tiny", "where the first stage starts")
    first: str | None = opt(None, "stage to begin with, those before it are left out: where what "
                            "they would leave is there, --NAME.data names it")


@dataclass(frozen=True)
class Stage:
    """A stage and its config, in whose text {NAME} of earlier stages still stands. number: from 1,
    0 for the only run of a recipe without stages, which has no folder of its own."""

    number: int
    name: str
    method: str
    step: str | None
    choose: str
    cfg: object
    named: frozenset[str] = frozenset()  # keys that the recipe or the command line gives a value

    @property
    def what(self) -> str:
        """In words: "1 cold: sft, the best checkpoint"."""
        best = ", the best checkpoint" * (self.choose == "best")
        return f"{self.number} {self.name}: {self.method} {self.step or ''}".strip() + best

    def folder(self, out: Path) -> Path:
        """Where it writes, below the folder of the whole."""
        return out / f"{self.number}_{self.name}" if self.number else out

    def leaves(self, out: Path) -> Path:
        """What {NAME} stands for; a training stage leaves one of the checkpoints in there."""
        files = {"filter": "kept.jsonl", "distill": "set" if self.step == "pack" else "rows.jsonl"}
        return self.folder(out) / files.get(self.method, "")

    def ready(self, out: Path, left: dict[str, str]):
        """The config to run with: what the stages before have `left` is in place."""
        place = self.leaves(out) if self.method == "distill" else self.folder(out)
        values = {f.name: filled(getattr(self.cfg, f.name), left) for f in fields(self.cfg)}
        return replace(self.cfg, **{**values, "out": str(place)})


@dataclass(frozen=True)
class Recipe:
    """The stages of a recipe, and what is said for all of them."""

    path: str
    whole: Whole
    stages: tuple[Stage, ...]

    def text(self) -> str:
        """Every stage with each key that is named, or not its method's default."""
        lines = [f"{self.path} -> {self.whole.out}"]
        for stage in self.stages:
            lines.append(f"\n{stage.what}")
            values = {f: getattr(stage.cfg, f.name) for f in fields(stage.cfg) if f.name != "out"}
            lines += [f"    {f.name} = {json.dumps('none' if x is None else x)}"
                      for f, x in values.items() if x != f.default or f.name in stage.named]
        return "\n".join(lines)


# ---------------------------------------------------------------------------------- from a recipe


def read(argv: list[str]) -> Recipe:
    """The recipe of a command line, checked as far as that needs no file. ValueError naming place,
    stage, key and value of what is wrong."""
    if not argv or argv[0].startswith("-") or not argv[0].endswith(".toml"):
        raise ValueError("which recipe? python run.py RECIPE.toml [--key value] [--NAME.key value]")
    path, told = argv[0], load_toml(argv[0])
    single = "stage" not in told
    tables = [{key: told.pop(key) for key in OWN if key in told}] if single else told.pop("stage")
    if not tables or not isinstance(tables, list) or {*map(type, tables)} != {dict}:
        raise ValueError(f"{path}: stage: a stage is a table under [[stage]]")
    if single and tables[0].get("method") == "distill":
        raise ValueError(f"{path}: method = \"distill\": a step by itself is run by python "
                         "distill.py STEP; here it stands under [[stage]]")
    heads = heads_of(path, [{"method": "grpo", **tables[0]}] if single else tables)
    configs = {head["name"]: config_of(path, head) for head in heads}
    for key in told:
        if "." in key:
            raise ValueError(f"{path}: {cut(key)}: a key of one stage stands under its [[stage]]")
        known(configs, key, f"{path}: ")
    _, words = split_words(argv, lambda key: known(configs, key, "command line: --"))
    whole = {k: told_value(Whole, k, told[k], f"{path}: ") for k in keys(Whole) & told.keys()}
    whole |= {k: said_value(Whole, k, words[k]) for k in keys(Whole) & words.keys()}
    default = configs[heads[0]["name"]]().out if single else f"runs/{Path(path).stem}"
    whole = Whole(**{"out": default, **whole})
    model, stages = whole.model, []
    begin = index_of(path, heads, whole.first)
    for n, (head, table) in islice(enumerate(zip(heads, tables), not single), begin, None):
        own = {key: x for key, x in table.items() if key not in OWN}
        if "model" in words and not stages:
            own.pop("model", None)
        values = values_of(path, head["name"], configs, own, told, words, model)
        before = [stage.name for stage in stages]
        cfg = made(path, head, before, configs[head["name"]], values, model)
        stages.append(Stage(n, *(head[key] for key in OWN), cfg, frozenset(values)))
        model = f"{{{head['name']}}}" if head["method"] in TRAINS else model
    return Recipe(path, whole, tuple(stages))


def heads_of(path: str, tables: list[dict]) -> list[dict]:
    """The keys of each stage that no Config has, with their defaults."""
    heads, names = [], set()
    for n, table in enumerate(tables, 1):
        place, head = f"{path}: stage {n}: ", {key: table.get(key) for key in OWN}
        if head["method"] not in (*CONFIGS, "distill"):
            raise ValueError(f"{place}method = {show(head['method'])}: must be one of "
                             f"{', '.join(CONFIGS)}, distill")
        free = (head["method"] + f"_{k}" * (k > 1) for k in count(1))
        name = head["name"] or next(name for name in free if name not in names)
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in {*names, "model"}:
            raise ValueError(f"{place}name = {show(name)}: must be of a-z, 0-9 and _, that of no "
                             "other stage, and not model")
        if head["choose"] not in (None, "last", "best"):
            raise ValueError(f"{place}choose = {show(head['choose'])}: must be last or best")
        if head["choose"] == "best" and head["method"] not in TRAINS:
            raise ValueError(f"{place}choose = best: {head['method']} leaves no checkpoints")
        names.add(name)
        heads.append({**head, "name": name, "choose": head["choose"] or "last"})
    return heads


def index_of(path: str, heads: list[dict], name: str | None) -> int:
    """The place of the stage of that name, 0 for None."""
    names = [head["name"] for head in heads]
    if name not in (None, *names):
        raise ValueError(f"{path}: first {name}: no such stage{nearest(name, names)}; they are "
                         f"{', '.join(names)}")
    return names.index(name) if name else 0


def config_of(path: str, head: dict) -> type:
    """The Config of a stage."""
    step, place = head["step"], f"{path}: stage {head['name']}: step = {show(head['step'])}: "
    if head["method"] != "distill":
        if step is not None:
            raise ValueError(f"{place}is a key of distill")
        return CONFIGS[head["method"]]
    if not isinstance(step, str) or step not in distill.STEPS:
        raise ValueError(f"{place}no step of distillation{nearest(str(step), distill.STEPS)}; they "
                         f"are {', '.join(distill.STEPS)}")
    return distill.STEPS[step][0]


def known(configs: dict[str, type], key: str, place: str) -> tuple:
    """kind_of a key in the first Config that knows it; of NAME.key in that of NAME. ValueError for
    a key that nobody knows."""
    name, dot, bare = key.rpartition(".")
    if dot and name not in configs:
        raise ValueError(f"{place}{cut(key)}: no stage {name!r}{nearest(name, configs)}; they are "
                         f"{', '.join(configs)}")
    asked = [configs[name]] if dot else [Whole, *configs.values()]
    for Config in asked:
        if bare in keys(Config) and not (dot and bare in WHOLE):
            return kind_of(Config, bare)
    if "." not in key and (others := [m for m, C in CONFIGS.items() if bare in keys(C)]):
        raise ValueError(f"{place}{cut(key)}: is a key of {' and '.join(others)}, which no stage "
                         f"is (a recipe without stages says method = {show(others[0])} or is grpo)")
    hint = nearest(bare, {key for Config in asked for key in keys(Config)})
    raise ValueError(f"{place}{cut(key)}: unknown key{hint} (--help lists those of the whole, "
                     "grpo.py --help those of grpo, and so on)")


def values_of(path, name, configs, own: dict, told: dict, words: dict, model: str) -> dict:
    """The values of a stage's keys: those above, then its own, --key, --NAME.key; the last of them
    wins, but --key does not stand in for what an earlier stage leaves."""
    Config = configs[name]
    shared = {key: x for key, x in told.items() if key in keys(Config) and key not in WHOLE}
    values = {key: told_value(Config, key, x, f"{path}: (stage {name}) ")
              for key, x in shared.items()}  # fmt: skip
    if (key := start_of(Config)) and (key == "model" or key not in values):
        values[key] = model
    for key, x in own.items():
        if key in WHOLE:
            raise ValueError(f"{path}: stage {name}: {key}: is a key of the whole, to stand above "
                             "the stages")
        values[key] = told_value(Config, key, x, f"{path}: stage {name}: ")
    for key, word in words.items():
        through = key in keys(Config) and key not in (*WHOLE, "model")
        if through and not braced(values.get(key)) & configs.keys():
            values[key] = said_value(Config, key, word)
    for key, word in words.items():
        if key.startswith(f"{name}."):
            values[bare] = said_value(Config, bare := key.rpartition(".")[2], word, key)
    return values


def made(path: str, head: dict, before: list[str], Config: type, values: dict, model: str):
    """The config of a stage behind those called `before`, {model} in it resolved."""
    place = f"{path}: stage {head['name']}: "
    if head["choose"] == "best":
        if not values.get("evals"):
            raise ValueError(f"{place}choose = best: by which evals? It needs the key evals")
        values["eval_saves"] = True
    for key, value in values.items():
        for word in braced(value) - {*before, "model"} if key in SOURCES else ():
            raise ValueError(f"{place}{key} = {show(value)}: {{{word}}} is no stage before this one"
                             f"{nearest(word, before)}; they are {', '.join(before) or 'none'}")
    values = {key: filled(value, {"model": model}) for key, value in values.items()}
    try:
        validate(cfg := Config(**values))
    except ValueError as error:
        raise ValueError(f"{place}{error}") from error
    return cfg


def keys(Config: type) -> set[str]:
    return {field.name for field in fields(Config)}


def start_of(Config: type) -> str | None:
    """The key of the checkpoint that a stage starts from: model; of a step of distillation that
    asks no server teacher."""
    known = keys(Config)
    asks = "teacher" if "teacher" in known and "base_url" not in known else None
    return "model" if "model" in known else asks


def texts(value) -> tuple[str, ...]:
    """The texts that a value is or holds."""
    return tuple(x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, str))


def braced(value) -> set[str]:
    """The names that stand in braces in a value: {"cold"} of "{cold}"."""
    return {name for text in texts(value) for name in BRACED.findall(text)}


def filled(value, names: dict[str, str]):
    """The value with {NAME} replaced, for the names that are given."""
    if isinstance(value, tuple):
        return tuple(filled(item, names) for item in value)
    if not isinstance(value, str):
        return value
    return BRACED.sub(lambda found: names.get(found[1], found[0]), value)
