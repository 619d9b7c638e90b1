"""What a launch gives each process, without starting it: Accelerate's configuration, and the script's EDiT flags."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from transformers import HfArgumentParser

from hf_edit.config import CONFIG_ENV_VAR, EDiTConfig

LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")
SETTINGS = [setting.name for setting in fields(EDiTConfig)]


@dataclass
class Launch:
    """What each process of a launch finds.

    Attributes:
        asked: processes that the configuration asks for; `world_size` are started.
        lone: the launcher starts one process, whatever was asked.
        main_address: of the first machine; None if it is not given.
        flags: see `read_flags`.
    """

    asked: int
    world_size: int
    num_machines: int
    main_address: str | None
    environment: dict[str, str]
    on_cpu: bool
    lone: bool
    flags: dict[str, Any]

    @property
    def ranks_per_machine(self) -> int:
        return self.world_size // self.num_machines

    @property
    def edit_flags(self) -> dict[str, Any]:
        return {name: value for name, value in self.flags.items() if name in SETTINGS and value is not None}

    def training_arguments(self) -> Any:
        """What `TrainingArguments` would say, as far as `plan_layout` asks."""
        version = None
        if self.flags["fsdp"] not in (None, "", "false", "False"):
            path = self.flags["fsdp_config"]
            given = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
            version = int(given.get("version") or given.get("fsdp_version") or 2)
        return SimpleNamespace(
            world_size=self.world_size,
            process_index=0,
            fsdp_plugin_args=None if version is None else {"fsdp_version": version},
            parallelism_config=None,
            deepspeed=self.flags["deepspeed"],
        )


def read_launch(command: str | None = None, config_file: str | None = None) -> Launch:
    """What `[NAME=value ...] accelerate launch ... SCRIPT ...` starts, or with `config_file` any script.

    Raises:
        ValueError: there is no such command, or the launcher or the script would refuse it.
    """
    if command is None and config_file is None and not os.path.isfile(default_config_file):
        raise ValueError(
            "There is no Accelerate configuration: give --config_file YAML, or --launch with the training's command "
            "(Accelerate has no default one here either; `accelerate config` would write it)."
        )
    words = shlex.split(os.path.expandvars((command or "accelerate launch train.py").replace("\\\n", " ")))
    start = next((index for index, word in enumerate(words) if Path(word).name in LAUNCHERS), None)
    if start is not None and words[start + 1 : start + 2] == [
        "launch"
    ]:  # python -m accelerate....accelerate_cli launch
        start += 1
    if start is None:
        raise ValueError(
            f"--launch {command!r}: there is no `accelerate launch` in it. Give the whole command that starts the "
            "training, in quotes."
        )
    assignments = [re.fullmatch(r"(\w+)=(.*)", word, re.DOTALL) for word in words[:start]]
    variables = {found[1]: found[2] for found in assignments if found}
    options = words[start + 1 :]
    if config_file is not None:
        if "--config_file" in options:
            raise ValueError("--config_file is given beside --launch, whose command names one too. Give one of them.")
        options = ["--config_file", config_file, *options]
    try:
        with patch_environment(**variables):
            return _ask_launcher(launch_command_parser().parse_args(options))
    except yaml.YAMLError as error:
        raise ValueError(f"The Accelerate config file is no valid YAML: {error}") from error


def _ask_launcher(args: Any) -> Launch:
    # Private in Accelerate 1.15: it alone knows how a file, flags and defaults come together. Every case of
    # tests/unit/cli/test_check.py fails when it moves.
    args, _, _ = _validate_launch_command(args)
    lone = args.cpu or not (args.use_fsdp or args.multi_gpu or args.use_megatron_lm or args.use_deepspeed or args.tpu)
    address, args.main_process_port = args.main_process_ip, 0  # any port: nothing is started
    if not lone and args.num_machines > 1 and args.machine_rank is None:
        raise ValueError(
            f"num_machines: {args.num_machines}, but machine_rank is not given, and `accelerate launch` ends without "
            "it. Set it in the config file, or pass --machine_rank 0, 1, ... on the machines."
        )
    if lone:
        args.main_process_ip = address or "unknown"  # else the launcher's assertion would be all that is heard
        environment = prepare_simple_launcher_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    lone = lone and args.mpirun_hostfile is None
    if args.use_deepspeed:
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
    asked, num_machines = max(1, args.num_processes or 1), 1 if lone else args.num_machines
    per_machine = 1 if lone else max(1, asked // num_machines)
    environment |= {"LOCAL_WORLD_SIZE": str(per_machine), "WORLD_SIZE": str(per_machine * num_machines)}
    flags = read_flags(args.training_script_args)
    hands_on = environment.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "on")
    on_cpu = hands_on or bool(args.use_cpu or args.cpu or flags["use_cpu"])
    return Launch(asked, per_machine * num_machines, num_machines, address, environment, on_cpu, lone, flags)


class _Flags(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"The training script's flags: {message}.")


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """The flags of a training script that mean something here; None, or -1 for max_steps: not given."""
    parser = _Flags(EDiTConfig, allow_abbrev=False)
    parser.set_defaults(**dict.fromkeys(SETTINGS))
    parser.add_argument("--max_steps", type=int, default=-1)
    for name in ("use_cpu", "fsdp", "torch_compile"):
        parser.add_argument(f"--{name}", nargs="?", const="true")
    for name in ("deepspeed", "fsdp_config"):
        parser.add_argument(f"--{name}")
    return vars(parser.parse_known_args(words)[0])


def read_settings(edit_config: str | None, launch: Launch | None) -> tuple[EDiTConfig, list[str]]:
    """The EDiT settings, and what is to be said of where they are from.

    Args:
        edit_config: a file; None: the one that EDIT_CONFIG names, if any.
        launch: whose flags come on top; None: this process's own environment, without flags.
    """
    flags = {} if launch is None else launch.edit_flags
    environment = os.environ if launch is None else launch.environment
    source = edit_config or environment.get(CONFIG_ENV_VAR)
    notes = []
    if flags and source and not edit_config:
        notes.append(
            f"{CONFIG_ENV_VAR} and flags such as --{next(iter(flags))} are both given; a script that makes its "
            f"EDiTConfig from flags does not read {CONFIG_ENV_VAR}. Here the flags are put on top of the file."
        )
    elif not flags and not source:
        notes.append(
            "no EDiT settings are given, so these are the defaults; a script may have its own. Name them with "
            "--edit_config FILE, or give the script's flags in --launch."
        )
    return replace(EDiTConfig.load(source or {}), **flags), notes
