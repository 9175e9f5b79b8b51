"""Cleaning text: one Unicode form, no control characters, no noise, nothing twice."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

from longattn.errors import InvalidInput
from longattn.scaling import finite_number

__all__ = ["clean_documents", "deduplicated", "is_noise", "normalised"]

_SPACES = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_LINE_ENDS = re.compile(r"\r\n?|[\u2028\u2029\x85]")


def normalised(text: str) -> str:
    """NFC, "\\n" as the only line end, one space between words, at most one blank line, no control characters.

    Indentation of code goes with it: leave code as it is.
    """
    text = unicodedata.normalize("NFC", _LINE_ENDS.sub("\n", text))
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    lines = (line.strip() for line in _SPACES.sub(" ", text).split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


def is_noise(text: str, *, least_letters: float = 0.6, least_length: int = 20) -> bool:
    """Whether a document is too short, or too few of its characters, spaces aside, are letters: tables, codes, debris.

    Args:
        least_letters: the share of letters below which it is noise, in [0, 1].
        least_length: how many characters, spaces aside, it takes to be none.
    """
    finite_number("least_letters", least_letters, at_least=0.0, at_most=1.0)
    characters = [c for c in text if not c.isspace()]
    if len(characters) < max(1, least_length):
        return True
    # Marks are parts of letters in many scripts.
    return sum(unicodedata.category(c)[0] in "LM" for c in characters) < least_letters * len(characters)


def deduplicated(documents: Iterable[str]) -> Iterator[str]:
    """The documents without those whose words, case and spaces aside, came before; 16 bytes of memory each."""
    seen: set[bytes] = set()
    for document in documents:
        words = " ".join(document.casefold().split())
        digest = hashlib.sha256(words.encode("utf-8", "surrogatepass")).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            yield document


def clean_documents(documents: Iterable[str], *, least_letters: float = 0.6, least_length: int = 20) -> Iterator[str]:
    """Normalised, without noise, each once; one document at a time.

    Raises:
        InvalidInput: something other than text.
    """

    def kept() -> Iterator[str]:
        for document in documents:
            if not isinstance(document, str):
                raise InvalidInput("documents", "str", type(document).__name__)
            text = normalised(document)
            if not is_noise(text, least_letters=least_letters, least_length=least_length):
                yield text

    return deduplicated(kept())
