"""Evaluation: metrics of tasks, loss by position on long held-out text, and what one call costs in time and memory."""

from longattn.evaluation.attention_calls import ATTENTION_CALLS, attention_cost
from longattn.evaluation.by_position import Bucket, LossByPosition, loss_by_position, loss_in_short_windows
from longattn.evaluation.cost import Cost, CouldNotRun, PeakMemory, measure
from longattn.evaluation.longrope import search_longrope
from longattn.evaluation.metrics import accuracy, bleu, f1, mean_loss, perplexity, retrieval_accuracy
from longattn.evaluation.plan import MACHINES, MODELS, Estimate, Machine, plan
from longattn.evaluation.reading import Reader, check_memory, make_reader, most_positions
from longattn.evaluation.retrieval import RULER_TASKS, Question, passkey, ruler
from longattn.evaluation.suite import TASKS, TEXT_TASKS, Cell, Evaluation, Plan, Results, summary

__all__ = [
    "ATTENTION_CALLS",
    "Bucket",
    "Cell",
    "Cost",
    "CouldNotRun",
    "Estimate",
    "Evaluation",
    "LossByPosition",
    "MACHINES",
    "MODELS",
    "Machine",
    "PeakMemory",
    "Plan",
    "Question",
    "RULER_TASKS",
    "Reader",
    "Results",
    "TASKS",
    "TEXT_TASKS",
    "accuracy",
    "attention_cost",
    "bleu",
    "check_memory",
    "f1",
    "loss_by_position",
    "loss_in_short_windows",
    "make_reader",
    "mean_loss",
    "measure",
    "most_positions",
    "passkey",
    "perplexity",
    "plan",
    "retrieval_accuracy",
    "ruler",
    "search_longrope",
    "summary",
]
