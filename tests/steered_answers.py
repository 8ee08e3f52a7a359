"""Prompts and answers of uneven lengths, one of them empty, for what measures answers; and a control of tiny_model."""

from tiny import tiny_head

from hf_recontrol.control import ControlConfig, Controller

PROMPTS = [[1, 9, 30], [1, 5, 8, 41, 7, 22], [1], [1, 50]]
ANSWERS = [[12, 33, 2], [40], [11, 60, 4, 9, 17, 2], []]


def controller(step_size=0.5, num_steps=3):
    return Controller(tiny_head(), ControlConfig(step_size=step_size, num_steps=num_steps))
