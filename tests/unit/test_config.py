from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_edit import EDiTConfig

DESIGN = dict(
    num_replicas=None, sync_interval=128, sync_seconds=None, warmup_steps=0, outer_optimizer="nesterov", outer_lr=0.8,
    outer_momentum=0.85, anomaly_threshold=3.0, ema_alpha=0.02, ema_warmup_syncs=10, max_consecutive_anomalies=3,
    weighting="norm", softmax_temperature=1.0, max_pseudo_grad_norm=10.0, overlap="forward", delay_steps=4,
    compression="none", fragments=1, averaging="mean", sync_moments="none", sync_interval_end=None,
    offload_outer_state=False, sync_timeout_seconds=600, loss_spike_threshold=6.0,
)  # fmt: skip


def test_the_defaults_are_the_papers_method() -> None:
    config = EDiTConfig()
    assert {name: getattr(config, name) for name in DESIGN} == DESIGN
    assert EDiTConfig.preset("edit") == dataclasses.replace(config, outer_warmup_syncs=0, momentum_follows_lr=False)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            dict(sync_interval=0),
            "sync_interval=0: a whole number of at least 1 is needed. Give sync_interval=1 to sync after every step.",
        ),
        (dict(sync_interval=2.5), "sync_interval=2.5"),
        (dict(sync_interval=8, sync_seconds=60.0), "sync_interval=8 and sync_seconds=60.0 are both set"),
        (dict(sync_seconds=0.0), "sync_seconds=0.0: a number of seconds above 0 is needed"),
        (dict(num_replicas=0), "num_replicas=0: a whole number of at least 1"),
        (dict(num_replicas=True), "num_replicas=True"),
        (dict(warmup_steps=-1), "edit_warmup_steps=-1: a whole number of at least 0"),
        (dict(outer_optimizer="adam"), "outer_optimizer='adam': one of 'nesterov', 'sgd', 'none', or a callable"),
        (dict(outer_momentum=1.0), r"outer_momentum=1.0: a number in \[0, 1\)"),
        (dict(outer_lr=0), "outer_lr=0: a number above 0"),
        (dict(outer_lr=float("inf")), "outer_lr=inf: a finite number is needed"),
        (dict(inner_lr_scale=-1.0), "inner_lr_scale=-1.0: a number above 0"),
        (dict(inner_lr_scale=float("inf")), "inner_lr_scale=inf: a finite number is needed"),
        (dict(heartbeat_seconds=float("inf")), "heartbeat_seconds=inf: a replica that is gone must be noticed"),
        (dict(ema_alpha=0.0), "ema_alpha=0.0"),
        (
            dict(anomaly_threshold=-1.0),
            "anomaly_threshold=-1.0: a number above 0 is needed, or None to turn the z-test",
        ),
        (dict(max_pseudo_grad_norm=0.0), "or None to turn clipping off"),
        (dict(max_pseudo_grad_norm=float("nan")), "max_pseudo_grad_norm=nan"),
        (dict(softmax_temperature=0.0), "softmax_temperature=0.0"),
        (dict(weighting="steps2"), "weighting='steps2': one of 'norm', 'relative', 'uniform', 'steps'"),
        (dict(overlap="backward"), "overlap='backward': one of 'none', 'forward', 'delayed'"),
        (dict(delay_steps=0), "delay_steps=0"),
        (dict(fragments=0), "fragments=0"),
        (dict(fragments=3, sync_interval=8), "fragments=3 does not divide sync_interval=8"),
        (dict(fragments=4, sync_interval=8, overlap="delayed"), "every sync_interval=8 / fragments=4 = 2 inner steps"),
        (dict(compression="int2"), "compression='int2'"),
        (dict(averaging="median"), "averaging='median': one of 'mean', 'length'"),
        (dict(sync_moments="second"), "sync_moments='second': one of 'none', 'first', 'both'"),
        (dict(sync_moments_every=0), "sync_moments_every=0: a whole number of at least 1"),
        (dict(sync_interval_end=0), "sync_interval_end=0: a whole number of at least 1"),
        (dict(sync_interval_end=3, overlap="delayed"), "sync_interval_end=3: a whole number of at least 4"),
        (dict(sync_interval_end=8, sync_seconds=5.0), "the interval has one master"),
        (dict(sync_interval_end=8, tune="auto", overlap="delayed"), "the interval has one master"),
        (dict(balance="false"), "balance='false': true or false is needed"),
        (dict(balance=True, sync_seconds=3.0), "balance=True and sync_seconds=3.0"),
        (dict(elastic=True, overlap="none"), "elastic=True with num_replicas=None, min_replicas=1"),
        (dict(elastic=True, overlap="none", num_replicas=2, min_replicas=3), "min_replicas=3"),
        (dict(elastic=True, num_replicas=2), 'elastic=True with overlap="forward"'),
        (dict(elastic=True, num_replicas=2, overlap="none", warmup_steps=8), "elastic=True with edit_warmup_steps=8"),
        (dict(elastic=True, num_replicas=2, overlap="none", fragments=2), "elastic=True with fragments=2"),
        (dict(elastic=True, num_replicas=2, overlap="none", balance=True), "elastic=True with balance=True"),
        (dict(elastic=True, num_replicas=2, overlap="delayed", tune="auto"), "elastic=True with tune='auto'"),
        (dict(elastic=True, num_replicas=2, overlap="none", outer_optimizer=len), "Leave outer_optimizer out"),
        (dict(elastic="yes"), "elastic='yes': true or false is needed"),
        (dict(heartbeat_seconds=0), "heartbeat_seconds=0: a number above 0"),
        (dict(units_in_flight=0), "units_in_flight=0: a whole number of at least 1"),
        (dict(sync_timeout_seconds=-5), "sync_timeout_seconds=-5"),
        (dict(sync_timeout_seconds=float("inf")), "sync_timeout_seconds=inf"),
    ],
)
def test_wrong_values_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EDiTConfig(**settings)


OPTIONAL = ("num_replicas", "sync_interval_end", "sync_seconds", "anomaly_threshold", "max_pseudo_grad_norm")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EDiTConfig)])
def test_every_setting_refuses_what_it_cannot_be(name: str) -> None:
    others: tuple[dict[str, object], ...] = ({}, {"overlap": "delayed"}, {"sync_interval_end": 64})
    for value, beside in itertools.product((None, "many", [2], float("nan"), -1, 2.5j), others):
        if value is not None or name not in OPTIONAL:
            with pytest.raises(ValueError, match=rf"\b{name}="):
                EDiTConfig(**{**beside, name: value})


def test_it_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EDiTConfig().sync_interval = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        EDiTConfig(4)  # type: ignore[misc]


def test_warmup_steps_is_readable_and_replaceable_under_both_names() -> None:
    config = EDiTConfig(warmup_steps=5)
    assert config.warmup_steps == config.edit_warmup_steps == 5
    assert dataclasses.replace(config, sync_interval=2).warmup_steps == 5
    assert dataclasses.replace(config, warmup_steps=7).warmup_steps == 7
    assert dataclasses.replace(config, edit_warmup_steps=8).warmup_steps == 8


def test_off_in_yaml_is_off(tmp_path: Path) -> None:
    (tmp_path / "edit.yaml").write_text("tune: off\nbalance: yes\n", encoding="utf-8")
    config = EDiTConfig.load(tmp_path / "edit.yaml")
    assert (config.tune, config.balance) == ("off", True)


def test_presets() -> None:
    diloco = EDiTConfig.preset("diloco", sync_interval=50)
    assert (diloco.outer_lr, diloco.outer_momentum, diloco.weighting) == (0.7, 0.9, "uniform")
    assert (diloco.anomaly_threshold, diloco.max_pseudo_grad_norm, diloco.sync_interval) == (None, None, 50)
    assert EDiTConfig.preset("post-local-sgd").outer_optimizer == "none"
    assert EDiTConfig.preset("a-edit").sync_seconds == 600.0
    assert EDiTConfig.preset("co2", sync_interval=16).delay_steps == 16
    assert EDiTConfig.preset("co2").delay_steps == 128
    streaming = EDiTConfig.preset("streaming-diloco", sync_interval=64)
    assert (streaming.fragments, streaming.compression, streaming.outer_momentum) == (4, "int4", 0.9)
    muon = EDiTConfig.preset("muon")
    assert (muon.outer_optimizer, muon.sync_moments, muon.weighting) == ("none", "both", "norm")
    with pytest.raises(ValueError, match=r"preset 'adam': one of 'edit', .*, 'post-local-sgd'"):
        EDiTConfig.preset("adam")


def test_a_parser_takes_it_beside_training_arguments(tmp_path: Path) -> None:
    parser = HfArgumentParser((TrainingArguments, EDiTConfig))
    args, config = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--warmup_steps", "3", "--edit_warmup_steps", "4",
         "--sync_interval", "9", "--overlap", "none", "--max_pseudo_grad_norm", "inf", "--offload_outer_state",
         "--num_replicas", "2"]
    )  # fmt: skip
    assert args.warmup_steps == 3
    assert config == EDiTConfig(
        warmup_steps=4, sync_interval=9, overlap="none", max_pseudo_grad_norm=float("inf"), offload_outer_state=True,
        num_replicas=2,
    )  # fmt: skip
    help_text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(EDiTConfig):
        assert f"--{field.name}" in help_text
        assert " ".join(field.metadata["help"].split()[:4]) in help_text.replace("- ", "-")


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_it_is_read_from_files(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"edit{suffix}"
    path.write_text('{"sync_interval": 7, "warmup_steps": 2}')
    expected = EDiTConfig(sync_interval=7, warmup_steps=2)
    assert EDiTConfig.load(str(path)) == EDiTConfig.load(path) == expected
    monkeypatch.setenv("EDIT_CONFIG", str(path))
    assert EDiTConfig.load(None) == expected
    monkeypatch.delenv("EDIT_CONFIG")
    assert EDiTConfig.load(None) == EDiTConfig()
    assert EDiTConfig.load({"sync_interval": 7, "warmup_steps": 2}) == expected
    assert EDiTConfig.load(expected) is expected


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        EDiTConfig.load(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match=r"Unknown EDiTConfig settings: \['tau'\]\. Known: .*sync_interval"):
        EDiTConfig.load({"tau": 3})
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is no valid JSON"):
        EDiTConfig.load(broken)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is no valid YAML"):
        EDiTConfig.load(broken)
    with pytest.raises(ValueError, match="an EDiTConfig, a dict, or a path"):
        EDiTConfig.load(3)  # type: ignore[arg-type]


def test_to_dict_takes_json() -> None:
    config = EDiTConfig(outer_optimizer=test_presets)  # type: ignore[arg-type]
    assert json.loads(json.dumps(config.to_dict()))["outer_optimizer"] == "test_presets"


def test_the_config_module_loads_nothing_heavy() -> None:
    code = "import sys, hf_edit.config; print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
