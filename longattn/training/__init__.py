"""Training: data from files, tokenizers, the loop, and checkpoints that resume to the very same losses."""

from longattn.training.batching import (
    LabelledSequence,
    LabelledSequences,
    LabelledTokens,
    SentencePairs,
    SequencePair,
    TaggedSequences,
    Translations,
    pad,
)
from longattn.training.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from longattn.training.context_parallel import ContextParallel
from longattn.training.data import ByteCorpus, RandomWindows, find_files, split_files, stdlib_files
from longattn.training.loop import Batches, Loss, Trainable, TrainingConfig, TrainingResult, train
from longattn.training.lora import Lora
from longattn.training.packing import Documents, PackedDocuments, TokenFile, pack, write_token_file
from longattn.training.pretraining import DenoisedWindows, MaskedWindows
from longattn.training.skipping import SkippedPositions
from longattn.training.text import clean_documents, deduplicated, is_noise, normalised
from longattn.training.tokenizers import (
    ByteTokenizer,
    TextTokenizer,
    WordTokenizer,
    load_tokenizer,
    train_bpe,
    train_wordpiece,
)

__all__ = [
    "Batches",
    "ByteCorpus",
    "ByteTokenizer",
    "Checkpoint",
    "ContextParallel",
    "DenoisedWindows",
    "Documents",
    "LabelledSequence",
    "LabelledSequences",
    "LabelledTokens",
    "Lora",
    "Loss",
    "MaskedWindows",
    "PackedDocuments",
    "RandomWindows",
    "SentencePairs",
    "SequencePair",
    "SkippedPositions",
    "TaggedSequences",
    "TextTokenizer",
    "TokenFile",
    "Trainable",
    "TrainingConfig",
    "TrainingResult",
    "Translations",
    "WordTokenizer",
    "clean_documents",
    "deduplicated",
    "find_files",
    "is_noise",
    "load_checkpoint",
    "load_model",
    "load_tokenizer",
    "normalised",
    "pack",
    "pad",
    "save_checkpoint",
    "split_files",
    "stdlib_files",
    "train",
    "train_bpe",
    "train_wordpiece",
    "write_token_file",
]
