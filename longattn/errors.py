"""Errors at the public boundary: bad arguments, and calls that no backend can run.

Exceptions keep their arguments (`BaseException.__new__` does) and become text when they are shown: torch.compile traces
their constructors, which call no method of a built-in class for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_LONGEST = 200  # characters of what came, in a message


class InvalidInput(ValueError):
    """An argument does not satisfy the contract: names it, what was expected, and what came."""

    def __init__(self, argument: str, expected: str, got: object) -> None:
        self.argument = argument
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"{self.argument}: expected {self.expected}, got {_on_one_line(self.got)}"


class CacheFull(InvalidInput):
    """A cache has no room for what a call appends; the cache is as it was."""


class Unsupported(NotImplementedError):
    """No backend (or not the one that was named) can run a valid call: lists each backend with its reasons."""

    def __init__(self, call: str, reasons: Mapping[str, Sequence[str]]) -> None:
        self.call = call
        self.reasons = {backend: list(why) for backend, why in reasons.items()}

    def __str__(self) -> str:
        listing = "\n".join(f"  {backend}: {'; '.join(why)}" for backend, why in self.reasons.items())
        return f"no backend can run this call\n  call: {self.call}\n{listing}"


def _on_one_line(got: object) -> str:
    text = " ".join(str(got).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
