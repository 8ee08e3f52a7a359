"""Coherence with tiny random encoders: which state of the model is the embedding, and what is made of it."""

import sys

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import BertConfig, BertModel, BertTokenizerFast

from hf_recontrol.coherence import Coherence

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"]
ANSWERS = ["w2 w3 w30", "w11 w12 w13 w14 w15", "w1"]


def bert(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=160, initializer_range=0.5, **sizes)
    return BertModel(config, **options).eval()


def save(model, folder):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(bert(), tmp_path_factory.mktemp("encoders") / "bert")


def embedding(text, state):
    """From the definition, for one text: the pooler's output, or the mean of its tokens' states."""
    ids = [2, *(VOCABULARY.index(word) for word in text.split()), 3]
    out = bert()(torch.tensor([ids]))
    return {"pooler": out.pooler_output[0], "mean": out.last_hidden_state[0].mean(0)}[state].detach()


def cosines(state, prompts=PROMPTS, answers=ANSWERS):
    pairs = zip(prompts, answers, strict=True)
    return [float(torch.cosine_similarity(*(embedding(text, state) for text in pair), dim=0)) for pair in pairs]


def test_a_plain_bert_is_read_as_simcse_is_by_its_pooler(folder):
    assert Coherence(folder)(PROMPTS, ANSWERS) == pytest.approx(cosines("pooler"), abs=1e-5)
    assert cosines("pooler") != pytest.approx(cosines("mean"), abs=1e-2)  # else the line above says nothing


def test_the_size_of_a_batch_does_not_matter(folder):
    assert Coherence(str(folder), batch_size=2)(PROMPTS, ANSWERS) == pytest.approx(cosines("pooler"), abs=1e-5)


def test_texts_are_cut_at_the_128_tokens_of_simcse(folder):
    long = " ".join(f"w{i % 40}" for i in range(126))  # and [CLS], and [SEP]
    score = Coherence(folder)
    assert score([long + " w1 w2"], ["w3"]) == pytest.approx(score([long], ["w3"]), abs=1e-6)
    assert score([long.removesuffix("w5")], ["w3"]) != pytest.approx(score([long], ["w3"]), abs=1e-4)


def test_a_model_without_a_trained_pooler_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trained pooler \(it lacks \['pooler.dense.bias', 'pooler.dense.weight'\]\)"):
        Coherence(save(bert(add_pooling_layer=False), tmp_path / "no pooler"))


@pytest.fixture(scope="module")
def mean_pooled(folder, tmp_path_factory):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from sentence_transformers import SentenceTransformer

    encoder = modules.Transformer(str(folder))
    model = SentenceTransformer(modules=[encoder, modules.Pooling(16, "mean")], device="cpu")
    saved = tmp_path_factory.mktemp("encoders") / "sentence-transformer"
    model.save(str(saved), create_model_card=False)
    return saved, model


def test_a_sentence_transformer_is_read_as_it_says_itself(mean_pooled):
    saved, model = mean_pooled
    for encoder in (saved, str(saved), model):
        assert Coherence(encoder)(PROMPTS, ANSWERS) == pytest.approx(cosines("mean"), abs=1e-5)


def test_without_sentence_transformers_the_extra_is_named(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ImportError, match=r"pip install 'hf-recontrol\[eval\]'"):
        Coherence(tmp_path)
    assert Coherence(folder)(PROMPTS, ANSWERS) == pytest.approx(cosines("pooler"), abs=1e-5)  # needs none


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def templateless(hub):
    """The tests' Hub, which cannot list a folder, says that there is none of further chat templates."""
    hub.fail("/tree/", status=404)
    return hub


def test_a_hub_id_is_read_by_the_same_rule(templateless, folder, mean_pooled):
    hub = templateless
    hub.add("user/bert", files_of(folder))
    hub.add("user/sentences", files_of(mean_pooled[0]))
    assert Coherence("user/bert")(PROMPTS, ANSWERS) == pytest.approx(cosines("pooler"), abs=1e-5)
    assert Coherence("user/sentences")(PROMPTS, ANSWERS) == pytest.approx(cosines("mean"), abs=1e-5)


def test_without_the_hub_what_it_said_before_counts(templateless, folder, monkeypatch):
    templateless.add("user/again", files_of(folder))
    once = Coherence("user/again")(PROMPTS, ANSWERS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Coherence("user/again")(PROMPTS, ANSWERS) == once
    with pytest.raises(LocalEntryNotFoundError, match="not find the requested files in the local cache"):
        Coherence("user/never")


# Any encoder


def counts(texts):
    return torch.tensor([[text.count("a"), text.count("b")] for text in texts])


def test_a_callable_is_an_encoder():
    assert Coherence(counts)(["a", "aab", "a"], ["a", "abb", "b"]) == pytest.approx([1, 4 / 5, 0])


def test_coherence_is_a_cosine():
    assert Coherence(lambda texts: -counts(texts) * len(texts[0]))(["ab"], ["abab"]) == pytest.approx([1])
    assert Coherence(lambda texts: [[3.0, 4.0] if text == "p" else [-3, -4] for text in texts])(["p"], ["c"]) == [-1]


def test_an_empty_answer_scores_0_and_is_not_encoded():
    def never_empty(texts):
        assert all(text.strip() for text in texts)
        return counts(texts)

    empty = [{"role": "assistant", "content": ""}]
    assert Coherence(never_empty)(["a"] * 4, ["", " \n", empty, "a"]) == pytest.approx([0, 0, 0, 1])
    assert Coherence(never_empty)(["a"], [""]) == [0]
    assert Coherence(never_empty)([], []) == []


def test_message_lists_are_read_by_their_contents():
    seen = []

    def encode(texts):
        seen.extend(texts)
        return counts(texts)

    prompt = [{"role": "system", "content": "a"}, {"role": "user", "content": "b?"}]
    Coherence(encode)([prompt], [[{"role": "assistant", "content": "ab"}]])
    assert seen == ["a\nb?", "ab"]


def test_what_is_no_encoder_or_no_embedding_is_refused():
    with pytest.raises(TypeError, match="The encoder is a int"):
        Coherence(3)
    with pytest.raises(ValueError, match=r"shape \(2,\) for 1 texts; expected is \(1, d\)"):
        Coherence(lambda texts: torch.zeros(2))(["a"], ["b"])
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for 1 texts"):
        Coherence(lambda texts: torch.zeros(3, 2))(["a"], ["b"])
    with pytest.raises(ValueError, match="1 prompts and 2 completions"):
        Coherence(counts)(["a"], ["a", "b"])
