"""Loss by position against the plain formula, and the same tokens read a piece at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from longattn import InvalidInput
from longattn.evaluation import LossByPosition, loss_by_position, loss_in_short_windows
from longattn.models import Decoder, TransformerConfig


@pytest.fixture
def model() -> Decoder:
    decoder = Decoder(TransformerConfig(dim=32, layers=2, heads=2, max_length=8))
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(5.0)  # far from uniform predictions
    return decoder


def test_is_the_loss_of_each_token(model: Decoder) -> None:
    windows = torch.randint(0, 256, (5, 25))
    measured = loss_by_position(model, windows, batch_size=2)
    logits = model(windows[:, :-1])
    expected = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(measured.losses, expected.detach(), rtol=1e-4, atol=1e-4)
    assert not measured.losses.requires_grad
    assert model.training


def test_bfloat16_is_near(model: Decoder) -> None:
    windows = torch.randint(0, 256, (4, 17))
    exact = loss_by_position(model, windows).losses
    assert (loss_by_position(model, windows, dtype=torch.bfloat16).losses - exact).abs().mean() < 0.1


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_short_windows_score_each_token_once(model: Decoder, stride: int) -> None:
    windows = torch.randint(0, 256, (3, 25))
    measured = loss_in_short_windows(model, windows, 8, stride).losses
    assert measured.shape == (3, 24)
    for token in range(24):
        start = 0 if token < 8 else 8 + (token - 8) // stride * stride + stride - 8
        piece = loss_by_position(model, windows[:, start : start + 9]).losses
        torch.testing.assert_close(measured[:, token], piece[:, token - start], rtol=1e-4, atol=1e-4)


def test_short_windows_of_the_whole_length_are_one_reading(model: Decoder) -> None:
    windows = torch.randint(0, 256, (3, 9))
    torch.testing.assert_close(
        loss_in_short_windows(model, windows, 8, 4).losses, loss_by_position(model, windows).losses
    )


def test_buckets_are_means_with_their_errors() -> None:
    result = LossByPosition(torch.tensor([[1.0, 3.0, 5.0], [3.0, 5.0, 5.0]]))
    first, last = result.buckets(2)
    assert (first.start, first.stop, first.loss) == (0, 2, 3.0)
    assert first.standard_error == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert (last.start, last.stop, last.loss, last.standard_error) == (2, 3, 5.0, 0.0)
    assert math.isnan(LossByPosition(torch.ones(1, 4)).bucket(0, 4).standard_error)


@pytest.mark.parametrize("windows", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 5), torch.zeros(2, 1).long()])
def test_windows_that_are_none_are_refused(model: Decoder, windows: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match="windows"):
        loss_by_position(model, windows)


@pytest.mark.parametrize(
    ("argument", "keywords"),
    [
        ("length", {"length": 25, "stride": 1}),
        ("length", {"length": 0, "stride": 1}),
        ("stride", {"length": 8, "stride": 9}),
        ("stride", {"length": 8, "stride": 3}),
        ("stride", {"length": 8, "stride": 0}),
    ],
)
def test_pieces_that_do_not_fit_are_refused(model: Decoder, argument: str, keywords: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as error:
        loss_in_short_windows(model, torch.randint(0, 256, (1, 25)), **keywords)
    assert error.value.argument == argument
