"""Planted faults: each must be reported by the emulator, or give wrong numbers."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from emulator.build import CUDA, EMULATOR, compile_one, link
from emulator.engine import EARLY, LATE, RANDOM, Engine
from emulator.faults import FAULTS, Fault
from helpers import random_qkv
from longattn.backends.cuda import native

CPU_SECONDS, SECONDS = 90, 600  # a fault may make a kernel run for ever
TOLERANCE = 0.02
SEEDS = ((LATE, 1), (LATE, 10), (EARLY, 1), (RANDOM, 2), (EARLY, 7), (LATE, 2), (LATE, 3), (LATE, 15), (LATE, 23))
SHAPES = {128: ((4, 2), (300, 400)), 256: ((2, 1), (150, 200))}  # of the heads' width: heads, lengths
CALLS: tuple[dict[str, Any], ...] = (
    {"causal": True, "window": 150, "sinks": 100, "deterministic": True},
    {"deterministic": True},
    {"causal": True},
    {"key_mask": None, "causal": True},
)


def inputs(width: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """((q, k, v), dout, key_mask)."""
    torch.manual_seed(0)
    heads, lengths = SHAPES[width]
    qkv = random_qkv(1, heads, lengths, width, torch.bfloat16)
    key_mask = torch.rand(1, lengths[1]) < 0.5
    for x in qkv[1:]:
        x[:, :, ~key_mask[0]] *= 4.0
    return list(qkv), torch.randn_like(qkv[0]), key_mask


def results(backend: str, dtype: torch.dtype, width: int, keywords: dict[str, Any]) -> list[Tensor]:
    """out, lse and gradients of one of CALLS."""
    qkv, dout, key_mask = inputs(width)
    if "key_mask" in keywords:
        keywords = keywords | {"key_mask": key_mask}
        if backend == "cuda":  # what hidden keys hold does not matter
            for x in qkv[1:]:
                x[:, :, ~key_mask[0]] = torch.nan
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    out, lse = longattn.attention(*leaves, backend=backend, return_lse=True, **keywords)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def differs(got: list[Tensor], expected: list[Tensor]) -> bool:
    """By a share of the largest entry, or in what is finite; hidden keys have gradients of zero in both."""
    return any(
        not (x.isfinite() == y.isfinite()).all() or not (x.double() - y).abs().max() < TOLERANCE * y.abs().max()
        for x, y in zip(got, expected, strict=True)
    )


def examine(path: Path, width: int, expected: list[list[Tensor]], to: Connection) -> None:
    """In a process of its own: how the faulty library gives itself away, "" if it does not."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    native.found = native.load(path)
    engine, first = Engine(), {}
    for mode, seed in SEEDS:
        for number, (keywords, right) in enumerate(zip(CALLS, expected, strict=True)):
            engine.configure(mode, seed, resident=3, skew=128 * seed % 1024, processors=2)
            try:
                got = results("cuda", torch.bfloat16, width, keywords)
            except RuntimeError:
                got = None
            reports = engine.take_reports()
            if reports:
                return to.send(reports)
            if got is None or differs(got, right):
                return to.send("wrong numbers")
            if keywords.get("deterministic"):
                before = first.setdefault(number, got)
                if not all(torch.equal(x, y) for x, y in zip(got, before, strict=True)):
                    return to.send("other bits under another seed")
    to.send("")


@pytest.fixture(scope="module")
def expected() -> dict[int, list[list[Tensor]]]:
    """By width."""
    return {width: [results("cpu", torch.float64, width, dict(keywords)) for keywords in CALLS] for width in SHAPES}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of the emulator."""
    folder = Path(os.environ["LONGATTN_EMULATOR"]).resolve()
    return [folder / f"{source.stem}.o" for source in sorted(EMULATOR.glob("*.cpp"))]


def found_out(
    fault: Fault | None, width: int, folder: Path, objects: list[Path], expected: dict[int, list[list[Tensor]]]
) -> str:
    cuda = folder / "cuda"
    shutil.copytree(CUDA, cuda, ignore=shutil.ignore_patterns("units", "hopper"))
    if fault is not None:
        changed = fault.planted((cuda / fault.file).read_text(encoding="utf-8"))
        (cuda / fault.file).write_text(changed, encoding="utf-8")
    made = compile_one(EMULATOR / "fault_library.cu", folder, "-O1", "-w", f"-DLONGATTN_WIDTH={width}", cuda=cuda)
    path = link([made, *objects], folder / "_cuda.so")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=examine, args=(path, width, expected[width], sender))
    process.start()
    sender.close()
    try:
        verdict: str = receiver.recv() if receiver.poll(SECONDS) else "runs for ever"
    except EOFError:
        verdict = "the process died"
    process.kill()
    process.join()
    return verdict


@pytest.mark.parametrize("width", SHAPES)
def test_the_kernels_as_they_are(
    width: int, tmp_path: Path, objects: list[Path], expected: dict[int, list[list[Tensor]]]
) -> None:
    assert found_out(None, width, tmp_path, objects, expected) == ""


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fault(fault: Fault, tmp_path: Path, objects: list[Path], expected: dict[int, list[list[Tensor]]]) -> None:
    assert found_out(fault, fault.width, tmp_path, objects, expected) != ""
