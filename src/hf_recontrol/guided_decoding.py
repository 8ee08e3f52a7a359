"""What the paper compares with at the logits, as LogitsProcessors for any generate(): ARGS, and a prefix scorer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from .forwards import last_hidden_states
from .keywords import check_base_model
from .rewards import RewardFunc, Rewards, Text
from .value_head import ValueHead


class _CandidatesLogitsProcessor(LogitsProcessor):
    """scores_v + weight · bonus_v for the top_k likeliest tokens v; −∞ for the others.

    Or, where these are kept, their own scores, and for the candidates scores_v + weight · (bonus_v − mean bonus).
    """

    def __init__(self, top_k: int, weight: float, keep_others: bool):
        if type(top_k) is not int or top_k < 1 or not abs(weight) < float("inf"):
            raise ValueError(f"top_k is {top_k!r} and weight {weight!r}; expected are an int ≥ 1 and a finite number.")
        self.top_k, self.weight, self.keep_others = top_k, weight, keep_others

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        likeliest = scores.topk(min(self.top_k, scores.shape[-1]))
        bonus = self._bonus(input_ids, likeliest.indices).to(scores)
        if self.keep_others:  # in the mean they gain nothing, so that they are as likely as before
            mean = (likeliest.values.softmax(-1) * bonus).sum(-1, keepdim=True)
            return scores.scatter(-1, likeliest.indices, likeliest.values + self.weight * (bonus - mean))
        chosen = likeliest.values + self.weight * bonus
        return torch.full_like(scores, -torch.inf).scatter(-1, likeliest.indices, chosen)

    def _bonus(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        """Of each candidate, float (rows, candidates)."""
        raise NotImplementedError


class ARGSLogitsProcessor(_CandidatesLogitsProcessor):
    """logit_v + weight · r([x, y_<t, v]) for the top_k likeliest tokens v, −∞ for the others.

    ARGS (Khanov et al. 2024, arXiv:2402.01694), the baseline that Kong et al. 2024 (arXiv:2406.05954) call CD. Greedy
    decoding takes the best candidate, sampling draws by softmax, at the temperature that generate() is given.

    Costs top_k rewards of the whole text for each token. The candidates of all rows are scored together, as texts: the
    reward model's tokenizer need not be the language model's, as the original's must. A candidate that ends in the
    middle of a character is scored with the replacement sign that decode() puts there.

    Made for one generate(): a new batch of prompts needs a new one.

    Args:
        reward_funcs: one function, several, or a Rewards; in TRL's convention.
        tokenizer: the language model's.
        prompts: the texts or message lists of the batch, in order; one for each row of generate()'s input_ids.
        prompt_length: the columns of these input_ids.
        top_k: candidates, ≥ 1.
        weight: of the reward, in nats per unit of it; 0 is top-k decoding.
        keep_others: leave the other tokens possible, as likely as before, where the source rules them out. Then 0
            changes nothing, and any KL from the model can be had; top-k decoding alone may cost a nat a token.
        columns: further columns for the reward functions, one entry for each prompt.

    Raises:
        ValueError: top_k or weight out of bounds; in generate(), rows that are no multiple of the prompts, or a
            candidate without a reward.
    """

    def __init__(
        self,
        reward_funcs: Rewards | RewardFunc | list[RewardFunc],
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Text],
        prompt_length: int,
        *,
        top_k: int = 10,
        weight: float = 1.0,
        keep_others: bool = False,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ):
        super().__init__(top_k, weight, keep_others)
        self.rewards = reward_funcs if isinstance(reward_funcs, Rewards) else Rewards(reward_funcs)
        self.tokenizer, self.prompts, self.prompt_length = tokenizer, list(prompts), prompt_length
        self.columns = dict(columns or {})

    def _bonus(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        repeats = _rows_per_prompt(len(input_ids), len(self.prompts))
        new = input_ids[:, self.prompt_length :]
        ended = (new == self.tokenizer.eos_token_id).any(-1).tolist()  # of these generate() takes padding, whatever
        asked = [(row, token) for row, end in enumerate(ended) if not end for token in candidates[row].tolist()]
        bonus = torch.zeros_like(candidates, dtype=torch.float32)
        if asked:
            answers = new.tolist()
            ids = [[*answers[row], token] for row, token in asked]
            rewards = self._rewards([row // repeats for row, _ in asked], ids)
            live = torch.tensor([not end for end in ended], device=bonus.device)
            bonus[live] = rewards.to(bonus).view(-1, candidates.shape[1])
        return bonus

    def _rewards(self, prompt_of: list[int], completion_ids: list[list[int]]) -> Tensor:
        prompts = [self.prompts[i] for i in prompt_of]
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        completions: list[Text] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {name: [column[i] for i in prompt_of] for name, column in self.columns.items()}
        total = self.rewards(prompts, completions, completion_ids, columns).total
        if None in total:
            raise ValueError(
                f"{self.rewards.names} gave no reward for the candidate {texts[total.index(None)]!r}; ARGS needs a "
                "number for each. Return one for unfinished answers too, or use best-of-n."
            )
        return torch.tensor(total, dtype=torch.float32)


class PrefixScorerLogitsProcessor(_CandidatesLogitsProcessor):
    """logit_v + weight · V([x, y_<t, v]) for the top_k likeliest tokens v, −∞ for the others.

    Token-wise controlled decoding with a prefix scorer, π(v) ∝ π_base(v) · exp(weight · V) (Mudgal et al. 2024,
    arXiv:2310.17022), which Kong et al. 2024 (arXiv:2406.05954) call CD prefix. The scorer is a value head, read one
    token later than the control reads it: V of the state after v. Trained with td_lambda = 1 it is CD-FUDGE (every
    prefix regressed on the answer's reward); with td_lambda = 0 it is CD-Q by samples: the sampled next token stands
    for the expectation over all of them, as their squared error has the same gradient on average.

    Costs two forwards of `model` for each token, of one row and of top_k rows for each row of the batch, over a cache
    of its own. Departs from the source at EOS: rollouts hold no state after it, so V of the prefix stands in.

    Made for one generate(): a new batch of prompts needs a new one.

    Args:
        model: the head's base model, without control; most often the one that generates.
        head: V, in standard deviations of the reward.
        attention_mask: of generate()'s input_ids, int (batch, prompt tokens).
        top_k: candidates, ≥ 1.
        weight: λ of the source, in nats per standard deviation of the reward; 0 is top-k decoding.
        keep_others: see ARGSLogitsProcessor.
        eos_token_id: what ends an answer; the model's generation config's where None.
        use_cache: False reads every candidate's whole text: for models whose cache cannot be copied for several rows.

    Raises:
        HeadMismatch: a head of another width. One of another base model is warned of.
        ValueError: top_k or weight out of bounds; in generate(), a cache that cannot be copied.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: ValueHead,
        attention_mask: Tensor,
        *,
        top_k: int = 10,
        weight: float = 1.0,
        keep_others: bool = False,
        eos_token_id: int | list[int] | None = None,
        use_cache: bool = True,
    ):
        super().__init__(top_k, weight, keep_others)
        check_base_model(head, model, stacklevel=3)
        eos = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        self.eos = torch.as_tensor([] if eos is None else eos, dtype=torch.long).flatten()
        self.model, self.head, self.attention_mask, self.use_cache = model, head, attention_mask, use_cache
        self._read = attention_mask.new_zeros(len(attention_mask), 0, dtype=torch.long)  # the ids that the cache holds
        self._cache: Any = None

    def _bonus(self, input_ids: Tensor, candidates: Tensor) -> Tensor:
        repeats = _rows_per_prompt(len(input_ids), len(self.attention_mask))
        mask = self.attention_mask.to(input_ids.device).repeat_interleave(repeats, 0)
        mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1] + 1)], 1)
        prefix = self._prefix_states(input_ids, mask[:, :-1])
        rows, tokens = mask.repeat_interleave(candidates.shape[1], 0), candidates.reshape(-1, 1)
        if self.use_cache:
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(candidates.shape[1])
            states, _ = last_hidden_states(self.model, tokens, rows, cache=cache, use_cache=True)
        else:
            texts = input_ids.repeat_interleave(candidates.shape[1], 0)
            states, _ = last_hidden_states(self.model, torch.cat([texts, tokens], 1), rows)
        values = self._values(states).view_as(candidates)
        at_eos = torch.isin(candidates, self.eos.to(candidates.device))
        return torch.where(at_eos, self._values(prefix)[:, None], values)

    def _prefix_states(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """h after the last token of each row; the cache then holds all of them."""
        if not self.use_cache:
            return last_hidden_states(self.model, input_ids, mask)[0]
        read = self._read.shape[1]
        # Beams change places; then all is read again.
        if self._cache is None or not torch.equal(input_ids[:, :read], self._read):
            self._cache, read = None, 0
        new = input_ids[:, read:]
        states, self._cache = last_hidden_states(self.model, new, mask, cache=self._cache, use_cache=True)
        self._read = input_ids
        if not isinstance(self._cache, Cache) or not hasattr(self._cache, "batch_repeat_interleave"):
            raise ValueError(
                f"{type(self.model).__name__} has a {type(self._cache).__name__} for a cache, which cannot be copied "
                "for several candidates. Pass use_cache=False."
            )
        return states

    def _values(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            values: Tensor = self.head(states.to(self.head.input_mean.device))
        return values.to(states.device)


def _rows_per_prompt(rows: int, prompts: int) -> int:
    if not prompts or rows % prompts:
        raise ValueError(
            f"generate() has {rows} rows, but the processor was made for {prompts} prompts; expected is a multiple "
            "(num_beams, num_return_sequences). Make one for each batch."
        )
    return rows // prompts
