"""One safetensors file that holds a training: weights, optimiser state, random state, and the configs as JSON.

Tensors are named `model.<weight>`, `optimizer.<weight>.<state>` and `rng`; the rest is JSON in the header. A file is
untrusted input: what it holds is compared with the model that it is for before any of it is used.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longattn.errors import InvalidInput
from longattn.files import replaced
from longattn.models import TransformerConfig, build

__all__ = ["Checkpoint", "load_checkpoint", "load_model", "save_checkpoint", "saved_steps"]

_HEADER = "longattn"
_FORMAT = 1
_PREFIXES = ("model.", "optimizer.")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Sizes of a config that are dimensions of some weight, or numbers of them.
_SIZES = ("vocab_size", "dim", "layers", "heads", "kv_heads", "head_dim", "hidden", "encoder_layers", "token_types")
_SMALL = 1 << 16


@dataclass(frozen=True)
class Checkpoint:
    """A training between two steps.

    model, optimizer, rng: tensors by name. config: the model's.
    progress: steps done and so on; settings: what the training was started with. Both plain Python values.
    """

    config: TransformerConfig
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    rng: Tensor | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file whole or not at all: whoever interrupts it finds the old one.

    Raises:
        OSError: the file cannot be written, for example on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in checkpoint.optimizer.items()}
    if checkpoint.rng is not None:
        tensors["rng"] = checkpoint.rng
    header = {
        "format": _FORMAT,
        "config": checkpoint.config.to_dict(),
        "progress": checkpoint.progress,
        "settings": checkpoint.settings,
    }
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {_HEADER: json.dumps(header)}
    with replaced(path) as temporary:
        try:
            with _in_utf8(temporary.parent) as folder:
                made = folder / (temporary.name if _is_utf8(temporary.name) else f".safetensors.{os.getpid()}.tmp")
                save_file(contiguous, made, metadata=metadata)
                os.replace(made, temporary)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU.

    Raises:
        InvalidInput: there is no such file, or it is truncated, damaged, or not one of ours.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise InvalidInput("checkpoint", "a file that exists", path)
    try:
        with _in_utf8(path) as name, safe_open(name, framework="pt") as file:
            header = _header(path, file.metadata())
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            config = _config(path, header, sum(map(math.prod, shapes.values())))
            tensors = {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise InvalidInput("checkpoint", "a complete safetensors file", f"{path}: {error}") from error
    unknown = sorted(name for name in tensors if name != "rng" and not name.startswith(_PREFIXES))
    if unknown:
        raise InvalidInput("checkpoint", "tensors named model.*, optimizer.* and rng", f"{path}: {', '.join(unknown)}")
    return Checkpoint(
        config=config,
        model=_below("model.", tensors),
        optimizer=_below("optimizer.", tensors),
        rng=tensors.get("rng"),
        progress=header["progress"],
        settings=header["settings"],
    )


def saved_steps(path: Path) -> int | None:
    """Return how many steps of training the checkpoint at `path` holds; None if there is no complete checkpoint."""
    from safetensors import SafetensorError, safe_open

    try:
        with _in_utf8(path) as name, safe_open(name, framework="pt") as file:
            step = _header(path, file.metadata())["progress"].get("step")
    except (InvalidInput, OSError, SafetensorError):
        return None
    return step if isinstance(step, int) else None


def _is_utf8(name: object) -> bool:
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _in_utf8(path: Path) -> Iterator[Path]:
    """Yield a name of a file or folder that is UTF-8, which safetensors asks for: its own, or that of a link to it."""
    if _is_utf8(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "link")
        link.symlink_to(path.absolute())
        yield link


def load_model(path: Path, make: Callable[[TransformerConfig], nn.Module] = build) -> Any:
    """Load the model of a checkpoint to the CPU, in eval mode. Its weights have the dtypes that were saved.

    Args:
        path: the checkpoint.
        make: makes the model of the checkpoint's config; by default the one of its architecture. A model with a
            head is made by, say, lambda config: SequenceClassifier(config, classes=3).

    Raises:
        InvalidInput: as `load_checkpoint`; also weights that are not those of the model, or are not finite.
    """
    checkpoint = load_checkpoint(path)
    weights, least = sum(tensor.numel() for tensor in checkpoint.model.values()), _least_weights(checkpoint.config)
    if weights < least:
        expected = f"at least {least:,} weights, for its config"
        raise InvalidInput("checkpoint", expected, f"{path} with {weights:,}")
    model = make(checkpoint.config)
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        saved = checkpoint.model.get(name)
        if saved is not None and saved.is_floating_point() and weight.is_floating_point():
            weight.data = weight.data.to(saved.dtype)
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model.

    Raises:
        InvalidInput: missing or unexpected weights, weights of another shape or dtype, or weights that are not finite.
            The model is as it was.
    """
    check_weights(model, checkpoint)
    model.load_state_dict(checkpoint.model)


def check_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InvalidInput unless the checkpoint's weights are those of the model, and finite."""
    ours, theirs = model.state_dict(), checkpoint.model
    problems = [f"missing {name}" for name in ours.keys() - theirs.keys()]
    problems += [f"unexpected {name}" for name in theirs.keys() - ours.keys()]
    problems += [
        problem for name in ours.keys() & theirs.keys() if (problem := _misfit(name, theirs[name], ours[name]))
    ]
    if not problems:
        trained = dict(model.named_parameters(remove_duplicate=False))
        problems = [f"{name} is not finite" for name in not_finite((name, theirs[name]) for name in trained)]
    if problems:
        raise InvalidInput("checkpoint", "the weights of the model", "; ".join(sorted(problems)))


def check_optimizer(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> None:
    """Raise InvalidInput unless the checkpoint holds the state that AdamW has of these weights after some steps."""

    def refuse(problem: str) -> None:
        raise InvalidInput("checkpoint", "the optimiser's state of every weight that is trained", problem)

    theirs = checkpoint.optimizer
    names = {f"{name}.{key}" for name in weights for key in ("step", *_MOMENTS)}
    for name in sorted(names - theirs.keys()):
        refuse(f"none of {name}")
    for name in sorted(theirs.keys() - names):
        refuse(f"{name} as well")
    for name, weight in weights.items():
        step = theirs[f"{name}.step"]
        if step.shape != () or step.dtype != torch.float32 or not step.isfinite() or step < 0 or step != step.round():
            refuse(f"{name}.step that is not a whole number: {step.dtype} of shape {tuple(step.shape)}")
        for key in _MOMENTS:
            problem = _misfit(f"{name}.{key}", theirs[f"{name}.{key}"], weight)
            if problem:
                refuse(problem)
    for name in not_finite(theirs.items()):
        refuse(f"{name} is not finite")
    for name in weights:
        if (theirs[f"{name}.exp_avg_sq"] < 0).any():
            refuse(f"{name}.exp_avg_sq is negative")


def check_progress(checkpoint: Checkpoint) -> tuple[int, float]:
    """Return (steps done, seconds used).

    Raises:
        InvalidInput: they are missing, or out of range.
    """
    step, elapsed = checkpoint.progress.get("step"), checkpoint.progress.get("elapsed")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
        raise InvalidInput("checkpoint's step", "an int >= 0", repr(step))
    if isinstance(elapsed, bool) or not isinstance(elapsed, (int, float)) or not 0.0 <= elapsed < math.inf:
        raise InvalidInput("checkpoint's elapsed", "a number of seconds >= 0", repr(elapsed))
    return step, float(elapsed)


def check_rng(checkpoint: Checkpoint) -> Tensor:
    """Return the state of the random generator.

    Raises:
        InvalidInput: it is missing, or not a state of PyTorch's generator.
    """
    state, expected = checkpoint.rng, "a state of PyTorch's generator on the CPU"
    if state is None:
        raise InvalidInput("checkpoint's rng", expected, "none")
    if state.dtype != torch.uint8 or state.dim() != 1:
        raise InvalidInput("checkpoint's rng", expected, f"{state.dtype} of shape {tuple(state.shape)}")
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise InvalidInput("checkpoint's rng", expected, str(error)) from error
    return state


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors that hold an infinity or a NaN."""
    return [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]


def _misfit(name: str, theirs: Tensor, ours: Tensor) -> str | None:
    if theirs.shape != ours.shape:
        return f"{name} of shape {tuple(theirs.shape)} for {tuple(ours.shape)}"
    return None if theirs.dtype == ours.dtype else f"{name} of {theirs.dtype} for {ours.dtype}"


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Read the JSON of the header; the types of its entries are those that `save_checkpoint` wrote."""
    expected = f"a file saved by longattn (format {_FORMAT})"
    try:
        header = json.loads((metadata or {}).get(_HEADER, "null"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput("checkpoint", expected, f"{path}: damaged metadata ({error})") from error
    number = header.get("format") if isinstance(header, dict) else None
    if type(number) is not int or number != _FORMAT:
        raise InvalidInput("checkpoint", expected, path)
    for name in ("config", "progress", "settings"):
        if not isinstance(header.get(name), dict):
            raise InvalidInput("checkpoint", f"{expected} with its {name}", path)
    return header


def _config(path: Path, header: dict[str, Any], elements: int) -> TransformerConfig:
    """Read the config of a file that holds so many numbers."""
    values = header["config"]
    for name, value in values.items():
        if name in _SIZES and isinstance(value, int) and value > max(elements, _SMALL):
            raise InvalidInput(f"checkpoint's {name}", f"a size of weights in the file ({elements:,} numbers)", value)
        if isinstance(value, int) and abs(value) >= 2**53:
            raise InvalidInput(f"checkpoint's {name}", "a number below 2^53", f"one of {value.bit_length()} bits")
    try:
        return TransformerConfig.from_dict(values)
    except InvalidInput:
        raise
    except Exception as error:  # whatever wrong types and numbers in the file lead to
        expected = "a config of longattn.models"
        raise InvalidInput("checkpoint", expected, f"{path}: {type(error).__name__}: {error}") from error


def _least_weights(config: TransformerConfig) -> int:
    """Return a number of weights that every model of a config has: no file makes us build a model larger than it."""
    attention = 2 * config.dim * (config.heads + config.kv_heads) * config.head_dim
    blocks = (config.layers + (config.encoder_layers or 0)) * (attention + 2 * config.dim * config.hidden)
    learned = config.max_length if config.positions == "learned" else 0
    return blocks + (config.vocab_size + learned) * config.dim


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
