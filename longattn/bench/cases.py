"""What is measured: the cases, their arithmetic, and their inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.mask import Mask
from longattn.models import Block, TransformerConfig
from longattn.rope import Rope

SETS = ("dense", "gqa", "window", "varlen", "decode", "rope", "module")
DTYPES = ("float32", "bfloat16", "float16")

Bound = Literal["arithmetic", "bandwidth"]

_BACKWARD = 2.5  # floating-point operations of attention's backward, per one of its forward


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The tensors of a case. `wanted` are the leaves that gradients are asked for, given `dout`, that of the output."""

    wanted: tuple[Tensor, ...] = ()
    dout: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One computation that every contender does, on the same tensors.

    Args:
        set: the name of the set it belongs to, of SETS.
        dtype: of DTYPES.
        device: "cpu" or "cuda".
        backward: whether the gradients of the output with respect to all inputs are part of it.
    """

    kind: ClassVar[str]

    set: str
    dtype: str
    device: str = "cpu"
    backward: bool = False

    @property
    @abstractmethod
    def bound(self) -> Bound:
        """What limits the computation on a machine that it suits."""

    @property
    @abstractmethod
    def length(self) -> int:
        """N, what the plots have on their x axis: the tokens that are seen."""

    @property
    @abstractmethod
    def shape(self) -> str:
        """The computation but for its length, dtype and direction, for people to read."""

    @property
    @abstractmethod
    def work(self) -> int:
        """Floating-point operations if bound by arithmetic, else the bytes that must be read and written at least."""

    @abstractmethod
    def small(self) -> Case:
        """The same computation over few tokens."""

    @abstractmethod
    def inputs(self) -> Inputs:
        """Its tensors, the same in each process."""

    @property
    def curve(self) -> str:
        """Cases of one curve differ in length only."""
        return f"{self.shape} {self.dtype} {'forward+backward' if self.backward else 'forward'}"

    @property
    def name(self) -> str:
        """Tells it from every other case."""
        return f"{self.set}: {self.curve} N {self.length}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Its arguments and its kind in plain values, for `from_dict`."""
        return {"kind": self.kind, **{field.name: getattr(self, field.name) for field in fields(self)}}

    def _random(self, *shapes: Sequence[int], seed: int = 0) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        where: dict[str, Any] = {"dtype": self.torch_dtype, "device": self.device}
        return [torch.randn(*shape, generator=generator, **where) for shape in shapes]

    def _gradients(self, wanted: Sequence[Tensor], out: Sequence[int]) -> dict[str, Any]:
        """The fields of Inputs for an output of that shape."""
        if not self.backward:
            return {}
        return {"wanted": tuple(x.requires_grad_() for x in wanted), "dout": self._random(out, seed=1)[0]}


@dataclass(frozen=True, kw_only=True)
class AttentionInputs(Inputs):
    """q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D]; packed, q [T, Hq, D], k and v [T, Hkv, D] and cu_seqlens."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None = None  # int32 [documents + 1]


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """One call of attention; with `documents`, their lengths, one call over packed sequences.

    Queries stand at the end of the keys. window counts keys, the query's own included.
    """

    kind = "attention"

    nk: int
    nq: int
    batch: int = 1
    q_heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()

    @property
    def bound(self) -> Bound:
        return "bandwidth" if self.nq == 1 else "arithmetic"

    @property
    def length(self) -> int:
        return self.nk

    @property
    def mask(self) -> Mask:
        return Mask.from_window(causal=self.causal, window=self.window)

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head, all sequences together."""
        sequences = [(n, n) for n in self.documents] or [(self.nq, self.nk)] * self.batch
        return sum(self.mask.visible_pairs(lq, lk) for lq, lk in sequences)

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every key."""
        first, last = (self.mask.position(i, self.nq, self.nk) for i in (0, self.nq - 1))
        keys = self.mask.kv_range(first, last, self.nk)
        return not self.documents and keys.full_stop - keys.full_start == self.nk

    @property
    def flops(self) -> int:
        """Two products of 2 * D operations per visible pair and head forward, 2.5 times that backward."""
        forward = 4 * self.q_heads * self.pairs * self.head_dim
        return int(forward * (1 + _BACKWARD)) if self.backward else forward

    @property
    def work(self) -> int:
        if self.bound == "arithmetic":
            return self.flops
        return 2 * self.batch * self.kv_heads * self.nk * self.head_dim * self.torch_dtype.itemsize

    @property
    def shape(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        what = "one query" if self.nq == 1 else "causal" if self.causal else "full"
        if self.window is not None:
            what = f"window {self.window}"
        if self.documents:
            what += ", documents"
        batch = f"B {self.batch} " if self.batch > 1 else ""
        return f"{what}, {batch}H {heads} D {self.head_dim}"

    def small(self) -> AttentionCase:
        n = min(self.nk, 64)
        return replace(self, nk=n, nq=min(self.nq, n), documents=(n,) if self.documents else ())

    def inputs(self) -> AttentionInputs:
        q_shape: tuple[int, ...] = (self.batch, self.q_heads, self.nq, self.head_dim)
        kv_shape: tuple[int, ...] = (self.batch, self.kv_heads, self.nk, self.head_dim)
        cu_seqlens = None
        if self.documents:
            q_shape, kv_shape = (self.nq, self.q_heads, self.head_dim), (self.nk, self.kv_heads, self.head_dim)
            ends = torch.tensor([0, *self.documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            cu_seqlens = ends.to(self.device)
        q, k, v = self._random(q_shape, kv_shape, kv_shape)
        return AttentionInputs(q=q, k=k, v=v, cu_seqlens=cu_seqlens, **self._gradients((q, k, v), q_shape))


@dataclass(frozen=True, kw_only=True)
class RopeInputs(Inputs):
    """x [B, H, N, D]."""

    x: Tensor


@dataclass(frozen=True, kw_only=True)
class RopeCase(Case):
    """The rotation of x [1, H, N, D] by its positions 0..N - 1, out of place."""

    kind = "rope"

    n: int
    heads: int
    head_dim: int

    @property
    def bound(self) -> Bound:
        return "bandwidth"

    @property
    def length(self) -> int:
        return self.n

    @property
    def rope(self) -> Rope:
        return Rope(self.head_dim)

    @property
    def work(self) -> int:
        moves = 2 * self.heads * self.n * self.head_dim * self.torch_dtype.itemsize  # read x, write the result
        return 2 * moves if self.backward else moves

    @property
    def shape(self) -> str:
        return f"rope, H {self.heads} D {self.head_dim}"

    def small(self) -> RopeCase:
        return replace(self, n=min(self.n, 64))

    def inputs(self) -> RopeInputs:
        shape = (1, self.heads, self.n, self.head_dim)
        (x,) = self._random(shape)
        return RopeInputs(x=x, **self._gradients((x,), shape))


@dataclass(frozen=True, kw_only=True)
class BlockInputs(Inputs):
    """x [1, N, C] and the block it goes through."""

    block: Block
    x: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockCase(Case):
    """A Transformer block, causal, over x [1, N, C]: norms, projections, rope, attention and SwiGLU."""

    kind = "block"

    n: int
    dim: int
    q_heads: int
    kv_heads: int
    window: int | None = None

    @property
    def bound(self) -> Bound:
        return "arithmetic"

    @property
    def config(self) -> TransformerConfig:
        return TransformerConfig(
            dim=self.dim,
            layers=1,
            heads=self.q_heads,
            kv_heads=self.kv_heads,
            max_length=self.n,
            pattern="L" if self.window is None else "S",
            window=self.window,
        )

    @property
    def attention(self) -> AttentionCase:
        """The attention within."""
        return AttentionCase(
            set=self.set,
            dtype=self.dtype,
            device=self.device,
            backward=self.backward,
            nk=self.n,
            nq=self.n,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim // self.q_heads,
            window=self.window,
        )

    @property
    def length(self) -> int:
        return self.n

    @property
    def work(self) -> int:
        config = self.config
        heads = 2 * (config.heads + config.kv_heads)  # of the projections of q and out, k and v
        weights = config.dim * (heads * config.head_dim + 3 * config.hidden)
        products = 2 * weights * self.n  # of x with every weight; backward, those for x and for the weight
        return self.attention.flops + (3 * products if self.backward else products)

    @property
    def shape(self) -> str:
        what = "causal" if self.window is None else f"window {self.window}"
        return f"block, {what}, C {self.dim} H {self.q_heads}/{self.kv_heads}"

    def small(self) -> BlockCase:
        return replace(self, n=min(self.n, 64))

    def inputs(self) -> BlockInputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            block = Block(self.config, 0)
        block = block.to(self.device, self.torch_dtype)
        if not self.backward:
            block.requires_grad_(False)
        shape = (1, self.n, self.dim)
        (x,) = self._random(shape)
        return BlockInputs(block=block, x=x, **self._gradients((x, *block.parameters()), shape))


_KINDS: dict[str, type[Case]] = {kind.kind: kind for kind in (AttentionCase, RopeCase, BlockCase)}


def from_dict(values: dict[str, Any]) -> Case:
    """The case that `to_dict` described."""
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        arguments[name] = tuple(value) if isinstance(value, list) else value
    kind = _KINDS[arguments.pop("kind")]
    return kind(**arguments)


@dataclass(frozen=True)
class Sizes:
    """How large the cases are on one kind of device."""

    widths: tuple[int, ...]  # D of dense; the last is that of gqa
    heads: int  # of dense
    lengths: tuple[int, ...]  # of dense
    full: tuple[int, ...]  # lengths without a causal mask
    batch: tuple[int, int, int]  # B, H, N of many short sequences
    groups: tuple[int, int]  # Hq, Hkv of gqa, window and varlen
    grouped: tuple[int, ...]  # lengths of gqa
    window: int
    windowed: tuple[int, ...]  # lengths under it
    narrow: tuple[int, int]  # a window and a length
    wide: int  # a window over long contexts, of one head
    long: tuple[int, ...]  # their lengths
    packed: tuple[int, ...]  # tokens of varlen
    cached: tuple[int, ...]  # keys of decode, of 32/8 heads of 128
    rotated: tuple[int, ...]  # lengths of rope
    block: int  # C, the width of the Transformer block
    block_lengths: tuple[int, ...]


CPU = Sizes(
    widths=(64, 128),
    heads=4,
    lengths=(2048, 4096, 8192),
    full=(2048, 4096),
    batch=(8, 12, 512),
    groups=(8, 2),
    grouped=(1024, 4096),
    window=1024,
    windowed=(2048, 8192),
    narrow=(512, 4096),
    wide=4096,
    long=(8192, 32768, 131072),
    packed=(2048, 8192),
    cached=(2048, 8192, 32768),
    rotated=(2048, 8192, 32768),
    block=512,
    block_lengths=(1024, 4096),
)
CUDA = Sizes(
    widths=(64, 128),
    heads=16,
    lengths=(2048, 4096, 8192, 16384, 32768),
    full=(2048, 4096, 8192, 16384, 32768),
    batch=(64, 12, 512),
    groups=(64, 8),
    grouped=(2048, 8192, 32768),
    window=1024,
    windowed=(2048, 8192, 32768),
    narrow=(512, 4096),
    wide=4096,
    long=(8192, 32768, 131072),
    packed=(16384, 65536),
    cached=(2048, 8192, 32768, 131072),
    rotated=(2048, 8192, 32768),
    block=4096,
    block_lengths=(2048, 8192, 32768),
)
QUICK = Sizes(
    widths=(32,),
    heads=2,
    lengths=(128, 256),
    full=(128,),
    batch=(4, 4, 64),
    groups=(4, 2),
    grouped=(128, 256),
    window=64,
    windowed=(128, 256),
    narrow=(32, 256),
    wide=128,
    long=(256, 1024),
    packed=(256, 512),
    cached=(512, 1024),
    rotated=(128, 256),
    block=64,
    block_lengths=(128, 256),
)


def make_cases(
    sets: Sequence[str] = SETS, dtypes: Sequence[str] = (), device: str = "cpu", quick: bool = False
) -> list[Case]:
    """The cases of some sets, in the order of SETS.

    Args:
        dtypes: of DTYPES; by default float32 and bfloat16 on a CPU, bfloat16 on a GPU.
        quick: sizes that take a moment, to see that everything runs.

    Raises:
        InvalidInput: an unknown set or dtype.
    """
    for argument, given, known in (("sets", sets, SETS), ("dtypes", dtypes, DTYPES)):
        if unknown := set(given) - set(known):
            raise InvalidInput(argument, f"names out of {', '.join(known)}", ", ".join(sorted(unknown)))
    sizes = QUICK if quick else CPU if device == "cpu" else CUDA
    dtypes = dtypes or (("float32", "bfloat16") if device == "cpu" else ("bfloat16",))
    return [
        case
        for name in SETS
        if name in sets
        for dtype in dtypes
        for case in _GENERATORS[name](sizes, {"set": name, "dtype": dtype, "device": device})
    ]


Where = dict[str, Any]  # the fields of Case that all cases of a set, dtype and device have in common


def _dense(sizes: Sizes, where: Where) -> Iterator[Case]:
    batch, heads, n_short = sizes.batch
    for backward in (False, True):
        for width in sizes.widths:
            for n in sizes.lengths:
                yield _attention(where, n, sizes.heads, head_dim=width, backward=backward)
            for n in sizes.full:
                yield _attention(where, n, sizes.heads, head_dim=width, backward=backward, causal=False)
        yield _attention(where, n_short, heads, batch=batch, head_dim=sizes.widths[0], backward=backward)


def _gqa(sizes: Sizes, where: Where) -> Iterator[Case]:
    for backward in (False, True):
        for n in sizes.grouped:
            yield _attention(where, n, *sizes.groups, head_dim=sizes.widths[-1], backward=backward)


def _window(sizes: Sizes, where: Where) -> Iterator[Case]:
    narrow, n_narrow = sizes.narrow
    for backward in (False, True):
        for n in sizes.windowed:
            yield _attention(where, n, *sizes.groups, head_dim=64, window=sizes.window, backward=backward)
        yield _attention(where, n_narrow, sizes.heads, head_dim=64, window=narrow, backward=backward)
        for n in sizes.long:
            yield _attention(where, n, 1, head_dim=64, window=sizes.wide, backward=backward)


def _varlen(sizes: Sizes, where: Where) -> Iterator[Case]:
    for backward in (False, True):
        for n in sizes.packed:
            yield _attention(where, n, *sizes.groups, head_dim=64, documents=quarters(n), backward=backward)


def _decode(sizes: Sizes, where: Where) -> Iterator[Case]:
    for n in sizes.cached:
        yield _attention(where, n, 32, 8, nq=1, head_dim=128)


def _rope(sizes: Sizes, where: Where) -> Iterator[Case]:
    for backward in (False, True):
        for n in sizes.rotated:
            yield RopeCase(**where, n=n, heads=8, head_dim=128, backward=backward)


def _module(sizes: Sizes, where: Where) -> Iterator[Case]:
    q_heads, kv_heads = sizes.groups
    for window in (None, sizes.narrow[0]):
        for n in sizes.block_lengths:
            yield BlockCase(
                **where, n=n, dim=sizes.block, q_heads=q_heads, kv_heads=kv_heads, window=window, backward=True
            )


_GENERATORS = {
    "dense": _dense,
    "gqa": _gqa,
    "window": _window,
    "varlen": _varlen,
    "decode": _decode,
    "rope": _rope,
    "module": _module,
}


def _attention(
    where: Where, n: int, q_heads: int, kv_heads: int | None = None, *, nq: int | None = None, **rest: Any
) -> AttentionCase:
    kv_heads = q_heads if kv_heads is None else kv_heads
    return AttentionCase(**where, nk=n, nq=n if nq is None else nq, q_heads=q_heads, kv_heads=kv_heads, **rest)


def quarters(tokens: int) -> tuple[int, ...]:
    """Lengths of documents that add up to `tokens`, a multiple of 32.

    A quarter of the tokens is in documents of each size: tokens / 4, tokens / 8, tokens / 16, tokens / 32.
    """
    return tuple(tokens // size for size in (4, 8, 16, 32) for _ in range(size // 4))
