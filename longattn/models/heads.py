"""What turns an encoder's output into predictions: masked tokens, sentence pairs, classes, embeddings.

Each is a module over an encoder of its own, with `loss` for the training loop. Shapes: B sequences, N tokens, C model
width, V token ids, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longattn.errors import InvalidInput
from longattn.models.blocks import make_norm
from longattn.models.config import TransformerConfig
from longattn.models.encoder import Encoder
from longattn.models.losses import IGNORED, chunked_cross_entropy, info_nce
from longattn.models.projection import Projection, project, projection_of
from longattn.models.stack import draw_weights
from longattn.problem import checkable, readable
from longattn.tracing import leaf, leaf_module

__all__ = ["MaskedLM", "Pooler", "SentenceEncoder", "SequenceClassifier", "TokenClassifier", "mean_pool"]


class Pooler(nn.Module):
    """tanh(dense(the first token)), BERT's summary of a sequence: [B, N, C] to [B, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    @leaf_module
    def forward(self, hidden: Tensor) -> Tensor:
        if not hidden.shape[1]:
            raise InvalidInput("tokens", "at least one token", f"shape {tuple(hidden.shape[:2])}")
        return torch.tanh(self.dense(hidden[:, 0]))


class MaskedLM(nn.Module):
    """An encoder that fills masked tokens in; with next_sentence also one that says whether B follows A.

    Devlin et al., BERT, arXiv 1810.04805, section 3.1: dense, GELU and a norm before the output projection, which is
    the embedding if the config ties them.

    Args:
        config: of the encoder.
        next_sentence: add a pooler and the two logits of next-sentence prediction.
    """

    def __init__(self, config: TransformerConfig, *, next_sentence: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.dense = nn.Linear(config.dim, config.dim)
        self.norm = make_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.pooler = Pooler(config.dim) if next_sentence else None
        self.next_sentence = nn.Linear(config.dim, 2) if next_sentence else None
        draw_weights(self, config)

    @property
    def output_weight(self) -> Tensor:
        """The weight of the output projection, [V, C]; what the head computes may be more (see `projection`)."""
        return self.encoder.embedding.weight if self.head is None else self.head.weight

    @property
    def projection(self) -> Projection:
        """What computes logits, before `output_bias`: the head, or the weight of the embedding that it is tied to.

        Raises:
            InvalidInput: tied to an embedding that is more than its weight.
        """
        return projection_of(self.head, self.encoder.embedding)

    @leaf_module
    def forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """The logits of what stands at each token, [B, N, V]; arguments as `Encoder.forward`."""
        return project(self.transformed(self.encoder(tokens, **inputs)), self.projection, self.output_bias)

    def transformed(self, hidden: Tensor) -> Tensor:
        """What the output projection reads, of the encoder's output: [..., C] to [..., C]."""
        return self.norm(F.gelu(self.dense(hidden)))

    def next_sentence_logits(self, hidden: Tensor) -> Tensor:
        """[B, 2] of the encoder's output [B, N, C]: is the next sentence (0), is another (1)."""
        if self.pooler is None or self.next_sentence is None:
            raise InvalidInput("is_random", "None for a model without next_sentence", "a tensor")
        return self.next_sentence(self.pooler(hidden))

    def loss(
        self, tokens: Tensor, targets: Tensor, *, is_random: Tensor | None = None, chunk: int = 1024, **inputs: Any
    ) -> Tensor:
        """The mean cross-entropy of the masked tokens, plus that of the sentence pairs; in nats.

        Only the tokens that count meet the output projection, a chunk at a time.

        Args:
            tokens: int [B, N] with masks; targets: int64 [B, N], what stood there, -100 where no mask is.
            is_random: int64 or bool [B], whether the second sentence is not the next one; adds that loss.
            inputs: as `Encoder.forward`.

        Raises:
            InvalidInput: arguments that do not fit.
        """
        hidden = self.encoder(tokens, **inputs)
        if targets.shape != tokens.shape or targets.dtype != torch.int64:
            got = f"{targets.dtype} of shape {tuple(targets.shape)}"
            raise InvalidInput("targets", f"an int64 tensor {list(tokens.shape)} as tokens", got)
        counted = targets != IGNORED
        if readable(counted) or torch.compiler.is_compiling():
            read, targets = hidden[counted], targets[counted]
        else:  # a selection has no shape without its values; -100 leaves the others out, too
            read = hidden
        loss = chunked_cross_entropy(
            self.transformed(read), self.projection, targets, bias=self.output_bias, chunk=chunk
        )
        if is_random is None:
            return loss
        return loss + _classification_loss("is_random", self.next_sentence_logits(hidden), is_random.long())


class SequenceClassifier(nn.Module):
    """One of K classes for a whole sequence: BERT's pooler, dropout and a projection.

    Args:
        config: of the encoder. classes: K, at least 2.
    """

    def __init__(self, config: TransformerConfig, classes: int) -> None:
        super().__init__()
        _check_classes(classes)
        self.config = config
        self.encoder = Encoder(config)
        self.pooler = Pooler(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.dim, classes)
        draw_weights(self, config)

    @leaf_module
    def forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """Logits [B, K]; arguments as `Encoder.forward`, not packed."""
        return self.head(self.dropout(self.pooler(self.encoder(tokens, **inputs))))

    def loss(self, tokens: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
        """The mean cross-entropy of labels, int64 [B] below K."""
        return _classification_loss("labels", self(tokens, **inputs), labels)


class TokenClassifier(nn.Module):
    """One of K classes for each token: dropout and a projection.

    Args:
        config: of the encoder. classes: K, at least 2.
    """

    def __init__(self, config: TransformerConfig, classes: int) -> None:
        super().__init__()
        _check_classes(classes)
        self.config = config
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.dim, classes)
        draw_weights(self, config)

    @leaf_module
    def forward(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """Logits [B, N, K]; arguments as `Encoder.forward`."""
        return self.head(self.dropout(self.encoder(tokens, **inputs)))

    def loss(self, tokens: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
        """The mean cross-entropy of labels, int64 [B, N] below K; -100 is left out."""
        return _classification_loss("labels", self(tokens, **inputs), labels)


class SentenceEncoder(nn.Module):
    """Sequences as unit vectors whose cosine says how alike they are: the mean over the tokens, normalised.

    Reimers and Gurevych, Sentence-BERT, arXiv 1908.10084.

    Args:
        config: of the encoder.
        temperature: of the contrastive loss.
    """

    def __init__(self, config: TransformerConfig, *, temperature: float = 0.05) -> None:
        super().__init__()
        self.config = config
        self.temperature = temperature
        self.encoder = Encoder(config)

    @leaf_module
    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """[B, C], of length 1; a sequence without tokens is 0."""
        hidden = self.encoder(tokens, key_mask=key_mask)
        return F.normalize(mean_pool(hidden, key_mask), dim=-1)

    def loss(
        self, tokens: Tensor, others: Tensor, *, key_mask: Tensor | None = None, others_mask: Tensor | None = None
    ) -> Tensor:
        """`info_nce` of pairs: row i of tokens [B, N] belongs to row i of others [K, M]; further rows are negatives."""
        queries, keys = self(tokens, key_mask=key_mask), self(others, key_mask=others_mask)
        return info_nce(queries, keys, temperature=self.temperature)


@leaf
def mean_pool(hidden: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The mean over the tokens that key_mask [B, N] keeps: [B, N, C] to [B, C]; 0 where there are none."""
    if key_mask is None:
        return hidden.sum(1) / max(1, hidden.shape[1])
    kept = torch.where(key_mask[..., None], hidden, 0.0)
    return kept.sum(1) / key_mask.sum(1, keepdim=True).clamp(min=1)


def _classification_loss(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1]:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise InvalidInput(name, f"an int64 tensor {list(logits.shape[:-1])}", got)
    counted = labels != IGNORED
    classes = logits.shape[-1]
    if checkable(labels):
        wrong = labels[counted & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            raise InvalidInput(name, f"classes in [0, {classes}), or {IGNORED} to leave one out", wrong[0].item())
    logits = torch.where(counted[..., None], logits, 0.0)  # what is left out need not be finite
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)
    return total / counted.sum().clamp(min=1)


def _check_classes(classes: object) -> None:
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise InvalidInput("classes", "an int >= 2", repr(classes))
