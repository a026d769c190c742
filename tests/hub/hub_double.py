"""A stand-in for the Hub on the loopback: the routes that the real client uses to publish and load.

Repositories live in memory. Faults can be switched on: `refuse_uploads` breaks off large files,
`refuse_tags` forbids tags, `corrupt` alters what is served, `lose_answer` and `hang` keep the
answer to a commit back, `before_commit` is called before one, and only `answers` requests are
allowed if it is a number. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"


class HubDouble(ThreadingHTTPServer):
    """The server and its state; `url` is what HF_ENDPOINT must be."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Forget all repositories and faults."""
        self.refs: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.n_commits = 0
        self.refuse_uploads = False
        self.refuse_tags = False
        self.lose_answer = False
        self.hang = False
        self.answers: int | None = None
        self.before_commit = lambda: None
        self.lock = threading.Lock()
        self.parents: dict[str, str | None] = {}
        self.messages: dict[str, str] = {}
        self.corrupt = ""

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content at a branch, tag or commit."""
        return self.commits[self.refs[repository].get(revision, revision)]

    def commit(self, repository: str, revision: str, files: dict[str, bytes]) -> str:
        """Store a new tree and move the branch to it."""
        self.n_commits += 1
        sha = hashlib.sha1(f"{repository}{self.n_commits}".encode()).hexdigest()
        self.commits[sha] = files
        self.parents[sha] = self.refs[repository].get(revision)
        self.refs[repository][revision] = sha
        return sha


class Handler(BaseHTTPRequestHandler):
    """Routes as the client asks for them."""

    server: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Keep test output quiet."""

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        """JSON, or bytes as they are; HEAD sends the headers alone."""
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        """What the client sent, chunked or not."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def parse_request(self) -> bool:
        """Take a request, or refuse it once enough were answered."""
        if not super().parse_request():
            return False
        if self.server.answers is not None:
            self.server.answers -= 1
            if self.server.answers < 0:
                self.close_connection = True
                self.answer(403, {"error": "Forbidden"})
                return False
        return True

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        sent = self.body()
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.startswith("/lfs/verify"):
            return self.answer(200)
        if not self.authorized():
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(sent))
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(sent))
        _, _, kind, organisation, name, action, *rest = path.split("/")
        repository = f"{organisation}/{name}"
        if kind not in ("models", "spaces") or repository not in self.server.refs:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        revision = "/".join(rest)
        if action == "preupload":
            return self.preupload(repository, revision, json.loads(sent))
        if action == "commit":
            return self.commit(repository, revision, sent)
        if action in ("branch", "tag"):
            return self.refer(repository, action, revision, json.loads(sent or b"{}"))
        return self.answer(404)

    def create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted['organization']}/{wanted['name']}"
        link = {"url": f"{self.server.url}/{repository}", "name": repository, "id": repository}
        if repository in self.server.refs:
            return self.answer(409, link | {"error": "You already created this model repo"})
        self.server.refs[repository] = {}
        # The first is what releases since 2.0 of the client send.
        private = wanted.get("visibility") == "private" or wanted.get("private")
        self.server.private[repository] = bool(private)
        self.server.commit(repository, "main", {})
        return self.answer(200, link)

    def preupload(self, repository: str, revision: str, wanted: dict[str, Any]) -> None:
        present = self.server.files(repository, revision)
        rows = []
        for file in wanted["files"]:
            large = file["path"].endswith(".safetensors")
            content = present.get(file["path"])
            rows.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if content is None else object_id(content, large),
                }
            )
        self.answer(200, {"files": rows})

    def batch(self, wanted: dict[str, Any]) -> None:
        rows = []
        for item in wanted["objects"]:
            row = dict(item)
            if item["oid"] not in self.server.objects:
                row["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs/verify"},
                }
            rows.append(row)
        self.answer(200, {"transfer": "basic", "objects": rows})

    def commit(self, repository: str, revision: str, sent: bytes) -> None:
        self.server.before_commit()
        with self.server.lock:
            self.commit_alone(repository, revision, sent)

    def commit_alone(self, repository: str, revision: str, sent: bytes) -> None:
        files = dict(self.server.files(repository, revision))
        message = ""
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = f"{value['summary']}\n{value.get('description', '')}"
                parent = value.get("parentCommit")
                if parent and parent != self.server.refs[repository][revision]:
                    return self.answer(412, {"error": "A commit has happened since."})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit(repository, revision, files)
        self.server.messages[sha] = message
        if self.server.lose_answer or self.server.hang:
            time.sleep(3 if self.server.hang else 0)
            self.close_connection = True
            return self.connection.close()
        url = f"{self.server.url}/{repository}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def refer(self, repository: str, kind: str, name: str, wanted: dict[str, Any]) -> None:
        refs = self.server.refs[repository]
        source = name if kind == "tag" else "main"
        target = wanted.get("tag", name) if kind == "tag" else name
        if kind == "tag" and self.server.refuse_tags:
            return self.answer(403, {"error": "Forbidden"})
        if target in refs:
            return self.answer(409, {"error": "Reference already exists"})
        refs[target] = refs.get(source, source)
        return self.answer(200)

    def do_PUT(self) -> None:
        content = self.body()
        if self.server.refuse_uploads:
            self.close_connection = True
            return self.connection.close()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        return self.answer(200)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path[:2] in (["api", "models"], ["api", "spaces"]):
            repository, rest = "/".join(path[2:4]), path[4:]
        else:
            repository, rest = "/".join(path[:2]), path[2:]
        refs = self.server.refs.get(repository)
        if refs is None or (self.server.private[repository] and not self.authorized()):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if rest == ["refs"]:  # branches and tags are not told apart here
            rows = [{"name": n, "ref": n, "targetCommit": sha} for n, sha in refs.items()]
            return self.answer(200, {"branches": [], "converts": [], "tags": rows})
        revision = rest[1] if len(rest) > 1 else "main"
        sha = refs.get(revision, revision)
        if sha not in self.server.commits:
            code = {"X_Error_Code": "RevisionNotFound"}
            return self.answer(404, {"error": "Invalid rev id"}, **code)
        if path[0] != "api":
            return self.resolve(sha, "/".join(rest[2:]))
        files = self.server.commits[sha]
        if rest[:1] == ["commits"]:
            rows, known = [], sha
            while known:
                title, _, text = self.server.messages.get(known, "").partition("\n")
                row = {"id": known, "title": title, "message": text, "authors": []}
                rows.append(row | {"date": "2026-01-01T00:00:00.000Z"})
                known = self.server.parents.get(known)
            return self.answer(200, rows)
        if rest[:1] == ["tree"]:
            return self.answer(200, [described(name, data) for name, data in files.items()])
        siblings = [{"rfilename": name} for name in files]
        facts = {"id": repository, "modelId": repository, "sha": sha, "siblings": siblings}
        return self.answer(200, facts | {"private": self.server.private[repository], "tags": []})

    do_HEAD = do_GET

    def resolve(self, sha: str, name: str) -> None:
        content = self.server.commits[sha].get(name)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = object_id(content, name.endswith(".safetensors"))
        if self.server.corrupt == name:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=sha)


def object_id(content: bytes, large: bool) -> str:
    """What the Hub calls a file: SHA-256 of a large one, git's blob id of others."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(name: str, content: bytes) -> dict[str, Any]:
    """A row of the tree route."""
    row: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    row["oid"] = object_id(content, False)
    if name.endswith(".safetensors"):
        row["lfs"] = {"oid": object_id(content, True), "size": len(content), "pointerSize": 134}
    return row
