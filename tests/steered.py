"""What tests of steered generate() calls share: settings, heads, and the short ways to ask."""

import functools

from tiny import prompts, tiny_head, tiny_model
from transformers import GenerationConfig

from hf_recontrol import ControlConfig, ControlDefaults
from hf_recontrol.keywords import RecontrolKeywords

GREEDY = {"do_sample": False, "max_new_tokens": 8}
STEER = {"recontrol_step_size": 2.0, "recontrol_num_steps": 3}
STEERING = ControlConfig(2.0, 3)
TABLE = [[0.02, 1.0], [0.4, 8.0]]


def tokens(model, **keywords):
    return model.generate(**prompts(), **(GREEDY | keywords)).tolist()


@functools.cache
def stock_tokens():
    """Of the stock model."""
    return tokens(tiny_model())


def calibrated(seed=0):
    head = tiny_head(seed)
    head.config.control = ControlDefaults(num_steps=3, calibration=TABLE)
    return head


def on_the_hub(hub, repo_id, head, folder):
    """Put the head there, and return its commit."""
    head.save_pretrained(folder)
    return hub.add(repo_id, {path.name: path.read_bytes() for path in folder.iterdir()})


def named(head="polite", **scalars):
    """A generation config that names heads."""
    return GenerationConfig(recontrol_value_head=head, **{f"recontrol_{name}": x for name, x in scalars.items()})


def asked(model, given=None, **keywords):
    return RecontrolKeywords.pop(keywords).request(model, given)


def defaults_of(model):
    return {name: value for name, value in vars(model.generation_config).items() if name.startswith("recontrol_")}
