"""extend on our models: the config says the method, the weights are shared, and a saved model is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longattn import InvalidInput, scaling
from longattn.extension import (
    BaseChange,
    DualChunk,
    LayerPattern,
    LearnedPositions,
    LogN,
    Method,
    SelfExtend,
    ShiftedGroups,
    StreamingLLM,
)
from longattn.integrations import extend
from longattn.models import (
    Decoder,
    Encoder,
    GenerationConfig,
    MaskedLM,
    TransformerConfig,
    build,
    extended_config,
    generate,
    make_caches,
)
from longattn.training import Checkpoint, load_model, save_checkpoint

SIZES: dict[str, Any] = {"vocab_size": 50, "dim": 32, "layers": 3, "heads": 4, "max_length": 16}
ROTARY: list[Any] = [
    scaling.Linear(4),
    scaling.NTK(4),
    scaling.DynamicNTK(4, 16),
    scaling.YaRN(4, 16),
    scaling.LongRoPE(4, 16, (1.0,) * 4, (1.0, 2.0, 3.0, 4.0)),
    scaling.Llama3(4, 16),
    scaling.Proportional(0.5),
    BaseChange(5e5),
    LogN(16),
    SelfExtend(4, 6),
    DualChunk(8, 12),
    StreamingLLM(10, 2),
    LayerPattern("SNL", 5, 1),
    ShiftedGroups(8),
]


def llama(**changes: Any) -> Decoder:
    torch.manual_seed(1)
    model = Decoder(TransformerConfig(**{**SIZES, "kv_heads": 2, **changes})).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(5)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape)


@pytest.mark.parametrize("method", ROTARY, ids=lambda method: method.name)
def test_weights_are_shared_and_what_is_saved_is_the_same(method: Any, tmp_path: Path) -> None:
    model = llama()
    extended = extend(model, method)
    assert type(extended) is Decoder and not extended.training
    shared = dict(model.named_parameters())
    assert all(weight is shared[name] for name, weight in extended.named_parameters())
    config = extended.config
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config != model.config
    text = tokens(2, 40)
    if not isinstance(method, ShiftedGroups):
        assert not torch.allclose(extended(text), model(text))
    save_checkpoint(tmp_path / "model.safetensors", Checkpoint(config, extended.state_dict()))
    loaded = load_model(tmp_path / "model.safetensors").double()
    torch.testing.assert_close(loaded(text), extended(text), rtol=1e-4, atol=1e-5)  # of weights read as float32
    read = (Method if isinstance(method, Method) else scaling.Scaling).read(json.loads(json.dumps(method.to_dict())))
    assert read == method and hash(read) == hash(method)


@pytest.mark.parametrize(
    "method", [LogN(8), SelfExtend(3, 5), DualChunk(6, 8), StreamingLLM(7, 2), LayerPattern("SNL", 5, 1)], ids=str
)
def test_generation_continues_what_a_single_reading_says(method: Any) -> None:
    model = extend(llama(), method)
    prompts = [tokens(30).tolist(), tokens(11).tolist()]
    found = generate(model, prompts, GenerationConfig(max_new_tokens=9))
    for prompt, result in zip(prompts, found, strict=True):
        text = list(prompt)
        with torch.no_grad():
            for _ in range(9):
                text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        assert list(result.tokens) == text[len(prompt) :]


def test_methods_add_up_and_replace_their_own_kind() -> None:
    config = TransformerConfig(**SIZES)
    for method in (scaling.YaRN(4, 16), LogN(16), SelfExtend(2, 4), scaling.NTK(4), DualChunk(8, 9), LogN(8)):
        config = extended_config(config, method)
    assert config.rope_scaling == scaling.NTK(4)
    assert config.methods == (DualChunk(8, 9), LogN(8))
    config = extended_config(extended_config(config, StreamingLLM(8)), LayerPattern("SL", 4))
    assert (config.pattern, config.window, config.sinks, config.window_positions) == ("SL", 4, 0, "original")


LONG = scaling.LongRoPE(4, 16, (1.0,) * 4, (1.0, 1.5, 2.0, 4.0))


@pytest.mark.parametrize("rotary", [scaling.DynamicNTK(4, 16), LONG], ids=lambda scaling: scaling.name)
@pytest.mark.parametrize(
    "method",
    [
        LogN(16),
        SelfExtend(4, 6),
        DualChunk(8, 12),
        ShiftedGroups(8),
        StreamingLLM(10, 0),
        StreamingLLM(10, 2),
        StreamingLLM(30, 3),
        LayerPattern("S", 10, 2),
        LayerPattern("S", 30),
        LayerPattern("N"),
    ],
    ids=str,
)
def test_frequencies_that_depend_on_the_length_are_the_same_through_caches(rotary: Any, method: Any) -> None:
    """With one layer there is no other reason for a difference."""
    for pair in ((rotary, method), (method, rotary)):
        model = llama(layers=1)
        try:
            for one in pair:
                model = extend(model, one)
        except InvalidInput:  # as two say where tokens are, or a window is too long before the scaling is there
            assert isinstance(method, (SelfExtend, DualChunk)) or (pair[0] is method and method.window == 30)
            continue
        for length in (9, 16, 17, 70):
            text = tokens(1, length)
            with torch.no_grad():
                whole = model(text)
                at_once = model(text, caches=make_caches(model, 1, length))
                torch.testing.assert_close(at_once, whole, rtol=1e-6, atol=1e-6)
                caches = make_caches(model, 1, length)
                for part in text.split([length - 2, 1, 1], 1):
                    last = model(part, caches=caches)[:, -1]
            torch.testing.assert_close(last, whole[:, -1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("style", ["gpt2", "bert"])
def test_learned_positions_are_interpolated(style: str, factor: float) -> None:
    model = build(TransformerConfig.style(style, **SIZES)).double().eval()
    extended = extend(model, LearnedPositions(factor))
    table, old = extended.position_embedding.weight, model.position_embedding.weight
    assert extended.config.max_length == len(table) == int(16 * factor)
    for place, row in enumerate(table):
        at = min(place / factor, 15.0)
        below = int(at)
        wanted = old[below] + (at - below) * (old[min(below + 1, 15)] - old[below])
        torch.testing.assert_close(row, wanted)
    assert table.requires_grad and extended.embedding.weight is model.embedding.weight
    assert extended(tokens(1, int(16 * factor))).isfinite().all()
    with pytest.raises(InvalidInput):
        extended(tokens(1, int(16 * factor) + 1))


def test_encoders_take_what_is_not_causal() -> None:
    model = build(TransformerConfig.style("modern-encoder", **SIZES)).eval()
    for method in (scaling.YaRN(4, 16), BaseChange(1e6), LayerPattern("SN", 4)):
        assert isinstance(extend(model, method), Encoder)
    for method in (LogN(16), SelfExtend(2, 4), StreamingLLM(4), ShiftedGroups(4)):
        with pytest.raises(InvalidInput):
            extend(model, method)


def test_nope_layers_do_not_know_where_tokens_stand() -> None:
    model = extend(llama(), LayerPattern("N"))
    rotated = [block.attention.rope for block in model.blocks]
    assert rotated == [None] * 3
    text = tokens(1, 12)
    moved = text[:, [1, 0, *range(2, 12)]]
    before, after = model.blocks[0](model.embedding(text)), model.blocks[0](model.embedding(moved))
    torch.testing.assert_close(before[:, 2:], after[:, 2:])  # a set of keys, in any order


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (lambda: build(TransformerConfig.style("gpt2", **SIZES)), scaling.YaRN(4, 16)),
        (lambda: build(TransformerConfig.style("gpt2", **SIZES)), SelfExtend(4, 4)),
        (lambda: build(TransformerConfig.style("gpt2", **SIZES)), LayerPattern("NL")),
        (lambda: build(TransformerConfig.style("gpt2", **SIZES)), StreamingLLM(8)),
        (llama, LearnedPositions(2)),
        (llama, "yarn"),
        (llama, LayerPattern("SLSL", 4)),
        (lambda: extend(llama(), scaling.DynamicNTK(2, 16)), SelfExtend(4, 4)),
        (lambda: MaskedLM(TransformerConfig.style("bert", **SIZES)), LearnedPositions(2)),
        (lambda: torch.nn.Linear(2, 2), LogN(8)),
    ],
)
def test_what_a_model_has_no_use_for_is_an_error(make: Any, method: Any) -> None:
    with pytest.raises(InvalidInput):
        extend(make(), method)


@pytest.mark.parametrize(
    "make",
    [
        lambda: scaling.YaRN(0.5, 16),
        lambda: scaling.Linear(0.99),
        lambda: LearnedPositions(0.5),
        lambda: SelfExtend(0, 4),
        lambda: SelfExtend(2, 0),
        lambda: DualChunk(8, 7),
        lambda: LogN(1),
        lambda: ShiftedGroups(3),
        lambda: StreamingLLM(0),
        lambda: StreamingLLM(4, -1),
        lambda: BaseChange(1.0),
        lambda: LayerPattern(""),
        lambda: LayerPattern("LX"),
        lambda: LayerPattern("SL"),
        lambda: LayerPattern("L", 4),
        lambda: Method.read({"type": "no such"}),
        lambda: Method.read({"type": "log_n"}),
        lambda: Method.read({"type": "log_n", "original_max_position": 8, "more": 1}),
    ],
)
def test_values_out_of_range(make: Any) -> None:
    with pytest.raises(InvalidInput):
        make()
