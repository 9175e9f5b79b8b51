"""`longattn predict`: what a fine-tuned model says of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from longattn.cli.card import Card, read_card
from longattn.cli.fine_tune import framed, translated, word_tokens
from longattn.cli.output import echo
from longattn.errors import InvalidInput
from longattn.training import TextTokenizer

__all__ = ["predict"]

_LIKELIEST = 5


@click.command(context_settings={"show_default": True})
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("texts", nargs=-1, required=True)
@click.option("--context", default=512, help="Most tokens of a text; longer ones are cut.")
@torch.no_grad()
def predict(checkpoint: Path, texts: tuple[str, ...], context: int) -> None:
    """Say what the model of CHECKPOINT makes of TEXTS, one after another.

    \b
    classify   the class and its probability
    tag        each word and its label
    translate  the translation, by a beam search
    embed      the cosine of each text with the first
    masked     the likeliest tokens at each [MASK]
    """
    if context < 1:
        raise InvalidInput("--context", "an int >= 1", context)
    card = read_card(checkpoint)
    if card is None or card.tokenizer is None:
        raise InvalidInput("CHECKPOINT", "one of `longattn fine-tune`, with the .json beside it", checkpoint)
    if card.purpose not in _ANSWERS:
        raise InvalidInput("CHECKPOINT", f"a model for {', '.join(_ANSWERS)}", card.purpose)
    for number, text in enumerate(texts):
        if not text.strip():
            raise InvalidInput("TEXTS", "texts that are not empty", f"an empty one at place {number}")
    model = card.load(checkpoint)
    if model.config.positions == "learned":
        context = min(context, model.config.max_length - 2)
    for line in _ANSWERS[card.purpose](model, card, card.tokenizer, texts, context):
        echo(line)


def _classify(model: Any, card: Card, tokenizer: TextTokenizer, texts: tuple[str, ...], context: int) -> list[str]:
    lines = []
    for text in texts:
        probabilities = model(torch.tensor([framed(tokenizer, text, context)])).softmax(-1)[0]
        best = int(probabilities.argmax())
        lines.append(f"{card.labels[best]}\t{probabilities[best]:.3f}")
    return lines


def _tag(model: Any, card: Card, tokenizer: TextTokenizer, texts: tuple[str, ...], context: int) -> list[str]:
    lines = []
    for text in texts:
        words = text.split()
        ids, places = word_tokens(tokenizer, words, context)
        found = model(torch.tensor([ids])).argmax(-1)[0]
        lines.append(" ".join(f"{word}/{card.labels[found[at]]}" for word, at in zip(words, places, strict=False)))
    return lines


def _translate(model: Any, card: Card, tokenizer: TextTokenizer, texts: tuple[str, ...], context: int) -> list[str]:
    return translated(model, tokenizer, texts, context)


def _embed(model: Any, card: Card, tokenizer: TextTokenizer, texts: tuple[str, ...], context: int) -> list[str]:
    vectors = torch.cat([model(torch.tensor([framed(tokenizer, text, context)])) for text in texts])
    return [f"{cosine:.3f}\t{text}" for cosine, text in zip((vectors @ vectors[0]).tolist(), texts, strict=True)]


def _masked(model: Any, card: Card, tokenizer: TextTokenizer, texts: tuple[str, ...], context: int) -> list[str]:
    mask = tokenizer.id_of("[MASK]")
    lines = []
    for text in texts:
        parts = [tokenizer.encode(part) for part in text.split("[MASK]")]
        ids = [tokenizer.id_of("[CLS]"), *parts[0]]
        for part in parts[1:]:
            ids += [mask, *part]
        ids = [*ids[: context + 1], tokenizer.id_of("[SEP]")]
        if mask not in ids:
            raise InvalidInput("TEXTS", "a [MASK] in each", text)
        logits = model(torch.tensor([ids]))[0]
        for place in (index for index, token in enumerate(ids) if token == mask):
            best = logits[place].topk(min(_LIKELIEST, logits.shape[-1])).indices.tolist()
            lines.append(" ".join(repr(tokenizer.decode([token])) for token in best))
    return lines


_ANSWERS = {"classify": _classify, "tag": _tag, "translate": _translate, "embed": _embed, "masked": _masked}
