"""grpo.py, chapter two: the whole step against a naive twin, then runs that learn. The formulae, on
numbers done by hand, are in test_estimators.py.

The twin is GRPO as the papers print it, in loops over sequences and tokens: prompt and image are
repeated for every completion, batches are padded, logits are full, the model is transformers' own.

Letters as in grpo.py: B prompts, G completions per prompt, T completion tokens.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensors import close, column
from tiny_checkpoint import make_checkpoint, picture
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

import grpo
import lora
from ahead import Ahead
from checkpoint import hub_name
from config import parse, validate
from data import Processor
from estimators import group_advantages, k3
from grading import load_rewards
from grpo import Config, main, sample_batch, sample_groups, train, update
from lora import Learns, part_of
from model import Qwen2VL, VisionTower
from optim import draw_rows, make_optimizers
from rollout import Rollout, as_rollout, look, score
from rows import Example
from tally import advantages, has_signal, reward_table

NAN = math.nan


# --------------------------------------------------------------------------------- the naive twin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def far(folder, tmp_path_factory):
    """A checkpoint some way off, for a reference whose KL is not 0."""
    hf = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.1 * p.std() * torch.randn(p.shape, generator=gen))
    out = tmp_path_factory.mktemp("far")
    hf.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_pretrained(folder, template="{Question}")


@pytest.fixture
def qwen(folder):
    return Qwen2VL.from_pretrained(folder)


EXAMPLES = [  # prompts of unequal length with images of unequal size and number
    Example("How many?", "3", (picture(0, 56, 84),)),
    Example("How many?", "5", (picture(1, 56, 84),)),
    Example("one, two, three", "four"),
    Example("What color?", "red", (picture(2, 84, 56), picture(3, 56, 56))),
]
ADV = torch.tensor([[1.2, -0.7, -0.5], [-1.0, 0.1, 0.9], [0.8, 0.3, -1.1], [-0.6, -0.6, 1.2]])


@pytest.fixture(scope="module")
def rollout(processor, folder):
    """4 prompts x 3 completions of 1 to 6 tokens; one of them was cut."""
    gen = torch.Generator().manual_seed(0)
    lengths = [[3, 5, 1], [2, 6, 4], [1, 1, 6], [4, 2, 3]]
    targets = [[torch.randint(384, (n,), generator=gen).tolist() for n in row] for row in lengths]
    out = as_rollout([processor.prompt(e) for e in EXAMPLES], targets)
    out.finished[1, 1] = out.finished[2, 2] = False
    with torch.no_grad():
        out.logp = score(Qwen2VL.from_pretrained(folder), out, 0.7, processor.banned_ids)[0]
    return out


class Record(torch.optim.SGD):
    """SGD that keeps the gradients of every step."""

    def __init__(self, model, lr: float):
        super().__init__(model.parameters(), lr=lr)
        self.model, self.seen = model, []

    def step(self):
        named = self.model.named_parameters()
        self.seen.append({hub_name(n): p.grad.clone() for n, p in named if p.grad is not None})
        super().step()


def keys(**changes) -> Config:
    """Settings that hide nothing: no clipping of the gradient, a temperature that is not 1."""
    plain = {"max_new": 6, "temperature": 0.7, "max_grad_norm": 1e9, "clip_low": 0.1,
             "clip_high": 0.15, "beta": 0.0, "group": 3, "prompts": 4}  # fmt: skip
    return Config(**{**plain, **changes})


def naive_logp(hf, rollout: Rollout, processor, temperature: float) -> list[Tensor]:
    """log pi(o_t | prompt, image, o_<t) of the N = B * G completions, each a row with a prompt and
    images of its own in a padded batch."""
    G = rollout.ids.shape[1]
    prompts = [p for p in rollout.prompts for _ in range(G)]
    answers = [i[:n] for i, n in zip(rollout.ids.flatten(0, 1), rollout.lengths.flatten())]
    width = max(len(p.ids) + len(a) for p, a in zip(prompts, answers))
    ids, real = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for i, (p, a) in enumerate(zip(prompts, answers)):
        ids[i, : len(p.ids) + len(a)] = torch.cat((p.ids, a))
        real[i, : len(p.ids) + len(a)] = 1
    logits = hf(
        input_ids=ids, attention_mask=real,
        pixel_values=torch.cat([p.patches for p in prompts]),
        image_grid_thw=torch.cat([p.grid for p in prompts]),
        mm_token_type_ids=(ids == processor.image_id).long(),
    ).logits / temperature  # fmt: skip
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool)
    banned[processor.banned_ids] = True
    logp = logits.masked_fill(banned, -torch.inf).log_softmax(-1)
    return [
        torch.stack([logp[i, len(p.ids) - 1 + t, a[t]] for t in range(len(a))])
        for i, (p, a) in enumerate(zip(prompts, answers))
    ]


def naive_loss(logp, old, ref, adv, finished, cfg) -> tuple[Tensor, dict]:
    """The GRPO loss of N completions with advantages of their tokens, in loops, and the metrics
    that update() gives. adv: N lists; NaN does not train."""
    losses, clipped = [], 0
    learnt = [(bool(f) or not cfg.mask_truncated) and not math.isnan(a[0])
              for f, a in zip(finished, adv)]  # fmt: skip
    all_tokens = sum(len(l) for l, yes in zip(logp, learnt) if yes)
    for i in range(len(logp)):
        own = []
        for t in range(len(logp[i]) if learnt[i] else 0):
            ratio, A = torch.exp(logp[i][t] - old[i][t]), adv[i][t]
            if cfg.ratio == "sequence":
                ratio = torch.exp((logp[i] - old[i]).mean())
            if cfg.ratio_cap and ratio > cfg.ratio_cap:
                ratio = torch.tensor(cfg.ratio_cap)
            bounded = min(max(ratio.item(), 1 - cfg.clip_low), 1 + cfg.clip_high)
            inside = bounded == ratio.item()
            gain = torch.min(ratio * A, (ratio if inside else torch.tensor(bounded)) * A)
            clipped += not inside and gain.item() == pytest.approx(bounded * A)
            kl = torch.exp(ref[i][t] - logp[i][t]) - (ref[i][t] - logp[i][t]) - 1 if ref else 0.0
            own.append(-gain + (cfg.beta * kl if cfg.kl == "loss" else 0.0))
        share = {"sequence": 1 / max(1, len(own)) / len(adv), "token": 1 / max(1, all_tokens),
                 "constant": 1 / len(adv) / cfg.max_new}[cfg.mean]  # fmt: skip
        losses.append(sum(own) * share)
    n = sum(len(l) for l in logp)
    return sum(losses), {"clip_share": clipped / n}


def naive_advantages(adv: list[float], logp, ref, finished, cfg) -> list[list[float]]:
    """Of the tokens of N completions: with the KL in the reward a token's return is the reward at
    the end less beta times the log-ratios on the way; REINFORCE++ then whitens all that train."""
    found = []
    for i, A in enumerate(adv):
        returns, after = [], A
        for t in reversed(range(len(logp[i]))):
            if ref and cfg.kl == "reward":
                after = after - cfg.beta * (logp[i][t] - ref[i][t]).item()
            returns.insert(0, after)
        found.append(returns)
    if cfg.advantage == "baseline":
        flat = [a for i, own in enumerate(found) for a in own
                if not math.isnan(a) and (finished[i] or not cfg.mask_truncated)]  # fmt: skip
        found = [[(a - np.mean(flat)) / np.std(flat) for a in own] for own in found]
    return found


def naive_update(hf, reference, optimizer, rollout, adv, processor, cfg) -> dict:
    """The steps of the twin on one batch; old and reference log-probs, and what the advantages of
    tokens are, are taken before them. Minibatches: every so many-th prompt."""
    def logps(model, part=rollout):
        return naive_logp(model, part, processor, cfg.temperature)

    G, finished = adv.shape[1], rollout.finished.flatten().tolist()
    with torch.no_grad():
        old, ref = logps(hf), logps(reference) if reference else None
    credit = naive_advantages(adv.flatten().tolist(), old, ref, finished, cfg)
    for _ in range(cfg.updates_per_batch):
        for k in range(cfg.minibatches):
            rows = list(range(k, len(adv), cfg.minibatches))
            at = [b * G + g for b in rows for g in range(G)]
            own = [[x[i] for i in at] if x else None for x in (old, ref, credit, finished)]
            optimizer.zero_grad()
            loss, metrics = naive_loss(logps(hf, rollout.select(rows)), *own, cfg)
            loss.backward()
            optimizer.step()
    return {"loss": loss.item(), **metrics}


def hf_model(folder) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()


def ours(folder, rollout, processor, cfg, adv=ADV, reference=None, lr=0.03):
    """Gradients of each step, the last step's metrics, and the weights after, of update()."""
    model = Qwen2VL.from_pretrained(folder)
    sgd = Record(model, lr)
    found = update(model, reference, [sgd], rollout, adv, processor.banned_ids, cfg)
    return sgd.seen, found, dict(model.named_parameters())


def twin(folder, rollout, processor, cfg, adv=ADV, reference=None, lr=0.03):
    """The same of the naive twin."""
    hf = hf_model(folder)
    sgd = Record(hf, lr)
    found = naive_update(hf, reference, sgd, rollout, adv, processor, cfg)
    return sgd.seen, found


def distance(a: dict, b: dict) -> float:
    """The largest difference between two sets of gradients."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# -------------------------------------------------------------------------------- frozen parts


@pytest.fixture
def looks(monkeypatch):
    """A list that gets an item each time that a vision tower runs."""
    seen, run = [], VisionTower.patch_states
    monkeypatch.setattr(VisionTower, "patch_states", lambda *a: seen.append(1) or run(*a))
    return seen


def frozen_update(folder, rollout, processor, cfg, reference):
    """Gradients of each step, metrics, and the model, of update() where parts do not learn."""
    model = lora.load(Learns.of(cfg), folder)
    sgd = Record(model, 0.03)
    found = update(model, reference, [sgd], rollout, ADV, processor.banned_ids, cfg)
    return sgd.seen, found, model


@pytest.mark.parametrize("freeze", [("vision",), ("vision", "merger"), ("language",)])
def test_frozen_parts_have_no_gradient_and_the_others_theirs(
    freeze, folder, far, rollout, processor
):
    cfg = keys(freeze=freeze, beta=0.1, updates_per_batch=1)
    whole, _, _ = ours(folder, rollout, processor, keys(beta=0.1, updates_per_batch=1),
                       reference=Qwen2VL.from_pretrained(far))
    seen, _, model = frozen_update(folder, rollout, processor, cfg, Qwen2VL.from_pretrained(far))
    left = {k: v for k, v in whole[0].items() if part_of(k) not in freeze}
    assert len(left) < len(whole[0]) and distance(seen[0], left) < 1e-6
    start = Qwen2VL.from_pretrained(folder).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, start[name]) == (part_of(name) in freeze), name


@pytest.mark.parametrize("freeze", [("vision",), ("vision", "merger")])
def test_a_frozen_tower_runs_once_a_batch_and_nothing_changes(
    freeze, looks, folder, far, rollout, processor
):
    """Its states are made once; two updates in micro-batches, old log-probs and the reference read
    them. Loss and gradients are those of running it each time."""
    cfg = keys(freeze=freeze, beta=0.1, updates_per_batch=2, micro_prompts=2)
    start, reference = Qwen2VL.from_pretrained(folder), Qwen2VL.from_pretrained(far)
    reference.visual.load_state_dict(start.visual.state_dict())  # as that of a run has it
    plain, found, _ = frozen_update(folder, rollout, processor, cfg, reference)
    assert len(looks) == 2 * (1 + 1 + 2)
    seen = look(start, rollout.prompts)
    assert [len(p.patches) for p in seen] == [0] * 4 and not len(seen[2].states)
    again, same, _ = frozen_update(folder, replace(rollout, prompts=seen), processor, cfg,
                                   reference)
    assert len(looks) == 2 * (1 + 1 + 2) + 1
    assert max(distance(a, b) for a, b in zip(plain, again)) < 1e-6
    assert same == pytest.approx(found, rel=1e-5, abs=1e-7)


def test_sampling_with_a_frozen_tower_runs_it_once_and_draws_the_same(looks, qwen, processor):
    plain = sample_groups(qwen, Ahead(processor, EXAMPLES), 0, 4, keys())
    looks.clear()
    cfg = keys(freeze=("vision",), updates_per_batch=2, beta=0.1)
    once = sample_groups(qwen, Ahead(processor, EXAMPLES), 0, 4, cfg)
    assert len(looks) == 1 and torch.equal(once.ids, plain.ids)
    update(qwen, qwen, [], once, ADV, processor.banned_ids, cfg)
    assert len(looks) == 1


# ------------------------------------------------------------------------ a step equals the twin


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("mean", ["sequence", "token", "constant"])
def test_loss_and_gradient_are_those_of_the_naive_twin(mean, ratio, folder, rollout, processor):
    """Two updates on one batch: in the second the ratios are not 1 and some are clipped. The
    gradient is the same in micro-batches of 1, 2, 3 and all 4 prompts."""
    cfg = keys(mean=mean, ratio=ratio, updates_per_batch=2)
    expected, naive = twin(folder, rollout, processor, cfg)
    assert 0 < naive["clip_share"] < 1
    for micro in (1, 2, 3, 4):
        seen, found, _ = ours(folder, rollout, processor, replace(cfg, micro_prompts=micro))
        assert len(seen) == 2
        for step in (0, 1):
            assert distance(seen[step], expected[step]) < 1e-5, (micro, step)
        assert found["loss"] == pytest.approx(naive["loss"], abs=1e-5)
        assert found["clip_share"] == pytest.approx(naive["clip_share"])


@pytest.mark.parametrize("mean", ["sequence", "token", "constant"])
def test_the_kl_to_the_reference_is_in_the_gradient(mean, folder, far, rollout, processor):
    """beta k3(pi || ref) beside the clipped term, with the same weights of tokens."""
    cfg = keys(mean=mean, beta=0.3, micro_prompts=3)
    expected, naive = twin(folder, rollout, processor, cfg, reference=hf_model(far))
    reference = Qwen2VL.from_pretrained(far)
    (with_kl,), found, _ = ours(folder, rollout, processor, cfg, reference=reference)
    (without,), _, _ = ours(folder, rollout, processor, replace(cfg, beta=0.0))
    assert distance(with_kl, expected[0]) < 1e-5
    assert distance(with_kl, without) > 1e-2
    assert found["loss"] == pytest.approx(naive["loss"], abs=1e-5)


def test_the_kl_metric_is_the_mean_of_k3_over_all_tokens(folder, far, rollout, processor):
    """And it is 0 where the reference is the policy itself."""
    with torch.no_grad():
        logp, ref = (
            score(Qwen2VL.from_pretrained(f), rollout, 0.7, processor.banned_ids)[0][rollout.mask]
            for f in (folder, far)
        )
    cfg = keys(beta=0.3, micro_prompts=3)
    _, found, _ = ours(folder, rollout, processor, cfg, reference=Qwen2VL.from_pretrained(far))
    assert found["kl"] == pytest.approx(k3(logp, ref).mean().item(), rel=1e-4)
    assert found["kl"] > 0.01
    _, found, _ = ours(folder, rollout, processor, cfg, reference=Qwen2VL.from_pretrained(folder))
    assert found["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reference_is_left_alone(folder, far, rollout, processor):
    reference = Qwen2VL.from_pretrained(far)
    ours(folder, rollout, processor, keys(beta=0.3), reference=reference)
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("mean", ["sequence", "token", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_truncated_completions_do_not_train_if_masked(mean, ratio, folder, rollout, processor):
    """Their tokens are out of the loss; DAPO's denominator is then that of the others."""
    cfg = keys(mean=mean, ratio=ratio, mask_truncated=True, updates_per_batch=2, micro_prompts=2)
    expected, naive = twin(folder, rollout, processor, cfg)
    seen, found, _ = ours(folder, rollout, processor, cfg)
    for step in (0, 1):
        assert distance(seen[step], expected[step]) < 1e-5
    assert found["loss"] == pytest.approx(naive["loss"], abs=1e-5)
    unmasked, _, _ = ours(folder, rollout, processor, replace(cfg, mask_truncated=False))
    assert distance(seen[0], unmasked[0]) > 1e-2


NEW = {
    "MM-Eureka": {"advantage": "baseline", "minibatches": 2},
    "MM-Eureka 2": {"ratio_cap": 1.16, "minibatches": 2, "clip_low": 0.05},
    "LMM-R1": {"advantage": "baseline", "kl": "reward", "beta": 0.3, "mean": "token"},
    "verl": {"minibatches": 2, "updates_per_batch": 2, "beta": 0.3, "mean": "token"},
    "all at once": {"advantage": "baseline", "kl": "reward", "beta": 0.3, "ratio": "sequence",
                    "minibatches": 2, "mask_truncated": True, "mean": "constant"},
}  # fmt: skip


@pytest.mark.parametrize("name", NEW)
def test_the_estimators_of_other_systems_are_those_of_the_naive_twin(
    name, folder, far, rollout, processor
):
    """Each step's gradient, in micro-batches of 1 and 3 prompts; one completion has no reward, and
    none of a group that is out of the band."""
    cfg, adv = keys(**NEW[name]), ADV.clone()
    adv[0, 2] = NAN
    if name == "all at once":
        adv[3] = NAN
    theirs, reference = (hf_model(far), Qwen2VL.from_pretrained(far)) if cfg.beta else (None, None)
    expected, naive = twin(folder, rollout, processor, cfg, adv, theirs)
    for micro in (1, 3):
        seen, found, _ = ours(folder, rollout, processor, replace(cfg, micro_prompts=micro), adv,
                              reference)
        assert len(seen) == len(expected) == cfg.minibatches * cfg.updates_per_batch
        apart = [distance(*both) for both in zip(seen, expected)]
        assert apart[0] < 1e-5 and max(apart) < 3e-4  # which each step makes larger
    assert found["skipped"] == 0 and ("kl" in found) == bool(cfg.beta)
    if cfg.minibatches == 1:
        assert found["loss"] == pytest.approx(naive["loss"], abs=1e-5)
        assert found["clip_share"] == pytest.approx(naive["clip_share"])


def test_each_of_these_keys_changes_the_gradient(folder, far, rollout, processor):
    """Or the comparison above would prove little."""
    reference = Qwen2VL.from_pretrained(far)

    def steps(**changes):
        cfg = keys(beta=0.3, minibatches=2, ratio_cap=4.0, clip_low=0.05)
        return ours(folder, rollout, processor, replace(cfg, **changes), ADV, reference)[0]

    plain = steps()
    for changes in ({"advantage": "baseline"}, {"kl": "reward"}, {"minibatches": 4},
                    {"ratio_cap": 1.16}):  # fmt: skip
        assert distance(plain[1], steps(**changes)[1]) > 1e-3, changes


def test_the_metrics_of_minibatches_are_those_of_the_whole_batch(folder, far, rollout, processor):
    """With a step size of 0 the parts are those of one update: means over all tokens, the mean of
    the losses, of which each has a denominator of its own."""
    reference = Qwen2VL.from_pretrained(far)
    (one, two) = (ours(folder, rollout, processor, keys(beta=0.3, minibatches=n), ADV, reference,
                       lr=0.0)[1] for n in (1, 2))  # fmt: skip
    norms = [k for k in one if k.startswith("grad_norm")]
    for name in one.keys() - set(norms):
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
    assert all(two[name] > 0 for name in norms)


def test_a_minibatch_that_is_not_finite_is_skipped_alone(folder, rollout, processor):
    """The prompts 1 and 3 are the second minibatch; the first has had its step."""
    adv = ADV.clone()
    adv[1, 0] = math.inf
    seen, found, _ = ours(folder, rollout, processor, keys(minibatches=2), adv)
    plain, _, _ = ours(folder, rollout, processor, keys(minibatches=2))
    assert (found["skipped"], found["grad_norm"], len(seen)) == (1, None, 1)
    assert distance(seen[0], plain[0]) == 0


def test_a_batch_of_text_alone_trains_and_leaves_the_vision_tower(folder, processor):
    prompts = [processor.prompt(Example(text, "1")) for text in ("one", "two red cubes")]
    rollout = as_rollout(prompts, [[[7, 8], [9]], [[10], [11, 12, 13]]])
    adv, cfg = torch.tensor([[1.0, -1.0], [0.5, -0.5]]), keys()
    (seen,), found, _ = ours(folder, rollout, processor, cfg, adv)
    assert found["grad_norm"] > 0.01
    assert not any(name.startswith("visual") for name in seen)


@pytest.mark.parametrize("fault", ["images swapped", "labels shifted", "sign", "groups swapped"])
def test_the_comparison_sees_what_must_not_happen(fault, folder, rollout, processor):
    """The twin with a fault of our peers gives another gradient, a thousand tolerances away."""
    cfg, adv, prompts = keys(), ADV, list(rollout.prompts)
    (seen,), _, _ = ours(folder, rollout, processor, cfg)
    wrong = replace(rollout, prompts=prompts)
    if fault == "images swapped":  # two pictures of one size, as in R1-V with a batch of 2
        a, b = prompts[:2]
        prompts[:2] = replace(a, patches=b.patches), replace(b, patches=a.patches)
    elif fault == "labels shifted":
        wrong.ids = rollout.ids.roll(1, -1)
    elif fault == "sign":
        adv = -ADV
    else:
        adv = ADV[[1, 0, 2, 3]]
    (expected,), _ = twin(folder, wrong, processor, cfg, adv)
    assert distance(seen, expected) > 1e-2


# --------------------------------------------------------------------------- what a step amounts to


def test_on_policy_the_gradient_is_the_policy_gradient(folder, rollout, processor):
    """d loss = - sum_i,t w_it A_i d logp_it, although the loss is - sum w A, here - sum A / N = 0:
    a loss of 0 says nothing about whether there is something to learn."""
    adv = group_advantages(column([1, 2, 3], [0, 1, 1], [5, 1, 0], [1, 0, 0]))
    (seen,), found, _ = ours(folder, rollout, processor, keys(), adv)
    assert found["loss"] == pytest.approx(0, abs=1e-6)
    assert found["grad_norm"] > 0.1
    model = Qwen2VL.from_pretrained(folder)
    logp, _ = score(model, rollout, 0.7, processor.banned_ids)
    weights = rollout.mask / rollout.lengths[..., None] / 12
    (-(weights * adv[..., None] * logp).sum()).backward()
    expected = {hub_name(n): p.grad for n, p in model.named_parameters()}
    assert distance(seen, expected) < 1e-5


def test_after_a_step_the_better_completions_are_likelier_and_the_worse_rarer(
    folder, rollout, processor
):
    """The sign of the loss, seen from outside: d log pi(o_i) has the sign of A_i."""
    adv = torch.tensor([[1.0, -1.0, 0.0]] * 4)
    _, _, weights = ours(folder, rollout, processor, keys(), adv, lr=0.02)
    model = Qwen2VL.from_pretrained(folder)
    with torch.no_grad():
        before = score(model, rollout, 0.7, processor.banned_ids)[0].sum(-1)
        model.load_state_dict({**dict(model.state_dict()), **weights})
        after = score(model, rollout, 0.7, processor.banned_ids)[0].sum(-1)
    assert ((after - before)[:, 0] > 0).all()
    assert ((after - before)[:, 1] < 0).all()


def test_one_update_is_the_first_of_two(folder, rollout, processor):
    """With one update the old log-probs are the current ones, so no pass is made for them."""
    (one,), _, _ = ours(folder, rollout, processor, keys())
    two, _, _ = ours(folder, rollout, processor, keys(updates_per_batch=2))
    assert distance(one, two[0]) < 1e-6
    assert distance(one, two[1]) > 1e-2


def test_a_group_without_advantage_changes_nothing(folder, rollout, processor):
    (seen,), found, _ = ours(folder, rollout, processor, keys(), torch.zeros(4, 3))
    assert all(not g.any() for g in seen.values())
    assert (found["loss"], found["grad_norm"]) == (0, 0)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(updates, folder, rollout, processor):
    adv = ADV.clone()
    adv[2, 1] = math.inf
    model = Qwen2VL.from_pretrained(folder)
    optimizers = make_optimizers(model, "muon", 1e-2)
    before = copy.deepcopy(model.state_dict())
    cfg = keys(updates_per_batch=updates)
    found = update(model, None, optimizers, rollout, adv, processor.banned_ids, cfg)
    assert (found["skipped"], found["grad_norm"]) == (updates, None)
    assert not math.isfinite(found["loss"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(o.state for o in optimizers)
    found = update(model, None, optimizers, rollout, ADV, processor.banned_ids, cfg)
    assert found["skipped"] == 0  # nothing of the bad step is left
    assert all(v.isfinite().all() for v in model.state_dict().values())


def test_a_weight_that_is_nan_is_not_spread_to_the_others(folder, rollout, processor):
    model = Qwen2VL.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = NAN
    sgd = Record(model, 1.0)
    found = update(model, None, [sgd], rollout, ADV, processor.banned_ids, keys())
    assert (found["skipped"], sgd.seen) == (1, [])
    assert sum(int(v.isnan().sum()) for v in model.state_dict().values()) == 1


def test_the_gradient_norm_is_told_before_it_is_clipped(folder, rollout, processor):
    (free,), full, _ = ours(folder, rollout, processor, keys())
    (held,), found, _ = ours(folder, rollout, processor, keys(max_grad_norm=0.5))
    norm = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    assert full["grad_norm"] == found["grad_norm"] == pytest.approx(norm, rel=1e-5)
    kept = math.sqrt(sum(float(g.square().sum()) for g in held.values()))
    assert norm > 0.5 and kept == pytest.approx(0.5, rel=1e-4)


def test_entropy_and_mismatch_are_means_over_the_tokens_of_the_step(folder, rollout, processor):
    """mismatch: mean of exp|logp_sampler - logp|, 1 where they are one; e where all are 1 apart."""
    with torch.no_grad():
        model = Qwen2VL.from_pretrained(folder)
        _, entropy = score(model, rollout, 0.7, processor.banned_ids)
    for micro in (1, 4):
        _, found, _ = ours(folder, rollout, processor, keys(micro_prompts=micro))
        assert found["entropy"] == pytest.approx(entropy[rollout.mask].mean().item(), rel=1e-5)
        assert found["mismatch"] == pytest.approx(1, abs=1e-5)
        off = replace(rollout, logp=rollout.logp - 1)
        _, found, _ = ours(folder, off, processor, keys(micro_prompts=micro))
        assert found["mismatch"] == pytest.approx(math.e, rel=1e-4)


def test_bfloat16_updates_are_near_the_twin_and_see_each_others_steps(folder, rollout, processor):
    """autocast would keep the weights of the first update for the second: its ratios would be 1 and
    nothing would ever be clipped."""
    cfg = keys(updates_per_batch=2, micro_prompts=2)
    expected, naive = twin(folder, rollout, processor, cfg)
    with torch.autocast("cpu", torch.bfloat16):
        seen, found, weights = ours(folder, rollout, processor, cfg)
    assert {p.dtype for p in weights.values()} == {torch.float32}
    for step in (0, 1):
        both = (seen[step], expected[step])
        a, b = (torch.cat([x[k].flatten() for k in sorted(x)]) for x in both)
        assert torch.cosine_similarity(a, b, dim=0) > 0.97
    assert found["clip_share"] > naive["clip_share"] / 2


# ------------------------------------------------------------------------------------- the samples


def half_dull(text: str, example: Example) -> float:
    """A number made of the text; always 0.5 where the example is dull."""
    return 0.5 if example.task == "dull" else sum(map(ord, text)) % 97 / 97


MIXED = [Example(f"Question {i}?", "1", task="dull" if i % 3 == 1 else "") for i in range(12)]


def batch_of(qwen, processor, examples, drawn=0, **changes):
    cfg = keys(prompts=6, **changes)
    ahead = Ahead(processor, examples)
    return sample_batch(qwen, ahead, [("half_dull", half_dull, 1.0)], drawn, cfg)


def is_dull(rollout: Rollout) -> list[bool]:
    return [p.example.task == "dull" for p in rollout.prompts]


def test_prompts_come_in_the_order_of_the_data(qwen, processor):
    """Batch after batch through the epoch; a batch depends on its place in it, not on history."""
    at = draw_rows(12, seed=0, start=0, count=24)
    for drawn in (0, 6, 9, 18):
        rollout, table, now = batch_of(qwen, processor, MIXED, drawn)
        assert [p.example for p in rollout.prompts] == [MIXED[i] for i in at[drawn : drawn + 6]]
        assert (table.shape, now) == ((1, 6, 3), drawn + 6)


def test_a_row_gets_other_samples_each_time_and_with_each_seed(qwen, processor):
    """One row, so that its order says nothing: epoch 1, epoch 2, and epoch 1 of another seed."""
    def texts(drawn, seed=0):
        ahead = Ahead(processor, MIXED[:1])
        return sample_groups(qwen, ahead, drawn, 1, keys(seed=seed)).texts[0]

    assert texts(0) == texts(0)
    assert not set(texts(0)) & set(texts(1))
    assert not set(texts(0)) & set(texts(0, seed=1))
    assert len(set(texts(0))) == 3  # nor are those of a group alike


def test_a_prompt_that_is_too_long_is_refused_with_its_row(qwen, processor):
    examples = [Example("many words " * 50, "1", row="train.jsonl:7")]
    with pytest.raises(ValueError, match=r"train\.jsonl:7: the prompt has .* at most 60"):
        sample_groups(qwen, Ahead(processor, examples, max_prompt=60), 0, 1, keys())


def test_dynamic_sampling_replaces_groups_without_signal_and_keeps_the_others(qwen, processor):
    """DAPO: the dull prompts make way for the next of the data, in place; what had signal stays."""
    plain, old, _ = batch_of(qwen, processor, MIXED)
    dull = [b for b, x in enumerate(is_dull(plain)) if x]
    assert 0 < len(dull) < 6
    found, table, drawn = batch_of(qwen, processor, MIXED, dynamic_sampling=1)
    at = draw_rows(12, seed=0, start=6, count=len(dull))
    fresh = sample_groups(qwen, Ahead(processor, MIXED), 6, len(dull), keys())
    assert drawn == 6 + len(dull)
    assert [found.prompts[b].example for b in dull] == [MIXED[i] for i in at]
    for b in range(6):
        source, i = (fresh, dull.index(b)) if b in dull else (plain, b)
        assert found.texts[b] == source.texts[i]
        for name in ("ids", "lengths", "logp", "finished"):
            assert torch.equal(getattr(found, name)[b], getattr(source, name)[i]), name
        if b not in dull:
            assert torch.equal(table[:, b], old[:, b])
        if found.prompts[b].example.task == "dull":
            assert (table[0, b] == 0.5).all()
        else:
            expected = [half_dull(t, found.prompts[b].example) for t in found.texts[b]]
            assert close(table[0, b], expected)


def test_dynamic_sampling_goes_on_until_all_groups_have_signal(qwen, processor):
    rollout, table, drawn = batch_of(qwen, processor, MIXED, dynamic_sampling=20)
    assert not any(is_dull(rollout))
    assert has_signal(table[0]).all()
    assert 6 < drawn < 30


def test_dynamic_sampling_gives_up_after_its_number_of_tries(qwen, processor):
    """With nothing but dull prompts: 6 drawn, and 6 more for each try."""
    dull = [replace(e, task="dull") for e in MIXED]
    for tries in (0, 1, 3):
        rollout, _, drawn = batch_of(qwen, processor, dull, dynamic_sampling=tries)
        assert (drawn, len(rollout.prompts)) == (6 + 6 * tries, 6)


def test_a_replaced_batch_trains_like_any_other(qwen, folder, processor):
    """Its log-probs belong to its tokens: sampler and trainer agree."""
    rollout, table, _ = batch_of(qwen, processor, EXAMPLES + MIXED, dynamic_sampling=3)
    adv = group_advantages(table[0])
    cfg = keys(updates_per_batch=1)
    _, found, _ = ours(folder, rollout, processor, cfg, adv)
    assert found["mismatch"] == pytest.approx(1, abs=1e-4)
    assert found["grad_norm"] > 0.01


# ---------------------------------------------------------------------------------------- it learns

REWARD_FILE = """
def lower(text, example):
    '''Share of the characters that are small letters.'''
    return sum("a" <= c <= "z" for c in text) / max(1, len(text))
"""


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARD_FILE)
    return f"{path}:lower"


def learn(folder, processor, reward_file, weight=1.0, steps=25, **changes) -> list[float]:
    """The loop of train() without its files: the mean of the unweighted reward at each step."""
    cfg = keys(prompts=4, group=8, max_new=6, temperature=1.0, max_grad_norm=1.0, **changes)
    rewards = load_rewards((reward_file,), (weight,))
    policy = Qwen2VL.from_pretrained(folder)
    reference = Qwen2VL.from_pretrained(folder) if cfg.beta else None
    optimizers = make_optimizers(policy, cfg.optimizer, 3e-3)
    ahead, means, drawn = Ahead(processor, EXAMPLES), [], 0
    for _ in range(steps):
        rollout, table, drawn = sample_batch(policy, ahead, rewards, drawn, cfg)
        adv = advantages(rollout, table, rewards, cfg)
        update(policy, reference, optimizers, rollout, adv, processor.banned_ids, cfg)
        means.append(float(table.nanmean()))
    return means


VARIANTS = {
    "GRPO": {},
    "DAPO": {"mean": "token", "clip_high": 0.28, "dynamic_sampling": 1, "updates_per_batch": 2},
    "Dr. GRPO": {"mean": "constant", "advantage": "center"},
    "GSPO": {"ratio": "sequence", "updates_per_batch": 2},
    "RLOO": {"advantage": "loo", "mean": "token"},
    "REINFORCE++": {"advantage": "baseline", "kl": "reward", "beta": 0.01, "mean": "token",
                    "minibatches": 2},
    "with KL": {"beta": 0.01},
    "Muon": {"optimizer": "muon"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns(name, folder, processor, reward_file):
    means = learn(folder, processor, reward_file, **VARIANTS[name])
    assert np.mean(means[-5:]) > np.mean(means[:5]) + 0.2, means


def test_with_the_sign_of_the_reward_turned_it_learns_the_opposite(folder, processor, reward_file):
    means = learn(folder, processor, reward_file, weight=-1.0)
    assert np.mean(means[-5:]) < np.mean(means[:5]) - 0.2, means


# ----------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """train.jsonl, with pictures of unequal size and a row without one, and test.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        Image.fromarray(picture(i, 56 + 28 * (i % 2), 84)).save(folder / f"{i}.png")
    for name, n in (("train", 6), ("test", 3)):
        lines = [{"problem": f"How many {i}?", "solution": str(i)} for i in range(n)]
        for i in range(n - 1):
            lines[i]["images"] = [f"{i}.png"]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def run_keys(folder, rows, reward_file):
    """Of a run of 2 steps with everything on; the test adds `out`."""
    return {
        "model": str(folder), "data": f"{rows}/train.jsonl", "evals": (f"A={rows}/test.jsonl",),
        "rewards": (reward_file, "format"), "reward_weights": (1.0, 0.5), "steps": 2, "prompts": 3,
        "group": 4, "max_new": 6, "micro_prompts": 2, "beta": 0.1, "lr": 1e-3, "probes": 2,
        "probe_every": 1, "template": "{Question}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(run_keys, tmp_path_factory):
    """(folder of a finished run, what train() returned)."""
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, train(Config(**run_keys, out=str(out)))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_in(folder: Path) -> dict[str, Tensor]:
    return Qwen2VL.from_pretrained(folder).state_dict()


def without_times(row: dict) -> dict:
    timed = ("seconds", "time/", "samples_per", "tokens_per", "memory_gb")
    return {k: v for k, v in row.items() if not k.startswith(timed)}


def test_workers_that_prepare_prompts_change_nothing(finished, run_keys, tmp_path):
    """Also where dynamic sampling asks for other prompts than were expected."""
    out, _ = finished
    for name, changes in [("a", {}), ("b", {"dynamic_sampling": 2})]:
        runs = [out] if name == "a" else []
        for workers in (0, 2)[len(runs) :]:
            runs.append(tmp_path / f"{name}{workers}")
            train(Config(**{**run_keys, **changes, "workers": workers}, out=str(runs[-1])))
        first, second = ([without_times(r) for r in lines_of(x / "metrics.jsonl")] for x in runs)
        assert first == second


def test_template_system_prompt_and_pixels_of_a_run_reach_its_prompts(run_keys, tmp_path):
    changes = {"template": "{Question} {Image}!", "system": "Be short.", "max_pixels": 3136}
    train(Config(**{**run_keys, **changes, "steps": 1}, out=str(tmp_path / "run")))
    (prompt, *_) = [row["prompt"] for row in lines_of(tmp_path / "run" / "rollouts.jsonl")]
    assert "<|im_start|>system\nBe short.<|im_end|>" in prompt
    assert prompt.endswith("<|vision_end|>!<|im_end|>\n<|im_start|>assistant\n")
    saved = Processor.from_pretrained(tmp_path / "run" / "step_000001")
    assert saved.settings["max_pixels"] == 3136


def test_a_run_leaves_its_files(finished, run_keys):
    out, summary = finished
    names = {p.name for p in out.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "rollouts.jsonl", "probes.jsonl", "summary.json",
        "report.html", "images", "eval", "step_000002", "run.lock",
    }  # fmt: skip
    assert {p.name for p in (out / "eval").iterdir()} == {"A_before.json", "A_after.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["group"] == 4 and config["rewards"] == list(run_keys["rewards"])
    assert config["clip_low"] == 0.2  # defaults too
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (summary["steps"], summary["seed"], summary["before"]["A"]["n"]) == (2, 0, 3)


def test_a_run_logs_every_step(finished):
    out, _ = finished
    one, two = lines_of(out / "metrics.jsonl")
    assert (one["step"], two["step"]) == (1, 2)
    assert (one["drawn"], two["drawn"]) == (3, 6)
    assert (one["lr"], two["lr"]) == pytest.approx((1e-3, 0.5e-3))
    assert one["kl"] == pytest.approx(0, abs=1e-6) and two["kl"] > 1e-5
    assert one["mismatch"] == pytest.approx(1, abs=1e-4) == two["mismatch"]
    assert one["skipped"] == two["skipped"] == 0
    assert one["reward"] == pytest.approx(one["reward/lower"] + 0.5 * one["reward/format"])
    assert 1 <= one["length/min"] <= one["length/mean"] <= one["length/max"] <= 6
    assert two["seconds"] > one["seconds"] > 0 and one["grad_norm"] > 0


def test_a_run_logs_samples_with_their_pictures(finished, rows):
    out, _ = finished
    logged = lines_of(out / "rollouts.jsonl")
    assert [row["step"] for row in logged] == [1, 1, 1, 2, 2, 2]
    assert sorted(row["problem"] for row in logged) == [f"How many {i}?" for i in range(6)]
    for row in logged:
        i = int(row["solution"])
        assert row["row"] == f"train.jsonl:{i + 1}" and row["problem"] in row["prompt"]
        assert len(row["images"]) == (i < 5)
        for name in row["images"]:  # each question has its own picture
            shown = np.asarray(Image.open(out / name))
            assert np.array_equal(shown, np.asarray(Image.open(rows / f"{i}.png")))
        rewards = [c["rewards"]["lower"] + 0.5 * c["rewards"]["format"] for c in row["completions"]]
        assert [c["reward"] for c in row["completions"]] == pytest.approx(rewards)
        adv = group_advantages(column(rewards))[0].tolist()
        assert [c["advantage"] for c in row["completions"]] == pytest.approx(adv, abs=1e-3)


def test_a_run_follows_the_same_questions(finished):
    out, _ = finished
    logged = lines_of(out / "probes.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2]
    for row in logged:
        assert [a["problem"] for a in row["answers"]] == ["How many 0?", "How many 1?"]
        assert all((out / name).is_file() for a in row["answers"] for name in a["images"])


def test_transformers_loads_the_checkpoint_and_gives_the_same_log_probs(finished, rollout):
    out, _ = finished
    saved = out / "step_000002"
    processor, model = Processor.from_pretrained(saved), Qwen2VL.from_pretrained(saved)
    with torch.no_grad():
        logp = score(model, rollout, 1.0, processor.banned_ids)[0][rollout.mask]
        naive = torch.cat(naive_logp(hf_model(saved), rollout, processor, 1.0))
    assert (logp - naive).abs().max() < 1e-4


def test_a_run_changed_the_weights_it_was_given(finished, folder):
    out, _ = finished
    before, after = weights_in(folder), weights_in(out / "step_000002")
    moved = [k for k in after if not torch.equal(after[k], before[k])]
    assert len(moved) > 0.9 * len(after)
    assert all(v.isfinite().all() for v in after.values())


def test_a_second_run_gets_a_folder_of_its_own_and_a_seed_fixes_everything(
    finished, run_keys, capsys
):
    out, _ = finished
    train(Config(**run_keys, out=str(out)))
    second = out.with_name("first_2")
    assert f"this one goes to {second}" in capsys.readouterr().err
    for name in ("metrics.jsonl", "rollouts.jsonl", "probes.jsonl"):
        old, new = (list(map(without_times, lines_of(f / name))) for f in (out, second))
        assert old == new, name
    old, new = weights_in(out / "step_000002"), weights_in(second / "step_000002")
    assert all(torch.equal(new[k], old[k]) for k in old)


def test_another_seed_gives_another_run(finished, run_keys, tmp_path):
    train(Config(**{**run_keys, "steps": 1, "evals": (), "probes": 0, "seed": 1},
                 out=str(tmp_path / "run")))
    one, other = (lines_of(f / "metrics.jsonl")[0] for f in (finished[0], tmp_path / "run"))
    assert one["reward"] != other["reward"]


def test_without_beta_no_reference_is_loaded(run_keys, tmp_path, monkeypatch):
    loads, load = [], Qwen2VL.from_pretrained.__func__
    monkeypatch.setattr(Qwen2VL, "from_pretrained",
                        classmethod(lambda cls, *a, **k: loads.append(a) or load(cls, *a, **k)))
    changes = {"steps": 1, "evals": (), "probes": 0}
    for beta, models in ((0.0, 1), (0.1, 2)):
        loads.clear()
        out = str(tmp_path / str(beta))
        train(Config(**{**run_keys, **changes, "beta": beta}, out=out))
        assert len(loads) == models


def test_a_run_goes_on_from_the_newest_checkpoint_of_another(finished, run_keys, tmp_path):
    """And saves every save_every steps. So early in so long a warm-up it stays where it was."""
    changes = {"model": str(finished[0]), "warmup": 10**9, "evals": (), "save_every": 1}
    train(Config(**{**run_keys, **changes}, out=str(tmp_path / "run")))
    saved = sorted(p.name for p in (tmp_path / "run").glob("step_*"))
    assert saved == ["step_000001", "step_000002"]
    old, new = weights_in(finished[0] / "step_000002"), weights_in(tmp_path / "run" / "step_000002")
    assert all(torch.allclose(new[k], old[k], rtol=0, atol=1e-10) for k in old)


def test_a_run_that_only_skips_stops_and_says_what_to_try(run_keys, folder, tmp_path):
    """With a reward of size 1e37 the loss is finite, and the norm of the gradient is not."""
    changes = {"reward_weights": (1e37, 1.0), "advantage": "center", "evals": (), "steps": 9}
    cfg = Config(**{**run_keys, **changes}, out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match="step 5: no finite update in 5 steps"):
        train(cfg)
    logged = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert all(row["skipped"] == 1 and math.isfinite(row["loss"]) for row in logged)
    assert not list((tmp_path / "run").glob("step_*"))


MISTAKES = [
    (["--group", "1"], "group 1"),
    (["--evals", "world:A:n=5"], "is not NAME=SOURCE"),
    (["--evals", "A=world:A:n=5,test.jsonl"], "'test.jsonl' is not NAME=SOURCE"),
    (["--advantage", "grup"], "advantage"),
    (["--beta", "-0.1"], "beta"),
    (["--temperature", "0"], "temperature"),
    (["--grupo", "4"], "group"),
    (["--micro_prompts", "0"], "micro_prompts"),
    (["--minibatches", "3"], "prompts 16: must be a multiple of minibatches 3"),
    (["--least_right", "0.9", "--most_right", "0.1"], "least_right 0.9: is above most_right 0.1"),
    (["--ratio_cap", "1.1"], "ratio_cap 1.1: must be above 1 + clip_high 0.2"),
    (["--kl", "reward", "--beta", "0"], "with beta 0 there is no KL"),
    (["--kl", "rewards"], "kl"),
]


@pytest.mark.parametrize(("argv", "told"), MISTAKES)
def test_mistakes_in_the_config_are_refused(argv, told, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, argv)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_a_weight_for_each_reward_or_none_at_all(run_keys, tmp_path):
    """Refused before anything is written; without weights each reward counts 1."""
    cfg = Config(**{**run_keys, "reward_weights": (1.0, 1.0, 1.0)}, out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match=r"error: reward weights: 3 for \d rewards"):
        train(cfg)
    assert not (tmp_path / "run").exists()
    found = load_rewards(("accuracy", "format"), Config().reward_weights)
    assert [weight for _, _, weight in found] == [1, 1]


def test_a_prompt_that_is_too_long_is_refused_at_the_start(run_keys, tmp_path):
    cfg = Config(**{**run_keys, "max_prompt": 5}, out=str(tmp_path / "run"))
    with pytest.raises(SystemExit, match=r"error: .* rows have more than 5 tokens.*:1 with \d+"):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_rows_that_the_rewards_cannot_score_are_refused_at_the_start(run_keys, tmp_path):
    cfg = Config(**{**run_keys, "rewards": ("iou",), "reward_weights": ()}, out=f"{tmp_path}/run")
    with pytest.raises(SystemExit, match="error: 6 of 6 rows do not fit the rewards"):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_the_frames_of_a_run_reach_its_rewards(run_keys, tmp_path, monkeypatch):
    """Of the model and of the rows: what processor.prompt tells."""
    seen = []
    monkeypatch.setattr(grpo, "reward_table",
                        lambda rollout, rewards: seen.extend(p.example.view for p in
                                                             rollout.prompts)
                        or reward_table(rollout, rewards))  # fmt: skip
    changes = {"frame": "resized", "gold_frame": "0-1000", "steps": 1, "evals": (), "probes": 0}
    train(Config(**{**run_keys, **changes}, out=str(tmp_path / "run")))
    assert {(view.frame, view.gold) for view in seen} == {("resized", "0-1000")}


def test_the_defaults_and_several_evals_are_accepted():
    validate(Config())
    found = parse(Config, ["--evals", "A=world:A:n=5,B=b.jsonl"])
    assert found.evals == ("A=world:A:n=5", "B=b.jsonl")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--model", "nowhere"], "model nowhere: neither a checkpoint"),
        (["--rewards", "acuracy", "--reward_weights", "1"], "accuracy"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_main_tells_mistakes_in_one_line_and_leaves_no_folder(argv, told, folder, tmp_path):
    given = [] if "--model" in argv else ["--model", str(folder)]
    with pytest.raises(SystemExit, match="error: ") as stop:
        main([*given, *argv, "--out", str(tmp_path / "run")])
    assert told in str(stop.value)
    assert not (tmp_path / "run").exists()
