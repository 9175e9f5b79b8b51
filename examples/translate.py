"""Translate with an encoder-decoder: numbers in English words into French ones.

The parallel text is synthetic, so that it needs no download and every translation can be checked: "ninety one" is
"quatre-vingt-onze". A tenth of the numbers from 100 on is never trained on.

    python examples/translate.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch

from longattn.evaluation import bleu
from longattn.models import EncoderDecoder, GenerationConfig, TransformerConfig, beam_search, decode_bytes
from longattn.training import SequencePair, TrainingConfig, Translations, train

ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
ENGLISH_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
FRENCH = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept dix-huit "
    "dix-neuf"
).split()
FRENCH_TENS = "- - vingt trente quarante cinquante soixante soixante quatre-vingt quatre-vingt".split()
START, END = 1, 2  # no text holds these bytes
DIGITS = 6


def english(number: int) -> str:
    """A number below a million in English."""
    if number >= 1000:
        rest = number % 1000
        joint = " " if rest >= 100 else " and "
        return f"{english(number // 1000)} thousand" + (joint + english(rest) if rest else "")
    if number >= 100:
        return f"{ENGLISH[number // 100]} hundred" + (f" and {english(number % 100)}" if number % 100 else "")
    if number >= 20:
        return ENGLISH_TENS[number // 10] + (f" {ENGLISH[number % 10]}" if number % 10 else "")
    return ENGLISH[number]


def french(number: int, *, last: bool = True) -> str:
    """A number below a million in French; `last`: no "mille" follows, so that "vingt" and "cent" have a plural."""
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        before = "" if thousands == 1 else french(thousands, last=False) + " "
        return f"{before}mille" + (" " + french(rest) if rest else "")
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        before = "" if hundreds == 1 else FRENCH[hundreds] + " "
        plural = "s" if hundreds > 1 and not rest and last else ""
        return f"{before}cent{plural}" + (" " + french(rest, last=last) if rest else "")
    if number < 20:
        return FRENCH[number]
    tens, rest = divmod(number, 10)
    if tens in (7, 9):  # sixty and ten to nineteen, four twenties and ten to nineteen
        rest += 10
    if number == 80:
        return "quatre-vingts" if last else "quatre-vingt"
    if not rest:
        return FRENCH_TENS[tens]
    return FRENCH_TENS[tens] + (" et " if rest in (1, 11) and tens < 8 else "-") + FRENCH[rest]


def held_out(number: int) -> bool:
    """One number in ten of those from 100 on, with no pattern in its digits (Knuth's multiplicative hash)."""
    return number >= 100 and (number * 2_654_435_761 % 2**32) / 2**32 < 0.1


def draw(count: int, seed: int, *, wanted: bool) -> list[int]:
    """Random numbers, as many of each number of digits; held out if wanted, else not."""
    rng = random.Random(seed)
    numbers: list[int] = []
    while len(numbers) < count:
        number = rng.randrange(10 ** rng.randint(1, DIGITS))
        if held_out(number) == wanted:
            numbers.append(number)
    return numbers


def translate(model: EncoderDecoder, texts: Sequence[str], limit: int = 100) -> list[str]:
    """The best of a search by four beams for each text."""
    config = GenerationConfig(max_new_tokens=limit, stop_tokens=[END])
    sources = [list(text.encode()) for text in texts]
    found = beam_search(model.eval(), [[START]] * len(texts), config, sources=sources, decode=decode_bytes, beams=4)
    return [best[0].text or "" for best in found]


def main(
    *, steps: int = 1000, batch_size: int = 64, dim: int = 128, examples: int = 50_000, unseen: int = 200
) -> tuple[float, float]:
    """Train, show some translations, and return the share of held-out numbers that come out right, and BLEU."""
    numbers = draw(examples, seed=0, wanted=False)
    pairs = [SequencePair(list(english(number).encode()), list(french(number).encode())) for number in numbers]
    batches = Translations(pairs, start_id=START, end_id=END, batch_size=batch_size)

    torch.manual_seed(0)
    config = TransformerConfig.style("modern-transformer", dim=dim, layers=2, heads=dim // 32, max_length=128)
    model = EncoderDecoder(config)
    training = TrainingConfig(steps=steps, warmup=min(100, steps // 4), learning_rate=2e-3, weight_decay=0.01)
    train(model, batches, training, description="English to French")

    tested = draw(unseen, seed=1, wanted=True)
    found = translate(model, [english(number) for number in tested])
    wanted = [french(number) for number in tested]
    for number, text in list(zip(tested, found, strict=True))[:8]:
        right = text == french(number)
        print(f"{english(number)}: {text}" + ("" if right else f"   (should be {french(number)})"))
    exact = sum(text == reference for text, reference in zip(found, wanted, strict=True)) / unseen
    score = bleu(found, wanted)
    print(f"{exact:.1%} of {unseen} numbers that were never trained on are right; BLEU {score:.1f}")
    return exact, score


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
