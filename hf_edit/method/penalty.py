"""The pseudo-gradient penalty of EDiT (Algorithm 2, Sync): eliminate, weigh, clip.

Pure functions on plain tensors; no process group, no module. Shapes: U units, R replicas. Norms and statistics are
float64 tensors on the host: every rank computes the same decisions from the same exchanged numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

CHAIN = 1 << 16  # numbers that are added up in fp32


@dataclass
class DetectorState:
    """Moving statistics of the pseudo-gradient norms, one detector for each unit of each replica; all [U, R].

    `count` is the number of norms that fed the statistics, `streak` the number of finite anomalies in a row.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    streak: Tensor

    @classmethod
    def zeros(cls, num_units: int, num_replicas: int) -> DetectorState:
        shape = (num_units, num_replicas)
        return cls(
            mean=torch.zeros(shape, dtype=torch.float64),
            variance=torch.zeros(shape, dtype=torch.float64),
            count=torch.zeros(shape, dtype=torch.int64),
            streak=torch.zeros(shape, dtype=torch.int64),
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def of(self, units: list[int]) -> DetectorState:
        """A copy of these units' detectors."""
        return DetectorState(**{name: tensor[units] for name, tensor in self.state_dict().items()})

    def replaced(self, units: list[int], by: DetectorState) -> DetectorState:
        """A copy in which these units have other detectors."""
        rows = torch.tensor(units)
        new = by.state_dict()
        return DetectorState(**{name: t.index_copy(0, rows, new[name]) for name, t in self.state_dict().items()})


def ema_update(mean: Tensor, variance: Tensor, count: Tensor, value: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Exponential moving mean and variance after `value`, the first ones being a plain mean.

    With n = `count` values seen so far, a = max(alpha, 1/(n+1)) and d = value - mean:
    mean += a d, variance = (1 - a)(variance + a d^2).

    >>> one, two = torch.tensor(1.0), torch.tensor(2.0)
    >>> mean, variance = ema_update(one, torch.tensor(0.0), torch.tensor(1), two, alpha=0.02)
    >>> float(mean), float(variance)
    (1.5, 0.25)
    """
    a = (1.0 / (count + 1)).clamp(min=alpha).to(mean.dtype)
    d = value - mean
    return mean + a * d, (1 - a) * (variance + a * d * d)


def z_score(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(value - mean) / sqrt(variance); 0 where the variance is 0."""
    deviation = variance.sqrt()
    return torch.where(deviation > 0, (value - mean) / deviation.where(deviation > 0, 1.0), 0.0)


def detect_anomalies(
    state: DetectorState,
    norms: Tensor,
    *,
    threshold: float | None,
    alpha: float,
    warmup_syncs: int,
    max_consecutive: int,
    idle: Tensor | None = None,
) -> tuple[Tensor, Tensor, DetectorState]:
    """Which replicas are to be left out of which units (Algorithm 2, anomaly elimination).

    A norm is anomalous if it is not finite, or if its detector has seen `warmup_syncs` norms and its z-score exceeds
    `threshold` (None: never). Only norms that pass feed the statistics. A finite norm that is anomalous for the
    `max_consecutive`-th time in a row is still left out, and its detector restarts empty.

    Args:
        norms: [U, R], G of each unit of each replica.
        idle: [R] bool, replicas that did no step: their norms are neither judged nor do they feed the statistics.

    Returns:
        anomalous [U, R] bool, restarted [U, R] bool, and the detectors' next state.
    """
    finite = norms.isfinite()
    judged = torch.ones_like(finite) if idle is None else (~idle).expand(finite.shape)
    spike = torch.zeros_like(finite)
    if threshold is not None:
        spike = judged & finite & (state.count >= warmup_syncs)
        spike &= z_score(norms, state.mean, state.variance) > threshold
    passed = finite & ~spike
    feeds = passed & judged
    mean, variance = ema_update(state.mean, state.variance, state.count, norms.where(finite, 0.0), alpha)
    streak = torch.where(spike, state.streak + 1, torch.where(judged, 0, state.streak))
    restarted = streak >= max_consecutive
    after = DetectorState(
        mean=torch.where(feeds, mean, state.mean).masked_fill(restarted, 0.0),
        variance=torch.where(feeds, variance, state.variance).masked_fill(restarted, 0.0),
        count=(state.count + feeds).masked_fill(restarted, 0),
        streak=streak.masked_fill(restarted, 0),
    )
    return ~passed, restarted, after


def norm_weights(norms: Tensor, passed: Tensor, temperature: float) -> Tensor:
    """softmax(-G / temperature) over the replicas that passed, exactly 0 for the others; [U, R] each.

    >>> norm_weights(torch.tensor([[1.0, 1.0, 9.0]]), torch.tensor([[True, True, False]]), 1.0)
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    logits = (-norms / temperature).masked_fill(~passed, -torch.inf)
    return torch.softmax(logits, dim=1).masked_fill(~passed, 0.0)  # a row without any that passed: NaN, then 0


def relative_weights(norms: Tensor, passed: Tensor, temperature: float) -> Tensor:
    """`norm_weights` of the norms over their mean, so that the scale of a unit does not matter; [U, R] each.

    The norm of a unit grows with the root of its size, and soon a few percent more is e times less weight.

    >>> relative_weights(torch.tensor([[40.0, 44.0], [0.40, 0.44]]), torch.ones(2, 2, dtype=torch.bool), 1.0)
    tensor([[0.5238, 0.4762],
            [0.5238, 0.4762]])
    """
    counted = norms.masked_fill(~passed, 0.0)
    mean = counted.sum(dim=1, keepdim=True) / passed.sum(dim=1, keepdim=True).clamp(min=1)
    return norm_weights(norms / mean.where(mean > 0, 1.0), passed, temperature)


def share_weights(shares: Tensor, passed: Tensor) -> Tensor:
    """Weights in proportion to `shares` [R] over the replicas that passed, exactly 0 for the others; [U, R].

    Ones give uniform weights, inner steps since the last sync the weighting "steps".

    >>> share_weights(torch.tensor([3.0, 1.0]), torch.tensor([[True, True], [True, False]]))
    tensor([[0.7500, 0.2500],
            [1.0000, 0.0000]])
    """
    kept = shares.expand(passed.shape).masked_fill(~passed, 0.0)
    # Replicas that all did no step have nothing to add; they share equally, so the weights still sum to 1.
    kept = torch.where(kept.sum(dim=1, keepdim=True) > 0, kept, passed.to(kept.dtype))
    return kept / kept.sum(dim=1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)


def effective_replicas(weights: Tensor) -> Tensor:
    """1 / sum of squared weights, for each unit [U]; 0 for a unit that was rolled back.

    >>> effective_replicas(torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]))
    tensor([2., 1., 0.])
    """
    squares = weights.square().sum(dim=1)
    return torch.where(squares > 0, 1 / squares.where(squares > 0, 1.0), 0.0)


def clip_factor(norm: Tensor, max_norm: float | None) -> Tensor:
    """beta = min(1, max_norm / (norm + 1e-6)), a tensor of `norm`'s shape and device; 1 when `max_norm` is None.

    >>> clip_factor(torch.tensor([5.0, 40.0]), 10.0)
    tensor([1.0000, 0.2500])
    """
    if max_norm is None:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def kept_length(norms: Tensor, weights: Tensor) -> Tensor:
    """How long a unit's average would be if its members all pointed the same way: the mean of their norms; [R] each.

    >>> kept_length(torch.tensor([3.0, 5.0, torch.inf]), torch.tensor([0.5, 0.5, 0.0]))
    tensor(4.)
    """
    return (norms.where(weights > 0, 0.0) * weights).sum()


def pseudo_gradient(anchor: Tensor, param: Tensor, out: Tensor) -> Tensor:
    """The anchor as the replica was given it, rounded to the parameter's dtype, minus the parameter; all of one shape.

    What the rounding leaves out is no progress of anybody's. `anchor` and `out` are fp32, and may be the same tensor.

    >>> anchor, param = torch.tensor([1.003, 2.0]), torch.tensor([1.0, 1.5], dtype=torch.bfloat16)
    >>> pseudo_gradient(anchor, param, out=torch.empty(2))
    tensor([0.0000, 0.5000])
    """
    if param.dtype == anchor.dtype:
        return torch.sub(anchor, param, out=out)
    return out.copy_(anchor.to(param.dtype)).sub_(param)


def square_norm(tensor: Tensor) -> Tensor:
    """The square of the L2 norm of a flat tensor [n], [] float64.

    A CPU sums fp32 in few long chains, which loses 2 % of the norm of 16M equal numbers; so the chains are cut.
    """
    cut = tensor.numel() // CHAIN * CHAIN
    rows = torch.linalg.vector_norm(tensor[:cut].view(-1, CHAIN), dim=1)
    rest = torch.linalg.vector_norm(tensor[cut:])
    return torch.cat([rows, rest.view(1)]).double().square().sum()


def weighed(pseudo_gradient: Tensor, weight: float, out: Tensor | None = None) -> Tensor:
    """`weight` times the pseudo-gradient, in place or in `out`; a weight of 0 gives zeros whatever it holds, also inf.

    >>> weighed(torch.tensor([2.0, torch.inf]), 0.0)
    tensor([0., 0.])
    """
    out = pseudo_gradient if out is None else out
    return out.zero_() if weight == 0.0 else torch.mul(pseudo_gradient, weight, out=out)
