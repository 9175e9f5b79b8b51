"""`longattn train`: a model from text files, by the objective that is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from longattn.cli.card import Card, card_path, check_card, open_tokenizer, tokenizer_json
from longattn.cli.output import make_console
from longattn.cli.writing import check_out, claimed
from longattn.errors import InvalidInput
from longattn.evaluation import loss_by_position, mean_loss, perplexity
from longattn.files import temporary_folder
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
    TokenFile,
    TrainingConfig,
    clean_documents,
    load_model,
    split_files,
    write_token_file,
)
from longattn.training import train as run_training
from longattn.training.loop import PRECISIONS
from longattn.training.text_files import TextFiles, find_texts, read_text

__all__ = ["open_tokens", "train"]

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

    Below folders, binary files and what longattn itself wrote are left out, and counted. Texts are UTF-8 if a tokenizer
    reads them; bytes may be in any encoding. Ctrl-C saves; the same command with --resume goes on from there, to the
    same losses.
    """
    console = make_console()
    check_out(out, resume)
    if next_sentence and objective != "masked":
        raise InvalidInput("--next-sentence", "left out, or --objective masked", objective)
    if teacher is not None and objective != "causal":
        raise InvalidInput("--teacher", "left out, or --objective causal", objective)
    if not 0.0 <= held_out < 1.0:
        raise InvalidInput("--held-out", "a number in [0, 1)", held_out)
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
    from_bytes = objective == "causal" and tokenizer_name == "bytes" and not clean
    tokenizer = None if from_bytes else open_tokenizer(tokenizer_name)
    make_config(256 if tokenizer is None else tokenizer.vocab_size)  # reports what is out of range
    teacher_model = None if teacher is None else load_model(teacher)
    inputs = [path for path in (None if from_bytes else Path(tokenizer_name), teacher) if path is not None]
    texts = find_texts(paths, name_pattern, out=out, inputs=inputs)
    fingerprints = texts.fingerprints()
    if (warning := texts.warning()) is not None:
        make_console(error=True).print(f"Warning: {warning}", soft_wrap=True)
    card = Card(objective, tokenizer, next_sentence=next_sentence, texts=fingerprints)

    tokens = out.with_name(out.name + ".tokens")
    beside = [card_path(out), tokens, tokens.with_name(tokens.name + ".ends")]
    with claimed(out, resume, console, checkpoint=out, beside=beside), ExitStack() as opened:
        check_card(out, card, resume)
        if tokenizer is None:
            data = _bytes(list(texts.files), held_out, make_config, context, batch_size, seed)
        else:
            source = _source(fingerprints, tokenizer_json(tokenizer), clean)
            encode, size = tokenizer.encode, tokenizer.vocab_size
            file = open_tokens(opened, tokens, _documents(texts, clean), encode, size, source, resume)
            sides = file.split(held_out) if held_out else (file, None)
            data = _encoded(objective, tokenizer, next_sentence, sides, make_config, context, batch_size, seed)
        torch.manual_seed(seed)
        model = card.make(data.config)
        loss = None if teacher_model is None else Distillation(model, teacher_model)
        weights = sum(weight.numel() for weight in model.parameters())
        console.print(f"{weights:,} weights; {data.size}")
        if not resume:
            card.write(out)
        result = run_training(model, data.batches, training_config, loss=loss, checkpoint=out, resume=resume)
        console.print(f"{result.step} steps, {result.seconds:.0f} s; saved to {out}", soft_wrap=True)
        if data.evaluate is not None:
            console.print(data.evaluate(model))


def open_tokens(
    opened: ExitStack,
    path: Path,
    documents: Iterator[str],
    encode: Callable[[str], list[int]],
    vocab_size: int,
    source: bytes,
    resume: bool,
) -> TokenFile:
    """Return the documents encoded: the token file at `path` if it was made of the same, a new one otherwise.

    Args:
        opened: closed when the training ends.
        path: of the token file.
        documents, encode, vocab_size: as in `write_token_file`.
        source: the SHA-256 of all that decides the tokens.
        resume: leave the file at `path` as it is, and write a temporary one if it was made of something else.

    Raises:
        InvalidInput: the file at `path` is not a token file; as `write_token_file`.
    """
    if path.exists():
        try:
            found = TokenFile(path)
        except InvalidInput as error:
            raise InvalidInput("--out", f"no other file at {path}", error) from error
        if found.source == source and found.vocab_size == vocab_size:
            return found
        if resume:
            path = opened.enter_context(temporary_folder(path)) / path.name
    return write_token_file(path, documents, encode, vocab_size, source=source)


def _documents(texts: TextFiles, clean: bool) -> Iterator[str]:
    decoded = map(read_text, texts.files)
    return clean_documents(decoded) if clean else decoded


def _source(fingerprints: dict[str, str], tokenizer: Any, clean: bool) -> bytes:
    decides = [list(fingerprints.values()), tokenizer, clean]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).digest()


class _Configs(NamedTuple):
    """The config of a vocabulary."""

    style: str
    sizes: dict[str, Any]

    def __call__(self, vocab_size: int) -> TransformerConfig:
        return TransformerConfig.style(self.style, vocab_size=vocab_size, **self.sizes)


class _Data(NamedTuple):
    """What is trained, on what; `evaluate` says how the model does on held-out text."""

    config: TransformerConfig
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
    batches = RandomWindows(corpus, batch_size=batch_size, length=context, seed=seed)
    if not for_evaluation:
        return _Data(config, batches, size, None)
    longest = max(file.stat().st_size for file in for_evaluation)
    if longest <= context:
        got = f"{len(for_evaluation)} held-out files of at most {longest} bytes"
        raise InvalidInput("--held-out", f"a held-out file of at least {context + 1} bytes for --context, or 0", got)

    def evaluate(model: Any) -> str:
        windows = ByteCorpus(for_evaluation).spread(_HELD_OUT_WINDOWS, context + 1)
        found = loss_by_position(model, windows, dtype=matmul_dtype("cpu")).bucket(0, context)
        return f"held-out loss {found.loss:.3f} ± {found.standard_error:.3f} nats per byte"

    return _Data(config, batches, size, evaluate)


def _encoded(
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

    batches = make(for_training, seed)
    if held_out is None:
        return _Data(config, batches, size, None)
    try:
        held_out_batches = make(held_out, seed + 1)
    except InvalidInput as error:
        raise InvalidInput(f"--held-out: {error.argument}", error.expected, error.got) from error

    def evaluate(model: Any) -> str:
        count = max(1, _HELD_OUT_WINDOWS // batch_size)
        loss = mean_loss(model, held_out_batches, count, dtype=matmul_dtype("cpu"))
        pairs = ", of tokens and of pairs together" if next_sentence else f", perplexity {perplexity(loss):.2f}"
        return f"held-out loss {loss:.3f} nats{pairs}"

    return _Data(config, batches, size, evaluate)
