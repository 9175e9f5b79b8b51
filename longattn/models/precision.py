"""The dtype that a model's matrix products run in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast", "matmul_dtype", "product_dtype"]


def matmul_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.9 cannot say
        capabilities = torch.cpu.get_capabilities()
        faster = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    else:
        faster = False
    return torch.bfloat16 if faster else torch.float32


def autocast(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype` on a device; of no effect for float32, the dtype of the weights."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x with weights runs in: autocast's dtype where that is on, else x's own.

    What several products read is cast to it once; autocast would cast it for each.
    """
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
