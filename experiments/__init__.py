"""Experiments: each file answers the question in its docstring, with ``python -m experiments.<name>``."""
