"""Windows of the trained length whose positions skip ahead, so that training on them teaches far ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.training.packing import Documents

__all__ = ["SkippedPositions"]


class SkippedPositions:
    """PoSE: windows of `length` tokens in pieces, each of which stands further on than the one before.

    The text of a window is of one piece; its positions rise by one within a piece, and skip between them, so that over
    many windows every distance up to `target` occurs. Zhu et al., PoSE, arXiv 2309.10400, section 3, with v_i = 0.

    Args:
        documents: where the text is; a document shorter than a window is left out.
        batch_size: B. length: N, tokens of a window. target: the length aimed at, at least N.
        pieces: of a window.
        seed: of what is drawn. The batch of a step hangs on the seed and the step alone.

    Raises:
        InvalidInput: numbers out of range, or no document that is long enough.
    """

    def __init__(
        self, documents: Documents, *, batch_size: int, length: int, target: int, pieces: int = 2, seed: int = 0
    ) -> None:
        least = {"batch_size": (batch_size, 1), "pieces": (pieces, 1)}
        least |= {"length": (length, pieces), "target": (target, length)}
        for name, (value, low) in least.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InvalidInput(name, f"an int >= {low}", repr(value))
        places = documents.lengths - length  # where a window and the target of its last token can start
        self._usable = np.flatnonzero(places > 0)
        if not len(self._usable):
            got = f"{len(documents)} of at most {documents.lengths.max(initial=0)}"
            raise InvalidInput("documents", f"one of at least {length + 1} tokens", got)
        self._cumulative = np.cumsum(places[self._usable])
        self.documents, self.batch_size, self.length = documents, batch_size, length
        self.target, self.pieces, self.seed = target, pieces, seed

    def batch(self, step: int) -> dict[str, Tensor]:
        """The arguments of `Decoder.loss`: tokens, targets and positions, int64 [B, N]."""
        rng = np.random.default_rng([self.seed, step])
        windows, positions = [], []
        for place in rng.integers(self._cumulative[-1], size=self.batch_size):
            index = int(np.searchsorted(self._cumulative, place, side="right"))
            start = int(place - (self._cumulative[index - 1] if index else 0))
            windows.append(self.documents[int(self._usable[index])][start : start + self.length + 1])
            positions.append(self._positions(rng))
        tokens = torch.stack(windows)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": torch.stack(positions)}

    def describe(self) -> dict[str, Any]:
        """What decides the batches, in plain Python values."""
        names = ("batch_size", "length", "target", "pieces", "seed")
        return {**{name: getattr(self, name) for name in names}, "documents": self.documents.digest()}

    def _positions(self, rng: np.random.Generator) -> Tensor:
        cuts = np.sort(rng.choice(np.arange(1, self.length), self.pieces - 1, replace=False))
        skips = np.sort(rng.integers(self.target - self.length + 1, size=self.pieces))
        skips[0] = 0 if self.pieces > 1 else skips[0]
        piece = np.searchsorted(cuts, np.arange(self.length), side="right")
        return torch.from_numpy(np.arange(self.length) + skips[piece])
