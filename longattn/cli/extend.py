"""`longattn extend`: a model that reads further, after a fine-tune if asked for, written as it came."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longattn.cli.card import card_path, check_card, tokenizer_json
from longattn.cli.device import Device
from longattn.cli.eval import read_text
from longattn.cli.language_model import LanguageModel, load_language_model, trained_length
from longattn.cli.methods import chosen_methods, extended_by, method_options
from longattn.cli.output import make_console
from longattn.cli.train import open_tokens
from longattn.cli.writing import check_installed, claimed
from longattn.errors import InvalidInput
from longattn.evaluation import make_reader, search_longrope
from longattn.extension import Method
from longattn.files import new_folder, write_text
from longattn.integrations import huggingface
from longattn.models import Decoder
from longattn.rope import Rope
from longattn.scaling import LongRoPE, Scaling
from longattn.training import (
    Batches,
    Checkpoint,
    Lora,
    PackedDocuments,
    SkippedPositions,
    TrainingConfig,
    save_checkpoint,
)
from longattn.training import train as run_training
from longattn.training.loop import PRECISIONS
from longattn.training.text_files import TextFiles, check_same_texts, find_texts, outputs
from longattn.training.text_files import read_text as read_file

__all__ = ["extend"]

_SAMPLED = 256  # numbers of each weight that identify a model


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A file for a checkpoint, else a folder.")
@click.option("--gguf", help="The file in the folder, where there are several.")
@click.option(
    "--search", type=click.Path(exists=True, path_type=Path), help="Of longrope: a text to search the divisors on."
)
@click.option("--search-population", default=16, help="Candidates of a generation of the search.")
@click.option("--search-generations", default=8, help="Generations of the search, after the first.")
@click.option("--text", "texts", type=click.Path(exists=True, path_type=Path), multiple=True, help="To fine-tune on.")
@click.option("--files", "name_pattern", default="*", help="Which names to take below folders, such as '*.txt'.")
@click.option("--steps", default=200, help="Of the fine-tune.")
@click.option("--context", type=int, help="Tokens that a document has at most; by default factor x trained length.")
@click.option("--tokens", type=int, help="Of a step, in packed documents; --context by default.")
@click.option("--pose", is_flag=True, help="Train windows of the trained length whose positions skip up to --context.")
@click.option("--batch-size", default=1, help="Windows of a step, with --pose.")
@click.option("--learning-rate", default=1e-4, help="Peak learning rate.")
@click.option("--warmup", default=20, help="Steps in which it rises.")
@click.option("--lora", type=int, help="Train adapters of this rank in place of all weights (needs peft).")
@click.option("--lora-embeddings", is_flag=True, help="And the token embeddings and norms, as LongLoRA does.")
@click.option("--recompute", type=int, default=0, help="Keep the input of every n-th block only; 0: keep everything.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", help="Of the matrix products.")
@click.option("--save-every", default=50, help="Steps between checkpoints of the fine-tune.")
@click.option("--resume", is_flag=True, help="Go on with a fine-tune that was interrupted; all else as it was started.")
@click.option("--device", type=Device(), default="cpu", help="Where to train.")
@click.option("--seed", default=0, help="Of the batches and the search.")
@method_options
def extend(
    model: Path,
    out: Path,
    gguf: str | None,
    search: Path | None,
    search_population: int,
    search_generations: int,
    texts: tuple[Path, ...],
    name_pattern: str,
    steps: int,
    context: int | None,
    tokens: int | None,
    pose: bool,
    batch_size: int,
    learning_rate: float,
    warmup: int,
    lora: int | None,
    lora_embeddings: bool,
    recompute: int,
    precision: str,
    save_every: int,
    resume: bool,
    device: str,
    seed: int,
    **options: Any,
) -> None:
    """Make MODEL read further by one or more --method, fine-tune it on --text if there is one, and write it to --out.

    MODEL is a checkpoint of `longattn train`, a folder of a Hugging Face model with its tokenizer, or a folder with a
    GGUF file. What is written is of the same kind; of a GGUF file, a folder of a Hugging Face model.
    """
    console = make_console()
    if out.exists() or out.is_symlink():
        raise InvalidInput("--out", "a new file or folder", out)
    if not options["methods"]:
        raise InvalidInput("--method", "at least one", "none")
    if resume and not texts:
        raise InvalidInput("--resume", "a fine-tune, by --text", "none")
    config = TrainingConfig(
        steps=steps,
        learning_rate=learning_rate,
        warmup=warmup,
        precision=precision,
        save_every=save_every,
        recompute=recompute,
    )
    adapters = None
    if lora is not None:
        check_installed(["peft"], "lora", "--lora")
        adapters = Lora(rank=lora, alpha=2 * lora, embeddings=lora_embeddings)
    found = find_texts(texts, name_pattern, out=out, argument="--text") if texts else None
    if found is not None and (warning := found.warning()) is not None:
        make_console(error=True).print(f"Warning: {warning}", soft_wrap=True)
    loaded = load_language_model(model, gguf=gguf, device=device, keep=True)
    before: Any = loaded.model
    if search is not None:
        options["methods"], searched = _searched(options, search, loaded, search_population, search_generations, seed)
    else:
        searched = []
    methods = [*searched, *chosen_methods(before, **options)]
    extended: Any = extended_by(before, methods, make_console(error=True))
    theirs: Any = None
    if loaded.tokenizer is not None:
        theirs = extended_by(loaded.theirs, methods) if isinstance(extended, Decoder) else extended
        _check_saves(theirs, loaded.tokenizer)

    _, card, tokens_file, ends, training, proof = outputs(out)
    checkpoint = out if found is None else training
    with claimed(out, resume, console, checkpoint=checkpoint, beside=[card, tokens_file, ends, proof]):
        if out.exists():  # another command wrote it since
            raise InvalidInput("--out", "a new file or folder", out)
        if loaded.card is not None:
            check_card(out, loaded.card, resume=False)
        elif loaded.tokenizer is None and card.exists():
            raise InvalidInput("--out", f"no other file at {card}", "one")
        if found is not None:
            if not isinstance(extended, Decoder):
                got = type(before).__name__
                raise InvalidInput("--text", "none for a model that longattn.models cannot say", got)
            trained = trained_length(before) if options["trained"] is None else options["trained"]
            reach = context or int((options["factor"] or 1.0) * trained)
            origin = _origin(loaded, found)
            _check_origin(proof, origin, resume)
            with ExitStack() as opened:
                file = open_tokens(
                    opened,
                    tokens_file,
                    map(read_file, found.files),
                    lambda text: [*loaded.prefix, *loaded.encode(text)],
                    extended.config.vocab_size,
                    hashlib.sha256(json.dumps([list(origin["texts"].values()), origin["tokenizer"]]).encode()).digest(),
                    resume,
                )
                batches: Batches = PackedDocuments(file, tokens=tokens or reach, longest=reach, seed=seed)
                if pose:
                    batches = SkippedPositions(file, batch_size=batch_size, length=trained, target=reach, seed=seed)
                if not resume:
                    write_text(proof, json.dumps(origin))
                _fine_tune(extended, batches, config, adapters, training, resume, seed, console)
        _write(out, loaded, extended, theirs, trained=found is not None)
        console.print(f"{', '.join(str(method) for method in methods)}; saved to {out}", soft_wrap=True)
        if found is not None:
            for left in (training, tokens_file, ends, proof):
                left.unlink(missing_ok=True)


def _searched(
    options: dict[str, Any], path: Path, loaded: LanguageModel, population: int, generations: int, seed: int
) -> tuple[tuple[str, ...], list[Scaling | Method]]:
    """The other methods by name, and the LongRoPE that a search found, by losses past the trained length."""
    if "longrope" not in options["methods"] or options["longrope"] is not None:
        raise InvalidInput("--search", "--method longrope without --longrope", path)
    factor = options["factor"]
    if factor is None or not factor > 1:
        raise InvalidInput("--factor", "a number above 1, to search for", factor)
    trained = trained_length(loaded.model) if options["trained"] is None else options["trained"]
    length = int(factor * trained)
    text = read_text([path], loaded, length + 1, argument="--search")
    if len(text) < length + 1:
        raise InvalidInput("--search", f"a text of at least {length + 1:,} tokens", f"{len(text):,} tokens in {path}")
    model: Any = loaded.model
    if isinstance(model, Decoder):
        if model.config.rope is None:
            raise InvalidInput("MODEL", "one with rotary positions", f"positions {model.config.positions!r}")
        rope = replace(model.config.rope, scaling=None)
    else:
        rope = replace(Rope.from_hf(model.config.get_text_config()), scaling=None)
    columns = (TextColumn("searching"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeElapsedColumn(), console=make_console(error=True)) as progress:
        bar = progress.add_task("searching", total=population * (generations + 1), loss=float("nan"))

        def loss(candidate: LongRoPE) -> float:
            return make_reader(extended_by(model, [candidate])).losses(text[: length + 1]).double().mean().item()

        found = search_longrope(
            loss,
            rope,
            factor,
            trained,
            population=population,
            parents=max(2, population // 3),
            generations=generations,
            seed=seed,
            show=lambda done, most, best: progress.update(bar, completed=done, total=most, loss=best),
        )
    return tuple(name for name in options["methods"] if name != "longrope"), [found]


def _origin(loaded: LanguageModel, texts: TextFiles) -> dict[str, Any]:
    """What a fine-tune starts from, in plain values: its texts, its tokenizer, and its weights by a sample of each."""
    if loaded.tokenizer is None:
        tokenizer = tokenizer_json(None if loaded.card is None else loaded.card.tokenizer)
    else:
        backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
        tokenizer = sorted(loaded.tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    weights = hashlib.sha256()
    for name, weight in loaded.model.named_parameters():
        sample = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)].float().cpu()
        weights.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return {
        "texts": texts.fingerprints(),
        "tokenizer": hashlib.sha256(json.dumps([tokenizer, loaded.prefix]).encode()).hexdigest(),
        "model": weights.hexdigest(),
    }


def _check_origin(proof: Path, origin: dict[str, Any], resume: bool) -> None:
    """Compare what a fine-tune starts from with what the one to resume started from.

    Raises:
        InvalidInput: other texts, another tokenizer or model; the file is damaged or another one.
    """
    if not proof.exists():  # version 0.1.0 wrote none
        return
    try:
        before = json.loads(proof.read_text(encoding="utf-8"))
        texts = dict(before["texts"])
        kinds = {type(value) for value in (*texts.values(), before["tokenizer"], before["model"])}
        if kinds != {str}:
            raise TypeError(f"values of {', '.join(sorted(kind.__name__ for kind in kinds))}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput("--out", f"no other or damaged file at {proof}", error) from error
    if not resume:
        return
    check_same_texts("--resume", texts, origin["texts"])
    for name, what in (("tokenizer", "tokenizer"), ("model", "weights")):
        if before[name] != origin[name]:
            raise InvalidInput("--resume: MODEL", f"the {what} that it was started with", "others")


def _fine_tune(
    model: Decoder,
    batches: Batches,
    config: TrainingConfig,
    adapters: Lora | None,
    checkpoint: Path,
    resume: bool,
    seed: int,
    console: Console,
) -> None:
    """Train in place; what an interrupt leaves is in `checkpoint`."""
    torch.manual_seed(seed)
    merge = None if adapters is None else adapters.attach(model)
    counted = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    console.print(f"{counted:,} weights train")
    result = run_training(model, batches, config, checkpoint=checkpoint, resume=resume, description="fine-tuning")
    if merge is not None:
        merge()
    if result.losses:
        took = f"{result.step} steps, {result.tokens:,} tokens, {result.seconds:.0f} s"
        console.print(f"{took}; loss {result.losses[-1]:.4f}")


def _check_saves(theirs: Any, tokenizer: Any) -> None:
    """Raise InvalidInput if transformers would not save a model or its tokenizer, before any work on the model."""
    with TemporaryDirectory() as folder, huggingface.readable("MODEL", "a model that transformers saves", "MODEL"):
        theirs.config.save_pretrained(folder)
        if theirs.generation_config is not None:
            theirs.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write(out: Path, loaded: LanguageModel, extended: Any, theirs: Any, *, trained: bool) -> None:
    """The model as it came: a checkpoint with its card, or a folder of a Hugging Face model with its tokenizer."""
    if loaded.tokenizer is None:
        if loaded.card is not None:
            replace(loaded.card, texts=None).write(out)
        try:
            save_checkpoint(out, Checkpoint(extended.config, extended.state_dict()))
        except BaseException:
            card_path(out).unlink(missing_ok=True)
            raise
        return
    if trained:
        assert isinstance(extended, Decoder)
        huggingface.load_into(theirs, extended.cpu())
    with new_folder(out) as folder:
        theirs.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
