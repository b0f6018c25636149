"""A server of this machine that speaks what is needed of the hub's API, in both directions."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from huggingface_hub import constants

COMMIT = "0" * 40  # of every upload


def commit_of(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories by name, "org/name", and revision: the commit and the files' bytes.

    Of those in `gated` only the list is given. `requested` are the files that were asked for, and `posted` the paths
    and bodies of uploads, which are answered with `status`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.gated, self.requested, self.posted, self.status = {}, set(), [], [], 200
        self.address = f"http://127.0.0.1:{self.server_port}"

    def add(self, name, files, revision="main"):
        commit = commit_of(name + revision)
        repository = self.repositories.setdefault(name, {})
        repository[revision] = repository[commit] = (commit, files)
        return commit

    def receive(self, path, body):
        """What is answered to a step of an upload."""
        self.posted.append((path, body))
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        home = f"{self.address}/me/mine"
        return {"url": home, "commitUrl": f"{home}/commit/{COMMIT}", "commitOid": COMMIT}

    def answer(self, path):
        """Status, headers and body."""
        listing = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/?]+)(/\w+)?)?(?:\?.*)?", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        if not (listing or file):
            return 404, {}, b""
        name, revision = (listing[1], listing[3] or "main") if listing else (file[1], file[2])
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit, files = self.repositories[name].get(unquote(revision), (None, None))
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if listing and listing[4]:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""  # there are no folders
        if listing:
            return 200, {}, json.dumps((tree if listing[2] == "tree" else information)(name, commit, files)).encode()
        self.requested.append(unquote(file[3]))
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        content = files.get(unquote(file[3]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}, content


def tree(name, commit, files):
    return [{"type": "file", "path": name, "size": len(files[name]), "oid": commit_of(name)} for name in files]


def information(name, commit, files):
    return {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(*self.server.answer(self.path))

    do_HEAD = do_GET

    def do_POST(self):
        answer = self.server.receive(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        self.send(self.server.status, {}, json.dumps(answer).encode())

    def send(self, status, headers, body):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(monkeypatch, directory):
    """A hub that `huggingface_hub` believes to be the only one, and an empty cache in the directory."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    files = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(directory / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
