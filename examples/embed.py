"""Contrastive sentence embeddings: find a function by what its docstring says.

The pairs are real: each documented function of Python's standard library, as (first paragraph of the docstring, code
without docstring). A description shall be nearer to its own code than to that of the other functions of a batch
(InfoNCE). A fifth of the files is held out; there, each description looks for its code among all held-out functions.
With --bert the encoder starts from what pretrain_bert.py left.

    python examples/pretrain_bert.py --folder runs/bert
    python examples/embed.py --bert runs/bert
"""

from __future__ import annotations

import argparse
import ast
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longattn.evaluation import retrieval_accuracy
from longattn.models import MaskedLM, SentenceEncoder, TransformerConfig
from longattn.training import (
    SentencePairs,
    SequencePair,
    TrainingConfig,
    WordTokenizer,
    load_model,
    load_tokenizer,
    pad,
    split_files,
    stdlib_files,
    train,
    train_wordpiece,
)

LENGTH = 128  # tokens of a description, of a function


def documented_functions(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(what it does, how) of every function with a docstring of at least four words."""
    for file in files:
        with warnings.catch_warnings(action="ignore"):  # old escapes in strings
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
                description = (ast.get_docstring(node) or "").split("\n\n")[0]
                if len(description.split()) >= 4:
                    node.body = node.body[1:]
                    yield description, ast.unparse(node)


def main(
    bert: Path | None = None,
    *,
    files: Sequence[Path] | None = None,
    steps: int = 250,
    batch_size: int = 64,
    dim: int = 128,
    layers: int = 4,
) -> float:
    """Train, and return how many of the held-out descriptions find their own function."""
    files = stdlib_files() if files is None else files
    tokenizer, model = start_from(bert, files, dim, layers)
    for_training, held_out = (
        [SequencePair(*(tokenizer.encode(text)[:LENGTH] for text in pair)) for pair in documented_functions(side)]
        for side in split_files(files, 0.2)
    )
    print(f"{len(for_training)} functions to train on, {len(held_out)} held out")
    before = search(model, held_out)
    training = TrainingConfig(steps=steps, warmup=min(50, steps // 4), learning_rate=5e-4, weight_decay=0.01)
    train(model, SentencePairs(for_training, batch_size=batch_size), training, description="embeddings")
    after = search(model, held_out)
    print(f"the right one first among {len(held_out)}: {before:.1%} before, {after:.1%} after")
    return after


@torch.no_grad()
def embeddings(model: SentenceEncoder, texts: Sequence[Sequence[int]]) -> Tensor:
    """Unit vectors [B, C]."""
    parts = []
    for first in range(0, len(texts), 64):
        tokens, key_mask = pad(texts[first : first + 64])
        parts.append(model(tokens, key_mask=key_mask))
    return torch.cat(parts)


def search(model: SentenceEncoder, pairs: Sequence[SequencePair]) -> float:
    """How many descriptions are nearest to their own function."""
    model.eval()
    return retrieval_accuracy(*(embeddings(model, side) for side in zip(*pairs, strict=True)))


def start_from(
    bert: Path | None, files: Sequence[Path], dim: int, layers: int
) -> tuple[WordTokenizer, SentenceEncoder]:
    """The pretrained encoder; or a new one."""
    torch.manual_seed(0)
    if bert is None:
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        tokenizer = WordTokenizer(train_wordpiece(texts, 4096))
        sizes = {"vocab_size": tokenizer.vocab_size, "dim": dim, "layers": layers, "heads": dim // 32}
        blocks = {"norm_first": True, "embedding_norm": False, "positions": "rope"}  # pretrain_bert.py's
        return tokenizer, SentenceEncoder(TransformerConfig.style("bert", max_length=LENGTH, **sizes, **blocks))
    tokenizer = WordTokenizer(load_tokenizer(bert / "tokenizer.json"))
    pretrained = load_model(bert / "model.safetensors", lambda config: MaskedLM(config, next_sentence=True))
    model = SentenceEncoder(pretrained.config)
    model.encoder.load_state_dict(pretrained.encoder.state_dict())
    return tokenizer, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bert", type=Path, help="the folder of pretrain_bert.py")
    main(parser.parse_args().bert)
