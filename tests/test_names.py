"""Public names: where each is found, and that those of version 0.1.0 still work, and warn what is new."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pyro_vae
from pyro_vae import _moved

ROOT = Path(__file__).parent.parent
SHORT = ["diagnostics", "evidence", "likelihoods", "networks", "objectives", "posteriors", "priors"]
# the public names of 0.1.0, by the module of then
OLD = {
    "": "CIWAE CREMER_2018 ELBO IWAE MIWAE MLP PIWAE STL TVO VAE WU_2017 AggregatedPosterior Annealing Bernoulli Beta "
    "BetaELBO Categorical CheckpointError CompiledSVI Conditional ContinuousBernoulli ContractError ConvDecoder "
    "ConvEncoder Coordinates DReG DiagonalNormal DiscretizedLogistic Epoch Evidence ExactGaps FlowPosterior FlowPrior "
    "FullRank GatedMLP Gaussian GaussianMixture InferenceGaps LaplaceLikelihood LaplacePrior Latents Likelihood "
    "LinearGaussianVAE LocalPosterior LowRank MeanField NegativeBinomial Network NonFiniteError Objective Poisson "
    "Posterior Prior PyroSVI RecurrentDecoder RecurrentEncoder Renyi Sandwich StandardNormal StudentTPrior Traces "
    "TwoLayerVAE UniformPrior VampPrior active_units annealed_importance_sampling bidirectional_monte_carlo "
    "check_program difference_estimate effective_sample_size enumeration estimate_elbo fit importance_sampling "
    "inference_gaps kl_divergence laplace_approximation local_flow local_mean_field log_weights mutual_information "
    "pareto_k pareto_k_threshold pareto_smooth posterior_samples quadrature reduce_log_weights traces",
    "diagnostics": "AggregatedPosterior pareto_tail_length",
    "distributions": "innermost is_whole_space into_support ContinuousBernoulli BernoulliVector FlowDistribution",
    "evidence": "ExactGaps Latents LinearGaussianVAE LocalPosterior quadrature",
    "evidence.annealed": "Annealing WU_2017",
    "evidence.exact": "ExactGaps LinearGaussianVAE quadrature enumeration",
    "evidence.gaps": "LocalPosterior InferenceGaps inference_gaps local_mean_field local_flow",
    "evidence.importance": "importance_sampling reduce_log_weights",
    "evidence.laplace": "Coordinates laplace_approximation",
    "evidence.latents": "Latents",
    "evidence.result": "Evidence difference_estimate",
    "likelihoods": "Likelihood Bernoulli LaplaceLikelihood",
    "log_weights": "Traces traces posterior_samples log_weights check_program",
    "networks": "ContractError Network MLP check_widths",
    "objectives": "Objective ELBO check_choice",
    "posteriors": "Posterior MeanField FlowPosterior",
    "priors": "Prior FlowPrior LaplacePrior StudentTPrior UniformPrior",
    "svi": "NonFiniteError PyroSVI CompiledSVI",
    "training": "Epoch CheckpointError fit",
    "vae": "VAE Conditional TwoLayerVAE num_outputs",
}
NAMES = [(module, name) for module, names in OLD.items() for name in names.split()]
NEW = {"FlowPosterior": "Flow", "LaplaceLikelihood": "Laplace"}
NEW |= {f"{name}Prior": name for name in ("Flow", "Laplace", "StudentT", "Uniform")}


def at(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda text: text)
def test_an_old_name_is_the_very_same_and_says_its_new_one(module, name):
    old = f"pyro_vae.{module}.{name}" if module else f"pyro_vae.{name}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = at(old)
    assert getattr(value, "__name__", NEW.get(name, name)) == NEW.get(name, name)
    said = {str(warning.message) for warning in caught}
    assert all(warning.category is DeprecationWarning and warning.filename == __file__ for warning in caught)
    new = said.pop().removeprefix(f"{old} is now ") if said else old
    assert not said
    assert at(new) is value  # and the new name warns of nothing, which would be an error here
    assert at(_moved.current(old)) is value


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import pyro_vae.{0}", "from pyro_vae import {0}", "import {1}"])
def test_a_short_path_is_the_very_same_module(first):
    """Whatever is imported first, in an interpreter of its own."""
    program = ["import sys, importlib, pyro_vae"]
    for short, long in _moved.SHORT.items():
        program += [
            first.format(short, f"pyro_vae.{long}"),
            f"long = importlib.import_module('pyro_vae.{long}')",
            f"import pyro_vae.{short} as one",
            f"from pyro_vae import {short} as two",
            f"assert long is one is two is importlib.import_module('pyro_vae.{short}') is pyro_vae.{short}",
        ]
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(program)], cwd=ROOT, check=True)


def test_a_module_inside_a_short_path_is_not_loaded_twice():
    from pyro_vae.evidence.annealed import Annealing

    from pyro_vae.infer.evidence import annealed

    assert sys.modules["pyro_vae.evidence.annealed"] is annealed
    assert Annealing is annealed.Annealing is pyro_vae.Annealing


def test_importing_an_old_module_hides_no_function():
    importlib.import_module("pyro_vae.log_weights")
    assert callable(pyro_vae.log_weights)
    with pytest.warns(DeprecationWarning, match=r"pyro_vae.svi.CompiledSVI is now pyro_vae.CompiledSVI"):
        assert pyro_vae.svi.CompiledSVI is pyro_vae.CompiledSVI


def test_every_listed_name_is_there_and_none_is_old():
    assert pyro_vae.__all__ == sorted(pyro_vae.__all__) == dir(pyro_vae)
    names = [name for name in pyro_vae.__all__ if isinstance(getattr(pyro_vae, name), type) or name.islower()]
    assert set(names) == set(pyro_vae.__all__)
    modules = [name for name in names if isinstance(getattr(pyro_vae, name), type(sys))]
    assert len(names) - len(modules) <= 50
    assert set(SHORT) <= set(modules)
    assert list(_moved.SHORT) == SHORT
    assert not set(pyro_vae.__all__) & set(_moved.NAMES)


@pytest.mark.parametrize("path", ["no_such_name", "svi.no_such_name", "priors.no_such_name", "svi._Graph", "Uniform"])
def test_a_name_that_never_was_is_no_attribute(path):
    module, _, name = f"pyro_vae.{path}".rpartition(".")
    with pytest.raises(AttributeError, match=f"module '{module}(.*)' has no attribute '{name}'"):
        getattr(importlib.import_module(module), name)
    assert _moved.current(f"pyro_vae.{path}") == f"pyro_vae.{path}"


def test_paths_of_others_stay_as_they_are():
    assert _moved.current("mine.UniformPrior") == "mine.UniformPrior"
    assert _moved.current("pyro_vae.VAE") == "pyro_vae.VAE"


@pytest.mark.slow
def test_nothing_inside_uses_an_old_name():
    """Every module of the library and the experiments is imported where an old name is an error."""
    paths = [*ROOT.glob("pyro_vae/**/*.py"), *ROOT.glob("experiments/*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if "_moved" not in path.parts]
    program = (
        "import importlib, warnings, pyro_vae\n"
        "warnings.filterwarnings('error', r'pyro_vae\\.', DeprecationWarning)\n"
        f"for name in {[name.removesuffix('.__init__') for name in names]}: importlib.import_module(name)\n"
        "for name in pyro_vae.__all__: getattr(pyro_vae, name)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_file_of_settings_names_a_class_by_its_new_path():
    from jsonargparse._util import get_import_path

    from pyro_vae import priors

    assert get_import_path(priors.VampPrior) == "pyro_vae.parts.priors.VampPrior"
    assert get_import_path(priors.StandardNormal) == "pyro_vae.StandardNormal"
