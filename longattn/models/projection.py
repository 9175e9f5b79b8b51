"""The output projection: a head that is called as the module it is, or the weight of a tied embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from longattn.errors import InvalidInput

__all__ = ["Projection", "project", "projection_of", "share_head", "unfolded"]

Projection = Tensor | Callable[[Tensor], Tensor]

_PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)  # the last two stand for plain ones while tracing
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def projection_of(head: nn.Module | None, embedding: nn.Module) -> Projection:
    """Return what computes a model's logits: its head, or without one the weight [V, C] of its embedding.

    Hooks on the embedding run where the embedding is called, with token ids; a projection that is tied to it reads its
    weight alone, as everywhere in PyTorch.

    Raises:
        InvalidInput: there is no head, and the embedding is not a plain torch.nn.Embedding, whose weight is all of it.
    """
    if head is not None:
        return head
    reason = _not_plain(embedding, nn.Embedding)
    if reason is not None:
        expected = "a plain torch.nn.Embedding while the output projection is tied to it (tie_embeddings=False unties)"
        raise InvalidInput("embedding", expected, reason)
    weight: Any = embedding.weight
    return weight


def project(hidden: Tensor, projection: Projection, bias: Tensor | None = None) -> Tensor:
    """Return the logits [..., V] of hidden states [..., C], plus a bias [V] if there is one."""
    if bias is not None:
        projection, bias = unfolded(projection, bias)
    if isinstance(projection, Tensor | Proxy):
        return F.linear(hidden, projection, bias)
    logits = projection(hidden)
    return logits if bias is None else logits + bias


def unfolded(projection: Projection, bias: Tensor | None) -> tuple[Projection, Tensor | None]:
    """Return the weight and the bias of a projection that is no more than these; any other one as it is.

    No more than these is a module of type torch.nn.Linear without hooks, its own or global ones, without a forward of
    its own or a parametrization, and with plain tensors as weight and bias.

    Args:
        bias: [V], added to what the projection computes.
    """
    if not isinstance(projection, nn.Module) or _not_plain(projection, nn.Linear) is not None:
        return projection, bias
    if any(getattr(projection, name) for name in _HOOKS) or any(getattr(hooks, name) for name in _GLOBAL_HOOKS):
        return projection, bias
    weight, own = projection.weight, projection.bias
    assert isinstance(weight, Tensor)
    if isinstance(own, Tensor):
        bias = own if bias is None else own + bias
    return weight, bias


def share_head(source: nn.Module, target: nn.Module) -> None:
    """Give a model over another's weights the other's head itself, where that is more than its weight."""
    head = getattr(source, "head", None)
    if isinstance(head, nn.Module) and not isinstance(unfolded(head, None)[0], Tensor):
        target.head = head


def _not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return why a call of the module may be more than what its kind makes of its parameters; hooks are not asked."""
    if type(module) is not kind:
        return type(module).__qualname__
    if "forward" in vars(module):
        return f"a {kind.__name__} with a forward of its own"
    if "weight" not in module._parameters and module._forward_pre_hooks:
        return f"a {kind.__name__} whose weight a hook computes"
    for name in ("weight", "bias"):
        value = module._parameters.get(name, vars(module).get(name))
        if value is not None and type(value) not in _PLAIN:
            return f"a {kind.__name__} whose {name} is a {type(value).__name__}"
    return None
