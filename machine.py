"""One machine as a measurement sees it: its name, its limits, time and memory of phases on it.

    phases = Phases("cuda:0")
    with phases("decode"): ...                   # phases.seconds, phases.peak
    limits("cuda:0")                             # FLOP/s and bytes/s, of the data sheet

A share of a limit is only as good as the limit: a GPU that is not known is refused, not guessed.
"""

import platform
import statistics
import subprocess
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ahead import Ahead
from journal import peak_memory_gb
from worker import cores

HERE = Path(__file__).resolve().parent
# Dense bfloat16 FLOP/s with float32 sums, and bytes/s of memory, by the name that CUDA tells. Of
# each: the data sheet of NVIDIA that says so. Its FLOP/s "with sparsity" are twice the dense ones.
LIMITS = {
    "NVIDIA H200": (989e12, 4.8e12, "H200 Tensor Core GPU, SXM"),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12, "H100 Tensor Core GPU, SXM"),
    "NVIDIA H100 PCIe": (756e12, 2.0e12, "H100 Tensor Core GPU, PCIe"),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12, "A100 Tensor Core GPU, 80 GB SXM"),
    "NVIDIA A100 80GB PCIe": (312e12, 1.935e12, "A100 Tensor Core GPU, 80 GB PCIe"),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12, "A100 Tensor Core GPU, 40 GB SXM"),
    "NVIDIA A100-PCIE-40GB": (312e12, 1.555e12, "A100 Tensor Core GPU, 40 GB PCIe"),
    "NVIDIA L40S": (362e12, 0.864e12, "L40S GPU"),
}
MEMORY = {"cuda": "torch.cuda.max_memory_allocated in each phase",
          "cpu": "peak so far of the process"}  # fmt: skip


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Peak of memory since reset_peak, see MEMORY."""
    return int(peak_memory_gb() * 1e9)


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def limits(device: str, dtype=torch.bfloat16, flops=None, bandwidth=None) -> dict:
    """{"flops", "bandwidth", "source"} of the machine, where they are not given. ValueError for a
    GPU that is not in LIMITS, or that computes in anything but bfloat16."""
    source = "command line"
    if not (flops and bandwidth):
        if device.startswith("cuda"):
            *found, sheet = data_sheet(torch.cuda.get_device_name(device), dtype)
            source = f"data sheet of NVIDIA {sheet}"
        else:
            source, found = f"measured here: product of {dtype} matrices, copy", probe(dtype)
        flops, bandwidth = flops or found[0], bandwidth or found[1]
    return {"flops": flops, "bandwidth": bandwidth, "source": source}


def data_sheet(name: str, dtype=torch.bfloat16) -> tuple[float, float, str]:
    """FLOP/s, bytes/s and data sheet of the GPU of that name. ValueError for what is not known."""
    if name not in LIMITS or dtype != torch.bfloat16:
        raise ValueError(f"{name}, {dtype}: no data sheet of it is here, only in bfloat16 of "
                         f"{', '.join(LIMITS)}; give --peak_flops (dense, per second) and "
                         "--bandwidth (bytes per second)")  # fmt: skip
    return LIMITS[name]


def probe(dtype: torch.dtype, side: int = 1024) -> tuple[float, float]:
    """FLOP/s of a product of matrices and bytes/s of a copy (read and written) on the CPU, the best
    of 5."""
    a, source, target = torch.ones(side, side, dtype=dtype), torch.ones(2**24), torch.ones(2**24)
    product = min(seconds_of(lambda: a @ a) for _ in range(5))
    copy = min(seconds_of(lambda: target.copy_(source)) for _ in range(5))
    return 2 * side**3 / product, 2 * source.nbytes / copy


def seconds_of(work) -> float:
    """Wall-clock seconds of work()."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, as far as torch can tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not before 2.13
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def told(device: str, commit: str | None = None) -> dict:
    """What a figure was measured on: names, versions, and the commit, with + where files differ
    from it; or that which is given, where git knows none."""
    cuda = device.startswith("cuda")

    def git(*words):
        done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "cores": cores(), "threads": torch.get_num_threads(), "system": platform.platform(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "cuda": torch.version.cuda if cuda else None, "numpy": np.__version__},
        "commit": head + "+" * bool(git("status", "--porcelain", "-uno")) if head else commit,
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }  # fmt: skip


def processor_name() -> str:
    """The CPU's model, as Linux tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Phases:
    """Seconds and peak memory of the phases of a step: `with phases("decode"): ...`. A phase inside
    another interrupts it. Waits for the device wherever one begins or ends."""

    def __init__(self, device: str):
        self.device, self.stack, self.since = device, [], 0.0
        self.seconds, self.peak = defaultdict(float), defaultdict(int)

    def mark(self) -> None:
        synchronize(self.device)
        if self.stack:
            name = self.stack[-1]
            self.seconds[name] += time.perf_counter() - self.since
            self.peak[name] = max(self.peak[name], peak_bytes())
        reset_peak(self.device)
        self.since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str):
        self.mark()
        self.stack.append(name)
        yield
        self.mark()
        self.stack.pop()

    def of(self, function, name):
        """The function as a phase. name: a text, or what makes one of its first argument."""

        def run(*args, **keys):
            with self(name(args[0]) if callable(name) else name):
                return function(*args, **keys)

        return run


class Awaited(Ahead):
    """Ahead that counts the seconds for which its caller waits: a GPU that has nothing to do."""

    waited = 0.0

    def __call__(self, rows, expected=()):
        begin = time.perf_counter()
        prompts = super().__call__(rows, expected)
        self.waited += time.perf_counter() - begin
        return prompts


def traced(work, folder: str) -> None:
    """work() under torch.profiler, to be seen in chrome://tracing or ui.perfetto.dev."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        work()
    profile.export_chrome_trace(str(Path(folder) / "step.json"))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def spreads(rounds: list[dict]) -> dict:
    """Median, lowest and highest of each number that the rounds have."""
    return {name: spread([found[name] for found in rounds]) for name in rounds[0]}
