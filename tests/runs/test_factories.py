"""What settings name is checked before it is called, wherever they come from; those made in Python can be written."""

import functools
import shlex
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
import yaml
from torch import nn

from pyro_vae import MLP, Bernoulli, MeanField, Network, Prior, StandardNormal, cli, runs
from pyro_vae.data.fetched import Digits
from pyro_vae.errors import RunError
from pyro_vae.parts import priors
from pyro_vae.runs import factories
from pyro_vae.runs.settings import Settings

called = []
"""What was called that must not be."""


class Own(Prior):
    """A prior that takes another one, and something of no type."""

    def __init__(self, latent_dim: int, inner: Prior | None = None, anything=None, untyped: Any = None):
        super().__init__(latent_dim)
        self.inner, self.anything = inner, anything
        self.layers: list[nn.Module] = []

    def forward(self, posterior=None):
        return dist.Normal(torch.zeros(self.latent_dim), 1.0).to_event(1)


class Layered(Network):
    """A network that takes its activation as a module or a function."""

    def __init__(self, in_features: int, out_features: int, activation: nn.Module | None = None, image_shape=None):
        super().__init__(in_features, out_features)
        self.layer, self.activation = nn.Linear(in_features, out_features), activation

    def forward(self, features):
        return self.layer(features)


def make_prior(latent_dim: int) -> Prior:
    return StandardNormal(latent_dim)


def unannotated(latent_dim=3, **more):
    called.append("unannotated")


def other(latent_dim: int = 3) -> Network:
    called.append("other")
    return MLP(latent_dim, 3)


def to_text(latent_dim: int = 3) -> str:
    called.append("to_text")
    return ""


class Evil:
    """Not a part: it acts when it is made."""

    def __init__(self, *args, **kwargs):
        called.append("Evil")


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch, capfd):
    """Whatever runs leaves a trace: a file here, a call, or a line."""
    monkeypatch.chdir(tmp_path)
    called.clear()
    for trained in ("pyro_vae.runs.train", "pyro_vae.runs.studies.train"):
        monkeypatch.setattr(trained, lambda *settings: called.append("train"))
    yield tmp_path
    assert called == []
    assert "printed" not in capfd.readouterr().out
    assert "touched" not in [path.name for path in tmp_path.iterdir()]


TOUCH = "{command: 'touch touched'}"
OPEN = "{args: [touch, touched]}"
OWN, EVIL = f"{__name__}.Own", f"{__name__}.Evil"


def own(**arguments):
    """A prior of the user's, with arguments, as YAML."""
    return yaml.safe_dump({"prior": {"class_path": OWN, "init_args": arguments}})


COMMAND = {"class_path": "os.system", "init_args": {"command": "touch touched"}}
PROGRAM = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "touched"]}}
ATTACKS = {
    "os.system": f"prior: {{class_path: os.system, init_args: {TOUCH}}}",
    "os.popen": "prior: {class_path: os.popen, init_args: {cmd: 'touch touched'}}",
    "posix.system": f"prior: {{class_path: posix.system, init_args: {TOUCH}}}",
    "subprocess.run": f"prior: {{class_path: subprocess.run, init_args: {OPEN}}}",
    "subprocess.Popen": f"dataset: {{class_path: subprocess.Popen, init_args: {OPEN}}}",
    "os by another module": f"decoder: {{class_path: shutil.os.system, init_args: {TOUCH}}}",
    "builtins.eval": 'objective: {class_path: builtins.eval, init_args: {source: \'open("touched", "w")\'}}',
    "builtins.exec": 'encoder: {class_path: builtins.exec, init_args: {source: \'open("touched", "w")\'}}',
    "builtins.print": "prior: {class_path: builtins.print, init_args: {args: [printed]}}",
    "builtins.open": "prior: {class_path: builtins.open, init_args: {file: touched, mode: w}}",
    "a bare string": "prior: os.system",
    "a class that is no part": f"prior: {{class_path: {EVIL}, init_args: {{}}}}",
    "a class of another part": "prior: {class_path: pyro_vae.MLP, init_args: {hidden: [3]}}",
    "a class of another part, to the objective": "objective: {class_path: pyro_vae.MLP}",
    "a function without annotation": f"prior: {{class_path: {__name__}.unannotated}}",
    "its name": f"prior: {__name__}.unannotated",
    "a function of another part": f"prior: {{class_path: {__name__}.other}}",
    "a function of text": f"prior: {{class_path: {__name__}.to_text}}",
    "a method": "prior: {class_path: pathlib.Path.touch, init_args: {self: touched}}",
    "inside a part": own(inner=COMMAND),
    "inside a part, a class that is none": own(inner={"class_path": EVIL}),
    "inside, of no type": own(anything=COMMAND),
    "inside, of no type, a program": own(anything=PROGRAM),
    "inside, of any type": own(untyped={"class_path": EVIL}),
    "inside a list of no type": own(anything=[1, {"class_path": EVIL}]),
    "inside a mapping of no type": own(untyped={"a": {"class_path": EVIL}}),
    "inside a loss of Pyro, whose arguments have no types": yaml.safe_dump(
        {"objective": {"class_path": "pyro.infer.Trace_ELBO", "init_args": {"num_particles": COMMAND}}}
    ),
    "twice inside": own(inner={"class_path": OWN, "init_args": {"latent_dim": 2, "anything": {"class_path": EVIL}}}),
    "in place of a module": yaml.safe_dump(
        {"encoder": {"class_path": f"{__name__}.Layered", "init_args": {"activation": {"class_path": EVIL}}}}
    ),
    "dict_kwargs": yaml.safe_dump({"prior": {"class_path": OWN, "dict_kwargs": {"anything": COMMAND}}}),
    "dict_kwargs of a command": "prior: {class_path: subprocess.Popen, dict_kwargs: {args: [touch, touched]}}",
    "where no class is asked for": f"evidence: {{class_path: subprocess.Popen, init_args: {OPEN}}}",
    "deeper, where none is asked for": f"evidence: {{annealing: {{class_path: subprocess.Popen, init_args: {OPEN}}}}}",
    "in place of a number": f"epochs: {{class_path: os.system, init_args: {TOUCH}}}",
    "partial": "prior: {class_path: functools.partial, init_args: {func: os.system}}",
    "call": f"prior: {{class_path: {OWN}, __call__: os.system}}",
    "a tag": "prior: !!python/object/apply:os.system ['touch touched']",
    "a tag of a name": "prior: !!python/name:os.system",
    "a tag inside": "prior: {class_path: StandardNormal, init_args: !!python/object/apply:os.system ['touch touched']}",
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_a_file_of_settings_runs_no_command(nothing_runs, attack):
    (nothing_runs / "shared.yaml").write_text(ATTACKS[attack] + "\n")
    for argv in (["--config=shared.yaml"], ["--config", "shared.yaml", "--epochs=3"]):
        with pytest.raises(RunError) as caught:
            cli.train([*argv, "--run_dir=run"])
        assert "\n" not in str(caught.value)
    assert not (nothing_runs / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_nor_does_the_directory_of_a_run(nothing_runs, attack):
    (nothing_runs / "config.yaml").write_text(ATTACKS[attack] + "\n")
    (nothing_runs / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError):
        runs.load_settings(nothing_runs)
    with pytest.raises(RunError):
        runs.load_model(nothing_runs)
    with pytest.raises(RunError):
        cli.train([f"--run_dir={nothing_runs}", "--resume"])


@pytest.mark.slow
@pytest.mark.parametrize("attack", [name for name in ATTACKS if "!!" not in ATTACKS[name]])
def test_nor_does_the_command_line(nothing_runs, attack):
    for option, value in yaml.safe_load(ATTACKS[attack]).items():
        given = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        forms = [[f"--{option}={given}"], [f"--{option}", given]]
        if isinstance(value, dict) and ("init_args" in value or value.get("class_path", OWN) != OWN):
            forms.append([f"--{option}={value['class_path']}"])
            forms.append([f"--{option}.class_path={value['class_path']}"])
            for name, inner in value.get("init_args", {}).items():
                forms[-2].append(f"--{option}.{name}={yaml.safe_dump(inner, default_flow_style=True).strip()}")
                forms[-1].append(
                    f"--{option}.init_args.{name}={yaml.safe_dump(inner, default_flow_style=True).strip()}"
                )
        for argv in forms:
            with pytest.raises(RunError):
                cli.train([*argv, "--run_dir=run"])
            with pytest.raises(RunError):
                cli.study([f"--contenders.a={shlex.join(argv)}", "--run_dir=study"])
    assert not (nothing_runs / "run").exists()
    assert not (nothing_runs / "study").exists()


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", f"{__name__}.Evil", f"{__name__}.unannotated"])
def test_nor_does_the_help_of_a_part(nothing_runs, path):
    with pytest.raises((RunError, SystemExit)):
        cli.train([f"--prior.help={path}"])
    with pytest.raises((RunError, SystemExit)):
        cli.train([f"--prior={path}", "--print_config"])


def test_the_refusal_says_what_would_be_right(tmp_path):
    for given, refusal in {
        f"{{class_path: {__name__}.Evil}}": "Evil is no Prior",
        f"{{class_path: {__name__}.other}}": "other is no Prior, nor a function annotated to return one",
        f"{{class_path: {__name__}.Own, init_args: {{anything: {{class_path: {__name__}.Evil}}}}}}": (
            f"--prior.anything: {__name__}.Evil is not built there, where no class is asked for"
        ),
    }.items():
        with pytest.raises(RunError, match=refusal.replace("(", r"\(")):
            cli.train([f"--prior={given}", f"--run_dir={tmp_path / 'run'}"])


def test_what_is_right_is_built():
    settings, text = runs.parse(Settings, [f"--prior={__name__}.make_prior"])
    assert isinstance(settings.prior(3), StandardNormal)
    assert yaml.safe_load(text)["prior"] == f"{__name__}.make_prior"
    inner = {"class_path": "StandardNormal", "init_args": {"latent_dim": 2}}
    given = yaml.safe_dump({"class_path": OWN, "init_args": {"inner": inner}}, default_flow_style=True, width=1000)
    settings, _ = runs.parse(Settings, [f"--prior={given}"])
    assert settings.prior(3).inner.latent_dim == 2
    settings, _ = runs.parse(Settings, [f"--encoder={__name__}.Layered", "--encoder.activation=torch.nn.Tanh"])
    assert isinstance(settings.encoder(4, 3, image_shape=(1, 2, 2)).activation, nn.Tanh)


# Settings made in Python


@pytest.mark.slow
def test_settings_of_python_are_those_of_the_command_line(tmp_path):
    made = Settings(
        dataset=Digits,
        prior=functools.partial(priors.GaussianMixture, components=5),
        encoder=functools.partial(MLP, hidden=(7, 5)),
        lr=0.01,
        evidence=runs.EvidenceSettings(num_samples=12),
        data_dir=tmp_path,
        run_dir=tmp_path / "run",
    )
    argv = "--dataset Digits --prior GaussianMixture --prior.components 5 --encoder.hidden [7,5] --lr 0.01 "
    argv += "--encoder.activation tanh"  # what MLP has, where nothing else is said
    read, text = runs.parse(Settings, [*argv.split(), "--evidence.num_samples=12", f"--data_dir={tmp_path}"])
    assert runs.settings_text(made) == text == runs.settings_text(read)
    (tmp_path / "mine.yaml").write_text(text)
    again, _ = runs.parse(Settings, [f"--config={tmp_path / 'mine.yaml'}"])
    shapes = [{name: p.shape for name, p in each.prior(3).named_parameters()} for each in (again, read, made)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert again.lr == made.lr
    assert runs.settings_text(Settings()) == runs.parse(Settings, [])[1]
    assert yaml.safe_load(runs.settings_text(Settings(prior=make_prior)))["prior"] == f"{__name__}.make_prior"


def local_class():
    class Local(Prior):
        pass

    return Local


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            lambda: Settings(prior=lambda dim: None),
            r"^--prior: <function .*<lambda>.* cannot be written",
        ),
        (lambda: Settings(prior=local_class()), "^--prior: .* cannot be written to config.yaml"),
        (lambda: Settings(encoder=functools.partial(MLP, 3)), "^--encoder: .*partial.* with named arguments"),
        (lambda: Settings(encoder=functools.partial(MLP, hidden=torch.ones(2))), "^--encoder.hidden: tensor"),
        (lambda: Settings(prior=functools.partial(MLP, hidden=[3])), "^--prior: .*MLP is no Prior"),
        (lambda: Settings(prior=MLP), "^--prior: .*MLP is no Prior"),
        (lambda: Settings(prior=unannotated), "^--prior: .*unannotated"),
        (lambda: Settings(encoder=functools.partial(MLP, hiden=[3])), "--encoder.hiden: MLP has no such option"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch, settings, refusal):
    monkeypatch.chdir(tmp_path)
    called.clear()
    with pytest.raises((RunError, TypeError), match=refusal) as caught:
        runs.train(settings())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert called == []


# Names of version 0.1.0


RENAMED = {
    "prior": {"FlowPrior": "Flow", "LaplacePrior": "Laplace", "StudentTPrior": "StudentT", "UniformPrior": "Uniform"},
    "likelihood": {"LaplaceLikelihood": "Laplace"},
    "posterior": {"FlowPosterior": "Flow"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "old"), [(setting, old) for setting, names in RENAMED.items() for old in names])
def test_old_names_are_todays(setting, old):
    now = f"pyro_vae.{setting}s.{RENAMED[setting][old]}"
    for path in (old, f"pyro_vae.{old}", f"pyro_vae.{setting}s.{old}"):
        assert factories.present_path(setting, path) == now
        for given in (path, f"{{class_path: {path}}}"):
            with pytest.warns(DeprecationWarning, match=f"^--{setting} {path} is now {now}$"):
                read, text = runs.parse(Settings, [f"--{setting}", given])
            assert getattr(read, setting).func.__name__ == RENAMED[setting][old]
            assert yaml.safe_load(text)[setting]["class_path"] == now


def test_other_names_are_left_alone():
    assert factories.present_path("dataset", "experiments.datasets.MNIST") == "pyro_vae.data.MNIST"
    assert factories.present_path("prior", "pyro_vae.GaussianMixture") == "pyro_vae.priors.GaussianMixture"
    for setting, own in {
        "prior": "my_package.LaplacePrior",
        "objective": "pyro.infer.Trace_ELBO",
        "posterior": "LaplacePrior",
        "likelihood": "pyro_vae.no_such",
        "encoder": "MLP",
        "run_dir": "LaplacePrior",
    }.items():
        assert factories.present_path(setting, own) == own


def test_public_paths_are_written():
    text = runs.settings_text(Settings(likelihood=Bernoulli, posterior=MeanField, prior=StandardNormal))
    paths = {name: value["class_path"] for name, value in yaml.safe_load(text).items() if name in factories.MODULES}
    for setting, path in paths.items():
        assert path.startswith((factories.MODULES[setting], "pyro.infer.")), path


def test_a_path_is_written_as_text():
    assert factories.plain(Path("a") / "b", "here") == "a/b"
