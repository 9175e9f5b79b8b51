"""One safetensors file that holds a training: weights, optimiser state, random state, and the configs as JSON.

Tensors are named `model.<weight>`, `optimizer.<weight>.<state>` and `rng`; the rest is JSON in the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from longattn.errors import InvalidInput
from longattn.models import TransformerConfig, build

__all__ = ["Checkpoint", "load_checkpoint", "load_model", "save_checkpoint"]

_HEADER = "longattn"
_FORMAT = 1


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
    """Write the file whole or not at all: whoever interrupts it finds the old one."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={_HEADER: json.dumps(header)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU.

    Raises:
        InvalidInput: there is no such file, or it is truncated, or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise InvalidInput("checkpoint", "a file that exists", path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise InvalidInput("checkpoint", "a complete safetensors file", f"{path}: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise InvalidInput("checkpoint", f"a file saved by longattn (format {_FORMAT})", path)
    return Checkpoint(
        config=TransformerConfig.from_dict(header["config"]),
        model=_below("model.", tensors),
        optimizer=_below("optimizer.", tensors),
        rng=tensors.get("rng"),
        progress=header["progress"],
        settings=header["settings"],
    )


def load_model(path: Path, make: Callable[[TransformerConfig], nn.Module] = build) -> Any:
    """The model of a checkpoint, on the CPU and in eval mode.

    Args:
        make: what makes the model of the checkpoint's config; by default the one of its architecture. A model with a
            head is made by, say, lambda config: SequenceClassifier(config, classes=3).

    Raises:
        InvalidInput: as `load_checkpoint`; also weights that are not those of the model.
    """
    checkpoint = load_checkpoint(path)
    model = make(checkpoint.config)
    load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model.

    Raises:
        InvalidInput: missing or unexpected weights, or weights of another shape.
    """
    ours, theirs = model.state_dict(), checkpoint.model
    problems = [f"missing {name}" for name in ours.keys() - theirs.keys()]
    problems += [f"unexpected {name}" for name in theirs.keys() - ours.keys()]
    problems += [
        f"{name} of shape {tuple(theirs[name].shape)} for {tuple(ours[name].shape)}"
        for name in ours.keys() & theirs.keys()
        if ours[name].shape != theirs[name].shape
    ]
    if problems:
        raise InvalidInput("checkpoint", "the weights of the model", "; ".join(sorted(problems)))
    model.load_state_dict(theirs)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
