"""What a checkpoint's weights do not say, in a file beside it: what it was trained for, its tokenizer, its labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longattn.errors import InvalidInput
from longattn.files import write_text
from longattn.models import (
    Decoder,
    EncoderDecoder,
    MaskedLM,
    SentenceEncoder,
    SequenceClassifier,
    TokenClassifier,
    TransformerConfig,
)
from longattn.training import ByteTokenizer, TextTokenizer, WordTokenizer, load_model, load_tokenizer
from longattn.training.text_files import check_same_texts
from longattn.training.tokenizers import parse_tokenizer

__all__ = ["Card", "card_path", "check_card", "open_tokenizer", "read_card", "tokenizer_json"]

_PURPOSES = ("causal", "masked", "infilling", "spans", "classify", "tag", "translate", "embed")
_WITH_LABELS = ("classify", "tag")


@dataclass(frozen=True)
class Card:
    """purpose: an objective of `longattn train` or a task of `longattn fine-tune`. tokenizer: None for bytes without
    special tokens. labels: the names of classes. next_sentence: of a masked language model. texts: what it was trained
    on, as `TextFiles.fingerprints`; None where that is not known."""

    purpose: str
    tokenizer: TextTokenizer | None = None
    labels: tuple[str, ...] = ()
    next_sentence: bool = False
    texts: Mapping[str, str] | None = None

    def write(self, checkpoint: Path) -> None:
        """Put the card beside a checkpoint, whole or not at all.

        Raises:
            OSError: it cannot be written, for example on a full disk.
        """
        card = {"purpose": self.purpose, "tokenizer": tokenizer_json(self.tokenizer), "labels": self.labels}
        card["next_sentence"] = self.next_sentence
        if self.texts is not None:
            card["texts"] = dict(self.texts)
        write_text(card_path(checkpoint), json.dumps(card))

    def make(self, config: TransformerConfig) -> Any:
        """A model of this purpose, freshly drawn.

        Raises:
            InvalidInput: a config of another architecture.
        """
        if self.purpose == "masked":
            return MaskedLM(config, next_sentence=self.next_sentence)
        if self.purpose == "classify":
            return SequenceClassifier(config, len(self.labels))
        if self.purpose == "tag":
            return TokenClassifier(config, len(self.labels))
        if self.purpose == "embed":
            return SentenceEncoder(config)
        return Decoder(config) if self.purpose == "causal" else EncoderDecoder(config)

    def load(self, checkpoint: Path) -> Any:
        """The model of the checkpoint.

        Raises:
            InvalidInput: as `load_model`; or a card of another checkpoint.
        """
        model = load_model(checkpoint, self.make)
        most = _highest_id(self.tokenizer)
        if most >= model.config.vocab_size:
            expected = f"a tokenizer with ids below {model.config.vocab_size}, the checkpoint's vocabulary"
            raise InvalidInput(card_path(checkpoint).name, expected, f"id {most}")
        return model


def card_path(checkpoint: Path) -> Path:
    """Return where the card of a checkpoint is."""
    return checkpoint.with_name(checkpoint.name + ".json")


def read_card(checkpoint: Path) -> Card | None:
    """Read the card beside a checkpoint; return None where there is none.

    Raises:
        InvalidInput: a damaged card.
    """
    place = card_path(checkpoint)
    if not place.is_file():
        return None

    def refuse(got: object) -> InvalidInput:
        return InvalidInput("checkpoint", f"a complete {place.name} beside it", got)

    try:
        card = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise refuse(f"{type(error).__name__}: {error}") from error
    if not isinstance(card, dict):
        raise refuse(f"{type(card).__name__} in place of an object")
    for key in ("purpose", "tokenizer", "labels", "next_sentence"):
        if key not in card:
            raise refuse(f"one without {key!r}")
    purpose, saved, labels, texts = card["purpose"], card["tokenizer"], card["labels"], card.get("texts")
    if not isinstance(purpose, str) or purpose not in _PURPOSES:
        raise refuse(f"purpose {purpose!r}")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise refuse("labels that are not a list of strings")
    if len(set(labels)) != len(labels) or bool(labels) != (purpose in _WITH_LABELS):
        raise refuse(f"{len(labels)} labels, {len(set(labels))} of them different, for {purpose}")
    if not isinstance(card["next_sentence"], bool) or (card["next_sentence"] and purpose != "masked"):
        raise refuse(f"next_sentence {card['next_sentence']!r} for {purpose}")
    if texts is not None and not (
        isinstance(texts, dict) and all(isinstance(digest, str) for digest in texts.values())
    ):
        raise refuse("texts that are not digests by name")
    tokenizer: TextTokenizer | None = None
    if saved == "bytes":
        tokenizer = ByteTokenizer()
    elif isinstance(saved, dict):
        tokenizer = WordTokenizer(parse_tokenizer(json.dumps(saved), str(place)))
    elif saved is not None:
        raise refuse(f"a tokenizer that is a {type(saved).__name__}")
    return Card(purpose, tokenizer, tuple(labels), card["next_sentence"], texts)


def check_card(checkpoint: Path, card: Card, resume: bool) -> None:
    """Compare the card of a command with the one that is beside its checkpoint.

    Args:
        checkpoint: the path that the command writes.
        card: the command's.
        resume: the command continues the checkpoint. Otherwise it writes a new card, over that of a killed run at most.

    Raises:
        InvalidInput: with resume, another purpose, tokenizer, other labels or texts; the texts are named. Without, a
            file where the card goes that is not a card.
    """
    if not resume:
        try:
            read_card(checkpoint)
        except InvalidInput as error:
            raise InvalidInput("--out", f"no other file at {card_path(checkpoint)}", error.got) from error
        return
    before = read_card(checkpoint) or Card("causal")
    for name in ("purpose", "labels", "next_sentence"):
        ours, theirs = getattr(card, name), getattr(before, name)
        if ours != theirs:
            raise InvalidInput(f"--resume: {name}", f"{theirs!r}, as it was started with", repr(ours))
    if tokenizer_json(card.tokenizer) != tokenizer_json(before.tokenizer):
        raise InvalidInput("--resume: --tokenizer", "the one that it was started with", "another one")
    if before.texts is not None and card.texts is not None:
        check_same_texts("--resume", dict(before.texts), dict(card.texts))


def open_tokenizer(name: str) -> TextTokenizer:
    """ "bytes", or the tokenizer of a tokenizer.json."""
    return ByteTokenizer() if name == "bytes" else WordTokenizer(load_tokenizer(Path(name)))


def tokenizer_json(tokenizer: TextTokenizer | None) -> Any:
    """Return a tokenizer in plain Python values, as a card holds it."""
    if isinstance(tokenizer, WordTokenizer):
        return json.loads(tokenizer.tokenizer.to_str())
    return None if tokenizer is None else "bytes"


def _highest_id(tokenizer: TextTokenizer | None) -> int:
    if isinstance(tokenizer, WordTokenizer):
        return max(tokenizer.tokenizer.get_vocab().values(), default=-1)
    return -1 if tokenizer is None else tokenizer.vocab_size - 1
