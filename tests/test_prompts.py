"""Prompts from files, lists and the Hub, in the shapes in which preference data is published."""

import builtins
import gzip
import json

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tiny import tiny_model, tiny_tokenizer

from hf_recontrol import collect_rollouts
from hf_recontrol.prompts import NEXT_TURN, load_prompts, stop_strings_of

USER, ANSWER, OTHER = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Ho"), ("assistant", "Hm"))
)
SYSTEM = {"role": "system", "content": "Be kind."}
HH = [
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant: Well, Assistant: I",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant: No",
    },
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So", "rejected": "\n\nHuman: Why?\n\nAssistant: Soon"},
]
SHP = [
    {"post_id": post, "history": f"Post {post}", "human_ref_A": answer, "labels": 1}
    for post, answer in (("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"), ("b", "5"))
]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "csv", "parquet"])
def test_files_keep_their_other_columns(tmp_path, ending):
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(4)]
    path = tmp_path / f"prompts.{ending}"
    if ending == "csv":
        Dataset.from_list(rows).to_csv(path)
    elif ending == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        write(path, rows)
    assert load_prompts(path).to_list() == load_prompts(str(path)).to_list() == rows


def test_a_text_file_has_a_prompt_in_each_line_that_is_not_blank(tmp_path):
    (tmp_path / "prompts.txt").write_text("Why?\n\n  \nÜber alles \n", encoding="utf-8")
    assert load_prompts(tmp_path / "prompts.txt")["prompt"][:] == ["Why?", "Über alles "]


def test_a_folder_is_one_of_data_files_or_one_that_datasets_saved(tmp_path):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", [{"prompt": "a"}])
    write(tmp_path / "files" / "test.jsonl", [{"prompt": "b"}])
    assert load_prompts(tmp_path / "files")["prompt"][:] == ["a"]
    assert load_prompts(tmp_path / "files", split="test")["prompt"][:] == ["b"]
    DatasetDict(train=Dataset.from_list([{"prompt": "c"}])).save_to_disk(tmp_path / "dict")
    Dataset.from_list([{"prompt": "d"}]).save_to_disk(tmp_path / "one")
    assert [load_prompts(tmp_path / name)["prompt"][:] for name in ("dict", "one")] == [["c"], ["d"]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ([[USER], [SYSTEM, USER]], [[USER], [SYSTEM, USER]]),
        ([{"prompt": "a", "x": 1}], ["a"]),
        ([{"prompt": [USER], "completion": [ANSWER]}], [[USER]]),
        ([{"messages": [SYSTEM, USER, ANSWER]}], [[SYSTEM, USER]]),
        ([{"messages": [USER, ANSWER, USER]}], [[USER, ANSWER, USER]]),
        ([{"messages": [USER, ANSWER, USER, OTHER]}], [[USER, ANSWER, USER]]),
        ([{"chosen": "The sky is blue.", "rejected": "The sky is green."}], ["The sky is"]),
        ([{"chosen": "Why? So", "rejected": "Why? So it is"}], ["Why? S"]),
        ([{"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}], [[USER]]),
        ([{"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}], [[USER]]),
        ([{"chosen": [USER, ANSWER, USER, OTHER], "rejected": [USER, ANSWER, USER, ANSWER]}], [[USER, ANSWER, USER]]),
        ([{"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"}], ["Hi"]),
        ([{"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}], [[USER]]),
    ],
)
def test_the_prompt_is_found_in_each_of_trls_shapes(rows, expected):
    prompts = load_prompts(rows)
    assert prompts["prompt"][:] == expected
    assert not stop_strings_of(prompts)
    if isinstance(rows[0], dict):
        assert load_prompts(Dataset.from_list(rows)).to_list() == prompts.to_list()
        for name in rows[0].keys() - {"prompt"}:
            assert prompts[name][:] == [row[name] for row in rows]  # the answers are left whole


def test_a_dataset_that_is_given_is_not_changed():
    data = Dataset.from_list(HH)
    before = data.to_list(), data.info.description
    load_prompts(data, recipe="hh")
    assert (data.to_list(), data.info.description) == before


def test_hh_ends_at_the_last_turn_of_the_assistant_and_leaves_its_answer_out():
    prompts = load_prompts(HH, recipe="hh")
    assert prompts["prompt"][:] == [
        "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: And?\n\nAssistant:",
        "\n\nHuman: Why?\n\nAssistant:",
    ]
    assert prompts.remove_columns("prompt").to_list() == HH


def test_shp_is_the_papers_template_around_each_post_once():
    prompts = load_prompts(SHP, recipe="shp")
    assert prompts["prompt"][:] == [f"Human: Post {post}\nAssistant:" for post in "abc"]
    assert prompts["human_ref_A"][:] == ["1", "2", "4"]  # the first row of each post


def test_the_recipes_go_with_the_ids_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((*arguments, keywords))
        return Dataset.from_list(HH if "hh" in arguments[0] else SHP)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hh = load_prompts("Anthropic/hh-rlhf", split="test[:10]", name="harmless-base", revision="abc")
    shp = load_prompts("stanfordnlp/SHP")
    assert [len(hh), len(shp)] == [2, 3]
    assert stop_strings_of(hh) == stop_strings_of(shp) == NEXT_TURN
    assert asked == [
        ("Anthropic/hh-rlhf", "harmless-base", {"split": "test[:10]", "revision": "abc"}),
        ("stanfordnlp/SHP", None, {"split": "train", "revision": None}),
    ]


def test_a_recipe_stays_with_a_part_of_the_prompts(tmp_path):
    prompts = load_prompts(HH * 5, recipe="hh")
    parts = [prompts.select([1]), prompts.shuffle(seed=0), prompts.filter(bool, input_columns="prompt")]
    parts += list(prompts.train_test_split(0.5).values())
    prompts.save_to_disk(tmp_path)
    parts += [load_prompts(tmp_path), load_prompts(HH, recipe="hh", limit=1, seed=3)]
    assert [stop_strings_of(part) for part in parts] == [NEXT_TURN] * 7
    assert stop_strings_of(HH) == stop_strings_of(["a"]) == ()


def words(completions, **kwargs):
    return [float(len(completion.split())) for completion in completions]


def test_answers_end_at_the_recipes_stop_strings_unless_others_are_told(tmp_path):
    def collect(folder, prompts, **options):
        options = {"max_new_tokens": 4, "num_return_sequences": 2, "progress": False} | options
        return collect_rollouts(tiny_model(), tiny_tokenizer(), prompts, words, tmp_path / folder, **options)

    prompts = load_prompts(HH, recipe="hh")
    assert collect("a", prompts).fingerprint["generation"]["stop_strings"] == list(NEXT_TURN)
    assert collect("b", prompts, stop_strings=[]).fingerprint["generation"]["stop_strings"] == []
    rollouts = collect("c", prompts, stop_strings="w7")
    assert rollouts.fingerprint["generation"]["stop_strings"] == ["w7"]
    assert [row["prompt_id"] for row in rollouts.rows()] == [0, 0, 1, 1]
    plain = collect("d", prompts["prompt"][:])
    assert plain.fingerprint["generation"]["stop_strings"] == []


def test_where_an_answer_is_cut_the_line_ends_before_the_turn_go_too():
    text = "Sure.\n\nHuman: Thanks"
    assert text[: min(text.find(stop) for stop in NEXT_TURN if stop in text)] == "Sure."


def test_limit_takes_the_first_and_a_seed_shuffles_before():
    rows = [f"p{i}" for i in range(50)]
    assert load_prompts(rows, limit=3)["prompt"][:] == ["p0", "p1", "p2"]
    drawn = load_prompts(rows, limit=3, seed=1)["prompt"][:]
    assert drawn == load_prompts(rows, limit=3, seed=1)["prompt"][:]
    assert drawn not in (["p0", "p1", "p2"], load_prompts(rows, limit=3, seed=2)["prompt"][:])
    assert len(load_prompts(rows, limit=99)) == 50


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ([{"text": "a"}], {}, r"has the columns \['text'\]; expected is prompt, messages, or chosen and rejected"),
        ([], {}, "The list has no rows in split 'train'; expected is one prompt or more"),
        (Dataset.from_dict({"prompt": []}), {}, "The Dataset has no rows"),
        (["a", "", "b", ""], {}, "Row 1, and 1 more, have no prompt like the others: ''"),
        ([{"prompt": "a"}, {"prompt": None}], {}, "Row 1, and 0 more, .*None"),
        ([{"prompt": 1}], {}, "Row 0, .*: 1. Expected is a text"),
        ([{"messages": [ANSWER]}], {}, r"Row 0, .*: \[\]"),
        ([{"chosen": "a", "rejected": "b"}], {}, "Row 0, and 0 more, have no prompt"),
        (HH, {"recipe": "hhh"}, r"recipe is 'hhh'; expected is one of \['hh', 'shp'\]"),
        (SHP, {"recipe": "hh"}, r"recipe 'hh' reads the columns \['chosen'\], but .*'history'.* for Anthropic/hh-rlhf"),
        (HH, {"recipe": "shp"}, r"reads the columns \['history', 'post_id'\]"),
        ([{"chosen": "So"}], {"recipe": "hh"}, r"Row 0 has 'So' as 'chosen'; the recipe 'hh' expects a dialogue"),
        ([{"chosen": None}], {"recipe": "hh"}, "Row 0 has None"),
        ([{"history": " ", "post_id": "a"}], {"recipe": "shp"}, "expects a post that is not blank"),
        (["a"], {"limit": 0}, "limit is 0; it must be an integer ≥ 1"),
        (DatasetDict(test=Dataset.from_list(HH)), {}, r"has the splits \['test'\], but split is 'train'"),
    ],
)
def test_what_holds_no_prompts_is_refused_by_what_was_found(data, options, words):
    with pytest.raises(ValueError, match=words):
        load_prompts(data, **options)


def test_a_split_or_an_ending_that_is_not_there_is_named(tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"prompts.jsonl could not be loaded with split='test'.*\['train'\]"):
        load_prompts(path, split="test")
    (tmp_path / "prompts.doc").write_text("a")
    with pytest.raises(ValueError, match=r"ends in '.doc'; expected is one of .jsonl, .json"):
        load_prompts(tmp_path / "prompts.doc")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"torn.jsonl could not be read: .*Mend the file"):
        load_prompts(tmp_path / "torn.jsonl")


def test_a_stream_is_refused_with_the_way_out():
    stream = Dataset.from_list(HH).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"is a IterableDataset; expected is .*list\(stream.take"):
        load_prompts(stream)


def test_an_id_that_is_not_on_the_hub_is_an_os_error(hub):
    with pytest.raises(OSError, match="user/none"):
        load_prompts("user/none")


def test_without_datasets_the_answer_is_the_pip_command(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'hf-recontrol\[train\]'"):
        load_prompts(["a"])
