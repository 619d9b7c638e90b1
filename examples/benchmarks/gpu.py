#!/usr/bin/env python
"""What one GPU can show of a sync: its exposed time beside a step's, and that every way of carrying it out agrees.

    python examples/benchmarks/gpu.py --json gpu.jsonl

Two replicas of one rank share one GPU and talk through gloo, so through host memory, as over Ethernet. A Llama of about
1.1B parameters in bf16 is trained on random tokens with a hand-written loop: never syncing, blocking, layer by layer in
the forward pass, delayed, with the outer state in host memory, and with int8 codes. Ways that must agree are compared
by a digest of the parameters, bit for bit. --cpu runs a tiny model without a GPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.bench import markdown_table
from lib.results import add_run, open_results

NUM_REPLICAS = 2
WARM_UP_STEPS = 4
WAYS: dict[str, dict[str, Any]] = {
    "never": {"sync_interval": 10**6},
    "none": {"overlap": "none"},
    "none, again": {"overlap": "none"},
    "forward": {"overlap": "forward"},
    "forward, offloaded": {"overlap": "forward", "offload_outer_state": True},
    "delayed": {"overlap": "delayed"},
    "delayed, again": {"overlap": "delayed"},
    "delayed, offloaded": {"overlap": "delayed", "offload_outer_state": True},
    "none, int8": {"overlap": "none", "compression": "int8"},
    "forward, int8": {"overlap": "forward", "compression": "int8"},
    "delayed, int8": {"overlap": "delayed", "compression": "int8"},
}
AGREE = (
    ("none", "none, again", "forward", "forward, offloaded"),
    ("delayed", "delayed, again", "delayed, offloaded"),
    ("none, int8", "forward, int8"),
)
SIZES: dict[str, dict[str, int]] = {
    "1b": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
               num_attention_heads=32, num_key_value_heads=4),
    "tiny": dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=2),
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
                        help=f"of {', '.join(WAYS)} (all)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=32, help="inner steps of a training (32)")
    parser.add_argument("--tau", type=int, default=8, help="inner steps between syncs (8)")
    parser.add_argument("--delay_steps", type=int, default=6, help="of the delayed ways (6)")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences of a replica in a step (4)")
    parser.add_argument("--sequence_length", type=int, default=1024, help="tokens of a sequence (1024)")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one training may take (900)")
    parser.add_argument(
        "--json", type=Path, metavar="JSONL", help="keep every finished run here; an existing file is continued"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.worker:
        work(json.loads(arguments.worker))
        return
    import torch

    if not arguments.cpu and not torch.cuda.is_available():
        sys.exit("gpu.py: there is no GPU here. Run it where one is, or give --cpu to try the script out.")
    names = ("steps", "tau", "delay_steps", "batch_size", "sequence_length", "cpu")
    settings = {name: getattr(arguments, name) for name in names}
    device = "CPU" if arguments.cpu else torch.cuda.get_device_name()
    results = open_results(arguments.json, {**settings, "device": device})
    for way in arguments.ways:
        if way not in [run["way"] for run in results["runs"]]:
            add_run(results, {"way": way, **run_one(way, settings, arguments.timeout)}, arguments.json)
    print(table(results))
    for ways in AGREE:
        digests = {run["way"]: run["digest"] for run in results["runs"] if run["way"] in ways}
        if len(set(digests.values())) > 1:
            sys.exit(f"gpu.py: these must agree bit for bit and do not: {digests}")


def run_one(way: str, settings: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Both replicas of one training; the figures of the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        job = json.dumps({**settings, "way": way, "report": str(report)})
        # Not torchrun, which would give each rank a GPU of its own.
        shared = {"WORLD_SIZE": str(NUM_REPLICAS), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                  "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # fmt: skip
        if settings["cpu"]:
            shared["ACCELERATE_USE_CPU"] = "true"
        ranks = [
            subprocess.Popen([sys.executable, __file__, "--worker", job], env={**os.environ, **shared, "RANK": str(i)})
            for i in range(NUM_REPLICAS)
        ]
        try:
            codes = [rank.wait(timeout) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(codes):
            sys.exit(f"gpu.py: {way} failed, exit codes by rank {codes}")
        return dict(json.loads(report.read_text(encoding="utf-8")))


# -- one rank ---------------------------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> None:
    """Trains on this rank, and writes the report on the first."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_edit import EDiT

    # Else two equal trainings differ in their last bits. Not warn_only, with which flash attention stays as it is.
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    dist.init_process_group("cpu:gloo,cuda:gloo")
    torch.manual_seed(0)
    sizes = SIZES["tiny" if job["cpu"] else "1b"]
    config = {"num_replicas": NUM_REPLICAS, "sync_interval": job["tau"], "delay_steps": job["delay_steps"]}
    config |= WAYS[job["way"]]
    accelerator = EDiT.accelerator(config)
    assert accelerator.num_processes == NUM_REPLICAS
    with torch.device(accelerator.device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False)).to(torch.bfloat16)
    num_parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    seconds: list[float] = []
    logs: list[dict[str, float]] = []
    with EDiT(accelerator, model, optimizer, config) as edit:
        for _ in range(job["steps"]):
            size = (job["batch_size"], job["sequence_length"])
            tokens = torch.randint(sizes["vocab_size"], size, generator=generator).to(accelerator.device)
            started = time.perf_counter()
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            edit.step(loss, tokens=tokens.numel())
            if not job["cpu"]:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            logs += edit.logs()
    if dist.get_rank() == 0:
        report = figures(model, seconds[WARM_UP_STEPS:], logs)
        report["parameters"] = num_parameters
        report["peak_bytes"] = 0 if job["cpu"] else torch.cuda.max_memory_allocated()
        Path(job["report"]).write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()


def figures(model: Any, seconds: list[float], logs: list[dict[str, float]]) -> dict[str, Any]:
    import torch

    def digest(param: Any) -> int:
        words = param.detach().view(torch.int16).flatten().to(torch.int64)
        return int((words * torch.arange(1, words.numel() + 1, device=words.device)).sum())

    return {
        "digest": sum(map(digest, model.parameters())),
        "step_seconds": statistics.mean(seconds),
        "median_step_seconds": statistics.median(seconds),
        "exposed_seconds": [entry["edit/exposed_seconds"] for entry in logs],
        "sync_seconds": [entry["edit/sync_seconds"] for entry in logs],
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each way. A step is the median, which has no sync in it."""
    rows = []
    for run in results["runs"]:
        exposed = ", ".join(f"{seconds:.2f}" for seconds in run["exposed_seconds"])
        peak = f"{run['peak_bytes'] / 1e9:.1f} GB" if run["peak_bytes"] else ""
        rows.append([run["way"], f"{run['median_step_seconds']:.3f}", exposed, peak])
    return markdown_table(["way", "step, s", "exposed in each sync, s", "peak memory"], rows)


if __name__ == "__main__":
    main()
