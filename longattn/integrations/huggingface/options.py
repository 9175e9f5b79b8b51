"""What one side's config must say for the other side to compute the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from longattn.errors import InvalidInput, Unsupported
from longattn.models import STYLES, TransformerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["readable", "require", "require_no_methods", "require_style"]

_STRUCTURE = (
    "architecture",
    "positions",
    "norm",
    "norm_first",
    "embedding_norm",
    "feed_forward",
    "bias",
    "scale_embeddings",
    "tie_embeddings",
    "norm_eps",
)


@contextmanager
def readable(argument: str, expected: str, source: object) -> Iterator[None]:
    """Turn whatever a damaged or hostile file makes the code that reads it raise into InvalidInput, on one line.

    Args:
        argument, expected: as of InvalidInput. source: the file or folder.
    """
    try:
        yield
    except (InvalidInput, Unsupported):
        raise
    except Exception as error:
        raise InvalidInput(argument, expected, f"{source}: {type(error).__name__}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust, not derived from Exception
            raise
        raise InvalidInput(argument, expected, f"{source}: {error}") from error


def require(config: PreTrainedConfig, **expected: Any) -> None:
    """Raise InvalidInput unless these options of a Hugging Face config, where it has them, have these values."""
    for name, value in expected.items():
        if getattr(config, name, value) != value:
            raise InvalidInput("config", f"{name} {value!r}", repr(getattr(config, name)))


def require_style(config: TransformerConfig, style: str, free: Sequence[str] = ()) -> None:
    """Raise InvalidInput unless our config is of a style in all but sizes, dropout and what is named free."""
    defaults = {field.name: field.default for field in fields(config)}
    for name in _STRUCTURE:
        expected = STYLES[style].get(name, defaults[name])
        if name not in free and getattr(config, name) != expected:
            raise InvalidInput("config", f"{name} {expected!r}, as the style {style!r}", repr(getattr(config, name)))


def require_no_methods(config: TransformerConfig) -> None:
    """Raise InvalidInput for layers that a Hugging Face model has only with attn_implementation="longattn".

    `longattn.integrations.extend` gives it them: a folder that every implementation reads must not be wrong in others.
    """
    if config.methods or "N" in config.pattern:
        got = f"methods {list(config.methods)} and pattern {config.pattern!r}"
        raise InvalidInput("config", "no methods and no layer N (extend the Hugging Face model)", got)
