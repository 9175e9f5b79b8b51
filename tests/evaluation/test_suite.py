"""Evaluations: what cells read, that readers agree with the models, memory estimates, and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from longattn import InvalidInput, scaling
from longattn.evaluation import (
    Cell,
    Evaluation,
    Plan,
    Results,
    check_memory,
    make_reader,
    reading,
    search_longrope,
    summary,
)
from longattn.extension import DualChunk, StreamingLLM
from longattn.integrations import extend
from longattn.integrations.huggingface import register, to_hf
from longattn.models import Decoder, TransformerConfig
from longattn.rope import Rope


def decoder(**changes: Any) -> Decoder:
    sizes: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "max_length": 64, "norm_eps": 1e-5}
    return Decoder(TransformerConfig(**{**sizes, **changes})).eval()


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def evaluation(plan: Plan, reader: Any = None, text: Tensor | None = None) -> Evaluation:
    return Evaluation(reader or make_reader(decoder()), plan, encode=encode, decode=decode, text=text)


@pytest.mark.parametrize(
    "method",
    [None, scaling.DynamicNTK(4, 64), DualChunk(30, 40), StreamingLLM(40, 4)],
    ids=lambda m: getattr(m, "name", ""),
)
def test_readers_give_the_losses_of_one_reading(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", 50)
    monkeypatch.setattr(reading, "_LOGITS", 30)
    register()
    model = decoder()
    theirs = to_hf(model)
    theirs.set_attn_implementation("longattn")
    if method is not None:
        model, theirs = extend(model, method), extend(theirs, method)
    ids = torch.randint(0, 256, (171,))
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        best = model(ids[None])[0, -1].argmax()
    for reader in (make_reader(model), make_reader(theirs)):
        torch.testing.assert_close(reader.losses(ids), wanted, rtol=1e-4, atol=1e-4)
        answer = list(reader.answer(ids.tolist(), 3))
        assert answer[0] == best and len(answer) == 3
        assert reader.length_matters == isinstance(method, scaling.DynamicNTK)
        assert reader.bytes_for(100_000) >= reader.bytes_for(1000) > 0
    assert isinstance(theirs, transformers.PreTrainedModel)
    with pytest.raises(InvalidInput, match="model"):
        make_reader(torch.nn.Linear(2, 2))


def test_a_stream_takes_constant_memory_by_estimate() -> None:
    reader = make_reader(extend(decoder(), StreamingLLM(40, 4)))
    assert reader.bytes_for(1_000_000) == reader.bytes_for(100_000)


class Recorder:
    """Says what it was asked to read."""

    length_matters = False

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def losses(self, tokens: Tensor) -> Tensor:
        self.read.append(tokens.tolist())
        return tokens[1:].float()  # the loss of a token is the token

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        return iter(b" The special magic 12345")

    def bytes_for(self, tokens: int) -> int:
        return tokens


def test_perplexity_is_of_the_same_tokens_at_every_length() -> None:
    reader, text = Recorder(), torch.arange(1000)
    plan = Plan(("perplexity",), (32, 64), windows=2, stride=16)
    run = evaluation(plan, reader, text)
    results = Results({})
    run.run(results, lambda: None)
    counted = [tokens[-16:] for tokens in reader.read]
    assert [len(tokens) for tokens in reader.read] == [33, 33, 65, 65]
    assert counted[0] == counted[2] == list(range(49, 65)) and counted[1] == counted[3] == list(range(65, 81))
    means = summary(results)["perplexity"]
    assert [row["length"] for row in means] == [32, 64]
    assert means[0]["loss"] == pytest.approx(sum(range(49, 81)) / 32) == means[1]["loss"]


def test_short_windows_count_every_token_once_where_it_stands_latest() -> None:
    reader, text = Recorder(), torch.arange(1000)
    plan = Plan(("loss", "short_windows"), (50, 70), windows=2, stride=16, bucket=1, context=32)
    results = Results({})
    evaluation(plan, reader, text).run(results, lambda: None)
    means = summary(results)
    assert means["short_windows"][0]["losses"] == means["loss"][0]["losses"]
    assert [(tokens[0], len(tokens) - 1) for tokens in reader.read[2:6]] == [(0, 32), (16, 32), (32, 32), (38, 32)]
    with pytest.raises(InvalidInput, match="context"):
        Plan(("short_windows",), (64,), stride=16, context=8)
    with pytest.raises(InvalidInput, match="context"):
        evaluation(Plan(("short_windows",), (64,)), reader, text)


def test_losses_by_position_are_means_of_buckets_over_windows() -> None:
    reader, text = Recorder(), torch.arange(1000) % 250
    run = evaluation(Plan(("loss",), (32, 100), windows=2, bucket=40), reader, text)
    results = Results({})
    run.run(results, lambda: None)
    assert [len(tokens) for tokens in reader.read] == [101, 101]  # what is shorter is the beginning of what is longer
    (row,) = summary(results)["loss"]
    first, second = range(1, 101), [n % 250 for n in range(101, 201)]
    wanted = [(sum(first[a:b]) + sum(second[a:b])) / (2 * (b - a)) for a, b in ((0, 40), (40, 80), (80, 100))]
    assert row["losses"] == pytest.approx(wanted) and row["windows"] == 2


def test_an_interrupted_evaluation_goes_on(tmp_path: Path) -> None:
    plan = Plan(("loss", "passkey", "fwe", "speed"), (400, 1200), depths=2, trials=2, bucket=100)
    text = torch.randint(0, 256, (1201,))
    whole, place = Results({"model": "m"}), tmp_path / "results.json"
    reader = Recorder()
    evaluation(plan, reader, text).run(whole, lambda: whole.save(place))
    asked = []

    class Impatient(Recorder):
        def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
            asked.append(len(prompt))
            if len(asked) == 4:
                raise KeyboardInterrupt
            return super().answer(prompt, new_tokens)

    partial = Results({"model": "m"})
    with pytest.raises(KeyboardInterrupt):
        evaluation(plan, Impatient(), text).run(partial, lambda: partial.save(place))
    resumed = Results.load(place)
    assert 0 < len(resumed.cells) < len(whole.cells) and resumed.settings == {"model": "m"}
    seen: list[Cell] = []
    again = evaluation(plan, Recorder(), text)
    again.run(resumed, lambda: resumed.save(place), lambda cell, number, count: seen.append(cell))
    assert list(Results.load(place).cells) == list(resumed.cells) and set(resumed.cells) == set(whole.cells)
    assert len(seen) == len(again.cells()) == len(whole.cells)
    found = summary(resumed)
    assert found["passkey"][0] == summary(whole)["passkey"][0]
    assert found["speed"][0]["tokens_per_second"] > 0


def test_what_cannot_be_measured_is_said_before_anything_is_read() -> None:
    reader = Recorder()
    with pytest.raises(InvalidInput, match=r"text: expected a text of at least 201 tokens.*got 150 tokens"):
        evaluation(Plan(("loss",), (100,), windows=2), reader, torch.zeros(150, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="GB of memory"):
        evaluation(Plan(("speed",), (10**18,)), reader)
    with pytest.raises(InvalidInput, match=r"10,000,000,000 tokens, which take about"):
        check_memory("lengths", 10**10, 10**18)
    check_memory("lengths", 10, 10)
    assert reader.read == []
    for bad in (
        {"tasks": ("speech",)},
        {"tasks": ()},
        {"lengths": ()},
        {"lengths": (0,)},
        {"windows": 0},
        {"tasks": ("perplexity",), "lengths": (16,)},
    ):
        with pytest.raises(InvalidInput):
            Plan(**{"tasks": ("loss",), "lengths": (64,), **bad})
    with pytest.raises(InvalidInput, match="results"):
        Results.load(Path("no such file"))


def test_results_survive_json(tmp_path: Path) -> None:
    measured = {"recall": 1.0, "characters": 0.5, "seconds": 2.0}
    results = Results({"a": 1}, {Cell("passkey", 8, 1, 0.25).key: measured})
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results
    assert json.loads((tmp_path / "r.json").read_text())["cells"][0]["depth"] == 0.25


def test_the_search_for_longrope_finds_divisors_that_fit() -> None:
    rope, wanted = Rope(16, 10000.0), [1.0, 1.0, 1.2, 1.5, 2.5, 4.0, 4.0, 4.0]
    asked: list[scaling.LongRoPE] = []

    def loss(candidate: scaling.LongRoPE) -> float:
        asked.append(candidate)
        return sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(candidate.long_factor, wanted, strict=True))

    shown: list[tuple[int, int, float]] = []
    found = search_longrope(
        loss, rope, 4.0, 64, population=10, parents=3, generations=12, show=lambda *state: shown.append(state)
    )
    starts = [loss(candidate) for candidate in asked[:3]]
    assert loss(found) < 0.5 * min(starts) and loss(found) == shown[-1][2]
    assert shown[-1][:2] == (130, 130)
    for candidate in asked:
        divisors = list(candidate.long_factor)
        assert divisors == sorted(divisors) and 1.0 <= divisors[0] and divisors[-1] <= 5.0
        assert candidate.short_factor == (1.0,) * 8
    plain, factor = rope.frequencies(64)
    inv_freq, attention_factor = Rope(16, 10000.0, found).frequencies(64)
    assert torch.equal(inv_freq, plain) and factor == attention_factor == 1.0
    again = search_longrope(loss, rope, 4.0, 64, population=10, parents=3, generations=12)
    assert again == found
    for bad in ({"population": 2}, {"parents": 1}, {"parents": 11, "population": 10}, {"generations": -1}):
        with pytest.raises(InvalidInput):
            search_longrope(loss, rope, 4.0, 64, **bad)
    with pytest.raises(InvalidInput, match="factor"):
        search_longrope(loss, rope, 1.0, 64)


CELL = {"task": "passkey", "length": 8, "number": 1, "depth": 0.25, "recall": 1.0, "characters": 0.5, "seconds": 2.0}
READ = {"task": "loss", "length": 8, "number": 0, "depth": 0.0, "losses": [1.0, 2], "seconds": 1, "peak_bytes": None}


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "{}", '{"settings": {}}', '{"settings": [], "cells": []}'])
def test_other_files_are_not_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InvalidInput, match="results"):
        Results.load(tmp_path / "r.json")


@pytest.mark.parametrize(
    "cell",
    [
        7,
        *({key: value for key, value in CELL.items() if key != name} for name in CELL),
        *({**CELL, name: value} for name in CELL for value in ("x", [], None, True, {"a": 1})),
        {**CELL, "length": 0},
        {**CELL, "length": 10**30},
        {**CELL, "depth": float("nan")},
        {**CELL, "depth": 2.0},
        {**CELL, "seconds": 10**400},
        *({**READ, "losses": losses} for losses in (None, [], 1.0, ["x"], [[1.0]])),
        {**READ, "peak_bytes": "x"},
    ],
)
def test_damaged_cells_are_refused(tmp_path: Path, cell: Any) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"settings": {}, "cells": [READ, cell]}))
    with pytest.raises(InvalidInput, match="results"):
        Results.load(tmp_path / "r.json")


def test_cells_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"settings": {}, "cells": [READ, READ]}))
    with pytest.raises(InvalidInput, match="each cell once"):
        Results.load(tmp_path / "r.json")


def test_what_was_measured_may_be_infinite(tmp_path: Path) -> None:
    cell = {"task": "perplexity", "length": 8, "number": 0, "depth": 0.0, "loss": 1e6, "seconds": 1.0}
    (tmp_path / "r.json").write_text(json.dumps({"settings": {}, "cells": [cell, {**READ, "losses": [math.inf]}]}))
    found = summary(Results.load(tmp_path / "r.json"))
    assert found["perplexity"][0]["perplexity"] == math.inf and found["loss"][0]["losses"] == [math.inf]
