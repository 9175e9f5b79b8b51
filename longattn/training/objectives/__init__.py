"""From text as token ids to what a model is asked: masks, sentence pairs, infilling. The losses are the models' own."""

from longattn.training.objectives.denoising import Denoised, corrupt_spans, infill_text
from longattn.training.objectives.masking import mask_tokens
from longattn.training.objectives.sentence_pairs import SentencePair, join_pair, sentence_pair

__all__ = ["Denoised", "SentencePair", "corrupt_spans", "infill_text", "join_pair", "mask_tokens", "sentence_pair"]
