"""Data loaders compute in forked workers, beside their parent."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import longattn
from longattn.backends import cpu

MISSING = cpu.CpuBackend().unavailable()


class Attended(Dataset[Tensor]):
    """Samples that are results of attention and of its backward."""

    def __init__(self) -> None:
        self.inputs = torch.randn(6, 2, 4, 96, 16)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        x = self.inputs[index].clone().requires_grad_()
        out = longattn.attention(x, x, x, causal=True, window=40, backend="cpu")
        assert isinstance(out, Tensor)
        return torch.stack((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))


def two_threads(_: int) -> None:
    torch.set_num_threads(2)  # a worker starts with one


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_forked_workers(set_threads: Callable[[int], None]) -> None:
    """They are forked while threads of the parent's pool live; it goes on computing beside them."""
    set_threads(2)
    samples = Attended()
    expected = [samples[index] for index in range(len(samples))]
    loader = DataLoader(
        samples, batch_size=None, num_workers=2, multiprocessing_context="fork", worker_init_fn=two_threads, timeout=120
    )
    for _ in range(2):
        for index, sample in enumerate(loader):
            assert torch.equal(sample, expected[index])
            assert torch.equal(samples[index], expected[index])
