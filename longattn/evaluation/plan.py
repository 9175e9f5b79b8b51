"""What a training step over one long sequence would take on so many GPUs: a small cost model.

Per rank and layer, for N tokens on R ranks:

    matrices     8 (recomputed: 2 forward, 2 again, 4 backward) operations per weight and token, N / R tokens
    attention    4 D operations per visible pair and query head, forward, again in the recomputation, and 2.5 times in
                 the backward; the busiest rank counts
    a ring step  the longer of computing and sending, as both go on at once; and the merge of a partial result, whose
                 float32 sum is read and written (10 bytes an entry forward, 8 a summand backward)
    heads, halo  sending, then computing: nothing overlaps but the own block of a halo
    weights      gathered twice and their gradients scattered once a step, beside the computation

Memory: weights, gradients and AdamW's state by the ranks (16 bytes a weight; offloaded: what one layer needs), one
checkpoint a layer of bfloat16 [N / R, dim] (offloaded: two), and the tensors of one layer's backward. Traffic is what
`longattn.distributed.explain` says. docs/distributed.md compares with published figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from longattn.distributed.geometry import Geometry
from longattn.distributed.schedule import HALO, RING, ULYSSES, Call, choose, reasons, traffic
from longattn.errors import InvalidInput
from longattn.mask import Mask
from longattn.models import TransformerConfig
from longattn.problem import Problem

__all__ = ["MACHINES", "MODELS", "Estimate", "Machine", "plan"]

_HALF, _FULL = 2, 4  # bytes of bfloat16 and float32
_STATE = 16  # bytes a weight: bfloat16 weight and gradient, float32 weight and two moments
_MOST_TOKENS, _MOST_GPUS = 10**12, 2048  # the time that a plan takes grows with the ranks of a ring
_MERGE, _ADD = 10, 8  # bytes an entry that a partial result and a partial gradient cost


@dataclass(frozen=True)
class Machine:
    """GPUs, and what joins them. Rates are those that long kernels reach, not peaks.

    Args:
        matmul, attention: operations per second, bfloat16; attention's forward and backward together.
        memory: bytes of a GPU, of which `usable` can be planned with.
        bandwidth: of the GPU's memory, bytes per second.
        node: GPUs that the fast link joins.
        inside, outside: bytes per second that a GPU sends within and beyond a node.
        latency: seconds until a message or a kernel is under way.
    """

    matmul: float
    attention: float
    memory: float
    bandwidth: float
    node: int
    inside: float
    outside: float
    latency: float
    usable: float = 0.92


# H800: the rate of flash-attn in ring-flash-attention's table, 154.7 per second of Llama-8B's heads over 8,192 tokens.
# NVLink 400 GB/s both ways together (H800), 900 (H100, H200), of which three quarters arrive; a 400 Gbit/s card a GPU.
MACHINES: Mapping[str, Machine] = {
    "h100": Machine(6e14, 4.5e14, 80e9, 2.7e12, 8, 3.4e11, 4e10, 15e-6),
    "h200": Machine(6e14, 4.5e14, 141e9, 4.0e12, 8, 3.4e11, 4e10, 15e-6),
    "h800": Machine(6e14, 2.98e14, 80e9, 2.7e12, 8, 1.5e11, 4e10, 15e-6),
}

MODELS: Mapping[str, TransformerConfig] = {
    "llama-8b": TransformerConfig(
        dim=4096, layers=32, heads=32, kv_heads=8, hidden=14336, vocab_size=128256, max_length=131072
    ),
    "llama-70b": TransformerConfig(
        dim=8192, layers=80, heads=64, kv_heads=8, hidden=28672, vocab_size=128256, max_length=131072
    ),
    # Three sliding layers of four, as examples of what windows change.
    "llama-8b-sliding": TransformerConfig(
        dim=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        hidden=14336,
        vocab_size=128256,
        max_length=131072,
        pattern="SSSL",
        window=4096,
        sinks=4,
    ),
}


@dataclass(frozen=True)
class Estimate:
    """One step of one schedule. Seconds, and bytes of a rank; attention_seconds are a part of seconds.

    asked: the schedule that was asked for; schedule: those that the layers take.
    efficiency: the time that the operations alone would take, spread evenly, over that of the step.
    sent: bytes of keys, values, heads and their gradients in a step; weights travel beside.
    """

    gpus: int
    tokens: int
    asked: str
    schedule: str
    layout: str
    seconds: float
    attention_seconds: float
    efficiency: float
    memory: float
    sent: int
    fits: bool


def plan(
    model: TransformerConfig,
    tokens: int,
    gpus: int,
    machine: Machine,
    *,
    schedule: str = "auto",
    layout: str = "zigzag",
    offload: bool = False,
) -> Estimate:
    """A step over one sequence of so many tokens, all GPUs sharing it.

    Args:
        model: a decoder with rotary positions.
        tokens: N, rounded up to what the ranks divide.
        schedule: "ring", "halo", "ulysses" (where a model has other layers, too, these take a ring), or "auto", each
            layer what it would choose.
        layout: of a ring and a halo, as in `longattn.distributed.shard`.
        offload: checkpoints and the optimiser's state stay in the host's memory.

    Raises:
        InvalidInput: tokens outside [1, 10**12], gpus outside [1, 2048], or a schedule that no layer can take.
    """
    _check(tokens, gpus)
    asked, tokens = tokens, _rounded(tokens, gpus)
    calls = [_call(model, tokens, gpus, layer, layout) for layer in range(model.layers)]
    named = {call: _schedule(call, schedule) for call in dict.fromkeys(calls)}  # layers differ in their mask alone
    names = [named[call] for call in calls]
    if schedule not in ("auto", *names):
        raise InvalidInput("schedule", "one that some layer can take", repr(schedule))
    costs = {call: _attention(call, machine, name) for call, name in named.items()}
    found = [costs[call] for call in calls]
    share = tokens / gpus
    matrices = 8 * share * _matrix_weights(model) / machine.matmul
    gathered = 3 * _HALF * _weights(model) * (gpus - 1) / gpus / _link(machine, gpus)
    attention = sum(layer.seconds for layer in found)
    seconds = max(matrices + attention, gathered)
    ideal = 8 * share * _matrix_weights(model) / machine.matmul + sum(layer.ideal for layer in found)
    memory = _memory(model, share, gpus, offload, max(layer.buffers for layer in found))
    chosen = "+".join(dict.fromkeys(names))
    return Estimate(
        gpus,
        asked,
        schedule,
        chosen,
        layout,
        seconds,
        attention,
        ideal / seconds,
        memory,
        sum(layer.sent for layer in found),
        memory <= machine.usable * machine.memory,
    )


def can_run(model: TransformerConfig, tokens: int, gpus: int, schedule: str) -> bool:
    """Return whether some layer can take a schedule.

    Raises:
        InvalidInput: as `plan`.
    """
    _check(tokens, gpus)
    layers = range(min(model.layers, len(model.pattern)))
    calls = [_call(model, _rounded(tokens, gpus), gpus, layer, "zigzag") for layer in layers]
    return any(not reasons(call, schedule) for call in calls)


def _check(tokens: int, gpus: int) -> None:
    for name, value, most in (("tokens", tokens, _MOST_TOKENS), ("gpus", gpus, _MOST_GPUS)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InvalidInput(name, f"an int in [1, {most}]", repr(value))


def _rounded(tokens: int, gpus: int) -> int:
    return tokens + -tokens % (2 * gpus)


@dataclass(frozen=True)
class _Layer:
    """The attention of a layer in a step: seconds, those at full rate evenly spread, bytes sent, bytes of buffers."""

    seconds: float
    ideal: float
    sent: int
    buffers: float


def _schedule(call: Call, asked: str) -> str:
    if asked != "auto" and not reasons(call, asked):
        return asked
    chosen, _ = choose(call, "auto" if asked == "auto" else RING)
    assert chosen is not None  # a ring can run everything
    return chosen


def _call(model: TransformerConfig, tokens: int, gpus: int, layer: int, layout: str) -> Call:
    sliding = model.is_sliding(layer)
    mask = Mask(model.window - 1 if sliding and model.window else None, 0, model.sinks if sliding else 0, 0, False)
    problem = Problem(
        1, model.heads, model.kv_heads, 0, 0, model.head_dim, model.head_dim, torch.bfloat16, "cuda", Mask(), 1.0
    )
    return Call(problem, Geometry(mask, tokens, tokens, layout, gpus), 0, masked=False)


def _attention(call: Call, machine: Machine, name: str) -> _Layer:
    problem, geometry = call.problem, call.geometry
    tokens, gpus = geometry.nq, geometry.ranks
    middle = gpus // 2
    pairs = [sum(map(geometry.visible_pairs, geometry.queries_of(rank))) for rank in (0, middle, gpus - 1)]
    operations = 4 * problem.head_dim * problem.q_heads
    compute = 4.5 * operations * max(pairs) / machine.attention  # forward, again, backward
    if name == ULYSSES:  # all ranks have the same pairs, of other heads
        whole = geometry.mask.visible_pairs(tokens, tokens) / gpus
        compute = 4.5 * operations * whole / machine.attention
    each = traffic(call, middle, name)
    sent = 2 * each.forward + each.backward
    link = _link(machine, gpus)
    entries = tokens / gpus * problem.q_heads * problem.head_dim
    kv_entries = 2 * tokens / gpus * problem.kv_heads * problem.head_dim
    shard = entries * _HALF
    if name == RING:
        steps = gpus
        merges = steps * (2 * entries * _MERGE + (entries + kv_entries) * _ADD) / machine.bandwidth
        seconds = max(compute, sent / link) + merges + 3 * steps * machine.latency
        buffers = 2 * entries * _FULL + 6 * kv_entries * _FULL
    else:
        overlap = compute / 2 if name.startswith(HALO) else 0.0
        merges = (2 * entries * _MERGE + (entries + kv_entries) * _ADD) / machine.bandwidth
        seconds = compute + max(0.0, sent / link - overlap) + merges + 6 * machine.latency
        buffers = entries * _FULL + (
            3 * kv_entries * _FULL if name.startswith(HALO) else 2 * (shard + kv_entries * _HALF)
        )
    if gpus == 1:
        seconds, sent, buffers = compute, 0, 0.0
    ideal = 4.5 * operations * geometry.mask.visible_pairs(tokens, tokens) / gpus / machine.attention
    return _Layer(seconds, ideal, sent, buffers)


def _link(machine: Machine, gpus: int) -> float:
    """What a GPU sends per second; beyond one node the slowest link sets the pace."""
    return machine.inside if gpus <= machine.node else machine.outside


def _matrix_weights(model: TransformerConfig) -> float:
    """Weights that multiply every token, the output projection's included."""
    dim, width = model.dim, model.head_dim
    attention = dim * width * (2 * model.heads + 2 * model.kv_heads)
    feed_forward = dim * model.hidden * (3 if model.feed_forward == "swiglu" else 2)
    return model.layers * (attention + feed_forward) + dim * model.vocab_size


def _weights(model: TransformerConfig) -> float:
    return _matrix_weights(model) + (0 if model.tie_embeddings else model.dim * model.vocab_size)


def _memory(model: TransformerConfig, share: float, gpus: int, offload: bool, buffers: float) -> float:
    """Bytes of a rank at the peak, in the backward of a layer."""
    layer = _matrix_weights(model) / model.layers
    state = 3 * _HALF * layer + 2 * _HALF * model.dim * model.vocab_size if offload else _STATE * _weights(model) / gpus
    stream = share * model.dim * _HALF
    checkpoints = (2 if offload else model.layers) * stream
    heads = share * model.head_dim * _HALF
    # The residual stream and its gradient, the norm; q, k, v and out, and the gradients of all four.
    working = 3 * stream + heads * (2 * 2 * model.heads + 2 * 2 * model.kv_heads)
    return state + checkpoints + working + buffers
