"""The contenders of a Transformer block: ours, and the same weights around other attentions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from longattn.bench import attention
from longattn.bench.cases import AttentionCase, BlockCase, BlockInputs
from longattn.bench.contenders import Contender, Prepared, compiled
from longattn.bench.rope import addcmul
from longattn.models import Block


def contenders(case: BlockCase) -> list[Contender]:
    """Ours and every attention that has a backward, eager and under torch.compile."""
    found = [
        Contender("longattn", "ours", _ours),
        Contender("longattn, torch.compile", "ours", partial(_ours, whole=compiled), compiled=True),
    ]
    for name, attend in attention.sdpa_variants(case.device).items():
        found.append(Contender(name, "peer", partial(_around, attend)))
        found.append(
            Contender(f"{name}, torch.compile", "peer", partial(_around, attend, whole=compiled), compiled=True)
        )
    found.append(Contender("FlexAttention", "peer", partial(_around, attention.flex), compiled=True))
    found.append(Contender("eager", "peer", partial(_around, attention.eager)))
    return found


Whole = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def _as_it_is(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def _ours(case: BlockCase, inputs: BlockInputs, whole: Whole = _as_it_is) -> Prepared:
    attention.ours(case.attention)  # refuses the reference backend
    forward = whole(inputs.block)
    return Prepared(lambda: forward(inputs.x))


def _around(
    attend: Callable[[AttentionCase], attention.Attend], case: BlockCase, inputs: BlockInputs, whole: Whole = _as_it_is
) -> Prepared:
    function, held = attend(case.attention)
    positions = torch.arange(case.n, device=case.device)
    rope = case.config.rope
    assert rope is not None
    cos, sin = rope.tables(positions, dtype=case.torch_dtype)
    forward = whole(partial(_block, inputs.block, function))
    return Prepared(lambda: forward(inputs.x, cos, sin), (*held, cos, sin))


def _block(
    block: Block, attend: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The block's own layers and weights around another attention and an eager rotation."""
    layer = block.attention
    normed = block.attention_norm(x)
    q = layer.q_proj(normed).unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
    k, v = (
        project(normed).unflatten(-1, (layer.num_kv_heads, layer.head_dim)).transpose(1, 2)
        for project in (layer.k_proj, layer.v_proj)
    )
    out = attend(addcmul(q, cos, sin), addcmul(k, cos, sin), v)
    x = x + layer.o_proj(out.transpose(1, 2).flatten(-2))
    return x + block.feed_forward(block.feed_forward_norm(x))
