"""p(c | x) of classes c, by Bayes' rule from log p(x | c): a generative classifier with an error."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_vae.errors import ContractError
from pyro_vae.infer.evidence.annealed import annealed_importance_sampling
from pyro_vae.infer.evidence.result import Evidence, pick
from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import Data, data_size, with_arguments


class ClassPosterior(NamedTuple):
    """p(c | x) of B observations and L classes.

    Attributes:
        log_prob: log p(c | x), shape ``(B, L)``; their exponentials add up to one.
        mc_se: its standard error, nats, shape ``(B, L)``; of a probability p it is p times that.
        reliable: whether all log p(x | c) of an observation are, shape ``(B,)``.
        evidence: log p(x | c), of each class.
    """

    log_prob: Tensor
    mc_se: Tensor
    reliable: Tensor
    evidence: tuple[Evidence, ...]

    @property
    def predicted(self) -> Tensor:
        """The number of the most probable class, shape ``(B,)``."""
        return self.log_prob.argmax(-1)


def class_posterior(
    model: Program,
    guide: Program,
    data: Data,
    classes: Tensor,
    prior: Tensor | None = None,
    estimate: Callable[[Program, Program, Data], Evidence] = annealed_importance_sampling,
    name: str = "c",
) -> ClassPosterior:
    """p(c | x) = p(x | c) p(c) / sum_c' p(x | c') p(c') for each observation x and each class c.

    The errors s_c of log p(x | c) are carried over by the delta method: the variance of log p(c | x) is
    sum_k (1[k = c] - p(k | x))^2 s_k^2.

    Args:
        model, guide: called with ``data``, and with the condition as another argument, ``name``; as a
            :class:`pyro_vae.ConditionalVAE` is.
        data: see :func:`pyro_vae.traces`, without the condition.
        classes: the condition of each class, shape ``(L, *)``, such as ``torch.eye(10)``; L at least 2.
        prior: p(c), positive, shape ``(L,)``, or ``(B, L)``; what it sums to does not matter. None: all alike.
        estimate: of log p(x | c), called as ``estimate(model, guide, data)``.
        name: of the argument.

    Raises:
        ValueError: if there are fewer than two classes, or the prior is not positive or of another shape.
        ContractError: as the estimator, and if an estimate is NaN, or p(x | c) zero of all classes.
    """
    size, count = data_size(data), len(classes) if classes.dim() else 0
    if count < 2:
        raise ValueError(f"classes must be the conditions of at least 2 classes, it is of shape {tuple(classes.shape)}")
    weight = torch.ones(count) if prior is None else prior
    if weight.shape not in ((count,), (size, count)) or not (weight > 0).all():
        raise ValueError(
            f"prior must be positive numbers of shape {(count,)} or {(size, count)}, got {tuple(weight.shape)}"
        )
    repeated = tree_map(lambda leaf: leaf.repeat(count, *[1] * (leaf.dim() - 1)), data)
    conditions = classes.repeat_interleave(size, 0)
    evidence = estimate(model, guide, with_arguments(repeated, **{name: conditions}))
    places = torch.arange(count * size, device=evidence.log_px.device).view(count, size)
    of_class = tuple(pick(evidence, among) for among in places)
    log_joint = evidence.log_px.view(count, size).T + weight.to(evidence.log_px).log()
    if not (total := log_joint.logsumexp(-1)).isfinite().all():
        row = int((~total.isfinite()).nonzero()[0])
        raise ContractError(f"log p(x) of row {row} is not finite under the classes: it is {log_joint[row].tolist()}")
    log_prob = log_joint - total.unsqueeze(-1)
    share = torch.eye(count).to(log_prob) - log_prob.exp().unsqueeze(-2)  # (B, c, k)
    mc_se = (share.square() * evidence.mc_se.view(count, size).T.unsqueeze(-2).square()).sum(-1).sqrt()
    reliable = cast(Tensor, evidence.reliable).view(count, size).all(0)
    return ClassPosterior(log_prob, mc_se, reliable, of_class)
