"""What of a model learns: all of it, some parts, or a few factors beside the weights (LoRA).

    python grpo.py recipes/vlm_r1_rec_lora.toml                 # --lora 64 --lora_alpha 128 ...
    python grpo.py recipes/tiny.toml --freeze vision,merger
    python lora.py merge runs/grpo/step_000100 --out merged     # a plain Hugging Face checkpoint

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685),
equation 3: h = W x + (alpha / r) B A x with W (out, in) frozen, A (r, in) and B (out, r), B = 0 at
the start. What the paper leaves open is as in PEFT: A is uniform in +-1/sqrt(in), dropout is of x.

What we do differently: the reference of the KL is the policy with its adapter off, so there is no
second model. Dropout's random numbers are drawn from (seed, step, process): a run keeps no random
state, and one that goes on is one that was not ended. It is applied where there is a gradient, that
is never to samples, references and old log-probs. On a GPU samples are drawn from a copy with B A
added to W (parallel.copy): added in float32 and rounded once, which in bfloat16 is why `mismatch`
is not exactly 1. The head and the embedding have no adapter.
"""

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import adapter
from checkpoint import checkpoint_folder, like, save_weights
from model import Qwen2VL

PARTS = ("vision", "merger", "language")


def part_of(name: str) -> str:
    """The part of the model that a weight belongs to: vision, merger or language."""
    inner = "merger" if "merger." in name else "vision"
    return inner if name.startswith("visual.") else "language"


# --------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Learns:
    """What of a model learns. Rank 0: all weights of the parts that are not in `freeze`. Else, in
    these parts, and of the two of vision only if asked, the factors of each linear layer whose name
    is, or ends in, one of `targets` (none: of all but the head), and no other weight."""

    freeze: tuple[str, ...] = ()
    rank: int = 0
    alpha: float | None = None  # default: twice the rank
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    vision: bool = False

    @classmethod
    def of(cls, cfg) -> "Learns":
        """By the keys of a run. ValueError where nothing would learn, or a key do nothing."""
        found = cls(cfg.freeze, cfg.lora, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets,
                    cfg.lora_vision)
        idle = (cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets, cfg.lora_vision)
        if not cfg.lora and any(idle):
            raise ValueError("lora_alpha, lora_dropout, lora_targets, lora_vision: need --lora, "
                             "the rank, above 0")
        if cfg.lora_vision and {"vision", "merger"} <= {*cfg.freeze}:
            raise ValueError("lora_vision: both parts of vision are in freeze, so none has one")
        if not found.parts:
            more = "; with lora a part that is frozen has no adapter, either" * bool(cfg.lora)
            raise ValueError(f"freeze {', '.join(cfg.freeze)}: nothing is left to learn{more}")
        return found

    @property
    def parts(self) -> tuple[str, ...]:
        """Those that learn."""
        no = {*self.freeze, *(("vision", "merger") if self.rank and not self.vision else ())}
        return tuple(part for part in PARTS if part not in no)

    @property
    def looks_once(self) -> bool:
        """Whether the vision tower's blocks stay as they are, so that its states may be kept."""
        return "vision" not in self.parts

    @property
    def scale(self) -> float:
        """alpha / r."""
        return (2.0 if self.alpha is None else self.alpha / self.rank) if self.rank else 0.0


ALL = Learns()


# ------------------------------------------------------------------------------------- the layer


class LoRALinear(nn.Linear):
    """A linear layer that stays, and its two factors: y = W x + b + scale B A dropout(x)."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.on = True  # see adapter_off
        self.weight, self.bias, self.scale, self.dropout = layer.weight, layer.bias, scale, dropout
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(layer.weight.new_empty(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        if self.dropout and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged(self) -> Tensor:
        """W + scale B A (out, in), float32."""
        with torch.autocast(self.weight.device.type, enabled=False):
            factors = self.lora_B.float(), self.lora_A.float()
            return torch.addmm(self.weight.float(), *factors, alpha=self.scale)


def is_factor(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def adapted(model: nn.Module) -> list[LoRALinear]:
    return [part for part in model.modules() if isinstance(part, LoRALinear)]


def set_learning(model: nn.Module, learns: Learns, prefix: str = "") -> nn.Module:
    """Freezes what does not learn, and puts LoRALinear in place of layers whose factors do. prefix:
    of the names of a module that is a part of a model. Of a model on the meta device the factors
    are yet to be written, see `load`. ValueError for a target that is no linear layer."""
    for name, p in model.named_parameters(prefix.removesuffix(".")):
        p.requires_grad_(part_of(name) in learns.parts and not learns.rank)
    if not learns.rank:
        return model
    model.adapter, used = learns, set()
    for name, layer in list(model.named_modules()):
        known = [t for t in learns.targets if f".{prefix}{name}".endswith(f".{t}")]
        learnt = part_of(prefix + name) in learns.parts and (known or not learns.targets)
        if not learnt or not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        used.update(known)
        place, _, last = name.rpartition(".")
        adapter_of = LoRALinear(layer, learns.rank, learns.scale, learns.dropout)
        setattr(model.get_submodule(place), last, adapter_of)
    if not prefix and (idle := set(learns.targets) - used):
        raise ValueError(f"lora_targets {min(idle)}: no linear layer of {', '.join(learns.parts)} "
                         "is called so; q_proj, say, or mlp.down_proj (the head has no adapter)")
    return model


@contextmanager
def adapter_off(model):
    """Inside, a model with adapters is what it was at the start. Any other model, or None, is left
    as it is."""
    layers = adapted(model) if model is not None else []
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def seed_dropout(model, seed: int, step: int, process: int = 0) -> None:
    """Fixes what dropout draws in the update of a step, if there is any: by these numbers alone."""
    if any(layer.dropout for layer in adapted(model)[:1]):
        torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + process) % 2**64)


def merged(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and values of the parameters of a module as a model without adapters has them; of those
    that are whole in this process."""
    for name, part in module.named_modules(prefix=prefix):
        for key, p in part.named_parameters(name, recurse=False, remove_duplicate=False):
            if not is_factor(key) and not isinstance(p, DTensor):
                adds = isinstance(part, LoRALinear) and key.endswith(".weight")
                yield key, part.merged() if adds else p


# ---------------------------------------------------------------------------------- checkpoints


def load(learns: Learns, start, saved=None, seed=0, device="cpu", shard=None) -> Qwen2VL:
    """The model of a run that starts from the checkpoint `start`, of which learns what `learns`
    says; as it was saved in the run's own checkpoint `saved`, if it goes on. seed: of the factors
    A. device, shard, errors: see Qwen2VL.from_pretrained."""

    def shaped(model):
        model = set_learning(model, learns)
        return shard(model) if shard else model

    if not learns.rank:
        return Qwen2VL.from_pretrained(saved or start, device=device, shard=shaped)
    base = adapter.base_of(Path(saved)) if saved else checkpoint_folder(start)
    model = Qwen2VL.from_pretrained(base, device=device, shard=shaped)
    wanted = {name: p for name, p in model.state_dict().items() if is_factor(name)}
    found = saved_factors(saved, wanted) if saved else new_factors(wanted, seed)
    found = {name: like(x.to(device), wanted[name]) for name, x in found.items()}
    model.load_state_dict(found, strict=False, assign=True)
    model.base = base, adapter.fingerprint(base)
    return model


def reference(policy: Qwen2VL, start, bf16: bool, device: str, shard) -> Qwen2VL:
    """What a policy that started from `start` was then: itself, with its adapter off; of one that
    has none another model, in what is computed in, so that no copy need be made: it never changes.
    """
    if adapted(policy):
        return policy
    low = torch.bfloat16 if bf16 else torch.float32
    found = Qwen2VL.from_pretrained(start, low if shard else torch.float32, device, shard)
    return found.frozen(low).prepare(policy.compiled)


def new_factors(wanted: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A uniform in +-1/sqrt(in), B zero, of these shapes; the seed fixes them."""
    gen, found = torch.Generator().manual_seed(seed % 2**64), {}
    for name, weight in wanted.items():
        found[name] = torch.zeros(weight.shape)
        if name.endswith("A"):
            bound = 1 / math.sqrt(weight.shape[1])
            found[name].uniform_(-bound, bound, generator=gen)
    return found


def saved_factors(folder, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a LoRA checkpoint by the names of `wanted`. ValueError for others."""
    found = {}
    for layer, (A, B) in adapter.read_factors(Path(folder)).items():
        found |= {f"{layer}.lora_A": A, f"{layer}.lora_B": B}
    for name in found.keys() | wanted.keys():
        shapes = [tuple(x[name].shape) if name in x else "nothing" for x in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{folder}: {name}: expected {shapes[0]}, found {shapes[1]}")
    return found


def kept(model) -> set[str]:
    """Names of the weights that a checkpoint of the model holds: of one with adapters, theirs."""
    names = set(model.state_dict())
    factors = set(filter(is_factor, names))
    return factors or names


def save(folder: Path, weights: dict[str, Tensor], model) -> None:
    """Writes config.json and the weights that are `kept`."""
    if not adapted(model):
        save_weights(folder, weights, model.cfg)
        return
    (base, fingerprint), learns = model.base, model.adapter
    told = {"rank": learns.rank, "alpha": learns.scale * learns.rank, "dropout": learns.dropout,
            "base": base, "fingerprint": fingerprint}  # fmt: skip
    adapter.save_adapter(Path(folder), weights, model.cfg, told)


def merge(folder, out) -> Path:
    """Writes a plain Hugging Face checkpoint of a LoRA checkpoint: float32 weights with the adapter
    added, and the files beside them. ValueError for a folder that is none, and for an `out` that
    holds something."""
    folder, out = Path(folder), Path(out)
    if not adapter.is_adapter(folder):
        raise ValueError(f"{folder}: no {adapter.CONFIG}, so no LoRA checkpoint: nothing to merge")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: holds something already; give an empty or a new folder")
    Qwen2VL.from_pretrained(folder).save_pretrained(out)
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("adapter_") and path.name != "config.json":
            shutil.copy(path, out)
    return out


def main(argv=None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 4 or words[0] != "merge" or words[2] != "--out":
        raise SystemExit("usage: python lora.py merge RUN/step_000100 --out FOLDER")
    try:
        print(f"merged {words[1]} into {merge(words[1], words[3])}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
