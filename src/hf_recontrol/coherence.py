"""Coherence of prompt and answer: the cosine of their sentence embeddings."""

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from .reward_models import Text, answer_text

Encoder = Callable[[list[str]], Tensor]
SIMCSE = "princeton-nlp/sup-simcse-bert-base-uncased"
SIMCSE_MAX_TOKENS = 128  # what the simcse package cuts texts at


class Coherence:
    """cos(e(prompt), e(answer)) of each answer, with sentence embeddings e; 0 for an answer without text.

    The metric of Kong et al. 2024 (arXiv:2406.05954): the mean over answers, with supervised SimCSE (Gao et al. 2021,
    arXiv:2104.08821). SimCSE's embedding is the [CLS] state after BERT's pooler (dense and tanh), of the first 128
    tokens. sentence-transformers makes, by itself, a mean of all tokens' states of such a model, and its Pooling has no
    mode for the pooler. So a name whose repository is no sentence-transformers model (it has no modules.json) is read
    by transformers, as `pooler_output`, cut at 128 tokens; the others, by sentence-transformers, as they say
    themselves. Departure: the authors embed a space where an answer is empty.

    An embedding sees the topic of a text: an answer that repeats its prompt has coherence 1.

    Args:
        encoder: a Hub id, downloaded here, or a folder; a SentenceTransformer; or a callable, texts → float (texts, d).
        device: where a model that is given by name computes; None is the CPU. A model object stays where it is.
        batch_size: texts per forward of a model.

    Raises:
        ImportError: a sentence-transformers model, without that package.
        ValueError: a model without a trained pooler.
        TypeError: something else than the above.
    """

    def __init__(
        self, encoder: Any = SIMCSE, *, device: torch.device | str | None = None, batch_size: int = 64
    ) -> None:
        if isinstance(encoder, (str, os.PathLike)):
            encoder = _load(os.fspath(encoder), device, batch_size)
        self._encode = _as_encoder(encoder, batch_size)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """Score answers.

        Args:
            prompts: texts, or message lists, whose contents are joined by line breaks.
            completions: texts, or message lists, of which the last one counts; one for each prompt.

        Returns:
            −1 to 1 for each answer.

        Raises:
            ValueError: unequal lengths, or an encoder that returns no row for each text.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"Got {len(prompts)} prompts and {len(completions)} completions; pass one for each.")
        asked = [
            text if isinstance(text, str) else "\n".join(str(message["content"]) for message in text)
            for text in prompts
        ]
        answers = [answer_text(completion) for completion in completions]
        scored = [i for i, answer in enumerate(answers) if answer.strip()]
        scores = [0.0] * len(answers)
        if scored:
            of_prompts, of_answers = (self._embeddings([texts[i] for i in scored]) for texts in (asked, answers))
            cosines = torch.nn.functional.cosine_similarity(of_prompts, of_answers)
            for i, cosine in zip(scored, cosines.tolist(), strict=True):
                scores[i] = cosine
        return scores

    def _embeddings(self, texts: list[str]) -> Tensor:
        embeddings = torch.as_tensor(self._encode(texts)).detach().double().cpu()
        if embeddings.ndim != 2 or len(embeddings) != len(texts):
            raise ValueError(
                f"The encoder returned shape {tuple(embeddings.shape)} for {len(texts)} texts; expected is "
                f"({len(texts)}, d). Return one row for each text."
            )
        return embeddings


class _Pooler:
    """texts → pooler_output, float (texts, hidden_size), of an encoder such as BERT."""

    def __init__(self, name: str, device: torch.device | str | None, batch_size: int):
        model, loading = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        lacking = sorted(key for key in loading["missing_keys"] if "pooler" in key)
        if lacking or getattr(model, "pooler", None) is None:
            raise ValueError(
                f"{name!r} is neither a sentence-transformers model (it has no modules.json) nor has it a trained "
                f"pooler{f' (it lacks {lacking})' if lacking else ''}, and random weights would embed at random. Give "
                f"{SIMCSE!r}, a sentence-transformers model, or a callable, texts → embeddings."
            )
        self.model = model.to(device or "cpu").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        embeddings = []
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                padding=True,
                truncation=True,
                max_length=SIMCSE_MAX_TOKENS,
                return_tensors="pt",
            )
            embeddings.append(self.model(**inputs.to(self.model.device)).pooler_output.cpu())
        return torch.cat(embeddings)


def _load(name: str, device: torch.device | str | None, batch_size: int) -> Any:
    if not _is_sentence_transformer(name):
        return _Pooler(name, device, batch_size)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"{name!r} needs sentence-transformers. Install the extra: pip install 'hf-recontrol[eval]'"
        ) from error
    return SentenceTransformer(name, device=str(device or "cpu"))


def _is_sentence_transformer(name: str) -> bool:
    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, "modules.json"))
    try:
        hf_hub_download(name, "modules.json")
    except LocalEntryNotFoundError:  # no network: it may be there all the same, unless the Hub once said otherwise
        if try_to_load_from_cache(name, "modules.json") is None:
            raise
        return False
    except EntryNotFoundError:
        return False
    return True


def _as_encoder(encoder: Any, batch_size: int) -> Encoder:
    if hasattr(encoder, "encode"):  # a SentenceTransformer; its own call takes features
        return lambda texts: cast(
            Tensor,
            encoder.encode(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False),
        )
    if not callable(encoder):
        raise TypeError(
            f"The encoder is a {type(encoder).__name__}; expected is a Hub id, a folder, a SentenceTransformer, or a "
            "callable, texts → float (texts, d)."
        )
    return cast(Encoder, encoder)
