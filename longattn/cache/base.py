"""What all caches share: which sequences they hold, how long these are, and what may be done to them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from longattn import arguments, forked, ops
from longattn.arguments import CacheShape
from longattn.backends import registry
from longattn.cache.rotation import Rotations
from longattn.cache.storage import Storage
from longattn.errors import InvalidInput
from longattn.problem import Slots
from longattn.rope import Rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)

_Arguments = ParamSpec("_Arguments")
_Cache = TypeVar("_Cache", bound="Cache")
_Result = TypeVar("_Result")


class Room(NamedTuple):
    """Where a call finds the old tokens of its sequences, and puts the new ones."""

    slots: Slots
    finish: Callable[[], Storage] | None = None  # the storage that holds the result, if another than before
    release: Callable[[], None] | None = None  # undo what making room has done


def in_turn(
    method: Callable[Concatenate[_Cache, _Arguments], _Result],
) -> Callable[Concatenate[_Cache, _Arguments], _Result]:
    """Refuse a call while another one runs: each reads lengths first and counts the new tokens last."""

    @functools.wraps(method)
    def alone(cache: _Cache, /, *args: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        if torch.compiler.is_compiling():
            return method(cache, *args, **keywords)
        try:
            turn = cache._turn.pop()  # in one step, whatever other threads do
        except IndexError:
            raise InvalidInput("cache", "one call at a time", "a call while another thread's runs") from None
        try:
            return method(cache, *args, **keywords)
        finally:
            cache._turn.append(turn)

    return forked.on_one_thread(alone)


class Cache(ABC):
    """Keys and values of one attention layer, for `batch` sequences of unequal lengths.

    A sequence is a number below `batch`. All start empty; `free` gives one back, and `fork` and `allocate` hand out
    those given back. Every method either does what it says or raises and leaves the cache as it was. One thread at a
    time may use a cache: a call while another one runs is refused.

    Keys are stored rotated. Where the rotation of a key changes as the context grows (DynamicNTK, LongRoPE, and
    positions="cache") they are stored as they come and rotated whenever they are read.

    Attributes:
        batch, kv_heads, head_dim, v_head_dim: B, Hkv, D, Dv.
        dtype: of the slots. int8 keeps a float32 scale max|x| / 127 per token and head, so that each number is off by
            at most half a scale; x is what the slot would hold, a rotated key.
        device: of the slots.
    """

    window: int | None = None  # newest tokens that are kept, None: all
    sinks: int = 0  # first tokens that are kept beside a window
    cache_positions: bool = False
    _ring: int = 0  # slots past the sinks, where tokens take them in turn

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        sizes = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim}
        for name, size in sizes.items():
            check_int(name, size, 1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise InvalidInput("dtype", "float32, bfloat16, float16, float64 or int8", dtype)
        self.batch, self.kv_heads, self.head_dim, self.v_head_dim = batch, kv_heads, head_dim, v_head_dim
        self.dtype, self.device = dtype, torch.device("cpu" if device is None else device)
        self._lengths = [0] * batch
        self._live = [True] * batch
        self._rope: Rope | None = None
        self._rotations = Rotations()
        self._turn = [True]  # taken by the call that runs; a lock could be neither copied nor saved
        self._storage: Storage

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence has seen, 0 for one given back."""
        return tuple(self._lengths)

    def next_positions(
        self, new: int, *, sequences: Sequence[int] | None = None, tree: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Where `new` more tokens of these sequences will stand, int64 [B, new]: for embeddings of positions.

        Args:
            sequences, tree: as in `attention_with_cache`.
        """
        arguments.count("new", new)
        rows = self._rows(sequences)
        starts = torch.tensor([self._lengths[row] for row in rows], device=self.device)
        if tree is None:
            return starts[:, None] + torch.arange(new, device=self.device)
        return starts[:, None] + arguments.draft_tree(tree, len(rows), new, self.device)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self._storage.nbytes

    @in_turn
    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        rope: Rope | None = None,
        positions: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        sequences: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        """Append without attending. The arguments are those of `attention_with_cache`."""
        rows = self._rows(sequences)
        counts = arguments.new_lengths(lengths, len(rows), k)
        self._check_counts(rows, counts)
        self._check_rope(rope)
        after = [self._lengths[row] + count for row, count in zip(rows, counts, strict=True)]
        shape = self._shape()
        rotation = self._rotations.of(shape, rope, after, max(counts), arguments.accumulate_dtype(k))
        tensors, problem = arguments.cached(None, k, v, shape, after, counts, rotation=rotation, positions=positions)
        chosen = registry.select(problem, backend).name

        def run(room: Room) -> None:
            ops.cache_append(tensors, room.slots, problem, chosen)

        self._run(rows, counts, rope, run)

    @in_turn
    def allocate(self) -> int:
        """An empty sequence, out of those given back.

        Raises:
            InvalidInput: none was given back.
        """
        if all(self._live):
            raise InvalidInput("cache", "a sequence that was freed", f"{self.batch} in use")
        sequence = self._live.index(False)
        self._live[sequence] = True
        return sequence

    @in_turn
    def free(self, sequence: int) -> None:
        """Give a sequence back, and what only it holds.

        Raises:
            InvalidInput: no such sequence, or it was given back before.
        """
        self._check_live(sequence)
        self._drop(sequence, 0)
        self._lengths[sequence] = 0
        self._live[sequence] = False

    @in_turn
    def fork(self, source: int, target: int | None = None, *, length: int | None = None) -> int:
        """Make a sequence the continuation of another's first `length` tokens (all of them by default).

        Args:
            target: an empty sequence or one given back; by default the first given back.

        Returns:
            target.

        Raises:
            InvalidInput: no such sequences, target in use, a length that source does not have.
        """
        self._check_live(source, "source")
        if target is None:
            if all(self._live):
                raise InvalidInput("target", "a sequence that is free, or was freed", f"{self.batch} in use")
            target = self._live.index(False)
        self._check_sequence("target", target)
        if self._lengths[target]:
            raise InvalidInput(
                "target", "an empty sequence or one that was freed", f"{target}, of {self._lengths[target]}"
            )
        if length is None:
            length = self._lengths[source]
        self._check_length(source, length)
        self._share(source, target, length)
        self._lengths[target], self._live[target] = length, True
        return target

    @in_turn
    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            InvalidInput: no such sequence, a length that it does not have, or (of a ring) a length whose window was
                overwritten.
        """
        self._check_live(sequence)
        self._check_length(sequence, length)
        self._drop(sequence, length)
        self._lengths[sequence] = length

    @in_turn
    def accept(self, sequence: int, length: int, branch: Sequence[int]) -> None:
        """Keep, of the tokens past the first `length`, one branch of a draft tree.

        Args:
            branch: numbers of draft tokens, as in the tree, ascending; the rest is forgotten.

        Raises:
            InvalidInput: as `truncate`; or numbers that are no draft tokens, or not ascending.
        """
        self._check_live(sequence)
        self._check_length(sequence, length)
        drafts = self._lengths[sequence] - length
        chosen = arguments.int_list("branch", branch)
        if chosen != sorted(set(chosen)) or (chosen and not 0 <= chosen[0] <= chosen[-1] < drafts):
            raise InvalidInput("branch", f"ascending numbers of the {drafts} draft tokens", chosen)
        self._make_own(sequence, length)
        places = torch.tensor(chosen, dtype=torch.int64, device=self.device)
        rows = self._storage.read(*self._places(sequence, length + places))
        self._lengths[sequence] = length
        kept = torch.arange(length, length + len(chosen), device=self.device)
        self._storage.write(*self._places(sequence, kept), rows)
        self._drop(sequence, length + len(chosen))
        self._lengths[sequence] = length + len(chosen)

    @in_turn
    def reorder(self, index: Sequence[int]) -> None:
        """Sequence i becomes what sequence index[i] was: the step of a beam search.

        Raises:
            InvalidInput: not one sequence in use for each.
        """
        chosen = arguments.int_list("index", index)
        if len(chosen) != self.batch:
            raise InvalidInput("index", f"{self.batch} sequences", chosen)
        for sequence in chosen:
            self._check_live(sequence, "index")
        self._permute(chosen)
        self._lengths = [self._lengths[sequence] for sequence in chosen]
        self._live = [True] * self.batch

    @in_turn
    def reset(self) -> None:
        """Empty all sequences; those given back are in use again."""
        for sequence in range(self.batch):
            if self._live[sequence]:
                self._drop(sequence, 0)
            self._lengths[sequence], self._live[sequence] = 0, True

    @in_turn
    def read(self, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
        """(positions int64 [n], k [Hkv, n, D], v [Hkv, n, Dv]) of the tokens held, as stored; int8 as float32."""
        self._check_live(sequence)
        positions = self._held(sequence)
        k, v, k_scales, v_scales = self._storage.read(*self._places(sequence, positions))
        assert k is not None and v is not None
        if k_scales is not None and v_scales is not None:
            k, v = k * k_scales[..., None], v * v_scales[..., None]
        return positions, k.transpose(0, 1), v.transpose(0, 1)

    # What the kinds of caches differ in.

    @abstractmethod
    def _make_room(self, rows: list[int], counts: list[int]) -> Room:
        """Slots for counts[i] more tokens of sequence rows[i]; raises with nothing changed."""

    @abstractmethod
    def _places(self, sequence: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(page, slot in it) of each of these tokens."""

    @abstractmethod
    def _share(self, source: int, target: int, length: int) -> None:
        """Give target the first `length` tokens of source."""

    @abstractmethod
    def _permute(self, index: list[int]) -> None:
        """Give every sequence i what sequence index[i] holds."""

    def _drop(self, sequence: int, length: int) -> None:  # noqa: B027 - most have nothing to do
        """Let go of what lies past the first `length` tokens."""

    def _make_own(self, sequence: int, length: int) -> None:  # noqa: B027
        """Share nothing with other sequences past the first `length` tokens."""

    def _oldest_held(self, sequence: int) -> int:
        """Return the first token, sinks aside, from which on all are held."""
        return 0

    def _held(self, sequence: int) -> Tensor:
        """Positions of the tokens that the cache still has."""
        return torch.arange(self._lengths[sequence], device=self.device)

    # For the calls.

    def _run(self, rows: list[int], counts: list[int], rope: Rope | None, run: Callable[[Room], _Result]) -> _Result:
        """Make room, let `run` fill it, and count the new tokens as the very last step."""
        room = self._make_room(rows, counts)
        try:
            result = run(room)
            storage = self._storage if room.finish is None else room.finish()
            lengths = self._lengths.copy()
            for row, count in zip(rows, counts, strict=True):
                lengths[row] += count
        except BaseException:
            if room.release is not None:
                room.release()
            raise
        self._storage, self._lengths, self._rope = storage, lengths, rope  # no interrupt comes between
        return result

    def _shape(self) -> CacheShape:
        return CacheShape(
            self.kv_heads,
            self.head_dim,
            self.v_head_dim,
            self.dtype,
            self.device,
            self.window,
            self.sinks,
            self.cache_positions,
            self._ring,
        )

    def _rows(self, sequences: Sequence[int] | None) -> list[int]:
        """The sequences of a call, each of them in use."""
        if sequences is None:
            return list(range(self.batch))
        rows = arguments.int_list("sequences", sequences)
        if not rows or len(set(rows)) != len(rows):
            raise InvalidInput("sequences", "at least one sequence, each of them once", rows)
        for row in rows:
            self._check_live(row, "sequences")
        return rows

    def _check_counts(self, rows: list[int], counts: list[int]) -> None:
        for row, count in zip(rows, counts, strict=True):
            if count and not self._live[row]:
                raise InvalidInput("lengths", f"0 for sequence {row}, that was freed", count)

    def _check_rope(self, rope: Rope | None) -> None:
        if rope is not None and not isinstance(rope, Rope):
            raise InvalidInput("rope", "None or a longattn.Rope", repr(rope))
        if rope is not self._rope and rope != self._rope and any(self._lengths):
            raise InvalidInput("rope", f"{self._rope}, that turned the keys in the cache", rope)

    def _check_sequence(self, name: str, sequence: int) -> None:
        if isinstance(sequence, bool) or not isinstance(sequence, int) or not 0 <= sequence < self.batch:
            raise InvalidInput(name, f"a sequence of 0 to {self.batch - 1}", repr(sequence))

    def _check_live(self, sequence: int, name: str = "sequence") -> None:
        self._check_sequence(name, sequence)
        if not self._live[sequence]:
            raise InvalidInput(name, "one in use", f"{sequence}, that was freed")

    def _check_length(self, sequence: int, length: int) -> None:
        held = self._lengths[sequence]
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= held:
            raise InvalidInput("length", f"an int of 0 to {held}, the tokens of sequence {sequence}", repr(length))


def check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InvalidInput(name, f"an int of {least} to 2^31 - 1", repr(value))
