"""However a head's bytes travel and whatever goes wrong on the way: the same head, or an error in time, and no token
on another host or in any output."""

import contextlib
import logging
import resource
import time
import traceback

import pytest
from hub_server import READ_TOKEN, TOKEN

from hf_recontrol import hub_deadline
from hf_recontrol.errors import HeadError, HeadUnavailable
from hf_recontrol.value_head import ValueHead

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # the Hub library's own upload by LFS
]


@pytest.fixture
def files(head, tmp_path):
    head.save_pretrained(tmp_path / "files")
    return {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}


@pytest.fixture(params=["regular", "lfs"])
def transport(request, hub, monkeypatch):
    """How model.safetensors travels."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.lfs = (".safetensors",) if request.param == "lfs" else ()
    return request.param


@pytest.fixture
def no_waiting(monkeypatch):
    """The Hub library pauses between its tries; not here."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def weights_at(transport):
    """What the path of a request for the weights themselves contains."""
    return "/storage/" if transport == "lfs" else "model.safetensors"


def same(left, right):
    return left.digest() == right.digest()


def downloads(hub, where):
    """How often a path that contains `where` was asked for with its body."""
    return sum(request.method == "GET" and where in request.path for request in hub.log)


# Both transports


def test_a_head_goes_and_comes_by_either_transport_and_its_storage_sees_no_token(hub, head, make_head, transport):
    head.push_to_hub("user/new", token=TOKEN, private=True)
    make_head(seed=1).push_to_hub("user/new", token=TOKEN, revision="other")
    assert same(head, ValueHead.from_pretrained("user/new", token=READ_TOKEN))
    assert same(make_head(seed=1), ValueHead.from_pretrained("user/new@other", token=READ_TOKEN))
    assert len(hub.storage) == (2 if transport == "lfs" else 0)
    assert ("localhost" in {request.headers["Host"].split(":")[0] for request in hub.log}) == (transport == "lfs")
    assert hub.hosts_of_tokens() == {"127.0.0.1"}


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
@pytest.mark.usefixtures("no_waiting")
def test_weights_that_their_storage_withholds_are_unavailable(hub, files, transport, status):
    hub.add("user/head", files)
    hub.fail(weights_at(transport), method="GET", status=status)
    with pytest.raises(HeadUnavailable, match=r"user/head"):
        ValueHead.from_pretrained("user/head", token=READ_TOKEN)


@pytest.mark.usefixtures("no_waiting")
def test_weights_that_break_off_are_unavailable_and_nothing_half_is_kept(hub, head, files, transport):
    hub.add("user/head", files)
    hub.fail(weights_at(transport), method="GET", cut=10)
    with pytest.raises(HeadUnavailable, match=r"could not be reached|had now"):
        ValueHead.from_pretrained("user/head")
    hub.faults.clear()
    assert same(head, ValueHead.from_pretrained("user/head"))


@pytest.mark.parametrize("part", ["config.json", "weights"])
def test_wrong_bytes_of_the_right_length_are_fetched_once_more(hub, head, files, transport, part):
    hub.add("user/head", files)
    where = weights_at(transport) if part == "weights" else part
    hub.fail(where, method="GET", wrong=True)
    with pytest.raises(HeadError, match=r"SHA-256|strict JSON"):
        ValueHead.from_pretrained("user/head")
    assert downloads(hub, where) == 2
    with pytest.raises(HeadError, match=r"SHA-256|strict JSON"):
        ValueHead.from_pretrained("user/head", local_files_only=True)
    hub.faults.clear()
    assert same(head, ValueHead.from_pretrained("user/head"))  # what is damaged in the cache does not stay there
    assert same(head, ValueHead.from_pretrained("user/head", local_files_only=True))


@pytest.mark.usefixtures("no_waiting")
def test_a_push_whose_upload_fails_leaves_the_old_head_whole(hub, head, make_head, transport):
    head.push_to_hub("user/new", token=TOKEN)
    for where in ("/info/lfs/", "/storage/") if transport == "lfs" else ("/commit/",):
        hub.faults.clear()
        hub.fail(where, status=500)
        with pytest.raises(HeadUnavailable, match=r"not pushed to 'user/new'"):
            make_head(seed=1).push_to_hub("user/new", token=TOKEN)
        hub.faults.clear()
        assert same(head, ValueHead.from_pretrained("user/new"))


# Sizes, asked for before anything is downloaded


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_larger_than_the_head_can_be_is_not_downloaded(hub, files, transport, name):
    hub.add("user/head", files | {name: bytes(1_000_000)})
    with pytest.raises(HeadError, match=rf"{name} has 1000000 bytes; this head's can have \d+ at most"):
        ValueHead.from_pretrained("user/head")
    assert downloads(hub, name) == downloads(hub, "/storage/") == 0


def test_a_cached_head_costs_one_request_and_a_pinned_one_none(hub, files):
    commit = hub.add("user/head", files)
    ValueHead.from_pretrained("user/head")
    for name, requests in (("user/head", 1), (f"user/head@{commit}", 0)):
        hub.log.clear()
        ValueHead.from_pretrained(name)
        assert [request.method for request in hub.log] == ["HEAD"] * requests


# Other hosts


@pytest.mark.parametrize(
    ("where", "method"), [("/resolve/", "HEAD"), ("/resolve/", "GET"), ("/api/", "GET"), ("/api/", "POST")]
)
@pytest.mark.usefixtures("no_waiting")
def test_a_redirect_to_another_host_does_not_take_the_token_along(hub, head, files, transport, where, method):
    hub.add("user/head", files, private=True)
    hub.fail(where, method=method, location=f"{hub.storage_url}/elsewhere")
    for ask in (
        lambda: ValueHead.from_pretrained("user/head", token=READ_TOKEN),
        lambda: head.push_to_hub("user/head", token=TOKEN),
        lambda: head.push_to_hub("user/new", token=TOKEN),
    ):
        with contextlib.suppress(HeadUnavailable):
            ask()
    followed = any(path.startswith("/elsewhere/") for path in hub.paths())
    assert followed == ((where, method) != ("/resolve/", "HEAD"))  # there the Hub library follows to its own hosts only
    assert hub.hosts_of_tokens() == {"127.0.0.1"}


def test_a_repository_that_was_renamed_is_found_under_its_old_name(hub, head, files):
    hub.add("user/head", files, private=True)
    hub.moved["user/old"] = "user/head"
    assert same(head, ValueHead.from_pretrained("user/old", token=READ_TOKEN))


# Time


@pytest.fixture
def short(hub, monkeypatch):
    """A deadline of 0.4 s; what waits is woken at the end."""
    monkeypatch.setattr(hub_deadline, "DEADLINE_SECONDS", 0.4)
    yield
    hub.wake()


@pytest.mark.parametrize(
    "fault",
    [
        {"where": "config.json", "seconds": 60},
        {"where": "config.json", "method": "GET", "cut": 10, "seconds": 60},
        {"where": "weights", "seconds": 60},
        {"where": "weights", "method": "GET", "cut": 10, "seconds": 60},
    ],
    ids=["config", "config's body", "weights", "weights' body"],
)
@pytest.mark.usefixtures("short")
def test_a_hub_that_hangs_is_left_at_the_deadline_wherever_it_does(hub, files, transport, fault):
    hub.add("user/head", files)
    hub.fail(**fault | {"where": fault["where"].replace("weights", weights_at(transport))})
    with pytest.raises(HeadUnavailable, match="no answer from the Hub in time"):
        ValueHead.from_pretrained("user/head")


@pytest.mark.parametrize("where", ["weights", "weights' body"])
@pytest.mark.usefixtures("short")
def test_a_large_head_gives_a_hub_that_hangs_no_more_time(hub, make_head, transport, where):
    """4 MB: at 100 kB/s they would take 40 s."""
    head = make_head(1024)
    head.push_to_hub("user/head", token=TOKEN)
    body = {"method": "GET", "cut": 10} if where == "weights' body" else {}
    hub.fail(weights_at(transport), seconds=60, **body)
    start = time.monotonic()
    with pytest.raises(HeadUnavailable, match="no answer from the Hub in time"):
        ValueHead.from_pretrained("user/head")
    assert time.monotonic() - start < 10


def test_the_files_of_a_head_have_one_deadline_together(hub, files, monkeypatch):
    rests, remaining = [], hub_deadline.Deadline.remaining
    monkeypatch.setattr(hub_deadline.Deadline, "remaining", lambda self: rests.append(remaining(self)) or rests[-1])
    hub.add("user/head", files)
    hub.fail("config.json", method="HEAD", seconds=0.1)
    ValueHead.from_pretrained("user/head")
    config, weights = rests
    assert weights < config - 0.05


def test_bytes_that_come_put_the_deadline_off_if_they_come_fast_enough(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(hub_deadline.time, "monotonic", lambda: now[0])
    deadline = hub_deadline.Deadline()
    assert deadline.remaining() == 30
    now[0] = 20
    deadline.received(10**9)
    assert deadline.remaining() == 30  # from the last byte
    slow = hub_deadline.Deadline()
    for second in range(1, 30):
        now[0] = 20 + second
        slow.received(50_000)
    assert slow.remaining() == pytest.approx(1 + 29 * 50_000 / 100_000)
    assert hub_deadline.Deadline(sent=10**6).remaining() == 40


@pytest.mark.parametrize("where", ["/repos/create", "/branch/", "/revision/", "/preupload/", "/commit/"])
@pytest.mark.usefixtures("short")
def test_a_push_to_a_hub_that_hangs_is_left_at_the_deadline(hub, head, files, where):
    hub.add("user/head", files)
    hub.fail(where, seconds=60)
    with pytest.raises(HeadUnavailable, match=r"not pushed to 'user/head'.*no answer from the Hub in time"):
        head.push_to_hub("user/head", token=TOKEN, revision="other")


# The cache


def test_a_cache_that_is_full_is_named(hub, make_head, tmp_path):
    head = make_head(64)
    head.push_to_hub("user/new", token=TOKEN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # then a longer file cannot be written: EFBIG
    try:
        with pytest.raises(HeadUnavailable, match=r"cannot be kept in the cache, which is full.*cache_dir="):
            ValueHead.from_pretrained("user/new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(head, ValueHead.from_pretrained("user/new"))


def test_a_cache_that_cannot_be_made_is_named(hub, files, tmp_path):
    hub.add("user/head", files)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(HeadUnavailable, match="cannot be kept in the cache"):
        ValueHead.from_pretrained("user/head", cache_dir=tmp_path / "file")


# The token


@pytest.mark.usefixtures("no_waiting")
def test_no_token_is_in_any_output_file_or_error(hub, head, files, transport, tmp_path, caplog, capfd, monkeypatch):
    """With every logger at its most talkative; through what goes well, what is refused and what fails."""
    caplog.set_level(logging.DEBUG)
    for name in ("huggingface_hub", "hf_recontrol", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    hub.add("user/private", files, private=True)
    hub.add("user/broken", files | {"config.json": b"{"}, private=True)
    said = []

    def attempt(ask, error):
        with pytest.raises(error) as caught:
            ask()
        said.append("".join(traceback.format_exception(caught.value)))

    def pull(name="user/private", token=READ_TOKEN, **arguments):
        return ValueHead.from_pretrained(name, token=token, cache_dir=tmp_path / "cache", **arguments)

    head.push_to_hub("user/new", token=TOKEN, private=True)
    head.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="user/saved", token=TOKEN)
    pull()
    attempt(lambda: pull("user/broken"), HeadError)
    attempt(lambda: pull("user/nothing"), HeadUnavailable)
    attempt(lambda: pull(revision="v9"), HeadUnavailable)
    attempt(lambda: head.push_to_hub("user/other", token=READ_TOKEN), HeadUnavailable)
    for status in (401, 403, 429, 500):
        hub.faults.clear()
        hub.fail("/", status=status)
        attempt(lambda: pull("user/new"), HeadUnavailable)
        attempt(lambda: head.push_to_hub("user/new", token=TOKEN), HeadUnavailable)
    printed = "".join(capfd.readouterr())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    commits = [files for repository in hub.repositories.values() for files in repository.commits.values()]
    sent = [data for files in commits for data in files.values()]
    assert "user/private" in caplog.text  # the loggers do talk
    for token in (TOKEN, READ_TOKEN):
        assert token not in caplog.text + printed + "".join(said)
        assert not any(token.encode() in data for data in written + sent + list(hub.storage.values()))
