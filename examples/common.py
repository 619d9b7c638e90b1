"""What the examples share: flags, text when none is named, small models to start from, and the summary at the end.

Nothing in here is EDiT's. Who copies an example takes this file along, or puts data and a model of their own in the
place of what the example imports from it.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NoReturn

import datasets
import torch
from accelerate.utils import gather_object
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

PRETRAINED = Path("edit_pretrain")  # where examples/pretrain.py leaves its model
EOS = "<|endoftext|>"
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


# -- flags ------------------------------------------------------------------------------------------------------------


@dataclass
class TextArguments:
    """Which text to train on."""

    dataset: str | None = field(default=None, metadata={"help": "Name of a dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of --dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    train_file: str | None = field(default=None, metadata={"help": "A .txt, .jsonl or .parquet file to train on."})


def parse(kinds: Sequence[type], defaults: dict[str, Any], description: str) -> tuple[Any, ...]:
    """The command line as dataclasses of these `kinds`, the one with `seed` having seeded everything.

    Args:
        defaults: what differs from the dataclasses' own defaults.
        description: a script's docstring, whose first paragraph --help shows.

    Where there is no GPU or other accelerator, Accelerate is made to train on CPUs: without that, each process would
    train alone.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    parser = HfArgumentParser(kinds, description=description.split("\n\n")[0])
    if any(word.startswith("--sync_seconds") for word in sys.argv):  # a sync has one trigger
        defaults = {name: value for name, value in defaults.items() if name != "sync_interval"}
    parser.set_defaults(**defaults)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    except ValueError as error:  # a setting that one of the dataclasses refuses
        refuse(str(error))
    if unknown:
        refuse(_not_a_flag(unknown[0], [f"--{each.name}" for kind in kinds for each in fields(kind)]))
    set_seed(next(part.seed for part in parsed if hasattr(part, "seed")))
    return tuple(parsed)


def _not_a_flag(word: str, flags: Sequence[str]) -> str:
    name = word.split("=")[0]
    close = difflib.get_close_matches(name, flags, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"{name} is no flag of this script.{meant} --help shows them all."


def refuse(text: str) -> NoReturn:
    """Ends the program; of all processes of a machine one says why."""
    sys.exit(text if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def resume_from(args: Any) -> str | bool | None:
    """For `trainer.train`: the checkpoint that --resume_from_checkpoint names; with "true" the newest one, if any host
    has one."""
    if (args.resume_from_checkpoint or "").lower() != "true":
        return args.resume_from_checkpoint
    return any(gather_object([any(Path(args.output_dir).glob("checkpoint-*"))]))


# -- text -------------------------------------------------------------------------------------------------------------


def load_text(script: TextArguments, otherwise: Callable[[], Any], streaming: bool = False) -> Any:
    """The text that the flags name, else what `otherwise` makes: one document a row, in a column called "text"."""
    if script.dataset:
        rows = datasets.load_dataset(
            script.dataset, script.dataset_config, split=script.dataset_split, streaming=streaming
        )
    elif script.train_file:
        suffix = Path(script.train_file).suffix
        if suffix not in KINDS:
            sys.exit(f"--train_file {script.train_file}: the name must end in {', '.join(KINDS)}, not in {suffix!r}.")
        options = {"sample_by": "paragraph"} if suffix == ".txt" else {}
        rows = datasets.load_dataset(KINDS[suffix], data_files=script.train_file, split="train", **options)
    else:
        rows = otherwise()
    require_columns(rows, [script.text_column], "Name the one that holds the text with --text_column.")
    return rows.select_columns([script.text_column]).rename_columns({script.text_column: "text"})


def require_columns(rows: Any, columns: Sequence[str], advice: str) -> None:
    """Ends the program with `advice` if `rows` lacks one of `columns`; a stream may not know its columns."""
    missing = [name for name in columns if rows.column_names is not None and name not in rows.column_names]
    if missing:
        sys.exit(f"The data has the columns {rows.column_names}, but not {missing}. {advice}")


def standard_library() -> datasets.Dataset:
    """The source files of the running interpreter's standard library, one a row."""
    files = sorted(str(path) for path in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py") if _is_source(path))
    return datasets.load_dataset("text", data_files=files, sample_by="document", split="train")


def _is_source(path: Path) -> bool:
    """True for a file of the standard library that is its own code, in UTF-8."""
    if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
        return False
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def language_reference() -> datasets.Dataset:
    """Python's language reference, as `help()` shows it, one topic a row."""
    return datasets.Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})


def packer(tokenizer: Any, size: int) -> Callable[[dict[str, list[str]]], dict[str, list[list[int]]]]:
    """For `map(batched=True)`: texts in, blocks of `size` tokens out, cut from documents that end with EOS.

    Without a tokenizer a byte is a token, and a zero ends a document.
    """

    def pack(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        if tokenizer is None:
            documents, end = [list(text.encode()) for text in rows["text"]], 0
        else:
            documents = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
            end = tokenizer.eos_token_id
        tokens = [token for document in documents for token in [*document, end]]
        blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    return pack


# -- models -----------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int, split_digits: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts`; with `split_digits` a digit is always a token of its own."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split_digits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS)


def small_llama_config(vocab_size: int, **settings: Any) -> LlamaConfig:
    """A Llama's configuration of about a million parameters; `settings` say what shall differ."""
    defaults = dict(
        hidden_size=128, intermediate_size=336, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip  # EOS is the first token of train_tokenizer
    return LlamaConfig(vocab_size=vocab_size, **{**defaults, **settings})


def starting_model(args: Any, texts: Iterable[str], split_digits: bool = False) -> str:
    """The folder of what examples/pretrain.py has trained, or of a small Llama that has seen nothing yet.

    Every process gets the name; the first one of a machine writes what is in it.
    """
    if (PRETRAINED / "config.json").is_file():
        return str(PRETRAINED)
    folder = Path(args.output_dir) / "untrained"
    if args.local_process_index == 0:
        tokenizer = train_tokenizer(texts, 2048, split_digits)
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM(small_llama_config(len(tokenizer))).save_pretrained(folder)
    return str(folder)


# -- what came of it --------------------------------------------------------------------------------------------------


def train_seconds(history: list[dict[str, Any]]) -> float:
    """How long the training took, from a Trainer's `state.log_history`."""
    return next(entry["train_runtime"] for entry in history if "train_runtime" in entry)


def waited(exposed_seconds: float, seconds: float) -> tuple[str, str]:
    """A row of the summary."""
    return "waited for syncs", f"{exposed_seconds / seconds:.1%} of {seconds:.0f} s"


def summarise(folder: str | Path, summary: dict[str, Any], rows: Sequence[tuple[str, str]]) -> None:
    """Prints the rows, and leaves the summary in the folder as summary.json."""
    (Path(folder) / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print("\n" + "\n".join(f"{name:<27}{value}" for name, value in rows), flush=True)
