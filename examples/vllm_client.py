"""A plain and a steered answer from `hf-recontrol serve --engine vllm`, by the openai package.

Start the server first:
hf-recontrol serve MODEL --engine vllm --head polite=path/to/head --port 8000
"""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", default="http://localhost:8000/v1")
parser.add_argument("--head", default="polite", help="a name that the server was given with --head NAME=…")
parser.add_argument("--strength", type=float, help="mean KL per token to spend, in nats; the head's own where left out")
parser.add_argument("--step-size", type=float, help="α of a value head, instead of a strength")
parser.add_argument("--prompt", default="The film was")
parser.add_argument("--max-tokens", type=int, default=60)
arguments = parser.parse_args()

client = OpenAI(base_url=arguments.url, api_key="none")
model = client.models.list().data[0].id
options = {"recontrol_strength": arguments.strength, "recontrol_step_size": arguments.step_size}
steering = {"recontrol_value_head": arguments.head} | {
    name: value for name, value in options.items() if value is not None
}
for name, xargs in (("plain", {"recontrol_value_head": False}), (arguments.head, steering)):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": arguments.prompt}],
        max_tokens=arguments.max_tokens,
        temperature=0,
        extra_body={"vllm_xargs": xargs},
    )
    print(f"{name}: {answer.choices[0].message.content.strip()}")
