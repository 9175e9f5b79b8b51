"""The loop: it learns, stops where it should, and resumes to the very same losses."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longattn import InvalidInput
from longattn.models import Decoder, TransformerConfig
from longattn.training import (
    ByteCorpus,
    Checkpoint,
    RandomWindows,
    TrainingConfig,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from longattn.training import train as run_training

MODEL = TransformerConfig(dim=32, layers=2, heads=2, kv_heads=1, max_length=16)
TEN_STEPS = TrainingConfig(steps=10, learning_rate=5e-3, warmup=2, precision="float32", save_every=0)


def model() -> Decoder:
    torch.manual_seed(1)
    return Decoder(MODEL)


@pytest.fixture
def batches(tmp_path: Path) -> RandomWindows:
    (tmp_path / "text").write_bytes(b"The quick brown fox jumps over the lazy dog. " * 20)
    return RandomWindows(ByteCorpus([tmp_path / "text"]), batch_size=4, length=16)


def train(*arguments: Any, **keywords: Any) -> Any:
    return run_training(*arguments, **keywords, show_progress=False)


class Interrupted(RandomWindows):
    """Ctrl-C comes while a step is at work."""

    at: int = 4

    def batch(self, step: int) -> Tensor:
        if step == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().batch(step)


def test_learns(batches: RandomWindows) -> None:
    result = train(model(), batches, replace(TEN_STEPS, steps=80))
    assert result.step == len(result.losses) == 80
    assert result.tokens == 80 * 4 * 16
    assert result.losses[0] == pytest.approx(5.5, abs=0.2)
    assert result.losses[-1] < 1.5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_is_the_same_every_time(batches: RandomWindows, precision: str) -> None:
    config = replace(TEN_STEPS, precision=precision)
    assert train(model(), batches, config).losses == train(model(), batches, config).losses


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_interrupted_training_resumes_to_the_same_losses(
    batches: RandomWindows, tmp_path: Path, precision: str
) -> None:
    config = replace(TEN_STEPS, precision=precision)
    whole = train(model(), batches, config, checkpoint=tmp_path / "whole.safetensors")
    path = tmp_path / "parts.safetensors"
    interrupted = Interrupted(batches.corpus, batch_size=4, length=16)
    with pytest.raises(KeyboardInterrupt):
        train(model(), interrupted, config, checkpoint=path)
    assert load_checkpoint(path).progress["step"] == 5  # the step at hand was finished

    other = Decoder(MODEL)
    torch.randn(7)  # neither the weights nor the generator at hand matter
    rest = train(other, batches, config, checkpoint=path, resume=True)
    assert rest.losses == whole.losses[5:]
    assert rest.step == 10
    weights = load_model(tmp_path / "whole.safetensors").state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in other.state_dict().items())
    rng = [load_checkpoint(tmp_path / f"{name}.safetensors").rng for name in ("whole", "parts")]
    assert rng[0] is not None and rng[1] is not None

    assert train(other, batches, config, checkpoint=path, resume=True).losses == []  # nothing is left to do


def test_ctrl_c_works_as_before_after_a_training(batches: RandomWindows) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(model(), batches, replace(TEN_STEPS, steps=1))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Python's own handler: where a shell started the tests in the background, they ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_second_ctrl_c_does_not_wait(batches: RandomWindows) -> None:
    class Twice(Interrupted):
        def batch(self, step: int) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        train(model(), Twice(batches.corpus, batch_size=4, length=16), TEN_STEPS)


def test_runs_in_a_thread_of_its_own(batches: RandomWindows) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(train(model(), batches, replace(TEN_STEPS, steps=2))))
    thread.start()
    thread.join()
    assert len(results[0].losses) == 2


def test_saves_on_the_way(batches: RandomWindows, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    steps = []

    class Watched(RandomWindows):
        def batch(self, step: int) -> Tensor:
            steps.append(load_checkpoint(path).progress["step"] if path.exists() else None)
            return super().batch(step)

    train(
        model(),
        Watched(batches.corpus, batch_size=4, length=16),
        replace(TEN_STEPS, steps=5, save_every=2),
        checkpoint=path,
    )
    assert steps == [None, None, 2, 2, 4]
    assert load_checkpoint(path).progress["step"] == 5


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("training", {"config": replace(TEN_STEPS, learning_rate=1e-4)}),
        ("config", {"model": Decoder(replace(MODEL, dim=64))}),
        ("data", {"seed": 9}),
        ("data", {"length": 8}),
    ],
)
def test_another_training_does_not_resume(
    batches: RandomWindows, tmp_path: Path, part: str, changes: dict[str, Any]
) -> None:
    path = tmp_path / "model.safetensors"
    train(model(), batches, TEN_STEPS, checkpoint=path)
    windows = {"seed": 0, "length": 16}
    other = RandomWindows(batches.corpus, batch_size=4, **windows | {k: v for k, v in changes.items() if k in windows})
    with pytest.raises(InvalidInput, match=part):
        train(changes.get("model", model()), other, changes.get("config", TEN_STEPS), checkpoint=path, resume=True)


def test_there_must_be_something_to_resume_from(batches: RandomWindows, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a path to resume from"):
        train(model(), batches, TEN_STEPS, resume=True)
    with pytest.raises(InvalidInput, match="a file that exists"):
        train(model(), batches, TEN_STEPS, checkpoint=tmp_path / "none", resume=True)


def test_a_loss_that_is_not_finite_stops_the_training(batches: RandomWindows) -> None:
    broken = model()
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        train(broken, batches, TEN_STEPS)


@pytest.mark.parametrize("packed", [False, True])
def test_recomputing_keeps_less_and_changes_nothing(packed: bool) -> None:
    config = replace(MODEL, layers=4, dropout=0.1, attention_dropout=0.1, pattern="SL", window=5)
    tokens = torch.randint(0, 256, (1, 33))
    inputs = {"tokens": tokens[0, :-1], "targets": tokens[0, 1:], "cu_seqlens": torch.tensor([0, 20, 32]).int()}
    if not packed:
        inputs = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = Decoder(config)
        model.recompute = recompute
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model.loss(**inputs)
        loss.backward()
        found.append((loss, [weight.grad for weight in model.parameters()], sum(kept.values())))
    (loss, grads, bytes_kept), (again, grads_again, fewer) = found
    assert torch.equal(loss, again) and fewer < 0.6 * bytes_kept
    for grad, wanted in zip(grads_again, grads, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_a_training_that_recomputes(batches: RandomWindows) -> None:
    losses = train(model(), batches, replace(TEN_STEPS, recompute=True)).losses
    assert losses == train(model(), batches, TEN_STEPS).losses
    other = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidInput, match="recompute"):
        train(other, batches, replace(TEN_STEPS, recompute=True))


def test_trains_the_weights_of_the_model_that_was_extended(batches: RandomWindows) -> None:
    base = model()
    before = base.embedding.weight.clone()
    train(base.extended(window=4), batches, replace(TEN_STEPS, steps=1))
    assert not torch.equal(base.embedding.weight, before)


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainingConfig(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup=4)
    rates = [config.learning_rate_at(step, config.progress(step, 0.0)) for step in range(100)]
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75], rel=0.01)
    assert max(rates) == rates[3] == pytest.approx(1.0, rel=0.01)
    assert all(b < a for a, b in zip(rates[3:], rates[4:], strict=False))
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
    assert config.learning_rate_at(50, 0.5) == pytest.approx(0.55)


def test_a_clock_only_adds_steps() -> None:
    config = TrainingConfig(steps=10, seconds=60.0)
    assert config.progress(5, 600.0) == 0.5
    assert config.progress(100, 30.0) == 0.5
    assert config.progress(10, 60.0) == 1.0
    assert TrainingConfig(steps=10).progress(5, 600.0) == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("seconds", -1.0),
        ("seconds", float("inf")),
        ("learning_rate", float("nan")),
        ("final_learning_rate", 1.1),
        ("warmup", -1),
        ("precision", "float16"),
        ("save_every", True),
        ("recompute", -1),
        ("recompute", 0.5),
        ("offload", True),
        ("feed_forward_tile", 0),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        TrainingConfig(**{"steps": 1, name: value})
    assert error.value.argument == name


def test_settings_are_plain_values() -> None:
    assert TrainingConfig(**asdict(TEN_STEPS)) == TEN_STEPS


def _moment(name: str, change: Any) -> Any:
    def damage(saved: Checkpoint) -> Checkpoint:
        key = f"blocks.0.attention.q_proj.weight.{name}"
        state = {**saved.optimizer, key: change(saved.optimizer[key])}
        return replace(saved, optimizer={name: value for name, value in state.items() if value is not None})

    return damage


DAMAGES: dict[str, Any] = {
    "shape of a moment": _moment("exp_avg", lambda x: torch.zeros(1)),
    "transposed moment": _moment("exp_avg_sq", lambda x: x.flatten()),
    "dtype of a moment": _moment("exp_avg", lambda x: x.double()),
    "NaN in a moment": _moment("exp_avg", lambda x: x * torch.nan),
    "negative second moment": _moment("exp_avg_sq", lambda x: -1 - x),
    "missing moment": _moment("exp_avg", lambda x: None),
    "step of many": _moment("step", lambda x: x.expand(3)),
    "infinite step": _moment("step", lambda x: x * torch.inf),
    "no optimiser": lambda saved: replace(saved, optimizer={}),
    "state of no weight": lambda saved: replace(saved, optimizer={**saved.optimizer, "x.step": torch.tensor(1.0)}),
    "no generator": lambda saved: replace(saved, rng=None),
    "short generator": lambda saved: replace(saved, rng=saved.rng[:7]),
    "dtype of the generator": lambda saved: replace(saved, rng=saved.rng.float()),
    "garbage generator": lambda saved: replace(saved, rng=torch.full_like(saved.rng, 255)),
    "no step": lambda saved: replace(saved, progress={"elapsed": 1.0}),
    "negative step": lambda saved: replace(saved, progress={**saved.progress, "step": -1}),
    "huge step": lambda saved: replace(saved, progress={**saved.progress, "step": 10**30}),
    "true step": lambda saved: replace(saved, progress={**saved.progress, "step": True}),
    "NaN seconds": lambda saved: replace(saved, progress={**saved.progress, "elapsed": float("nan")}),
    "settings": lambda saved: replace(saved, settings={"training": 1}),
    "NaN in a weight": lambda saved: replace(
        saved, model={**saved.model, "norm.weight": saved.model["norm.weight"] * torch.nan}
    ),
}


@pytest.fixture(scope="module")
def resumable(tmp_path_factory: pytest.TempPathFactory) -> tuple[RandomWindows, Checkpoint]:
    folder = tmp_path_factory.mktemp("resumable")
    (folder / "text").write_bytes(b"The quick brown fox jumps over the lazy dog. " * 20)
    windows = RandomWindows(ByteCorpus([folder / "text"]), batch_size=4, length=16)
    train(model(), windows, TEN_STEPS, checkpoint=folder / "m")
    return windows, load_checkpoint(folder / "m")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_refused_before_it_is_used(
    resumable: tuple[RandomWindows, Checkpoint], tmp_path: Path, damage: str
) -> None:
    windows, whole = resumable
    path = tmp_path / "m"
    save_checkpoint(path, DAMAGES[damage](replace(whole, progress={**whole.progress, "step": 4})))
    before, ours = path.read_bytes(), model()
    weights, rng = {name: weight.clone() for name, weight in ours.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(InvalidInput, match="checkpoint"):
        train(ours, windows, TEN_STEPS, checkpoint=path, resume=True)
    assert all(torch.equal(weight, weights[name]) for name, weight in ours.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_error_in_a_step_saves_the_steps_before_it(batches: RandomWindows, tmp_path: Path) -> None:
    def dropping() -> Decoder:
        torch.manual_seed(1)
        return Decoder(replace(MODEL, dropout=0.2))

    whole = train(dropping(), batches, TEN_STEPS)

    class Failing:
        """The model's own loss; it draws from the generator, and then fails."""

        def __init__(self, model: Decoder, fails: int | None) -> None:
            self.model, self.fails = model, fails

        def __call__(self, **inputs: Tensor) -> Tensor:
            self.fails = None if self.fails is None else self.fails - 1
            loss = self.model.loss(**inputs)
            if self.fails == -1:
                raise MemoryError("no room")
            return loss

        def describe(self) -> dict[str, Any]:
            return {}

    path, ours = tmp_path / "m", dropping()
    with pytest.raises(MemoryError):
        train(ours, batches, TEN_STEPS, loss=Failing(ours, 6), checkpoint=path)
    assert load_checkpoint(path).progress["step"] == 6
    rest = dropping()
    assert (
        train(rest, batches, TEN_STEPS, loss=Failing(rest, None), checkpoint=path, resume=True).losses
        == (whole.losses[6:])
    )


def test_what_is_not_finite_is_not_saved(batches: RandomWindows, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(FloatingPointError, match="not finite"):  # the only step overflows the weights
        train(model(), batches, replace(TEN_STEPS, steps=1, warmup=0, learning_rate=1e38), checkpoint=path)
    assert list(tmp_path.glob("*m*")) == []


def test_a_failed_save_is_noted_beside_the_error_of_a_step(
    batches: RandomWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(RandomWindows):
        def batch(self, step: int) -> Tensor:
            if step == 3:
                raise ConnectionError("the text is gone")
            return super().batch(step)

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("longattn.training.loop.save_checkpoint", full)
    with pytest.raises(ConnectionError) as error:
        train(model(), Failing(batches.corpus, batch_size=4, length=16), TEN_STEPS, checkpoint=tmp_path / "m")
    assert error.value.__notes__ == ["The 3 steps since the last save are lost: no space left"]


def test_a_place_that_cannot_be_written_is_refused_first(batches: RandomWindows, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "m"):
        with pytest.raises(InvalidInput, match="checkpoint"):
            train(model(), batches, TEN_STEPS, checkpoint=path)
