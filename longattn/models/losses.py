"""Losses over long sequences, in memory that does not grow with N x vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longattn.errors import InvalidInput
from longattn.models.precision import product_dtype
from longattn.models.projection import Projection, project, unfolded
from longattn.problem import checkable
from longattn.scaling import finite_number
from longattn.tracing import leaf

__all__ = [
    "IGNORED",
    "chunked_cross_entropy",
    "chunked_distillation",
    "hidden_state_loss",
    "info_nce",
    "triplet_loss",
]

IGNORED = -100  # PyTorch's ignore_index


@leaf
def chunked_cross_entropy(
    hidden: Tensor,
    weight: Projection,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
    chunk: int = 1024,
) -> Tensor:
    """Return the cross-entropy of hidden @ weight.T + bias, a chunk of tokens at a time, forward and backward.

    The gradients of a mean are computed with each chunk's loss, while its logits are there (Hsu et al., Liger Kernel,
    arXiv 2410.10989, section 3.2); it has no second derivative. With reduction "none", and with a module that is more
    than its weight, the backward computes each chunk's logits again (Chen et al., Sublinear Memory Cost, arXiv
    1604.06174). Under transforms of torch.func, which allow neither, the logits of all chunks are kept.

    Args:
        hidden: [..., C], floating; commonly [B, N, C].
        weight: [V, C], the output projection; or a module that computes logits [n, V] of hidden states [n, C]. A module
            is called for a chunk at a time; a plain torch.nn.Linear, without hooks, counts as its weight and bias.
        targets: int64 [...], ids below V; -100 is left out, whatever its hidden state holds.
        bias: [V], added to the logits.
        reduction: "mean" over the targets that count (0 if none do), or "none".
        chunk: how many tokens' logits are held at once, at least 1.

    Returns:
        A scalar, or [...] with 0 where left out; in float32 (float64 for float64 inputs).

    Raises:
        InvalidInput: shapes that do not fit, or a target out of range (on a GPU with LONGATTN_CHECK=1).
    """
    if not hidden.dim() or targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        got = f"{targets.dtype} of shape {tuple(targets.shape)} beside hidden {tuple(hidden.shape)}"
        raise InvalidInput("targets", "an int64 tensor [...] beside hidden [..., C]", got)
    if reduction not in ("mean", "none"):
        raise InvalidInput("reduction", "'mean' or 'none'", repr(reduction))
    _check_chunk(chunk)
    weight, bias = unfolded(weight, bias)
    if isinstance(weight, Tensor):
        _check_targets(targets, weight.shape[0])
        if reduction == "mean" and not torch._C._are_functorch_transforms_active():
            return _MeanCrossEntropy.apply(hidden, weight, bias, targets, chunk, torch.is_grad_enabled())

    # split, not slices: the gradients of its parts are joined once, in place of one full-length sum a chunk.
    hidden_chunks = hidden.reshape(-1, hidden.shape[-1]).split(chunk)
    target_chunks = targets.flatten().split(chunk)
    losses = []
    for tokens, wanted in zip(hidden_chunks, target_chunks, strict=True):
        losses.append(_recomputed(partial(_token_losses, weight, bias), tokens, wanted))
    token_losses = torch.cat(losses)
    if reduction == "none":
        return token_losses.view(targets.shape)
    return token_losses.sum() / (targets != IGNORED).sum().clamp(min=1)


class _MeanCrossEntropy(torch.autograd.Function):
    """A mean's gradients differ from those of its tokens' losses by one factor, which is known before the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        differentiate: bool,
    ) -> Tensor:
        dtype, exact = product_dtype(hidden), torch.promote_types(hidden.dtype, torch.float32)
        rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.flatten()
        counted = wanted != IGNORED
        share = 1.0 / counted.sum().clamp(min=1).to(exact)
        projection = weight.to(dtype)
        # What needs a gradient does so under no_grad, too, which holds in here in any case.
        needs_hidden, needs_weight, needs_bias = (differentiate and needed for needed in ctx.needs_input_grad[:3])
        hidden_grad = torch.empty_like(rows) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=exact) if needs_bias and bias is not None else None
        total = rows.new_zeros((), dtype=exact)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            counts = counted[part, None]
            x = torch.where(counts, rows[part].to(dtype), 0.0)  # what is left out need not be finite
            logits = F.linear(x, projection, None if bias is None else bias.to(dtype))
            scores = torch.log_softmax(logits, -1, dtype=exact)
            index = torch.where(counts, wanted[part, None], 0)
            total -= torch.where(counts, scores.gather(-1, index), 0.0).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            # d mean / d logits = (softmax - one-hot) / count
            scores.exp_().scatter_add_(-1, index, scores.new_full((), -1.0).expand_as(index)).mul_(counts * share)
            if bias_grad is not None:
                bias_grad += scores.sum(0)
            by_logits = scores.to(dtype)
            if hidden_grad is not None:
                hidden_grad[part] = by_logits @ projection
            if weight_grad is not None:
                weight_grad += by_logits.T @ x
        grads = (hidden_grad, weight_grad, bias_grad)
        ctx.save_for_backward(*grads)
        ctx.like = hidden.shape, weight.dtype, None if bias is None else bias.dtype
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight, by_bias = ctx.saved_tensors
        shape, weight_dtype, bias_dtype = ctx.like
        return (
            None if by_hidden is None else (by_hidden * grad).view(shape),
            None if by_weight is None else (by_weight * grad).to(weight_dtype),
            None if by_bias is None else (by_bias * grad).to(bias_dtype),
            None,
            None,
            None,
        )


@leaf
def chunked_distillation(
    student: Tensor,
    student_weight: Projection,
    teacher: Tensor,
    teacher_weight: Projection,
    *,
    temperature: float = 1.0,
    counted: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """How far a student's predictions stand from a teacher's, a chunk of tokens at a time, forward and backward.

        T^2 KL(softmax(teacher logits / T) || softmax(student logits / T))

    The factor keeps the gradients' size whatever the temperature (Hinton et al., Distilling the Knowledge in a Neural
    Network, arXiv 1503.02531, section 2).

    Args:
        student: [..., C], hidden states; student_weight: [V, C], its output projection, or a module that computes
            logits [n, V] of hidden states [n, C], called for a chunk at a time.
        teacher: [..., C'], without gradient; teacher_weight: [V, C'], or a module, without gradient, too.
        temperature: T > 0.
        counted: bool [...], which tokens count, whatever the others hold; all by default.
        chunk: how many tokens' logits are held at once, at least 1.

    Returns:
        The mean over the tokens that count (0 if none do), a scalar in float32 (float64 for float64 inputs).

    Raises:
        InvalidInput: shapes that do not fit, or a temperature out of range.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InvalidInput("teacher", f"hidden states {[*student.shape[:-1], '...']}", f"shape {tuple(teacher.shape)}")
    if counted is not None and (counted.shape != student.shape[:-1] or counted.dtype != torch.bool):
        got = f"{counted.dtype} of shape {tuple(counted.shape)}"
        raise InvalidInput("counted", f"a bool tensor {list(student.shape[:-1])}", got)
    finite_number("temperature", temperature, above=0.0)
    _check_chunk(chunk)
    student_chunks = student.reshape(-1, student.shape[-1]).split(chunk)
    teacher_chunks = teacher.detach().reshape(-1, teacher.shape[-1]).split(chunk)
    counted_chunks = [None] * len(student_chunks) if counted is None else counted.flatten().split(chunk)
    losses = []
    for learned, known, counts in zip(student_chunks, teacher_chunks, counted_chunks, strict=True):
        call = partial(_divergences, student_weight, teacher_weight, temperature)
        losses.append(_recomputed(call, learned, known, counts))
    token_losses = torch.cat(losses)
    if counted is None:
        return token_losses.sum() / max(1, token_losses.numel())
    return torch.where(counted.flatten(), token_losses, 0.0).sum() / counted.sum().clamp(min=1)


@leaf
def hidden_state_loss(student: Tensor, teacher: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """1 - the cosine between hidden states, the mean over tokens (Sanh et al., DistilBERT, arXiv 1910.01108).

    Args:
        student: [..., C]; teacher: of its shape, without gradient. A student of another width is projected first.
        counted: bool [...], which tokens count, whatever the others hold; all by default.

    Raises:
        InvalidInput: shapes that do not fit.
    """
    if student.shape != teacher.shape:
        raise InvalidInput("teacher", f"shape {tuple(student.shape)} as student", tuple(teacher.shape))
    if counted is None:
        return (1.0 - F.cosine_similarity(student, teacher.detach(), dim=-1)).mean()
    if counted.shape != student.shape[:-1] or counted.dtype != torch.bool:
        got = f"{counted.dtype} of shape {tuple(counted.shape)}"
        raise InvalidInput("counted", f"a bool tensor {list(student.shape[:-1])}", got)
    student, teacher = (torch.where(counted[..., None], x, 0.0) for x in (student, teacher.detach()))
    distances = 1.0 - F.cosine_similarity(student, teacher, dim=-1)
    return torch.where(counted, distances, 0.0).sum() / counted.sum().clamp(min=1)


@leaf
def info_nce(
    queries: Tensor, keys: Tensor, *, temperature: float = 0.05, symmetric: bool = False, chunk: int = 1024
) -> Tensor:
    """The contrastive loss that picks each query's own key among all keys by cosine similarity.

        -log softmax(cos(q_i, k_j) / temperature)_i   (van den Oord et al., arXiv 1807.03748; in this form Chen et al.,
        SimCLR, arXiv 2002.05709)

    Args:
        queries: [B, C]; keys: [K, C], K >= B: key i belongs to query i, further ones are hard negatives.
        temperature: > 0.
        symmetric: the mean with the loss that picks each key's query (CLIP, arXiv 2103.00020); needs K = B.
        chunk: how many queries' similarities are held at once.

    Returns:
        The mean over the queries, a scalar.

    Raises:
        InvalidInput: shapes that do not fit, or a temperature out of range.
    """
    finite_number("temperature", temperature, above=0.0)
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1] or len(keys) < len(queries):
        expected = f"[K, C] with K at least as many as queries {tuple(queries.shape)}"
        raise InvalidInput("keys", expected, tuple(keys.shape))
    if symmetric and len(keys) != len(queries):
        raise InvalidInput("keys", f"{len(queries)} keys for the symmetric loss", len(keys))
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    own = torch.arange(len(queries), device=queries.device)
    loss = chunked_cross_entropy(queries / temperature, keys, own, chunk=chunk)
    if not symmetric:
        return loss
    return (loss + chunked_cross_entropy(keys / temperature, queries, own, chunk=chunk)) / 2


@leaf
def triplet_loss(anchors: Tensor, positives: Tensor, negatives: Tensor, *, margin: float = 0.3) -> Tensor:
    """max(0, d(anchor, positive) - d(anchor, negative) + margin) with d = 1 - cosine, the mean over the triplets.

    Schroff et al., FaceNet (arXiv 1503.03832), with the cosine in place of its squared distance on the unit sphere,
    of which it is half.

    Args:
        anchors, positives, negatives: [B, C].
        margin: how much nearer the positive must be, >= 0.

    Raises:
        InvalidInput: shapes that do not fit, or a negative margin.
    """
    finite_number("margin", margin, at_least=0.0)
    for name, x in (("positives", positives), ("negatives", negatives)):
        if x.shape != anchors.shape or x.dim() != 2:
            raise InvalidInput(name, f"a tensor [B, C] of the shape of anchors {tuple(anchors.shape)}", tuple(x.shape))
    near = F.cosine_similarity(anchors, positives, dim=-1)
    far = F.cosine_similarity(anchors, negatives, dim=-1)
    return F.relu(far - near + margin).mean()


def _recomputed(call: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Return what the call returns; the backward computes it again, except under torch.func, which cannot have that."""
    if torch._C._are_functorch_transforms_active():
        return call(*tensors)
    return checkpoint(call, *tensors, use_reentrant=False)


def _token_losses(weight: Projection, bias: Tensor | None, hidden: Tensor, targets: Tensor) -> Tensor:
    hidden = torch.where((targets != IGNORED)[:, None], hidden, 0.0)  # what is left out need not be finite
    logits = _exact(project(hidden, weight, bias))
    if not isinstance(weight, Tensor):
        _check_targets(targets, logits.shape[-1])
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


def _divergences(
    student_weight: Projection,
    teacher_weight: Projection,
    temperature: float,
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
) -> Tensor:
    if counted is not None:  # what does not count need not be finite
        student, teacher = (torch.where(counted[:, None], x, 0.0) for x in (student, teacher))
    with torch.no_grad():
        taught = _exact(project(teacher, teacher_weight))
    found = _exact(project(student, student_weight))
    if found.shape != taught.shape:
        got = f"{taught.shape[-1]} beside {found.shape[-1]}"
        raise InvalidInput("teacher_weight", "the student's number of token ids", got)
    wanted = F.log_softmax(taught / temperature, -1)
    found = F.log_softmax(found / temperature, -1)
    return temperature**2 * F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_chunk(chunk: object) -> None:
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InvalidInput("chunk", "an int >= 1", repr(chunk))


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if not checkable(targets) or not targets.numel():
        return
    valid = ((targets >= 0) & (targets < vocabulary)) | (targets == IGNORED)
    if not valid.all():
        bad = targets[~valid][0].item()
        raise InvalidInput("targets", f"ids in [0, {vocabulary}), or {IGNORED} to leave one out", bad)
