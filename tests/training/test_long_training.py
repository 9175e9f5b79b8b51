"""What makes long sequences fit: tiles, checkpoints and offload change no loss and no gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longattn import InvalidInput
from longattn.extension import SelfExtend
from longattn.models import Decoder, TransformerConfig
from longattn.training import TrainingConfig, pack
from longattn.training.loop import _save_memory

CONFIG = TransformerConfig(vocab_size=64, dim=16, layers=5, heads=2, kv_heads=1, max_length=512)


def loss_and_gradients(model: Decoder, batch: dict[str, Tensor], **memory: Any) -> list[Tensor]:
    _save_memory(model, TrainingConfig(steps=1, **memory))
    model.zero_grad()
    torch.manual_seed(5)  # for dropout
    loss = model.loss(**batch)
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def dense_reference(model: Decoder, batch: dict[str, Tensor]) -> list[Tensor]:
    """All logits at once, everything kept."""
    _save_memory(model, TrainingConfig(steps=1))
    model.zero_grad()
    logits = model(batch["tokens"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def test_four_thousand_tokens_give_what_the_plain_implementation_gives() -> None:
    model = Decoder(CONFIG).double().train()
    ids = torch.randint(0, 64, (1, 4097))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    wanted = dense_reference(model, batch)
    wanted = [x.clone() for x in wanted]
    got = loss_and_gradients(model, batch, recompute=2, feed_forward_tile=1000, offload=True)
    assert len(got) == len(wanted) == 1 + len(list(model.parameters()))
    for ours, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "memory",
    [
        {"recompute": True},
        {"recompute": 3},
        {"recompute": 9},
        {"feed_forward_tile": 7},
        {"feed_forward_tile": 1000},
        {"recompute": 2, "feed_forward_tile": 16, "offload": True},
    ],
    ids=str,
)
def test_every_way_gives_the_same(memory: dict[str, Any], packed: bool) -> None:
    model = Decoder(replace(CONFIG, norm_first=packed, methods=(SelfExtend(2, 20),))).double().train()
    if packed:
        batch = pack([torch.randint(0, 64, (n,)) for n in (40, 3, 31)])
    else:
        ids = torch.randint(0, 64, (2, 51))
        batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    wanted = [x.clone() for x in loss_and_gradients(model, batch)]
    for ours, plain in zip(loss_and_gradients(model, batch, **memory), wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_dropout_drops_the_same() -> None:
    model = Decoder(replace(CONFIG, dropout=0.2, attention_dropout=0.2)).double().train()
    ids = torch.randint(0, 64, (1, 41))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    wanted = [x.clone() for x in loss_and_gradients(model, batch)]
    for ours, plain in zip(loss_and_gradients(model, batch, recompute=2), wanted, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_between_forward_and_backward_only_inputs_of_blocks_are_kept() -> None:
    model = Decoder(CONFIG).train()
    kept: dict[int, int] = {}
    ids = torch.randint(0, 64, (1, 301))
    for recompute in (0, 1, 2):
        _save_memory(model, TrainingConfig(steps=1, recompute=recompute, feed_forward_tile=50))
        sizes: list[int] = []
        weights = {weight.data_ptr() for weight in model.parameters()}

        def note(x: Tensor, sizes: list[int] = sizes, weights: set[int] = weights) -> Tensor:
            if x.data_ptr() not in weights and x.is_floating_point():
                sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            hidden = model.hidden_states(ids[:, :-1])
        kept[recompute] = sum(size == hidden.numel() for size in sizes)
    assert kept[2] < kept[1] <= 5 + 3 < kept[0]  # five blocks, and the last norm


def test_inference_in_tiles() -> None:
    model = Decoder(CONFIG).eval()
    ids = torch.randint(0, 64, (1, 90))
    with torch.no_grad():
        plain = model(ids)
        _save_memory(model, TrainingConfig(steps=1, feed_forward_tile=32))
        torch.testing.assert_close(model(ids), plain)


def test_positions_of_a_loss() -> None:
    model = Decoder(CONFIG).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.dim() == 2 else 1)
    ids = torch.randint(0, 64, (2, 21))
    plain = model.loss(ids[:, :-1], ids[:, 1:])
    places = torch.arange(20)
    for given in (places, places + 1000, places[None] + torch.tensor([[0], [77]])):
        torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:], positions=given), plain, rtol=1e-4, atol=0)
    skipped = torch.where(places < 9, places, places + 300)
    assert not torch.isclose(model.loss(ids[:, :-1], ids[:, 1:], positions=skipped), plain, rtol=1e-4)
    learned = Decoder(TransformerConfig.style("gpt2", vocab_size=64, dim=16, layers=1, heads=2, max_length=32)).double()
    moved = learned.loss(ids[:, :-1], ids[:, 1:], positions=places + 12)
    assert not torch.isclose(moved, learned.loss(ids[:, :-1], ids[:, 1:]), rtol=1e-6)
    with pytest.raises(InvalidInput, match="max_length"):
        learned.loss(ids[:, :-1], ids[:, 1:], positions=places + 13)
