"""Reward functions: called as TRL calls them, and believed only when they answer as they should."""

import asyncio
import functools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerState

from hf_recontrol import RolloutDataset, collect_rollouts, reward_calls
from hf_recontrol.errors import CollectError
from hf_recontrol.reward_calls import Failures
from hf_recontrol.rewards import Rewards

TEMPLATE = "{{ '<s>' }}{% for m in messages %}{{ ' ' + m['content'] + ' </s>' }}{% endfor %}"
PROMPTS, COMPLETIONS, IDS = ["w10 w11", "w12", "w13"], [" w20", " w21 w22", ""], [[20], [21, 22], []]


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def one(completions, **kwargs):
    return [1.0] * len(completions)


def score(functions, weights=None, **columns):
    return Rewards(functions, weights)(PROMPTS, COMPLETIONS, IDS, columns)


def classifier(**config):
    torch.manual_seed(0)
    defaults = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForSequenceClassification(
        LlamaConfig(
            **{
                **defaults,
                "vocab_size": 64,
                "num_labels": 1,
                "max_position_embeddings": 32,
                "pad_token_id": None,
                **config,
            }
        )
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-reward"
    classifier().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(token_ids):
    with torch.no_grad():
        return classifier()(input_ids=torch.tensor([token_ids])).logits[0, 0].item()


def test_a_callable_gets_what_trl_gives_by_keyword():
    seen = {}

    def reward(*args, **kwargs):
        assert not args
        seen.update(kwargs)
        return [1.0, 2.0, 3.0]

    result = score(reward, answer=["a", "b", "c"], difficulty=(1, 2, 3))
    assert {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "answer",
        "difficulty",
    } == set(seen)
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (PROMPTS, COMPLETIONS, IDS)
    assert (seen["answer"], seen["difficulty"]) == (["a", "b", "c"], [1, 2, 3])
    assert isinstance(seen["trainer_state"], TrainerState)
    assert (result.total, result.per_function) == ([1.0, 2.0, 3.0], {"reward": [1.0, 2.0, 3.0]})


def test_rewards_are_weighted_and_none_is_left_out():
    def picky(completions, **kwargs):
        return [None, 10, None]

    def silent(completions, **kwargs):
        return [1.0, 1.0, None]

    result = score([picky, silent], [0.5, 2.0])
    assert result.total == [2.0, 7.0, None]
    assert result.per_function == {"picky": [None, 10.0, None], "silent": [1.0, 1.0, None]}
    assert score([length, one]).total == [5.0, 9.0, 1.0]


def test_async_functions_run_together_and_may_stand_beside_others():
    started = asyncio.Event()

    async def waits(completions, **kwargs):
        await asyncio.wait_for(started.wait(), 10)
        return [1.0] * 3

    async def wakes(completions, **kwargs):
        started.set()
        return [2.0] * 3

    class Later:
        async def __call__(self, completions, **kwargs):
            return [3.0] * 3

    result = score([waits, length, wakes, Later()])
    assert result.per_function["waits"] == [1.0] * 3
    assert list(result.per_function) == ["waits", "length", "wakes", "Later"]
    assert result.total == [10.0, 14.0, 6.0]


def test_all_calls_of_an_async_function_see_one_loop():
    loops = []

    async def reward(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [1.0] * 3

    rewards = Rewards(reward)
    for _ in range(2):
        rewards(PROMPTS, COMPLETIONS, IDS)
    assert loops[0] is loops[1]


def test_async_functions_work_where_a_loop_runs_already_as_in_a_notebook():
    async def reward(completions, **kwargs):
        return [1.0] * 3

    async def notebook():
        return score(reward).total

    assert asyncio.run(notebook()) == [1.0] * 3


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([1.0], "returned 1 rewards for 3"),  # would broadcast
        ([], "returned 0 rewards"),
        (None, "returned a NoneType; expected is a list of 3"),
        (1.0, "returned a float"),
        ("123", "returned a str"),
        (b"123", "returned a bytes"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned a dict"),
        (torch.ones(3), r"returned a Tensor; .* call .tolist\(\)"),
        (np.ones(3), r"returned a ndarray; .* call .tolist\(\)"),
        ([1.0, True, 1.0], r"returned True \(bool\) for completion 1"),
        ([1.0, 1.0, "1"], r"returned '1' \(str\) for completion 2"),
        ([[1.0], 1.0, 1.0], r"returned \[1.0\] \(list\) for completion 0"),
        ([1.0, float("nan"), 1.0], "returned nan"),
        ([1.0, float("inf"), 1.0], "returned inf"),
        ([1.0, 10**400, 1.0], "for completion 1"),
        ([1.0, 1j, 1.0], "returned 1j"),
        ([torch.tensor(1.0), 1.0, 1.0], "Tensor"),
    ],
)
def test_a_wrong_return_is_refused_and_the_function_named(returned, words):
    def broken(**kwargs):
        return returned

    with pytest.raises(CollectError, match=f"'broken'.*{words}"):
        score([length, broken])


@pytest.mark.parametrize("returned", [[1, 2, 3], (1.0, 2.0, 3.0), [np.float32(1), np.float64(2), np.int64(3)]])
def test_any_real_numbers_are_taken_as_floats(returned):
    total = score(lambda **kwargs: returned).total
    assert total == [1.0, 2.0, 3.0]
    assert all(type(reward) is float for reward in total)


@pytest.fixture
def hurry(monkeypatch):
    """No pauses between tries."""
    monkeypatch.setattr(reward_calls, "PAUSE", 0.0)


def flaky(fails, error=ZeroDivisionError):
    """A function that raises at its first `fails` calls; its calls; and the same as async."""
    calls = []

    def reward(completions, log_extra, **kwargs):
        calls.append(completions.copy())
        completions.clear()  # what it does to its lists is its own affair
        log_extra("try", [len(calls)] * 3)
        if len(calls) <= fails:
            raise error("mine")
        return [1.0] * 3

    async def reward_async(**kwargs):
        return reward(**kwargs)

    return reward, calls, reward_async


@pytest.mark.parametrize("kind", ["sync", "in a thread", "async"])
def test_a_function_that_raises_is_called_again_as_at_first(hurry, kind):
    reward, calls, reward_async = flaky(2)
    rewards = Rewards(reward_async if kind == "async" else reward, timeout=60 if kind == "in a thread" else None)
    result = rewards(PROMPTS, COMPLETIONS, IDS)
    assert (result.total, result.errors) == ([1.0] * 3, {})
    assert calls == [COMPLETIONS] * 3
    assert result.logged == {"try": [3] * 3}  # of the try that came through


@pytest.mark.parametrize("kind", ["sync", "in a thread", "async"])
def test_after_the_retries_the_error_is_the_cause_of_ours(hurry, kind):
    reward, calls, reward_async = flaky(9)
    rewards = Rewards(
        reward_async if kind == "async" else reward, timeout=60 if kind == "in a thread" else None, retries=1
    )
    with pytest.raises(CollectError, match=r"'reward\w*' failed on 3 answers.*ZeroDivisionError: mine") as raised:
        rewards(PROMPTS, COMPLETIONS, IDS)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert len(calls) == 2


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("timeout", [None, 60])
def test_an_interrupt_is_no_failure(interrupt, timeout):
    reward, calls, _ = flaky(9, interrupt)
    with pytest.raises(interrupt):
        Rewards(reward, timeout=timeout)(PROMPTS, COMPLETIONS, IDS)
    assert len(calls) == 1


def test_the_pauses_between_tries_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr(reward_calls.time, "sleep", pauses.append)
    Rewards(flaky(3)[0], retries=3)(PROMPTS, COMPLETIONS, IDS)
    assert pauses == [0.0, 0.5, 1.0, 2.0]


def test_a_function_that_hangs_is_given_up_and_tried_again(hurry):
    release, late = threading.Event(), []

    def hangs(completions, log_extra, **kwargs):
        late.append(None)
        if len(late) == 1:
            release.wait(60)
            log_extra("late", [1] * 3)  # by the abandoned thread: it must not reach the table
        return [1.0] * 3

    start = time.monotonic()
    result = Rewards(hangs, timeout=0.2)(PROMPTS, COMPLETIONS, IDS)
    release.set()
    assert (result.total, result.logged) == ([1.0] * 3, {})
    assert time.monotonic() - start < 10


def test_an_async_function_that_hangs_is_cancelled(hurry):
    cancelled = []

    async def hangs(**kwargs):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(None)
            raise

    with pytest.raises(CollectError, match=r"'hangs' failed .* TimeoutError: no rewards within 0.1 s\. What was"):
        Rewards(hangs, timeout=0.1, retries=1)(PROMPTS, COMPLETIONS, IDS)
    assert len(cancelled) == 2


def test_the_process_can_end_while_a_function_hangs():
    code = (
        "import time; from hf_recontrol.rewards import Rewards\n"
        "try: Rewards(lambda **kw: time.sleep(600), timeout=0.1, retries=0)(['a'], ['b'], [[1]])\n"
        "except RuntimeError as error: print(error)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "no rewards within 0.1 s" in process.stdout


def test_a_failed_function_leaves_no_sum_of_the_others(hurry):
    rewards, failures = Rewards([one, flaky(9)[0]], retries=0), Failures(planned=600)
    result = rewards(PROMPTS, COMPLETIONS, IDS, failures=failures)
    assert result.total == [None] * 3
    assert result.per_function == {"one": [1.0] * 3, "reward": [None] * 3}
    assert result.errors == {"reward": "ZeroDivisionError: mine"}
    assert failures.answers == {"reward": 3}


def test_up_to_five_percent_of_the_answers_may_fail_and_not_one_more(caplog):
    failures = Failures(planned=200)
    failures.count("good", 5, None)
    failures.count("reward", 5, None)
    for _ in range(2):
        failures.count("reward", 5, ValueError("503"))
    assert "'reward' failed on a batch of 5 answers" in caplog.text
    with pytest.raises(CollectError, match=r"'reward' failed on 15 answers, of 200 .* ValueError: 503.* call again"):
        failures.count("reward", 5, ValueError("503"))


def test_a_function_that_never_scores_ends_the_collecting_early():
    failures = Failures(planned=10**6)
    for _ in range(2):
        failures.count("reward", 5, ValueError("503"))
    with pytest.raises(CollectError, match="has scored none yet"):
        failures.count("reward", 5, ValueError("503"))


def test_a_wrong_return_is_not_tried_again():
    calls = []

    def short(**kwargs):
        calls.append(None)
        return [1.0]

    with pytest.raises(CollectError, match="returned 1 rewards for 3"):
        Rewards(short)(PROMPTS, COMPLETIONS, IDS)
    assert len(calls) == 1


def test_a_batch_that_failed_is_in_the_table_with_its_error_and_not_in_the_dataset(tmp_path, hurry):
    calls = []

    def reward(prompts, completions, **kwargs):
        calls.append(prompts)
        if "w7" in prompts:
            raise ConnectionError("503\nService Unavailable")
        return [1.0] * len(completions)

    prompts = [f"w{i}" for i in range(5, 46)]
    options = {"block_size": 2, "max_new_tokens": 2, "progress": False}
    dataset = collect_rollouts(tiny_model(), tiny_tokenizer(), prompts, Rewards(reward, retries=1), tmp_path, **options)
    failed = [row for row in dataset.rows() if row["errors"]]
    assert [row["prompt"] for row in failed] == ["w7", "w8"]
    assert all(row["errors"] == {"reward": "ConnectionError: 503 Service Unavailable"} for row in failed)
    assert all(row["reward"] is None and row["rewards"] == {"reward": None} for row in failed)
    assert len(dataset) == 39
    assert len(calls) == 21 + 1  # the retry


def test_too_many_failures_end_the_collecting_and_what_is_committed_goes_on(tmp_path, hurry):
    broken = [False]

    def reward(prompts, completions, **kwargs):
        if "w7" in prompts and broken[0]:
            raise ConnectionError("503")
        return [1.0] * len(completions)

    prompts, options = ["w5", "w6", "w7", "w8"], {"block_size": 2, "max_new_tokens": 2, "progress": False}
    broken[0] = True
    with pytest.raises(CollectError, match="'reward' failed on 2 answers, of 4"):
        collect_rollouts(tiny_model(), tiny_tokenizer(), prompts, reward, tmp_path, **options)
    assert len(RolloutDataset(tmp_path)) == 2
    broken[0] = False
    assert len(collect_rollouts(tiny_model(), tiny_tokenizer(), prompts, reward, tmp_path, **options)) == 4


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": float("inf")}, {"retries": -1}, {"retries": 1.5}])
def test_timeouts_and_retries_out_of_bounds_are_refused(options):
    with pytest.raises(ValueError, match="expected are seconds > 0 or None, and an integer ≥ 0"):
        Rewards(one, **options)


def test_what_a_function_logs_goes_into_columns():
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("words", [len(completion.split()) for completion in completions])
        log_extra("scores", np.array([1.0, float("nan"), 3.0]))
        log_metric("mean", torch.tensor(0.5))
        return [0.0] * 3

    assert score(reward).logged == {"words": [1, 2, 0], "scores": [1.0, None, 3.0], "mean": [0.5] * 3}


def test_logged_columns_of_a_wrong_length_or_kind_are_refused():
    def short(log_extra, **kwargs):
        log_extra("words", [1])

    def odd(log_extra, **kwargs):
        log_extra("things", [object()] * 3)

    with pytest.raises(CollectError, match="'short' logged 1 values as 'words' for 3"):
        score(short)
    with pytest.raises(CollectError, match=r"'odd' logged .* as 'things', which does not go into a table"):
        score(odd)


def test_names_are_trls_and_each_stands_once(folder):
    partial = functools.partial(one)
    assert Rewards([str(folder), length, one, one, partial]).names == [
        "tiny-reward",
        "length",
        "one",
        "one_2",
        "partial",
    ]


@pytest.mark.parametrize("kind", ["str", "path", "model", "pair"])
def test_a_classifier_scores_prompt_and_completion_without_padding_effects(folder, kind):
    model = LlamaForSequenceClassification.from_pretrained(folder)
    function = {"str": str(folder), "path": folder, "model": model, "pair": (classifier(), tiny_tokenizer())}[kind]
    total = Rewards(function)(PROMPTS, COMPLETIONS, IDS).total
    in_batches = Rewards(function, batch_size=2)(PROMPTS, COMPLETIONS, IDS).total
    expected = [by_hand([1, 10, 11, 20]), by_hand([1, 12, 21, 22]), by_hand([1, 13])]  # <s> in front: the tokenizer's
    assert total == pytest.approx(expected, abs=1e-5)  # the last text is padded
    assert in_batches == pytest.approx(expected, abs=1e-5)
    assert len(set(total)) == 3


def test_messages_go_through_the_reward_models_template_and_get_no_second_bos(folder):
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": text.strip() or "w9"}] for text in COMPLETIONS]
    total = Rewards(str(folder))(prompts, completions, IDS).total
    # Padding is EOS here, and the last token that is not padding gives the score, as in TRL: EOS at the end is skipped.
    expected = by_hand([1, 10, 11, 2, 20])
    assert total[0] == pytest.approx(expected, abs=1e-5)


def test_a_callers_model_and_tokenizer_are_left_as_they_were():
    model, tokenizer = classifier(attention_dropout=0.5).train(), tiny_tokenizer()
    model.model.layers[0].train(False)
    tokenizer.pad_token = None
    modes = [module.training for module in model.modules()]
    rewards = Rewards((model, tokenizer))
    assert rewards(PROMPTS, COMPLETIONS, IDS).total == rewards(PROMPTS, COMPLETIONS, IDS).total  # no dropout in it
    assert [module.training for module in model.modules()] == modes
    assert model.config.pad_token_id is None
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_classifier_with_two_labels_or_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"has 2 labels; a reward is one score"):
        Rewards((classifier(num_labels=2), tiny_tokenizer()))
    with pytest.raises(ValueError, match=r"Give the pair \(model, tokenizer\)"):
        Rewards(classifier())


def test_a_language_model_is_not_taken_for_a_reward_model(tmp_path):
    LlamaForCausalLM(classifier().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not a reward model: it has no weights for .*score.weight"):
        Rewards(str(tmp_path))


def test_texts_longer_than_the_reward_model_reads_are_refused():
    with pytest.raises(CollectError, match=r"has 41 tokens, but the reward model .* reads 32"):
        Rewards((classifier(), tiny_tokenizer()))(["w5 " * 40], [""], [[]])


def test_prompts_that_the_reward_model_cannot_read_are_refused_at_the_door(folder):
    rewards = Rewards((classifier(), tiny_tokenizer()))
    rewards.check(conversational=False)
    with pytest.raises(ValueError, match="has no chat template"):
        rewards.check(conversational=True)
    Rewards(str(folder)).check(conversational=True)


@pytest.mark.parametrize(
    ("functions", "weights"), [([], None), ([one], [1.0, 2.0]), ([one, length], [1.0]), (one, [float("nan")])]
)
def test_functions_and_weights_must_match(functions, weights):
    with pytest.raises(ValueError, match="as many finite weights"):
        Rewards(functions, weights)


def test_what_is_no_reward_function_is_refused():
    with pytest.raises(TypeError, match="A reward function is 3; expected is a Hub id"):
        Rewards([one, 3])
