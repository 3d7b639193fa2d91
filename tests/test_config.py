"""Chapter two of config.py: what a command line and a recipe may say, and what mistakes get."""
import dataclasses
import json
from dataclasses import dataclass

import pytest

from config import apart, load_toml, opt, parse, read, to_dict, validate


@dataclass(frozen=True)
class Config:
    group: int = opt(8, "completions per prompt", least=2, most=64)
    lr: float = opt(1e-6, "AdamW step size", above=0)
    name: str = opt("tiny", "name of the run")
    rewards: tuple[str, ...] = opt(("accuracy", "format"), "rewards that are summed")
    weights: tuple[float, ...] = opt((), "a weight per reward")
    size: tuple[int, ...] = opt((112, 112), "width, height", least=28)
    save_every: int | None = opt(50, "steps between checkpoints", least=1)
    device: str = opt("auto", "where to run", choices=("auto", "cpu", "cuda"))
    compile: bool = opt(False, "compile the decoder")
    dropout: float = opt(0.0, "share of units left out", least=0, below=1)

    def check(self):
        if self.weights and len(self.weights) != len(self.rewards):
            raise ValueError("weights: give one per reward")


def told(argv, capsys):
    """What parse() prints on stderr when it refuses argv with exit status 2."""
    with pytest.raises(SystemExit) as leaving:
        parse(Config, [str(arg) for arg in argv])
    assert leaving.value.code == 2 and isinstance(leaving.value.__cause__, ValueError)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.rstrip("\n")


def recipe(tmp_path, text, name="run.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- what is accepted ----

def test_no_words_give_the_defaults():
    assert parse(Config, []) == Config()


def test_argv_is_the_process_s_own_unless_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["grpo.py", "--group", "4"])
    assert parse(Config).group == 4


def test_every_type_is_read_from_the_command_line():
    words = "--group 4 --lr 1e-3 --name x --rewards a,b.py:f --weights 1,-.5 --size=56,84"
    words += " --save_every none --device cpu --compile --dropout=0.5"
    assert parse(Config, words.split()) == Config(
        4, 1e-3, "x", ("a", "b.py:f"), (1.0, -0.5), (56, 84), None, "cpu", True, 0.5)


def test_every_type_is_read_from_a_recipe(tmp_path):
    path = recipe(tmp_path, 'group = 4\nlr = 1\nname = "x"\nrewards = ["a", "b"]\n'
                            'weights = [1, 2.5]\nsize = [56, 84]\nsave_every = "none"\n'
                            'device = "cpu"\ncompile = true\n')
    cfg = parse(Config, [str(path)])
    assert cfg == Config(4, 1.0, "x", ("a", "b"), (1.0, 2.5), (56, 84), None, "cpu", True)
    assert type(cfg.lr) is float and type(cfg.weights[0]) is float and type(cfg.rewards) is tuple


def test_the_command_line_beats_the_recipe_which_beats_the_default(tmp_path):
    path = recipe(tmp_path, "group = 4\nlr = 0.5\n")
    cfg = parse(Config, ["--group", "16", str(path)])
    assert (cfg.group, cfg.lr, cfg.name) == (16, 0.5, "tiny")


@pytest.mark.parametrize("words, flag", [
    ("", False), ("--compile", True), ("--compile true", True), ("--compile false", False),
    ("--compile=false", False), ("--compile --group 4", True)])
def test_a_flag_alone_is_true(words, flag):
    assert parse(Config, words.split()).compile is flag


def test_a_flag_does_not_eat_the_recipe(tmp_path):
    cfg = parse(Config, ["--compile", str(recipe(tmp_path, "group = 4\n"))])
    assert cfg.compile is True and cfg.group == 4


def test_a_value_may_be_negative_and_with_an_equals_sign_it_may_be_anything():
    assert parse(Config, ["--weights", "-1,-2"]).weights == (-1.0, -2.0)
    assert parse(Config, ["--name=--x=y"]).name == "--x=y"


def test_a_tuple_may_be_empty_and_have_blanks_after_commas():
    assert parse(Config, ["--rewards="]).rewards == ()
    assert parse(Config, ["--rewards", "a, b"]).rewards == ("a", "b")


def test_a_comma_in_brackets_separates_nothing():
    words = "gate(format, iou(least=0.5)),all_of(a,b),f.py:g"
    assert parse(Config, ["--rewards", words]).rewards == (
        "gate(format, iou(least=0.5))", "all_of(a,b)", "f.py:g")
    assert apart("a(b,c") == ["a(b,c"] and apart("a),b") == ["a)", "b"] and apart("") == []


def test_text_stays_text_whatever_it_spells():
    assert [parse(Config, ["--name", word]).name for word in ("3", "true", "none", "a,b")] == [
        "3", "true", "none", "a,b"]


def test_a_bound_is_inclusive_for_least_and_most_and_exclusive_for_above_and_below(capsys):
    assert [parse(Config, ["--group", word]).group for word in ("2", "64")] == [2, 64]
    assert "must be above 0" in told(["--lr", "0"], capsys)
    assert "must be at least 0 and below 1" in told(["--dropout", "1"], capsys)


# ---- what is refused, and what it is told ----

@pytest.mark.parametrize("words, message", [
    ("--group 1",
     "command line: --group 1: must be at least 2 and at most 64 (completions per prompt)"),
    ("--group 65", "command line: --group 65: must be at least 2 and at most 64"),
    ("--group 3.0", 'command line: --group 3.0: must be a whole number, not "3.0"'),
    ("--group none", 'command line: --group none: must be a whole number, not "none"'),
    ("--lr fast", 'command line: --lr fast: must be a finite number, not "fast"'),
    ("--lr nan", "command line: --lr nan: must be a finite number, not nan"),
    ("--dropout inf", "command line: --dropout inf: must be a finite number, not inf"),
    ("--weights 1,-inf", "command line: --weights 1,-inf: must be a finite number, not -inf"),
    ("--size 56,14", "command line: --size 56,14: must be at least 28 (width, height)"),
    ("--size 56,", 'command line: --size 56,: must be a whole number, not ""'),
    ("--rewards a,,b", "command line: --rewards a,,b: holds an empty item"),
    ("--device gpu", "command line: --device gpu: must be one of auto, cpu, cuda (where to run)"),
    ("--compile=yes", 'command line: --compile yes: must be true or false, not "yes"'),
    ("--compile yes", "command line: yes: neither a key (--key value) nor a recipe"),
    ("-group 4", "command line: -group: neither a key (--key value) nor a recipe"),
    ("--grup 4", "command line: --grup: unknown key; did you mean --group? (--help lists"),
    ("--save-every 4", "command line: --save-every: unknown key; did you mean --save_every?"),
    ("--zzz 4", "command line: --zzz: unknown key (--help lists every key)"),
    ("--", "command line: --: unknown key"),
    ("--lr", "command line: --lr: no value; write --lr VALUE"),
    ("--lr --group 4", "command line: --lr: no value"),
    ("--lr 1 --lr=2", "command line: --lr: given twice, 1 and 2; give it once"),
    ("a.toml b.toml", "command line: two recipes, a.toml and b.toml; give one"),
    ("--weights 1", "weights: give one per reward")])
def test_a_mistake_on_the_command_line_is_named(words, message, capsys):
    assert told(words.split(), capsys).startswith("error: " + message)


@pytest.mark.parametrize("abbreviation", ["--gro", "--rew", "--l", "--comp"])
def test_abbreviations_are_refused(abbreviation, capsys):
    assert "unknown key" in told([abbreviation, "4"], capsys)


@pytest.mark.parametrize("text, message", [
    ("group = 1", "group = 1: must be at least 2 and at most 64 (completions per prompt)"),
    ('group = "4"', 'group = "4": must be a whole number, not "4"'),
    ("group = 4.0", "group = 4.0: must be a whole number, not 4.0"),
    ("group = true", "group = true: must be a whole number, not true"),
    ("lr = nan", "lr = nan: must be a finite number, not nan"),
    ("lr = true", "lr = true: must be a finite number, not true"),
    ("name = 3", "name = 3: must be text, not 3"),
    ("compile = 1", "compile = 1: must be true or false, not 1"),
    ('rewards = "accuracy"', 'rewards = "accuracy": must be a list of items'),
    ('size = [56, "84"]', 'size = [56, "84"]: must be a whole number, not "84"'),
    ("group = [4]", "group = [4]: must be a whole number, not [4]"),
    ('group = "none"', 'group = "none": must be a whole number, not "none"'),
    ("grup = 4", "grup: unknown key; did you mean group?"),
    ("[grpo]\ngroup = 4", "[grpo]: a recipe is flat lines `key = value`, no tables"),
    ("group = ", "not a readable TOML recipe: Invalid value"),
    ("group = 4\ngroup = 5", "not a readable TOML recipe: Cannot overwrite a value")])
def test_a_mistake_in_a_recipe_is_named_with_its_file(text, message, tmp_path, capsys):
    path = recipe(tmp_path, text)
    assert told([path], capsys).startswith(f"error: {path}: {message}")


def test_a_mistake_in_a_recipe_is_refused_although_the_command_line_mends_it(tmp_path, capsys):
    assert "group = 1: must be" in told([recipe(tmp_path, "group = 1"), "--group", "4"], capsys)


def test_a_missing_recipe_is_named_with_its_folder_and_the_nearest_one(tmp_path, capsys):
    recipe(tmp_path, "", "tiny.toml")
    message = told([tmp_path / "tinny.toml"], capsys)
    assert f"tinny.toml: no such recipe in {tmp_path}; did you mean tiny.toml?" in message


def test_a_recipe_that_is_a_folder_or_not_utf8_is_named(tmp_path, capsys):
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    for name in ("folder.toml", "latin.toml"):
        assert f"{tmp_path / name}: not a readable TOML recipe" in told([tmp_path / name], capsys)


def test_a_long_word_is_cut_in_the_message(capsys):
    assert len(told(["--group", "9" * 5000], capsys)) < 300


def test_read_raises_what_parse_prints():
    with pytest.raises(ValueError, match="command line: --group 1: must be at least 2"):
        read(Config, ["--group", "1"])


# ---- a config made in Python ----

def test_validate_takes_the_defaults_and_refuses_what_breaks_a_rule():
    validate(Config())
    for wrong in (Config(group=1), Config(group=None), Config(lr=float("nan")), Config(lr="1"),
                  Config(rewards=["a"]), Config(size=(112, 1)), Config(weights=(1.0,))):
        with pytest.raises(ValueError):
            validate(wrong)


def test_validate_names_key_value_and_rule():
    with pytest.raises(ValueError, match=r"group = 1: must be at least 2 and at most 64 \(compl"):
        validate(Config(group=1))


def test_a_default_that_breaks_its_own_rule_is_refused():
    @dataclass(frozen=True)
    class Wrong:
        group: int = opt(1, "completions per prompt", least=2)
    with pytest.raises(ValueError, match="group = 1: must be at least 2"):
        read(Wrong, [])


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().group = 4


# ---- help and files ----

def test_help_prints_every_key_with_type_default_help_and_rule(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse(Config, ["--help"], doc="GRPO, the paper's box.")
    text = capsys.readouterr().out
    assert leaving.value.code == 0 and text.startswith("GRPO, the paper's box.")
    for field in dataclasses.fields(Config):
        assert f"  --{field.name}  " in text and field.metadata["help"] in text
    assert "--group  int = 8\n        completions per prompt (at least 2 and at most 64)" in text
    assert '--rewards  str, ... = ["accuracy", "format"]' in text
    assert "--save_every  int or none = 50" in text and "one of auto, cpu, cuda" in text


def test_a_config_as_json_holds_every_key_and_reads_back():
    cfg = Config(save_every=None, name="\u00e9 \udcff", rewards=())
    saved = json.loads(json.dumps(to_dict(cfg)))
    assert saved == to_dict(cfg) and list(saved) == [f.name for f in dataclasses.fields(Config)]
    assert Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}) == cfg


def test_load_toml_gives_the_file_as_a_dict(tmp_path):
    assert load_toml(recipe(tmp_path, "group = 4\n[a]\nb = [1]\n")) == {"group": 4, "a": {"b": [1]}}
