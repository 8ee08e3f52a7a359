"""Architectures beside an oracle that has no hook of ours: a sample of families; every class there is, by -m sweep."""

import pytest
import transformers
from architecture_configs import ALL, classes
from architectures import NOT_RUN, REFUSED, outcome, section, section_of_readme

SAMPLE = {
    "LlamaForCausalLM": "the plainest",
    "GPT2LMHeadModel": "learned positions, tied weights",
    "T5ForConditionalGeneration": "encoder and decoder, tied and scaled",
    "BartForConditionalGeneration": "encoder and decoder, a bias after the LM head",
    "BloomForCausalLM": "positions as biases of attention",
    "MambaForCausalLM": "a state and no attention",
    "Gemma2ForCausalLM": "a soft-cap",
    "Qwen2MoeForCausalLM": "experts",
    "FalconH1ForCausalLM": "attention and a state in one layer",
    "BertLMHeadModel": "a transform inside the head",
    "LlavaForConditionalGeneration": "images",
    "CohereForCausalLM": "a scale after the LM head",
}


@pytest.mark.versions
@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_is_steered_as_the_oracle_says(name):
    found = outcome(name)
    assert found.status == "passes", found.reason


@pytest.mark.sweep
@pytest.mark.parametrize("name", ALL)
def test_every_class_is_steered_refused_or_listed_with_a_reason(name):
    found, listed = outcome(name), {"not run": NOT_RUN, "refused": REFUSED}
    assert found.status != "fails", f"{name} must be refused by enable_recontrol, or be steered: {found.reason}"
    for status, table in listed.items():
        if found.status == status:
            assert name in table, f"write down why {name} is {status}: {found.reason}"
        else:
            assert name not in table, f"{name} {found.status}: take it off the list of what is {status}"


@pytest.mark.sweep
def test_nearly_all_architectures_are_built_and_run():
    total = []
    for mapping, least in (("causal", 150), ("sequence-to-sequence", 27), ("image-text", 52)):
        run = [found for found in (outcome(name).status for name in classes(mapping)) if found != "not run"]
        assert len(run) >= least, mapping
        total += run
    assert total.count("passes") >= 0.99 * len(total)


@pytest.mark.sweep
def test_the_readme_says_what_is_supported():
    told = section_of_readme()
    if told is None or f"transformers {transformers.__version__}" not in told:
        pytest.skip("the README speaks of another version of transformers")
    assert told == section({name: outcome(name) for name in ALL})
