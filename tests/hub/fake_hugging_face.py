"""A small Hugging Face on this machine: repositories with commits, branches and large files, over its HTTP API."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 512  # bytes from which on a file is kept as a large one
TOKEN = "hf_fake_token_that_may_write"


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        sha = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class FakeHuggingFace:
    """Serves `repositories` at `url` until closed; `seen` are the requests: method and path."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.seen: list[tuple[str, str]] = []
        self.failing = 0  # so many requests are answered with status 503
        self.lying = b""  # appended to every file that is downloaded
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None: ...

            def do_GET(self) -> None:
                fake.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, call: Any) -> None:
        parts = urlsplit(call.path)
        path = unquote(parts.path)
        self.seen.append((call.command, path))
        body = call.rfile.read(int(call.headers.get("Content-Length") or 0))
        if self.failing:
            self.failing -= 1
            return send(call, 503, {"error": "busy"})
        pieces = path.strip("/").split("/")
        if pieces[:2] == ["api", "validate-yaml"]:
            return self._validate(call, json.loads(body))
        if pieces[:3] == ["api", "repos", "create"]:
            return self._create(call, json.loads(body))
        if pieces[0] == "large":
            self.stored[pieces[1]] = body
            return send(call, 200, {})
        if pieces[:2] == ["api", "models"]:
            return self._models(call, "/".join(pieces[2:4]), pieces[4:], body)
        if len(pieces) > 3 and pieces[1].endswith(".git"):
            return self._large(call, json.loads(body))
        if len(pieces) > 4 and pieces[2] == "resolve":
            return self._resolve(call, "/".join(pieces[:2]), pieces[3], "/".join(pieces[4:]))
        return send(call, 404, {"error": "no such page"})

    def _writer(self, call: Any) -> bool:
        if call.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        send(call, 401, {"error": "Invalid username or password."})
        return False

    def _found(self, call: Any, name: str) -> Repository | None:
        repository = self.repositories.get(name)
        hidden = (
            repository is not None and repository.private and call.headers.get("Authorization") != f"Bearer {TOKEN}"
        )
        if repository is None or hidden:
            send(call, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if repository.gated:
            send(call, 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return None
        return repository

    def _create(self, call: Any, asked: dict[str, Any]) -> None:
        if not self._writer(call):
            return None
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return send(call, 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
        made = self.repositories[name] = Repository(private=asked.get("visibility") == "private")
        made.commit({".gitattributes": b"* lfs"})
        return send(call, 200, {"url": f"{self.url}/{name}", "name": name})

    def _validate(self, call: Any, asked: dict[str, Any]) -> None:
        import yaml

        front = asked["content"].split("---\n")[1]
        told = yaml.safe_load(front)
        wrong = [] if isinstance(told, dict) and told.get("library_name") else [{"message": "no library_name"}]
        return send(call, 400 if wrong else 200, {"errors": wrong, "warnings": []})

    def _models(self, call: Any, name: str, rest: list[str], body: bytes) -> None:
        repository = self._found(call, name)
        if repository is None:
            return None
        if rest[:1] in ([], ["revision"]):
            sha = repository.find("/".join(rest[1:]) or "main")
            if sha is None:
                return send(call, 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            files = [self._sibling(path, data) for path, data in repository.commits[sha].items()]
            return send(call, 200, {"id": name, "sha": sha, "private": repository.private, "siblings": files})
        if not self._writer(call):
            return None
        if rest[0] == "branch":
            branch = "/".join(rest[1:])
            if branch in repository.branches:
                return send(call, 409, {"error": "Reference already exists"})
            repository.branches[branch] = repository.branches["main"]
            return send(call, 200, {})
        branch = "/".join(rest[1:])
        there = repository.commits[repository.branches[branch]]
        if rest[0] == "preupload":
            files = [
                {
                    "path": each["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if each["size"] >= LARGE else "regular",
                    "oid": _oid(there[each["path"]]) if each["path"] in there else None,
                }
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            return send(call, 200, {"files": files})
        if rest[0] == "commit":
            return self._commit(call, name, repository, branch, body)
        return send(call, 404, {"error": "no such page"})

    def _sibling(self, path: str, data: bytes) -> dict[str, Any]:
        told: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git(data)}
        if len(data) >= LARGE:
            digest = hashlib.sha256(data).hexdigest()
            told |= {"blobId": "0" * 40, "lfs": {"sha256": digest, "size": len(data), "pointerSize": 130}}
        return told

    def _large(self, call: Any, asked: dict[str, Any]) -> None:
        if not self._writer(call):
            return None
        objects = []
        for each in asked["objects"]:
            told = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.stored:
                told["actions"] = {"upload": {"href": f"{self.url}/large/{each['oid']}"}}
            objects.append(told)
        return send(call, 200, {"transfer": "basic", "objects": objects})

    def _commit(self, call: Any, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files, message = dict(repository.commits[repository.branches[branch]]), ""
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "header":
                message = value["summary"]
            elif told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                data = self.stored[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
        sha = repository.commit(files, branch, message)
        return send(call, 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"})

    def _resolve(self, call: Any, name: str, revision: str, path: str) -> None:
        repository = self._found(call, name)
        if repository is None:
            return None
        sha = repository.find(revision)
        if sha is None:
            return send(call, 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        data = repository.commits[sha].get(path)
        if data is None:
            return send(call, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = data + self.lying
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        return send(call, 200, data, headers)


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) >= LARGE else _git(data)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def send(call: Any, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    call.send_response(status)
    for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
        call.send_header(name, text)
    call.send_header("Content-Length", str(len(data)))
    call.end_headers()
    if call.command != "HEAD":
        call.wfile.write(data)
