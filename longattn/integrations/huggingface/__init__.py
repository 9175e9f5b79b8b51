"""Hugging Face models on longattn's attention, and their checkpoints in longattn's models."""

from longattn.integrations.huggingface.registration import register

__all__ = ["register"]
