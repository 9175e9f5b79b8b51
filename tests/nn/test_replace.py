"""longattn.nn.replace_attention: what stays, what changes, and what is left alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longattn import InvalidInput, Rope
from longattn.nn import MultiheadAttention, replace_attention

pytestmark = pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")


class Model(nn.Module):
    """Two attentions, one of them used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.stack = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4), self.first])
        self.outside = [self.first]  # a reference that is no child module


def test_modules_stay_the_same_objects() -> None:
    model = Model().half().eval()
    model.first.in_proj_weight.requires_grad_(False)
    model.stack[0].train()
    hits: list[int] = []
    model.first.register_forward_hook(lambda *_: hits.append(1))
    modules, parameters = list(model.modules()), list(model.parameters())
    state = copy.deepcopy(model.state_dict())

    assert replace_attention(model) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(model.first) is type(model.stack[0]) is MultiheadAttention
    assert model.first is model.stack[1] is model.outside[0]
    assert not model.first.in_proj_weight.requires_grad and not model.first.training and model.stack[0].training
    assert model.first.in_proj_weight.dtype == torch.float16
    assert list(model.state_dict()) == list(state)
    model.float()
    model.first(*[torch.randn(1, 3, 8)] * 3)
    assert hits == [1]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"kdim": 4, "vdim": 4, "add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_a_root_module_is_replaced_itself(arguments: dict[str, Any], need_weights: bool) -> None:
    theirs = nn.MultiheadAttention(8, 2, **arguments).double()
    ours = replace_attention(copy.deepcopy(theirs))
    assert isinstance(ours, MultiheadAttention)
    query, key = torch.randn(3, 2, 8).double(), torch.randn(4, 2, theirs.kdim).double()
    found, expected = (module(query, key, key, need_weights=need_weights) for module in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is MultiheadAttention
    torch.testing.assert_close(again(query, key, key, need_weights=need_weights), found)


def test_options_go_to_every_module_once() -> None:
    model = Model()
    replace_attention(model.stack[0], window=2, sinks=1)
    replace_attention(model, rope=Rope(4))
    replace_attention(model, window=7)
    assert (model.stack[0].window, model.stack[0].sinks, model.stack[0].rope) == (2, 1, None)
    assert (model.first.window, model.first.sinks, model.first.rope) == (None, 0, Rope(4))


def test_nothing_is_replaced_if_one_module_cannot_be() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, add_zero_attn=True)])
    with pytest.raises(InvalidInput, match="window"):
        replace_attention(model, window=4)
    assert all(type(module) is nn.MultiheadAttention for module in model)


def test_only_modules_are_replaced() -> None:
    with pytest.raises(InvalidInput, match="model"):
        replace_attention([nn.MultiheadAttention(8, 2)])  # type: ignore[type-var]


def test_modules_with_a_forward_of_their_own_stay() -> None:
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args: Any, **keywords: Any) -> Any:
            return 2 * super().forward(*args, **keywords)[0]

    def forward(query: Tensor, *_: Any, **__: Any) -> Tensor:
        return query

    model = nn.ModuleDict({"subclass": Doubled(8, 2), "patched": nn.MultiheadAttention(8, 2)})
    model["patched"].forward = forward
    with pytest.warns(UserWarning) as caught:
        replace_attention(model)
    assert sorted(str(w.message).split()[0] for w in caught) == ["patched", "subclass"]
    assert type(model["subclass"]) is Doubled and type(model["patched"]) is nn.MultiheadAttention


def test_the_other_modules_are_untouched() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    other = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 1)
    replace_attention(encoder)
    assert not encoder.use_nested_tensor and encoder.enable_nested_tensor
    assert other.use_nested_tensor and type(other.layers[0].self_attn) is nn.MultiheadAttention
    plain = nn.Linear(2, 2)
    assert replace_attention(plain) is plain
