"""Generation: prompts in, tokens and text out, at once or as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longattn.errors import InvalidInput
from longattn.models.encoder_decoder import EncoderDecoder
from longattn.models.generation.plain import PlainSteps, Steps
from longattn.models.generation.reader import Model, Reader, check_model, make_caches
from longattn.models.generation.sampling import GREEDY, Sampling
from longattn.models.generation.speculative import SpeculativeSteps
from longattn.models.generation.text import Decode, TextStream

__all__ = ["Generation", "GenerationConfig", "Piece", "Prompt", "Reason", "check_prompts", "generate", "stream"]

Prompt = Sequence[int] | Tensor
Reason = Literal["length", "stop"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to go on from a prompt, and when to stop.

    Args:
        max_new_tokens: of each sequence. None: on and on, which models with sliding layers only can do.
        sampling: the likeliest token by default.
        stop: a string, or several, that end the text; they are left out of it. Needs a tokenizer's `decode`.
        stop_tokens: ids that end the text; they are the last of the tokens, and left out of the text.
        draft_tokens: with a draft model, how many tokens it guesses at a time.
        cache_dtype: of the caches, as in `longattn.KVCache`; the weights' by default.
        positions: of the rings of sliding layers, "original" or "cache", as in `longattn.SlidingKVCache`; by default as
            the model's config has them.

    Raises:
        InvalidInput: a value out of range.
    """

    max_new_tokens: int | None
    sampling: Sampling = GREEDY
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    draft_tokens: int = 4
    cache_dtype: torch.dtype | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _check_count("max_new_tokens", self.max_new_tokens)
        _check_count("draft_tokens", self.draft_tokens)
        if not isinstance(self.sampling, Sampling):
            raise InvalidInput("sampling", "a Sampling", type(self.sampling).__name__)
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise InvalidInput("stop", "strings of at least one character", repr(stop))
        object.__setattr__(self, "stop_tokens", _tuple("stop_tokens", self.stop_tokens))
        for token in self.stop_tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                raise InvalidInput("stop_tokens", "token ids", repr(token))


class Piece(NamedTuple):
    """A new token, as it comes.

    text: what can be shown now. A character that is not complete, and what may begin a stop string, comes later.
    reason: "stop" or "length" if this was the sequence's last token.
    drafted: a draft model guessed it.
    """

    sequence: int
    token: int
    text: str
    reason: Reason | None
    drafted: bool


@dataclass(frozen=True)
class Generation:
    """What follows one prompt: tokens, their text if there is a tokenizer, and why it ended."""

    tokens: list[int]
    text: str | None
    reason: Reason


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    sources: Sequence[Prompt] | None = None,
    decode: Decode | None = None,
    draft: Model | None = None,
    generator: torch.Generator | None = None,
) -> list[Generation]:
    """Go on from each prompt until it ends. Arguments as `stream`, with a `max_new_tokens`.

    Returns:
        One for each prompt.
    """
    if isinstance(config, GenerationConfig) and config.max_new_tokens is None:
        raise InvalidInput("max_new_tokens", "an int >= 1 (stream can do without)", None)
    tokens: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    reasons: list[Reason] = ["length"] * len(prompts)
    for piece in stream(model, prompts, config, sources=sources, decode=decode, draft=draft, generator=generator):
        tokens[piece.sequence].append(piece.token)
        texts[piece.sequence] += piece.text
        reasons[piece.sequence] = piece.reason or "length"
    return [
        Generation(new, None if decode is None else text, reason)
        for new, text, reason in zip(tokens, texts, reasons, strict=True)
    ]


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    sources: Sequence[Prompt] | None = None,
    decode: Decode | None = None,
    draft: Model | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Piece]:
    """Go on from each prompt, one piece at a time. Sliding layers keep their window only, full layers all.

    Sequences of a batch do not depend on each other: each is what it is alone, up to rounding, but for the random
    numbers, which are drawn for the whole batch.

    Args:
        model: in eval mode.
        prompts: token ids, at least one each; of any lengths. Of an encoder-decoder, how the targets begin.
        config: how.
        sources: of an encoder-decoder, what each prompt's answer is about: token ids, of any lengths.
        decode: text of token ids, by a tokenizer (`decode_bytes` of a model over bytes); without, texts are empty.
        draft: a smaller model of the same vocabulary, that guesses `draft_tokens` at a time for the model to check.
            The tokens are distributed as without it. Its rope may scale in any way; the model's frequencies may not
            depend on the length.
        generator: draws the tokens, on its own device; torch's default without. The same state gives the same tokens.

    Returns:
        An iterator over the pieces of all sequences, each in order.

    Raises:
        InvalidInput: arguments that contradict the model or each other.
        FloatingPointError: while iterating: the model's logits are not finite.
    """
    check_model("model", model)
    if not isinstance(config, GenerationConfig):
        raise InvalidInput("config", "a GenerationConfig", type(config).__name__)
    ids = check_prompts(model, prompts)
    about = check_sources(model, sources, len(ids))
    for token in config.stop_tokens:
        if not 0 <= token < model.config.vocab_size:
            raise InvalidInput("stop_tokens", f"ids in [0, {model.config.vocab_size})", token)
    if config.stop and decode is None:
        raise InvalidInput("decode", "a tokenizer's function, to find stop strings", None)
    if decode is not None and not callable(decode):
        raise InvalidInput("decode", "a function from token ids to text", type(decode).__name__)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InvalidInput("generator", "a torch.Generator", type(generator).__name__)
    steps: Steps
    if draft is None:
        steps = PlainSteps(_reader("model", model, ids, about, config, 0), config.sampling, generator)
    else:
        check_model("draft", draft)
        if draft.config.vocab_size != model.config.vocab_size:
            raise InvalidInput("draft", f"a model of {model.config.vocab_size} token ids", draft.config.vocab_size)
        if type(draft) is not type(model):
            raise InvalidInput("draft", f"a {type(model).__name__} as the model", type(draft).__name__)
        if model.config.rope is not None and model.config.rope.depends_on_length:
            expected = "None where frequencies depend on the length: tokens checked together would share them"
            raise InvalidInput("draft", expected, model.config.rope_scaling)
        guesses = config.draft_tokens
        checker = _reader("model", model, ids, about, config, guesses)
        guesser = _reader("draft", draft, ids, about, config, guesses)
        steps = SpeculativeSteps(checker, guesser, config.sampling, guesses, generator)
    return _pieces(steps, ids, config, decode)


def _pieces(steps: Steps, prompts: list[list[int]], config: GenerationConfig, decode: Decode | None) -> Iterator[Piece]:
    texts = [None if decode is None else TextStream(decode, config.stop) for _ in prompts]
    counts = [0] * len(prompts)
    running = list(range(len(prompts)))
    steps.start(prompts)
    while running:
        for row, new in zip(running.copy(), steps.advance(running), strict=True):
            for token, drafted in new:
                counts[row] += 1
                text, stopped = _text(texts[row], token, token in config.stop_tokens)
                reason: Reason | None = None
                if stopped:
                    reason = "stop"
                elif counts[row] == config.max_new_tokens:
                    reason = "length"
                    text += "" if (ending := texts[row]) is None else ending.finish()
                if reason is not None:  # before the yield, from which there may be no return
                    running.remove(row)
                    steps.free(row)
                yield Piece(row, token, text, reason, drafted)
                if reason is not None:
                    break


def _text(text: TextStream | None, token: int, is_stop_token: bool) -> tuple[str, bool]:
    """What to show of a new token, and whether it ends the text."""
    if text is None:
        return "", is_stop_token
    if is_stop_token:
        return text.finish(), True
    shown = text.push(token)
    return shown, text.stopped


def _reader(
    name: str, model: Model, prompts: list[list[int]], sources: list[list[int]], config: GenerationConfig, spare: int
) -> Reader:
    check_length(name, model, prompts, config.max_new_tokens, spare)
    if config.max_new_tokens is None:
        if not all(map(model.config.is_sliding, range(model.config.layers))):
            raise InvalidInput("max_new_tokens", "an int for a model with full layers, whose caches grow", None)
        room = 1
    else:
        room = sum(map(len, prompts)) + len(prompts) * (config.max_new_tokens + spare)
    caches = make_caches(model, len(prompts), room, positions=config.positions, spare=spare, dtype=config.cache_dtype)
    return Reader(model, caches, sources)


def check_length(name: str, model: Model, prompts: list[list[int]], new_tokens: int | None, spare: int = 0) -> None:
    """Raise InvalidInput if a model of learned positions would run out of them; spare: guesses read beyond the text."""
    if model.config.positions != "learned":
        return
    most = model.config.max_length
    if new_tokens is None or max(map(len, prompts)) + new_tokens - 1 + spare > most:
        got = f"prompts of up to {max(map(len, prompts))} and {new_tokens} new, {spare} guessed at a time"
        raise InvalidInput("max_new_tokens", f"texts of at most {most} tokens, the learned positions of {name}", got)


def check_sources(model: Model, sources: Sequence[Prompt] | None, count: int) -> list[list[int]]:
    """The token ids of an encoder-decoder's sources, one for each of `count` prompts; none for a decoder."""
    if isinstance(model, EncoderDecoder) == (sources is None):
        expected = "one for each prompt" if isinstance(model, EncoderDecoder) else "None for a Decoder"
        raise InvalidInput("sources", expected, type(sources).__name__)
    if sources is None:
        return []
    checked = check_prompts(model, sources, "sources")
    if len(checked) != count:
        raise InvalidInput("sources", f"{count}, one for each prompt", len(checked))
    if model.config.positions == "learned" and max(map(len, checked)) > model.config.max_length:
        expected = f"at most {model.config.max_length} tokens each (learned positions)"
        raise InvalidInput("sources", expected, max(map(len, checked)))
    return checked


def check_prompts(model: Model, prompts: Sequence[Prompt], name: str = "prompts") -> list[list[int]]:
    """The token ids of prompts, or of what else is called `name`, checked."""
    expected = f"a list of {name}, each of one or more ids in [0, {model.config.vocab_size})"
    if isinstance(prompts, (str, bytes, Tensor)) or not isinstance(prompts, Sequence) or not prompts:
        raise InvalidInput(name, expected, "none" if isinstance(prompts, Sequence) else type(prompts).__name__)
    checked = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, Tensor):
            fits = prompt.dim() == 1 and not (prompt.is_floating_point() or prompt.dtype == torch.bool)
            ids = prompt.tolist() if fits else None
        else:
            fits = isinstance(prompt, Sequence) and all(type(token) is int for token in prompt)
            ids = list(prompt) if fits else None
        if not ids:
            raise InvalidInput(
                name, expected, f"an empty {name.removesuffix('s')}, number {number}" if fits else repr(prompt)[:80]
            )
        if not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
            raise InvalidInput(name, expected, f"ids {min(ids)}..{max(ids)}")
        checked.append(ids)
    return checked


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(name, "an int >= 1", repr(value))


def _tuple(name: str, values: object) -> tuple[object, ...]:
    if not isinstance(values, (Sequence, set, frozenset)):
        raise InvalidInput(name, "a sequence", type(values).__name__)
    return tuple(values)
