"""longattn.nn.replace_attention: what stays, what changes, and what is left alone."""

from __future__ import annotations

import copy
import pickle
import warnings
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
    model.first(*[torch.randn(1, 3, 8)] * 3, need_weights=True)
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


class Returns(nn.Module):
    """Passes need_weights on only where it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, **keywords)


def test_weights_can_be_left_out_where_nobody_asks_for_them() -> None:
    model, x = Returns(), torch.randn(2, 3, 8)
    out, weights = model(x)
    linear = replace_attention(copy.deepcopy(model), need_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, none = linear(x)
        assert none is None and linear(x, need_weights=False)[1] is None
        assert linear(x, need_weights=None)[1] is None
    torch.testing.assert_close(found, out)
    with pytest.warns(UserWarning, match="attention stays dense"):
        torch.testing.assert_close(linear(x, need_weights=True), (out, weights))
    again = pickle.loads(pickle.dumps(copy.deepcopy(linear)))
    assert again(x)[1] is None
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    assert compiled(x)[1] is None and compiled(x, need_weights=True)[1] is not None


def test_a_warning_names_what_stays_dense() -> None:
    model, x = replace_attention(Returns()), torch.randn(2, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(x, need_weights=True)[1] is not None and model(x, need_weights=False)[1] is None
        assert replace_attention(Returns(), True)(x)[1] is not None
    with pytest.warns(UserWarning, match="attention stays dense.*need_weights=False"):
        assert model(x)[1] is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert model(x)[1] is not None
    with pytest.warns(UserWarning, match="attention is longattn's already"):
        replace_attention(model, need_weights=False)
    with pytest.raises(InvalidInput, match="need_weights"):
        replace_attention(Returns(), need_weights=0)  # type: ignore[arg-type]


def test_packed_weights_are_told_of() -> None:
    for keywords in ({}, {"kdim": 4, "vdim": 4}, {"kdim": 8, "vdim": 8}):
        theirs = nn.MultiheadAttention(8, 2, **keywords)
        ours = replace_attention(copy.deepcopy(theirs))
        assert ours._qkv_same_embed_dim == theirs._qkv_same_embed_dim
        old = MultiheadAttention(8, 2, **keywords)
        old._qkv_same_embed_dim = False  # as files of version 0.1.0 have it
        old._forward_pre_hooks.clear()
        again = copy.deepcopy(old)
        assert again._qkv_same_embed_dim == theirs._qkv_same_embed_dim and len(again._forward_pre_hooks) == 1


def test_adapters_of_peft_work_on_it() -> None:
    peft = pytest.importorskip("peft")
    found = []
    for replaced in (False, True):
        torch.manual_seed(0)
        model = Returns().double().eval()
        if replaced:
            replace_attention(model, need_weights=False)
        config = peft.LoraConfig(target_modules=["attention"], r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 8)
        out = adapted(x)[0]
        out.square().sum().backward()
        with adapted.disable_adapter():
            plain = adapted(x)[0]
        assert not torch.equal(out, plain)
        grads = [weight.grad for weight in adapted.parameters() if weight.grad is not None]
        assert grads
        found.append((out, plain, *grads))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_bias_may_have_another_dtype(dtype: torch.dtype, need_weights: bool) -> None:
    module = MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    nn.init.normal_(module.out_proj.bias)
    expected_of = copy.deepcopy(module)
    for of in (module, module.out_proj):
        name = "in_proj_bias" if of is module else "bias"
        setattr(of, name, nn.Parameter(getattr(of, name).to(dtype)))
        getattr(expected_of if of is module else expected_of.out_proj, name).data.copy_(getattr(of, name))
    x, key = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    for inputs in ((x, x, x), (x, key, key)):
        found, expected = (m(*inputs, need_weights=need_weights)[0] for m in (module, expected_of))
        assert torch.equal(found, expected)
    found.sum().backward()
    assert module.in_proj_bias.grad is not None and module.in_proj_bias.grad.dtype == dtype
