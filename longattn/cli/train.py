"""`longattn train`: a model from text files, by the objective that is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console

from longattn.cli.card import Card, open_tokenizer
from longattn.errors import InvalidInput
from longattn.evaluation import loss_by_position, mean_loss, perplexity
from longattn.models import STYLES, Distillation, TransformerConfig, matmul_dtype
from longattn.training import (
    Batches,
    ByteCorpus,
    DenoisedWindows,
    Documents,
    MaskedWindows,
    PackedDocuments,
    RandomWindows,
    TextTokenizer,
    TrainingConfig,
    clean_documents,
    find_files,
    load_model,
    split_files,
    write_token_file,
)
from longattn.training import train as run_training
from longattn.training.loop import PRECISIONS

__all__ = ["train"]

_HELD_OUT_WINDOWS = 64
_STYLES = {"causal": "llama", "masked": "bert", "infilling": "modern-transformer", "spans": "modern-transformer"}
_MASKED_TOKENS = {"mask": "[MASK]", "start": "[CLS]", "separator": "[SEP]"}


@click.command(context_settings={"show_default": True})
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The checkpoint to write.")
@click.option("--resume", is_flag=True, help="Go on from --out; all else as it was started.")
@click.option(
    "--objective",
    type=click.Choice(list(_STYLES)),
    default="causal",
    help="Next tokens (a decoder), masked tokens (an encoder), BART's infilling or T5's spans (an encoder-decoder).",
)
@click.option("--next-sentence", is_flag=True, help="With masked: also whether one passage follows another.")
@click.option("--tokenizer", "tokenizer_name", default="bytes", help="bytes, or a file of `longattn tokenizer`.")
@click.option("--clean", is_flag=True, help="First normalise the text, and drop noise and doubles; not for code.")
@click.option("--teacher", type=click.Path(path_type=Path), help="Distil: a decoder to learn from beside the text.")
@click.option("--style", type=click.Choice(list(STYLES)), help="Of the blocks; by default one that fits the objective.")
@click.option("--files", "name_pattern", default="*", help="Which names to take below folders, such as '*.txt'.")
@click.option("--held-out", default=0.1, help="Share of the files kept out of training, to be evaluated on; may be 0.")
@click.option("--context", default=256, help="Trained length, in tokens.")
@click.option("--dim", default=128, help="Width of the model.")
@click.option("--layers", default=4, help="Number of blocks.")
@click.option("--heads", default=2, help="Query heads.")
@click.option("--kv-heads", type=int, help="Key and value heads; by default 1, of encoders as many as heads.")
@click.option("--pattern", default="L", help="One letter a layer, repeated: L full attention, S sliding window.")
@click.option("--window", type=int, help="Keys that a sliding layer sees.")
@click.option("--sinks", default=0, help="First keys that a sliding layer sees from everywhere.")
@click.option("--steps", default=2000, help="Training steps.")
@click.option("--seconds", default=0.0, help="Train on for at least this long.")
@click.option("--batch-size", default=8, help="Windows of text per step.")
@click.option("--learning-rate", default=2.5e-3, help="Peak learning rate.")
@click.option("--recompute", is_flag=True, help="Less memory for more work: keep the inputs of blocks only.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="Of the matrix products.")
@click.option("--save-every", default=200, help="Steps between checkpoints.")
@click.option("--seed", default=0, help="Of the initial weights and of the batches.")
def train(
    paths: tuple[Path, ...],
    out: Path,
    resume: bool,
    objective: str,
    next_sentence: bool,
    tokenizer_name: str,
    clean: bool,
    teacher: Path | None,
    style: str | None,
    name_pattern: str,
    held_out: float,
    context: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    pattern: str,
    window: int | None,
    sinks: int,
    steps: int,
    seconds: float,
    batch_size: int,
    learning_rate: float,
    recompute: bool,
    precision: str,
    save_every: int,
    seed: int,
) -> None:
    """Train a model on text files, or on all files below folders: by default a decoder of bytes.

    Ctrl-C saves; the same command with --resume goes on from there, to the same losses.
    """
    console = Console(highlight=False, markup=False)
    if out.exists() != resume:
        expected = "a checkpoint to resume from" if resume else "a new file, or --resume beside it"
        raise InvalidInput("--out", expected, out)
    if next_sentence and objective != "masked":
        raise InvalidInput("--next-sentence", "left out, or --objective masked", objective)
    if teacher is not None and objective != "causal":
        raise InvalidInput("--teacher", "left out, or --objective causal", objective)
    training_config = TrainingConfig(
        steps=steps,
        seconds=seconds,
        learning_rate=learning_rate,
        precision=precision,
        recompute=recompute,
        save_every=save_every,
    )
    sizes: dict[str, Any] = {
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "kv_heads": (1 if objective == "causal" else heads) if kv_heads is None else kv_heads,
        "max_length": context,
        "pattern": pattern,
        "window": window,
        "sinks": sinks,
    }
    make_config = _Configs(style or _STYLES[objective], sizes)
    files = find_files(paths, name_pattern)
    if objective == "causal" and tokenizer_name == "bytes" and not clean:
        data = _bytes(files, held_out, make_config, context, batch_size, seed)
    else:
        tokenizer = open_tokenizer(tokenizer_name)
        documents = _encoded(files, out, tokenizer, clean, held_out)
        data = _documents(objective, tokenizer, next_sentence, documents, make_config, context, batch_size, seed)
    torch.manual_seed(seed)
    model = data.card.make(data.config)
    loss = None if teacher is None else Distillation(model, load_model(teacher))
    weights = sum(weight.numel() for weight in model.parameters())
    console.print(f"{weights:,} weights; {data.size}")
    data.card.write(out)
    try:
        result = run_training(model, data.batches, training_config, loss=loss, checkpoint=out, resume=resume)
    except KeyboardInterrupt:
        console.print(f"interrupted; saved to {out}: the same command with --resume goes on", soft_wrap=True)
        sys.exit(130)
    console.print(f"{result.step} steps, {result.seconds:.0f} s; saved to {out}", soft_wrap=True)
    if data.evaluate is not None:
        console.print(data.evaluate(model))


class _Configs(NamedTuple):
    """The config of a vocabulary."""

    style: str
    sizes: dict[str, Any]

    def __call__(self, vocab_size: int) -> TransformerConfig:
        return TransformerConfig.style(self.style, vocab_size=vocab_size, **self.sizes)


class _Data(NamedTuple):
    """What is trained, on what; `evaluate` says how the model does on held-out text."""

    config: TransformerConfig
    card: Card
    batches: Batches
    size: str
    evaluate: Callable[[Any], str] | None


def _bytes(
    files: list[Path], held_out: float, make_config: _Configs, context: int, batch_size: int, seed: int
) -> _Data:
    """Windows of bytes, read straight from the files."""
    config = make_config(256)
    for_training, for_evaluation = split_files(files, held_out) if held_out else (files, [])
    corpus = ByteCorpus(for_training)
    size = f"{len(corpus):,} bytes in {len(for_training)} files, {len(for_evaluation)} files held out"

    def evaluate(model: Any) -> str:
        windows = ByteCorpus(for_evaluation).spread(_HELD_OUT_WINDOWS, context + 1)
        found = loss_by_position(model, windows, dtype=matmul_dtype("cpu")).bucket(0, context)
        return f"held-out loss {found.loss:.3f} ± {found.standard_error:.3f} nats per byte"

    batches = RandomWindows(corpus, batch_size=batch_size, length=context, seed=seed)
    return _Data(config, Card("causal"), batches, size, evaluate if for_evaluation else None)


def _encoded(
    files: list[Path], out: Path, tokenizer: TextTokenizer, clean: bool, held_out: float
) -> tuple[Documents, Documents | None]:
    """(training documents, held-out ones), in a token file beside the checkpoint."""
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = out.with_name(out.name + ".tokens")
    file = write_token_file(place, clean_documents(texts) if clean else texts, tokenizer.encode, tokenizer.vocab_size)
    return file.split(held_out) if held_out else (file, None)


def _documents(
    objective: str,
    tokenizer: TextTokenizer,
    next_sentence: bool,
    documents: tuple[Documents, Documents | None],
    make_config: _Configs,
    context: int,
    batch_size: int,
    seed: int,
) -> _Data:
    """Token ids of documents, as the objective has them."""
    vocab_size = tokenizer.vocab_size
    shape: dict[str, Any] = {"batch_size": batch_size, "length": context}
    make: Callable[..., Batches]
    if objective == "causal":

        def make(text: Documents, seed: int) -> Batches:
            return PackedDocuments(text, tokens=batch_size * context, longest=context, seed=seed)

    elif objective == "masked":
        shape |= {f"{name}_id": tokenizer.id_of(token) for name, token in _MASKED_TOKENS.items()}
        others = [tokenizer.id_of("[PAD]"), tokenizer.id_of("[UNK]")]

        def make(text: Documents, seed: int) -> Batches:
            return MaskedWindows(text, **shape, special_ids=others, next_sentence=next_sentence, seed=seed)

    else:
        shape |= {"start_id": tokenizer.id_of("[CLS]"), "end_id": tokenizer.id_of("[SEP]")}
        if objective == "infilling":
            shape["mask_id"] = tokenizer.id_of("[MASK]")
        else:
            # Sentinels stand behind the tokenizer's own ids: as many as a window can need.
            sentinels = range(vocab_size, vocab_size + context // 20 + 2)
            shape["sentinel_ids"] = sentinels
            vocab_size = sentinels.stop

        def make(text: Documents, seed: int) -> Batches:
            return DenoisedWindows(text, **shape, seed=seed)

    for_training, held_out = documents
    config = make_config(vocab_size)
    held_out_count = 0 if held_out is None else len(held_out)
    size = f"{int(for_training.lengths.sum()):,} tokens in {len(for_training)} documents, {held_out_count} held out"

    def evaluate(model: Any) -> str:
        assert held_out is not None
        count = max(1, _HELD_OUT_WINDOWS // batch_size)
        loss = mean_loss(model, make(held_out, seed + 1), count, dtype=matmul_dtype("cpu"))
        pairs = ", of tokens and of pairs together" if next_sentence else f", perplexity {perplexity(loss):.2f}"
        return f"held-out loss {loss:.3f} nats{pairs}"

    card = Card(objective, tokenizer, next_sentence=next_sentence)
    return _Data(config, card, make(for_training, seed), size, None if held_out is None else evaluate)
