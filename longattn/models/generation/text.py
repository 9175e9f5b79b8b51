"""Text from tokens as they come: whole characters only, and stop strings found before they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Decode", "TextStream", "decode_bytes"]

Decode = Callable[[list[int]], str]

_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens that a character may come in
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decode_bytes(tokens: list[int]) -> str:
    """Text of byte tokens, as UTF-8; bytes that are none become U+FFFD."""
    return bytes(tokens).decode("utf-8", errors="replace")


class TextStream:
    """Text of one growing sequence of tokens.

    Args:
        decode: text of token ids, by a tokenizer. What it gives for a sequence must begin with what it gives for the
            sequence's beginning, unfinished characters aside.
        stops: strings that end the text, and are left out of it.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded along, as tokenizers treat a first token differently
        self._shown = 0  # tokens whose text was taken
        self._held = ""  # may begin a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now. Nothing comes after a stop string."""
        self._tokens.append(token)
        return self._release(self._take(whole_characters=True))

    def finish(self) -> str:
        """What was held back, as no more tokens come."""
        text = self._release(self._take(whole_characters=False)) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _take(self, whole_characters: bool) -> str:
        """The text of tokens not yet taken; none while the last may be a part of a character."""
        known = self._decode(self._tokens[self._context : self._shown])
        text = self._decode(self._tokens[self._context :])
        waiting = len(self._tokens) - self._shown
        if whole_characters and text.endswith(_INCOMPLETE) and waiting < _LONGEST_CHARACTER:
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(known) :]

    def _release(self, text: str) -> str:
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        released, self._held = self._held[:keep], self._held[keep:]
        return released


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that is a beginning of stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
