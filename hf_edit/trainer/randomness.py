"""What the batches of a loader depend on: random state, generators, states of samplers and data sets; and a digest.

All of it as numbers, strings, lists, dicts and tensors, so that a checkpoint is read without unpickling objects.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from copy import deepcopy
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

_LIBRARIES = ("torch.", "accelerate.", "transformers.", "datasets.")
_TWISTER = 624  # words of its state
_DEEPEST = 6  # samplers in samplers, data sets in data sets


def parts_of(loader: Any) -> dict[str, Any]:
    """The loader, and the samplers, data sets and collators in it, by their path."""
    found: dict[str, Any] = {}
    queue = [("loader", getattr(loader, "base_dataloader", loader))]
    names = ("batch_sampler", "sampler", "dataset", "collate_fn", "data_collator")
    while queue:
        path, part = queue.pop(0)
        if part is None or path.count(".") > _DEEPEST or any(part is other for other in found.values()):
            continue
        found[path] = part
        queue += [(f"{path}.{name}", getattr(part, name, None)) for name in names]
    return found


def random_state(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Of Python, NumPy and torch on the host, and of the generators that are attributes of `parts`."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "own": {name: _get_state(generator) for name, generator in generators(parts)},
    }


def set_random_state(state: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    random.setstate(_numbers(state["python"]))
    np.random.set_state(_numbers(state["numpy"]))
    torch.set_rng_state(state["torch"])
    for name, generator in generators(parts):
        if name in state["own"]:
            _set_state(generator, _numbers(state["own"][name]))


def generators(parts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, part in parts.items():
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, torch.Generator | np.random.Generator | random.Random):
                yield f"{path}.{name}", value


def _get_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def is_stateful(part: Any) -> bool:
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


def states_kept(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The states of the samplers and data sets that have one, and one that a checkpoint can hold.

    Not of data sets that workers read: theirs are copies, and what this process keeps they would take for a place.
    """
    kinds = "sampler" if getattr(parts["loader"], "num_workers", 0) else ("sampler", "dataset")
    stateful = {path: p for path, p in parts.items() if path.endswith(kinds) and is_stateful(p)}
    states = {path: part.state_dict() for path, part in stateful.items()}
    return {path: deepcopy(state) for path, state in states.items() if is_storable(state)}


def own_attributes(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and strings that the user's samplers and streams keep, where nobody tells them of epochs or state."""
    found: dict[str, Any] = {}
    for path, part in parts.items():
        orders = isinstance(part, IterableDataset) or path.endswith("sampler")
        informed = hasattr(part, "set_epoch") or is_stateful(part)
        if orders and not informed and not type(part).__module__.startswith(_LIBRARIES):
            mine = {name: value for name, value in vars(part).items() if type(value) in (str, int, float, bool)}
            found |= {f"{path}.{name}": value for name, value in mine.items()}
    return found


def is_storable(state: Any) -> bool:
    """True if it comes back from a file as it was."""
    if isinstance(state, Mapping):
        return all(isinstance(key, str | int) for key in state) and all(map(is_storable, state.values()))
    if type(state) in (list, tuple):
        return all(map(is_storable, state))
    return isinstance(state, Tensor) or type(state) in (str, int, float, bool, type(None))


def storable(state: Any) -> Any:
    """`state` with the words of Python's and NumPy's Mersenne twisters as tensors, which a file reads fast."""
    if isinstance(state, Mapping):
        return {key: storable(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        state = state.tolist()
    if isinstance(state, list | tuple):
        if len(state) >= _TWISTER and all(type(value) is int for value in state):
            return torch.tensor(state, dtype=torch.int64)
        return type(state)(map(storable, state))
    return state


def _numbers(state: Any) -> Any:
    """What `storable` has put into tensors, as Python and NumPy take it."""
    if isinstance(state, Mapping):
        return {key: _numbers(value) for key, value in state.items()}
    if isinstance(state, Tensor) and state.dtype == torch.int64:
        return tuple(state.tolist())
    return type(state)(map(_numbers, state)) if isinstance(state, list | tuple) else state


def _leaves(batch: Any) -> Iterator[Any]:
    """Tensors, numbers and strings of nested lists and dicts, with the keys; of other objects their type."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield str(key)
            yield from _leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value)
    else:
        readable = isinstance(batch, Tensor) and batch.layout == torch.strided and not batch.is_nested
        yield batch if readable or isinstance(batch, str | int | float | bool | None) else type(batch).__name__


class Contents:
    """What a batch held when it was drawn; compared without a copy, and read when a checkpoint is written."""

    def __init__(self, batch: Any) -> None:
        self.leaves = list(_leaves(batch))
        self.versions = self._versions()

    def _versions(self) -> list[int]:  # `_version`: as in torch's notes on autograd; counts writes in place
        return [leaf._version for leaf in self.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]

    def digest(self) -> str | None:
        """None if the batch was written to since."""
        if self._versions() != self.versions:
            return None
        hasher = blake2b(digest_size=16)
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                hasher.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
                hasher.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                hasher.update(repr(leaf).encode())
        return hasher.hexdigest()
