"""Rope as a value, its rotation against complex numbers, and its agreement with transformers."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn import InvalidInput, Rope
from longattn.scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE, Proportional, YaRN

LONGROPE = LongRoPE(4, 8, (1.0, 1.1, 1.2, 1.3), (2.0, 3.0, 4.0, 5.0))
SCALINGS = [None, Linear(2), NTK(2), DynamicNTK(2, 8), YaRN(4, 8), LONGROPE, Llama3(4, 8), Proportional(0.5)]
scalings = pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.name if scaling else "none")
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def by_complex_numbers(x: torch.Tensor, rope: Rope, positions: torch.Tensor, length: int) -> torch.Tensor:
    """The rotation in float64, one complex multiplication for each pair; positions [N]."""
    inv_freq, attention_factor = rope.frequencies(length)
    angle = (positions.float()[:, None] * inv_freq).double()
    pairs = torch.arange(rope.dim).view(-1, 2) if rope.interleaved else torch.arange(rope.dim).view(2, -1).T
    out = x.double().clone()
    turned = torch.view_as_complex(out[..., pairs].contiguous()) * torch.polar(torch.ones_like(angle), angle)
    out[..., pairs] = torch.view_as_real(turned) * attention_factor
    return out


# Rotation.


@layouts
@scalings
def test_rotation_is_a_complex_product(scaling, interleaved):
    rope = Rope(8, 100.0, scaling, interleaved)
    x, positions = torch.randn(2, 3, 5, 12, dtype=torch.float64), torch.tensor([0, 7, 3, 11, 200])
    for length in (None, 4, 9, 1000):
        expected = by_complex_numbers(x, rope, positions, 201 if length is None else length)
        torch.testing.assert_close(rope.rotate(x, positions, length), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 1_000_003, 16_777_217, 100_000_007])
def test_low_precision_rounds_the_result_only(dtype, position):
    rope = Rope(64)
    x, positions = torch.randn(2, 64).to(dtype), torch.tensor([position, position + 1])
    exact = by_complex_numbers(x, rope, positions, 1)
    out = rope.rotate(x, positions)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_angles_are_float32_products():
    rope, positions = Rope(64, 500000.0), torch.tensor([1_000_003, 5_000_011, 2**24 + 1, 2**31 + 12345])
    inv_freq, _ = rope.frequencies(1)
    cos, sin = rope.tables(positions, dtype=torch.float64)
    for row, position in enumerate(positions):
        for i in range(32):
            product = position.double().float().double() * inv_freq[i].double()  # exact: 48 bits
            angle = product.float().item()
            assert cos[row, i].item() == pytest.approx(math.cos(angle), abs=1e-15)
            assert sin[row, i].item() == pytest.approx(math.sin(angle), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tables(dtype):
    rope, positions = Rope(8), torch.arange(6).view(2, 3) * 1000
    cos, sin = rope.tables(positions, dtype=dtype)
    exact = (positions.float()[..., None] * rope.frequencies(1)[0]).double()
    assert cos.dtype == sin.dtype == dtype and cos.shape == sin.shape == (2, 3, 4)
    for table, expected in ((cos, exact.cos()), (sin, exact.sin())):
        torch.testing.assert_close(table.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@layouts
@scalings
def test_norm_is_scaled_by_the_attention_factor(scaling, interleaved):
    rope = Rope(8, 10000.0, scaling, interleaved)
    x, positions = torch.randn(5, 12, dtype=torch.float64), torch.arange(5)
    out, (_, attention_factor) = rope.rotate(x, positions), rope.frequencies(5)
    torch.testing.assert_close(out[:, :8].norm(dim=-1), x[:, :8].norm(dim=-1) * attention_factor)
    assert torch.equal(out[:, 8:], x[:, 8:])


@given(
    st.integers(1, 16).map(lambda pairs: 2 * pairs),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 2**12),
    st.integers(0, 2**12),
)
def test_scores_depend_on_the_distance(dim, passing, interleaved, position, shift):
    rope = Rope(dim, interleaved=interleaved)
    q, k = torch.randn(2, 1, dim + passing, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        return (rope.rotate(q, torch.tensor([i])) * rope.rotate(k, torch.tensor([j]))).sum()

    # three angles, each rounded to float32 at less than 2^13
    tolerance = 3 * 2.0**-12 * (q.norm() * k.norm()).item()
    torch.testing.assert_close(score(position + shift, shift), score(position, 0), rtol=0, atol=tolerance)


@scalings
def test_interleaved_is_halves_permuted(scaling):
    halves, interleaved = Rope(8, 100.0, scaling), Rope(8, 100.0, scaling, interleaved=True)
    x, positions = torch.randn(2, 5, 8), torch.arange(5)
    order = torch.arange(8).view(2, 4).T.flatten()  # 0 4 1 5 2 6 3 7
    assert torch.equal(interleaved.rotate(x[..., order], positions), halves.rotate(x, positions)[..., order])


@layouts
def test_positions_of_each_batch(interleaved):
    rope, x = Rope(4, interleaved=interleaved), torch.randn(2, 3, 5, 6)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 8, 100, 6, 5]])
    out = rope.rotate(x, positions)
    for b in range(2):
        assert torch.equal(out[b], rope.rotate(x[b], positions[b]))


def test_longest_position_sets_the_length():
    for scaling in (DynamicNTK(2, 8), LONGROPE):
        rope, x = Rope(8, scaling=scaling), torch.randn(2, 8)
        for last in (6, 7, 8, 40):
            positions = torch.tensor([0, last])
            assert torch.equal(rope.rotate(x, positions), rope.rotate(x, positions, last + 1))
        assert not torch.equal(rope.rotate(x, positions, 8), rope.rotate(x, positions, 9))


def test_empty():
    rope = Rope(8, scaling=DynamicNTK(2, 8))
    assert rope.rotate(torch.randn(2, 3, 0, 8), torch.arange(0)).shape == (2, 3, 0, 8)
    assert rope.rotate(torch.randn(0, 3, 4, 8), torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 3, 4, 8)


@layouts
def test_gradient(interleaved):
    rope, positions = Rope(4, scaling=YaRN(4, 8), interleaved=interleaved), torch.tensor([0, 5, 1_000_003])
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope.rotate(x, positions), x)


def test_strides_do_not_matter():
    rope, x, positions = Rope(8), torch.randn(2, 5, 3, 16).transpose(1, 2), torch.arange(5)
    assert torch.equal(rope.rotate(x[..., ::2], positions), rope.rotate(x[..., ::2].contiguous(), positions))


# Values.


@scalings
def test_value(scaling):
    rope = Rope(8, 500.0, scaling, interleaved=True)
    same = Rope(8, 500, scaling, True)
    assert rope == same and hash(rope) == hash(same) and len({rope, same}) == 1
    assert rope != Rope(8, 500.0, scaling) and rope != Rope(8, 501.0, scaling, True)
    copies = (
        Rope.from_dict(json.loads(json.dumps(rope.to_dict()))),
        pickle.loads(pickle.dumps(rope)),
        copy.deepcopy(rope),
        dataclasses.replace(rope),
    )
    for other in copies:
        assert other == rope and torch.equal(other.frequencies(9)[0], rope.frequencies(9)[0])
    with pytest.raises(AttributeError):
        rope.base = 2.0


@scalings
def test_frequencies_are_kept(scaling):
    rope = Rope(8, scaling=scaling)
    inv_freq, attention_factor = rope.frequencies(8)
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (4,) and isinstance(attention_factor, float)
    assert rope.frequencies(1)[0] is inv_freq
    assert rope.frequencies(8, "meta")[0] is rope.frequencies(8, torch.device("meta"))[0]
    assert rope.frequencies(100, "meta")[0].is_meta
    assert rope.depends_on_length is (not torch.equal(rope.frequencies(100)[0], inv_freq))


def test_default_dtype_device_and_inference_mode_do_not_matter():
    expected = Rope(8, scaling=YaRN(4, 8)).frequencies(1)[0]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            rope = Rope(8, scaling=YaRN(4, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rope.frequencies(1)[0], expected) and rope.frequencies(1)[0].dtype == torch.float32
    with torch.inference_mode():
        assert not rope.frequencies(1, "meta")[0].is_inference()
    rope.rotate(torch.randn(3, 8, requires_grad=True), torch.arange(3)).sum().backward()


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        *[("dim", lambda bad=bad: Rope(bad)) for bad in (0, 1, 3, -2, 4.0, "8", None, True)],
        *[("base", lambda bad=bad: Rope(8, bad)) for bad in (1, 0, -5.0, math.nan, math.inf, "10000", None, True)],
        ("scaling", lambda: Rope(8, scaling="yarn")),
        ("scaling", lambda: Rope(8, scaling=4.0)),
        ("interleaved", lambda: Rope(8, interleaved=1)),
        ("dim", lambda: Rope(2, scaling=NTK(2))),
        ("dim", lambda: Rope(2, scaling=DynamicNTK(2, 8))),
        ("short_factor", lambda: Rope(6, scaling=LONGROPE)),
        ("long_factor", lambda: Rope(8, scaling=LongRoPE(4, 8, (1.0,) * 4, (1.0,) * 3))),
        ("rope", lambda: Rope.from_dict({"base": 4.0})),
        ("rope", lambda: Rope.from_dict({"dim": 8, "width": 4})),
        ("rope", lambda: Rope.from_dict("rope")),
        ("scaling", lambda: Rope.from_dict({"dim": 8, "scaling": {"type": "other"}})),
    ],
)
def test_bad_arguments(argument, make):
    with pytest.raises(InvalidInput, match=f"^{argument}: expected"):
        make()


@pytest.mark.parametrize(
    ("argument", "x", "positions"),
    [
        ("x", torch.zeros(3, 8, dtype=torch.int64), torch.arange(3)),
        ("x", torch.zeros(8), torch.arange(1)),
        ("x", torch.zeros(3, 6), torch.arange(3)),
        ("x", torch.zeros(2, 3, 8), torch.zeros(2, 3)),
        ("positions", torch.zeros(3, 8), torch.arange(4)),
        ("positions", torch.zeros(3, 8), torch.tensor(3)),
        ("positions", torch.zeros(3, 8), torch.ones(3, dtype=torch.bool)),
        ("positions", torch.zeros(3, 8), torch.ones(3, dtype=torch.complex64)),
        ("positions", torch.zeros(2, 1, 3, 8), torch.zeros(1, 3)),
    ],
)
def test_bad_rotation(argument, x, positions):
    with pytest.raises(InvalidInput, match=f"^{argument}: expected"):
        Rope(8).rotate(x, positions)


def test_documentation():
    result = doctest.testfile(str(Path(__file__).parents[1] / "docs" / "rope.md"), module_relative=False)
    assert result.attempted > 0 and result.failed == 0


# torch.compile.


@pytest.fixture
def graphs() -> torch._dynamo.testing.CompileCounter:
    """Counts the graphs that torch.compile makes, and runs them in eager mode."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    return CompileCounter()


def weigh(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    inv_freq, attention_factor = rope.frequencies(x.shape[0])
    return rope.rotate(x, torch.arange(x.shape[0]), x.shape[0]) * inv_freq.sum() * attention_factor


@scalings
def test_compiles_whole(scaling):
    torch._dynamo.reset()
    compiled = torch.compile(weigh, backend="eager", fullgraph=True)
    rope = Rope(8, 500.0, scaling, interleaved=True)
    for n in (3, 8, 9, 20, 21, 22, 23, 40, 41, 42, 43):
        x = torch.randn(n, 8)
        assert torch.equal(compiled(x, rope), weigh(x, rope))


def test_compiles_for_autograd():
    torch._dynamo.reset()
    compiled = torch.compile(weigh, backend="aot_eager", fullgraph=True)
    for rope in (Rope(8), Rope(8, scaling=LONGROPE)):
        for n in (3, 20, 41):
            x = torch.randn(n, 8)
            assert torch.equal(compiled(x, rope), weigh(x, rope))


def test_equal_layers_share_a_graph(graphs):
    compiled = torch.compile(weigh, backend=graphs, fullgraph=True)
    x = torch.randn(5, 8)
    for base in (10.0, 100.0, 1000.0, 1000.0):
        rope = Rope(8, base, scaling=Linear(2))
        assert torch.equal(compiled(x, rope), weigh(x, rope))
    assert graphs.frame_count == 1


def test_made_inside_a_compiled_function():
    def turn(x: torch.Tensor) -> torch.Tensor:
        return weigh(x, Rope(8, scaling=YaRN(4, 8)))

    torch._dynamo.reset()
    x = torch.randn(5, 8)
    assert torch.equal(torch.compile(turn, backend="eager", fullgraph=True)(x), turn(x))


# transformers.


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    """What these tests need of transformers, its warnings about odd parameters silenced."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def init(config: Any, seq_len: int | None, layer_type: str | None = None) -> tuple[torch.Tensor, float]:
        parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
        if parameters["rope_type"] == "default":
            return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len, layer_type=layer_type)

    return SimpleNamespace(transformers=transformers, init=init)


def assert_agrees(rope: Rope, expected: tuple[torch.Tensor, float], length: int) -> None:
    inv_freq, attention_factor = rope.frequencies(length)
    torch.testing.assert_close(inv_freq, expected[0], rtol=1e-6, atol=0)
    assert attention_factor == pytest.approx(expected[1], rel=1e-6)


FACTORS = st.one_of(st.integers(1, 64), st.floats(1.0, 64.0))
LENGTHS = st.integers(16, 200_000)


@st.composite
def rope_parameters(draw: st.DrawFn, rope_type: str, pairs: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": draw(st.floats(100.0, 1e8))}

    def maybe(name: str, values: st.SearchStrategy[Any]) -> None:
        if draw(st.booleans()):
            parameters[name] = draw(values)

    if rope_type in ("linear", "dynamic", "yarn", "llama3"):
        parameters["factor"] = draw(FACTORS)
    if rope_type in ("yarn", "longrope", "llama3"):
        parameters["original_max_position_embeddings"] = draw(LENGTHS)
    match rope_type:
        case "yarn":
            maybe("attention_factor", st.floats(0.1, 2.0))
            maybe("beta_fast", st.floats(8.0, 64.0))
            maybe("beta_slow", st.floats(0.25, 4.0))
            maybe("mscale", st.sampled_from([0, 0.707, 1.0, 2.0]))
            maybe("mscale_all_dim", st.sampled_from([0, 0.707, 1.0]))
            maybe("truncate", st.booleans())
        case "longrope":
            for name in ("short_factor", "long_factor"):
                parameters[name] = draw(st.lists(st.floats(1.0, 64.0), min_size=pairs, max_size=pairs))
            maybe("factor", FACTORS)
            maybe("attention_factor", st.floats(0.1, 2.0))
        case "llama3":
            parameters["low_freq_factor"] = draw(st.floats(0.5, 2.0))
            parameters["high_freq_factor"] = draw(st.floats(3.0, 8.0))
        case "proportional":
            maybe("factor", FACTORS)
            maybe("partial_rotary_factor", st.floats(0.0, 1.0))
    return parameters


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
@settings(max_examples=50)
@given(data=st.data())
def test_from_hf_agrees(hf, rope_type, data):
    heads, pairs = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 64))
    parameters = data.draw(rope_parameters(rope_type, pairs))
    original = parameters.get("original_max_position_embeddings", data.draw(LENGTHS))
    config = hf.transformers.LlamaConfig(
        hidden_size=heads * 2 * pairs,
        num_attention_heads=heads,
        num_hidden_layers=1,
        max_position_embeddings=original * data.draw(st.integers(1, 16)),
        rope_parameters=parameters,
    )
    rope = Rope.from_hf(config)
    assert rope.dim == 2 * pairs and rope.base == parameters["rope_theta"] and not rope.interleaved
    trained = config.max_position_embeddings if rope_type == "dynamic" else original
    for length in (1, trained - 1, trained, trained + 1, data.draw(st.integers(trained + 2, 32 * trained))):
        assert_agrees(rope, hf.init(config, length), length)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_from_hf_partial_rotation(hf, rope_type):
    parameters = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 512,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = hf.transformers.LlamaConfig(head_dim=32, max_position_embeddings=2048, rope_parameters=parameters)
    rope = Rope.from_hf(config)
    assert rope.dim == 16
    for length in (512, 513, 4096):
        assert_agrees(rope, hf.init(config, length), length)


def test_from_hf_layer_types(hf):
    gemma3, gemma4 = hf.transformers.Gemma3TextConfig(), hf.transformers.Gemma4TextConfig()
    assert Rope.from_hf(gemma3, "full_attention") == Rope(256, 1_000_000.0)
    assert Rope.from_hf(gemma3, "sliding_attention") == Rope(256, 10_000.0)
    full = Rope.from_hf(gemma4, "full_attention")  # these layers have wider heads
    assert full == Rope(512, 1_000_000.0, Proportional(0.25))
    assert_agrees(full, hf.init(gemma4, None, "full_attention"), 1)
    with pytest.raises(InvalidInput, match=r"^layer_type: expected one of \['full_attention', 'sliding_attention'\]"):
        Rope.from_hf(gemma3)


def test_from_hf_truncate_inside_a_layer_type_is_not_read(hf):
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "truncate": False,
    }
    config = hf.transformers.Gemma3TextConfig(
        rope_parameters={"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    )
    assert_agrees(Rope.from_hf(config, "full_attention"), hf.init(config, None, "full_attention"), 1)


MODELS = {  # a model of each way to write the pairs down
    "llama": "LlamaConfig",
    "qwen3": "Qwen3Config",
    "gpt_neox": "GPTNeoXConfig",
    "phi3": "Phi3Config",
    "deepseek_v3": "DeepseekV3Config",
    "glm": "GlmConfig",
    "cohere": "CohereConfig",
    "helium": "HeliumConfig",
}


@pytest.mark.parametrize("model_type", MODELS)
def test_rotates_as_the_model_does(hf, model_type):
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = getattr(hf.transformers, MODELS[model_type])()
    embedding = next(
        cls
        for name, cls in vars(module).items()
        if name.endswith("RotaryEmbedding") and cls.__module__ == module.__name__
    )
    turn = getattr(module, "apply_rotary_pos_emb_interleave", module.apply_rotary_pos_emb)
    rope = Rope.from_hf(config)
    q, k = torch.randn(2, 1, 2, 7, rope.dim)
    positions = torch.arange(7)
    theirs_q, theirs_k = turn(q, k, *embedding(config)(q, positions[None]))
    scores = rope.rotate(q, positions) @ rope.rotate(k, positions).mT
    torch.testing.assert_close(scores, theirs_q @ theirs_k.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(32, 5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(32, 1e4, Linear(2))),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2}}, Rope(32, 1e4, DynamicNTK(2, 4096))),
        (
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4, "attention_factor": None}},
            Rope(32, 1e4, YaRN(4, 4096)),
        ),
        (
            {
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "original_max_position_embeddings": 1024,
                "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            },
            Rope(8, 1e4, LongRoPE(4, 1024, (1.0,) * 4, (2.0,) * 4)),
        ),
        ({"rope_theta": 1e6, "head_dim": 48}, Rope(48, 1e6)),
        ({"rotary_pct": 0.25, "rotary_emb_base": 2e4}, Rope(8, 2e4)),
        ({"rope_theta": 1e4, "rotary_dim": 16}, Rope(16, 1e4)),
        ({"rotary_dim": 16, "model_type": "gptj"}, Rope(16, 1e4, interleaved=True)),
        ({"rope_theta": 1e4, "rope_interleave": True}, Rope(32, 1e4, interleaved=True)),
        ({"rope_theta": 1e4, "rope_interleave": False, "model_type": "glm"}, Rope(32, 1e4)),
    ],
)
def test_from_hf_attributes_before_version_5(attributes, expected):
    plain = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 4096}
    assert Rope.from_hf(SimpleNamespace(**plain, **attributes)) == expected


def test_from_hf_local_base_before_version_5():
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = SimpleNamespace(head_dim=256, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=scaling)
    assert Rope.from_hf(config, "full_attention") == Rope(256, 1e6, Linear(8))
    assert Rope.from_hf(config, "sliding_attention") == Rope(256, 1e4)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "config: expected a model with rotary positions"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "config: expected a rope type out of"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "config: expected rope_parameters with factor",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}, "config: .*max_position"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}}, "factor: expected"),
        ({"rope_parameters": {"rope_theta": 0}}, "base: expected"),
        ({"rope_theta": 1e4, "head_dim": 7}, "dim: expected"),
        ({"rope_theta": 1e4, "head_dim": None}, "config: expected a configuration with hidden_size"),
        ({"rope_theta": 1e4, "model_type": "nanochat"}, "config: .*nanochat: it turns the other way round"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "other": None}}, "layer_type: expected one of"),
    ],
)
def test_from_hf_refuses(attributes, message):
    with pytest.raises(InvalidInput, match=f"^{message}"):
        Rope.from_hf(SimpleNamespace(**{"head_dim": 32, **attributes}), "other")
