"""Where a rank is in its data: a resumed run goes on with the very batch that would have come next.

An epoch is a function of its number, of the random state it begins in, and of what samplers and data sets keep. A
checkpoint has these as of the epoch's beginning, the random state before each of the last draws, and the number of
batches drawn. A resumed run begins the epoch again and goes forward on the cheapest way there is: from a saved state of
the loader or the stream, past the indices of a sampler, or by reading everything again. The last batch drawn must come
out as it did; where it does not, the next way is tried, and after the last one the user is warned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import DataLoaderShard, IterableDatasetShard, skip_first_batches
from torch.utils.data import IterableDataset

from hf_edit.trainer.randomness import (
    Contents,
    is_stateful,
    is_storable,
    own_attributes,
    parts_of,
    random_state,
    set_random_state,
    states_kept,
    storable,
)

# Accelerate's loader reads one batch ahead. So that the last batch drawn, and the one read ahead of it, are read in the
# random state they were read in, the last two draws are repeated; the draw before them fills the loader.
_REPEATED = 2


class DataPosition:
    """Watches what a rank draws from `loader`; goes to where a saved position was.

    Args:
        epoch, num_batches: where the run begins.
        saved: a `state()` from before, of that place; None to take the epoch's iterator as it is.
    """

    def __init__(self, loader: Any, epoch: int = 0, num_batches: int = 0, saved: dict[str, Any] | None = None) -> None:
        self.loader, self.epoch, self.num_batches = loader, epoch, num_batches
        self.must_move = saved is not None
        self._saved = saved
        self._parts = parts_of(loader)
        self._left_over = 0
        self._leads = False  # the loader is told of this epoch, not of the Trainer's
        self._forget()
        self.let_go()

    @classmethod
    def behind(cls, loader: Any, epoch: int, num_batches: int) -> DataPosition:
        """Where `num_batches` of `epoch` lie behind, of which nothing is known but that; whatever epoch the Trainer
        counts, this and the next ones are read."""
        position = cls(loader, epoch)
        now = position._beginning()
        position._saved = {
            "num_batches": num_batches, "left_over": 0, "began": now, "recent": [now] * _REPEATED, "digest": None,
        }  # fmt: skip
        position.must_move = position._leads = True
        return position

    def let_go(self) -> None:
        """Of the epoch's iterator. Its workers end with it, at once here; the garbage collector, which comes when their
        queues are closed, would wait 5 s for each (torch 2.13)."""
        self._given: Any = None
        self._iterator: Iterator[Any] = iter(())

    def _forget(self) -> None:
        self._began: dict[str, Any] | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=_REPEATED + 2)
        self._last: Contents | None = None

    # What a Trainer takes for its epoch's iterator.

    def watch(self, epoch_iterator: Iterator[Any]) -> Iterator[Any]:
        """An epoch's iterator, watched. One that nobody has drawn from begins an epoch."""
        if epoch_iterator is not self._given:
            self._given = self._iterator = epoch_iterator
            if self._leads:  # before the iterator is drawn from for the first time
                self._set_epoch()
            self._began = self._beginning()
        return self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        before = {"random": random_state(self._parts), **self._states()}
        batch = next(self._iterator)
        self._recent.append(before)
        self.num_batches += 1
        self._last = Contents(batch)
        return batch

    def end_epoch(self, unused: int) -> None:
        """The next epoch will begin; `unused` of this one's last batches have entered no optimizer step."""
        self.epoch, self.num_batches, self._left_over = self.epoch + 1, 0, unused
        self._forget()
        self.let_go()

    # -- out

    def state(self) -> dict[str, Any]:
        """For a checkpoint that is read without unpickling objects."""
        return {
            "epoch": self.epoch,
            "num_batches": self.num_batches,
            "left_over": self._left_over if not self.num_batches else 0,
            "began": _stored(self._began if self.num_batches and self._began else self._beginning()),
            "recent": [_stored(entry) for entry in self._recent],
            "digest": self._last.digest() if self._last else None,
        }

    def _beginning(self) -> dict[str, Any]:
        random, kept = random_state(self._parts), states_kept(self._parts)
        return {"random": random, "kept": kept, "attributes": own_attributes(self._parts)}

    def _states(self) -> dict[str, Any]:
        """States to go on from without reading again: the loader's own, or a stream's that this process reads."""
        if getattr(self.loader, "use_stateful_dataloader", False):
            found = {"loader": self.loader.state_dict()}
        else:
            found = {} if self._stream is None else {"stream": self._stream.state_dict()}
        return {name: state for name, state in found.items() if is_storable(state)}

    @property
    def _stream(self) -> Any:
        dataset = getattr(self.loader, "dataset", None)
        if isinstance(dataset, IterableDatasetShard) and dataset.drop_last:  # else it fills up with the first examples
            dataset = dataset.dataset
        in_this_process = isinstance(dataset, IterableDataset) and not self.loader.num_workers
        return dataset if in_this_process and is_stateful(dataset) else None

    # -- in

    def move(self, epoch_iterator: Iterator[Any]) -> str | None:
        """Goes to the saved place, in the stead of `epoch_iterator`; a sentence if it may be another one."""
        saved, self._saved, self.must_move = self._saved, None, False
        assert saved is not None
        self._given = epoch_iterator
        if not saved["num_batches"]:
            self._begin_again(saved)
            self._iterator, self._began = epoch_iterator, saved["began"]
            return self._doubts(saved)
        found = False
        tried: Any = None
        for start, loader in self._ways(saved):
            if hasattr(tried, "end"):
                tried.end()  # or Accelerate would count it among the loaders in use
            tried, self._iterator = loader, iter(loader)
            found = self._repeat(saved, start)
            if found:
                break
        self.num_batches, self._began = saved["num_batches"], saved["began"]
        self._recent.extend(saved["recent"])
        if not found:
            return "read again from the epoch's beginning, the last batch before the checkpoint is another one"
        return None

    def _ways(self, saved: dict[str, Any]) -> Iterator[tuple[int, Any]]:
        """Loaders that begin with the batch of a number, cheapest first. Without a digest nothing may be guessed."""
        start = saved["num_batches"] - _REPEATED - 1
        dataset, sampler = (getattr(self.loader, name, None) for name in ("dataset", "batch_sampler"))
        sized = sampler is not None and not isinstance(dataset, IterableDataset)
        recent = {saved["num_batches"] - back: entry for back, entry in enumerate(reversed(saved["recent"]), 1)}
        ahead = isinstance(self.loader, DataLoaderShard)
        if start > 0 and saved["digest"] is not None:
            if (state := recent.get(start, {}).get("loader")) is not None:
                self._begin_again(saved)
                self.loader.load_state_dict(state)
                yield start, self.loader
            if (state := recent.get(start - ahead, {}).get("stream")) is not None and self._stream is not None:
                self._begin_again(saved)
                self._stream.load_state_dict(state)
                yield start, self.loader
        if start > 0 and sized:
            self._begin_again(saved)
            yield start, skip_first_batches(self.loader, start)
        self._begin_again(saved)
        yield 0, self.loader

    def _begin_again(self, saved: dict[str, Any]) -> None:
        """All that the epoch depends on is as it was when the epoch began."""
        set_random_state(saved["began"]["random"], self._parts)
        for path, kept in saved["began"]["kept"].items():
            if path in self._parts:
                self._parts[path].load_state_dict(kept)
        self._set_epoch()

    def _set_epoch(self) -> None:
        # As the Trainer and Accelerate do it, but for the loader itself and not for one that skips batches: through
        # that one a sampler of the user's, and BatchRebalanceSampler, would not get the epoch.
        inner = getattr(getattr(self.loader, "batch_sampler", None), "batch_sampler", None)
        for part in (self.loader, inner):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(self.epoch)

    def _repeat(self, saved: dict[str, Any], start: int) -> bool:
        """Draws up to the saved place; True if the last batch is what it was."""
        for number in range(start, saved["num_batches"]):
            if (back := saved["num_batches"] - number) <= _REPEATED:
                set_random_state(saved["recent"][-back]["random"], self._parts)
            try:
                self._last = Contents(next(self._iterator))
            except StopIteration:
                return False
        return saved["digest"] in (None, self._last.digest() if self._last else None)

    def _doubts(self, saved: dict[str, Any]) -> str | None:
        if saved["left_over"]:
            return f"the gradients of the last {saved['left_over']} batches of the epoch before are not in a checkpoint"
        now = own_attributes(self._parts)
        for name, value in saved["began"]["attributes"].items():
            if now.get(name) != value:
                return (
                    f"{name} was {value!r} at the checkpoint and is {now.get(name)!r}; a sampler or data set whose "
                    "order depends on it needs set_epoch, or state_dict and load_state_dict"
                )
        return None


def _stored(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "random": storable(entry["random"])}
