"""Experiments: each file answers the question in its docstring, with ``python -m experiments.<name>``."""

import os
import signal
import sys


def _leave(*_: object) -> None:
    """End at once, in one line: what :func:`pyro_vae.cli.leave_when_interrupted` sets, before that is imported."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


# of a program, whose imports take seconds; once it runs it says itself what Ctrl-C does
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
