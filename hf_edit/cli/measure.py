"""`hf-edit check --measure`: what the link between replicas, their hosts and a step really give, and a plan from that.

All ranks of a launch run it together; the first one prints. What crosses between replicas is what a sync would send,
over the same groups.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from hf_edit.cli.job import CPU_SECONDS_PER_BYTE, PROTOCOL_OVERHEAD, Numbers, Outcome, Settings
from hf_edit.cli.simulation import recommend
from hf_edit.cli.sizes import build_model, model_config, moments, show_bytes, show_count, show_rate, unit_sizes
from hf_edit.config import EDiTConfig
from hf_edit.peers.group import Peers, ProcessGroupPeers
from hf_edit.peers.layout import ring_bytes
from hf_edit.sync.units import keep_gradients_local
from hf_edit.trainer.loop_accelerator import make_accelerator

MIN_BYTES, MAX_BYTES = 1 << 18, 64 << 20  # that a rank all-reduces at a time
LONG_SECONDS = 0.4  # for an all-reduce, in which its start no longer counts
MIN_SAMPLES = 3
EVEN = 0.05  # hosts whose speeds differ by less are taken for equal: as much comes and goes
WARMUP_STEPS, TIMED_STEPS = 2, 6
CHUNKS, CHUNK_SECONDS = 5, 0.1  # of matrix products, of the first rank
MARGIN = 3.0  # of a sync's time limit over what it should take


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """Between the replicas. The rate is of one replica's link, in each direction, with what the protocol adds."""

    bits_per_second: float
    slowest: float  # of the samples
    fastest: float
    round_trip_seconds: float


def settle(device: torch.device) -> None:
    """Waits for what the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def all_reduce_seconds(peers: Peers, tensor: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    """Of one all-reduce between the replicas, all shards at a time, until the last rank has it."""
    settle(tensor.device)
    peers.barrier()
    begin = clock()
    peers.all_reduce([tensor]).wait()
    settle(tensor.device)
    return float(max(peers.gather_object(clock() - begin)))


def measure_link(peers: Peers, device: torch.device, seconds: float, clock: Any = time.perf_counter) -> Link:
    """Watches the link for about `seconds`."""
    layout = peers.layout
    small = torch.zeros(1, device=device)
    delays = [all_reduce_seconds(peers, small, clock) for _ in range(13)][3:]  # the first ones set up connections
    delay = statistics.median(delays)
    begin, num_bytes, samples = clock(), MIN_BYTES, []
    while True:
        took = all_reduce_seconds(peers, torch.zeros(num_bytes // 4, device=device), clock)
        elapsed = max(peers.gather_object(clock() - begin))  # equal on all, and so is what follows
        if took < LONG_SECONDS and num_bytes < MAX_BYTES and elapsed < seconds:
            num_bytes *= 2
            continue
        sent = layout.replica_size * ring_bytes(num_bytes, layout.num_replicas)
        samples.append(8 * sent * (1 + PROTOCOL_OVERHEAD) / max(took - delay, took / 2))
        if len(samples) >= MIN_SAMPLES and elapsed >= seconds:
            break
    # An all-reduce is 2 (R - 1) messages one after the other, half a round trip each.
    return Link(statistics.median(samples), min(samples), max(samples), delay / (layout.num_replicas - 1))


def measure_speeds(peers: Peers, device: torch.device, clock: Any = time.perf_counter) -> list[float]:
    """Of each replica, the fastest being 1: of its slowest rank, when all ranks multiply the same matrices at once."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))

    def seconds(count: int) -> float:
        settle(device)
        begin = clock()
        for _ in range(count):
            torch.mm(left, right)
        settle(device)
        return float(clock() - begin)

    seconds(3)
    count = peers.gather_object(max(1, math.ceil(CHUNK_SECONDS / max(seconds(5) / 5, 1e-6))))[0]
    peers.barrier()
    taken = peers.gather_object(statistics.median(seconds(count) for _ in range(CHUNKS)))
    slowest = [max(taken[rank] for rank in peers.layout.replica_ranks(r)) for r in range(peers.layout.num_replicas)]
    return [min(slowest) / each for each in slowest]


def measure_steps(
    accelerator: Any, peers: Peers, config: Any, sequences: int, tokens: int, clock: Any = time.perf_counter
) -> tuple[float, float]:
    """Seconds of an inner step (forward, backward, AdamW) of the fastest replica, and their spread over their mean."""
    model = build_model(config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5))
    keep_gradients_local(model)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = torch.randint(text_config.vocab_size, (sequences, tokens), device=accelerator.device)
    taken = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        peers.barrier()
        begin = clock()
        with accelerator.autocast():
            scores = _outputs(model, ids)
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), ids.flatten().clamp(max=scores.shape[-1] - 1))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        settle(accelerator.device)
        taken.append(clock() - begin)
    by_rank = peers.gather_object(taken[WARMUP_STEPS:])
    replicas = [peers.layout.replica_ranks(replica) for replica in range(peers.layout.num_replicas)]
    steps = [[max(by_rank[rank][step] for rank in ranks) for step in range(TIMED_STEPS)] for ranks in replicas]
    means = [statistics.mean(each) for each in steps]
    fastest = min(range(len(means)), key=means.__getitem__)
    return means[fastest], statistics.stdev(steps[fastest]) / means[fastest]


def _outputs(model: nn.Module, ids: Tensor) -> Tensor:
    try:
        scores: Tensor = model(input_ids=ids)[0].float()
    except (TypeError, ValueError) as error:
        raise ValueError(f"This model does not take tokens alone ({error}). Give --step_seconds instead.") from error
    return scores


# -- the command ------------------------------------------------------------------------------------------------------


def measure_and_plan(arguments: Any, edit_config: EDiTConfig, say: Callable[[str], None]) -> None:
    """Measures and plans; all ranks of a launch call it together, and the first one's `say` should be heard alone.

    Raises:
        ValueError: what is given cannot be measured, or planned with.
    """
    config = sizes = None
    if arguments.model is not None:
        config = model_config(arguments.model)
        with torch.device("meta"):
            sizes = unit_sizes(build_model(config))
    accelerator = make_accelerator(edit_config, {})
    layout = accelerator.edit_layout
    if layout.num_replicas == 1:
        raise ValueError(
            f"One replica of {layout.replica_size} ranks: there is no link to measure. Set num_replicas, or "
            "dp_replicate_size in the Accelerate config."
        )
    peers = ProcessGroupPeers(layout, edit_config.sync_timeout_seconds)
    output = Path(arguments.output)
    plans = config is not None or None not in (arguments.parameters, arguments.step_seconds)
    problem = _output_problem(output, arguments.force) if plans else None
    if (problem := peers.gather_object(problem)[0]) is not None:  # the first rank writes
        raise ValueError(problem)
    numbers = _measure(arguments, accelerator, peers, config, sizes, say)
    if numbers is None:
        say("\nFor a plan give --model, or --parameters with --step_seconds.")
        return
    if layout.rank == 0:
        try:
            _plan(replace(numbers, moments=moments(edit_config)), edit_config, output, arguments.force, say)
        except (OSError, ValueError) as error:  # all shall know of it, not wait for this rank
            problem = str(error)
    if (problem := peers.gather_object(problem)[0]) is not None:
        raise ValueError(problem)


def _output_problem(output: Path, force: bool) -> str | None:
    """What keeps the plan from being written, to be known before all is measured; or None."""
    if not output.parent.is_dir():
        return f"--output {output}: there is no folder {output.parent}. Make it first, or give another path."
    if output.exists() and not force:
        return f"{output} exists already. Give another --output, or --force to write over it."
    return None


def _measure(
    arguments: Any, accelerator: Any, peers: Peers, config: Any, sizes: list[int] | None, say: Callable[[str], None]
) -> Numbers | None:
    layout, device = peers.layout, accelerator.device
    hosts = len(set(peers.gather_object(socket.gethostname())))
    say(f"layout       {layout} on {hosts} machine{'s' * (hosts > 1)}, {device.type}")
    link = _slower_link(peers, device, 60 * arguments.minutes, say)
    if hosts == 1:
        say("             all on this machine: no network's rate. Measure on the machines that will train.")
    speeds = measure_speeds(peers, device)
    say("speeds       of the replicas' hosts: " + ", ".join(f"{speed:.2f}" for speed in speeds))
    step_seconds, spread = arguments.step_seconds, 0.0
    if config is not None and step_seconds is None:
        step_seconds, spread = measure_steps(accelerator, peers, config, arguments.sequences, arguments.tokens)
        say(f"step         {step_seconds:.3g} s, spread {spread:.0%}: one micro-batch of {arguments.sequences} x "
            f"{arguments.tokens} tokens a rank")  # fmt: skip
    parameters = sum(sizes) if sizes else arguments.parameters
    if parameters is None or step_seconds is None:
        return None
    cores = (os.cpu_count() or 1) * hosts / layout.num_replicas
    return Numbers(
        parameters=parameters, num_replicas=layout.num_replicas, step_seconds=step_seconds,
        bits_per_second=link.bits_per_second, round_trip_seconds=link.round_trip_seconds,
        replica_size=layout.replica_size, step_spread=spread, num_units=len(sizes) if sizes else 10,
        speeds=() if min(speeds) > 1 - EVEN else tuple(speeds),
        processor_seconds_per_byte=CPU_SECONDS_PER_BYTE / cores if device.type == "cpu" else 0.0,
    )  # fmt: skip


def _slower_link(peers: Peers, device: torch.device, seconds: float, say: Callable[[str], None]) -> Link:
    """The link as a sync uses it; with an accelerator the slower one of the device's way and of host memory's, by which
    a delayed sync goes."""
    links = {device.type: measure_link(peers, device, seconds)}
    if device.type != "cpu":
        peers.make_host_groups()
        links["host memory"] = measure_link(peers, torch.device("cpu"), seconds)
    for name, link in links.items():
        seen = f"{show_rate(link.slowest)} to {show_rate(link.fastest)}"
        delay = f"round trip {1000 * link.round_trip_seconds:.3g} ms"
        say(f"link         {show_rate(link.bits_per_second)} a replica ({seen}), {delay}, by {name}")
    return min(links.values(), key=lambda link: link.bits_per_second)


# -- the plan ---------------------------------------------------------------------------------------------------------


def _plan(numbers: Numbers, config: EDiTConfig, output: Path, force: bool, say: Callable[[str], None]) -> None:
    outcomes = recommend(numbers, compression=config.compression)
    say("\nshare of the speed without syncs, simulated; the first is taken:")
    for outcome in outcomes[:3]:
        say(f"  {outcome.share:5.3f}  {_describe(outcome.settings)}")
    text = recommended_yaml(numbers, outcomes, config)
    with output.open("w" if force else "x", encoding="utf-8") as file:
        file.write(text)
    say(f"\nwritten to {output}:\n\n{text}")


def _describe(settings: Settings | None) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in chosen(settings or Settings()).items())


def chosen(settings: Settings) -> dict[str, Any]:
    """What a simulated setting means in an EDiTConfig, without what is idle."""
    by_time = settings.sync_seconds is not None
    found: dict[str, Any] = {"sync_seconds": settings.sync_seconds} if by_time else {
        "sync_interval": settings.sync_interval
    }  # fmt: skip
    found["overlap"] = settings.overlap
    if settings.overlap == "delayed":
        found["delay_steps"] = settings.delay_steps
    return found


def recommended_yaml(numbers: Numbers, outcomes: Sequence[Outcome], config: EDiTConfig) -> str:
    """The first outcome as an EDiT configuration file, with what `config` sets beside it."""
    best = outcomes[0]
    assert best.settings is not None
    timing = {"sync_interval", "sync_seconds", "overlap", "delay_steps"}
    values = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    values = {name: value for name, value in values.items() if name not in timing} | chosen(best.settings)
    if MARGIN * best.network_seconds > config.sync_timeout_seconds:
        values["sync_timeout_seconds"] = float(math.ceil(MARGIN * best.network_seconds))
    EDiTConfig(**values)  # refuses what it would refuse when it is read
    lines = [
        f"# By `hf-edit check --measure` on {numbers.num_replicas} replicas x {numbers.replica_size} ranks:",
        f"# {show_count(numbers.parameters)} parameters, {show_rate(numbers.bits_per_second)} a replica, steps of "
        f"{numbers.step_seconds:.3g} s.",
        f"# Expected: {best.share:.3f} of the speed without syncs; a sync sends {show_bytes(best.bytes_per_sync)} a "
        f"replica, {best.network_seconds:.3g} s on the link.",
    ]
    return "\n".join([*lines, yaml.safe_dump(values, sort_keys=False)])
