"""Several tokens a step: a small model guesses, the large one checks all guesses in one call.

The text is distributed as the large model's alone would be, whatever the small one guesses (Leviathan et al., arXiv
2211.17192, algorithm 1; Chen et al., arXiv 2302.01318). With p and q the distributions of the large and of the small
model, a guess x ~ q is kept with probability min(1, p(x) / q(x)); the first that is not gives way to a draw from
max(0, p - q), normalised. If all are kept, the large model adds a token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longattn.models.generation.plain import New, seen_tokens
from longattn.models.generation.reader import Reader
from longattn.models.generation.sampling import Sampling, draw, uniform

__all__ = ["SpeculativeSteps"]


class SpeculativeSteps:
    """Up to `guesses` + 1 tokens per call of the model.

    The model has read all of a text but its newest token, the draft model all but the newest one or two.

    Args:
        reader: of the model, whose rings have `guesses` slots to spare; draft: of the small model, likewise.
        guesses: tokens that are guessed before the model is asked.
    """

    def __init__(
        self, reader: Reader, draft: Reader, sampling: Sampling, guesses: int, generator: torch.Generator | None
    ) -> None:
        self._reader = reader
        self._draft = draft
        self._sampling = sampling
        self._guesses = guesses
        self._generator = generator
        self._texts: list[list[int]] = []
        self._seen: Tensor | None = None

    def start(self, prompts: Sequence[list[int]]) -> None:
        self._texts = [prompt.copy() for prompt in prompts]
        for reader in (self._reader, self._draft):
            reader.read_prompts([prompt[:-1] for prompt in prompts])
        if self._sampling.penalises:
            self._seen = seen_tokens(prompts, self._reader)

    @torch.no_grad()
    def advance(self, rows: Sequence[int]) -> list[list[New]]:
        # Drawn for all sequences, so that none depends on which others have ended.
        drawn = uniform(len(self._texts), 2 * self._guesses + 1, self._generator, self._reader.device)[rows]
        to_guess, to_keep, to_replace = drawn.split((self._guesses, self._guesses, 1), dim=1)
        guesses, q, seen = self._guess(rows, to_guess)

        newest = [self._texts[row][-1] for row in rows]
        logits = self._reader.read_all([[new, *line] for new, line in zip(newest, guesses.tolist(), strict=True)], rows)
        p = self._sampling.probabilities(logits, seen)

        p_guessed, q_guessed = (x[:, : self._guesses].gather(2, guesses[..., None])[..., 0] for x in (p, q))
        kept = (to_keep * q_guessed < p_guessed).long().cumprod(1).sum(1)
        at = torch.arange(len(rows), device=kept.device), kept
        replacements = draw(_left_over(p[at], q[at]), to_replace[:, 0])
        return [
            self._commit(row, line[:count], token)
            for row, line, count, token in zip(
                rows, guesses.tolist(), kept.tolist(), replacements.tolist(), strict=True
            )
        ]

    def free(self, row: int) -> None:
        self._reader.free(row)
        self._draft.free(row)

    def _guess(self, rows: Sequence[int], drawn: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Guesses [R, G]; q [R, G + 1, V], 0 after the last; which tokens the text has before each, [R, G + 1, V]."""
        read = self._draft.lengths
        unread: list[list[int]] = [self._texts[row][read[row] :] for row in rows]
        seen = None if self._seen is None else self._seen[rows]
        guesses, q, seen_before = [], [], [seen]
        for step in range(self._guesses):
            q.append(self._sampling.probabilities(self._draft.read(unread, rows), seen))
            guesses.append(draw(q[-1], drawn[:, step]))
            unread = guesses[-1][:, None].tolist()
            if seen is not None:
                seen = seen.scatter(1, guesses[-1][:, None], True)
            seen_before.append(seen)
        q.append(torch.zeros_like(q[0]))
        all_seen = [part for part in seen_before if part is not None]
        return torch.stack(guesses, 1), torch.stack(q, 1), torch.stack(all_seen, 1) if all_seen else None

    def _commit(self, row: int, kept: list[int], token: int) -> list[New]:
        """Add what was kept, and forget the rest of the guesses."""
        text = self._texts[row]
        text += [*kept, token]
        if self._seen is not None:
            self._seen[row, [*kept, token]] = True
        for reader in (self._reader, self._draft):
            reader.truncate(row, min(reader.lengths[row], len(text) - 1))
        return [*(New(guess, True) for guess in kept), New(token, False)]


def _left_over(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), or p where rounding leaves nothing of it; not normalised."""
    rest = (p - q).clamp_min(0.0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
