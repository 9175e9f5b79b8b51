"""Translate with an encoder-decoder: numbers in English words into digits.

The parallel text is synthetic, so that it needs no download and every answer can be checked: "four hundred and seven"
is 407. A tenth of the numbers from 100 on is never trained on.

    python examples/translate.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longattn.models import EncoderDecoder, GenerationConfig, TransformerConfig, decode_bytes, generate
from longattn.training import TrainingConfig, train

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
PAD, START, END = 0, 1, 2  # no text holds these bytes
DIGITS = 4


def words(number: int) -> str:
    """A number below a million in English."""
    if number >= 1000:
        rest = number % 1000
        joint = " " if rest >= 100 else " and "
        return f"{words(number // 1000)} thousand" + (joint + words(rest) if rest else "")
    if number >= 100:
        return f"{ONES[number // 100]} hundred" + (f" and {words(number % 100)}" if number % 100 else "")
    if number >= 20:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    return ONES[number]


def padded(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """(tokens [B, N], lengths int32 [B])."""
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    width = int(lengths.max())
    return torch.tensor([[*text, *[PAD] * (width - len(text))] for text in texts]), lengths


def held_out(number: int) -> bool:
    """One number in ten of those from 100 on, with no pattern in its digits (Knuth's multiplicative hash)."""
    return number >= 100 and (number * 2_654_435_761 % 2**32) / 2**32 < 0.1


class Numbers:
    """Batches of numbers that are not held out, as many of each number of digits."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return pairs(draw(self.batch_size, generator, wanted=False))

    def describe(self) -> dict[str, Any]:
        return {"digits": DIGITS, "batch_size": self.batch_size}


def draw(count: int, generator: torch.Generator, *, wanted: bool) -> list[int]:
    """Random numbers, held out if wanted, else not."""
    numbers: list[int] = []
    while len(numbers) < count:
        digits = int(torch.randint(1, DIGITS + 1, (1,), generator=generator))
        number = int(torch.randint(10**digits, (1,), generator=generator))
        if held_out(number) == wanted:
            numbers.append(number)
    return numbers


def pairs(numbers: Sequence[int]) -> dict[str, Tensor]:
    """The arguments of `EncoderDecoder.loss`."""
    source, source_lens = padded([words(number).encode() for number in numbers])
    target, target_lens = padded([bytes([START]) + str(number).encode() + bytes([END]) for number in numbers])
    targets = target[:, 1:].masked_fill(torch.arange(target.shape[1] - 1) >= target_lens[:, None] - 1, -100)
    return {"source": source, "tokens": target[:, :-1], "targets": targets, "source_lens": source_lens}


def translate(model: EncoderDecoder, texts: Sequence[str], limit: int = DIGITS + 1) -> list[str]:
    """The likeliest next token each time, until a text has ended."""
    config = GenerationConfig(max_new_tokens=limit, stop_tokens=[END])
    sources = [list(text.encode()) for text in texts]
    found = generate(model.eval(), [[START]] * len(texts), config, sources=sources, decode=decode_bytes)
    return [each.text or "" for each in found]


def main(steps: int = 1500, batch_size: int = 64, dim: int = 64) -> float:
    """Train, show some translations, and return the share of held-out numbers that come out right."""
    torch.manual_seed(0)
    config = TransformerConfig.style("modern-transformer", dim=dim, layers=2, heads=4, max_length=64)
    model = EncoderDecoder(config)
    training = TrainingConfig(steps=steps, warmup=min(100, steps // 4), learning_rate=2e-3, weight_decay=0.01)
    train(model, Numbers(batch_size), training, description="words to digits")

    numbers = draw(200, torch.Generator().manual_seed(-1), wanted=True)
    found = translate(model, [words(number) for number in numbers])
    for number, text in list(zip(numbers, found, strict=True))[:8]:
        print(f"{words(number):70} {text:>8}" + ("" if text == str(number) else f"   (should be {number})"))
    right = sum(text == str(number) for number, text in zip(numbers, found, strict=True)) / len(numbers)
    print(f"{right:.0%} of {len(numbers)} numbers that were never trained on are right.")
    return right


if __name__ == "__main__":
    main()
