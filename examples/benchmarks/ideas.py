#!/usr/bin/env python
"""Outer steps that the library does not have, or only might get: tried on replicas in one process.

    python examples/benchmarks/ideas.py --train_file train.txt --validation_file validation.txt --json ideas.jsonl \\
        --ideas sync edit edit-moments edit-cosine
    python examples/benchmarks/ideas.py --table ideas.jsonl

A second implementation of the method in a few lines of tensors, R replicas stacked and stepped together, on the model
and the data of convergence.py. What both have ends at the same loss (1.8287, edit with seed 0).
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lib.arguments import add_files, parse_with_files
from lib.bench import markdown_table
from lib.convergence_job import Job
from lib.results import add_run, open_results, read_results
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Idea:
    """
    Args:
        muon: inside, for the blocks' matrices.
        together: one replica with the whole batch.
        uniform: equal weights; else softmax(-norm).
        lr, momentum: of the outer step.
        rule: "nesterov"; "qhm" steps by lr ((1 - nu) g + nu m), m being the moving mean of g; "cosine" is Nesterov
            whose momentum is the mean cosine of the last eight pairs of averages.
        warmup: of the outer momentum; see `outer_warmup_syncs`.
        cooldown: its momentum is at most k / (k + cooldown) at the k-th sync from the end.
        follows: the momentum shrinks with the inner learning rate to this power.
        moments: of the inner optimizer, that are averaged.
        length: power of (mean length / length of the mean) that the average is multiplied by.
        tau_end: tau at the end, to which it goes in a straight line.
        squares: of which gradients Adam's second moment is; "mean": of the mean over all replicas, as in synchronous
            training, which nobody can know without talking in every step; "estimated": of one's own, times what the
            mean's would be of them, tensor by tensor, from the correlation of a gradient with the first moment before.
        local: learning rate of local steps over that of synchronous ones.
        beta: Muon's momentum.
        rest: learning rate of what AdamW steps over that of Muon.
        delay: steps between the beginning of a sync and its application, of those that begin in `late`, shares of all
            steps.
        ahead: what a replica does as a delayed sync begins; "momentum": the outer momentum's part of the step, which
            all know; "own": the whole step, as if its own pseudo-gradient were the average.
        kept: of what it learns in the delay, as the sync is applied.
    """

    muon: bool = False
    together: bool = False
    uniform: bool = False
    rule: str = "nesterov"
    lr: float = 0.8
    momentum: float = 0.85
    nu: float = 0.7
    warmup: int = 5
    cooldown: float = 0.0
    follows: float = 0.0
    moments: tuple[str, ...] = ()
    length: float = 0.0
    tau: int = 16
    tau_end: int | None = None
    squares: str = "own"
    local: float = 1.0
    beta: float = 0.95
    rest: float = 1.0
    delay: int = 0
    late: tuple[float, float] = (0.0, 1.0)
    ahead: str = ""
    kept: float = 1.0


EDIT = Idea()
FOLLOWS = replace(EDIT, follows=1.0)
DELAYED = replace(FOLLOWS, delay=4)
MOMENTS = replace(EDIT, moments=("first", "second"))
MUON = Idea(muon=True, uniform=True, lr=1.0, momentum=0.0, moments=("first",))
SYNC_MUON = Idea(muon=True, together=True)
IDEAS = {
    "sync": Idea(together=True),
    "edit": EDIT,
    "edit-moments": MOMENTS,
    "edit-first-moments-unbounded": replace(EDIT, moments=("first",)),
    "edit-second-moments": replace(EDIT, moments=("second",)),
    "edit-uniform": replace(MOMENTS, uniform=True),
    "edit-warmup-10": replace(MOMENTS, warmup=10),
    "edit-momentum-0.6": replace(MOMENTS, momentum=0.6),
    "edit-gain-1.3": replace(MOMENTS, lr=1.3, momentum=0.0, warmup=0),
    "edit-gain-1.6": replace(MOMENTS, lr=1.6, momentum=0.0, warmup=0),
    "edit-qhm": replace(MOMENTS, rule="qhm", lr=1.5, momentum=0.9),
    "edit-cosine": replace(MOMENTS, rule="cosine"),
    "edit-follows-lr": replace(MOMENTS, follows=1.0),
    "edit-cooldown": replace(MOMENTS, cooldown=3.0),
    "edit-shrinking": replace(MOMENTS, tau=24, tau_end=8),
    "edit-growing": replace(MOMENTS, tau=8, tau_end=24),
    **{f"edit-local-{by:g}": replace(FOLLOWS, local=by) for by in (1.0, 1.4, 2.0)},
    **{f"edit-moments-local-{by:g}": replace(MOMENTS, follows=1.0, local=by) for by in (0.7, 1.4, 2.0)},
    **{
        f"edit-moments-tau-{tau}-to-{end}": replace(MOMENTS, follows=1.0, tau=tau, tau_end=end)
        for tau, end in ((16, 16), (8, 24), (4, 28), (24, 8))
    },
    "edit-moments-warmup-2": replace(MOMENTS, follows=1.0, warmup=2),
    "edit-mean-squares": replace(FOLLOWS, squares="mean"),
    "edit-estimated-squares": replace(FOLLOWS, squares="estimated"),
    "edit-moments-mean-squares": replace(MOMENTS, follows=1.0, squares="mean"),
    "edit-moments-estimated-squares": replace(MOMENTS, follows=1.0, squares="estimated"),
    "average": Idea(uniform=True, lr=1.0, momentum=0.0),
    "average-mean-squares": Idea(uniform=True, lr=1.0, momentum=0.0, squares="mean"),
    "sync-muon": SYNC_MUON,
    **{f"sync-muon-rest-{by:g}": replace(SYNC_MUON, rest=by) for by in (0.25, 2.0)},
    **{f"muon-moments-rest-{by:g}": replace(MUON, rest=by) for by in (0.25, 2.0)},
    "muon-average": replace(MUON, moments=()),
    "muon-average-moments": MUON,
    **{f"muon-average-moments-local-{by:g}": replace(MUON, local=by) for by in (0.7, 1.4)},
    "muon-gain-1.4-local-0.7": replace(MUON, lr=1.4, local=0.7),
    "muon-average-moments-length-0.5": replace(MUON, length=0.5),
    "muon-average-moments-tau-12": replace(MUON, tau=12),
    "muon-momentum-0.3-follows-lr": replace(MUON, lr=0.9, momentum=0.3, follows=1.0),
    **{f"muon-average-moments-beta-{by:g}": replace(MUON, beta=by) for by in (0.9, 0.975)},
    "sync-muon-beta-0.975": replace(SYNC_MUON, beta=0.975),
    **{f"muon-average-moments-tau-{tau}-to-{32 - tau}": replace(MUON, tau=tau, tau_end=32 - tau) for tau in (8, 4)},
    "muon-average-moments-mean-squares": replace(MUON, squares="mean"),
    "muon-gain-1.2": replace(MUON, lr=1.2),
    "muon-momentum-0.5": replace(MUON, lr=0.8, momentum=0.5),
    **{f"edit-tau-{tau}": replace(FOLLOWS, tau=tau) for tau in (20, 24)},
    **{f"delayed-{by}": replace(FOLLOWS, delay=by) for by in (2, 4)},
    "delayed-early": replace(DELAYED, late=(0.0, 0.5)),
    "delayed-late": replace(DELAYED, late=(0.5, 1.0)),
    **{f"delayed-ahead-{what}": replace(DELAYED, ahead=what) for what in ("momentum", "own")},
    "delayed-momentum-0.6": replace(DELAYED, momentum=0.6),
    **{f"delayed-kept-{by:g}": replace(DELAYED, kept=by) for by in (0.0, 0.5)},
    "delayed-local-1.4": replace(DELAYED, local=1.4),
    "delayed-kept-0.5-local-1.4": replace(DELAYED, kept=0.5, local=1.4),
    "muon-edit": replace(EDIT, muon=True, moments=("first",)),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--ideas", nargs="+", choices=IDEAS, default=["sync", "edit"], metavar="IDEA", help=f"of {', '.join(IDEAS)}")
    add("--learning_rates", nargs="+", type=float, default=[3e-3], help="each is tried")
    add("--seeds", nargs="+", type=int, default=[0], help="of model and data order")
    add("--replicas", type=int, default=4, help="R")
    add("--batch", type=int, default=8, help="sequences of one replica in a step")
    add("--steps", type=int, default=640, help="of a training")
    add("--warmup", type=int, default=64, help="synchronous steps first")
    add("--block", type=int, default=64, help="bytes of a sequence")
    add("--base", type=Path, help="folder of a model to fine-tune; None: a new one is trained")
    add_files(add)
    return parse_with_files(parser)


def main() -> None:
    arguments = parse()
    if arguments.table:
        print(table(read_results(arguments.table)))
        return
    torch.set_num_threads(1)
    settings = {name: getattr(arguments, name) for name in ("replicas", "batch", "steps", "warmup")}
    if (arguments.block, arguments.base) != (64, None):
        settings |= {"block": arguments.block, "base": arguments.base and arguments.base.name}
    results = open_results(arguments.json, settings)
    for seed in arguments.seeds:
        for name in arguments.ideas:
            for rate in arguments.learning_rates:
                cell = {"idea": name, "learning_rate": rate, "seed": seed}
                if any(cell.items() <= run.items() for run in results["runs"]):
                    continue
                run = {
                    **cell,
                    **Training(IDEAS[name], make_job(arguments, seed, rate)).run(),
                    "is": asdict(IDEAS[name]),
                }
                add_run(results, run, arguments.json)
                print(f"{name} {rate:g} seed {seed}: {run['loss']:.4f} nats a byte", flush=True)
    print("\n" + table(results))


def make_job(arguments: argparse.Namespace, seed: int, rate: float) -> Job:
    files = {name: getattr(arguments, name) for name in ("train_file", "validation_file")}
    return Job(
        method="", scenario="clean", seed=seed, num_replicas=arguments.replicas, sharded=False, steps=arguments.steps,
        tau=0, sync_seconds=None, warmup=arguments.warmup, batch=arguments.batch, block=arguments.block,
        hidden_size=64, layers=3, learning_rate=rate, evaluations=1, validation_blocks=512, fault_first=0,
        fault_steps=0, fault_factor=1.0, report="", base=arguments.base and str(arguments.base),
        **{name: file and str(file) for name, file in files.items()},
    )  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each idea and learning rate."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        cells.setdefault((run["idea"], run["learning_rate"]), []).append(run)
    rows = [
        [name, f"{rate:g}", f"{statistics.fmean(run['loss'] for run in runs):.4f}", len(runs),
         f"{runs[0]['cosine']:.2f}" if runs[0]["cosine"] else ""]
        for (name, rate), runs in sorted(cells.items(), key=lambda cell: (list(IDEAS).index(cell[0][0]), cell[0][1]))
    ]  # fmt: skip
    heading = ["idea", "learning rate", "validation loss", "seeds", "cosine of successive averages"]
    return markdown_table(heading, rows)


@dataclass
class UnderWay:
    """A sync that has begun: where the replicas were, what their moments change by, and the step that applies it."""

    params: Tensors
    moments: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    due: int = 0


class Training:
    """All replicas' tensors, the first axis being the replica."""

    def __init__(self, idea: Idea, job: Job) -> None:
        from lib.convergence_worker import build_model, read_rows  # which tells Accelerate to stay on the CPU

        self.idea, self.job = idea, job
        self.texts = {validation: read_rows(job, validation) for validation in (False, True)}
        self.count = 1 if idea.together else job.num_replicas
        self.batch = job.batch * job.num_replicas // self.count
        torch.manual_seed(job.seed)
        self.model = build_model(job)
        self.model.set_attn_implementation("eager")
        named = dict(self.model.named_parameters())
        self.params = {n: p.detach().clone()[None].repeat(self.count, *[1] * p.ndim) for n, p in named.items()}
        self.matrices = {n for n, p in named.items() if idea.muon and p.ndim == 2 and "layers" in n}
        self.first, self.second = ({n: torch.zeros_like(p) for n, p in self.params.items()} for _ in range(2))
        self.mask = torch.full((job.block, job.block), -math.inf).triu(1)[None, None]
        self.units: dict[str, list[str]] = {}
        for name in named:
            unit = name.split("layers.")[1].split(".")[0] if "layers." in name else "embed" in name
            self.units.setdefault(str(unit), []).append(name)
        self.syncs, self.cosines, self.rates = 0, list[float](), list[float]()
        self.before: Tensor | None = None
        self.seen: Tensors = {}
        self.under_way: UnderWay | None = None

    def run(self) -> dict[str, float]:
        """The final loss, and what was seen."""
        rows, job = self.texts[False].rows, self.job
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(job.seed))
        size, since = job.batch * job.num_replicas, 0
        for step in range(job.steps):
            if self.count > 1 and step == job.warmup:
                self.anchor = {name: param[0].clone() for name, param in self.params.items()}
                self.velocity = {name: torch.zeros_like(tensor) for name, tensor in self.anchor.items()}
            first = step * size % (len(order) - size)
            tokens = with_labels(rows[order[first : first + size].numpy()])
            self.step(step, tokens.view(self.count, self.batch, 2, -1))
            if self.count > 1 and step >= job.warmup:
                since += 1
                if self.under_way is not None and step >= self.under_way.due:
                    self.apply(since)
                if since >= self.tau(step) or step == job.steps - 1:
                    self.sync(step, since)
                    since = 0
        cosine = statistics.fmean(self.cosines) if self.cosines else 0.0
        return {"loss": self.evaluate(), "cosine": cosine, "syncs": self.syncs}

    def tau(self, step: int) -> float:
        share = (step - self.job.warmup) / (self.job.steps - self.job.warmup)
        end = self.idea.tau if self.idea.tau_end is None else self.idea.tau_end
        return round(self.idea.tau + (end - self.idea.tau) * share)

    def loss(self, params: Tensors, tokens: Tensor) -> Tensor:
        tokens, labels = tokens.unbind(1)
        given = dict(input_ids=tokens, use_cache=False, attention_mask=self.mask.expand(len(tokens), -1, -1, -1))
        logits = functional_call(self.model, (params, dict(self.model.named_buffers())), kwargs=given).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def rate(self, step: int) -> float:
        warm = max(self.job.steps // 20, 1)
        share = (step - warm) / (self.job.steps - warm)
        return self.job.learning_rate * (step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * share)))

    def step(self, step: int, tokens: Tensor) -> None:
        """Gradients clipped to 1, as the Trainer does, then Muon or AdamW."""
        if self.count > 1:
            grads, _ = vmap(grad_and_value(self.loss))(self.params, tokens)
        else:
            alone, _ = grad_and_value(self.loss)({name: param[0] for name, param in self.params.items()}, tokens[0])
            grads = {name: grad[None] for name, grad in alone.items()}
        if step < self.job.warmup:
            grads = {name: grad.mean(0, keepdim=True).expand_as(grad) for name, grad in grads.items()}
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
        clip, lr = (1 / (norms + 1e-6)).clamp(max=1.0), self.rate(step)
        self.rates.append(lr)
        lr *= self.idea.local if step >= self.job.warmup and self.count > 1 else 1.0
        for name, param in self.params.items():
            grad, first, second = grads[name] * along(clip, param), self.first[name], self.second[name]
            own = lr if name in self.matrices else lr * self.idea.rest
            param.mul_(1 - own * 0.1 * (param.ndim > 2))
            if name in self.matrices:
                first.lerp_(grad, 1 - self.idea.beta)
                param.add_(
                    orthogonal(grad.lerp(first, self.idea.beta)), alpha=-own * 0.2 * math.sqrt(max(param.shape[1:]))
                )
                continue
            second.mul_(0.95).add_(self.squares(name, grad, first, step), alpha=0.05)
            first.lerp_(grad, 0.1)
            root = (second / (1 - 0.95 ** (step + 1))).sqrt_().add_(1e-8)
            param.addcdiv_(first / (1 - 0.9 ** (step + 1)), root, value=-own)

    def squares(self, name: str, grad: Tensor, first: Tensor, step: int) -> Tensor:
        """What enters Adam's second moment."""
        if self.idea.squares == "own" or step < self.job.warmup:
            return grad * grad
        if self.idea.squares == "mean":
            return grad.mean(0, keepdim=True).square().expand_as(grad)
        found = torch.stack([(grad * first).flatten(1).sum(1), grad.flatten(1).square().sum(1)])
        seen = self.seen.setdefault(name, found.clone())
        seen.lerp_(found, 0.05)
        signal = (seen[0] / seen[1]).clamp(0, 1)
        return grad * grad * along(signal + (1 - signal) / self.job.num_replicas, grad)

    def sync(self, step: int, since: int) -> None:
        """Weigh, average, step the anchor; and the replicas, at once or `delay` steps later."""
        if self.under_way is not None:
            self.apply(since)
        now = UnderWay({name: param.clone() for name, param in self.params.items()})
        averages: Tensors = {}
        for names in self.units.values():
            deltas = {name: self.anchor[name] - self.params[name] for name in names}
            norms = torch.stack([delta.flatten(1).square().sum(1) for delta in deltas.values()]).sum(0).sqrt()
            weights = torch.ones_like(norms) / self.count if self.idea.uniform else torch.softmax(-norms, 0)
            found = {name: mean(delta, weights) for name, delta in deltas.items()}
            size = math.sqrt(sum(float(average.square().sum()) for average in found.values()))
            stretch = (float(weights @ norms) / size) ** self.idea.length
            averages |= {name: average * stretch for name, average in found.items()}
            for kind in self.idea.moments:
                for name in names:
                    moment = (self.first if kind == "first" else self.second)[name]
                    now.moments[kind, name] = mean(moment, weights) - moment
        flat = torch.cat([average.flatten() for average in averages.values()])
        if self.before is not None:
            self.cosines.append(float(torch.cosine_similarity(flat, self.before, dim=0)))
        self.before = flat
        ahead = self.foresee(step, since)
        self.move(averages, step, since)
        self.syncs += 1
        first, end = self.idea.late
        late = first <= step / self.job.steps < end and step < self.job.steps - 1
        now.due = step + self.idea.delay * late
        self.under_way = now
        if now.due == step:
            self.apply(0)
            return
        for name, by in ahead.items():
            self.params[name].sub_(by)
            now.params[name].sub_(by)

    def foresee(self, step: int, since: int) -> Tensors:
        """By how much each replica goes ahead while a sync is under way, of its outer step that is to come."""
        lr, momentum, kept = self.outer(step, since)
        ahead: Tensors = {}
        for name, param in self.params.items():
            velocity, own = momentum * kept * self.velocity[name], self.anchor[name] - param
            if self.idea.ahead == "own":
                ahead[name] = lr * (own + momentum * (velocity + own)) - own
            elif self.idea.ahead == "momentum":
                ahead[name] = (lr * momentum * velocity)[None]
        return ahead

    def apply(self, after: int) -> None:
        """The sync under way, so many steps after it has begun."""
        now, self.under_way = self.under_way, None
        assert now is not None
        for name, param in self.params.items():
            param[:] = self.anchor[name] + self.idea.kept * (param - now.params[name])
        for (kind, name), by in now.moments.items():
            moments, forgets = (self.first, 0.9) if kind == "first" else (self.second, 0.95)
            moments[name].add_(by * forgets**after)

    def move(self, averages: Tensors, step: int, since: int) -> None:
        """The outer step."""
        lr, momentum, kept = self.outer(step, since)
        for name, average in averages.items():
            velocity, anchor = self.velocity[name], self.anchor[name]
            if self.idea.rule == "qhm":
                velocity.mul_(momentum).add_(average, alpha=1 - momentum)
                anchor.sub_(lr * ((1 - self.idea.nu) * average + self.idea.nu * velocity))
            else:
                velocity.mul_(momentum * kept).add_(average)
                anchor.sub_(lr * (average + momentum * velocity))

    def outer(self, step: int, since: int) -> tuple[float, float, float]:
        """The outer step's learning rate, its momentum, and what the momentum keeps beside."""
        idea, momentum = self.idea, self.idea.momentum
        if idea.rule == "cosine":
            recent = self.cosines[-8:]
            momentum = min(momentum, max(0.0, statistics.fmean(recent))) if recent else 0.0
        elif idea.warmup and momentum:
            momentum = min(momentum, self.syncs / (self.syncs + idea.warmup))
        if idea.cooldown:
            left = (self.job.steps - 1 - step) / idea.tau
            momentum = min(momentum, left / (left + idea.cooldown))
        lr = 1 - (1 - idea.lr) * momentum / idea.momentum if idea.momentum and idea.rule != "qhm" else idea.lr
        now, earlier = statistics.fmean(self.rates[-since:]), self.rates[-since - idea.tau : -since]
        kept = min(1.0, now / statistics.fmean(earlier)) ** idea.follows if self.syncs else 1.0
        return lr, momentum, kept

    @torch.no_grad()
    def evaluate(self) -> float:
        rows = self.texts[True].spread(self.job.validation_blocks).rows
        params = {name: param[0] for name, param in self.params.items()}
        return statistics.fmean(float(self.loss(params, part)) for part in with_labels(rows).chunk(8))


def with_labels(rows: Any) -> Tensor:
    """Tokens and labels, [..., 2, block]: text is its own."""
    tokens = torch.from_numpy(rows).long()
    return tokens if tokens.ndim == 3 else torch.stack([tokens, tokens], 1)


def along(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * along(weights, values)).sum(0)


def orthogonal(matrices: Tensor) -> Tensor:
    """Of each matrix, by Muon's Newton-Schulz iterations, in fp32."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


if __name__ == "__main__":
    main()
