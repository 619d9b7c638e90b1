"""How long the averages are, over the whole replica: what clips them, and how far they point the same way as before."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_edit.config import EDiTConfig
from hf_edit.method.penalty import clip_factor, kept_length, square_norm
from hf_edit.peers.replica import Replica
from hf_edit.sync.measure import phase
from hf_edit.sync.running import Running

SAMPLE = 1 << 12  # numbers of a unit on a rank, evenly spread, that stand for all when two averages are compared


class Lengths:
    """Norms of the averages, reduced over the replica for all units that are applied at once together.

    Args:
        config: the method's settings.
        replica: this one's ranks.
        device: the training's.
    """

    def __init__(self, config: EDiTConfig, replica: Replica, device: torch.device) -> None:
        self._config, self._replica, self._device = config, replica, device
        self._samples: dict[int, Tensor] = {}  # of each unit's last average

    def measure(self, run: Running, place: int, average: Tensor) -> None:
        """Of this rank's part of a unit's average."""
        run.samples[place] = sample = average[:: max(1, -(-average.numel() // SAMPLE))].clone()
        before = self._samples.get(run.units[place])
        products = sample.new_zeros(3, dtype=torch.float64)
        if before is not None:
            products = torch.stack([torch.dot(before, sample), torch.dot(sample, sample), torch.dot(before, before)])
        run.measured[place] = torch.cat([square_norm(average).view(1), products.double()])

    @phase("clip")
    def decide(self, run: Running, places: list[int]) -> None:
        """What the averages of these units are multiplied by (EDiT, Algorithm 2: clip), and what of that clips."""
        wanted, length = self._config.max_pseudo_grad_norm, self._config.averaging == "length"
        if not places or (wanted is None and not length):
            return
        norms = self._over_replica(run, places)[:, 0].sqrt()
        factors = torch.ones_like(norms)
        if length:
            plan = run.decided
            means = torch.stack([kept_length(plan.norms[place], plan.weights[place]) for place in places])
            # Replicas that point nowhere in common leave a rest that says nothing, and is not to be blown up.
            stretch = (means.to(norms.device, non_blocking=True) / norms).clamp(max=plan.norms.shape[1])
            factors = stretch.where(norms > 0, 1.0)
        if wanted is not None:
            clips = clip_factor(norms * factors, wanted)
            run.clips.update(zip(places, clips.unbind(), strict=True))
            factors = factors * clips
        run.factors.update(zip(places, factors.unbind(), strict=True))

    def end(self, run: Running) -> None:
        """The sync was applied."""
        if run.measured:
            self._over_replica(run, list(run.measured))
        self._samples |= {run.units[place]: sample for place, sample in run.samples.items()}

    def _over_replica(self, run: Running, places: list[int]) -> Tensor:
        rows = torch.stack([run.measured.pop(place) for place in places])
        if rows.device != self._device:
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        summed = self._replica.sum(rows)
        run.lengths.update(zip(places, summed.unbind(), strict=True))
        return summed
