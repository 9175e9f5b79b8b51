"""Pretrain a GPT: byte-pair encoding, packed documents, held-out perplexity, and a text from the result.

The text is the source of Python's standard library, which is on every machine; a tenth of its files is held out.

    python examples/pretrain_gpt.py --folder runs/gpt
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from longattn.evaluation import mean_loss, perplexity
from longattn.models import Decoder, GenerationConfig, Sampling, TransformerConfig, generate, matmul_dtype
from longattn.training import (
    PackedDocuments,
    TrainingConfig,
    WordTokenizer,
    deduplicated,
    stdlib_files,
    train,
    train_bpe,
    write_token_file,
)

LENGTH = 512  # tokens that the model looks back, at most
PROMPT = "def __init__(self, "


def main(
    folder: Path,
    *,
    files: Sequence[Path] | None = None,
    steps: int = 300,
    vocab_size: int = 4096,
    dim: int = 256,
    layers: int = 4,
    tokens: int = 4096,
) -> float:
    """Train in `folder`, print what came out, and return the held-out loss in nats per token."""
    folder.mkdir(parents=True, exist_ok=True)
    files = stdlib_files() if files is None else files
    texts = list(deduplicated(file.read_text(encoding="utf-8", errors="replace") for file in files))
    tokenizer = WordTokenizer(train_bpe(texts, vocab_size))
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))

    # Code keeps its spaces as they are; prose would first go through `clean_documents`.
    file = write_token_file(folder / "text.tokens", texts, tokenizer.encode, tokenizer.vocab_size)
    for_training, held_out = file.split(0.1)
    print(f"{len(file)} documents, {int(file.lengths.sum()):,} tokens of {tokenizer.vocab_size} kinds")

    # GPT-2's blocks, but for rotary positions: they go on past max_length, and generation can cache them.
    torch.manual_seed(0)
    config = TransformerConfig.style(
        "gpt2",
        positions="rope",
        vocab_size=tokenizer.vocab_size,
        dim=dim,
        layers=layers,
        heads=dim // 64,
        max_length=LENGTH,
    )
    model = Decoder(config)
    training = TrainingConfig(steps=steps, warmup=min(50, steps // 4), learning_rate=1.5e-3)
    checkpoint = folder / "model.safetensors"
    train(
        model,
        PackedDocuments(for_training, tokens=tokens, longest=LENGTH),
        training,
        checkpoint=checkpoint,
        description="GPT",
    )

    batches = min(50, 1 + int(held_out.lengths.sum()) // tokens)
    loss = mean_loss(
        model, PackedDocuments(held_out, tokens=tokens, longest=LENGTH), batches, dtype=matmul_dtype("cpu")
    )
    characters = len("".join(texts)) / int(file.lengths.sum())
    print(
        f"held out: {loss:.3f} nats per token, perplexity {perplexity(loss):.1f}, {characters:.2f} characters a token"
    )

    settings = GenerationConfig(max_new_tokens=60, sampling=Sampling(temperature=0.7, top_p=0.9))
    generator = torch.Generator().manual_seed(0)
    written = generate(model, [tokenizer.encode(PROMPT)], settings, generator=generator)[0]
    print(PROMPT + tokenizer.decode(written.tokens))
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpt"))
    main(parser.parse_args().folder)
