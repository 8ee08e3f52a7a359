"""A saved head comes back bit for bit, and whatever is not a head is refused before it can do harm."""

import hashlib
import json
import os
import pickle
import signal
import struct

import pytest
import torch
from safetensors import torch as safetensors_torch

from hf_recontrol.errors import HeadError, HeadUnavailable
from hf_recontrol.head_config import ACTIVATIONS
from hf_recontrol.model_card import is_as_written
from hf_recontrol.value_head import ValueHead

NAMES = ("config.json", "model.safetensors")


@pytest.fixture
def folder(head, tmp_path):
    head.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def sign(folder):
    """Make config.json vouch for whatever model.safetensors holds: what a hostile author can do."""
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def write_weights(folder, tensors):
    (folder / "model.safetensors").write_bytes(safetensors_torch.save(tensors))
    sign(folder)


def write_raw(folder, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    sign(folder)


def parts(folder):
    """The header and the data of model.safetensors."""
    weights = (folder / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8:end]), weights[end:]


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def refused(folder, match):
    with pytest.raises(HeadError, match=match) as caught:
        ValueHead.from_pretrained(folder)
    assert str(caught.value).isprintable()
    return str(caught.value)


# What is saved


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_save_load_save_gives_the_same_bytes(make_head, tmp_path, activation, layers):
    head = make_head(num_hidden_layers=layers, hidden_act=activation, intermediate_size=5, info={"note": "é"})
    head.save_pretrained(tmp_path / "first")
    loaded = ValueHead.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    for name in (*NAMES, "README.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    hidden_states = torch.randn(3, 8)
    torch.testing.assert_close(loaded(hidden_states), head(hidden_states), rtol=0, atol=0)


def test_a_loaded_head_is_an_ordinary_one_in_float32_in_eval_mode(folder):
    with torch.inference_mode():
        head = ValueHead.from_pretrained(folder)
    assert not head.training
    assert all(p.requires_grad and p.dtype == torch.float32 and p.is_leaf for p in head.parameters())
    head(torch.randn(2, 8)).sum().backward()  # not so for tensors made in inference mode


def test_loading_draws_no_random_number(folder):
    state = torch.random.get_rng_state()
    ValueHead.from_pretrained(folder)
    torch.testing.assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)


def test_loading_and_saving_leave_the_head_and_its_config_alone(head, tmp_path):
    before = head.config.to_json_string()
    head.save_pretrained(tmp_path)
    assert head.config.to_json_string() == before


def test_a_head_in_float64_is_saved_in_float32(head, tmp_path):
    head.double().save_pretrained(tmp_path)
    assert ValueHead.from_pretrained(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_into_float32(head, folder, dtype):
    write_weights(folder, {name: tensor.to(dtype) for name, tensor in head.state_dict().items()})
    loaded = ValueHead.from_pretrained(folder)
    for name, tensor in head.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.to(dtype).float(), rtol=0, atol=0)


def test_a_file_changed_after_loading_does_not_change_the_head(folder):
    head = ValueHead.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    os.truncate(path, 3)
    for name, tensor in head.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_subfolder_holds_a_head_of_its_own(head, tmp_path):
    head.save_pretrained(tmp_path / "many" / "one")
    assert isinstance(ValueHead.from_pretrained(tmp_path / "many", subfolder="one"), ValueHead)


def test_saving_twice_replaces_the_head_and_its_card(make_head, folder):
    other = make_head(seed=1)
    other.config.info["data"] = "other texts"
    other.save_pretrained(folder)
    assert "other texts" in (folder / "README.md").read_text()


def test_a_subfolder_that_is_a_link_out_of_the_folder_is_refused(head, tmp_path):
    head.save_pretrained(tmp_path / "elsewhere")
    head.save_pretrained(tmp_path / "many" / "one")
    (tmp_path / "many" / "two").symlink_to(tmp_path / "many" / "one")
    (tmp_path / "many" / "three").symlink_to(tmp_path / "elsewhere")
    ValueHead.from_pretrained(tmp_path / "many", subfolder="two")
    with pytest.raises(HeadError, match="a link that leads out of"):
        ValueHead.from_pretrained(tmp_path / "many", subfolder="three")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_card_is_known_as_written_until_a_word_of_it_changes(head, newline):
    text = head.model_card("user/head").replace("\n", newline)
    assert is_as_written(text.encode())
    assert is_as_written(text.rstrip().encode())
    for edited in (text.replace("reward", "award", 1), text + "More.", "Before.\n" + text, text.replace("Limits", "")):
        assert not is_as_written(edited.encode())
    assert not is_as_written(text[: text.rindex("<!--")].encode())
    assert not is_as_written(b"\xff")


def test_saving_twice_replaces_the_head_and_keeps_a_card_edited_by_hand(make_head, folder):
    (folder / "README.md").write_text("mine")
    other = make_head(seed=1)
    other.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    torch.testing.assert_close(ValueHead.from_pretrained(folder).input_mean, other.input_mean, rtol=0, atol=0)
    other.save_pretrained(folder, replace_model_card=True)
    assert "library_name: hf-recontrol" in (folder / "README.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e5])
def test_a_head_that_diverged_is_not_saved_over_a_good_one(head, folder, value):
    good = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        head.layers[0].weight[1, 1] = value
    with pytest.raises(HeadError, match=r"layers.0.weight holds .* smaller learning rate"):
        head.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == good


def test_weights_that_do_not_fit_the_config_are_not_saved(head, tmp_path):
    head.config.num_hidden_layers = 2
    with pytest.raises(HeadError, match="its config says"):
        head.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_a_save_that_is_interrupted_never_leaves_a_wrong_head(make_head, folder, monkeypatch):
    replaced = []

    def crash_at_the_second(source, target):
        replaced.append(target)
        if len(replaced) == 2:
            raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr("os.replace", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_head(seed=1).save_pretrained(folder)
    refused(folder, "SHA-256")


# Files that are not what they should be


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert "save_pretrained" in refused(folder, f"no {name}")


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "head.pt", "head.pkl", "value.pth"])
def test_a_pickle_is_never_opened(tmp_path, monkeypatch, pickled):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    def forbidden(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    (tmp_path / pickled).write_bytes(pickle.dumps(Bomb()))
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    refused(tmp_path, f"{pickled}.*safetensors only")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("what", ["pickle", "zip", "empty", "text"])
def test_another_kind_of_file_named_safetensors_is_refused(folder, what):
    data = {"pickle": pickle.dumps({"a": 1}), "zip": b"PK\x03\x04" + bytes(99), "empty": b"", "text": b"hello world"}
    (folder / "model.safetensors").write_bytes(data[what])
    sign(folder)
    refused(folder, "not a head's safetensors file")


@pytest.mark.parametrize("name", NAMES)
def test_a_fifo_a_folder_and_a_link_to_itself_are_refused_at_once(folder, name):
    signal.alarm(5)  # a naive open of a FIFO waits forever
    try:
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, "regular file")
        (folder / name).unlink()
        (folder / name).mkdir()
        refused(folder, f"{name} cannot be read")
        (folder / name).rmdir()
        (folder / name).symlink_to(folder / name)
        refused(folder, f"{name} cannot be read")
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "../outside", "/nowhere"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(folder, name, target):
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to(target)
    assert "root:" not in refused(folder, f"{name} is a link that leads out of the folder")


def test_links_within_the_folder_and_to_it_are_followed(folder, tmp_path):
    for name in NAMES:
        (folder / name).rename(folder / f"blob-{name}")
        (folder / name).symlink_to(f"blob-{name}")
    (tmp_path / "alias").symlink_to(folder)
    ValueHead.from_pretrained(folder)
    ValueHead.from_pretrained(tmp_path / "alias")


@pytest.mark.parametrize("subfolder", [None, "one/two"])
def test_a_folder_of_the_hubs_cache_is_read_though_its_files_are_links(folder, tmp_path, subfolder):
    repository = tmp_path / "hub" / "models--user--head"
    snapshot = repository / "snapshots" / "0" / (subfolder or "")
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in NAMES:
        (folder / name).rename(repository / "blobs" / name)
        (snapshot / name).symlink_to(os.path.relpath(repository / "blobs" / name, snapshot))
    ValueHead.from_pretrained(repository / "snapshots" / "0", subfolder=subfolder)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/passwd")
    refused(snapshot, "leads out of the folder")


def test_a_file_larger_than_the_head_can_be_is_not_read(folder):
    os.truncate(folder / "model.safetensors", 4 * 2**30)  # sparse
    refused(folder, r"4294967296 bytes; this head's can have \d+ at most")


def test_an_index_file_that_points_elsewhere_is_ignored(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"input_mean": "/etc/passwd"}}')
    ValueHead.from_pretrained(folder)


# config.json


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b'{"hidden_size": 8, "hidden_size": 9}', "repeated keys"),
        (b'{"hidden_size": 8, "info": {"a": 1, "a": 1}}', "repeated keys"),
        (b"[" * 30_000, "strict JSON"),
        (b'{"hidden_size": 8, "info": {"a": ' + b"[" * 100 + b"]" * 100 + b"}}", "nested"),
        (b'{"hidden_size": NaN}', "NaN is not JSON"),
        (b'{"hidden_size": 8, "info": {"a": -Infinity}}', "Infinity is not JSON"),
        (b'{"hidden_size": 8, "info": {"a": 1e999}}', "info"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "config.json|hidden_size"),
        (b'\xef\xbb\xbf{"hidden_size": 8}', "strict JSON"),
        ('{"hidden_size": 8}'.encode("utf-16"), "strict JSON"),
        (b'{"hidden_size": 8}\xff', "strict JSON"),
        (b'{"hidden_size": 8} {}', "strict JSON"),
        (b'{"hidden_size": 8}' + b" " * 65_536, "at most"),
        (b"[8]", "holds a list"),
        (b"8", "holds a int"),
        (b"null", "holds a NoneType"),
        (b"", "strict JSON"),
        (b'{"hidden_size": 8, "base_model_type": "\\ud800"}', "base_model_type"),
        (b'{"hidden_size": 8}', "no weights_sha256"),
    ],
    ids=range(19),
)
def test_a_config_that_is_not_one_strict_json_object_is_refused(folder, data, match):
    (folder / "config.json").write_bytes(data)
    refused(folder, match)


def test_a_config_larger_than_the_weights_file_is_refused_before_memory_is_taken(folder):
    edit_config(folder, hidden_size=2**13, intermediate_size=2**13)
    refused(folder, "does not|shape")


# model.safetensors


def test_weights_of_another_head_are_refused_by_their_hash(make_head, folder, tmp_path):
    make_head(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(folder / "model.safetensors")
    refused(folder, "SHA-256 .* different heads")


def test_every_truncation_is_refused_with_or_without_a_hash_that_fits(folder):
    weights = (folder / "model.safetensors").read_bytes()
    for length in [*range(32), *range(32, len(weights), 37), len(weights) - 1]:
        (folder / "model.safetensors").write_bytes(weights[:length])
        refused(folder, "SHA-256")
        sign(folder)
        refused(folder, "cannot be loaded")


@pytest.mark.parametrize("extra", [b"\0", b"PK\x05\x06" + bytes(18), b"x" * 64])
@pytest.mark.parametrize("where", ["behind", "before"])
def test_bytes_behind_or_before_the_tensors_are_refused(folder, extra, where):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights + extra if where == "behind" else extra + weights)
    sign(folder)
    refused(folder, "tensors at" if where == "behind" else "cannot be loaded")


@pytest.mark.parametrize("length", [0, 1, 7, 65_537, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be_is_refused(folder, length):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + weights[8:])
    sign(folder)
    refused(folder, "cannot be loaded")


def test_a_header_of_spaces_and_a_thousand_tensors_are_refused(folder):
    write_raw(folder, b"{}" + b" " * 60_000)
    refused(folder, "missing")
    write_raw(folder, b"{}" + b" " * 10_000_000)
    refused(folder, "at most")
    write_raw(folder, {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(1000)})
    refused(folder, "unexpected")


def test_a_header_beyond_its_cap_is_refused_even_in_a_file_that_is_small_enough(head, folder):
    write_weights(folder, {name: tensor.half() for name, tensor in head.state_dict().items()})
    header, data = parts(folder)
    text = json.dumps(header).encode()
    write_raw(folder, text.ljust(64 * 1024), data)
    ValueHead.from_pretrained(folder)
    write_raw(folder, text.ljust(64 * 1024 + 8), data)
    refused(folder, "at most 65536 are allowed")


@pytest.mark.parametrize("name", ["input_mean", "input_std", "layers.0.weight", "layers.1.bias"])
def test_a_missing_a_renamed_and_an_unexpected_tensor_are_named(head, folder, name):
    tensors = dict(head.state_dict())
    write_weights(folder, tensors | {"extra": torch.zeros(1)})
    refused(folder, r"missing \[\], unexpected \['extra'\]")
    tensors["renamed"] = tensors.pop(name)
    write_weights(folder, tensors)
    refused(folder, rf"missing \['{name}'\], unexpected \['renamed'\]")


def test_a_tensor_of_the_right_size_and_another_shape_is_refused(make_head, tmp_path):
    head = make_head(intermediate_size=4)
    head.save_pretrained(tmp_path)
    tensors = dict(head.state_dict())
    write_weights(tmp_path, tensors | {"layers.0.weight": tensors["layers.0.weight"].reshape(8, 4)})
    refused(tmp_path, r"layers.0.weight has shape \[8, 4\]; its config.json implies \[4, 8\]")


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_only_three_float_dtypes_are_read(head, folder, dtype):
    write_weights(folder, {**head.state_dict(), "input_mean": torch.ones(8).to(dtype)})
    refused(folder, "input_mean has dtype .*F32, F16, BF16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 2e4])
@pytest.mark.parametrize("name", ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"])
def test_a_weight_that_is_not_finite_or_absurd_is_refused(head, folder, name, value):
    tensors = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    tensors[name].view(-1)[-1] = value
    write_weights(folder, tensors)
    refused(folder, f"{name} holds a value of magnitude")


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [("input_mean", 1e6, True), ("input_std", 1e6, True), ("input_mean", float("nan"), False)]
    + [("input_std", value, False) for value in (0.0, -1.0, 1e-30, float("nan"), float("inf"))],
)
def test_input_statistics_may_be_large_but_must_be_usable(head, folder, name, value, accepted):
    tensors = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    tensors[name][0] = value
    write_weights(folder, tensors)
    if accepted:
        assert ValueHead.from_pretrained(folder)(torch.zeros(8)).isfinite()
    else:
        refused(folder, name)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [8.0]},
        {"shape": [True] * 8},
        {"shape": [-8]},
        {"shape": [10**18, 0]},
        {"shape": [2**63, 2]},
        {"shape": "8"},
        {"shape": {}},
        {"dtype": ["F32"]},
        {"dtype": None},
        {"dtype": "f32"},
        {"data_offsets": [0]},
        {"data_offsets": [0, 32, 64]},
        {"data_offsets": [-32, 0]},
        {"data_offsets": [4, 36]},
        {"data_offsets": [32, 64]},
        {"data_offsets": [0.0, 32.0]},
        {"data_offsets": [0, 2**70]},
        {"data_offsets": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_header_entry_that_lies_is_refused(folder, entry):
    header, data = parts(folder)
    assert header["input_mean"]["data_offsets"] == [0, 32]
    header["input_mean"] |= entry
    write_raw(folder, header, data)
    refused(folder, "input_mean|tensors at")


def test_a_tensor_listed_twice_is_refused(folder):
    header, data = parts(folder)
    text = json.dumps(header)
    write_raw(folder, (text[:-1] + ', "input_mean": ' + json.dumps(header["input_std"]) + "}").encode(), data)
    refused(folder, "repeated keys")


def test_two_tensors_over_the_same_bytes_are_refused(folder):
    header, data = parts(folder)
    header["input_std"]["data_offsets"] = header["input_mean"]["data_offsets"]
    write_raw(folder, header, data)
    refused(folder, "tensors at")


def test_a_header_that_safetensors_alone_refuses_is_a_head_error_too(folder):
    header, data = parts(folder)
    write_raw(folder, header | {"__metadata__": {"format": 1}}, data)
    refused(folder, "safetensors")


# Names


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 300,
        "user/" + "x" * 10**6,
        "~nobody_is_called_so/head",
        "user/he\0ad",
        "user/\ud800",
        "\u202euser/head",
    ],
    ids=range(7),
)
def test_a_name_that_can_be_none_is_unavailable_and_shown_printably(name, monkeypatch, folder):
    monkeypatch.chdir(folder)  # "" is not the folder one stands in
    with pytest.raises(HeadUnavailable, match=r"neither a folder nor .* Hub repository") as caught:
        ValueHead.from_pretrained(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [1e-40, -1e-42])
def test_a_flood_of_subnormal_weights_is_refused_and_a_few_are_not(head, folder, value):
    tensors = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    tensors["layers.0.weight"].view(-1)[:32] = value  # of 64
    write_weights(folder, tensors)
    ValueHead.from_pretrained(folder)
    tensors["layers.0.weight"].view(-1)[:33] = value
    write_weights(folder, tensors)
    refused(folder, r"layers.0.weight holds mostly values below 1.17549e-38")


def test_a_path_that_leads_nowhere_says_what_was_expected(tmp_path, folder):
    for name in (tmp_path / "nowhere", f"{tmp_path}/nowhere", "./nowhere", "a/b/c", folder / "config.json"):
        with pytest.raises(HeadUnavailable, match=r"neither a folder nor .* Hub repository"):
            ValueHead.from_pretrained(name)


def test_a_folder_has_no_revision(folder, head, tmp_path):
    with pytest.raises(ValueError, match="a folder has no revision 'main'"):
        ValueHead.from_pretrained(folder, revision="main")
    with pytest.raises(ValueError, match="a folder has no revision 'v1'"):
        ValueHead.from_pretrained(f"{folder}@v1")
    head.save_pretrained(tmp_path / "head@v1")  # a folder may be called so
    ValueHead.from_pretrained(tmp_path / "head@v1")
    ValueHead.from_pretrained(f"{tmp_path}/head@v1")


def test_the_revision_is_said_once():
    with pytest.raises(ValueError, match="say the revision once"):
        ValueHead.from_pretrained("user/head@v1", revision="v1")
