"""What the ranks of a test's World run: trainings, and Hugging Face models, on shards of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from longattn import InvalidInput
from longattn.distributed import shard, unshard
from longattn.models import Decoder, TransformerConfig
from longattn.training import ContextParallel, TrainingConfig, train

SIZES: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_length": 48}
CONFIGS = (
    TransformerConfig(**SIZES, pattern="SL", window=9, sinks=2),
    TransformerConfig.style("gpt2", **{**SIZES, "kv_heads": 4}),
)


class Batches:
    """Random tokens, two sequences of 48 a step, until a step before which the training is cut off."""

    def __init__(self, until: int) -> None:
        self.until = until

    def batch(self, step: int) -> Tensor:
        if step == self.until:
            raise InterruptedError
        return torch.randint(256, (2, 49), generator=torch.Generator().manual_seed(step))

    def describe(self) -> dict[str, Any]:
        return {"data": "random"}


def training(model: Any, until: int = 4, checkpoint: Path | None = None, resume: bool = False) -> list[float]:
    """The losses of four steps, or none if it is cut off before."""
    config = TrainingConfig(steps=4, warmup=0, precision="float32", save_every=2)
    try:
        return train(model, Batches(until), config, checkpoint=checkpoint, resume=resume, show_progress=False).losses
    except InterruptedError:
        return []


def decoder(config: TransformerConfig) -> Decoder:
    torch.manual_seed(3)
    return Decoder(config)


def train_here(
    rank: int, shape: tuple[int, ...], layout: str, until: int, folder: str, resume: bool
) -> list[list[float]]:
    """The losses of a training of each config on these ranks."""
    mesh = init_device_mesh("cpu", shape)
    found = []
    for at, config in enumerate(CONFIGS):
        model = ContextParallel(decoder(config), mesh, layout=layout)
        found.append(training(model, until, Path(folder) / str(at), resume))
    return found


FAMILIES = ("gpt2", "llama", "mistral", "qwen3", "gpt_oss", "llama4")


def hugging_face(rank: int, world: int, layout: str) -> None:
    """Logits and summed gradients of tiny models on shards are those of whole sequences."""
    import transformers

    from integrations.tiny_models import DECODERS, VOCABULARY
    from longattn.integrations import huggingface

    transformers.logging.set_verbosity_error()
    huggingface.register()
    mesh = init_device_mesh("cpu", (world,))
    tokens = torch.randint(3, VOCABULARY, (2, 16 * world))
    targets = tokens.roll(-1, 1)
    mine = {
        name: shard(x, mesh, dim=1, layout=layout) for name, x in (("input_ids", tokens), ("shift_labels", targets))
    }
    close = {"rtol": 1e-3, "atol": 1e-4}  # float32: a mixture of experts runs in nothing wider
    for family in FAMILIES:
        kind, sizes = DECODERS[family]
        torch.manual_seed(1)
        config = kind(**sizes)
        config._attn_implementation = "longattn"
        model = transformers.AutoModelForCausalLM.from_config(config).train(False)
        whole = model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False)
        expected = torch.autograd.grad(whole.loss, list(model.parameters()), materialize_grads=True)
        with huggingface.context_parallel(model, mesh, layout=layout):
            part = model(**mine, labels=mine["shift_labels"], num_items_in_batch=targets.numel(), use_cache=False)
        logits = unshard(part.logits, mesh, dim=1, layout=layout)
        torch.testing.assert_close(logits, whole.logits, **close)
        got = torch.autograd.grad(part.loss, list(model.parameters()), materialize_grads=True)
        for right, share in zip(expected, got, strict=True):
            dist.all_reduce(share)
            torch.testing.assert_close(share, right, **close)


def unfit(rank: int, world: int) -> None:
    """What a model or a call cannot mean on shards is an error."""
    import transformers

    from integrations.tiny_models import DECODERS
    from longattn import Unsupported, attention_rows
    from longattn.integrations import huggingface

    huggingface.register()
    mesh = init_device_mesh("cpu", (world,))
    kind, sizes = DECODERS["llama"]
    model = transformers.AutoModelForCausalLM.from_config(kind(**sizes), attn_implementation="longattn")
    tokens = torch.randint(3, 50, (1, 8))
    with huggingface.context_parallel(model, mesh):
        with pytest.raises(InvalidInput, match="shift_labels"):
            model(input_ids=tokens, labels=tokens)
        with pytest.raises(Unsupported, match="shards"):
            model(input_ids=tokens, position_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
        q = torch.randn(1, 2, 8, 4)
        with pytest.raises(Unsupported, match="attention_rows"):
            attention_rows(q, q, [0])
    with pytest.raises(InvalidInput, match="attn_implementation"):
        with huggingface.context_parallel(torch.nn.Linear(1, 1), mesh):
            pass
