"""torch.vmap over a call: the samples become sequences of one larger batch, or, where they cannot, calls in turn.

What a call knows by sequence may differ by sample. What all its sequences share may not: how they are packed, the
logits of learned sinks, and the numbers of dropout, which count the sequences of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longattn.problem import Tensors

_SHARED = ("cu_seqlens_q", "cu_seqlens_k", "sink_logits", "inv_freq", "seed")
_ONE_FOR_ALL = ("lo", "hi", "positions_q", "positions_k", "alibi_slopes")  # with one dimension; with two, by sequence


def one_by_one(call: Callable[..., Any], size: int, dims: Sequence[Any], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """What the call returns for each sample, stacked. An argument holds the samples at its dim, or serves all."""
    results = []
    for sample in range(size):
        chosen = [x.select(dim, sample) if isinstance(dim, int) else x for x, dim in zip(args, dims, strict=True)]
        found = call(*chosen)
        results.append((found,) if isinstance(found, Tensor) else found)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def fold(x: Tensor, dim: int | None, size: int, batch: int, by_sequence: bool = True) -> Tensor:
    """x of all samples, one after another: [size * batch, ...].

    Args:
        dim: where x holds the samples; None: the same for all.
        by_sequence: whether each has a leading dimension of sequences, `batch` of them or one for all.
    """
    x = x[None] if dim is None else x.movedim(dim, 0)
    if not by_sequence:
        x = x[:, None]
    x = x.expand(size, batch, *x.shape[2:])
    return x.reshape(size * batch, *x.shape[2:])


class Samples(NamedTuple):
    """The tensors of `size` calls: those of one, and where (`dims`) each of them holds a dimension of samples."""

    size: int
    tensors: Tensors
    dims: Tensors

    @property
    def batch(self) -> int:
        """Sequences of one call."""
        return self.shape_of("q")[0]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """That of one sample."""
        shape, dim = list(getattr(self.tensors, name).shape), getattr(self.dims, name)
        if dim is not None:
            shape.pop(dim)
        return tuple(shape)

    def folded(self, own: Collection[str]) -> Tensors | None:
        """The tensors of one call on all samples; None if there is no such call.

        Args:
            own: names of tensors that each sample must have for itself, as each asks for its gradient.
        """
        tensors, dims = self.tensors, self.dims
        if tensors.cu_seqlens_q is not None or tensors.seed is not None:
            return None
        if any(name in own or getattr(dims, name) is not None for name in _SHARED):
            return None
        by_sample = {name for name in Tensors._fields if name in own or getattr(dims, name) is not None}
        if by_sample & {"lo", "hi"}:
            by_sample |= {"lo", "hi"}
        folded: dict[str, Any] = {
            name: x if x is None or self._serves_all(name, by_sample) else self.fold(name, x, getattr(dims, name))
            for name, x in zip(Tensors._fields, tensors, strict=True)
        }
        return Tensors(**folded)

    def fold(self, name: str, x: Tensor, dim: int | None) -> Tensor:
        """x, a tensor of the call or a gradient of its shape, of all samples one after another."""
        return fold(x, dim, self.size, self.batch, self._is_by_sequence(name))

    def unfold(self, name: str, x: Tensor) -> Tensor:
        """The transpose of `fold`: by sample, [size, ...], x a gradient (or an output, by sequence)."""
        x = x.unflatten(0, (self.size, self.batch))
        if name not in Tensors._fields:
            return x
        shape = self.shape_of(name)
        leading = shape if self._is_by_sequence(name) else (1, *shape)
        return x.sum_to_size(self.size, *leading).reshape(self.size, *shape)

    def _is_by_sequence(self, name: str) -> bool:
        return not (name in _ONE_FOR_ALL and len(self.shape_of(name)) == 1)

    def _serves_all(self, name: str, by_sample: Collection[str]) -> bool:
        """Whether the call reads the tensor for every sequence as it is."""
        if name in by_sample:
            return False
        one_for_all = name == "bias" and self.shape_of(name)[0] == 1
        return one_for_all or name in _SHARED or not self._is_by_sequence(name)
