"""What a user can get wrong, and how a script says so: one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, where, and what was expected."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main` and say in one line on stderr why it could not finish.

    Exit codes: 2 for an `InputError`, 1 for a number that is not finite (`FloatingPointError`) and for what the system refuses (a full
    disk ...: `OSError`), 130 for Ctrl-C and 143 for SIGTERM.
    """
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts what runs behind it
            signal.signal(number, interrupt)
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        if received or isinstance(error, KeyboardInterrupt):  # some libraries make another exception of it while they are imported
            print("\ninterrupted: what was finished is kept", file=sys.stderr)
            sys.exit(128 + next(iter([*received, *error.args]), signal.SIGINT))
        if isinstance(error, InputError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, FloatingPointError | OSError):
            print(f"\nerror: {error}", file=sys.stderr)  # on a line of its own: a progress bar may stand on this one
            sys.exit(1)
        raise
