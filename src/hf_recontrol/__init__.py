"""RE-Control for transformers: a value head steers generate() at decoding time (arXiv:2406.05954)."""

from .control import ControlConfig, Controller
from .errors import CollectError, HeadError, HeadMismatch, HeadUnavailable, SteeringNotApplied
from .generation import RecontrolGenerationMixin, disable_recontrol, enable_recontrol
from .head_config import ControlDefaults, RewardScale, ValueHeadConfig
from .value_head import ValueHead

__version__ = "0.1.0"

__all__ = [
    "CollectError",
    "ControlConfig",
    "ControlDefaults",
    "Controller",
    "HeadError",
    "HeadMismatch",
    "HeadUnavailable",
    "RecontrolGenerationMixin",
    "RewardScale",
    "SteeringNotApplied",
    "ValueHead",
    "ValueHeadConfig",
    "disable_recontrol",
    "enable_recontrol",
]
