"""The shape of a Transformer as one immutable value, saved beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from longattn import scaling
from longattn.errors import InvalidInput
from longattn.rope import Rope
from longattn.scaling import Scaling, finite_number

__all__ = ["TransformerConfig"]

FULL, SLIDING = "L", "S"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Everything that a model is, but its weights.

    Args:
        vocab_size: V, the number of token ids; 256 for bytes.
        dim: C, the width of the residual stream.
        layers: how many blocks.
        heads: Hq, query heads.
        kv_heads: Hkv, a divisor of heads; heads by default.
        head_dim: D, even; dim / heads by default.
        hidden: inner width of the feed-forward layers; 8/3 dim by default, rounded up to a multiple of 64, where
            SwiGLU's three matrices weigh what two of width 4 dim do (Shazeer, GLU Variants, arXiv 2002.05202).
        max_length: the trained length, in tokens. Longer inputs run; a rope_scaling or sliding layers make them work.
        pattern: one letter a layer, repeated over the layers: "L" full causal attention, "S" a sliding window.
            "SSSL" is three sliding layers, then a full one.
        window: how many of the newest keys a sliding layer sees, the query's own included.
        sinks: how many of the first keys a sliding layer sees from everywhere.
        rope_base, rope_scaling: of `longattn.Rope`.
        norm_eps: of the RMSNorms.
        tie_embeddings: the output projection is the embedding.

    Raises:
        InvalidInput: a value out of range, or two that contradict each other.
    """

    vocab_size: int = 256
    dim: int
    layers: int
    heads: int
    kv_heads: int = None  # type: ignore[assignment]  # an int once constructed, as are the next two
    head_dim: int = None  # type: ignore[assignment]
    hidden: int = None  # type: ignore[assignment]
    max_length: int
    pattern: str = FULL
    window: int | None = None
    sinks: int = 0
    rope_base: float = 10000.0
    rope_scaling: Scaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "max_length"):
            _check_int(name, getattr(self, name))
        if self.head_dim is None and self.dim % self.heads:
            raise InvalidInput("dim", f"a multiple of heads {self.heads} (or head_dim beside it)", self.dim)
        self._default("kv_heads", self.heads)
        self._default("head_dim", self.dim // self.heads)
        self._default("hidden", -(-8 * self.dim // (3 * 64)) * 64)
        if self.heads % self.kv_heads:
            raise InvalidInput("kv_heads", f"a divisor of heads {self.heads}", self.kv_heads)
        self._check_pattern()
        finite_number("norm_eps", self.norm_eps, above=0.0)
        if not isinstance(self.tie_embeddings, bool):
            raise InvalidInput("tie_embeddings", "a bool", repr(self.tie_embeddings))
        _check_int("head_dim", self.head_dim, even=True)
        self.rope.frequencies(self.max_length)  # a scaling may not exist at this width

    @property
    def rope(self) -> Rope:
        """How positions rotate queries and keys."""
        return Rope(self.head_dim, self.rope_base, self.rope_scaling)

    def is_sliding(self, layer: int) -> bool:
        """Whether a layer sees a window (and the sinks) only."""
        return self.pattern[layer % len(self.pattern)] == SLIDING

    def to_dict(self) -> dict[str, Any]:
        """The arguments in plain Python values, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """The config that `to_dict` described.

        Raises:
            InvalidInput: a missing, unknown or bad argument.
        """
        names = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if not isinstance(values, Mapping) or not required <= values.keys() <= names:
            expected = f"a mapping with {sorted(required)} and any of {sorted(names - required)}"
            raise InvalidInput("config", expected, list(values) if isinstance(values, Mapping) else values)
        rope_scaling = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": None if rope_scaling is None else scaling.from_dict(rope_scaling)})

    def _default(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)
        _check_int(name, getattr(self, name))

    def _check_pattern(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern or set(self.pattern) - {FULL, SLIDING}:
            raise InvalidInput("pattern", "letters S (sliding) and L (full), at least one", repr(self.pattern))
        if len(self.pattern) > self.layers:
            raise InvalidInput("pattern", f"at most {self.layers} letters, one a layer", repr(self.pattern))
        if SLIDING in self.pattern:
            _check_int("window", self.window)
        elif self.window is not None:
            raise InvalidInput("window", "None without a sliding layer (S in pattern)", self.window)
        elif self.sinks:
            raise InvalidInput("sinks", "0 without a sliding layer (S in pattern)", self.sinks)
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise InvalidInput("sinks", "an int >= 0", repr(self.sinks))


def _check_int(name: str, value: object, *, even: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (even and value % 2):
        raise InvalidInput(name, "an even int >= 2" if even else "an int >= 1", repr(value))
