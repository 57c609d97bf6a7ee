"""A step of stochastic variational inference as Pyro takes it, in its two halves: differentiate, and update."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from operator import is_
from typing import Any, Literal, NamedTuple, cast

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import PyroOptim
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._pytree import tree_map_only

from pyro_vae.errors import NonFiniteError
from pyro_vae.infer.compiling import RoundedProducts
from pyro_vae.infer.holding import PLAIN
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.tracing import Collected
from pyro_vae.infer.trees import as_data
from pyro_vae.infer.updates import update

_PLAIN_FORM: dict[type, type] = {
    JitTrace_ELBO: Trace_ELBO,
    JitTraceEnum_ELBO: TraceEnum_ELBO,
    JitTraceGraph_ELBO: TraceGraph_ELBO,
    JitTraceMeanField_ELBO: TraceMeanField_ELBO,
}
_HELD = "_held_by_an_optimizer_of_torch"

Loss = PyroELBO | Objective | Callable[..., Any]
Reduce = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Sequence[Tensor | None]]
"""``reduce(parameters, gradients)`` gives the gradients that are used instead; None where a parameter has none."""


class Derivatives(NamedTuple):
    """What half a step gives.

    Attributes:
        loss: tensor or number, or a tuple of them.
        params: the unconstrained tensors of the ``param`` sites that programs met, by name.
        gradients: pairs of a tensor and its gradient; empty if Pyro's backward pass has left them in ``grad``.
    """

    loss: Any
    params: dict[str, Tensor]
    gradients: list[tuple[Tensor, Tensor]]


class Steps:
    """The halves of a step for one pair of programs, one optimizer, and one loss.

    With an optimizer of ``pyro.optim`` the tensors of the ``param`` sites that a step meets are updated, as
    ``pyro.infer.SVI`` does; with one of torch those that it holds, whether Pyro knows them or not.

    Args:
        model, guide, optim, loss: as :class:`pyro_vae.CompiledSVI` takes them.
        max_norm: the norm of all gradients together is clipped to this; None: not.
        precision: of matrix products and convolutions.
        loss_and_grads: in place of a loss that is a function; it calls ``backward`` itself.

    Raises:
        TypeError: if optimizer or loss is none, or steps with a closure.
        ValueError: if ``max_norm`` is not positive.
    """

    def __init__(
        self,
        model: Callable[..., object],
        guide: Callable[..., object],
        optim: PyroOptim | torch.optim.Optimizer,
        loss: Loss | None,
        max_norm: float | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        loss_and_grads: Callable[..., Any] | None = None,
    ):
        loss = Trace_ELBO() if loss is None else loss
        if not isinstance(optim, (torch.optim.Optimizer, PyroOptim)) or isinstance(optim, torch.optim.LBFGS):
            raise TypeError(
                "optim must be an optimizer of pyro.optim, such as pyro.optim.Adam({'lr': 1e-3}), or one of torch that "
                f"needs no closure, such as torch.optim.Adam(parameters), got {type(optim).__name__}"
            )
        if isinstance(loss, type) or not (callable(loss) or isinstance(loss, PyroELBO)):
            raise TypeError(f"loss must be an instance, such as Trace_ELBO(), got {loss}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self._max_norm, self._own = max_norm, loss_and_grads
        self._precision: Literal["float32", "bfloat16"] = precision
        self._pyros = optim if isinstance(optim, PyroOptim) else None
        self.reduce: Reduce | None = None
        self._met: dict[str, Tensor] = {}
        self.passes = 0  # backward passes of the last loss whose gradients were collected
        self._zeros: dict[int, tuple[Tensor, int]] = {}
        self._state: tuple[list[Any], tuple[list[Tensor], tuple]] = [], ([], ())

    def with_other(self, **parts: Any) -> "Steps":
        """The same with another model, guide or optimizer."""
        own: dict[str, Any] = {"model": self.model, "guide": self.guide, "optim": self.optim, "loss": self.loss} | parts
        other = Steps(**own, max_norm=self._max_norm, precision=self._precision, loss_and_grads=self._own)
        other.reduce = self.reduce
        return other

    @property
    def held(self) -> list[Tensor]:
        """The tensors that the optimizer knows and that need gradients."""
        if self._pyros is not None:
            return list(self._pyros.optim_objs)
        return _parameters(cast(torch.optim.Optimizer, self.optim))

    def differentiate(self, args: tuple, kwargs: dict, collect: bool = False) -> Derivatives:
        """The loss with its gradients, which nothing has been done with.

        Args:
            collect: the gradients are given also where Pyro would leave them in ``grad``, before any hooks of theirs,
                and loss and gradients are tensors, for which nobody waits.

        Raises:
            ValueError: if a torch optimizer holds no tensor that the loss depends on, or lacks a ``pyro.param`` on
                which it does.
        """
        collected = Collected(self.loss)
        ours = collect or self._pyros is None
        with self._rounded(), poutine.trace(param_only=True) as capture, collected if ours else nullcontext():
            loss = self._loss_and_grads(args, kwargs)
        self.passes = len(collected.losses)
        sites = {name: site["value"] for name, site in capture.trace.nodes.items() if name != _HELD}
        params = {name: cast(Any, value).unconstrained() for name, value in sites.items()}
        if not ours:
            return Derivatives(loss, params, [])
        with self._rounded(), _without_hooks([*self.held, *params.values()]) if collect else nullcontext():
            return Derivatives(detached(loss), params, self._gradients(collected.losses, params))

    @property
    def hooked(self) -> bool:
        """Whether a tensor has hooks on its gradient."""
        return any(p._backward_hooks for p in self.held)

    @property
    def is_recordable(self) -> bool:
        """Whether a CUDA graph can hold the optimizer's step: it is torch's own, and does nothing in Python, nor is
        anything asked of other processes."""
        optim: Any = self.optim
        if (
            self.reduce is not None
            or not type(optim).__module__.startswith("torch.optim.")
            or optim._optimizer_step_pre_hooks
        ):
            return False
        if optim._optimizer_step_post_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            return False
        step = vars(optim).get("step")
        plain = step is None or hasattr(step, "_wrapped_by_lr_sched")
        return plain and all(group.get("capturable") for group in optim.param_groups)

    def state_of(self, params: Iterable[Tensor]) -> tuple[list[Tensor], tuple]:
        """What a step of torch's optimizer on these depends on: tensors, and numbers."""
        optim = cast(torch.optim.Optimizer, self.optim)
        states = [state for state in map(optim.state.get, params) if state is not None]
        values: list[Any] = list(chain.from_iterable(map(dict.values, [*optim.param_groups, *states])))
        known, found = self._state
        if len(values) != len(known) or not all(map(is_, values, known)):
            flat = values + [x for each in values if isinstance(each, (tuple, list)) for x in each]
            found = [x for x in flat if isinstance(x, Tensor)], tuple(x for x in flat if isinstance(x, PLAIN))
            self._state = values, found
        return found

    @torch.no_grad()
    def through_hooks(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The gradients that hooks of their tensors make of these."""
        found = []
        for p, gradient in gradients:
            for hook in tuple((p._backward_hooks or {}).values()):
                changed = hook(gradient)
                gradient = gradient if changed is None else changed
            found.append((p, gradient))
        return found

    def evaluate(self, args: tuple, kwargs: dict) -> Any:
        """The loss alone."""
        with torch.no_grad(), self._rounded(), Collected(self.loss):
            if isinstance(self.loss, PyroELBO):
                return detached(cast(Any, self.loss).loss(self.model, self.guide, *args, **kwargs))
            return detached(self._called(args, kwargs))

    def given(self, loss: Any) -> Any:
        """A loss as steps return it: with an optimizer of Pyro as a number, else as a tensor."""
        number = self._pyros is not None
        if type(loss) is Tensor:
            return loss.item() if number else loss.detach()
        if number:
            return tree_map_only(Tensor, Tensor.item, loss)
        return tree_map_only((Tensor, int, float), lambda x: torch.as_tensor(x).detach(), loss)

    def update(
        self, params: dict[str, Tensor], gradients: Sequence[tuple[Tensor, Tensor]], finite: bool = False
    ) -> None:
        """Let the optimizer step, with the gradients given on top of those that the tensors have.

        Args:
            finite: refuse gradients that are not.

        Raises:
            NonFiniteError: if so; nothing has been updated then.
        """
        if self.reduce is not None:
            gradients = self._reduced(self.reduce, params, gradients)
        # the largest entry, since squares of large ones overflow
        if finite and gradients and not nn.utils.get_total_norm([each for _, each in gradients], math.inf).isfinite():
            raise NonFiniteError("a gradient is NaN or infinite")
        for p, gradient in gradients:
            zeros, version = self._zeros.get(id(p), (None, 0))
            if p.grad is None or (zeros is not None and p.grad is zeros and zeros._version == version):
                p.grad = gradient
            else:
                p.grad = p.grad + gradient
        met = list({id(p): p for p in params.values()}.values()) if self._pyros is not None else self.held
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_([p for p in met if p.grad is not None], self._max_norm)
        if self._pyros is not None:
            update(self._pyros, met)
            self._zero(met)
        elif gradients:
            cast(torch.optim.Optimizer, self.optim).step()
            for p in met:
                p.grad = None

    def update_without_data(self) -> None:
        """The update of a step in which other processes alone have data."""
        self.update(self._met, [])

    def _reduced(
        self, reduce: Reduce, params: dict[str, Tensor], gradients: Sequence[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """The gradients given, and those that Pyro has left, with what other processes have."""
        self._met = params
        met = self.held if self._pyros is None else list({id(p): p for _, p in sorted(params.items())}.values())
        given = {id(p): gradient for p, gradient in gradients}
        if self._pyros is not None:
            for p in met:
                if p.grad is not None:
                    given[id(p)] = p.grad + given[id(p)] if id(p) in given else p.grad
                    p.grad = None
        found = reduce(met, [given.get(id(p)) for p in met])
        return [(p, gradient) for p, gradient in zip(met, found, strict=True) if gradient is not None]

    def _zero(self, params: Iterable[Tensor]) -> None:
        """Gradients of zero, as Pyro leaves them; the same tensor each time, so that a known zero is not added."""
        for p in params:
            if p.grad is not None:
                zeros, version = self._zeros.get(id(p), (None, 0))
                if zeros is None or zeros._version != version or zeros.shape != p.shape or zeros.dtype != p.dtype:
                    zeros = torch.zeros_like(p.grad)  # of its layout, which may differ from that of p
                    self._zeros[id(p)] = zeros, zeros._version
                p.grad = zeros

    def _rounded(self) -> Any:
        return RoundedProducts() if self._precision == "bfloat16" else nullcontext()

    def _loss_and_grads(self, args: tuple, kwargs: dict) -> Any:
        if isinstance(self.loss, PyroELBO):
            loss: Any = self.loss
            if type(loss) in _PLAIN_FORM:
                loss = object.__new__(_PLAIN_FORM[type(loss)])
                loss.__dict__ = vars(self.loss)
            model = _with_a_param(self.model) if self._pyros is None else self.model
            return loss.loss_and_grads(model, self.guide, *args, **kwargs)
        if self._own is not None:
            return self._own(self.model, self.guide, *args, **kwargs)
        value = self._called(args, kwargs)
        if getattr(value, "requires_grad", False):
            value.backward(retain_graph=True)
        return value

    def _called(self, args: tuple, kwargs: dict) -> Any:
        if isinstance(self.loss, Objective):
            return self.loss(self.model, self.guide, as_data(args, kwargs))
        return cast(Any, self.loss)(self.model, self.guide, *args, **kwargs)

    def _gradients(self, losses: list[Tensor], params: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Those of the optimizer's tensors, or of the parameters met."""
        held = self.held if self._pyros is None else list(params.values())
        losses = [loss for loss in losses if loss.requires_grad]
        held += _leaves(losses) if self._pyros is not None else []  # in whose ``grad`` Pyro leaves gradients as well
        ids = {id(p) for p in held}
        beside = {name: p for name, p in params.items() if id(p) not in ids}
        asked = list({id(p): p for p in (*held, *beside.values()) if p.requires_grad}.values())
        if not losses or not asked:
            found: Sequence[Tensor | None] = [None] * len(asked)
        else:
            found = torch.autograd.grad(cast(Tensor, sum(losses)), asked, allow_unused=True)
        pairs = [(p, gradient) for p, gradient in zip(asked, found, strict=True) if gradient is not None]
        reached = {id(p) for p, _ in pairs}
        forgotten = next((name for name, p in beside.items() if id(p) in reached), None)
        if forgotten is not None:
            raise ValueError(
                f"pyro.param '{forgotten}' is not held by the optimizer, so that it would never be trained: make the "
                "optimizer of it too, freeze it with requires_grad_(False), or give an optimizer of pyro.optim"
            )
        if not pairs and self._pyros is None and (losses or not params):
            raise ValueError("the optimizer holds no tensor that the loss depends on: nothing would be trained")
        return pairs


@contextmanager
def _without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context: hooks on gradients are not called."""
    kept = [(p._backward_hooks, dict(p._backward_hooks)) for p in tensors if p._backward_hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


@effectful(type="param")
def _meet_a_param() -> Tensor:
    return torch.zeros(())


def _with_a_param(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with a ``param`` site: Pyro's losses compute no gradients for programs that have none."""

    def registered(*args: Any, **kwargs: Any) -> Any:
        _meet_a_param(name=_HELD)
        return model(*args, **kwargs)

    return registered


def _parameters(optim: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optim.param_groups for p in group["params"] if p.requires_grad]


def _leaves(losses: list[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass would leave gradients in."""
    found, seen, todo = [], set(), [loss.grad_fn for loss in losses]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [cast(Any, node).variable] if hasattr(node, "variable") else []
            todo += [each for each, _ in node.next_functions]
    return found


def detached(loss: Any) -> Any:
    """A loss without its graph."""
    return tree_map_only(Tensor, Tensor.detach, loss)
