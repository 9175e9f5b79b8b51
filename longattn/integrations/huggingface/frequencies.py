"""Keys in transformers' caches, which are rotated with the frequencies of the call that appended them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longattn.errors import Unsupported

__all__ = ["refuse_other_frequencies"]


def refuse_other_frequencies(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    start: Tensor | None,
    call: Mapping[str, Any],
    position_ids: Tensor | None,
) -> None:
    """Refuse a call whose cached keys were rotated with other frequencies than its queries.

    DynamicNTK's frequencies change with every token past the trained length, and LongRoPE's change once, there. A
    reading of the whole text rotates all keys with those of its length; a cache holds what earlier lengths gave.

    Args:
        module: the layer. query: [B, Hq, Nq, D]; key: [B, Hkv, Nk, D], the cached ones included.
        start: where sequences start among the keys, as `Visibility.start`.
        call: the keywords of `longattn.attention` that the model and its mask ask for.
        position_ids: int [..., Nq], that the rotation was made of, where the layer was given them.

    Raises:
        Unsupported: the frequencies changed between the calls. In compiled code, which cannot look: they may have.
    """
    found = _changing(module)
    new, keys = query.shape[2], key.shape[2]
    if found is None or keys <= new or call.get("align") == "start":
        return
    kind, trained = found
    if torch.compiler.is_compiling():
        before, after = 1, keys
    else:
        before, after = _lengths(new, keys, start, call, position_ids)
    if before > 0 and after > trained and (kind == "dynamic" or before <= trained):
        why = (
            f"its keys were rotated with the frequencies of fewer tokens, and those of {kind} change past {trained}; "
            "read without a cache (use_cache=False), or take our own models' caches (huggingface.from_hf)"
        )
        raise Unsupported(f"{kind} rotation with a cache of {before} tokens", {"every backend": [why]})


def _changing(module: nn.Module) -> tuple[str, int] | None:
    """Return the rope type of a layer, where its frequencies depend on the length, and its trained length."""
    config: Any = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return None
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and layer is not None and isinstance(parameters.get(kinds[layer]), Mapping):
        parameters = parameters[kinds[layer]]
    kind = parameters.get("rope_type")
    if kind == "dynamic":
        return kind, config.max_position_embeddings
    if kind != "longrope":
        return None
    original = getattr(config, "original_max_position_embeddings", None)
    return kind, parameters.get("original_max_position_embeddings") or original or config.max_position_embeddings


def _lengths(
    new: int, keys: int, start: Tensor | None, call: Mapping[str, Any], position_ids: Tensor | None
) -> tuple[int, int]:
    """Return the tokens before a call and after it, of the longest sequence, as the rotation counts them."""
    if call.get("align") == "end" and call.get("key_mask") is None and call.get("window") in (None, (-1, 0)):
        return keys - new, keys  # without a value read from the device: no padding, and nothing was forgotten
    if position_ids is not None and position_ids.shape[-1] == new:
        return int(position_ids[..., 0].max()), int(position_ids.max()) + 1
    offset = call.get("align", "end")
    first = offset if isinstance(offset, Tensor) else torch.tensor([keys - new], device="cpu")
    before = int((first if start is None else first.to(start) - start[:, 0]).max())
    return before, before + new
