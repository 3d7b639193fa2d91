"""run.py, chapter two: stages run in order, go on after any end, and are one run to the reader."""

import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from run_many import RunMany
from tiny_checkpoint import make_checkpoint

import report
import run
import stages

RECIPE = """
note = "Two and more."
data = "world:A:n=6"
max_pixels = 3136
max_new = 4
micro = 2
probes = 0
save_every = 1
keep = 1

[[stage]]
name = "few"
method = "filter"
n = 3
rewards = ["length(per=1)"]
above = 0.5
below = 3.9

[[stage]]
name = "seen"
method = "distill"
step = "describe"
world = "world:A:n=2"
limit = 2

[[stage]]
name = "cold"
method = "sft"
choose = "best"
data = "world:A:n=4:teacher=flawed"
steps = 3
batch = 2
evals = ["A=world:A:n=2"]
scorer = "length(per=1)"
lr = 1e-1

[[stage]]
method = "grpo"
data = "world:A:n=6 only={few}"
steps = 3
prompts = 2
group = 2
micro_prompts = 2
rewards = ["length(per=1)"]
"""


@pytest.fixture(scope="module")
def many():
    with RunMany() as run_many:
        yield run_many


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory):
    """A recipe that ran through: its words, folder and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    make_checkpoint(folder / "model")
    (folder / "four.toml").write_text(RECIPE)
    words = [folder / "four.toml", "--model", folder / "model"]
    status, said = many("run", *words, "--out", folder / "run")
    assert status == 0, said
    return SimpleNamespace(words=words, out=folder / "run", said=said)


def rows(out: Path, *names: str) -> list[dict]:
    """The metrics of some stages, but how long things took."""
    return [{k: x for k, x in json.loads(line).items()
             if not k.startswith("time/") and not k.endswith(("_per_second", "seconds", "_gb"))
             and k != "resumed"}
            for name in names for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def files(out: Path) -> dict:
    return {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def best(out: Path) -> dict:
    return json.loads((out / "3_cold" / "summary.json").read_text())["best"]


def copied(whole, out: Path) -> Path:
    """A whole that ran, as if it had done so in `out`."""
    shutil.copytree(whole.out, out)
    for path in out.rglob("config.json"):
        path.write_text(path.read_text().replace(str(whole.out), str(out)))
    return out


def config(out: Path, name: str) -> dict:
    return json.loads((out / name / "config.json").read_text())


def read(words, *more) -> stages.Recipe:
    return stages.read([str(word) for word in (*words, *more)])


# ------------------------------------------------------------------------------------- in order


def test_every_stage_gets_what_the_ones_before_it_left(whole):
    out = whole.out
    names = sorted(p.name for p in out.iterdir())
    assert names == ["1_few", "2_seen", "3_cold", "4_grpo", "recipe.json", "report.html",
                     "run.lock"]  # fmt: skip
    summary = json.loads((out / "3_cold" / "summary.json").read_text())
    best = f"{out}/3_cold/step_{summary['best']['step']:06d}"
    assert Path(best).is_dir() and config(out, "4_grpo")["model"] == best
    assert config(out, "4_grpo")["data"] == f"world:A:n=6 only={out}/1_few/kept.jsonl"
    kept = (out / "1_few" / "kept.jsonl").read_text().splitlines()
    rollouts = (out / "4_grpo" / "rollouts.jsonl").read_text().splitlines()
    asked = {json.loads(line)["row"] for line in rollouts}
    assert asked <= {json.loads(line)["row"] for line in kept} and len(kept) < 6
    assert len((out / "2_seen" / "rows.jsonl").read_text().splitlines()) == 2


def test_the_best_is_the_highest_of_what_was_saved_and_the_end(whole):
    """Of equals the later; the scores are those of the metrics and, of the end, the summary."""
    summary = json.loads((whole.out / "3_cold" / "summary.json").read_text())
    scores = [row.get("eval/A/score", row.get("eval/A")) for row in rows(whole.out, "3_cold")]
    assert scores[2] is None and None not in scores[:2]
    scores[2] = summary["after"]["A"]["score"]
    best = max(range(3), key=lambda i: (scores[i], i))
    assert summary["best"] == {"step": best + 1, "score": scores[best]}


def test_what_is_said_at_the_end_has_every_stage_and_where_its_work_is(whole):
    table = whole.said[whole.said.index("stage ") :]
    for word in ("few", "seen", "cold", "grpo", " of 6 rows kept", "1_few/kept.jsonl",
                 "2_seen/rows.jsonl", "4_grpo/step_000003", f"report  {whole.out}/report.html"):
        assert word in table
    assert "A           0.000 -> 0.000" in table


def test_one_page_has_all_stages_in_order(whole):
    page = (whole.out / "report.html").read_text()
    heads = ["1 few: filter", "2 seen: distill describe", "3 cold: sft, the best checkpoint",
             "4 grpo: grpo"]  # fmt: skip
    assert sorted(heads, key=page.index) == heads and "All stages have ended." in page
    assert page.count("<section><h2>") == 4 and "of 6 rows kept" in page
    for name in ("3_cold", "4_grpo"):
        assert f'href="{name}/report.html"' in page and (whole.out / name / "report.html").exists()
    assert "<h3>Loss" in page and "<h3>Reward" in page and "best step" in page
    assert "http-equiv=\"refresh\"" not in page


def test_the_page_of_a_whole_that_has_not_ended_says_so(whole, tmp_path):
    shutil.copytree(whole.out, tmp_path / "run")
    (tmp_path / "run" / "3_cold" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "4_grpo")
    page = report.write(tmp_path / "run" / "3_cold", running=True)  # of a stage: of both
    assert page == tmp_path / "run" / "3_cold" / "report.html"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "2 of 4 stages have not ended" in page and 'http-equiv="refresh"' in page
    assert "has not ended, 3 steps are done" in page and "has not begun" in page


# ------------------------------------------------------------------------------------ going on


def test_ended_in_any_stage_and_gone_on_is_not_ended(many, whole, tmp_path):
    """SIGTERM while stage 3 saves its first step, SIGKILL while stage 4 saves its second. What is
    the best is the same, though a step that is saved in haste is scored only later."""
    out = tmp_path / "run"
    ends = (("3_cold/step_000001.tmp/config.json", signal.SIGTERM, 0),
            ("4_grpo/step_000002.tmp/config.json", signal.SIGKILL, -signal.SIGKILL))  # fmt: skip
    for at, number, wanted in ends:
        status, said = many("run", *whole.words, "--out", out, at=at, kill=0, signal=number)
        assert status == wanted, said
        assert (wanted == 0) == ("ended and saved; the same command goes on" in said)
        assert (out / "4_grpo").exists() == (wanted != 0)
    ended = {p: t for p, t in files(out).items() if (p.parent / "summary.json").exists()}
    status, said = many("run", *whole.words, "--out", out)
    assert status == 0 and "== 4" in said and "== 3" not in said, said
    assert ended.items() <= files(out).items()  # no stage that had ended was touched
    assert rows(out, "4_grpo") == rows(whole.out, "4_grpo")
    assert best(out) == best(whole.out)
    for row, other in zip(rows(out, "3_cold"), rows(whole.out, "3_cold"), strict=True):
        assert row == {key: x for key, x in other.items() if key in row or "eval" not in key}
    for name in ("1_few/kept.jsonl", "4_grpo/step_000003/model.safetensors"):
        assert (out / name).read_bytes() == (whole.out / name).read_bytes()


def test_what_has_ended_is_not_run_again_but_may_get_more_steps(many, whole, tmp_path):
    words = [*whole.words, "--out", copied(whole, tmp_path / "run")]
    before = files(tmp_path / "run")
    status, said = many("run", *words)
    assert status == 0 and "==" not in said and "4_grpo/step_000003" in said
    assert {p.name for p, t in files(tmp_path / "run").items() if before.get(p) != t} == {
        "recipe.json", "run.lock"}  # fmt: skip
    status, said = many("run", *words, "--grpo.steps", 4)
    assert status == 0 and "== 4" in said and "== 3" not in said
    assert [row["step"] for row in rows(tmp_path / "run", "4_grpo")] == [1, 2, 3, 4]


@pytest.mark.parametrize("words, why", [
    ((), None),
    (("--grpo.steps", "4"), None),  # the last that was begun may get more
    (("--grpo.save_every", "7"), None),
    (("--grpo.steps", "2"), "its stage 4_grpo: it has another config: steps 3, not 2"),
    (("--cold.steps", "4"), "it has a stage 4_grpo already"),  # its start would be another
    (("--cold.lr", "1"), "its stage 3_cold: it has another config: lr 0.1, not 1.0"),
    (("--few.below", "3.5"), "its stage 1_few: it has another config: below 3.9, not 3.5"),
])  # fmt: skip
def test_a_whole_goes_on_only_as_what_it_was(whole, words, why):
    assert run.why_not(whole.out, read(whole.words, *words)) == why


def test_the_best_is_not_chosen_of_steps_that_were_not_scored(whole, tmp_path):
    out = copied(whole, tmp_path / "run")
    recipe, path = read(whole.words, "--out", out), out / "3_cold" / "config.json"
    path.write_text(path.read_text().replace('"eval_saves": true', '"eval_saves": false'))
    assert run.why_not(out, recipe) == ("its stage 3_cold: it has another config: eval_saves false"
                                        ", not true")  # fmt: skip


def test_epochs_say_nothing_where_steps_are_told(whole):
    recipe = read(whole.words, "--out", whole.out, "--cold.epochs", "3")
    assert run.why_not(whole.out, recipe) is None


def test_torchruns_restart_goes_on_with_what_it_began(whole, tmp_path, monkeypatch):
    out = copied(whole, tmp_path / "run")
    never = read(whole.words, "--out", out, "--resume", "never")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run.choose_whole(never)[0] == out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert run.choose_whole(never)[0] == Path(f"{out}_2")


def test_another_recipe_gets_a_folder_of_its_own(whole, tmp_path, capsys):
    out = copied(whole, tmp_path / "run")
    recipe = read(whole.words, "--out", out, "--seed", "1")
    found, lock = run.choose_whole(recipe)
    assert found == Path(f"{out}_2") and (found / "recipe.json").exists()
    assert f"{out} is left alone: its stage 1_few: it has another config: seed 0, not 1" in (
        capsys.readouterr().err)  # fmt: skip
    lock.close()
    never = read(whole.words, "--out", out, "--seed", "1", "--resume", "never")
    assert run.choose_whole(never)[0] == Path(f"{out}_3")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    single = read(whole.words, "--out", tmp_path / "one")
    assert run.choose_whole(single)[0] == Path(f"{tmp_path}/one_2")


def test_a_stage_that_cannot_be_gone_on_with_is_told(whole, tmp_path):
    """Its newest checkpoint is damaged: that counts only as long as it has steps to do."""
    out = copied(whole, tmp_path / "run")
    recipe = read(whole.words, "--out", out)
    (out / "4_grpo" / "step_000003" / "model.safetensors").unlink()
    assert run.why_not(out, recipe) is None
    (out / "4_grpo" / "summary.json").unlink()
    assert "4_grpo: step_000003 cannot be gone on from (mod" in run.why_not(out, recipe)


@pytest.mark.parametrize("words, told", [
    (("--grpo.rewards", "formt"), "stage grpo: rewards: reward formt: unknown"),
    (("--grpo.rewards", "format(thought=0)"), "stage grpo: rewards: reward format: thought=0: mus"),
    (("--grpo.reward_weights", "1,2"), "stage grpo: rewards: reward weights: 2 for 1 rewards"),
    (("--grpo.template", "r1"), "stage grpo: template: template 'r1': neither"),
    (("--cold.scorer", "cuont"), "stage cold: scorer: scorer cuont: unknown"),
    (("--grpo.data", "no.jsonl only={few}"), "stage grpo: data: no.jsonl: no such file or folder"),
    (("--grpo.data", "world:A only=no.jsonl"), "stage grpo: data: no.jsonl: no such file"),
    (("--grpo.data", "world:A:ask=cuont"), "stage grpo: data: world:A:ask=cuont: no question"),
    (("--grpo.data", ""), "stage grpo: data: none given: no such file or folder"),
    (("--cold.held_out", "world:A + no.json"), "stage cold: held_out: no.json: no such file"),
    (("--cold.evals", "A=world:A,B=no.jsonl"), "stage cold: evals: no.jsonl: no such file"),
    (("--grpo.images", "no"), "stage grpo: images: no: no such file or folder"),
    (("--grpo.model", "no"), "stage grpo: model: model no: neither a checkpoint folder"),
    (("--grpo.model", "owner/name", "--grpo.data", "owner/name:train + {seen}"), None),
])  # fmt: skip
def test_what_a_later_stage_cannot_begin_with_is_told_before_the_first_one(
    whole, tmp_path, words, told
):
    recipe = read(whole.words, "--out", tmp_path / "run", *words)
    if told:
        with pytest.raises(ValueError, match=f"^{whole.words[0]}: {re.escape(told)}"):
            run.choose_whole(recipe)
        assert not (tmp_path / "run").exists()
        return
    run.check(recipe, tmp_path / "run")  # may be on the hub, or is left by an earlier stage


# --------------------------------------------------------------------- one run, several processes


def test_a_recipe_without_stages_runs_as_its_method_does(many, whole, tmp_path):
    flat = 'data = "world:A:n=4:teacher=flawed"\nmethod = "sft"\nsteps = 1\nbatch = 2\nprobes = 0\n'
    (tmp_path / "flat.toml").write_text(flat + "max_pixels = 3136\n")
    words = [tmp_path / "flat.toml", *whole.words[1:], "--out", tmp_path / "run"]
    status, said = many("run", *words)
    assert status == 0 and (tmp_path / "run" / "step_000001").is_dir(), said
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_two_processes_do_as_one(many, whole, tmp_path):
    """What they keep is the same; a step of distillation is the first one's; the others wait."""
    text = RECIPE[: RECIPE.rindex("[[stage]]")].replace('choose = "best"', "")
    (tmp_path / "three.toml").write_text(text.replace('evals = ["A=world:A:n=2"]', ""))
    words = [tmp_path / "three.toml", *whole.words[1:], "--out", tmp_path / "run"]
    status, said = many("run", *words, "--steps", 1, processes=2)
    assert status == 0 and said.count("== 2 seen") == 1, said
    for name in ("1_few/kept.jsonl", "2_seen/rows.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (whole.out / name).read_bytes()
    one, two = (rows(out, "3_cold")[0] for out in (whole.out, tmp_path / "run"))
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-5)


def test_what_fails_in_the_first_process_ends_the_others(many, whole, tmp_path):
    words = [*whole.words, "--out", tmp_path / "run", "--seen.world", "world:D:n=2"]
    status, said = many("run", *words, "--first", "seen", "--grpo.data", "world:A", processes=2)
    assert status == 1 and said.count("error: ") == 1 and "split 'D'" in said


# -------------------------------------------------------------------------------------- the command


def test_a_dry_run_reads_nothing(whole, tmp_path, capsys):
    words = [*whole.words, "--dry_run", "--out", tmp_path / "no", "--model", "no/such"][2:]
    found = run.main([str(whole.words[0]), *map(str, words[1:])])
    printed = capsys.readouterr().out
    assert found == {} and "4 grpo: grpo\n    model = \"{cold}\"" in printed
    assert not (tmp_path / "no").exists()


def test_a_mistake_ends_it_with_status_2(whole, capsys):
    with pytest.raises(SystemExit) as end:
        run.main([str(whole.words[0]), "--cold.gruop", "3"])
    assert end.value.code == 2 and "--cold.gruop: unknown key" in capsys.readouterr().err
