#!/usr/bin/env python
"""What a replica tells that was away: how much it should weigh, tried on two replicas in one process.

    python examples/benchmarks/stale.py --train_file train.txt --validation_file validation.txt --json stale.jsonl
    python examples/benchmarks/stale.py --table stale.jsonl

At a sync one of two replicas may be gone for some of them; the other one trains and syncs alone. Progress is the steps
of both / 2, as with elastic=True. Where it tells of the interval before it was away, its pseudo-gradient is from an
anchor that the other has left.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lib.arguments import add_files, parse_with_files
from lib.bench import markdown_table
from lib.results import add_run, open_results, read_results
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WAYS = {
    "never away": "",
    "nothing to tell": "it is away between two intervals, so nothing is stale",
    "weighs 1": "its pseudo-gradient weighs as much as another",
    "weighs 1 / (1 + missed)": "the less, the more syncs it lacks",
    "left out": "it is dropped, and its steps are not counted",
    "from the nearest point": "told from the point nearest to it on the way that the anchor has gone since",
}
SETTINGS = ("steps", "tau", "batch", "block", "hidden_size", "layers", "learning_rate", "chance", "missed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="of model, data order and who is away when")
    add("--chance", type=float, default=0.16, help="that one goes at a sync")
    add("--missed", type=int, default=5, help="syncs that it lacks then, half as many to half as many more")
    add("--steps", type=int, default=4000, help="of both / 2")
    add("--tau", type=int, default=16, help="inner steps between syncs")
    add("--batch", type=int, default=8, help="sequences of one replica in a step")
    add("--block", type=int, default=64, help="bytes of a sequence")
    add("--hidden_size", type=int, default=32, help="width of the model")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--learning_rate", type=float, default=3e-3, help="of AdamW")
    add_files(add)
    return parse_with_files(parser)


def main() -> None:
    arguments = parse()
    if arguments.table:
        print(table(read_results(arguments.table)))
        return
    torch.set_num_threads(1)
    results = open_results(arguments.json, {name: getattr(arguments, name) for name in SETTINGS})
    for seed in arguments.seeds:
        for way in arguments.ways:
            if not any((run["way"], run["seed"]) == (way, seed) for run in results["runs"]):
                run = {"way": way, "seed": seed, **Training(arguments, way, seed).run()}
                add_run(results, run, arguments.json)
                print(f"{way}, seed {seed}: {run['loss']:.4f} nats a byte", flush=True)
    print("\n" + table(results))


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each way, its losses beside those of the same seeds where none was away."""
    whole = {run["seed"]: run["loss"] for run in results["runs"] if run["way"] == "never away"}
    rows = []
    for way, what in WAYS.items():
        runs = [run for run in results["runs"] if run["way"] == way]
        if not runs:
            continue
        losses = [run["loss"] for run in runs]
        over = [run["loss"] / whole[run["seed"]] - 1 for run in runs if run["seed"] in whole]
        error = f" ± {100 * statistics.stdev(over) / math.sqrt(len(over)):.2f}" if len(set(over)) > 1 else ""
        rows.append([
            f"{way}{': ' if what else ''}{what}", len(runs), f"{statistics.fmean(losses):.4f}",
            f"{100 * statistics.fmean(over):+.2f}{error} %" if over else "",
            f"{statistics.fmean(run['alone'] for run in runs):.0f} of "
            f"{statistics.fmean(run['syncs'] for run in runs):.0f}",
            f"{statistics.fmean(run['stale'] for run in runs):.0f}",
        ])  # fmt: skip
    heading = ["what a replica tells that was away", "seeds", "validation loss", "over never away, ± standard error",
               "syncs of one alone", "stale pseudo-gradients"]  # fmt: skip
    return markdown_table(heading, rows)


@dataclass
class Held:
    """An interval that the others do not know of."""

    told: list[Tensor]
    anchor: list[Tensor]
    sync: int


class Training:
    """Two replicas, and the default outer step: Nesterov whose momentum warms up, and follows the learning rate."""

    def __init__(self, arguments: argparse.Namespace, way: str, seed: int) -> None:
        from lib.convergence_worker import NUM_BYTES, Blocks, read_bytes  # which tells Accelerate to stay on the CPU

        self.arguments, self.way, self.chance = arguments, way, random.Random(seed + 1)
        self.text = Blocks(read_bytes(arguments.train_file and str(arguments.train_file), False), arguments.block)
        validation = Blocks(
            read_bytes(arguments.validation_file and str(arguments.validation_file), True), arguments.block
        )
        self.validation = validation.spread(256)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=NUM_BYTES, hidden_size=arguments.hidden_size, intermediate_size=arguments.hidden_size * 8 // 3,
            num_hidden_layers=arguments.layers, num_attention_heads=4, max_position_embeddings=arguments.block,
        )  # fmt: skip  # as soak.py's
        self.models = [LlamaForCausalLM(config), LlamaForCausalLM(config)]
        self.models[1].load_state_dict(self.models[0].state_dict())
        self.params = [list(model.parameters()) for model in self.models]
        self.optimizers = [torch.optim.AdamW(params, weight_decay=0.1) for params in self.params]
        self.anchor = [param.detach().clone() for param in self.params[0]]
        self.velocity = [torch.zeros_like(tensor) for tensor in self.anchor]
        self.order = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(seed)).tolist()
        self.read = [0, 1]
        self.progress, self.syncs, self.last_rate = 0.0, 0, 0.0
        self.back_at, self.held = [0, 0], dict[int, Held]()
        self.alone = self.stale = 0

    def run(self) -> dict[str, float]:
        """The final loss, and how often who was away."""
        while self.progress < self.arguments.steps:
            here = self.who_is_here()
            told, weights = [], []
            for replica in here:
                held = self.held.pop(replica, None)
                if held is None:
                    self.train(replica, len(here))
                    told.append(self.learnt(replica))
                    weights.append(1.0)
                elif self.way != "left out":
                    self.stale += 1
                    told.append(self.from_nearest(held) if self.way == "from the nearest point" else held.told)
                    weights.append(1 / (1 + self.syncs - held.sync) if "missed" in self.way else 1.0)
            self.alone += len(here) == 1
            self.progress += self.arguments.tau * len(told) / 2
            self.move(told, weights)
        loss = self.evaluate()
        return {"loss": loss, "syncs": self.syncs, "alone": self.alone, "stale": self.stale}

    def who_is_here(self) -> list[int]:
        here = [replica for replica in (0, 1) if self.back_at[replica] <= self.syncs]
        if len(here) == 2 and self.way != "never away" and self.chance.random() < self.arguments.chance:
            gone = self.chance.choice(here)
            self.back_at[gone] = self.syncs + max(1, round(self.arguments.missed * self.chance.uniform(0.5, 1.5)))
            if self.way != "nothing to tell":
                self.train(gone, 2)
                self.held[gone] = Held(self.learnt(gone), [tensor.clone() for tensor in self.anchor], self.syncs)
            here.remove(gone)
        return here

    def rate(self, step: float) -> float:
        warm, steps = self.arguments.steps / 200, self.arguments.steps
        share = min(1.0, max(0.0, step - warm) / (steps - warm))
        return self.arguments.learning_rate * min(1.0, step / warm) * 0.5 * (1 + math.cos(math.pi * share))

    def train(self, replica: int, together: int) -> None:
        """An interval of a replica, with which `together` replicas make progress."""
        size = self.arguments.batch
        for step in range(self.arguments.tau):
            for group in self.optimizers[replica].param_groups:
                group["lr"] = self.rate(self.progress + (step + 1) * together / 2)
            first, self.read[replica] = self.read[replica], self.read[replica] + 2 * size
            rows = [self.text[self.order[(first + 2 * number) % len(self.order)]] for number in range(size)]
            tokens = torch.stack([row["input_ids"] for row in rows])
            self.models[replica](input_ids=tokens, labels=tokens).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params[replica], 1.0)
            self.optimizers[replica].step()
            self.optimizers[replica].zero_grad()

    def learnt(self, replica: int) -> list[Tensor]:
        return [before - param.detach() for before, param in zip(self.anchor, self.params[replica], strict=True)]

    def from_nearest(self, held: Held) -> list[Tensor]:
        ways = [before - now for before, now in zip(held.anchor, self.anchor, strict=True)]
        parts = [
            float((delta * way).sum() / way.square().sum().clamp(min=1e-30))
            for delta, way in zip(held.told, ways, strict=True)
        ]
        return [delta - min(1.0, max(0.0, part)) * way for delta, way, part in zip(held.told, ways, parts, strict=True)]

    @torch.no_grad()
    def move(self, told: Sequence[list[Tensor]], weights: Sequence[float]) -> None:
        """The outer step; everybody takes the anchor."""
        rate, momentum = self.rate(self.progress), min(0.85, self.syncs / (self.syncs + 5))
        lr = 1 - 0.2 * momentum / 0.85
        kept = min(1.0, rate / self.last_rate) if self.last_rate else 1.0
        if told:
            self.last_rate = rate
        for number, (anchor, velocity) in enumerate(zip(self.anchor, self.velocity, strict=True)):
            if told:
                deltas = [weight * delta[number] for weight, delta in zip(weights, told, strict=True)]
                average = torch.stack(deltas).sum(0) / sum(weights)
                velocity.mul_(momentum * kept).add_(average)
                anchor.sub_(lr * (average + momentum * velocity))
            for params in self.params:
                params[number].copy_(anchor)
        self.syncs += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        rows = torch.stack([self.validation[row]["input_ids"] for row in range(len(self.validation))])
        return statistics.fmean(float(self.models[0](input_ids=part, labels=part).loss) for part in rows.split(64))


if __name__ == "__main__":
    main()
