"""torch.onnx.export(..., dynamo=True) writes our calls, and onnxruntime computes from them what we compute."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import longattn
from longattn import Rope, compat

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def check(module: torch.nn.Module, *args: Tensor, others: Any = (), **options: Any) -> list[str]:
    """Export with these arguments, run with them and `others`; the operators of the model."""
    module = module.eval()
    program = torch.onnx.export(module, args, dynamo=True, verbose=False, **options)
    for inputs in (args, *others):
        with torch.no_grad():
            expected = module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, theirs in zip(expected, program(*inputs), strict=True):
            torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)
    return [node.op_type for node in program.model.graph]


def qkv(nq: int = 5, nk: int = 7, heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, heads[0], nq, 8), torch.randn(2, heads[1], nk, 8), torch.randn(2, heads[1], nk, 6)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "dense": ({}, {}),
    "causal, at the start": ({"causal": True, "align": "start"}, {}),
    "causal, at the end": ({"causal": True}, {}),
    "softcap": ({"softcap": 2.0}, {}),
    "causal, softcap, window": ({"causal": True, "softcap": 2.0, "window": 3, "sinks": 1}, {}),
    "rope": ({"causal": True, "rope": Rope(6, scaling=longattn.scaling.YaRN(2.0, 8)), "scale": 0.4}, {}),
    "tensors": (
        {"window": (2, 1)},
        {"key_mask": torch.rand(2, 7) < 0.7, "key_lens": torch.tensor([7, 5], dtype=torch.int32)},
    ),
    "bias": ({"causal": True}, {"bias": torch.randn(4, 5, 7)}),
    "bool bias": ({}, {"bias": torch.rand(2, 1, 5, 7) < 0.6}),
    "a bias that hides a row": ({}, {"bias": torch.randn(5, 7).index_fill(0, torch.tensor([2]), -torch.inf)}),
}


class Calls(torch.nn.Module):
    """All of them, as to export a model takes seconds; and causal at the end where the first queries see nothing."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        outs = [longattn.attention(q, k, v, **keywords, **tensors) for keywords, tensors in CALLS.values()]
        return *outs, longattn.attention(q, k[:, :, :3], v[:, :, :3], causal=True)


@pytest.mark.parametrize("opset", [None, 23])
def test_calls(opset: int | None) -> None:
    q, k, v = qkv()
    assert not Calls()(q, k, v)[-1][:, :, :2].any()
    assert ("Attention" in check(Calls(), q, k, v, opset_version=opset)) == (opset == 23)


def test_any_length() -> None:
    batch, n = torch.export.Dim("batch"), torch.export.Dim("n")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = longattn.nn.Attention(16, 2, num_kv_heads=1, window=4, sinks=1, rope=Rope(8))

        def forward(self, x: Tensor, visible: Tensor) -> Tensor:
            return self.attention(x, key_mask=visible)

    def inputs(batch: int, n: int) -> tuple[Tensor, Tensor]:
        visible = torch.rand(batch, n) < 0.8
        return torch.randn(batch, n, 16), visible

    shapes = ({0: batch, 1: n}, {0: batch, 1: n})
    check(Block(), *inputs(2, 9), others=[inputs(3, 5), inputs(1, 12)], dynamic_shapes=shapes)


def test_modules() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    longattn.nn.replace_attention(layer)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            return self.layer(x, src_key_padding_mask=hidden)

    class Sdpa(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with compat.use():
                return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    hidden = torch.arange(7) >= torch.tensor([[7], [4]])
    check(Encoder(), torch.randn(2, 7, 16), hidden)
    check(Sdpa(), qkv()[0])


def test_a_model_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from longattn.integrations.huggingface import register

    register()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False, attn_implementation="longattn"))

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    check(Logits(), torch.arange(12).reshape(2, 6))


REFUSED: dict[str, Any] = {
    "sink_logits": lambda q, k, v: longattn.attention(q, k, v, sink_logits=torch.zeros(4)),
    "alibi_slopes": lambda q, k, v: longattn.attention(q, k, v, alibi_slopes=torch.ones(4)),
    "dropout": lambda q, k, v: longattn.attention(q, k, v, dropout_p=0.5),
    "lse": lambda q, k, v: longattn.attention(q, k, v, return_lse=True)[1],
    "varlen": lambda q, k, v: longattn.attention_varlen(
        q[0].mT, k[0].mT, v[0].mT, *[torch.tensor([0, 1], dtype=torch.int32)] * 2, 1, 1
    ),
    "cache": lambda q, k, v: longattn.attention_with_cache(
        k, k, k, longattn.KVCache(2, 2, 8, dtype=torch.float32, device="cpu")
    ),
}


def causes(error: BaseException | None) -> str:
    return "" if error is None else f"{error}\n{causes(error.__cause__)}"


def test_a_refusal_reaches_the_user() -> None:
    class Sinks(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return longattn.attention(q, q, q, sink_logits=torch.zeros(4))

    with pytest.raises(torch.onnx.OnnxExporterError) as info:
        torch.onnx.export(Sinks(), (qkv()[0],), dynamo=True, verbose=False)
    assert "ONNX's Attention has no sink_logits" in causes(info.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_cannot_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (mode.from_tensor(x) for x in qkv(5, 5))
        with pytest.raises(longattn.Unsupported, match="ONNX") as info:
            REFUSED[name](q, k, v[..., :1].expand(k.shape))
    assert name in str(info.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("function", [lambda x: longattn.attention(x, x, x), lambda x: longattn.apply_rope(x, Rope(8))])
def test_the_older_exporter(function: Any) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with pytest.raises(longattn.Unsupported, match="dynamo=True"):
        torch.onnx.export(Module(), (torch.randn(1, 2, 5, 8),), io.BytesIO(), dynamo=False)
