"""longattn.nn.MultiheadAttention inside torch.nn's Transformer, whose fused inference paths must not pass it by."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longattn
from longattn import InvalidInput
from longattn.nn import MultiheadAttention, multihead, replace_attention

WIDTH, HEADS = 8, 2
BATCH, LENGTH, KEYS = 3, 5, 7
LAYER: dict[str, Any] = {
    "d_model": WIDTH,
    "nhead": HEADS,
    "dim_feedforward": 16,
    "dropout": 0.0,
    "dtype": torch.float64,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread(set_threads: Callable[[int], None]) -> None:
    set_threads(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every call of `longattn.attention` by the module. (A hook would refuse the fast path itself.)"""
    seen: list[dict[str, Any]] = []

    def spy(*tensors: Tensor, **keywords: Any) -> Any:
        seen.append(keywords)
        return longattn.attention(*tensors, **keywords)

    monkeypatch.setattr(multihead, "attention", spy)
    return seen


def masks() -> list[dict[str, Any]]:
    """The keywords of an encoder layer; each leaves every token something to see."""
    hidden = torch.arange(LENGTH) >= torch.tensor([[5], [1], [3]])
    pairs = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(2)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    return [
        {},
        {"src_key_padding_mask": hidden},
        {"src_mask": pairs},
        {"src_mask": pairs, "src_key_padding_mask": hidden},
        {"src_mask": causal, "is_causal": True},
        {"src_mask": causal, "is_causal": True, "src_key_padding_mask": hidden},
    ]


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, WIDTH, dtype=torch.float64)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, found: Tensor, expected: Tensor) -> None:
    dout = torch.randn_like(found)
    grads = [torch.autograd.grad(out, list(m.parameters()), dout) for out, m in ((found, ours), (expected, theirs))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer(training: bool, mode: Callable[[], Any], norm_first: bool, calls: list[dict[str, Any]]) -> None:
    theirs = nn.TransformerEncoderLayer(**LAYER, norm_first=norm_first, batch_first=True).train(training)
    ours = copy.deepcopy(theirs)
    ours.self_attn = MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = tokens()
    for number, keywords in enumerate(masks(), 1):
        with mode():
            found, expected = ours(x, **keywords), theirs(x, **keywords)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert len(calls) == number
            if found.requires_grad:
                assert_same_gradients(ours, theirs, found, expected)
    assert calls[-1]["causal"] and calls[-1]["bias"] is None and calls[-1]["key_mask"] is not None


@pytest.mark.parametrize("built", ["from a layer that has it", "replaced afterwards"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_encoder(training: bool, mode: Callable[[], Any], built: str, calls: list[dict[str, Any]]) -> None:
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH, dtype=torch.float64)).train(training)
    assert theirs.use_nested_tensor
    if built == "replaced afterwards":
        ours = replace_attention(copy.deepcopy(theirs))
    else:
        ours = nn.TransformerEncoder(replace_attention(layer), 2, norm=copy.deepcopy(theirs.norm)).train(training)
    assert all(type(layer.self_attn) is MultiheadAttention for layer in ours.layers)
    assert ours.load_state_dict(theirs.state_dict())
    x = tokens()
    for number, keywords in enumerate(masks(), 1):
        keywords = {name.removeprefix("src_") if name == "src_mask" else name: x for name, x in keywords.items()}
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch's, on its nested tensors
            found, expected = ours(x, **keywords), theirs(x, **keywords)
        kept = ~keywords.get("src_key_padding_mask", torch.zeros(BATCH, LENGTH, dtype=torch.bool))
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-11, atol=1e-11)  # PyTorch may blank padding
        assert len(calls) == 2 * number


@pytest.mark.parametrize("training", [True, False])
def test_decoder_layer(training: bool, calls: list[dict[str, Any]]) -> None:
    theirs = nn.TransformerDecoderLayer(**LAYER).train(training)  # length first
    ours = replace_attention(copy.deepcopy(theirs))
    x, memory = tokens().transpose(0, 1), tokens(KEYS).transpose(0, 1)
    keywords = {
        "tgt_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.arange(KEYS) >= torch.tensor([[7], [1], [3]]),
        "memory_mask": torch.randn(LENGTH, KEYS, dtype=torch.float64),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, on masks of two types
        found, expected = ours(x, memory, **keywords), theirs(x, memory, **keywords)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(ours, theirs, found, expected)
    assert [call["causal"] for call in calls] == [True, False]


@pytest.mark.parametrize("training", [True, False])
def test_transformer(training: bool, calls: list[dict[str, Any]]) -> None:
    theirs = nn.Transformer(
        WIDTH, HEADS, 2, 2, dim_feedforward=16, dropout=0.0, batch_first=True, dtype=torch.float64
    ).train(training)
    ours = replace_attention(copy.deepcopy(theirs))
    source, target = tokens(KEYS), tokens()
    hidden = torch.arange(KEYS) >= torch.tensor([[7], [1], [3]])
    keywords = {
        "tgt_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
        "src_key_padding_mask": hidden,
        "memory_key_padding_mask": hidden,
    }
    with torch.set_grad_enabled(training):
        found, expected = ours(source, target, **keywords), theirs(source, target, **keywords)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert len(calls) == 6  # 2 encoder layers, 2 decoder layers with two attentions each
    if training:
        assert_same_gradients(ours, theirs, found, expected)


def test_the_nested_tensors_of_an_encoder_are_read(calls: list[dict[str, Any]]) -> None:
    layer = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    theirs = copy.deepcopy(encoder)
    for part in encoder.layers:
        replace_attention(part)  # the encoder itself was not told
    x, hidden = tokens(), torch.arange(LENGTH) >= torch.tensor([[5], [1], [3]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, on its nested tensors
        found, expected = (model(x, src_key_padding_mask=hidden) for model in (encoder, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert len(calls) == 2 and (found[hidden] == 0).all()


def test_other_nested_tensors_are_refused_with_a_remedy() -> None:
    attention = replace_attention(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)])
    with pytest.raises(InvalidInput, match="enable_nested_tensor=False"):
        attention(x, x, x, need_weights=True)
