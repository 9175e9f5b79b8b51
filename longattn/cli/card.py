"""What a checkpoint's weights do not say, in a file beside it: what it was trained for, its tokenizer, its labels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longattn.errors import InvalidInput
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

__all__ = ["Card", "open_tokenizer", "read_card"]


@dataclass(frozen=True)
class Card:
    """purpose: an objective of `longattn train` or a task of `longattn fine-tune`. tokenizer: None for bytes without
    special tokens. labels: the names of classes. next_sentence: of a masked language model."""

    purpose: str
    tokenizer: TextTokenizer | None = None
    labels: tuple[str, ...] = field(default=())
    next_sentence: bool = False

    def write(self, checkpoint: Path) -> None:
        """Put the card beside a checkpoint."""
        tokenizer: Any = None
        if isinstance(self.tokenizer, WordTokenizer):
            tokenizer = json.loads(self.tokenizer.tokenizer.to_str())
        elif self.tokenizer is not None:
            tokenizer = "bytes"
        card = {"purpose": self.purpose, "tokenizer": tokenizer, "labels": self.labels}
        card["next_sentence"] = self.next_sentence
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        _place(checkpoint).write_text(json.dumps(card, ensure_ascii=False), encoding="utf-8")

    def make(self, config: TransformerConfig) -> Any:
        """A model of this purpose, freshly drawn."""
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
        """The model of the checkpoint."""
        return load_model(checkpoint, self.make)


def read_card(checkpoint: Path) -> Card | None:
    """The card beside a checkpoint; None where there is none.

    Raises:
        InvalidInput: a damaged card.
    """
    place = _place(checkpoint)
    if not place.is_file():
        return None
    try:
        card = json.loads(place.read_text(encoding="utf-8"))
        saved = card["tokenizer"]
        tokenizer: TextTokenizer | None = None
        if saved == "bytes":
            tokenizer = ByteTokenizer()
        elif saved is not None:
            from tokenizers import Tokenizer

            tokenizer = WordTokenizer(Tokenizer.from_str(json.dumps(saved)))
        return Card(card["purpose"], tokenizer, tuple(card["labels"]), card["next_sentence"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            "checkpoint", f"a complete {place.name} beside it", f"{type(error).__name__}: {error}"
        ) from error


def open_tokenizer(name: str) -> TextTokenizer:
    """ "bytes", or the tokenizer of a tokenizer.json."""
    return ByteTokenizer() if name == "bytes" else WordTokenizer(load_tokenizer(Path(name)))


def _place(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".json")
