"""Caches of keys and values: contiguous, sliding (a ring) and paged; and attention that appends to them."""

from longattn.cache.base import Cache
from longattn.cache.call import attention_with_cache
from longattn.cache.contiguous import KVCache
from longattn.cache.paged import PagedKVCache
from longattn.cache.sliding import SlidingKVCache

__all__ = ["Cache", "KVCache", "PagedKVCache", "SlidingKVCache", "attention_with_cache"]
