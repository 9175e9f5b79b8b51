"""The contenders of attention: ours, PyTorch's, FlexAttention, flash-attn and the plain formula."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import longattn.functional
from longattn.bench.cases import AttentionCase, AttentionInputs
from longattn.bench.contenders import Contender, Prepared, Refused, compiled, refuse_quadratic, refuse_reference
from longattn.mask import KeyRange

# A function (q [B, Hq, Nq, D], k, v [B, Hkv, Nk, D]) -> out, and the tensors that it holds, such as its mask.
Attend = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[Tensor, ...]]

_FLEX_BLOCK = 128  # queries and keys of a block of FlexAttention's masks, its default


def contenders(case: AttentionCase) -> list[Contender]:
    """All that there are on the case's device; each refuses for itself what it cannot do."""
    packed, cuda = bool(case.documents), case.device == "cuda"
    found = [Contender("longattn", "ours", _ours_packed if packed else _over(ours))]
    if packed:
        found.append(Contender("SDPA, one by one", "peer", _sdpa_one_by_one))
        found.append(Contender("SDPA, padded", "peer", _sdpa_padded))
    else:
        found += [Contender(name, "peer", _over(attend)) for name, attend in sdpa_variants(case.device).items()]
    if case.bound == "bandwidth":
        found.append(Contender("SDPA, heads as queries", "peer", _sdpa_heads_as_queries))
        found.append(Contender("plain read", "baseline", _plain_read))
    if cuda and packed:
        found.append(Contender("torch varlen_attn", "peer", _torch_varlen))
    if cuda:
        for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
            prepare = partial(_flash_attn_packed, module) if packed else _over(partial(flash_attn, module))
            found.append(Contender(name, "peer", prepare))
    found.append(Contender("FlexAttention", "peer", _flex_packed if packed else _over(flex), compiled=True))
    if not packed:
        found.append(Contender("eager", "peer", _over(eager)))
    return found


def sdpa_variants(device: str) -> dict[str, Callable[[AttentionCase], Attend]]:
    """PyTorch's scaled_dot_product_attention by name; on a GPU, each of its fused backends."""
    if device == "cpu":
        return {"SDPA": sdpa}
    backends = {
        "SDPA cuDNN": "CUDNN_ATTENTION",
        "SDPA flash": "FLASH_ATTENTION",
        "SDPA efficient": "EFFICIENT_ATTENTION",
    }
    return {name: partial(sdpa, backend=backend) for name, backend in backends.items()}


def _over(attend: Callable[[AttentionCase], Attend]) -> Callable[[AttentionCase, AttentionInputs], Prepared]:
    """The preparation of a contender from its function over dense q, k and v."""

    def prepare(case: AttentionCase, inputs: AttentionInputs) -> Prepared:
        function, held = attend(case)
        return Prepared(lambda: function(inputs.q, inputs.k, inputs.v), held)

    return prepare


def ours(case: AttentionCase) -> Attend:
    """longattn.attention."""
    mask: dict[str, Any] = {"causal": case.causal, "window": case.window}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = longattn.functional.attention(q, k, v, **mask)
        assert isinstance(out, Tensor)
        return out

    small = case.small().inputs()
    refuse_reference(small.q, small.k, small.v, **mask)
    return attend, ()


def sdpa(case: AttentionCase, backend: str | None = None) -> Attend:
    """scaled_dot_product_attention: without a mask, with is_causal, or with a mask tensor, whichever is cheapest."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = case.causal and case.window is None and case.nq == case.nk and not case.hides_nothing
    mask = None if causal or case.hides_nothing else _mask(case)
    call = partial(
        F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=case.q_heads != case.kv_heads
    )
    held = () if mask is None else (mask,)
    if backend is None:
        return call, held
    chosen = getattr(SDPBackend, backend)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return call(q, k, v)

    return attend, held


def eager(case: AttentionCase) -> Attend:
    """softmax(q k^T / sqrt(D)) v, with the softmax in float32."""
    scores = case.batch * case.q_heads * case.nq * case.nk * torch.float32.itemsize
    refuse_quadratic(case, "matrix of scores", scores)
    hidden = None if case.hides_nothing else ~_mask(case)
    group, scale = case.q_heads // case.kv_heads, case.head_dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (q * scale) @ k.mT
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    return attend, () if hidden is None else (hidden,)


def flex(case: AttentionCase) -> Attend:
    """FlexAttention under torch.compile, with a block mask: it is quicker with one even where that hides nothing."""
    attend = _compiled_flex(case)
    mask = case.mask
    shift = mask.position(0, case.nq, case.nk)
    left, right = mask.left, mask.right

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if right is not None:
            seen = seen & (j <= i + shift + right)
        if left is not None:
            seen = seen & (j >= i + shift - left)
        return seen

    tiles = [mask.kv_range(first + shift, last + shift, case.nk) for first, last in _query_tiles(case.nq)]
    blocks = _block_mask(case, tiles, visible)
    return partial(attend, block_mask=blocks), _tensors_of(blocks)


def flash_attn(module: str, case: AttentionCase) -> Attend:
    """flash_attn_func of flash-attn 2 ("flash_attn") or 3 ("flash_attn_interface")."""
    function = _module(module).flash_attn_func
    window = (-1 if case.window is None else case.window - 1, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _first(function(q, k, v, causal=case.causal, window_size=window)).transpose(1, 2)

    return attend, ()


def _ours_packed(case: AttentionCase, inputs: AttentionInputs) -> Prepared:
    mask: dict[str, Any] = {"causal": case.causal, "window": case.window}
    refuse_reference(*(x[:1].transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v)), **mask)
    assert inputs.cu_seqlens is not None
    cu_seqlens, longest = inputs.cu_seqlens, max(case.documents)

    def forward() -> Tensor:
        out = longattn.functional.attention_varlen(
            inputs.q, inputs.k, inputs.v, cu_seqlens, cu_seqlens, longest, longest, **mask
        )
        assert isinstance(out, Tensor)
        return out

    return Prepared(forward)


def _sdpa_one_by_one(case: AttentionCase, inputs: AttentionInputs) -> Prepared:
    """A call per document, and a concatenation."""
    _refuse_window(case)

    def forward() -> Tensor:
        documents = zip(*(x.split(case.documents) for x in (inputs.q, inputs.k, inputs.v)), strict=True)
        return torch.cat(
            [_sdpa_causal(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1) for qkv in documents]
        )

    return Prepared(forward)


def _sdpa_padded(case: AttentionCase, inputs: AttentionInputs) -> Prepared:
    """One call on a batch of equal lengths: the copies to it and from it are part of the work.

    The padding stands behind the tokens, so no token sees it under the causal mask.
    """
    _refuse_window(case)
    longest = max(case.documents)
    padded = len(case.documents) * longest * case.q_heads * case.head_dim * case.torch_dtype.itemsize
    refuse_quadratic(case, "padded batch", padded)
    places = torch.cat([b * longest + torch.arange(n) for b, n in enumerate(case.documents)]).to(case.device)

    def pad(x: Tensor) -> Tensor:
        empty = x.new_zeros(len(case.documents) * longest, *x.shape[1:])
        return empty.index_copy(0, places, x).unflatten(0, (-1, longest)).transpose(1, 2)

    def forward() -> Tensor:
        out = _sdpa_causal(*map(pad, (inputs.q, inputs.k, inputs.v)))
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places)

    return Prepared(forward, (places,))


def _sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _sdpa_heads_as_queries(case: AttentionCase, inputs: AttentionInputs) -> Prepared:
    """The query heads that share keys as so many queries of one head: right for one query, which sees every key."""
    if not case.hides_nothing:
        raise Refused("needs queries that see every key")
    q = inputs.q.view(case.batch, case.kv_heads, -1, case.head_dim)
    return Prepared(lambda: F.scaled_dot_product_attention(q, inputs.k, inputs.v).view(inputs.q.shape))


def _plain_read(case: AttentionCase, inputs: AttentionInputs) -> Prepared:
    """Reads every bit of k and v, and does next to nothing with it."""
    words = [x.view(torch.int32).flatten() for x in (inputs.k, inputs.v)]
    return Prepared(lambda: torch.stack([x.amax() for x in words]))


def _torch_varlen(case: AttentionCase, inputs: AttentionInputs) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(case.documents)
    window = (-1 if case.window is None else case.window - 1, 0 if case.causal else -1)
    gqa = case.q_heads != case.kv_heads

    cu_seqlens = inputs.cu_seqlens
    assert cu_seqlens is not None

    def forward() -> Tensor:
        out = varlen_attn(
            inputs.q, inputs.k, inputs.v, cu_seqlens, cu_seqlens, longest, longest, window_size=window, enable_gqa=gqa
        )
        return _first(out)

    return Prepared(forward)


def _flash_attn_packed(module: str, case: AttentionCase, inputs: AttentionInputs) -> Prepared:
    function = _module(module).flash_attn_varlen_func
    longest = max(case.documents)
    window = (-1 if case.window is None else case.window - 1, -1)

    def forward() -> Tensor:
        ends = (inputs.cu_seqlens, inputs.cu_seqlens, longest, longest)
        return _first(function(inputs.q, inputs.k, inputs.v, *ends, causal=case.causal, window_size=window))

    return Prepared(forward)


def _flex_packed(case: AttentionCase, inputs: AttentionInputs) -> Prepared:
    """One sequence under a mask of documents."""
    _refuse_window(case)
    attend = _compiled_flex(case)
    lengths = torch.tensor(case.documents)
    document = torch.repeat_interleave(torch.arange(len(case.documents)), lengths)
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths).tolist()
    tiles = []
    for first, last in _query_tiles(case.nq):
        one_document = starts[first] == starts[last]
        tiles.append(KeyRange(0, starts[first], starts[last], first + 1 if one_document else starts[last], last + 1))
    document = document.to(case.device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (document[i] == document[j])

    blocks = _block_mask(case, tiles, visible)

    def forward() -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
        return attend(q, k, v, block_mask=blocks)[0].transpose(0, 1)

    return Prepared(forward, (document, *_tensors_of(blocks)))


def _compiled_flex(case: AttentionCase) -> Callable[..., Tensor]:
    if case.device == "cpu" and case.backward:
        raise Refused("has no backward on a CPU")
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(partial(flex_attention, enable_gqa=case.q_heads != case.kv_heads))


def _query_tiles(nq: int) -> Iterator[tuple[int, int]]:
    """The first and last query of each block of queries."""
    return ((first, min(first + _FLEX_BLOCK, nq) - 1) for first in range(0, nq, _FLEX_BLOCK))


def _block_mask(case: AttentionCase, tiles: Sequence[KeyRange], visible: Callable[..., Tensor]) -> Any:
    """What create_block_mask gives, in time linear in the blocks: it evaluates the mask for every pair."""
    from torch.nn.attention.flex_attention import BlockMask

    partly, fully = [], []
    for keys in tiles:
        touched = range(keys.start // _FLEX_BLOCK, -(-keys.stop // _FLEX_BLOCK))
        full = range(-(-keys.full_start // _FLEX_BLOCK), keys.full_stop // _FLEX_BLOCK)
        fully.append(list(full))
        partly.append([block for block in touched if block not in full])
    columns = -(-case.nk // _FLEX_BLOCK)
    return BlockMask.from_kv_blocks(
        *_block_lists(partly, columns, case.device),
        *_block_lists(fully, columns, case.device),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(case.nq, case.nk),
    )


def _block_lists(rows: Sequence[Sequence[int]], columns: int, device: str) -> tuple[Tensor, Tensor]:
    """The number of blocks in each row, int32 [1, 1, rows], and their places, int32 [1, 1, rows, columns]."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    places = torch.zeros(len(rows), columns, dtype=torch.int32)
    for row, blocks in zip(places, rows, strict=True):
        row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return counts[None, None].to(device), places[None, None].to(device)


def _tensors_of(blocks: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in blocks.as_tuple() if isinstance(x, Tensor))


def _mask(case: AttentionCase) -> Tensor:
    """The mask tensor, bool [Nq, Nk], True = visible."""
    refuse_quadratic(case, "mask tensor", case.nq * case.nk)
    return case.mask.materialize(case.nq, case.nk, device=case.device)[0]


def _refuse_window(case: AttentionCase) -> None:
    if not case.causal or case.window is not None:
        raise Refused("packed sequences are run with a causal mask only")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"{name} is not installed ({error})") from error


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of functions that may return their log-sum-exp beside it."""
    return result[0] if isinstance(result, tuple) else result
