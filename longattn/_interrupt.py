"""Ctrl-C while the command line is starting: the process ends with one line and exit code 130.

A KeyboardInterrupt in the middle of importing torch would end in a long traceback, or be lost in its extension modules.
"""

from __future__ import annotations

import os
import signal

_EXIT_CODE = 130  # as shells report a process that SIGINT ended


def end_at_once() -> None:
    """Make Ctrl-C end this process without cleaning up. A SIGINT that is ignored or handled by others stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Undo `end_at_once`: Ctrl-C raises KeyboardInterrupt again. Does nothing where nothing was changed."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signum: int, frame: object) -> None:
    try:
        os.write(2, b"Interrupted.\n")
    finally:
        os._exit(_EXIT_CODE)
