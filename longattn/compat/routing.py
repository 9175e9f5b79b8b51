"""PyTorch's scaled_dot_product_attention, routed through ours for as long as a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ContextDecorator
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from longattn.compat.errors import described
from longattn.compat.sdpa import scaled_dot_product_attention
from longattn.errors import InvalidInput, Unsupported


def _with_attention(attention: Callable[..., Any]) -> Callable[..., Any]:
    """torch.nn.functional.multi_head_attention_forward, but the attention that it calls is this one."""
    function = F.multi_head_attention_forward
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, "scaled_dot_product_attention": attention}
    del names["__name__"]  # torch.compile would look up names in the module that it names
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _ours_or_torchs(*args: Any, **kwargs: Any) -> Any:
    try:
        return scaled_dot_product_attention(*args, **kwargs)
    except Unsupported:
        return F.scaled_dot_product_attention(*args, **kwargs)


_FALLBACKS = {None: scaled_dot_product_attention, "torch": _ours_or_torchs}
_REPLACEMENTS = {
    fallback: {F.scaled_dot_product_attention: ours, F.multi_head_attention_forward: _with_attention(ours)}
    for fallback, ours in _FALLBACKS.items()
}


class use(TorchFunctionMode, ContextDecorator):
    """Within `with longattn.compat.use():`, or in a function decorated so, PyTorch's attention is ours.

    Every call of torch.nn.functional.scaled_dot_product_attention in this thread is routed, however it was imported,
    and with it torch.nn.MultiheadAttention (need_weights=False), torch.nn.Transformer's layers and Hugging Face models
    with attn_implementation="sdpa". PyTorch's fused inference paths of torch.nn.TransformerEncoderLayer and
    torch.nn.MultiheadAttention step aside. Blocks may be nested; other threads do not notice. It composes with
    torch.compile.

    Activation checkpointing computes attention again in the backward: run that within the block, too.

    Args:
        fallback: what becomes of a call that no backend of ours can run (see `compat.sdpa`): None raises Unsupported,
            "torch" lets PyTorch compute it.

    Raises:
        InvalidInput: another fallback.
    """

    def __init__(self, *, fallback: str | None = None) -> None:
        super().__init__()
        if fallback not in (None, "torch"):
            raise InvalidInput("fallback", "None or 'torch'", described(fallback))
        self.replacements = _REPLACEMENTS[fallback]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # A mode is off while it handles a call: what multi_head_attention_forward calls would not come here.
        return self.replacements.get(func, func)(*args, **(kwargs or {}))
