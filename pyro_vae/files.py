"""Files: written whole or not at all, and never through a link that was found where they are written."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

PARTIAL = ".partial"
"""The ending of a file that is being written; what a killed process leaves of one is nothing to anybody."""


@contextmanager
def whole(path: Path, new: bool = False) -> Iterator[Path]:
    """Context: an empty file to write to, which takes the place of ``path`` at the end; nothing is left of half a file.

    A symbolic link of the name of ``path`` is replaced, never followed. The file has the permissions of any new file.

    Args:
        path: where the file shall be.
        new: refuse what is there, whoever wrote it in the meantime.

    Raises:
        OSError: naming ``path``, if it cannot be written; FileExistsError if it must be new and is not.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield partial
        if new:
            _link(partial, path)
        else:
            os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Give a file its name, unless there is something of that name."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        os.replace(partial, path)


def bytes_in(path: Path) -> bytes:
    """What a file holds.

    Raises:
        OSError: if it cannot be read, or is a pipe or a device, which might never end.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and not str(path).startswith(("/dev/", "/proc/")):
        raise OSError(errno.EINVAL, "it is a pipe or a device, no file", str(path))
    return path.read_bytes()


def open_own(path: Path) -> TextIO:
    """A file to read and to append to, made if it is not there; never what a link of its name leads to.

    Raises:
        OSError: if it cannot be opened, or is a link, or in a folder that is one, or no file.
    """
    if path.parent.is_symlink():
        raise OSError(f"{path.parent.name} is a link, which is not followed")
    no_wait = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | no_wait, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError("is no file")
    return os.fdopen(number, "a+", encoding="utf-8")


def holds_anything(directory: Path) -> bool:
    """Whether there is anything in a directory beside what a killed process left of files that it was writing."""
    return any(not each.name.endswith(PARTIAL) for each in directory.iterdir())


def forget_partial(directory: Path) -> None:
    """Delete what killed processes left of files that they were writing; nobody else may be at work there."""
    for each in directory.glob(f"*{PARTIAL}"):
        if each.is_symlink() or each.is_file():
            each.unlink(missing_ok=True)
