"""What generate() takes besides its own keywords: read, checked against the model, and made into a control."""

import difflib
import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedModel

from .config_checks import shown
from .control import Controller
from .control_config import ControlConfig, as_float, is_known
from .control_head import ControlHead
from .errors import HeadMismatch
from .head import Head
from .hooks import hidden_width, model_name
from .registry import as_head, register_value_heads, registered_head
from .row_control import RowController
from .start import Start

CONTROL = [field.name for field in fields(ControlConfig)]
FLAGS = ["strict", "trace", "start", "start_token_id"]
IN_A_CONFIG = ["value_head", *CONTROL, *FLAGS]
HeadReference = str | os.PathLike[str] | Head
Heads = HeadReference | Mapping[HeadReference, float] | bool | None


class Request(NamedTuple):
    """What one generate() is to do."""

    controller: Controller | RowController | None = None
    trace: bool = False
    start: Start | None = None


@dataclass(frozen=True)
class RecontrolKeywords:
    """What generate() takes besides its own keywords, each with `recontrol_` in front.

    What is None is taken from the generation config that is given, then from the model's, then from the head.
    """

    value_head: Heads | Sequence[Heads] = None
    """The head, of either kind: an id on the Hub, "id@revision", a folder (which wins over an id of the same name), a
    ValueHead or a ControlHead; or several, each with its weight. False is none: stock generate(), whatever else is
    said. A list has one of these for each prompt of the batch, and None for a plain one."""
    step_size: float | None = None
    """α of a value head, ≥ 0; 0 is no control, bit for bit. Not together with strength."""
    num_steps: int | None = None
    """n of a value head, 0 to 1024; 0 is no control, bit for bit."""
    strength: float | None = None
    """Mean KL per token to spend, nats, > 0; picks α, of a control head the scale, from the head's calibration, and
    sets max_kl to 4 × as much."""
    max_kl: float | None = None
    """No token's KL above it, nats, > 0, before temperature and other logits processors; inf: no bound."""
    max_relative_norm: float | None = None
    """‖u‖ at most this share of ‖h‖, > 0; inf: no bound."""
    regularization: float | None = None
    """λ ≥ 0 of the penalty λ‖u‖²."""
    target_value: float | None = None
    """Value to steer to, from below and from above, in raw units of the reward."""
    scale: float | None = None
    """What the u of a control head is multiplied by, ≥ 0; 0 is no control, bit for bit. Not together with strength."""
    config: ControlConfig | Mapping[str, Any] | None = None
    """The eight above at once. A keyword that says something else is an error."""
    revision: str | None = None
    """Branch, tag or commit of a head on the Hub."""
    token: str | None = None
    """Access token for a head on the Hub; the stored one where None."""
    strict: bool | None = None
    """Whether a head trained on another base model is an error; otherwise it is a warning."""
    trace: bool | None = None
    """Whether the output, with return_dict_in_generate, has a `recontrol_trace`: see Trace. Greedy decoding and
    sampling only; costs a second row through the LM head."""
    start: int | None = None
    """So many new tokens of each answer stay plain, ≥ 0; 0 where None: the control begins with the first."""
    start_token_id: int | Sequence[int] | None = None
    """A token, or several: each answer stays plain until one of them has been generated, the end of a thinking section,
    say. One in the prompt does not count. Where None, the control does not wait."""

    @classmethod
    def pop(cls, kwargs: dict[str, Any]) -> "RecontrolKeywords":
        """Take ours out of generate()'s keywords."""
        ours = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("recontrol_")}
        if ours.get("recontrol_value_head") is False:  # plain text, whatever the rest says
            return cls(value_head=False)
        return cls(**_known(ours, [field.name for field in fields(cls)], "generate()"))

    def request(self, model: PreTrainedModel, given_config: Any = None, own_config: Any = None) -> Request:
        """What was asked for, by the call and by the configs, checked against the model.

        Args:
            given_config: the GenerationConfig of the call.
            own_config: that of the model; its present one where None.

        Raises:
            TypeError, ValueError: a keyword or a config has a wrong value, or one that does nothing as it stands.
            HeadError, HeadUnavailable, HeadMismatch: the head cannot be read, fetched, or used with this model.
        """
        if self.value_head is False:
            return Request()
        if isinstance(self.value_head, list | tuple):
            return self._row_request(self.value_head, model, given_config, own_config)
        if getattr(given_config, "is_assistant", False) and self == RecontrolKeywords():
            return Request()  # drafts are made with a copy of the target's config: they are plain, the target decides
        control, flags = self._control(), {name: getattr(self, name) for name in FLAGS}
        heads = None if self.value_head is None else self._heads()
        own_config = model.generation_config if own_config is None else own_config
        for where, config in (("given", given_config), ("model's", own_config)):
            said = said_by(config, f"{where} generation config")
            if heads:  # the call's, or another config's: what this one says may be of its own head's kind only
                known = [head.config.control for head in heads]
                said = {name: value for name, value in said.items() if name not in CONTROL or is_known(name, known)}
            if heads is None and said.get("value_head") is not None:
                heads = _registered(said["value_head"], f"{where} generation config")
            try:
                control = control.over(ControlConfig(**{name: said[name] for name in CONTROL if name in said}))
            except ValueError as error:
                raise ValueError(f"In the {where} generation config: {error}") from None
            flags = {name: said.get(name) if flag is None else flag for name, flag in flags.items()}
        _check_flags(flags)
        if not heads:
            if self != RecontrolKeywords():  # also where a config says False
                raise ValueError(
                    "generate() was given recontrol_ keywords but no recontrol_value_head, so nothing would be "
                    "steered. Name a head, or leave the others out."
                )
            return Request()
        for head in heads:
            check_base_model(head, model, strict=bool(flags["strict"]))
            if isinstance(head, ControlHead) and head.is_zero():
                raise ValueError(
                    "The control head is 0 everywhere, as one that was just made, so nothing would be steered. Train "
                    "it, see RecontrolTrainer and train_control; for plain text pass recontrol_value_head=False."
                )
        return Request(Controller(heads, control), bool(flags["trace"]), _start(flags))

    def _row_request(
        self, heads: Sequence[Heads], model: PreTrainedModel, given_config: Any, own_config: Any
    ) -> Request:
        """A head for each prompt."""
        self._control()  # what is said beside them is checked also where every row is plain
        _check_flags({name: getattr(self, name) for name in FLAGS})
        if self.revision is not None or not heads:
            raise ValueError(
                f"recontrol_value_head is a list of {len(heads)}; give one head, or None, for each prompt of the "
                'batch. recontrol_revision is for one head: write "id@revision".'
            )
        requests: dict[Any, Request] = {}
        for named in heads:
            key = _key(named)
            if key is not None and key not in requests:
                requests[key] = replace(self, value_head=named).request(model, given_config, own_config)
        if self.trace or any(request.trace for request in requests.values()):
            raise ValueError("recontrol_trace is for one head, or several with weights, not for a list of heads.")
        controllers: list[Any] = [None if _key(named) is None else requests[_key(named)].controller for named in heads]
        start = next((request.start for request in requests.values()), None)
        return Request(RowController(controllers), start=start)

    def _control(self) -> ControlConfig:
        """The keywords and `config` together."""
        said = {name: getattr(self, name) for name in CONTROL if getattr(self, name) is not None}
        control = ControlConfig(**said)
        if self.config is None:
            return control
        whole = ControlConfig.of(self.config)
        for name, value in said.items():
            if getattr(whole, name) not in (None, value):
                raise ValueError(
                    f"recontrol_{name} is {value}, but recontrol_config has {name} = {getattr(whole, name)}. "
                    "Say it once."
                )
        return ControlConfig(**{name: getattr(whole, name) for name in CONTROL} | said)

    def _heads(self) -> dict[Head, float]:
        given = self.value_head
        if isinstance(given, Head) and (self.revision is not None or self.token is not None):
            raise ValueError(
                "recontrol_revision and recontrol_token are for a head on the Hub, but a head itself was given."
            )
        if not isinstance(given, Mapping):
            return {as_head(given, revision=self.revision, token=self.token): 1.0}  # type: ignore[arg-type]
        if self.revision is not None or self.token is not None or not given:
            raise ValueError(
                f"recontrol_value_head has {len(given)} heads; pass one or more. recontrol_revision and "
                'recontrol_token are for one head without a weight: write "id@revision", and log in for private ones.'
            )
        return _summed((as_head(head), weight) for head, weight in given.items())


def _key(named: Heads) -> Any:
    """Equal for what means the same head in a list; None for a plain row."""
    if named is None or named is False:
        return None
    if not isinstance(named, str | os.PathLike | Head | Mapping):
        as_head(named)  # type: ignore[arg-type] # says what is wrong
    return tuple(named.items()) if isinstance(named, Mapping) else named


def _summed(pairs: Any) -> dict[Any, float]:
    """The heads with their weights, those of one head (two names may mean one) added up."""
    heads: dict[Any, float] = {}
    for head, weight in pairs:
        if math.isnan(as_float(weight)):
            raise ValueError(f"A head's weight is {shown(weight)}; it must be a finite number other than 0.")
        heads[head] = heads.get(head, 0) + float(weight)
    return heads


def _check_flags(flags: Mapping[str, Any]) -> None:
    for name in ("strict", "trace"):
        if flags.get(name) is not None and type(flags[name]) is not bool:
            raise ValueError(f"recontrol_{name} is {shown(flags[name])}; it must be True or False.")
    _start(flags)


def _start(flags: Mapping[str, Any]) -> Start | None:
    """When steering begins, where that is not at once."""
    first, ids = flags.get("start"), flags.get("start_token_id")
    if first is not None and (isinstance(first, bool) or not isinstance(first, Integral) or first < 0):
        raise ValueError(f"recontrol_start is {shown(first)}; it must be a number of tokens, an integer ≥ 0.")
    ids = [] if ids is None else list(ids) if isinstance(ids, Sequence) and not isinstance(ids, str) else [ids]
    wrong = [one for one in ids if isinstance(one, bool) or not isinstance(one, Integral) or one < 0]
    if wrong or (flags.get("start_token_id") is not None and not ids):
        raise ValueError(
            f"recontrol_start_token_id is {shown(flags['start_token_id'])}; it must be a token's id or several, "
            'integers ≥ 0: tokenizer.convert_tokens_to_ids("</think>"), say.'
        )
    return Start(int(first or 0), [int(one) for one in ids]) if first or ids else None


def _known(values: Mapping[str, Any], known: list[str], where: str) -> dict[str, Any]:
    """The values by their names without `recontrol_`; one that is not known is an error."""
    names = ["recontrol_" + name for name in known]
    for name in values:
        if name not in names:
            nearest = difflib.get_close_matches(name[:80], names, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{where} has no keyword {shown(name)}; the nearest is {nearest!r}. Ours: {', '.join(names)}."
            )
    return {name.removeprefix("recontrol_"): value for name, value in values.items()}


def said_by(config: Any, where: str) -> dict[str, Any]:
    """What a generation config says of steering. It is data, maybe a stranger's: only what IN_A_CONFIG lists."""
    attributes = getattr(config, "__dict__", {})
    ours = {name: value for name, value in attributes.items() if name.startswith("recontrol_")}
    return _known(ours, IN_A_CONFIG, f"The {where}")


def _registered(named: Any, where: str) -> dict[Head, float]:
    """The heads that a config names; {} for False."""
    if named is False:
        return {}
    weights = {named: 1.0} if isinstance(named, str) else named
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(name, str) for name in weights):
        raise ValueError(
            f"The {where} has recontrol_value_head = {shown(named)}; it must be the name of a registered head, names "
            "with their weights, or False. Use model.set_recontrol_defaults()."
        )
    return _summed((registered_head(name, where), weight) for name, weight in weights.items())


def set_defaults(model: PreTrainedModel, value_head: Any, defaults: Mapping[str, Any]) -> None:
    """Register the heads, and write what is not None into the model's generation config in place of what was there."""
    if unknown := sorted(defaults.keys() - {*IN_A_CONFIG}):
        raise ValueError(
            f"set_recontrol_defaults() has no keyword {unknown[0]!r}. It has {', '.join(IN_A_CONFIG)}, each as "
            "generate() has it with recontrol_ in front."
        )
    said = {name: value for name, value in defaults.items() if value is not None}
    if value_head is not None and value_head is not False:
        if not isinstance(value_head, str | os.PathLike | Head | Mapping):
            as_head(value_head)  # says what is wrong
        weights = value_head if isinstance(value_head, Mapping) else {value_head: 1.0}
        heads = {given: as_head(given) for given in weights}
        keywords = RecontrolKeywords(_summed((heads[given], weight) for given, weight in weights.items()), **said)
        keywords.request(model, own_config=GenerationConfig())  # checks the lot, without the defaults of before
        names = {given: _name(given, head) for given, head in heads.items()}
        register_value_heads({names[given]: head for given, head in heads.items()})
        named = _summed((names[given], weight) for given, weight in weights.items())
        said["value_head"] = named if isinstance(value_head, Mapping) else names[value_head]
    else:
        ControlConfig(**{name: value for name, value in said.items() if name in CONTROL})
        _check_flags(said)
    if isinstance(ids := said.get("start_token_id"), Sequence):
        said["start_token_id"] = [int(one) for one in ids]
    config = model.generation_config
    for name in [name for name in vars(config) if name.startswith("recontrol_")]:
        delattr(config, name)
    for name, value in said.items():
        plain = value.item() if hasattr(value, "item") else value  # NumPy's numbers are no JSON
        setattr(config, f"recontrol_{name}", plain)
    config._from_model_config = False  # else save_pretrained takes it for a copy of the model's config, without ours


def _name(given: Any, head: Head) -> str:
    if not isinstance(given, Head):
        return str(os.fspath(given))
    digest = hashlib.sha256((head.config.to_json_string() + head.digest()).encode())
    return f"{head.config.reward.name}-{digest.hexdigest()[:8]}"


def check_base_model(head: Head, model: PreTrainedModel, *, strict: bool = False, stacklevel: int = 5) -> None:
    """Refuse a head of another width; warn of a head of another base model, or refuse it where `strict`.

    Raises:
        HeadMismatch: names both sides.
    """
    name, trained_on = model_name(model), head.config.base_model_name_or_path
    head.check_width(hidden_width(model), repr(name or type(model).__name__))
    kinds = head.config.base_model_type, model.config.model_type
    same = _may_be_same(trained_on, name) and (kinds[0] is None or kinds[0] == kinds[1])
    pair = (
        f"The {head.config.kind} head was trained on {trained_on!r} ({kinds[0]}), this model is {name!r} ({kinds[1]})"
    )
    if strict and (not same or trained_on is None or trained_on != name or name.startswith("./")):
        raise HeadMismatch(
            f"{pair}, and recontrol_strict asks for the same Hub id, since a folder's name says little. Use the head's "
            "own base model, or leave recontrol_strict out."
        )
    if not same:
        warnings.warn(
            f"{pair}; it may mean nothing there. If the two share their weights, silence this by "
            "warnings.filterwarnings.",
            UserWarning,
            stacklevel=stacklevel,
        )


def _may_be_same(trained_on: str | None, name: str | None) -> bool:
    """Whether two names may be of one model: a folder's last part is compared with a Hub id's."""
    if trained_on is None or name is None:
        return True
    if trained_on.startswith("./") or name.startswith("./"):
        return trained_on.rpartition("/")[2] == name.rpartition("/")[2]
    return trained_on == name
