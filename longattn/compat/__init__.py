"""Other libraries' interfaces to attention: flash-attn's functions, and PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

from longattn.compat import flash_attn, sdpa
from longattn.compat.routing import use

__all__ = ["flash_attn", "sdpa", "use"]
