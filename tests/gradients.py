"""Several runs one after another in the same processes, which start but once, and their gradients.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/gradients.py runs.json

runs.json: [["grpo" or "sft", [words of the command line]], ...]
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpo
import optim
import parallel
import sft
from config import parse


def run(program: str, words: list[str]) -> None:
    """One run; the whole gradients of its steps go to OUT.gradients, and how far the weights of a
    parallel.copy are from those of the model, rounded as they are, at each."""
    module, seen = {"grpo": grpo, "sft": sft}[program], {}
    cfg = parse(module.Config, words)

    def watched(model, *rest):
        copied = parallel.copy(model).state_dict()
        whole = {name: parallel.full(p) for name, p in model.state_dict().items()}
        for name, p in copied.items():
            wanted, layer = whole[name], name.removesuffix(".weight")
            if f"{layer}.lora_A" in whole:
                wanted = wanted + model.adapter.scale * (
                    whole[f"{layer}.lora_B"] @ whole[f"{layer}.lora_A"])
            far = p - wanted.to(p.dtype)
            seen[f"copy {len(steps)} {name}"] = (far.abs() > 1e-7 * ("lora" in cfg.out)).sum()
        for name, p in model.named_parameters():
            if p.grad is not None:
                seen[f"{len(steps)} {name}"] = parallel.full(p.grad).clone()
        steps.append(1)
        return optim.apply_gradients(model, *rest)

    steps, module.apply_gradients = [], watched
    try:
        module.train(cfg)
    finally:
        module.apply_gradients = optim.apply_gradients
    if parallel.rank() == 0:
        save_file(seen, f"{cfg.out}.gradients")


if __name__ == "__main__":
    with parallel.together():
        for line in json.loads(Path(sys.argv[1]).read_text()):
            run(*line)
