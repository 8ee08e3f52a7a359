"""Heads that a config names are those registered in this process; nothing else is ever loaded."""

import sys
import threading
import time
from math import inf, nan

import pytest
from hub_server import READ_TOKEN
from steered import GREEDY, STEER, asked, calibrated, named, on_the_hub, stock_tokens, tokens
from test_generation import NoToken
from tiny import prompts, tiny_head, tiny_model
from transformers import (
    GenerationConfig,
)

from hf_recontrol import (
    HeadError,
    HeadUnavailable,
    ValueHead,
    enable_recontrol,
    register_value_heads,
    registry,
)

pytestmark = pytest.mark.versions


@pytest.fixture
def model():
    return enable_recontrol(tiny_model())


@pytest.fixture
def head():
    return tiny_head()


# Heads that a config names


@pytest.mark.parametrize("where", ["call", "positional", "model"])
def test_a_config_may_name_registered_heads_and_say_how_hard(model, where):
    heads = {"polite": calibrated(1), "brief": calibrated(2)}
    register_value_heads(heads)
    plain = tokens(model)
    for config, keywords in (
        (named(step_size=2.0, num_steps=3), {"recontrol_value_head": heads["polite"], **STEER}),
        (named(strength=0.3), {"recontrol_value_head": heads["polite"], "recontrol_strength": 0.3}),
        (
            named({"polite": 1.0, "brief": -0.5}, step_size=2.0),
            {"recontrol_value_head": {heads["polite"]: 1.0, heads["brief"]: -0.5}, "recontrol_step_size": 2.0},
        ),
    ):
        expected = tokens(model, **keywords)
        if where == "positional":
            actual = model.generate(None, config, **prompts(), **GREEDY).tolist()
        elif where == "call":
            actual = tokens(model, generation_config=config)
        else:
            other = enable_recontrol(tiny_model())
            other.generation_config = config
            actual = tokens(other, pad_token_id=0)
        assert actual == expected
        assert actual != plain


def test_two_names_in_a_config_of_one_head_add_up(model, head):
    register_value_heads({"polite": head, "kind": head})
    expected = tokens(model, recontrol_value_head={head: 1.25}, **STEER)
    config = named({"polite": 2.0, "kind": -0.75})
    assert tokens(model, generation_config=config, **STEER) == expected


@pytest.mark.parametrize("where", ["given", "model's"])
def test_a_head_that_is_not_registered_is_an_error_that_loads_nothing(model, head, hub, where, tmp_path, monkeypatch):
    """Neither a folder of that name nor a repository is looked at: data does not choose what is read."""
    on_the_hub(hub, "user/head", head, tmp_path / "files")
    head.save_pretrained(tmp_path / "user" / "head")
    head.save_pretrained(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    register_value_heads({"polite": head})
    monkeypatch.setattr(ValueHead, "from_pretrained", lambda *args, **kwargs: pytest.fail("a config loaded a head"))
    touched = watch_files(monkeypatch)
    for name in ("user/head", f"user/head@{'0' * 40}", "folder", str(tmp_path / "folder"), "./folder", "nowhere/head"):
        for wanted in (name, {name: 1.0}, {"polite": 1.0, name: 1.0}):
            given = {"generation_config": named(wanted)} if where == "given" else {}
            if where == "model's":
                model.generation_config = named(wanted)
            with pytest.raises(ValueError, match=f"^The {where} generation config names the head '") as caught:
                model.generate(**prompts(), streamer=NoToken(), **given)
            for words in ("not registered in this process (registered: 'polite')", "register_value_heads({"):
                assert words in str(caught.value)
            assert "model.set_recontrol_defaults(value_head=" in str(caught.value)
    assert not [path for path in touched if path.startswith((str(tmp_path), "user", "folder", "./folder", "nowhere"))]
    assert not hub.log
    assert tokens(model, recontrol_value_head=False, pad_token_id=0) == stock_tokens()  # plain text for the asking


def watch_files(monkeypatch):
    """A list that fills with the paths that are looked at from here on."""
    touched = []
    for name in ("builtins.open", "io.open", "os.stat", "os.listdir", "os.scandir"):
        module, function = name.split(".")
        stock = getattr(sys.modules[module], function)
        monkeypatch.setattr(
            name, lambda path=".", *a, stock=stock, **k: touched.append(str(path)) or stock(path, *a, **k)
        )
    return touched


HOSTILE = [
    {"recontrol_token": "hf_stolen"},
    {"recontrol_revision": "main"},
    {"recontrol_config": {"step_size": 1e6}},
    {"recontrol_path": "/etc"},
    {"recontrol_": 1},
    {"recontrol_value_head": True},
    {"recontrol_value_head": 3},
    {"recontrol_value_head": ["polite"]},
    {"recontrol_value_head": {}},
    {"recontrol_value_head": ""},
    {"recontrol_value_head": {"polite": 1.0, 3: 1.0}},
    {"recontrol_value_head": {"polite": "1"}},
    {"recontrol_value_head": {"polite": nan}},
    {"recontrol_value_head": {"polite": inf}},
    {"recontrol_value_head": {"polite": True}},
    {"recontrol_value_head": {"polite": {"polite": 1.0}}},
    {"recontrol_value_head": {"polite": 0}},
    {"recontrol_step_size": "1"},
    {"recontrol_step_size": -1},
    {"recontrol_step_size": nan},
    {"recontrol_num_steps": 10**9},
    {"recontrol_num_steps": 1.0},
    {"recontrol_strength": True},
    {"recontrol_strength": 0.1, "recontrol_step_size": 0.1},
    {"recontrol_max_kl": {}},
    {"recontrol_max_relative_norm": 0},
    {"recontrol_regularization": [0.1]},
    {"recontrol_target_value": "/etc/passwd"},
    {"recontrol_strict": "yes"},
    {"recontrol_trace": 1},
]


@pytest.mark.parametrize("said", HOSTILE, ids=str)
@pytest.mark.parametrize("where", ["given", "model's"])
def test_a_config_that_says_more_than_it_may_is_refused_and_false_still_gives_plain_text(model, head, said, where):
    register_value_heads({"polite": head})
    config = GenerationConfig(**({"recontrol_value_head": "polite"} | said))
    if where == "model's":
        model.generation_config = config
    given = {"generation_config": config} if where == "given" else {}
    with pytest.raises(ValueError, match=r"recontrol_|weight is|is .*; it must be|Give one of the two"):
        model.generate(**prompts(), streamer=NoToken(), **given)
    assert tokens(model, recontrol_value_head=False, pad_token_id=0, **given) == stock_tokens()


@pytest.mark.parametrize(
    "said",
    [
        *({f"recontrol_{name}": 10**400} for name in ("step_size", "strength", "max_relative_norm", "target_value")),
        {"recontrol_value_head": {"polite": 10**400}},
        {"recontrol_value_head": {"polite": "x", "kind": 1.0}},  # two names of one head: their sum is none
        {"recontrol_value_head": ["x" * 10**6]},
        {"recontrol_value_head": "x" * 10**6},
        {"recontrol_step_size": "x" * 10**6},
        {"recontrol_strict": "x" * 10**6},
        {"recontrol_" + "x" * 10**6: 1},
    ],
    ids=lambda said: f"{next(iter(said))[:30]}",
)
def test_what_a_hostile_config_says_is_no_crash_and_is_not_repeated_at_length(model, head, said):
    register_value_heads({"polite": head, "kind": head})
    config = GenerationConfig(**({"recontrol_value_head": "polite"} | said))
    with pytest.raises(ValueError, match=r"recontrol_|weight|must be") as caught:
        model.generate(**prompts(), streamer=NoToken(), generation_config=config)
    assert len(str(caught.value)) < 1000


# register_value_heads


def test_registering_is_all_or_nothing(head, tmp_path):
    register_value_heads({"polite": head})
    other = tiny_head(1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for bad, error in (
        (tmp_path / "broken", HeadError),
        (str(tmp_path / "nowhere"), HeadUnavailable),
        (3, TypeError),
        ([other], TypeError),
    ):
        for names in (("polite", "new", "bad"), ("bad", "polite", "new")):
            with pytest.raises(error):
                register_value_heads({name: bad if name == "bad" else other for name in names})
            assert list(registry._REGISTERED.items()) == [("polite", head)]
    with pytest.raises(TypeError, match="pass a dict from names to heads"):
        register_value_heads(["polite"])


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "x" * 513, 3, None, ("polite",)])
def test_a_name_is_a_short_printable_text(head, name):
    with pytest.raises(ValueError, match=r"name is .* 1 to 512 printable characters") as caught:
        register_value_heads({"fine": head, name: head})
    assert str(caught.value).isprintable()
    assert not registry._REGISTERED


def test_a_name_is_replaced_and_taken_off(model, head):
    other = tiny_head(1)
    register_value_heads({"polite": head, "brief": other, "x" * 512: head})
    register_value_heads({"polite": other})
    assert asked(model, named()).controller.heads == [other]
    register_value_heads({"polite": None, "never there": None})
    with pytest.raises(ValueError, match=r"'polite', which is not registered .*\(registered: 'brief', "):
        asked(model, named())
    assert asked(model, named("brief")).controller.heads == [other]


def test_a_name_that_is_replaced_is_there_at_every_moment():
    """At every line of register_value_heads: another thread may generate just then."""
    register_value_heads({"polite": tiny_head(1)})
    there = []

    def watch(frame, event, argument):
        there.append("polite" in registry._REGISTERED)
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        register_value_heads({"polite": tiny_head(2)})
    finally:
        sys.settrace(before)
    assert len(there) > 10
    assert all(there)


def test_a_registered_head_stays_what_it_was_when_its_folder_changes(model, head, tmp_path):
    head.save_pretrained(tmp_path)
    register_value_heads({"polite": tmp_path})
    model.set_recontrol_defaults(tmp_path, step_size=2.0, num_steps=3)
    expected = tokens(model, recontrol_value_head=head, **STEER)
    tiny_head(1).save_pretrained(tmp_path)
    assert tokens(model) == expected
    assert tokens(model, generation_config=named(step_size=2.0, num_steps=3)) == expected
    assert tokens(model, recontrol_value_head=tmp_path, **STEER) != expected  # a call reads what is there now


def test_a_registered_head_of_the_hub_stays_at_its_commit_and_is_asked_for_once(model, head, hub, tmp_path):
    on_the_hub(hub, "user/head", head, tmp_path / "old")
    register_value_heads({"polite": "user/head"})
    tiny_head(1).save_pretrained(tmp_path / "new")
    hub.repositories["user/head"].commit({path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()})
    asked_before = len(hub.log)
    expected = tokens(model, recontrol_value_head=head, **STEER)
    assert tokens(model, generation_config=named(step_size=2.0, num_steps=3)) == expected
    assert len(hub.log) == asked_before > 0


def test_a_private_head_is_registered_with_its_token(model, head, hub, tmp_path):
    on_the_hub(hub, "user/private", head, tmp_path)
    hub.repositories["user/private"].private = True
    with pytest.raises(HeadUnavailable):
        register_value_heads({"polite": "user/private"})
    register_value_heads({"polite": "user/private"}, token=READ_TOKEN)
    expected = tokens(model, recontrol_value_head=head, **STEER)
    assert tokens(model, generation_config=named(step_size=2.0, num_steps=3)) == expected


def test_threads_may_register_and_generate_at_once(model):
    heads = {f"head {i}": tiny_head(i) for i in range(4)}
    expected = {name: tokens(model, recontrol_value_head=head, **STEER) for name, head in heads.items()}
    assert len({str(output) for output in expected.values()}) == 4
    wrong, done = [], []

    def work(name):
        for i in range(10):
            register_value_heads({name: heads[name], f"{name} {i}": heads[name]})
            if tokens(model, generation_config=named(name), **STEER) != expected[name]:
                wrong.append(name)
        done.append(name)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(name,)) for name in heads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert (wrong, sorted(done)) == ([], sorted(heads))


@pytest.mark.parametrize("names", [["polite"], ["polite", "brief"]])
def test_a_name_may_be_taken_off_while_it_is_looked_up(names):
    """At each line of the look-up in turn another thread may take it off: the head, or the error that says so."""
    outcomes = [looked_up_while_taken_off(names, line) for line in range(1, 12)]
    assert "not registered" in "".join(outcome for outcome in outcomes if isinstance(outcome, str))
    assert any(isinstance(outcome, ValueHead) for outcome in outcomes)


def looked_up_while_taken_off(names, line):
    """The head, or the text of the ValueError."""
    register_value_heads(dict.fromkeys(["polite", "brief"], tiny_head()))
    seen = 0

    def take_off(frame, event, argument):
        nonlocal seen
        seen += 1
        if seen == line:
            register_value_heads(dict.fromkeys(names))
        return take_off

    before = sys.gettrace()
    sys.settrace(take_off)
    try:
        return registry.registered_head("polite", "given generation config")
    except ValueError as error:
        return str(error)
    finally:
        sys.settrace(before)


# Heads that calls name, read once per process


def together(threads, function):
    """What function() gives, or raises, in each of so many threads that start at once."""
    barrier, outcomes = threading.Barrier(threads), []

    def run():
        barrier.wait(30)
        try:
            outcomes.append(function())
        except (HeadError, HeadUnavailable) as error:
            outcomes.append(error)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert len(outcomes) == threads
    return outcomes


@pytest.fixture
def waiting(monkeypatch):
    """A list with an entry for each time that a thread began to wait for a head."""
    entries = []

    class Counted(registry.Future):
        def result(self, timeout=None):
            entries.append(threading.current_thread())
            return super().result(timeout)

    monkeypatch.setattr(registry, "Future", Counted)
    return entries


def test_sixteen_threads_that_ask_for_one_id_download_it_once(head, hub, tmp_path):
    on_the_hub(hub, "user/head", head, tmp_path)
    hub.fail("config.json", method="HEAD", seconds=0.2)  # so that all are there before the first is through
    heads = together(16, lambda: registry.load_head("user/head"))
    assert len(set(map(id, heads))) == 1
    downloads = [request.path for request in hub.log if request.method == "GET"]
    assert sorted(path.rpartition("/")[2] for path in downloads) == ["config.json", "model.safetensors"]


def test_a_load_that_fails_fails_for_all_who_wait_and_is_tried_again_by_the_next(
    head, hub, tmp_path, monkeypatch, waiting
):
    tries = []
    stock = registry.Head.from_pretrained

    def counted(*args, **kwargs):
        tries.append(args)
        while len(waiting) < 7:  # until the others are here
            time.sleep(0.01)
        return stock(*args, **kwargs)

    monkeypatch.setattr(registry.Head, "from_pretrained", counted)
    errors = together(8, lambda: registry.load_head("user/head"))
    assert all(isinstance(error, HeadUnavailable) for error in errors)
    assert len(tries) == 1
    on_the_hub(hub, "user/head", head, tmp_path)
    assert registry.load_head("user/head").digest() == head.digest()
    assert registry.load_head("user/head") is registry.load_head("user/head")
    assert len(tries) == 2


@pytest.mark.parametrize("damage", ["cut", "wrong"])
def test_a_damaged_download_is_not_remembered(head, hub, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the Hub library pauses between its tries
    on_the_hub(hub, "user/head", head, tmp_path)
    hub.fail("config.json", method="GET", **{damage: 1})
    with pytest.raises((HeadError, HeadUnavailable)):
        registry.load_head("user/head")
    hub.faults.clear()
    assert registry.load_head("user/head").digest() == head.digest()


def test_a_hub_that_hangs_keeps_nobody_from_the_heads_that_are_here(head, hub, tmp_path):
    on_the_hub(hub, "user/head", head, tmp_path / "one")
    on_the_hub(hub, "user/slow", tiny_head(1), tmp_path / "two")
    here = registry.load_head("user/head")
    hub.fail("user/slow", seconds=60)
    waiting = threading.Thread(target=lambda: together(1, lambda: registry.load_head("user/slow")))
    waiting.start()
    while not any("user/slow" in path for path in hub.paths()):
        time.sleep(0.01)
    assert registry.load_head("user/head") is here  # while the other thread waits
    assert waiting.is_alive()
    hub.wake()
    waiting.join(60)


def test_an_interrupted_load_is_an_error_for_who_waits_and_is_tried_again(head, waiting):
    cache, begun = registry._HeadCache(), threading.Event()

    def interrupted():
        begun.set()
        while not waiting:
            time.sleep(0.01)
        raise KeyboardInterrupt

    def interrupted_get():
        with pytest.raises(KeyboardInterrupt):
            cache.get(("head",), interrupted)

    loading = threading.Thread(target=interrupted_get)
    loading.start()
    begun.wait(30)
    with pytest.raises(HeadUnavailable, match=r"interrupted\. Call again"):
        cache.get(("head",), lambda: pytest.fail("it is loading already"))
    loading.join(30)
    assert cache.get(("head",), lambda: head) is head


def test_a_head_swapped_on_the_hub_while_it_serves_changes_nothing_until_it_is_loaded_anew(model, head, hub, tmp_path):
    on_the_hub(hub, "user/head", head, tmp_path / "old")
    old, new = (tokens(model, recontrol_value_head=one, **STEER) for one in (head, tiny_head(1)))
    assert tokens(model, recontrol_value_head="user/head", **STEER) == old != new
    tiny_head(1).save_pretrained(tmp_path / "new")
    hub.repositories["user/head"].commit({path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()})
    asked_before = len(hub.log)
    for outcome in together(4, lambda: tokens(model, recontrol_value_head="user/head", **STEER)):
        assert outcome == old
    assert len(hub.log) == asked_before
    reloaded = ValueHead.from_pretrained("user/head")
    assert tokens(model, recontrol_value_head=reloaded, **STEER) == new
