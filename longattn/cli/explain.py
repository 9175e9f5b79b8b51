"""`longattn explain`: a call described by its shapes and options, and the backend that would run it."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import click
import torch
from torch import Tensor

from longattn.arguments import DTYPES
from longattn.cli.device import Device
from longattn.cli.output import echo
from longattn.errors import InvalidInput
from longattn.functional import explain as explain_call
from longattn.rope import Rope

__all__ = ["explain"]

_MOST_ENTRIES = 1 << 62
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class _Ints(click.ParamType[tuple[int, ...]]):
    """Integers with commas between them."""

    name = "ints"

    def __init__(self, *counts: int) -> None:
        self.counts = counts

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            numbers = tuple(int(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 1,8,4096,64", param, ctx)
        if self.counts and len(numbers) not in self.counts:
            self.fail(f"{value!r} has {len(numbers)} numbers, not {' or '.join(map(str, self.counts))}", param, ctx)
        return numbers


@click.command(context_settings={"show_default": True})
@click.option("--q", "shape", type=_Ints(4), required=True, help="B,Hq,Nq,D: sequences, query heads, queries, width.")
@click.option("--kv-heads", type=int, help="Key and value heads; as many as query heads by default.")
@click.option("--keys", type=int, help="Nk, keys; as many as queries by default.")
@click.option("--v-dim", type=int, help="Dv, the width of a value; D by default.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="float32", help="Of q, k and v.")
@click.option("--device", type=Device(computes=False), default="cpu", help="As PyTorch names it, such as cuda.")
@click.option("--packed", type=_Ints(), help="Lengths of packed sequences; they replace B and Nq of --q.")
@click.option("--causal", is_flag=True, help="No key to the right of its query.")
@click.option("--window", type=_Ints(1, 2), help="W, or LEFT,RIGHT with -1 for unbounded.")
@click.option("--sinks", default=0, help="First keys that stay visible.")
@click.option("--align", default="end", help="end, start, or the position of the first query.")
@click.option("--key-mask", is_flag=True, help="With a key_mask.")
@click.option("--key-lens", type=_Ints(), help="Keys of each sequence.")
@click.option("--bounds", is_flag=True, help="With bounds for each query.")
@click.option("--bias", type=_Ints(1, 2, 3, 4), help="The shape of a bias, such as 1,8,4096,4096.")
@click.option("--softcap", type=float, help="Cap of the scores.")
@click.option("--alibi", is_flag=True, help="With ALiBi slopes.")
@click.option("--sink-logits", is_flag=True, help="With learned sinks.")
@click.option("--rope", type=int, help="Rotated width.")
@click.option("--dropout", default=0.0, help="Probability of dropping a weight.")
@click.option("--deterministic", is_flag=True, help="The same bits in every run.")
@click.option("--backward", is_flag=True, help="With gradients of q, k and v.")
@click.option("--backend", default="auto", help="The one to ask for; auto takes the first that can.")
def explain(
    shape: tuple[int, ...],
    kv_heads: int | None,
    keys: int | None,
    v_dim: int | None,
    dtype: str,
    device: str,
    packed: tuple[int, ...] | None,
    causal: bool,
    window: tuple[int, ...] | None,
    sinks: int,
    align: str,
    key_mask: bool,
    key_lens: tuple[int, ...] | None,
    bounds: bool,
    bias: tuple[int, ...] | None,
    softcap: float | None,
    alibi: bool,
    sink_logits: bool,
    rope: int | None,
    dropout: float,
    deterministic: bool,
    backward: bool,
    backend: str,
) -> None:
    """Show what a query of a call sees, what the call costs, and which backend runs it.

    For example: longattn explain --q 1,32,4096,128 --kv-heads 8 --dtype bfloat16 --causal --window 1024 --sinks 4
    """
    batch, q_heads, nq, d = shape
    if packed is not None:
        batch, nq = 1, sum(packed)
        if keys not in (None, nq):
            raise InvalidInput("--keys", f"as many as the {nq} of --packed", keys)
    nk = nq if keys is None else keys
    sizes = {"--q": min(shape), "--keys": nk, "--kv-heads": kv_heads or 0, "--v-dim": v_dim or 0}
    sizes |= {"--packed": min(packed or (0,)), "--bias": min(bias or (0,))}
    for name, size in sizes.items():
        if size < 0:
            raise InvalidInput(name, "numbers >= 0", size)
    where = torch.device(device)

    def one_entry(*size: int, dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
        """A tensor of any size in the memory of its last dimension."""
        if math.prod(size) >= _MOST_ENTRIES or max(size) >= _MOST_ENTRIES:
            raise InvalidInput("shapes", "tensors of fewer than 2^62 entries", size)
        row = torch.zeros(size[-1], dtype=dtype, device=where, requires_grad=requires_grad)
        return row.expand(size)

    widths = ((q_heads, nq, d), (kv_heads or q_heads, nk, d), (kv_heads or q_heads, nk, v_dim or d))
    q, k, v = (one_entry(batch, *width, dtype=_DTYPES[dtype], requires_grad=backward) for width in widths)
    keywords: dict[str, Any] = {
        "causal": causal,
        "window": window[0] if window is not None and len(window) == 1 else window,
        "sinks": sinks,
        "align": align if align in ("end", "start") else _int("--align", align),
        "softcap": softcap,
        "dropout_p": dropout,
        "deterministic": deterministic,
        "backend": backend,
    }
    if key_mask:
        keywords["key_mask"] = one_entry(batch, nk, dtype=torch.bool)
    if key_lens is not None:
        keywords["key_lens"] = torch.tensor(key_lens, device=where)
    if bounds:
        keywords["bounds"] = (one_entry(nq, dtype=torch.int32),) * 2
    if bias is not None:
        keywords["bias"] = one_entry(*bias, dtype=torch.float32, requires_grad=backward)
    if alibi:
        keywords["alibi_slopes"] = one_entry(q_heads, dtype=torch.float32)
    if sink_logits:
        keywords["sink_logits"] = one_entry(q_heads, dtype=torch.float32)
    if rope is not None:
        keywords["rope"] = Rope(rope)
    if packed is None:
        echo(explain_call(q, k, v, **keywords))
        return
    cu_seqlens = torch.tensor([0, *accumulate(packed)], device=where)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    longest = max(packed)
    echo(explain_call(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **keywords))


def _int(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise InvalidInput(name, "end, start or an int", value) from None
