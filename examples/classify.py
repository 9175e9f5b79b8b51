"""Fine-tune a classifier: which package of Python's standard library is this passage from?

The text and the labels are real: passages of the library's source files, and the folder that each file lies in. A fifth
of the files is held out. With --bert the encoder starts from what pretrain_bert.py left; without, from random weights.

    python examples/pretrain_bert.py --folder runs/bert
    python examples/classify.py --bert runs/bert
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from longattn.evaluation import accuracy, f1
from longattn.models import MaskedLM, SequenceClassifier, TransformerConfig
from longattn.training import (
    LabelledSequence,
    LabelledSequences,
    TrainingConfig,
    WordTokenizer,
    load_model,
    load_tokenizer,
    split_files,
    stdlib_files,
    train,
    train_wordpiece,
)

LENGTH = 128  # tokens of a passage
LEAST_FILES = 8  # to train on, of a package that is a class


def packages(files: Sequence[Path]) -> dict[str, tuple[list[Path], list[Path]]]:
    """(files to train on, files held out) of each package that has enough of both."""
    root = Path(os.path.commonpath([file.parent for file in files]))
    found: dict[str, tuple[list[Path], list[Path]]] = {}
    for side, chosen in enumerate(split_files(files, 0.2)):
        for file in chosen:
            package, *below = file.relative_to(root).parts
            if below:
                found.setdefault(package, ([], []))[side].append(file)
    return {name: sides for name, sides in sorted(found.items()) if len(sides[0]) >= LEAST_FILES and sides[1]}


def passages(files: Sequence[Path], label: int, tokenizer: WordTokenizer) -> list[LabelledSequence]:
    """[CLS] passage, one after another, of all files."""
    start = tokenizer.id_of("[CLS]")
    found = []
    for file in files:
        ids = tokenizer.encode(file.read_text(encoding="utf-8", errors="replace"))
        found += [LabelledSequence([start, *ids[i : i + LENGTH - 1]], label) for i in range(0, len(ids), LENGTH - 1)]
    return found


def main(
    bert: Path | None = None,
    *,
    files: Sequence[Path] | None = None,
    steps: int = 200,
    batch_size: int = 32,
    dim: int = 128,
    layers: int = 4,
) -> tuple[float, float]:
    """Fine-tune, print what came out, and return the held-out accuracy and macro F1."""
    files = stdlib_files() if files is None else files
    names = packages(files)
    tokenizer, classifier = start_from(bert, files, len(names), dim, layers)
    for_training: list[LabelledSequence] = []
    held_out: list[LabelledSequence] = []
    for label, (first, second) in enumerate(names.values()):
        for_training += passages(first, label, tokenizer)
        held_out += passages(second, label, tokenizer)
    print(f"{len(names)} packages, {len(for_training)} passages to train on, {len(held_out)} held out")

    batches = LabelledSequences(for_training, batch_size=batch_size)
    training = TrainingConfig(steps=steps, warmup=min(30, steps // 4), learning_rate=5e-4, weight_decay=0.01)
    train(classifier, batches, training, description="classifier")

    labels = [example.label for example in held_out]
    predictions: list[int] = []
    with torch.no_grad():
        for first in range(0, len(held_out), 64):
            batch = batches.collate(held_out[first : first + 64])
            predictions += classifier(batch["tokens"], key_mask=batch["key_mask"]).argmax(-1).tolist()
    commonest = Counter(example.label for example in for_training).most_common(1)[0][0]
    right, macro = accuracy(labels, predictions), f1(labels, predictions)
    baseline = accuracy(labels, [commonest] * len(labels))
    print(f"held out: accuracy {right:.1%}, macro F1 {macro:.3f}; always {list(names)[commonest]!r}: {baseline:.1%}")
    return right, macro


def start_from(
    bert: Path | None, files: Sequence[Path], classes: int, dim: int, layers: int
) -> tuple[WordTokenizer, SequenceClassifier]:
    """The pretrained encoder below a new head; or all new."""
    torch.manual_seed(0)
    if bert is None:
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        tokenizer = WordTokenizer(train_wordpiece(texts, 4096))
        sizes = {"vocab_size": tokenizer.vocab_size, "dim": dim, "layers": layers, "heads": dim // 32}
        blocks = {"norm_first": True, "embedding_norm": False, "positions": "rope"}  # pretrain_bert.py's
        return tokenizer, SequenceClassifier(
            TransformerConfig.style("bert", max_length=LENGTH, **sizes, **blocks), classes
        )
    tokenizer = WordTokenizer(load_tokenizer(bert / "tokenizer.json"))
    pretrained = load_model(bert / "model.safetensors", lambda config: MaskedLM(config, next_sentence=True))
    classifier = SequenceClassifier(pretrained.config, classes)
    classifier.encoder.load_state_dict(pretrained.encoder.state_dict())
    return tokenizer, classifier


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bert", type=Path, help="the folder of pretrain_bert.py")
    main(parser.parse_args().bert)
