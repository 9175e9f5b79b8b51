"""Train a tagger: what is each byte of a Python program, comment, string, keyword, name, ...?

The text is the source of Python's standard library, and the labels are those of Python's own `tokenize`: what is
learned is a syntax highlighter. A tenth of the files is held out. Whether a byte is in a string hangs on quotes before
and after it, so the encoder sees both sides, in most layers through a window.

    python examples/tag.py
"""

from __future__ import annotations

import argparse
import io
import itertools
import keyword
import random
import tokenize
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from longattn.evaluation import accuracy, f1
from longattn.models import TokenClassifier, TransformerConfig
from longattn.training import LabelledTokens, TaggedSequences, TrainingConfig, split_files, stdlib_files, train

KINDS = ("space", "comment", "string", "keyword", "name", "number", "operator")
COLOURS = ("0", "90", "32", "1;34", "0", "36", "33")  # of terminals
TOKENS = {tokenize.COMMENT: 1, tokenize.STRING: 2, tokenize.NUMBER: 5, tokenize.OP: 6}
LENGTH = 256  # bytes


def kinds(source: str) -> list[int]:
    """The kind of each character."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = [0] * len(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = TOKENS.get(token.type, 0)
        if token.type == tokenize.NAME:
            kind = KINDS.index("keyword" if keyword.iskeyword(token.string) else "name")
        first, last = (starts[min(row - 1, len(lines))] + column for row, column in (token.start, token.end))
        found[first:last] = [kind] * (last - first)
    return found


def windows(files: Sequence[Path], count: int, seed: int) -> list[LabelledTokens]:
    """Random windows of files of which each character is one byte."""
    sources = []
    for file in files:
        source = file.read_bytes().decode("latin-1").replace("\r\n", "\n")
        if source.isascii() and "\f" not in source and len(source) > LENGTH:
            sources.append((source.encode(), kinds(source)))
    rng = random.Random(seed)
    found = []
    for text, labels in rng.choices(sources, weights=[len(text) for text, _ in sources], k=count):
        start = rng.randrange(len(text) - LENGTH)
        found.append(LabelledTokens(list(text[start : start + LENGTH]), labels[start : start + LENGTH]))
    return found


def main(
    *,
    files: Sequence[Path] | None = None,
    steps: int = 400,
    batch_size: int = 16,
    dim: int = 128,
    layers: int = 4,
    examples: int = 10_000,
) -> tuple[float, float]:
    """Train, print what came out, and return the held-out accuracy and macro F1."""
    for_training, held_out = split_files(stdlib_files() if files is None else files, 0.1)
    batches = TaggedSequences(windows(for_training, examples, seed=0), batch_size=batch_size)
    torch.manual_seed(0)
    pattern = "SSSL"[-layers:]
    config = TransformerConfig.style(
        "modern-encoder", dim=dim, layers=layers, heads=dim // 32, max_length=LENGTH, pattern=pattern, window=32
    )
    model = TokenClassifier(config, len(KINDS))
    training = TrainingConfig(steps=steps, warmup=min(50, steps // 4), learning_rate=1.5e-3)
    train(model, batches, training, description="tagger")

    unseen = windows(held_out, max(16, examples // 50), seed=1)
    batch = batches.collate(unseen)
    with torch.no_grad():
        predictions = torch.cat([model(tokens).argmax(-1) for tokens in batch["tokens"].split(32)])
    right, macro = accuracy(batch["labels"], predictions), f1(batch["labels"], predictions)
    counts = Counter(label for example in unseen for label in example.labels)
    kind, most = counts.most_common(1)[0]
    print(f"held out: accuracy {right:.2%}, macro F1 {macro:.3f}; always {KINDS[kind]!r}: {most / counts.total():.2%}")
    show(bytes(unseen[0].tokens), predictions[0].tolist())
    return right, macro


def show(text: bytes, labels: Sequence[int]) -> None:
    """The text in colours of the kinds."""
    runs = itertools.groupby(zip(text, labels, strict=True), key=lambda pair: COLOURS[pair[1]])
    print("".join(f"\033[{colour}m{bytes(byte for byte, _ in run).decode()}" for colour, run in runs) + "\033[0m")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
