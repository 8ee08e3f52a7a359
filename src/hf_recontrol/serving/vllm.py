"""vLLM, steered: its layer in front of the logits edits each request's row by the head that the request names.

Its two parts meet in each worker. `RequestRouter`, which vLLM takes for a logits processor, is told of every request
that enters, moves or leaves the batch, and before each forward arms the batch's control. `SteeredLogitsProcessor`
stands in for the *layer* whose input is the LM head's input; its first call in a forward uses that control up, so
prompt logprobs, which come later, are the plain model's. The edit never enters the KV cache, so steered and plain
requests may share it.

Written for vLLM's V1 model runner. What cannot be steered is refused when the engine starts, and what cannot be asked
for when a request comes in; a worker raises only rather than return text that was meant to be steered and was not.
"""

import functools
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.logits_processor import LogitsProcessor as LogitsLayer
from vllm.triton_utils import HAS_TRITON
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from ..config_checks import shown
from ..control import Controller
from ..errors import SteeringNotApplied
from .vllm_batch import BatchControl
from .vllm_requests import ServedHeads, check_request, serve_heads
from .vllm_settings import KEY, ROUTER, V2, VARIABLE, settings_from

logger = init_logger("vllm.hf_recontrol")  # a logger below vllm's is shown as its own are
SUPPORTED = "0.32."
LAYER = "LogitsProcessor"
SECONDS_BETWEEN_WARNINGS = 10.0


def register() -> None:
    """The entry point in vllm.general_plugins, called in every process of every engine on the machine.

    Puts the layer in place; without heads it is vLLM's own. Where it cannot, it leaves all as it is, and an engine that
    is to be steered is refused when it starts.

    Raises:
        ValueError, HeadError, HeadUnavailable: heads are in the environment, and cannot be read, or vLLM would run its
            V2 model runner.
    """
    if (text := os.environ.get(VARIABLE)) is not None:
        # Else vLLM would say that the router is no subclass of a class of V2, and not what to do.
        _check_runner(HAS_TRITON if envs.VLLM_USE_V2_MODEL_RUNNER is None else envs.VLLM_USE_V2_MODEL_RUNNER)
        serve_heads(text)  # when workers read theirs: the first request may come after the files have changed
    if vllm.__version__.startswith(SUPPORTED) and LAYER not in op_registry_oot:
        LogitsLayer.register_oot(SteeredLogitsProcessor, name=LAYER)


@dataclass
class _Routing:
    """What the router and the layer of one worker share."""

    heads: ServedHeads
    armed: BatchControl | None = None
    """For the next call of the layer, once."""
    layer: LogitsLayer | None = None
    unsound: int = 0
    """Rows that were left plain and not warned of."""
    counts: deque[tuple[Tensor, torch.Event | None]] = field(default_factory=deque)
    """Of them in one forward each, int64 () in the host's memory, and when it has arrived there."""
    silent_until: float = 0.0

    def note(self, unsound: Tensor) -> None:
        """Have a forward's count of rows that were left plain sent to the host; nothing waits for it."""
        arrived = None
        if unsound.device.type != "cpu":
            arrived, unsound = torch.Event(unsound.device), unsound.to("cpu", non_blocking=True)
            arrived.record()
        self.counts.append((unsound, arrived))
        self.warn()

    def warn(self) -> None:
        """Warn of the rows whose counts have arrived: on a CPU at once, else one forward later."""
        while self.counts and ((arrived := self.counts[0][1]) is None or arrived.query()):
            self.unsound += int(self.counts.popleft()[0])
        if self.unsound and time.monotonic() >= self.silent_until:
            logger.warning(
                "%d hidden states were not finite, or they or their logits would not have been after the edit, and "
                "were left unedited; those tokens are unguided. Give requests a smaller step size, scale or strength.",
                self.unsound,
            )
            self.unsound, self.silent_until = 0, time.monotonic() + SECONDS_BETWEEN_WARNINGS


_made: list[_Routing] = []
"""Of the engine that starts: a worker makes its router, and then its model, in one thread."""


class SteeredLogitsProcessor(LogitsLayer):  # type: ignore[misc]
    """vLLM's layer from hidden states to logits, which edits the hidden states first."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.routing = _routing_of(get_current_vllm_config(), self)

    def forward(
        self, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None = None, skip_gather: bool = False
    ) -> Tensor | None:
        """As LogitsProcessor.forward. `self` may be a LoRA layer around this one, which calls it so."""
        own: Any = getattr(self, "base_layer", self)
        routing: _Routing | None = own.routing
        stock = functools.partial(
            LogitsLayer.forward, self, lm_head, embedding_bias=embedding_bias, skip_gather=skip_gather
        )
        if routing is None or routing.armed is None:
            return stock(hidden_states)  # type: ignore[no-any-return]
        control, routing.armed = routing.armed, None
        logits, unsound = control.logits(hidden_states, stock, whole_batches=own is not self)
        routing.note(unsound)
        return logits


class RequestRouter(LogitsProcessor):  # type: ignore[misc]
    """Knows which row of the batch is whose: `--logits-processors hf_recontrol.serving.vllm:RequestRouter`.

    Leaves the logits alone; the layer edits in front of them.

    Raises:
        ValueError, HeadError, HeadUnavailable: no heads, or the engine cannot be steered.
    """

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """In the process that takes requests, which answers a ValueError with status 400."""
        check_request(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        settings = _settings(vllm_config)
        if settings is None:
            raise ValueError(
                f"{ROUTER} is among the logits processors, but there are no heads. Start with `hf-recontrol serve "
                f"--engine vllm`, or set {VARIABLE}, or leave the router out."
            )
        _check_engine(vllm_config)
        self.device = device
        self.routing = _Routing(ServedHeads(settings))
        _made[:] = [self.routing]
        self.of_row: dict[int, Controller] = {}
        self.control: BatchControl | None = None

    def is_argmax_invariant(self) -> bool:
        """False, so that apply() is called under greedy decoding too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Before each forward."""
        if batch_update is not None:
            process_dict_updates(self.of_row, batch_update, self._controller)
            rows = [self.of_row.get(row) for row in range(batch_update.batch_size)]
            self.control = BatchControl(rows) if any(one is not None for one in rows) else None
        self.routing.armed = self.control
        self.routing.warn()

    def _controller(self, params: Any, prompt: Any, output: Any) -> Controller | None:
        controller = self.routing.heads.controller(params.extra_args)
        if controller is None or controller.is_identity:
            return None
        controller.prepare(self.device)
        return controller

    def apply(self, logits: Tensor) -> Tensor:
        """After each forward: the logits as they are.

        Raises:
            SteeringNotApplied: they were made without the layer. The engine ends; no unguided text is returned.
        """
        if self.routing.armed is not None:
            raise SteeringNotApplied(
                "vLLM made logits without its layer LogitsProcessor, so nothing was steered, and no text is returned. "
                "This model cannot be steered in vLLM; use hf-recontrol serve with transformers."
            )
        return logits


def _settings(vllm_config: Any) -> Any:
    """The heads of additional_config, which goes to every worker; else those of the environment; else None."""
    found = vllm_config.additional_config
    given = found.get(KEY) if isinstance(found, dict) else None
    variable = settings_from(os.environ.get(VARIABLE))
    if given is not None and variable is not None and given != variable:
        raise ValueError(
            f"additional_config has the heads {shown(given)}, but {VARIABLE} has {shown(variable)}. Requests are "
            "checked by the one and steered by the other: give the same, or use steering_arguments()."
        )
    return variable if given is None else given


def _routing_of(vllm_config: Any, layer: LogitsLayer) -> _Routing | None:
    """That of the worker's router; None where nothing is steered, or raises where it cannot be."""
    if _settings(vllm_config) is None or vllm_config.model_config.runner_type != "generate":
        return None
    _check_runner(vllm_config.use_v2_model_runner)  # which makes no router of ours, and its models before any
    given = vllm_config.model_config.logits_processors or []
    if ROUTER not in given and RequestRouter not in given:
        raise ValueError(
            "There are heads for vLLM, but no router, so no request would be steered. Start with --logits-processors "
            f"{ROUTER}, as hf-recontrol serve --engine vllm does; to serve without heads, unset {VARIABLE}."
        )
    (routing,) = _made
    if routing.layer is not None or layer.logits_as_input:
        raise ValueError(
            f"{vllm_config.model_config.architectures} has several layers LogitsProcessor, or one whose input is "
            "logits, so where its LM head's input is is not known. It cannot be steered in vLLM."
        )
    routing.layer = layer
    _check_heads(routing.heads, vllm_config.model_config)
    return routing


def _check_engine(vllm_config: Any) -> None:
    """Raise ValueError where this engine cannot be steered."""
    if not vllm.__version__.startswith(SUPPORTED):
        raise ValueError(
            f"vLLM is {vllm.__version__}; steering uses parts of it that change, and was tested with {SUPPORTED}*. "
            f"Install that: pip install 'vllm=={SUPPORTED}*'"
        )
    _check_runner(vllm_config.use_v2_model_runner)
    if vllm_config.speculative_config is not None:
        raise ValueError("Speculative decoding is configured, with which vLLM takes no router. Leave it out.")
    # That and V2 are also where a rank keeps logits of its shard of the vocabulary, on which no max_kl can be measured.
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise ValueError("enable_batch_sharded_sampling splits logits by ranks, which is not supported. Leave it out.")
    if op_registry_oot.get(LAYER) is not SteeredLogitsProcessor:
        found = getattr(op_registry_oot.get(LAYER), "__module__", "vllm itself")
        raise ValueError(
            f"vLLM's layer {LAYER} is that of {found}, not ours. VLLM_PLUGINS is {envs.VLLM_PLUGINS}: it must name "
            "hf_recontrol or be unset, and no other plugin may take the layer."
        )


def _check_runner(is_v2: bool) -> None:
    if is_v2:
        raise ValueError(
            f"vLLM's Model Runner V2 cannot be steered. Set {V2}=0, which chooses V1, and leave out what vLLM runs "
            "with V2 alone: --watermark-config, HiSparse."
        )


def _check_heads(heads: ServedHeads, model_config: Any) -> None:
    """Refuse a head of another width, and warn of one of another kind of model."""
    for name, head in heads.heads.items():
        head.check_width(model_config.get_hidden_size(), repr(model_config.model))
        kinds = head.config.base_model_type, model_config.hf_config.model_type
        if kinds[0] not in (None, kinds[1]):
            logger.warning("The head %s was trained on a %s, this model is a %s.", shown(name), *kinds)
        else:
            logger.info("Head %s, trained on %s.", shown(name), shown(head.config.base_model_name_or_path))
