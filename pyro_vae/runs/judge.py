"""A small classifier, trained here, that judges decoded images: how clear their class, how far from the data.

Its numbers compare models with each other under the same judge; they are not those of the Inception network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from pyro_vae.data.datasets import Data
from pyro_vae.data.images import ImageData
from pyro_vae.errors import RunError
from pyro_vae.parts.networks import ConvEncoder

FEATURES = 32
"""Width of the layer whose values are compared: few, since a Frechet distance of n images is too high by about
FEATURES^2 / n times their variance."""


class Judge:
    """A convolutional classifier of grey training images, with the features below its last layer.

    Args:
        data: labelled images; the last tenth of the training images is held out to score the classifier.
        num_steps: of its training, on 128 images each.

    Attributes:
        accuracy: share of right answers on the images held out.
        reference: features of up to 10,000 training images ``(N, 32)``, drawn at random: those of the data.
        others: features of as many other training images, at most.

    Raises:
        RunError: if the data have no labels, or as :func:`classes`.
    """

    def __init__(self, data: ImageData, num_steps: int = 1200):
        images, labels = grey(data), classes(data)[0].to(data.device)
        held_out = len(images) // 10
        self.data = data
        encoder = ConvEncoder(images.shape[1], FEATURES, channels=(16, 32), image_shape=data.image_shape)
        self._features = nn.Sequential(encoder, nn.ReLU()).to(images.device)
        self._output = nn.Linear(FEATURES, int(labels.max()) + 1).to(images.device)
        optim = torch.optim.Adam([*self._features.parameters(), *self._output.parameters()], lr=2e-3)
        size = len(images) - held_out
        for _ in trange(num_steps, desc="judge", unit="step"):
            index = torch.randint(size, (128,), device=images.device)
            loss = F.cross_entropy(self._output(self._features(images[index])), labels[index])
            optim.zero_grad()
            loss.backward()
            optim.step()
        wrong = self.classify(images[size:]).argmax(-1) != labels[size:]
        self.accuracy = 1 - wrong.double().mean().item()
        order = torch.randperm(len(images), device=images.device)
        half = min(10_000, len(images) // 2)
        self.reference, self.others = (self.features(images[each]) for each in order[: 2 * half].split(half))

    def features(self, images: Tensor) -> Tensor:
        """Features ``(N, 32)`` of images ``(N, X)`` with intensities in [0, 1]."""
        with torch.no_grad():
            return torch.cat([self._features(part) for part in images.split(1000)])

    def classify(self, images: Tensor) -> Tensor:
        """The probability of each class, ``(N, classes)``."""
        with torch.no_grad():
            return self._output(self.features(images)).softmax(-1)

    def confidence(self, images: Tensor) -> Tensor:
        """The probability of the most probable class of each image, ``(N,)``."""
        return self.classify(images).amax(-1)

    def distance(self, images: Tensor) -> float:
        """Frechet distance of images ``(N, X)`` to the training images, in the classifier's features."""
        return frechet_distance(self.features(images), self.reference)

    def floor(self, size: int) -> float:
        """The distance of ``size`` training images to others: that of a perfect model, not 0 where images are few."""
        return frechet_distance(self.others[:size], self.reference)


def classes(data: Data) -> tuple[Tensor, Tensor]:
    """Labels of training and test images as places 0, 1, .. in the list of classes, ``(N,)`` each, on the CPU.

    Raises:
        RunError: if labels are missing, there are fewer than two classes, or some are in the test set alone.
    """
    if data.train_labels is None or data.test_labels is None:
        raise RunError("the data set has no labels, which this needs of training and test images")
    known, train = data.train_labels.unique(return_inverse=True)
    if len(known) < 2:
        raise RunError("the data set has a single class: there is nothing to tell apart")
    if not torch.isin(data.test_labels, known).all():
        raise RunError("some test images are of classes that no training image has")
    return train, torch.searchsorted(known, data.test_labels)


def grey(data: ImageData) -> Tensor:
    """Training images as intensities in [0, 1], ``(N, X)``: of binary data, the probabilities they are drawn with."""
    return data.train_pixels.float() / data.max_value


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) for the means and covariances of two samples ``(N, F)``.

    The squared Wasserstein distance of two Gaussians (Dowson & Landau 1982), on features of images the "FID" of Heusel
    et al. (2017, equation 6), whose features are those of another network.
    """
    a, b = a.double(), b.double()
    of_a, of_b = torch.cov(a.mT), torch.cov(b.mT)
    values, vectors = torch.linalg.eigh(of_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ of_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + of_a.trace() + of_b.trace() - 2 * cross).item()


def pairs_of_classes(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Places of images, by their labels ``(N,)``, and of as many images of other classes, at random: ``(size,)`` each.

    There are fewer, where images of other classes are rare.
    """
    one, other = torch.randint(len(labels), (2, 4 * size))
    differ = (labels[one] != labels[other]).nonzero().squeeze(1)[:size]
    return one[differ], other[differ]


def nearest(points: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance of each of ``points`` ``(N, D)`` to the nearest of ``known``, and which that is: ``(N,)``."""
    found = [torch.cdist(part, known).min(-1) for part in points.split(100)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
