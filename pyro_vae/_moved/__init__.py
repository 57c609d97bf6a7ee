"""Where the names of version 0.1.0 are now; each works for one release more, with a DeprecationWarning.

This folder stands on the package's path: its other files are the short paths that stay, such as ``pyro_vae.priors`` for
``pyro_vae.parts.priors``, the very same module.
"""

import importlib
import sys
import warnings
from functools import partial
from types import ModuleType
from typing import Any

SHORT = {
    "diagnostics": "infer.diagnostics",
    "evidence": "infer.evidence",
    "likelihoods": "parts.likelihoods",
    "networks": "parts.networks",
    "objectives": "infer.objectives",
    "posteriors": "parts.posteriors",
    "priors": "parts.priors",
}
"""Short paths that stay."""

_HOMES = {
    "objectives": "CIWAE MIWAE PIWAE Renyi STL TVO",
    "diagnostics": "AggregatedPosterior effective_sample_size kl_divergence mutual_information pareto_k "
    "pareto_k_threshold pareto_smooth",
    "evidence": "CREMER_2018 WU_2017 Coordinates InferenceGaps LocalPosterior Sandwich difference_estimate enumeration "
    "laplace_approximation local_flow local_mean_field reduce_log_weights",
    "infer": "Latents posterior_samples",
    "infer.programs": "Traces",
    "likelihoods": "Beta Categorical ContinuousBernoulli DiscretizedLogistic NegativeBinomial Poisson",
    "networks": "ConvDecoder ConvEncoder GatedMLP RecurrentDecoder RecurrentEncoder",
    "posteriors": "FullRank LowRank",
    "priors": "DiagonalNormal GaussianMixture VampPrior",
    "linear": "ExactGaps",
    "training": "Epoch",
    "errors": "CheckpointError",
}
_RENAMED = {
    "likelihoods.LaplaceLikelihood": "likelihoods.Laplace",
    "posteriors.FlowPosterior": "posteriors.Flow",
    "priors.FlowPrior": "priors.Flow",
    "priors.LaplacePrior": "priors.Laplace",
    "priors.StudentTPrior": "priors.StudentT",
    "priors.UniformPrior": "priors.Uniform",
}
NAMES = (
    {name: f"{home}.{name}" for home, names in _HOMES.items() for name in names.split()}
    | _RENAMED
    | {old.split(".")[1]: new for old, new in _RENAMED.items()}
)
"""Old names, without the package's, and the new ones."""

MODULES = {
    "distributions": ("parts.distributions", "infer.supports"),
    "evidence": ("infer.supports", "linear"),
    "evidence.exact": ("linear",),
    "evidence.gaps": ("infer.evidence.local",),
    "evidence.latents": ("infer.supports",),
    "log_weights": ("infer.programs", "infer.checks"),
    "networks": ("errors",),
    "objectives": ("errors",),
    "svi": ("errors", "infer.engines", "infer.compiled", "infer.tracing", "infer.compiling"),
    "training": ("errors",),
}
"""Old modules, and the new ones that hold what they held."""


def current(path: str) -> str:
    """The new import path of an old one, such as that of a class in a file of version 0.1.0; others as they are."""
    new = _locate(path.removeprefix("pyro_vae.")) if path.startswith("pyro_vae.") else None
    return path if new is None else f"pyro_vae.{new}"


def old(module: str, name: str, stacklevel: int = 2) -> Any:
    """What version 0.1.0 called ``name`` in one of its modules ("" for the package), with a DeprecationWarning.

    Raises:
        AttributeError: if it had no such name.
    """
    path = f"{module}.{name}" if module else name
    if path in _GONE:
        return sys.modules[f"pyro_vae.{path}"]
    # jsonargparse looks for the shortest path of a class, to write it into a file, and must not find an old one
    asks_where = sys._getframe(stacklevel - 1).f_code.co_name == "get_import_path"
    if asks_where or (new := _locate(path)) is None:
        raise AttributeError(f"module 'pyro_vae{'.' * bool(module)}{module}' has no attribute '{name}'")
    warnings.warn(f"pyro_vae.{path} is now pyro_vae.{new}", DeprecationWarning, stacklevel=stacklevel + 1)
    return _read(new)


def register() -> None:
    """Make the old modules known that have no file any more, as importing them would."""
    for name in _GONE:
        module = ModuleType(f"pyro_vae.{name}", f"The names that pyro_vae.{name} had in version 0.1.0.")
        module.__dict__["__getattr__"] = partial(old, name)
        sys.modules.setdefault(module.__name__, module)


def shorten(short: str) -> None:
    """Let the module being imported by its short path be the very same as by its long one, and know its old names."""
    module = importlib.import_module(f"pyro_vae.{SHORT[short]}")
    inside = [name for name in sys.modules if name.startswith(f"{module.__name__}.")]
    for long in (module.__name__, *inside):
        path = short + long.removeprefix(module.__name__)
        sys.modules[f"pyro_vae.{path}"] = sys.modules[long]
        sys.modules[long].__dict__.setdefault("__getattr__", partial(old, path))


_GONE = ("distributions", "evidence.latents", "log_weights", "svi")


def _locate(path: str) -> str | None:
    """The new path of an old name, both without the package's name."""
    if path in NAMES:
        return NAMES[path]
    module, _, name = path.rpartition(".")
    if name.startswith("_"):
        return None
    for home in MODULES.get(module, ()):
        if name in vars(importlib.import_module(f"pyro_vae.{home}")):
            public = name in sys.modules["pyro_vae"].__all__
            return name if public else f"{home}.{name}"
    return None


def _read(path: str) -> Any:
    module, _, name = f"pyro_vae.{path}".rpartition(".")
    return getattr(importlib.import_module(module), name)
