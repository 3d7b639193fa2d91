"""One frozen dataclass is the config: defaults, help, command line and TOML recipe.

    @dataclass(frozen=True)
    class Config:
        lr: float = opt(1e-6, "AdamW step size", above=0)
        rewards: tuple[str, ...] = opt(("accuracy", "format"), "rewards that are summed")

    cfg = parse(Config, doc=__doc__)      # python grpo.py recipes/tiny.toml --lr 2e-6 --name=try2

A value comes from the command line, else from the recipe, else from the dataclass, which is the
only place of a default. argparse is not used: it accepts abbreviations, takes the last of a
repeated key in silence, and cannot say where a bad value came from.

Types: int, float, str, bool, tuple[T, ...] of these, and `T | None`.
Command line: `--key value`, or `--key=value` when the value starts with `--`. Tuples are comma
separated (a comma in brackets separates nothing) and `--key=` is the empty one. `--flag` is
`--flag true`. `none` is None where allowed.
Recipe: flat lines `key = value` in TOML's own types. An int will do for a float; nothing else is
converted. `"none"` is None where allowed, since TOML has no null.
NaN and infinity are refused everywhere: "no limit" is said by None.
"""
import dataclasses
import difflib
import json
import math
import operator
import sys
import tomllib
import types
import typing
from pathlib import Path

RULES = {"above": (operator.gt, "above"), "least": (operator.ge, "at least"),
         "most": (operator.le, "at most"), "below": (operator.lt, "below"),
         "choices": (lambda value, choices: value in choices, "one of")}
NAMES = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def opt(default, help, *, above=None, least=None, most=None, below=None, choices=None):
    """A key of a config: its default, its help text and its rule (for each item of a tuple)."""
    rule = {"above": above, "least": least, "most": most, "below": below, "choices": choices}
    rule = {name: bound for name, bound in rule.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, "rule": rule})


def parse(Config, argv=None, doc=None):
    """Config from `[RECIPE.toml] --key value ...` (argv, default sys.argv[1:]), checked.

    A mistake is printed on stderr and leaves by SystemExit(2); `--help` prints and leaves by 0.
    """
    try:
        return read(Config, sys.argv[1:] if argv is None else argv, doc)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def read(Config, argv, doc=None):
    """parse() for use as a library: a mistake is a ValueError naming place, key, value, rule."""
    recipe, words = split_argv(Config, argv, doc)
    values = {}
    for key, value in (load_toml(recipe) if recipe else {}).items():
        if key == "stage":
            raise ValueError(f"{recipe}: holds stages; what runs them is python run.py {recipe}")
        if isinstance(value, dict):
            raise ValueError(f"{recipe}: [{key}]: a recipe is flat lines `key = value`, no tables")
        values[key] = told_value(Config, key, value, f"{recipe}: ")
    for key, word in words.items():
        values[key] = said_value(Config, key, word)
    cfg = Config(**values)
    validate(cfg)
    return cfg


def told_value(Config, key, value, place):
    """The value of a key as a recipe tells it; a ValueError opening with place if it is wrong."""
    field = find(Config, key, place)
    value = None if value == "none" and kind_of(Config, key)[2] else value
    return settle(Config, field, value, f"{place}{key} = {show(value)}")


def said_value(Config, key, word, name=None):
    """The value of a key as a word of the command line spells it, where it is called --name."""
    field = find(Config, key, "command line: --")
    value = from_word(word, *kind_of(Config, key))
    return settle(Config, field, value, f"command line: --{name or key} {cut(word)}")


def validate(cfg):
    """ValueError unless each key has its type and keeps its rule; cfg.check(), if any, is asked."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        settle(type(cfg), field, value, f"{field.name} = {show(value)}")
        if isinstance(value, list):
            raise ValueError(f"{field.name} = {show(value)}: must be a tuple, not a list")
    if hasattr(cfg, "check"):
        cfg.check()


def load_toml(path):
    """The dict in a TOML file; a missing or broken file is a ValueError that names it."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = nearest(path.name, [other.name for other in path.parent.glob("*.toml")])
        raise ValueError(f"{path}: no such recipe in {path.parent.resolve()}{hint}") from None
    except (OSError, ValueError) as error:      # a folder, no permission; not UTF-8, not TOML
        raise ValueError(f"{path}: not a readable TOML recipe: {error}") from None


def to_dict(cfg):
    """Every key and value as JSON knows them: tuples are lists."""
    return {key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(cfg).items()}


# ---- the command line ----

def split_argv(Config, argv, doc):
    """(recipe or None, {key: word}). Only a word that ends in .toml can be the recipe."""
    if {"-h", "--help"} & set(argv):
        print(help_text(Config, doc))
        raise SystemExit(0)

    def kind(key):
        find(Config, key, "command line: --")
        return kind_of(Config, key)

    return split_words(argv, kind)


def split_words(argv, kind):
    """(recipe or None, {key: word}); kind(key) is kind_of, or a ValueError for an unknown one."""
    recipe, words, rest = None, {}, list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            if not arg.endswith(".toml"):
                raise ValueError(f"command line: {cut(arg)}: neither a key (--key value) nor "
                                 "a recipe (its name ends in .toml)")
            if recipe is not None:
                raise ValueError(f"command line: two recipes, {recipe} and {arg}; give one")
            recipe = arg
            continue
        key, equals, word = arg[2:].partition("=")
        is_flag = kind(key)[:2] == (bool, False)
        if not equals:
            if is_flag:
                word = rest.pop(0) if rest and rest[0] in ("true", "false", "none") else "true"
            elif not rest or rest[0].startswith("--"):
                raise ValueError(f"command line: --{key}: no value; write --{key} VALUE "
                                 f"(or --{key}=VALUE if it starts with --)")
            else:
                word = rest.pop(0)
        if key in words:
            raise ValueError(f"command line: --{key}: given twice, {cut(words[key])} and "
                             f"{cut(word)}; give it once")
        words[key] = word
    return recipe, words


def from_word(word, base, many, optional):
    """The value that a word of the command line spells, or the word itself if it spells none
    (settle() then refuses it by name)."""
    if optional and word == "none":
        return None
    if many:
        return [from_word(item, base, False, False) for item in apart(word)]
    if base is bool:
        return {"true": True, "false": False}.get(word, word)
    try:
        return base(word)
    except ValueError:
        return word


def apart(word):
    """Its items between the commas that stand in no brackets, without blanks around them: "a",
    "f(b, c)" of "a, f(b, c)". None of an empty word."""
    items, depth = [""], 0
    for letter in word:
        depth = max(0, depth + (letter == "(") - (letter == ")"))
        if letter == "," and not depth:
            items.append("")
        else:
            items[-1] += letter
    return [item.strip() for item in items] if word else []


def help_text(Config, doc=None):
    """What --help prints: the doc, then every key with type, default, help and rule."""
    lines = [doc.strip(), ""] if doc else []
    lines += [f"usage: python {Path(sys.argv[0]).name} [RECIPE.toml] [--key value ...]", ""]
    for field in dataclasses.fields(Config):
        base, many, optional = kind_of(Config, field.name)
        kind = base.__name__ + (", ..." if many else "") + (" or none" if optional else "")
        rule = f" ({rule_text(field)})" if field.metadata["rule"] else ""
        lines += [f"  --{field.name}  {kind} = {show(field.default)}",
                  f"        {field.metadata['help']}{rule}"]
    return "\n".join(lines)


# ---- one key: its name, its type, its rule ----

def find(Config, key, place):
    """The field called key, exactly; else a ValueError with the nearest name."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if key not in fields:
        dashes = "--" if place.endswith("--") else ""
        hint = nearest(key, fields, dashes)
        raise ValueError(f"{place}{cut(key)}: unknown key{hint} (--help lists every key)")
    return fields[key]


def nearest(name, names, dashes=""):
    """'; did you mean X?', or nothing if no name is near."""
    match = difflib.get_close_matches(name.replace("-", "_"), list(names), n=1)
    return f"; did you mean {dashes}{match[0]}?" if match else ""


def kind_of(Config, key):
    """(base type, is it a tuple, may it be None) of a key's annotation."""
    hint = typing.get_type_hints(Config)[key]
    args = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    inner = next(arg for arg in args if arg is not types.NoneType)
    many = typing.get_origin(inner) is tuple
    base = typing.get_args(inner)[0] if many else inner
    if base not in NAMES:
        raise TypeError(f"{Config.__name__}.{key}: {hint} is not a type that config.py reads")
    return base, many, types.NoneType in args


def settle(Config, field, value, place):
    """value in the type of its field; a ValueError opening with place if type or rule is broken."""
    base, many, optional = kind_of(Config, field.name)
    hint = f"({field.metadata['help']})"
    if optional and value is None:
        return None
    if many and not isinstance(value, list | tuple):
        raise ValueError(f"{place}: must be a list of items {hint}")
    items = []
    for item in value if many else [value]:
        if base is float and type(item) is int and abs(item) < 2**1000:
            item = float(item)
        if type(item) is not base or (base is float and not math.isfinite(item)):
            raise ValueError(f"{place}: must be {NAMES[base]}, not {show(item)} {hint}")
        if many and item == "":
            raise ValueError(f"{place}: holds an empty item {hint}")
        if not all(RULES[name][0](item, bound) for name, bound in field.metadata["rule"].items()):
            raise ValueError(f"{place}: must be {rule_text(field)} {hint}")
        items.append(item)
    return tuple(items) if many else items[0]


def rule_text(field):
    """'at least 2 and at most 64', 'one of cpu, cuda'."""
    def text(bound):
        return ", ".join(map(str, bound)) if isinstance(bound, tuple) else bound
    return " and ".join(f"{RULES[name][1]} {text(bound)}"
                        for name, bound in field.metadata["rule"].items())


def show(value):
    """A value as a recipe would spell it, cut."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return cut(f"[{', '.join(map(show, value))}]")
    return cut(json.dumps(value) if isinstance(value, str) else str(value))


def cut(text):
    return text if len(text) <= 80 else text[:77] + "..."
