"""flash_attn.layers: the rotary embedding."""

from longattn.compat.flash_attn.layers import rotary

__all__ = ["rotary"]
