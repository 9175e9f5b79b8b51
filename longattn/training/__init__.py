"""Training: byte-level data from files, the loop, and checkpoints that resume to the very same losses."""

from longattn.training.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from longattn.training.data import ByteCorpus, RandomWindows, find_files, split_files, stdlib_files
from longattn.training.loop import Batches, TrainingConfig, TrainingResult, train

__all__ = [
    "Batches",
    "ByteCorpus",
    "Checkpoint",
    "RandomWindows",
    "TrainingConfig",
    "TrainingResult",
    "find_files",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
    "split_files",
    "stdlib_files",
    "train",
]
