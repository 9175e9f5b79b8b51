"""Context parallelism: one sequence shared by the ranks of a torch.distributed DeviceMesh.

The ranks talk through torch's own process groups (gloo on CPUs, NCCL on GPUs) and collectives alone.
"""

from longattn.distributed.attention import (
    context_parallel,
    context_parallel_attention,
    context_parallel_attention_varlen,
    explain,
)
from longattn.distributed.schedule import SCHEDULES, Choice, Traffic
from longattn.distributed.sharding import shard, unshard
from longattn.distributed.spans import LAYOUTS, spans_of
from longattn.distributed.traffic import CountBytes

__all__ = [
    "LAYOUTS",
    "SCHEDULES",
    "Choice",
    "CountBytes",
    "Traffic",
    "context_parallel",
    "context_parallel_attention",
    "context_parallel_attention_varlen",
    "explain",
    "shard",
    "spans_of",
    "unshard",
]
