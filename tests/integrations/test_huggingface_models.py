"""attn_implementation="longattn" against "eager" in tiny random models: outputs, gradients, generated text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import longattn
from integrations.tiny_models import ALL, DECODERS, ENCODERS, SEQ2SEQ, VOCABULARY, inputs, tiny
from longattn.integrations.huggingface import register

hf.logging.set_verbosity_error()


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()


def close(got: Tensor, expected: Tensor, units: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=units * max(1.0, expected.abs().max().item()))


def forward_backward(model: Any, implementation: str, keywords: dict[str, Any], real: Tensor) -> dict[str, Tensor]:
    """The output where it is real, and the gradients of its product with random numbers."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    output = model(**keywords)[0]
    output = output.masked_fill(real[:, :, None] == 0, 0)
    generator = torch.Generator().manual_seed(5)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"output": output.detach(), **gradients}


@pytest.mark.parametrize("name", ALL)
def test_outputs_and_gradients(name: str) -> None:
    model = tiny(name)
    for padding in (None, "left", "right"):
        keywords, real = inputs(name, padding)
        if name not in ENCODERS:
            keywords["use_cache"] = False
        expected = forward_backward(model, "eager", keywords, real)
        got = forward_backward(model, "longattn", keywords, real)
        assert got.keys() == expected.keys()
        for label, value in got.items():
            close(value, expected[label])


def generated(model: Any, implementation: str, keywords: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    model.set_attn_implementation(implementation)
    options |= {"max_new_tokens": 10, "do_sample": False, "disable_compile": True}
    done = model.generate(**keywords, **options, return_dict_in_generate=True, output_logits=True)
    return done.sequences, torch.stack(done.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3", "gpt_oss", "llama4", *SEQ2SEQ])
def test_greedy_text(name: str, cache: str) -> None:
    """Windows and chunks of 5 are full long before the end: the sliding caches roll."""
    model = tiny(name)
    keywords, _ = inputs(name, "left")
    keywords = {key: value for key, value in keywords.items() if not key.startswith("decoder")}
    text, logits = generated(model, "eager", keywords, cache_implementation=cache)
    our_text, our_logits = generated(model, "longattn", keywords, cache_implementation=cache)
    assert torch.equal(our_text, text)
    close(our_logits, logits)


def test_beams() -> None:
    model, (keywords, _) = tiny("bart"), inputs("bart", "right")
    del keywords["decoder_input_ids"]
    text, _ = generated(model, "eager", keywords, num_beams=3)
    assert torch.equal(generated(model, "longattn", keywords, num_beams=3)[0], text)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "llama4"])
def test_a_prompt_in_two_parts(name: str) -> None:
    model, (keywords, _) = tiny(name), inputs(name, "left")
    ids, mask = keywords["input_ids"], keywords["attention_mask"]
    results = {}
    for implementation in ("eager", "longattn"):
        model.set_attn_implementation(implementation)
        cache = hf.DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
            results[implementation] = model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache)[0]
    close(results["longattn"], results["eager"])


PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1]])


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "llama4"])
def test_packed_sequences(name: str) -> None:
    model = tiny(name)
    ids = torch.randint(3, VOCABULARY, PACKED.shape)
    keywords = {"input_ids": ids, "position_ids": PACKED, "use_cache": False}
    expected = forward_backward(model, "eager", keywords, torch.ones_like(ids))
    got = forward_backward(model, "longattn", keywords, torch.ones_like(ids))
    for label, value in got.items():
        close(value, expected[label])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_by_cu_seq_lens(name: str) -> None:
    """Each sequence as if it were alone, and tokens past the last one do no harm."""
    model = tiny(name)
    model.set_attn_implementation("longattn")
    ids = torch.randint(3, VOCABULARY, (1, 15))
    ends = torch.tensor([0, 4, 4, 12], dtype=torch.int32)
    positions = torch.cat((torch.arange(4), torch.arange(8), torch.arange(3)))[None]
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 8, "max_length_k": 8}
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), **lengths)[0]
        for start, stop in ((0, 4), (4, 12)):
            close(packed[:, start:stop], model(input_ids=ids[:, start:stop])[0])


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "gpt_oss", "bert", "t5", "bart"])
def test_attention_weights(name: str) -> None:
    model, (keywords, _) = tiny(name), inputs(name, None)
    weights = {}
    for implementation in ("eager", "longattn"):
        model.set_attn_implementation(implementation)
        outputs = model(**keywords, output_attentions=True)
        weights[implementation] = {key: value for key, value in outputs.items() if key.endswith("attentions") and value}
    assert weights["longattn"].keys() == weights["eager"].keys() != set()
    for key, layers in weights["longattn"].items():
        assert len(layers) == 2
        for got, expected in zip(layers, weights["eager"][key], strict=True):
            close(got, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpointing_and_dropout(reentrant: bool) -> None:
    model = tiny("llama", attention_dropout=0.3).train()
    model.set_attn_implementation("longattn")
    keywords, _ = inputs("llama", "right")

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        model(**keywords, use_cache=False)[0].square().sum().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    model.eval()
    assert not torch.equal(plain["model.norm.weight"], gradients()["model.norm.weight"])


def test_bfloat16() -> None:
    model = tiny("gemma2").to(torch.bfloat16)
    keywords, real = inputs("gemma2", "left")
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(**keywords)[0]
        error = {}
        for implementation in ("eager", "longattn"):
            model.set_attn_implementation(implementation)
            error[implementation] = (model(**keywords)[0] - exact)[real == 1].abs().max()
    assert error["longattn"] <= 2 * error["eager"]


def test_dense_masks_given_by_the_caller() -> None:
    """A 4-D mask is the caller's own wish for a dense one."""
    model = tiny("llama")
    ids = torch.randint(3, VOCABULARY, (2, 9))
    visible = (torch.rand(2, 1, 9, 9) > 0.3) | torch.eye(9, dtype=torch.bool)
    added = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=added)[0]
        model.set_attn_implementation("longattn")
        close(model(ids, attention_mask=added)[0], expected)
        close(model(ids, attention_mask=visible)[0], expected)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_decoders_without_causality(bidirectional: bool) -> None:
    model = tiny("gemma3", use_bidirectional_attention=bidirectional)
    keywords, real = inputs("gemma3", "right")
    keywords["use_cache"] = False
    expected = forward_backward(model, "eager", keywords, real)
    close(forward_backward(model, "longattn", keywords, real)["output"], expected["output"])


def test_compiled() -> None:
    model = tiny("mistral", num_hidden_layers=1)
    model.set_attn_implementation("longattn")
    keywords, real = inputs("mistral", "left")
    keywords["use_cache"] = False
    expected = forward_backward(model, "longattn", keywords, real)
    got = forward_backward(torch.compile(model, backend="aot_eager"), "longattn", keywords, real)
    for name, value in got.items():
        close(value, expected[name.removeprefix("_orig_mod.")])


def test_compiled_decoding_is_one_graph() -> None:
    """As `generate` does it on accelerators: the mask is made outside, the static cache keeps its shapes."""
    model, (keywords, _) = tiny("llama", num_hidden_layers=1), inputs("llama", "left")
    expected, _ = generated(model, "eager", keywords, cache_implementation="static")
    model.set_attn_implementation("longattn")
    eager = model.forward
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    calls = []

    def forward(input_ids: Tensor, attention_mask: Any = None, **others: Any) -> Any:
        calls.append(input_ids.shape[1])
        chosen = compiled if input_ids.shape[1] == 1 else eager
        return chosen(input_ids=input_ids, attention_mask=attention_mask, **others)

    model.forward = forward
    assert torch.equal(generated(model, "longattn", keywords, cache_implementation="static")[0], expected)
    assert calls == [13] + [1] * 9


class LargestTensor(TorchDispatchMode):
    """How many entries the largest tensor has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if type(tensor) is Tensor:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("name", ["gemma3", "llama4", "bert"])
def test_nothing_quadratic_is_made(name: str) -> None:
    n = 1024
    model = tiny(name, max_position_embeddings=n, **({"head_dim": 8} if name in DECODERS else {}))
    model.set_attn_implementation("longattn")
    ids = torch.randint(3, VOCABULARY, (1, n))
    padding = torch.ones_like(ids)
    padding[:, :5] = 0
    with LargestTensor() as largest, torch.no_grad():
        model(ids, attention_mask=padding)
    assert n <= largest.entries < n * n / 4


def test_models_outside_of_the_interface_say_so() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = hf.LongformerModel(hf.LongformerConfig(**shape, vocab_size=VOCABULARY, attention_window=4))
    model.config._attn_implementation = "longattn"
    with pytest.raises(longattn.Unsupported, match="mask of longformer.*\n.*edits its mask.*'sdpa'.*compat.use"):
        model(torch.tensor([[3, 4, 5, 6]]))
