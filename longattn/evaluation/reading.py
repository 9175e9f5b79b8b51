"""Long texts through a language model, in pieces: losses of every token, and answers; no [N, vocab] logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longattn.errors import InvalidInput
from longattn.models import Decoder, GenerationConfig, chunked_cross_entropy, make_caches, stream
from longattn.models.generation.reader import placement

__all__ = [
    "DecoderReader",
    "HuggingFaceReader",
    "Reader",
    "check_memory",
    "free_bytes",
    "make_reader",
    "most_positions",
]

_PIECE = 2048  # tokens that go through the layers at once
_LOGITS = 1024  # tokens whose logits are held at once


class Reader(Protocol):
    """A language model that reads."""

    @property
    def length_matters(self) -> bool:
        """Whether what follows a token changes how the model reads those before it (DynamicNTK, LongRoPE)."""

    def losses(self, tokens: Tensor) -> Tensor:
        """The loss of each next token in nats, float32 [N], of tokens int64 [N + 1], on the CPU."""

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        """The likeliest tokens after a prompt, each as it comes."""

    def bytes_for(self, tokens: int) -> int:
        """About how much memory reading so many tokens takes, beside the weights."""


class DecoderReader:
    """A decoder of `longattn.models`, in eval mode.

    Args:
        model: on its device.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model

    @property
    def length_matters(self) -> bool:
        rope = self.model.config.rope
        return rope is not None and rope.depends_on_length

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(placement(self.model)[1])
        count = len(tokens) - 1
        if self.length_matters:  # pieces would each have other frequencies
            inputs, targets = tokens[None, :-1], tokens[None, 1:]
            return self.model.loss(inputs, targets, reduction="none", chunk=_LOGITS)[0].float().cpu()
        caches = make_caches(self.model, 1, count)
        found = []
        for start in range(0, count, _PIECE):
            stop = min(start + _PIECE, count)
            hidden = self.model.hidden_states(tokens[None, start:stop], caches=caches)
            targets = tokens[None, start + 1 : stop + 1]
            losses = chunked_cross_entropy(hidden, self.model.projection, targets, reduction="none", chunk=_LOGITS)
            found.append(losses[0].float().cpu())
        return torch.cat(found)

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        for piece in stream(self.model, [list(prompt)], GenerationConfig(max_new_tokens=new_tokens)):
            yield piece.token

    def bytes_for(self, tokens: int) -> int:
        config, width = self.model.config, placement(self.model)[0].itemsize
        row = 2 * config.kv_heads * config.head_dim * width  # keys and values of a layer
        kept = 0
        for layer in range(config.layers):
            sliding = config.is_sliding(layer) and config.window is not None
            kept += row * (min(tokens, (config.window or 0) + config.sinks) if sliding else tokens)
        read_back = 3 * row * tokens if config.methods else 0  # of one layer, unrotated
        piece = tokens if self.length_matters else min(tokens, _PIECE)
        heads = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
        working = piece * (4 * config.dim + heads + 3 * config.hidden) * width
        return kept + read_back + working + 3 * min(tokens, _LOGITS) * config.vocab_size * 4


class HuggingFaceReader:
    """A causal language model of transformers, in eval mode, with its own caches.

    Args:
        model: on its device.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def length_matters(self) -> bool:
        parameters = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
        return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.model.device)
        count = len(tokens) - 1
        piece = count if self.length_matters else _LOGITS
        cache, found = None, []
        for start in range(0, count, piece):
            stop = min(start + piece, count)
            read = self.model(tokens[None, start:stop], past_key_values=cache, use_cache=piece < count)
            cache = getattr(read, "past_key_values", None)
            logits, targets = read.logits[0], tokens[start + 1 : stop + 1]
            parts = zip(logits.split(_LOGITS), targets.split(_LOGITS), strict=True)
            found += [nn.functional.cross_entropy(x.float(), y, reduction="none").cpu() for x, y in parts]
        return torch.cat(found)

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        ids = torch.tensor([list(prompt)], device=self.model.device)
        if self.length_matters:  # the keys of a cache would keep the frequencies of fewer tokens
            for _ in range(new_tokens):
                with torch.no_grad():
                    newest = self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
                yield int(newest)
                ids = torch.cat((ids, newest), 1)
            return
        cache = None
        parts = ids.split(_PIECE, 1)
        for _ in range(new_tokens):
            with torch.no_grad():
                for part in parts:
                    read = self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    cache = read.past_key_values
            logits = read.logits[:, -1]
            if not logits.amax(-1).isfinite().all():
                raise FloatingPointError("the model's logits are not finite")
            newest = logits.argmax(-1, keepdim=True)
            yield int(newest)
            parts = (newest,)

    def bytes_for(self, tokens: int) -> int:
        config = self.model.config.get_text_config()
        width = next(self.model.parameters()).element_size()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        kept = 2 * config.num_hidden_layers * kv_heads * head_dim * width * tokens
        piece = tokens if self.length_matters else min(tokens, _PIECE)
        hidden = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        working = piece * (4 * config.hidden_size + 4 * heads * head_dim + 3 * hidden) * width
        rows = tokens if self.length_matters else min(tokens, _LOGITS)
        return kept + working + rows * config.vocab_size * (width + 8)


def most_positions(model: nn.Module) -> int | None:
    """Return the number of positions of a model whose positions are a table; None: there is no such limit."""
    config: Any = model.config
    if isinstance(model, Decoder):
        return config.max_length if config.positions == "learned" else None
    found = getattr(config.get_text_config(), "n_positions", None)  # so GPT-2's kin call them
    return found if isinstance(found, int) else None


def make_reader(model: nn.Module) -> Reader:
    """The reader of a model: a `longattn.models.Decoder`, or one of transformers."""
    if isinstance(model, Decoder):
        return DecoderReader(model.eval())
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise InvalidInput("model", "a Decoder, or a language model of transformers", type(model).__name__)
    return HuggingFaceReader(model.eval())


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that can be taken now; None where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" is none
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return max(0, min(found)) if found else None


def check_memory(name: str, tokens: int, needed: int, device: torch.device | str = "cpu") -> None:
    """Raise InvalidInput if reading so many tokens would take more memory than there is.

    Args:
        name: of the argument that asks for them. needed: as `Reader.bytes_for` estimates.
    """
    free = free_bytes(device)
    if free is not None and needed > free:
        expected = f"lengths that fit into the {free / 1e9:.1f} GB of memory that are free"
        raise InvalidInput(name, expected, f"{tokens:,} tokens, which take about {needed / 1e9:.1f} GB")
