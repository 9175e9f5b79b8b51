"""How rotary frequencies change so that a model reads past its trained length.

Notation: D the rotated width (`dim`), b the base, theta_i = b^(-2i/D) the frequency of pair i in radians per token,
L0 the trained length (`original_max_position`), s the extension L / L0 (`factor`), n the length of the current context.

Every scaling is an immutable value: it compares, hashes, and survives `from_dict(scaling.to_dict())`, JSON included.
The arithmetic is float32, in the order of transformers' modeling_rope_utils.py, because a checkpoint was trained with
exactly those frequencies and at a million tokens one rounding of them is a visible angle.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from longattn.errors import InvalidInput

__all__ = ["NTK", "DynamicNTK", "Linear", "Llama3", "LongRoPE", "Proportional", "Scaling", "YaRN", "from_dict"]

Frequencies = tuple[Tensor, float]
"""inv_freq, float32 [dim / 2] on the CPU, and the attention_factor that multiplies the rotated part."""


def inverse_frequencies(dim: int, base: float) -> Tensor:
    """theta_i = base^(-2i/dim), float32 [dim / 2] (Su et al., RoFormer, arXiv 2104.09864, section 3.2.2)."""
    return 1.0 / _inverse_theta(dim, base)


def _inverse_theta(dim: int, base: float, pairs: int | None = None) -> Tensor:
    """Of the first `pairs`, by default all; how many there are can move a power by one rounding."""
    end = dim if pairs is None else 2 * pairs
    return base ** (torch.arange(0, end, 2, dtype=torch.float32, device="cpu") / dim)


class Named:
    """Values of one kind, frozen dataclasses, each known by its name to `to_dict` and `from_dict`.

    A kind is a class that says kind="its name in messages"; its subclasses say name="their own".
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    _by_name: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, *, name: str | None = None, kind: str | None = None) -> None:
        super().__init_subclass__()
        if kind is not None:
            cls.kind, cls._by_name = kind, {}
        elif name is not None:
            cls.name = name
            cls._by_name[name] = cls

    def to_dict(self) -> dict[str, Any]:
        """The name, as "type", and the arguments, in plain Python values."""
        return {"type": self.name, **{field.name: getattr(self, field.name) for field in _fields(type(self))}}

    @classmethod
    def read(cls: type[_Kind], values: Mapping[str, Any]) -> _Kind:
        """The value of this kind that `to_dict` described.

        Raises:
            InvalidInput: an unknown type, a missing, unknown or bad argument.
        """
        name = values.get("type") if isinstance(values, Mapping) else None
        if not isinstance(name, str) or name not in cls._by_name:
            raise InvalidInput(cls.kind, f"a mapping whose 'type' is one of {sorted(cls._by_name)}", values)
        made = cls._by_name[name]
        arguments = {key: value for key, value in values.items() if key != "type"}
        names = {field.name for field in _fields(made)}
        required = {field.name for field in _fields(made) if field.default is MISSING}
        if not required <= arguments.keys() <= names:
            expected = f"the arguments {sorted(required)} of {made.__name__} and any of {sorted(names - required)}"
            raise InvalidInput(cls.kind, expected, list(arguments))
        return made(**arguments)


_Kind = TypeVar("_Kind", bound=Named)


class Scaling(Named, ABC, kind="scaling"):
    """One way to change the frequencies."""

    @abstractmethod
    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        """The frequencies of a context of `length` tokens.

        Args:
            dim: rotated width, even.
            base: the base b of the unscaled frequencies, above 1.
            length: tokens in the context, the cached ones included.

        Returns:
            inv_freq (float32 [dim / 2], on the CPU) and the attention_factor.

        Raises:
            InvalidInput: the scaling does not exist at this width.
        """

    def regime(self, length: int) -> int | None:
        """A length that stands for all those with the frequencies of `length`; None if `length` has its own."""
        return 1

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change while the context grows, so that rotated keys may not be cached."""
        return self.regime(1) != self.regime(sys.maxsize)


@dataclass(frozen=True)
class AtLength(Scaling):
    """Another scaling's frequencies for one length, whatever the context's. It has no name: it is made, not saved.

    Args:
        scaling: whose frequencies; length: in tokens.
    """

    scaling: Scaling
    length: int

    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        return self.scaling.frequencies(dim, base, self.length)


def from_dict(values: Mapping[str, Any]) -> Scaling:
    """The scaling that `Scaling.to_dict` described.

    Raises:
        InvalidInput: an unknown type, a missing, unknown or bad argument.
    """
    return Scaling.read(values)


@dataclass(frozen=True)
class Linear(Scaling, name="linear"):
    """Position interpolation: theta_i / s.

    Chen et al., Extending Context Window of Large Language Models via Positional Interpolation, arXiv 2306.15595.

    Args:
        factor: s, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _number(self, "factor", at_least=1.0)

    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        return inverse_frequencies(dim, base) / self.factor, 1.0


@dataclass(frozen=True)
class NTK(Scaling, name="ntk"):
    """NTK-aware base change: b' = b * s^(D/(D-2)), which divides the slowest frequency by s and keeps the fastest.

    bloc97, "NTK-Aware Scaled RoPE", reddit r/LocalLLaMA, 2023; Peng et al., YaRN, arXiv 2309.00071, section 3.1.

    Args:
        factor: s, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _number(self, "factor", at_least=1.0)

    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        _check_more_than_one_pair(dim)
        return inverse_frequencies(dim, base * self.factor ** (dim / (dim - 2))), 1.0


@dataclass(frozen=True)
class DynamicNTK(Scaling, name="dynamic"):
    """NTK-aware base change that grows with the context: b' = b * (s * n / L0 - (s - 1))^(D/(D-2)), n >= L0.

    Up to L0 tokens the frequencies are the unscaled ones. Past it they change with every token.
    emozilla, "Dynamically Scaled RoPE", reddit r/LocalLLaMA, 2023; transformers modeling_rope_utils.py, "dynamic".

    Args:
        factor: s, at least 1.
        original_max_position: L0, in tokens.
    """

    factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _number(self, "factor", at_least=1.0)
        _length(self, "original_max_position")

    def regime(self, length: int) -> int | None:
        return None if length > self.original_max_position else 1

    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        _check_more_than_one_pair(dim)
        if length > self.original_max_position:
            growth = self.factor * length / self.original_max_position - (self.factor - 1.0)
            base = base * growth ** (dim / (dim - 2))
        return inverse_frequencies(dim, base), 1.0


@dataclass(frozen=True)
class YaRN(Scaling, name="yarn"):
    """NTK by parts: fast pairs keep theta_i, slow pairs take theta_i / s, a linear ramp over the index joins them.

    d(r) = D ln(L0 / (2 pi r)) / (2 ln b) is the index of the pair that turns r times within L0 tokens. The ramp rises
    from 0 at d(beta_fast) to 1 at d(beta_slow), rounded outwards to whole indices if `truncate`:

        theta'_i = (1 - ramp_i) theta_i + ramp_i theta_i / s
        attention_factor = m(1),  or m(mscale) / m(mscale_all_dim) where both are given,  with m(c) = 0.1 c ln s + 1

    Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, arXiv 2309.00071, sections 3.2-3.4;
    mscale: DeepSeek-V2, arXiv 2405.04434, section 3.1.4, and its modeling_deepseek.py.

    Args:
        factor: s, at least 1.
        original_max_position: L0, in tokens.
        beta_fast: turns within L0 from which a pair is left alone.
        beta_slow: turns within L0 up to which a pair is fully interpolated; at most beta_fast.
        mscale: weight of ln s in the numerator of the attention factor; no effect unless mscale_all_dim is given, too.
        mscale_all_dim: the same for the denominator.
        truncate: whether the ramp starts and ends at whole indices.
        attention_factor: replaces the formula's.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _number(self, "factor", at_least=1.0)
        _length(self, "original_max_position")
        _number(self, "beta_slow", above=0.0)
        _number(self, "beta_fast", at_least=self.beta_slow)
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None:
                _number(self, name, above=0.0)
        if not isinstance(self.truncate, bool):
            raise InvalidInput("truncate", "a bool", self.truncate)

    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        inverse_theta = _inverse_theta(dim, base)
        kept = 1.0 - self._ramp(dim, base)
        inv_freq = 1.0 / (self.factor * inverse_theta) * (1.0 - kept) + 1.0 / inverse_theta * kept
        return inv_freq, self._attention_factor()

    def _ramp(self, dim: int, base: float) -> Tensor:
        def index_turning(times: float) -> float:
            return dim * math.log(self.original_max_position / (times * 2.0 * math.pi)) / (2.0 * math.log(base))

        first, last = index_turning(self.beta_fast), index_turning(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        if first == last:
            last += 0.001  # a step: no index lies strictly between
        return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0.0, 1.0)

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        log_factor = 0.1 * math.log(self.factor)
        if self.mscale is None or self.mscale_all_dim is None:
            return log_factor + 1.0
        return (self.mscale * log_factor + 1.0) / (self.mscale_all_dim * log_factor + 1.0)


@dataclass(frozen=True)
class LongRoPE(Scaling, name="longrope"):
    """A searched divisor for every pair: theta_i / short_i up to L0 tokens, theta_i / long_i past it.

    attention_factor = sqrt(1 + ln s / ln L0), whatever the length.
    Ding et al., LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens, arXiv 2402.13753; the short and long
    lists and the attention factor as in Phi-3 and transformers modeling_rope_utils.py, "longrope".

    Args:
        factor: s, at least 1; enters the attention factor only.
        original_max_position: L0, in tokens.
        short_factor: dim / 2 positive divisors.
        long_factor: dim / 2 positive divisors.
        attention_factor: replaces the formula's.
    """

    factor: float
    original_max_position: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _number(self, "factor", at_least=1.0)
        _length(self, "original_max_position")
        _numbers(self, "short_factor", above=0.0)
        _numbers(self, "long_factor", above=0.0)
        if self.attention_factor is not None:
            _number(self, "attention_factor", above=0.0)

    def regime(self, length: int) -> int | None:
        return self.original_max_position + 1 if length > self.original_max_position else 1

    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        name = "long_factor" if length > self.original_max_position else "short_factor"
        factors = getattr(self, name)
        if len(factors) != dim // 2:
            raise InvalidInput(name, f"{dim // 2} numbers, one for each pair", len(factors))
        divisors = torch.tensor(factors, dtype=torch.float32, device="cpu")
        return 1.0 / (divisors * _inverse_theta(dim, base)), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_max_position))


@dataclass(frozen=True)
class Llama3(Scaling, name="llama3"):
    """Slow pairs are interpolated, fast ones kept, by how often they turn within L0 tokens.

    With turns_i = L0 theta_i / (2 pi) and keep_i = clamp((turns_i - low) / (high - low), 0, 1):

        theta'_i = (1 - keep_i) theta_i / s + keep_i theta_i

    Llama 3.1, github.com/meta-llama/llama-models, models/llama3/model.py, apply_scaling.

    Args:
        factor: s, at least 1.
        original_max_position: L0, in tokens.
        low_freq_factor: turns up to which a pair is fully interpolated.
        high_freq_factor: turns from which a pair is left alone; above low_freq_factor.
    """

    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _number(self, "factor", at_least=1.0)
        _length(self, "original_max_position")
        _number(self, "low_freq_factor", above=0.0)
        _number(self, "high_freq_factor", above=self.low_freq_factor)

    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        theta = inverse_frequencies(dim, base)
        turns = self.original_max_position / (2.0 * math.pi / theta)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return (1.0 - keep) * theta / self.factor + keep * theta, 1.0


@dataclass(frozen=True)
class Proportional(Scaling, name="proportional"):
    """p-RoPE: the first floor(p D / 2) pairs, the fastest, turn (by theta_i / s); the others stand still.

    Unlike a smaller `dim`, the frequencies that remain are those of the full width, spread over the whole head.
    Barbero et al., Round and Round We Go! What makes Rotary Positional Encodings useful?, arXiv 2410.06205, section 6;
    transformers modeling_rope_utils.py, "proportional".

    Args:
        proportion: p, from 0 (no pair turns) to 1 (all do).
        factor: s, at least 1.
    """

    proportion: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        _number(self, "proportion", at_least=0.0, at_most=1.0)
        _number(self, "factor", at_least=1.0)

    def frequencies(self, dim: int, base: float, length: int) -> Frequencies:
        turning = math.floor(self.proportion * dim / 2)
        inv_freq = torch.zeros(dim // 2, dtype=torch.float32, device="cpu")
        inv_freq[:turning] = 1.0 / _inverse_theta(dim, base, turning) / self.factor
        return inv_freq, 1.0


def _fields(cls: type[Any]) -> tuple[Field[Any], ...]:
    return fields(cls)  # those that have a name are dataclasses


def finite_number(
    argument: str, value: Any, *, at_least: float = -math.inf, at_most: float = math.inf, above: float = -math.inf
) -> float:
    """The value as a float; InvalidInput where it is not a number within the bounds."""
    if isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value):
        number = float(value)
        if at_least <= number <= at_most and number > above:
            return number
    bounds = {"at least": at_least, "at most": at_most, "above": above}
    finite = [f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound)]
    raise InvalidInput(argument, f"a finite number {' and '.join(finite)}", value)


def _is_finite(value: Any) -> bool:
    return bool(abs(value) <= sys.float_info.max)  # also where an int is too large for a float


def _number(scaling: Scaling, name: str, **bounds: float) -> None:
    """Check an argument and store it as a float, so that 4 and 4.0 are one value."""
    object.__setattr__(scaling, name, finite_number(name, getattr(scaling, name), **bounds))


def _numbers(scaling: Scaling, name: str, **bounds: float) -> None:
    values = getattr(scaling, name)
    if not isinstance(values, (tuple, list)):
        raise InvalidInput(name, "a tuple of numbers", values)
    checked = tuple(finite_number(f"{name}[{i}]", value, **bounds) for i, value in enumerate(values))
    object.__setattr__(scaling, name, checked)


def _length(scaling: Scaling, name: str) -> None:
    value = getattr(scaling, name)
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 2:
        raise InvalidInput(name, "an int, at least 2", value)
    object.__setattr__(scaling, name, int(value))


def _check_more_than_one_pair(dim: int) -> None:
    if dim <= 2:
        raise InvalidInput("dim", "more than 2, since the base is raised by D / (D - 2)", dim)
