"""What teacher forcing says of each token of given answers: log-probabilities with and without control, and KL."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .control import Controller
from .forwards import forward_steered
from .kl_bound import kl_divergence, log_softmax

TokenIds = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What teacher forcing says of each token of some answers, and the means of it that a table shows."""

    log_probs: list[Tensor]
    """Per answer, float (tokens,) on the CPU: log-probability under the unsteered model, nats."""
    steered_log_probs: list[Tensor]
    """Per answer, float (tokens,) on the CPU: log-probability under the steered model, nats; log_probs unsteered."""
    kl: list[Tensor]
    """Per answer, float (tokens,) on the CPU: KL(p_steered ‖ p_base) where the token was chosen, nats; 0 unsteered."""

    @property
    def perplexity(self) -> float:
        """exp of the mean of −log p_base over all tokens of all answers; long ones weigh more. NaN without tokens."""
        return _perplexity(self.log_probs)

    @property
    def steered_perplexity(self) -> float:
        """exp of the mean of −log p_steered, likewise: what control costs on texts that it did not write."""
        return _perplexity(self.steered_log_probs)

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
    steered_prompt_ids: TokenIds | None = None,
    steered_model: PreTrainedModel | None = None,
    batch_size: int = 64,
) -> TokenStatistics:
    """log p_base(y_t), log p_steered(y_t) and KL(p_steered ‖ p_base) at each token of each answer, by teacher forcing.

    Costs one forward per batch, two where something is steered, and holds one batch's logits of each. The KL is exact
    over the vocabulary and compares two real forwards, so what the model does after its LM head (soft-cap, scale) is in
    it; temperature and other sampling options are not. Summed over an answer sampled from the steered model at
    temperature 1, it is an unbiased estimate of the KL between the two distributions of answers.

    Args:
        model: a decoder-only language model in eval mode.
        prompt_ids: token ids of each prompt, unpadded, at least one.
        completion_ids: token ids of each answer, unpadded, with its EOS if it generated one; may be empty.
        controller: whose effect is asked for; None for none.
        steered_prompt_ids: what the steered model reads for each prompt, such as an instruction and the prompt.
        steered_model: what stands in its place, such as a fine-tuned one with the same vocabulary.
        batch_size: answers per forward. An answer's numbers do not depend on its neighbours.

    Returns:
        TokenStatistics in the order of the answers, in float32 (float64 for a float64 model).

    Raises:
        ValueError: no answer, unequal lengths, an empty prompt, an encoder-decoder, or a model in training mode.
    """
    for one, prompts in ((model, prompt_ids), (steered_model or model, steered_prompt_ids or prompt_ids)):
        _check_teacher_forcing(one, prompts, completion_ids)
    steered = None
    if controller is not None or steered_model is not None or steered_prompt_ids is not None:
        steered = (steered_model or model, controller, steered_prompt_ids or prompt_ids)
    columns = [[torch.zeros(0) for _ in completion_ids] for _ in fields(TokenStatistics)]
    lengths = [(len(prompt), len(completion)) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    # answers of like length go together, empty ones nowhere
    answered = sorted((i for i, (_, new) in enumerate(lengths) if new), key=lengths.__getitem__)
    for start in range(0, len(answered), batch_size):
        chosen = answered[start : start + batch_size]
        completions = [completion_ids[i] for i in chosen]
        base = _logits(model, None, [prompt_ids[i] for i in chosen], completions)
        other = base if steered is None else _logits(*steered[:2], [steered[2][i] for i in chosen], completions)
        rows = [_of_answer(*part) for part in zip(base, other, completions, strict=True)]
        for i, row in zip(chosen, rows, strict=True):
            for column, numbers in zip(columns, row, strict=True):
                column[i] = numbers.cpu()
    return TokenStatistics(*columns)


def _logits(
    model: PreTrainedModel, controller: Controller | None, prompt_ids: TokenIds, completion_ids: TokenIds
) -> list[Tensor]:
    """Of each answer, where its tokens are chosen: views (tokens, vocabulary) in the model's dtype."""
    inputs = _forward_inputs(model, prompt_ids, completion_ids)
    logits = forward_steered(model, controller, **inputs).logits
    cut = inputs["input_ids"].shape[1] - logits.shape[1]  # positions without logits, by logits_to_keep
    starts = [len(prompt) - 1 - cut for prompt in prompt_ids]
    pairs = zip(starts, completion_ids, strict=True)
    return [logits[row, start : start + len(completion)] for row, (start, completion) in enumerate(pairs)]


def _of_answer(base: Tensor, steered: Tensor, completion: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 copies of no more than one answer's distributions."""
    ids = torch.as_tensor(completion, dtype=torch.long, device=base.device)[:, None]
    log_base = log_softmax(base).gather(-1, ids).squeeze(-1)
    log_steered = log_base if steered is base else log_softmax(steered).gather(-1, ids).squeeze(-1)
    return log_base, log_steered, kl_divergence(steered.to(base.device), base)


def _perplexity(log_probs: list[Tensor]) -> float:
    return float(torch.exp(-torch.cat(log_probs).double().mean()))


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
