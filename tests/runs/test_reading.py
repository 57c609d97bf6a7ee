"""Files of strangers: what is not what it must be is told in one line, and nothing of theirs is imported or called."""

import gc
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from safetensors.torch import load_file, save_file

from pyro_vae import cli, runs
from pyro_vae.callbacks import Checkpoint
from pyro_vae.errors import CheckpointError
from pyro_vae.runs import reading

OLD = Path(__file__).parent / "data" / "0.1.0" / "vae"


@pytest.fixture
def run_dir(tmp_path):
    return shutil.copytree(OLD, tmp_path / "run")


def refused(function, *args, **kwargs):
    """The one line of a refusal."""
    with pytest.raises(runs.RunError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# One schema a file

ENTRIES = [
    ("num_images", "100", "'num_images' cannot be '100'"),
    ("num_images", True, "'num_images' cannot be True"),
    ("num_images", 99, "'importance' has 100 data, result.json 99"),
    ("annealed_images", 3, "'annealed' has 40 data, result.json 3"),
    ("annealed_images", None, "'annealed_images' is missing, beside 'annealed_log_likelihood'"),
    ("khat_threshold", None, "'khat_threshold' is missing, beside 'share_khat_above_threshold'"),
    ("test_log_likelihood", -20.0, "evidence.nc is damaged: its mean log p(x) is -28.2665, that of result.json -20"),
    ("test_elbo", [1.0], "'test_elbo' cannot be [1.0]"),
    ("test_elbo", 10**400, "'test_elbo' cannot be 1000"),
    ("mc_se", -0.1, "'mc_se' cannot be -0.1"),
    ("unit", "", "'unit' cannot be ''"),
    ("share_khat_above_threshold", 1.5, "'share_khat_above_threshold' cannot be 1.5"),
    ("reliable", "yes", "'reliable' cannot be 'yes'"),
    ("versions", [], "'versions' cannot be []"),
    ("active_units", ..., "'active_units' is missing"),
]


@pytest.mark.parametrize(("entry", "value", "words"), ENTRIES)
def test_an_entry_of_a_result_that_cannot_be(run_dir, entry, value, words):
    path = run_dir / "result.json"
    content = json.loads(path.read_text()) | {entry: value}
    path.write_text(json.dumps({name: each for name, each in content.items() if each is not ...}))
    line = refused(runs.load, run_dir)
    assert words in line
    assert str(run_dir) in line


READERS = {
    "result.json": reading.result_of,
    "evidence.nc": lambda run_dir: reading.groups_of(run_dir / "evidence.nc"),
    "config.yaml": runs.load_settings,
    "model.safetensors": reading.weights_of,
    "data.json": reading.memory_of,
}


CONTENTS = [
    ("result.json", b"", "result.json is damaged"),
    ("result.json", b"[]", "expected an object {...}, got []"),
    ("result.json", b'{"test_elbo": NaN}', "NaN is no number of JSON"),
    ("result.json", b'{"test_elbo": 1e999}', "1e999 is no finite number"),
    ("result.json", b"[" * 100_000, "result.json is damaged"),
    ("result.json", "é".encode("latin-1"), "result.json is damaged: it is no text in UTF-8"),
    ("evidence.nc", b"hello", "evidence.nc is damaged: no readable netCDF"),
    ("config.yaml", b"\x80", "config.yaml is no readable YAML"),
    ("config.yaml", b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ("config.yaml", b"latent_dim: many", "config.yaml: --latent_dim: expected a whole number, got 'many'"),
    ("model.safetensors", b"", "model.safetensors is damaged"),
    ("data.json", b'{"paths": []}', "data.json is damaged: 'paths' cannot be []"),
]


@pytest.mark.parametrize(("name", "content", "words"), CONTENTS)
def test_other_contents(run_dir, name, content, words):
    (run_dir / name).write_bytes(content)
    assert words in refused(READERS[name], run_dir)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file(tmp_path, name):
    path = tmp_path / name
    for make, words in ((Path.mkdir, "Is a directory"), (os.mkfifo, "it is a pipe or a device"), (loop, "symbolic")):
        make(path)
        line = refused(READERS[name], tmp_path)
        assert name in line
        assert words in line
        path.rmdir() if path.is_dir() else path.unlink()


def loop(path):
    path.symlink_to(path)


def with_groups(change):
    def spoil(run_dir):
        with xr.open_datatree(run_dir / "evidence.nc", engine="h5netcdf") as tree:
            groups = {name: tree[name].to_dataset().load() for name in tree.children}
        (run_dir / "evidence.nc").unlink()
        xr.DataTree.from_dict(change(groups, groups["importance"])).to_netcdf(run_dir / "evidence.nc")

    return spoil


GROUPS = [
    (lambda groups, own: {"annealed": own}, "it has no group 'importance'"),
    (lambda groups, own: {"importance": own.drop_vars("mc_se")}, "'importance' has no 'mc_se'"),
    (lambda groups, own: {"importance": own.assign(mc_se=-own["mc_se"])}, "'mc_se' of 'importance' is negative"),
    (lambda groups, own: {"importance": own.assign(ess=own["ess"].astype(str))}, "'ess' of 'importance' is not one"),
    (lambda groups, own: {"importance": own.assign_coords(image=np.zeros(100, int))}, "has no places of data"),
    (lambda groups, own: {"importance": own.assign(log_px=own["log_px"] + np.nan)}, "its mean log p(x) is nan"),
]


@pytest.mark.parametrize(("change", "words"), GROUPS)
def test_evidence_that_is_none(run_dir, change, words):
    with_groups(change)(run_dir)
    line = refused(runs.load, run_dir)
    assert "evidence.nc is damaged: " in line
    assert words in line


@pytest.mark.parametrize(
    ("shape", "words"),
    [("[1, 8]", "is of another model"), ("[1, 0, 8]", "cannot be"), ('["8"]', "cannot be"), ("8", "damaged")],
)
def test_shapes_of_an_observation(run_dir, shape, words):
    path = run_dir / "model.safetensors"
    save_file(load_file(path), path, {"image_shape": shape})
    assert words in refused(runs.load_model, run_dir)


def test_weights_that_are_nan(run_dir):
    path = run_dir / "model.safetensors"
    weights = load_file(path)
    name = next(name for name, weight in weights.items() if weight.is_floating_point())
    save_file(weights | {name: weights[name] * np.nan}, path, {"image_shape": "[1, 8, 8]"})
    assert f"model.safetensors is damaged: '{name}' holds NaN" in refused(runs.load_model, run_dir)


def test_a_checkpoint_with_parts_missing_is_damaged(tmp_path):
    class Started:
        module = torch.nn.Linear(1, 1)

        def load_state_dict(self, content):
            return content["weights"]

    torch.save({"format": "pyro_vae.training/3"}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint.pt is damaged: 'weights'"):
        Checkpoint(tmp_path / "checkpoint.pt", resume=True).load(Started())


def test_evaluations_stay_in_the_directory_of_the_run(run_dir, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run_dir / "evaluations").symlink_to(tmp_path / "elsewhere")
    assert "evaluations is a link, which is not followed" in refused(runs.score, run_dir, num_images=2)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_old_results_hold_what_every_result_must():
    assert set(reading.RESULT) <= set(json.loads((OLD / "result.json").read_text()))


# Classes of strangers


@pytest.fixture
def stranger(run_dir, tmp_path, monkeypatch):
    """A run whose settings are changed; and a module that says when it is imported, and when it is called."""
    (tmp_path / "strange.py").write_text(
        "import os, pyro_vae\nos.environ['STRANGE'] = 'imported'\n"
        "class Net(pyro_vae.MLP):\n    def __init__(self, *args, **kwargs):\n        os.environ['STRANGE'] = 'called'\n"
        "def function(*args, **kwargs):\n    os.environ['STRANGE'] = 'called'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    monkeypatch.setenv("STRANGE", "")

    def change(**settings):
        path = run_dir / "config.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
        return run_dir

    return change


def part(path, **arguments):
    return {"class_path": path, "init_args": arguments}


ATTACKS = [
    {"encoder": part("os.system", command="touch here")},
    {"encoder": "os.system"},
    {"prior": part("subprocess.Popen", args="touch here")},
    {"optimizer": part("builtins.eval")},
    {"optimizer": "strange.function"},
    {"objective": part("functools.partial", func="strange.function")},
    {"encoder": part("strange.function")},
    {"encoder": part("pyro_vae.networks.MLP", activation=part("strange.function"))},
    {"encoder": part("pyro_vae.networks.MLP", hidden=[part("strange.function")])},
    {"encoder": {"class_path": "pyro_vae.networks.MLP", "dict_kwargs": {"activation": part("strange.function")}}},
    {"encoder": part("pyro_vae.runs.directory.os.system", command="touch here")},
    {"encoder": part("pyro_vae.cli.main")},
    {"encoder": part("torch.hub.load", repo_or_dir="strange")},
    {"dataset": part("strange.<lambda>")},
    {"encoder.class_path": "strange.function"},
    {"latent_dim": part("strange.function")},
    {"evidence": {"annealing": part("strange.function")}},
]


@pytest.mark.parametrize("settings", ATTACKS)
def test_nothing_of_a_stranger_is_called_and_without_trust_nothing_is_imported(stranger, monkeypatch, settings):
    run_dir = stranger(**settings)
    monkeypatch.setattr(os, "system", lambda *args: os.environ.update(STRANGE="called"))
    assert str(run_dir) in refused(runs.load_settings, run_dir, trust=False)
    assert os.environ["STRANGE"] == ""
    refused(runs.load_settings, run_dir)
    assert os.environ["STRANGE"] != "called"


def test_a_strangers_class_is_named_with_the_way_to_trust_it(stranger, capsys):
    run_dir = stranger(encoder=part("strange.Net"))
    line = refused(runs.load, run_dir, trust=False)
    assert re.search(r"--encoder: strange\.Net is no class of pyro_vae.*trust=True, or by --trust true", line)
    assert os.environ["STRANGE"] == ""
    for command in ("evaluate", "sample"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, str(run_dir), "--trust", "false"])
        assert caught.value.code == 2
        assert "strange.Net is no class of pyro_vae" in capsys.readouterr().err
    with pytest.raises(Exception, match="Net"):
        runs.load_model(run_dir)
    assert os.environ["STRANGE"] == "called"


def test_own_classes_need_no_trust(stranger):
    run = runs.load(stranger(optimizer=part("torch.optim.SGD", momentum=0.9)), trust=False)
    weights = run.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in load_file(run.path / "model.safetensors").items())


@pytest.mark.parametrize("trust", ["false", "False", "no", 0])
@pytest.mark.parametrize("load", [runs.load, runs.load_settings, runs.load_model, runs.load_data])
def test_trust_is_a_bool(stranger, load, trust):
    run_dir = stranger(encoder="strange.Net")
    assert refused(load, run_dir, trust=trust) == f"trust must be True or False, got {trust!r}"
    assert os.environ["STRANGE"] == ""


# What was changed since a run was finished


@pytest.fixture
def sealed(run_dir):
    """A run as it is finished today."""
    weights, metadata = reading.tensors_of(run_dir / "model.safetensors")
    settings = json.dumps(yaml.safe_load((run_dir / "config.yaml").read_text()))
    runs.write_weights(run_dir / "model.safetensors", weights, metadata | {"settings": settings})
    return run_dir


def test_no_bit_of_the_weights_can_change(sealed):
    path = sealed / "model.safetensors"
    runs.load_model(sealed)
    content = bytearray(path.read_bytes())
    for place in (-1, -500, -3000):
        changed = content.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        assert refused(runs.load_model, sealed) == f"{path} is damaged: its checksum is another"


def test_weights_are_the_same_bytes_whenever_they_are_written(sealed):
    path = sealed / "model.safetensors"
    weights, metadata = reading.tensors_of(path)
    metadata |= dict.fromkeys("abcdef", "é")
    written = set()
    for order in (1, -1, 1, -1):
        runs.write_weights(path, weights, dict([*metadata.items()][::order]))
        written.add(path.read_bytes())
    assert len(written) == 1
    again, told = reading.tensors_of(path)
    assert {**metadata, "checksum": told["checksum"]} == told
    torch.testing.assert_close(again, weights, rtol=0, atol=0)


def test_types_shapes_names_and_metadata_count():
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}
    known = reading.checksum(tensors, {"told": "1", "checksum": "any"})
    assert known == reading.checksum(dict(reversed(tensors.items())), {"told": "1"})
    others = [
        (tensors | {"a": tensors["a"].T.reshape(3, 2)}, {"told": "1"}),
        (tensors | {"a": tensors["a"].reshape(3, 2)}, {"told": "1"}),
        (tensors | {"a": tensors["a"].view(torch.int32)}, {"told": "1"}),
        ({"a": tensors["a"], "c": tensors["b"]}, {"told": "1"}),
        (tensors, {"told": "2"}),
        (tensors, {}),
    ]
    assert len({known, *(reading.checksum(*each) for each in others)}) == 1 + len(others)


def edit(run_dir, **settings):
    path = run_dir / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 5}, r"--seed \(\d+, now 5\)"),
        ({"epochs": 999}, r"--epochs \(\d+, now 999\)"),
        ({"missing": "zeros"}, r"--missing \(None, now zeros\)"),
        ({"likelihood": "ContinuousBernoulli"}, "--likelihood "),
        ({"dataset": part("MNIST", binarization="threshold")}, "--dataset"),
    ],
)
def test_settings_of_a_finished_run_cannot_change(sealed, settings, words):
    edit(sealed, **settings)
    for function in (runs.load_settings, runs.load_model, runs.load_data):
        line = refused(function, sealed)
        assert re.search(rf"config\.yaml was edited since the run was finished, with another {words}", line)


def test_a_run_may_move(sealed):
    edit(sealed, device="cpu", data_dir="/elsewhere")
    assert runs.load_settings(sealed).data_dir == Path("/elsewhere")


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("epochs: 2\nlr: 0.1\nepochs: 1\n", "epochs", 3),
        ("evidence:\n  num_samples: 2\n  num_samples: 2\n", "num_samples", 3),
        ("encoder: {class_path: MLP, init_args: {hidden: [3], hidden: [4]}}\n", "hidden", 1),
        ("'seed': 1\nseed: 2\n", "seed", 2),
    ],
)
def test_a_setting_given_twice(tmp_path, text, name, line):
    (path := tmp_path / "settings.yaml").write_text(text)
    words = f"{name} is given twice, the second time in line {line}"
    assert words in refused(runs.parse, runs.Settings, [f"--config={path}"])


def test_settings_by_reference_are_no_repetition(tmp_path):
    (path := tmp_path / "settings.yaml").write_text(
        "evidence: &few\n  num_samples: 7\nencoder:\n  class_path: MLP\n  init_args: &same {hidden: [3]}\n"
        "decoder:\n  class_path: MLP\n  init_args:\n    <<: *same\n"
    )
    settings, _ = runs.parse(runs.Settings, [f"--config={path}"])
    assert settings.evidence.num_samples == 7
    assert settings.decoder.keywords["hidden"] == [3]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"decoder": {"class_path": "pyro_vae.networks.MLP", "init_args": {"hidden": [1_000_000, 1_000_000]}}},
        {"latent_dim": 2_000_000_000},
        {"prior": {"class_path": "pyro_vae.priors.VampPrior", "init_args": {"components": 2_000_000_000}}},
        {"prior": {"class_path": "pyro_vae.priors.Flow", "init_args": {"transforms": 1000, "hidden": [8] * 50}}},
    ],
    ids=["wide", "latent", "prior", "flow"],
)
def test_a_model_far_larger_than_its_weights_is_refused_before_it_takes_memory(run_dir, settings):
    content = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(content | settings))
    line = refused(runs.load_model, run_dir, trust=False)
    assert re.search(r"config.yaml: a model of these settings is far larger than .*model.safetensors", line)
    runs.load_model(OLD, trust=False)


@pytest.mark.parametrize("place", [64, 96, 200])
def test_a_flipped_bit_of_evidence_is_told_in_one_line_and_no_more(run_dir, place, monkeypatch):
    path, unraisable = run_dir / "evidence.nc", []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert "evidence.nc is damaged: no readable netCDF" in refused(runs.load, run_dir)
    gc.collect()
    assert not unraisable
