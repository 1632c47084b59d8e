# SPDX-License-Identifier: Apache-2.0
"""What both example scripts share: arguments, one or two training runs with the stock Trainer, and the results."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from example_data import DataError
from example_plots import plot_runs
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.training_args import OptimizerNames

from hf_nsf.trainer.options import OPTIONS, parse_optim_args

SGD_LIKE = ("lcam", "sgd")
_TIMINGS = ("_runtime", "_per_second")


@dataclass
class ExampleTrainingArguments(TrainingArguments):
    """The Trainer's arguments, with defaults for a short demonstration and with a second optimizer to compare with."""

    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: one that suits the script's task and the optimizer."}
    )
    compare_with: str | None = field(
        default=None, metadata={"help": "Train again from the same seed with this optimizer, e.g. adamw_torch."}
    )
    compare_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the second run."})
    compare_optim_args: str | None = field(default=None, metadata={"help": "optim_args of the second run."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints. The end is always saved."})
    logging_steps: float = field(default=1, metadata={"help": "Log the training loss every so many updates."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Updates, or a share below 1, of rising rate."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Whether to pin memory for a GPU."})

    def __post_init__(self) -> None:
        """Check the second optimizer and both texts of options beside the Trainer's own checks."""
        super().__post_init__()
        if self.compare_with is not None:
            allowed = [name.value for name in OptimizerNames]
            if self.compare_with not in allowed:
                raise DataError(f"compare_with={self.compare_with!r} is unknown: allowed are {', '.join(allowed)}.")
        for name, text in ((self.optim.value, self.optim_args), (self.compare_with, self.compare_optim_args)):
            if name in OPTIONS:
                parse_optim_args(name, text)


@dataclass
class LearningRates:
    """Default learning rates of a task for the two families of optimizers, and for nsf where it has its own."""

    adam_like: float
    sgd_like: float
    nsf: float | None = None

    def of(self, optimizer: str) -> float:
        """Return the default learning rate of an optimizer."""
        if optimizer == "nsf" and self.nsf is not None:
            return self.nsf
        return self.sgd_like if optimizer in SGD_LIKE else self.adam_like


class QuietProgressCallback(ProgressCallback):
    """A progress bar that shows the last training loss and prints a line for evaluations only."""

    def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: D102
        if logs and "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}", refresh=False)
        elif logs:
            super().on_log(args, state, control, logs=logs, **kwargs)


def parse_arguments(argument_types: tuple[type, ...], args: list[str] | None = None) -> tuple[Any, ...]:
    """Parse a command line, or the single .json or .yaml file that it names.

    Args:
        argument_types: dataclasses of the arguments.
        args: the command line; None stands for the process's own.

    Returns:
        One object for each type.

    Raises:
        DataError: a value is not allowed, or the file is missing.
    """
    try:
        return _parse(HfArgumentParser(argument_types), args)
    except ValueError as error:
        raise DataError(" ".join(str(error).split())) from None


def _parse(parser: HfArgumentParser, args: list[str] | None) -> tuple[Any, ...]:
    args = sys.argv[1:] if args is None else args
    if len(args) == 1 and args[0].endswith((".json", ".yaml", ".yml")):
        file = Path(args[0])
        if not file.is_file():
            raise DataError(f"The file {args[0]!r} does not exist.")
        return parser.parse_json_file(file) if file.suffix == ".json" else parser.parse_yaml_file(file)
    return parser.parse_args_into_dataclasses(args)


def run(main: Callable[[], Any]) -> None:
    """Run a script's main function; wrong arguments or data end it with one sentence."""
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")


def train_and_report(
    build_model: Callable[[], PreTrainedModel],
    arguments: ExampleTrainingArguments,
    rates: LearningRates,
    title: str,
    **trainer_arguments: Any,
) -> dict[str, Any]:
    """Train with one optimizer, or with two from the same seed, and write metrics.json and training.png.

    Args:
        build_model: builds or loads the model; called after the seed is set.
        arguments: the training arguments.
        rates: learning rates to use where the user gave none.
        title: heading of the picture.
        trainer_arguments: for the Trainer; `test_dataset` may be None.

    Returns:
        What stands in metrics.json.
    """
    first = copy.copy(arguments)
    first.learning_rate = _rate(arguments.learning_rate, arguments.optim, rates)
    output = Path(arguments.output_dir)
    plans = [first]
    if arguments.compare_with is not None:
        second = copy.copy(arguments)
        second.optim = OptimizerNames(arguments.compare_with)
        second.optim_args = arguments.compare_optim_args
        second.learning_rate = _rate(arguments.compare_learning_rate, second.optim, rates)
        second.output_dir = str(output / f"compare_{second.optim.value}")
        plans.append(second)

    results, histories = [], []
    for plan in plans:
        result, history = _train(build_model, plan, **trainer_arguments)
        results.append(result)
        histories.append(history)
    report = {"title": title, "seed": arguments.seed, "runs": results}
    if arguments.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        plot_runs(output / "training.png", title, [result["optimizer"] for result in results], histories)
        print(format_table(results))
        print(f"Wrote {output / 'metrics.json'} and {output / 'training.png'}")
    return report


def _rate(given: float | None, optimizer: OptimizerNames, rates: LearningRates) -> float:
    return rates.of(optimizer.value) if given is None else given


def _train(
    build_model: Callable[[], PreTrainedModel],
    arguments: ExampleTrainingArguments,
    test_dataset: Any = None,
    **trainer_arguments: Any,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train, evaluate and save one model.

    Returns:
        Its results, and the Trainer's log.
    """
    set_seed(arguments.seed)
    trainer = Trainer(model=build_model(), args=arguments, **trainer_arguments)
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgressCallback)
    start = time.perf_counter()
    trained = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    history = list(trainer.state.log_history)
    result: dict[str, Any] = {
        "optimizer": arguments.optim.value,
        "optim_args": arguments.optim_args,
        "learning_rate": arguments.learning_rate,
        "epochs": trainer.state.epoch,
        "updates": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "train_loss": trained.training_loss,
    }
    parts = {"validation": trainer_arguments["eval_dataset"], "test": test_dataset}
    for name, dataset in parts.items():
        if dataset is not None:
            values = trainer.evaluate(dataset, metric_key_prefix=name)
            result.update({key: value for key, value in values.items() if not key.endswith(_TIMINGS)})
    result.pop("epoch", None)
    trainer.save_model()
    return result, history


def format_table(results: list[dict[str, Any]]) -> str:
    """Format the results of the runs side by side, a line for each figure."""
    labels = [key for key in results[0] if any(result.get(key) is not None for result in results)]
    columns = [[_format(result.get(label)) for label in labels] for result in results]
    lines = []
    for row, label in enumerate(labels):
        cells = "  ".join(column[row].rjust(max(map(len, column))) for column in columns)
        lines.append(f"{label.ljust(max(map(len, labels)))}  {cells}")
    return "\n".join(lines)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def load_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """Call `auto_class.from_pretrained`.

    Raises:
        DataError: there is no such model, or it does not fit the task.
    """
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"--model_name_or_path {name!r} cannot be loaded ({reason}): give a local folder or a Hub name."
        ) from None


def label_options(label_names: list[str]) -> dict[str, Any]:
    """Return the options of a model's config that name its classes."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
    }
