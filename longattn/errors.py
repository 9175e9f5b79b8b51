"""What goes wrong at the public boundary: bad arguments, and calls that no backend can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_LONGEST = 200  # characters of what came, in a message


class InvalidInput(ValueError):
    """An argument does not satisfy the contract: names it, what was expected, and what came."""

    def __init__(self, argument: str, expected: str, got: object) -> None:
        super().__init__(f"{argument}: expected {expected}, got {_on_one_line(got)}")
        self.argument = argument
        self.expected = expected
        self.got = got

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str, object]]:
        return type(self), (self.argument, self.expected, self.got)


class CacheFull(InvalidInput):
    """A cache has no room for what a call appends; the cache is as it was."""


class Unsupported(NotImplementedError):
    """No backend (or not the one that was named) can run a valid call: lists each backend with its reasons."""

    def __init__(self, call: str, reasons: Mapping[str, Sequence[str]]) -> None:
        listing = "\n".join(f"  {backend}: {'; '.join(why)}" for backend, why in reasons.items())
        super().__init__(f"no backend can run this call\n  call: {call}\n{listing}")
        self.call = call
        self.reasons = {backend: list(why) for backend, why in reasons.items()}

    def __reduce__(self) -> tuple[type[Unsupported], tuple[str, dict[str, list[str]]]]:
        return type(self), (self.call, self.reasons)


def _on_one_line(got: object) -> str:
    text = " ".join(str(got).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
