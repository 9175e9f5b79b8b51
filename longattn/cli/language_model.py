"""A language model with its tokenizer, from whatever a MODEL argument names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

__all__ = ["LanguageModel", "check_draft", "load_language_model", "trained_length"]

_CHECKPOINT = "model.safetensors"
_MESSAGE = "The message of the user stands here."  # found again in a rendered template


@dataclass(frozen=True)
class LanguageModel:
    """What reads and what makes its tokens.

    model: a Decoder of ours, or a model of transformers that ours cannot say. encode, decode: without special tokens.
    prefix: tokens that a text starts with. stop_tokens: all that end it, by the folder's tokenizer and configs.
    card: beside a checkpoint of ours; None otherwise.
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

    def chat(self, text: str) -> list[int]:
        """Return the tokens of a message of a user, and of the beginning of an answer, by the model's chat template.

        Raises:
            InvalidInput: a model without a chat template, or one that fails.
        """
        return self.encode(self._rendered(text))

    def chat_frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens before a message of a user and those after it, by the model's chat template.

        Raises:
            InvalidInput: as `chat`; or a template that does not repeat the message.
        """
        parts = self._rendered(_MESSAGE).split(_MESSAGE)
        if len(parts) != 2:
            raise InvalidInput("--chat", "a chat template that has the message once", f"{len(parts) - 1} times")
        before, after = parts
        return self.encode(before), self.encode(after)

    def vocabulary(self) -> dict[str, int] | None:
        """Return the text of every token and its id; None for bytes."""
        if self.tokenizer is not None:
            return dict(self.tokenizer.get_vocab())
        inner = getattr(None if self.card is None else self.card.tokenizer, "tokenizer", None)
        return None if inner is None else dict(inner.get_vocab())

    def _rendered(self, text: str) -> str:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InvalidInput("--chat", "a model whose tokenizer has a chat template", "one without")
        with huggingface.readable("--chat", "a chat template that takes a message of a user", "chat template"):
            messages = [{"role": "user", "content": text}]
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def check_draft(model: LanguageModel, draft: LanguageModel) -> None:
    """Raise InvalidInput unless both models' tokens are the same."""
    ours, theirs = model.vocabulary(), draft.vocabulary()
    if ours == theirs:
        return
    got = "another kind of tokenizer"
    if ours is not None and theirs is not None:
        others = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        got = f"one with {len(others):,} other tokens, such as {others[0]!r}"
    raise InvalidInput("--draft", "a model with the tokenizer of the model that it drafts for", got)


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
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InvalidInput("MODEL", "one whose config says max_position_embeddings", length)
    return length


def _of_transformers(path: Path, gguf: str | None, dtype: torch.dtype, device: str, keep: bool) -> LanguageModel:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    huggingface.register()
    # No code of the folder runs, and transformers does not offer to run it.
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    where |= {"gguf_file": gguf} if gguf else {}
    config = None if gguf else huggingface.read_config(path, "MODEL")
    with huggingface.readable("MODEL", "a folder with a tokenizer that transformers reads without running code", path):
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
    theirs: Any = None
    loading: Any = None
    model: Any = None
    if config is not None and not keep:
        try:
            model = huggingface.load_pretrained(path, dtype=dtype)
        except InvalidInput:
            model = None  # a model that ours cannot say runs as it is
    if model is None:
        if (path / "model.safetensors.index.json").is_file():
            huggingface.weight_files(path)
        with _quiet(transformers), huggingface.readable("MODEL", "a causal language model of transformers", path):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                attn_implementation=huggingface.registration.NAME,
                dtype=dtype,
                output_loading_info=True,
                **where,
            )
        theirs, loading = loaded
        theirs.eval()
        if missing := sorted(loading["missing_keys"]):
            raise InvalidInput("MODEL", "a folder with all weights of its model", f"missing {', '.join(missing[:8])}")
        for name, weight in theirs.named_parameters():
            if not huggingface.is_finite(weight):
                raise InvalidInput("MODEL", "a folder with finite weights", f"{name} is not finite")
        if gguf:
            _forget_quantization(theirs)
        try:
            model = huggingface.from_hf(theirs)
        except InvalidInput:
            model = theirs
    model = model.to(device)
    config = theirs.config if config is None else config
    generation = _generation_config(path, theirs)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    first = tuple(tokenizer.encode(""))[:1]
    prefix = first if tokenizer.bos_token_id is not None and first == (tokenizer.bos_token_id,) else ()
    text = config.get_text_config()
    stop = _stop_tokens(text.vocab_size, (tokenizer, config, text, generation))
    kept = theirs if keep or model is theirs else None
    return LanguageModel(model, encode, decode, prefix, stop, tokenizer=tokenizer, theirs=kept)


def _generation_config(path: Path, theirs: Any) -> Any:
    """Return what a folder's generation_config.json says, or what transformers made of it; None without either."""
    from transformers import GenerationConfig

    if theirs is not None:
        return theirs.generation_config
    if not (path / "generation_config.json").is_file():
        return None
    with huggingface.readable("MODEL", "a folder with a complete generation_config.json", path):
        return GenerationConfig.from_pretrained(path, local_files_only=True)


def _stop_tokens(vocab_size: int, sources: Iterable[Any]) -> tuple[int, ...]:
    """Return the ids that a tokenizer or a config says end a text. Each names one, several or none.

    Those that the model does not have, such as -1, end nothing and are left out.
    """
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        for token in ids if isinstance(ids, (list, tuple)) else [ids]:
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int):
                raise InvalidInput("MODEL", "an eos_token_id that is an int or a list of ints", repr(ids))
            found.add(token)
    return tuple(sorted(token for token in found if 0 <= token < vocab_size))


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
