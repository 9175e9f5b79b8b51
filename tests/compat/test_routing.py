"""longattn.compat.use(): which calls it routes, and that it leaves no trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported_early
from torch.utils.checkpoint import checkpoint

import longattn
from longattn import InvalidInput, Unsupported
from longattn.compat import sdpa, use

PYTORCHS = F.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each call of our attention."""
    made: list[int] = []

    def counting(*args, **keywords):
        made.append(1)
        return longattn.attention(*args, **keywords)

    monkeypatch.setattr(sdpa, "attention", counting)
    yield made
    assert F.scaled_dot_product_attention is PYTORCHS
    made.clear()
    q = torch.randn(1, 1, 2, 4)
    F.scaled_dot_product_attention(q, q, q)
    assert not made  # whatever the test did, PyTorch's is PyTorch's again


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    return q, k, v


def test_every_name_is_routed(calls: list[int]) -> None:
    args = qkv()
    want = PYTORCHS(*args)
    with use():
        for function in (F.scaled_dot_product_attention, imported_early, torch._C._nn.scaled_dot_product_attention):
            torch.testing.assert_close(function(*args), want)
    assert len(calls) == 3


def test_nested_blocks_errors_and_decoration(calls: list[int]) -> None:
    args = qkv()
    with use(), use():
        imported_early(*args)
    with use():
        with use():
            pass
        imported_early(*args)
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="from within"), use():
        raise RuntimeError("from within")
    imported_early(*args)
    assert len(calls) == 2

    @use()
    def decorated() -> Tensor:
        return imported_early(*args)

    decorated(), decorated()
    assert len(calls) == 4


def test_other_threads_do_not_notice(calls: list[int]) -> None:
    args = qkv()
    with use():
        thread = threading.Thread(target=imported_early, args=args)
        thread.start()
        thread.join()
        assert not calls


@pytest.mark.filterwarnings("ignore:Support for mismatched src_key_padding_mask")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_encoder_layer(calls: list[int], training: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 16, requires_grad=training)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    options = [{}, {"src_mask": causal}, {"src_mask": causal, "is_causal": True}]
    with torch.set_grad_enabled(training):
        for option in options:
            want = layer(x, src_key_padding_mask=padding, **option)
            with use():
                got = layer(x, src_key_padding_mask=padding, **option)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            if training:
                gradients = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (got, want)]
                torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(options)


def test_attention_modules(calls: list[int]) -> None:
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    decoder = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with torch.no_grad():
        want = decoder(x, memory), attention(x, memory, memory, need_weights=False)[0]
        with use():
            got = decoder(x, memory), attention(x, memory, memory, need_weights=False)[0]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hugging_face_model(calls: list[int], kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "attn_implementation": "sdpa"}
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **sizes,
        )
    else:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(1, 31, (2, 9))
    padding = torch.ones(2, 9, dtype=torch.int64)
    padding[1, :4] = 0
    for mask in (None, padding):
        want = model(tokens, attention_mask=mask)
        with use():
            got = model(tokens, attention_mask=mask)
        seen = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(got.logits[seen], want.logits[seen], rtol=1e-4, atol=1e-5)
    assert len(calls) == 4
    generate = {"max_new_tokens": 4, "do_sample": False, "attention_mask": padding, "pad_token_id": 0}
    with use():
        generated = model.generate(tokens, **generate)
    assert torch.equal(generated, model.generate(tokens, **generate))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fallback(calls: list[int]) -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, 3, 8) for n in (2, 4)], layout=torch.jagged).transpose(1, 2)
    with use(), pytest.raises(Unsupported, match="nested"):
        imported_early(nested, nested, nested)
    with use(fallback="torch"):
        out = imported_early(nested, nested, nested)
        imported_early(*qkv())
        with pytest.raises(InvalidInput, match="query"):
            imported_early(*(x.int() for x in qkv()))
    assert out.is_nested and len(calls) == 2  # the second was refused by our attention
    with pytest.raises(InvalidInput, match="fallback"):
        use(fallback="eager")


def test_activation_checkpointing(calls: list[int]) -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        return imported_early(x, x, x, dropout_p=0.5)

    results = []
    for run in (attend, lambda x: checkpoint(attend, x, use_reentrant=False, context_fn=lambda: (use(), use()))):
        torch.manual_seed(0)
        with use():
            out = run(x)
            results.append((out, *torch.autograd.grad(out.sin().sum(), x)))
    assert len(calls) == 3
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_compiled(calls: list[int]) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return layer(x) + imported_early(x, x, x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(x)
    assert not calls
    want = run(x)
    with use():
        got = compiled(x)  # another graph: the mode is part of what it was compiled for
    assert len(calls) == 2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    calls.clear()
    compiled(x)
    assert not calls
