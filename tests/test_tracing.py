"""torch.fx.symbolic_trace: our functions and modules are nodes of the graph, and the graph computes the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import longattn
from longattn import Rope, scaling
from longattn.models import Decoder, MaskedLM, TransformerConfig, build, chunked_cross_entropy, mean_pool

pytestmark = pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


class Of(Call):
    """The same, of one argument: torch.fx cannot trace a starred one."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.function(x)


def scaled_rope() -> Rope:
    return Rope(4, 500.0, scaling.Linear(4.0), interleaved=True)


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "attention": lambda q: longattn.attention(q, q, q, causal=True, window=3, scale=q.shape[-1] ** -0.5),
    "with lse": lambda q: longattn.attention(q, q, q, return_lse=True)[1],
    "by keyword": lambda q: longattn.attention(q=q, k=q, v=q),
    "rope": lambda q: longattn.attention(q, q, q, rope=scaled_rope(), causal=True),
    "a bias that is traced": lambda q: longattn.attention(torch.ones(1, 2, 5, 8), q, q, bias=q @ q.mT),
    "apply_rope": lambda q: longattn.apply_rope(q, scaled_rope()),
    "merge": lambda q: longattn.merge_attention([q, 2 * q], [q[..., 0], q[..., 1]])[0],
    "rows": lambda q: longattn.attention_rows(q, q, [0, -1], causal=True),
    "stats": lambda q: longattn.attention_stats(q, q, longattn.attention(q, q, q, return_lse=True)[1])[0],
    "varlen": lambda q: longattn.attention_varlen(
        q[0].transpose(0, 1), q[0].transpose(0, 1), q[0].transpose(0, 1), torch.tensor([0, 2, 5]).int(),
        torch.tensor([0, 2, 5]).int(), 3, 3,
    ),
    "sdpa": lambda q: longattn.compat.sdpa.scaled_dot_product_attention(q, q, q, is_causal=True),
    "flash_attn": lambda q: longattn.compat.flash_attn.flash_attn_func(q.mT, q.mT, q.mT, causal=True),
    "mean_pool": lambda q: mean_pool(q[0]),
    "cross-entropy": lambda q: chunked_cross_entropy(q[0], torch.ones(3, 8), q[0, :, :, 0].long() * 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_nodes(name: str) -> None:
    module = Of(FUNCTIONS[name])
    traced = fx.symbolic_trace(module)
    x = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert any(getattr(target, "__module__", "").startswith("longattn") for target in targets)


def test_a_trace_within_use_calls_longattn() -> None:
    module = Of(lambda q: F.scaled_dot_product_attention(q, q, q))
    with longattn.compat.use():
        traced = fx.symbolic_trace(module)
    x = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(traced(x), module(x))


class Block(nn.Module):
    """As torchvision's vision transformer calls its attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + y


class NodePathTracer(fx.Tracer):
    """Keeps the path of the module that each node belongs to, as feature extractors do, and the default leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""
        self.paths: dict[str, str] = {}

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before, self.current = self.current, self.path_of_module(m)
        try:
            if self.is_leaf_module(m, self.current):
                return self.create_proxy("call_module", self.current, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.current = before

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        self.paths[proxy.node.name] = self.current
        return proxy


@pytest.mark.parametrize("tracer", [fx.Tracer, NodePathTracer])
@pytest.mark.parametrize("rope", [None, scaled_rope()])
def test_replaced_modules_are_leaves(tracer: type[fx.Tracer], rope: Rope | None) -> None:
    model = nn.Sequential(*[Block(nn.MultiheadAttention(32, 2, batch_first=True)) for _ in range(2)])
    longattn.nn.replace_attention(model, rope=rope)
    traced = tracer()
    graph = fx.GraphModule(model, traced.trace(model))
    x = torch.randn(2, 5, 32)
    assert torch.equal(graph(x), model(x))
    leaves = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert [name for name in leaves if name.endswith("attention")] == ["0.attention", "1.attention"]
    if isinstance(traced, NodePathTracer):
        assert {"0.attention", "1.attention"} <= set(traced.paths.values())


CONFIGS = [
    TransformerConfig.style(style, vocab_size=20, dim=16, layers=2, heads=2, max_length=32)
    for style in ("llama", "gpt2", "bert", "modern-encoder")
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_models_are_leaves(config: TransformerConfig) -> None:
    model: Any = nn.Sequential(build(config), nn.Identity()).eval()
    traced = fx.symbolic_trace(model)
    tokens = torch.randint(0, 20, (2, 7))
    assert torch.equal(traced(tokens), model(tokens))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]


def test_modules_with_keywords_are_leaves() -> None:
    layer = longattn.nn.Attention(16, 2, rope=Rope(8), window=4)
    head = MaskedLM(CONFIGS[2]).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.head = head

        def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x=x, key_mask=mask), self.head(tokens, key_mask=mask)

    model = Model()
    inputs = torch.randn(2, 5, 16), torch.randint(0, 20, (2, 5)), torch.rand(2, 5) < 0.8
    torch.testing.assert_close(fx.symbolic_trace(model)(*inputs), model(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_is_traced_through_as_the_root(tied: bool) -> None:
    model = Decoder(TransformerConfig(vocab_size=20, dim=16, layers=2, heads=2, max_length=32, tie_embeddings=tied))
    without = dict.fromkeys(["key_mask", "cu_seqlens", "caches", "lengths", "sequences", "tree"])
    traced = fx.symbolic_trace(model, concrete_args=without)
    tokens = torch.randint(0, 20, (2, 7))
    assert torch.equal(traced(tokens), model(tokens))
    assert "blocks.1" in [node.target for node in traced.graph.nodes]


def test_signatures_stay() -> None:
    assert list(inspect.signature(longattn.apply_rope).parameters) == ["x", "rope", "positions", "backend"]
    assert list(inspect.signature(longattn.nn.Attention.forward).parameters)[:3] == ["self", "x", "context"]
