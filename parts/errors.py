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
    disk ...: `OSError`), 130 for Ctrl-C and SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts what runs behind it
            signal.signal(number, signal.default_int_handler)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"\nerror: {error}", file=sys.stderr)  # on a line of its own: a progress bar may stand on this one
        sys.exit(1)
    except OSError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept", file=sys.stderr)
        sys.exit(130)
