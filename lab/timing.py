"""
How bench.py and bench_files.py measure: rounds in which all candidates take turns, operations, tables.
"""

import gc
import platform
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support import machine
from support.common import table
from support.machine import native_bf16

REPEATS = 7
ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = machine.device()
HALF = torch.bfloat16 if native_bf16() else torch.float32  # what is called half precision below
HALF_NAME = "bf16" if native_bf16() else "no"


def machine():
    """One line: what the figures were measured on."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:  # no git
        commit = ""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else ()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(names)} x {names[0]}" if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if CUDA else ""
    half = "no bf16" if HALF_NAME == "no" else f"has {HALF_NAME}"
    return (
        f"{cpu}{gpu}, {torch.get_num_threads()} threads, {half}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, commit {commit or 'unknown'}"
    )


def timed(functions, repeats=REPEATS):
    """Calls the functions of a dict in turns, after one warm-up round.
    Returns {name: seconds of every other round, float (repeats,)}."""
    seconds = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if CUDA:
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def row(what, seconds, baseline=None, **more):
    """One line of a table. seconds, baseline: as `timed` gives them."""
    ms = 1e3 * seconds
    line = dict(what=what, ms=np.median(ms), fastest=ms.min(), slowest=ms.max())
    if baseline is not None:
        line["ratio"] = float(np.median(seconds / baseline))
    return {**line, **more}


def markdown(rows):
    """A table of what `row` gave."""
    names = list(dict.fromkeys(name for line in rows for name in line))

    def text(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return table(names, [[text(line.get(name, "")) for name in names] for line in rows])


def flops_of(function):
    """Floating point operations of one call, in units of 1e12. The counter does not know the CPU's flash
    attention."""
    kernel = nullcontext() if CUDA else sdpa_kernel(SDPBackend.MATH)
    with kernel, FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def forget():
    """Frees what is no longer used on the GPU: compiled modules hold themselves alive."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def matmul_peak(side=4096 if CUDA else 2048):
    """TFLOP/s of a large matrix product in half precision: what 100 % of this machine is below."""
    a, b = (torch.randn(side, side, device=DEVICE, dtype=HALF) for _ in range(2))
    return 2 * side**3 / timed({"product": lambda: a @ b})["product"].min() / 1e12
