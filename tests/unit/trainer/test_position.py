"""A run that is stopped and resumed draws what it would have drawn, whatever its data are; each rank by itself."""

from __future__ import annotations

import io
import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from hf_edit.trainer.position import DataPosition
from hf_edit.trainer.randomness import Contents

RANKS, BATCH, ROWS, EPOCHS = 2, 2, 22, 3  # six batches a rank and epoch, the last filled up
LENGTHS = [3 + (7 * i) % 11 for i in range(ROWS)]
reads: list[int] = []  # of streams, in this process


class OwnSampler(Sampler):  # type: ignore[type-arg]
    """Draws a permutation from `source`: None is torch's global generator."""

    def __init__(self, source: Any = None) -> None:
        self.source = source

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.source, random.Random):
            return iter(self.source.sample(range(ROWS), ROWS))
        if isinstance(self.source, np.random.Generator):
            return iter(self.source.permutation(ROWS).tolist())
        return iter(torch.randperm(ROWS, generator=self.source).tolist())


class EpochSampler(OwnSampler):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class StatefulSampler(OwnSampler):
    """Another order in every pass, told by a count that it keeps."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([(i + self.passes) % ROWS for i in range(ROWS)])

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]


class HiddenSampler(StatefulSampler):
    state_dict = load_state_dict = property()  # type: ignore[assignment]  # raises AttributeError: it has none


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows in order, each with noise from `source`: None is no noise."""

    def __init__(self, source: Any = None) -> None:
        self.source = source

    def __iter__(self) -> Iterator[int]:
        for i in range(ROWS):
            reads.append(i)
            if self.source is None:
                yield i
            elif isinstance(self.source, torch.Generator):
                yield i + 100 * int(torch.randint(50, (), generator=self.source))
            else:
                yield i + 100 * self.source.randrange(50)


class HiddenStream(Stream):
    passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return (i + 1000 * self.passes for i in super().__iter__())


class StatefulStream(Stream):
    """Counts passes, too, and knows how to go on."""

    def __init__(self) -> None:
        self.passes = self.next = 0

    def __iter__(self) -> Iterator[int]:
        while self.next < ROWS:
            reads.append(self.next)
            self.next += 1
            yield self.next + 1000 * self.passes
        self.passes, self.next = self.passes + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes, self.next = state["passes"], state["next"]


def counted(row: dict[str, int]) -> dict[str, int]:
    reads.append(row["x"])
    return row


def hub(num_shards: int, first: int = 0) -> datasets.IterableDataset:
    rows = datasets.Dataset.from_dict({"x": list(range(first, first + ROWS))})
    return rows.to_iterable_dataset(num_shards=num_shards).map(counted)


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([row["x"] if isinstance(row, dict) else row for row in rows])}


def masking(rows: list[Any]) -> dict[str, torch.Tensor]:
    """Draws from all global generators, as data collators for masked language models do."""
    noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in rows]
    return {**collate(rows), "noise": torch.tensor(noise)}


class Masking:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        return {**collate(rows), "noise": torch.rand(len(rows), generator=self.generator)}


def sized(sampler: Callable[[], Any], **settings: Any) -> Callable[..., DataLoader[Any]]:
    return lambda **more: DataLoader(  # type: ignore[arg-type]
        range(ROWS), **{"batch_size": BATCH, "sampler": sampler(), "collate_fn": collate, **settings, **more}
    )


def stream(dataset: Callable[[], Any], **settings: Any) -> Callable[..., DataLoader[Any]]:
    return lambda **more: DataLoader(dataset(), **{"batch_size": BATCH, "collate_fn": collate, **settings, **more})


def split(rank: int = 1) -> Any:
    return split_dataset_by_node(hub(4), rank=rank, world_size=2)


SAMPLED = {
    "sequential": sized(lambda: None),
    "random": sized(lambda: RandomSampler(range(ROWS))),
    "random, not seedable": sized(lambda: RandomSampler(range(ROWS))),
    "grouped by length": sized(lambda: LengthGroupedSampler(4, lengths=LENGTHS)),
    "rebalanced": lambda **more: DataLoader(  # type: ignore[arg-type]
        range(ROWS),
        batch_sampler=BatchRebalanceSampler(LENGTHS, effective_batch_size=8, dp_size=2, grad_accum=2),
        collate_fn=collate,
        **more,
    ),
    "own": sized(OwnSampler),
    "own, torch's generator": sized(lambda: OwnSampler(torch.Generator().manual_seed(1))),
    "own, NumPy's generator": sized(lambda: OwnSampler(np.random.Generator(np.random.MT19937(1)))),
    "own, Python's generator": sized(lambda: OwnSampler(random.Random(1))),
    "own, told the epoch": sized(EpochSampler),
    "own, with a state": sized(StatefulSampler),
}
STREAMS = {
    "own": stream(Stream),
    "own, global randomness": stream(lambda: Stream(random)),
    "own, a generator": stream(lambda: Stream(torch.Generator().manual_seed(1))),
    "hub's, several shards": stream(lambda: hub(4)),
    "hub's, one shard": stream(lambda: hub(1)),
    "hub's, shuffled": stream(lambda: hub(4).shuffle(seed=3, buffer_size=8)),
    "hub's, shuffled, one shard": stream(lambda: hub(1).shuffle(seed=3, buffer_size=8)),
    "hub's, interleaved": stream(
        lambda: datasets.interleave_datasets([hub(4), hub(4, first=100)], probabilities=[0.3, 0.7], seed=5)
    ),
    "hub's, split by node": stream(split),
    "hub's, one shard, last batch dropped": stream(lambda: hub(1), drop_last=True),
}
IN_THIS_PROCESS = {  # what these draw, workers would draw from their own random state
    "masked": sized(OwnSampler, collate_fn=masking),
    "masked by a generator": sized(OwnSampler, collate_fn=lambda: None),
    "stream, masked": stream(lambda: hub(4), collate_fn=masking),
    "stream, own, with a state": stream(StatefulStream),
}
KINDS = {
    **{f"sampled: {name}": make for name, make in SAMPLED.items()},
    **{f"stream: {name}": make for name, make in STREAMS.items()},
    **IN_THIS_PROCESS,
}


def prepared(kind: str, workers: int, rank: int) -> Any:
    more: dict[str, Any] = {"num_workers": workers}
    if kind == "masked by a generator":
        more["collate_fn"] = Masking()
    loader = prepare_data_loader(
        KINDS[kind](**more), num_processes=RANKS, process_index=rank, put_on_device=False, dispatch_batches=False,
        use_seedable_sampler="not seedable" not in kind, data_seed=42, rng_types=[],
    )  # fmt: skip
    if "rebalanced" in kind:  # as the Trainer does: this sampler knows of the ranks
        loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
    return loader


def set_epoch(loader: Any, epoch: int) -> None:
    """As the Trainer does."""
    loader.set_epoch(epoch)
    inner = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if hasattr(inner, "set_epoch"):
        inner.set_epoch(epoch)


def drawn(batch: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def written(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def seed(value: int) -> None:
    random.seed(value), np.random.seed(value), torch.manual_seed(value)


def model_draws() -> None:
    random.random(), np.random.rand(), torch.rand(3)


def run(
    loader: Any, saved: dict[str, Any] | None = None, globals_: Any = None
) -> tuple[list[Any], list[Any], str | None]:
    """Draws as the Trainer does, from the beginning or from `saved`; batches, checkpoints before each, the problem."""
    place = (saved["epoch"], saved["num_batches"]) if saved else (0, 0)
    position = DataPosition(loader, *place, saved)
    batches, checkpoints, problem = [], [], None
    for epoch in range(place[0], EPOCHS):
        set_epoch(loader, epoch)
        iterator = iter(loader)
        if position.must_move:
            problem = position.move(iterator)
            restore_globals(globals_)
        while True:
            try:
                batch = next(position.watch(iterator))
            except StopIteration:
                break
            batches.append(drawn(batch))
            model_draws()  # dropout
            if saved is None:
                checkpoints.append((len(batches), written(position.state()), take_globals()))
        position.end_epoch(unused=0)
        model_draws()  # an evaluation
        if saved is None and epoch < EPOCHS - 1:
            checkpoints.append((len(batches), written(position.state()), take_globals()))
    return batches, checkpoints, problem


def take_globals() -> Any:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def restore_globals(state: Any) -> None:
    random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])


def resumed(kind: str, workers: int, rank: int, checkpoint: Any) -> tuple[list[Any], str | None]:
    _, state, globals_ = checkpoint
    seed(99)  # as another process would
    batches, _, problem = run(prepared(kind, workers, rank), state, globals_)
    return batches, problem


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_draws_what_would_have_come(kind: str) -> None:
    seed(1)
    whole, checkpoints, _ = run(prepared(kind, 0, 1))
    end = torch.get_rng_state()
    for checkpoint in checkpoints[:3] + checkpoints[4::3]:
        batches, problem = resumed(kind, 0, 1, checkpoint)
        assert problem is None
        assert batches == whole[checkpoint[0] :], checkpoint[0]
        assert torch.equal(torch.get_rng_state(), end)


# One of each way to draw; all of `KINDS` but those passed, too, in a minute.
WITH_WORKERS = ["sampled: grouped by length", "stream: own", "stream: hub's, shuffled", "stream: hub's, interleaved"]


@pytest.mark.parametrize("kind", WITH_WORKERS)
def test_with_workers(kind: str) -> None:
    seed(1)
    whole, checkpoints, _ = run(prepared(kind, 2, 1))
    for checkpoint in checkpoints[4::6]:
        batches, problem = resumed(kind, 2, 1, checkpoint)
        assert problem is None
        assert batches == whole[checkpoint[0] :], checkpoint[0]


@pytest.mark.parametrize("end", ["of the epoch", "of the training"])
def test_workers_end_when_nothing_more_is_drawn(end: str) -> None:
    """Also in the middle of an epoch. Those of an iterator that the garbage collector finds are waited for 5 s each."""
    position = DataPosition(loader := prepared("sampled: grouped by length", 2, 1))
    drawing = position.watch(iter(loader))
    next(drawing)
    assert len(multiprocessing.active_children()) == 2
    if end == "of the epoch":
        position.end_epoch(0)
    else:
        position.let_go()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("make", "most"), [(StatefulStream, 12), (lambda: hub(4), 12), (lambda: hub(1), ROWS)])
def test_a_stream_with_a_state_is_not_read_twice(make: Any, most: int) -> None:
    """Three batches are: two to compare and to draw again in the same random state, one that Accelerate reads ahead."""
    loader = prepare_data_loader(stream(make, batch_size=1)(), num_processes=1, put_on_device=False, rng_types=[])
    batches, checkpoints, _ = run(loader)
    at, state, _ = checkpoints[ROWS - 3]
    loader = prepare_data_loader(stream(make, batch_size=1)(), num_processes=1, put_on_device=False, rng_types=[])
    iterator = iter(loader)
    reads.clear()
    position = DataPosition(loader, state["epoch"], state["num_batches"], state)
    assert position.move(iterator) is None
    assert len(reads) <= most
    assert drawn(next(position.watch(iterator))) == batches[at]


@pytest.mark.parametrize("make", [sized(HiddenSampler), stream(HiddenStream)])
@pytest.mark.parametrize(
    ("at", "text"), [(8, "the last batch before the checkpoint is another one"), (6, "passes was 1")]
)
def test_a_hidden_state_is_told(make: Any, at: int, text: str) -> None:
    def loader() -> Any:
        return prepare_data_loader(make(), num_processes=RANKS, process_index=1, put_on_device=False, rng_types=[])

    whole, checkpoints, _ = run(loader())
    done, state, globals_ = checkpoints[at]
    assert (state["epoch"], state["num_batches"]) == (1, 0 if at == 6 else 2)
    batches, _, problem = run(loader(), state, globals_)
    assert text in str(problem)
    assert len(batches) == len(whole) - done  # it goes on with as many all the same


def test_gradients_left_over_are_told() -> None:
    """A stream that ends in the middle of an accumulation, and a checkpoint there."""
    loader = prepared("stream: own", 0, 1)
    position = DataPosition(loader)
    list(position.watch(iter(loader)))
    position.end_epoch(unused=1)
    saved = written(position.state())
    problem = DataPosition(loader, 1, 0, saved).move(iter(loader))
    assert "gradients of the last 1 batches" in str(problem)


def test_a_batch_that_was_written_to_has_no_digest() -> None:
    batch = {"x": torch.zeros(3), "ids": [torch.ones(2, dtype=torch.bfloat16), "text"]}
    contents = Contents(batch)
    assert (
        contents.digest()
        == Contents({"x": torch.zeros(3), "ids": [torch.ones(2, dtype=torch.bfloat16), "text"]}).digest()
    )
    assert contents.digest() != Contents({**batch, "x": torch.zeros(3, dtype=torch.int32)}).digest()
    del batch["ids"]  # compute_loss may take labels out
    assert contents.digest() is not None
    batch["x"][0] = 1.0
    assert contents.digest() is None
