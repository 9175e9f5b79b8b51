"""Hugging Face models on longattn's attention, and their checkpoints in longattn's models."""

from longattn.integrations.huggingface.checkpoints import (
    config_from_hf,
    config_to_hf,
    from_hf,
    load_into,
    load_pretrained,
    to_hf,
)
from longattn.integrations.huggingface.context_parallel import context_parallel
from longattn.integrations.huggingface.extending import extend
from longattn.integrations.huggingface.registration import register

__all__ = [
    "config_from_hf",
    "config_to_hf",
    "context_parallel",
    "extend",
    "from_hf",
    "load_into",
    "load_pretrained",
    "register",
    "to_hf",
]
