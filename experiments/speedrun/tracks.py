"""Tracks of the speedrun, what belongs to each, and the boards on which records stand."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import yaml

from pyro_vae import MLP, Bernoulli, MeanField, StandardNormal, runs
from pyro_vae.data.datasets import Pixels, Schema
from pyro_vae.data.fetched import MNIST
from pyro_vae.optimizers import make_optimizer
from pyro_vae.runs.build import Model
from pyro_vae.runs.reading import yaml_of
from pyro_vae.runs.training import optimizer_of

RECIPES = Path(__file__).parents[1] / "recipes"
"""Where recipes are that may enter the table."""
PIXELS = Pixels("dynamic", 777, 255)
SCHEMA = Schema((1, 28, 28), pixels=PIXELS)
TEST_SET = "6ad91318c645a65d"
"""The hash of the 10,000 test images of dynamic MNIST, drawn once: what every record is scored on."""
CUSTOMARY = 5000
"""Importance samples of the IWAE paper."""
LEAST_KL = 5.0
"""Nats that the latents of a VAE must carry: an autoregressive decoder can do without them."""
WIDTHS = (200, 200)
NEVER_PART = ("seed", "device", "data_dir", "evidence")
"""Settings that do not make another recipe: how a model is scored, and where and from which seed it is trained."""

Name = Literal["A", "B", "C"]


@dataclass(frozen=True)
class Board:
    """Where one record at a time stands.

    Args:
        name: what it is called in the table.
        track: whose recipes may enter.
        target: log p(x) to be reached, in nats per image: the fewest seconds win. None: the highest value wins.
        limit: seconds that a training may take, where there is no target.
        estimator: of log p(x).
        least_seeds: trainings that an entry takes.
    """

    name: str
    track: Name
    target: float | None = None
    limit: float | None = None
    estimator: Literal["annealed", "importance"] = "annealed"
    least_seeds: int = 3


BOARDS = (
    Board("A, to -88.00", "A", target=-88.0),
    Board("A, to -87.00", "A", target=-87.0),
    Board("A, to -86.76 by IS-5,000", "A", target=-86.76, estimator="importance"),
    Board("B, 3 minutes", "B", limit=180),
    Board("B, 20 minutes", "B", limit=1200),
    Board("C, 20 minutes", "C", limit=1200, least_seeds=1),
    Board("C, 150 minutes", "C", limit=9000, least_seeds=1),
)
"""-86.76 is the value of the IWAE paper's VAE with one layer (Burda et al. 2016, table 1), by 5,000 samples."""


@dataclass(frozen=True)
class Recipe:
    """A way to train, as ``pyro-vae train --config`` takes it.

    Args:
        path: of the YAML file.
        settings: what is in it.
        text: the same, as a run's config.yaml has it.
        tracks: to which it belongs, those of them that were asked for.
    """

    path: Path
    settings: runs.Settings
    text: str
    tracks: tuple[Name, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def fingerprint(self) -> str:
        """A short hash of what makes the recipe, however its file spells it."""
        return fingerprint(yaml.safe_load(self.text))

    @property
    def is_kept(self) -> bool:
        """Whether it is one of those that may enter the table."""
        return self.path.resolve().parent == RECIPES.resolve()


def fingerprint(settings: dict) -> str:
    """A short hash of settings, of which a run's ``config.yaml`` has the same as its recipe."""
    kept = {name: value for name, value in settings.items() if name not in NEVER_PART}
    return hashlib.sha256(yaml.safe_dump(kept, sort_keys=True).encode()).hexdigest()[:16]


def recipes(names: Sequence[str], tracks: Sequence[Name] | None) -> list[Recipe]:
    """The recipes of these names or paths; none: all that are kept.

    Args:
        names: of files in experiments/recipes, without their ending, or paths of others.
        tracks: to each of which every recipe must belong; None: all to which it does; none: nothing is checked but that
            it is a recipe.

    Raises:
        RunError: in one line, for a file that is none, a recipe of no such track, and an optimizer without a step of
            its own.
    """
    paths = [_path(name) for name in names] or sorted(RECIPES.glob("*.yaml"))
    if not paths:
        raise runs.RunError(f"--recipes: there is none in {RECIPES}")
    slugs = [runs.slug(path.stem) for path in paths]
    if twice := next((slug for slug in slugs if slugs.count(slug) > 1), None):
        raise runs.RunError(f"--recipes: {twice} is named twice, and its name is that of its directories")
    return [_read(path, tracks) for path in paths]


def _path(name: str) -> Path:
    """The file of a recipe, by name or by path."""
    known = RECIPES / f"{name}.yaml"
    path = known if known.exists() else Path(name)
    if not path.is_file():
        others = ", ".join(sorted(each.stem for each in RECIPES.glob("*.yaml")))
        raise runs.RunError(f"--recipes: {name} is neither a file nor one of {others or 'experiments/recipes'}")
    return path


def _read(path: Path, tracks: Sequence[Name] | None) -> Recipe:
    try:
        if not isinstance(yaml_of(path), dict):
            raise runs.RunError("it holds no settings")
        settings, text = runs.parse(runs.Settings, [f"--config={path}"])
        reasons = reasons_against(settings) if tracks is None or tracks else {}
    except (runs.RunError, UnicodeDecodeError) as error:
        raise runs.RunError(f"--recipes: {path} is no recipe: {error}") from error
    if tracks is None and all(reasons.values()):
        told = f"{path.stem} is of no track: {reasons['C']}; to look at it, without records: --tracks '[]'"
        raise runs.RunError(f"--recipes: {told}")
    for track in tracks or ():
        if (reason := reasons[track]) is not None:
            raise runs.RunError(f"--recipes: {path.stem} is not of track {track}: {reason}")
    if tracks is None:
        tracks = [track for track, reason in reasons.items() if reason is None]
    return Recipe(path, settings, text, tuple(tracks))


def reasons_against(settings: runs.Settings) -> dict[Name, str | None]:
    """Why settings are of no track, for each; None where they are.

    Raises:
        RunError: if there is no such model, or its optimizer needs a closure.
    """
    if reason := _of_all(settings):
        return {"A": reason, "B": reason, "C": reason}
    model = model_of(settings)
    head = type(model.likelihood.head)
    factorized = None if head is Bernoulli else f"given z, pixels of {head.__name__} are not independent Bernoulli ones"
    return {"A": factorized or _of_the_paper(settings, model), "B": factorized, "C": None}


def model_of(settings: runs.Settings, schema: Schema = SCHEMA) -> Model:
    """The untrained model of a recipe, for data of this schema; no random number is consumed.

    Raises:
        RunError: if it cannot be built, or its objective, or its optimizer needs a closure.
    """
    with torch.random.fork_rng([]):
        model = runs.build(settings, schema)
        parameters = list(model.parameters())
        runs.make("optimizer", make_optimizer, optimizer_of(settings), parameters, settings.lr)
        runs.make("objective", settings.objective)
    return model


def _of_all(settings: runs.Settings) -> str | None:
    """Why the log p(x) of a recipe is not that of the tracks."""
    dataset = runs.make("dataset", settings.dataset, Path())
    if type(dataset) is not MNIST:
        return f"tracks are on MNIST, it trains on {type(dataset).__name__}"
    if dataset.binarization != "dynamic":
        return f"tracks are on dynamic MNIST, it trains on --dataset.binarization {dataset.binarization}"
    if dataset.binarization_seed != PIXELS.seed:
        return f"tracks score the test images of --dataset.binarization_seed {PIXELS.seed}"
    if settings.condition is not None:
        return "tracks are of log p(x), its --condition makes it log p(x given c)"
    if settings.evidence.num_images is not None:
        return "tracks score all 10,000 test images, leave out --evidence.num_images"
    if settings.evidence.annealed_images == 0:
        return "tracks are of annealed log p(x), and --evidence.annealed_images is 0"
    return None


def _of_the_paper(settings: runs.Settings, model: Model) -> str | None:
    """Why a model is not the one-layer network of the IWAE paper; the nonlinearity is free."""
    latent_dim, sizes = 50, (784, *WIDTHS)
    if settings.model != "VAE":
        return f"it has one stochastic layer, not --model {settings.model}"
    parts = {"prior": (model.prior, StandardNormal), "posterior": (model.posterior.head, MeanField)}
    parts |= {"encoder": (model.posterior.network, MLP), "decoder": (model.likelihood.network, MLP)}
    for option, (part, wanted) in parts.items():
        if type(part) is not wanted:
            return f"--{option} is {wanted.__name__} there, not {type(part).__name__}"
    if settings.latent_dim != latent_dim:
        return f"--latent_dim is {latent_dim} there, not {settings.latent_dim}"
    for option, ends, network in (
        ("encoder", (*sizes, 2 * latent_dim), model.posterior.network),
        ("decoder", (latent_dim, *reversed(sizes)), model.likelihood.network),
    ):
        layers = [shape for m, n in pairwise(ends) for shape in ((n, m), (n,))]
        if sorted(layers) != sorted(tuple(each.shape) for each in network.parameters()):
            return f"--{option}.hidden is {list(WIDTHS)} there, and no layer is more than affine"
    return None
