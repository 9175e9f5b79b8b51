"""The loop trains every model on its own loss, resumes it to the same losses, and gives it back with its head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longattn import InvalidInput
from longattn.models import EncoderDecoder, MaskedLM, SequenceClassifier, TransformerConfig, build
from longattn.training import TrainingConfig, load_model, train
from longattn.training.objectives import mask_tokens

SIZES: dict[str, Any] = {"vocab_size": 20, "dim": 32, "layers": 1, "heads": 4, "max_length": 16}
CONFIG: dict[str, Any] = {"warmup": 2, "learning_rate": 1e-2, "precision": "float32", "weight_decay": 0.0}


class Task:
    """Batches drawn anew for each step from its number."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def batch(self, step: int) -> dict[str, Tensor]:
        return self.draw(torch.Generator().manual_seed(step))

    def describe(self) -> dict[str, Any]:
        return {"task": self.draw.__name__}


def masked(generator: torch.Generator) -> dict[str, Tensor]:
    """Two tokens take turns: what is masked stands beside."""
    pairs = torch.randint(4, 20, (8, 1, 2), generator=generator)
    tokens, targets = mask_tokens(pairs.expand(8, 6, 2).reshape(8, 12), mask_id=3, vocab_size=20, generator=generator)
    return {"tokens": tokens, "targets": targets, "is_random": torch.randint(0, 2, (8,), generator=generator)}


def contains(generator: torch.Generator) -> dict[str, Tensor]:
    """Whether token 0 occurs."""
    tokens = torch.randint(0, 20, (32, 12), generator=generator)
    key_mask = torch.arange(12) < torch.randint(6, 13, (32, 1), generator=generator)
    return {"tokens": tokens, "labels": ((tokens == 0) & key_mask).any(1).long(), "key_mask": key_mask}


def copied(generator: torch.Generator) -> dict[str, Tensor]:
    """The target is the source, with 0 to start and 1 to end."""
    source = torch.randint(2, 20, (32, 6), generator=generator)
    return {
        "source": source,
        "tokens": nn.functional.pad(source, (1, 0)),
        "targets": nn.functional.pad(source, (0, 1), value=1),
    }


def fresh(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: MaskedLM(TransformerConfig.style("bert", dropout=0.1, **SIZES), next_sentence=True), masked),
        (lambda: SequenceClassifier(TransformerConfig.style("bert", attention_dropout=0.1, **SIZES), 2), contains),
        (lambda: EncoderDecoder(TransformerConfig.style("transformer", **SIZES)), copied),
    ],
)
def test_resumes_to_the_same_losses(make: Any, draw: Any, tmp_path: Path) -> None:
    config = TrainingConfig(steps=6, save_every=3, **CONFIG)
    whole = train(fresh(make), Task(draw), config, show_progress=False)

    class Stopped(Task):
        def batch(self, step: int) -> dict[str, Tensor]:
            if step == 4:
                raise ConnectionError
            return super().batch(step)

    path = tmp_path / "model.safetensors"
    with pytest.raises(ConnectionError):
        train(fresh(make), Stopped(draw), config, checkpoint=path, show_progress=False)
    model = make()
    rest = train(model, Task(draw), config, checkpoint=path, resume=True, show_progress=False)
    assert rest.losses == whole.losses[4:]  # an error saves the steps before it
    loaded = load_model(path, lambda config: make())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_a_checkpoint_makes_the_model_of_its_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    config = TrainingConfig(steps=1, **CONFIG)
    train(
        build(TransformerConfig.style("transformer", **SIZES)),
        Task(copied),
        config,
        checkpoint=path,
        show_progress=False,
    )
    assert isinstance(load_model(path), EncoderDecoder)
    classifier = SequenceClassifier(TransformerConfig.style("bert", **SIZES), 2)
    train(classifier, Task(contains), config, checkpoint=path, show_progress=False)
    with pytest.raises(InvalidInput, match="missing blocks"):
        load_model(path)
    with pytest.raises(InvalidInput, match="head.weight of shape"):
        load_model(path, lambda config: SequenceClassifier(config, 3))


def test_an_encoder_decoder_learns_to_read_its_source() -> None:
    model = fresh(lambda: EncoderDecoder(TransformerConfig.style("modern-transformer", **SIZES)))
    losses = train(model, Task(copied), TrainingConfig(steps=120, **CONFIG), show_progress=False).losses
    blind = 6 / 7 * math.log(18)  # the best without the source: six random tokens and the end
    assert sum(losses[-5:]) / 5 < 0.75 * blind


def test_a_classifier_learns() -> None:
    model = fresh(lambda: SequenceClassifier(TransformerConfig.style("modern-encoder", **SIZES), 2))
    train(model, Task(contains), TrainingConfig(steps=150, **CONFIG), show_progress=False)
    batch = Task(contains).batch(10_000)
    with torch.no_grad():
        right = model(batch["tokens"], key_mask=batch["key_mask"]).argmax(-1) == batch["labels"]
    assert right.float().mean() > 0.9
