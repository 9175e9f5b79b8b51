"""The command line: info, explain, tokenizer, train, fine-tune, predict, generate, extend, eval, plan, demo, bench."""

from __future__ import annotations

from typing import Any

import click

from longattn._version import __version__
from longattn.cli import bench, demo, eval, explain, extend, fine_tune, generate, info, plan, predict, tokenizer, train
from longattn.errors import InvalidInput, Unsupported

__all__ = ["main"]


class _Commands(click.Group):
    """Tells the library's errors as messages: what was wrong is in them, and a traceback is not for the user."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (InvalidInput, Unsupported) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="longattn")
def main() -> None:
    """Exact attention over long contexts for PyTorch."""


for command in (
    info.info,
    explain.explain,
    tokenizer.tokenizer,
    train.train,
    fine_tune.fine_tune,
    predict.predict,
    generate.generate,
    extend.extend,
    eval.evaluate,
    plan.plan,
    demo.demo,
    bench.bench,
):
    main.add_command(command)
