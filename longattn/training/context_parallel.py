"""Training with one sequence on several ranks: weights by FSDP2, activations by context parallelism.

The weights, their gradients and the optimiser's state are cut among the ranks (fully_shard; Zhao et al., PyTorch FSDP,
arXiv 2304.11277), and so is every sequence. Checkpoints are those of torch.distributed.checkpoint, which other numbers
of ranks can load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longattn.distributed import context_parallel, shard
from longattn.errors import InvalidInput
from longattn.models import Decoder, TransformerConfig
from longattn.models.losses import IGNORED

__all__ = ["ContextParallel"]


class ContextParallel(nn.Module):
    """A decoder whose sequences and weights the ranks of a mesh share; ready for `longattn.training.train`.

    Every rank makes the same batches and calls the same functions. Residual dropout draws from each rank's own
    generator.

    Args:
        model: with the same weights on every rank. It is changed in place: its weights become shards (DTensor).
        mesh, layout, schedule: of the sequences, as in `longattn.distributed.context_parallel_attention`.
        weights_mesh: of one dimension, among whose ranks the weights are cut; by default all ranks of `mesh`.

    Raises:
        InvalidInput: not a decoder, or not a mesh.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: DeviceMesh,
        *,
        layout: str = "zigzag",
        schedule: str = "auto",
        weights_mesh: DeviceMesh | None = None,
    ) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        super().__init__()
        if not isinstance(model, Decoder):
            raise InvalidInput("model", "a longattn.models.Decoder", type(model).__name__)
        if weights_mesh is None:
            weights_mesh = mesh if mesh.ndim == 1 else DeviceMesh(mesh.device_type, mesh.mesh.flatten())
        for block in model.blocks:
            fully_shard(block, mesh=weights_mesh)
        fully_shard(model, mesh=weights_mesh)
        register_fsdp_forward_method(model, "loss")
        self.model = model
        self.mesh, self.layout, self.schedule = mesh, layout, schedule
        self.weights_mesh = weights_mesh

    @property
    def config(self) -> TransformerConfig:
        return self.model.config

    def loss(self, tokens: Tensor, targets: Tensor, **others: Any) -> Tensor:
        """As `Decoder.loss`, of the whole batch on every rank; the gradients, which FSDP averages, are those of it.

        Args:
            tokens, targets: the whole sequences, [B, N] or with cu_seqlens [N]; N is a multiple of the ranks (zigzag:
                of twice the ring's).
            others: as in `Decoder.loss`, but reduction.
        """
        mine = [shard(x, self.mesh, dim=-1, layout=self.layout) for x in (tokens, targets)]
        with context_parallel(self.mesh, layout=self.layout, schedule=self.schedule):
            losses = self.model.loss(*mine, **others, reduction="none")
        counted = (targets != IGNORED).sum().clamp(min=1)
        group = self.weights_mesh.get_group()
        share = losses.sum() / counted
        whole = share.detach().clone()
        dist.all_reduce(whole, group=group)
        batches = self.weights_mesh.size() // self.mesh.size()  # how many the ranks train on side by side
        averaged = share * self.mesh.size()  # FSDP divides the sum of gradients by its ranks
        return averaged + (whole / batches - averaged).detach()


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of the weights only."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in model.parameters())


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is set on some rank: what they do together, they decide together."""
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def save_sharded(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], step: int
) -> None:
    """Write a folder, every rank its part: whole or not at all, whatever ends a rank.

    Raises:
        OSError: a rank could not write its part, for example on a full disk. The older checkpoint stays.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    from longattn.training.sharded_files import Writer

    weights, state = get_state_dict(model, optimizer)
    values = {"model": weights, "optimizer": state, "step": step, "settings": dict(settings)}
    try:
        save(values, storage_writer=Writer(Path(path)))
    except CheckpointException as error:
        raise OSError(f"{path} cannot be written: {_first(error)}") from error


def load_sharded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> int:
    """Read it, written by any number of ranks; return the steps done.

    Names, shapes and dtypes are compared with the model's before anything is read into it.

    Raises:
        InvalidInput: there is no such folder, it is damaged or of another training, or its tensors are not finite.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    from longattn.training.sharded_files import Planner, Reader, check_state

    path = Path(path)
    if not (path / ".metadata").is_file():
        raise InvalidInput("checkpoint", "a folder that a training wrote", str(path))
    weights, state = get_state_dict(model, optimizer)
    tensors: dict[str, Any] = {"model": weights, "optimizer": state}
    values: dict[str, Any] = {"step": 0, "settings": dict(settings)}
    metadata = Reader(path).read_metadata()
    check_state(metadata, _flat({**tensors, **values}))
    groups = _plain(tensors)
    expected = "a complete folder that a training wrote"
    try:
        load(values, storage_reader=Reader(path), planner=Planner())
        step, before = values["step"], values["settings"]
        if before != dict(settings):
            raise InvalidInput("checkpoint", f"a training by {dict(settings)}", before)
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
            raise InvalidInput("checkpoint's step", "an int >= 0", repr(step))
        load(tensors, storage_reader=Reader(path), planner=Planner())
    except CheckpointException as error:
        raise InvalidInput("checkpoint", expected, f"{path}: {_first(error)}") from None
    changed = [name for name, value in _plain(tensors).items() if value != groups[name]]
    if changed:
        raise InvalidInput("checkpoint", "the optimiser of this training", f"another {changed[0]}")
    mine = {name: value.to_local() if hasattr(value, "to_local") else value for name, value in _flat(tensors).items()}
    broken = [name for name, value in mine.items() if isinstance(value, Tensor) and not _is_sound(name, value)]
    if on_any_rank(bool(broken), next(model.parameters()).device):
        got = f"{broken[0]}" if broken else "others on another rank"
        raise InvalidInput("checkpoint", "finite weights, and moments of the optimiser that can be", got)
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    return step


def _is_sound(name: str, value: Tensor) -> bool:
    return bool(value.isfinite().all()) and not (name.endswith(".exp_avg_sq") and bool((value < 0).any()))


def _plain(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the optimiser's options. The learning rate, which every step sets, is not one."""
    found = {name: value for name, value in _flat(tensors).items() if not isinstance(value, Tensor)}
    return {name: value for name, value in found.items() if not name.endswith(".lr")}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values by the names that torch.distributed.checkpoint gives them."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    return dict(flatten_state_dict(values)[0])


def _first(error: Any) -> str:
    """Return what the first of the ranks that failed says."""
    failures = [failure[0] for failure in error.failures.values()]
    return str(failures[0]) if failures else str(error)
