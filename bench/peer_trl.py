"""The peer: TRL's GRPOTrainer on the checkpoint, prompts and settings that bench.py wrote.

    .venv-peers/bin/python bench/peer_trl.py FOLDER --batch 128 --out trl.json

Why TRL: R1-V is built on it (src/r1-v/src/open_r1/trainer/grpo_trainer.py is TRL's trainer, changed
for images), and it is what most of the field trains with. This file runs in an environment of its
own (requirements-peers.txt), imports of the project only twin.py beside it, and reads the rest from
FOLDER: settings, questions and their tokens, pictures as PNG, where the checkpoint is.

TRL's best is what is timed, in float32 or, as ours, in mixed precision. What of its defaults would
cost it time here is off: gradient checkpointing, logging, saving, shuffling; pictures are decoded
before the first step. Of an optimizer step, `--batch` completions go through one forward and
backward; bench.py tries several and keeps the best. Every completion has exactly max_new tokens:
the end tokens are among those that are never sampled, as in ours; other lengths are refused. The
loss is GRPO's with a mean over each sequence, as ours. The reward is cheaper than ours: is the
solution in the text?

AutoProcessor needs torchvision for the part of Qwen2-VL's processor that reads videos; twin.py puts
the processor together without that part.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from twin import load_processor, message

WARM_UP = 2  # steps that are not counted


def check_tokens(processor, rows: list[dict], pictures: list) -> None:
    """ValueError unless the prompts are token for token those of ours."""
    for row, picture in zip(rows, pictures, strict=True):
        made = processor.apply_chat_template(
            [message(row["text"], picture)], add_generation_prompt=True, tokenize=True,
            return_dict=True,
        )  # fmt: skip
        if (ids := list(made["input_ids"][0])) != row["ids"]:
            raise ValueError(f"{row['image']}: TRL's prompt is {ids}, ours {row['ids']}")


def right_or_not(completions, solution, **_) -> list[float]:
    """A reward as cheap as can be: does the completion name the solution?"""
    texts = (completion[0]["content"] for completion in completions)
    return [float(answer in text) for text, answer in zip(texts, solution, strict=True)]


def resident(key: str) -> int:
    """VmRSS: bytes of memory that this process has; VmHWM: had at the highest. As in bench.py."""
    file = Path("/proc/self/status")
    if not file.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in file.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


class Clock(TrainerCallback):
    """Seconds of each optimizer step: dataloader, sampling, reward, reference, update. After each
    it says so and waits for a line: bench.py takes its turn."""

    def __init__(self):
        self.seconds, self.last = [], None

    def on_step_begin(self, args, state, control, **_):
        if self.last is None:
            self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.last)
        print("step", flush=True)
        sys.stdin.readline()
        self.last = time.perf_counter()


def make_trainer(folder: Path, told: dict, batch: int, steps: int, bf16: bool, clock: Clock):
    """The trainer whose step is all prompts times G completions."""
    rows, checkpoint = told["prompts"], told["checkpoint"]
    pictures = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
    processor = load_processor(checkpoint)
    check_tokens(processor, rows, pictures)
    count = len(rows) * told["group"]
    if count % batch:
        raise ValueError(f"--batch {batch} does not divide {count} completions")
    cfg = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=bf16, seed=told["seed"],
        model_init_kwargs={"dtype": "float32"}, max_steps=steps, learning_rate=told["lr"],
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=told["max_grad_norm"],
        per_device_train_batch_size=batch, gradient_accumulation_steps=count // batch,
        gradient_checkpointing=False, num_generations=told["group"], beta=told["beta"],
        max_completion_length=told["max_new"], temperature=told["temperature"], top_k=0,
        loss_type="grpo", scale_rewards="group", logging_strategy="no", save_strategy="no",
        report_to=[], disable_tqdm=True, shuffle_dataset=False, dataloader_pin_memory=False,
        generation_kwargs={"suppress_tokens": told["banned"]},
    )  # fmt: skip

    def with_pictures(some: dict) -> dict:
        found = [message(rows[i]["text"], pictures[i]) for i in some["at"]]
        return {"prompt": found, "solution": [rows[i]["solution"] for i in some["at"]]}

    data = Dataset.from_dict({"at": list(range(len(rows)))}).with_transform(with_pictures)
    return GRPOTrainer(checkpoint, [right_or_not], cfg, data, processing_class=processor,
                       callbacks=[clock])  # fmt: skip


def run(folder: Path, batch: int, steps: int, bf16: bool) -> dict:
    """Seconds of each step, memory, versions, and what makes the run comparable."""
    told = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(told["threads"])
    clock, lengths = Clock(), []
    trainer = make_trainer(folder, told, batch, steps + WARM_UP, bf16, clock)
    generate = trainer._generate_single_turn

    def counted(*args, **kwargs):
        ids, logp = generate(*args, **kwargs)
        lengths.append(sorted({len(one) for one in ids}))
        return ids, logp

    trainer._generate_single_turn = counted
    loaded = resident("VmRSS")
    trainer.train()
    if lengths != [[told["max_new"]]] * (steps + WARM_UP):
        raise ValueError(f"a step samples completions of {told['max_new']} tokens once, found "
                         f"{lengths}")  # fmt: skip
    seconds = clock.seconds[WARM_UP:]
    return {
        "batch": batch, "bf16": bf16, "seconds": seconds, "median": statistics.median(seconds),
        "warm_up": clock.seconds[:WARM_UP], "loaded_bytes": loaded,
        "peak_bytes": resident("VmHWM"),
        "threads": torch.get_num_threads(), "parameters": trainer.model.num_parameters(),
        "optimizer": type(trainer.optimizer.optimizer).__name__,
        "versions": {"trl": trl.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what bench.py wrote")
    parser.add_argument("--batch", type=int, default=128, help="completions per forward")
    parser.add_argument("--steps", type=int, default=5, help=f"counted, after {WARM_UP} more")
    parser.add_argument("--bf16", action="store_true", help="its mixed precision, else float32")
    parser.add_argument("--out", type=Path, required=True, help="results as JSON")
    args = parser.parse_args()
    found = run(args.folder, args.batch, args.steps, args.bf16)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
