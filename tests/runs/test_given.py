"""Runs that are told a condition: labels from data to model, scores, figures and class posteriors."""

import functools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pyro_vae import MLP, ConditionalVAE, Network, cli, quadrature, runs
from pyro_vae.data.datasets import Schema
from pyro_vae.data.fetched import Digits
from pyro_vae.data.images import Dataset, Images
from pyro_vae.data.tables import Table
from pyro_vae.errors import DataError, RunError
from pyro_vae.infer.evidence import ClassPosterior, Evidence
from pyro_vae.parts.likelihoods import Gaussian
from pyro_vae.parts.networks import ConvDecoder, ConvEncoder, Told
from pyro_vae.parts.priors import GaussianMixture, VampPrior
from pyro_vae.runs import new_data
from pyro_vae.runs.build import build
from pyro_vae.runs.classifying import summary

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 2, 2)).astype(np.uint8)
LABELS = np.random.default_rng(1).choice([7, -1, 3], 40)
LABELS[:3] = [7, -1, 3]


class Own(Dataset):
    """Thirty training images, the last five of them held out, and ten test images."""

    labels = LABELS

    def read(self) -> Images:
        train, test = (None, None) if self.labels is None else np.split(self.labels, [30])
        return Images(PIXELS[:30], PIXELS[30:], 255, train, test)


def own(tmp_path, labels=LABELS):
    source = Own(tmp_path, num_validation=5)
    source.labels = labels
    return source.load()


def settings(**more):
    linear = functools.partial(MLP, hidden=())
    like = functools.partial(Gaussian, scale=0.5)
    return runs.Settings(**({"encoder": linear, "decoder": linear, "likelihood": like, "latent_dim": 2} | more))


def test_labels_become_a_condition(tmp_path, capsys):
    data = own(tmp_path)
    told = data.given(["label"])
    assert "the label -1 of Own is a class like the others, not an unknown one" in capsys.readouterr().out
    (column,) = told.schema.condition
    assert (column.name, column.kind, column.values) == ("label", "categorical", (-1, 3, 7))
    assert told.schema.condition_dim == 3
    assert told.about["condition"] == ["label"]
    assert told.fingerprint == data.fingerprint
    assert Schema.loads(told.schema.dumps()) == told.schema
    wanted = torch.as_tensor(LABELS[:, None] == np.array([-1, 3, 7])).float()
    for (x, c), labels in zip([told.validation, told.test], [wanted[25:30], wanted[30:]], strict=True):
        assert torch.equal(c, labels)
        assert x.shape == (len(labels), 4)
    index = torch.tensor([4, 0, 24])
    assert torch.equal(told.observe(index)[1], wanted[index])
    assert all(len(x) == len(c) for x, c in told.batches(7))
    assert isinstance(data.test, torch.Tensor)  # the data themselves are as they were


def changed(row, label):
    labels = LABELS.copy()
    labels[row] = label
    return labels


@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [
        (["age"], LABELS, "--condition age: Own has nothing beside its images but label"),
        (["label", "age"], LABELS, "--condition label, age: Own has nothing"),
        (["label"], None, "--condition label: the training images of Own have no labels"),
        (["label"], np.zeros(40, int), "Own has 1 different training labels, there must be between 2 and 1,000"),
        (["label"], changed(33, 8), "test image 3 .from 0. of Own has the label 8, which no training image has"),
        (["label"], changed(26, 4), "validation image 1 .from 0. of Own has the label 4"),
    ],
)
def test_what_cannot_be_a_condition_is_refused(tmp_path, names, labels, words):
    with pytest.raises(DataError, match=words):
        own(tmp_path, labels).given(names)


@pytest.mark.parametrize(
    "parts", [["decoder", "encoder"], ["prior"], ["prior", "decoder"], ["encoder"]], ids=lambda parts: "-".join(parts)
)
def test_log_px_given_c_of_a_model_from_settings_is_that_of_the_normal(tmp_path, doubles, parts):
    vae = build(
        settings(condition="label", condition_in=parts, condition_hidden=()), own(tmp_path).given(["label"]).schema
    )
    assert isinstance(vae, ConditionalVAE)
    assert {part for part in ("prior", "decoder", "encoder") if getattr(vae, f"{part}_sees")} == set(parts)
    c, x = torch.eye(3), torch.randn(3, 4)
    found = quadrature(vae.model, vae.guide, (x, c)).log_px
    weight = vae.likelihood.network.layers[0].weight.detach()
    prior = vae.prior(c) if "prior" in parts else None
    for i in range(3):
        mean = weight[:, 2 + i] if "decoder" in parts else torch.zeros(4)
        scale = torch.ones(2)
        if prior is not None:
            mean, scale = mean + weight[:, :2] @ prior.base_dist.loc[i].detach(), prior.base_dist.scale[i].detach()
        covariance = weight[:, :2] * scale.square() @ weight[:, :2].mT + 0.25 * torch.eye(4)
        assert found[i].item() == pytest.approx(stats.multivariate_normal(mean, covariance).logpdf(x[i]), abs=1e-6)


def table(**changed):
    """Forty rows; what is changed holds for the rows that are named."""
    noise = np.random.default_rng(0).standard_normal((40, 3))
    frame = pd.DataFrame(noise, columns=["height", "weight", "age"])
    frame["age"] = 40 + 10 * frame["age"]
    frame["sex"] = ["f", "m", "m", "x"] * 10
    for name, (row, value) in changed.items():
        frame.loc[row, name] = value
    return frame


def rows(frame, split=None):
    split = Table("unused", frame, num_test=8) if split is None else split
    return split.load()


def test_columns_become_a_condition():
    whole = rows(table(weight=(3, np.nan)))
    data = whole.given(["sex", "age"])
    assert [column.name for column in data.schema.columns] == ["height", "weight"]
    assert [column.name for column in data.schema.condition] == ["sex", "age"]
    assert (data.schema.shape, data.schema.condition_dim, data.schema.missing) == ((2,), 4, True)
    assert data.about["condition"] == ["sex", "age"]
    assert data.fingerprint == whole.fingerprint
    age = torch.cat([whole.train, whole.validation])[:, 2]
    x, c = data.test
    assert torch.equal(x, whole.test[:, :2])
    assert torch.equal(c[:, :3].argmax(1).float(), whole.test[:, 3])
    torch.testing.assert_close(c[:, 3], (whole.test[:, 2] - age.mean()) / age.std(correction=0))
    index = torch.tensor([5, 2])
    torch.testing.assert_close(data.observe(index)[0], whole.train[index, :2], equal_nan=True)
    assert data.num_train == whole.num_train == len(data.observe(torch.arange(data.num_train))[1])
    assert not rows(table(sex=(3, "f"))).given(["sex"]).schema.missing
    assert Schema.loads(data.schema.dumps()) == data.schema


@pytest.mark.parametrize(
    ("frame", "names", "words"),
    [
        (
            table(),
            ["shoe"],
            "--condition shoe: there is no such column in the table, 4 columns: height, weight, age, sex",
        ),
        (table(), ["height", "weight", "age", "sex"], "no column is left to be modelled"),
        (table(age=(7, np.nan)), ["sex", "age"], "--condition age: the table, row 7 is missing, and a condition must"),
        (table(sex=(7, None)), ["sex"], "--condition sex: the table, row 7 is missing"),
        (
            table(height=(6, np.nan), weight=(6, np.nan)),
            ["sex", "age"],
            "--condition sex, age: the table, row 6 has nothing else that was seen",
        ),
    ],
)
def test_columns_that_cannot_be_a_condition_are_refused(frame, names, words):
    with pytest.raises(DataError, match=words):
        rows(frame).given(names)


def test_a_value_that_no_training_row_has_is_refused():
    order = np.random.default_rng(0).permutation(40)  # as the table is split
    with pytest.raises(
        DataError, match=f"--condition sex: the table, row {order[-2]} is 'rare', which no training row"
    ):
        rows(table(sex=(order[-2], "rare"))).given(["sex"])


def test_log_px_given_columns_is_that_of_the_normal(doubles):
    """In the units of the file, with the condition standardized."""
    frame = table()
    data = rows(frame).given(["age", "sex"])
    vae = build(settings(condition=["age", "sex"]), data.schema)
    x = torch.tensor(frame[["height", "weight"]].to_numpy()[:4].copy())
    train = np.random.default_rng(0).permutation(40)[:-8]
    age = ((frame["age"] - frame["age"][train].mean()) / frame["age"][train].std(ddof=0)).to_numpy()
    sex = frame["sex"].to_numpy()[:, None] == np.array(["f", "m", "x"])
    c = torch.tensor(np.column_stack([age, sex])[:4].astype(float))
    found = quadrature(vae.model, vae.guide, (x, c)).log_px
    weight = vae.likelihood.network.layers[0].weight.detach()
    covariance = weight[:, :2] @ weight[:, :2].mT + 0.25 * torch.eye(2)
    for i in range(4):
        wanted = stats.multivariate_normal(weight[:, 2:] @ c[i], covariance).logpdf(x[i])
        assert found[i].item() == pytest.approx(wanted, abs=1e-6)
    given = torch.cat([data.observe(torch.arange(data.num_train))[1], data.validation[1], data.test[1]])
    assert given[:, 0].sort().values.tolist() == pytest.approx(np.sort(age), abs=1e-5)


class Averaged(Network):
    """A network of images alone, of a user."""

    def __init__(self, in_features, out_features, image_shape=None):
        super().__init__(in_features, out_features, image_shape)
        self.image_shape = image_shape
        self.output = torch.nn.Linear(image_shape[-1], out_features)

    def forward(self, features):
        return self.output(features.reshape(*features.shape[:-1], *self.image_shape).mean((-3, -2)))


@pytest.mark.parametrize(("encoder", "told"), [(MLP, False), (ConvEncoder, True), (Averaged, True)])
def test_every_network_can_be_told(tmp_path, encoder, told):
    schema = own(tmp_path).given(["label"]).schema
    vae = build(settings(encoder=encoder, decoder=ConvDecoder, condition="label"), schema)
    network = vae.posterior.network
    assert isinstance(network, Told) == told
    assert network.in_features == 4 + 3
    x, c = torch.rand(5, 4), torch.eye(3)[torch.arange(5) % 3]
    if told:
        alone = network.network(x)
        assert torch.equal(network(torch.cat([x, c], -1)), alone)
        network.planes.weight.data.normal_()
        assert torch.equal(network(torch.cat([x, c], -1)), network.network(x + c @ network.planes.weight.mT))
    vae.initialize(100 * x, c)  # log scales start within +-1 of what the encoder is shown
    network(torch.cat([vae.posterior.inputs(torch.cat([100 * x, c], -1))], -1))
    assert vae.posterior(torch.cat([100 * x, c], -1)).base_dist.scale.log().abs().max() < 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"condition": ["label", "label"]}, "--condition must be different names"),
        ({"condition": []}, "--condition must be different names"),
        ({"condition_in": ["prior"]}, "--condition_in needs --condition"),
        ({"condition": "label", "condition_in": ["top"]}, "--condition_in must be different ones of prior"),
        ({"condition": "label", "model": "TwoLayerVAE"}, "--condition is for --model VAE"),
        ({"condition": "label", "condition_hidden": [0]}, "--condition_hidden"),
        ({"condition": "label", "condition_in": ["prior"], "prior": GaussianMixture}, "--prior cannot be chosen"),
    ],
)
def test_settings_that_make_no_sense_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        settings(**more)


TINY = "--dataset Digits --latent_dim 2 --encoder.hidden [16] --decoder.hidden [16] --epochs 6 --lr 0.01 --device cpu "
TINY += "--encoder.activation tanh --decoder.activation tanh "
TINY += "--evidence.num_samples 50 --evidence.num_images 40 --evidence.annealed_images 0"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return cli.train([*TINY.split(), "--condition=label", f"--run_dir={folder / 'told'}"])


@pytest.mark.slow
def test_a_run_that_is_told_labels(told, tmp_path):
    assert told.result["condition"] == ["label"]
    assert told.result["unit"] == "nats per image, mass, given label"
    again = runs.load_model(told.path)  # from its own file, without data
    assert isinstance(again, ConditionalVAE)
    x, c = (each[:40] for each in told.data.test)
    shuffled = c[torch.randperm(40)]
    elbo = [
        runs.scoring.estimate_elbo(again.model, again.guide, (x, each), num_samples=20).mean() for each in (c, shuffled)
    ]
    assert elbo[0] == pytest.approx(told.result["test_elbo"], abs=0.3)
    assert elbo[1] < elbo[0] - 1  # a wrong label is worth less
    plain = cli.train([*TINY.split(), f"--run_dir={tmp_path / 'plain'}"])
    with pytest.raises(RunError, match="unit is 'nats per image, mass' and 'nats per image, mass, given label'"):
        runs.compare([told, plain])
    with pytest.raises(RunError, match=r"made for models of p.x., .* is told label"):
        runs.open_finished(told.path, None, "study", "cpu", 0)
    with pytest.raises(RunError, match=r"is told nothing: p.c given x. needs a run with one column of classes"):
        runs.classify(plain)
    with pytest.raises(RunError, match=r"made for models of p.x., .* is told label"):
        runs.load_finished(told.path, torch.device("cpu"), may_be_told=False)
    np.save(tmp_path / "x.npy", told.data.test_labels[:2, None].repeat(1, 64).numpy() * 0)
    new = new_data.score_new(
        new_data.ScoreSettings(told.path, tmp_path / "x.npy", given=7, estimator="importance", num_samples=50)
    )
    assert told.result["unit"] in new.text
    scored = runs.score(told, num_images=5, estimator="importance", num_samples=50)
    assert scored.result["unit"] == told.result["unit"]


@pytest.mark.slow
def test_a_run_that_is_told_labels_resumes_as_if_it_had_not_stopped(told, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    argv = [*TINY.split(), "--condition=label", f"--run_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(runs.training, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            cli.train(argv)
    resumed = cli.train([f"--run_dir={tmp_path / 'run'}", "--resume"])
    assert resumed.result["test_log_likelihood"] == told.result["test_log_likelihood"]
    with pytest.raises(RunError, match=r"was run with another --condition .label, now None."):
        cli.train([*TINY.split(), "--condition=null", f"--run_dir={tmp_path / 'run'}", "--resume"])


@pytest.mark.slow
def test_class_posteriors_of_a_run_are_those_of_brute_force(told, tmp_path, capsys):
    found = runs.classify(told, num_images=12, run_dir=tmp_path / "classes")
    vae, data = told.model, told.data
    (x, _), among = runs.some_images(data, "test", 12)
    prior = torch.bincount(data.train_labels) / len(data.train_labels)
    # a regular grid over z: the midpoint rule is exact to rounding here
    side = torch.linspace(-6, 6, 121)
    z = torch.cartesian_prod(side, side)
    log_prior = -0.5 * z.square().sum(-1) - np.log(2 * np.pi) + 2 * np.log(0.1)
    with torch.no_grad():
        of_class = [vae.likelihood(torch.cat([z, k.expand(len(z), -1)], -1)) for k in torch.eye(10)]
        rows = [torch.stack([(each.log_prob(row) + log_prior).logsumexp(0) for each in of_class]) for row in x]
    joint = torch.stack(rows)
    wanted = (joint + prior.log()).log_softmax(-1)
    torch.testing.assert_close(found.posterior.log_prob.float(), wanted, rtol=0, atol=0.05)
    right = data.test_labels[among]
    assert found.result["log_loss"] == pytest.approx(-wanted[torch.arange(12), right].mean().item(), abs=0.02)
    assert found.result["accuracy"] == pytest.approx((wanted.argmax(-1) == right).double().mean().item())
    whole = (joint + prior.log()).logsumexp(-1).mean().item()
    assert found.result["log_likelihood"] == pytest.approx(whole, abs=0.02)
    assert found.result["log_loss_of_prior"] == pytest.approx(-prior.log()[right].mean().item(), abs=1e-6)
    assert json.loads((tmp_path / "classes" / "result.json").read_text())["classes"] == list(range(10))
    with pytest.raises(RunError, match="never overwritten"):
        runs.classify(told, num_images=12, run_dir=tmp_path / "classes")
    cli.main(["classify", str(told.path), "--num_images", "2", "--run_dir", str(tmp_path / "more")])
    assert "| accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_figures_of_a_run_that_is_told_labels(told, tmp_path):
    runs.figures.pictures(told.model.model, told.model.guide, told.data, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("latent_space.png", "reconstructions.png", "samples.png", "other_classes.png"),
    }
    classes = torch.eye(10)
    x = runs.figures.samples_given(told.model.model, told.data.test[0], classes, 3)
    torch.manual_seed(0)
    y = runs.figures.samples_given(told.model.model, told.data.test[0], classes, 3)
    torch.manual_seed(0)
    z = torch.randn(3, 2)
    with torch.no_grad():
        wanted = told.model.likelihood(torch.cat([z, classes[4].expand(3, -1)], -1)).mean
    torch.testing.assert_close(y[4], wanted)
    assert x.shape == (10, 3, 64)


@pytest.mark.slow
def test_a_vamp_prior_beside_an_encoder_that_is_told_is_refused(tmp_path):
    with pytest.raises(RunError, match="this encoder sees a condition too"):
        runs.train(runs.Settings(dataset=Digits, prior=VampPrior, condition="label", run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_summary_has_the_numbers_of_the_formulas():
    log_px = torch.tensor([[-3.0, -4.0], [-5.0, -5.1], [-2.0, -9.0], [-7.0, -4.0]])
    errors = torch.tensor([[0.1, 0.2], [0.3, 0.3], [0.1, 0.1], [0.2, 0.0]])
    nan = torch.full((4,), torch.nan)
    each = [
        Evidence(*([nan] * len(Evidence._fields)))._replace(log_px=x, mc_se=e)
        for x, e in zip(log_px.mT, errors.mT, strict=True)
    ]
    prior = torch.tensor([0.25, 0.75])
    log_prob = (log_px + prior.log()).log_softmax(-1)
    found = ClassPosterior(log_prob, errors / 2, torch.tensor([True, True, True, False]), tuple(each))
    right = torch.tensor([0, 1, 0, 0])
    result = summary(found, right, prior)
    odds = np.array([0.25 / (0.25 + 0.75 * np.exp(-1)), 0.75 / (0.75 + 0.25 * np.exp(0.1)), 0, 0])
    odds[2:] = 0.25 / (0.25 + 0.75 * np.exp([-7, 3]))
    assert result["log_loss"] == pytest.approx(-np.log(odds).mean(), rel=1e-5)
    assert result["log_loss_se"] == pytest.approx(np.log(odds).std(ddof=1) / 2, rel=1e-5)
    assert result["mc_se"] == pytest.approx(np.sqrt(0.05**2 + 0.15**2 + 0.05**2 + 0.1**2) / 4, rel=1e-5)
    assert (result["accuracy"], result["accuracy_se"]) == pytest.approx((0.5, np.sqrt(0.5 * 0.5 / 8)))  # images 1 and 2
    assert result["share_undecided"] == 0.25  # 0.1 between the classes of image 0, of which an error is 0.22
    assert (result["share_reliable"], result["reliable"]) == (0.75, False)
    whole = np.log(0.25 * np.exp(log_px[:, 0].numpy()) + 0.75 * np.exp(log_px[:, 1].numpy()))
    assert result["log_likelihood"] == pytest.approx(whole.mean(), rel=1e-5)
    assert result["log_loss_of_prior"] == pytest.approx(-(3 * np.log(0.25) + np.log(0.75)) / 4, rel=1e-6)
