"""Training: data from files, tokenizers, the loop, and checkpoints that resume to the very same losses."""

from longattn.training.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from longattn.training.context_parallel import ContextParallel
from longattn.training.data import ByteCorpus, RandomWindows, find_files, split_files, stdlib_files
from longattn.training.loop import Batches, Trainable, TrainingConfig, TrainingResult, train
from longattn.training.packing import PackedDocuments, TokenFile, pack, write_token_file
from longattn.training.text import clean_documents, deduplicated, is_noise, normalised
from longattn.training.tokenizers import load_tokenizer, train_bpe, train_wordpiece

__all__ = [
    "Batches",
    "ByteCorpus",
    "Checkpoint",
    "ContextParallel",
    "PackedDocuments",
    "RandomWindows",
    "TokenFile",
    "Trainable",
    "TrainingConfig",
    "TrainingResult",
    "clean_documents",
    "deduplicated",
    "find_files",
    "is_noise",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "normalised",
    "pack",
    "save_checkpoint",
    "split_files",
    "stdlib_files",
    "train",
    "train_bpe",
    "train_wordpiece",
    "write_token_file",
]
