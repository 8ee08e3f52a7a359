"""A Hugging Face Hub in memory, on 127.0.0.1: model repositories with commits, a request log, and faults on demand.

It answers what huggingface_hub 1 and 2 ask when heads are pulled and pushed. Every file is sent inside the commit
("regular" upload) unless `lfs` names it: then it goes by git LFS, to and from a storage of another host name, which
refuses requests that carry a token. No Xet.
"""

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_testerMayWrite"
READ_TOKEN = "hf_testerMayOnlyRead"
REFUSAL = "as asked"


@dataclass
class Request:
    method: str
    path: str
    headers: Message
    """Its names are found in any case."""


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    """Tags too."""

    def commit(
        self, files: Mapping[str, bytes], branch: str = "main", *, keep: bool = True, deleted: Sequence[str] = ()
    ) -> str:
        """Add a commit that changes `files` and takes `deleted` away, and return its id."""
        before = self.commits.get(self.branches.get(branch, ""), {}) if keep else {}
        before = {name: data for name, data in before.items() if name not in deleted}
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = {**before, **files}
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `where`."""

    where: str
    status: int | None = None
    method: str | None = None
    seconds: float = 0.0
    """Wait before answering."""
    cut: int = 0
    """Bytes of the body that are not sent, though the header promises them; after `seconds` the connection ends."""
    wrong: bool = False
    """The body has its length, but its last byte is another."""
    location: str = ""
    """The beginning of a URL to which the request is redirected."""
    times: int = 10**9


class HubServer:
    """Start it, point HF_ENDPOINT at `url`, and put repositories in."""

    def __init__(self) -> None:
        self.reset()
        self.woken = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.storage_url = f"http://localhost:{self._server.server_address[1]}"
        """The same server under the name of another host."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lfs: tuple[str, ...] = ()
        """Endings of the names of files that go by LFS."""
        self.storage: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        """Old repository id → new one."""

    def add(self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False) -> str:
        """Make a repository with one commit, and return the commit's id."""
        self.repositories[repo_id] = Repository(private, gated)
        return self.repositories[repo_id].commit(files)

    def fail(self, where: str, **fault: object) -> None:
        self.faults.append(Fault(where, **fault))  # type: ignore[arg-type]

    def paths(self, method: str | None = None) -> list[str]:
        """The paths asked for so far, in order."""
        return [request.path for request in self.log if method in (None, request.method)]

    def hosts_of_tokens(self) -> set[str]:
        """The host names to which a request with an access token went."""
        return {request.headers["Host"].split(":")[0] for request in self.log if "Authorization" in request.headers}

    def wake(self) -> None:
        """End every fault and every wait, and let the threads finish that were left at a deadline."""
        self.faults.clear()
        self.woken.set()
        for thread in threading.enumerate():
            if thread.name == "hf-recontrol-hub":
                thread.join(60)
        self.woken = threading.Event()

    def stop(self) -> None:
        self.woken.set()
        self._server.shutdown()
        self._server.server_close()


def _card_data(card: bytes) -> dict[str, Any]:
    parts = card.decode().split("---\n")
    return yaml.safe_load(parts[1]) if len(parts) > 2 else {}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left is no news; and on Python 3.11 two threads may not format tracebacks at once."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        self._answer_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 (the names that http.server calls)

    def _answer_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        split = urlsplit(self.path)
        self.path = split.path
        self.query = parse_qs(split.query)
        self.hub.log.append(Request(self.command, self.path, self.headers))
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.fault = Fault("")
        for fault in self.hub.faults:
            if fault.where in self.path and fault.method in (None, self.command) and fault.times > 0:
                fault.times -= 1
                self.fault = fault
                if fault.seconds and not fault.cut and self.hub.woken.wait(fault.seconds):
                    self.close_connection = True
                    return
                if fault.location:
                    return self._redirect(fault.location + self.path)
                if fault.status:
                    return self._error(fault.status, "" if fault.status != 404 else "EntryNotFound")
        for old, new in self.hub.moved.items():
            if f"/{old}/" in f"{self.path}/":
                return self._redirect(self.path.replace(old, new))
        parts = [unquote(part) for part in self.path.strip("/").split("/")]
        if parts[0] == "storage":
            return self._store(parts[1], body)
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            return self._lfs(json.loads(body))
        if parts[0] == "api":
            return self._api(parts[1:], body)
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._error(404)

    def _api(self, parts: list[str], body: bytes) -> None:
        if parts[0] == "whoami-v2":
            user = {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            return self._json(user) if self.token in (TOKEN, READ_TOKEN) else self._error(401)
        if parts == ["validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts == ["repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["models"]:
            return self._list()
        if parts == ["repos", "delete"]:
            return self._delete(json.loads(body))
        repo_id, action = "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "revision"
        repository = self._visible(repo_id)
        if repository is None:
            return None
        if self.command == "POST" and self.token != TOKEN and action != "paths-info":
            return self._error(403 if self.token else 401)
        revision = parts[4] if len(parts) > 4 else "main"
        if action == "branch":
            if revision in repository.branches:
                return self._error(409)
            repository.branches[revision] = repository.branches["main"]
            return self._json({})
        sha = repository.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound")
        if action == "tag":
            repository.branches[json.loads(body)["tag"]] = sha
            return self._json({})
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(self.hub.lfs) else "regular" for path in paths}
            return self._json(
                {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]}
            )
        if action == "tree":
            return self._tree(repository.commits[sha], "".join(f"{part}/" for part in parts[5:]))
        if action == "commit":
            return self._commit(repo_id, repository, revision, body)
        commit, blobs = repository.commits[sha], "blobs" in self.query
        files = [{"rfilename": name} | ({"size": len(commit[name])} if blobs else {}) for name in sorted(commit)]
        info = {"_id": "0", "id": repo_id, "sha": sha, "private": repository.private, "tags": [], "downloads": 0}
        return self._json({**info, "siblings": files})

    def _tree(self, files: Mapping[str, bytes], folder: str) -> None:
        """The files of a folder, and of those in it."""
        found = [name for name in files if name.startswith(folder)]
        if not found:
            return self._error(404, "EntryNotFound")
        entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in found]
        return self._json(entries)

    def _list(self) -> None:
        """The public repositories that have all tags that are asked for, as `expand` of cardData, tags and counts."""
        wanted, found = set(self.query.get("filter", [])), []
        for repo_id, repository in self.hub.repositories.items():
            card = _card_data(repository.commits[repository.branches["main"]].get("README.md", b""))
            relation = card.get("base_model_relation")
            base = [f"base_model:{card.get('base_model')}", f"base_model:{relation}:{card.get('base_model')}"]
            tags = [*card.get("tags", []), *(base if "base_model" in card else []), str(card.get("library_name"))]
            tags += [f"license:{card['license']}"] if "license" in card else []
            if wanted <= set(tags) and not repository.private:
                expanded = {"tags": tags, "cardData": card, "downloads": len(repo_id)}
                asked = {name: expanded[name] for name in self.query.get("expand", []) if name in expanded}
                found.append({"_id": "0", "id": repo_id, **asked})
        limit = int(self.query.get("limit", ["1000"])[0])
        return self._json(found[:limit])

    def _create(self, wanted: Mapping[str, object]) -> None:
        if self.token != TOKEN:
            return self._error(403 if self.token else 401)
        repo_id = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        if repo_id in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, status=409)
        self.hub.add(
            repo_id,
            {".gitattributes": b""},
            private=bool(wanted.get("private")) or wanted.get("visibility") == "private",
        )
        return self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def _delete(self, wanted: Mapping[str, object]) -> None:
        if self.token != TOKEN:
            return self._error(403 if self.token else 401)
        del self.hub.repositories[f"{wanted.get('organization') or 'user'}/{wanted['name']}"]
        return self._json({})

    def _lfs(self, wanted: Mapping[str, list[dict[str, object]]]) -> None:
        """Where to put what the storage lacks."""
        if self.token != TOKEN:
            return self._error(403 if self.token else 401)
        objects = []
        for one in wanted["objects"]:
            put = {"upload": {"href": f"{self.hub.storage_url}/storage/{one['oid']}"}}
            objects.append({**one, **({} if one["oid"] in self.hub.storage else {"actions": put})})
        return self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        if "Authorization" in self.headers:  # as S3 does with a signed URL
            return self._error(400)
        if self.command == "PUT":
            self.hub.storage[oid] = body
            return self._send(200, b"", {})
        return self._send(200, self.hub.storage[oid], {"Accept-Ranges": "bytes"})

    def _commit(self, repo_id: str, repository: Repository, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != repository.branches.get(branch):
            return self._error(412)
        sent = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        for line in lines:
            if line["key"] == "lfsFile":
                sent[line["value"]["path"]] = self.hub.storage[line["value"]["oid"]]
        pull_request = self.query.get("create_pr") == ["1"]
        target = "refs/pr/1" if pull_request else branch
        if pull_request:
            repository.branches[target] = repository.branches[branch]
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        sha = repository.commit(sent, target, deleted=deleted)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/1"
        return self._json(answer)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repository = self._visible(repo_id)
        if repository is None:
            return None
        if repository.gated and not self.token:
            return self._error(401, "GatedRepo")
        sha = repository.resolve(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound")
        if name not in repository.commits[sha]:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": sha})
        data = repository.commits[sha][name]
        if name.endswith(self.hub.lfs):
            oid = hashlib.sha256(data).hexdigest()
            self.hub.storage[oid] = data
            linked = {"X-Repo-Commit": sha, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            return self._redirect(f"{self.hub.storage_url}/storage/{oid}", linked)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        return self._send(200, data, headers)

    def _visible(self, repo_id: str) -> Repository | None:
        """The repository; or None, answered as the Hub does: a stranger cannot tell a private one from none."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token not in (TOKEN, READ_TOKEN)):
            self._error(404 if self.token else 401, "RepoNotFound")
            return None
        return repository

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        coded = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(
            status,
            json.dumps({"error": REFUSAL}).encode(),
            {"Content-Type": "application/json", **coded, **(headers or {})},
        )

    def _redirect(self, location: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(307, b"", {"Location": location, **(headers or {})})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.fault.wrong and data:
                data = data[:-1] + bytes([data[-1] ^ 1])
            self.wfile.write(data[: len(data) - self.fault.cut])
        if self.fault.cut:
            self.hub.woken.wait(self.fault.seconds)
            self.close_connection = True
