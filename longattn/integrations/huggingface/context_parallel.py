"""Hugging Face models on shards of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longattn import distributed
from longattn.errors import InvalidInput
from longattn.integrations.huggingface.registration import NAME
from longattn.redirection import token_places


@contextmanager
def context_parallel(
    model: nn.Module, mesh: DeviceMesh, *, layout: str = "contiguous", schedule: str = "auto"
) -> Iterator[None]:
    """While it lasts, a model with attn_implementation="longattn" reads shards of sequences that ranks share.

    It is called as ever, with this rank's shards (see `longattn.distributed.shard`) of input_ids, attention_mask and
    shift_labels, and gives those of its outputs. position_ids are made where there are none. The loss is of the shard,
    by transformers' rules: with num_items_in_batch, the number of targets in the whole, the sum over ranks is that of
    the whole. The backward of a model with gradient checkpointing belongs inside, too.

    Args:
        model: of transformers.
        mesh, layout, schedule: as in `longattn.distributed.context_parallel_attention`.

    Raises:
        InvalidInput: a model with another attn_implementation; in its calls labels without shift_labels, as a shard
            does not hold the target of its last token.
    """
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != NAME:
        raise InvalidInput("model", f"a model with attn_implementation={NAME!r}", repr(implementation))

    def prepare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
            raise InvalidInput("labels", "shift_labels beside them: a shard of each next token", "labels alone")
        tokens: Tensor | None = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = token_places(tokens.shape[1], tokens.device)[None].expand(tokens.shape[0], -1)
            if len(args) < 2 and kwargs.get("attention_mask") is None:
                # Or transformers would take the jump in them, in a zigzag shard, for the start of a packed document.
                kwargs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        return args, kwargs

    hook = model.register_forward_pre_hook(prepare, with_kwargs=True)
    try:
        with distributed.context_parallel(mesh, layout=layout, schedule=schedule):
            yield
    finally:
        hook.remove()
