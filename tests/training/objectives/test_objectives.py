"""What is masked, paired and left out: shares, exact reconstruction, seeds, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from longattn import InvalidInput
from longattn.training.objectives import corrupt_spans, infill_text, join_pair, mask_tokens, sentence_pair


def test_masks_fifteen_of_a_hundred_eighty_ten_ten() -> None:
    tokens = torch.randint(5, 1000, (400, 500))
    tokens[:, 0], tokens[:, -1] = 1, 2
    before = tokens.clone()
    masked, targets = mask_tokens(tokens, mask_id=3, vocab_size=1000, special_ids=(0, 1, 2, 4))
    assert torch.equal(tokens, before)
    chosen = targets != -100
    assert torch.equal(targets[chosen], tokens[chosen]) and torch.equal(masked[~chosen], tokens[~chosen])
    assert not chosen[:, [0, -1]].any()
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.005)
    kept = (masked == tokens)[chosen].float().mean().item()
    hidden = (masked == 3)[chosen].float().mean().item()
    assert hidden == pytest.approx(0.8, abs=0.01) and kept == pytest.approx(0.1, abs=0.01)
    assert masked[chosen & (masked != 3)].min() >= 5


def test_the_same_seed_masks_the_same() -> None:
    tokens = torch.randint(5, 50, (3, 40))
    first, again, other = (
        mask_tokens(tokens, mask_id=3, vocab_size=50, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_half_of_the_pairs_are_neighbours() -> None:
    documents = [[[d * 100 + s] for s in range(6)] for d in range(4)] + [[[999]], []]
    rng = np.random.default_rng(0)
    pairs = [sentence_pair(documents, rng) for _ in range(2000)]
    for first, second, is_random in pairs:
        follows = second[0] == first[0] + 1
        same_document = first[0] // 100 == second[0] // 100
        assert follows if not is_random else not same_document
        assert first[0] != 999
    assert np.mean([pair.is_random for pair in pairs]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("lengths", "length", "kept"),
    [((3, 2), 20, (3, 2)), ((30, 2), 20, (15, 2)), ((2, 30), 20, (2, 15)), ((30, 30), 20, (9, 8)), ((9, 9), 5, (1, 1))],
)
def test_pairs_fit(lengths: tuple[int, int], length: int, kept: tuple[int, int]) -> None:
    first, second = list(range(10, 10 + lengths[0])), list(range(50, 50 + lengths[1]))
    tokens, types = join_pair(first, second, start_id=1, separator_id=2, length=length)
    assert tokens.tolist() == [1, *first[: kept[0]], 2, *second[: kept[1]], 2]
    assert types.tolist() == [0] * (kept[0] + 2) + [1] * (kept[1] + 1)


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_infilling_leaves_the_asked_share_out(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(20):
        tokens = torch.arange(10, 10 + count)
        source, target = infill_text(tokens, mask_id=1, rng=rng)
        assert torch.equal(target, tokens)
        kept = source[source != 1]
        assert len(kept) == count - max(1, round(0.3 * count))
        assert torch.equal(kept, kept.sort().values)  # in order, each once
        assert kept.unique().numel() == len(kept) and (source == 1).any()


@pytest.mark.parametrize("count", [2, 3, 10, 200])
def test_spans_and_what_is_kept_make_the_text(count: int) -> None:
    rng = np.random.default_rng(count)
    sentinels = list(range(1000, 900, -1))
    for _ in range(20):
        tokens = torch.arange(10, 10 + count)
        source, target = corrupt_spans(tokens, sentinel_ids=sentinels, rng=rng)
        spans: dict[int, list[int]] = {}
        for token in target.tolist():
            if token >= 900:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        text = [x for token in source.tolist() for x in (spans[token] if token >= 900 else [token])]
        assert text == tokens.tolist() and source[0] < 900
        assert target[-1] not in source and list(spans) == sentinels[: len(spans)]
        assert sum(map(len, spans.values())) == min(max(1, round(0.15 * count)), count - 1)


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("tokens", lambda rng: mask_tokens(torch.tensor([50]), mask_id=3, vocab_size=50)),
        ("tokens", lambda rng: mask_tokens(torch.tensor([1.0]), mask_id=3, vocab_size=50)),
        ("mask_id", lambda rng: mask_tokens(torch.tensor([1]), mask_id=50, vocab_size=50)),
        ("special_ids", lambda rng: mask_tokens(torch.tensor([1]), mask_id=0, vocab_size=2, special_ids=(1,))),
        ("probability", lambda rng: mask_tokens(torch.tensor([1]), mask_id=0, vocab_size=2, probability=0.0)),
        ("documents", lambda rng: sentence_pair([[[1], [2]]], rng)),
        ("documents", lambda rng: sentence_pair([[[1]], [[2]]], rng)),
        ("second", lambda rng: join_pair([1], [], start_id=1, separator_id=2, length=9)),
        ("length", lambda rng: join_pair([1], [2], start_id=1, separator_id=2, length=4)),
        ("at least 1 tokens", lambda rng: infill_text(torch.tensor([], dtype=torch.int64), mask_id=1, rng=rng)),
        ("at least 2 tokens", lambda rng: corrupt_spans(torch.tensor([5]), sentinel_ids=[9, 8], rng=rng)),
        ("sentinel_ids", lambda rng: corrupt_spans(torch.arange(100), sentinel_ids=[999], rng=rng)),
        ("share", lambda rng: infill_text(torch.tensor([5]), mask_id=1, rng=rng, share=0.0)),
    ],
)
def test_bad_input_is_named(says: str, call: Any) -> None:
    with pytest.raises(InvalidInput, match=says):
        call(np.random.default_rng(0))
