"""A Hub on 127.0.0.1, in memory: what `push_to_hub` and `from_pretrained` ask of huggingface.co, and nothing else.

    with LocalHub() as hub:
        subprocess.run(command, env=hub.environment(home))
        hub.repos["house/model"].head["README.md"]

Small files travel inside a commit, weights through Git LFS, as on the Hub. huggingface_hub reads HF_ENDPOINT once, when it is
imported: a client of this server is a process that was started with `environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

LFS_SUFFIXES = (".safetensors", ".bin")  # what the .gitattributes of a new Hub repository sends to LFS


@dataclass
class Repo:
    """One repository and its commits, oldest first: commit id -> {path: content}."""

    id: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return next(reversed(self.commits))

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.sha]

    def commit(self, files: dict[str, bytes]) -> None:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files


@dataclass
class Answer:
    """One HTTP response; a `body` that is not bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def not_found(code: str, what: str) -> Answer:
    """The 404 that huggingface_hub turns into RepositoryNotFoundError, RevisionNotFoundError or EntryNotFoundError."""
    return Answer({"error": f"{what} not found"}, 404, {"X-Error-Code": code})


def object_id(path: str, content: bytes) -> str:
    """The SHA-256 of an LFS file, git's blob id of any other: by it the client knows the file again."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LocalHub(ThreadingHTTPServer):
    """The server: listens on an ephemeral port for as long as its context lasts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.unknown_requests: list[str] = []

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.serve_forever).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client process: this endpoint and no proxy, a cache of its own, requests about models only."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.endpoint,
            "NO_PROXY": "127.0.0.1",
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_fake",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def create_repo(self, body: bytes) -> Answer:
        request = json.loads(body)
        repo_id = f"{request['organization']}/{request['name']}"
        exists = repo_id in self.repos
        if not exists:
            self.repos[repo_id] = Repo(repo_id)
            self.repos[repo_id].commit({".gitattributes": b""})
        return Answer({"url": f"{self.endpoint}/{repo_id}"}, 409 if exists else 200)

    def validate_yaml(self, body: bytes) -> Answer:
        try:
            ModelCard(json.loads(body)["content"])
        except (ValueError, yaml.YAMLError) as error:
            return Answer({"errors": [{"message": str(error)}]}, 400)
        return Answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: Repo, sha: str) -> Answer:
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": object_id(path, repo.head[path]) if path in repo.head else None,
            }
            for path in (file["path"] for file in json.loads(body)["files"])
        ]
        return Answer({"files": files})

    def lfs_batch(self, body: bytes, repo: Repo) -> Answer:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> Answer:
        self.lfs_objects[oid] = body
        return Answer(status=200 if hashlib.sha256(body).hexdigest() == oid else 400)

    def commit(self, body: bytes, repo: Repo, sha: str) -> Answer:
        files = dict(repo.head)
        for line in map(json.loads, body.splitlines()):
            change = line["value"]
            if line["key"] == "file":
                files[change["path"]] = base64.b64decode(change["content"])
            elif line["key"] == "lfsFile":
                files[change["path"]] = self.lfs_objects[change["oid"]]
        repo.commit(files)
        return Answer({"commitUrl": f"{self.endpoint}/{repo.id}/commit/{repo.sha}", "commitOid": repo.sha})

    def model_info(self, body: bytes, repo: Repo, sha: str) -> Answer:
        return Answer({"id": repo.id, "sha": sha, "siblings": [{"rfilename": path} for path in repo.commits[sha]]})

    def tree(self, body: bytes, repo: Repo, sha: str, folder: str) -> Answer:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": object_id(path, content)}
            for path, content in repo.commits[sha].items()
            if path.startswith(folder)
        ]
        return Answer(entries) if entries else not_found("EntryNotFound", folder)

    def resolve(self, body: bytes, repo: Repo, sha: str, path: str) -> Answer:
        if path not in repo.commits[sha]:
            return not_found("EntryNotFound", path)
        content = repo.commits[sha][path]
        return Answer(content, headers={"X-Repo-Commit": sha, "ETag": f'"{object_id(path, content)}"'})


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<sha>[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", LocalHub.create_repo),
    ("POST", r"/api/validate-yaml", LocalHub.validate_yaml),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", LocalHub.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", LocalHub.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", LocalHub.lfs_upload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", LocalHub.commit),
    ("GET", rf"/api/models/{REPO}(/revision/{REVISION})?", LocalHub.model_info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}/?(?P<folder>.*)", LocalHub.tree),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", LocalHub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        answer = self.route(self.path.partition("?")[0], self.rfile.read(int(self.headers.get("Content-Length", 0))))
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def route(self, path: str, body: bytes) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path) if method == route_method else None
            if match:
                return self.handle_in_repo(handle, body, match.groupdict())
        self.server.unknown_requests.append(f"{self.command} {self.path}")
        return Answer({"error": "the local Hub does not know this request"}, 501)

    def handle_in_repo(self, handle: Any, body: bytes, names: dict[str, Any]) -> Answer:
        """Call `handle` with the repository and the commit that the address names."""
        if "repo" in names:
            repo = self.server.repos.get(names["repo"])
            if repo is None:
                return not_found("RepoNotFound", names["repo"])
            names["repo"] = repo
        if "sha" in names:
            if names["sha"] in (None, "main"):
                names["sha"] = repo.sha
            if names["sha"] not in repo.commits:
                return not_found("RevisionNotFound", names["sha"])
        return handle(self.server, body, **names)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the server's access log would drown what a test has to say."""
