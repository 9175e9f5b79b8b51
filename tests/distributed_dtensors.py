"""What the ranks of a test's World run on DTensors: every call and module against the same one on plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import longattn
from longattn import InvalidInput, Rope
from longattn.models import Decoder, TransformerConfig

F64 = torch.float64
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def features(batch: int, heads: int, nq: int, nk: int) -> list[dict[str, Any]]:
    """Keywords of calls; floating tensors among them have gradients."""
    floats = lambda *shape: torch.randn(*shape, dtype=F64)  # noqa: E731
    return [
        {"causal": True, "window": 5, "sinks": 1, "softcap": 2.0, "rope": Rope(8)},
        {"key_mask": torch.rand(batch, nk) < 0.7, "bias": floats(batch, heads, 1, nk)},
        {"key_lens": torch.randint(1, nk, (batch,)), "bias": floats(heads, nq, 1), "sink_logits": floats(heads)},
        {"bounds": (torch.zeros(batch, nq).int(), torch.full((batch, nq), nk - 2).int()), "bias": floats(nq, nk)},
        {"align": torch.arange(batch), "causal": True, "alibi_slopes": floats(heads), "dropout_p": 0.3, "seed": 5},
        {"alibi_slopes": floats(batch, heads), "rope": Rope(4), "positions": torch.arange(batch * nk).view(batch, nk)},
    ]


def compare(call: Callable[..., Any], inputs: dict[str, Tensor], place: Callable[[str, Tensor], Tensor]) -> None:
    """Results and gradients on DTensors, against those on plain tensors; keywords left plain are on all ranks."""
    plain = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    placed = {name: place(name, x.clone()).requires_grad_() for name, x in inputs.items()}
    expected, got = call(**plain), call(**placed)
    for x, y in zip(got, expected, strict=True):
        assert isinstance(x, DTensor) and x.shape == y.shape
        torch.testing.assert_close(x.full_tensor(), y, **CLOSE)
    douts = [torch.randn_like(y) for y in expected]
    torch.autograd.backward(expected, douts)
    for x, dout in zip(got, douts, strict=True):  # gradients of x's own placements, and of others
        x.backward(distribute_tensor(dout, x.device_mesh, [Replicate()] * x.device_mesh.ndim), retain_graph=True)
    for name, x in plain.items():
        grad = placed[name].grad
        assert grad is not None and grad.shape == x.shape, name
        found = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(found, x.grad, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def attention(rank: int, shape: tuple[int, ...], placements: Sequence[Any], heads: tuple[int, int], of: int) -> None:
    """One mesh and placement of q, k and v; parameters are plain, or replicated DTensors."""
    mesh = init_device_mesh("cpu", shape)
    torch.manual_seed(of)
    batch, nq, nk = 4, 7, 9
    q = torch.randn(batch, heads[0], nq, 8, dtype=F64)
    k, v = torch.randn(batch, heads[1], nk, 8, dtype=F64), torch.randn(batch, heads[1], nk, 6, dtype=F64)
    keywords = features(batch, heads[0], nq, nk)[of]
    parameters = {name: x for name, x in keywords.items() if isinstance(x, Tensor) and x.is_floating_point()}
    rest = {name: x for name, x in keywords.items() if name not in parameters}

    def place(name: str, x: Tensor) -> Tensor:
        if name == "q" or (name in "kv" and x.shape[1] % 2 == 0):
            return distribute_tensor(x, mesh, placements)
        if name in "kv":  # one head for all ranks
            return distribute_tensor(x, mesh, [Replicate() if p == Shard(1) else p for p in placements])
        return x if of % 2 else distribute_tensor(x, mesh, [Replicate()] * mesh.ndim)

    compare(lambda **x: longattn.attention(**x, **rest, return_lse=True), {"q": q, "k": k, "v": v} | parameters, place)


def varlen_and_rope(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q, k = torch.randn(9, 4, 8, dtype=F64), torch.randn(9, 2, 8, dtype=F64)
    cu = ints(0, 4, 9)

    def call(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor) -> Any:
        options = {"causal": True, "rope": Rope(8), "return_lse": True, "dropout_p": 0.2, "seed": 3}
        return longattn.attention_varlen(q, k, v, cu, cu, 5, 5, sink_logits=sink_logits, **options)

    def place(name: str, x: Tensor) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(0 if x.dim() == 1 else 1)])

    compare(call, {"q": q, "k": k, "v": k + 1, "sink_logits": torch.randn(4, dtype=F64)}, place)
    x = torch.randn(3, 4, 5, 8, dtype=F64)  # three sequences on two ranks
    for dim in (0, 1):
        for positions in (None, torch.arange(15).view(3, 5)):
            rotated = lambda x, at=positions: (longattn.apply_rope(x, Rope(6), at),)  # noqa: E731
            compare(rotated, {"x": x}, lambda _, x, dim=dim: distribute_tensor(x, mesh, [Shard(dim)]))


def placements_are_aligned(rank: int) -> None:
    """What is replicated is divided as what is sharded; a sum that is pending is made; an unseeded dropout is one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q, k, v = torch.randn(3, 3, 4, 6, 8, dtype=F64).unbind()
    want = longattn.attention(q, k, v)
    pending = DTensor.from_local(k / mesh.size(), mesh, [Partial()])
    out: Any = longattn.attention(distribute_tensor(q, mesh, [Shard(1)]), pending, distribute_tensor(v, mesh))
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), want, **CLOSE)
    out = longattn.attention(*(distribute_tensor(x, mesh, [Shard(0)]) for x in (q, k, v)))  # 3 sequences on 2 ranks
    torch.testing.assert_close(out.full_tensor(), want, **CLOSE)
    torch.manual_seed(rank)
    out = longattn.attention(*(distribute_tensor(x, mesh) for x in (q, k, v)), dropout_p=0.5)
    others = [torch.empty_like(want) for _ in range(mesh.size())]
    dist.all_gather(others, out.to_local())
    assert all(torch.equal(x, others[0]) for x in others)


def refusals(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 3, 6, 8)
    placed = lambda x, at: distribute_tensor(x, mesh, [at])  # noqa: E731
    calls: list[Callable[[], Any]] = [
        lambda: longattn.attention(*[placed(q, Shard(2))] * 3),
        lambda: longattn.attention(placed(q, Shard(0)), placed(q, Shard(1)), placed(q, Shard(1))),
        lambda: longattn.attention(placed(q, Shard(0)), q, q),
        lambda: longattn.attention(placed(k, Shard(1)), placed(k, Shard(1)), placed(k, Shard(1))),
        lambda: longattn.attention(*[placed(q, Shard(0))] * 3, bias=placed(torch.randn(6, 6), Shard(0))),
        lambda: longattn.apply_rope(placed(q, Shard(3)), Rope(8)),
        lambda: longattn.attention_rows(placed(q, Shard(0)), placed(q, Shard(0)), [0]),
    ]
    found = []
    for call in calls:
        try:
            call()
        except InvalidInput as error:
            found.append(str(error.argument))
        else:
            found.append("none")
    return found


def projections(module: nn.Module) -> dict[str, Any]:
    """The plan of Megatron: what opens heads and hidden units by columns, what closes them by rows."""
    closing = ("o_proj", "down_proj")
    linears = [name for name, child in module.named_modules() if isinstance(child, nn.Linear) and "_proj" in name]
    return {name: RowwiseParallel() if name.endswith(closing) else ColwiseParallel() for name in linears}


def modules(rank: int) -> None:
    """parallelize_module on a layer, and on the blocks of a model: outputs and gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(2, 9, 32, dtype=F64)
    options = {"rope": Rope(8), "window": 4, "sinks": 1, "sink_logits": True, "dtype": F64}
    for heads, kv_heads in ((4, 4), (4, 2)):
        torch.manual_seed(1)
        layers = [longattn.nn.Attention(32, heads, kv_heads, 8, **options) for _ in range(2)]
        layers[1].load_state_dict(layers[0].state_dict())
        parallelize_module(layers[1], mesh, projections(layers[1]))
        layers[1].sink_logits = nn.Parameter(distribute_tensor(layers[0].sink_logits.detach(), mesh, [Shard(0)]))
        same_gradients(layers, [layer(x) for layer in layers])

    config = TransformerConfig(vocab_size=17, dim=32, layers=2, heads=4, kv_heads=2, hidden=24, max_length=16)
    torch.manual_seed(2)
    models = [Decoder(config).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for block in models[1].blocks:
        parallelize_module(block, mesh, projections(block))
    ids = torch.randint(17, (2, 9))
    same_gradients(models, [model(ids) for model in models])


def same_gradients(modules: Sequence[nn.Module], outs: Sequence[Tensor]) -> None:
    torch.testing.assert_close(outs[1], outs[0], **CLOSE)
    for out in outs:
        out.square().sum().backward()
    expected = dict(modules[0].named_parameters())
    for name, parameter in modules[1].named_parameters():
        grad = parameter.grad
        found = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(found, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def modules_on_dtensors(rank: int) -> None:
    """Modules whose parameters are DTensors: MultiheadAttention, and projections whose outputs stay DTensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(2, 5, 16, dtype=F64)
    torch.manual_seed(3)
    plain = longattn.nn.MultiheadAttention(16, 4, batch_first=True, dtype=F64)
    want = plain(x, x, x, need_weights=False)[0]
    spread = longattn.nn.MultiheadAttention(16, 4, batch_first=True, dtype=F64)
    spread.load_state_dict(plain.state_dict())
    distribute_module(spread, mesh)
    for placement in (Shard(0), Replicate()):
        out: Any = spread(*[distribute_tensor(x, mesh, [placement])] * 3, need_weights=False)[0]
        torch.testing.assert_close(out.full_tensor(), want, **CLOSE)

    layer, kept = (longattn.nn.Attention(16, 4, 2, rope=Rope(4), qk_norm=True, dtype=F64) for _ in range(2))
    kept.load_state_dict(layer.state_dict())
    plan: dict[str, Any] = {name: ColwiseParallel(use_local_output=False) for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(kept, mesh, plan | {"o_proj": RowwiseParallel()})
    distribute_module(kept.q_norm, mesh), distribute_module(kept.k_norm, mesh)
    same_gradients([layer, kept], [layer(x), kept(x)])


def misaligned(rank: int) -> str:
    """Queries that are divided and keys that are not would meet the wrong heads."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = longattn.nn.Attention(32, 4, 2)
    parallelize_module(layer, mesh, {"q_proj": ColwiseParallel(), "o_proj": RowwiseParallel()})
    try:
        layer(torch.randn(1, 3, 32))
    except InvalidInput as error:
        return str(error.argument)
    return "none"
