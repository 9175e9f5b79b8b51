"""flash_attn.bert_padding: from padded batches to packed sequences and back. Everything is differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longattn.compat.errors import described
from longattn.compat.flash_attn.checks import check_axes, check_contents, check_indices
from longattn.errors import InvalidInput


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` [n] of input [rows, ...]: [n, ...].

    Raises:
        InvalidInput: indices that are no rows of input.
    """
    _check_rank("input", input, "rows, ...")
    _check_rows(indices, input.shape[0], input.device)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros [first_axis_dim, ...] with values [n, ...] in the rows `indices` [n].

    Raises:
        InvalidInput: another number of values than of indices, or indices that are no rows.
    """
    _check_rank("values", values, "n, ...")
    _check_rows(indices, first_axis_dim, values.device)
    if values.shape[0] != indices.shape[0]:
        raise InvalidInput("values", f"{indices.shape[0]} rows, as indices has entries", described(values))
    empty = values.new_zeros(first_axis_dim, *values.shape[1:])
    return empty.index_copy(0, indices.to(torch.int64), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that the masks select, one sequence after another.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask: bool or int [batch, seqlen], nonzero = a token.
        unused_mask: as attention_mask: tokens that are kept, too, but not counted as used.

    Returns:
        The tokens [total, ...]; indices int64 [total], their places in the flattened batch; cu_seqlens int32
        [batch + 1]; the length of the longest sequence; and int32 [batch], how many of its tokens are used.

    Raises:
        InvalidInput: masks that do not fit hidden_states.
    """
    used = _mask("attention_mask", attention_mask, hidden_states)
    kept = used if unused_mask is None else used | _mask("unused_mask", unused_mask, hidden_states)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens, longest = _sequences(kept.sum(-1, dtype=torch.int32))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, longest, used.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` where each row of the batch holds several sequences.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask_in_length: int [batch, seqlen], the lengths of the sequences in a row, then zeros.

    Returns:
        As `unpad_input`, without the last.

    Raises:
        InvalidInput: lengths that do not fit hidden_states.
    """
    _mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    totals = attention_mask_in_length.sum(-1)
    seqlen = hidden_states.shape[1]
    check_contents("attention_mask_in_length", totals, 0, seqlen, "the lengths of a row, in all")
    check_contents("attention_mask_in_length", attention_mask_in_length, 0, seqlen, "a length")
    kept = torch.arange(seqlen, device=totals.device) < totals[:, None]
    indices = kept.flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    cu_seqlens, longest = _sequences(lengths[lengths > 0].to(torch.int32))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: tokens [total, ...] back in a batch [batch, seqlen, ...] of zeros.

    Raises:
        InvalidInput: another number of tokens than of indices, or indices outside the batch.
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _check_rows(indices: Tensor, rows: int, device: torch.device) -> None:
    check_axes("indices", indices, ("total",))
    check_indices("indices", indices, tuple(indices.shape), device)
    check_contents("indices", indices, 0, rows - 1, "rows")


def _mask(name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    _check_rank("hidden_states", hidden_states, "batch, seqlen, ...")
    check_axes(name, mask, tuple(hidden_states.shape[:2]))
    if mask.is_floating_point() or mask.is_complex() or mask.device != hidden_states.device:
        raise InvalidInput(name, f"a bool or int tensor on {hidden_states.device}", f"{mask.dtype} on {mask.device}")
    return mask != 0


def _check_rank(name: str, x: object, axes: str) -> None:
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided or x.dim() < 2:
        raise InvalidInput(name, f"a tensor [{axes}]", described(x))


def _sequences(lengths: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens int32, and the longest of these lengths."""
    longest = int(lengths.max()) if lengths.numel() else 0
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), longest
