"""stages.py, chapter two: a recipe becomes stages, each with every key; mistakes are told early."""

from pathlib import Path

import pytest

import grpo
import sft
import sieve
import stages

TWO = """
model = "start"
out = "runs/two"
seed = 3
max_new = 7
lr = 1e-4

[[stage]]
name = "cold"
method = "sft"
data = "a.jsonl"
lr = 2e-5

[[stage]]
method = "grpo"
data = "b.jsonl"
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, and reads it with words of a command line."""

    def read(text: str, *words: str) -> stages.Recipe:
        (tmp_path / "two.toml").write_text(text)
        return stages.read([str(tmp_path / "two.toml"), *words])

    return read


def values(found: stages.Recipe, key: str) -> list:
    return [getattr(stage.cfg, key, None) for stage in found.stages]


# --------------------------------------------------------------------------------------- the keys


def test_a_key_above_goes_to_all_stages_that_know_it_and_a_stages_own_wins(recipe):
    found = recipe(TWO)
    assert found.whole == stages.Whole(out="runs/two", model="start")
    assert [(s.number, s.name, s.method, s.choose) for s in found.stages] == [
        (1, "cold", "sft", "last"), (2, "grpo", "grpo", "last")]  # fmt: skip
    assert [type(stage.cfg) for stage in found.stages] == [sft.Config, grpo.Config]
    assert values(found, "seed") == [3, 3] and values(found, "max_new") == [7, 7]
    assert values(found, "lr") == [2e-5, 1e-4] and values(found, "group") == [None, 8]


def test_the_command_line_speaks_to_all_stages_or_to_one(recipe):
    found = recipe(TWO, "--lr", "3", "--cold.steps=5", "--grpo.lr", "4", "--group", "6",
                   "--grpo.compile", "--out", "elsewhere")  # fmt: skip
    assert values(found, "lr") == [3.0, 4.0] and values(found, "steps") == [5, 100]
    assert found.whole.out == "elsewhere" and found.stages[1].cfg.compile
    assert values(found, "group") == [None, 6]


def test_a_stage_starts_from_what_the_training_stage_before_it_left(recipe):
    text = TWO + '[[stage]]\nmethod = "filter"\n[[stage]]\nmethod = "distill"\nstep = "sample"\n'
    text += '[[stage]]\nmethod = "sft"\ndata = "{distill}"\n'
    text += '[[stage]]\nmethod = "sft"\nmodel = "x"\n'
    found = recipe(text)
    assert [s.name for s in found.stages][2:] == ["filter", "distill", "sft", "sft_2"]
    assert values(found, "model") == ["start", "{cold}", "{grpo}", None, "{grpo}", "x"]
    assert found.stages[3].cfg.teacher == "{grpo}"
    assert values(recipe(text, "--model", "base"), "model")[:2] == ["base", "{cold}"]
    named = recipe(TWO.replace('data = "a.jsonl"', 'model = "own"'))
    assert values(named, "model") == ["own", "{cold}"]


def test_a_teacher_above_is_that_of_all_stages_else_the_model_is(recipe):
    text = 'model = "start"\n[[stage]]\nmethod = "distill"\nstep = "bridge"\n'
    assert recipe(text).stages[0].cfg.teacher == "start"
    text = 'teacher = "R1@http://host/v1"\n' + text
    assert recipe(text).stages[0].cfg.teacher == "R1@http://host/v1"
    assert recipe(text, "--teacher", "{model}").stages[0].cfg.teacher == "start"


def test_a_server_is_no_model_of_ours(recipe):
    found = recipe('model = "start"\n[[stage]]\nmethod = "distill"\nstep = "query"\n')
    assert found.stages[0].cfg.teacher == "deepseek-reasoner"


def test_names_in_braces_stand_for_what_earlier_stages_leave(recipe):
    text = TWO.replace("b.jsonl", "b.jsonl only={few}").replace('"b', '"{cold} + b') + """
evals = ["A={few}", "B={model}"]
template = "{Question} in {few} {words}"
"""
    text = text.replace('[[stage]]\nmethod = "grpo"', """[[stage]]
name = "few"
method = "filter"
[[stage]]
method = "distill"
step = "pack"
[[stage]]
method = "grpo"
""")
    found, left = recipe(text), {"cold": "CHECKPOINT", "few": "KEPT"}
    cfg = found.stages[3].ready(Path("o"), left)
    assert cfg.data == "CHECKPOINT + b.jsonl only=KEPT" and cfg.model == "CHECKPOINT"
    assert cfg.evals == ("A=KEPT", "B=CHECKPOINT") and cfg.out == "o/4_grpo"
    assert cfg.template == "{Question} in KEPT {words}"
    assert [str(stage.leaves(Path("o"))) for stage in found.stages] == [
        "o/1_cold", "o/2_few/kept.jsonl", "o/3_distill/set", "o/4_grpo"]  # fmt: skip
    assert found.stages[2].ready(Path("o"), left).out == "o/3_distill/set"


def test_a_word_for_all_does_not_cut_the_chain_but_one_for_a_stage_does(recipe):
    text = TWO.replace("b.jsonl", "{cold}/rows.jsonl")
    assert values(recipe(text, "--data", "new"), "data") == ["new", "{cold}/rows.jsonl"]
    assert values(recipe(text, "--grpo.data", "new"), "data") == ["a.jsonl", "new"]


def test_the_best_checkpoint_needs_evals_and_has_them_scored_at_each_save(recipe):
    text = TWO.replace('name = "cold"', 'name = "cold"\nchoose = "best"')
    with pytest.raises(ValueError, match="stage cold: choose = best: by which evals"):
        recipe(text)
    found = recipe(text, "--evals", "A=a.jsonl")
    assert values(found, "eval_saves") == [True, False]
    assert found.stages[0].what == "1 cold: sft, the best checkpoint"


def test_the_stages_before_the_first_one_asked_for_are_left_out(recipe):
    found = recipe(TWO, "--first", "grpo")
    assert [(s.number, s.name, s.cfg.model) for s in found.stages] == [(2, "grpo", "start")]
    text = TWO.replace("b.jsonl", "{cold}")
    with pytest.raises(ValueError, match=r"\{cold\} is no stage before this one; they are none"):
        recipe(text, "--first", "grpo")
    assert values(recipe(text, "--first", "grpo", "--grpo.data", "c"), "data") == ["c"]


def test_a_recipe_without_stages_is_one_run(recipe):
    [stage] = recipe('lr = 2.0\nsteps = 3\nout = "runs/x"').stages
    assert (stage.number, stage.method, stage.cfg.lr) == (0, "grpo", 2.0)
    assert stage.ready(Path("runs/x"), {}) == grpo.Config(lr=2.0, steps=3, out="runs/x")
    single = recipe('method = "sft"\nmask = "all"', "--lr", "1")
    assert single.whole.out == sft.Config().out
    assert single.stages[0].cfg == sft.Config(mask="all", lr=1.0)
    with pytest.raises(ValueError, match="a step by itself is run by python"):
        recipe('method = "distill"\nstep = "pack"')
    with pytest.raises(ValueError, match=r"a stage is a table under \[\[stage\]\]"):
        recipe("stage = 3")


def test_what_is_printed_has_every_key_that_is_named_or_not_the_default(recipe):
    """The lr named here is grpo's default."""
    assert recipe(TWO, "--grpo.keep", "none", "--lr", "1e-6").text().partition("\n")[2] == """
1 cold: sft
    model = "start"
    data = "a.jsonl"
    seed = 3
    lr = 1e-06
    max_new = 7

2 grpo: grpo
    model = "{cold}"
    data = "b.jsonl"
    seed = 3
    max_new = 7
    lr = 1e-06
    keep = "none\""""


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("old, new, told", [
    ("seed = 3", "sede = 3", "two.toml: sede: unknown key; did you mean seed"),
    ("seed = 3", 'n = 3', "two.toml: n: is a key of filter, which no stage is"),
    ("seed = 3", "seed = 1.5", r"two.toml: \(stage cold\) seed = 1.5: must be a whole number"),
    ("lr = 2e-5", "lr = -1", "two.toml: stage cold: lr = -1: must be above 0"),
    ("lr = 2e-5", "group = 4", "two.toml: stage cold: group: unknown key"),
    ("lr = 2e-5", 'out = "x"', "stage cold: out: is a key of the whole"),
    ("seed = 3", '"cold.lr" = 1.0', "two.toml: cold.lr: a key of one stage stands under its"),
    ("lr = 2e-5", 'step = "pack"', "stage cold: step = \"pack\": is a key of distill"),
    ("lr = 2e-5", 'choose = "newest"', "stage 1: choose = \"newest\": must be last or best"),
    ('"cold"', '"Cold"', "stage 1: name = \"Cold\": must be of a-z"),
    ('"cold"', '"model"', "stage 1: name = \"model\": .* not model"),
    ('method = "sft"', 'method = "ppo"', "stage 1: method = \"ppo\": must be one of sft, grpo"),
    ('method = "sft"', "", "stage 1: method = none: must be one of"),
    ('method = "grpo"', 'name = "cold"\nmethod = "grpo"', "stage 2: name = \"cold\": .* no other"),
    ('method = "grpo"', 'method = "distill"', "stage distill: step = none: no step of distill"),
    ('method = "grpo"', 'method = "distill"\nstep = "pak"', "did you mean pack"),
    ('method = "grpo"', 'method = "distill"\nstep = ["pack"]', r".pack.\]: no step of distill"),
    ("b.jsonl", "{cald}", "stage grpo: data = .*: {cald} is no stage before .* did you mean cold"),
    ("a.jsonl", "{grpo}", "stage cold: data = .*: {grpo} is no stage before this one"),
    ("seed = 3", 'evals = ["x"]', "stage .*: evals: 'x' is not NAME=SOURCE"),
    ("[[stage]]", "[stage]", "Cannot|not a readable TOML|a stage is a table under"),
])  # fmt: skip
def test_a_mistake_in_a_recipe_names_place_and_mend(recipe, old, new, told):
    with pytest.raises(ValueError, match=told):
        recipe(TWO.replace(old, new))


@pytest.mark.parametrize("words, told", [
    (["--sede", "3"], "command line: --sede: unknown key; did you mean seed"),
    (["--could.seed", "3"], "command line: --could.seed: no stage 'could'; did you mean cold"),
    (["--cold.group", "3"], "command line: --cold.group: unknown key"),
    (["--cold.out", "x"], "command line: --cold.out: unknown key"),
    (["--cold.lr", "-1"], "command line: --cold.lr -1: must be above 0"),
    (["--lr", "x"], "command line: --lr x: must be a finite number"),
    (["--first", "gpro"], "first gpro: no such stage; did you mean grpo"),
    (["--cold.lr"], "--cold.lr: no value"),
    (["b.toml"], "command line: two recipes"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_told(recipe, words, told):
    with pytest.raises(ValueError, match=told):
        recipe(TWO, *words)


def test_a_recipe_of_stages_is_not_for_grpo_alone(recipe, tmp_path, capsys):
    recipe(TWO)
    with pytest.raises(SystemExit):
        grpo.main([str(tmp_path / "two.toml")])
    assert "holds stages; what runs them is python run.py" in capsys.readouterr().err
    with pytest.raises(ValueError, match="which recipe"):
        stages.read(["--lr", "1"])


def test_the_words_of_the_whole_are_of_no_method():
    """Or a stage could not be told from all of them."""
    assert not {*stages.OWN, "first"} & {
        key for Config in (sft.Config, grpo.Config, sieve.Config) for key in stages.keys(Config)}
