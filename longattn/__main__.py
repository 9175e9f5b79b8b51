"""The command `longattn`, also as `python -m longattn`.

It takes over Ctrl-C before it imports anything that takes time, so this module and longattn/__init__.py import little.
"""

from __future__ import annotations

from longattn import _interrupt

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process, and exit."""
    _interrupt.end_at_once()
    from longattn.cli import main as command

    try:
        command(prog_name="longattn")
    finally:
        _interrupt.end_at_once()  # it takes the interpreter a while to unload torch


if __name__ == "__main__":
    main()
