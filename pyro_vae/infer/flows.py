"""zuko, imported when it is needed and without its side effect."""

from types import ModuleType

from torch.distributions import Distribution


def import_zuko() -> ModuleType:
    """The library of flows; its import switches the validation of all distributions off, which is put back."""
    validate = Distribution._validate_args
    import zuko

    Distribution.set_default_validate_args(validate)
    return zuko
