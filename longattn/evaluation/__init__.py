"""Evaluation: metrics of tasks, loss by position on long held-out text, and what one call costs in time and memory."""

from longattn.evaluation.attention_calls import ATTENTION_CALLS, attention_cost
from longattn.evaluation.by_position import Bucket, LossByPosition, loss_by_position, loss_in_short_windows
from longattn.evaluation.cost import Cost, CouldNotRun, measure
from longattn.evaluation.metrics import accuracy, bleu, f1, mean_loss, perplexity, retrieval_accuracy
from longattn.evaluation.plan import MACHINES, MODELS, Estimate, Machine, plan

__all__ = [
    "ATTENTION_CALLS",
    "Bucket",
    "Cost",
    "CouldNotRun",
    "Estimate",
    "LossByPosition",
    "MACHINES",
    "MODELS",
    "Machine",
    "accuracy",
    "attention_cost",
    "bleu",
    "f1",
    "loss_by_position",
    "loss_in_short_windows",
    "mean_loss",
    "measure",
    "perplexity",
    "plan",
    "retrieval_accuracy",
]
