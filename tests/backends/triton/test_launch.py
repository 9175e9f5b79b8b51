"""The launcher: Triton looks at a signature once, and what it compiled is started from memory after that."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from longattn.backends.triton import launch


class Pair(NamedTuple):
    ptr: Any
    size: Any


class Kernel:
    """A compiled kernel of Triton's, that writes down how it was started."""

    arg_names = ("pair", "n", "WIDTH", "M")

    def __init__(self) -> None:
        self.device_caches: dict[int, Any] = {}
        self.compiled: list[Any] = []
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.compiled.append((grid, arguments, constants))
            return _Compiled(self)

        return run


class _Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.started.append((grid, arguments))


def test_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel = Kernel()
    memory = torch.zeros(64)
    x, moved, other = memory[:8], memory[16:24], memory[1:9]

    def start(programs: int, ptr: torch.Tensor, size: int, n: int | None, width: int = 16) -> tuple[int, int]:
        launch.launch(kernel, programs, Pair(ptr, size), n, M=32, WIDTH=width, num_warps=4)
        return len(kernel.compiled), len(kernel.started)

    assert start(3, x, 5, 7) == (1, 0)
    assert start(0, x, 5, 7) == (1, 0)
    assert start(9, moved, 5, 7) == (1, 1)
    assert kernel.started == [((9, 1, 1), (Pair(moved, 5), 7, 16, 32))]  # constants in the kernel's order, no options
    assert start(3, other, 5, 7) == (2, 1)  # another alignment
    assert start(3, x.half(), 5, 7) == (3, 1)
    assert start(3, x, 1, 7) == (4, 1)
    assert start(3, x, 5, None) == (5, 1)
    assert start(3, x, 5, 7, width=64) == (6, 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert start(3, x, 5, 7) == (7, 1)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_MOST", 3)
    monkeypatch.setattr(launch, "_compiled", {})
    for n in range(8):
        launch.launch(Kernel(), 1, Pair(torch.zeros(1), n), n, WIDTH=1, M=1)
        assert len(launch._compiled) <= 3
