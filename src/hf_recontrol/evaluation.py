"""What a comparison is made of: diversity, perplexity, KL, rewards, coherence. Answers in, numbers out."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from .answers import prompt_token_ids
from .coherence import Coherence
from .control import Controller
from .judging import warn_if_trained_by
from .reward_models import Text, answer_text
from .rewards import RewardFunc, Rewards
from .token_statistics import token_statistics

Tokenize = Callable[[str], Sequence[str]]
COLUMNS = ("prompt", "completion", "token_ids")


def words(text: str) -> list[str]:
    """The words and punctuation marks of `text`, case kept; needs no extra package.

    The paper takes nltk's `word_tokenize`, which cuts contractions (`do`, `n't`) and keeps dots together. To take it
    here, pass `tokenize=functools.partial(nltk.word_tokenize, preserve_line=True)` wherever this is the default.

    Examples:
        >>> words("Don't stop, she said.")
        ["Don't", 'stop', ',', 'she', 'said', '.']
    """
    return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text)


def diversity(text: str, *, max_words: int | None = None, tokenize: Tokenize = words) -> float:
    """Π_{n=2..4} (1 − rep_n) of one answer, where 1 − rep_n = distinct n-grams / (n-grams + 1).

    The metric of Kong et al. 2024 (arXiv:2406.05954) and ARGS (Khanov et al. 2024, arXiv:2402.01694), with their
    denominator: L words without a repeat score 1 − 3/L, not 1, and fewer than four words score 0. So compare answers of
    one length, or cut them to one by `max_words`. Several answers: the mean of theirs.

    Args:
        text: the answer.
        max_words: score only the first so many words, as `tokenize` counts them; None for all.
        tokenize: text → words.

    Examples:
        >>> diversity("a b c d e f")
        0.5
    """
    tokens = tokenize(text)[:max_words]
    # n-grams + 1 = L − n + 2, and 1 where the text is shorter than n
    return math.prod(len(set(_ngrams(tokens, n))) / max(len(tokens) - n + 2, 1) for n in (2, 3, 4))


def distinct_n(texts: Sequence[str], n: int = 3, *, tokenize: Tokenize = words) -> float:
    """Distinct n-grams / n-grams, both over all answers: low where answers resemble one another.

    After Li et al. 2016 (arXiv:1510.03055), who divide by the number of words; so divided, texts without a repeat
    score 1. It falls the more text is pooled: compare equally many answers of like length.

    Args:
        texts: the answers. No n-gram spans two of them; where there is none at all, 0 is returned.
        n: ≥ 1.
        tokenize: text → words.
    """
    counts = Counter(ngram for text in texts for ngram in _ngrams(tokenize(text), n))
    return len(counts) / max(counts.total(), 1)


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def best_of_n(rewards: Sequence[Sequence[float | None]], n: int) -> list[int]:
    """Of each prompt, the index of the highest reward among its first n answers; the first of equals.

    Args:
        rewards: per prompt, the rewards of its answers. None and NaN are never chosen.
        n: ≥ 1. A prompt with fewer answers, or without any reward among the first n, is a ValueError.
    """
    best = []
    for prompt, values in enumerate(rewards):
        if not 1 <= n <= len(values):
            raise ValueError(f"n is {n}, but prompt {prompt} has {len(values)} answers; pass 1 ≤ n ≤ {len(values)}.")
        rewarded = {i: reward for i, reward in enumerate(values[:n]) if reward is not None and not math.isnan(reward)}
        if not rewarded:
            raise ValueError(f"Prompt {prompt} has no reward among its first {n} answers. Leave that prompt out.")
        best.append(max(rewarded, key=rewarded.__getitem__))
    return best


def best_of_n_kl_bound(n: int) -> float:
    """log n − (n − 1)/n nats per answer: an upper bound of KL(best-of-n ‖ base), to be drawn as one.

    Often given as the KL itself; Beirami et al. 2024 (arXiv:2401.01879) show that it is a bound, which can be loose.
    """
    return math.log(n) - (n - 1) / n


def evaluate_answers(
    rows: Sequence[Mapping[str, Any]],
    reward_funcs: Rewards | RewardFunc | list[RewardFunc] | None = None,
    *,
    judge_funcs: Rewards | RewardFunc | list[RewardFunc] | None = None,
    coherence: Coherence | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    controller: Controller | None = None,
    batch_size: int = 64,
    tokenize: Tokenize = words,
    seconds: float | None = None,
    forwards_per_token: float | None = None,
) -> dict[str, float]:
    """One row of a comparison: what is measured of one method's answers, each figure a mean over answers.

    Args:
        rows: one per answer: "prompt" and "completion" (strings, or message lists) and "token_ids", the answer's ids
            as generated, with its EOS, without padding. Other columns, which every row must have, go to the rewards.
        reward_funcs: in TRL's convention, or a Rewards made once for all methods; None for no rewards. The reward that
            trained the head belongs here.
        judge_funcs: likewise, rewards that trained nothing, to see whether the answers are better and not the reward
            alone. A name that is also that of the reward which trained a head of `controller` is warned of.
        coherence: a Coherence made once for all methods; None for none.
        model: the model without control, for perplexity and KL; None for neither.
        tokenizer: the model's, for the prompts' ids; needed with `model`.
        controller: what the answers were steered by; without one the KL is 0.
        batch_size: answers per forward.
        tokenize: text → words, for diversity and distinct-n.
        seconds, forwards_per_token: what generating cost, as the caller measured it; not in the row where None.

    Returns:
        {"n", "reward/<name>" and "judge/<name>" of each function (without the answers it returned None for),
        "coherence", "perplexity", "kl_per_answer", "kl_per_token", "diversity", "diversity_20" (of the first 20 words,
        so that length does not show), "distinct_3", "length" (tokens), "seconds", "forwards_per_token"}.

    Raises:
        ValueError: no rows, a row without a column, or `model` without `tokenizer`.
    """
    if not rows or (model is not None and tokenizer is None):
        raise ValueError(f"Got {len(rows)} rows and tokenizer={tokenizer!r}; pass rows, and with model its tokenizer.")
    columns = _columns(rows)
    figures: dict[str, float] = {"n": len(rows)}
    if reward_funcs is not None:
        figures |= _reward_figures("reward", _as_rewards(reward_funcs), columns)
    if judge_funcs is not None:
        judge = _as_rewards(judge_funcs)
        for head in controller.heads if controller is not None else ():
            warn_if_trained_by(head, judge, stacklevel=3)
        figures |= _reward_figures("judge", judge, columns)
    prompts, completions, ids = (columns[name] for name in COLUMNS)
    if coherence is not None:
        figures["coherence"] = _mean(coherence(prompts, completions))
    if model is not None:
        prompt_ids = [prompt_token_ids(tokenizer, prompt) for prompt in prompts]
        statistics = token_statistics(model, prompt_ids, ids, controller, batch_size=batch_size)
        figures |= {name: getattr(statistics, name) for name in ("perplexity", "kl_per_answer", "kl_per_token")}
    texts = [answer_text(completion) for completion in completions]
    figures["diversity"] = _mean([diversity(text, tokenize=tokenize) for text in texts])
    figures["diversity_20"] = _mean([diversity(text, max_words=20, tokenize=tokenize) for text in texts])
    figures["distinct_3"] = distinct_n(texts, 3, tokenize=tokenize)
    figures["length"] = _mean([len(answer) for answer in ids])
    cost = {"seconds": seconds, "forwards_per_token": forwards_per_token}
    return figures | {name: value for name, value in cost.items() if value is not None}


def side_effects(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Text],
    references: Sequence[Text],
    controller: Controller | None,
    batch_size: int = 64,
) -> dict[str, float]:
    """What control does to texts that it did not write: KL per token, and their perplexity without and with it.

    A control that raises one reward and leaves the rest of the model alone has a small KL on texts of other kinds.

    Args:
        model: a decoder-only language model in eval mode.
        tokenizer: the model's.
        prompts: texts, or message lists, which get the chat template.
        references: texts that follow the prompts, or message lists, of which the last message counts; tokenised without
            special tokens, so that no EOS is scored.
        controller: whose effect is asked for; None: none.
        batch_size: texts per forward.

    Returns:
        {"n" (references), "kl_per_token" (nats), "perplexity", "steered_perplexity"}; each over all tokens, and NaN
        where there is none.

    Raises:
        ValueError: as token_statistics.
    """
    prompt_ids = [prompt_token_ids(tokenizer, prompt) for prompt in prompts]
    ids = [list(tokenizer(answer_text(text), add_special_tokens=False)["input_ids"]) for text in references]
    statistics = token_statistics(model, prompt_ids, ids, controller, batch_size=batch_size)
    figures = {name: getattr(statistics, name) for name in ("kl_per_token", "perplexity", "steered_perplexity")}
    return {"n": len(references), **figures}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    needed = {*COLUMNS, *rows[0]}
    for i, row in enumerate(rows):
        if lacking := sorted(needed - row.keys()):
            raise ValueError(f"Row {i} lacks {lacking}, but every row needs {sorted(needed)}. Add what it lacks.")
    return {name: [row[name] for row in rows] for name in needed}


def _as_rewards(reward_funcs: Rewards | RewardFunc | list[RewardFunc]) -> Rewards:
    return reward_funcs if isinstance(reward_funcs, Rewards) else Rewards(reward_funcs)


def _reward_figures(kind: str, rewards: Rewards, columns: Mapping[str, list[Any]]) -> dict[str, float]:
    others = {name: column for name, column in columns.items() if name not in COLUMNS}
    result = rewards(columns["prompt"], columns["completion"], columns["token_ids"], others)
    return {
        f"{kind}/{name}": _mean([value for value in values if value is not None])
        for name, values in result.per_function.items()
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
