"""Pretrain a BERT: WordPiece, masked tokens, and whether the second half of a passage follows the first.

The text is the source of Python's standard library, which is on every machine; a tenth of its files is held out.
classify.py and embed.py go on from what this leaves.

    python examples/pretrain_bert.py --folder runs/bert
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longattn.evaluation import accuracy
from longattn.models import MaskedLM, TransformerConfig
from longattn.models.projection import project
from longattn.training import (
    Documents,
    MaskedWindows,
    TrainingConfig,
    WordTokenizer,
    deduplicated,
    stdlib_files,
    train,
    train_wordpiece,
    write_token_file,
)


def main(
    folder: Path,
    *,
    files: Sequence[Path] | None = None,
    steps: int = 1200,
    vocab_size: int = 4096,
    dim: int = 128,
    layers: int = 4,
    batch_size: int = 32,
) -> tuple[float, float]:
    """Train in `folder`; returns the held-out accuracies of masked tokens and of sentence pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    files = stdlib_files() if files is None else files
    texts = list(deduplicated(file.read_text(encoding="utf-8", errors="replace") for file in files))
    tokenizer = WordTokenizer(train_wordpiece(texts, vocab_size))
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    file = write_token_file(folder / "text.tokens", texts, tokenizer.encode, tokenizer.vocab_size)

    def pairs(documents: Documents, seed: int) -> MaskedWindows:
        return MaskedWindows(
            documents,
            batch_size=batch_size,
            length=128,
            mask_id=tokenizer.id_of("[MASK]"),
            start_id=tokenizer.id_of("[CLS]"),
            separator_id=tokenizer.id_of("[SEP]"),
            special_ids=[tokenizer.id_of("[PAD]"), tokenizer.id_of("[UNK]")],
            next_sentence=True,
            seed=seed,
        )

    for_training, held_out = file.split(0.1)
    torch.manual_seed(0)
    # BERT's blocks with norms first and rotary positions: small models then learn from far fewer steps.
    config = TransformerConfig.style(
        "bert",
        norm_first=True,
        embedding_norm=False,
        positions="rope",
        vocab_size=tokenizer.vocab_size,
        dim=dim,
        layers=layers,
        heads=dim // 32,
        max_length=128,
    )
    model = MaskedLM(config, next_sentence=True)
    training = TrainingConfig(steps=steps, warmup=min(100, steps // 4), learning_rate=1e-3, weight_decay=0.01)
    checkpoint = folder / "model.safetensors"
    train(model, pairs(for_training, seed=0), training, checkpoint=checkpoint, description="BERT")

    unseen = pairs(held_out, seed=1)
    tokens, sentences = zip(*(evaluate(model, unseen.batch(step)) for step in range(20)), strict=True)
    masked, pair = score(tokens), score(sentences)
    print(f"held out: {masked:.1%} of the masked tokens are right, and {pair:.1%} of the pairs (half by chance)")
    return masked, pair


@torch.no_grad()
def evaluate(model: MaskedLM, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Labels and predictions, of the masked tokens and of the pairs."""
    hidden = model.encoder(batch["tokens"], token_types=batch["token_types"], key_mask=batch["key_mask"])
    counted = batch["targets"] != -100
    logits = project(model.transformed(hidden[counted]), model.projection, model.output_bias)
    pairs = model.next_sentence_logits(hidden).argmax(-1)
    return (batch["targets"][counted], logits.argmax(-1)), (batch["is_random"].long(), pairs)


def score(found: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The accuracy over several batches."""
    labels, predictions = zip(*found, strict=True)
    return accuracy(torch.cat(labels), torch.cat(predictions))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/bert"))
    main(parser.parse_args().folder)
