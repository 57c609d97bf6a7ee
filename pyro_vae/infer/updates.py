"""What an optimizer does with gradients: one of torch at once, those of Pyro as Pyro does it, but together."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import is_scheduler
from torch import Tensor
from torch.optim.adam import Adam, adam


def update(optim: PyroOptim, params: Sequence[Tensor]) -> None:
    """``optim(params)``, whose Adams of one parameter each step together, with the same states.

    An optimizer that has met a parameter steps as it is the first time, and so does any that is not plainly Adam.
    """
    if type(optim) not in (PyroOptim, PyroLRScheduler):
        optim(list(params))
        return
    alone: list[Tensor] = []
    together: dict[tuple, list[tuple[Tensor, dict[str, Any]]]] = defaultdict(list)
    for p in params:
        each = optim.optim_objs.get(p)
        inner: Any = each.optimizer if each is not None and is_scheduler(each) else each
        if not _is_plain(inner, p):
            alone.append(p)
            continue
        if (clip := optim.grad_clip[p]) is not None:
            clip(p)
        if inner is not each:
            inner._opt_called = True  # a scheduler counts the steps of its optimizer
        together[_settings(inner.param_groups[0], p)].append((p, inner.state[p]))
    if alone:
        optim(alone)
    for settings, group in together.items():
        _adam(dict(settings[1]), group)


_SETTINGS = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "betas")


def _settings(group: dict[str, Any], p: Tensor) -> tuple:
    return (p.device, p.dtype), tuple((name, group[name]) for name in _SETTINGS)


def _is_plain(optimizer: Any, p: Tensor) -> bool:
    """Whether this is torch's Adam of one parameter after its first step, without hooks or wishes of its own."""
    if type(optimizer) is not Adam or p.grad is None or p.grad.is_sparse or p.is_complex():
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or len(optimizer.param_groups) != 1:
        return False
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        return False
    group = optimizer.param_groups[0]
    if len(group["params"]) != 1 or group["params"][0] is not p or isinstance(group["lr"], Tensor):
        return False
    if group["capturable"] or group["differentiable"] or group["fused"] or group.get("decoupled_weight_decay"):
        return False
    return "step" in optimizer.state.get(p, ())


def _adam(settings: dict[str, Any], group: list[tuple[Tensor, dict[str, Any]]]) -> None:
    states = [state for _, state in group]
    beta1, beta2 = settings.pop("betas")
    on_gpu = group[0][0].is_cuda  # the counts of steps are on the CPU, which fused steps on a GPU refuse
    with torch.no_grad():
        adam(
            [p for p, _ in group],
            [p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad) for p, _ in group],  # type: ignore[union-attr]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if settings["amsgrad"] else [],
            [state["step"] for state in states],
            foreach=on_gpu,
            fused=not on_gpu,
            beta1=beta1,
            beta2=beta2,
            **settings,
        )
