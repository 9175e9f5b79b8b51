"""Beam search: the likeliest continuations, as far as keeping the best few beginnings finds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models.generation.loop import (
    GenerationConfig,
    Prompt,
    Reason,
    check_length,
    check_prompts,
    check_sources,
)
from longattn.models.generation.plain import seen_tokens
from longattn.models.generation.reader import Model, Reader, check_model, make_caches
from longattn.models.generation.text import Decode
from longattn.scaling import finite_number

__all__ = ["Beam", "beam_search"]

_PAGE_SIZE = 16  # small, as what beams do not share is copied by the page


@dataclass(frozen=True)
class Beam:
    """One continuation of a prompt.

    log_probability: of its tokens, in nats. score: log_probability / len(tokens) ** length_penalty.
    """

    tokens: list[int]
    text: str | None
    reason: Reason
    log_probability: float
    score: float


def beam_search(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    beams: int,
    length_penalty: float = 1.0,
    sources: Sequence[Prompt] | None = None,
    decode: Decode | None = None,
) -> list[list[Beam]]:
    """The best continuations of each prompt that a beam search finds.

    At each step the `beams` likeliest of all one-token continuations go on. One among these that ends is set aside; the
    search of a prompt ends when as many are, and none that goes on can come to a better score.

    Args:
        model: in eval mode.
        prompts: token ids, at least one each; of any lengths.
        config: max_new_tokens, stops, the repetition penalty and the caches; its temperature must be 0.
        beams: how many; 1 is a greedy search.
        length_penalty: above 0 prefers longer texts.
        sources: of an encoder-decoder, as in `generate`.
        decode: text of token ids, by a tokenizer.

    Returns:
        For each prompt up to `beams` of them, best score first.

    Raises:
        InvalidInput: arguments that contradict the model or each other.
        FloatingPointError: the model's logits are not finite.
    """
    check_model("model", model)
    ids = check_prompts(model, prompts)
    about = check_sources(model, sources, len(ids))
    if not isinstance(config, GenerationConfig):
        raise InvalidInput("config", "a GenerationConfig", type(config).__name__)
    if config.max_new_tokens is None:
        raise InvalidInput("max_new_tokens", "an int >= 1", None)
    if config.sampling.temperature != 0:
        raise InvalidInput("temperature", "0: a beam search draws nothing", config.sampling.temperature)
    if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
        raise InvalidInput("beams", "an int >= 1", repr(beams))
    if config.stop and decode is None:
        raise InvalidInput("decode", "a tokenizer's function, to find stop strings", None)
    length_penalty = finite_number("length_penalty", length_penalty)
    check_length("model", model, ids, config.max_new_tokens)
    return _Search(model, ids, about, config, config.max_new_tokens, beams, length_penalty, decode).run()


class _Search:
    """Sequence beam * P + prompt is a beam of a prompt, P prompts."""

    def __init__(
        self,
        model: Model,
        prompts: list[list[int]],
        sources: list[list[int]],
        config: GenerationConfig,
        max_new_tokens: int,
        beams: int,
        length_penalty: float,
        decode: Decode | None,
    ) -> None:
        self.prompts = prompts
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.beams = beams
        self.length_penalty = length_penalty
        self.decode = decode
        own = max_new_tokens + _PAGE_SIZE  # tokens of a beam, its copy of the prompt's last page included
        caches = make_caches(
            model,
            len(prompts) * beams,
            sum(map(len, prompts)) + len(prompts) * beams * own,
            positions=config.positions,
            page_size=_PAGE_SIZE,
            dtype=config.cache_dtype,
        )
        self.reader = Reader(model, caches, sources)
        self.tokens: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in prompts]
        self.ended: list[list[Beam]] = [[] for _ in prompts]

    def run(self) -> list[list[Beam]]:
        prompts, beams, device = len(self.prompts), self.beams, self.reader.device
        running = list(range(prompts))
        logits = self.reader.read_prompts(self.prompts).expand(beams, -1, -1)  # [beams, prompts, V]
        for prompt in range(prompts):
            for beam in range(1, beams):
                self.reader.fork(prompt, beam * prompts + prompt)
        seen = None
        if self.config.sampling.penalises:
            seen = seen_tokens(self.prompts, self.reader).repeat(beams, 1, 1)
        sums = torch.full((beams, prompts), -math.inf, dtype=torch.float64, device=device)
        sums[0] = 0.0  # the beams are still one
        while True:
            index = list(range(prompts * beams))
            log_p = self._log_probabilities(logits, None if seen is None else seen[:, running])
            totals = sums[:, running, None] + log_p
            for place, prompt in enumerate(running):
                parents, scores = self._step(prompt, totals[:, place])
                sums[:, prompt] = torch.tensor(scores, dtype=torch.float64, device=device)
                for beam, parent in enumerate(parents):
                    index[beam * prompts + prompt] = parent * prompts + prompt
            if seen is not None:
                seen = seen.flatten(0, 1)[index].unflatten(0, (beams, prompts))
                for prompt in running:
                    for beam in range(beams):
                        seen[beam, prompt, self.tokens[prompt][beam][-1]] = True
            running = [prompt for prompt in running if not self._done(prompt, sums[:, prompt].max().item())]
            if not running:
                return self.ended
            self.reader.reorder(index)
            rows = [beam * prompts + prompt for beam in range(beams) for prompt in running]
            newest = [[self.tokens[row % prompts][row // prompts][-1]] for row in rows]
            logits = self.reader.read(newest, rows).unflatten(0, (beams, len(running)))

    def _log_probabilities(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        logits = self.config.sampling.penalised(logits.double(), seen)
        if not logits.amax(-1).isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        return logits.log_softmax(-1)

    def _step(self, prompt: int, totals: Tensor) -> tuple[list[int], list[float]]:
        """Choose what goes on, out of totals [beams, V]: the parents of the new beams, and their log-probabilities."""
        vocab_size = totals.shape[1]
        # Enough that `beams` of them go on, whatever ends by a token.
        count = min(totals.numel(), self.beams * (2 + len(self.config.stop_tokens)))
        best, places = totals.flatten().topk(count)
        parents: list[int] = []
        scores: list[float] = []
        texts: list[list[int]] = []
        for rank, (score, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
            if len(parents) == self.beams:
                break
            parent, token = divmod(place, vocab_size)
            tokens = [*self.tokens[prompt][parent], token]
            text, reason = self._judge(tokens)
            if reason is None:
                parents.append(parent)
                scores.append(score)
                texts.append(tokens)
            elif rank < self.beams and score > -math.inf:
                self._end(prompt, tokens, text, reason, score)
        while len(parents) < self.beams:  # beams that nothing is expected of
            parents.append(0)
            scores.append(-math.inf)
            texts.append([*self.tokens[prompt][0], 0])
        self.tokens[prompt] = texts
        return parents, scores

    def _judge(self, tokens: list[int]) -> tuple[str | None, Reason | None]:
        """The text, and why it ends here, if it does."""
        if tokens[-1] in self.config.stop_tokens:
            return self._text(tokens[:-1]), "stop"
        text = self._text(tokens) if self.config.stop else None
        if text is not None:
            found = [at for stop in self.config.stop if (at := text.find(stop)) >= 0]
            if found:
                return text[: min(found)], "stop"
        if len(tokens) == self.max_new_tokens:
            return self._text(tokens), "length"
        return None, None

    def _text(self, tokens: list[int]) -> str | None:
        return None if self.decode is None else self.decode(tokens)

    def _end(self, prompt: int, tokens: list[int], text: str | None, reason: Reason, log_probability: float) -> None:
        beam = Beam(tokens, text, reason, log_probability, self._score(log_probability, len(tokens)))
        best = sorted([*self.ended[prompt], beam], key=lambda ended: ended.score, reverse=True)
        self.ended[prompt] = best[: self.beams]

    def _score(self, log_probability: float, length: int) -> float:
        return log_probability / length**self.length_penalty

    def _done(self, prompt: int, best: float) -> bool:
        """Whether nothing that goes on, `best` the likeliest, can get among what is set aside."""
        ended, length = self.ended[prompt], len(self.tokens[prompt][0])
        if best == -math.inf or length == self.max_new_tokens:
            return True
        attainable = self._score(best, self.max_new_tokens if self.length_penalty > 0 else length + 1)
        return len(ended) == self.beams and ended[-1].score >= attainable
