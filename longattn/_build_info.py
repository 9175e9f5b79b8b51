"""How the native extension was built, or why it was not: the record that setup.py leaves beside this file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_RECORD = Path(__file__).with_name("_build.json")


@dataclass(frozen=True)
class BuildInfo:
    """What setup.py recorded about ``longattn._C``.

    reason: why the extension is missing, in one line; None if it was built.
    compiler: the compiler's own version line; None if none was found.
    mode: "release", "debug", or the sanitizers it is instrumented for ("address,undefined"); None without a compiler.
    targets: the instruction sets compiled in, narrowest first.
    dropped: the instruction sets of this machine whose flags the compiler does not know.
    cuda_reason: why the CUDA kernels are missing; None if they were built.
    """

    reason: str | None
    compiler: str | None = None
    mode: str | None = None
    targets: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    cuda_reason: str | None = None


def build_info() -> BuildInfo:
    """Reads the record of the last build; never raises for a tree that was not built."""
    try:
        record = json.loads(_RECORD.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return BuildInfo(reason="the extension was not built: run `make build`, or `pip install .`")
    return BuildInfo(
        reason=record["reason"],
        compiler=record["compiler"],
        mode=record["mode"],
        targets=tuple(record["targets"]),
        dropped=tuple(record["dropped"]),
        cuda_reason=record.get("cuda_reason"),
    )
