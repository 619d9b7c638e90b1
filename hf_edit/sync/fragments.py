"""Which units a sync is of: all, or those of one fragment after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_edit.method.schedule import fragments
from hf_edit.sync.units import Unit


@dataclass(frozen=True)
class Part:
    """The units of a sync by their `indices`, and where there are several fragments, that of each unit.

    `told` are this replica's inner steps since the last sync of each fragment, `after` the same behind this sync.
    """

    indices: list[int]
    fragments: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


class Fragments:
    """The units in `count` parts of about the same size.

    `steps` are this replica's inner steps from the last sync of each fragment to the last sync.

    Raises:
        ValueError: there are fewer units.
    """

    def __init__(self, units: Sequence[Unit], count: int) -> None:
        if count > len(units):
            raise ValueError(f"fragments={count}, but the model has {len(units)} units: set it to at most that many.")
        self._parts = fragments([sum(param.numel() for param in unit.params) for unit in units], count)
        self.steps = [0] * count

    def __len__(self) -> int:
        return len(self._parts)

    def of_sync(self, before: int, inner_steps: int, whole: bool) -> Part:
        """What the sync after `before` others is of, `inner_steps` after the last one; `whole`: of all units."""
        chosen = range(len(self)) if whole else [before % len(self)]
        told = [since + inner_steps for since in self.steps]
        owners = {unit: part for part in chosen for unit in self._parts[part]}
        return Part(
            indices=sorted(owners),
            fragments=[owners[unit] for unit in sorted(owners)] if len(self) > 1 else [],
            told=told,
            after=[0 if part in chosen else since for part, since in enumerate(told)],
        )

    def forget(self) -> None:
        """There is nothing to tell of the steps until now."""
        self.steps = [0] * len(self)
