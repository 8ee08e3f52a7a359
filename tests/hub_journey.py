"""A head's way from its author to a user, on whatever Hub HF_ENDPOINT names; the token is HF_TOKEN.

    python tests/hub_journey.py author NAME FOLDER     train, push, tag, push again; prints what was pushed
    python tests/hub_journey.py user REPO_ID COMMIT    pull the tag, the commit and the branch, and generate
    python tests/hub_journey.py delete REPO_ID

What is printed is one line of JSON. test_hub_journey.py goes this way on the Hub in memory and, with a token, on the
real one.
"""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi

from hf_recontrol import HeadUnavailable, RecontrolTrainer, ValueHead, ValueHeadConfig
from hf_recontrol.demo.assets import Demo
from hf_recontrol.demo.training import collect, training_arguments
from hf_recontrol.fitting import fit_linear_head


def author(name, folder):
    """Two heads of the demo's language model: the first is tagged v1, the second is on main."""
    demo, folder = Demo(), Path(folder)
    train, held_out = collect(demo, demo.prompts["train"][:12], folder / "rollouts", answers=4).split(0.2, seed=0)
    torch.manual_seed(0)
    first = ValueHead(ValueHeadConfig(hidden_size=train.hidden_size, intermediate_size=8))
    args = training_arguments(folder / "out", num_train_epochs=2, disable_tqdm=True)
    RecontrolTrainer(first, args, train_dataset=train, eval_dataset=held_out).train()
    second = fit_linear_head(train)
    for head in (first, second):
        head.config.base_model_name_or_path = None  # the demo's is on no Hub
    api = HfApi()
    repo_id = f"{api.whoami()['name']}/{name}"
    first.eval().push_to_hub(repo_id, private=True)
    api.create_tag(repo_id, tag="v1")
    commit = api.model_info(repo_id).sha
    second.push_to_hub(repo_id)
    return {"repo_id": repo_id, "commit": commit, "v1": texts(demo, first), "main": texts(demo, second)}


def user(repo_id, commit):
    """What the pulled heads say, and why others cannot be had."""
    demo, said = Demo(), {"plain": texts(Demo(), False)}
    refused = {"nobody": {"token": False}, "v9": {"revision": "v9"}, "elsewhere": {"subfolder": "elsewhere"}}
    for name, arguments in refused.items():  # before anything is in the cache
        try:
            ValueHead.from_pretrained(repo_id, **arguments)
            said[name] = "loaded"
        except HeadUnavailable as error:
            said[name] = str(error)
    said |= {at: texts(demo, f"{repo_id}@{at}") for at in ("v1", commit, "main")}
    return said


def texts(demo, head):
    inputs = demo.tokenizer(demo.prompts["test"][:2], return_tensors="pt", padding=True, padding_side="left")
    steer = {"recontrol_step_size": 3.0, "recontrol_num_steps": 5} if head else {}
    ids = demo.model.generate(**inputs, recontrol_value_head=head, do_sample=False, max_new_tokens=12, **steer)
    return demo.tokenizer.batch_decode(ids)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    commands = {"author": author, "user": user, "delete": lambda repo_id: HfApi().delete_repo(repo_id)}
    print(json.dumps(commands[command](*arguments)))
