"""The command line as its user meets it: help, errors without tracebacks, info, and a training with resume."""

from __future__ import annotations

import runpy
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from longattn import Unsupported, __version__
from longattn.backends import registry
from longattn.cli import main
from longattn.training import RandomWindows, load_checkpoint


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n}.txt").write_bytes(b"Lorem ipsum dolor sit amet. " * (n + 4))
    return folder


TINY = ("--context", 16, "--dim", 32, "--layers", 2, "--heads", 2, "--batch-size", 2, "--precision", "float32")


def test_version_and_help() -> None:
    assert run("--version").output.split() == ["longattn,", "version", __version__]
    for command in ((), ("info",), ("train",), ("demo",)):
        result = run(*command, "--help")
        assert result.exit_code == 0 and "Usage: " in result.output


def test_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["longattn", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("longattn", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"longattn, version {__version__}\n"


def test_info_tells_versions_and_every_backend() -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    for part in (__version__, torch.__version__, str(torch.get_num_threads())):
        assert part in result.output
    for backend in registry.BACKENDS:
        assert backend.name in result.output


def test_info_without_the_extension_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longattn.backends.cpu._UNAVAILABLE", "no kernels: no compiler")
    monkeypatch.setattr("longattn._build_info._RECORD", Path("nowhere"))
    output = run("info").output
    assert "no kernels" in output and "was not built" in output


def test_trains_evaluates_and_saves(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    result = run("train", texts, "--out", out, "--steps", 3, *TINY)
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.output
    checkpoint = load_checkpoint(out)
    assert checkpoint.progress["step"] == 3 and checkpoint.config.dim == 32

    again = run("train", texts, "--out", out, "--steps", 3, *TINY)
    assert again.exit_code == 1 and "--resume" in again.output and "Traceback" not in again.output


def test_an_interrupted_training_goes_on(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("train", texts, "--steps", 5, "--held-out", 0, *TINY)
    assert run(*command, "--out", tmp_path / "whole").exit_code == 0

    batch = RandomWindows.batch

    def interrupt(self: RandomWindows, step: int) -> Tensor:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(RandomWindows, "batch", interrupt)
        stopped = run(*command, "--out", tmp_path / "parts")
    assert stopped.exit_code == 130 and "--resume continues" in stopped.output
    assert load_checkpoint(tmp_path / "parts").progress["step"] == 2

    resumed = run(*command, "--out", tmp_path / "parts", "--resume")
    assert resumed.exit_code == 0 and "5 steps" in resumed.output
    whole, parts = (load_checkpoint(tmp_path / name).model for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "files or folders that exist"),
        (("--files", "*.md"), "at least one file named *.md"),
        (("--held-out", 2), "--held-out"),
        (("--context", 5000), "at least 5001 bytes"),
        (("--dim", 33), "a multiple of heads"),
        (("--window", 8), "window"),
        (("--steps", 0), "steps"),
        (("--resume",), "a checkpoint to resume from"),
    ],
)
def test_bad_input_is_told_without_a_traceback(
    texts: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = run("train", texts, "--out", tmp_path / "out", *TINY, *arguments)
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output
    assert result.output.startswith("Error: ")


def test_calls_that_nothing_supports_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise Unsupported("a call", {"cpu": ["cannot"]})

    monkeypatch.setattr("longattn.cli.info._instruction_set", fail)
    result = run("info")
    assert result.exit_code == 1 and "cpu: cannot" in result.output
