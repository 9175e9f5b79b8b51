"""extend on Hugging Face models: the same as our models under the same method, saved and loaded, cached, and padded."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from integrations.tiny_models import tiny
from longattn import InvalidInput, Unsupported, scaling
from longattn.extension import (
    BaseChange,
    DualChunk,
    LayerPattern,
    LearnedPositions,
    LogN,
    SelfExtend,
    ShiftedGroups,
    StreamingLLM,
)
from longattn.integrations import extend
from longattn.integrations.huggingface import from_hf, load_pretrained, register, to_hf
from longattn.rope import Rope

register()

LLAMA: dict[str, Any] = {"max_position_embeddings": 16, "attn_implementation": "longattn"}
LLAMA |= {"num_hidden_layers": 3}
METHODS: list[Any] = [
    scaling.Linear(4),
    scaling.NTK(4),
    scaling.DynamicNTK(4, 16),
    scaling.YaRN(4, 16),
    scaling.LongRoPE(4, 16, (1.0, 1.0, 1.5, 2.0), (1.0, 2.0, 3.0, 4.0)),
    scaling.Llama3(4, 16),
    scaling.Proportional(0.5),
    BaseChange(5e5),
    LogN(16),
    SelfExtend(4, 6),
    DualChunk(8, 12),
    StreamingLLM(10, 2),
    LayerPattern("SNL", 5, 1),
]
LISTED = [method for method in METHODS if not isinstance(method, (scaling.Scaling, BaseChange))]


def llama(name: str = "llama", **changes: Any) -> Any:
    return tiny(name, **{**LLAMA, **changes}).double()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 90, shape)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_it_computes_what_our_model_does(method: Any, tmp_path: Path) -> None:
    model, text = llama(), ids(2, 40)
    ours, theirs = extend(from_hf(model), method), extend(model, method)
    shared = {id(weight) for weight in model.parameters()}
    assert all(id(weight) in shared for weight in theirs.parameters())
    before, got = model(text).logits, theirs(text).logits
    torch.testing.assert_close(got, ours(text), rtol=1e-4, atol=1e-5)  # tables of cos and sin are float32 in theirs
    assert not torch.allclose(got, before, atol=1e-2)
    torch.testing.assert_close(model(text).logits, before, rtol=0, atol=0)  # the first model is as it was

    theirs.save_pretrained(tmp_path)
    kind = transformers.AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path, attn_implementation="longattn", dtype=torch.float64)
    torch.testing.assert_close(loaded(text).logits, got)
    torch.testing.assert_close(load_pretrained(tmp_path)(text), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", LISTED, ids=lambda method: method.name)
def test_caches_and_padding(method: Any) -> None:
    model = extend(llama(), method)
    text = ids(2, 34)
    whole = model(text).logits
    cache = transformers.DynamicCache()
    pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in text.split([20, 1, 9, 4], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)

    padded = torch.cat((torch.zeros(2, 5, dtype=torch.int64), text), 1)
    mask = (torch.arange(39) >= 5).long().expand(2, -1)
    for places in (None, (mask.cumsum(1) - 1).clamp(min=0)):
        got = model(padded, attention_mask=mask, position_ids=places).logits[:, 5:]
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)

    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(padded, attention_mask=mask, **greedy)[:, 5:]
    static = model.generate(text, attention_mask=torch.ones_like(text), cache_implementation="static", **greedy)
    assert torch.equal(dynamic, static)
    assert torch.equal(static[:, 34], whole[:, -1].argmax(-1))


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_positions_where_sliding_caches_forget(name: str, kind: str) -> None:
    # Padding and most of the text leave the caches of sliding layers.
    model = tiny(name, sliding_window=5, attn_implementation="longattn").eval()
    if name != "gpt_oss":  # its experts' products know no float64
        model = model.double()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    sharp, text = extend(model, LogN(4)), ids(2, 30)
    whole = sharp(text, use_cache=False).logits
    assert not torch.allclose(whole, model(text, use_cache=False).logits, atol=1e-2)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.int64), text), 1)
    padded[1] = padded[1].roll(-3)
    mask = torch.ones_like(padded)
    mask[0, :3] = mask[1, 30:] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = transformers.DynamicCache(config=model.config)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=33)
    pieces, seen = [], 0
    for part in padded.split([14, 1, 1, 9, 1, 1, 6], 1):
        now, seen = slice(seen, seen + part.shape[1]), seen + part.shape[1]
        call = {"attention_mask": mask[:, :seen], "position_ids": places[:, now]}
        pieces.append(sharp(part, past_key_values=cache, use_cache=True, **call).logits)
    got = torch.cat(pieces, 1)
    torch.testing.assert_close(got[0, 3:], whole[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1, :30], whole[1], rtol=1e-4, atol=1e-4)


ROTARY = [scaling.DynamicNTK(4, 16), scaling.LongRoPE(4, 16, (1.0, 1.0, 1.5, 2.0), (1.0, 2.0, 3.0, 4.0))]


@pytest.mark.parametrize("rotary", ROTARY, ids=lambda scaling: scaling.name)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_keys_keep_their_frequencies(rotary: Any, kind: str) -> None:
    """What is read through a cache is what is read at once, or refused where the frequencies changed between calls."""

    def cache() -> Any:
        if kind == "dynamic":
            return transformers.DynamicCache(config=model.config)
        return transformers.StaticCache(config=model.config, max_cache_len=40)

    model = extend(llama(num_hidden_layers=1), rotary).eval()
    always = rotary.name == "dynamic"
    for pieces, refused in (([9, 1, 6], False), ([16, 1], True), ([9, 8], True), ([30, 1], always), ([17, 5], always)):
        text = ids(1, sum(pieces))
        held = cache()
        *before, last = text.split(pieces, 1)
        for part in before:
            model(part, past_key_values=held, use_cache=True)
        if refused:
            with pytest.raises(Unsupported, match="rotation with a cache"):
                model(last, past_key_values=held, use_cache=True)
            continue
        got = model(last, past_key_values=held, use_cache=True).logits
        torch.testing.assert_close(got, model(text, use_cache=False).logits[:, -pieces[-1] :], rtol=1e-4, atol=1e-5)

    # Positions count without padding: 13 tokens after 3 of padding are 13.
    text, padded = ids(1, 16), torch.zeros(1, 19, dtype=torch.int64)
    padded[:, 3:], mask, held = text, (torch.arange(19) >= 3).long()[None], cache()
    for now in (slice(0, 16), slice(16, 17), slice(17, 19)):
        call = {"attention_mask": mask[:, : now.stop], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, now]}
        got = model(padded[:, now], past_key_values=held, use_cache=True, **call).logits
    torch.testing.assert_close(got, model(text, use_cache=False).logits[:, -2:], rtol=1e-4, atol=1e-5)

    prompt = ids(1, 12)
    with pytest.raises(Unsupported, match="rotation with a cache"):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False)
    whole = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False, use_cache=False
    )
    text = prompt
    for _ in range(whole.shape[1] - 12):
        text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(whole, text)


@pytest.mark.parametrize("rotary", ROTARY, ids=lambda scaling: scaling.name)
@pytest.mark.parametrize("method", [*LISTED, StreamingLLM(10, 0), LayerPattern("N")], ids=str)
def test_what_rotates_again_is_refused_with_frequencies_that_change(rotary: Any, method: Any) -> None:
    for pair in ((rotary, method), (method, rotary)):
        if isinstance(method, LogN):
            model = extend(extend(llama(num_hidden_layers=1), pair[0]), pair[1]).eval()
            text = ids(1, 30)
            got = model(text, past_key_values=transformers.DynamicCache(), use_cache=True).logits
            torch.testing.assert_close(got, extend(from_hf(model), LogN(16))(text), rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(InvalidInput, match="frequencies are fixed"):
                extend(extend(llama(), pair[0]), pair[1])


def test_packed_documents_start_anew() -> None:
    model = extend(llama(), SelfExtend(3, 5))
    first, second = ids(1, 17), ids(1, 13)
    places = torch.cat((torch.arange(17), torch.arange(13)))[None]
    got = model(torch.cat((first, second), 1), position_ids=places, use_cache=False).logits
    for part, document in ((got[:, :17], first), (got[:, 17:], second)):
        torch.testing.assert_close(part, model(document).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi", "gemma2", "gemma3"])
def test_vectors_turn_back_to_where_they_came_from(name: str) -> None:
    model = tiny(name, attn_implementation="longattn").double()
    text = ids(1, 9)
    still = extend(model, LayerPattern("N"))(text, position_ids=torch.arange(9)[None]).logits
    ones = torch.ones_like(text)  # or positions that do not rise would be taken for packed documents
    wanted = model(text, attention_mask=ones, position_ids=torch.zeros(1, 9, dtype=torch.int64)).logits
    torch.testing.assert_close(still, wanted, rtol=1e-4, atol=1e-4)


def test_the_full_layers_of_mixed_models_are_scaled() -> None:
    model = tiny("gemma3", attn_implementation="longattn")
    extended = extend(model, scaling.Linear(8))
    assert Rope.from_hf(extended.config, "full_attention").scaling == scaling.Linear(8)
    local = Rope.from_hf(extended.config, "sliding_attention")
    assert local == Rope.from_hf(model.config, "sliding_attention")
    assert not torch.allclose(extended(ids(1, 30)).logits, model(ids(1, 30)).logits)


def test_shifted_groups_train_and_read_as_ever() -> None:
    model, text = llama(), ids(2, 33)
    theirs, ours = extend(model, ShiftedGroups(8)), extend(from_hf(model), ShiftedGroups(8))
    torch.testing.assert_close(theirs.eval()(text).logits, model(text).logits)
    theirs.train(), ours.train()
    got, wanted = theirs(text).logits, ours(text)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, model(text).logits, atol=1e-2)
    got.square().mean().backward()
    wanted.square().mean().backward()
    theirs_grad = theirs.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(theirs_grad, ours.blocks[0].attention.q_proj.weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_learned_positions(name: str, tmp_path: Path) -> None:
    gpt2 = {"n_positions": 16, "scale_attn_by_inverse_layer_idx": False}
    sizes = gpt2 if name == "gpt2" else {"max_position_embeddings": 16}
    model = tiny(name, **sizes, attn_implementation="longattn")
    extended, text = extend(model, LearnedPositions(3)), ids(2, 48)
    with pytest.raises((IndexError, RuntimeError)):
        model(text)
    got = extended(text)[0]
    ours = extend(from_hf(model), LearnedPositions(3))
    torch.testing.assert_close(got, ours(text), rtol=1e-4, atol=1e-4)
    extended.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="longattn")
    torch.testing.assert_close(loaded(text)[0], got)
    assert model.config.max_position_embeddings == 16


def saved_attention(folder: Path) -> str | None:
    return json.loads((folder / "config.json").read_text()).get("attn_implementation")


@pytest.mark.parametrize("method", LISTED, ids=lambda method: method.name)
def test_a_folder_names_the_attention_that_it_needs(method: Any, tmp_path: Path) -> None:
    model, text, kind = llama(), ids(1, 30), transformers.AutoModelForCausalLM
    extended = extend(model, method)
    extended.save_pretrained(tmp_path / "first")
    assert saved_attention(tmp_path / "first") == "longattn"
    loaded = kind.from_pretrained(tmp_path / "first", dtype=torch.float64)  # no name given
    torch.testing.assert_close(loaded(text).logits, extended(text).logits)
    loaded.save_pretrained(tmp_path / "second")
    assert saved_attention(tmp_path / "second") == "longattn"
    chosen = kind.from_pretrained(tmp_path / "second", attn_implementation="eager", dtype=torch.float64)
    torch.testing.assert_close(chosen(text).logits, model(text).logits, rtol=1e-4, atol=1e-5)  # float32 softmax
    chosen.save_pretrained(tmp_path / "third")
    assert saved_attention(tmp_path / "third") == "longattn"
    model.save_pretrained(tmp_path / "plain")
    assert saved_attention(tmp_path / "plain") is None


def test_plain_transformers_refuses_what_it_cannot_compute(tmp_path: Path) -> None:
    extend(llama(), LogN(16)).save_pretrained(tmp_path / "listed")
    extend(llama(), scaling.YaRN(4, 16)).save_pretrained(tmp_path / "known")
    code = """if True:
        import sys
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/known")
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/listed")
        except ValueError as error:
            print(error)
        assert "longattn" not in sys.modules
    """
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert 'attn_implementation="longattn"` is not supported' in said.stdout


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_oss", "deepseek_v3"])
def test_transformers_reads_what_it_knows_without_a_warning(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name, attn_implementation="longattn").eval()
    trained = model.config.max_position_embeddings
    pairs = Rope.from_hf(model.config).dim // 2
    long = scaling.LongRoPE(4, trained, (1.0,) * pairs, tuple(1.0 + 3 * i / pairs for i in range(pairs)))
    known = [scaling.Linear(4), scaling.NTK(4), scaling.DynamicNTK(4, trained), scaling.YaRN(4, trained), long]
    known += [scaling.YaRN(4, trained // 2), scaling.Llama3(4, trained), scaling.Proportional(0.5), BaseChange(5e5)]
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    text = ids(1, trained + 9)
    for method in known:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            extended = extend(model, method)
            extended.save_pretrained(tmp_path)
            plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        said = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in warned]
        assert not said or method == scaling.YaRN(4, trained // 2) and "fewer" in said[0], said
        assert saved_attention(tmp_path) is None
        with torch.no_grad():
            got, wanted = plain(text, use_cache=False).logits, extended(text, use_cache=False).logits
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_what_a_config_class_does_not_save_is_refused() -> None:
    """Some have checks of their own, which transformers would run when the work is done."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Phi3Config(**sizes, num_key_value_heads=2, vocab_size=99, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="longattn")
    with pytest.raises(InvalidInput, match="method: expected a method that Phi3Config saves and loads"):
        extend(model, scaling.YaRN(4, 4096))


def test_replacing_a_scaling_and_reading_less_far_are_said() -> None:
    llama3 = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 1e4}
    llama3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = llama(rope_parameters=llama3, max_position_embeddings=64)
    for model in (theirs, from_hf(theirs)):
        with pytest.warns(UserWarning, match=r"YaRN\(.*\) replaces Llama3\(factor=2.0, original_max_position=8"):
            extend(model, scaling.YaRN(2, 64))
        with pytest.warns(UserWarning, match="replaces"):
            with pytest.warns(UserWarning, match="reads about 16 tokens with .* before 64 tokens"):
                extend(model, scaling.YaRN(2, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            extend(extend(model, LogN(64)), SelfExtend(4, 16))
            extend(model, BaseChange(5e5))
        for nonsense in (
            SelfExtend(4, 64),
            SelfExtend(1, 16),
            DualChunk(32, 64),
            StreamingLLM(64, 0),
            StreamingLLM(62, 4),
            LayerPattern("SL", 64),
        ):
            with pytest.raises(InvalidInput, match="window|group|longest|sinks"):
                extend(model, nonsense)
    longer = extend(llama(), scaling.YaRN(4, 16))
    assert extend(longer, StreamingLLM(40, 4)).config.longattn  # within what the scaling reaches
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extend(llama(), scaling.YaRN(4, 16))


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
def test_a_window_of_nothing_is_refused(name: str) -> None:
    model = tiny(name, sliding_window=0, attn_implementation="longattn")
    with pytest.raises(InvalidInput, match="sliding_window: expected an int >= 1"):
        model(ids(1, 9), use_cache=False)
    if name == "mistral":
        with pytest.raises(InvalidInput, match="sliding_window None or an int >= 1"):
            from_hf(model)
    tiny("qwen2", sliding_window=0, attn_implementation="longattn")(ids(1, 9))  # no layer uses it


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (lambda: tiny("gpt2", attn_implementation="longattn"), scaling.YaRN(4, 16)),
        (lambda: tiny("gpt2", attn_implementation="longattn"), SelfExtend(4, 4)),
        (lambda: tiny("gpt2", attn_implementation="longattn"), StreamingLLM(4)),
        (lambda: tiny("bert", attn_implementation="longattn"), LogN(16)),
        (lambda: tiny("bert", attn_implementation="longattn"), scaling.Linear(2)),
        (lambda: tiny("opt", attn_implementation="longattn"), LearnedPositions(2)),
        (lambda: tiny("mistral", attn_implementation="longattn"), StreamingLLM(8, 2)),
        (lambda: tiny("llama4", attn_implementation="longattn"), SelfExtend(4, 4)),
        (lambda: tiny("llama"), LogN(16)),
        (llama, LearnedPositions(2)),
        (llama, scaling.DynamicNTK(2, 99)),
        (llama, "yarn"),
        (lambda: extend(llama(), scaling.DynamicNTK(2, 16)), SelfExtend(4, 4)),
        (lambda: extend(llama(), SelfExtend(4, 4)), scaling.DynamicNTK(2, 16)),
    ],
)
def test_what_a_model_has_no_use_for_is_an_error(make: Any, method: Any) -> None:
    with pytest.raises(InvalidInput):
        extend(make(), method)


def test_what_methods_cannot_be_joined_with_is_an_error() -> None:
    model, text = extend(llama(), SelfExtend(3, 5)), ids(1, 12)
    with pytest.raises(Unsupported, match="output_attentions"):
        model(text, output_attentions=True)
    dense = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(Unsupported, match="dense"):
        model(text, attention_mask=dense)
    for method in (SelfExtend(3, 5), LayerPattern("NL")):
        with pytest.raises(InvalidInput, match="config"):
            to_hf(extend(from_hf(llama()), method))
