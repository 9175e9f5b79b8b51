"""Attention as PyTorch modules: a drop-in for torch.nn.MultiheadAttention, one for new models, the swap in place."""

from longattn.nn.attention import Attention
from longattn.nn.multihead import MultiheadAttention
from longattn.nn.replace import replace_attention

__all__ = ["Attention", "MultiheadAttention", "replace_attention"]
