"""Exports: programs without pyro_vae have the numbers of the model, and what is no such program is refused by name."""

import json
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae import (
    MLP,
    VAE,
    Conditional,
    ConditionalVAE,
    Gaussian,
    MeanField,
    Network,
    StandardNormal,
    TwoLayerVAE,
    cli,
    runs,
)
from pyro_vae.data import Digits
from pyro_vae.data.datasets import Column, Schema
from pyro_vae.data.incoming import conditions
from pyro_vae.errors import MissingExtra, RunError
from pyro_vae.parts import distributions as own
from pyro_vae.parts import likelihoods, posteriors, priors
from pyro_vae.parts.pixels import PixelDecoder
from pyro_vae.runs import exporting
from pyro_vae.runs.exporting import formats
from pyro_vae.runs.exporting.described import described, mean_of
from pyro_vae.runs.exporting.noise import Noise, NotExportable, drawn
from pyro_vae.runs.exporting.programs import Decoder, Encoder, Sampler, encoded, stored

MINUTE = [
    *(
        "--dataset=Digits",
        "--engine=pyro",
        "--epochs=1",
        "--encoder.hidden=[4]",
        "--decoder.hidden=[4]",
        "--latent_dim=2",
    ),
    *("--evidence.num_samples=5", "--evidence.num_images=2", "--evidence.annealed_images=0", "--device=cpu"),
]
ROWS = 4000


def rows(*values):
    """Parameters of so many rows alike, with what is given along the last dimension."""
    return torch.tensor(values).expand(ROWS, len(values))


def table_of(order):
    numbers = own.Scaled(dist.Normal(rows(0.5), rows(2.0)), torch.tensor([100.0]), torch.tensor([10.0]))
    return own.Columns([numbers, dist.Bernoulli(logits=rows(0.3))], torch.tensor(order)).to_event(1)


DISTRIBUTIONS = {
    "Normal": lambda: dist.Normal(rows(1.0, -2.0), rows(0.5, 3.0)).to_event(1),
    "LogNormal": lambda: dist.LogNormal(rows(0.3), rows(0.5)).to_event(1),
    "FullRank": lambda: posteriors.FullRank(2)(rows(0.3, -1.0), rows(0.2, -0.4), rows(0.7)),
    "LowRank": lambda: posteriors.LowRank(2, 1)(rows(0.3, -1.0), rows(0.2, -0.4), rows(0.7, -0.9)),
    "Flow": lambda: posteriors.Flow(2, transform="spline")(rows(0.3, -1.0), rows(0.2, -0.4), rows(*[0.5] * 32)),
    "Laplace": lambda: dist.Laplace(rows(1.0), rows(2.0)).to_event(1),
    "StudentT": lambda: dist.StudentT(rows(4.0), rows(1.0), rows(2.0)).to_event(1),
    "GaussianMixture": lambda: priors.GaussianMixture(2, 3)().expand((ROWS,)),
    "Mixture of flows": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        posteriors.Flow(2)(*(torch.randn(2, n) for n in (2, 2, 32))),
    ).expand((ROWS,)),
    "in a cube": lambda: dist.TransformedDistribution(
        dist.Normal(rows(0.0), rows(1.0)).to_event(1), [dist.transforms.SigmoidTransform()]
    ),
    "Bernoulli": lambda: likelihoods.Bernoulli(2)(rows(1.0, -0.5)),
    "Categorical": lambda: likelihoods.Categorical(2, 3)(rows(0.3, 1.0, -0.4, 0.2, 0.0, -1.0)),
    "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli(2)(rows(3.0, -0.5)),
    "DiscretizedLogistic": lambda: likelihoods.DiscretizedLogistic(1, 9, components=2)(
        rows(0.3, -0.2), rows(0.1, 0.4), rows(0.2, 0.5)
    ),
    "a table": lambda: table_of([1, 0]),
}


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_draws_of_noise_have_their_distribution(make):
    with torch.no_grad():
        made = make()
        noise = Noise(ROWS)
        found, wanted = drawn(made, noise), made.sample()
        assert torch.equal(drawn(made, Noise(0, **noise.whole())), found)  # the same noise, the same draw
    assert found.shape == wanted.shape
    for ours, theirs in zip([*found.mT, found.sum(1)], [*wanted.mT, wanted.sum(1)], strict=True):  # and dependence
        assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-4
    tensors, tree = described(made, "x")
    assert tree["family"]
    assert tensors
    assert all(len(each) == ROWS for each in tensors.values())


def test_draws_of_no_number_are_none():
    nothing = rows(torch.nan, torch.nan)
    with pyro.validation_enabled(False):
        for made in (likelihoods.Bernoulli(2)(nothing), likelihoods.Categorical(1, 2)(nothing)):
            assert drawn(made, Noise(ROWS)).isnan().all()


def test_what_is_no_function_of_noise_is_named():
    class Shifted(dist.Normal):
        def sample(self, *args, **kwargs):
            return super().sample(*args, **kwargs) + 1

    for made, name in (
        (dist.Poisson(rows(2.0)).to_event(1), "Poisson"),
        (dist.Beta(rows(2.0), rows(1.0)).to_event(1), "Beta"),
        (Shifted(rows(0.0), rows(1.0)).to_event(1), "Shifted"),
    ):
        with pytest.raises(NotExportable, match=f"draws of {name} are no function"):
            drawn(made, Noise(ROWS))


def test_parameters_are_in_the_units_of_the_data():
    tensors, tree = described(table_of([1, 0]), "x")
    assert tensors["x_part0_loc"][0].item() == 105
    assert tensors["x_part0_scale"][0].item() == 20
    assert tree["parts"][0]["family"] == "Normal"
    assert tree["parts"][0]["entries"].tolist() == [1]
    _, tree = described(likelihoods.Categorical(2, 3)(rows(*[0.0] * 6)), "x")
    assert tree == {"family": "Categorical", "parameters": {"logits": "x_logits"}}
    mean = mean_of(table_of([1, 0]), torch.tensor([True, False]))
    assert mean[0].tolist() == [1.0, 105.0]  # the most probable of two values, and a mean


def told(prior=None):
    return ConditionalVAE(
        StandardNormal(2) if prior is None else prior,
        Conditional(MLP(2 + 3, 6, [4]), likelihoods.Bernoulli(6)),
        Conditional(MLP(6 + 3, 4, [4]), MeanField(2)),
        condition_dim=3,
    ).eval()


SCHEMA = Schema(
    (6,), "row", condition=(Column("kind", "categorical", ("a", "b")), Column("age", "real", (), 40.0, 8.0))
)


def test_programs_have_the_numbers_of_the_models_own_distributions():
    vae, given = told(), {"kind": ["b", "a", "b"], "age": [40.0, 48.0, 30.0]}
    with torch.no_grad():
        x, c = torch.bernoulli(torch.full((3, 6), 0.5)), torch.tensor([[1.0, 40], [0, 48], [1, 30]])
        own_c = conditions(
            {name: torch.tensor(each) if name == "age" else each for name, each in given.items()}, 3, SCHEMA
        )
        noise = torch.randn(3, 2)
        found = Encoder(vae, SCHEMA, ["x", "c", "normal"])(x, c, noise)
        q = vae.posterior_given(x, own_c).base_dist
        torch.testing.assert_close(found, {"z_loc": q.loc, "z_scale": q.scale, "z": q.loc + q.scale * noise})
        p = vae.likelihood_given(found["z"], own_c)
        made = Decoder(vae, SCHEMA, ["z", "c"])(found["z"], c)
        torch.testing.assert_close(made, {"x_logits": p.logits, "mean": p.mean})
        u = torch.rand(3, 6)
        drawn_x = Sampler(vae, SCHEMA, ["c", "normal", "uniform"])(c, noise, u)
        p = vae.likelihood_given(noise, own_c)
        torch.testing.assert_close(drawn_x, {"z": noise, "x": (u < p.mean).float(), "mean": p.mean})
        lost = Sampler(vae, SCHEMA, ["c", "normal", "uniform"])(torch.tensor([[7.0, 40]]), noise[:1], u[:1])
        assert lost["x"].isnan().all()  # of a category that there is not
        assert lost["mean"].isnan().all()


def test_conditions_are_read_as_they_are_stored():
    c = torch.tensor([[1.0, 40], [0, 48]])
    inside = encoded(c, SCHEMA.condition)
    assert inside.tolist() == [[0, 1, 0], [1, 0, 1]]
    torch.testing.assert_close(stored(inside, SCHEMA.condition), c)
    assert encoded(torch.tensor([[2.0, 40]]), SCHEMA.condition)[0, :2].isnan().all()  # and never a silent zero


def test_nan_was_not_seen():
    x = torch.rand(3, 4)
    vae = VAE(StandardNormal(2), Conditional(MLP(2, 4, [3]), Gaussian(4)), Conditional(MLP(4, 4, [3]), MeanField(2)))
    vae.posterior.initialize(5 + 2 * torch.randn(50, 4), vae.likelihood.head)
    seen = torch.tensor([[True, False, True, True]]).expand(3, 4)
    with torch.no_grad():
        found = Encoder(vae.eval(), Schema((4,), "row"), ["x", "normal"])(
            torch.where(seen, x, torch.nan), torch.zeros(3, 2)
        )["z_loc"]
        neutral = torch.where(seen, x, vae.posterior.inputs.neutral)
        torch.testing.assert_close(found, vae.posterior(neutral).mean)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "run"
    cli.train([*MINUTE, f"--run_dir={path}"])
    return runs.load(path)


def replaced(run, **parts):
    """The run, with other parts in its model."""
    vae = VAE(run.model.prior, run.model.likelihood, run.model.posterior)
    for name, part in parts.items():
        setattr(vae, name, part)
    other = runs.Run(run.path, run.result, run.evidence)
    other.__dict__["model"] = vae.eval()
    return other


class Stubborn(Network):
    def forward(self, features):
        return features[..., : self.out_features] * (2.0 if features.sum().item() > 0 else 1.0)


class Noisy(Network):
    def forward(self, features):
        return features[..., : self.out_features] + torch.randn_like(features[..., : self.out_features])


@pytest.mark.parametrize(
    ("parts", "chosen", "words"),
    [
        (
            {"likelihood": Conditional(MLP(2, 64, [2]), likelihoods.Poisson(64))},
            ("sampler",),
            "the sampler cannot be exported: draws of Poisson are no function of a fixed number of random numbers",
        ),
        (
            {"likelihood": Conditional(MLP(2, 128, [2]), PixelDecoder(64, 2, channels=2, context=1))},
            ("decoder", "encoder"),
            "the decoder cannot be exported: PixelDecoder: each entry depends on those before it.* '.encoder.' leaves",
        ),
        pytest.param(
            {"posterior": Conditional(Stubborn(64, 4), MeanField(2))},
            ("encoder",),
            "the encoder cannot be exported: Stubborn cannot be traced: ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"posterior": Conditional(Noisy(64, 4), MeanField(2))},
            ("encoder",),
            "the encoder cannot be exported: random numbers are drawn inside, by .*randn",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["Poisson", "PixelDecoder", "Stubborn", "Noisy"],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(run, tmp_path, parts, chosen, words):
    with pytest.raises(RunError, match=words) as caught:
        runs.export(replaced(run, **parts), tmp_path / "out", "torch", chosen)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_settings_are_refused_before_any_work(run, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    for wrong, words in (
        ({"out": tmp_path}, "exists and is never overwritten: choose another directory by --out"),
        ({"parts": ()}, "--parts must be different ones of encoder, decoder, sampler"),
        ({"tolerance": 0.0}, "--tolerance must be positive"),
        ({"format": "tflite"}, "--format: expected one of 'onnx', 'torch', got 'tflite'"),
        ({"license": "do what you want"}, "--license: expected an identifier"),
        ({"trust": "no"}, "trust must be True or False"),
    ):
        with pytest.raises(RunError, match=words):
            runs.export(run, **{"out": tmp_path / "out", "format": "torch"} | wrong)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]
    monkeypatch.setattr("pyro_vae.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install -e '\.\[export\]' in its checkout"):
        runs.export(run, tmp_path / "out")


ALONE = """
import json, sys
for name in ("pyro_vae", "pyro", "zuko"):
    sys.modules[name] = None
import torch
place = sys.argv[1]
manifest = json.load(open(f"{place}/manifest.json"))
torch.manual_seed(0)
found = {}
for name, told in manifest["programs"].items():
    program = torch.export.load(f"{place}/{told['file']}").module()
    inputs = [torch.rand(3, *each["shape"][1:]).round() for each in told["inputs"]]
    found[name] = {each: value.tolist() for each, value in program(*inputs).items()}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_programs_of_torch_run_where_there_is_no_pyro_vae(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Digits, "read", None)  # nor are the data here
    fresh = runs.load(run.path)
    monkeypatch.setattr(Digits, "load", lambda *_: (_ for _ in ()).throw(exporting.RunError("they are on the moon")))
    done = runs.export(fresh, tmp_path / "out", "torch", license="MIT")
    assert "drawn by the model (its data are not here: they are on the moon)" in done.text
    assert {each.name for each in done.path.iterdir()} == {
        *("encoder.pt2", "decoder.pt2", "sampler.pt2", "manifest.json", "README.md")
    }
    ran = subprocess.run([sys.executable, "-c", ALONE, done.path], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    torch.manual_seed(0)
    vae, x = run.model, torch.rand(3, 64).round()
    with torch.no_grad():
        q, noise = vae.posterior(x).base_dist, torch.rand(3, 2).round()
        z = torch.rand(3, 2).round()
        p = vae.likelihood(z)
    torch.testing.assert_close(torch.tensor(found["encoder"]["z"]), q.loc + q.scale * noise)
    torch.testing.assert_close(torch.tensor(found["decoder"]["x_logits"]), p.logits)
    torch.testing.assert_close(torch.tensor(found["decoder"]["mean"]), p.mean)
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["observations"]["encoding"] == "0 or 1: 1 with probability p / 16"
    assert manifest["log_likelihood"]["unit"] == "nats per image, mass"
    card = (done.path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "| decoder.pt2 | z (batch, 2) | x\\_logits (batch, 64), mean (batch, 64) |" in card


@pytest.mark.slow
def test_onnxruntime_has_the_numbers_of_the_model(run, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    cli.export([str(run.path), f"--out={tmp_path}/out"])
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert all(each["compared"]["largest_difference"] < 1e-5 for each in manifest["programs"].values())
    assert manifest["programs"]["encoder"]["compared"]["on"] == "256 test images of the run"
    x, noise = run.data.test[:7], torch.randn(7, 2)
    session = runtime.InferenceSession(tmp_path / "out/encoder.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy(), "normal": noise.numpy()})
    with torch.no_grad():
        q = run.model.posterior(x).base_dist
    for ours, wanted in zip(found, (q.loc, q.scale, q.loc + q.scale * noise), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), wanted, rtol=1e-5, atol=1e-5)
    for name in ("encoder", "decoder", "sampler"):  # no path of this machine
        assert str(run.path).encode() not in (tmp_path / f"out/{name}.onnx").read_bytes()
        assert b"site-packages" not in (tmp_path / f"out/{name}.onnx").read_bytes()


@pytest.mark.slow
def test_the_decoder_asks_only_for_what_it_needs(run, tmp_path):
    parts = [MLP(2, 4, [3]), MLP(2, 64, [3]), MLP(64, 4, [3]), MLP(2, 4, [3])]
    latent, posterior, top = (Conditional(parts[i], MeanField(2)) for i in (0, 2, 3))
    likelihood = Conditional(parts[1], likelihoods.Bernoulli(64))
    other = runs.Run(run.path, run.result, run.evidence)
    other.__dict__["model"] = TwoLayerVAE(StandardNormal(2), latent, likelihood, posterior, top).eval()
    done = runs.export(other, tmp_path / "out", "torch", ["decoder"])
    assert [each["name"] for each in done.manifest["programs"]["decoder"]["inputs"]] == ["z1"]
    weights = torch.export.load(done.path / "decoder.pt2").state_dict  # its own alone
    assert {each.shape for each in weights.values()} == {(3, 2), (3,), (64, 3), (64,)}


@pytest.mark.slow
def test_a_part_that_is_not_told_the_condition_has_no_input_for_it():
    vae = ConditionalVAE(
        Conditional(MLP(3, 4, [3]), MeanField(2)),
        Conditional(MLP(2, 6, [3]), likelihoods.Bernoulli(6)),
        Conditional(MLP(6, 4, [3]), MeanField(2)),
        condition_dim=3,
    ).eval()
    x, c, noise = torch.zeros(5, 6), torch.zeros(5, 2), torch.zeros(5, 2)
    names = ["x", "c", "normal"]
    assert formats.unused(formats.traced(Encoder(vae, SCHEMA, names), (x, c, noise)), names) == ["c"]
    names = ["c", "normal", "uniform"]
    assert formats.unused(formats.traced(Sampler(vae, SCHEMA, names), (c, noise, x)), names) == []


def test_a_program_that_differs_is_refused(run, tmp_path, monkeypatch):
    def wrong(program, inputs, outputs, path):
        path.write_text("")

    def call(path, names):
        return lambda *inputs: {name: torch.full_like(inputs[0], 0.1)[:, :2] for name in names}

    monkeypatch.setattr(exporting, "traced", lambda *_: None)
    monkeypatch.setattr(exporting, "unused", lambda *_: [])
    monkeypatch.setattr(exporting, "saved", wrong)
    monkeypatch.setattr(exporting, "opened", call)
    with pytest.raises(RunError, match=r"its z\w* differs from the model's by \S+, more than --tolerance 1e-05"):
        runs.export(run, tmp_path / "out", "torch", ["encoder"])
    assert not list(tmp_path.iterdir())


def test_differences():
    assert formats.difference(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])) == 0
    assert formats.difference(torch.tensor([1001.0]), torch.tensor([1000.0])) == pytest.approx(1e-3)
    assert formats.difference(torch.tensor([torch.nan]), torch.tensor([1.0])) == float("inf")
    assert formats.difference(torch.zeros(2), torch.zeros(3)) == float("inf")
