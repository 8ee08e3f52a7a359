"""Reward models: sequence classifiers with one label, as callables in TRL's convention."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config_checks import shown
from .errors import CollectError
from .fingerprints import sha256_of, weight_samples
from .hooks import model_name

Text = str | list[dict[str, Any]]


def answer_text(completion: Text) -> str:
    """The text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


class RewardModel:
    """A sequence classifier as a callable: one score for each prompt + completion."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        if getattr(model.config, "num_labels", None) != 1:
            raise ValueError(
                f"The reward model {short_name(model)!r} has {getattr(model.config, 'num_labels', 'no')} labels; a "
                "reward is one score. Load it with AutoModelForSequenceClassification.from_pretrained(…, "
                "num_labels=1), or wrap it in a function that returns one float for each completion."
            )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.pad_token_id = 0 if pad is None else pad

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text], **unread: object) -> list[float]:
        rows = [self._token_ids(*pair) for pair in zip(prompts, completions, strict=True)]
        modes = [(module, module.training) for module in self.model.modules()]
        config_pad = self.model.config.pad_token_id
        try:
            self.model.train(False)
            self.model.config.pad_token_id = self.pad_token_id  # the model finds a row's last token by it
            scores = []
            for start in range(0, len(rows), self.batch_size):
                scores += self._scores(rows[start : start + self.batch_size])
            return scores
        finally:
            self.model.config.pad_token_id = config_pad
            for module, training in modes:
                module.training = training

    def facts(self) -> dict[str, Any]:
        """What it is, in plain JSON."""
        return {
            "model": model_name(self.model),
            "revision": getattr(self.model.config, "_commit_hash", None),
            "weights_sample_sha256": sha256_of(weight_samples(self.model)),
        }

    @torch.no_grad()
    def _scores(self, rows: list[list[int]]) -> list[float]:
        tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        input_ids = pad_sequence(tokens, batch_first=True, padding_value=self.pad_token_id)
        device = self.model.device
        logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores

    def _token_ids(self, prompt: Text, completion: Text) -> list[int]:
        if isinstance(prompt, str):
            token_ids: list[int] = self.tokenizer(prompt + str(completion))["input_ids"]
        else:
            text = self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(token_ids) > longest:
            raise CollectError(
                f"A prompt with its completion has {len(token_ids)} tokens, but the reward model "
                f"{short_name(self.model)!r} reads {longest}. Shorten the prompts or lower max_new_tokens."
            )
        return token_ids


def reward_model(function: object, device: torch.device | str | None, batch_size: int) -> RewardModel | None:
    """From a Hub id, a folder, a classifier or a pair (model, tokenizer); None where it is nothing of that kind."""
    if isinstance(function, (str, os.PathLike)):
        name = os.fspath(function)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, output_loading_info=True
        )
        if loading["missing_keys"]:
            raise ValueError(
                f"{name!r} is not a reward model: it has no weights for {shown(sorted(loading['missing_keys']))}, and "
                "random ones would give random rewards. Give a trained sequence classifier with one label."
            )
        return RewardModel(model.to(device or "cpu"), AutoTokenizer.from_pretrained(name), batch_size)
    if isinstance(function, tuple) and len(function) == 2 and isinstance(function[0], PreTrainedModel):
        return RewardModel(function[0], function[1], batch_size)
    if isinstance(function, PreTrainedModel):
        if not function.config._name_or_path:
            raise ValueError(
                "The reward model's config says not where it came from, so its tokenizer cannot be loaded. Give the "
                "pair (model, tokenizer)."
            )
        return RewardModel(function, AutoTokenizer.from_pretrained(function.config._name_or_path), batch_size)
    return None


def short_name(model: PreTrainedModel) -> str:
    return model.config._name_or_path.rstrip("/").split("/")[-1] or type(model).__name__
