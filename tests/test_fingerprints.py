"""What a reward function is known by: another process, folder or line is the same function, another code is not."""

import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from hf_recontrol import CollectError, collect_rollouts
from hf_recontrol.fingerprints import code_sha256
from hf_recontrol.rewards import Rewards

REWARD = """
    import functools

    GOOD = ("fine", "good")
    CALLS = 0
    MODEL = None
    seen = []

    def share(words):
        return sum(word in GOOD for word in words) / len(words)

    def model():
        global MODEL
        MODEL = MODEL or object()
        return MODEL

    def reward(completions, *, floor=0.5, **kwargs):
        "Says what is good."
        global CALLS
        CALLS += 1
        seen.append(completions)
        model()
        kinds = {"a", "b", "c", "d"}
        return [max(floor, share(text.split()) if text not in {"x", "y", "z"} else 1.0) for text in completions]

    class Judge:
        def __init__(self, bar):
            self.bar, self.calls, self.cache = bar, 0, {}

        def score(self, text):
            return len(text) / self.bar

        def __call__(self, completions, **kwargs):
            self.calls += 1
            self.cache[self.calls] = completions
            return [self.score(text) for text in completions]

    def scaled(function, by):
        @functools.wraps(function)
        def inner(**kwargs):
            return [by * value for value in function(**kwargs)]
        return inner

    reward_of_two = functools.partial(reward, floor=2)
    judge = Judge(8)
    half = scaled(reward, 0.5)
    method = judge.score
"""
NAMES = ("reward", "reward_of_two", "judge", "half", "method")


def load(source):
    namespace = {"__name__": "rewards"}
    exec(textwrap.dedent(source), namespace)
    return namespace


def hashes(source=REWARD):
    namespace = load(source)
    return {name: code_sha256(namespace[name]) for name in NAMES}


@pytest.fixture(scope="module")
def known():
    return hashes()


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_new_process_another_folder_and_another_line_give_the_same_hash(tmp_path, known, seed):
    (tmp_path / "elsewhere.py").write_text("# a comment\n\n" + textwrap.dedent(REWARD), encoding="utf-8")
    code = (
        "import runpy; from hf_recontrol.fingerprints import code_sha256\n"
        f"found = runpy.run_path('elsewhere.py')\n"
        f"for name in {NAMES}: print(name, code_sha256(found[name]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert dict(line.split() for line in process.stdout.splitlines()) == known


def test_calls_change_nothing():
    namespace = load(REWARD)
    before = {name: code_sha256(namespace[name]) for name in NAMES}
    for _ in range(100):  # the interpreter specialises bytecode that runs often
        for name in ("reward", "reward_of_two", "judge", "half"):
            namespace[name](completions=["fine day", "x"])
    assert {name: code_sha256(namespace[name]) for name in NAMES} == before


@pytest.mark.parametrize(
    ("there", "here", "changed"),
    [
        ("/ len(words)", "/ (1 + len(words))", {"reward", "reward_of_two", "half"}),  # a helper
        ('("fine", "good")', '("fine", "bad")', {"reward", "reward_of_two", "half"}),  # a constant that it reads
        ("floor=0.5", "floor=0.6", {"reward", "reward_of_two", "half"}),
        ("floor=2", "floor=3", {"reward_of_two"}),
        ("floor=2", "floor=2.0", {"reward_of_two"}),
        ("Judge(8)", "Judge(9)", {"judge", "method"}),
        ("/ self.bar", "* self.bar", {"judge", "method"}),  # a method that the call names
        ("scaled(reward, 0.5)", "scaled(reward, 0.25)", {"half"}),  # in a closure
        ('{"x", "y", "z"}', '{"x", "y"}', {"reward", "reward_of_two", "half"}),
        ("max(floor", "min(floor", {"reward", "reward_of_two", "half"}),
        ("seen = []", "seen = [1]", set()),  # not seen
        ("CALLS = 0", "CALLS = 7", set()),  # state
    ],
)
def test_what_changes_the_rewards_changes_the_hash_and_nothing_else_does(known, there, here, changed):
    assert there in REWARD
    other = hashes(REWARD.replace(there, here))
    assert {name for name in NAMES if other[name] != known[name]} == changed


def test_recursion_and_builtins_are_described_too():
    def down(n):
        return n and down(n - 1)

    assert code_sha256(down) == code_sha256(down)
    assert code_sha256(len) != code_sha256(max)
    assert code_sha256(functools.partial(down, 1)) != code_sha256(functools.partial(down, 2))
    assert code_sha256(functools.partial(down, True)) != code_sha256(functools.partial(down, 1))


def classifier(seed):
    torch.manual_seed(seed)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=1, **shape))


def test_a_model_is_known_by_its_weights():
    facts = [Rewards((classifier(seed), tiny_tokenizer())).facts()["reward_functions"] for seed in (0, 0, 1)]
    assert facts[0] == facts[1] != facts[2]
    assert set(facts[0]["LlamaForSequenceClassification"]) == {"model", "revision", "weights_sample_sha256"}


def test_resuming_with_another_function_of_the_same_name_is_refused(tmp_path):
    def made(factor):
        def reward(completions, **kwargs):
            return [factor * len(text) for text in completions]

        return reward

    options = {"max_new_tokens": 2, "progress": False}
    for factor in (1.0, 1.0):
        collect_rollouts(tiny_model(), tiny_tokenizer(), ["w5"], made(factor), tmp_path, **options)
    with pytest.raises(CollectError, match=r"reward_functions.reward.code_sha256 is '\w+' there and '\w+' here"):
        collect_rollouts(tiny_model(), tiny_tokenizer(), ["w5"], made(2.0), tmp_path, **options)
