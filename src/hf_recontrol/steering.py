"""One steered generate(): from its keywords and configs to a live call, and from its output to a trace."""

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from .calls import Call, live_call, run_live
from .control import Controller
from .errors import SteeringNotApplied
from .hooks import install, lm_head, lm_head_owner
from .keywords import RecontrolKeywords, Request, said_by
from .recording import Recorder
from .row_control import RowController
from .start import Start
from .trace import Trace, TraceRecorder

P = ParamSpec("P")

ONE_FORWARD_A_TOKEN: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "prefill_chunk_size": (None,),
    "guidance_scale": (None, 1),
    "use_mtp": (None, False),
    "custom_generate": (None,),
}
"""Settings of generate() and their values under which each forward makes one token of each row."""
PROMPTS = ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values", "decoder_input_ids")
"""Keywords of generate() with one row for each prompt."""


def steered_generate(
    stock: Callable[..., Any],
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recorder: Recorder | None = None,
    controller: Controller | None = None,
) -> Any:
    """`stock(*args, **kwargs)`, a generate(), with `controller`, or the control that keywords and configs ask for."""
    keywords = RecontrolKeywords.pop(kwargs)
    configs = _configs(model, args, kwargs)
    if keywords == RecontrolKeywords() and _is_part_of(live_call(), model, configs[0]):
        return stock(*args, **kwargs)
    if isinstance(keywords.value_head, list | tuple):  # before a head is fetched
        _check_prompts(len(keywords.value_head), args, kwargs)
    request = keywords.request(model, configs[0]) if controller is None else Request(controller)
    call, tracer = None, None
    if request.trace and isinstance(request.controller, Controller):
        _check_traceable(kwargs, configs, recorder)
        tracer = recorder = TraceRecorder(request.controller)
    if request.controller is not None or recorder is not None:
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError('cache_implementation="paged" cannot be steered: it runs in a thread of its own.')
        check_mode(request, kwargs, configs)
        if request.start is not None and (eos := _setting("eos_token_id", kwargs, configs)) is not None:
            request.start.eos_token_ids = torch.as_tensor(eos).flatten().tolist()
        install(model)
        call = call_for(model, request.controller, recorder, request.start)
        call.passes_on = kwargs.get("custom_generate") is not None
    result = run_live(call, stock, *args, **kwargs)
    _warn_of_unsound(call)
    _warn_of_waiting(call)
    if tracer is not None:
        result.recontrol_trace = _trace(tracer, result.sequences, kwargs, configs)
    return result


def _is_part_of(outer: Call | None, model: Any, config: Any) -> bool:
    """Whether this generate() is how a custom_generate around it makes its text. Drafts of an early exit are not."""
    if outer is None or not outer.passes_on or outer.model is not model:
        return False
    return not getattr(config, "is_assistant", False)


def steered_generate_batch(stock: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`stock(*args, **kwargs)`, a generate_batch(), under one control for all its requests.

    Its forwards run in a thread of its own, where `steered_manager` makes the control live.
    """
    keywords = RecontrolKeywords.pop(kwargs)
    bound = inspect.signature(GenerationMixin.generate_batch).bind(model, *args, **kwargs)
    given = bound.arguments
    request = keywords.request(model, given.get("generation_config"))
    config = copy.deepcopy(given.get("generation_config") or model.generation_config)
    for name in [name for name in vars(config) if name.startswith("recontrol_")]:
        delattr(config, name)
    config.recontrol_value_head = False  # what it asked for has been read: it is live, or is not wanted
    given["generation_config"] = config
    run = functools.partial(stock, *bound.args[1:], **bound.kwargs)
    if request.controller is None or not given["inputs"]:
        return run_live(None, run)
    if request.trace:
        raise ValueError("recontrol_trace is for greedy decoding and sampling with generate(), not generate_batch().")
    if isinstance(request.controller, RowController):
        raise ValueError(
            "recontrol_value_head is a list, but generate_batch() steers all its requests by one head. Call it once "
            "for each head, or use generate()."
        )
    if request.start is not None:
        raise ValueError(
            "recontrol_start and recontrol_start_token_id are for generate(), not generate_batch(): each of its "
            "forwards holds requests at different tokens. Leave them out, or use generate()."
        )
    if given.get("persistent_manager") or getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError(
            "A persistent manager of continuous batching cannot be steered: it would outlive this call. Leave "
            "persistent_manager out, and call model.destroy_cached_continuous_batching_manager() if there is one."
        )
    install(model)
    call = call_for(model, request.controller)
    result = run_live(call, run)
    _warn_of_unsound(call)
    return result


def steered_manager(stock: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`stock(*args, **kwargs)`, an init_continuous_batching(); its thread gets the control that is live in this one."""
    call = live_call()
    for config in (args[0] if args else kwargs.get("generation_config"), model.generation_config):
        named = said_by(config, "generation config").get("value_head")
        if named is not None:
            break
    if call is None and named not in (None, False):
        raise ValueError(
            "A manager of continuous batching is not steered by its generation config. Use generate_batch(), or set "
            "recontrol_value_head = False in the config."
        )
    manager = stock(*args, **kwargs)
    if call is not None:
        manager._run_generation_loop = functools.partial(_run_steered, call, manager._run_generation_loop)
    return manager


def _run_steered(call: Call, loop: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    with contextlib.suppress(SteeringNotApplied):  # generate_batch raises it, in the caller's thread
        run_live(call, loop, *args, **kwargs)


def call_for(
    model: PreTrainedModel,
    controller: Controller | RowController | None,
    recorder: Recorder | None = None,
    start: Start | None = None,
) -> Call:
    """The call that applies `controller` and `recorder` to the model's forwards."""
    owner = lm_head_owner(model)
    if controller is None or controller.is_identity:
        return Call(None, recorder, owner, model=model)
    weight = next(lm_head(model).parameters(), None)
    if weight is not None and not weight.is_meta:  # on meta while it is offloaded; then nothing is traced
        controller.prepare(weight.device)
    return Call(controller.edit, recorder, owner, controller.max_kl, start, model)


def check_forward(model: Any) -> None:
    """After each forward of a model's generate(), before its token is chosen: raise unless it was steered as asked.

    Another model's loop, run in between by GenerationMixin.generate(), is none of the call's.
    """
    call = live_call()
    if call is not None and (model is call.model or model is call.owner):
        call.check()


def note_tokens(ids: Any) -> None:
    """Before each forward of a generate(): all tokens so far, int64 (rows, tokens)."""
    call = live_call()
    if call is None or not isinstance(ids, Tensor):
        return
    if call.start is not None:
        call.start.note(ids)
    if call.recorder is not None and call.recorder.prompt_tokens is None:
        call.recorder.prompt_tokens = ids.shape[1]


def _warn_of_waiting(call: Call | None) -> None:
    if call is not None and call.start is not None and (waiting := call.start.waiting()):
        warnings.warn(
            f"{waiting} answers (of beams, beams) ended before recontrol_start or recontrol_start_token_id let the "
            "control begin; they are unguided. Allow more new tokens, or let it begin earlier.",
            UserWarning,
            stacklevel=4,
        )


def _warn_of_unsound(call: Call | None) -> None:
    if call is not None and call.unsound is not None and int(call.unsound):
        warnings.warn(
            f"{int(call.unsound)} hidden states were not finite, or they or their logits would not have been after "
            "the edit, and were left unedited; those tokens are unguided. Is the model's dtype too narrow, or the step "
            "size or scale huge?",
            UserWarning,
            stacklevel=4,
        )


def _configs(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The generation config of the call, which may be None, and the model's."""
    return kwargs.get("generation_config", args[1] if len(args) > 1 else None), model.generation_config


def _setting(name: str, kwargs: Mapping[str, Any], configs: tuple[Any, Any]) -> Any:
    """What generate() will take for `name`: the call's keyword, else the given config's, else the model's."""
    said = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in said if value is not None), None)


def _check_prompts(heads: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A list of heads has one for each prompt."""
    inputs = (args[0] if args else None, *(kwargs.get(name) for name in PROMPTS))
    given = next((len(each) for each in inputs if isinstance(each, Tensor)), None)
    if given != heads:
        found = "none of " + ", ".join(PROMPTS) if given is None else f"{given} prompts"
        raise ValueError(
            f"recontrol_value_head is a list of {heads}, but {found} were given. Give one head, or None, "
            "for each prompt of the batch; beams and num_return_sequences follow their prompt."
        )


def check_mode(request: Request, kwargs: Mapping[str, Any], configs: tuple[Any, Any]) -> None:
    """Refuse by name a way of decoding in which what was asked for cannot be had."""
    weight = _setting("assistant_ensemble_weight", kwargs, configs)
    if request.controller is not None and weight is not None:
        raise ValueError(
            f"assistant_ensemble_weight is {weight!r}, which draws tokens from a mixture with the plain draft, so that "
            "neither a strength nor recontrol_max_kl would hold for the text. Leave it out."
        )
    for name, plain in ONE_FORWARD_A_TOKEN.items() if request.start is not None else ():
        if name not in ("num_beams", "guidance_scale") and (value := _setting(name, kwargs, configs)) not in plain:
            raise ValueError(
                "recontrol_start and recontrol_start_token_id need one forward for each new token, which "
                f"{name}={value!r} does not make. Leave them out."
            )


def _check_traceable(kwargs: Mapping[str, Any], configs: tuple[Any, Any], recorder: Recorder | None) -> None:
    if recorder is not None:
        raise ValueError("recontrol_trace is for generate(); hidden states and a trace are not recorded at once.")
    for name, plain in ONE_FORWARD_A_TOKEN.items():
        if (value := _setting(name, kwargs, configs)) not in plain:
            raise ValueError(f"recontrol_trace is for greedy decoding and sampling, not for {name}={value!r}.")
    if not _setting("return_dict_in_generate", kwargs, configs):
        raise ValueError("recontrol_trace is part of the output with return_dict_in_generate=True; pass that too.")


def _trace(tracer: TraceRecorder, sequences: Tensor, kwargs: Mapping[str, Any], configs: tuple[Any, Any]) -> Trace:
    if not tracer.steps:
        raise SteeringNotApplied(
            "The text was steered, but generated by a model inside this one, where it is not traced. Leave "
            "recontrol_trace out."
        )
    token_ids = sequences[:, sequences.shape[1] - tracer.new_tokens(tracer.steps, sequences.shape[1]) :].cpu()
    eos = _setting("eos_token_id", kwargs, configs)
    if eos is None:  # then generate() pads nothing
        return tracer.trace(token_ids, torch.full((len(token_ids),), token_ids.shape[1]))
    ends = torch.as_tensor(eos).flatten().cpu()
    pad = _setting("pad_token_id", kwargs, configs)
    pad = ends[0] if pad is None else pad  # as generate() has it
    before_eos = torch.isin(token_ids, ends).cumsum(-1).eq(0).sum(-1)
    padding = (token_ids != pad).flip(-1).cumsum(-1).eq(0).sum(-1)  # at the end of a row that a stop string ended
    whole = token_ids.shape[1]
    return tracer.trace(token_ids, torch.where(before_eos < whole, before_eos + 1, whole - padding))
