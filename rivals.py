"""A GRPO step, ours and that of a naive twin, as bench.py times it: in phases, from outside.

    run = setup(cfg)                       # what both share; cfg: bench.Config
    Ours(run).step(0), Twin(run).step(0)   # {phase: seconds}

Ours is what grpo.train calls: parallel.copy, rollout.sample, tally.reward_table, grpo.update. The
twin is transformers' Qwen2-VL with prompt and picture repeated G times, its generate, and the
logits of all tokens (bench/twin.py); tests/test_rivals.py proves that it computes the same
log-probs, loss and gradient. Both start from the same weights, see the same prompts, draw from the
same distribution, and every completion has exactly max_new tokens.

Letters: B prompts, G completions per prompt, N = B G completions, T tokens of each.
"""

import importlib.util
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import estimators
import grpo
import parallel
import rollout
from data import Processor
from grading import load_rewards
from journal import write_json
from live import keep_memory
from machine import Phases
from model import Qwen2VL
from optim import make_optimizers
from rows import load_examples
from sampling import Room
from standin import rebound, unending
from tally import reward_table, total_reward

HERE = Path(__file__).resolve().parent
PHASES = ("preprocess", "prefill", "decode", "reward", "reference", "forward/backward", "optimizer")


# --------------------------------------------------------------------------------- what both share


def setup(cfg) -> SimpleNamespace:
    """Rows, rewards, and a processor whose end tokens are banned, so that no completion ends before
    max_new. ValueError for too few rows."""
    keep_memory()  # as every run does
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    processor = unending(Processor.from_pretrained(cfg.model, "r1v"))
    examples = load_examples(cfg.data, None, "train")
    if len(examples) < cfg.prompts:
        raise ValueError(f"{cfg.data}: {len(examples)} rows, --prompts {cfg.prompts} are needed")
    return SimpleNamespace(
        cfg=cfg, examples=[examples[i] for i in range(cfg.prompts)], processor=processor,
        banned=processor.banned_ids, rewards=load_rewards(("accuracy", "format")),
    )  # fmt: skip


def rewarded(run, batch: rollout.Rollout) -> Tensor:
    """Rewards (B, G) of the completions, all of which must have max_new tokens (RuntimeError)."""
    if not bool((batch.lengths == run.cfg.max_new).all()):
        raise RuntimeError(f"completions end before {run.cfg.max_new} tokens")
    return total_reward(reward_table(batch, run.rewards), run.rewards)


def questions(run) -> list[str]:
    """The user's text of each prompt."""
    user = run.processor.template.user
    return [user.replace("{Question}", example.problem) for example in run.examples]


def picture(example) -> Image.Image:
    return Image.fromarray(np.asarray(example.images[0]))


# -------------------------------------------------------------------------------------------- ours


class Ours:
    """The project's own step; `step(round)` gives the seconds of its phases."""

    def __init__(self, run, bf16: bool = False):
        cfg = run.cfg
        self.run, self.half = run, partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
        self.policy = Qwen2VL.from_pretrained(cfg.model)
        low, load = torch.bfloat16 if bf16 else torch.float32, Qwen2VL.from_pretrained
        self.reference = load(cfg.model).frozen(low) if cfg.beta else None
        self.optimizers = make_optimizers(self.policy, "adamw", cfg.lr)
        self.grpo = grpo.Config(
            prompts=cfg.prompts, group=cfg.group, max_new=cfg.max_new, beta=cfg.beta, lr=cfg.lr,
            temperature=cfg.temperature, micro_prompts=cfg.micro_prompts,
        )  # fmt: skip

    def step(self, seed: int) -> dict[str, float]:
        run, cfg, phases = self.run, self.run.cfg, Phases("cpu")
        with timed(phases, self.reference):
            with phases("preprocess"):
                prompts = [run.processor.prompt(example) for example in run.examples]
            with self.half(), phases("decode"):
                batch = rollout.sample(parallel.copy(self.policy), run.processor, prompts,
                                       cfg.group, cfg.max_new, cfg.temperature, seed)  # fmt: skip
            with phases("reward"):
                adv = estimators.group_advantages(rewarded(run, batch))
            with self.half(), phases("forward/backward"):
                grpo.update(self.policy, self.reference, self.optimizers, batch, adv, run.banned,
                            self.grpo)  # fmt: skip
        return dict(phases.seconds)


@contextmanager
def timed(phases: Phases, reference):
    """Inside, the parts of sampling and of the update are phases; then the names are as before."""

    def scored(model):
        return "reference" if model is reference else "forward/backward"

    places = ((Room, "enter", "prefill"), (grpo, "score", scored),
              (grpo, "apply_gradients", "optimizer"))  # fmt: skip
    with ExitStack() as stack:
        for owner, name, phase in places:
            function = phases.of(getattr(owner, name), phase)
            stack.enter_context(rebound(owner, **{name: function}))
        yield


# ---------------------------------------------------------------------------------------- the twin


def load_twin():
    """bench/twin.py as a module. It needs transformers, which no file of the project does."""
    found = importlib.util.spec_from_file_location("twin", HERE / "bench" / "twin.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class Twin:
    """The same step by bench/twin.py. Its micro-batches have as many completions as ours."""

    def __init__(self, run):
        self.run, self.twin, folder = run, load_twin(), run.cfg.model
        self.processor = self.twin.load_processor(folder)
        self.policy = self.twin.load_model(folder)
        load = self.twin.load_model
        self.reference = load(folder).requires_grad_(False) if run.cfg.beta else None
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), run.cfg.lr, weight_decay=0.0)
        self.texts = questions(run)
        self.pictures = [picture(example) for example in run.examples]
        inputs, group = self.prepare(), run.cfg.group
        rows = zip(inputs["input_ids"][::group], inputs["attention_mask"][::group].bool())
        for example, (ids, real) in zip(run.examples, rows):
            if not torch.equal(ids[real], run.processor.prompt(example).ids):
                raise ValueError(f"{example.row}: transformers makes other tokens of its prompt")

    def prepare(self) -> dict[str, Tensor]:
        return self.twin.prepare(self.processor, self.texts, self.pictures, self.run.cfg.group)

    def step(self, seed: int) -> dict[str, float]:
        run, cfg, phases = self.run, self.run.cfg, Phases("cpu")
        torch.manual_seed(seed)
        with phases("preprocess"):
            inputs = self.prepare()
        with phases("decode"):
            ids = self.twin.generate(self.policy, inputs, cfg.max_new, cfg.temperature, run.banned,
                                     phases("prefill"))  # fmt: skip
            texts = [run.processor.decode(row) for row in ids.tolist()]
        with phases("reward"):
            adv = self.twin.advantages(rewarded(run, as_batch(run, ids, texts)))
        with phases("forward/backward"):
            self.gradient(inputs, ids, adv, phases)
        with phases("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), grpo.Config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return dict(phases.seconds)

    def gradient(self, inputs: dict, ids: Tensor, adv: Tensor, phases) -> float:
        """Adds the gradient of the step's loss to that of the policy; the loss."""
        cfg, size, total = self.run.cfg, self.run.cfg.micro_prompts * self.run.cfg.group, 0.0
        for start in range(0, len(ids), size):
            rows, ref = slice(start, min(start + size, len(ids))), None
            given = (self.twin.rows_of(inputs, rows), ids[rows], cfg.temperature, self.run.banned)
            if self.reference:
                with phases("reference"), torch.no_grad():
                    ref = self.twin.logps(self.reference, *given)
            logp = self.twin.logps(self.policy, *given)
            loss = self.twin.loss(logp, ref, adv[rows], cfg.beta) / ids.numel()
            loss.backward()
            total += float(loss.detach())
        return total


def as_batch(run, ids: Tensor, texts: list[str]) -> rollout.Rollout:
    """Completions ids (N, T) of the run's rows, as far as rewards ask for them."""
    shape, group = (len(run.examples), run.cfg.group), run.cfg.group
    prompts = [SimpleNamespace(example=example) for example in run.examples]
    lengths = torch.full(shape, ids.shape[1])
    rows = [texts[i : i + group] for i in range(0, len(texts), group)]
    ids = ids.view(*shape, -1)
    return rollout.Rollout(prompts, ids, lengths, torch.zeros(ids.shape), lengths < 0, rows)


# ------------------------------------------------------------------------------- others, by a file


def write_inputs(run, folder: Path) -> None:
    """What a peer reads: settings.json, with prompts and their tokens, and pictures as PNG."""
    cfg, prompts = run.cfg, []
    for i, (example, text) in enumerate(zip(run.examples, questions(run))):
        picture(example).save(folder / f"{i}.png")
        ids = run.processor.prompt(example).ids.tolist()
        prompts.append({"image": f"{i}.png", "text": text, "ids": ids,
                        "solution": example.solution})  # fmt: skip
    keys = ("group", "max_new", "temperature", "beta", "lr", "seed")
    write_json({
        "checkpoint": str(Path(cfg.model).resolve()), "prompts": prompts, "banned": run.banned,
        "max_grad_norm": grpo.Config.max_grad_norm, "threads": torch.get_num_threads(),
        **{key: getattr(cfg, key) for key in keys},
    }, folder / "settings.json")  # fmt: skip


KINDS = {"ours": Ours, "ours, bfloat16": partial(Ours, bf16=True), "twin": Twin}
