"""One attention call, validated: the tensors it reads, and a frozen description of everything else."""

from __future__ import annotations

import os
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.mask import Mask

OUT_OF_RANGE = -(2**31)  # of an offset or a length that 32 bits do not hold; no other may be so low
_PLAIN = (Tensor, torch.nn.Parameter)
_TRACERS = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))


class Tensors(NamedTuple):
    """What a kernel reads. B sequences, Hq query heads, Hkv key/value heads, Nq queries, Nk keys.

    With cu_seqlens the sequences are packed: q is [1, Hq, Tq, D], k and v are [1, Hkv, Tk, D or Dv].
    """

    q: Tensor  # [B, Hq, Nq, D], unit stride in D
    k: Tensor  # [B, Hkv, Nk, D], unit stride in D
    v: Tensor  # [B, Hkv, Nk, Dv], unit stride in Dv
    key_mask: Tensor | None = None  # bool [B, Nk], True = visible
    key_lens: Tensor | None = None  # int32 [B]
    lo: Tensor | None = None  # int32 [Nq] or [B, Nq]: query i sees lo <= j < hi
    hi: Tensor | None = None  # int32, of lo's shape
    offset: Tensor | None = None  # int32 [B]: in place of the mask's offset
    cu_seqlens_q: Tensor | None = None  # int32 [B + 1]
    cu_seqlens_k: Tensor | None = None  # int32 [B + 1]
    bias: Tensor | None = None  # floating or bool, 4-D, broadcastable to [B, Hq, Nq, Nk]
    alibi_slopes: Tensor | None = None  # floating [Hq] or [B, Hq]
    sink_logits: Tensor | None = None  # floating [Hq]
    inv_freq: Tensor | None = None  # float32 [rotated width / 2]: rope
    positions_q: Tensor | None = None  # float32 [Nq] or [B, Nq]: in place of p_i in the rotation
    positions_k: Tensor | None = (
        None  # float32 [Nk] or [B, Nk]: in place of j; queries read entry p_i unless positions_q
    )
    seed: Tensor | None = None  # int64 [1]: dropout


class CacheTensors(NamedTuple):
    """What a kernel reads in a call on a cache, beside its slots. Sequence b appends as many keys as it has queries."""

    q: Tensor | None  # [B, Hq, Nq, D], unit stride in D; None: the call only appends
    k: Tensor | None  # [B, Hkv, Nq, D], unit stride in D: new keys; None: nothing is appended
    v: Tensor | None  # [B, Hkv, Nq, Dv]
    key_lens: Tensor  # int32 [B], the new keys included
    query_lens: Tensor  # int32 [B]: the first so many queries and new keys count; they stand at the last keys
    alibi_slopes: Tensor | None = None  # floating [Hq] or [B, Hq]
    sink_logits: Tensor | None = None  # floating [Hq]
    inv_freq: Tensor | None = None  # float32 [rotated width / 2] or [B, rotated width / 2]: rope
    positions: Tensor | None = None  # float32 [Nq] or [B, Nq]: in place of those of the new tokens in the rotation
    cos: Tensor | None = None  # [1 or B, places, rotated width / 2], accumulation dtype, times the rope's factor:
    sin: Tensor | None = None  # keys lie in their slots unrotated, and rotate so when they are read
    tree: Tensor | None = None  # bool [Nq, Nq] or [B, Nq, Nq]: which new keys each query sees
    depths: Tensor | None = None  # int32 [Nq] or [B, Nq], with tree: query i stands depths[i] past the old keys


class Slots(NamedTuple):
    """Where a cache keeps its keys and values: P pages of S slots each.

    Key j of a sequence lies in its slot j, or with a ring past the first `sinks` keys in slot
    sinks + (j - sinks) % ring. Slot s of sequence b lies in page table[b, s // S].
    """

    k: Tensor  # [P, Hkv, S, D], contiguous; floating or int8
    v: Tensor  # [P, Hkv, S, Dv], as k
    k_scales: Tensor | None  # float32 [P, Hkv, S]: of int8 keys
    v_scales: Tensor | None
    table: Tensor  # int32 [B, pages of a sequence], contiguous
    ring: int = 0  # 0: no key takes another's slot
    sinks: int = 0


FEATURES = (
    "key_mask",
    "key_lens",
    "bounds",
    "bias",
    "softcap",
    "alibi_slopes",
    "sink_logits",
    "rope",
    "dropout",
    "origin",
    "varlen",
    "cache",
    "ring",
    "int8",
    "tree",
    "rotate_on_read",
)


class Origin(NamedTuple):
    """Where a call's first sequence, head, query and key stand in the attention that it is a block of.

    Dropout counts from there. All else that a block needs to know of its place, its mask says.
    """

    sequence: int = 0
    head: int = 0
    query: int = 0
    key: int = 0


_WHOLE = Origin()


class Problem(NamedTuple):
    """The metadata of one call. Hashable; a backend decides from it alone whether it can run the call."""

    batch: int
    q_heads: int
    kv_heads: int
    nq: int  # queries of one sequence; of all packed sequences if varlen
    nk: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: str
    mask: Mask
    scale: float
    softcap: float = 0.0  # 0: none
    rope_factor: float = 1.0  # scales what the rotation returns
    interleaved: bool = False  # rotation pairs (2i, 2i + 1) in place of (i, i + dim / 2)
    dropout_p: float = 0.0
    origin: Origin = _WHOLE
    deterministic: bool = False
    max_seqlen_q: int = 0  # of a packed sequence
    max_seqlen_k: int = 0
    storage: torch.dtype | None = None  # of a cache's slots
    frame: int = 0  # of a cache: keys rotate at their place among the newest so many, and the sinks before them
    features: tuple[str, ...] = ()  # of FEATURES, in that order
    needs_grad: bool = False

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def varlen(self) -> bool:
        return "varlen" in self.features

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of sums and of lse."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        heads = f"{self.q_heads}" if self.group == 1 else f"{self.q_heads}/{self.kv_heads}"
        width = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"
        mask = self.mask
        parts = [f"B {self.batch}, H {heads}, Nq {self.nq}, Nk {self.nk}, D {width}", str(self.dtype)[6:], self.device]
        if mask.left is not None or mask.right is not None:
            sinks = f", sinks {mask.sinks}" if mask.sinks else ""
            parts.append(f"left {mask.left}, right {mask.right}{sinks}")
        parts += self.features
        if self.deterministic:
            parts.append("deterministic")
        if self.needs_grad:
            parts.append("with gradient")
        return "; ".join(parts)


def present_features(tensors: Tensors, softcap: float, dropout_p: float, origin: Origin = _WHOLE) -> tuple[str, ...]:
    """The features that a call uses, of FEATURES."""
    used = (
        tensors.key_mask is not None,
        tensors.key_lens is not None,
        tensors.lo is not None,
        tensors.bias is not None,
        softcap > 0.0,
        tensors.alibi_slopes is not None,
        tensors.sink_logits is not None,
        tensors.inv_freq is not None,
        dropout_p > 0.0,
        dropout_p > 0.0 and any(origin),
        tensors.cu_seqlens_q is not None,
    )
    return tuple(compress(FEATURES, used))


def cache_features(tensors: CacheTensors, softcap: float, ring: bool, storage: torch.dtype) -> tuple[str, ...]:
    """The features that a call on a cache uses, of FEATURES."""
    used = {
        "softcap": softcap > 0.0,
        "alibi_slopes": tensors.alibi_slopes is not None,
        "sink_logits": tensors.sink_logits is not None,
        "rope": tensors.inv_freq is not None,
        "cache": True,
        "ring": ring,
        "int8": storage == torch.int8,
        "tree": tensors.tree is not None,
        "rotate_on_read": tensors.cos is not None,
    }
    return tuple([name for name in FEATURES if used.get(name)])


def check_memory(name: str, x: Tensor) -> None:
    """Refuse a tensor whose storage was freed, as FSDP frees what it gathered: its address is that of nothing.

    Raises:
        InvalidInput: the storage is empty, the tensor is not.
    """
    if not x.untyped_storage().nbytes() and x.numel():
        raise InvalidInput(name, "a tensor with storage", f"shape {tuple(x.shape)}, whose storage was freed")


def checks_enabled() -> bool:
    """Whether LONGATTN_CHECK asks for checks that cost time: those of what lies on a GPU."""
    return os.environ.get("LONGATTN_CHECK", "0") not in ("", "0")


def check_places(tensors: Tensors) -> None:
    """Read the offsets and lengths that place queries.

    Raises:
        InvalidInput: one of them did not fit into 32 bits.
    """
    for name, x in (("align", tensors.offset), ("key_lens", tensors.key_lens)):
        if x is not None and bool((x == OUT_OF_RANGE).any()):
            raise InvalidInput(name, "ints from -(2^31 - 1) to 2^31 - 1", "one outside")


def readable(x: Tensor) -> bool:
    """Return whether the values of x can be read now: not in a graph, not under a transform, and only if it has any."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or x.is_meta:
        return False
    if torch._C._len_torch_dispatch_stack() and any(torch._C._get_dispatch_mode(key) for key in _TRACERS):
        return False
    return not torch._C._are_functorch_transforms_active()


def checkable(x: Tensor) -> bool:
    """Return whether a check may read the values of x: where they are readable, and on a GPU if LONGATTN_CHECK asks."""
    return readable(x) and (x.device.type == "cpu" or checks_enabled())


def check_sequences(tensors: Tensors, problem: Problem) -> None:
    """Read what cu_seqlens hold.

    Raises:
        InvalidInput: they decrease, leave the packed tokens, or hold a sequence longer than max_seqlen.
    """
    for side, cu_seqlens, tokens, longest in (
        ("q", tensors.cu_seqlens_q, problem.nq, problem.max_seqlen_q),
        ("k", tensors.cu_seqlens_k, problem.nk, problem.max_seqlen_k),
    ):
        assert cu_seqlens is not None
        entries = cu_seqlens.tolist()
        if entries != sorted(entries) or entries[0] < 0 or entries[-1] > tokens:
            raise InvalidInput(f"cu_seqlens_{side}", f"entries of 0 to {tokens} that never decrease", f"{entries}"[:80])
        length = max([stop - start for start, stop in zip(entries, entries[1:], strict=False)], default=0)
        if length > longest:
            raise InvalidInput(f"max_seqlen_{side}", f"at least {length}, the length of a sequence", f"{longest}")
