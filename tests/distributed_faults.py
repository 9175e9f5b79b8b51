"""What the ranks of a test's World run: calls that go wrong on some rank, and what they cost."""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import longattn
from longattn import InvalidInput, distributed


def error_of(rank: int, world: int, kind: str) -> str | None:
    """The InvalidInput of a call with a fault of some kind; None: there was none."""
    mesh = init_device_mesh("cpu", (world,))
    odd = rank == 1
    heads, tokens, keywords = 4, 8, {"causal": True}
    schedule = "auto"
    if kind == "shape":
        tokens = 6 if odd else 8
    elif kind == "empty":
        tokens = 0 if odd else 8
    elif kind == "empty everywhere":
        tokens = 0
    elif kind == "dtype":
        pass
    elif kind == "heads":
        heads, schedule = 5, "ulysses"
    elif kind == "window":
        keywords["window"] = 3 if odd else 4
    elif kind == "schedule":
        schedule = "ring" if odd else "ulysses"
    elif kind == "bad argument":
        keywords["softcap"] = -1.0 if odd else 1.0
    elif kind == "seed":
        keywords |= {"dropout_p": 0.5, "seed": rank}
    elif kind == "slopes":
        keywords["alibi_slopes"] = torch.full((heads,), 0.5 + rank)
    dtype = torch.float64 if kind == "dtype" and odd else torch.float32
    q = torch.randn(1, heads, tokens, 8, dtype=dtype)
    os.environ["LONGATTN_CHECK"] = "1" if kind == "slopes" else "0"
    try:
        distributed.context_parallel_attention(q, q, q, mesh, schedule=schedule, **keywords)
    except InvalidInput as error:
        return str(error)
    finally:
        del os.environ["LONGATTN_CHECK"]
    return None


def die(rank: int, world: int, dying: int, while_travelling: bool) -> float:
    """One rank ends without a word, before a call or while keys travel; the seconds until the others know."""
    mesh = init_device_mesh("cpu", (world,))
    q = torch.randn(1, 4, 64, 8)
    distributed.context_parallel_attention(q, q, q, mesh, schedule="ring")
    if rank == dying:
        if while_travelling:
            dist.batch_isend_irecv = lambda _: os._exit(1)
        else:
            os._exit(1)
    started = time.monotonic()
    try:
        distributed.context_parallel_attention(q, q, q, mesh, schedule="ring")
    except RuntimeError:
        return time.monotonic() - started
    raise AssertionError("no error")


def peak_of(rank: int, world: int, schedule: str, tokens: int, keywords: dict[str, Any]) -> float:
    """Peak memory of forward and backward beyond the inputs, in shards of one [1, 16, N, 64] float32 tensor."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    libc.mallopt(-1, 65536)  # M_TRIM_THRESHOLD
    mesh = init_device_mesh("cpu", (world,))

    def call(tokens: int) -> int:
        q, k, v = (torch.randn(1, 16, tokens // world, 64, requires_grad=True) for _ in range(3))
        dout = torch.randn(1, 16, tokens // world, 64)
        dist.barrier()

        Path("/proc/self/clear_refs").write_text("5")  # proc(5): reset VmHWM
        before = _status("VmRSS")
        out = distributed.context_parallel_attention(q, k, v, mesh, schedule=schedule, layout="zigzag", **keywords)
        assert isinstance(out, torch.Tensor)
        torch.autograd.grad(out, (q, k, v), dout)
        return _status("VmHWM") - before

    call(8 * world)
    return call(tokens) / (16 * tokens // world * 64 * 4)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def same_dropout(rank: int, world: int, schedule: str) -> bool:
    """Whether the very same weights are dropped as in one process: values are the identity, so weights come out."""
    mesh = init_device_mesh("cpu", (world,))
    tokens = 16 * world
    q, k = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)
    v = torch.eye(tokens).expand(2, 2, -1, -1)
    whole = longattn.attention(q, k, v, dropout_p=0.5, seed=3)
    assert isinstance(whole, torch.Tensor)
    shards = [distributed.shard(x, mesh, dim=2, layout="zigzag") for x in (q, k, v, whole)]
    mine = distributed.context_parallel_attention(
        *shards[:3], mesh, layout="zigzag", schedule=schedule, dropout_p=0.5, seed=3
    )
    assert isinstance(mine, torch.Tensor)
    drawn = distributed.context_parallel_attention(*shards[:3], mesh, layout="zigzag", dropout_p=0.5)
    assert isinstance(drawn, torch.Tensor)
    return torch.equal(mine == 0, shards[3] == 0) and 0.4 < (drawn == 0).float().mean() < 0.6


def sent(rank: int, world: int, tokens: int, schedule: str, keywords: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes that this rank sends forward and backward, and of what ranks tell each other before, for float32 keys."""
    mesh = init_device_mesh("cpu", (world,))
    q, k, v = (torch.randn(1, heads, tokens // world, 8, requires_grad=True) for heads in (8, 4, 4))
    with distributed.CountBytes() as forward:
        out = distributed.context_parallel_attention(q, k, v, mesh, schedule=schedule, **keywords)
    assert isinstance(out, torch.Tensor)
    with distributed.CountBytes() as backward:
        out.sum().backward()
    told = forward.by_operator["c10d::allgather_"]
    return forward.total - told, backward.total, told


def shards(rank: int, world: int, shape: tuple[int, ...]) -> None:
    """shard and unshard are inverses of each other, and so are their gradients."""
    mesh = init_device_mesh("cpu", shape)
    for layout in distributed.LAYOUTS:
        for dim, dtype in ((1, torch.int64), (-1, torch.float64), (0, torch.bool)):
            sizes = [3, 3, 3]
            sizes[dim] = 4 * world
            x = torch.arange(9 * 4 * world).reshape(sizes).to(dtype)
            mine = distributed.shard(x, mesh, dim=dim, layout=layout)
            assert mine.shape[dim] == 4 and torch.equal(distributed.unshard(mine, mesh, dim=dim, layout=layout), x)
        x = torch.randn(2, 4 * world, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 4 * world, dtype=torch.float64)
        mine = distributed.shard(x, mesh, dim=1, layout=layout)
        (grad,) = torch.autograd.grad(mine, x, distributed.shard(weight, mesh, dim=1, layout=layout))
        assert torch.equal(grad, weight)  # gathered
        mine = mine.detach().requires_grad_()
        (grad,) = torch.autograd.grad(distributed.unshard(mine, mesh, dim=1, layout=layout), mine, weight)
        assert torch.equal(grad, distributed.shard(weight, mesh, dim=1, layout=layout))  # the own slice
