"""Documents packed by position_ids in models whose masks are made without them: each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from integrations.tiny_models import VOCABULARY, tiny
from longattn.integrations.huggingface import packing, register

IDS = torch.randint(3, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(1))
PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1]])


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def family(name: str) -> Any:
    if name in ("gpt_oss", "opt"):
        return tiny(name)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(hf.BioGptConfig(**shape, vocab_size=VOCABULARY)).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.15)
    return model


def logits(model: Any, implementation: str, ids: Tensor, **options: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(input_ids=ids, **{"use_cache": False, **options}).logits


def documents(model: Any) -> Tensor:
    """Each document of the rows alone, by eager attention."""
    rows = []
    for ids, positions in zip(IDS, PACKED, strict=True):
        cuts = [0, *(torch.nonzero(positions.diff() != 1).flatten() + 1).tolist(), len(ids)]
        parts = [slice(start, stop) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
        given = [(ids[None, part], positions[None, part]) for part in parts]
        rows.append(torch.cat([logits(model, "eager", i, position_ids=p) for i, p in given], 1))
    return torch.cat(rows)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", ["gpt_oss", "opt", "biogpt"])
def test_documents_do_not_see_each_other(name: str) -> None:
    model = family(name)
    expected = documents(model)
    close(logits(model, "longattn", IDS, position_ids=PACKED), expected)
    close(logits(model, "longattn", IDS[:1], position_ids=PACKED[:1]), expected[:1])
    twice = IDS[:1].expand(2, -1)
    close(logits(model, "longattn", twice, position_ids=PACKED[:1]), expected[:1].expand(2, -1, -1))


def test_compiled_and_exported() -> None:
    model = family("opt")
    expected = documents(model)
    model.set_attn_implementation("longattn")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        version = tuple(map(int, hf.__version__.split(".")[:2]))
        close(compiled(input_ids=IDS, position_ids=PACKED, use_cache=False).logits, expected)
        if version < (5, 23):
            pytest.skip(
                "OPT made a mask of its own before transformers 5.23, and a graph cannot see that it hides nothing"
            )
        given = {"input_ids": IDS, "position_ids": PACKED, "use_cache": False}
        program = torch.export.export(model, (), given).module()
        close(program(**given).logits, expected)
        other = {**given, "position_ids": torch.arange(15).expand(2, -1)}
        close(program(**other).logits, logits(model, "eager", IDS))


@pytest.mark.parametrize(
    "options",
    [
        {"position_ids": torch.arange(15)[None] + 7},  # ids that start late
        {"position_ids": PACKED, "use_cache": True},  # a cache
        {  # padding on the left
            "position_ids": torch.tensor([[0, 0, 0, *range(12)], list(range(15))]),
            "attention_mask": torch.tensor([[0] * 3 + [1] * 12, [1] * 15]),
        },
    ],
    ids=["late", "cache", "padding"],
)
def test_what_is_not_packed(options: dict[str, Any]) -> None:
    model = family("gpt_oss")
    real = options.get("attention_mask", torch.ones_like(IDS))[:, :, None]
    got, expected = (logits(model, name, IDS, **options) * real for name in ("longattn", "eager"))
    close(got, expected)


def test_cu_seq_lens_win() -> None:
    model = family("gpt_oss")
    ends = torch.tensor([0, 4, 15], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11}
    got = logits(model, "longattn", IDS[:1], position_ids=PACKED[:1], **lengths)
    alone = [logits(model, "eager", IDS[:1, part], position_ids=PACKED[:1, part]) for part in (slice(4), slice(4, 15))]
    close(got[:, :4], alone[0])
    assert not torch.allclose(got[:, 4:], logits(model, "longattn", IDS[:1], position_ids=PACKED[:1])[:, 4:])


def test_bounds_are_found_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = family("gpt_oss"), []
    pad = packing.F.pad
    monkeypatch.setattr(packing.F, "pad", lambda *given, **named: calls.append(1) or pad(*given, **named))
    logits(model, "longattn", IDS, position_ids=PACKED)
    assert len(calls) == 2  # a mask for windows and one without
