"""The decoder: shapes, causality, gradients, patterns, and other attention over the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from longattn import InvalidInput
from longattn.models import Decoder, TransformerConfig
from longattn.scaling import Linear, YaRN


def decoder(**changes: Any) -> Decoder:
    arguments: dict[str, Any] = {"vocab_size": 50, "dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "max_length": 16}
    return Decoder(TransformerConfig(**arguments | changes)).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_have_the_shape_of_the_vocabulary(tied: bool) -> None:
    model = decoder(tie_embeddings=tied)
    assert model(tokens(2, 7)).shape == (2, 7, 50)
    assert model(tokens(2, 7).int()).shape == (2, 7, 50)
    assert model(tokens(2, 0)).shape == (2, 0, 50)
    assert ("head.weight" in model.state_dict()) != tied


@pytest.mark.parametrize("changes", [{}, {"pattern": "SSL", "window": 3, "sinks": 1}, {"rope_scaling": YaRN(4, 16)}])
def test_a_token_changes_no_logits_before_it(changes: dict[str, Any]) -> None:
    model = decoder(**changes)
    before = tokens(2, 12)
    after = before.clone()
    after[:, 8] = (after[:, 8] + 1) % 50
    logits, changed = model(before), model(after)
    torch.testing.assert_close(changed[:, :8], logits[:, :8], rtol=0, atol=1e-12)
    assert not torch.isclose(changed[:, 8], logits[:, 8]).all()


def test_a_sliding_stack_sees_its_windows_and_the_sinks_only() -> None:
    model = decoder(pattern="S", window=3, sinks=1)  # three layers reach 3 * 2 tokens back
    before = tokens(1, 20)
    logits = model(before)
    for place, reached in ((5, 11), (0, 19)):
        after = before.clone()
        after[:, place] = (after[:, place] + 1) % 50
        changed = (model(after) - logits).abs().amax(-1)[0] > 1e-12
        assert changed.nonzero().flatten().tolist() == list(range(place, reached + 1))


def test_every_weight_has_a_gradient() -> None:
    model = decoder()
    model(tokens(2, 7)).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_weights_start_as_documented() -> None:
    model = Decoder(TransformerConfig(dim=128, layers=8, heads=4, max_length=16))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].feed_forward.down_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.blocks[3].attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    logits = model(torch.arange(16)[None])
    assert logits.std() < 1  # about uniform predictions


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([[0, 50]]),
        torch.tensor([[-1, 3]]),
        torch.tensor([1, 2]),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([[True, False]]),
        [[1, 2]],
    ],
)
def test_tokens_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidInput, match="tokens"):
        decoder()(bad)


def test_extension_shares_the_weights() -> None:
    model = decoder(tie_embeddings=True)
    extended = model.extended(scaling=YaRN(4, 16), window=5, sinks=2)
    ours, theirs = dict(model.named_parameters()), dict(extended.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert extended.config.pattern == "S" and extended.config.rope_scaling == YaRN(4, 16)
    assert model.config.pattern == "L" and model.config.rope_scaling is None
    with torch.no_grad():
        model.norm.weight.zero_()
    assert extended(tokens(1, 4)).abs().max() == 0


@pytest.mark.parametrize(
    "keywords",
    [
        {"scaling": Linear(2.0)},
        {"window": 4},
        {"window": 4, "sinks": 1},
        {"pattern": "SL", "window": 4, "scaling": YaRN(2, 16)},
    ],
)
def test_extension_is_the_model_of_its_config(keywords: dict[str, Any]) -> None:
    model = decoder()
    extended = model.extended(**keywords)
    twin = Decoder(extended.config).double()
    twin.load_state_dict(model.state_dict())
    inputs = tokens(2, 12)
    torch.testing.assert_close(extended(inputs), twin(inputs), rtol=0, atol=0)
    assert not torch.allclose(extended(inputs), model(inputs))


def test_extension_keeps_what_it_is_not_asked_to_change() -> None:
    model = decoder(pattern="SL", window=4, rope_scaling=Linear(2.0)).eval()
    assert model.extended(scaling=YaRN(4, 16)).config.pattern == "SL"
    assert model.extended(pattern="L").config.rope_scaling == Linear(2.0)
    assert model.extended(pattern="L").config.window is None
    assert not model.extended().training
    with pytest.raises(InvalidInput, match="window"):
        model.extended(pattern="SL")
    with pytest.raises(InvalidInput, match="sinks"):
        model.extended(sinks=2)


def test_extension_draws_no_random_numbers() -> None:
    model = decoder()
    before = torch.get_rng_state()
    model.extended(window=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_are_independent() -> None:
    model = decoder()
    twin = copy.deepcopy(model)
    inputs = tokens(1, 5)
    torch.testing.assert_close(twin(inputs), model(inputs), rtol=0, atol=0)
    assert twin.embedding.weight is not model.embedding.weight
