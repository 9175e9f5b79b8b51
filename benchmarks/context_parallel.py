"""Context parallelism on this machine: what each schedule costs beside one process, and how much it sends.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py [tokens]

Prints a table of milliseconds (the median of rounds in random order; forward and backward, one thread a rank) and of
kilobytes that rank 0 sends, for our schedules, for keys gathered whole, and for PyTorch's own prototype where it runs.
"one process" is rank 0 alone with the whole sequence and one thread while the others wait; two ranks do the same work
on as many threads as there are ranks, so half of its time would be ideal.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.nn.functional import all_gather

import longattn
from longattn.distributed import CountBytes, context_parallel_attention, shard

HEADS, KV_HEADS, WIDTH = 8, 4, 64
ROUNDS = 5

Step = Callable[[], Any]


def main(tokens: int = 4096) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [torch.randn(1, heads, tokens, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    if dist.get_rank() == 0:
        print(f"{mesh.size()} ranks, {tokens} tokens, heads {HEADS}/{KV_HEADS} of {WIDTH}, float32, causal")
        print(f"{'mask':8} {'what':24} {'ms':>9} {'of one':>7} {'kB sent':>9}")
    for name, mask in (("full", {}), ("window", {"window": 256, "sinks": 4})):
        compare(name, mesh, whole, {"causal": True, **mask})


def compare(name: str, mesh: DeviceMesh, whole: list[Tensor], mask: dict[str, Any]) -> None:
    steps = contenders(mesh, whole, mask)
    sent = {what: count(step) for what, step in steps.items()}
    steps["one process"] = alone(whole, mask) if dist.get_rank() == 0 else lambda: None
    times: dict[str, list[float]] = {what: [] for what in steps}
    order = random.Random(0)
    for _ in range(ROUNDS + 1):  # the first warms up
        for what in order.sample(list(steps), len(steps)):
            dist.barrier()
            started = time.perf_counter()
            steps[what]()
            dist.barrier()
            times[what].append(time.perf_counter() - started)
    medians = {what: statistics.median(each[1:]) for what, each in times.items()}
    if dist.get_rank() == 0:
        for what, seconds in medians.items():
            share = seconds / medians["one process"]
            traffic = "" if what not in sent else f"{sent[what] / 1e3:9.0f}"
            print(f"{name:8} {what:24} {seconds * 1e3:9.1f} {share:7.2f} {traffic}")


def contenders(mesh: DeviceMesh, whole: list[Tensor], mask: dict[str, Any]) -> dict[str, Step]:
    found: dict[str, Step] = {}
    for layout in ("contiguous", "zigzag"):
        q, k, v, dout = (shard(x, mesh, dim=2, layout=layout) for x in whole)
        for schedule in ("ring", "ulysses", *(["halo"] if "window" in mask else [])):
            found[f"{schedule}, {layout}"] = ours(
                mesh, (q, k, v), dout, {**mask, "layout": layout, "schedule": schedule}
            )
    q, k, v, dout = (shard(x, mesh, dim=2) for x in whole)
    found["keys gathered"] = gathered(mesh, (q, k, v), dout, mask)
    if "window" not in mask:
        theirs = prototype(mesh, whole, dout)
        if theirs is not None:
            found["torch context_parallel"] = theirs
    return found


def ours(mesh: DeviceMesh, shards: tuple[Tensor, ...], dout: Tensor, keywords: dict[str, Any]) -> Step:
    q, k, v = (x.clone().requires_grad_() for x in shards)

    def step() -> None:
        torch.autograd.grad(context_parallel_attention(q, k, v, mesh, **keywords), (q, k, v), dout)

    return step


def gathered(mesh: DeviceMesh, shards: tuple[Tensor, ...], dout: Tensor, mask: dict[str, Any]) -> Step:
    """Every rank gathers all keys and values, and their gradients are reduced, as Megatron does for windows."""
    q, k, v = (x.clone().requires_grad_() for x in shards)
    start = q.shape[2] * mesh.get_local_rank()

    def step() -> None:
        keys, values = (torch.cat(all_gather(x, group=mesh.get_group()), 2) for x in (k, v))
        torch.autograd.grad(longattn.attention(q, keys, values, align=start, **mask), (q, k, v), dout)

    return step


def prototype(mesh: DeviceMesh, whole: list[Tensor], dout: Tensor) -> Step | None:
    """torch.distributed.tensor.experimental.context_parallel around SDPA; None where it does not run."""
    import torch.nn.functional as F
    from torch.distributed.tensor.experimental import context_parallel

    def step() -> None:
        buffers = [x.repeat_interleave(HEADS // x.shape[1], 1) for x in whole[:3]]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
            q, k, v = (x.detach().requires_grad_() for x in buffers)
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), dout)

    try:
        step()
        with CountBytes() as counted:
            step()
        if not counted.total:
            raise RuntimeError("it sends nothing: each rank attends to its own keys alone")
    except (NotImplementedError, RuntimeError, ValueError) as error:
        if dist.get_rank() == 0:
            print(f"torch context_parallel does not run here: {str(error).splitlines()[0][:150]}")
        return None
    return step


def alone(whole: list[Tensor], mask: dict[str, Any]) -> Step:
    q, k, v = (x.clone().requires_grad_() for x in whole[:3])

    def step() -> None:
        torch.autograd.grad(longattn.attention(q, k, v, **mask), (q, k, v), whole[3])

    return step


def count(step: Step) -> int:
    with CountBytes() as counted:
        step()
    return counted.total


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(*map(int, sys.argv[1:]))
    dist.destroy_process_group()
