"""The attention of a Hugging Face model's layer as one call of `longattn.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longattn.errors import InvalidInput, Unsupported
from longattn.functional import attention
from longattn.inspect import attention_rows
from longattn.integrations.huggingface.frequencies import refuse_other_frequencies
from longattn.integrations.huggingface.keywords import refuse_unknown
from longattn.integrations.huggingface.methods import attend, methods_of
from longattn.integrations.huggingface.packing import packed_bounds
from longattn.integrations.huggingface.visibility import Visibility, hides_nothing, keywords
from longattn.redirection import on_shards, token_places


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a layer. transformers' AttentionInterface calls it.

    Args:
        module: the layer.
        query: [B, Hq, Nq, D]; key, value: [B, Hkv, Nk, D or Dv], the cached ones included.
        attention_mask: the Visibility made for this call, a 4-D mask that the caller gave to the model (bool, or
            floating and added to the scores), or None: the layer's is_causal decides.
        scaling, dropout, softcap: as `scale`, `dropout_p` and `softcap` of `longattn.attention`.
        position_bias: added to the scores, broadcastable to [B, Hq, Nq, Nk] (T5).
        s_aux: [Hq], learned sink logits (gpt-oss).
        is_causal: what a layer without a mask is; None: the module's own is_causal.
        sliding_window: of a layer without a mask, where it has to hide nothing; masks carry it otherwise.
        cu_seq_lens_q, cu_seq_lens_k: int32, where the sequences packed in a row of batch 1 start and the last ends.
        output_attentions: return the weights, too; a tensor [B, Hq, Nq, Nk] that nothing else makes.
        position_ids, use_cache: where the documents packed in a row start, if the mask was made without them.
        others: keywords in `keywords.WITHOUT_EFFECT`, or None.

    Returns:
        (out [B, Nq, Hq, Dv], the weights before dropout or None).

    Raises:
        InvalidInput, Unsupported: as `longattn.attention`; also for a mask or keyword that it cannot honour.
    """
    refuse_unknown(module, others)
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, the same for all
    call = _visible(module, attention_mask, query, key, is_causal, sliding_window)
    start = attention_mask.start if isinstance(attention_mask, Visibility) else None
    if position_bias is not None:
        dense = call.pop("bias", None)
        call["bias"] = position_bias if dense is None else _biased(position_bias, dense)
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        call["bounds"], start = _within_sequences(cu_seq_lens_q, cu_seq_lens_k, query, call)
    elif isinstance(attention_mask, Visibility):
        packed = packed_bounds(module, attention_mask, position_ids, use_cache)
        if packed is not None:
            call["bounds"] = packed
            start = packed[0].view(-1, query.shape[2])
    call |= {"scale": scaling, "softcap": softcap, "sink_logits": s_aux}
    refuse_other_frequencies(module, query, key, start, call, position_ids)
    methods = methods_of(module)
    wants_weights = output_attentions or _weights_are_captured()
    if methods:
        if wants_weights:
            raise Unsupported("output_attentions", {"every backend": ["a method of config.longattn changes them"]})
        call["dropout_p"] = dropout
        return attend(module, methods, query, key, value, start, call).transpose(1, 2), None
    out = attention(query, key, value, dropout_p=dropout, **call)
    assert isinstance(out, Tensor)
    weights = None
    if wants_weights:
        weights = attention_rows(query, key, range(query.shape[2]), **call).to(query.dtype)
    return out.transpose(1, 2), weights


def _weights_are_captured() -> bool:
    """Whether the model was asked for its attentions without telling its layers, as GPT-2 does."""
    if torch.compiler.is_compiling():
        return False
    from transformers.utils import output_capturing

    collector = getattr(output_capturing, "_active_collector", None)
    wanted = None if collector is None else collector.get()
    return any("attentions" in name for name in wanted or ())


def _visible(
    module: nn.Module,
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
) -> dict[str, Any]:
    """The keywords of `longattn.attention` that say which keys a query sees."""
    nq, nk = query.shape[2], key.shape[2]
    if mask is not None and mask.dim() != 4:
        raise InvalidInput("attention_mask", "4 dimensions in an attention layer", f"shape {tuple(mask.shape)}")
    if isinstance(mask, Visibility):
        if hides_nothing(mask):
            return {}
        if tuple(mask.shape[2:]) != (nq, nk):
            raise InvalidInput("attention_mask", f"a mask made for {nq} queries and {nk} keys", repr(mask))
        if is_causal is False and mask.right == 0 and getattr(module, "is_causal", None) is True:
            reason = "the mask was made by config.is_causal, which is True; set it to False before the call"
            raise Unsupported("is_causal=False", {"every backend": [reason]})
        return keywords(mask)
    if mask is not None:
        return {"bias": mask}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        return {}
    if sliding_window is not None and sliding_window < nk:
        raise InvalidInput("attention_mask", f"a mask, as sliding_window {sliding_window} hides keys", None)
    if nq == 1 and not on_shards():
        return {}
    return {"causal": True, "align": "start"}  # the meaning in PyTorch's scaled_dot_product_attention


def _biased(bias: Tensor, mask: Tensor) -> Tensor:
    """A bias under a dense mask, bool (True = visible) or to be added."""
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _within_sequences(
    cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor, query: Tensor, call: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The bounds of queries that see only the keys of their own sequence, and of `call`; and where these start."""
    if len(query) != 1:
        raise InvalidInput("cu_seq_lens_q", "None beside more than one row: sequences are packed in one", len(query))
    one_sided = call.get("causal") or call.get("window") is not None
    if one_sided and cu_seq_lens_q is not cu_seq_lens_k and not torch.compiler.is_compiling():
        if not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
            raise InvalidInput("cu_seq_lens_k", "cu_seq_lens_q, where the mask depends on positions", "other lengths")
    index = token_places(query.shape[2], query.device)
    sequence = torch.searchsorted(cu_seq_lens_q, index, right=True)
    ends = torch.cat((cu_seq_lens_k, cu_seq_lens_k.new_zeros(1)))  # tokens past the last sequence see nothing
    lo, hi = ends[sequence - 1].to(torch.int32), ends[sequence].to(torch.int32)
    start = lo[None]
    if call.get("bounds") is not None:
        lo, hi = torch.maximum(lo, call["bounds"][0]), torch.minimum(hi, call["bounds"][1])
    return (lo, hi), start
