"""Hugging Face models on longattn's attention, and their checkpoints in longattn's models."""

from longattn.integrations.huggingface.checkpoints import (
    config_from_hf,
    config_to_hf,
    from_hf,
    load_into,
    load_pretrained,
    read_config,
    to_hf,
    weight_files,
)
from longattn.integrations.huggingface.context_parallel import context_parallel
from longattn.integrations.huggingface.extending import extend
from longattn.integrations.huggingface.options import readable
from longattn.integrations.huggingface.registration import register
from longattn.integrations.huggingface.weights import is_finite

__all__ = [
    "config_from_hf",
    "config_to_hf",
    "context_parallel",
    "extend",
    "from_hf",
    "is_finite",
    "load_into",
    "load_pretrained",
    "read_config",
    "readable",
    "register",
    "to_hf",
    "weight_files",
]
