"""The methods as values. Notation: L0 the trained length, p a query's place in its sequence, j a key's."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.extension.parts import Part
from longattn.extension.places import Places
from longattn.rope import Rope
from longattn.scaling import Named, finite_number

__all__ = [
    "BaseChange",
    "DualChunk",
    "LayerPattern",
    "LearnedPositions",
    "LogN",
    "Method",
    "Remapping",
    "SelfExtend",
    "ShiftedGroups",
    "StreamingLLM",
    "check_layer_methods",
]


class Method(Named, kind="method"):
    """One way to make a trained model read further, beside those of `longattn.scaling`."""


class Remapping(Method):
    """Gives keys other positions far from a query than near, so that no distance is longer than a trained one."""

    @abstractmethod
    def parts(self, places: Places) -> list[Part]:
        """The parts that together are all keys up to each query's own."""


@dataclass(frozen=True)
class SelfExtend(Remapping, name="self_extend"):
    """Keys nearer than `window` stand where they are; farther ones, and the query for them, in groups.

        p - j < W:   q at p,                            k at j
        else:        q at floor(p/G) + W - floor(W/G),  k at floor(j/G)

    Reads about (L0 - W) G + W tokens. Jin et al., LLM Maybe LongLM, arXiv 2401.01325; github.com/datamllab/LongLM.

    Args:
        group: G, tokens that share a position; at least 1, and at least 2 to extend a model.
        window: W, at least 1, well below L0.
    """

    group: int
    window: int

    def __post_init__(self) -> None:
        _check_int("group", self.group, 1)
        _check_int("window", self.window, 1)

    def parts(self, places: Places) -> list[Part]:
        p, at = places.queries, places.in_sequence
        oldest = p - self.window + 1
        near = Part(torch.maximum(places.starts, oldest), p + 1)
        if places.keys.shape[-1] <= self.window:
            return [near]
        shift = self.window - self.window // self.group
        grouped = _floor_divide(at, self.group) + shift, _floor_divide(places.keys, self.group)
        return [near, Part(places.starts, oldest, grouped)]


@dataclass(frozen=True)
class DualChunk(Remapping, name="dual_chunk"):
    """Dual chunk attention: keys stand where they do in their chunk, queries by how many chunks lie between.

        k at j mod c;   q at p mod c for its own chunk,  min(p mod c + c, longest) for the one before,  longest else

    An et al., Training-Free Long-Context Scaling of Large Language Models, arXiv 2402.17463; github.com/HKUNLP/
    ChunkLlama, where c is chunk_size - local_window, and longest chunk_size.

    Args:
        chunk: c, tokens of a chunk.
        longest: the longest distance that the rotation sees, at least c and below L0. Up to longest - c tokens before
            a query, distances are true ones wherever chunks begin.
    """

    chunk: int
    longest: int

    def __post_init__(self) -> None:
        _check_int("chunk", self.chunk, 1)
        _check_int("longest", self.longest, self.chunk)

    @classmethod
    def of(cls, original_max_position: int) -> DualChunk:
        """The sizes that ChunkLlama takes for a trained length: longest 3/4 of it, 1/16 of it between longest and c."""
        longest = max(1, original_max_position * 3 // 4)
        return cls(max(1, longest - original_max_position // 16), longest)

    def parts(self, places: Places) -> list[Part]:
        p, at, c = places.queries, places.in_sequence, self.chunk
        inside = at.remainder(c)
        keys = places.keys.remainder(c)
        own = p - inside
        before = torch.maximum(places.starts, own - c)
        parts = [
            Part(own, p + 1, (inside, keys)),
            Part(before, own, ((inside + c).clamp(max=self.longest), keys)),
            Part(places.starts, before, (torch.full_like(inside, self.longest), keys)),
        ]
        chunks = -(-places.keys.shape[-1] // c)
        return parts[: max(1, chunks)]


@dataclass(frozen=True)
class LogN(Method, name="log_n"):
    """Queries are multiplied by max(1, ln(p + 1) / ln L0): the more keys, the sharper the softmax.

    Su, https://kexue.fm/archives/8823, 2021; Qwen's use_logn_attn.

    Args:
        original_max_position: L0, in tokens.
    """

    original_max_position: int

    def __post_init__(self) -> None:
        _check_int("original_max_position", self.original_max_position, 2)

    def scaled(self, q: Tensor, positions: Tensor) -> Tensor:
        """q [B, H, N, D] of queries at positions [N] or [B, N]."""
        length = (positions + 1).clamp(min=1).to(torch.float32)
        scale = (length.log() / math.log(self.original_max_position)).clamp(min=1.0)
        scale = scale[:, None, :, None] if scale.dim() == 2 else scale[:, None]
        return q * scale.to(q.dtype)


@dataclass(frozen=True)
class ShiftedGroups(Method, name="shifted_groups"):
    """LongLoRA's S2-attention: in training, tokens see their group only, and half of the heads have other groups.

    Chen et al., LongLoRA, arXiv 2309.12307. There the shifted groups wrap around, and the first tokens of a text see
    its last ones; here the first shifted group is half as long.

    Args:
        group: tokens of a group, even; the paper takes a quarter of the length.
    """

    group: int

    def __post_init__(self) -> None:
        _check_int("group", self.group, 2)
        if self.group % 2:
            raise InvalidInput("group", "an even int", self.group)


@dataclass(frozen=True)
class BaseChange(Method, name="base"):
    """Another base of the rotation, for models that are trained on with it (ABF).

    Xiong et al., Effective Long-Context Scaling of Foundation Models, arXiv 2309.16039.

    Args:
        base: b, above 1.
    """

    base: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", finite_number("base", self.base, above=1.0))


@dataclass(frozen=True)
class StreamingLLM(Method, name="streaming"):
    """All layers see the first `sinks` tokens and the newest `window`, at their places in a cache of these.

    Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.

    Args:
        window: tokens, the query's own included; below L0, or what the model's scaling makes of it, and with the sinks
            at most that.
        sinks: first tokens that stay.
    """

    window: int
    sinks: int = 4

    def __post_init__(self) -> None:
        _check_int("window", self.window, 1)
        _check_int("sinks", self.sinks, 0)


@dataclass(frozen=True)
class LayerPattern(Method, name="pattern"):
    """Which layers see what.

    Args:
        pattern: one letter a layer, repeated: "L" as it is, "S" a window, "N" without rotation (NoPE).
        window: tokens that a layer "S" sees, the query's own included.
        sinks: first tokens that a layer "S" sees from everywhere.
    """

    pattern: str
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern or set(self.pattern) - set("LSN"):
            raise InvalidInput("pattern", "letters L, S and N, at least one", repr(self.pattern))
        if "S" in self.pattern:
            _check_int("window", self.window, 1)
        elif self.window is not None or self.sinks:
            raise InvalidInput("window", "None, and no sinks, without a layer S", self.window)
        _check_int("sinks", self.sinks, 0)

    def letter(self, layer: int) -> str:
        """That of a layer."""
        return self.pattern[layer % len(self.pattern)]


@dataclass(frozen=True)
class LearnedPositions(Method, name="learned"):
    """Learned position vectors between the trained ones: place p takes the vector of p / s, linearly interpolated.

    Chen et al., arXiv 2306.15595, for a table in place of a rotation. Needs a fine-tune.

    Args:
        factor: s, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", finite_number("factor", self.factor, at_least=1.0))

    def length(self, trained: int) -> int:
        """Rows of the new table."""
        return int(trained * self.factor)

    def interpolated(self, table: Tensor) -> Tensor:
        """The new table of a trained one [L0, C]; past (L0 - 1) s the last vector."""
        places = torch.arange(self.length(len(table)), dtype=torch.float64, device=table.device) / self.factor
        places = places.clamp(max=len(table) - 1)
        below = places.floor().long()
        above = (below + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[below], table[above], (places - below)[:, None].to(table.dtype))


def check_layer_methods(methods: Sequence[Method], rope: Rope | None) -> None:
    """Raise InvalidInput unless an attention layer can take these: at most one of LogN, ShiftedGroups and a Remapping.

    A Remapping needs a rotation whose frequencies do not depend on the length.
    """
    if not isinstance(methods, Sequence):
        raise InvalidInput("methods", "a sequence of methods", repr(methods))
    kinds: list[type[Method]] = [LogN, ShiftedGroups, Remapping]
    for method in methods:
        kind = next((kind for kind in kinds if isinstance(method, kind)), None)
        if kind is None:
            raise InvalidInput("methods", "at most one of LogN, ShiftedGroups, and SelfExtend or DualChunk", method)
        kinds.remove(kind)
        if kind is Remapping:
            if rope is None:
                raise InvalidInput("methods", "none that gives tokens positions, without a rotation", method)
            if rope.depends_on_length:
                raise InvalidInput("methods", f"none that gives tokens positions beside {rope.scaling}", method)


def _floor_divide(x: Tensor, by: int) -> Tensor:
    return torch.div(x, by, rounding_mode="floor")


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InvalidInput(name, f"an int >= {least}", repr(value))
