import csv
import json
import math
import os
import re
import shlex
import signal
import sys
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
import yaml

from pyro_vae import MLP, Annealing, NonFiniteError, cli, runs
from pyro_vae.data.fetched import Digits
from pyro_vae.errors import RunError
from pyro_vae.runs import directory, parsing
from pyro_vae.runs.settings import EvaluationSettings, EvidenceSettings, Settings


class NoSubclassOfAnything:
    pass


def complaint(*argv):
    """The one line about a mistake in a command line."""
    with pytest.raises(RunError) as caught:
        runs.parse(Settings, argv)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# A command line that is right


def test_defaults():
    config, text = runs.parse(Settings, [])
    for name, value in vars(Settings()).items():
        assert callable(value) or getattr(config, name) == value
    saved = yaml.safe_load(text)
    assert saved["dataset"]["class_path"] == "pyro_vae.data.MNIST"
    assert saved["dataset"]["init_args"]["binarization_seed"] == 777
    assert saved["prior"]["class_path"] == "pyro_vae.priors.StandardNormal"
    assert saved["encoder"]["init_args"] == {"hidden": [200, 200], "activation": "silu", "image_shape": None}
    assert (saved["epochs"], saved["lr"], saved["data_dir"]) == (40, 0.005, None)
    annealing = saved["evidence"].pop("annealing")
    assert saved["evidence"] == {"num_samples": 1000, "num_images": None, "annealed_images": 1500}
    assert annealing == asdict(Annealing())
    elsewhere = ("run_dir", "resume", "tensorboard", "wandb", "mlflow", "report")
    assert saved.keys() == {name for name in vars(config) if name not in elsewhere}


def test_values_reach_the_parts(tmp_path):
    config, _ = runs.parse(
        Settings,
        shlex.split(
            "--dataset Digits --dataset.binarization static --encoder.hidden [7,5] --encoder.activation relu --lr 1e-4 "
            "--evidence.num_samples 12 --patience 3 --run_dir x --weights best"
        ),
    )
    dataset = config.dataset(tmp_path)
    assert isinstance(dataset, Digits)
    assert (dataset.binarization, dataset.data_dir) == ("static", tmp_path)
    encoder = config.encoder(64, 6, image_shape=(1, 8, 8))
    assert isinstance(encoder, MLP)
    assert [layer.out_features for layer in encoder.layers] == [7, 5, 6]
    assert encoder.activate.activation == "relu"
    assert (config.lr, config.evidence.num_samples, config.patience, str(config.run_dir)) == (1e-4, 12, 3, "x")
    assert config.weights == "best"


@pytest.mark.parametrize("flag", [["--tensorboard"], ["--tensorboard", "true"], ["--tensorboard=true"]], ids=str)
def test_a_flag_needs_no_value(flag):
    assert runs.parse(Settings, [*flag, "--epochs", "3"])[0].tensorboard
    assert not runs.parse(Settings, ["--tensorboard", "false", "--epochs", "3"])[0].tensorboard


def test_the_command_line_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["svi_mnist", "--epochs", "3"])
    assert runs.parse(Settings)[0].epochs == 3


@pytest.mark.parametrize("alpha", ["-.inf", "-1e3", "-2"])
def test_a_negative_number_is_a_value(alpha):
    config, _ = runs.parse(Settings, ["--objective", "Renyi", "--objective.alpha", alpha, "--epochs", "3"])
    assert config.objective().alpha == float(alpha.replace(".inf", "inf"))
    assert config.epochs == 3


def test_saved_settings_give_the_same_settings_again(in_folder):
    argv = shlex.split("--dataset Digits --dataset.num_validation 9 --encoder.hidden [3] --lr 0.1 --objective ELBO")
    _, text = runs.parse(Settings, [*argv, "--run_dir", "x", "--tensorboard"])
    (in_folder / "config.yaml").write_text(text)
    config, again = runs.parse(Settings, ["--config", "config.yaml"])
    assert again == text
    assert (config.lr, config.run_dir, config.tensorboard) == (0.1, None, False)
    assert config.objective().num_particles == 1
    changed, _ = runs.parse(Settings, ["--config", "config.yaml", "--lr", "0.2"])
    assert changed.lr == 0.2


def test_a_chosen_class_has_its_own_defaults(in_folder):
    """Not those of the class that it replaces, in a file or on the command line."""
    (in_folder / "gated.yaml").write_text("encoder: GatedMLP\n")
    for argv in (["--encoder", "GatedMLP"], ["--encoder=GatedMLP"], ["--config", "gated.yaml"]):
        _, text = runs.parse(Settings, argv)
        assert yaml.safe_load(text)["encoder"]["init_args"] == {"hidden": [300, 300], "image_shape": None}
    (in_folder / "narrow.yaml").write_text("encoder: {hidden: [7]}\n")
    for argv in (["--encoder.hidden", "[7]", "--encoder", "GatedMLP"], ["--config", "narrow.yaml"]):
        _, text = runs.parse(Settings, argv)
        assert yaml.safe_load(text)["encoder"]["init_args"]["hidden"] == [7]


def test_print_config_can_be_given_back(in_folder, capsys):
    with pytest.raises(SystemExit) as caught:
        runs.parse(Settings, ["--dataset", "Digits", "--epochs", "3", "--print_config"])
    assert caught.value.code == 0
    (in_folder / "mine.yaml").write_text(capsys.readouterr().out)
    assert (
        runs.parse(Settings, ["--config", "mine.yaml"])[1]
        == runs.parse(Settings, shlex.split("--dataset Digits --epochs 3"))[1]
    )


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_what_matters_first(capsys, word):
    with pytest.raises(SystemExit) as caught:
        runs.parse(Settings, ["--epochs=3", word])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 120
    for name in Settings.MAIN:
        assert f"--{name} " in text
    assert "--evidence" not in text
    flat = " ".join(text.split())
    assert "report its test log-likelihood with its error" in flat
    assert "dimensions of z, at least 1 (default 50)" in flat
    assert re.search(r"--prior p\(z\): .*GaussianMixture, .*VampPrior, .*or an import path", flat)
    assert "or an import path (default StandardNormal)" in flat
    assert "--help.all lists every option" in flat


@pytest.mark.parametrize(
    "settings",
    [runs.EvaluationSettings, runs.ComparisonSettings, runs.ReportSettings, runs.StudySettings],
    ids=lambda each: each.__name__,
)
def test_help_of_every_command_is_short(capsys, settings):
    with pytest.raises(SystemExit):
        runs.parse(settings, ["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 60
    assert "--run_dir" in text


def test_help_all_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        runs.parse(Settings, ["--help.all"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "report its test log-likelihood with its error" in text
    assert "dimensions of z, at least 1. (type: int, default: 50)" in text
    assert "known subclasses: " in text
    assert "StandardNormal" in text
    assert "go on with the interrupted run in --run_dir" in text
    for name in vars(Settings()):
        assert f"--{name}" in text
    assert "--evidence.num_samples" in text


def test_help_of_a_part_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        runs.parse(Settings, ["--encoder.help", "MLP"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--encoder.hidden" in text
    assert "width of each hidden layer" in text
    assert "in_features" not in text


# Mistakes


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prior", "Nope"], ["--prior: 'Nope' is no known class", "StandardNormal", "import path"]),
        (["--likelihood", "Bernouli"], ["'Bernouli' is no known class", "did you mean Bernoulli?"]),
        (["--dataset", "MNST"], ["--dataset", "did you mean MNIST?", "Digits", "Npz"]),
        (["--objective", "IVAE"], ["--objective: 'IVAE' is no known class", "ELBO", "Trace_ELBO"]),
        (
            ["--objective=pyro_vae.infer.turns.InTurn", "--objective.first=pyro.infer.Trace_ELBO"],
            ["--objective.first: pyro.infer.Trace_ELBO is no Objective; choose one of BetaELBO", "DReG"],
        ),
        (["--top", "{latent_tim: 3}"], ["--top.latent_tim: there is no such option"]),
        (
            ["--likelihood=PixelDecoder", "--likelihood.pixel=Nope"],
            ["--likelihood.pixel: 'Nope' is no known class; choose one of Bernoulli"],
        ),
        (["--optimizer", "torch.optim.Optimizer"], ["--optimizer: expected 'adam'", "got 'torch.optim.Optimizer'"]),
        (["--prior", "no_such_module.Prior"], ["--prior: No module named 'no_such_module'", "StandardNormal"]),
        (["--prior", "pyro_vae.Foo"], ["--prior: ", "attribute", "Foo", "StandardNormal"]),
        (["--prior", "pyro_vae.MLP"], ["--prior: pyro_vae.MLP is no Prior; choose one of", "StandardNormal"]),
        (["--encoder", "torch.nn.Linear"], ["--encoder: torch.nn.Linear is no Network; choose one of", "MLP"]),
        (["--objective", "pyro_vae.MLP"], ["--objective: pyro_vae.MLP is no Objective | ELBO; choose"]),
        (["--prior", f"{__name__}.NoSubclassOfAnything"], ["--prior", "NoSubclassOfAnything is no Prior"]),
        (["--prior", "pyro_vae.active_units"], ["--prior: expected Prior, got 'pyro_vae.active_units'"]),
        (["--prior=null"], ["--prior", "choose one of", "StandardNormal"]),
        (["--encoder.help", "Nope"], ["--encoder: 'Nope' is no known class; choose one of", "MLP"]),
        (["--epoch", "3"], ["unknown option --epoch", "did you mean --epochs?"]),
        (["--epocs=3"], ["unknown option --epocs", "did you mean --epochs?"]),
        (["--zzz"], ["unknown option --zzz", "--help"]),
        (["--evidence.samples", "1"], ["--evidence.samples", "did you mean --evidence.num_samples?"]),
        (["word"], ["unknown option word", "--help"]),
        (["--encoder.hiden", "[3]"], ["--encoder.hiden: MLP has no", "did you mean hidden?", "--encoder.help MLP"]),
        (["--encoder", "MLP", "--encoder.hiden", "[3]"], ["--encoder.hiden", "did you mean hidden?"]),
        (["--dataset", "{class_path: Digits, init_args: {binarisation: static}}"], ["did you mean binarization?"]),
        (["--prior.scale", "3"], ["--prior.scale: StandardNormal has no such option"]),
        (["--prior.latent_dim", "3"], ["--prior.latent_dim cannot be given: the program sets it"]),
        (["--dataset", "Npz"], ["--dataset.path must be given", "Npz"]),
        (["--epochs", "x"], ["--epochs: expected a whole number, got 'x'"]),
        (["--epochs", "1.5"], ["--epochs: expected a whole number, got '1.5'"]),
        (["--latent_dim", "1.5"], ["--latent_dim: expected a whole number, got '1.5'"]),
        (["--latent_dim", "[3]"], ["--latent_dim: expected a whole number, got '[3]'"]),
        (["--latent_dim=null"], ["--latent_dim: expected a whole number"]),
        (["--patience", "soon"], ["--patience: expected a whole number or null, got 'soon'"]),
        (["--lr", "fast"], ["--lr: expected a number, got 'fast'"]),
        (["--tensorboard", "maybe"], ["--tensorboard: expected true or false, got 'maybe'"]),
        (["--resume", "maybe"], ["--resume: expected true or false, got 'maybe'"]),
        (["--encoder.hidden", "3"], ["--encoder.hidden: expected a list", "got '3'"]),
        (["--encoder.hidden", "[a]"], ["--encoder.hidden: expected a whole number, got 'a'"]),
        (["--dataset.binarization_seed", "x"], ["--dataset.binarization_seed: expected a whole number, got 'x'"]),
        (["--evidence.num_samples", "x"], ["--evidence.num_samples: expected a whole number, got 'x'"]),
        (["--evidence.num_samples", "1e3"], ["--evidence.num_samples: expected a whole number"]),
        (["--engine", "fast"], ["--engine: expected one of", "'pyro'", "got 'fast'"]),
        (
            ["--schedule", "x"],
            ["--schedule: expected 'one_cycle', 'constant'", "'trapezoid' or the import path of an LRScheduler, got"],
        ),
        (["--weights", "x"], ["--weights: expected one of 'last', 'best', 'average', got 'x'"]),
        (["--encoder.activation", "sine"], ["--encoder.activation: expected one of 'tanh', 'relu'", "got 'sine'"]),
        (["--dataset.binarization", "some"], ["--dataset.binarization: expected one of 'dynamic'", "got 'some'"]),
        (["--epochs", "0"], ["--epochs must be at least 1, got 0"]),
        (["--epochs", "-1"], ["--epochs must be at least 1, got -1"]),
        (["--batch_size", "0"], ["--batch_size must be at least 1, got 0"]),
        (["--latent_dim", "-3"], ["--latent_dim must be at least 1, got -3"]),
        (["--patience", "0"], ["--patience must be at least 1, got 0"]),
        (["--evidence.num_samples", "0"], ["--evidence.num_samples must be at least 1, got 0"]),
        (["--evidence.num_images", "1"], ["--evidence.num_images must be at least 2, got 1"]),
        (["--average_decay", "1"], ["--average_decay must be above 0 and below 1, got 1"]),
        (["--lr", "0"], ["--lr must be positive and finite, got 0"]),
        (["--lr", "-0.1"], ["--lr must be positive and finite, got -0.1"]),
        (["--lr", ".nan"], ["--lr must be positive and finite, got nan"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", ".inf"], ["--lr must be positive and finite, got inf"]),
        (["--seed", "-1"], ["--seed must be at least 0", "got -1"]),
        (["--seed", "9" * 30], ["--seed", "below 2^63"]),
        (["--epochs="], ["--epochs: the value is empty"]),
        (["--run_dir", ""], ["--run_dir: the value is empty"]),
        (["--data_dir="], ["--data_dir: the value is empty"]),
        (["--dataset.path", ""], ["--dataset.path: the value is empty"]),
        (["--epochs"], ["--epochs", "expected one argument"]),
        (["--config"], ["--config", "expected one argument"]),
        (["--resume"], ["--resume needs --run_dir"]),
        (["--resume", "--run_dir", "nowhere"], ["--resume: nowhere holds no run"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_is_one_line(argv, words, in_folder):
    message = complaint(*argv)
    for word in words:
        assert word in message
    assert list(in_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"epocs: 3\n", ["unknown setting epocs", "did you mean epochs?"]),
        (b"epochs: many\n", ["--epochs: expected a whole number, got 'many'"]),
        (b"evidence:\n  num_sample: 3\n", ["num_sample"]),
        (b"encoder:\n  class_path: MLP\n  init_args:\n    hiden: [3]\n", ["--encoder.hiden", "did you mean hidden?"]),
        (b"prior: Nope\n", ["--prior: 'Nope' is no known class"]),
        (b"a: [1\nb: }\n", ["mine.yaml is no readable YAML", "line 2"]),
        (b"\xff\xfe\x00\x81", ["mine.yaml is no readable YAML"]),
        (b"- 1\n- 2\n", ["mine.yaml: expected lines such as 'epochs: 10'"]),
        (b"", ["mine.yaml: expected lines such as 'epochs: 10'"]),
        (None, ["--config mine.yaml: No such file or directory"]),
    ],
    ids=str,
)
def test_a_wrong_file_of_settings_is_one_line(content, words, in_folder):
    if content is not None:
        (in_folder / "mine.yaml").write_bytes(content)
    message = complaint("--config", "mine.yaml")
    for word in words:
        assert word in message


NEVER_NULL = ("prior", "evidence", "top", "encoder", "optimizer", "objective", "lr", "seed", "condition_in", "resume")
LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghijk")
)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((f"{name}: {value}", f"--{name}: expected") for name in NEVER_NULL for value in ("null", "~")),
        *((f"{name}: {value}", f"--{name}: expected settings by their names")
          for name in ("evidence", "top") for value in ("3", "[]", "[3]", "true", "2020-01-01")),
        *((f"evidence: {{annealing: {value}}}", "--evidence.annealing: expected settings by their names")
          for value in ("null", "3", "[]", "false")),
        ("evidence.annealing: null", "--evidence.annealing: expected settings"),
        ("evidence: {num_samples: null}", "--evidence.num_samples: expected a whole number, got null"),
        ("top: {hidden: null}", "--top.hidden: expected a list"),
        ("encoder: {class_path: MLP, init_args: {hidden: null}}", "--encoder.hidden: expected a list"),
        ("optimizer: {class_path: torch.optim.AdamW, init_args: {betas: null}}", "--optimizer.betas: expected"),
        ("prior: {class_path: null}", "mine.yaml: class_path must be an import path"),
        ("prior: {class_path: 3}", "mine.yaml: class_path must be an import path"),
        ("prior: {class_path: StandardNormal, init_args: null}", "init_args must be settings by their names, got null"),
        ("prior: {class_path: StandardNormal, init_args: []}", "init_args must be settings by their names, got []"),
        ("config: other.yaml", "mine.yaml: a file of settings cannot name another one, by config"),
        ("config: null", "mine.yaml: a file of settings cannot name another one, by config"),
        ("epochs: 1000000000000", "--epochs must be at most 2,147,483,647"),
        ("encoder: {class_path: MLP, init_args: {hidden: [3000000000]}}", "--encoder.hidden must be at most"),
        ("lr: 1e400", "--lr must be positive and finite"),
        ('data_dir: "a\\0b"', "--data_dir: a path has no character '\\x00'"),
        ("run_dir: \"a\\nb\"", "--run_dir: a path has no character '\\n'"),
        ("prior: " + "[" * 1000, "mine.yaml: it is nested too deeply"),
        ("prior: " + "[" * 40 + "]" * 40, "more than 32 levels are no settings"),
        ("prior: &x [*x]", "more than 32 levels are no settings"),
        ("encoder: {class_path: MLP, init_args: {hidden: [" + "1, " * 1001 + "]}}", "more than 1,000 entries in a"),
        (LAUGHS, "more than 10,000 entries are no settings"),
        (LAUGHS + "prior: {class_path: *k}", "class_path must be an import path"),
        ("#" * 2**21, "more than 1,048,576 bytes are no settings"),
    ],
    ids=lambda value: value[:50],
)  # fmt: skip
def test_settings_of_another_kind_are_refused_at_every_depth(content, words, in_folder):
    (in_folder / "mine.yaml").write_text(content + "\n")
    message = complaint("--config=mine.yaml")
    assert words in message
    assert "mine.yaml" in message


def test_train_and_evaluate_take_each_others_names():
    argv = ["--num_samples", "7", "--annealing.num_chains=3", "--evidence.num_images=5", "--annealed_images=0"]
    evidence = parsing.parse(Settings, argv)[0].evidence
    assert (evidence.num_samples, evidence.annealing.num_chains) == (7, 3)
    assert (evidence.num_images, evidence.annealed_images) == (5, 0)
    argv = ["run", "--evidence.num_images", "6", "--evidence.annealing.num_chains=4"]
    found = parsing.parse(EvaluationSettings, argv, first="run")[0]
    assert (found.num_images, found.annealing.num_chains) == (6, 4)
    with pytest.raises(RunError, match=r"unknown option --evidence\.annealed_images"):
        parsing.parse(EvaluationSettings, ["run", "--evidence.annealed_images=3"], first="run")


@pytest.mark.parametrize(
    "content", ["lr: -1", "epochs: many", "prior: NoPrior", "encoder: {class_path: MLP, init_args: {hiden: [3]}}"]
)
def test_a_mistake_names_the_file_that_it_is_in(content, in_folder):
    (in_folder / "mine.yaml").write_text(content + "\n")
    (in_folder / "other.yaml").write_text("seed: 3\n")
    name = content.partition(":")[0]
    for argv in (["--config=mine.yaml", "--config", "other.yaml"], ["--seed=1", "--config", "mine.yaml"]):
        assert complaint(*argv).startswith(f"mine.yaml: --{name}")
    option = f"--{name}={content.partition(': ')[2]}"
    assert complaint("--config=other.yaml", option).startswith(f"--{name}")


@pytest.mark.parametrize(
    ("config", "given"),
    [
        *((Settings, {name: value}) for name in NEVER_NULL[:6] for value in (None, 3, [], {})),
        *((Settings, {"epochs": value}) for value in (2.5, True, 10**12)),
        *((Settings, {name: "x"}) for name in ("lr", "engine", "prior")),
        *((Settings, {name: 3}) for name in ("data_dir", "condition")),
        *((EvidenceSettings, {"annealing": value}) for value in (None, 3, [])),
        *((EvaluationSettings, {"run": "x", "name": name}) for name in ("a" * 300, "a\nb", "..", "-x")),
        (EvaluationSettings, {"run": "x", "annealing": None}),
        (EvaluationSettings, {"run": "x", "widening": math.inf, "proposal": "laplace", "estimator": "importance"}),
        (EvaluationSettings, {"run": None}),
        *((runs.StudySettings, {"contenders": {"a": ""}, "seeds": value}) for value in (10**9, 0, "3")),
        *((runs.StudySettings, {"contenders": {name: ""}}) for name in ("a" * 300, "a\nb", "a\0b", "-", "..", " ")),
        (runs.StudySettings, {"contenders": {"a": "--epochs 'x"}}),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_another_kind_are_refused_in_python(config, given):
    with pytest.raises(ValueError, match=f"^--({'|'.join(given)})[: .]") as caught:
        config(**given)
    assert "\n" not in str(caught.value)


def test_paths_are_expanded_and_those_of_data_are_absolute(in_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(in_folder / "home"))
    argv = ["--dataset=Npz", "--dataset.path=mine.npz", "--data_dir=~/data", "--run_dir=~/run"]
    settings, text = runs.parse(Settings, argv)
    assert (settings.data_dir, settings.run_dir) == (in_folder / "home" / "data", in_folder / "home" / "run")
    assert yaml.safe_load(text)["dataset"]["init_args"]["path"] == str(in_folder / "mine.npz")
    assert Settings(data_dir="~/data").data_dir == in_folder / "home" / "data"


@pytest.mark.parametrize("option", ["--config", "--evidence", "--evidence.annealing"])
def test_a_pipe_is_no_file_of_settings(option, in_folder):
    """Nobody writes into it, so that reading would wait for ever."""
    os.mkfifo(in_folder / "pipe")
    assert re.search("pipe.* no file", complaint(f"{option}={in_folder / 'pipe'}"))


def test_a_file_of_settings_that_is_a_folder(in_folder):
    assert f"--config {in_folder}: Is a directory" in complaint(f"--config={in_folder}")


def test_a_module_that_does_not_compile(in_folder, monkeypatch):
    (in_folder / "uncompilable.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(in_folder)
    assert "uncompilable.py" in complaint("--prior", "uncompilable.Prior")


def test_a_complaint_that_is_not_understood_is_still_one_line():
    options = runs.parser(Settings)
    for message in ("Parser key \"prior\":\n  Option 'a' is not accepted", "something\n  else", 'Parser key "x":\n  y'):
        line = parsing._one_line(message, Settings, options)
        assert "\n" not in line
        assert message.split()[-1] in line


# Run directories


@pytest.mark.parametrize("depth", ["run", "a/b/run"])
def test_open_run_makes_a_home(tmp_path, depth):
    runs.open_run(tmp_path / depth, "epochs: 3\n", resume=False)
    assert [path.name for path in (tmp_path / depth).iterdir()] == ["config.yaml"]
    assert (tmp_path / depth / "config.yaml").read_text() == "epochs: 3\n"
    runs.open_run(tmp_path / depth, "epochs: 3\n", resume=True)


def test_an_empty_directory_will_do(tmp_path):
    runs.open_run(tmp_path, "epochs: 3\n", resume=False)
    assert (tmp_path / "config.yaml").exists()


def another_run(path):
    path.mkdir()
    (path / "config.yaml").write_text("epochs: 3\n")


def other_files(path):
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def file(path):
    path.write_text("mine")


@pytest.mark.parametrize(
    ("occupy", "words"),
    [(another_run, "holds another run"), (other_files, "no empty directory"), (file, "no empty directory")],
)
def test_nothing_is_overwritten(tmp_path, occupy, words):
    home = tmp_path / "home"
    occupy(home)
    before = {path: path.read_bytes() for path in [home, *home.glob("*")] if path.is_file()}
    for open_ in (runs.open_run, runs.check_run_dir):
        with pytest.raises(RunError, match=words) as caught:
            open_(home, "epochs: 3\n", resume=False)
        assert str(home) in str(caught.value)
    assert {path: path.read_bytes() for path in [home, *home.glob("*")] if path.is_file()} == before


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"--run_dir .*Not a directory"):
        runs.open_run(tmp_path / "file" / "run", "epochs: 3\n", resume=False)
    with pytest.raises(RunError, match=r"file/run: Not a directory"):
        runs.make_directory(tmp_path / "file" / "run")


def test_an_experiment_ends_with_its_table_its_numbers_and_where_they_are(tmp_path, capsys):
    assert runs.conclude(tmp_path, "a table", {"a": 1.5}, torch.device("cpu")) == tmp_path
    assert (tmp_path / "table.md").read_text() == "a table\n"
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["a"] == 1.5
    assert found["device"] == runs.provenance(torch.device("cpu"))["device"]
    assert capsys.readouterr().out == f"\na table\n\n{tmp_path}\n"
    with pytest.raises(RunError, match=r"elsewhere: No such file or directory"):
        runs.conclude(tmp_path / "elsewhere", "a table", {}, torch.device("cpu"))
    with pytest.raises(RunError, match=r"^first$"), runs.writing(tmp_path):  # stays as it is
        raise RunError("first")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs: 3", "epochs: 4", r"--epochs \(3, now 4\)"),
        ("a: 1\nb: {c: [1, 2]}", "a: 1\nb: {c: [1]}", r"--b.c \(\[1, 2\], now \[1\]\)"),
        ("p: {class_path: A}", "p: {class_path: B}", r"--p \(A, now B\)"),
        (
            "p: {class_path: A, init_args: {k: 1}}",
            "p: {class_path: A, init_args: {k: 2}}",
            r"--p.k \(1, now 2\)",
        ),
        ("epochs: 3", "epochs: 3\nlr: 1", r"--lr \(None, now 1\)"),
        ("epochs: 3\nlr: 1", "epochs: 3", r"--lr \(1, now None\)"),
    ],
)
def test_resuming_with_another_setting_names_it(tmp_path, old, new, words):
    runs.open_run(tmp_path, old, resume=False)
    with pytest.raises(RunError, match=words) as caught:
        runs.open_run(tmp_path, new, resume=True)
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == old


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\xff"], ids=repr)
def test_resuming_with_damaged_settings(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(RunError, match=r"config.yaml is damaged") as caught:
        runs.open_run(tmp_path, "epochs: 3\n", resume=True)
    assert "\n" not in str(caught.value)


def test_resuming_without_a_run(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        runs.open_run(tmp_path / "missing", "epochs: 3\n", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_resume_takes_the_settings_of_the_run(tmp_path):
    _, text = runs.parse(Settings, shlex.split("--dataset Npz --dataset.path a.npz --lr 0.1"))
    runs.open_run(tmp_path, text, resume=False)
    config, again = runs.parse(Settings, ["--run_dir", str(tmp_path), "--resume"])
    assert again == text
    assert config.lr == 0.1
    assert config.resume
    same = ["--resume", f"--run_dir={tmp_path}", "--dataset.path", "a.npz", "--lr", "0.1"]
    assert runs.parse(Settings, same)[1] == text


# The edge of the program


def test_ctrl_c_ends_imports_at_once_and_programs_by_an_exception(monkeypatch):
    """Here without a process: what Ctrl-C calls while commands are imported, and once one runs."""
    before, ends = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(cli.os, "_exit", ends.append)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.leave_when_interrupted()
        signal.raise_signal(signal.SIGINT)
        assert ends == [130]
        cli.guarded(lambda: ends.append(signal.getsignal(signal.SIGINT)))
        assert ends[1] is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RunError("--lr must be positive"), 2, "error: --lr must be positive"),
        (NonFiniteError("site 'z' is NaN"), 2, "error: site 'z' is NaN"),
        (
            torch.linalg.LinAlgError("cholesky:\nof NaN"),
            2,
            "error: a number of the model is NaN or infinite (cholesky: of",
        ),
        (
            RuntimeError("normal expects all elements of std >= 0.0"),
            2,
            "error: a number of the model is NaN or infinite",
        ),
        (KeyboardInterrupt("go on with: this"), 130, "interrupted: go on with: this"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 1, ""),
        (MemoryError(), 2, "error: out of memory"),
        (torch.OutOfMemoryError("CUDA out of\nmemory"), 2, "error: out of memory (CUDA out of memory)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "error: out of memory"),
    ],
    ids=repr,
)
def test_cli_gives_a_status_and_one_line(error, status, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.guarded(main)
    assert caught.value.code == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.strip().startswith(words)
    assert len(output.err.strip().splitlines()) == (1 if words else 0)


def test_cli_hides_no_bug():
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.guarded(main)


def has_devices(monkeypatch, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("name", "cuda", "expected"),
    [
        *(("auto", 1, "cuda"), ("auto", 0, "cpu"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda")),
        *(("cuda:0", 1, "cuda:0"), ("cuda:1", 2, "cuda:1"), ("cuda:12", 13, "cuda:12")),
    ],
)
def test_device(monkeypatch, name, cuda, expected):
    has_devices(monkeypatch, cuda, mps=True)
    for scores in (True, False):
        assert runs.choose_device(name, scores) == torch.device(expected)


def test_models_are_trained_on_mps_and_scored_elsewhere(monkeypatch):
    has_devices(monkeypatch, mps=True)
    assert runs.choose_device("mps", scores=False) == torch.device("mps")
    with pytest.raises(RunError, match=r"--device mps: .*double precision, which mps lacks; use --device cpu"):
        runs.choose_device("mps")


@pytest.mark.parametrize(
    ("name", "cuda", "words"),
    [
        ("cuda", 0, "--device cuda: torch finds no CUDA device here; use --device cpu, or auto"),
        ("cuda:0", 0, "--device cuda:0: torch finds no CUDA device here; use --device cpu, or auto"),
        ("cuda:1", 1, "--device cuda:1: the last CUDA device here is cuda:0"),
        ("mps", 1, "--device mps: torch finds no Metal device here; use --device cpu, or auto"),
    ]
    + [
        (name, 1, f"--device: expected auto, cpu, mps, cuda, or one of several such as cuda:1, got '{name}'")
        for name in ("tpu", "meta", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "mps:0", "CUDA", "")
    ],
)
def test_device_that_is_not_there(monkeypatch, name, cuda, words):
    has_devices(monkeypatch, cuda)
    for scores in (True, False):
        with pytest.raises(RunError) as error:
            runs.choose_device(name, scores)
        assert str(error.value) == words


# Files


def test_json_has_no_nan(tmp_path):
    content = {"a": math.nan, "b": {"c": [1.5, -math.inf]}, "d": "x", "e": None, "f": 3}
    runs.write_json(tmp_path / "result.json", content)
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == {"a": None, "b": {"c": [1.5, None]}, "d": "x", "e": None, "f": 3}
    assert "NaN" not in text
    assert "Infinity" not in text


def test_csv(tmp_path):
    runs.write_csv(tmp_path / "metrics.csv", [{"epoch": 1, "elbo": -1.25}, {"epoch": 2, "elbo": -1.0}])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"epoch": "1", "elbo": "-1.25"}, {"epoch": "2", "elbo": "-1.0"}]


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    runs.write_text(path, "old")
    monkeypatch.setattr(directory.os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs.write_text(path, "new")
    assert path.read_text() == "old"


def test_table():
    rows = [("name", "value"), ("a", "-1.50"), ("longer", "12")]
    assert runs.table(rows).splitlines() == [
        "| name   | value |",
        "| ------ | ----: |",
        "| a      | -1.50 |",
        "| longer |    12 |",
    ]
    cells = ("1 layer", "-inf", "+1.5e-05", "3 +- 0.2", "12%", "")
    right = [runs.table([("header",), (cell,)]).splitlines()[1].endswith(": |") for cell in cells]
    assert right == [False, True, True, True, True, True]


def test_provenance_outside_a_checkout(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(directory.subprocess, "run", no_git)
    found = runs.provenance(torch.device("cpu"))
    assert found["commit"] is None
    assert found["device"].startswith("cpu, ")
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["versions"].keys() == {"python", "pyro_vae", "torch", "pyro-ppl", "numpy"}
