"""Cleaning, tokenizers, and documents packed from token files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longattn import InvalidInput
from longattn.models import Decoder, TransformerConfig
from longattn.training import (
    PackedDocuments,
    TokenFile,
    TrainingConfig,
    clean_documents,
    is_noise,
    load_tokenizer,
    normalised,
    pack,
    train,
    train_bpe,
    train_wordpiece,
    write_token_file,
)

TEXTS = ["The quick brown fox jumps over the lazy dog.", "The dog sleeps; the fox, quick as ever, does not."] * 4


def test_text_is_brought_to_one_form() -> None:
    assert normalised("  Cafe\u0301\u200b \t au\r\nlait\x00\r\n\n\n\n end\u2028.\ufeff ") == "Café au\nlait\n\nend\n."
    assert normalised(normalised("a \n b")) == normalised("a \n b")
    assert normalised("") == ""


def test_noise_and_doubles_go() -> None:
    words = "Some words that say something."
    assert is_noise("12 34 | 56 -- 78 %% 90 :: 11 22 33") and is_noise("short") and not is_noise(words)
    assert not is_noise("हिन्दी में लिखा हुआ एक वाक्य यहाँ है")
    given = [
        words,
        "  some WORDS that say\nsomething. ",
        "",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14",
        "Other words, long enough.",
    ]
    assert list(clean_documents(iter(given))) == [words, "Other words, long enough."]
    with pytest.raises(InvalidInput, match="documents"):
        list(clean_documents([b"bytes"]))  # type: ignore[list-item]


def test_bpe_gives_every_text_back(tmp_path: Path) -> None:
    tokenizer = train_bpe(iter(TEXTS), 300)
    assert 257 < tokenizer.get_vocab_size() <= 300 and tokenizer.token_to_id("<|endoftext|>") == 0
    for text in (*TEXTS, "naïve 漢字 \n\t\x00", "", " two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(TEXTS[0]).ids) < len(TEXTS[0])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(TEXTS[1]).ids == tokenizer.encode(TEXTS[1]).ids


def test_wordpiece_is_berts() -> None:
    tokenizer = train_wordpiece(iter(TEXTS), 80)
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    encoded = tokenizer.encode("The FOX sleeps 漢")
    assert encoded.tokens[0] == "the" and "[UNK]" in encoded.tokens
    assert tokenizer.decode(tokenizer.encode("the lazy dog").ids) == "the lazy dog"


def test_token_files(tmp_path: Path) -> None:
    path = tmp_path / "text.tokens"
    documents = ["abc", "", "x", "héllo"]
    for vocab_size, width in ((256, 1), (1000, 2), (100_000, 4)):
        written = write_token_file(path, iter(documents), lambda text: text.encode(), vocab_size)
        assert path.stat().st_size == 10 * width
        assert [bytes(document.tolist()).decode() for document in written] == ["abc", "x", "héllo"]
        assert TokenFile(path).digest() == written.digest() and written.lengths.tolist() == [3, 1, 6]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text.tokens", "text.tokens.ends"]
    with pytest.raises(InvalidInput, match="encode"):
        write_token_file(path, ["é"], lambda text: text.encode(), 100)
    assert len(TokenFile(path)) == 3  # the old one stays
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="a token file of 40 bytes, got 39"):
        TokenFile(path)


def test_packed_batches_are_windows_of_documents(tmp_path: Path) -> None:
    texts = ["abcdefghijklmnopqrstuvwxyz", "0123456789", "Z", "ABCD"]
    file = write_token_file(tmp_path / "t", texts, lambda text: text.encode(), 256)
    packed = PackedDocuments(file, tokens=20, seed=1)
    seen: set[str] = set()
    for step in range(50):
        batch = packed.batch(step)
        assert batch["tokens"].shape == batch["targets"].shape == (20,)
        cu = batch["cu_seqlens"].tolist()
        assert cu[0] == 0 and cu[-1] == 20 and sorted(set(cu)) == cu
        for start, end in zip(cu, cu[1:], strict=False):
            window = bytes([*batch["tokens"][start:end].tolist(), int(batch["targets"][end - 1])]).decode()
            assert any(window in text for text in texts)
            seen.add(window[0])
    assert {"0", "A"} <= seen
    short = PackedDocuments(file, tokens=20, longest=6, seed=1).batch(0)
    assert short["tokens"].shape == (20,) and short["cu_seqlens"].diff().max() == 6
    assert torch.equal(packed.batch(3)["tokens"], PackedDocuments(file, tokens=20, seed=1).batch(3)["tokens"])


def test_nothing_leaks_between_packed_documents() -> None:
    model = Decoder(TransformerConfig(dim=32, layers=2, heads=2, max_length=32)).double()
    documents = [torch.randint(0, 256, (n,)) for n in (9, 1, 2, 14)]
    batch = pack(documents)
    losses = model.loss(**batch, reduction="none")
    alone = [model.loss(d[None, :-1], d[None, 1:], reduction="none")[0] for d in documents if len(d) > 1]
    torch.testing.assert_close(losses, torch.cat(alone))
    embedded = model.embedding(batch["tokens"]).detach().requires_grad_()
    hidden = model.run(embedded, cu_seqlens=batch["cu_seqlens"])
    (grad,) = torch.autograd.grad(hidden[8:9].sum() + hidden[9:].sum(), embedded)
    assert grad[:8].abs().max() == 0 and grad[8:].abs().amax(-1).min() > 0


def test_a_decoder_trains_on_packed_documents(tmp_path: Path) -> None:
    file = write_token_file(tmp_path / "t", TEXTS, lambda text: text.encode(), 256)
    batches = PackedDocuments(file, tokens=64)
    config = TrainingConfig(steps=6, warmup=1, precision="float32", learning_rate=1e-2, save_every=3)
    sizes: dict[str, Any] = {"dim": 32, "layers": 1, "heads": 2, "max_length": 64}

    def fresh() -> Decoder:
        torch.manual_seed(0)
        return Decoder(TransformerConfig(**sizes))

    whole = train(fresh(), batches, config, show_progress=False)
    assert whole.losses[-1] < whole.losses[0] and whole.tokens == 6 * 64


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("vocab_size", lambda path: train_bpe(TEXTS, 100)),
        ("texts", lambda path: train_bpe(["", " "], 300)),
        ("texts", lambda path: train_wordpiece([], 300)),
        ("special_tokens", lambda path: train_wordpiece(TEXTS, 300, special_tokens=["[PAD]"])),
        ("tokenizer", lambda path: load_tokenizer(path / "none.json")),
        ("documents", lambda path: write_token_file(path / "t", ["", ""], lambda text: text.encode(), 256)),
        ("path", lambda path: TokenFile(path / "none")),
        ("documents", lambda path: pack([torch.tensor([1])])),
        (
            "longest",
            lambda path: PackedDocuments(write_token_file(path / "t", TEXTS, str.encode, 256), tokens=8, longest=1),
        ),
        ("documents", lambda path: pack([torch.tensor([], dtype=torch.int64)])),
        (
            "documents",
            lambda path: PackedDocuments(write_token_file(path / "t", ["a"], lambda x: x.encode(), 256), tokens=8),
        ),
    ],
)
def test_bad_input_is_named(says: str, call: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=says):
        call(tmp_path)


def test_a_damaged_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(InvalidInput, match=r"complete tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
