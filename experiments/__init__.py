"""Experiments: each file answers the question in its docstring, with ``python -m experiments.<name>``."""

import sys

if sys.argv[0] == "-m":  # a program, whose imports take seconds; once it runs it says itself what Ctrl-C does
    from pyro_vae import cli

    cli.leave_when_interrupted()
