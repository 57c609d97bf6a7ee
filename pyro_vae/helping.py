"""Further processes that help this one: they begin before anything large is imported, and end with it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Helpers(NamedTuple):
    """Processes that wait: how many, and what tells them all to begin, with an argument that JSON has a form of."""

    number: int
    go: Callable[[Any], None]


NOBODY = Helpers(0, lambda argument: None)


@contextlib.contextmanager
def helpers(number: int, function: str, before: str) -> Iterator[Helpers]:
    """Context: further processes, which end with this one, and at the end of the context.

    They start at once, since importing takes seconds, and wait until they are told to go on.

    Args:
        number: of processes.
        function: the import path of a function of one argument, which each of them calls.
        before: that of a function without, which they call while they wait.
    """
    paths = (path.rpartition(".") for path in (function, before))
    imports, names = zip(*((f"from {module} import {name}", name) for module, _, name in paths), strict=True)
    code = "\n".join(["from pyro_vae.helping import helped", *imports, f"{names[1]}()", f"helped({names[0]})"])
    # modules that this process finds are found there, and one thread each is what they compute with
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_helper(code, environment)) for _ in range(number)]

        def go(argument: Any) -> None:
            for process in processes:
                with contextlib.suppress(BrokenPipeError):  # it is dead: the others do its work
                    process.stdin.write(json.dumps(argument).encode() + b"\n")
                    process.stdin.flush()

        yield Helpers(number, go)


def of_evaluations(number: int) -> contextlib.AbstractContextManager[Helpers]:
    """Context: helpers of an evaluation, which go where its directory is."""
    return helpers(number, "pyro_vae.runs.evaluating.help_in", "pyro_vae.infer.compiling.import_ahead")


def ahead_of(argv: Sequence[str]) -> contextlib.AbstractContextManager[Helpers]:
    """Context: helpers that a command line asks for by ``--workers``, no more than there are processors."""
    return of_evaluations(max(0, min(workers_asked(argv), os.cpu_count() or 1) - 1))


def workers_asked(argv: Sequence[str]) -> int:
    """How many workers a command line asks for, before anything has read it; 1 if it does not say."""
    asked = re.findall(r"--workers[= ](\d{1,9})", " ".join(argv))
    return int(asked[-1]) if asked else 1


@contextlib.contextmanager
def _helper(code: str, environment: dict[str, str]) -> Iterator[Any]:
    """Context: a process that runs Python's ``code``; at the end what it said is told, if it failed."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the process that they help
        )
        try:
            yield process
        finally:
            failed = process.poll()
            process.kill()  # whatever is half done: files are there whole or not at all
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin
                process.stdin.close()
            if failed:
                said.seek(0)
                *_, last = ["", *said.read().decode(errors="replace").split("\n")[:-1]]
                print(f"a helper ended with exit status {failed}: {last}", file=sys.stderr)


def helped(function: Callable[[str], object]) -> None:
    """The life of a helper: it ends when its standard input does, which the process that it helps holds open."""
    line = b""
    while not line.endswith(b"\n"):
        if not (more := os.read(0, 1)):
            return
        line += more

    def end() -> None:
        os.read(0, 1)
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
    function(json.loads(line))
