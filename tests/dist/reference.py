"""The method once more, as a straight-line simulation in one process: full models, no process group, no hf_edit.

Written from the method's description alone, to be compared number by number with the real thing.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def simulate(
    make_net: Callable[[], nn.Module],
    unit_of: Callable[[str], str],
    losses: Callable[[nn.Module, int, list[int]], Tensor],
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    num_replicas: int,
    replica_size: int,
    steps: int,
    tau: int,
    warmup: int = 0,
    outer_lr: float = 0.8,
    outer_momentum: float = 0.85,
    outer_warmup: int = 5,
    weighting: str = "norm",
    temperature: float = 1.0,
    clip: float | None = 10.0,
    delta: float | None = 3.0,
    alpha: float = 0.02,
    ema_warmup: int = 10,
    max_consecutive: int = 3,
    max_grad_norm: float | None = None,
    delay: int = 0,
    parts: list[list[str]] | None = None,
    averaging: str = "mean",
    moments: tuple[str, ...] = (),
    moments_every: int = 1,
    lr_at: Callable[[int], float] | None = None,
    follow_lr: bool = False,
) -> dict[str, Tensor]:
    """The parameters that all replicas hold at the end.

    Args:
        unit_of: the name of the unit that a parameter belongs to.
        losses: the training loss of a network in a step, over the batches of the given ranks.
        delay: steps between the beginning of a sync and its application; 0: at once.
        averaging: "length" gives the average the mean of its members' lengths.
        moments: keys of the inner optimizer's state that are averaged, at every `moments_every`-th sync of a unit.
        lr_at: the inner learning rate of a step.
        follow_lr: the outer momentum shrinks as it does.
        parts: names of units that are synced together, one part every tau / len(parts) steps; None: all are.
    """
    nets = [make_net() for _ in range(num_replicas)]
    optimizers = [make_optimizer(net.parameters()) for net in nets]
    units: dict[str, list[str]] = {}
    for name, _ in nets[0].named_parameters():
        units.setdefault(unit_of(name), []).append(name)
    anchor: dict[str, Tensor] = {}
    velocity: dict[str, Tensor] = {}
    seen = {(unit, i): (0.0, 0.0, 0) for unit in units for i in range(num_replicas)}
    streak = dict.fromkeys(seen, 0)
    parts = parts or [list(units)]
    syncs = 0
    whole = True  # the last sync was of all units
    taken = dict.fromkeys(units, 0)  # syncs in which the unit took part
    steps_since = dict.fromkeys(units, 0)
    rates: list[float] = []  # since the last sync
    last_rate: dict[str, float] = {}  # of the interval before a unit's last sync
    corrections: list[dict[str, Tensor]] = []  # of a sync that has begun, one for each replica
    moved: list[tuple[int, str, str, Tensor]] = []  # replica, parameter, key, what its moment is to change by

    def take_anchor() -> None:
        for name, param in nets[0].named_parameters():
            anchor[name] = param.detach().clone()
            velocity[name] = torch.zeros_like(param)

    def apply(after: int = 0) -> None:
        for i, name, key, by in moved:
            group = optimizers[i].param_groups[0]
            beta = group["betas"][key == "exp_avg_sq"] if "betas" in group else group["momentum"]
            state = optimizers[i].state[dict(nets[i].named_parameters())[name]]
            state[key] += beta**after * by
            if moments == ("exp_avg",):  # no further from 0 than Adam's own can be
                b1, b2 = group["betas"]
                limit = (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2)) * state["exp_avg_sq"].sqrt()
                state[key] = torch.minimum(torch.maximum(state[key], -limit), limit)
        moved.clear()
        with torch.no_grad():
            for net, correction in zip(nets, corrections, strict=True):
                params = dict(net.named_parameters())
                for name, by in correction.items():
                    params[name] += by
        corrections.clear()

    def outer_sync(at_once: bool, of_all: bool = False) -> None:
        nonlocal syncs, whole
        part = [list(units)] if of_all else [parts[syncs % len(parts)]]
        syncs, whole = syncs + 1, of_all or len(parts) == 1
        chosen = [unit for unit in part[0] if steps_since[unit]]  # else there is nothing to tell of it
        steps_since.update(dict.fromkeys(chosen, 0))
        moving = [name for unit in chosen for name in units[unit]]
        before = [{n: p.detach().clone() for n, p in net.named_parameters() if n in moving} for net in nets]
        move_anchor(chosen)
        rates.clear()
        corrections.extend({n: anchor[n] - own[n] for n in own} for own in before)
        if at_once:
            apply()

    def move_anchor(chosen: list[str]) -> None:
        params = [dict(net.named_parameters()) for net in nets]
        for unit in chosen:
            names = units[unit]
            mu, lr = outer_momentum, outer_lr
            if outer_warmup and outer_momentum:
                mu = min(outer_momentum, taken[unit] / (taken[unit] + outer_warmup))
                lr = 1 - (1 - outer_lr) * mu / outer_momentum
            with_moments = taken[unit] % moments_every == 0
            taken[unit] += 1
            deltas = [{n: anchor[n] - params[i][n].detach() for n in names} for i in range(num_replicas)]
            norms = [math.sqrt(sum(float(d[n].double().square().sum()) for n in names)) for d in deltas]
            good = []
            for i, norm in enumerate(norms):
                mean, variance, count = seen[unit, i]
                z = (norm - mean) / math.sqrt(variance) if variance > 0 else 0.0
                if not math.isfinite(norm):
                    streak[unit, i] = 0
                    continue
                if delta is not None and count >= ema_warmup and z > delta:
                    streak[unit, i] += 1
                    if streak[unit, i] == max_consecutive:
                        streak[unit, i], seen[unit, i] = 0, (0.0, 0.0, 0)
                    continue
                streak[unit, i] = 0
                good.append(i)
                a = max(alpha, 1 / (count + 1))
                d = norm - mean
                seen[unit, i] = (mean + a * d, (1 - a) * (variance + a * d * d), count + 1)
            if good:
                raw = [math.exp(-norms[i] / temperature) if weighting == "norm" else 1.0 for i in good]
                mixed = {n: sum(w / sum(raw) * deltas[i][n] for w, i in zip(raw, good, strict=True)) for n in names}
                size = math.sqrt(sum(float(mixed[n].double().square().sum()) for n in names))
                if averaging == "length":
                    length = sum(w / sum(raw) * norms[i] for w, i in zip(raw, good, strict=True))
                    stretch = min(length / size, num_replicas)
                    mixed, size = {n: stretch * g for n, g in mixed.items()}, stretch * size
                beta = 1.0 if clip is None else min(1.0, clip / (size + 1e-6))
                for n, key in itertools.product(names, moments if with_moments else ()):
                    each = [optimizers[i].state[params[i][n]][key] for i in range(num_replicas)]
                    mean = sum(w / sum(raw) * each[i] for w, i in zip(raw, good, strict=True))
                    moved.extend((i, n, key, mean - own) for i, own in enumerate(each))
                rate = sum(rates) / len(rates) if rates else last_rate.get(unit, 1.0)
                kept = min(1.0, rate / last_rate.get(unit, rate)) if follow_lr else 1.0
                last_rate[unit] = rate
                for n in names:
                    g = beta * mixed[n]
                    velocity[n] *= kept
                    velocity[n] = mu * velocity[n] + g
                    anchor[n] = anchor[n] - lr * (g + mu * velocity[n])

    since = 0
    for step in range(steps):
        if lr_at is not None:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr_at(step)
        grads = []
        for i, net in enumerate(nets):
            loss = losses(net, step, [i * replica_size + s for s in range(replica_size)])
            grads.append(torch.autograd.grad(loss, list(net.parameters())))
        if step < warmup:
            grads = [[sum(g) / num_replicas for g in zip(*grads, strict=True)]] * num_replicas
        for net, optimizer, grad in zip(nets, optimizers, grads, strict=True):
            for param, g in zip(net.parameters(), grad, strict=True):
                param.grad = g.clone()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), max_grad_norm)
            optimizer.step()
        if step == warmup - 1 or (warmup == 0 and step == 0):
            if warmup == 0:  # before the first step: the networks start equal
                fresh = make_net()
                for name, param in fresh.named_parameters():
                    anchor[name] = param.detach().clone()
                    velocity[name] = torch.zeros_like(param)
            else:
                take_anchor()
        if step >= warmup:
            since += 1
            rates.append(optimizers[0].param_groups[0]["lr"])
            steps_since = {unit: count + 1 for unit, count in steps_since.items()}
            if corrections and since == delay:
                apply(after=delay)
            if since == tau // len(parts):
                outer_sync(at_once=delay == 0)
                since = 0
    if corrections:
        apply(after=since)
    if since or not whole:
        outer_sync(at_once=True, of_all=True)
    return {name: copy.deepcopy(param.detach()) for name, param in nets[0].named_parameters()}
