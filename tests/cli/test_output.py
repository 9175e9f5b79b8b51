"""What a command prints, wherever it prints to; how it ends when it is wrong, interrupted, or cannot write."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from longattn import InvalidInput, Unsupported
from longattn.cli import main
from longattn.cli.output import drawable, make_console, message, plain
from longattn.models import Decoder, TransformerConfig
from longattn.training.checkpoint import Checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LATIN = os.fsdecode(b"caf\xe9")  # a file's name that is not UTF-8


def process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "longattn", *arguments],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, **options},
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_tables_in_any_encoding(encoding: str) -> None:
    for command in (["info"], ["plan", "--tokens", "500K"]):
        result = CliRunner(charset=encoding).invoke(main, command)
        assert result.exit_code == 0, result.output
        assert ("|" in result.stdout) == (encoding != "utf-8")


def test_replacements_are_plain() -> None:
    @click.command()
    def show() -> None:
        make_console().print("± → … ᵀ ┏━┃ █ ⠋ é [b] :cat: " + LATIN)

    main.add_command(show)
    try:
        shown = CliRunner(charset="ascii").invoke(main, ["show"]).stdout
    finally:
        del main.commands["show"]
    assert shown == "+- -> ... ^T +-| # * \\xe9 [b] :cat: caf\\xe9\n"
    assert plain(LATIN) == "caf\\xe9" and plain("é") == "é" and drawable("a$b") == r"a\$b"


def test_arguments_that_are_not_utf8() -> None:
    for encoding in ("ascii", "utf-8"):
        result = CliRunner(charset=encoding).invoke(main, ["plan", "--model", LATIN])
        assert result.exit_code == 1 and "caf\\xe9" in result.stderr and len(result.stderr.splitlines()) == 1


def test_files_whose_names_are_not_utf8(tmp_path: Path) -> None:
    model = Decoder(TransformerConfig(dim=32, layers=1, heads=2, max_length=32))
    (tmp_path / LATIN).mkdir()
    saved = tmp_path / LATIN / LATIN
    save_checkpoint(saved, Checkpoint(model.config, model.state_dict()))
    assert list(saved.parent.iterdir()) == [saved]
    command = ["eval", str(saved), "--lengths", "32", "--tasks", "loss", "--text", str(tmp_path / "text")]
    (tmp_path / "text").write_text("alpha beta gamma " * 20)
    result = CliRunner(charset="ascii").invoke(main, [*command, "--out", str(tmp_path / LATIN / "out")])
    assert result.exit_code == 0, result.output
    written = {path.name: path.read_bytes() for path in (tmp_path / LATIN / "out").iterdir()}
    assert b"caf\\xe9" in written["report.md"] and written["loss_by_position.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidInput("--steps", "an int", "x"), "--steps: expected an int, got x"),
        (Unsupported("a call", {"cpu": ["no", "never"]}), "no backend can run this call; call: a call; cpu: no; never"),
        (FileNotFoundError(2, "No such file or directory", "a"), "a: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            "peft is not installed: pip install longattn[lora]",
        ),
        (ImportError("cannot import name 'x'"), "cannot import name 'x'"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: DefaultCPUAllocator"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory: CUDA out of memory. Tried"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "'utf-8' codec can't decode byte 0xff"),
        (KeyError("x"), "KeyError: 'x' (LONGATTN_TRACEBACK=1 shows where)"),
    ],
)
def test_every_error_is_one_line(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert message(error).startswith(told)

    def fail() -> None:
        raise error

    monkeypatch.setattr("longattn.cli.info._extension", fail)
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 1 and result.stderr.startswith(f"Error: {told}")
    assert len(result.stderr.splitlines()) == 1

    monkeypatch.setenv("LONGATTN_TRACEBACK", "1")
    assert CliRunner().invoke(main, ["info"]).exception is error


def test_usage_errors_are_clicks() -> None:
    for arguments in (["nothing"], ["info", "--nothing"], ["explain"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and result.stderr.startswith("Usage: ")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", "xpu", ""])
def test_devices_that_are_not_there(device: str, tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    for command in (["generate", str(tmp_path / "model"), "x"], ["eval", str(tmp_path / "model"), "--lengths", "8"]):
        result = CliRunner().invoke(main, [*command, "--device", device])
        assert result.exit_code == 1 and result.stderr.startswith("Error: --device: expected a device")
        assert len(result.stderr.splitlines()) == 1


def test_an_interrupt_in_a_command_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longattn.cli.info._extension", interrupt)
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 130 and result.stderr == "Interrupted.\n"


def test_an_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    # A shell that starts the tests in the background has them, and what they start, ignore SIGINT.
    done = process("info", env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_start_needs_no_torch() -> None:
    program = (
        "import sys\nfrom longattn.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in main.commands)


def test_every_command_has_help() -> None:
    for name, command in main.commands.items():
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0 and result.stdout.startswith(f"Usage: main {name} ")
        assert command.get_short_help_str(200).endswith(".")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        for arguments in (["--version"], ["--help"]):
            done = process(*arguments, stdout=full)
            assert done.returncode == 1 and done.stderr == "Error: No space left on device\n"


def test_a_reader_that_is_gone_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = process("--help", stdout=writer)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


@pytest.fixture
def file_size_limit() -> Callable[[int], None]:
    """Sets the most bytes that a file may have, as on a disk that is nearly full; undone when the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path, file_size_limit: Callable[[int], None]) -> None:
    pytest.importorskip("matplotlib")
    command = ["plan", "--gpus", "1..8", "--plot", str(tmp_path / "plan.png")]
    before = os.umask(0o027)
    try:
        assert CliRunner().invoke(main, command).exit_code == 0
    finally:
        os.umask(before)
    picture = tmp_path / "plan.png"
    drawn = picture.read_bytes()
    assert picture.stat().st_mode & 0o777 == 0o640

    file_size_limit(1000)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == [picture] and picture.read_bytes() == drawn


def test_plots_without_matplotlib_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["plan", "--plot", str(tmp_path / "plan.png")])
    assert result.exit_code == 1 and "pip install longattn[plot]" in result.stderr and not result.stdout
