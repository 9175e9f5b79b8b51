"""Train a model of half a million parameters to find a number in a text of 512 bytes, and extend it to 4096.

The task is `longattn.evaluation.passkey`. It is learned in prompts that grow: to copy a number is learned among a few
sentences, to find it among many after that.

    python examples/passkey.py --folder runs/passkey       # train, extend, fine-tune, and the table
    python examples/passkey.py --folder examples/passkey --table        # the table of the models that are there
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longattn.evaluation import passkey
from longattn.integrations import extend
from longattn.models import Decoder, GenerationConfig, TransformerConfig, decode_bytes, generate
from longattn.scaling import NTK, Linear, Scaling, YaRN
from longattn.training import Checkpoint, TrainingConfig, load_model, pad, save_checkpoint, train

TRAINED, FACTOR = 512, 8  # tokens, and how many times that is read after fine-tuning
SHORTEST, SHORT = 120, 180  # between which prompts are at first, without their first line
WHOLE = 300  # from this length on prompts have their first line, which says what the task is
DIGITS = 5  # of the numbers that are asked for
OTHER_DIGITS = (3, 4, 6, 7, 8)  # of the numbers that are trained on: none of them is asked for
IGNORED = -100
METHODS: Mapping[str, Callable[[float], Scaling] | None] = {
    "none": None,
    "Linear": Linear,
    "NTK": NTK,
    "YaRN": lambda factor: YaRN(factor, TRAINED),
}


def encode(text: str) -> list[int]:
    """The tokens are bytes."""
    return list(text.encode())


FIRST_LINE = passkey(encode, TRAINED, 0.0, 0).prompt.index(ord("\n")) + 1  # bytes


class Prompts:
    """Batches of prompts with their answers, where only what can be known counts: digits that stood there before.

    Args:
        tokens: of a batch, about.
        longest: tokens of a prompt. Lengths are drawn between SHORTEST and a limit, which rises from SHORT to the
            longest between the steps of `rise`.
        seed: of lengths, numbers and depths.
    """

    def __init__(self, *, tokens: int, longest: int, rise: tuple[int, int] = (0, 0), seed: int = 0) -> None:
        self.tokens, self.longest, self.rise, self.seed = tokens, longest, rise, seed

    def batch(self, step: int) -> dict[str, Tensor]:
        """tokens and targets, int64 [B, N]."""
        rng = random.Random(f"{self.seed} {step}")
        start, stop = self.rise
        risen = max(step - start, 0) / (stop - start) if step < stop else 1.0
        length = rng.randint(SHORTEST, round(SHORT + risen * (self.longest - SHORT)))
        rows, counted = zip(*(self._example(length, rng) for _ in range(self.tokens // length)), strict=True)
        tokens, (targets, _) = pad(rows)[0], pad(counted, fill=IGNORED)
        return {"tokens": tokens[:, :-1], "targets": targets[:, 1:]}

    def describe(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "longest": self.longest, "rise": list(self.rise), "seed": self.seed}

    def _example(self, length: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """A prompt with its answer, and the same with all that does not count left out."""
        cut = 0 if length >= WHOLE else FIRST_LINE
        question = passkey(encode, length + cut, rng.random(), rng.random(), digits=rng.choice(OTHER_DIGITS))
        [key] = question.answers
        read = [*question.prompt[cut:], *encode(" " + key)]
        unknown = read.index(ord(key[0])) + len(key)  # up to the number's first mention
        answer = len(read) - len(key) - 1
        counts = [at >= unknown and (48 <= byte < 58 or at >= answer) for at, byte in enumerate(read)]
        return read, [byte if count else IGNORED for byte, count in zip(read, counts, strict=True)]


def right_digits(model: Decoder, length: int, prompts: int, batch_size: int = 4) -> float:
    """The share of digits in their places, over prompts whose numbers stand at depths from start to end."""
    questions = [passkey(encode, length, at / (prompts - 1), ("asked", at), digits=DIGITS) for at in range(prompts)]
    config = GenerationConfig(max_new_tokens=1 + DIGITS)
    found = 0.0
    for first in range(0, prompts, batch_size):
        asked = questions[first : first + batch_size]
        answers = generate(model, [question.prompt for question in asked], config, decode=decode_bytes)
        found += sum(question.characters(answer.text) for question, answer in zip(asked, answers, strict=True))
    return found / prompts


def trained(folder: Path, steps: int, dim: int) -> Decoder:
    """A model from nothing, at TRAINED."""
    torch.manual_seed(0)
    sizes = {"dim": dim, "hidden": 2 * dim, "layers": 3, "heads": dim // 32}
    model = Decoder(TransformerConfig(**sizes, max_length=TRAINED, tie_embeddings=True))
    batches = Prompts(tokens=4096, longest=TRAINED, rise=(steps // 4, 2 * steps // 3))
    config = TrainingConfig(steps=steps, learning_rate=3e-3, warmup=min(50, steps // 4))
    return _run(model, batches, config, folder / "trained.safetensors")


def tuned(folder: Path, model: Decoder, steps: int) -> Decoder:
    """The model extended by FACTOR, and trained a little in prompts up to that length."""
    longer = extend(model, YaRN(FACTOR, TRAINED))
    batches = Prompts(tokens=2 * FACTOR * TRAINED, longest=FACTOR * TRAINED, seed=1)
    config = TrainingConfig(steps=steps, learning_rate=1e-3, warmup=min(10, steps // 4))
    return _run(longer, batches, config, folder / "tuned.safetensors")


def _run(model: Decoder, batches: Prompts, config: TrainingConfig, file: Path) -> Decoder:
    """Train, and save the weights in float16: what is measured is what was saved."""
    result = train(model, batches, config, description=file.stem)
    print(f"{file.stem}: {result.step} steps, {result.tokens:,} tokens, {result.seconds:.0f} s")
    save_checkpoint(
        file, Checkpoint(model.config, {name: weight.half() for name, weight in model.state_dict().items()})
    )
    return load_model(file)


def table(folder: Path, prompts: int) -> dict[str, list[float]]:
    """Print and return the share of right digits at 1, 2, 4 and 8 times the trained length, by method."""
    model, longer = load_model(folder / "trained.safetensors"), load_model(folder / "tuned.safetensors")
    ratios = [2**power for power in range(FACTOR.bit_length())]
    print(f"digits, {prompts} prompts each\n{'':>12}" + "".join(f"{ratio * TRAINED:>8}" for ratio in ratios))
    found = {}
    for name, method in METHODS.items():
        extended = [extend(model, method(ratio)) if method and ratio > 1 else model for ratio in ratios]
        found[name] = _row(name, extended, ratios, prompts)
    found["YaRN, tuned"] = _row("YaRN, tuned", [longer] * len(ratios), ratios, prompts)
    return found


def _row(name: str, models: Sequence[Decoder], ratios: Sequence[int], prompts: int) -> list[float]:
    found = [right_digits(model, ratio * TRAINED, prompts) for model, ratio in zip(models, ratios, strict=True)]
    print(f"{name:>12}" + "".join(f"{share:>8.1%}" for share in found))
    return found


def main(
    folder: Path, *, steps: int = 1800, tuning_steps: int = 1000, dim: int = 128, prompts: int = 40
) -> dict[str, list[float]]:
    """Train in `folder`, extend, fine-tune, and return the table."""
    tuned(folder, trained(folder, steps, dim), tuning_steps)
    return table(folder, prompts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/passkey"))
    parser.add_argument("--table", action="store_true", help="of the models in the folder; nothing is trained")
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments.folder, prompts=40)
    else:
        main(arguments.folder)
