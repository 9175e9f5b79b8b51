"""`longattn info`: versions, the extension, and what each backend can run here."""

from __future__ import annotations

import platform

import click
import torch
from rich.table import Table

from longattn._build_info import build_info
from longattn._version import __version__
from longattn.backends import cpu, registry
from longattn.backends.base import Backend
from longattn.cli.output import make_console
from longattn.mask import Mask
from longattn.problem import FEATURES, Problem

__all__ = ["info"]


@click.command()
def info() -> None:
    """Show versions, the CPU kernels, and each backend with its reasons."""
    console = make_console()
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("longattn", __version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("threads", str(torch.get_num_threads())),
        ("extension", _extension()),
        ("instruction set", _instruction_set()),
    ):
        facts.add_row(name, value)
    console.print(facts)

    console.print("\nbackends, in order of preference:")
    backends = Table("backend", "status", "cannot run")
    for backend in registry.BACKENDS:
        missing = backend.unavailable()
        backends.add_row(
            backend.name, "ready" if missing is None else missing, _limits(backend) if missing is None else "-"
        )
    console.print(backends)


def _extension() -> str:
    build = build_info()
    if build.reason is not None:
        return f"missing: {build.reason}"
    dropped = f"; the compiler does not know {', '.join(build.dropped)}" if build.dropped else ""
    return f"{build.mode}, {build.compiler}, for {', '.join(build.targets)}{dropped}"


def _instruction_set() -> str:
    if cpu.CpuBackend().unavailable() is not None:
        return "-"
    native = cpu.native()
    return f"{native.isa()} of {', '.join(native.isas())} on this machine (LONGATTN_CPU_ISA chooses)"


def _limits(backend: Backend) -> str:
    """What the backend says against a call that asks for everything."""
    everything = Problem(
        batch=1,
        q_heads=1,
        kv_heads=1,
        nq=1,
        nk=1,
        head_dim=1,
        v_head_dim=1,
        dtype=torch.float32,
        device="cpu",
        mask=Mask(),
        scale=1.0,
        features=FEATURES,
    )
    return "; ".join(backend.reasons(everything)) or "-"
