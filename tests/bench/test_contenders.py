"""The contenders: all compute the same, and refuse what they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longattn.bench import attention, block, contenders, make_cases, rope
from longattn.bench.cases import AttentionCase, BlockCase, Case, Inputs, RopeCase
from longattn.bench.contenders import Contender, Prepared, Refused, runnable, warmed_up
from longattn.bench.runner import _difference


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile would be given runs as it is: what is computed is the same, and no compiler is waited for."""
    for module in (attention, block, rope):
        monkeypatch.setattr(module, "compiled", lambda function: function)


_LONGEST = {case.curve: case for case in make_cases(dtypes=["float32"], quick=True)}  # of each curve


@pytest.mark.filterwarnings("ignore:.*flex_attention.*without torch.compile")
@pytest.mark.parametrize("case", _LONGEST.values(), ids=_LONGEST.keys())
def test_all_compute_the_same(case: Case, uncompiled: None) -> None:
    ours, *others = [contender for contender in contenders(case) if contender.role != "baseline"]
    inputs = case.inputs()
    _, expected = warmed_up(ours, case, inputs)
    assert len(expected) == 1 + len(inputs.wanted)
    ran = []
    for contender in others:
        try:
            call = runnable(contender.prepare(case, inputs), inputs)
        except Refused as refused:
            assert (contender.name, case.backward, "has no backward" in str(refused)) == ("FlexAttention", True, True)
            continue
        outputs = call()
        assert [x.shape for x in outputs] == [x.shape for x in expected]
        assert max(map(_difference, outputs, expected)) < 1e-4, contender.name
        ran.append(contender.role)
    assert "peer" in ran


@pytest.mark.parametrize("case", make_cases(["decode", "rope"], ["bfloat16"], quick=True), ids=lambda case: case.name)
def test_bandwidth_has_a_baseline(case: Case) -> None:
    (baseline,) = (contender for contender in contenders(case) if contender.role == "baseline")
    warmed_up(baseline, case, case.inputs())


def test_a_plain_copy_copies_the_gradient_too() -> None:
    case = RopeCase(set="rope", dtype="float32", n=4, heads=1, head_dim=2, backward=True)
    (copy,) = (contender for contender in contenders(case) if contender.role == "baseline")
    inputs = case.inputs()
    _, (out, dx) = warmed_up(copy, case, inputs)
    assert inputs.dout is not None
    for result, source in ((out, inputs.wanted[0]), (dx, inputs.dout)):
        assert torch.equal(result, source)
        assert result.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ours_comes_first_and_names_are_unique(device: str) -> None:
    for case in make_cases(device=device):
        found = contenders(case)
        assert (found[0].name, found[0].role) == ("longattn", "ours")
        names = [contender.name for contender in found]
        assert len(set(names)) == len(names)


def test_a_gpu_has_contenders_of_its_own() -> None:
    for case in make_cases(device="cuda"):
        names = [contender.name for contender in contenders(case)]
        assert names[0] == "longattn"
        if isinstance(case, AttentionCase):
            assert "flash-attn 2" in names
        if isinstance(case, BlockCase):
            assert "SDPA cuDNN" in names


def test_what_is_not_installed_is_refused() -> None:
    with pytest.raises(Refused, match="no_such_package is not installed"):
        attention._module("no_such_package")


def _long() -> AttentionCase:
    return AttentionCase(
        set="window", dtype="float32", nk=65536, nq=65536, q_heads=1, kv_heads=1, head_dim=8, window=16
    )


@pytest.mark.parametrize(("attend", "what"), [(attention.sdpa, "mask tensor"), (attention.eager, "matrix of scores")])
def test_quadratic_memory_is_refused(attend: Any, what: str) -> None:
    with pytest.raises(Refused, match=f"its {what} would take .* MB; left out above 134 MB"):
        attend(_long())


def test_the_reference_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.longattn.functional.registry.BACKENDS[0], "unavailable", lambda: "no compiler")
    (case,) = make_cases(["dense"], ["float32"], quick=True)[:1]
    with pytest.raises(Refused, match="would run on the reference backend .*no compiler"):
        contenders(case)[0].prepare(case, case.inputs())


def _failing(case: Case, inputs: Inputs) -> Prepared:
    def forward() -> Tensor:
        raise RuntimeError("not here\nand a long story")

    return Prepared(forward)


def test_a_peer_that_fails_is_left_out_and_ours_is_not() -> None:
    (case,) = make_cases(["dense"], ["float32"], quick=True)[:1]
    with pytest.raises(Refused, match="^RuntimeError: not here$"):
        warmed_up(Contender("theirs", "peer", _failing), case, case.inputs())
    with pytest.raises(RuntimeError, match="not here"):
        warmed_up(Contender("ours", "ours", _failing), case, case.inputs())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 100},
        {"window": 300},
        {"window": 40, "causal": False},
        {"nq": 200, "window": 150},
        {"nq": 1, "window": 130},
        {"nk": 512, "nq": 512, "window": 129},
    ],
)
def test_flex_blocks_cover_the_mask(changes: dict[str, Any]) -> None:
    shape = {"nk": 400, "nq": 400, "q_heads": 1, "kv_heads": 1, "head_dim": 8}
    case = AttentionCase(**{"set": "window", "dtype": "float32", **shape, **changes})
    shift = case.nk - case.nq
    tiles = [
        case.mask.kv_range(first + shift, last + shift, case.nk) for first, last in attention._query_tiles(case.nq)
    ]
    blocks = attention._block_mask(case, tiles, lambda b, h, i, j: j >= 0)
    visible = case.mask.materialize(case.nq, case.nk)[0]
    rows, columns = -(-case.nq // 128), -(-case.nk // 128)
    for row in range(rows):
        partly = set(blocks.kv_indices[0, 0, row, : blocks.kv_num_blocks[0, 0, row]].tolist())
        fully = set(blocks.full_kv_indices[0, 0, row, : blocks.full_kv_num_blocks[0, 0, row]].tolist())
        assert not partly & fully
        for column in range(columns):
            block_of_pairs = visible[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            assert (column in partly | fully) == bool(block_of_pairs.any())
            complete = block_of_pairs.shape[1] == 128 and bool(block_of_pairs.all())
            assert (column in fully) == complete
