"""What every test starts from: fixed seeds, a say on which tests can run here, and a way to set the thread count."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import hypothesis
import numpy as np
import pytest
import torch

from longattn._build_info import build_info

# Examples are derived from the test itself, so a failure repeats; a slow machine is no failure.
hypothesis.settings.register_profile("longattn", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("longattn")


def pytest_report_header() -> str:
    build = build_info()
    kernels = build.reason or f"{', '.join(build.targets)} ({build.mode}, {build.compiler})"
    return f"torch {torch.__version__}, CPU kernels: {kernels}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU the tests marked gpu are deselected: so many skips would hide the others."""
    if not torch.cuda.is_available():
        waiting = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone when the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
