"""A language model with its tokenizer, from whatever a MODEL argument names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longattn.cli.card import Card, read_card
from longattn.errors import InvalidInput
from longattn.integrations import huggingface
from longattn.models import Decoder, decode_bytes
from longattn.training import load_model

__all__ = ["LanguageModel", "load_language_model", "trained_length"]

_CHECKPOINT = "model.safetensors"


@dataclass(frozen=True)
class LanguageModel:
    """What reads and what makes its tokens.

    model: a Decoder of ours, or a model of transformers that ours cannot say. encode, decode: without special tokens.
    prefix: tokens that a text starts with. stop_tokens: that end it. card: beside a checkpoint of ours; None otherwise.
    tokenizer: of transformers; None for ours. theirs: the model as transformers made it, where `keep` asked for it.
    """

    model: nn.Module
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    prefix: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    card: Card | None = None
    tokenizer: Any = None
    theirs: Any = None


def load_language_model(
    path: Path, *, gguf: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu", keep: bool = False
) -> LanguageModel:
    """Load a causal language model, in eval mode.

    Args:
        path: a checkpoint of `longattn train` or its folder (model.safetensors in it), a folder of a Hugging Face model
            with its tokenizer, or a folder with a GGUF file.
        gguf: the file in the folder, where there are several.
        keep: keep the model of transformers beside ours.

    Raises:
        InvalidInput: none of these, or a model that is no decoder.
    """
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if gguf is None and not files:
            if not (path / _CHECKPOINT).is_file():
                raise InvalidInput("MODEL", f"{_CHECKPOINT}, config.json or a .gguf file in the folder", path)
            path = path / _CHECKPOINT
        elif gguf is None:
            if len(files) > 1:
                raise InvalidInput("--gguf", "one of the files in the folder", [file.name for file in files])
            gguf = files[0].name
    if path.is_dir():
        return _of_transformers(path, gguf, dtype, device, keep)
    if gguf is not None:
        raise InvalidInput("--gguf", "none for a checkpoint of longattn", gguf)
    card = read_card(path)
    model = load_model(path) if card is None else card.load(path)
    if not isinstance(model, Decoder):
        raise InvalidInput("MODEL", "a decoder", type(model).__name__)
    model = model.to(device, dtype)
    if card is not None and card.tokenizer is not None:
        return LanguageModel(model, card.tokenizer.encode, card.tokenizer.decode, card=card)
    if model.config.vocab_size != 256:
        raise InvalidInput("MODEL", "a model over 256 bytes, or one with a tokenizer", model.config.vocab_size)
    return LanguageModel(model, lambda text: list(text.encode()), lambda ids: decode_bytes(list(ids)), card=card)


def trained_length(model: Any) -> int:
    """Return L0, the length that a model was trained at: what its config says, whatever scaling it came with.

    The original length of a scaling (Llama 3.1, Phi-3, DeepSeek) is that of an earlier stage of the training.
    """
    if isinstance(model, Decoder):
        return model.config.max_length
    return int(model.config.get_text_config().max_position_embeddings)


def _of_transformers(path: Path, gguf: str | None, dtype: torch.dtype, device: str, keep: bool) -> LanguageModel:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    huggingface.register()
    where: dict[str, Any] = {"local_files_only": True} | ({"gguf_file": gguf} if gguf else {})
    try:
        config = None if gguf else AutoConfig.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
    except (OSError, ValueError) as error:
        expected = "a folder with a configuration and a tokenizer that transformers can read"
        raise InvalidInput("MODEL", expected, f"{path}: {error}") from error
    theirs: Any = None
    model: Any = None
    if config is not None and not keep:
        try:
            model = huggingface.load_pretrained(path, dtype=dtype)
        except InvalidInput:
            model = None  # a model that ours cannot say runs as it is
    if model is None:
        with _quiet(transformers):
            theirs = AutoModelForCausalLM.from_pretrained(
                path, attn_implementation=huggingface.registration.NAME, dtype=dtype, **where
            ).eval()
        if gguf:
            _forget_quantization(theirs)
        try:
            model = huggingface.from_hf(theirs)
        except InvalidInput:
            model = theirs
    model = model.to(device)
    stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    prefix = () if tokenizer.bos_token_id is None else tuple(tokenizer.encode(""))[:1]
    kept = theirs if keep or model is theirs else None
    return LanguageModel(model, encode, decode, prefix, stop, tokenizer=tokenizer, theirs=kept)


def _forget_quantization(model: Any) -> None:
    """A GGUF file's weights were dequantised when they were read; transformers would not save them otherwise."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


class _quiet:
    """While it lasts, transformers shows no bars of its own."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._shown = self._logging.is_progress_bar_enabled()
        self._logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        if self._shown:
            self._logging.enable_progress_bar()
