"""The C++ core without Python: the program of tests/native, linked from the extension's own objects.

`make sanitize` and `make neon` run the same program instrumented and on an emulated processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longattn._build_info import build_info
from longattn.backends import cpu

ROOT = Path(__file__).resolve().parent.parent


def test_the_core_agrees_with_its_formulas_on_every_instruction_set() -> None:
    folders = [path.relative_to(ROOT) for path in ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}")]
    if build_info().mode != "release" or len(folders) != 1:
        pytest.skip("the objects of a release build are not in build/: run `make build`")

    command = [sys.executable, "setup.py", "--quiet", "build_check", "--build-temp", str(folders[0])]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr

    variables = {name: value for name, value in os.environ.items() if name != "LONGATTN_CPU_ISA"}
    done = subprocess.run([ROOT / folders[0] / "check"], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    totals = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" passed, 0 failed")]
    assert sorted(totals) == sorted(cpu.native().isas())
