"""Documents packed in a row, known by position_ids that reach a layer and not the mask that was made for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longattn.errors import Unsupported
from longattn.integrations.huggingface.visibility import Visibility
from longattn.onnx_export import running_max
from longattn.redirection import on_shards, token_places

__all__ = ["MASKS_WITHOUT_POSITIONS", "packed_bounds"]

_LIBRARY = "transformers.models."

# The model families of transformers that pass position_ids to their layers, but not to the functions that make causal
# masks. All the others have packed rows in the mask, and need no second look.
MASKS_WITHOUT_POSITIONS = frozenset(
    {
        "afmoe",
        "biogpt",
        "deepseek_ocr2",
        "dia",
        "evolla",
        "gpt_oss",
        "opt",
        "timesfm2_5",
    }
)


def packed_bounds(
    module: nn.Module, mask: Visibility, position_ids: Tensor | None, use_cache: bool | None
) -> tuple[Tensor, Tensor] | None:
    """Return the bounds within which the queries of a packed row see keys, or None if the mask says all.

    A document starts where position_ids do not grow by one. Their values decide nothing but the bounds: no branch
    depends on them. The bounds are computed once for all layers that share a mask.

    Args:
        module: the layer.
        mask: the one that transformers made for it.
        position_ids: [1 or B, N].
        use_cache: as the layer got it; packed rows do not go with caches.

    Returns:
        lo, hi: int32 [N] or [B, N], as `bounds` of `longattn.attention`.

    Raises:
        Unsupported: documents packed in shards of a sequence.
    """
    if position_ids is None or use_cache or not mask.plain or not _may_be_missing(module):
        return None
    rows, _, nq, nk = mask.shape
    if position_ids.dim() != 2 or position_ids.shape[1] != nq or nq != nk or position_ids.shape[0] not in (1, rows):
        return None
    known = None if torch.compiler.is_dynamo_compiling() else mask.packed
    if known is not None and known[0] is position_ids:
        return known[1]
    grown = token_places(nq, position_ids.device).diff()  # 1; where a shard has two parts of a sequence, more
    starts = F.pad(position_ids.diff(dim=-1) != grown, (1, 0), value=True)
    if on_shards():
        if starts[:, 1:].any():
            reason = "packed documents do not run on shards of a sequence; without any, give an attention_mask"
            raise Unsupported("position_ids that do not grow by one", {"every backend": [reason]})
        return None
    index = torch.arange(nq, device=position_ids.device)
    lo = running_max(torch.where(starts, index, 0)).to(torch.int32)
    lo = lo[0] if lo.shape[0] == 1 else lo
    bounds = lo, torch.full_like(lo, nk)  # the mask is causal: what comes later is hidden by it
    if not torch.compiler.is_dynamo_compiling():
        mask.packed = position_ids, bounds
    return bounds


def _may_be_missing(module: nn.Module) -> bool:
    """Return whether the mask of this layer may have been made without position_ids."""
    code = type(module).__module__
    return not code.startswith(_LIBRARY) or code[len(_LIBRARY) :].split(".")[0] in MASKS_WITHOUT_POSITIONS
