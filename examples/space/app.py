"""The page as a Space: the demo's own model and heads, or yours by the Space's variables MODEL and HEADS."""

import os

from hf_recontrol import Head
from hf_recontrol.page import build_page, launch_page

MODEL = os.environ.get("MODEL")  # an id on the Hub; the demo's own where there is none
HEADS = os.environ.get("HEADS", "")  # its heads: "polite=user/head brief=user/other@v1"

if MODEL:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    heads = {name: Head.from_pretrained(head) for name, _, head in (named.partition("=") for named in HEADS.split())}
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto", device_map="auto")
    page = build_page(model, AutoTokenizer.from_pretrained(MODEL), heads)
else:
    from hf_recontrol.demo.page import demo_page

    page = demo_page()

if __name__ == "__main__":
    launch_page(page)
