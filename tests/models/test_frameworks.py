"""Models under torch.func, fake and meta tensors, export and FSDP2: ids are read only where they can be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.func import functional_call, grad, vmap

from longattn import InvalidInput
from longattn.models import (
    Decoder,
    EncoderDecoder,
    GenerationConfig,
    MaskedLM,
    SequenceClassifier,
    TokenClassifier,
    TransformerConfig,
    build,
    generate,
)

pytestmark = pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")

STYLES = ("llama", "gpt2", "bert", "modern-encoder")
DEVICES = ("fake", "meta")


def config(style: str, **changes: Any) -> TransformerConfig:
    sizes = {"vocab_size": 30, "dim": 16, "layers": 1, "heads": 2, "max_length": 32, "dropout": 0.0}
    return TransformerConfig.style(style, **{**sizes, **changes})


@pytest.mark.parametrize("style", STYLES)
def test_per_sample_gradients(style: str) -> None:
    model = build(config(style)).double()
    tokens = torch.randint(0, 30, (3, 7))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return functional_call(model, weights, (tokens[None],)).square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, tokens)
    for name, wanted in grad(loss)(weights, tokens[1]).items():
        torch.testing.assert_close(found[name][1], wanted)


class Loss(nn.Module):
    """A model's loss as a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model.loss(*inputs)  # type: ignore[operator]


def masked_model() -> MaskedLM:
    return MaskedLM(config("bert"))


@pytest.mark.parametrize("make", [lambda: Decoder(config("llama")), lambda: Decoder(config("gpt2")), masked_model])
def test_per_sample_gradients_of_the_loss(make: Any) -> None:
    module = Loss(make().double())
    tokens = torch.randint(0, 30, (3, 7))
    targets = torch.where(torch.rand(3, 7) < 0.5, tokens, -100)
    targets[:, 0] = 3
    weights = {name: weight.detach() for name, weight in module.named_parameters()}

    def loss(weights: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        return functional_call(module, weights, (tokens[None], targets[None]))

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, tokens, targets)
    for sample in range(3):
        module.zero_grad()
        module(tokens[sample : sample + 1], targets[sample : sample + 1]).backward()
        for name, weight in module.named_parameters():
            wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.testing.assert_close(found[name][sample], wanted, msg=name)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("style", STYLES)
def test_shapes_without_values(style: str, kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        model, tokens = build(config(style)), torch.zeros(2, 7, dtype=torch.int64)
        assert model(tokens).shape[:2] == (2, 7)
        packed = model(tokens.flatten(), cu_seqlens=torch.zeros(3, dtype=torch.int32))
        assert packed.shape[0] == 14
        if isinstance(model, Decoder):
            assert model.loss(tokens, tokens).shape == ()


@pytest.mark.parametrize("kind", DEVICES)
def test_losses_of_heads_without_values(kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        tokens, labels = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        assert masked_model().loss(tokens, tokens).shape == ()
        assert TokenClassifier(config("bert"), 3).loss(tokens, tokens).shape == ()
        assert SequenceClassifier(config("bert"), 3).loss(tokens, labels).shape == ()


def test_ids_out_of_range_are_still_told_of() -> None:
    model = Decoder(config("gpt2"))
    for bad in (30, -1):
        tokens = torch.tensor([[1, bad]])
        with pytest.raises(InvalidInput, match="tokens"):
            model(tokens)
        with pytest.raises((IndexError, RuntimeError)):
            vmap(lambda x: model(x[None]))(tokens)
    with pytest.raises(InvalidInput, match="max_length"):
        model.loss(torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), positions=torch.tensor([0, 1, 32]))
    with pytest.raises(InvalidInput, match="labels"):
        TokenClassifier(config("bert"), 3).loss(torch.zeros(1, 2).long(), torch.tensor([[-100, 3]]))


def test_left_out_labels_need_no_finite_logits() -> None:
    model = TokenClassifier(config("bert"), 3)
    tokens, labels = torch.randint(0, 30, (1, 4)), torch.tensor([[0, -100, 1, 2]])

    def spoil(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        return torch.where(labels[..., None] == -100, torch.nan, logits)

    expected = model.loss(tokens, labels)
    wanted = torch.autograd.grad(expected, model.head.weight)
    model.head.register_forward_hook(spoil)
    found = model.loss(tokens, labels)
    assert torch.equal(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, model.head.weight), wanted)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("style", ["transformer", "modern-transformer"])
def test_an_encoder_decoder_is_exported_with_a_dynamic_batch(style: str, strict: bool) -> None:
    model = EncoderDecoder(config(style, encoder_layers=1)).eval()
    batch, source, target = (torch.export.Dim(name, min=2, max=30) for name in "BST")
    example = torch.randint(0, 30, (3, 12)), torch.randint(0, 30, (3, 9))
    shapes = ({0: batch, 1: source}, {0: batch, 1: target})
    program = torch.export.export(model, example, dynamic_shapes=shapes, strict=strict).module()
    for inputs in (example, (torch.randint(0, 30, (5, 7)), torch.randint(0, 30, (5, 11)))):
        torch.testing.assert_close(program(*inputs), model(*inputs))


@pytest.fixture
def one_rank() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("tied", [False, True])
def test_fsdp2_gathers_a_head(tied: bool) -> None:
    torch.manual_seed(0)
    plain = Decoder(config("llama", tie_embeddings=tied))
    torch.manual_seed(0)
    model = Decoder(config("llama", tie_embeddings=tied))
    if not tied:
        fully_shard(model.head)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for name in ("loss", "hidden_states"):
        register_fsdp_forward_method(model, name)
    tokens = torch.randint(0, 30, (2, 9))
    torch.testing.assert_close(model(tokens), plain(tokens))
    for chunk in (4, 100):
        plain.zero_grad()
        model.zero_grad()
        losses = [of.loss(tokens[:, :-1], tokens[:, 1:], chunk=chunk) for of in (model, plain)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        for (name, sharded), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, msg=name)
    steps = GenerationConfig(max_new_tokens=4)
    assert generate(model.eval(), [[1, 2]], steps)[0].tokens == generate(plain.eval(), [[1, 2]], steps)[0].tokens


@pytest.mark.usefixtures("one_rank")
def test_fsdp2_on_a_tied_embedding_alone_is_refused() -> None:
    model = Decoder(config("llama", tie_embeddings=True))
    fully_shard(model.embedding)
    fully_shard(model)
    with pytest.raises(InvalidInput, match="embedding"):
        model(torch.zeros(1, 3, dtype=torch.int64))
