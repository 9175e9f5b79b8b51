"""torch.nn.MultiheadAttention with the same parameters and results, in memory linear in the sequence length."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.init import constant_, xavier_normal_, xavier_uniform_
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from longattn.arguments import Window
from longattn.errors import InvalidInput
from longattn.functional import attention
from longattn.mask import Mask
from longattn.nn.checks import check_dropout, check_positive_int, check_structure
from longattn.problem import readable
from longattn.rope import Rope
from longattn.tracing import leaf_module

# The default of need_weights: PyTorch's True by value, and by its type not what a caller passes.
_NOT_PASSED: Any = 1


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for torch.nn.MultiheadAttention: its arguments, initial weights for a seed, state_dict, and results.

    With need_weights=False, memory is linear in the lengths: a bool key_padding_mask and is_causal are never expanded.
    need_weights=True, PyTorch's default, returns dense weights and costs what they cost. What differs from PyTorch:

    - A query that sees no key gives zeros (then out_proj.bias), where PyTorch may give NaN.
    - is_causal=True needs no attn_mask. With one, it is the promise that attn_mask is the causal mask, as in PyTorch.
    - Inference runs this forward, too: a hook that does nothing keeps torch.nn.TransformerEncoderLayer from its fused
      path, which would read the weights and pass the module by. A nested tensor is accepted in the one case that
      torch.nn.TransformerEncoder makes: self-attention of a batch first, without masks or weights.
    - Bad arguments are InvalidInput (a ValueError), where PyTorch has AssertionError and RuntimeError.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            torch.nn.MultiheadAttention; dropout below 1.
        window, sinks: as in `longattn.attention`, query i standing at key i. A window looks to both sides unless
            is_causal. Beside attn_mask and key_padding_mask, a key must be visible to all of them.
        rope: rotates queries and keys of every head by their places in the sequence.

    Raises:
        InvalidInput: sizes that do not fit each other; window or rope with add_bias_kv or add_zero_attn, whose keys
            stand at no position.
    """

    window: Window
    sinks: int
    rope: Rope | None
    weights_by_default: bool = True  # what a call that does not pass need_weights returns
    _warns_as: str | None = None  # the name to warn under at the next call that makes dense weights

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        window: Window = None,
        sinks: int = 0,
        rope: Rope | None = None,
    ) -> None:
        check_positive_int("embed_dim", embed_dim)
        check_positive_int("num_heads", num_heads)
        if embed_dim % num_heads:
            raise InvalidInput("embed_dim", f"a multiple of num_heads {num_heads}", embed_dim)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                check_positive_int(name, width)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        check_options(self, window, sinks, rope)
        self._set_options(window, sinks, rope)

    def _set_options(self, window: Window, sinks: int, rope: Rope | None) -> None:
        self.window = window
        self.sinks = sinks
        self.rope = rope
        self._stay_on_forward()

    def _stay_on_forward(self) -> None:
        """Keep torch.nn.TransformerEncoderLayer from its fused path, which bypasses forward: it looks for hooks."""
        if _do_nothing not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(_do_nothing)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._qkv_same_embed_dim = self.in_proj_weight is not None  # False in files of version 0.1.0
        self._stay_on_forward()

    def _reset_parameters(self) -> None:
        """torch.nn.MultiheadAttention's initialisation, draw for draw."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            constant_(self.in_proj_bias, 0.0)
            constant_(self.out_proj.bias, 0.0)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                xavier_normal_(row)

    @leaf_module
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = _NOT_PASSED,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value, as torch.nn.MultiheadAttention does.

        Args:
            query: [L, B, embed_dim], [B, L, embed_dim] if batch_first, or unbatched [L, embed_dim].
            key, value: [S, B, kdim] and [S, B, vdim], or in the layout of query.
            key_padding_mask: [B, S] ([S] if unbatched), bool (True = hidden) or floating (added to the scores).
            need_weights: return the weights, a dense matrix. False: return None in their place, in linear memory. True
                by default, as in PyTorch, unless `replace_attention(..., need_weights=False)` made the module.
            attn_mask: [L, S] or [B * num_heads, L, S], bool (True = hidden) or floating (added to the scores).
            average_attn_weights: the mean of the weights over the heads.
            is_causal: query i sees keys 0..i. Takes the place of attn_mask where PyTorch lets it.

        Returns:
            out, laid out as query, and None or the weights: [B, L, S] averaged, [B, num_heads, L, S] if not; without B
            if unbatched. They include dropout, and as last columns the keys of add_bias_kv and add_zero_attn.

        Raises:
            InvalidInput: a tensor whose shape, dtype or layout does not fit.
        """
        if type(need_weights) is not bool:
            need_weights = self.weights_by_default if need_weights is _NOT_PASSED else bool(need_weights)
            unasked = need_weights
        else:
            unasked = need_weights and not self.weights_by_default
        if unasked and self._warns_as is not None and not torch.compiler.is_compiling():
            self._warn_of_weights()
        if isinstance(query, Tensor) and query.is_nested and query is key and key is value:
            plain = self.batch_first and not need_weights and key_padding_mask is None and attn_mask is None
            if plain and query.layout == torch.strided and not torch.is_grad_enabled():
                return self._attend_nested(query, is_causal), None
        batched = self._check_inputs(query, key, value, key_padding_mask, attn_mask)
        appends = self.bias_k is not None or self.add_zero_attn
        if is_causal and attn_mask is None and appends:
            raise InvalidInput("attn_mask", "the causal mask beside is_causal, add_bias_kv and add_zero_attn", None)
        # PyTorch lets the hint take the mask's place but where it returns weights or merges both masks. For a true hint
        # the merged mask says the same, save that it shows the appended keys to every query.
        merges = appends and key_padding_mask is not None
        causal = bool(is_causal and (attn_mask is None or not (need_weights or merges)))
        if causal:
            attn_mask = None
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]

        q, k, v = (self._split_heads(x, batched) for x in self._project(query, key, value))
        if appends:
            added = int(self.bias_k is not None) + int(self.add_zero_attn)
            k, v = self._append_keys(k, self.bias_k), self._append_keys(v, self.bias_v)
            attn_mask, key_padding_mask = (
                None if mask is None else F.pad(mask, (0, added)) for mask in (attn_mask, key_padding_mask)
            )
        bias, key_mask = _in_our_terms(attn_mask, key_padding_mask, self.num_heads)
        dropout_p = self.dropout if self.training else 0.0

        if not need_weights:
            out = attention(
                q,
                k,
                v,
                causal=causal,
                window=self.window,
                sinks=self.sinks,
                align="start",
                key_mask=key_mask,
                bias=bias,
                rope=self.rope,
                dropout_p=dropout_p,
            )
            assert isinstance(out, Tensor)
            return self._project_out(self._join_heads(out, batched)), None

        if self.rope is not None:
            q, k = (self.rope.rotate(x, torch.arange(x.shape[2], device=x.device), k.shape[2]) for x in (q, k))
        mask = Mask.from_window(causal=causal, window=self.window, sinks=self.sinks, align="start")
        out, weights = _dense_attention(q, k, v, mask, key_mask, bias, dropout_p)
        if average_attn_weights:
            weights = weights.mean(1)
        return self._project_out(self._join_heads(out, batched)), weights if batched else weights[0]

    def _warn_of_weights(self) -> None:
        """Warn, once, that a call of a replaced module makes the weights although nobody is known to want them."""
        name, self._warns_as = self._warns_as, None
        remedy = "pass need_weights=False to the call" + (" or to replace_attention" if self.weights_by_default else "")
        text = f"{name} stays dense: it returns a matrix of weights, queries x keys ({remedy} where it is not used)"
        warnings.warn(text, stacklevel=3)

    def _attend_nested(self, x: Tensor, is_causal: bool) -> Tensor:
        """Self-attention of sequences of different lengths, a nested tensor as torch.nn.TransformerEncoder makes it."""
        lengths = [len(sequence) for sequence in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        hidden = torch.arange(padded.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        out, _ = self.forward(padded, padded, padded, hidden, False, is_causal=is_causal)
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(out, lengths, strict=True)])

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, window={self.window}, sinks={self.sinks}, rope={self.rope}"

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each [..., embed_dim]; one product if all three come from one tensor."""
        weight: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if bias is not None and bias.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            bias = bias.to(query.dtype)
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights: Any = separate if weight is None else weight.chunk(3)
        biases: Any = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(*terms) for terms in zip((query, key, value), weights, biases, strict=True))

    def _project_out(self, x: Tensor) -> Tensor:
        bias = self.out_proj.bias if type(self.out_proj) is NonDynamicallyQuantizableLinear else None
        if bias is None or bias.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return self.out_proj(x)
        return F.linear(x, self.out_proj.weight, bias.to(x.dtype))

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        """[..., embed_dim] in the caller's layout -> [B, num_heads, N, head_dim], a view."""
        x = x.unflatten(-1, (-1, self.head_dim))
        if not batched:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.transpose(1, 2)

    def _join_heads(self, x: Tensor, batched: bool) -> Tensor:
        """The inverse of `_split_heads`; a view of what `attention` returns, which lies in memory as q did."""
        x = x.transpose(1, 2)
        if not batched:
            x = x[0]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.flatten(-2)

    def _append_keys(self, x: Tensor, row: Tensor | None) -> Tensor:
        """k or v [B, num_heads, S, head_dim] with the learned row, then with zeros, as the module has them."""
        if row is not None:
            row = row.view(1, self.num_heads, 1, self.head_dim).expand(x.shape[0], -1, -1, -1)
            x = torch.cat((x, row.to(x.dtype)), 2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _check_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> bool:
        """Whether the inputs are batched, or InvalidInput where they do not fit the module or each other."""
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if not isinstance(x, Tensor) or x.is_nested:
                remedy = "pad nested ones, and make torch.nn.TransformerEncoder with enable_nested_tensor=False"
                raise InvalidInput(
                    name, f"a dense tensor ({remedy})", "a nested tensor" if isinstance(x, Tensor) else type(x).__name__
                )
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                ranks = "2 (unbatched) or 3" if x is query else f"{query.dim()}, as query has,"
                raise InvalidInput(name, f"{ranks} dimensions, the last of size {width}", f"shape {tuple(x.shape)}")
        batched = query.dim() == 3
        batch_at, length_at = (0, 1) if self.batch_first or not batched else (1, 0)
        batch = query.shape[batch_at] if batched else 1
        length, keys = (x.shape[length_at if batched else 0] for x in (query, key))
        if batched and key.shape[batch_at] != batch:
            raise InvalidInput("key", f"{batch} sequences as in query", f"shape {tuple(key.shape)}")
        if value.shape[:-1] != key.shape[:-1]:
            expected = f"key's length and batch size, as in {tuple(key.shape)}"
            raise InvalidInput("value", expected, f"shape {tuple(value.shape)}")
        _check_mask("key_padding_mask", key_padding_mask, ((batch, keys) if batched else (keys,),))
        _check_mask("attn_mask", attn_mask, ((length, keys), (batch * self.num_heads, length, keys)))
        return batched


def _do_nothing(module: torch.nn.Module, args: Any) -> None:
    """Be a hook."""


def check_options(module: torch.nn.MultiheadAttention, window: Window, sinks: int, rope: Rope | None) -> None:
    """Raise InvalidInput unless a module of these sizes can run with these options."""
    check_dropout(module.dropout)
    check_structure(window, sinks, rope, module.head_dim)
    if module.bias_k is not None or module.add_zero_attn:
        for name, value in (("window", window), ("rope", rope)):
            if value is not None:
                raise InvalidInput(name, "None with add_bias_kv or add_zero_attn (keys without a position)", value)


def _check_mask(name: str, mask: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.is_nested:
        got = "a nested tensor" if isinstance(mask, Tensor) else type(mask).__name__
    elif (mask.dtype == torch.bool or mask.is_floating_point()) and tuple(mask.shape) in shapes:
        return
    else:
        got = f"{str(mask.dtype)[6:]} of shape {tuple(mask.shape)}"
    raise InvalidInput(name, f"a bool or floating tensor {' or '.join(str(list(shape)) for shape in shapes)}", got)


def _in_our_terms(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """(bias, key_mask) of `longattn.attention` for PyTorch's masks [L, S] or [B * heads, L, S], and [B, S]."""
    bias = attn_mask
    if bias is not None and bias.dim() == 3:
        bias = bias.unflatten(0, (-1, heads))
    if bias is not None and bias.dtype == torch.bool:
        bias = ~bias
    if key_padding_mask is None:
        return bias, None
    if key_padding_mask.dtype == torch.bool:
        return bias, ~key_padding_mask
    if _only_hides(key_padding_mask):
        return bias, key_padding_mask == 0
    key_bias = key_padding_mask[:, None, None, :]
    if bias is None:
        return key_bias, None
    return torch.where(bias, key_bias, -torch.inf) if bias.dtype == torch.bool else bias + key_bias, None


def _only_hides(mask: Tensor) -> bool:
    """Whether a floating mask holds only 0 and -inf, as what torch.nn.Transformer makes of a bool mask does.

    A hidden key costs nothing, a bias is added to every score. Not asked where to read the values would break the graph
    or wait for the device, nor of a mask that learns.
    """
    if mask.device.type != "cpu" or mask.requires_grad or not readable(mask):
        return False
    return bool(((mask == 0) | (mask == -torch.inf)).all())


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, key_mask: Tensor | None, bias: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(out, weights [B, H, L, S]): the weights in full, for those who ask for them; a row that sees nothing is 0."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
    if mask.left is None and mask.right is None and key_mask is None and bias is None:
        weights = torch.softmax(scores, -1)
    else:
        visible = mask.materialize(q.shape[2], k.shape[2], key_mask=key_mask, device=q.device)[:, None]
        if bias is not None and bias.dtype == torch.bool:
            visible = visible & bias
        elif bias is not None:
            scores = scores + bias.to(scores.dtype)
        scores = scores.masked_fill(~visible, -torch.inf)
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    weights = F.dropout(weights, dropout_p)
    return weights.to(v.dtype) @ v, weights
