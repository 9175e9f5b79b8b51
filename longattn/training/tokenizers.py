"""From text to token ids and back: bytes, and what Hugging Face's tokenizers library trains, BPE and WordPiece.

Trained tokenizers are that library's own objects; `WordTokenizer` gives one the few methods that a `ByteTokenizer` has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longattn.errors import InvalidInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "SPECIAL_TOKENS",
    "ByteTokenizer",
    "TextTokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "parse_tokenizer",
    "train_bpe",
    "train_wordpiece",
]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # BERT's


class TextTokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """V, all ids are below it."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""

    def id_of(self, token: str) -> int:
        """The id of a special token."""


class ByteTokenizer:
    """UTF-8, one id a byte, and special tokens from 256 on; every text has ids, and nothing has to be trained.

    Args:
        special_tokens: their names.
    """

    def __init__(self, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> None:
        self.special_tokens = tuple(special_tokens)

    @property
    def vocab_size(self) -> int:
        """256 bytes and the special tokens."""
        return 256 + len(self.special_tokens)

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out, and what is no UTF-8 is U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def id_of(self, token: str) -> int:
        """The id of a special token.

        Raises:
            InvalidInput: there is no such token.
        """
        if token not in self.special_tokens:
            raise InvalidInput("token", f"one of {list(self.special_tokens)}", repr(token))
        return 256 + self.special_tokens.index(token)


class WordTokenizer:
    """A tokenizer of the tokenizers library.

    Args:
        tokenizer: as `train_bpe`, `train_wordpiece` and `load_tokenizer` give it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """V, special tokens included."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(list(ids))

    def id_of(self, token: str) -> int:
        """The id of a token.

        Raises:
            InvalidInput: there is no such token.
        """
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise InvalidInput("token", "one of the tokenizer's", repr(token))
        return found


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = ("<|endoftext|>",)
) -> Tokenizer:
    """Byte-level byte-pair encoding, GPT-2's: every text has tokens, and they give it back byte for byte.

    Sennrich et al., arXiv 1508.07909; Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

    Args:
        texts: read once, as a stream.
        vocab_size: V, at least 256 bytes and the special tokens. Little text gives fewer.
        special_tokens: the first ids.

    Raises:
        InvalidInput: no text, or too small a vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = 256 + len(special_tokens)
    _check_size(vocab_size, least)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _trained(tokenizer, texts, trainer)


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = True, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """WordPiece, BERT's: pieces of words, "##" before those that go on; what has none is [UNK].

    The library breaks ties between pieces anew each time: trained twice, ids differ. Save the tokenizer with the model.

    Args:
        texts: read once, as a stream.
        vocab_size: V. Little text gives fewer.
        lowercase: also strips accents.
        special_tokens: the first ids; [UNK] is one of them.

    Raises:
        InvalidInput: no text, too small a vocabulary, or no [UNK].
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if "[UNK]" not in special_tokens:
        raise InvalidInput("special_tokens", "[UNK] among them", list(special_tokens))
    _check_size(vocab_size, len(special_tokens) + 1)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(special_tokens), show_progress=False)
    return _trained(tokenizer, texts, trainer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, as `Tokenizer.save` writes it.

    Raises:
        InvalidInput: no such file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput("tokenizer", "a file that exists", path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput("tokenizer", "a complete tokenizer.json", f"{path}: {error}") from error
    return parse_tokenizer(text, str(path))


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """Make the tokenizer that the JSON of a tokenizer.json describes.

    Args:
        text: the JSON.
        where: the file that it is from, for errors.

    Raises:
        InvalidInput: it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # the library raises no narrower one, and panics are not even an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InvalidInput("tokenizer", "a complete tokenizer.json", f"{where}: {error}") from error


def _trained(tokenizer: Any, texts: Iterable[str], trainer: Any) -> Any:
    seen = False

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text.strip())
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise InvalidInput("texts", "at least one that is not empty", "none")
    return tokenizer


def _check_size(vocab_size: object, least: int) -> None:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < least:
        raise InvalidInput("vocab_size", f"an int >= {least}", repr(vocab_size))
