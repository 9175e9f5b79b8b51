"""Evaluation: loss by position on long held-out text, and what one call costs in time and memory."""

from longattn.evaluation.attention_calls import ATTENTION_CALLS, attention_cost
from longattn.evaluation.by_position import Bucket, LossByPosition, loss_by_position, loss_in_short_windows
from longattn.evaluation.cost import Cost, CouldNotRun, measure
from longattn.evaluation.plan import MACHINES, MODELS, Estimate, Machine, plan

__all__ = [
    "ATTENTION_CALLS",
    "MACHINES",
    "MODELS",
    "Bucket",
    "Cost",
    "CouldNotRun",
    "Estimate",
    "LossByPosition",
    "Machine",
    "attention_cost",
    "loss_by_position",
    "loss_in_short_windows",
    "measure",
    "plan",
]
