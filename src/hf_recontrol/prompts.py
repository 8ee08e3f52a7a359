"""load_prompts: prompts from the Hub, from files and from lists, in the shapes that preference data come in."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config_checks import shown

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
NEXT_TURN = tuple(f"{line}{speaker}:" for speaker in ("Human", "User") for line in ("\n\n", "\n", ""))
"""Where the paper cuts an answer: at the next turn of the other speaker. The line ends in front of it go too."""


@dataclass(frozen=True)
class Recipe:
    """How the rows of a published dataset become the prompts of Kong et al. 2024 (arXiv:2406.05954)."""

    dataset: str
    """Its id on the Hub, for which the recipe is taken by itself."""
    column: str
    """The one that the prompt is made of."""
    prompt: Callable[[str], str | None]
    """From a value of the column to the prompt; None where it holds none."""
    form: str
    """What the column must hold, in words."""
    unique: str | None = None
    """Of rows that agree in this column the first is kept."""
    stop_strings: tuple[str, ...] = NEXT_TURN
    """What ends an answer beside EOS: collect_rollouts' default for these prompts."""


def _hh(dialogue: str) -> str | None:
    """Up to the last "Assistant:", which leaves the reference answer out.

    The released code (Lingkai-Kong/RE-Control, f897869) tests with the answer in the prompt, for it takes the test
    split (inference_intervention.py:97) before the map that cuts it (line 125). It also writes "Human:" as "Human: ",
    or "User: " for Falcon and Llama (line 114); here the dialogue is as it was published.
    """
    prompt, turn, _ = dialogue.rpartition("\n\nAssistant:")
    return prompt + turn if turn else None


def _shp(post: str) -> str | None:
    """The template of inference_intervention.py:119 at f897869, with the "Human: " that it has for Vicuna."""
    return f"Human: {post}\nAssistant:" if post.strip() else None


RECIPES = {
    "hh": Recipe("Anthropic/hh-rlhf", "chosen", _hh, 'a dialogue with a turn "\\n\\nAssistant:"'),
    "shp": Recipe("stanfordnlp/SHP", "history", _shp, "a post that is not blank", unique="post_id"),
}


def load_prompts(
    dataset: "str | os.PathLike[str] | Dataset | Sequence[Any]",
    *,
    split: str = "train",
    name: str | None = None,
    recipe: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    revision: str | None = None,
) -> "Dataset":
    """A dataset with a column "prompt", for collect_rollouts. Downloads what is named by an id.

    The shapes of TRL's datasets are recognised by their columns:
    - prompt: a text or a list of messages, as it is;
    - messages: the prompt is what stands before an assistant's turn at the end;
    - chosen and rejected: the prompt is what the two have in common at their beginning. Of dialogues in plain text that
      is often some of the answer too (1 in 5 of hh-rlhf): name their recipe.

    Args:
        dataset: a dataset's id on the Hub, a folder (of data files, or written by save_to_disk), a file (.jsonl, .json,
            .parquet, .csv, or .txt with a prompt a line, also with .gz behind it), a datasets.Dataset or DatasetDict,
            or a list of texts, of message lists or of rows. An existing path wins over an id.
        split: "train", "test", "train[:1000]", …; a file and a list are "train".
        name: of the dataset's configuration on the Hub.
        recipe: "hh" or "shp", for other copies of Anthropic/hh-rlhf and stanfordnlp/SHP, which get theirs anyway. It
            also gives the stop strings that collect_rollouts uses where it is told none.
        limit: so many prompts, at most.
        seed: shuffle by it before the limit is taken; None keeps the order.
        revision: branch, tag or commit on the Hub.

    Returns:
        A datasets.Dataset: the column "prompt", and the others as they were.

    Raises:
        ImportError: the extra `train` is not installed.
        ValueError: no such split or recipe, an empty dataset, columns in which no prompt is found, or a row without
            one. What the Hub refuses is an OSError of datasets.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit is {limit!r}; it must be an integer ≥ 1, or None for all prompts.")
    if recipe is not None and recipe not in RECIPES:
        raise ValueError(
            f"recipe is {recipe!r}; expected is one of {sorted(RECIPES)}, or None for prompts as they are."
        )
    if recipe is None:
        recipe = next((own for own, known in RECIPES.items() if dataset == known.dataset), None)
    rows = _load(dataset, split, name, revision)
    if len(rows) == 0:
        raise ValueError(f"{_called(dataset)} has no rows in split {split!r}; expected is one prompt or more.")
    rows = _with_prompts(rows) if recipe is None else _by_recipe(rows, recipe)
    if seed is not None:
        rows = rows.shuffle(seed=seed)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def stop_strings_of(prompts: Any) -> tuple[str, ...]:
    """Those of the recipe that load_prompts made the prompts by; none where there was none."""
    described = getattr(getattr(prompts, "info", None), "description", None)
    return next((recipe.stop_strings for name, recipe in RECIPES.items() if described == _description(name)), ())


def _description(recipe: str) -> str:
    # A dataset keeps its description through select, filter, map, shuffle and save_to_disk.
    return f"Prompts by hf_recontrol's recipe {recipe!r} for {RECIPES[recipe].dataset}."


def _load(dataset: Any, split: str, name: str | None, revision: str | None) -> "Dataset":
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Prompts need datasets. Install the extra: pip install 'hf-recontrol[train]'") from error
    if isinstance(dataset, str | os.PathLike):
        dataset = _read(datasets, os.fspath(dataset), split, name, revision)
    elif isinstance(dataset, list | tuple):
        plain = not all(isinstance(row, Mapping) for row in dataset)
        dataset = datasets.Dataset.from_list([{"prompt": row} for row in dataset] if plain else list(dataset))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(
                f"The dataset has the splits {sorted(dataset)}, but split is {split!r}. Pass one of these."
            )
        dataset = dataset[split]
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}; expected is a Hub id, a path, a list, or a datasets.Dataset. Of a "
            "stream, take rows first: list(stream.take(1000))."
        )
    return dataset


def _read(datasets: Any, path: str, split: str, name: str | None, revision: str | None) -> Any:
    """From a file, a folder or the Hub."""
    suffix = Path(path.removesuffix(".gz")).suffix
    if os.path.isfile(path) and suffix not in FORMATS:
        raise ValueError(
            f"{path} ends in {suffix!r}; expected is one of {', '.join(FORMATS)}, or one of these and .gz."
        )
    if suffix in FORMATS and not os.path.exists(path):
        raise ValueError(f"There is no file {path}. Expected is a file, a folder, or the id of a dataset on the Hub.")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty; expected is one prompt or more.")
    saved = [marker for marker in ("dataset_dict.json", "state.json") if os.path.isfile(os.path.join(path, marker))]
    try:
        if saved:
            return datasets.load_from_disk(path)
        if not os.path.isfile(path):
            return datasets.load_dataset(path, name, split=split, revision=revision)
        rows = datasets.load_dataset(FORMATS[suffix], data_files=path, split=split)
    except ValueError as error:  # of an unknown split or configuration; its message names those that there are
        raise ValueError(f"{path} could not be loaded with split={split!r} and name={name!r}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{path} could not be read: {shown(str(error.__cause__ or error))}. Mend the file.") from error
    if FORMATS[suffix] == "text":  # a prompt a line
        rows = rows.rename_column("text", "prompt")
        rows = rows.select([i for i, line in enumerate(rows["prompt"][:]) if line.strip()])
    return rows


def _called(dataset: Any) -> str:
    return shown(os.fspath(dataset)) if isinstance(dataset, str | os.PathLike) else f"The {type(dataset).__name__}"


def _by_recipe(rows: "Dataset", name: str) -> "Dataset":
    recipe = RECIPES[name]
    missing = sorted({recipe.column, recipe.unique or recipe.column} - set(rows.column_names))
    if missing:
        raise ValueError(
            f"The recipe {name!r} reads the columns {missing}, but the dataset has {rows.column_names}. It is for "
            f"{recipe.dataset} and copies of it."
        )
    if recipe.unique is not None:
        first: dict[Any, int] = {}
        for i, key in enumerate(rows[recipe.unique][:]):
            first.setdefault(key, i)
        rows = rows.select(first.values())
    texts = rows[recipe.column][:]
    prompts = [recipe.prompt(text) if isinstance(text, str) else None for text in texts]
    if None in prompts:
        row = prompts.index(None)
        raise ValueError(
            f"Row {row} has {shown(texts[row])} as {recipe.column!r}; the recipe {name!r} expects {recipe.form}. Leave "
            "such rows out, or choose no recipe."
        )
    rows = _put(rows, prompts)
    rows.info.description = _description(name)
    return rows


def _with_prompts(rows: "Dataset") -> "Dataset":
    """By the columns that there are."""
    names = set(rows.column_names)
    pair = {"chosen", "rejected"} <= names
    if "prompt" in names and not (pair and isinstance(rows[0]["prompt"], str) and isinstance(rows[0]["chosen"], list)):
        prompts = rows["prompt"][:]
    elif pair:  # as in TRL also where the prompt is a text and the answers have it as messages
        prompts = list(map(_common, rows["chosen"][:], rows["rejected"][:]))
        rows = _put(rows, prompts)
    elif "messages" in names:
        prompts = [_before_answer(messages) for messages in rows["messages"][:]]
        rows = _put(rows, prompts)
    else:
        raise ValueError(
            f"The dataset has the columns {rows.column_names}; expected is prompt, messages, or chosen and rejected. "
            "Rename the column with the prompts: dataset.rename_column('…', 'prompt')."
        )
    kind = type(prompts[0])
    bad = [i for i, prompt in enumerate(prompts) if not prompt or type(prompt) is not kind or kind not in (str, list)]
    if bad:
        raise ValueError(
            f"Row {bad[0]}, and {len(bad) - 1} more, have no prompt like the others: {shown(prompts[bad[0]])}. "
            "Expected is a text in each, or a list of messages in each. Leave such rows out: dataset.filter(…)."
        )
    return rows


def _put(rows: "Dataset", prompts: list[Any]) -> "Dataset":
    rows = rows.remove_columns("prompt") if "prompt" in rows.column_names else rows
    return rows.add_column("prompt", prompts)


def _before_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages


def _common(chosen: Any, rejected: Any) -> Any:
    """What two answers begin with, of which each has something left; of texts without a space at the end, as in TRL."""
    most = min(len(chosen), len(rejected)) - 1
    length = next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))
    return chosen[:length].removesuffix(" ") if isinstance(chosen, str) else chosen[:length]
