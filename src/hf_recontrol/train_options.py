"""The options of hf-recontrol train: a small dataclass of ours beside RecontrolTrainingArguments, and a YAML file."""

import difflib
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from .training_args import RecontrolTrainingArguments

USAGE = """hf-recontrol train --rollouts FOLDER --output_dir FOLDER [--kind value|control|linear|constant] [options]
       hf-recontrol train --model M --dataset D --reward R --output_dir FOLDER --iterations K [options]
       hf-recontrol train --config train.yaml [options, which win over the file's]"""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainOptions:
    """What is trained, and on what."""

    config: str | None = _option(None, "A YAML file with any of these options, by name. The command line wins over it.")
    rollouts: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of rollouts of one model, as `hf-recontrol rollouts` makes them."},
    )
    kind: Literal["value", "control", "linear", "constant"] = _option(
        "value",
        "value: V(h), an MLP. control: u = f(h), an MLP. linear: V in closed form. constant: one u in closed form. The "
        "last two are the first to try.",
    )
    num_hidden_layers: int = _option(1, "Of a value or control head, 0 to 2.")
    num_heads: int = _option(
        1, "Of a value head: fit so many, of other seeds, and one head to what they agree on; see fit_ensemble."
    )
    kappa: float = _option(1.0, "With several heads: κ, how much of their disagreement is subtracted; 0 is their mean.")
    intermediate_size: int | None = _option(None, "Width of the head's hidden layers; as its config's where left out.")
    held_out: float = _option(0.1, "The share of the prompts that the metrics and the calibration are made on.")
    model: str | None = _option(
        None, "The language model: an id or a folder. Control heads need it; value heads are calibrated with it."
    )
    revision: str | None = _option(None, "Branch, tag or commit of the model.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _option("auto", "Of the model; auto is its own.")
    iterations: int = _option(1, "Without rollouts: rounds of answers, each written under the head fitted before.")
    dataset: str | None = _option(None, "Without rollouts: the prompts, an id, a folder, or a JSONL or Parquet file.")
    split: str = _option("train", "Of the dataset.")
    dataset_name: str | None = _option(None, "The name of the dataset's configuration on the Hub.")
    dataset_recipe: str | None = _option(None, "How prompts are found in the dataset, where its columns do not say.")
    limit: int | None = _option(None, "So many prompts, at most.")
    reward: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Without rollouts: sequence classifiers (ids or folders), or file.py:function, called as TRL's are."
        },
    )
    reward_weights: list[float] = field(
        default_factory=list, metadata={"help": "One for each reward; all 1 where left out."}
    )
    timeout: float | None = _option(None, "Seconds that a reward function may take for a batch.")
    retries: int = _option(2, "How often a reward function that fails is tried again.")
    num_return_sequences: int = _option(4, "Answers to each prompt.")
    max_new_tokens: int = _option(128, "Where an answer is cut.")
    block_size: int = _option(64, "Prompts that are answered together.")
    license: str | None = _option(None, "Of the head, for its card, as the Hub writes it: apache-2.0.")
    language: str | None = _option(None, "Of the texts, for the card: en.")
    data: str | None = _option(None, "What the prompts are from, for the card: an id on the Hub, or words.")
    data_license: str | None = _option(None, "Of these, for the card.")
    dry_run: bool = _option(False, "Say how much there is to do, and time a few steps. Writes nothing.")


class _Help(ArgumentDefaultsHelpFormatter):
    """One spelling of each option, and only defaults that say something."""

    def _format_action_invocation(self, action: Action) -> str:
        return " ".join([*action.option_strings[:1], self._format_args(action, action.dest.upper())]).strip()

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, False, [], MISSING) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are ValueErrors, of one line."""

    def __init__(self) -> None:
        both: Any = (TrainOptions, RecontrolTrainingArguments)
        super().__init__(both, usage=USAGE, formatter_class=_Help, add_help=False, allow_abbrev=False)
        self.by_name: dict[str, Action] = {}
        for action in self._actions:  # of --x and --no_x the first
            self.by_name.setdefault(action.dest, action)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. See hf-recontrol train --help.")


def help_text(*, everything: bool) -> str:
    """Our own options, and with `everything` those of transformers' TrainingArguments too."""
    parser = _Parser()
    own = {one.name for one in fields(TrainOptions)} | set(RecontrolTrainingArguments.__annotations__)
    if not everything:
        for action in parser._actions:
            if action.dest not in own:
                action.help = SUPPRESS
        parser.epilog = (
            "And all of transformers' TrainingArguments (--seed, --eval_strategy, --resume_from_checkpoint, "
            "--push_to_hub, --hub_model_id, --report_to, …): --help_all shows them. Dashes may stand for underscores."
        )
    return parser.format_help()


def parse(arguments: list[str]) -> tuple[TrainOptions, RecontrolTrainingArguments]:
    """From the command line and its --config.

    Raises:
        ValueError: an unknown option or key (the nearest is named), or a value of the wrong kind.
    """
    parser = _Parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        option = next((text for text in unknown if text.startswith("--")), unknown[0])
        names = [name for action in parser._actions for name in action.option_strings]
        raise ValueError(f"There is no option {option!r}{_nearest(option.split('=')[0], names)}")
    if given.config is not None:
        parser.set_defaults(**_read(given.config, parser.by_name))
    options, args = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return options, args


def _read(config: str, by_name: dict[str, Action]) -> dict[str, Any]:
    """The YAML file, as defaults for the options."""
    if not Path(config).is_file():
        raise ValueError(f"--config is {config!r}, but there is no such file.")
    try:
        found = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{config} holds a {type(found).__name__}; expected are lines such as learning_rate: 0.001.")
    defaults = {str(name).replace("-", "_"): value for name, value in found.items()}
    for name, value in defaults.items():
        if name not in by_name or name == "config":
            raise ValueError(f"{config} has {name!r}, which is no option{_nearest(name, list(by_name))}")
        action = by_name[name]
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"{config} has {name}: {value!r}; it must be one of {list(action.choices)}.")
        if action.nargs == "+":
            items = value if isinstance(value, list) else [value]
            defaults[name] = [action.type(item) if callable(action.type) else item for item in items]
    return defaults


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; do you mean {near[0]!r}?" if near else ". See hf-recontrol train --help_all."
