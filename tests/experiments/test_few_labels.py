"""Classification from few labels, on a finished run."""

import itertools
import json
import statistics

import numpy as np
import pytest
import torch

from experiments import few_labels
from experiments.few_labels import COMPONENTS, FEATURES, FINE_TUNED, LOGISTIC, PIXELS, SCRATCH
from pyro_vae import cli, runs
from pyro_vae.runs.kept import Kept

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("labels") / "run"
    argv = "--dataset Digits --epochs 40 --latent_dim 8 --encoder.hidden [64] --decoder.hidden [64] "
    argv += "--encoder.activation tanh --decoder.activation tanh --evidence.num_samples 2 --evidence.annealed_images 0"
    return cli.train([*argv.split(), f"--run_dir={run_dir}"]).path


@pytest.fixture(scope="module")
def studied(finished):
    out = few_labels.main([str(finished), "--labels=[1, 20]", "--num_draws=3", "--num_steps=100"])
    assert (out / "accuracy.png").stat().st_size > 1000
    return json.loads((out / "result.json").read_text()), (out / "table.md").read_text()


def test_accuracies(studied):
    result, text = studied
    mean = {name: {n: statistics.fmean(each) for n, each in by.items()} for name, by in result["accuracies"].items()}
    assert len(mean) == 8
    for by in mean.values():
        assert by["20"] > by["1"] + 0.1  # more labels help
        assert by["20"] > 0.6  # chance is 0.1
    assert mean[f"{FEATURES}, {LOGISTIC}"]["1"] > 0.3
    assert f"{100 * mean[FINE_TUNED]['20']:.1f}" in text
    ours, theirs = (np.array(result["accuracies"][name]["20"]) for name in (FINE_TUNED, SCRATCH))
    expected = [(ours - theirs).mean(), (ours - theirs).std(ddof=1) / 3**0.5]
    assert result["differences"][f"{FINE_TUNED} minus {SCRATCH}"]["20"] == pytest.approx(expected)
    assert set(itertools.chain(*few_labels.PAIRS)) <= set(mean)


def test_it_goes_on_where_it_was_interrupted(finished, studied, monkeypatch, tmp_path):
    out, whole = tmp_path / "out", few_labels.one_draw
    argv = ["--labels=[1, 20]", "--num_draws=3", "--num_steps=100", f"--run_dir={out}"]

    def stops(*args):
        if (out / "models" / "draw1.safetensors").exists():
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(few_labels, "one_draw", stops)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        few_labels.main([str(finished), *argv])
    monkeypatch.undo()
    few_labels.main(["--resume", f"--run_dir={out}"])
    assert json.loads((out / "result.json").read_text())["accuracies"] == studied[0]["accuracies"]


def test_representations(finished):
    vae, data = runs.load_model(finished), runs.load_data(finished)
    x = data.observe(torch.arange(200))
    spaces = few_labels.representations(vae.guide, x, data.test)
    with torch.no_grad():
        means, scales = vae.posterior(data.test).mean, vae.posterior(data.test).stddev
    error = (torch.from_numpy(spaces[FEATURES][1]) - means) / (scales / 8)  # of 64 draws
    assert error.square().mean().item() == pytest.approx(1, abs=0.1)
    assert spaces[PIXELS][0].shape == (200, 64)
    centred = x - x.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    theirs = (centred @ directions[:8].mT).abs().numpy()
    np.testing.assert_allclose(np.abs(spaces[COMPONENTS][0]), theirs, atol=1e-3)


def test_training_a_network_leaves_the_encoder_alone(finished):
    vae, data = runs.load_model(finished), runs.load_data(finished)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    x, labels = data.observe(torch.arange(300)), data.train_labels[:300]
    model = few_labels.supervised(vae.posterior.network, 10, x, labels, 300)
    assert (model(x).argmax(-1) == labels).double().mean() > 0.9
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_each_method_learns_from_what_it_should(finished, monkeypatch, tmp_path):
    """As many labels of each class; k by their number; new weights and the encoder's own, each under its name."""
    seen = {}

    def supervised(network, num_classes, x, labels, num_steps):
        seen.setdefault(len(x), []).append((network, labels.bincount().tolist()))
        return torch.nn.Sequential(network, torch.nn.Linear(network.out_features, num_classes))

    monkeypatch.setattr(few_labels, "supervised", supervised)
    vae, data = runs.load_model(finished), runs.load_data(finished)
    x = data.observe(torch.arange(len(data.train_pixels)))
    fresh = runs.build(runs.load_settings(finished), data.schema)
    networks = {SCRATCH: fresh.posterior.network, FINE_TUNED: vae.posterior.network}
    spaces = {PIXELS: (x.numpy(), data.test.numpy())}
    config = few_labels.Settings(finished, labels=(2, 7), num_draws=2)
    found = few_labels.study(config, spaces, networks, (x, data.test), data, Kept(tmp_path))
    assert set(found) == {f"{PIXELS}, {each}" for each in few_labels.CLASSIFIERS} | set(networks)
    for size, calls in seen.items():
        assert [network for network, _ in calls] == [*networks.values()] * 2
        assert all(counts == [size // 10] * 10 for _, counts in calls)
    assert [few_labels.CLASSIFIERS["nearest neighbours"](number).n_neighbors for number in (1, 3, 50)] == [1, 3, 5]


def test_names_of_networks(finished, monkeypatch, tmp_path):
    vae = runs.load_model(finished)
    given = {}
    monkeypatch.setattr(few_labels, "study", lambda config, spaces, networks, x, *_: given.update(networks) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        few_labels.main([str(finished), f"--run_dir={tmp_path / 'out'}"])
    weights = {name: network.layers[0].weight for name, network in given.items()}
    assert torch.equal(weights[FINE_TUNED], vae.posterior.network.layers[0].weight)
    assert not torch.equal(weights[SCRATCH], weights[FINE_TUNED])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--labels=[0]"], "--labels must be different numbers of at least 1"),
        (["--labels=[5, 5]"], "--labels must be different numbers"),
        (["--num_draws=1"], "--num_draws must be at least 2"),
        (["--labels=[500]"], "--labels 500: one class has only"),
    ],
)
def test_bad_settings_are_refused(finished, tmp_path, argv, message):
    with pytest.raises(runs.RunError, match=message):
        few_labels.main([str(finished), *argv, f"--run_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_images_without_labels_are_refused(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 255, (50, 4, 4), dtype=np.uint8))
    argv = f"--dataset Npy --dataset.path {tmp_path / 'images.npy'} --epochs 1 --latent_dim 2 --encoder.hidden [4] "
    argv += "--decoder.hidden [4] --evidence.num_samples 2 --evidence.annealed_images 0"
    cli.train([*argv.split(), f"--run_dir={tmp_path / 'run'}"])
    with pytest.raises(runs.RunError, match="the data set has no labels"):
        few_labels.main([str(tmp_path / "run")])


def test_networks_see_images_as_they_were_trained_to(finished, tmp_path, monkeypatch):
    """Standardized, where the run's encoder standardizes: raw values would be another language to it."""
    given = []
    monkeypatch.setattr(few_labels, "study", lambda settings, spaces, networks, seen, *_: given.append(seen) or {})
    monkeypatch.setattr(few_labels, "report", lambda *args: "")
    monkeypatch.setattr(few_labels, "plot", lambda *args: None)
    monkeypatch.setattr(few_labels, "PAIRS", ())
    open_finished = runs.open_finished

    def halved(*args, **options):
        vae, *others = open_finished(*args, **options)
        size = vae.posterior.inputs.loc
        vae.posterior.inputs._take(size + 1, torch.full_like(size, 2.0), torch.zeros_like(size, dtype=torch.bool))
        return vae, *others

    monkeypatch.setattr(runs, "open_finished", halved)
    few_labels.main([str(finished), "--run_dir", str(tmp_path / "out"), "--labels", "[2]"])
    data = open_finished(finished, tmp_path / "other", "few_labels", "cpu", 0)[1]
    torch.testing.assert_close(given[0][1], (data.test - 1) / 2)
