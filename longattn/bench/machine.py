"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from longattn._version import __version__
from longattn.bench.cases import DTYPES
from longattn.bench.clock import in_turn, make_clock

try:
    from longattn import _C as _native
except ImportError:  # built without a compiler, or not built at all
    _native = None

# What torch.cpu.get_capabilities says of the instructions that matrix products are made of.
_EXTENSIONS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve", "i8mm")
_FLOAT32, _FLOAT64, _BFLOAT16 = range(3)  # as csrc/include/longattn/params.h numbers them
_LOAD_THAT_DISTURBS = 0.25  # processes that want to run, per core


@dataclass(frozen=True)
class Machine:
    """The machine, and the software on it.

    Args:
        device: its name.
        extensions: instruction sets for arithmetic that the processor has.
        isa: the instruction set of our kernels; None without them.
        load: processes that wanted to run in the last minute, when the measurement began; None where unknown.
        peaks: by dtype, the most floating-point operations a second, measured; by VDPBF16PS that of this instruction,
            which is not what bfloat16 runs on where the processor has AMX. Empty where that is not possible.
    """

    device: str
    system: str
    cores: int
    threads: int
    extensions: tuple[str, ...]
    isa: str | None
    load: float | None
    peaks: dict[str, float]
    versions: dict[str, str]

    @classmethod
    def describe(cls, device: str, threads: int) -> Machine:
        """Of this process's machine. Measures the peaks, which takes a second."""
        capabilities = torch.cpu.get_capabilities()
        versions = {"longattn": __version__, "torch": torch.__version__, "python": platform.python_version()}
        if device == "cuda":
            versions["cuda"] = torch.version.cuda or ""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return cls(
            device=torch.cuda.get_device_name() if device == "cuda" else _processor(),
            system=f"{platform.system()} {platform.machine()}",
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=threads,
            extensions=tuple(name for name in _EXTENSIONS if capabilities.get(name)),
            isa=None if _native is None else _native.isa(),
            load=None if load is None else round(load, 2),
            peaks=_gpu_peaks() if device == "cuda" else _cpu_peaks(threads),
            versions=versions,
        )

    @property
    def warning(self) -> str | None:
        """Why the figures may be off, or None."""
        if self.load is None or self.load <= _LOAD_THAT_DISTURBS * self.cores:
            return None
        return (
            f"the machine was busy (load average {self.load:.2f} on {self.cores} cores): times are too long, and noisy"
        )

    def lines(self) -> list[str]:
        """For people to read."""
        software = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        peaks = ", ".join(f"{dtype} {peak / 1e9:.0f}" for dtype, peak in self.peaks.items())
        return [
            f"{self.device} ({self.system}), cores: {self.cores}, threads: {self.threads}",
            f"instructions: {', '.join(self.extensions) or 'baseline'}; ours use {self.isa or 'none: no CPU kernels'}",
            f"measured peak, GFLOP/s: {peaks or 'unknown'}",
            f"{software}; load average {'unknown' if self.load is None else self.load}",
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Machine:
        return cls(**{**values, "extensions": tuple(values["extensions"])})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cpu_peaks(threads: int) -> dict[str, float]:
    """Of the products that our kernels are made of, on independent accumulators in registers.

    A dtype without products of its own is multiplied in float32.
    """
    measure = getattr(_native, "peak_gflops", None)
    if measure is None:
        return {}
    single, double, bf16 = (measure(dtype, threads) * 1e9 for dtype in (_FLOAT32, _FLOAT64, _BFLOAT16))
    peaks = {"float32": single, "float64": double, "bfloat16": bf16 or single, "float16": single}
    if "avx512_bf16" in _native.isas():
        peaks["VDPBF16PS"] = measure(_BFLOAT16, threads, "avx512_bf16") * 1e9
    return {name: peak for name, peak in peaks.items() if peak}


def _gpu_peaks() -> dict[str, float]:
    """The product of two large matrices: its rate is what the hardware sustains."""
    n, tries = 8192, 10
    clock, peaks = make_clock("cuda"), {}
    for name in DTYPES:
        a = torch.randn(n, n, device="cuda").to(getattr(torch, name))
        (samples,) = in_turn([partial(torch.mm, a, a)], clock, rounds=tries, seconds=tries)
        peaks[name] = 2 * n**3 / median(samples)
    return peaks
