"""`longattn explain` builds the call that its options describe."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

import longattn
from longattn.cli import main


def explained(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["explain", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output.rstrip("\n")


def test_options_are_the_keywords() -> None:
    q, k, v = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 9, 8), torch.zeros(2, 2, 9, 16)
    shape = ("--q", "2,4,6,8", "--kv-heads", 2, "--keys", 9, "--v-dim", 16)
    assert explained(*shape) == str(longattn.explain(q, k, v))
    options = ("--causal", "--window", 3, "--sinks", 2, "--align", 1, "--softcap", 2.0, "--rope", 8, "--dropout", 0.1)
    keywords = {"causal": True, "window": 3, "sinks": 2, "align": 1, "softcap": 2.0, "dropout_p": 0.1}
    assert explained(*shape, *options) == str(longattn.explain(q, k, v, rope=longattn.Rope(8), **keywords))
    tensors = {
        "key_mask": torch.ones(2, 9).bool(),
        "key_lens": torch.tensor([9, 4]),
        "bounds": (torch.zeros(6).int(),) * 2,
        "bias": torch.zeros(6, 9).requires_grad_(),
        "alibi_slopes": torch.zeros(4),
        "sink_logits": torch.zeros(4),
    }
    options = ("--key-mask", "--key-lens", "9,4", "--bounds", "--bias", "6,9", "--alibi", "--sink-logits", "--backward")
    rest = ("--window", "-1,2", "--deterministic", "--backend", "reference")
    expected = longattn.explain(q, k, v, window=(-1, 2), deterministic=True, backend="reference", **tensors)
    assert explained(*shape, *options, *rest) == str(expected)


def test_packed() -> None:
    x, cu_seqlens = torch.zeros(9, 4, 8, dtype=torch.float16), torch.tensor([0, 4, 9])
    expected = longattn.explain(x, x, x, cu_seqlens, cu_seqlens, 5, 5, causal=True)
    assert explained("--q", "1,4,1,8", "--dtype", "float16", "--packed", "4,5", "--causal") == str(expected)


def test_nothing_is_allocated() -> None:
    assert "4,611,686,018,427,387,904 per head" in explained("--q", f"1,1,{2**31},128", "--causal", "--backward")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--q"),
        (("--q", "1,2,3"), "3 numbers, not 4"),
        (("--q", "1,2,x,4"), "not a list of integers"),
        (("--q", "1,2,-3,4"), "--q: expected numbers >= 0"),
        (("--q", "1,2,3,0"), "head_dim >= 1"),
        (("--q", "1,2,3,4", "--kv-heads", 3), "a multiple of k's 3"),
        (("--q", "1,2,3,4", "--window", 0), "window"),
        (("--q", "1,2,3,4", "--align", "middle"), "--align"),
        (("--q", "1,2,3,4", "--device", "abacus"), "--device"),
        (("--q", "1,2,3,4", "--backend", "abacus"), "backend"),
        (("--q", "1,2,3,4", "--packed", "3,4", "--keys", 5), "--keys"),
    ],
)
def test_bad_input_is_told_without_a_traceback(arguments: tuple[object, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["explain", *map(str, arguments)])
    assert result.exit_code in (1, 2) and message in result.output and "Traceback" not in result.output
