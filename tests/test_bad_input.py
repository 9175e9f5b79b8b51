"""Arguments that break the contract: each named in an InvalidInput, and the interpreter never crashes."""

from __future__ import annotations

import math
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import longattn
from helpers import backend_names, random_packed
from longattn import InvalidInput, Rope, Unsupported

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def floats(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def sparse(x: Tensor) -> Tensor:
    return x.to_sparse()


def nested(*parts: Tensor, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are a prototype
        return torch.nested.nested_tensor(list(parts), **options)


# (what is wrong, the argument that the error names, the arguments that differ from Q, K, V).
TENSORS: list[tuple[str, str, dict[str, Any]]] = [
    ("no tensor", "q", {"q": 3.0}),
    ("a list", "k", {"k": [[1.0]]}),
    ("None", "v", {"v": None}),
    ("rank 3", "q", {"q": Q[0]}),
    ("rank 5", "k", {"k": K[None]}),
    ("rank 0", "v", {"v": V.sum()}),
    ("int", "q", {"q": Q.int(), "k": K.int(), "v": V.int()}),
    ("bool", "q", {"q": Q.bool(), "k": K.bool(), "v": V.bool()}),
    ("complex", "q", {"q": Q.cfloat(), "k": K.cfloat(), "v": V.cfloat()}),
    ("float8", "q", {"q": Q.to(torch.float8_e4m3fn), "k": K.to(torch.float8_e4m3fn), "v": V.to(torch.float8_e4m3fn)}),
    ("k of another dtype", "k", {"k": K.double()}),
    ("v of another dtype", "v", {"v": V.bfloat16()}),
    ("sparse q", "q", {"q": sparse(Q)}),
    ("sparse k", "k", {"k": sparse(K)}),
    ("nested", "q", {"q": nested(Q[0], Q[1, :, :3])}),
    ("jagged", "q", {"q": nested(Q[0], Q[1, :3], layout=torch.jagged)}),
    ("k elsewhere", "k", {"k": K.to("meta")}),
    ("v elsewhere", "v", {"v": V.to("meta")}),
    ("batches differ", "k", {"k": K[:1], "v": V[:1]}),
    ("batch of v differs", "v", {"v": V[:1]}),
    ("lengths of k and v differ", "v", {"v": V[:, :, :6]}),
    ("heads of k and v differ", "v", {"v": V[:, :1]}),
    ("head widths of q and k differ", "k", {"k": K[..., :7]}),
    ("q heads no multiple of k heads", "q", {"q": Q[:, :3]}),
    ("no k heads", "q", {"k": K[:, :0], "v": V[:, :0]}),
    ("q of width 0", "q", {"q": Q[..., :0], "k": K[..., :0]}),
    ("v of width 0", "v", {"v": V[..., :0]}),
]
KEYWORDS: list[tuple[str, str, dict[str, Any]]] = [
    ("an int for causal", "causal", {"causal": 1}),
    ("None for causal", "causal", {"causal": None}),
    ("window 0", "window", {"window": 0}),
    ("negative window", "window", {"window": -3}),
    ("a triple for window", "window", {"window": (1, 2, 3)}),
    ("bool window", "window", {"window": True}),
    ("float window", "window", {"window": 3.0}),
    ("negative side", "window", {"window": (-2, 0)}),
    ("float side", "window", {"window": (1.0, 0)}),
    ("a tensor for window", "window", {"window": ints(3)}),
    ("huge window", "window", {"window": 2**31 + 1}),
    ("huge side", "window", {"window": (2**63, 0)}),
    ("beyond 64 bits", "window", {"window": 10**40}),
    ("negative sinks", "sinks", {"sinks": -1}),
    ("float sinks", "sinks", {"sinks": 1.0}),
    ("None for sinks", "sinks", {"sinks": None}),
    ("huge sinks", "sinks", {"sinks": 2**40}),
    ("align middle", "align", {"align": "middle"}),
    ("float align", "align", {"align": 0.5}),
    ("None for align", "align", {"align": None}),
    ("huge align", "align", {"align": 2**31}),
    ("hugely negative align", "align", {"align": -(2**70)}),
    ("align of another batch", "align", {"align": ints(1, 2, 3)}),
    ("scalar align tensor", "align", {"align": torch.tensor(3)}),
    ("float align tensor", "align", {"align": floats(2)}),
    ("sparse align", "align", {"align": sparse(ints(1, 2))}),
    ("align elsewhere", "align", {"align": ints(1, 2).to("meta")}),
    ("key_lens of another batch", "key_lens", {"key_lens": ints(1, 2, 3)}),
    ("scalar key_lens", "key_lens", {"key_lens": torch.tensor(3)}),
    ("matrix of key_lens", "key_lens", {"key_lens": ints(1, 2)[None]}),
    ("float key_lens", "key_lens", {"key_lens": floats(2)}),
    ("bool key_lens", "key_lens", {"key_lens": floats(2).bool()}),
    ("a list of key_lens", "key_lens", {"key_lens": [3, 4]}),
    ("sparse key_lens", "key_lens", {"key_lens": sparse(ints(1, 2))}),
    ("key_lens elsewhere", "key_lens", {"key_lens": ints(1, 2).to("meta")}),
    ("string scale", "scale", {"scale": "1"}),
    ("NaN scale", "scale", {"scale": math.nan}),
    ("infinite scale", "scale", {"scale": math.inf}),
    ("bool scale", "scale", {"scale": True}),
    ("a scale beyond floats", "scale", {"scale": 10**400}),
    ("a tensor for scale", "scale", {"scale": torch.tensor(1.0)}),
    ("negative softcap", "softcap", {"softcap": -1.0}),
    ("NaN softcap", "softcap", {"softcap": math.nan}),
    ("infinite softcap", "softcap", {"softcap": math.inf}),
    ("slopes of other heads", "alibi_slopes", {"alibi_slopes": floats(2)}),
    ("slopes of another batch", "alibi_slopes", {"alibi_slopes": floats(3, 4)}),
    ("int slopes", "alibi_slopes", {"alibi_slopes": ints(1, 2, 3, 4)}),
    ("a list of slopes", "alibi_slopes", {"alibi_slopes": [0.1] * 4}),
    ("sparse slopes", "alibi_slopes", {"alibi_slopes": sparse(floats(4))}),
    ("slopes elsewhere", "alibi_slopes", {"alibi_slopes": floats(4, device="meta")}),
    ("sink_logits of other heads", "sink_logits", {"sink_logits": floats(2)}),
    ("matrix of sink_logits", "sink_logits", {"sink_logits": floats(2, 4)}),
    ("bool sink_logits", "sink_logits", {"sink_logits": floats(4).bool()}),
    ("a number for sink_logits", "sink_logits", {"sink_logits": 0.0}),
    ("sink_logits elsewhere", "sink_logits", {"sink_logits": floats(4, device="meta")}),
    ("a number for rope", "rope", {"rope": 8}),
    ("rope wider than a head", "rope", {"rope": Rope(10)}),
    ("positions without rope", "positions", {"positions": torch.arange(7)}),
    ("bool positions", "positions", {"rope": Rope(8), "positions": floats(7).bool()}),
    ("float64 positions", "positions", {"rope": Rope(8), "positions": floats(7).double()}),
    ("a list of positions", "positions", {"rope": Rope(8), "positions": [1, 2, 3, 4, 5, 6, 7]}),
    ("a triple of positions", "positions", {"rope": Rope(8), "positions": (floats(5), floats(7), floats(7))}),
    ("positions elsewhere", "positions", {"rope": Rope(8), "positions": floats(7, device="meta")}),
    ("sparse positions", "positions", {"rope": Rope(8), "positions": sparse(floats(7))}),
    ("dropout 1", "dropout_p", {"dropout_p": 1.0}),
    ("negative dropout", "dropout_p", {"dropout_p": -0.1}),
    ("NaN dropout", "dropout_p", {"dropout_p": math.nan}),
    ("string dropout", "dropout_p", {"dropout_p": "0.1"}),
    ("float seed", "seed", {"dropout_p": 0.1, "seed": 1.0}),
    ("bool seed", "seed", {"dropout_p": 0.1, "seed": True}),
    ("huge seed", "seed", {"dropout_p": 0.1, "seed": 2**63}),
    ("two seeds", "seed", {"dropout_p": 0.1, "seed": torch.tensor([1, 2])}),
    ("int32 seed", "seed", {"dropout_p": 0.1, "seed": ints(1)}),
    ("seed without dropout", "seed", {"seed": "x"}),
    ("an int for deterministic", "deterministic", {"deterministic": 1}),
    ("an int for return_lse", "return_lse", {"return_lse": 1}),
    ("an unknown backend", "backend", {"backend": "tpu"}),
    ("a backend that is no name", "backend", {"backend": None}),
    ("a list of backends", "backend", {"backend": ["cpu"]}),
]
MASKS: list[tuple[str, str, dict[str, Any]]] = [
    ("float key_mask", "key_mask", {"key_mask": floats(2, 7)}),
    ("key_mask of another length", "key_mask", {"key_mask": floats(2, 5).bool()}),
    ("key_mask of another batch", "key_mask", {"key_mask": floats(1, 7).bool()}),
    ("key_mask without a batch", "key_mask", {"key_mask": floats(7).bool()}),
    ("a list for key_mask", "key_mask", {"key_mask": [True] * 7}),
    ("sparse key_mask", "key_mask", {"key_mask": sparse(floats(2, 7).bool())}),
    ("key_mask elsewhere", "key_mask", {"key_mask": floats(2, 7, device="meta").bool()}),
    ("one bound", "bounds", {"bounds": ints(0, 0, 0, 0, 0)}),
    ("three bounds", "bounds", {"bounds": (ints(0, 0, 0, 0, 0),) * 3}),
    ("bounds of another length", "bounds", {"bounds": (ints(0, 0), ints(1, 1))}),
    ("bounds of another batch", "bounds", {"bounds": (floats(3, 5).int(), floats(3, 5).int())}),
    ("bounds of two shapes", "bounds", {"bounds": (floats(5).int(), floats(2, 5).int())}),
    ("float bounds", "bounds", {"bounds": (floats(5), floats(5))}),
    ("numbers for bounds", "bounds", {"bounds": (0, 7)}),
    ("sparse bounds", "bounds", {"bounds": (sparse(floats(5).int()), floats(5).int())}),
    ("bounds elsewhere", "bounds", {"bounds": (floats(5).int(), floats(5).int().to("meta"))}),
    ("a number for bias", "bias", {"bias": 1.0}),
    ("int bias", "bias", {"bias": floats(5, 7).int()}),
    ("bias of rank 5", "bias", {"bias": floats(1, 1, 1, 1, 1)}),
    ("bias of another length", "bias", {"bias": floats(5, 6)}),
    ("bias of other heads", "bias", {"bias": floats(2, 5, 7)}),
    ("sparse bias", "bias", {"bias": sparse(floats(5, 7))}),
    ("bias elsewhere", "bias", {"bias": floats(5, 7, device="meta")}),
    ("positions of another length", "positions", {"rope": Rope(8), "positions": torch.arange(5)}),
    ("positions of another batch", "positions", {"rope": Rope(8), "positions": floats(3, 7)}),
    ("pair in the wrong order", "positions[0]", {"rope": Rope(8), "positions": (floats(7), floats(5))}),
    ("queries past positions", "positions", {"rope": Rope(8), "positions": floats(7), "align": 3}),
    ("queries before positions", "positions", {"rope": Rope(8), "positions": floats(7), "align": -1}),
]


@pytest.mark.parametrize(
    "what, argument, overrides", [*TENSORS, *KEYWORDS, *MASKS], ids=lambda x: x if isinstance(x, str) else ""
)
def test_attention(what: str, argument: str, overrides: dict[str, Any]) -> None:
    arguments = {"q": Q, "k": K, "v": V} | overrides
    with pytest.raises(InvalidInput) as raised:
        longattn.attention(**arguments)
    assert raised.value.argument == argument
    assert str(raised.value).startswith(f"{argument}: expected {raised.value.expected}, got")
    with pytest.raises(InvalidInput):
        longattn.explain(**arguments)


PACKED = dict(
    zip(
        ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        random_packed((3, 4), (5, 6), (4, 2), (8, 6)),
        strict=True,
    )
)
OF_PACKED: list[tuple[str, str, dict[str, Any]]] = [
    ("q of rank 4", "q", {"q": PACKED["q"][None]}),
    ("k of rank 2", "k", {"k": PACKED["k"][0]}),
    ("int q", "q", {"q": PACKED["q"].int()}),
    ("lengths of k and v differ", "v", {"v": PACKED["v"][:10]}),
    ("k elsewhere", "k", {"k": PACKED["k"].to("meta")}),
    ("key_mask", "key_mask", {"key_mask": floats(2, 7).bool()}),
    ("bounds", "bounds", {"bounds": (floats(7).int(), floats(7).int())}),
    ("bias", "bias", {"bias": floats(7, 11)}),
    ("None for cu_seqlens", "cu_seqlens_q", {"cu_seqlens_q": None}),
    ("a list of cu_seqlens", "cu_seqlens_k", {"cu_seqlens_k": [0, 5, 11]}),
    ("float cu_seqlens", "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0.0, 3.0, 7.0])}),
    ("int16 cu_seqlens", "cu_seqlens_q", {"cu_seqlens_q": ints(0, 3, 7).short()}),
    ("matrix of cu_seqlens", "cu_seqlens_q", {"cu_seqlens_q": ints(0, 3, 7)[None]}),
    ("empty cu_seqlens", "cu_seqlens_q", {"cu_seqlens_q": ints()}),
    ("sparse cu_seqlens", "cu_seqlens_q", {"cu_seqlens_q": sparse(ints(0, 3, 7))}),
    ("cu_seqlens elsewhere", "cu_seqlens_k", {"cu_seqlens_k": ints(0, 5, 11).to("meta")}),
    ("cu_seqlens of two batches", "cu_seqlens_k", {"cu_seqlens_k": ints(0, 3, 5, 11)}),
    ("cu_seqlens that decrease", "cu_seqlens_q", {"cu_seqlens_q": ints(0, 5, 3)}),
    ("cu_seqlens that decrease in the end", "cu_seqlens_k", {"cu_seqlens_k": ints(0, 11, 5)}),
    ("negative cu_seqlens", "cu_seqlens_q", {"cu_seqlens_q": ints(-1, 3, 7)}),
    ("cu_seqlens beyond the tokens", "cu_seqlens_q", {"cu_seqlens_q": ints(0, 3, 8)}),
    ("cu_seqlens far beyond", "cu_seqlens_k", {"cu_seqlens_k": ints(0, 5, 2**31 - 1)}),
    ("cu_seqlens beyond 32 bits", "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 3, 2**32 + 7])}),
    ("cu_seqlens below 32 bits", "cu_seqlens_q", {"cu_seqlens_q": torch.tensor([-(2**32), 3, 7])}),
    ("negative max_seqlen", "max_seqlen_q", {"max_seqlen_q": -1}),
    ("float max_seqlen", "max_seqlen_k", {"max_seqlen_k": 6.0}),
    ("bool max_seqlen", "max_seqlen_k", {"max_seqlen_k": True}),
    ("None for max_seqlen", "max_seqlen_q", {"max_seqlen_q": None}),
    ("max_seqlen below a length", "max_seqlen_q", {"max_seqlen_q": 3}),
    ("max_seqlen below a length of keys", "max_seqlen_k", {"max_seqlen_k": 5}),
    ("positions of another length", "positions", {"rope": Rope(8), "positions": torch.arange(7)}),
    ("positions by sequence", "positions", {"rope": Rope(8), "positions": floats(2, 11)}),
    ("pair in the wrong order", "positions[0]", {"rope": Rope(8), "positions": (floats(11), floats(7))}),
]


@pytest.mark.parametrize(
    "what, argument, overrides", [*OF_PACKED, *KEYWORDS], ids=lambda x: x if isinstance(x, str) else ""
)
def test_attention_varlen(what: str, argument: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as raised:
        longattn.attention_varlen(**{**PACKED, **overrides})
    assert raised.value.argument == argument
    with pytest.raises(InvalidInput) as raised:
        longattn.explain(**{**PACKED, **overrides})
    assert raised.value.argument == argument


@pytest.mark.parametrize("backend", backend_names(native=True))
def test_cu_seqlens_are_checked_whoever_runs_them(backend: str) -> None:
    for name, cu_seqlens in (("cu_seqlens_q", ints(0, 5, 3)), ("cu_seqlens_k", ints(0, 5, 12))):
        with pytest.raises(InvalidInput) as raised:
            longattn.attention_varlen(**{**PACKED, name: cu_seqlens}, backend=backend)
        assert raised.value.argument == name


def test_integers_cannot_require_grad() -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        longattn.attention(Q.int().requires_grad_(), K.int(), V.int())


def test_a_named_backend_never_falls_back() -> None:
    wide = torch.zeros(1, 1, 2, 513)
    with pytest.raises(Unsupported, match="head_dim|kernels are missing") as raised:
        longattn.attention(wide, wide, wide, backend="cpu")
    assert list(raised.value.reasons) == ["cpu"]


def test_errors_travel_between_processes() -> None:
    invalid = InvalidInput("q", "a tensor", "3")
    unsupported = Unsupported("a call", {"cpu": ["one", "two"], "reference": ["three"]})
    for error in (invalid, unsupported):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_a_message_is_a_line_that_can_be_read() -> None:
    text = str(InvalidInput("window", "an int", torch.zeros(50, 50)))
    assert text.startswith("window: expected an int, got tensor([[0.") and "\n" not in text and len(text) < 300


def test_errors_are_what_callers_expect_to_catch() -> None:
    assert issubclass(InvalidInput, ValueError) and issubclass(Unsupported, NotImplementedError)
    text = str(Unsupported("a call", {"cpu": ["one", "two"], "reference": ["three"]}))
    assert "a call" in text and "cpu: one; two" in text and "reference: three" in text


def junk(draw: random.Random) -> Any:
    """Something that an argument might be given by mistake; small, as what happens to fit is run."""
    shape = [draw.choice((0, 1, 2, 3, 4, 7, 8)) for _ in range(draw.randrange(6))]
    shape = draw.choice((shape, [2], [3], [4], [5], [7], [11], [2, 4], [2, 5], [2, 7], [5, 7]))
    dtype = draw.choice(
        (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)
    )
    makers: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: draw.choice((True, False)),
        lambda: draw.choice((-(2**63), -(2**31), -2, -1, 0, 1, 2, 7, 2**31 - 1, 2**31, 2**63, 10**30)),
        lambda: draw.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 1.0, 1e300)),
        lambda: draw.choice(("", "end", "start", "auto", "cpu", "reference", "\0")),
        lambda: [draw.choice((-1, 0, 3, 2.0, None))] * draw.randrange(4),
        lambda: tuple(draw.choice((-2, -1, 0, 3, 2**40)) for _ in range(draw.randrange(4))),
        lambda: Rope(draw.choice((2, 4, 8))),
        lambda: torch.full(shape, draw.choice((-(2**31), -1, 0, 1, 3, 6, 2**31 - 1))).to(dtype),
        lambda: torch.randn(shape).mul(1e3).nan_to_num().to(dtype),
        lambda: torch.full(shape, math.nan),
        lambda: torch.zeros(shape, dtype=dtype, device="meta"),
        lambda: torch.zeros(shape).to_sparse(),
        lambda: torch.arange(24).view(2, 3, 4)[draw.randrange(2)].t(),
        lambda: torch.zeros(()).expand([size or 1 for size in shape]),
        object,
    )
    return draw.choice(makers)()


EVERYWHERE: dict[str, Any] = {
    "causal": True,
    "window": 3,
    "sinks": 1,
    "align": 1,
    "key_lens": ints(3, 7),
    "scale": 0.5,
    "softcap": 1.0,
    "alibi_slopes": floats(4),
    "sink_logits": floats(4),
    "rope": Rope(8),
    "dropout_p": 0.1,
    "seed": 1,
    "deterministic": True,
    "return_lse": True,
    "backend": "auto",
}
DENSE = {
    "key_mask": floats(2, 7).bool(),
    "bounds": (ints(0, 0, 0, 0, 0), ints(7, 7, 7, 7, 7)),
    "bias": floats(5, 7),
}
# The call, right arguments, and right options.
FUZZED: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "attention": (longattn.attention, {"q": Q, "k": K, "v": V}, EVERYWHERE | DENSE),
    "attention_varlen": (longattn.attention_varlen, PACKED, EVERYWHERE),
    "apply_rope": (longattn.apply_rope, {"x": Q, "rope": Rope(4), "positions": None}, {"backend": "auto"}),
}


@pytest.mark.native
@pytest.mark.parametrize("function", FUZZED)
@pytest.mark.filterwarnings("ignore:longattn runs on its slow float64 reference backend")
def test_garbage_never_crashes(function: str) -> None:
    """Most of a call is right and some of it is not: it runs, or says which argument is wrong, or who cannot run it."""
    call, arguments, options = FUZZED[function]
    draw = random.Random(0)
    outcomes = {"runs": 0, "raises": 0}
    for _ in range(1500):
        given = arguments | {
            name: options[name] for name in draw.sample(sorted(options), draw.randrange(len(options) + 1) // 3)
        }
        wrong = draw.sample(
            sorted({*arguments, *options, *(["positions"] if "rope" in given else [])}), draw.choice((1, 1, 2))
        )
        given |= {name: junk(draw) for name in wrong}
        try:
            call(**given)
            outcomes["runs"] += 1
        except (InvalidInput, Unsupported):
            outcomes["raises"] += 1
        except Exception as error:
            raise AssertionError(f"{function} with { ({name: given[name] for name in wrong}) }") from error
    assert min(outcomes.values()) > 20, outcomes
