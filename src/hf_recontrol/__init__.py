"""RE-Control for transformers: a value head steers generate() at decoding time (arXiv:2406.05954)."""

from .calibration import calibrate, sample_states
from .chat_judge import ChatJudge
from .coherence import Coherence
from .control import Controller
from .control_config import ControlConfig
from .control_fitting import fit_constant_control
from .control_head import ControlHead
from .ensemble import fit_ensemble
from .errors import CollectError, HeadError, HeadMismatch, HeadUnavailable, SteeringNotApplied
from .fitting import fit_linear_head
from .generation import RecontrolGenerationMixin, disable_recontrol, enable_recontrol
from .guided_decoding import ARGSLogitsProcessor, PrefixScorerLogitsProcessor
from .head import Head
from .head_config import ControlDefaults, ControlHeadConfig, RewardScale, ScaleDefaults, ValueHeadConfig
from .judging import RewardJudge, WinRate, win_rate
from .merging import merge_heads
from .on_policy import train_control, train_value
from .prompts import load_prompts
from .registry import register_value_heads
from .rewards import Rewards
from .rollout_dataset import RolloutDataset
from .rollouts import collect_rollouts
from .sharing import SharedHead, list_heads
from .trace import Trace
from .trainer import RecontrolTrainer
from .training_args import RecontrolTrainingArguments
from .value_head import ValueHead

__version__ = "0.1.0"

__all__ = [
    "ARGSLogitsProcessor",
    "ChatJudge",
    "Coherence",
    "CollectError",
    "ControlConfig",
    "ControlDefaults",
    "ControlHead",
    "ControlHeadConfig",
    "Controller",
    "Head",
    "HeadError",
    "HeadMismatch",
    "HeadUnavailable",
    "PrefixScorerLogitsProcessor",
    "RecontrolGenerationMixin",
    "RecontrolTrainer",
    "RecontrolTrainingArguments",
    "RewardJudge",
    "RewardScale",
    "Rewards",
    "RolloutDataset",
    "ScaleDefaults",
    "SharedHead",
    "SteeringNotApplied",
    "Trace",
    "ValueHead",
    "ValueHeadConfig",
    "WinRate",
    "calibrate",
    "collect_rollouts",
    "disable_recontrol",
    "enable_recontrol",
    "fit_constant_control",
    "fit_ensemble",
    "fit_linear_head",
    "list_heads",
    "load_prompts",
    "merge_heads",
    "register_value_heads",
    "sample_states",
    "train_control",
    "train_value",
    "win_rate",
]
