"""The emulator of tests/emulator, as tests see it."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from longattn.backends.cuda import native

EARLY, LATE, RANDOM = range(3)  # when asynchronous work is done


class Engine:
    """The emulator that the CUDA backend's library of this process is linked with."""

    def __init__(self) -> None:
        found = native.found
        assert isinstance(found, native.Library) and found.emulated, found
        self._library = found._library
        self._library.emulator_take_reports.restype = ctypes.c_char_p

    def configure(self, mode: int = LATE, seed: int = 1, resident: int = 2, skew: int = 0, processors: int = 3) -> None:
        """How the next launches run.

        Args:
            seed: decides what is starved: a kind of asynchronous work, or a warpgroup.
            resident: blocks that run side by side; skew: bytes by which shared memory starts later.
            processors: how many the GPU has, so many persistent blocks.
        """
        self._library.emulator_configure(mode, seed, resident, skew, processors)

    def take_reports(self) -> str:
        """The faults since the last call."""
        return str(self._library.emulator_take_reports().decode())


def guarded(x: Tensor) -> Tensor:
    """A contiguous copy of x that ends at a page without access: kernels that read past it end the process."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(raw.data_ptr() + whole), ctypes.c_size_t(page), 0) == 0
    start = (whole - size) // 16 * 16
    copy = raw[start : start + size].view(x.dtype).view(x.shape)
    return copy.copy_(x)
