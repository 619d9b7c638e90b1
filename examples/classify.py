#!/usr/bin/env python
"""Trains a text classifier with EDiTTrainer, and keeps the best checkpoint.

    accelerate launch --config_file accelerate_configs/cpu_2x2.yaml examples/classify.py

Without --model it trains a small BERT from scratch; without --dataset or --train_file it tells praise from blame in
sentences that it makes up ("not bad" is praise). So it needs no download. Copy common.py along with this file.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
from common import parse, require_columns, resume_from, summarise, train_seconds, waited
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_edit import EDiTConfig, EDiTTrainer


@dataclass
class ScriptArguments:
    """What to classify, and with what."""

    _argument_group_name = "Model and data"

    model: str | None = field(
        default=None, metadata={"help": "A model's name on the Hub, or its folder. Unset: a small BERT from scratch."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Name of a dataset on the Hub with the columns text and label, and a test split."},
    )
    train_file: str | None = field(default=None, metadata={"help": "A .jsonl file with text and label (0, 1, ...)."})
    test_file: str | None = field(default=None, metadata={"help": "The same to test on. Unset: a tenth is held out."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text that are read."})
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary of a tokenizer that is trained here."})


# What differs from TrainingArguments' and EDiTConfig's own defaults: a run of minutes on two CPU cores.
DEFAULTS: dict[str, Any] = dict(
    output_dir="edit_classify",
    max_steps=128,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=64,
    learning_rate=1e-3,
    warmup_steps=16,
    logging_steps=8,
    eval_strategy="steps",
    eval_steps=32,  # a multiple of sync_interval: evaluations and checkpoints fall on syncs
    eval_on_start=True,
    save_strategy="steps",
    save_steps=32,
    save_total_limit=1,
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    seed=0,
    sync_interval=16,
)


def main() -> None:
    script, edit_config, args = parse((ScriptArguments, EDiTConfig, TrainingArguments), DEFAULTS, __doc__)
    with args.main_process_first(desc="preparing the data"):  # the others then read what it has written
        texts = load_texts(script)
        num_labels = max(texts["train"]["label"]) + 1
        name = script.model or starting_model(script, args, texts["train"]["text"], num_labels)
        tokenizer = AutoTokenizer.from_pretrained(name)
        rows = texts.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=script.max_length),
            batched=True,
            remove_columns=["text"],
            desc="Tokenizing",
        )

    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=num_labels)
    # The loss is a batch's mean, but BERT and others look as if they divided a sum by the Trainer's count of labels, so
    # that the Trainer (5.23) would multiply it by the number of processes.
    model.accepts_loss_kwargs = False
    # Accelerate 1.15 shards the word embeddings by themselves, and fails where the module around them, such as
    # BertEmbeddings, is sharded already.
    model._no_split_modules = [kind for kind in model._no_split_modules or () if not kind.endswith("Embeddings")]
    trainer = EDiTTrainer(
        model=model,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy_of_logits,
        edit_config=edit_config,
    )
    trainer.train(resume_from(args))
    best = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report(trainer, best["eval_accuracy"], majority=share_of_commonest(rows))


# -- data -------------------------------------------------------------------------------------------------------------


def load_texts(script: ScriptArguments) -> datasets.DatasetDict:
    """Splits train and test with the columns text and label."""
    if script.dataset:
        rows = datasets.load_dataset(script.dataset)
    elif script.train_file:
        files = {"train": script.train_file} | ({"test": script.test_file} if script.test_file else {})
        rows = datasets.load_dataset("json", data_files=files)
    else:
        rows = datasets.DatasetDict({"train": datasets.Dataset.from_list(opinions())})
    require_columns(rows["train"], ["text", "label"], "Rename yours.")
    if "test" not in rows:
        rows = rows["train"].train_test_split(0.1, seed=0)
    return datasets.DatasetDict({split: rows[split].select_columns(["text", "label"]) for split in ("train", "test")})


def opinions() -> list[dict[str, Any]]:
    """Made-up sentences; label 1 is praise. No word alone decides: "not" reverses it."""
    things = ["soup", "film", "book", "song", "city", "train", "lecture", "garden", "game", "hotel", "phone", "cake"]
    frames = ["the {} is {}", "i find the {} {}", "everybody says that the {} is {}", "yesterday the {} was {}"]
    good = ["good", "great", "lovely", "superb", "brilliant", "charming", "delightful", "splendid"]
    bad = ["bad", "awful", "boring", "terrible", "dreadful", "dull", "horrible", "miserable"]
    rows = [
        {"text": frame.format(thing, prefix + word), "label": int((word in good) == (prefix != "not "))}
        for frame, thing, word, prefix in itertools.product(frames, things, good + bad, ("", "not ", "very "))
    ]
    random.Random(0).shuffle(rows)
    return rows


def starting_model(script: ScriptArguments, args: TrainingArguments, texts: Any, num_labels: int) -> str:
    """The folder of a small BERT that has seen nothing yet, with a WordPiece vocabulary of the texts."""
    folder = Path(args.output_dir) / "untrained"
    if args.local_process_index == 0:
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        pieces.normalizer = normalizers.BertNormalizer()
        pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        pieces.train_from_iterator(
            texts,
            trainers.WordPieceTrainer(
                vocab_size=script.vocab_size, special_tokens=list(special.values()), show_progress=False
            ),
        )
        pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, **special)
        tokenizer.save_pretrained(folder)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=512, num_labels=num_labels,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


# -- evaluation -------------------------------------------------------------------------------------------------------


class Accuracy(evaluate.Metric):
    """The share of predictions that are right; `evaluate.load("accuracy")` would come from the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description="", features=features
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        right = sum(guess == label for guess, label in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}


def accuracy_of_logits(prediction: Any) -> dict[str, float]:
    guesses = prediction.predictions.argmax(axis=-1)
    return Accuracy(keep_in_memory=True).compute(predictions=guesses, references=prediction.label_ids)


def share_of_commonest(rows: datasets.DatasetDict) -> float:
    """The accuracy on the test split of always answering the training split's commonest label."""
    labels = rows["train"]["label"]
    commonest = max(set(labels), key=list(labels).count)
    return sum(label == commonest for label in rows["test"]["label"]) / len(rows["test"])


def report(trainer: EDiTTrainer, accuracy: float, majority: float) -> None:
    """Prints the summary and leaves it as summary.json."""
    history, stats = trainer.state.log_history, trainer.edit_stats
    seconds = train_seconds(history)
    summary = {
        "layout": str(trainer.edit_layout),
        "accuracy_before": next(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry),
        "accuracy_majority": majority,
        "accuracy_after": accuracy,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "waited_share": stats.exposed_seconds / seconds,
        **asdict(stats),
    }
    rows = [
        ("layout", f"{trainer.edit_layout} ({trainer.accelerator.distributed_type.value})"),
        ("accuracy, before", f"{summary['accuracy_before']:.1%}"),
        ("accuracy, commonest label", f"{majority:.1%}"),
        ("accuracy, best checkpoint", f"{accuracy:.1%} ({Path(summary['best_checkpoint'] or 'none').name})"),
        ("inner steps / syncs", f"{stats.inner_steps} / {stats.syncs}"),
        waited(stats.exposed_seconds, seconds),
        ("saved in", trainer.args.output_dir),
    ]
    summarise(trainer.args.output_dir, summary, rows)


if __name__ == "__main__":
    main()
