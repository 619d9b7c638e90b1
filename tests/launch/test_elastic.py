"""Replicas that are launches of their own, as a user would launch them: one is killed, and comes back."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from hf_edit.checkpoint.manifest import Manifest, checkpoints, problem
from tests.launch.launching import ROOT, SCRIPTS, accelerate_launch, free_port, run, start

pytestmark = pytest.mark.skipif(find_spec("torchft") is None, reason="hf_edit[elastic] is not installed")

SCRIPT = str(SCRIPTS / "coming.py")


class Job:
    """A lighthouse and two replicas of tests/launch/scripts/coming.py."""

    def __init__(self, folder: Path, kind: str, max_steps: int, pause: float) -> None:
        self.folder, self.words = folder, [kind, str(folder), str(max_steps), str(pause)]
        self.ranks = 2 if kind == "sharded" else 1
        self.port = free_port()
        words = ["-m", "hf_edit.cli.main", "lighthouse", "--port", str(self.port), "--heartbeat_seconds", "2"]
        self.lighthouse = start(words, subprocess.DEVNULL, {})
        self.processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, replica: int) -> None:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={self.ranks}", f"--master-port={free_port()}"]
        words = [*(launcher if self.ranks > 1 else []), SCRIPT, *self.words]
        environment = {"EDIT_REPLICA": str(replica), "TORCHFT_LIGHTHOUSE": f"127.0.0.1:{self.port}"}
        with (self.folder / f"output-{replica}.txt").open("a") as output:
            self.processes[replica] = start(words, output, environment)

    def kill(self, replica: int) -> None:
        family = [psutil.Process(self.processes[replica].pid)]
        for process in [*family[0].children(recursive=True), *family]:
            process.send_signal(signal.SIGKILL)
        self.processes[replica].wait()

    def notes(self, replica: int) -> list[list[dict[str, Any]]]:
        """What the first rank of each of its launches has noted."""
        lives = []
        for path in self.folder.glob(f"{replica}.*.jsonl"):
            notes = [json.loads(line) for line in path.read_text().splitlines()]
            if notes and notes[0]["first"]:
                lives.append(notes)
        return sorted(lives, key=lambda notes: notes[0]["at"])

    def wait(self, fact: Callable[[], Any], seconds: float = 180.0) -> None:
        deadline = time.monotonic() + seconds
        while not fact():
            texts = "\n".join(path.read_text()[-3000:] for path in self.folder.glob("output-*.txt"))
            assert time.monotonic() < deadline, f"waited {seconds} s: {texts}"
            codes = {replica: process.poll() for replica, process in self.processes.items()}
            assert not any(code for code in codes.values()), f"{codes}: {texts}"
            time.sleep(0.1)

    def end(self) -> list[dict[str, Any]]:
        self.wait(lambda: all(process.poll() == 0 for process in self.processes.values()))
        return [self.notes(replica)[-1][-1] for replica in self.processes]

    def close(self) -> None:
        for process in [*self.processes.values(), self.lighthouse]:
            if process.poll() is None:
                for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    one.kill()
            process.wait()


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(*args: Any, folder: str = ".") -> Job:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        made.append(Job(place, *args))
        return made[-1]

    yield make
    for job in made:
        job.close()


@pytest.mark.parametrize("kind", ["trainer", "sharded", "loop"])
def test_who_is_launched_again_goes_on_where_it_was(make_job: Callable[..., Job], kind: str, tmp_path: Path) -> None:
    job = make_job(kind, 160, 0.1)
    job.start(0)
    job.start(1)
    job.wait(lambda: job.notes(1) and len(job.notes(1)[0]) >= 30)
    job.kill(1)
    job.start(1)
    ends = job.end()
    assert [end["what"] for end in ends] == ["ended", "ended"]
    assert ends[0]["params"] == ends[1]["params"]
    assert ends[0]["step"] == ends[1]["step"] >= 160

    first, second = ([note for note in life if note["what"] == "reads"] for life in job.notes(1))
    told = second[0]["step"]
    assert told % 4 == 0, "the others know of whole intervals"
    assert 0 < told <= len(first)
    if told < len(first):  # it reads again what nobody has learnt from
        assert second[0]["rows"] == first[told]["rows"]
    learnt = [row for note in first[:told] + second for row in note["rows"]]
    mine = {row for note in job.notes(0)[0] if note["what"] == "reads" for row in note["rows"]}
    assert len(set(learnt)) == len(learnt), "no row twice"
    assert not mine & set(learnt), "each replica reads its own part"

    if kind == "loop":
        assert problem(tmp_path / "state", trainer=False) is None
        assert Manifest.read(tmp_path / "state").parts == [0, 1]
    else:
        newest = checkpoints(tmp_path / "out")[0]
        assert problem(newest) is None
        assert Manifest.read(newest).parts == [0, 1], "who does not write for all adds what is its own"
        assert not list(tmp_path.glob("out/replica-*/part"))
        assert (tmp_path / "out" / "model.safetensors").is_file()
    if kind == "trainer":  # who comes when the others have ended
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        job.start(1)
        job.wait(lambda: job.processes[1].poll() == 0)
        assert "the training has ended" in (tmp_path / "output-1.txt").read_text()
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_all_that_end_go_on_as_if_they_had_not(make_job: Callable[..., Job], tmp_path: Path) -> None:
    """Each with its own moments, remainders of codes, rows and random state."""
    whole, broken = (make_job("together", 80, 0.05, folder=name) for name in ("whole", "broken"))
    for replica in range(2):
        whole.start(replica)
    expected = whole.end()

    def has_both_parts() -> bool:
        newest = checkpoints(tmp_path / "broken" / "out")
        return bool(newest) and problem(newest[0]) is None and Manifest.read(newest[0]).parts == [0, 1]

    for _ in range(2):
        for replica in range(2):
            broken.start(replica)
        broken.wait(has_both_parts)
        for replica in range(2):
            broken.kill(replica)
    assert [path.name for path in checkpoints(tmp_path / "broken" / "out")] == ["checkpoint-40"]
    for replica in range(2):
        broken.start(replica)
    found = broken.end()

    for end, other in zip(expected, found, strict=True):
        assert other["params"] == end["params"]
        assert (other["step"], other["own"]) == (end["step"], end["own"])
    for replica in range(2):
        names = "step", "rows", "noise"
        reads = [[note[name] for name in names] for note in whole.notes(replica)[0] if note["what"] == "reads"]
        again = [[note[name] for name in names] for note in broken.notes(replica)[-1] if note["what"] == "reads"]
        assert again == reads[40:]


def test_the_demo_and_what_it_leaves(tmp_path: Path) -> None:
    """One is killed and comes back; the checkpoint is one for a single launch of four replicas, too."""
    folder = tmp_path / "demo"
    small = ["--hidden_size", "32", "--num_layers", "2", "--vocab_size", "300", "--validation_documents", "4"]
    words = [
        str(ROOT / "examples" / "elastic_demo.py"), "--num_replicas", "2", "--faults", "1", "--fault_seconds", "1",
        "--away_seconds", "0", "--output_dir", str(folder), "--max_steps", "400", *small,
    ]  # fmt: skip
    output = run(words, 700.0, {})
    assert "replica 0 is launched again" in output or "replica 1 is launched again" in output
    summary = json.loads((folder / "elastic.json").read_text())
    assert summary["faults"] == 1
    assert len(summary["back_in_step_seconds"]) == 1, output
    assert abs(sum(summary["steps"]) - 2 * 400) <= 16
    assert summary["loss"] < 4.5
    assert (folder / "elastic.png").stat().st_size > 10_000

    output = accelerate_launch(
        "cpu_4x1.yaml", ROOT / "examples" / "pretrain.py", "--output_dir", str(folder), "--max_steps", "416",
        "--resume_from_checkpoint", "true", "--edit_warmup_steps", "0", "--report_to", "none", *small,
    )  # fmt: skip
    assert "the checkpoint is of 2 replicas x 1 shards, this run has 4 replicas x 1 shards" in output
    trained = float(next(line for line in output.splitlines() if line.startswith("perplexity, trained")).split()[-1])
    assert trained < 90
