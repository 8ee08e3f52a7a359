"""What a comparison is made of: diversity, perplexity, KL, rewards, paired gains. Answers in, numbers out."""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .control import Controller
from .forwards import forward_steered
from .kl_bound import kl_divergence, log_softmax
from .rewards import RewardFunc, Rewards

Tokenize = Callable[[str], Sequence[str]]
TokenIds = Sequence[Sequence[int]]


def words(text: str) -> list[str]:
    """The words and punctuation marks of `text`, case kept; needs no extra package.

    The paper takes nltk's `word_tokenize`, which cuts contractions (`do`, `n't`) and keeps dots together. To take it
    here, pass `tokenize=functools.partial(nltk.word_tokenize, preserve_line=True)` wherever this is the default.

    Example:
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

    Example:
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


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What teacher forcing says of each token of some answers, and the means of it that a table shows."""

    log_probs: list[Tensor]
    """Per answer, float (tokens,) on the CPU: log-probability under the unsteered model, nats."""
    kl: list[Tensor]
    """Per answer, float (tokens,) on the CPU: KL(p_steered ‖ p_base) where the token was chosen, nats; 0 unsteered."""

    @property
    def perplexity(self) -> float:
        """exp of the mean of −log p_base over all tokens of all answers; long ones weigh more. NaN without tokens."""
        return float(torch.exp(-torch.cat(self.log_probs).double().mean()))

    @property
    def kl_per_token(self) -> float:
        """Nats, the mean over all tokens of all answers; NaN without tokens."""
        return float(torch.cat(self.kl).double().mean())

    @property
    def kl_per_answer(self) -> float:
        """Nats, summed over the tokens of an answer, the mean over answers; an empty answer counts as 0."""
        return float(torch.cat(self.kl).double().sum()) / len(self.kl)


@torch.no_grad()
def token_statistics(
    model: PreTrainedModel,
    prompt_ids: TokenIds,
    completion_ids: TokenIds,
    controller: Controller | None = None,
    *,
    batch_size: int = 64,
) -> TokenStatistics:
    """log p_base(y_t) and KL(p_steered ‖ p_base) at each token of each answer, by teacher forcing.

    Costs one forward per batch, two with a controller, and holds one batch's logits of each. The KL is exact over the
    vocabulary and compares two real forwards, so what the model does after its LM head (soft-cap, scale) is in it;
    temperature and other sampling options are not. Summed over an answer sampled from the steered model at temperature
    1, it is an unbiased estimate of the KL between the two distributions of answers.

    Args:
        model: a decoder-only language model in eval mode.
        prompt_ids: token ids of each prompt, unpadded, at least one.
        completion_ids: token ids of each answer, unpadded, with its EOS if it generated one; may be empty.
        controller: whose KL is asked for; None for the model alone, KL 0.
        batch_size: answers per forward. An answer's numbers do not depend on its neighbours.

    Returns:
        TokenStatistics in the order of the answers, in float32 (float64 for a float64 model).

    Raises:
        ValueError: no answer, unequal lengths, an empty prompt, an encoder-decoder, or a model in training mode.
    """
    _check_teacher_forcing(model, prompt_ids, completion_ids)
    log_probs, kl = ([torch.zeros(0) for _ in completion_ids] for _ in range(2))
    lengths = [(len(prompt), len(completion)) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    # answers of like length go together, empty ones nowhere
    answered = sorted((i for i, (_, new) in enumerate(lengths) if new), key=lengths.__getitem__)
    for start in range(0, len(answered), batch_size):
        chosen = answered[start : start + batch_size]
        inputs = _forward_inputs(model, [prompt_ids[i] for i in chosen], [completion_ids[i] for i in chosen])
        base = forward_steered(model, None, **inputs).logits
        steered = base if controller is None else forward_steered(model, controller, **inputs).logits
        cut = inputs["input_ids"].shape[1] - base.shape[1]  # positions without logits, by logits_to_keep
        for row, i in enumerate(chosen):  # row by row: float32 copies of one answer's distributions only
            first = lengths[i][0] - 1 - cut
            where = slice(first, first + lengths[i][1])
            log_p = log_softmax(base[row, where])
            ids = torch.as_tensor(completion_ids[i], dtype=torch.long, device=log_p.device)
            log_probs[i] = log_p.gather(-1, ids[:, None]).squeeze(-1).cpu()
            kl[i] = kl_divergence(steered[row, where], base[row, where]).cpu()
        del base, steered  # before the next batch's are made
    return TokenStatistics(log_probs, kl)


def _check_teacher_forcing(model: PreTrainedModel, prompt_ids: TokenIds, completion_ids: TokenIds) -> None:
    if len(prompt_ids) != len(completion_ids) or not len(completion_ids):
        raise ValueError(
            f"Got {len(prompt_ids)} prompts and {len(completion_ids)} completions; expected one prompt for each of one "
            "or more completions. Repeat a prompt that has several answers."
        )
    if not all(len(prompt) for prompt in prompt_ids):
        raise ValueError("A prompt has no token, but the answer must follow at least one. Begin it with the BOS token.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; use a decoder-only model.")
    if model.training:
        raise ValueError("The model is in training mode, where dropout would be measured too. Call model.train(False).")


def _forward_inputs(model: PreTrainedModel, prompt_ids: TokenIds, completion_ids: TokenIds) -> dict[str, Any]:
    # The last token predicts nothing. Padding is on the right, where causal attention does not look and positions need
    # no position_ids; its id, 0, is one that every vocabulary has.
    pairs = zip(prompt_ids, completion_ids, strict=True)
    rows = [torch.cat([torch.as_tensor(ids, dtype=torch.long) for ids in pair])[:-1] for pair in pairs]
    inputs: dict[str, Any] = {
        "input_ids": pad_sequence(rows, batch_first=True).to(model.device),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device),
    }
    logits_to_keep = inputs["input_ids"].shape[1] - min(len(prompt) for prompt in prompt_ids) + 1
    optional = {"use_cache": False, "logits_to_keep": logits_to_keep}  # they save memory; not every forward has them
    accepted = inspect.signature(model.forward).parameters
    return inputs | {name: value for name, value in optional.items() if name in accepted}


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


@dataclass(frozen=True)
class Gain:
    """A mean gain over prompts, with its confidence interval."""

    mean: float
    """treated − baseline, the mean over prompts."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Prompts."""


def paired_bootstrap(
    baseline: Any,
    treated: Any,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    in_baseline_sd: bool = False,
) -> Gain:
    """Mean of treated − baseline on the same prompts, with the percentile interval of a bootstrap over prompts.

    Efron 1979. Each prompt is drawn with all its answers, which are not independent. With few prompts the interval is
    too narrow: of 95 % intervals of normal gains, 89 % held the truth at 10 prompts, 93 % at 20, 94 % at 100.

    Args:
        baseline: float (prompts,) or (prompts, answers): tensor, array or nested lists.
        treated: likewise, prompts in the same order; it may have another number of answers.
        resamples: draws of as many prompts as there are.
        seed: of the draws; the global generators are left alone.
        confidence: of the interval, between 0 and 1.
        in_baseline_sd: divide by the standard deviation (n − 1) of all baseline values. It is not resampled: a fixed
            unit, the same for all methods that are compared with one baseline.

    Raises:
        ValueError: shapes that do not pair, fewer than two prompts, values that are not finite, or an sd of 0.
    """
    base, new = (torch.as_tensor(values, dtype=torch.float64).cpu() for values in (baseline, treated))
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence is {confidence}, resamples {resamples}; pass 0 < confidence < 1, resamples ≥ 1.")
    shapes = f"baseline has shape {tuple(base.shape)}, treated {tuple(new.shape)}"
    if not {base.ndim, new.ndim} <= {1, 2} or len(base) != len(new) or len(base) < 2:
        raise ValueError(f"{shapes}; both must be (prompts,) or (prompts, answers), of the same two or more prompts.")
    gains = new.reshape(len(new), -1).mean(1) - base.reshape(len(base), -1).mean(1)
    if in_baseline_sd:
        gains = gains / base.std()
    if not gains.isfinite().all():
        raise ValueError("A gain is not finite: a value is NaN or infinite, or the baseline's sd is 0. Leave it out.")
    generator = torch.Generator().manual_seed(seed)
    at_once = max(2**22 // len(gains), 1)  # 32 MiB of indices
    counts = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    draws = (torch.randint(len(gains), (count, len(gains)), generator=generator) for count in counts)
    means = torch.cat([gains[draw].mean(1) for draw in draws])
    low, high = (float(means.quantile((1 + side * confidence) / 2)) for side in (-1, 1))
    return Gain(float(gains.mean()), low, high, n=len(gains))


def crossed_bootstrap(gains: Any, *, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95) -> Gain:
    """Mean gain over runs and prompts, with the percentile interval of a bootstrap over both.

    Runs (of training, with their seeds) are drawn, and prompts, the same ones for every run that was drawn; as both are
    samples. With three runs the interval knows little of the spread between runs: a fourth may well lie outside.

    Args:
        gains: float (runs, prompts): treated − baseline, in the unit that is to be reported.
        resamples, seed, confidence: as for paired_bootstrap.

    Raises:
        ValueError: not of that shape, fewer than two prompts, or values that are not finite.
    """
    gains = torch.as_tensor(gains, dtype=torch.float64).cpu()
    if gains.ndim != 2 or not len(gains) or gains.shape[1] < 2 or not gains.isfinite().all():
        raise ValueError(
            f"gains has shape {tuple(gains.shape)}; it must be (runs, prompts) with finite values for one or more runs "
            "on the same two or more prompts."
        )
    generator = torch.Generator().manual_seed(seed)
    runs, prompts = gains.shape
    means = []
    for _ in range(resamples):
        drawn = gains[torch.randint(runs, (runs,), generator=generator)].mean(0)
        means.append(drawn[torch.randint(prompts, (prompts,), generator=generator)].mean())
    low, high = (float(torch.stack(means).quantile((1 + side * confidence) / 2)) for side in (-1, 1))
    return Gain(float(gains.mean()), low, high, n=prompts)


def evaluate_answers(
    rows: Sequence[Mapping[str, Any]],
    reward_funcs: Rewards | RewardFunc | list[RewardFunc] | None = None,
    *,
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
        reward_funcs: in TRL's convention, or a Rewards made once for all methods; None for no rewards.
        model: the model without control, for perplexity and KL; None for neither.
        tokenizer: the model's, for the prompts' ids; needed with `model`.
        controller: what the answers were steered by; without one the KL is 0.
        batch_size: answers per forward.
        tokenize: text → words, for diversity and distinct-n.
        seconds, forwards_per_token: what generating cost, as the caller measured it; not in the row where None.

    Returns:
        {"n", "reward/<name>" of each function (without the answers it returned None for), "perplexity",
        "kl_per_answer", "kl_per_token", "diversity", "diversity_20" (of the first 20 words, so that length does not
        show), "distinct_3", "length" (tokens), "seconds", "forwards_per_token"}.

    Raises:
        ValueError: no rows, a row without a column, or `model` without `tokenizer`.
    """
    if not rows or (model is not None and tokenizer is None):
        raise ValueError(f"Got {len(rows)} rows and tokenizer={tokenizer!r}; pass rows, and with model its tokenizer.")
    needed = {"prompt", "completion", "token_ids", *rows[0]}
    for i, row in enumerate(rows):
        if lacking := sorted(needed - row.keys()):
            raise ValueError(f"Row {i} lacks {lacking}, but every row needs {sorted(needed)}. Add what it lacks.")
    columns = {name: [row[name] for row in rows] for name in needed}
    prompts, completions, ids = (columns.pop(name) for name in ("prompt", "completion", "token_ids"))
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    figures: dict[str, float] = {"n": len(rows)}
    if reward_funcs is not None:
        rewards = reward_funcs if isinstance(reward_funcs, Rewards) else Rewards(reward_funcs)
        for name, values in rewards(prompts, completions, ids, columns).per_function.items():
            figures[f"reward/{name}"] = _mean([value for value in values if value is not None])
    if model is not None:
        prompt_ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
        statistics = token_statistics(model, prompt_ids, ids, controller, batch_size=batch_size)
        figures |= {name: getattr(statistics, name) for name in ("perplexity", "kl_per_answer", "kl_per_token")}
    figures["diversity"] = _mean([diversity(text, tokenize=tokenize) for text in texts])
    figures["diversity_20"] = _mean([diversity(text, max_words=20, tokenize=tokenize) for text in texts])
    figures["distinct_3"] = distinct_n(texts, 3, tokenize=tokenize)
    figures["length"] = _mean([len(answer) for answer in ids])
    cost = {"seconds": seconds, "forwards_per_token": forwards_per_token}
    return figures | {name: value for name, value in cost.items() if value is not None}


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
