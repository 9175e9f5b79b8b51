"""longattn.nn.MultiheadAttention against torch.nn.MultiheadAttention, over the grid of arguments."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longattn
from longattn import InvalidInput, Rope
from longattn.nn import MultiheadAttention, multihead

WIDTH, HEADS = 8, 2
BATCH, LENGTH, KEYS = 3, 5, 7

pytestmark = [
    pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread(set_threads: Callable[[int], None]) -> None:
    set_threads(1)  # thousands of tiny calls: threads only wait for each other


def our_module(**arguments: Any) -> MultiheadAttention:
    """A module whose biases are not the 0 that they start at."""
    module = MultiheadAttention(**{"embed_dim": WIDTH, "num_heads": HEADS, "dtype": torch.float64, **arguments})
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return module


def pair(**arguments: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """PyTorch's module and ours with the same weights."""
    theirs = nn.MultiheadAttention(**{"embed_dim": WIDTH, "num_heads": HEADS, "dtype": torch.float64, **arguments})
    ours = our_module(**arguments)
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def inputs(kind: str, layout: str, kdim: int = WIDTH, vdim: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value; for "self" one tensor, for "memory" one tensor for key and value."""

    def random(length: int, width: int) -> Tensor:
        shape = {
            "batch first": (BATCH, length, width),
            "length first": (length, BATCH, width),
            "unbatched": (length, width),
        }
        return torch.randn(shape[layout], dtype=torch.float64).requires_grad_()

    query = random(LENGTH, WIDTH)
    if kind == "self":
        return query, query, query
    key = random(KEYS, kdim)
    return query, key, key if kind == "memory" else random(KEYS, vdim)


def attn_masks(length: int, keys: int, batch: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every form of attn_mask. Key 0 is visible to all, as PyTorch's weights of a row without keys are NaN."""
    hidden = torch.rand(batch * HEADS, length, keys) < 0.4
    hidden[..., 0] = False
    added = torch.randn(batch * HEADS, length, keys, dtype=torch.float64)
    causal = torch.ones(length, keys, dtype=torch.bool).triu(1)
    yield "none", {}
    yield "bool 2-D", {"attn_mask": hidden[0]}
    yield "float 2-D", {"attn_mask": added[0].clone().requires_grad_()}
    yield "bool 3-D", {"attn_mask": hidden}
    yield "float 3-D", {"attn_mask": added.masked_fill(hidden, -torch.inf)}
    yield "causal", {"attn_mask": causal, "is_causal": True}
    yield "float causal", {"attn_mask": torch.zeros_like(added[0]).masked_fill(causal, -torch.inf), "is_causal": True}


def key_padding_masks(keys: int, batch: int, batched: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    hidden = torch.arange(keys) >= torch.tensor([keys, 1, 3])[:batch, None]
    added = torch.randn(batch, keys, dtype=torch.float64)
    yield "none", {}
    for name, mask in (
        ("bool", hidden),
        ("float of a bool", torch.zeros_like(added).masked_fill(hidden, -torch.inf)),
        ("float", added.masked_fill(hidden, -torch.inf)),
        ("learned", torch.zeros_like(added, requires_grad=True)),
    ):
        yield name, {"key_padding_mask": mask if batched else mask[-1]}


def results(
    module: nn.MultiheadAttention, arguments: tuple[Tensor, ...], keywords: dict[str, Any]
) -> dict[str, Tensor]:
    """Outputs, and the gradients of everything that has one, under a fixed loss."""
    found = dict(zip(("out", "weights"), module(*arguments, **keywords), strict=True))
    found = {name: x for name, x in found.items() if x is not None}
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum() for x in found.values())
    wanted = dict(module.named_parameters())
    wanted |= {f"input {i}": x for i, x in enumerate(arguments)}
    wanted |= {name: x for name, x in keywords.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return found | {f"d {name}": x for name, x in zip(wanted, grads, strict=True) if x is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], case: str, tolerance: float = 1e-12) -> None:
    # A gradient that PyTorch leaves out and we give as zeros (or the reverse) is the same gradient.
    for name in ours.keys() | theirs.keys():
        some = ours.get(name, theirs.get(name))
        mine, other = (x.get(name, torch.zeros_like(some)) for x in (ours, theirs))
        assert mine.shape == other.shape and torch.allclose(mine, other, rtol=tolerance, atol=tolerance), (
            f"{case}: {name}: {tuple(mine.shape)} and {tuple(other.shape)}, {mine} and {other}"
        )


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 4}, {"vdim": 4}], ids=["packed", "kdim vdim", "vdim"])
@pytest.mark.parametrize("add_bias_kv", [False, True], ids=["", "bias_kv"])
@pytest.mark.parametrize("add_zero_attn", [False, True], ids=["", "zero_attn"])
@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
def test_agrees_over_the_grid(layout: str, add_zero_attn: bool, add_bias_kv: bool, widths: dict[str, int]) -> None:
    theirs, ours = pair(
        add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=layout == "batch first", **widths
    )
    batch = 1 if layout == "unbatched" else BATCH
    chosen = random.Random(f"{layout} {add_zero_attn} {add_bias_kv} {widths}")  # a third of the combinations
    for kind in ("separate",) if widths else ("self", "memory", "separate"):
        arguments = inputs(kind, layout, **{"kdim": WIDTH, "vdim": WIDTH, **widths})
        keys = LENGTH if kind == "self" else KEYS
        grid = itertools.product(
            attn_masks(LENGTH, keys, batch), key_padding_masks(keys, batch, layout != "unbatched"), (True, False)
        )
        for (mask, masking), (padding, hiding), need_weights in itertools.islice(grid, chosen.randrange(3), None, 3):
            keywords = {**masking, **hiding, "need_weights": need_weights, "average_attn_weights": False}
            case = f"{kind}, attn_mask {mask}, key_padding_mask {padding}, need_weights {need_weights}"
            assert_same(results(ours, arguments, keywords), results(theirs, arguments, keywords), case)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 4}], ids=["packed", "kdim vdim"])
def test_agrees_without_bias(widths: dict[str, int], need_weights: bool) -> None:
    theirs, ours = pair(bias=False, **widths)
    assert ours.in_proj_bias is None and ours.out_proj.bias is None
    arguments = inputs("separate", "length first", **{"kdim": WIDTH, "vdim": WIDTH, **widths})
    keywords = {"need_weights": need_weights}
    assert_same(results(ours, arguments, keywords), results(theirs, arguments, keywords), "bias False")


@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
@pytest.mark.parametrize("average", [True, False])
def test_weights_have_the_same_shape(layout: str, average: bool) -> None:
    theirs, ours = pair(batch_first=layout == "batch first")
    arguments = inputs("separate", layout)
    for module_defaults in ({}, {"need_weights": True}):
        keywords = {"average_attn_weights": average, **module_defaults}
        assert_same(results(ours, arguments, keywords), results(theirs, arguments, keywords), layout)


@pytest.mark.parametrize("need_weights", [True, False])
def test_agrees_with_the_fused_inference_path(need_weights: bool) -> None:
    theirs, ours = pair(batch_first=True)
    x = inputs("self", "batch first")[0].detach()
    hidden = torch.arange(LENGTH) >= torch.tensor([[5], [1], [3]])
    for keywords in ({}, {"key_padding_mask": hidden}):
        with torch.inference_mode():
            found = ours.eval()(x, x, x, need_weights=need_weights, **keywords)
            expected = theirs.eval()(x, x, x, need_weights=need_weights, **keywords)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_agrees_in_lower_precision(dtype: torch.dtype, need_weights: bool) -> None:
    theirs, ours = (module.to(dtype) for module in pair(batch_first=True))
    x = torch.randn(2, 33, WIDTH, dtype=dtype)
    hidden = torch.arange(33) >= torch.tensor([[33], [20]])
    keywords = {"key_padding_mask": hidden, "need_weights": need_weights}
    tolerance = 16 * torch.finfo(dtype).eps
    found, expected = (module(x, x, x, **keywords) for module in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("need_weights", [True, False])
def test_runs_under_autocast(need_weights: bool) -> None:
    theirs, ours = (module.float() for module in pair(add_bias_kv=True))
    x = torch.randn(LENGTH, BATCH, WIDTH)
    mask = torch.randn(LENGTH, LENGTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (module(x, x, x, attn_mask=mask, need_weights=need_weights) for module in (ours, theirs))
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("length", "keys", "batch"), [(0, 3, 2), (3, 0, 2), (3, 3, 0)])
def test_empty_inputs(length: int, keys: int, batch: int, need_weights: bool) -> None:
    theirs, ours = pair()
    query, key = (torch.randn(n, batch, WIDTH, dtype=torch.float64) for n in (length, keys))
    found, expected = (module(query, key, key, need_weights=need_weights) for module in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_sees_nothing_gives_zeros(need_weights: bool) -> None:
    ours = our_module(batch_first=True)
    x = inputs("self", "batch first")[0]
    hidden = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    hidden[1] = True
    out, weights = ours(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
    assert torch.equal(out[1], ours.out_proj.bias.expand(LENGTH, WIDTH))
    assert weights is None or not weights[1].any()
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert grad.isfinite().all() and not grad[1].any()


def test_causal_needs_no_mask() -> None:
    theirs, ours = pair(batch_first=True)
    mask = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
    arguments = inputs("separate", "batch first")
    for need_weights in (True, False):
        keywords: dict[str, Any] = {"is_causal": True, "need_weights": need_weights}
        expected = results(theirs, arguments, {**keywords, "attn_mask": mask})
        assert_same(results(ours, arguments, keywords), expected, "causal without attn_mask")


class Spy:
    """Stands for `longattn.attention` inside the module, and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(multihead, "attention", self)

    def __call__(self, *tensors: Tensor, **keywords: Any) -> Any:
        self.calls.append(keywords)
        return longattn.attention(*tensors, **keywords)


def test_structure_is_not_materialized(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    ours = our_module(batch_first=True)
    x = inputs("self", "batch first")[0]
    hidden = torch.arange(LENGTH) >= torch.tensor([[5], [1], [3]])
    for mask in (hidden, torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)):
        ours(x, x, x, key_padding_mask=mask, attn_mask=torch.ones(5, 5).triu(1) > 0, is_causal=True, need_weights=False)
        call = spy.calls.pop()
        assert call["causal"] and call["align"] == "start" and call["bias"] is None
        assert torch.equal(call["key_mask"], ~hidden)
    hidden_pairs = torch.rand(LENGTH, LENGTH) < 0.5
    ours(x, x, x, attn_mask=hidden_pairs, need_weights=False)
    assert spy.calls[0]["bias"].shape == (LENGTH, LENGTH) and spy.calls[0]["key_mask"] is None


@pytest.mark.parametrize("options", [{"window": 2, "sinks": 1}, {"window": (3, 1)}, {"rope": Rope(4)}], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_options_mean_the_same_with_and_without_weights(options: dict[str, Any], is_causal: bool) -> None:
    ours = our_module(**options)
    for kind, keys in (("self", LENGTH), ("separate", KEYS)):
        arguments = inputs(kind, "length first")
        hidden = torch.arange(keys) >= torch.tensor([[keys], [1], [3]])
        keywords = {"is_causal": is_causal, "key_padding_mask": hidden}
        dense, linear = (ours(*arguments, need_weights=need, **keywords)[0] for need in (True, False))
        torch.testing.assert_close(dense, linear, rtol=1e-12, atol=1e-12)


def test_window_equals_its_mask() -> None:
    ours = our_module(window=2, sinks=1)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    arguments = inputs("self", "length first")
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    hidden = ~(((i - j).abs() < 2) | ((j < 1) & (j <= i + 1)))
    keywords = {"need_weights": False}
    assert_same(
        results(ours, arguments, keywords), results(theirs, arguments, {**keywords, "attn_mask": hidden}), "window"
    )


def test_rope_turns_queries_and_keys() -> None:
    rope = Rope(4)
    ours = our_module(rope=rope, batch_first=True)
    x = inputs("self", "batch first")[0]
    q, k, v = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part in nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias).chunk(3, -1)
    )
    q, k = (rope.rotate(part, torch.arange(LENGTH)) for part in (q, k))
    expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], ours.out_proj(expected), rtol=1e-12, atol=1e-12)


def test_dropout_with_weights_draws_as_pytorch() -> None:
    theirs, ours = pair(dropout=0.4)
    arguments = inputs("separate", "length first")
    found = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        found.append(results(module, arguments, {"average_attn_weights": False}))
    assert_same(*found, "dropout")
    assert (found[0]["weights"] == 0).any()


def test_dropout_without_weights_has_the_same_moments() -> None:
    theirs, ours = pair(dropout=0.25, batch_first=True)
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64).expand(8192, -1, -1)
    found, expected = (module(x, x, x, need_weights=False)[0].detach() for module in (ours, theirs))
    noise = expected.std(0) / 8192**0.5
    assert ((found.mean(0) - expected.mean(0)).abs() < 8 * noise).all()
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.1, atol=0.0)
    ours.eval()
    torch.testing.assert_close(ours(x[:1], x[:1], x[:1], need_weights=False)[0][0], found.mean(0), rtol=0.0, atol=0.05)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 6, "vdim": 4, "add_bias_kv": True}, {"bias": False}], ids=str)
def test_state_dict_and_initialisation_are_pytorchs(arguments: dict[str, Any]) -> None:
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **arguments)
    torch.manual_seed(5)
    ours = MultiheadAttention(WIDTH, HEADS, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, other)

    torch.manual_seed(6)
    ours._reset_parameters()
    torch.manual_seed(6)
    theirs._reset_parameters()
    assert torch.equal(next(ours.parameters()), next(theirs.parameters()))

    fresh = MultiheadAttention(WIDTH, HEADS, **arguments)
    fresh.load_state_dict(theirs.state_dict())
    back = nn.MultiheadAttention(WIDTH, HEADS, **arguments)
    back.load_state_dict(fresh.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), theirs.parameters(), strict=True))


def test_signature_extends_pytorchs() -> None:
    for method in ("__init__", "forward"):
        ours, theirs = (
            list(inspect.signature(getattr(cls, method)).parameters.values())
            for cls in (MultiheadAttention, nn.MultiheadAttention)
        )
        assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
            (p.name, p.default, p.kind) for p in theirs
        ]
        assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_copies_and_pickles() -> None:
    ours = our_module(window=3, sinks=1, rope=Rope(4))
    x = inputs("self", "length first")[0]
    expected = ours(x, x, x, need_weights=False)[0]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert (other.window, other.sinks, other.rope) == (3, 1, Rope(4))
        assert torch.equal(other(x, x, x, need_weights=False)[0], expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_to_one_graph(need_weights: bool) -> None:
    ours = our_module(batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = inputs("self", "batch first")[0]
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.float64)
    mask[:, 3:] = -torch.inf
    found, expected = (
        module(x, x, x, key_padding_mask=mask, need_weights=need_weights)[0] for module in (compiled, ours)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)))


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("embed_dim", {"embed_dim": 7}),
        ("embed_dim", {"embed_dim": 0}),
        ("num_heads", {"num_heads": 0}),
        ("num_heads", {"num_heads": 2.0}),
        ("kdim", {"kdim": 0}),
        ("vdim", {"vdim": 2.0}),
        ("dropout", {"dropout": 1.5}),
        ("dropout", {"dropout": 1.0}),
        ("window", {"window": 0}),
        ("window", {"window": (-2, 0)}),
        ("sinks", {"sinks": -1}),
        ("rope", {"rope": Rope(6)}),
        ("rope", {"rope": 4}),
        ("window", {"window": 3, "add_bias_kv": True}),
        ("rope", {"rope": Rope(4), "add_zero_attn": True}),
    ],
    ids=str,
)
def test_bad_constructor_arguments(argument: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as error:
        MultiheadAttention(**{"embed_dim": WIDTH, "num_heads": HEADS, **arguments})
    assert error.value.argument == argument


def _ragged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)], layout=torch.jagged)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("query", {"query": torch.randn(WIDTH)}),
        ("query", {"query": torch.randn(BATCH, LENGTH, WIDTH + 1)}),
        ("query", {"query": _ragged()}),
        ("query", {"query": None}),
        ("key", {"key": torch.randn(KEYS, WIDTH)}),
        ("key", {"key": torch.randn(BATCH + 1, KEYS, WIDTH), "value": torch.randn(BATCH + 1, KEYS, WIDTH)}),
        ("value", {"value": torch.randn(BATCH, KEYS - 1, WIDTH)}),
        ("value", {"value": torch.randn(BATCH, KEYS, WIDTH - 1)}),
        ("attn_mask", {"attn_mask": torch.zeros(LENGTH, KEYS + 1)}),
        ("attn_mask", {"attn_mask": torch.zeros(BATCH, LENGTH, KEYS)}),
        ("attn_mask", {"attn_mask": torch.zeros(LENGTH, KEYS, dtype=torch.int64)}),
        ("attn_mask", {"attn_mask": [[False] * KEYS] * LENGTH}),
        ("attn_mask", {"attn_mask": _ragged()}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(KEYS)}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(BATCH, LENGTH)}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(BATCH, KEYS, dtype=torch.uint8)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs(argument: str, change: dict[str, Any], need_weights: bool) -> None:
    ours = MultiheadAttention(WIDTH, HEADS, batch_first=True)
    call = {"query": torch.randn(BATCH, LENGTH, WIDTH), "key": torch.randn(BATCH, KEYS, WIDTH)}
    call["value"] = torch.randn(BATCH, KEYS, WIDTH)
    with pytest.raises(InvalidInput) as error:
        ours(**{**call, **change}, need_weights=need_weights)
    assert error.value.argument == argument


def test_causal_does_not_say_who_sees_appended_keys() -> None:
    ours = MultiheadAttention(WIDTH, HEADS, add_zero_attn=True)
    x = torch.randn(LENGTH, BATCH, WIDTH)
    with pytest.raises(InvalidInput, match="attn_mask"):
        ours(x, x, x, is_causal=True, need_weights=False)
