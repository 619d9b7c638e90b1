"""What `hf-edit check` reads, says and refuses, and what --measure makes of its measurements."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hf_edit import EDiTConfig
from hf_edit.cli import main, measure
from hf_edit.cli.job import Numbers, Settings
from hf_edit.cli.launch import read_launch, read_settings
from hf_edit.cli.simulation import simulate
from hf_edit.cli.sizes import amount, build_model, memory_bytes, model_config, unit_sizes
from hf_edit.peers.layout import Layout, ring_bytes

CONFIGS = Path(__file__).parents[3] / "accelerate_configs"
TINY = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=10, hidden_size=8, intermediate_size=16,
    num_hidden_layers=3, num_attention_heads=2, tie_word_embeddings=False,
)  # fmt: skip
BLOCK = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8  # attention, MLP, two norms


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDIT_CONFIG", "ACCELERATE_USE_CPU", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY), encoding="utf-8")
    return str(path)


def accelerate_config(folder: Path, base: str = "two_nodes_8gpu", **changes: Any) -> str:
    """A file as in accelerate_configs with `changes`; a dict changes what lies in one, None takes a key out."""
    config = yaml.safe_load((CONFIGS / f"{base}.yaml").read_text(encoding="utf-8"))
    for name, value in changes.items():
        if isinstance(value, dict):
            config[name] |= value
        else:
            config[name] = value
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}), encoding="utf-8")
    return str(path)


def axes(replicas: int, shards: int, **more: int) -> dict[str, int]:
    sizes = {"dp_replicate": replicas, "dp_shard": shards, **more}
    return {f"parallelism_config_{name}_size": size for name, size in sizes.items()}


def edit_file(folder: Path, **settings: Any) -> str:
    path = folder / "edit.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


class Check:
    """`hf-edit check WORDS`: its exit code and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self.code = main.main(["check", *words])
        self.output = capsys.readouterr().out

    def of(self, kind: str) -> list[str]:
        return [line.partition(": ")[2] for line in self.output.splitlines() if line.startswith(f"{kind}: ")]


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "processes", "layout", "replica", "size"),
    [
        ("cpu_2x2", "4: 1 machine x 4", "2 replicas x 2 shards (FSDP2)", 1, "ranks 2 to 3, machine 0"),
        ("cpu_4x1", "4: 1 machine x 4", "4 replicas x 1 shards (DDP)", 3, "rank 3, machine 0"),
        ("node_8gpu_2x4", "8: 1 machine x 8", "2 replicas x 4 shards (FSDP2)", 1, "ranks 4 to 7, machine 0"),
        ("two_nodes_8gpu", "16: 2 machines x 8", "2 replicas x 8 shards (FSDP2)", 1, "ranks 8 to 15, machine 1"),
        ("four_nodes_8gpu", "32: 4 machines x 8", "4 replicas x 8 shards (FSDP2)", 3, "ranks 24 to 31, machine 3"),
    ],
)
def test_our_own_configurations_are_fine(
    name: str, processes: str, layout: str, replica: int, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check = Check(capsys, "--config_file", str(CONFIGS / f"{name}.yaml"), "--strict")
    assert check.code == 0
    assert f"processes    {processes}\nlayout       {layout}\n" in check.output
    assert f"  replica {replica}  {size}\n" in check.output
    assert "nothing to warn of" in check.output
    told = any("this launcher does not hand it on" in note for note in check.of("note"))
    assert told == name.startswith("cpu"), "the launcher ignores use_cpu"


def test_a_launch_command(tmp_path: Path) -> None:
    """Variables before it, the launcher's flags over the file's, the script's flags behind its name."""
    launch = read_launch(
        f"EDIT_CONFIG={edit_file(tmp_path, sync_interval=32, outer_lr=0.5)} ACCELERATE_USE_CPU=true accelerate launch "
        f"--config_file {CONFIGS}/cpu_2x2.yaml --num_processes 8 \\\n train.py --sync-interval 64 --overlap=delayed "
        "--edit_warmup_steps 3 --max_steps 100 --warmup_steps 7 --delay 9 --offload_outer_state"
    )
    assert (launch.world_size, launch.num_machines, launch.on_cpu, launch.lone) == (8, 1, True, False)
    assert launch.edit_flags == {
        "sync_interval": 64, "overlap": "delayed", "edit_warmup_steps": 3, "offload_outer_state": True,
    }, "what no other trainer's flags can be taken for"  # fmt: skip
    assert launch.flags["max_steps"] == 100
    config, notes = read_settings(None, launch)
    assert config == EDiTConfig(
        sync_interval=64, outer_lr=0.5, overlap="delayed", edit_warmup_steps=3, offload_outer_state=True
    )
    assert len(notes) == 1
    assert "does not read EDIT_CONFIG" in notes[0]


@pytest.mark.parametrize("words", ["accelerate-launch", "python -m accelerate.commands.launch", "accelerate launch"])
def test_names_of_the_launcher(words: str) -> None:
    launch = read_launch(f"{words} --config_file {CONFIGS}/cpu_4x1.yaml train.py --use_cpu --num_replicas 2")
    assert launch.world_size == 4
    assert launch.edit_flags == {"num_replicas": 2}


def test_where_settings_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = read_launch(None, str(CONFIGS / "cpu_4x1.yaml"))
    config, notes = read_settings(None, launch)
    assert config == EDiTConfig()
    assert "these are the defaults" in notes[0]
    path = edit_file(tmp_path, sync_interval=32)
    assert read_settings(path, launch) == (EDiTConfig(sync_interval=32), [])
    monkeypatch.setenv("EDIT_CONFIG", path)
    assert read_settings(None, read_launch(None, str(CONFIGS / "cpu_4x1.yaml"))) == (EDiTConfig(sync_interval=32), [])
    assert read_settings(None, None)[0] == EDiTConfig(sync_interval=32)


def test_amounts() -> None:
    assert [amount(text) for text in ("1.1b", "350M", "7")] == [1_100_000_000, 350_000_000, 7]
    with pytest.raises(Exception, match="such as 350m or"):
        amount("many")


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_units_are_the_trainings(model: str) -> None:
    with torch.device("meta"):
        built = build_model(model_config(model))
    assert type(built).__name__ == "LlamaForCausalLM"
    assert sorted(unit_sizes(built)) == sorted([80, BLOCK, BLOCK, BLOCK, 8 + 80]), "embeddings, blocks, norm with head"


@pytest.mark.parametrize(
    ("settings", "state", "buffers", "host"),
    [
        ({}, 2 * 400, 200, 0),  # the largest two neighbours of 10, 30, 60, 40 and 60 parameters, on two ranks
        ({"units_in_flight": 1}, 800, 120, 0),
        ({"units_in_flight": 9}, 800, 400, 0),
        ({"overlap": "none"}, 800, 400, 0),
        ({"overlap": "delayed"}, 800, 240, 800),
        ({"outer_optimizer": "none"}, 400, 200, 0),
        ({"outer_momentum": 0.0}, 400, 200, 0),
        ({"offload_outer_state": True}, 800, 200 + 240, 0),
        ({"compression": "int8"}, 1200, 2 * 320, 0),  # of three neighbours the sums, and what is left out beside
        ({"compression": "int8", "overlap": "none"}, 1200, 800, 0),
        ({"compression": "int8", "overlap": "delayed"}, 800, 240, 1600),
        ({"tune": "auto", "overlap": "delayed"}, 800, 240, 1600),  # may come to codes
        ({"sync_moments": "both"}, 800, 3 * 200, 0),
        ({"sync_moments": "first", "overlap": "delayed"}, 800, 3 * 120, 1600),
    ],
)
def test_memory_on_paper(settings: dict[str, Any], state: int, buffers: int, host: int) -> None:
    sizes = [10, 30, 60, 40, 60]
    assert memory_bytes(EDiTConfig(**settings), sizes, 2) == {"state": state, "buffers": buffers, "host": host}


def test_pinned_memory_is_rounded_up() -> None:
    """Of 20, 60, 120, 80 and 120 bytes to 32, 64, 128, 128 and 128."""
    for settings, state, host in (
        ({}, 800, 0),
        ({"offload_outer_state": True, "overlap": "delayed"}, 960, 960),
        ({"offload_outer_state": True, "compression": "int8"}, 1440, 0),  # and what codes leave out
    ):
        found = memory_bytes(EDiTConfig(**settings), [10, 30, 60, 40, 60], 2, pinned=True)
        assert (found["state"], found["host"]) == (state, host)


def test_the_lines_on_bytes_and_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check = Check(capsys, "--config_file", str(CONFIGS / "four_nodes_8gpu.yaml"), "--parameters", "800m",
                  "--edit_config", edit_file(tmp_path, offload_outer_state=True, overlap="delayed"))  # fmt: skip
    # 3.2 GB, sent 2 * 3 / 4 times; in pinned memory anchor and momentum of ten times 40 MB, for each 64 MiB; a unit's
    # delta, average, anchor, momentum; in pinned memory twice all that a rank has.
    assert "sent a sync  600 MB a rank, 4.8 GB a replica" in check.output
    assert "memory       1.34 GB a rank in host memory for anchor and momentum" in check.output
    assert "in a sync  160 MB more on the device and 1.34 GB in host memory" in check.output
    assert "taken to be 10 equal units" in check.output
    assert "applied 4 steps later" in check.output


def test_a_models_numbers(capsys: pytest.CaptureFixture[str], model: str) -> None:
    check = Check(capsys, "--config_file", str(CONFIGS / "cpu_4x1.yaml"), "--model", str(Path(model).parent))
    parameters = 168 + 3 * BLOCK
    assert f"{parameters / 1e6:.4g} million trained parameters in 5 units" in check.output
    assert f"sent a sync  {4 * parameters * 1.5 / 1e3:.3g} kB a rank" in check.output


# -- warnings ---------------------------------------------------------------------------------------------------------

WITHOUT_EFFECT = [
    ({"delay_steps": 8}, "", "delay_steps=8 has no effect with overlap='forward'. Leave it out, or set overlap='del"),
    ({"softmax_temperature": 2.0, "weighting": "uniform"}, "", "softmax_temperature=2.0 has no effect with weighting="),
    ({"outer_lr": 0.7, "outer_optimizer": "none"}, "", "outer_lr=0.7 has no effect with outer_optimizer='none'"),
    ({"outer_momentum": 0.0, "outer_warmup_syncs": 3}, "", "outer_warmup_syncs=3 has no effect with outer_momentum=0"),
    ({"anomaly_threshold": None, "ema_alpha": 0.1}, "", "ema_alpha=0.1 has no effect with anomaly_threshold=None"),
    ({"weighting": "steps"}, "", "weighting='steps' is no other than 'uniform' with sync_interval"),
    ({"offload_outer_state": True}, "--use_cpu", "offload_outer_state=True has no effect on CPUs"),
    ({}, "--torch_compile", "overlap='forward' has no effect on a compiled model"),
    ({"sync_interval": 64}, "--max_steps 50", "This training takes 50 inner steps, fewer than sync_interval=64"),
    ({"num_replicas": 4}, "", "dp_replicate_size: 2 in the Accelerate config has no effect beside num_replicas=4"),
    ({"num_replicas": 16}, "", "FSDP's settings have no effect with replicas of one rank"),
    ({"num_replicas": 1}, "", "There is one replica, so EDiTTrainer is a plain Trainer"),
]


@pytest.mark.parametrize(("settings", "flags", "text"), WITHOUT_EFFECT)
def test_settings_without_effect(
    settings: dict[str, Any], flags: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"accelerate launch --config_file {CONFIGS}/two_nodes_8gpu.yaml train.py {flags}"
    words = ["--launch", command, "--edit_config", edit_file(tmp_path, **settings)]
    check = Check(capsys, *words)
    assert any(warning.startswith(text) for warning in check.of("warning")), check.output
    assert (check.code, Check(capsys, *words, "--strict").code) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"sync_interval": 32, "delay_steps": 8}, 48),
        ({"sync_interval": 32, "delay_steps": 8, "compression": "int4"}, 48),
        ({"sync_interval": 32, "delay_steps": 4}, None),
        ({"sync_interval": 32, "delay_steps": 8, "tune": "auto"}, None),
        ({}, None),
    ],
)
def test_what_a_long_delay_costs(
    settings: dict[str, Any], steps: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = edit_file(tmp_path, overlap="delayed", **settings)
    check = Check(capsys, "--config_file", str(CONFIGS / "two_nodes_8gpu.yaml"), "--edit_config", edit, "--strict")
    assert check.code == 0, "no warning"
    found = [note for note in check.of("note") if "replicas learn about as much" in note]
    assert len(found) == (steps is not None)
    assert all(f"as with prompt syncs every {steps} steps" in note for note in found)
    assert all(("compression='int8'" in note) == ("compression" not in settings) for note in found)


@pytest.mark.parametrize("preset", ["edit", "a-edit", "diloco", "post-local-sgd"])
def test_presets_have_an_effect(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = EDiTConfig.preset(preset).to_dict()
    settings.pop("sync_seconds" if settings["sync_seconds"] is None else "sync_interval")
    check = Check(capsys, "--config_file", str(CONFIGS / "two_nodes_8gpu.yaml"), "--strict",
                  "--edit_config", edit_file(tmp_path, **settings))  # fmt: skip
    assert check.code == 0, check.output


LAUNCHES: list[tuple[str, dict[str, Any], str]] = [
    ("four_nodes_8gpu", {"parallelism_config": axes(2, 16)},
     "Replica 0 lies on machines 0 to 1, so each inner step gathers the model over the link between them. Let a "
     "replica fit into a machine, such as dp_replicate_size: 4, dp_shard_size: 8."),
    ("cpu_4x1", {"distributed_type": "MULTI_CPU"}, "num_processes: 4, but for this distributed_type Accelerate starts"),
    ("two_nodes_8gpu", {"num_processes": 17}, "num_processes: 17 on 2 machines starts 8 on each, 16 in all."),
    ("two_nodes_8gpu", {"main_process_ip": None}, "main_process_ip is not set, so the machines do not find each other"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "text"), LAUNCHES)
def test_what_the_launcher_does(
    base: str, changes: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = Check(capsys, "--config_file", accelerate_config(tmp_path, base, **changes))
    assert any(warning.startswith(text) for warning in check.of("warning")), check.output


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"num_replicas": 3}, "num_replicas=3 does not divide the 16 processes"),
    ({}, {"num_replicas": 32}, "num_replicas=32, but only 16 process(es) take part"),
    ({}, {"sync_interval": 0}, "sync_interval=0: a whole number of at least 1 is needed"),
    ({}, {"sync_interval": 8, "sync_seconds": 3.0}, "sync_interval=8 and sync_seconds=3.0 are both set"),
    ({}, {"tau": 4}, "Unknown EDiTConfig settings"),
    ({"parallelism_config": axes(2, 4)}, {}, "dp_replicate_size=2 times dp_shard_size=4 is not the 16 processes"),
    ({"parallelism_config": axes(2, 4, tp=2)}, {}, "tp_size=2: EDiT shards a replica with FSDP2 (dp_shard) alone"),
    ({"fsdp_config": {"fsdp_version": 1}, "parallelism_config": None}, {}, "fsdp_version=1: EDiT needs FSDP2"),
    ({"fsdp_config": {"fsdp_offload_params": True}}, {}, "FSDP's cpu_offload keeps the parameters in host memory"),
    ({"distributed_type": "MULTI_GPU", "fsdp_config": None, "parallelism_config": None}, {},
     "num_replicas=2 on 16 processes gives replicas of 8 ranks, which need FSDP2, but FSDP is off"),
    ({"distributed_type": "DEEPSPEED", "fsdp_config": None, "parallelism_config": None}, {}, "DeepSpeed is on"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "settings", "text"), REFUSED)
def test_refused_at_the_start(
    changes: dict[str, Any],
    settings: dict[str, Any],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--config_file", accelerate_config(tmp_path, **changes)]
    check = Check(capsys, *words, "--edit_config", edit_file(tmp_path, **settings))
    assert check.code == 2
    (refusal,) = check.of("refused")
    assert text in refusal


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--launch", "python train.py"], "there is no `accelerate launch` in it"),
        (["--launch", "accelerate launch --multi_gpu --num_machines 2 --num_processes 4 train.py"],
         "num_machines: 2, but machine_rank is not given"),
        (["--launch", "accelerate launch --config_file a.yaml t.py", "--config_file", "b.yaml"], "Give one of them"),
        (["--config_file", "nowhere.yaml"], "does not exist"),
        (["--launch", f"accelerate launch --config_file {CONFIGS}/cpu_4x1.yaml t.py --sync_interval x"],
         "The training script's flags: argument --sync_interval/--sync-interval: invalid int value: 'x'"),
        (["--config_file", f"{CONFIGS}/cpu_4x1.yaml", "--model", "nowhere/model"], "nothing is downloaded"),
        (["--config_file", f"{CONFIGS}/cpu_2x2.yaml", "--model", "t5"], "FSDP2 cannot shard"),
        (["--config_file", f"{CONFIGS}/cpu_4x1.yaml", "--edit_config", "nowhere.yaml"], "no such file"),
        (["--measure"], "--measure needs the processes of a training"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    check = Check(capsys, *words)
    assert check.code == 2
    assert text in check.output


# -- measuring --------------------------------------------------------------------------------------------------------


class Wire:
    """`Peers` whose all-reduces take a link's time on a clock of its own."""

    def __init__(self, layout: Layout, bits_per_second: float, delay_seconds: float) -> None:
        self.layout = layout
        self._bits_per_second, self._delay_seconds = bits_per_second, delay_seconds
        self.seconds = 0.0

    def clock(self) -> float:
        return self.seconds

    def barrier(self) -> None: ...

    def gather_object(self, value: Any) -> list[Any]:
        return [value] * self.layout.num_replicas * self.layout.replica_size

    def all_reduce(self, tensors: list[Tensor]) -> Wire:
        sent = self.layout.replica_size * ring_bytes(tensors[0].nbytes, self.layout.num_replicas)
        messages = 2 * (self.layout.num_replicas - 1)
        self.seconds += 8 * 1.05 * sent / self._bits_per_second + messages * self._delay_seconds
        return self

    def wait(self) -> None: ...


@pytest.mark.parametrize("layout", [Layout(2, 2, 0), Layout(4, 1, 0)], ids=str)
@pytest.mark.parametrize("bits_per_second", [1e7, 1e9])
def test_a_links_rate_and_round_trip(layout: Layout, bits_per_second: float) -> None:
    wire = Wire(layout, bits_per_second, delay_seconds=0.01)
    link = measure.measure_link(wire, torch.device("cpu"), seconds=5.0, clock=wire.clock)
    assert link.bits_per_second == pytest.approx(bits_per_second, rel=1e-3)
    assert link.slowest <= link.bits_per_second <= link.fastest
    assert link.round_trip_seconds == pytest.approx(0.02, rel=0.01)
    assert wire.seconds < 12, "about as long as was asked for"


def test_speeds_are_the_slowest_ranks() -> None:
    class Uneven(Wire):
        def gather_object(self, value: Any) -> list[Any]:
            return [value] * 4 if isinstance(value, int) else [1.0, 2.0, 4.0, 1.0]

    assert measure.measure_speeds(Uneven(Layout(2, 2, 0), 1e9, 0.0), torch.device("cpu")) == [1.0, 0.5]


def test_the_recommended_file(tmp_path: Path) -> None:
    numbers = Numbers(parameters=10**9, num_replicas=2, step_seconds=1.0, bits_per_second=1e8, replica_size=4)
    best = simulate(numbers, Settings(512, None, "delayed", 340))
    given = EDiTConfig(outer_lr=0.7, sync_interval=16, edit_warmup_steps=5)
    text = measure.recommended_yaml(numbers, [best], given)
    path = tmp_path / "edit.yaml"
    path.write_text(text, encoding="utf-8")
    config = EDiTConfig.load(path)
    assert (config.sync_interval, config.overlap, config.delay_steps) == (512, "delayed", 340)
    assert (config.outer_lr, config.edit_warmup_steps) == (0.7, 5), "what was set beside"
    assert config.sync_timeout_seconds == pytest.approx(3 * best.network_seconds, abs=1)  # 336 s, near the limit
    assert "2 replicas x 4 ranks" in text


def test_a_plan_by_time_has_no_interval() -> None:
    assert measure.chosen(Settings(sync_seconds=30.0)) == {"sync_seconds": 30.0, "overlap": "forward"}
    assert measure.chosen(Settings(64)) == {"sync_interval": 64, "overlap": "forward"}


def test_the_output_is_looked_at_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(2, 1, 0)
    monkeypatch.setattr(measure, "ProcessGroupPeers", lambda layout, seconds: Wire(layout, 1e9, 0.0))
    monkeypatch.setattr(measure, "make_accelerator", lambda *_: SimpleNamespace(edit_layout=layout))
    path = tmp_path / "edit.yaml"
    path.write_text("sync_interval: 7\n", encoding="utf-8")
    arguments = SimpleNamespace(model=None, parameters=8, step_seconds=1.0, output=str(path), force=False)
    with pytest.raises(ValueError, match="exists already"):
        measure.measure_and_plan(arguments, EDiTConfig(), print)
    assert path.read_text(encoding="utf-8") == "sync_interval: 7\n"
    arguments.output = str(tmp_path / "nowhere" / "edit.yaml")
    with pytest.raises(ValueError, match="there is no folder"):
        measure.measure_and_plan(arguments, EDiTConfig(), print)


def test_one_replica_has_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "make_accelerator", lambda *_: SimpleNamespace(edit_layout=Layout(1, 4, 0)))
    with pytest.raises(ValueError, match="One replica of 4 ranks: there is no link to measure"):
        measure.measure_and_plan(SimpleNamespace(model=None), EDiTConfig(), print)
