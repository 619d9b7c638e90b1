"""Run by every rank of a launch: what ranks must do together although each comes to it in its own way. Arguments as for
scenarios.py."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_edit import EDiTConfig, EDiTTrainer
from tests.launch.scripts.features import assert_replicas_equal, run
from tests.launch.scripts.scenarios import FOLDER, LENGTH, VOCABULARY

SIZES = (20, 28, 24, 26)  # of the shards, of which each of four ranks reads one


def shards(numbers: list[int]) -> Any:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for _ in range(SIZES[number]):
            tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator).tolist()
            yield {"input_ids": tokens, "labels": tokens}


def stream() -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(shards, gen_kwargs={"numbers": list(range(len(SIZES)))})


def a_stream_ends_together_wherever_ranks_step_together() -> dict[str, Any]:
    """Four ranks have 10, 14, 12 and 13 batches in an epoch; a step takes two."""
    for warmup, epoch in ((0, None), (64, 5)):
        config = EDiTConfig(sync_interval=4, warmup_steps=warmup)
        trainer = run(None, rows=stream(), config=config, max_steps=16, gradient_accumulation_steps=2)
        size = trainer.edit_layout.replica_size
        shortest = [min(SIZES[rank - rank % size :][:size]) // 4 for rank in range(dist.get_world_size())]
        steps: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(steps, (trainer.state.global_step, trainer._position.epoch))
        epochs = [16 // (epoch or own) for own in shortest]
        assert steps == [(16, number) for number in epochs], steps
        assert_replicas_equal(trainer)
    return {}


def a_stream_is_evaluated_as_by_the_plain_trainer() -> dict[str, Any]:
    """With shards of different lengths, and with fewer rows than a batch of all ranks has."""
    plain, edit = run(1), run(None)
    for data in (stream(), stream().take(10)):
        one, other = (trainer.evaluate(data)["eval_loss"] for trainer in (plain, edit))
        assert other == pytest.approx(one, rel=1e-5)
    assert len(edit.predict(stream()).predictions) == len(plain.predict(stream()).predictions) == sum(SIZES)
    assert edit.accelerator.dataloader_config.dispatch_batches is False, "training reads everywhere"
    return {}


class SavesInEachEpoch(EDiTTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._position.num_batches == 7:
            self.save_model(str(FOLDER / "all"))
        return super().training_step(*args, **kwargs)


def what_all_call_at_steps_of_their_own_is_said() -> dict[str, Any]:
    """Their epochs are of different lengths, so from the second one on some call where others come to a sync."""
    with pytest.raises(RuntimeError, match=r"called between two syncs on ranks of replicas \[.*\] alone"):
        run(None, trainer=SavesInEachEpoch, rows=stream(), config=EDiTConfig(sync_interval=4), max_steps=40)
    dist.barrier()
    return {}


class SavesAlone(EDiTTrainer):
    """Saves between two syncs, on one rank."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 2 and self.is_world_process_zero():
            self.save_model(str(FOLDER / "alone"))
        return super().training_step(*args, **kwargs)


def what_one_rank_alone_calls_is_said_on_all() -> dict[str, Any]:
    if int(run(None, max_steps=1).edit_layout.replica_size) > 1:
        return {"not here": "the other ranks of its replica would wait in FSDP2's all-gather"}
    for overlap in ("none", "forward", "delayed"):
        config = EDiTConfig(sync_interval=4, overlap=overlap, delay_steps=2)
        with pytest.raises(RuntimeError, match=r"called between two syncs on ranks of replicas \[0\] alone"):
            run(None, trainer=SavesAlone, config=config, max_steps=8)
        dist.barrier()
    return {}


def all_resume_from_the_same() -> dict[str, Any]:
    run(None, max_steps=1)  # makes the process group
    mine = True if dist.get_rank() == 0 else None
    with pytest.raises(ValueError, match=r"differs between the ranks, which are 0 to 3: \[True, False, False, False\]"):
        run(None, resume=mine)
    return {}
