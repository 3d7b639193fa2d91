"""The third tiny checkpoint: it answers one counting question in four forms, all of them badly.

    python tiny_forms.py --out tiny_forms     # `make tiny_forms`; about 6 minutes

From it start the runs of `make field`. Eye, tokenizer and decoder of tiny/ are taken over; with the
eye frozen the decoder learns what a teacher answers to the questions of forms.py: open ones, with
four numbers to choose from, "is it 4?", and about scenes in words without a picture. He overlooks
each small object with probability 0.22, in pictures and in words, and often forgets the format: the
weakness is the same in all forms, so that what one form mends may be mended in another.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import opt, parse
from data import Processor
from model import Qwen2VL
from saving import save_checkpoint
from scenes import load_world
from sft import Config as SFTConfig
from sft import fit
from template import TEMPLATES
from tiny import begin, make

ASK = "open+open+open+pick+judge+read+read"  # how often each form is asked
DIRECT = 0.25  # share of the questions under the direct prompt, the others are under R1-V's


@dataclass(frozen=True)
class Config:
    """Keys of `python tiny_forms.py`."""

    out: str = opt("tiny_forms", "folder of the checkpoint")
    start: str = opt("tiny", "checkpoint that is taken over")
    seed: int = opt(0, "fixes everything", least=0)
    steps: int = opt(1200, "steps, 32 rows each", least=1)
    lr: float = opt(1.5e-3, "step size (Muon, cosine)", above=0)
    replace: bool = opt(False, "a folder that is there gives way once the new one is whole")


def rows(n: int, seed: int) -> list:
    """n Examples under their prompts, each with the flawed teacher's answer as its completion."""
    rng = np.random.default_rng((seed, 4))
    source = f"world:A:n={n}:seed={seed + 1}:objects=3-8:look=wild:ask={ASK}:teacher=flawed"
    found = []
    for example in load_world(source):
        template = TEMPLATES["direct" if rng.random() < DIRECT else "r1v"].user
        found.append(replace(example, problem=template.replace("{Question}", example.problem)))
    return found


def build(cfg: Config, work: Path) -> Path:
    """The instruct stage, in the folder `work`."""
    begin(work, cfg)
    model = Qwen2VL.from_pretrained(cfg.start)
    model.visual.requires_grad_(False)  # the teacher's flaw is in what is said, not in the eye
    processor = Processor.from_pretrained(cfg.start, "{Question}")
    stage = SFTConfig(steps=cfg.steps, batch=32, micro=32, optimizer="muon", lr=cfg.lr,
                      seed=cfg.seed, warmup=20)  # fmt: skip
    taught = fit(model, processor, rows(cfg.steps * 32, cfg.seed), stage, title="instruct")
    losses = [row["nll"] for row in taught]
    print(f"instruct: loss {losses[0]:.3f} -> {np.mean(losses[-50:]):.3f}")
    save_checkpoint(model, processor, work / "whole")
    return work / "whole"


def main(argv=None) -> None:
    make(parse(Config, argv, __doc__), build)


if __name__ == "__main__":
    main()
