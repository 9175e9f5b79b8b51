"""What replaces a dense mask says what transformers' own dense mask says, and cannot be mistaken for one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, masking_utils
from transformers.masking_utils import create_causal_mask

import longattn
from longattn.integrations.huggingface import register, visibility
from longattn.integrations.huggingface.attention import attention_forward
from longattn.integrations.huggingface.visibility import Visibility, keywords


def dense(mask: Visibility) -> Tensor:
    """bool [B, 1, Nq, Nk], by longattn.Mask."""
    batch, _, nq, nk = mask.shape
    call = keywords(mask)
    align = call.pop("align")
    offset = align if isinstance(align, Tensor) else None
    visible = longattn.Mask.from_window(window=call.pop("window"), align="start" if offset is not None else align)
    return visible.materialize(nq, nk, offset=offset, **call).expand(batch, nq, nk)[:, None]


def check(batch: int, nq: int, nk: int, function: Callable[..., Any], **arguments: Any) -> Visibility:
    mask = visibility.visibility(batch, nq, nk, mask_function=function, **arguments)
    expected = masking_utils.sdpa_mask(batch, nq, nk, mask_function=function, allow_is_causal_skip=False, **arguments)
    assert mask.shape == expected.shape
    assert torch.equal(dense(mask), expected)
    return mask


def random_function(rng: random.Random, batch: int) -> Callable[..., Any]:
    size = rng.randint(1, 6)
    padding = torch.tensor([rng.randint(0, 5) for _ in range(batch)])
    return rng.choice(
        [
            masking_utils.causal_mask_function,
            masking_utils.bidirectional_mask_function,
            masking_utils.sliding_window_causal_mask_function(size),
            masking_utils.sliding_window_bidirectional_mask_function(size),
            masking_utils.chunked_causal_mask_function(size, padding),
            masking_utils.and_masks(
                masking_utils.sliding_window_overlay(size),
                masking_utils.chunked_causal_mask_function(size + 2, padding),
            ),
        ]
    )


def test_standard_masks_with_caches_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visibility, "_evaluate", None)  # each of these is recognised
    rng = random.Random(0)
    for _ in range(150):
        batch, nq = rng.randint(1, 3), rng.randint(1, 9)
        past, first_key = rng.randint(0, 9), rng.choice([0, 0, rng.randint(0, 6)])
        nk = max(1, past - first_key + nq + rng.choice([0, 0, 4]))
        padding = rng.choice([None, torch.rand(batch, first_key + nk - rng.choice([0, 0, 1])) > 0.3])
        offset = rng.choice([past, torch.tensor(past)])  # an int with dynamic caches, a tensor with static ones
        function = random_function(rng, batch)
        check(batch, nq, nk, function, q_offset=offset, kv_offset=first_key, attention_mask=padding)


@pytest.mark.skipif(
    not hasattr(masking_utils, "packed_sequence_compatibility_function"), reason="transformers before 5.23 has none"
)
def test_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visibility, "_evaluate", None)
    rng = random.Random(0)
    for _ in range(60):
        batch, n = rng.randint(1, 3), rng.randint(1, 14)
        starts = torch.rand(batch, n) < 0.25
        starts[:, 0] = True
        index = torch.arange(n)
        positions = index - torch.where(starts, index, 0).cummax(-1).values
        ids = starts.long().cumsum(-1) - 1
        function = masking_utils.packed_sequence_compatibility_function(random_function(rng, batch), positions, ids)
        check(batch, n, n, function)


@pytest.mark.parametrize("tile", [1, 100, 1 << 22])
def test_functions_that_nobody_knows(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(visibility, "_TILE_ENTRIES", tile)
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1, -1, -1]])
    images = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(blocks))
    check(2, 9, 9, images)
    check(2, 4, 9, images, q_offset=torch.tensor(5), attention_mask=torch.rand(2, 9) > 0.3)

    def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) | (key < 4)

    def hole(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (key != 3)

    check(2, 9, 9, prefix, use_vmap=True)
    assert check(1, 6, 9, hole, q_offset=3).key_mask is not None

    def every_third(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query - key) % 3 == 0

    with pytest.raises(longattn.Unsupported, match="every_third.*\n.*no interval"):
        visibility.visibility(2, 9, 9, mask_function=every_third)


def test_packing_that_is_no_interval_is_not_taken_for_one() -> None:
    scattered = torch.tensor([[0, 1, 0, 1, 1, 0]])
    function = masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(scattered)
    )
    with pytest.raises(longattn.Unsupported):
        visibility.visibility(1, 6, 6, mask_function=function)


def test_a_mask_of_a_million_tokens() -> None:
    register()
    config = LlamaConfig(attn_implementation="longattn")
    padding = torch.ones(1, 1_000_000, dtype=torch.int64)
    padding[:, :3] = 0
    mask = create_causal_mask(config, torch.empty(1, 1_000_000, 1), padding, None)
    assert mask.shape == (1, 1, 1_000_000, 1_000_000)
    assert mask.right == 0 and mask.key_mask.shape == (1, 1_000_000)


def test_a_static_cache_may_count_on() -> None:
    length = torch.tensor(4)
    mask = visibility.visibility(2, 1, 9, q_offset=length)
    length.add_(1)
    assert mask.offset.tolist() == [4, 4]


def test_operations_on_a_mask() -> None:
    mask = visibility.visibility(2, 3, 5, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), q_offset=2)
    for same in (mask.contiguous(), mask.clone(), mask.detach(), mask.to("cpu"), mask[:], mask[:, :, :, :5]):
        assert torch.equal(dense(same), dense(mask))
    for edit in (
        lambda: mask + 1.0,
        lambda: mask.float(),
        lambda: mask[:, :, 1:],
        lambda: 1.0 - mask,
        lambda: torch.where(mask, mask, mask),
        lambda: mask.all(),
        lambda: mask.masked_fill(mask, 0),
        lambda: torch.cat([mask, mask]),
        lambda: mask.repeat(1, 1, 2, 1),
        lambda: mask.reshape(2, 15),
    ):
        with pytest.raises((longattn.Unsupported, RuntimeError), match="mask"):
            edit()
    assert repr(mask) == "Visibility([2, 1, 3, 5], right=0, key_mask=bool [2, 5], start=int32 [2, 1])"


def test_a_mask_over_batch_and_heads() -> None:
    mask = visibility.visibility(2, 3, 5, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), q_offset=2)
    entries = dense(mask)
    assert torch.equal(visibility.dense(mask), entries)
    repeated = mask.repeat(2, 4, 1, 1)
    assert isinstance(repeated, Visibility) and repeated.shape == (4, 4, 3, 5)
    assert torch.equal(visibility.dense(repeated), entries.repeat(2, 1, 1, 1))
    assert torch.equal(visibility.dense(mask.expand(-1, 4, -1, -1)), entries)
    flat = mask.repeat(1, 4, 1, 1).reshape(-1, 3, 5)
    assert torch.equal(visibility.dense(flat), entries.repeat(1, 4, 1, 1).reshape(-1, 3, 5))
    first = visibility.visibility(1, 3, 5, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]), q_offset=2)
    assert torch.equal(visibility.dense(first.expand(2, 1, 3, 5)), entries[:1].expand(2, 1, 3, 5))


def test_a_mask_in_sums_and_choices_of_the_model() -> None:
    """The model makes something dense of it: hidden entries become the least number, as transformers' own do."""
    mask = visibility.visibility(2, 3, 5, attention_mask=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]), q_offset=2)
    scores = torch.randn(2, 4, 3, 5, requires_grad=True)
    expected = scores.masked_fill(~dense(mask), torch.finfo(torch.float32).min)
    visibility._say_dense.cache_clear()
    with pytest.warns(UserWarning, match="dense"):
        assert torch.equal(scores + mask, expected)
    for total in (mask + scores, scores.clone().add_(mask)):
        assert torch.equal(total, expected)
    total.softmax(-1)[..., 2].sum().backward()
    assert scores.grad is not None and not scores.grad.masked_select(~dense(mask)).any()
    assert torch.equal(torch.where(mask, torch.tensor(0.0), torch.tensor(-1.0)), torch.where(dense(mask), 0.0, -1.0))


def test_a_mask_that_hides_nothing_has_any_size() -> None:
    """As for a prefix that PEFT puts before the keys of an encoder."""
    mask = visibility.visibility(2, 3, 3, mask_function=masking_utils.bidirectional_mask_function)
    torch.manual_seed(3)
    got = call(mask)
    torch.manual_seed(3)
    assert torch.equal(got, call(None, is_causal=False))


def test_a_mask_of_three_dimensions() -> None:
    with pytest.raises(longattn.InvalidInput, match="attention_mask: expected 2 dimensions.*or 4.*3, 5"):
        visibility.visibility(2, 3, 5, attention_mask=torch.ones(2, 3, 5, dtype=torch.bool))


def test_packed_rows_of_other_versions_of_transformers() -> None:
    """Before 5.23 the mask of a packed row is causality, a window and the sequences, all of indices in the row."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])
    for inner in (masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(3)):
        function = masking_utils.and_masks(inner, masking_utils.packed_sequence_mask_function(ids))
        assert check(2, 7, 7, function).lo is not None


def call(mask: Tensor | None, nq: int = 3, nk: int = 5, batch: int = 2, **others: Any) -> Tensor:
    layer = nn.Module()
    q, k, v = torch.randn(batch, 4, nq, 8), torch.randn(batch, 2, nk, 8), torch.randn(batch, 2, nk, 8)
    return attention_forward(layer, q, k, v, mask, **others)[0]


def test_layers_without_a_mask() -> None:
    """The layer's is_causal decides, as in PyTorch's own attention."""
    assert call(None).shape == (2, 3, 4, 8)
    torch.manual_seed(3)
    causal = call(None)
    torch.manual_seed(3)
    assert not torch.equal(call(None, is_causal=False), causal)
    with pytest.raises(longattn.InvalidInput, match="sliding_window 2 hides keys"):
        call(None, sliding_window=2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"mask": visibility.visibility(2, 3, 6)}, longattn.InvalidInput, "3 queries and 5 keys"),
        ({"mask": visibility.visibility(2, 3, 5).repeat(1, 4, 1, 1).view(8, 3, 5)}, longattn.InvalidInput, "4 dim"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, longattn.InvalidInput, "4 dimensions"),
        ({"mask": torch.ones(2, 1, 3, 5, dtype=torch.int64)}, longattn.InvalidInput, "floating or bool"),
        ({"mask": None, "sinks": torch.zeros(4)}, longattn.Unsupported, "sinks is not implemented"),
        (
            {"mask": None, "cu_seq_lens_q": torch.tensor([0, 3]), "cu_seq_lens_k": torch.tensor([0, 5])},
            longattn.InvalidInput,
            "one row|packed in one",
        ),
        (
            {"mask": None, "batch": 1, "cu_seq_lens_q": torch.tensor([0, 3]), "cu_seq_lens_k": torch.tensor([0, 5])},
            longattn.InvalidInput,
            "cu_seq_lens_k",
        ),
    ],
)
def test_bad_calls(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(**arguments)
