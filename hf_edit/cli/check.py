"""`hf-edit check`: what an Accelerate and an EDiT configuration give, before the training starts.

Nothing is started and nothing downloaded: Accelerate's launcher says what it would give each process, and the checks of
EDiTTrainer look at that. With --measure, under `accelerate launch`, link, hosts and step are measured: see measure.py.

    hf-edit check --config_file two_nodes_8gpu.yaml --parameters 1.1b
    accelerate launch --config_file two_nodes_8gpu.yaml -m hf_edit.cli.check --measure --model config.json
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

import torch

from hf_edit.cli.findings import Findings, find_layout, judge_launch, judge_settings
from hf_edit.cli.launch import Launch, read_launch, read_settings
from hf_edit.cli.measure import measure_and_plan
from hf_edit.cli.sizes import (
    amount,
    build_model,
    keeps_momentum,
    memory_bytes,
    model_config,
    moments,
    show_bytes,
    show_count,
    unit_sizes,
)
from hf_edit.config import EDiTConfig
from hf_edit.method.compression import bytes_per_element
from hf_edit.peers.layout import Layout, ring_bytes

FINE, WARNED, REFUSED = 0, 1, 2  # exit codes
ASSUMED_UNITS = 10  # where only the number of parameters is known
SHOWN_REPLICAS = 4

# -- what it comes to -------------------------------------------------------------------------------------------------


def costs(config: EDiTConfig, layout: Layout, on_cpu: bool, sizes: Sequence[int]) -> list[str]:
    """Lines on bytes and memory."""
    per_number = bytes_per_element(config.compression) + 4 * moments(config)
    num_bytes = round(per_number * sum(sizes)) // layout.replica_size
    rank_bytes = ring_bytes(num_bytes, layout.num_replicas)
    replica_bytes = rank_bytes * layout.replica_size
    bytes_of = memory_bytes(config, sizes, layout.replica_size, pinned=not on_cpu)
    memory = {name: show_bytes(size) for name, size in bytes_of.items()}
    kept = "anchor and momentum" if keeps_momentum(config) else "the anchor"
    if config.compression != "none" and config.overlap != "delayed":
        kept += f", and what {config.compression} leaves out"
    where = "" if on_cpu else " in host memory" if config.offload_outer_state else " on the device"
    host = f" and {memory['host']}{'' if on_cpu else ' in host memory'}" if config.overlap == "delayed" else ""
    every = config.sync_moments_every
    which = f"; with moments, at one in {every}" if moments(config) and every > 1 else ""
    return [
        f"sent a sync  {show_bytes(rank_bytes)} a rank, {show_bytes(replica_bytes)} a replica; as much comes in{which}",
        f"memory       {memory['state']} a rank{where} for {kept}",
        f"  in a sync  {memory['buffers']} more{'' if on_cpu else ' on the device'}{host}",
    ]


def describe(launch: Launch, config: EDiTConfig, layout: Layout) -> list[str]:
    """Lines on who trains what, and when it syncs."""
    per_machine = launch.ranks_per_machine
    started = f"{launch.num_machines} machine{'s' * (launch.num_machines > 1)} x {per_machine}"
    lines = [f"processes    {launch.world_size}: {started}"]
    if layout.num_replicas == 1:
        return [*lines, "layout       1 replica: a plain Trainer"]
    lines.append(f"layout       {layout} ({'FSDP2' if layout.replica_size > 1 else 'DDP'})")
    for index in range(min(layout.num_replicas, SHOWN_REPLICAS)):
        ranks = layout.replica_ranks(index)
        first, last = ranks[0] // per_machine, ranks[-1] // per_machine
        machine = f"machine {first}" if first == last else f"machines {first} to {last}"
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        place = f"a launch of its own, EDIT_REPLICA={index}" if config.elastic else f"{shown}, {machine}"
        lines.append(f"  replica {index}  {place}")
    if layout.num_replicas > SHOWN_REPLICAS:
        lines.append(f"  ... and {layout.num_replicas - SHOWN_REPLICAS} more in this order")
    when = f"every {config.sync_interval} inner steps"
    if config.sync_seconds is not None:
        when = f"every {config.sync_seconds:g} s (A-EDiT)"
    delay = f", applied {config.delay_steps} steps later" if config.overlap == "delayed" else ""
    warmup = f", after {config.warmup_steps} synchronous ones" if config.warmup_steps else ""
    codes = f", compression={config.compression!r}" if config.compression != "none" else ""
    return [*lines, f"sync         {when}{warmup}; overlap={config.overlap!r}{delay}{codes}"]


# -- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config_file", metavar="YAML", help="Accelerate's; unset: the one of --launch, else Accelerate's default")
    add("--edit_config", metavar="YAML", help="EDiT's; unset: the file named by EDIT_CONFIG, else the defaults")
    add("--launch", metavar="COMMAND", help="the training's whole `accelerate launch ...`, in quotes; its flags count")
    add("--model", metavar="NAME", help="config.json, its folder or a model type such as llama; nothing is downloaded")
    add("--parameters", type=amount, metavar="N", help="trained parameters, such as 1.1b, where --model does not say")
    add("--strict", action="store_true", help="exit with 1 if there are warnings (a refusal always exits with 2)")
    group = parser.add_argument_group("measuring, under accelerate launch -m hf_edit.cli.check")
    add = group.add_argument
    add("--measure", action="store_true", help="measure the link between replicas, hosts and step, and plan")
    add("--step_seconds", type=float, metavar="S", help="of one inner step; unset: some steps of --model are measured")
    add("--sequences", type=int, default=1, metavar="N", help="of a rank's batch in these steps (default: 1)")
    add("--tokens", type=int, default=512, metavar="N", help="of a sequence in these steps (default: 512)")
    add("--minutes", type=float, default=0.1, metavar="M", help="to watch the link; longer if shared (default: 0.1)")
    add("--output", default="edit_config.yaml", metavar="YAML", help="for the plan (default: edit_config.yaml)")
    add("--force", action="store_true", help="write over an existing --output")


def run(arguments: argparse.Namespace) -> int:
    """The command; its exit code."""
    findings = Findings()
    first = os.environ.get("RANK", "0") == "0"
    lines: list[str] = []
    if arguments.measure:
        with findings.refusing((ValueError,)):  # what else happens to a rank shall be seen, not only the first one's
            _measure(arguments, first)
    else:
        with findings.refusing():
            lines = _check(arguments, findings)
        if arguments.step_seconds is not None:
            findings.notes.append(
                "--step_seconds has no effect without --measure. For a link whose rate you know: hf-edit plan."
            )
    if first:  # at once: a launcher ends this rank when another one has ended
        for kind, texts in (("note", findings.notes), ("warning", findings.warnings), ("refused", findings.refusals)):
            lines += [f"\n{kind}: {text}" for text in texts]
        if not arguments.measure:
            lines.append(f"\n{_verdict(findings)}")
        print("\n".join(lines), flush=True)
    if findings.refusals:
        return REFUSED
    return WARNED if findings.warnings and arguments.strict else FINE


def _verdict(findings: Findings) -> str:
    if findings.refusals:
        return "Refused."
    if findings.warnings:
        return f"EDiTTrainer would start; {len(findings.warnings)} warning{'s' * (len(findings.warnings) > 1)}."
    return "EDiTTrainer would start; nothing to warn of."


def _check(arguments: argparse.Namespace, findings: Findings) -> list[str]:
    launch = read_launch(arguments.launch, arguments.config_file)
    config, notes = read_settings(arguments.edit_config, launch)
    findings.notes += notes
    model, sizes = None, [-(-arguments.parameters // ASSUMED_UNITS)] * ASSUMED_UNITS if arguments.parameters else []
    if arguments.model is not None:
        with findings.refusing(), torch.device("meta"):
            model = build_model(model_config(arguments.model))
            sizes = unit_sizes(model)
    if model is not None and config.fragments > len(sizes):
        findings.refusals.append(
            f"fragments={config.fragments}, but the model has {len(sizes)} units: set it to at most that many."
        )
    layout = find_layout(launch, config, model, findings)
    if layout is None:
        return []
    judge_launch(launch, layout, findings)
    judge_settings(config, launch, layout, findings)
    lines = describe(launch, config, layout)
    if sizes:
        known = f"in {len(sizes)} units" if model is not None else f"taken to be {len(sizes)} equal units"
        lines.append(f"model        {show_count(sum(sizes))} trained parameters {known}")
    if sizes and layout.num_replicas > 1:
        lines += costs(config, layout, launch.on_cpu, sizes)
    elif layout.num_replicas > 1:
        lines.append("bytes and memory: give --model or --parameters")
    return lines


def _measure(arguments: argparse.Namespace, first: bool) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        file = arguments.config_file or "YAML"
        raise ValueError(
            "--measure needs the processes of a training. Start it on every machine as\n\n    accelerate launch "
            f"--config_file {file} -m hf_edit.cli.check --measure ..."
        )
    config, _ = read_settings(arguments.edit_config, None)
    measure_and_plan(arguments, config, partial(print, flush=True) if first else lambda _: None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hf_edit.cli.check", description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
