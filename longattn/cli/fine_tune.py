"""`longattn fine-tune`: a model of a task, from labelled examples in a file of JSON lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from longattn.cli.card import Card, card_path, check_card, open_tokenizer, read_card
from longattn.cli.output import make_console
from longattn.cli.writing import check_installed, check_out, claimed
from longattn.errors import InvalidInput
from longattn.evaluation import accuracy, bleu, f1, retrieval_accuracy
from longattn.models import EncoderDecoder, GenerationConfig, TransformerConfig, autocast, beam_search, matmul_dtype
from longattn.models.losses import IGNORED
from longattn.training import (
    LabelledSequence,
    LabelledSequences,
    LabelledTokens,
    SentencePairs,
    SequencePair,
    TaggedSequences,
    TextTokenizer,
    TrainingConfig,
    Translations,
)
from longattn.training import train as run_training
from longattn.training.data import held_out_sides
from longattn.training.loop import PRECISIONS
from longattn.training.text_files import outputs, read_json_lines

__all__ = ["fine_tune", "framed", "translated", "word_tokens"]

_FIELDS: dict[str, dict[str, Any]] = {
    "classify": {"text": str, "label": (str, int)},
    "tag": {"tokens": list, "labels": list},
    "translate": {"source": str, "target": str},
    "embed": {"text": str, "other": str},
}
_STYLES = {"classify": "bert", "tag": "bert", "translate": "modern-transformer", "embed": "bert"}
_MODULES = {"classify": ["sklearn"], "tag": ["sklearn"], "translate": ["sacrebleu"]}  # that evaluate a task
_EVALUATED = 64  # examples at once
_TRANSLATED = 200  # examples that are translated to be evaluated
_BEAMS = 4


@click.command(name="fine-tune", context_settings={"show_default": True})
@click.argument("task", type=click.Choice(list(_FIELDS)))
@click.argument("examples", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The checkpoint to write.")
@click.option("--resume", is_flag=True, help="Go on from --out; all else as it was started.")
@click.option(
    "--start",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A checkpoint of `longattn train` to start from: masked, or infilling for translate.",
)
@click.option("--tokenizer", "tokenizer_name", help="bytes, or a file of `longattn tokenizer`; as --start by default.")
@click.option(
    "--held-out", default=0.1, help="Share of the examples kept out of training, to be evaluated on; may be 0."
)
@click.option("--context", default=512, help="Most tokens of a text; longer ones are cut.")
@click.option("--dim", default=128, help="Width of a model without --start.")
@click.option("--layers", default=4, help="Number of its blocks.")
@click.option("--heads", default=4, help="Its heads.")
@click.option("--steps", default=500, help="Training steps.")
@click.option("--batch-size", default=16, help="Examples per step.")
@click.option("--learning-rate", default=5e-4, help="Peak learning rate.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="Of the matrix products.")
@click.option("--save-every", default=200, help="Steps between checkpoints.")
@click.option("--seed", default=0, help="Of the new weights and of the batches.")
def fine_tune(
    task: str,
    examples: Path,
    out: Path,
    resume: bool,
    start: Path | None,
    tokenizer_name: str | None,
    held_out: float,
    context: int,
    dim: int,
    layers: int,
    heads: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    precision: str,
    save_every: int,
    seed: int,
) -> None:
    """Train a model of TASK on EXAMPLES, one JSON object a line, and say how it does on examples held out.

    \b
    classify   {"text": ..., "label": ...}
    tag        {"tokens": [words], "labels": [one a word]}
    translate  {"source": ..., "target": ...}
    embed      {"text": ..., "other": ...}: two texts that belong together
    """
    console = make_console()
    check_out(out, resume)
    if not 0.0 <= held_out < 1.0:
        raise InvalidInput("--held-out", "a number in [0, 1)", held_out)
    if isinstance(context, bool) or context < 1:
        raise InvalidInput("--context", "an int >= 1", context)
    config = TrainingConfig(
        steps=steps,
        learning_rate=learning_rate,
        warmup=min(50, steps // 4),
        weight_decay=0.01,
        precision=precision,
        save_every=save_every,
    )
    if held_out and task in _MODULES:
        check_installed(_MODULES[task], "metrics", f"--held-out of {task}")
    for path in (examples, start):
        if path is not None and path.resolve() in {one.resolve() for one in outputs(out)}:
            raise InvalidInput("--out", "a path other than those that the command reads", out)
    begun = None if start is None else read_card(start)
    if start is not None and begun is None:
        raise InvalidInput("--start", "a checkpoint of `longattn train`, with the .json beside it", start)
    if begun is not None and (tokenizer_name is not None or begun.tokenizer is None):
        raise InvalidInput(
            "--tokenizer", "left out: --start has its own, of an encoder", tokenizer_name or begun.purpose
        )
    tokenizer = open_tokenizer(tokenizer_name or "bytes") if begun is None else begun.tokenizer
    assert tokenizer is not None

    for_training, for_evaluation = _split(read_examples(task, examples), held_out)
    labels = _labels(task, for_training + for_evaluation)
    card = Card(task, tokenizer, labels)
    torch.manual_seed(seed)
    if begun is None or start is None:
        style, sizes = _STYLES[task], {"dim": dim, "layers": layers, "heads": heads, "max_length": context + 2}
        model = card.make(TransformerConfig.style(style, vocab_size=tokenizer.vocab_size, **sizes))
    else:
        model = _continued(card, begun.load(start))
    if model.config.positions == "learned" and context + 2 > model.config.max_length:
        context = model.config.max_length - 2
    make = _batches(task, tokenizer, labels, context, batch_size, seed)
    console.print(f"{len(for_training)} examples, {len(for_evaluation)} held out")
    batches, held_out_batches = make(for_training), make(for_evaluation) if for_evaluation else None
    with claimed(out, resume, console, checkpoint=out, beside=[card_path(out)]):
        check_card(out, card, resume)
        if not resume:
            card.write(out)
        result = run_training(model, batches, config, checkpoint=out, resume=resume)
        console.print(f"{result.step} steps, {result.seconds:.0f} s; saved to {out}", soft_wrap=True)
        if held_out_batches is not None:
            if task == "translate":
                figures = _evaluate_translations(model, tokenizer, for_evaluation[:_TRANSLATED], context)
            else:
                figures = _evaluate(task, model, held_out_batches)
            console.print(f"held out: {figures}")


def read_examples(task: str, path: Path) -> list[dict[str, Any]]:
    """The examples of a file.

    Raises:
        InvalidInput: a line that is no example of the task, named by its number; or none at all.
    """
    fields = _FIELDS[task]
    found = []
    for number, line, example in read_json_lines(path):
        where = f"{path.name}, line {number}"
        if not isinstance(example, dict) or not all(_fits(example.get(key), kind) for key, kind in fields.items()):
            raise InvalidInput(where, f"an object with {', '.join(fields)}, not empty", line[:80])
        if task == "tag" and not all(isinstance(word, str) for word in example["tokens"]):
            raise InvalidInput(where, "tokens that are strings", line[:80])
        if task == "tag" and any(isinstance(label, (list, dict)) for label in example["labels"]):
            raise InvalidInput(where, "labels that are strings or numbers", line[:80])
        if task == "tag" and len(example["tokens"]) != len(example["labels"]):
            got = f"{len(example['labels'])} for {len(example['tokens'])}"
            raise InvalidInput(where, "as many labels as tokens", got)
        found.append(example)
    if not found:
        raise InvalidInput(path.name, "at least one example", "an empty file")
    return found


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a field of an example has a value of its kind that is not empty."""
    return isinstance(value, kind) and not isinstance(value, bool) and value not in ("", [])


def framed(tokenizer: TextTokenizer, text: str, context: int) -> list[int]:
    """[CLS] text [SEP], with at most `context` tokens of the text."""
    return [tokenizer.id_of("[CLS]"), *tokenizer.encode(text)[:context], tokenizer.id_of("[SEP]")]


def word_tokens(tokenizer: TextTokenizer, words: Sequence[str], context: int) -> tuple[list[int], list[int]]:
    """(token ids, the place of each word's first token); words beyond `context` tokens are left out."""
    ids: list[int] = []
    places: list[int] = []
    for word in words:
        pieces = tokenizer.encode(f" {word}" if ids else word) or [tokenizer.id_of("[UNK]")]
        if len(ids) + len(pieces) > context:
            break
        places.append(len(ids))
        ids += pieces
    return ids, places


def translated(model: EncoderDecoder, tokenizer: TextTokenizer, texts: Sequence[str], context: int) -> list[str]:
    """The best translation of each text that a beam search finds, of at most `context` tokens."""
    config = GenerationConfig(max_new_tokens=context, stop_tokens=[tokenizer.id_of("[SEP]")])
    sources = [tokenizer.encode(text)[:context] for text in texts]
    found: list[str] = []
    for first in range(0, len(sources), _EVALUATED):
        some = sources[first : first + _EVALUATED]
        starts = [[tokenizer.id_of("[CLS]")]] * len(some)
        for best in beam_search(model.eval(), starts, config, beams=_BEAMS, sources=some):
            found.append(tokenizer.decode([token for token in best[0].tokens if token not in config.stop_tokens]))
    return found


def _split(examples: list[dict[str, Any]], held_out: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(for training, held out). An example's side depends on what it says alone: its copies are on one side."""
    if not held_out:
        return examples, []
    digests = (hashlib.sha256(json.dumps(example, sort_keys=True).encode()).digest() for example in examples)
    is_held_out = held_out_sides(digests, held_out, "examples", "--held-out")
    pairs = list(zip(examples, is_held_out, strict=True))
    return [example for example, held in pairs if not held], [example for example, held in pairs if held]


def _labels(task: str, examples: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    if task == "classify":
        names = {str(example["label"]) for example in examples}
    elif task == "tag":
        names = {str(label) for example in examples for label in example["labels"]}
    else:
        return ()
    if len(names) < 2:
        raise InvalidInput("EXAMPLES", "at least two labels", sorted(names))
    return tuple(sorted(names))


def _continued(card: Card, begun: Any) -> Any:
    """A model of the task that starts from a pretrained one."""
    translates = card.purpose == "translate"
    if isinstance(begun, EncoderDecoder) != translates or not (translates or hasattr(begun, "encoder")):
        wanted = "an encoder-decoder (infilling)" if translates else "an encoder (masked)"
        raise InvalidInput("--start", f"a checkpoint of {wanted} for {card.purpose}", type(begun).__name__)
    if translates:
        return begun
    model = card.make(begun.config)
    model.encoder.load_state_dict(begun.encoder.state_dict())
    return model


def _batches(
    task: str, tokenizer: TextTokenizer, labels: Sequence[str], context: int, batch_size: int, seed: int
) -> Callable[[Sequence[dict[str, Any]]], Any]:
    """What makes batches of examples."""
    shape = {"batch_size": batch_size, "seed": seed}
    number = {label: index for index, label in enumerate(labels)}

    def frame(text: str) -> list[int]:
        return framed(tokenizer, text, context)

    def make(examples: Sequence[dict[str, Any]]) -> Any:
        if task == "classify":
            return LabelledSequences(
                [LabelledSequence(frame(one["text"]), number[str(one["label"])]) for one in examples], **shape
            )
        if task == "tag":
            return TaggedSequences([tagged(one) for one in examples], **shape)
        if task == "embed":
            return SentencePairs([SequencePair(frame(one["text"]), frame(one["other"])) for one in examples], **shape)
        pairs = [
            SequencePair(tokenizer.encode(one["source"])[:context], tokenizer.encode(one["target"])[:context])
            for one in examples
        ]
        ends = {"start_id": tokenizer.id_of("[CLS]"), "end_id": tokenizer.id_of("[SEP]")}
        return Translations(pairs, **ends, **shape)

    def tagged(example: dict[str, Any]) -> LabelledTokens:
        ids, places = word_tokens(tokenizer, example["tokens"], context)
        wanted = [IGNORED] * len(ids)
        for place, label in zip(places, example["labels"], strict=False):
            wanted[place] = number[str(label)]
        return LabelledTokens(ids, wanted)

    return make


@torch.no_grad()
def _evaluate(task: str, model: Any, batches: Any) -> str:
    """The task's own figures over all examples."""
    dtype = matmul_dtype("cpu")
    parts = [
        batches.collate(batches.examples[first : first + _EVALUATED])
        for first in range(0, len(batches.examples), _EVALUATED)
    ]
    with autocast("cpu", dtype):
        if task == "embed":
            first = torch.cat([model(part["tokens"], key_mask=part["key_mask"]) for part in parts])
            second = torch.cat([model(part["others"], key_mask=part["others_mask"]) for part in parts])
            return f"{retrieval_accuracy(first, second):.1%} find their other among {len(first)}"
        found = [_flat(part["labels"], model(part["tokens"], key_mask=part["key_mask"]).argmax(-1)) for part in parts]
    labels, predictions = (torch.cat(side) for side in zip(*found, strict=True))
    return f"accuracy {accuracy(labels, predictions):.1%}, macro F1 {f1(labels, predictions):.3f}"


def _evaluate_translations(
    model: EncoderDecoder, tokenizer: TextTokenizer, examples: Sequence[dict[str, Any]], context: int
) -> str:
    found = translated(model, tokenizer, [one["source"] for one in examples], context)
    wanted = [one["target"] for one in examples]
    exact = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
    return f"BLEU {bleu(found, wanted):.1f}, {exact:.1%} of {len(wanted)} exact"


def _flat(labels: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    return labels.flatten(), predictions.flatten()
