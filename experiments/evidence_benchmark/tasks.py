"""All tasks of the benchmark by name: ``for task in tasks(): task.model, task.guide, task.data, task.reference``."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from experiments.evidence_benchmark import certified, exact, frozen, planar
from experiments.evidence_benchmark.task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "absolute_value": exact.absolute_value,
    "squares_2d": partial(exact.squares, 2),
    "squares_10d": partial(exact.squares, 10),
    "gamma_poisson": exact.gamma_poisson,
    "horseshoe_collapsed": partial(exact.collapsed, "horseshoe_collapsed", df=1.0, dim=10, scale=0.5),
    "student_t_collapsed": partial(exact.collapsed, "student_t_collapsed", df=2.0, dim=50, scale=1.0),
    "far_guide": exact.far_guide,
    "funnel": exact.funnel,
    "mixture_of_forty_2d": partial(exact.mixture_of_forty, 2),
    "mixture_of_forty_10d": partial(exact.mixture_of_forty, 10),
    "separable_bernoulli_20d": partial(exact.separable_bernoulli, 20),
    "separable_bernoulli_200d": partial(exact.separable_bernoulli, 200),
    "eight_schools": exact.eight_schools,
    "brownian_motion": exact.brownian_motion,
    "brownian_motion_unknown_scales": exact.brownian_motion_of_unknown_scales,
    "stochastic_volatility": certified.stored("stochastic_volatility", certified.stochastic_volatility),
    "logistic_breast_cancer": certified.stored(
        "logistic_breast_cancer", partial(certified.logistic_regression, "breast_cancer")
    ),
    "logistic_wine": certified.stored("logistic_wine", partial(certified.logistic_regression, "wine")),
    "cox_process_8x8": certified.stored("cox_process_8x8", partial(certified.cox_process, 8)),
    "cox_process_10x10": certified.stored("cox_process_10x10", partial(certified.cox_process, 10)),
    "digits_2d": frozen.digits_2d,
    "digits_10d": certified.stored("digits_10d", frozen.digits_10d),
    **{f"planar_{name}": partial(planar.planar, name) for name in planar.PRIORS},
    "planar_two_layers": planar.two_layers,
    **{f"planar_{name}_tripled": partial(planar.planar, name, tripled=True) for name in planar.PRIORS},
    "planar_two_layers_tripled": partial(planar.two_layers, tripled=True),
}
"""What makes each task: a function without arguments, so that only those asked for are made."""


def tasks(names: Sequence[str] | None = None) -> Iterator[Task]:
    """The tasks of these names, made one after the other; None: all.

    Raises:
        KeyError: for a name that is none.
    """
    return (TASKS[name]() for name in (TASKS if names is None else names))
