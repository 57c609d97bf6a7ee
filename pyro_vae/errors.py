"""What is refused: the exceptions of this library, and checks that raise them."""

from collections.abc import Sequence
from importlib.util import find_spec


class ContractError(ValueError):
    """A part, a program or an observation is not what it promises to be."""


def check_widths(name: str, widths: Sequence[int]) -> None:
    """Refuse layers without units.

    Raises:
        ValueError: naming the argument, if a width is below 1.
    """
    if any(width < 1 for width in widths):
        raise ValueError(f"{name}: every width must be at least 1, got {list(widths)}")


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; the parameters are as they were before the step."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to something else."""


def check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {number}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse, with a ValueError, a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value}")


class DataError(ValueError):
    """A data set is unreachable or damaged, or is not what it should be."""


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


NO_NUMBERS = ("to satisfy the constraint", "expects all elements of std", "p_in >= 0", "tensor contains either `inf`")


def is_of_no_number(error: Exception) -> bool:
    """Whether Pyro or torch refuses a parameter, a draw or a matrix because it is NaN or infinite."""
    return type(error).__name__ == "_LinAlgError" or any(words in str(error) for words in NO_NUMBERS)


class RunError(Exception):
    """A user's mistake, told in one line."""


class ProcessLost(RunError):
    """Another process of a training that several share ended, or does not answer."""


class MissingExtra(ModuleNotFoundError):
    """Packages are missing that an extra of this library brings."""


def need_extra(extra: str, packages: Sequence[str]) -> None:
    """Refuse, in one line that says what to install, to go on without the packages that ``extra`` brings.

    Raises:
        MissingExtra: naming the extra and what is missing.
    """
    if missing := [name for name in packages if not _is_installed(name)]:
        remedy = f"pyro-vae needs the extra '{extra}': pip install -e '.[{extra}]' in its checkout"
        raise MissingExtra(f"{remedy} (missing: {', '.join(missing)})")


def _is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder of its name, such as W&B leaves where it ran, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
