"""Engines: stochastic variational inference, one gradient step at a time."""

import warnings
from collections.abc import Callable
from typing import Literal, Protocol

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO as PyroELBO
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_vae.log_weights import Program, check_pathwise
from pyro_vae.networks import ContractError
from pyro_vae.objectives import Objective


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; the parameters are as they were before the step."""


class Engine(Protocol):
    """What :func:`pyro_vae.fit` asks of an engine: it is made of ``(model, guide, optim, loss)`` and has ``step``."""

    def step(self, x: Tensor) -> float | Tensor:
        """Take one gradient step on observations ``(B, X)``; return the loss, in the loss's own scale."""


class PyroSVI:
    """The reference engine: ``pyro.infer.SVI`` itself, and by default ``Trace_ELBO``.

    The optimizer's parameters are registered by one ``pyro.module`` per step, inside a parameter store of this
    engine's own. So several engines in a process all learn, and Pyro's global store stays as it was.

    Args:
        model: p(x, z); any Pyro program.
        guide: q(z | x); any Pyro program.
        optim: an optimizer of torch. It holds exactly the tensors that are trained: those of modules, or the
            unconstrained tensors of ``pyro.param`` statements that exist already.
        loss: one of Pyro's ELBOs, whose value and gradient are sums over the batch, or an objective of this
            library, whose are means. Default: ``Trace_ELBO()``.

    Raises:
        NonFiniteError: by ``step``, if a gradient is NaN or infinite; nothing has been updated then.
        ValueError: by ``step``, if the optimizer holds no tensor that the loss depends on.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: torch.optim.Optimizer,
        loss: PyroELBO | Objective | None = None,
    ):
        self.model = model
        self.guide = guide
        self.optim = optim
        self._params = pyro.get_param_store().get_state()
        modules = nn.ParameterList(
            p
            for group in optim.param_groups
            for p in group["params"]
            if isinstance(p, nn.Parameter) and p.requires_grad
        )

        def registered_model(*args, **kwargs):
            pyro.module("trained", modules)
            return model(*args, **kwargs)

        self._svi = SVI(registered_model, guide, _OneOptimizer(optim), loss=loss or Trace_ELBO())

    def step(self, x: Tensor) -> float:
        """Take one gradient step on observations ``x``, shape ``(B, X)``; return the loss in its own scale."""
        with pyro.get_param_store().scope(self._params):
            return self._svi.step(x)

    def evaluate_loss(self, x: Tensor) -> float:
        """The loss on observations ``x``, shape ``(B, X)``, in its own scale, without a step."""
        with pyro.get_param_store().scope(self._params):
            return self._svi.evaluate_loss(x)


class _OneOptimizer(PyroOptim):
    """Lets ``pyro.infer.SVI`` drive one torch optimizer for all parameters, so that schedules and checkpoints are
    those of torch. SVI calls it with the parameters it traced, and zeroes their gradients afterwards."""

    def __init__(self, optim: torch.optim.Optimizer):
        super().__init__(type(optim), {})
        self.optim = optim

    def __call__(self, params, *args, **kwargs) -> None:
        grads = [p.grad for group in self.optim.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            raise ValueError("the optimizer holds no tensor that the loss depends on: nothing would be trained")
        if not torch.nn.utils.get_total_norm(grads).isfinite():
            self.optim.zero_grad()
            raise NonFiniteError("a gradient is NaN or infinite")
        self.optim.step()


MOST_GRAPHS = 16
"""So many graphs of one engine: more shapes or settings than that mean that something changes at every step."""


class CompiledSVI:
    """Stochastic variational inference whose step is one compiled graph; a drop-in for ``pyro.infer.SVI``.

    At the first step, and again for every new shape of the data, loss and gradients are traced together into one graph
    of tensor operations: Pyro's handlers, the programs' Python and the backward pass run then, and never again.
    torch's inductor compiles the graph; each step runs it, clips if asked, and lets the optimizer step. Nothing waits
    for the device: ``step`` returns a tensor, which is read when you need it.

    The programs must have static structure: the same sites and shapes at every step, no Python that depends on the
    values of tensors, and latent sites whose draws are reparametrized. Python numbers are frozen into the graph;
    those of the modules and of the loss are watched, and a change traces anew. What changes often, such as the weight
    of a warm-up, must be a tensor.

    Args:
        model, guide: Pyro programs with the same arguments; see above.
        optim: an optimizer of torch. It holds exactly the tensors that are trained: those of modules and automatic
            guides, or the unconstrained tensors of ``pyro.param`` statements that exist already.
        loss: ``Trace_ELBO`` or ``TraceMeanField_ELBO``, whose value and gradient are sums over the batch, or an
            objective of this library, whose are means. Default: ``Trace_ELBO()``.
        max_norm: the norm of all gradients together is clipped to this, positive; None: not.
        compiler: ``inductor``; ``none`` runs the traced graph as it is: slower, with the random numbers of eager torch.

    Raises:
        TypeError: if the loss is another of Pyro's.
        ContractError: by the first step, if the programs have no static structure or a site cannot be reparametrized.
        ValueError: by ``step``, if the optimizer holds no tensor that the loss depends on, or others than at first.
    """

    def __init__(
        self,
        model: Callable[..., object],
        guide: Callable[..., object],
        optim: torch.optim.Optimizer,
        loss: PyroELBO | Objective | None = None,
        max_norm: float | None = None,
        compiler: Literal["inductor", "none"] = "inductor",
    ):
        loss = loss or Trace_ELBO()
        if isinstance(loss, PyroELBO) and type(loss) not in _BOUNDS:
            names = " and ".join(each.__name__ for each in _BOUNDS)
            raise TypeError(
                f"{type(loss).__name__} cannot be compiled, of Pyro's losses only {names} can: choose one of them, an "
                "objective of pyro_vae, or PyroSVI"
            )
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        if compiler not in ("inductor", "none"):
            raise ValueError(f"compiler must be inductor or none, got {compiler}")
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.max_norm, self.compiler = max_norm, compiler
        self._store = pyro.get_param_store().get_state()
        self._params = _parameters(optim)
        self._graphs: dict[tuple, _Graph] = {}
        self._watched = _numbers(model, guide, loss)

    def step(self, *args: object, **kwargs: object) -> Tensor:
        """Take one gradient step; return the loss in its own scale, a tensor without a graph."""
        if [id(p) for p in _parameters(self.optim)] != [id(p) for p in self._params]:
            raise ValueError("the optimizer holds other tensors than when CompiledSVI was made: make another")
        graph, tensors = self._graph(args, kwargs, train=True)
        loss, *gradients = graph(*tensors)
        for p, gradient in zip(graph.trained, gradients, strict=True):
            p.grad = gradient
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(graph.trained, self.max_norm)
        self.optim.step()
        return loss

    def evaluate_loss(self, *args: object, **kwargs: object) -> Tensor:
        """The loss in its own scale, without a step; a tensor without a graph."""
        graph, tensors = self._graph(args, kwargs, train=False)
        return graph(*tensors)[0]

    def _graph(self, args: tuple, kwargs: dict, train: bool) -> tuple["_Graph", list[Tensor]]:
        leaves, spec = tree_flatten((args, kwargs))
        like = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)
        key = train, spec, like, tuple(holder.get(name) for holder, name in self._watched)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= MOST_GRAPHS:
                raise ContractError(
                    f"{MOST_GRAPHS} graphs have been compiled, for other shapes of the data or other Python numbers: "
                    "give data of few shapes, and make what changes between steps a tensor"
                )
            graph = self._graphs[key] = _Graph(self, leaves, spec, train)
        return graph, [x for x in leaves if isinstance(x, Tensor)]


class _Graph:
    """Loss and gradients for arguments of one shape: traced together, compiled at the first call."""

    def __init__(self, svi: CompiledSVI, leaves: list[object], spec: TreeSpec, train: bool):
        self.trained: list[Tensor] = []
        params = svi._params if train else []

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            args, kwargs = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)
            loss = _loss(svi, args, kwargs)
            if not train:
                return (loss,)
            depends = bool(params) and loss.requires_grad
            gradients = torch.autograd.grad(loss, params, allow_unused=True) if depends else [None] * len(params)
            self.trained = [p for p, gradient in zip(params, gradients, strict=True) if gradient is not None]
            if not self.trained:
                raise ValueError("the optimizer holds no tensor that the loss depends on: nothing would be trained")
            return loss, *(gradient for gradient in gradients if gradient is not None)

        tensors = [x for x in leaves if isinstance(x, Tensor)]
        store = pyro.get_param_store()
        devices = {x.device for x in (*tensors, *svi._params) if x.device.type == "cuda"}
        # the noise of the first step must not depend on its having been traced
        with store.scope(svi._store), torch.random.fork_rng(devices), torch.enable_grad():
            self._try(svi, run, tensors)
            with pyro.validation_enabled(False):
                try:
                    self._traced = make_fx(run)(*tensors)
                except RuntimeError as error:
                    if "tracing tensor" not in str(error):
                        raise
                    raise ContractError(
                        "the programs look at the values of tensors, in an if, a float() or an .item(), which one "
                        "graph cannot hold: write torch.where, or train with PyroSVI"
                    ) from error
        self._compiled = self._traced
        if svi.compiler == "inductor":
            validation = Distribution._validate_args
            self._compiled = torch.compile(self._traced, fullgraph=True)
            Distribution._validate_args = validation  # torch.compile switches it off for the whole process

    def _try(self, svi: CompiledSVI, run: Callable, tensors: list[Tensor]) -> None:
        """An ordinary run first: its errors are easier to read than those of a trace."""
        store = pyro.get_param_store()
        known = set(store.keys())
        run(*tensors)
        held = {id(p) for p in svi._params}
        for name in set(store.keys()) - known:
            value = store._params[name]
            if not isinstance(value, nn.Parameter) and id(value) not in held:
                raise ValueError(
                    f"pyro.param '{name}' came into being at the first step, so that the optimizer does not hold it: "
                    "run the programs once, and then make optimizer and CompiledSVI"
                )

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            if self._compiled is self._traced:
                return self._traced(*tensors)
            try:
                return self._compiled(*tensors)
            except Exception as error:
                if not _has_no_compiler(error):
                    raise
                warnings.warn(
                    "inductor finds no C++ compiler: steps run uncompiled, and slower; install g++ or clang",
                    stacklevel=3,
                )
                self._compiled = self._traced
                return self._traced(*tensors)


def _has_no_compiler(error: BaseException | None) -> bool:
    while error is not None:
        if type(error).__name__ == "InvalidCxxCompiler":
            return True
        error = error.__cause__ or error.__context__ if not hasattr(error, "inner_exception") else error.inner_exception
    return False


def _parameters(optim: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optim.param_groups for p in group["params"] if p.requires_grad]


def _numbers(*roots: object) -> list[tuple[dict, str]]:
    """Where the Python numbers are that modules, losses and other objects hold as attributes, and the text."""
    holders: dict[int, dict] = {}
    for root in roots:
        root = getattr(root, "__self__", root)
        for each in root.modules() if isinstance(root, nn.Module) else [root]:
            if hasattr(each, "__dict__"):
                holders[id(each)] = vars(each)
    plain = (bool, int, float, str)
    return [(holder, name) for holder in holders.values() for name, value in holder.items() if type(value) in plain]


def _loss(svi: CompiledSVI, args: tuple, kwargs: dict) -> Tensor:
    if not isinstance(svi.loss, PyroELBO):
        return svi.loss(svi.model, svi.guide, *args, **kwargs)
    bound, total = _BOUNDS[type(svi.loss)], 0.0
    for model_trace, guide_trace in svi.loss._get_traces(svi.model, svi.guide, args, kwargs):
        check_pathwise(guide_trace)
        total = total - bound(model_trace, guide_trace) / svi.loss.num_particles
    return total


def _sampled_bound(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """What ``Trace_ELBO`` differentiates if every site is reparametrized, without its waiting for the device."""
    log_p = sum(site["log_prob_sum"] for site in model_trace.nodes.values() if site["type"] == "sample")
    return log_p - sum(site["log_prob_sum"] for site in guide_trace.nodes.values() if site["type"] == "sample")


def _closed_form_bound(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
    """What ``TraceMeanField_ELBO`` differentiates: KL in closed form where it is known, else sampled."""
    bound = 0.0
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        guide_site = guide_trace.nodes.get(name)
        if site["is_observed"] or guide_site is None:
            bound = bound + site["log_prob_sum"]
            continue
        try:
            kl = kl_divergence(guide_site["fn"], site["fn"])
        except NotImplementedError:
            bound = bound + site["log_prob_sum"] - guide_site["log_prob_sum"]
        else:
            bound = bound - scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"]).sum()
    auxiliary = (s for n, s in guide_trace.nodes.items() if s["type"] == "sample" and n not in model_trace.nodes)
    return bound - sum(site["log_prob_sum"] for site in auxiliary)


_BOUNDS = {Trace_ELBO: _sampled_bound, TraceMeanField_ELBO: _closed_form_bound}
