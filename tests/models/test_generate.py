"""Generation: cached equals uncached, sampling follows its distribution, beams and drafts are exact, text and stops."""

from __future__ import annotations

import itertools
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longattn import InvalidInput
from longattn.models import (
    Decoder,
    EncoderDecoder,
    GenerationConfig,
    Piece,
    Sampling,
    TransformerConfig,
    beam_search,
    decode_bytes,
    generate,
    make_caches,
    stream,
)
from longattn.models.generation.sampling import draw, uniform
from longattn.models.generation.text import TextStream
from longattn.scaling import DynamicNTK, LongRoPE, YaRN

pytestmark = pytest.mark.filterwarnings("ignore:longattn runs on its slow:RuntimeWarning")


def decoder(seed: int = 0, **changes: Any) -> Decoder:
    """A model in float64 whose predictions are far from uniform."""
    arguments: dict[str, Any] = {"vocab_size": 23, "dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "max_length": 16}
    torch.manual_seed(seed)
    model = Decoder(TransformerConfig(**arguments | changes)).double().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(8)
    return model


def prompts(*lengths: int, seed: int = 0, vocab_size: int = 23) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(vocab_size) for _ in range(length)] for length in lengths]


@torch.no_grad()
def uncached(
    model: Any, prompt: list[int], tokens: list[int], penalty: float = 1.0, source: list[int] | None = None
) -> list[int]:
    """The likeliest token after each beginning of a continuation, by a model without caches: the same if it is greedy.

    All are read at once, but where the frequencies of the rotation, and so all hidden states, change with the length.
    """
    text, start = [*prompt, *tokens], len(prompt)
    ends = range(start, len(text))

    def logits_of(text: list[int]) -> Tensor:
        about = () if source is None else (torch.tensor([source]),)
        return model(*about, torch.tensor([text]))[0]

    if model.config.rope is not None and model.config.rope.depends_on_length:
        logits = torch.stack([logits_of(text[:end])[-1] for end in ends])
    else:
        logits = logits_of(text[:-1])[start - 1 :]
    for row, end in zip(logits, ends, strict=True):
        seen = list(set(text[:end]))
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits.argmax(-1).tolist()


MODELS: dict[str, dict[str, Any]] = {
    "full": {},
    "tied, scaled": {"tie_embeddings": True, "rope_scaling": YaRN(4.0, 16)},
    "sliding": {"pattern": "S", "window": 5},
    "sinks": {"pattern": "SSL", "window": 4, "sinks": 2},
    # One layer: where there are more, uncached hidden states change with the context's length, cached ones do not.
    "DynamicNTK": {"layers": 1, "rope_scaling": DynamicNTK(2.0, 16)},
    "LongRoPE": {"layers": 1, "rope_scaling": LongRoPE(2.0, 16, (1.0,) * 4, (3.0,) * 4)},
    "learned positions": {"positions": "learned", "max_length": 44, "norm": "layer", "bias": True},
    "sinusoidal positions": {"positions": "sinusoidal", "pattern": "SL", "window": 5},
}


@pytest.mark.parametrize("name", MODELS)
def test_cached_equals_uncached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longattn.models.generation.reader._PROMPT_CHUNK", 7)
    model, batch = decoder(**MODELS[name]), prompts(1, 20, 7, 9)
    found = generate(model, batch, GenerationConfig(max_new_tokens=25))
    for prompt, each in zip(batch, found, strict=True):
        assert len(each.tokens) == 25 and each.tokens == uncached(model, prompt, each.tokens)
    assert {(each.text, each.reason) for each in found} == {(None, "length")}
    assert len({tuple(each.tokens) for each in found}) > 1


def test_positions_in_the_cache_and_its_dtype() -> None:
    """Within the window there is no difference; past it a stream goes on where all its positions are trained ones."""
    model, batch = decoder(pattern="S", window=64), prompts(5, 3)
    for config in (
        GenerationConfig(max_new_tokens=20, positions="cache"),
        GenerationConfig(max_new_tokens=5, cache_dtype=torch.float32),
    ):
        for prompt, each in zip(batch, generate(model, batch, config), strict=True):
            assert each.tokens == uncached(model, prompt, each.tokens)


def test_a_stream_without_end() -> None:
    model = decoder(layers=1, pattern="S", window=5, sinks=1)
    endless = stream(model, prompts(3), GenerationConfig(max_new_tokens=None, positions="cache"))
    pieces = list(itertools.islice(endless, 300))
    assert len(pieces) == 300 and all(piece.reason is None for piece in pieces)


def test_a_sequence_does_not_depend_on_the_others() -> None:
    model, batch = decoder(), prompts(6, 2, 11)
    together = generate(model, batch, GenerationConfig(max_new_tokens=12, stop_tokens=[3, 5, 7]))
    for prompt, found in zip(batch, together, strict=True):
        assert generate(model, [prompt], GenerationConfig(max_new_tokens=12, stop_tokens=[3, 5, 7])) == [found]


def test_repetition_penalty() -> None:
    model, batch = decoder(), prompts(6, 3)
    config = GenerationConfig(max_new_tokens=15, sampling=Sampling(temperature=0, repetition_penalty=1.7))
    found = [each.tokens for each in generate(model, batch, config)]
    for prompt, tokens in zip(batch, found, strict=True):
        assert tokens == uncached(model, prompt, tokens, 1.7)
    assert found[0] != uncached(model, batch[0], found[0])
    [only] = beam_search(model, batch[:1], config, beams=1)
    assert only[0].tokens == found[0]


def test_the_same_seed_gives_the_same_tokens() -> None:
    model, batch = decoder(), prompts(4, 9)
    config = GenerationConfig(max_new_tokens=20, sampling=Sampling(temperature=2.0, top_p=0.95))

    def tokens(seed: int, draft: Decoder | None = None) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [each.tokens for each in generate(model, batch, config, generator=generator, draft=draft)]

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(1, decoder(1)) == tokens(1, decoder(1)) != tokens(2, decoder(1))
    torch.manual_seed(5)
    first = generate(model, batch, config)
    torch.manual_seed(5)
    assert generate(model, batch, config) == first


# Distributions.


def by_hand(logits: list[float], sampling: Sampling, seen: set[int]) -> list[float]:
    """The definition, one token at a time."""
    penalty = sampling.repetition_penalty
    logits = [x if t not in seen else x / penalty if x > 0 else x * penalty for t, x in enumerate(logits)]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if sampling.temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    weights = {t: math.exp((logits[t] - logits[order[0]]) / sampling.temperature) for t in order[: sampling.top_k]}
    total, before, kept = sum(weights.values()), 0.0, {}
    for token, weight in weights.items():
        if before < sampling.top_p:
            kept[token] = weight
        before += weight / total
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(logits))]


def test_probabilities_are_those_of_the_definition() -> None:
    drawn = random.Random(0)
    for _ in range(40):
        logits = [[drawn.gauss(0, 3) for _ in range(12)] for _ in range(2)]
        seen = torch.rand(2, 12) < 0.3
        sampling = Sampling(
            temperature=drawn.choice([0, 0.3, 1, 2.5]),
            top_k=drawn.choice([None, 1, 4, 50]),
            top_p=drawn.choice([0.1, 0.6, 0.95, 1]),
            repetition_penalty=drawn.choice([1.0, 1.3, 0.8]),
        )
        found = sampling.probabilities(torch.tensor(logits, dtype=torch.float64), seen)
        for row in range(2):
            expected = by_hand(logits[row], sampling, set(seen[row].nonzero().flatten().tolist()))
            torch.testing.assert_close(found[row].tolist(), expected, rtol=1e-9, atol=1e-12)


def test_probabilities_of_extreme_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, -math.inf, 0.0]])
    for temperature in (1e-30, 1.0, 1e30):
        assert Sampling(temperature=temperature).probabilities(logits)[0, 2] == 0
        assert Sampling(temperature=temperature).probabilities(logits).sum().item() == pytest.approx(1)
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            Sampling().probabilities(torch.tensor([[0.0, bad]]))


def test_draws_invert_the_distribution_function() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).expand(4, -1)
    at = torch.tensor([0.0, 0.2499, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, at).tolist() == [1, 1, 3, 3]


def distance(found: dict[Any, float], expected: dict[Any, float]) -> float:
    """Total variation."""
    return sum(abs(found.get(key, 0) - expected.get(key, 0)) for key in {*found, *expected}) / 2


@torch.no_grad()
def texts_of(model: Decoder, prompt: list[int], count: int, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """All texts of so many tokens and their probabilities."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(count):
        whole = torch.tensor([[*prompt, *text] for text in texts])
        seen = torch.zeros(len(whole), model.config.vocab_size, dtype=torch.bool).scatter(1, whole, True)
        following = sampling.probabilities(model(whole)[:, -1], seen).tolist()
        texts = {
            (*text, token): probability * p
            for (text, probability), row in zip(texts.items(), following, strict=True)
            for token, p in enumerate(row)
            if p
        }
    return texts


TINY: dict[str, Any] = {"vocab_size": 5, "layers": 1, "dim": 16, "heads": 2, "kv_heads": 1}
DRAWS = 3000


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=2.0, top_k=4, top_p=0.9, repetition_penalty=1.5)]
)
def test_texts_have_the_distribution_of_the_model(drafted: bool, sampling: Sampling) -> None:
    """With a draft model, too: whatever it guesses, and wherever its guesses end."""
    model, draft = decoder(3, **TINY), decoder(4, **TINY)
    [prompt] = prompts(3, vocab_size=5)
    config = GenerationConfig(max_new_tokens=3, sampling=sampling, draft_tokens=2)
    generator = torch.Generator().manual_seed(0)
    found: dict[tuple[int, ...], float] = {}
    for each in generate(model, [prompt] * DRAWS, config, generator=generator, draft=draft if drafted else None):
        found[tuple(each.tokens)] = found.get(tuple(each.tokens), 0) + 1 / DRAWS
    expected = texts_of(model, prompt, 3, sampling)
    assert found.keys() <= expected.keys()
    # Of DRAWS from n texts the distance is below sqrt(n / DRAWS) / 2 on average, and hardly ever twice that.
    assert distance(found, expected) < math.sqrt(len(expected) / DRAWS)
    assert distance(texts_of(draft, prompt, 3, sampling), expected) > 2 * math.sqrt(len(expected) / DRAWS)


# Drafts.


@pytest.mark.parametrize("name", ["full", "tied, scaled", "sliding", "sinks"])
@pytest.mark.parametrize("guesses", [1, 4])
def test_drafts_change_no_greedy_token(name: str, guesses: int) -> None:
    model, batch = decoder(**MODELS[name]), prompts(1, 9, 4)
    config = GenerationConfig(max_new_tokens=14, draft_tokens=guesses)
    # A model that always agrees, one that never does, and one that does at times.
    sometimes = decoder(**MODELS[name])
    for weight in sometimes.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    for draft in (model, decoder(1, layers=1, pattern="S", window=2), sometimes):
        pieces = list(stream(model, batch, config, draft=draft))
        for row, prompt in enumerate(batch):
            tokens = [piece.token for piece in pieces if piece.sequence == row]
            assert len(tokens) == 14 and tokens == uncached(model, prompt, tokens)
        if draft is model:  # all but the one that each call of the model adds
            assert sum(piece.drafted for piece in pieces) == 3 * sum((i + 1) % (guesses + 1) > 0 for i in range(14))


def test_drafts_with_a_penalty_and_stops() -> None:
    model, batch = decoder(), prompts(5, 8)
    sampling = Sampling(temperature=0, repetition_penalty=1.5)
    config = GenerationConfig(max_new_tokens=20, sampling=sampling, stop_tokens=[4, 11])
    assert generate(model, batch, config, draft=model) == generate(model, batch, config)
    assert generate(model, batch, config, draft=decoder(2)) == generate(model, batch, config)


# Encoder-decoders.


def encoder_decoder(style: str) -> EncoderDecoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_length": 40}
    model = EncoderDecoder(TransformerConfig.style(style, tie_embeddings=False, **sizes)).double().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4)
    return model


@pytest.mark.parametrize("style", ["transformer", "modern-transformer"])
def test_an_answer_depends_on_its_source(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longattn.models.generation.reader._PAGE_SIZE", 4)
    model, starts, sources = encoder_decoder(style), [[1], [1, 5, 2], [1]], prompts(9, 3, 14)
    config = GenerationConfig(max_new_tokens=12)
    found = generate(model, starts, config, sources=sources)
    for start, source, each in zip(starts, sources, found, strict=True):
        assert len(each.tokens) == 12 and each.tokens == uncached(model, start, each.tokens, source=source)
    assert found[0] != found[2]
    for draft in (model, encoder_decoder(style).requires_grad_(False)):
        for weight in draft.parameters():
            weight.data.add_(0.05 * torch.randn_like(weight) if draft is not model else 0.0)
        assert generate(model, starts, config, sources=sources, draft=draft) == found
    stops = GenerationConfig(max_new_tokens=12, stop_tokens=[found[0].tokens[4]])  # one ends before the others
    for each, start, source in zip(generate(model, starts, stops, sources=sources), starts, sources, strict=True):
        assert generate(model, [start], stops, sources=[source]) == [each]


def test_beams_with_a_source() -> None:
    """Against a search without caches, as `test_beams_are_what_a_plain_search_finds`."""
    model, starts, sources = encoder_decoder("transformer"), [[1], [1, 5]], prompts(9, 4)
    found = beam_search(model, starts, GenerationConfig(max_new_tokens=6), beams=3, sources=sources)
    for start, source, beams in zip(starts, sources, found, strict=True):

        def following(texts: list[list[int]], start: list[int] = start, source: list[int] = source) -> Tensor:
            return model(torch.tensor([source] * len(texts)), torch.tensor([[*start, *text] for text in texts]))[:, -1]

        assert [beam.tokens for beam in beams] == [text for _, text in plain_search(following, 6, 3)]


def test_bad_sources() -> None:
    model, config = encoder_decoder("transformer"), GenerationConfig(max_new_tokens=2)
    for sources in (None, [[1]], [[], [1]], [[23], [1]], "ab"):
        with pytest.raises(InvalidInput, match="^sources: "):
            generate(model, [[1], [1]], config, sources=sources)
    with pytest.raises(InvalidInput, match="^sources: "):
        generate(decoder(), [[1]], config, sources=[[1]])
    with pytest.raises(InvalidInput, match="^draft: "):
        generate(model, [[1]], config, sources=[[1]], draft=decoder())
    with pytest.raises(InvalidInput, match="^positions: "):
        generate(model, [[1]], GenerationConfig(max_new_tokens=2, positions="cache"), sources=[[1]])


# Beams.


@torch.no_grad()
def plain_search(following: Any, count: int, beams: int) -> list[tuple[float, list[int]]]:
    """The likeliest texts that a beam search finds: following gives the logits after each of some texts."""
    texts: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        rows = zip(texts, following([text for _, text in texts]).log_softmax(-1).tolist(), strict=True)
        grown = [(score + p, [*text, t]) for (score, text), row in rows for t, p in enumerate(row)]
        texts = sorted(grown, key=lambda entry: -entry[0])[:beams]
    return texts


@torch.no_grad()
def log_probability(model: Decoder, prompt: list[int], tokens: list[int]) -> float:
    log_p = model(torch.tensor([[*prompt, *tokens]]))[0].log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens))


@pytest.mark.parametrize("changes", [{}, {"pattern": "S", "window": 2}])
def test_wide_beams_find_the_best(changes: dict[str, Any]) -> None:
    model, batch = decoder(6, **TINY | changes), prompts(3, 1, vocab_size=5)
    texts = [text for count in (1, 2, 3) for text in itertools.product(range(5), repeat=count)]
    whole = [text for text in texts if 2 not in text[:-1] and (text[-1] == 2 or len(text) == 3)]
    likely = [{text: log_probability(model, prompt, list(text)) for text in whole} for prompt in batch]
    for penalty in (0.0, 1.0, -0.5):
        config = GenerationConfig(max_new_tokens=3, stop_tokens=[2])
        found = beam_search(model, batch, config, beams=40, length_penalty=penalty)
        for known, beams in zip(likely, found, strict=True):
            scores = {text: log_p / len(text) ** penalty for text, log_p in known.items()}
            best = sorted(scores, key=scores.__getitem__, reverse=True)[: len(beams)]
            assert [tuple(beam.tokens) for beam in beams[:10]] == best[:10]
            assert beams[0].score == pytest.approx(scores[best[0]])


def test_beams_are_what_a_plain_search_finds() -> None:
    """Against lists of lists without caches; all texts of one length, so that nothing ends early."""
    for name in ("full", "sinks"):
        model, batch = decoder(**MODELS[name]), prompts(9, 40)
        found = beam_search(model, batch, GenerationConfig(max_new_tokens=12), beams=3)
        for prompt, beams in zip(batch, found, strict=True):

            def following(texts: list[list[int]], model: Decoder = model, prompt: list[int] = prompt) -> Tensor:
                return model(torch.tensor([[*prompt, *text] for text in texts]))[:, -1]

            texts = plain_search(following, 12, 3)
            assert [beam.tokens for beam in beams] == [text for _, text in texts]
            assert [beam.log_probability for beam in beams] == pytest.approx([score for score, _ in texts])
    [greedy] = beam_search(model, batch[:1], GenerationConfig(max_new_tokens=12), beams=1)
    assert greedy[0].tokens == uncached(model, batch[0], greedy[0].tokens)


# Text.


def test_stop_strings() -> None:
    model, [prompt] = decoder(vocab_size=256), prompts(5)
    free = generate(model, [prompt], GenerationConfig(max_new_tokens=30), decode=lambda ids: "".join(map(chr, ids)))[0]
    assert free.text == "".join(map(chr, free.tokens))
    stop = free.text[9:13]
    at = free.text.index(stop)
    for config in (
        GenerationConfig(max_new_tokens=30, stop=stop),
        GenerationConfig(max_new_tokens=30, stop=["\uffff", stop, stop + "\uffff"]),
    ):
        for draft in (None, model):
            [found] = generate(model, [prompt], config, decode=lambda ids: "".join(map(chr, ids)), draft=draft)
            assert (found.text, found.reason) == (free.text[:at], "stop")
            assert found.tokens == free.tokens[: at + 4]
        [[beam]] = beam_search(model, [prompt], config, beams=1, decode=lambda ids: "".join(map(chr, ids)))
        assert (beam.text, beam.tokens, beam.reason) == (found.text, found.tokens, "stop")


def test_stop_tokens_are_no_text() -> None:
    model, [prompt] = decoder(vocab_size=256), prompts(5)
    [free] = generate(model, [prompt], GenerationConfig(max_new_tokens=30))
    stop = free.tokens[10]
    [found] = generate(
        model, [prompt], GenerationConfig(max_new_tokens=30, stop_tokens={stop}), decode=lambda ids: "x" * len(ids)
    )
    count = free.tokens.index(stop) + 1
    assert (found.tokens, found.text, found.reason) == (free.tokens[:count], "x" * (count - 1), "stop")


def test_text_comes_in_whole_characters_and_never_shows_a_stop() -> None:
    drawn = random.Random(1)
    for _ in range(100):
        text = "".join(drawn.choice("abß€😀") for _ in range(30))
        stops = [text[at : at + drawn.randint(1, 4)] for at in (20, 25)] if drawn.random() < 0.7 else []
        known = TextStream(decode_bytes, stops)
        shown: list[str] = []
        for byte in text.encode():
            shown.append(known.push(byte))
            if known.stopped:
                break
        shown.append(known.finish())
        assert "".join(shown) == text[: min([text.find(stop) for stop in stops], default=30)]
        assert "\ufffd" not in "".join(shown)


def test_bytes_that_are_no_text_do_not_hold_it_up() -> None:
    known = TextStream(decode_bytes)
    shown = [known.push(byte) for byte in b"\xff\xff\xff\xff\xff\xffab"]
    assert "".join(shown) == "\ufffd" * 6 + "ab" and shown[3] != ""
    assert known.push(0xE2) == "" and known.finish() == "\ufffd"


def test_decoders_that_drop_a_first_space() -> None:
    words = [" one", " two", " three"]
    known = TextStream(lambda ids: "".join(words[i] for i in ids).lstrip(" "))
    assert [known.push(i) for i in (0, 1, 2, 1)] == ["one", " two", " three", " two"]


# Contract.


def test_pieces_come_in_order() -> None:
    model, batch = decoder(), prompts(4, 2)
    pieces = list(stream(model, batch, GenerationConfig(max_new_tokens=2)))
    assert [(piece.sequence, piece.reason) for piece in pieces] == [(0, None), (1, None), (0, "length"), (1, "length")]
    assert isinstance(pieces[0], Piece) and torch.is_grad_enabled()


def test_prompts_may_be_tensors() -> None:
    model, batch = decoder(), prompts(4, 2)
    config = GenerationConfig(max_new_tokens=3)
    assert generate(model, [torch.tensor(prompt) for prompt in batch], config) == generate(model, batch, config)


BAD_VALUES: list[tuple[Any, dict[str, Any], str]] = [
    (Sampling, {"temperature": -0.1}, "temperature"),
    (Sampling, {"temperature": math.nan}, "temperature"),
    (Sampling, {"top_p": 0.0}, "top_p"),
    (Sampling, {"top_p": 1.1}, "top_p"),
    (Sampling, {"top_k": 0}, "top_k"),
    (Sampling, {"top_k": 2.0}, "top_k"),
    (Sampling, {"repetition_penalty": 0}, "repetition_penalty"),
    (GenerationConfig, {"max_new_tokens": 0}, "max_new_tokens"),
    (GenerationConfig, {"max_new_tokens": 5, "stop": [b"x"]}, "stop"),
    (GenerationConfig, {"max_new_tokens": 5, "stop": ""}, "stop"),
    (GenerationConfig, {"max_new_tokens": 5, "stop": 3}, "stop"),
    (GenerationConfig, {"max_new_tokens": 5, "stop_tokens": ["a"]}, "stop_tokens"),
    (GenerationConfig, {"max_new_tokens": 5, "draft_tokens": 0}, "draft_tokens"),
    (GenerationConfig, {"max_new_tokens": 5, "sampling": 0.7}, "sampling"),
]


@pytest.mark.parametrize(("kind", "arguments", "name"), BAD_VALUES)
def test_bad_values(kind: Any, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{name}: "):
        kind(**arguments)


def test_bad_calls() -> None:
    model, config = decoder(), GenerationConfig(max_new_tokens=2)
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        *(("prompts", bad, {}) for bad in ([], [[]], "text", [[23]], [[-1]], [[1.0]], ["a"], [torch.ones(1)], [1, 2])),
        ("decode", [[1]], {"config": GenerationConfig(max_new_tokens=2, stop="x")}),
        ("decode", [[1]], {"decode": "utf-8"}),
        ("stop_tokens", [[1]], {"config": GenerationConfig(max_new_tokens=2, stop_tokens=[23])}),
        ("max_new_tokens", [[1]], {"config": GenerationConfig(max_new_tokens=None)}),
        ("positions", [[1]], {"config": GenerationConfig(max_new_tokens=2, positions="x"), "model": sliding()}),
        ("config", [[1]], {"config": {"max_new_tokens": 2}}),
        ("model", [[1]], {"model": decoder().train()}),
        ("model", [[1]], {"model": torch.nn.Linear(2, 2)}),
        ("draft", [[1]], {"draft": decoder(vocab_size=24)}),
        ("draft", [[1]], {"draft": model, "model": decoder(rope_scaling=DynamicNTK(2.0, 16))}),
        ("generator", [[1]], {"generator": 3}),
    ]
    for name, bad, changes in calls:
        with pytest.raises(InvalidInput, match=f"^{name}: "):
            arguments = {"model": model, "config": config} | changes
            generate(arguments.pop("model"), bad, arguments.pop("config"), **arguments)
    with pytest.raises(InvalidInput, match="^max_new_tokens: "):
        stream(model, [[1]], GenerationConfig(max_new_tokens=None))
    for name, arguments in (("beams", {"beams": 0}), ("length_penalty", {"beams": 2, "length_penalty": math.inf})):
        with pytest.raises(InvalidInput, match=f"^{name}: "):
            beam_search(model, [[1]], config, **arguments)
    with pytest.raises(InvalidInput, match="^temperature: "):
        beam_search(model, [[1]], GenerationConfig(max_new_tokens=2, sampling=Sampling()), beams=2)
    with pytest.raises(InvalidInput, match="^caches: "):
        model(torch.tensor([[1]]), caches=make_caches(model, 1, 8)[:2])


def sliding() -> Decoder:
    return decoder(pattern="S", window=4)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = decoder()
    model.norm.weight.data[0] = math.nan
    for run in (generate, lambda *call: beam_search(*call, beams=2)):
        with pytest.raises(FloatingPointError, match="not finite"):
            run(model, [[1]], GenerationConfig(max_new_tokens=2))


def test_uniform_numbers_are_the_generator_s() -> None:
    generator = torch.Generator().manual_seed(3)
    first = uniform(2, 3, generator, torch.device("cpu"))
    assert torch.equal(first, uniform(2, 3, generator.manual_seed(3), torch.device("cpu")))
    assert first.dtype == torch.float64 and 0 <= first.min() and first.max() < 1


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "generation.md"
    [example] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, str(page), "exec"), {})
    assert capsys.readouterr().out.startswith(("20 length\n", "20 stop\n"))
