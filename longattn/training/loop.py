"""The training loop: AdamW, warm-up and cosine decay, clipped gradients, checkpoints, a progress bar."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longattn.errors import InvalidInput
from longattn.models import TransformerConfig, autocast, matmul_dtype
from longattn.models.stack import Stack
from longattn.scaling import finite_number
from longattn.training.checkpoint import (
    Checkpoint,
    check_optimizer,
    check_progress,
    check_rng,
    check_weights,
    load_checkpoint,
    not_finite,
    save_checkpoint,
)
from longattn.training.context_parallel import is_sharded, load_sharded, on_any_rank, save_sharded

__all__ = ["Batches", "Loss", "Trainable", "TrainingConfig", "TrainingResult", "train"]

PRECISIONS = ("auto", "float32", "bfloat16")


class Batches(Protocol):
    """Where a training's tokens come from."""

    def batch(self, step: int) -> Tensor | Mapping[str, Tensor]:
        """The batch of a step, the same whenever it is asked: the arguments of the model's `loss` by name.

        For causal language modelling it may be the tokens alone, int64 [B, N + 1].
        """

    def describe(self) -> dict[str, Any]:
        """What decides the batches, in plain Python values: a resumed training must have the same."""


class Trainable(Protocol):
    """What a training needs of a model, a torch.nn.Module: its config, and the loss of a batch."""

    config: TransformerConfig

    def loss(self, *arguments: Any, **inputs: Any) -> Tensor:
        """A scalar; the arguments are the entries of a batch."""


class Loss(Protocol):
    """What is minimised in place of the model's own loss, such as `longattn.models.Distillation`."""

    def __call__(self, *arguments: Any, **inputs: Any) -> Tensor:
        """A scalar; the arguments are the entries of a batch."""

    def describe(self) -> dict[str, Any]:
        """What decides the loss, in plain Python values: a resumed training must have the same."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train.

    Args:
        steps: how many; with `seconds`, at least as many.
        seconds: go on for at least this much wall-clock time. The learning rate then falls with the clock, so two such
            trainings differ; with 0 a training is the same every time.
        learning_rate: the peak.
        final_learning_rate: where the cosine ends, as a share of the peak.
        warmup: steps of linear rise.
        weight_decay: of the matrices; vectors (norms) have none.
        beta1, beta2: of AdamW.
        max_grad_norm: gradients are scaled down to this norm.
        precision: "bfloat16" runs the products of matrices in it (autocast; weights stay float32), "float32" does
            not, "auto" does where the hardware gains from it.
        recompute: keep the input of each block only (True), or of every so many-th, and compute blocks again in the
            backward: a third more work, in memory that hardly grows with the layers. The losses are the same.
        offload: keep those inputs in the host's memory until the backward; of no effect on the CPU.
        feed_forward_tile: tokens that go through a feed-forward layer at once, which computes them again in the
            backward; None: all. The losses are the same.
        save_every: steps between checkpoints; 0 saves at the end only.

    Raises:
        InvalidInput: a value out of range.
    """

    steps: int
    seconds: float = 0.0
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: str = "auto"
    recompute: bool | int = False
    offload: bool = False
    feed_forward_tile: int | None = None
    save_every: int = 200

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("save_every", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInput(name, f"an int >= {least}", repr(value))
        for name, low, high in (
            ("seconds", 0.0, math.inf),
            ("learning_rate", 0.0, math.inf),
            ("final_learning_rate", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
            ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0),
            ("max_grad_norm", 0.0, math.inf),
        ):
            finite_number(name, getattr(self, name), at_least=low, at_most=high)
        if self.precision not in PRECISIONS:
            raise InvalidInput("precision", f"one of {', '.join(PRECISIONS)}", repr(self.precision))
        if not isinstance(self.recompute, int) or self.recompute < 0:
            raise InvalidInput("recompute", "a bool, or an int >= 0", repr(self.recompute))
        if not isinstance(self.offload, bool) or (self.offload and not self.recompute):
            raise InvalidInput("offload", "a bool, False without recompute", repr(self.offload))
        tile = self.feed_forward_tile
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise InvalidInput("feed_forward_tile", "None or an int >= 1", repr(tile))

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the training that is done after `step` steps and `elapsed` seconds; 1: all."""
        done = step / self.steps
        return min(done, elapsed / self.seconds) if self.seconds else done

    def learning_rate_at(self, step: int, progress: float) -> float:
        """Linear warm-up, then half a cosine (Loshchilov and Hutter, SGDR, arXiv 1608.03983)."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * rise * (self.final_learning_rate + (1.0 - self.final_learning_rate) * fall)

    def dtype(self, device: torch.device) -> torch.dtype:
        """What the products of matrices run in."""
        return matmul_dtype(device) if self.precision == "auto" else getattr(torch, self.precision)


@dataclass(frozen=True)
class TrainingResult:
    """What a call of `train` did.

    losses: of each step, in nats per token. step: how many are done, those before a resume included.
    tokens, seconds: of this call.
    """

    losses: list[float]
    step: int
    tokens: int
    seconds: float


def train(
    model: Any,
    batches: Batches,
    config: TrainingConfig,
    *,
    loss: Loss | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    description: str = "training",
    show_progress: bool = True,
) -> TrainingResult:
    """Train a model on its own loss: a decoder to predict each next token, others as their `loss` says.

    Ctrl-C ends the step at hand, saves, and raises KeyboardInterrupt; a second one does not wait. An error in a step
    saves the steps before it, and is raised. What is saved replaces the older checkpoint whole or not at all.

    Args:
        model: a module that is `Trainable`; trained in place, on its device.
        batches: the data, the arguments of its `loss`.
        config: how.
        loss: of a batch, in place of the model's own.
        checkpoint: where to save, every `save_every` steps, when interrupted, and at the end. A file; of a model whose
            weights ranks share, a folder, which any number of ranks can load (torch.distributed.checkpoint).
        resume: continue from the checkpoint, which must be of this model, data and config. The losses are those that an
            uninterrupted training would have had.
        description: shown next to the progress bar; show_progress: whether there is one.

    Raises:
        InvalidInput: a checkpoint that is missing, damaged, or of another training, or whose folder cannot be written.
            Model and file are as they were.
        FloatingPointError: the loss, the gradient or the weights are not finite.
        OSError: the checkpoint cannot be written, for example on a full disk.
    """
    if resume and checkpoint is None:
        raise InvalidInput("checkpoint", "a path to resume from", None)
    device = next(model.parameters()).device
    dtype = config.dtype(device)
    settings = {"training": asdict(config), "data": batches.describe(), "dtype": str(dtype).removeprefix("torch.")}
    if loss is not None:
        settings["loss"] = loss.describe()
    with _interrupt_between_steps() as interrupted:
        run = _Run(model, config, settings, None if checkpoint is None else Path(checkpoint), resume)
        _save_memory(model, config)
        model.train()
        run.start = start = time.perf_counter()
        losses: list[float] = []
        tokens = 0
        with _progress_bar(description, show_progress) as show:
            while (progress := config.progress(run.step, run.elapsed())) < 1.0:
                rng = torch.get_rng_state()
                try:
                    inputs = {name: x.to(device) for name, x in _inputs(batches.batch(run.step)).items()}
                    with autocast(device, dtype):
                        value = (loss or model.loss)(**inputs)
                    losses.append(run.backward(value))
                except Exception as error:
                    run.save_after(error, rng)
                    raise
                run.update(progress)
                tokens += inputs["tokens"].numel()
                seconds = time.perf_counter() - start
                show(config.progress(run.step, run.elapsed()), run.step, losses[-1], tokens / seconds)
                if on_any_rank(interrupted(), device) if run.sharded else interrupted():
                    run.save()
                    raise KeyboardInterrupt
                if config.save_every and run.step % config.save_every == 0:
                    run.save()
        run.save()
        if not run.sharded and interrupted():  # while the last steps were saved
            raise KeyboardInterrupt
    model.eval()
    return TrainingResult(losses, run.step, tokens, time.perf_counter() - start)


class _Run:
    """A training between two steps: model, optimiser, and how much of it is on disk.

    Attributes:
        step: how many are done. saved: how many of them the checkpoint holds.
        start: when this call began to train.
    """

    def __init__(
        self, model: Any, config: TrainingConfig, settings: dict[str, Any], checkpoint: Path | None, resume: bool
    ) -> None:
        self.model, self.config, self.settings, self.checkpoint = model, config, settings, checkpoint
        self.sharded = is_sharded(model)
        if self.sharded and config.seconds:
            raise InvalidInput("seconds", "0 where ranks train together, as their clocks differ", config.seconds)
        if checkpoint is not None:
            _check_writable(checkpoint, folder=self.sharded)
        self.optimizer = _optimizer(model, config)
        self.step, self._before = 0, 0.0
        if resume and checkpoint is not None:
            if self.sharded:
                self.step = load_sharded(checkpoint, model, self.optimizer, settings)
            else:
                self.step, self._before = _restore(load_checkpoint(checkpoint), model, self.optimizer, settings)
        self.saved = self.step
        self.start = time.perf_counter()

    def elapsed(self) -> float:
        """Return the seconds of training, those before a resume included."""
        return self._before + time.perf_counter() - self.start

    def backward(self, value: Tensor) -> float:
        """Compute and clip the gradients of a loss, and return it as a number.

        Raises:
            FloatingPointError: the loss or the gradient is not finite.
        """
        self.optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # ranks that share weights have a DTensor
        for what, found in (("loss", loss := value.item()), ("gradient's norm", norm.item())):
            if not math.isfinite(found):
                raise FloatingPointError(f"the {what} of step {self.step} is {found}: lower the learning rate")
        return loss

    def update(self, progress: float) -> None:
        """Let the optimiser take the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step, progress)
        self.optimizer.step()
        self.step += 1

    def save(self, rng: Tensor | None = None) -> None:
        """Write the checkpoint, unless it holds all steps.

        Args:
            rng: the state of the generator to save; that at hand by default.

        Raises:
            FloatingPointError: the weights are not finite. OSError: it cannot be written. The older one stays.
        """
        if self.checkpoint is None or self.step == self.saved:
            return
        if self.sharded:
            save_sharded(self.checkpoint, self.model, self.optimizer, self.settings, self.step)
        else:
            broken = not_finite(self.model.named_parameters())
            if broken:
                raise FloatingPointError(f"the weights after step {self.step} are not finite ({broken[0]}): not saved")
            state = {
                f"{name}.{key}": value
                for name, weight in self.model.named_parameters()
                for key, value in self.optimizer.state[weight].items()
            }
            progress = {"step": self.step, "elapsed": self.elapsed()}
            rng = torch.get_rng_state() if rng is None else rng
            weights = self.model.state_dict()
            made = Checkpoint(self.model.config, weights, state, rng, progress, self.settings)
            save_checkpoint(self.checkpoint, made)
        self.saved = self.step

    def save_after(self, error: Exception, rng: Tensor) -> None:
        """Save the steps before one that failed and began with this state of the generator.

        Ranks save together, and one that failed takes no part: sharded trainings save nothing.
        """
        try:
            if not self.sharded:
                self.save(rng)
        except (OSError, FloatingPointError) as failed:
            error.add_note(f"The {self.step - self.saved} steps since the last save are lost: {failed}")


def _check_writable(path: Path, *, folder: bool) -> None:
    """Raise InvalidInput unless a checkpoint can be written there, as far as can be seen without writing."""
    if path.exists() and path.is_dir() != folder:
        raise InvalidInput("checkpoint", "a folder" if folder else "a file, not a folder", path)
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidInput("checkpoint", "a path in a folder that can be written", path)


def _save_memory(model: nn.Module, config: TrainingConfig) -> None:
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    for name in ("recompute", "feed_forward_tile"):
        if getattr(config, name) and not stacks:
            got = type(model).__name__
            raise InvalidInput(name, "its default for a model that is none of longattn.models", got)
    for stack in stacks:
        stack.recompute, stack.offload = int(config.recompute), config.offload
        for block in stack.blocks:
            block.feed_forward_tile = config.feed_forward_tile  # type: ignore[assignment]  # a Block


def _inputs(batch: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"tokens": batch[:, :-1], "targets": batch[:, 1:]} if isinstance(batch, Tensor) else batch


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.dim() > 1]
    vectors = [weight for weight in trained if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def _restore(
    saved: Checkpoint, model: Any, optimizer: torch.optim.AdamW, settings: dict[str, Any]
) -> tuple[int, float]:
    """Put a checkpoint's state into model, optimiser and generator; return (steps done, seconds used).

    All of it is checked before any of it is used.
    """
    for name, ours, theirs in (
        ("config", model.config.to_dict(), saved.config.to_dict()),
        *(
            (name, settings.get(name), saved.settings.get(name))
            for name in sorted(settings.keys() | saved.settings.keys())
        ),
    ):
        if ours != theirs:
            raise InvalidInput(f"checkpoint's {name}", _different(ours, theirs), _different(theirs, ours))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    check_weights(model, saved)
    check_optimizer(saved, trained)
    rng, (step, elapsed) = check_rng(saved), check_progress(saved)

    model.load_state_dict(saved.model)
    for name, weight in trained.items():
        state = {key: saved.optimizer[f"{name}.{key}"].to(weight.device) for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = state
    torch.set_rng_state(rng)
    return step, elapsed


def _different(ours: Any, theirs: Any) -> Any:
    """Of two descriptions, what `ours` says otherwise."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ours
    return {key: value for key, value in ours.items() if key not in theirs or theirs[key] != value}


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted only: a step cut in two would leave weights and optimiser apart. A second one works as ever."""
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are not ours to handle
        yield noted.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        noted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress_bar(description: str, shown: bool) -> Iterator[Callable[[float, int, float, float], None]]:
    """A bar with step, loss (a running mean), tokens per second and time left: show(progress, step, loss, rate)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(description, total=1.0, step=0, loss=math.nan, rate=0.0)
        mean: float | None = None

        def show(progress: float, step: int, loss: float, rate: float) -> None:
            nonlocal mean
            mean = loss if mean is None else 0.95 * mean + 0.05 * loss
            bar.update(task, completed=progress, step=step, loss=mean, rate=rate)

        yield show
