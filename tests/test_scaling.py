"""The scalings against their formulas in float64, their limits, and their life as values."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn import InvalidInput, scaling
from longattn.scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Proportional, Scaling, YaRN

DIM, BASE, L0 = 64, 10000.0, 2048
PAIRS = DIM // 2
EXAMPLES = [
    Linear(4),
    NTK(4),
    DynamicNTK(4, L0),
    YaRN(4, L0),
    YaRN(40, L0, beta_fast=24, beta_slow=2, mscale=0.707, mscale_all_dim=1.0, truncate=False),
    LongRoPE(4, L0, (1.0,) * PAIRS, tuple(1 + 0.1 * i for i in range(PAIRS))),
    Llama3(8, L0),
    Proportional(0.25, 2),
]
examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)


def theta(dim: int = DIM, base: float = BASE) -> torch.Tensor:
    return torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)


def frequencies(example: Scaling, length: int = 1, dim: int = DIM, base: float = BASE) -> torch.Tensor:
    return example.frequencies(dim, base, length)[0].double()


def attention_factor(example: Scaling) -> float:
    return example.frequencies(DIM, BASE, 1)[1]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # float32 exponents and powers: ln(base) + 2 roundings, a few times over
    torch.testing.assert_close(actual, expected, rtol=4e-6, atol=0)


def assert_unscaled(actual: torch.Tensor) -> None:
    torch.testing.assert_close(actual, scaling.inverse_frequencies(DIM, BASE).double(), rtol=1e-6, atol=0)


def turns(dim: int = DIM, base: float = BASE) -> torch.Tensor:
    return L0 * theta(dim, base) / (2 * math.pi)


# Formulas.


def test_unscaled():
    inv_freq = scaling.inverse_frequencies(DIM, BASE)
    assert inv_freq.dtype == torch.float32 and inv_freq.device.type == "cpu" and inv_freq.shape == (PAIRS,)
    assert_close(inv_freq.double(), theta())


def test_linear():
    assert_close(frequencies(Linear(4)), theta() / 4)


@pytest.mark.parametrize("factor", [1.5, 4.0, 64.0])
def test_ntk(factor):
    inv_freq = frequencies(NTK(factor))
    assert_close(inv_freq, theta(base=BASE * factor ** (DIM / (DIM - 2))))
    assert inv_freq[0] == 1.0
    assert inv_freq[-1].item() == pytest.approx(theta()[-1].item() / factor, rel=4e-6)


@pytest.mark.parametrize("length", [1, L0, L0 + 1, 2 * L0, 1_000_000])
def test_dynamic_ntk(length):
    n = max(length, L0)
    base = BASE * (4 * n / L0 - 3) ** (DIM / (DIM - 2))
    assert_close(frequencies(DynamicNTK(4, L0), length), theta(base=base))


def test_yarn_keeps_fast_and_interpolates_slow_pairs():
    inv_freq, unscaled = frequencies(YaRN(4, L0)), theta()
    assert_close(inv_freq[turns() > 32], unscaled[turns() > 32])
    assert_close(inv_freq[turns() < 0.75], unscaled[turns() < 0.75] / 4)
    ratio = unscaled / inv_freq
    assert (ratio.diff() >= -1e-6).all() and 1 < ratio[PAIRS // 2] < 4


def test_yarn_ramp():
    def index(r: float) -> float:
        return DIM * math.log(L0 / (2 * math.pi * r)) / (2 * math.log(BASE))

    i = torch.arange(PAIRS, dtype=torch.float64)
    for truncate in (True, False):
        first, last = index(24), index(2)
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        gamma = ((i - first) / (last - first)).clamp(0, 1)
        expected = gamma * theta() / 8 + (1 - gamma) * theta()
        assert_close(frequencies(YaRN(8, L0, beta_fast=24, beta_slow=2, truncate=truncate)), expected)


def test_yarn_ramp_of_no_width_is_a_step():
    inv_freq = frequencies(YaRN(4, L0, beta_fast=8, beta_slow=8, truncate=False))
    assert_close(inv_freq, torch.where(turns() >= 8, theta(), theta() / 4))


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (YaRN(16, L0), 0.1 * math.log(16) + 1),
        (YaRN(16, L0, mscale=0.5), 0.1 * math.log(16) + 1),
        (YaRN(16, L0, mscale=0.5, mscale_all_dim=2), (0.05 * math.log(16) + 1) / (0.2 * math.log(16) + 1)),
        (YaRN(16, L0, attention_factor=1.25), 1.25),
        (LongRoPE(16, L0, (1.0,) * PAIRS, (2.0,) * PAIRS), math.sqrt(1 + math.log(16) / math.log(L0))),
        (LongRoPE(16, L0, (1.0,) * PAIRS, (2.0,) * PAIRS, attention_factor=1.25), 1.25),
        (Linear(16), 1.0),
        (NTK(16), 1.0),
        (DynamicNTK(16, L0), 1.0),
        (Llama3(16, L0), 1.0),
        (Proportional(0.5, 16), 1.0),
    ],
)
def test_attention_factor(example, expected):
    assert attention_factor(example) == pytest.approx(expected, rel=1e-12)


def test_longrope_changes_lists_past_the_trained_length():
    short, long = torch.linspace(1, 2, PAIRS).double(), torch.linspace(1, 50, PAIRS).double()
    example = LongRoPE(4, L0, tuple(short.tolist()), tuple(long.tolist()))
    for length in (1, L0):
        assert_close(frequencies(example, length), theta() / short)
    for length in (L0 + 1, 10 * L0):
        assert_close(frequencies(example, length), theta() / long)


def test_llama3():
    low, high = 1.0, 4.0
    keep = ((turns() - low) / (high - low)).clamp(0, 1)
    assert_close(frequencies(Llama3(8, L0, low, high)), (1 - keep) * theta() / 8 + keep * theta())


@pytest.mark.parametrize("proportion", [0.0, 0.25, 0.3, 0.99, 1.0])
def test_proportional(proportion):
    inv_freq = frequencies(Proportional(proportion, 2))
    turning = math.floor(proportion * DIM / 2)
    assert_close(inv_freq[:turning], theta()[:turning] / 2)
    assert (inv_freq[turning:] == 0).all()


# Limits.


@pytest.mark.parametrize(
    "identity",
    [
        Linear(1),
        NTK(1),
        YaRN(1, L0),
        LongRoPE(1, L0, (1.0,) * PAIRS, (1.0,) * PAIRS),
        Llama3(1, L0),
        Proportional(1),
    ],
    ids=lambda example: example.name,
)
@pytest.mark.parametrize("length", [1, 10 * L0])
def test_factor_one_changes_nothing(identity, length):
    assert_unscaled(frequencies(identity, length))
    assert attention_factor(identity) == 1.0


def test_dynamic_ntk_starts_unscaled_and_meets_ntk():
    for length in (1, L0):
        assert_unscaled(frequencies(DynamicNTK(4, L0), length))
    assert_close(frequencies(DynamicNTK(4, L0), 2 * L0), frequencies(NTK(4 * 2 - 3)))
    assert_close(frequencies(DynamicNTK(1, L0), 8 * L0), frequencies(NTK(8)))


@examples
def test_never_faster_than_unscaled(example):
    assert (frequencies(example, 4 * L0) <= theta() * (1 + 4e-6)).all()


@pytest.mark.parametrize(
    ("example", "expected"), [(example, isinstance(example, (DynamicNTK, LongRoPE))) for example in EXAMPLES]
)
def test_depends_on_length(example, expected):
    assert example.depends_on_length is expected
    assert torch.equal(frequencies(example, 1), frequencies(example, 100 * L0)) is not expected


@given(st.sampled_from(EXAMPLES), st.integers(1, 4 * L0))
def test_a_regime_stands_for_its_lengths(example, length):
    regime = example.regime(length)
    if regime is not None:
        assert torch.equal(frequencies(example, length), frequencies(example, regime))


# Values.


@examples
def test_round_trip(example):
    values = example.to_dict()
    for copy in (scaling.from_dict(values), scaling.from_dict(json.loads(json.dumps(values)))):
        assert copy == example and hash(copy) == hash(example) and type(copy) is type(example)


def test_equal_arguments_are_one_value():
    assert len({Linear(4), Linear(4.0), Linear(torch.tensor(4.0).item())}) == 1
    assert LongRoPE(4, 8, [1, 2], [3, 4]) == LongRoPE(4.0, 8, (1.0, 2.0), (3.0, 4.0))
    assert Linear(4) != NTK(4) and Linear(4) != Linear(5)


@examples
def test_immutable(example):
    with pytest.raises(AttributeError):
        example.factor = 2.0


@pytest.mark.parametrize(
    "values",
    [
        {"type": "no such"},
        {"factor": 4.0},
        {"type": ["linear"], "factor": 4.0},
        {"type": "linear"},
        {"type": "linear", "factor": 4.0, "other": 1},
        "linear",
        None,
    ],
)
def test_from_dict_refuses(values):
    with pytest.raises(InvalidInput, match="^scaling: expected"):
        scaling.from_dict(values)


ONES = (1.0,) * PAIRS


@pytest.mark.parametrize("bad", [0.5, -1, math.nan, math.inf, "4", None, True, 10**400], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        Linear,
        NTK,
        lambda s: DynamicNTK(s, L0),
        lambda s: YaRN(s, L0),
        lambda s: LongRoPE(s, L0, ONES, ONES),
        lambda s: Llama3(s, L0),
        lambda s: Proportional(0.5, s),
    ],
    ids=["linear", "ntk", "dynamic", "yarn", "longrope", "llama3", "proportional"],
)
def test_bad_factor(make, bad):
    with pytest.raises(InvalidInput, match="^factor: expected a finite number at least 1, got"):
        make(bad)


@pytest.mark.parametrize("bad", [0, 1, -2048, 2048.0, "2048", None, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: DynamicNTK(4, n),
        lambda n: YaRN(4, n),
        lambda n: LongRoPE(4, n, ONES, ONES),
        lambda n: Llama3(4, n),
    ],
    ids=["dynamic", "yarn", "longrope", "llama3"],
)
def test_bad_original_max_position(make, bad):
    with pytest.raises(InvalidInput, match="^original_max_position: expected an int, at least 2, got"):
        make(bad)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("beta_slow", lambda: YaRN(4, L0, beta_slow=0)),
        ("beta_fast", lambda: YaRN(4, L0, beta_fast=0.5)),
        ("beta_fast", lambda: YaRN(4, L0, beta_fast=math.inf)),
        ("mscale", lambda: YaRN(4, L0, mscale=-1)),
        ("mscale_all_dim", lambda: YaRN(4, L0, mscale_all_dim=0)),
        ("attention_factor", lambda: YaRN(4, L0, attention_factor=0)),
        ("truncate", lambda: YaRN(4, L0, truncate=1)),
        ("attention_factor", lambda: LongRoPE(4, L0, ONES, ONES, attention_factor=-1)),
        ("short_factor", lambda: LongRoPE(4, L0, None, ONES)),
        ("short_factor", lambda: LongRoPE(4, L0, 1.0, ONES)),
        ("long_factor\\[1\\]", lambda: LongRoPE(4, L0, ONES, (1.0, 0.0))),
        ("low_freq_factor", lambda: Llama3(4, L0, low_freq_factor=0)),
        ("high_freq_factor", lambda: Llama3(4, L0, low_freq_factor=4, high_freq_factor=4)),
        ("proportion", lambda: Proportional(1.5)),
        ("proportion", lambda: Proportional(-0.1)),
        ("dim", lambda: NTK(4).frequencies(2, BASE, 1)),
        ("dim", lambda: DynamicNTK(4, L0).frequencies(2, BASE, 1)),
        ("short_factor", lambda: LongRoPE(4, L0, (1.0,), ONES).frequencies(DIM, BASE, 1)),
        ("long_factor", lambda: LongRoPE(4, L0, ONES, (1.0,)).frequencies(DIM, BASE, L0 + 1)),
    ],
)
def test_bad_arguments(argument, make):
    with pytest.raises(InvalidInput, match=f"^{argument}: expected"):
        make()
