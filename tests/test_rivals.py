"""rivals.py, chapter two: the naive twin computes what ours computes, and timing changes nothing.

On a random checkpoint in float32. The reference is another random checkpoint, so that every term of
the loss counts. Two prompts of a micro-batch have different pictures: a picture that reached the
wrong sequence would show.

Letters as in rivals.py: B prompts, G completions per prompt, N = B G completions, T tokens of each.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint

import estimators
import grpo
import rollout
from bench import Config
from machine import Phases
from model import Qwen2VL
from rivals import PHASES, Ours, Twin, as_batch, rewarded, setup, timed, write_inputs
from sampling import Room
from standin import rebound

B, G, T, TEMPERATURE = 3, 2, 5, 0.7


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What both share: three prompts, of which two make a micro-batch."""
    folder = make_checkpoint(tmp_path_factory.mktemp("policy"), tie=False)
    return setup(Config(model=str(folder), data="world:A:n=4", prompts=B, group=G, max_new=T,
                        micro_prompts=2, temperature=TEMPERATURE, beta=0.3))  # fmt: skip


@pytest.fixture(scope="module")
def both(run, tmp_path_factory):
    """(ours, twin), with one policy and one other reference."""
    other = make_checkpoint(tmp_path_factory.mktemp("reference"), tie=False, seed=1)
    ours, twin = Ours(run), Twin(run)
    ours.reference = Qwen2VL.from_pretrained(other).requires_grad_(False)
    twin.reference = twin.twin.load_model(other).requires_grad_(False)
    return ours, twin


@pytest.fixture(scope="module")
def ids(run):
    """Completions (N, T) that may be sampled."""
    known = run.processor.vocab_size
    free = torch.tensor([i for i in range(known) if i not in run.banned])
    return free[torch.randint(len(free), (B * G, T), generator=torch.Generator().manual_seed(0))]


def batch_of(run, ids) -> rollout.Rollout:
    prompts = [run.processor.prompt(example) for example in run.examples]
    return rollout.as_rollout(prompts, ids.view(B, G, T).tolist())


def hub_name(name: str) -> str:
    """transformers' name of a weight as files on the hub, and ours, have it."""
    return name.replace("model.visual.", "visual.").replace("language_model.", "")


# ------------------------------------------------------------------------------ the same numbers


def test_the_twin_gives_completions_the_same_log_probs(run, both, ids):
    ours, twin = both
    inputs = twin.prepare()
    for policy, other in ((ours.policy, twin.policy), (ours.reference, twin.reference)):
        with torch.no_grad():
            wanted, _ = rollout.score(policy, batch_of(run, ids), TEMPERATURE, run.banned)
            found = twin.twin.logps(other, inputs, ids, TEMPERATURE, run.banned)
        torch.testing.assert_close(found, wanted.view(B * G, T), atol=1e-5, rtol=0)


def test_the_twin_has_the_same_loss_and_the_same_gradient(run, both, ids):
    """The whole step's, though each works in micro-batches: of two prompts and of one."""
    (ours, twin), seen = both, {}
    rewards = torch.tensor([[1.0, 0.0], [0.5, 2.0], [1.0, 1.0]])

    def watched(model, *_):
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
        return {"grad_norm": 0.0}

    with rebound(grpo, apply_gradients=watched):
        adv = estimators.group_advantages(rewards)
        wanted = grpo.update(ours.policy, ours.reference, [], batch_of(run, ids), adv, run.banned,
                             ours.grpo)["loss"]  # fmt: skip
    loss = twin.gradient(twin.prepare(), ids, twin.twin.advantages(rewards), Phases("cpu"))
    found = {hub_name(name): p.grad.clone() for name, p in twin.policy.named_parameters()}
    twin.policy.zero_grad()
    assert abs(wanted) > 1e-3
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert found.keys() == seen.keys()
    assert max(float(g.abs().max()) for g in seen.values()) > 1e-2
    for name, gradient in seen.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_both_sample_from_one_distribution(run, both):
    """Next to temperature 0 there is one answer; it is the same for both, and has no end."""
    ours, twin = both
    prompts = [run.processor.prompt(example) for example in run.examples]
    mine = rollout.sample(ours.policy, run.processor, prompts, G, T, 1e-6)
    phase = Phases("cpu")("prefill")
    found = twin.twin.generate(twin.policy, twin.prepare(), T, 1e-6, run.banned, phase)
    assert found.tolist() == mine.ids.view(B * G, T).tolist()
    assert bool((mine.lengths == T).all())


def test_no_token_that_is_banned_or_ends_a_completion_is_sampled(run, both):
    """At temperature 100 all of some 390 tokens are about equally likely: of 900 that are drawn
    one in 50 would be among the banned."""
    (ours, twin), phase = both, Phases("cpu")("prefill")
    assert {*run.processor.stop_ids, run.processor.image_id} <= {*run.banned}
    torch.manual_seed(0)
    found = twin.twin.generate(twin.policy, twin.prepare(), 150, 100.0, run.banned, phase)
    prompts = [run.processor.prompt(example) for example in run.examples]
    mine = rollout.sample(ours.policy, run.processor, prompts, G, 150, 100.0).ids
    for ids in (found, mine.view(B * G, -1)):
        assert ids.shape == (B * G, 150)
        assert len({*ids.flatten().tolist()}) > 300
        assert not {*run.banned} & {*ids.flatten().tolist()}


def test_completions_of_other_lengths_are_refused(run, ids):
    texts = [run.processor.decode(row) for row in ids.tolist()]
    assert rewarded(run, as_batch(run, ids, texts)).shape == (B, G)
    with pytest.raises(RuntimeError, match="5 tokens"):
        rewarded(run, as_batch(run, ids[:, :4], texts))


def test_rewards_meet_their_own_examples(run, ids):
    texts = [f"<think> {i} </think>\n<answer> {run.examples[i // G].solution} </answer>"
             for i in range(B * G)]  # fmt: skip
    assert rewarded(run, as_batch(run, ids, texts)).tolist() == [[2.0] * G] * B
    assert float(rewarded(run, as_batch(run, ids, ["7"] * B * G)).sum()) == 0.0


# --------------------------------------------------------------------------------------- the phases


def test_a_step_has_every_phase(both):
    for rival in both:
        assert {*rival.step(0)} == {*PHASES}


def test_a_step_changes_the_policy_and_nothing_else(both):
    for rival in both:
        before = [[p.clone() for p in model.parameters()]
                  for model in (rival.policy, rival.reference)]  # fmt: skip
        rival.step(1)
        for model, old in zip((rival.policy, rival.reference), before):
            same = all(torch.equal(p, q) for p, q in zip(model.parameters(), old))
            assert same == (model is rival.reference)
        assert all(p.grad is None for p in rival.policy.parameters())


def test_timing_puts_every_name_back(both):
    ours, _ = both
    names = ((Room, "enter"), (grpo, "score"), (grpo, "apply_gradients"))
    before = [getattr(*name) for name in names]
    with pytest.raises(KeyError), timed(Phases("cpu"), ours.reference):
        assert not any(getattr(*name) is old for name, old in zip(names, before))
        raise KeyError
    assert [getattr(*name) for name in names] == before


def test_a_score_is_that_of_the_reference_or_of_the_policy():
    phases, seen = Phases("cpu"), []
    score, reference = lambda model: seen.append(phases.stack[-1]), object()
    with rebound(grpo, score=score), timed(phases, reference):
        grpo.score(reference)
        grpo.score(object())
    assert seen == ["reference", "forward/backward"]


def test_the_hook_on_the_first_forward_is_gone_after_it(both):
    _, twin = both
    inside, entered = twin.twin.first_forward, []

    class Phase:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    model = torch.nn.Linear(1, 1)
    with inside(model, Phase()):
        model(torch.ones(1))
        assert entered == ["in", "out"]
        model(torch.ones(1))
    model(torch.ones(1))
    assert entered == ["in", "out"]
    assert not model._forward_hooks and not model._forward_pre_hooks


# ------------------------------------------------------------------------------------- for a peer


def test_a_peer_is_given_the_same_prompts(run, tmp_path):
    write_inputs(run, tmp_path)
    told = json.loads((tmp_path / "settings.json").read_text())
    assert {k: told[k] for k in ("group", "max_new", "temperature", "beta")} == {
        "group": G, "max_new": T, "temperature": TEMPERATURE, "beta": 0.3}  # fmt: skip
    assert told["banned"] == run.banned
    assert len(told["prompts"]) == B
    for row, example in zip(told["prompts"], run.examples):
        assert row["ids"] == run.processor.prompt(example).ids.tolist()
        assert example.problem in row["text"]
        assert row["solution"] == example.solution
        pixels = np.asarray(Image.open(tmp_path / row["image"]))
        assert np.array_equal(pixels, example.images[0])


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="4 rows, --prompts 5"):
        setup(Config(data="world:A:n=4", prompts=5))
