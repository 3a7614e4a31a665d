"""A stand-in for the HuggingFace hub: folders as repositories, over HTTP on localhost."""

import base64
import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/?]+)")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")


@contextlib.contextmanager
def serve(
    repositories: dict[str, pathlib.Path],
) -> Iterator[tuple[str, list[str], dict[str, bytes]]]:
    """Serve {"models/OWNER/NAME": folder}; yield (address, requests so far, uploaded files)."""
    asked: list[str] = []
    uploaded: dict[str, bytes] = {}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(with_body=True)

        def do_POST(self):
            asked.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            content: dict = {}
            if "/preupload/" in self.path:
                files = [{**f, "uploadMode": "regular"} for f in json.loads(body)["files"]]
                content = {"files": [{**f, "shouldIgnore": False} for f in files]}
            elif "/commit/" in self.path:
                kind, owner, name = self.path.split("/")[2:5]
                kind = "datasets/" if kind == "datasets" else ""
                place = f"http://{self.headers['Host']}/{kind}{owner}/{name}"
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        uploaded[value["path"]] = base64.b64decode(value["content"])
                content = {
                    "commitUrl": f"{place}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "success": True,
                }
            elif self.path == "/api/repos/create":
                asked.append(body.decode())
                made = json.loads(body)
                kind = "datasets/" if made.get("type") == "dataset" else ""
                place = f"{self.headers['Host']}/{kind}{made['organization']}/{made['name']}"
                content = {"url": f"http://{place}"}
            answer = json.dumps(content).encode()
            self.send(200, answer, True, {"Content-Type": "application/json"})

        def do_HEAD(self):
            self.answer(with_body=False)

        def answer(self, with_body: bool) -> None:
            asked.append(f"{self.command} {self.path}")
            api, file = _API.match(self.path), _FILE.match(self.path)
            kind = (api[1] if api else "datasets" if file and file[1] else "models") + "/"
            folder = repositories.get(kind + (api or file)[2]) if api or file else None
            if folder is None or (api or file)[4 if api else 3] not in ("main", COMMIT):
                code = "RepoNotFound" if folder is None else "RevisionNotFound"
                return self.send(404, b"", with_body, {"X-Error-Code": code})
            if api:
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                names = [str(p.relative_to(folder)) for p in files]
                content = (
                    {"id": api[2], "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                    if api[3] == "revision"
                    else [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": _hash(p)}
                        for n, p in zip(names, files, strict=True)
                    ]
                )
                kind = {"Content-Type": "application/json"}
                return self.send(200, json.dumps(content).encode(), with_body, kind)
            path = folder / file[4]
            if not path.is_file():
                return self.send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
            about = {"ETag": f'"{_hash(path)}"', "X-Repo-Commit": COMMIT}
            return self.send(200, path.read_bytes(), with_body, about)

        def send(self, status: int, body: bytes, with_body: bool, headers: dict) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked, uploaded
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _hash(path: pathlib.Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
