"""The command line: info, explain, tokenizer, train, fine-tune, predict, generate, extend, eval, plan, demo, bench."""

from __future__ import annotations

import importlib
from typing import Any

import click

from longattn import _interrupt
from longattn._version import __version__
from longattn.cli import output

__all__ = ["main"]


class _Commands(click.Group):
    """A group whose commands write to any output, and end in one line where something is wrong.

    Set LONGATTN_TRACEBACK=1 to see where an error comes from.
    """

    def main(self, *arguments: Any, **keywords: Any) -> Any:
        with output.safe_streams():
            return super().main(*arguments, **keywords)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own; and it ends quietly where the reader of a pipe is gone
        except KeyboardInterrupt:
            output.echo("Interrupted.", error=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            if output.shows_tracebacks():
                raise
            raise output.Failure(output.message(error)) from error


class _Deferred(click.Command):
    """A command whose module, and torch with it, is imported when the command runs.

    Args:
        name: of the command.
        place: "module:attribute", below longattn.cli.
        short_help: the first sentence of the command's help.
    """

    def __init__(self, name: str, place: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._place = place

    def load(self) -> click.Command:
        """Import the command itself."""
        module, _, attribute = self._place.partition(":")
        found = getattr(importlib.import_module(f"longattn.cli.{module}"), attribute)
        assert isinstance(found, click.Command)
        return found

    def make_context(self, *arguments: Any, **keywords: Any) -> click.Context:
        command = self.load()
        _interrupt.raise_again()
        return command.make_context(*arguments, **keywords)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="longattn")
def main() -> None:
    """Exact attention over long contexts for PyTorch."""


for _name, _place, _help in (
    ("info", "info:info", "Show versions, the CPU kernels, and each backend with its reasons."),
    ("explain", "explain:explain", "Show what a query of a call sees, what the call costs, and which backend runs it."),
    ("tokenizer", "tokenizer:tokenizer", "Train a tokenizer on text files."),
    ("train", "train:train", "Train a model on text files."),
    ("fine-tune", "fine_tune:fine_tune", "Train a model of a task on labelled examples."),
    ("predict", "predict:predict", "Run a fine-tuned model."),
    ("generate", "generate:generate", "Continue texts with a decoder."),
    ("extend", "extend:extend", "Make a model read longer texts."),
    ("eval", "eval:evaluate", "Measure how a model reads long texts."),
    ("plan", "plan:plan", "Estimate a training step over one sequence that GPUs share."),
    ("demo", "demo:demo", "Train a small model, extend it 8 times, and show what it gains."),
    ("bench", "bench:bench", "Measure speed and memory against every attention that is installed."),
):
    main.add_command(_Deferred(_name, _place, _help))
