"""`hf-edit COMMAND`: what to expect of EDiT before a training, whether a set-up is right, and what came of it."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

# Each is a module of this folder with `add_arguments(parser)` and `run(arguments) -> int`, and what --help says of it.
COMMANDS = {
    "plan": "what a network leaves of the speed, and which settings to take",
    "check": "what an Accelerate and an EDiT configuration give, before the training starts",
    "lighthouse": "where replicas that come and go find each other",
    "report": "one page of one run or several, from what the Trainer has written",
}


class CommandParser(argparse.ArgumentParser):
    """A command's: a flag's words may be joined by "-" or "_", and an unknown one is answered by the command itself."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Protected in argparse of Python 3.10 to 3.14, which tells subclasses of no public way to the flags.
        flags = list(self._option_string_actions)
        spelled = {flag.replace("_", "-"): flag for flag in flags}
        given = [*(sys.argv[1:] if args is None else args)]
        for place, word in enumerate(given):
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in flags:
                given[place] = spelled.get(name.replace("_", "-"), name) + equals + value
        found, unknown = super().parse_known_args(given, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], flags, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown: {' '.join(unknown)}{meant} `{self.prog} --help` lists all flags")
        return found, unknown


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line `words` (default: the process's own); its exit code."""
    words = sys.argv[1:] if words is None else list(words)
    parser = argparse.ArgumentParser(prog="hf-edit", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if words[:1] == [name]:  # the others' modules are not loaded
            module(name).add_arguments(command)
    arguments = parser.parse_args(words)
    try:
        code: int = module(arguments.command).run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def module(name: str) -> Any:
    return importlib.import_module(f"hf_edit.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
