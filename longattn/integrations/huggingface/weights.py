"""How one family's weights are another's: names, transposes, fused matrices, and what follows from the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.errors import InvalidInput

__all__ = ["Names", "Weight", "is_finite", "to_ours", "to_theirs", "without_derived"]


class Weight(NamedTuple):
    """Where a family keeps one of our weights: all of a tensor, or one of the three parts of its fused dimension."""

    name: str
    transposed: bool = False
    part: int | None = None


Names = Mapping[str, Weight]  # by our names

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def to_ours(names: Names, theirs: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Our weights of a checkpoint's.

    Args:
        shapes: of our weights, by our names.

    Raises:
        InvalidInput: missing or unexpected weights, or some of another shape, of no floating dtype, or not finite;
            named as the checkpoint names them.
    """
    wanted = {weight.name for weight in names.values()}
    problems = [f"missing {name}" for name in wanted - theirs.keys()]
    problems += [f"unexpected {name}" for name in theirs.keys() - wanted]
    ours: dict[str, Tensor] = {}
    for name, (source, transposed, part) in names.items():
        given = theirs.get(source)
        if given is None:
            continue
        value = given.mT if transposed and given.dim() == 2 else given
        value = value if part is None or not value.dim() else value.tensor_split(3)[part]
        if value.shape != shapes[name]:
            problems.append(f"{source} of shape {tuple(given.shape)} for our {name} {tuple(shapes[name])}")
        elif given.dtype not in _DTYPES:
            problems.append(f"{source} of {given.dtype}")
        ours[name] = (
            value if transposed is False and part is None else value.clone(memory_format=torch.contiguous_format)
        )
    problems += [f"{name} is not finite" for name in sorted(wanted & theirs.keys()) if not is_finite(theirs[name])]
    if problems:
        listing = "; ".join(sorted(problems)[:8]) + (f"; {len(problems) - 8} more" if len(problems) > 8 else "")
        raise InvalidInput("checkpoint", "the weights that its config asks for", listing)
    return ours


def is_finite(weight: Tensor) -> bool:
    """Return whether all numbers of a floating tensor are finite, without a tensor of as many flags."""
    if weight.dtype not in _DTYPES or not weight.numel() or weight.is_meta:
        return True
    return bool(torch.stack(weight.detach().aminmax()).isfinite().all())


def to_theirs(names: Names, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A family's weights of ours, as copies."""
    parts: dict[str, dict[int, Tensor]] = {}
    transposed = {weight.name for weight in names.values() if weight.transposed}
    for name, weight in names.items():
        parts.setdefault(weight.name, {})[weight.part or 0] = ours[name]
    whole = {name: torch.cat([found[part] for part in sorted(found)]) for name, found in parts.items()}
    return {name: value.mT.contiguous() if name in transposed else value for name, value in whole.items()}


def without_derived(state: Mapping[str, Tensor], derived: Mapping[str, str]) -> dict[str, Tensor]:
    """Without the weights that are tied to others.

    Args:
        derived: the name that each tied weight is equal to.

    Raises:
        InvalidInput: a weight that is not what it is tied to.
    """
    kept = dict(state)
    for name, original in derived.items():
        if name in kept and original in kept:
            tied, weight = kept.pop(name), kept[original]
            if tied.dtype != weight.dtype or not torch.equal(tied, weight):
                raise InvalidInput(
                    "checkpoint", f"{name} equal to {original}, as its config ties them", "other weights"
                )
        elif name in kept:
            kept[original] = kept.pop(name)
    return kept
