"""flash-attn 2.8's functions on every backend of ours: `import longattn.compat.flash_attn as flash_attn`.

Names, arguments, defaults, layouts and results are flash-attn's (https://github.com/Dao-AILab/flash-attention); its
submodules `flash_attn_interface`, `bert_padding` and `layers.rotary` are here, too.
"""

from longattn.compat.flash_attn import bert_padding, flash_attn_interface, layers
from longattn.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from longattn.compat.flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_

__version__ = "2.8.4"  # of the interface

__all__ = [
    "apply_rotary_emb",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "bert_padding",
    "flash_attn_func",
    "flash_attn_interface",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "layers",
]
