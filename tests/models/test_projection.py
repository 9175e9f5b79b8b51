"""A head is called as a module, in losses a chunk at a time; a tied embedding is read where its weight is all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from longattn import InvalidInput
from longattn.evaluation import loss_by_position
from longattn.evaluation.reading import DecoderReader
from longattn.models import (
    Decoder,
    Distillation,
    EncoderDecoder,
    GenerationConfig,
    MaskedLM,
    TransformerConfig,
    beam_search,
    chunked_cross_entropy,
    chunked_distillation,
    generate,
)
from longattn.training import TrainingConfig, train

pytestmark = pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")

SIZES: dict[str, Any] = {"vocab_size": 30, "dim": 16, "layers": 1, "heads": 2, "max_length": 32, "dropout": 0.0}


class Adapter(nn.Module):
    """A linear layer with a low-rank update, as adapters wrap one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def hooked(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda module, args, output: 3.0 * output)
    return head


def patched(head: nn.Linear) -> nn.Module:
    plain = head.forward
    head.forward = lambda x: -plain(x)  # type: ignore[method-assign]
    return head


def pruned(head: nn.Linear) -> nn.Module:
    prune.random_unstructured(head, "weight", 0.5)
    return head


def with_bias(head: nn.Linear) -> nn.Module:
    biased = nn.Linear(head.in_features, head.out_features)
    nn.init.normal_(biased.bias)
    return biased


def subclass(head: nn.Linear) -> nn.Module:
    return Scaled(head.in_features, head.out_features)


def factored(head: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Linear(head.in_features, 4), nn.Linear(4, head.out_features))


HEADS: list[Callable[[nn.Linear], nn.Module]] = [
    Adapter, hooked, patched, pruned, with_bias, subclass, factored, parametrizations.weight_norm,
]  # fmt: skip


def oracle(model: nn.Module, logits: Tensor, targets: Tensor) -> list[Tensor]:
    """The mean loss of logits, and its gradients."""
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return [loss, *gradients(loss, model)]


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    return [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]


def decoder(**changes: Any) -> Decoder:
    return Decoder(TransformerConfig.style("llama", **{**SIZES, **changes})).double()


@pytest.mark.parametrize("make", HEADS)
def test_a_decoder_s_head_is_called(make: Callable[[nn.Linear], nn.Module]) -> None:
    model = decoder()
    before = model(torch.zeros(1, 3, dtype=torch.int64))
    model.head = make(model.head).double()
    tokens, targets = torch.randint(0, 30, (2, 9)), torch.randint(0, 30, (2, 9))
    targets[0, :3] = -100
    logits = model.head(model.hidden_states(tokens))
    torch.testing.assert_close(model(tokens), logits)
    same = make is parametrizations.weight_norm
    assert torch.allclose(model(torch.zeros(1, 3, dtype=torch.int64)), before) == same
    expected = oracle(model, logits, targets)
    for chunk in (4, 100):
        loss = model.loss(tokens, targets, chunk=chunk)
        for found, wanted in zip([loss, *gradients(loss, model)], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    each = model.loss(tokens, targets, reduction="none", chunk=4)
    torch.testing.assert_close(each.sum() / 15, expected[0], rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(tokens, targets), expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [Adapter, hooked, with_bias])
def test_other_models_call_theirs(make: Callable[[nn.Linear], nn.Module]) -> None:
    tokens, targets = torch.randint(0, 30, (2, 9)), torch.randint(0, 30, (2, 9))
    targets[1, :3] = -100

    pair = EncoderDecoder(
        TransformerConfig.style("transformer", **SIZES, encoder_layers=1, tie_embeddings=False)
    ).double()
    pair.head = make(pair.head).double()
    logits = pair.head(pair.decode(tokens, pair.encode(tokens)))
    torch.testing.assert_close(pair(tokens, tokens), logits)
    loss = pair.loss(tokens, tokens, targets, chunk=4)
    for found, wanted in zip([loss, *gradients(loss, pair)], oracle(pair, logits, targets), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    masked = MaskedLM(TransformerConfig.style("bert", **SIZES, tie_embeddings=False)).double()
    masked.head = make(masked.head).double()
    nn.init.normal_(masked.output_bias)
    logits = masked.head(masked.transformed(masked.encoder(tokens))) + masked.output_bias
    torch.testing.assert_close(masked(tokens), logits)
    loss = masked.loss(tokens, targets, chunk=4)
    for found, wanted in zip([loss, *gradients(loss, masked)], oracle(masked, logits, targets), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)

    student, teacher = decoder(), decoder()
    student.head, teacher.head = make(student.head).double(), make(teacher.head).double()
    loss = Distillation(student, teacher, temperature=2.0, share=0.25)(tokens, targets, chunk=4)
    counted = targets != -100
    ours, theirs = (model(tokens)[counted] for model in (student, teacher))
    divergence = F.kl_div(
        F.log_softmax(ours / 2, -1), F.log_softmax(theirs / 2, -1).detach(), log_target=True, reduction="batchmean"
    )
    wanted = 0.75 * F.cross_entropy(ours, targets[counted]) + 0.25 * 4 * divergence
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    for found, expected in zip(gradients(loss, student), gradients(wanted, student), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_generation_and_evaluation_call_the_head() -> None:
    model = decoder().eval()
    model.head = Adapter(model.head).double()
    nn.init.normal_(model.head.up.weight)
    expected = [3, 4, 5]
    for _ in range(6):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    config = GenerationConfig(max_new_tokens=6)
    assert generate(model, [[3, 4, 5]], config)[0].tokens == expected[3:]
    assert generate(model, [[3, 4, 5]], config, draft=decoder().eval())[0].tokens == expected[3:]
    assert beam_search(model, [[3, 4, 5]], config, beams=1)[0][0].tokens == expected[3:]
    tokens = torch.randint(0, 30, (13,))
    wanted = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none").float()
    torch.testing.assert_close(DecoderReader(model).losses(tokens), wanted)
    torch.testing.assert_close(loss_by_position(model, tokens[None]).losses[0], wanted)


class Batches:
    def describe(self) -> dict[str, Any]:
        return {}

    def batch(self, step: int) -> dict[str, Tensor]:
        tokens = (torch.arange(9)[None] + step) % 30
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def test_training_reaches_what_is_on_the_head() -> None:
    model = decoder().float()
    model.requires_grad_(False)
    model.head = Adapter(model.head)
    model.head.base.requires_grad_(False)
    before = copy.deepcopy(model.head.up.weight)
    train(model, Batches(), TrainingConfig(steps=2), show_progress=False)  # type: ignore[arg-type]
    assert not torch.equal(model.head.up.weight, before)


class Largest(TorchDispatchMode):
    """Remember the size of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("make", [None, Adapter, hooked])
def test_memory_is_a_chunk_by_the_vocabulary(make: Callable[[nn.Linear], nn.Module] | None, reduction: str) -> None:
    tokens, vocabulary, chunk = 256, 400, 16
    head: nn.Module = nn.Linear(8, vocabulary, bias=False)
    head = head if make is None else make(head)  # type: ignore[arg-type]
    hidden = torch.randn(tokens, 8, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = chunked_cross_entropy(
            hidden, head, torch.randint(0, vocabulary, (tokens,)), reduction=reduction, chunk=chunk
        )
        kept = sum(saved.values())
        loss.sum().backward()
    assert largest.numel == chunk * vocabulary
    assert kept < tokens * vocabulary  # bytes: a quarter of all logits
    assert all(weight.grad is not None for weight in head.parameters()) and hidden.grad is not None


def test_distillation_keeps_a_chunk_by_the_vocabulary() -> None:
    student, teacher = Adapter(nn.Linear(8, 400)), Adapter(nn.Linear(6, 400))
    hidden = torch.randn(256, 8, requires_grad=True)
    with Largest() as largest:
        chunked_distillation(hidden, student, torch.randn(256, 6), teacher, chunk=16).backward()
    assert largest.numel == 16 * 400
    assert all(weight.grad is not None for weight in student.parameters())
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.fixture
def global_hook() -> Iterator[list[nn.Module]]:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    yield seen
    handle.remove()


def test_global_hooks_see_the_head(global_hook: list[nn.Module]) -> None:
    model = decoder()
    tokens = torch.randint(0, 30, (1, 9))
    model.loss(tokens, tokens, chunk=4).backward()
    assert global_hook.count(model.head) == 6  # three chunks, forward and again in the backward


def test_a_plain_head_is_fused_and_its_bits_are_the_weight_s() -> None:
    head, hidden = nn.Linear(8, 30), torch.randn(20, 8, requires_grad=True)
    targets = torch.randint(0, 30, (20,))
    found, expected = (
        chunked_cross_entropy(hidden, of, targets, bias=bias, chunk=7)
        for of, bias in ((head, None), (head.weight, head.bias))
    )
    assert torch.equal(found, expected)
    for a, b in zip(gradients(found, head), gradients(expected, head), strict=True):
        assert torch.equal(a, b)
    assert type(found.grad_fn).__name__ == "_MeanCrossEntropyBackward"


def test_targets_of_a_called_head_are_checked() -> None:
    with pytest.raises(InvalidInput, match="targets"):
        chunked_cross_entropy(torch.randn(3, 8), Adapter(nn.Linear(8, 5)), torch.tensor([0, 5, 1]))


@pytest.mark.parametrize("make", [Adapter, parametrizations.weight_norm, subclass, pruned, patched])
def test_a_tied_embedding_that_is_more_than_its_weight_is_refused(make: Callable[[Any], Any]) -> None:
    model = decoder(tie_embeddings=True)
    assert model.head is None and not any(name.startswith("head") for name in model.state_dict())
    if make in (Adapter, subclass):
        model.embedding = type("Doubled", (nn.Embedding,), {})(30, 16).double()
    else:
        make(model.embedding)
    tokens = torch.randint(0, 30, (1, 5))
    for call in (
        model,
        lambda x: model.loss(x, x),
        lambda x: generate(model.eval(), [[1]], GenerationConfig(max_new_tokens=1)),
    ):
        with pytest.raises(InvalidInput, match="embedding"):
            call(tokens)
    model.head = nn.Linear(16, 30).double()  # a head of its own is the way out
    assert model(tokens).shape == (1, 5, 30)


def test_hooks_on_a_tied_embedding_run_where_it_is_called() -> None:
    model = decoder(tie_embeddings=True)
    tokens = torch.randint(0, 30, (1, 5))
    expected = model(tokens)
    seen: list[Any] = []
    model.embedding.register_forward_hook(lambda *args: seen.append(args))
    assert torch.equal(model(tokens), expected) and len(seen) == 1


@pytest.mark.parametrize("make", [Adapter, hooked, patched])
def test_an_extended_decoder_keeps_the_head(make: Callable[[nn.Linear], nn.Module]) -> None:
    model = decoder()
    model.head = make(model.head).double()
    tokens = torch.randint(0, 30, (1, 9))
    assert torch.equal(model.extended(window=32)(tokens), model(tokens))
