"""A Hugging Face hub on the loopback: the few requests by which huggingface_hub fetches files."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class Hub:
    """Serves root/models/OWNER/NAME and root/datasets/OWNER/NAME.

    gated: names whose files it does not hand out. token: without it nothing is found. sent: how
    often it sent each file. resolved: how often it was asked for the commit of a revision. trouble:
    what it does instead of answering: a status to answer with, "drop" the connection, or "odd",
    JSON that says nothing.
    """

    def __init__(self, root: Path):
        self.root, self.gated, self.sent = root, set(), Counter()
        self.resolved, self.trouble, self.token = 0, None, ""
        handler = type("OfHub", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        if self.hub.trouble == "drop":
            self.close_connection = True
            return None
        if self.hub.trouble == "odd":
            return self.send(b"{}")
        if self.hub.token not in self.headers.get("Authorization", ""):
            return self.refuse(401, "RepoNotFound")
        if self.hub.trouble:
            return self.send(b"", self.hub.trouble)
        kind, *parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if kind == "api" and len(parts) < 3:
            self.refuse(404, "EntryNotFound")  # no request about a repository
        elif kind == "api":
            kind, owner, name, what, revision = (*parts, "revision", "main")[:5]
            self.describe(self.hub.root / kind / owner / name, what, revision)
        elif kind == "datasets":
            self.send_file("datasets", *parts)
        else:
            self.send_file("models", kind, *parts)

    do_HEAD = do_GET

    def describe(self, folder: Path, what: str, revision: str) -> None:
        if not folder.is_dir():
            return self.refuse(401, "RepoNotFound")
        if revision not in REVISIONS:
            return self.refuse(404, "RevisionNotFound")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in files]
        self.hub.resolved += what == "revision"
        if what == "tree":
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid(path)}
                for name, path in zip(names, files)
            ]
            return self.send(json.dumps(entries).encode())
        siblings = [{"rfilename": name} for name in names]
        about = {"id": "/".join(folder.parts[-2:]), "sha": COMMIT, "siblings": siblings}
        self.send(json.dumps(about).encode())

    def send_file(self, kind: str, owner: str, name: str, _: str, revision: str, *file) -> None:
        path = self.hub.root.joinpath(kind, owner, name, *file)
        if f"{owner}/{name}" in self.hub.gated:
            return self.refuse(403, "GatedRepo")
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        self.hub.sent["/".join(file)] += self.command == "GET"
        self.send(path.read_bytes(), ETag=f'"{oid(path)}"', **{"X-Repo-Commit": COMMIT})

    def refuse(self, status: int, code: str) -> None:
        self.send(b"", status, **{"X-Error-Code": code})

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
