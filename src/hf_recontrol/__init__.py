"""RE-Control for transformers: a value head steers generate() at decoding time (arXiv:2406.05954)."""

from .control import ControlConfig, Controller
from .errors import CollectError, HeadError, HeadMismatch, HeadUnavailable, SteeringNotApplied
from .fitting import fit_linear_head
from .generation import RecontrolGenerationMixin, disable_recontrol, enable_recontrol
from .head_config import ControlDefaults, RewardScale, ValueHeadConfig
from .rollout_store import RolloutDataset
from .rollouts import collect_rollouts
from .trainer import RecontrolTrainer
from .training_args import RecontrolTrainingArguments
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
    "RecontrolTrainer",
    "RecontrolTrainingArguments",
    "RewardScale",
    "RolloutDataset",
    "SteeringNotApplied",
    "ValueHead",
    "ValueHeadConfig",
    "collect_rollouts",
    "disable_recontrol",
    "enable_recontrol",
    "fit_linear_head",
]
