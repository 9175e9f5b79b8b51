"""The choice of a backend: in order of preference, with reasons, and never silently the slow one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import longattn
from helpers import backend_names, missing, random_qkv
from longattn import InvalidInput, Mask, Unsupported
from longattn.backends import registry
from longattn.backends.reference import ReferenceBackend
from longattn.problem import Problem

PROBLEM = Problem(
    batch=1,
    q_heads=1,
    kv_heads=1,
    nq=2,
    nk=2,
    head_dim=8,
    v_head_dim=8,
    dtype=torch.float32,
    device="cpu",
    mask=Mask(),
    scale=1.0,
)


class Picky(ReferenceBackend):
    """Runs heads 8 wide."""

    name = "picky"

    def reasons(self, problem: Problem) -> list[str]:
        return [] if problem.head_dim == 8 else ["head_dim is not 8", "nor will it be"]


class Absent(ReferenceBackend):
    name = "absent"

    def unavailable(self) -> str | None:
        return "it is not installed"

    def reasons(self, problem: Problem) -> list[str]:
        raise AssertionError("nobody asks what is not there")


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    candidates = (Absent(), Picky(), ReferenceBackend())
    monkeypatch.setattr(registry, "BACKENDS", candidates)
    monkeypatch.setattr(registry, "_BY_NAME", {backend.name: backend for backend in candidates})
    monkeypatch.setattr(registry, "_warned", set())
    yield tuple(backend.name for backend in candidates)


def test_the_contracts_names_exist() -> None:
    names = [backend.name for backend in registry.BACKENDS]
    assert len(set(names)) == len(names) and names[-1] == "reference"
    assert {"cpu", "reference"} <= set(names)


@pytest.mark.parametrize("backend", [backend.name for backend in registry.BACKENDS])
def test_the_tests_of_all_backends_run_it(backend: str) -> None:
    """Triton's kernels run in its interpreter, in a process of their own: see the Makefile."""
    reasons = missing(backend)
    if reasons:
        pytest.skip("; ".join(reasons))
    assert backend in [param.values[0] for param in backend_names()]


def test_auto_takes_the_first_that_can(backends: tuple[str, ...]) -> None:
    assert registry.select(PROBLEM).name == "picky"
    with warnings.catch_warnings(record=True):
        assert registry.select(PROBLEM._replace(head_dim=9)).name == "reference"


def test_falling_to_the_reference_warns_once(backends: tuple[str, ...]) -> None:
    wide = PROBLEM._replace(head_dim=9)
    with pytest.warns(RuntimeWarning, match="absent: it is not installed; picky: head_dim is not 8, nor will it be"):
        registry.select(wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.select(wide)
        registry.select(wide, "reference")  # asked for: no surprise


def test_a_named_backend_never_falls_back(backends: tuple[str, ...]) -> None:
    assert registry.select(PROBLEM, "reference").name == "reference"
    for name, why in (("absent", ["it is not installed"]), ("picky", ["head_dim is not 8", "nor will it be"])):
        with pytest.raises(Unsupported) as raised:
            registry.select(PROBLEM._replace(head_dim=9), name)
        assert raised.value.reasons == {name: why}


def test_an_unknown_name(backends: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match="'auto' or one of 'absent', 'picky', 'reference'"):
        registry.select(PROBLEM, "tpu")


def test_no_backend_at_all(backends: tuple[str, ...]) -> None:
    with pytest.raises(Unsupported) as raised:
        registry.select(PROBLEM._replace(head_dim=9, device="mps"))
    assert list(raised.value.reasons) == list(backends)
    assert "Nq 2, Nk 2, D 9" in str(raised.value)


def test_explain(backends: tuple[str, ...]) -> None:
    q, k, v = random_qkv(1, (1, 1), (2, 2), 9)
    found = longattn.explain(q, k, v, causal=True, return_lse=True)
    assert found.backend == "reference"
    assert found.reasons == {
        "absent": ["it is not installed"],
        "picky": ["head_dim is not 8", "nor will it be"],
        "reference": [],
    }
    lines = [line.split(maxsplit=1) for line in str(found).splitlines()]
    assert lines[-4:] == [
        ["runs", "on      reference"],
        ["absent", "cannot: it is not installed"],
        ["picky", "cannot: head_dim is not 8; nor will it be"],
        ["reference", "chosen"],
    ]
    assert longattn.explain(q[..., :8], k[..., :8], v).backend == "picky"
    assert longattn.explain(q, k, v, backend="picky").backend is None
    assert longattn.explain(q[..., :8], k[..., :8], v, backend="reference").backend == "reference"
    assert "reference  can run it, but comes later" in str(longattn.explain(q[..., :8], k[..., :8], v))
    assert "reference  can run it, but was not asked to" in str(longattn.explain(q, k, v, backend="picky"))


def test_explain_runs_nothing(backends: tuple[str, ...]) -> None:
    """A call far too large for any memory."""
    huge = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**30, 8)
    assert longattn.explain(huge, huge, huge).backend == "picky"
    with pytest.raises(InvalidInput):
        longattn.explain(huge, huge, huge, window=0)
    with pytest.raises(InvalidInput):
        longattn.explain(huge, huge, huge, backend="tpu")
