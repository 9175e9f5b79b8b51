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


def _rebound(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """The same function, but these global names mean something else in it."""
    assert isinstance(function, FunctionType)
    scope = {**function.__globals__, **names}
    del scope["__name__"]  # torch.compile would look up names in the module that it names
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _ours_or_torchs(*args: Any, **kwargs: Any) -> Any:
    try:
        return scaled_dot_product_attention(*args, **kwargs)
    except Unsupported:
        return F.scaled_dot_product_attention(*args, **kwargs)


# A mode is off while it handles a call: what multi_head_attention_forward calls would not come here.
_REPLACEMENTS = {
    fallback: {
        F.scaled_dot_product_attention: ours,
        F.multi_head_attention_forward: _rebound(F.multi_head_attention_forward, scaled_dot_product_attention=ours),
    }
    for fallback, ours in ((None, scaled_dot_product_attention), ("torch", _ours_or_torchs))
}


class use(TorchFunctionMode, ContextDecorator):
    """Within `with longattn.compat.use():`, or in a function decorated so, PyTorch's attention is ours.

    Every call of torch.nn.functional.scaled_dot_product_attention in this thread is routed, however it was imported,
    and with it torch.nn.MultiheadAttention (need_weights=False), torch.nn.Transformer's layers and Hugging Face models
    with attn_implementation="sdpa". PyTorch's fused inference paths of torch.nn.TransformerEncoderLayer and
    torch.nn.MultiheadAttention step aside. Blocks may be nested; other threads do not notice. It composes with
    torch.compile. Functions compiled by torch.jit.script call PyTorch's attention from C++ and are out of reach.

    The backward runs outside of every such block, by PyTorch's design, and activation checkpointing computes attention
    again there. Give torch.utils.checkpoint.checkpoint `use_reentrant=False, context_fn=lambda: (use(), use())`.

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
        return self.replacements.get(func, func)(*args, **(kwargs or {}))
