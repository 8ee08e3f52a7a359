"""What the page answers: a prompt answered without and with control from one seed, token by token. Knows no gradio."""

import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .answers import eos_token_ids, padding_token_id, prompt_token_ids, seeded
from .config_checks import shown
from .control import Controller
from .control_config import ControlConfig
from .control_head import ControlHead
from .figure_style import LINES
from .forwards import generate_recorded
from .generation import enable_recontrol
from .head import Head
from .keywords import check_base_model
from .trace import Trace, TraceRecorder
from .value_head import ValueHead

LONGEST = 4096  # tokens of an answer
COLOURS = dict(
    zip(("base", "steered, before u", "steered, after u", "steered"), (*LINES[:2], LINES[4], LINES[1]), strict=True)
)


@dataclass(frozen=True)
class Asked:
    """What a person asks the page for, as it was typed: it is checked before anything runs."""

    prompt: str
    head: str
    """A head's name."""
    strength: float | None = 0.1
    """Mean KL per token to spend, nats; 0 is no control."""
    multiplier: str = ""
    """α of a value head, the scale of a control head; where there is one, the strength is left out."""
    num_steps: str = ""
    """n of a value head; its own where empty."""
    max_kl: str = ""
    """nats; 4 × the strength where empty."""
    seed: float | None = 0
    max_new_tokens: float | None = 40
    temperature: float | None = 1.0
    """0 is greedy decoding."""
    chat: bool = False
    """Whether the prompt is a user's message, to be put into the tokenizer's chat template."""

    def check_sampling(self) -> None:
        """Raise a ValueError where the prompt is empty or a number of the sampling is none that can be used."""
        if not self.prompt.strip():
            raise ValueError("The prompt is empty; an answer needs words to go on from. Type the beginning of a text.")
        for name, wanted, holds in (
            ("seed", "an integer from 0 to 2⁶³ − 1", lambda x: _is_whole(x) and 0 <= x < 2**63),
            ("max_new_tokens", f"an integer from 1 to {LONGEST}", lambda x: _is_whole(x) and 1 <= x <= LONGEST),
            ("temperature", "a number from 0 (greedy) to 100", lambda x: 0 <= x <= 100),
        ):
            value = getattr(self, name)
            if value is None or not holds(value):
                said = "empty" if value is None else shown(value)
                raise ValueError(f"{name} is {said}; it must be {wanted}.")

    def control(self, own: str) -> ControlConfig:
        """How hard to steer; `own` is what the head's kind calls its multiplier.

        Raises:
            ValueError: a number is none, or none that can be used.
        """
        typed = {own: self.multiplier, "num_steps": self.num_steps, "max_kl": self.max_kl}
        said: dict[str, Any] = {name: _number(name, text) for name, text in typed.items() if text.strip()}
        if own not in said:
            said |= {own: 0.0} if self.strength == 0 else {"strength": self.strength}
        return ControlConfig(**said)


def _is_whole(number: float) -> bool:
    return float(number).is_integer()


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{name} is {shown(text)}; it must be a number, or empty.") from None
    return int(number) if _is_whole(number) else number


class Answerer:
    """Answers prompts, one at a time whoever asks.

    Args:
        model: a language model; it is enabled, see `enable_recontrol`.
        tokenizer: the model's.
        heads: name → head. One trained on another base model is warned of.

    Raises:
        ValueError: there is no head, or the model has no usable LM head.
        HeadMismatch: a head is of another width than the model.
    """

    def __init__(self, model: Any, tokenizer: Any, heads: Mapping[str, Head]):
        if not heads:
            raise ValueError("Got no heads, but the page steers by one. Name one or more: --head NAME=HEAD.")
        self.model = enable_recontrol(model)
        self.tokenizer = tokenizer
        self.heads = dict(heads)
        for head in heads.values():
            check_base_model(head, model)
        self._worker = ThreadPoolExecutor(1, "hf-recontrol-page")  # one: answers draw on torch's one random state

    def watching(self, head: str) -> Head:
        """The head whose values colour the tokens: a value head itself, of a control head a value head beside it.

        It is the deepest of the same reward; where there is none, the control head, which knows no values.
        """
        steering = self.heads[head]
        if isinstance(steering, ValueHead):
            return steering
        reward = steering.config.reward.name
        beside = (one for one in self.heads.values() if isinstance(one, ValueHead) and one.config.reward.name == reward)
        return max(beside, key=lambda one: one.config.num_hidden_layers, default=steering)

    def plain(self, asked: Asked) -> Asked:
        """The same without control: equal for all that differ in the control alone, and are watched by one head."""
        watching = next(name for name, head in self.heads.items() if head is self.watching(asked.head))
        return replace(asked, head=watching, strength=0.0, multiplier="", num_steps="", max_kl="")

    def checked(self, asked: Asked) -> tuple[Controller, list[int]]:
        """The control that is asked for and the prompt's tokens.

        Raises:
            ValueError: what is asked for cannot be had.
        """
        asked.check_sampling()
        return self._controller(asked), self._prompt(asked)

    def answer(self, asked: Asked, stop: threading.Event | None = None) -> Generator[Trace, None, None]:
        """One answer, as a trace of the tokens that there are so far, again and again until it is whole.

        Closing the generator ends the generation within one token, and so does `stop`, from another thread.

        Raises:
            ValueError: what was asked for cannot be had; before anything is generated.
            SteeringNotApplied: the model passed the hooks by.
        """
        controller, prompt = self.checked(asked)
        recorder, tokens, closed = TraceRecorder(_still(self.watching(asked.head))), _Tokens(), threading.Event()
        ends = [closed] if stop is None else [closed, stop]
        work = self._worker.submit(self._generate, asked, prompt, controller, recorder, tokens, ends)
        work.add_done_callback(lambda _: tokens.put_end())
        try:
            for ids in tokens.so_far():
                yield recorder.trace(torch.tensor([ids]), torch.tensor([len(ids)]))
            work.result()
        finally:
            closed.set()
            work.cancel()

    def _controller(self, asked: Asked) -> Controller:
        if asked.head not in self.heads:
            raise ValueError(f"The head is {shown(asked.head)}, but the heads are {', '.join(map(shown, self.heads))}.")
        head = self.heads[asked.head]
        return Controller(head, asked.control("scale" if isinstance(head, ControlHead) else "step_size"))

    def _prompt(self, asked: Asked) -> list[int]:
        message = [{"role": "user", "content": asked.prompt}] if asked.chat else asked.prompt
        ids = prompt_token_ids(self.tokenizer, message)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(ids) + int(asked.max_new_tokens or 0) > longest:
            raise ValueError(
                f"The prompt has {len(ids)} tokens and the answer may have {asked.max_new_tokens:g}, but the model "
                f"reads {longest} in all. Shorten the prompt or the answer."
            )
        return ids

    def _generate(
        self,
        asked: Asked,
        prompt: list[int],
        controller: Controller,
        recorder: TraceRecorder,
        streamer: "_Tokens",
        ends: list[threading.Event],
    ) -> None:
        ids = torch.tensor([prompt], device=self.model.device)
        temperature = float(asked.temperature or 0)  # a whole one is refused by transformers
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        eos = eos_token_ids(self.model, self.tokenizer, {})

        def stopped(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), any(end.is_set() for end in ends), device=input_ids.device)

        with seeded(self.model.device.type, int(asked.seed or 0)):
            generate_recorded(
                self.model,
                recorder,
                controller,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(asked.max_new_tokens or 0),
                eos_token_id=eos or None,
                pad_token_id=padding_token_id(self.tokenizer, eos),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stopped]),
                **sampling,
            )


class _Tokens(BaseStreamer):
    """Hands the new tokens from the thread that generates to the one that reads."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._prompt_is_next = True

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
        else:
            self._queue.put(int(value))

    def end(self) -> None:
        pass  # put_end() says it, also after an error

    def put_end(self) -> None:
        self._queue.put(None)

    def so_far(self) -> Iterator[list[int]]:
        """All tokens so far, again whenever there are more; a reader who is slow misses steps, not tokens."""
        ids: list[int] = []
        while (token := self._queue.get()) is not None:
            ids.append(token)
            if self._queue.empty():
                yield list(ids)
        if ids:
            yield ids


def _still(head: Head) -> Controller:
    """The head as a controller that moves nothing."""
    return Controller(head, ControlConfig(scale=0.0) if isinstance(head, ControlHead) else ControlConfig(step_size=0.0))


def side_by_side(traces: Sequence[Trace]) -> Trace:
    """Traces of one row each as the rows of one: so they are shown on one scale."""
    width = max(trace.token_ids.shape[1] for trace in traces)
    ends: dict[str, Any] = {"token_ids": 0, "base_token_ids": -1, "sound": True}

    def rows(name: str) -> Tensor:
        parts = [getattr(trace, name) for trace in traces]
        return torch.cat([pad(part, (0, width - part.shape[1]), value=ends.get(name, torch.nan)) for part in parts])

    return Trace(**{field.name: rows(field.name) for field in fields(Trace)})


def curves(plain: Trace, steered: Trace) -> tuple[str, list[dict[str, Any]]]:
    """What is drawn along the answers: values; KL where none are known.

    Returns:
        Its name, and for each point {"token": from 1, "value", "answer": one of COLOURS}.
    """
    drawn = [plain.values, steered.values, steered.steered_values]
    name = "value (units of the reward)"
    if bool(plain.values.isnan().all()):
        name, drawn = "KL (nats)", [plain.kl, steered.kl]
    names = ["base", "steered"] if len(drawn) == 2 else ["base", "steered, before u", "steered, after u"]
    return name, [
        {"token": place, "value": number, "answer": answer}
        for answer, row in zip(names, drawn, strict=True)
        for place, number in enumerate(row[0].tolist(), 1)
    ]
