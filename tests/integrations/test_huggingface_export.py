"""torch.export of models with attn_implementation="longattn": the exported program equals the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.integrations.executorch import register_dynamic_cache_export_support

import longattn
from integrations.tiny_models import VOCABULARY, inputs, tiny
from longattn.integrations.huggingface import register

BATCH, TOKENS = torch.export.Dim("batch", min=1, max=9), torch.export.Dim("tokens", min=2, max=60)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize(
    ("name", "strict"),
    [("llama", False), ("llama", True), ("mistral", False), ("llama4", False), ("bert", False), ("vit", False)],
)
def test_any_batch_and_length(name: str, strict: bool) -> None:
    model = tiny(name, **({} if name == "llama4" else {"num_hidden_layers": 1}))
    model.set_attn_implementation("longattn")
    keywords, _ = inputs(name, None if name == "vit" else "right")
    shapes: Any = {key: {0: BATCH} if name == "vit" else {0: BATCH, 1: TOKENS} for key in keywords}
    if name not in ("bert", "vit"):
        keywords["use_cache"], shapes["use_cache"] = False, None
    with torch.no_grad():
        program = torch.export.export(model, (), keywords, dynamic_shapes=shapes, strict=strict).module()
        close(program(**keywords)[0], model(**keywords)[0])
        other = {key: x if key == "use_cache" else torch.cat((x, x))[:3] for key, x in keywords.items()}
        if name != "vit":
            other = {key: x if key == "use_cache" else x[:, :8] for key, x in other.items()}
        close(program(**other)[0], model(**other)[0])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_cache_as_an_argument(name: str) -> None:
    register_dynamic_cache_export_support()
    model = tiny(name)
    model.set_attn_implementation("longattn")
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = 0

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
            return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits

    def cache() -> Any:
        past = hf.DynamicCache(config=model.config)
        model(input_ids=ids[:, :4], attention_mask=mask[:, :4], past_key_values=past)
        return past

    with torch.no_grad():
        program = torch.export.export(Step(), (ids[:, 4:], mask, cache())).module()
        close(program(ids[:, 4:], mask, cache()), Step()(ids[:, 4:], mask, cache()))


def test_a_mask_of_ones_own_is_refused() -> None:
    model = tiny("gemma3", num_hidden_layers=1, layer_types=["full_attention"])
    model.set_attn_implementation("longattn")
    from transformers.masking_utils import create_causal_mask

    class Prefix(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = create_causal_mask(model.config, x, None, None, or_mask_function=lambda b, h, q, k: k < 2)
            return x + mask.shape[0]

    with pytest.raises(longattn.Unsupported, match="can be traced; pass the model a 4-D attention_mask"):
        torch.export.export(Prefix(), (torch.randn(1, 5, 8),))
