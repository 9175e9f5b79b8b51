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
    """Write a folder, every rank its part."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state, "step": step, "settings": dict(settings)}, checkpoint_id=path)


def load_sharded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> int:
    """Read it, written by any number of ranks; the steps done.

    Raises:
        InvalidInput: there is no such folder, or it is of another training.
    """
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    if not (Path(path) / ".metadata").exists():
        raise InvalidInput("checkpoint", "a folder that a training wrote", str(path))
    weights, state = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"model": weights, "optimizer": state, "step": 0, "settings": dict(settings)}
    load(saved, checkpoint_id=path)
    if saved["settings"] != dict(settings):
        raise InvalidInput("checkpoint", f"a training by {dict(settings)}", saved["settings"])
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return saved["step"]
