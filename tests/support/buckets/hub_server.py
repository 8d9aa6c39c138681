"""The Hugging Face hub on loopback, as far as lightopd asks: commits, lists, files, ranges."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 4
"""Files of one page of a list."""
ROUTES = (
    ("api", r"/api/datasets/([^/]+/[^/]+)/revision/([^/]+)()"),
    ("tree", r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/?(.*)"),
    ("file", r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"),
    ("cdn", r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)"),
)


class HubServer:
    """Datasets by name, with their commits and branches.

    `tokens` says whose token a private dataset asks for, `is_busy` which requests are answered with 503,
    `drip_s` how long each byte takes, `lists_at` where the next page of a list is said to be, and
    `is_circular` whether each request is sent back to itself;
    `asked` has the path and the token of each request, `largest_bytes` is of the largest answer.
    """

    def __init__(self):
        self.commits, self.branches, self.tokens, self.asked = {}, {}, {}, []
        self.lists_at, self.is_circular, self.largest_bytes = "", False, 0
        self.is_busy, self.drip_s, self.lock = (lambda number: False), 0.0, threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repo, folder, inside="", branch="main"):
        """A commit that has the files of a folder as they are now; its hash."""
        files = {
            "/".join(filter(None, (inside, path.relative_to(folder).as_posix()))): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith((".lightopd", "index.duckdb"))
        } | {".gitattributes": b"*.parquet filter=lfs\n", "README.md": b"# Rollouts\n"}
        commit = hashlib.sha1(f"{repo} {len(self.commits)}".encode()).hexdigest()
        self.commits[repo, commit] = files
        self.branches[repo, branch] = commit
        return commit

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, token = self.server.hub, self.headers.get("Authorization", "").removeprefix("Bearer ")
        with hub.lock:
            hub.asked.append((self.path, token))
            number = len(hub.asked)
        if hub.is_busy(number):
            return self._say(503, b"busy")
        if hub.is_circular:
            return self._say(302, b"", {"Location": self.path})
        parts = urlsplit(self.path)
        routes = ((kind, re.fullmatch(route, parts.path)) for kind, route in ROUTES)
        kind, found = next(((kind, found) for kind, found in routes if found), (None, None))
        if found is None:  # what huggingface_hub asks for itself
            return self._say(404, b"")
        repo, revision, path = (unquote(part) for part in found.groups())
        is_shown = repo in {name for name, _ in hub.commits} and hub.tokens.get(repo, token) == token
        if kind != "cdn" and not is_shown:
            return self._say(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        if kind == "api":
            revision = hub.branches.get((repo, revision))
        files = hub.commits.get((repo, revision))
        if files is None:
            return self._say(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if kind == "api":
            return self._say(200, json.dumps({"sha": revision}).encode())
        if kind == "tree":
            return self._tree(files, path, int(parse_qs(parts.query).get("cursor", ["0"])[0]))
        return self._file(files, path, is_away=kind == "file" and path.endswith(".parquet"), parts=parts)

    def _tree(self, files, folder, start):
        inside = [name for name in files if not folder or name.startswith(f"{folder}/")]
        if not inside:
            return self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
        page = [
            {
                "type": "file",
                "path": name,
                "size": len(files[name]),
                "oid": hashlib.sha1(files[name]).hexdigest(),
            }
            for name in inside[start : start + PAGE]
        ]
        page.append({"type": "directory", "path": f"{folder}/rollouts", "size": 0, "oid": "0" * 40})
        at = self.server.hub.lists_at or f"http://{self.headers['Host']}"
        link = f"{at}{urlsplit(self.path).path}?recursive=true&cursor={start + PAGE}"
        more = {"Link": f'<{link}>; rel="next"'} if start + PAGE < len(inside) else {}
        return self._say(200, json.dumps(page).encode(), more)

    def _file(self, files, path, is_away, parts):
        if path not in files:
            return self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
        if is_away:  # as the hub does with large files: another host has them, which no token is for
            port = self.headers["Host"].rpartition(":")[2]
            place = parts.path.replace("/datasets/", "/cdn/").replace("/resolve/", "/")
            return self._say(302, b"", {"Location": f"http://localhost:{port}{place}"})
        content = files[path]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            return self._say(200, content)
        start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        return self._say(
            206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        )

    def _say(self, status, content, headers=()):
        self.server.hub.largest_bytes = max(self.server.hub.largest_bytes, len(content))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(content), size := 1 if self.server.hub.drip_s else 2**30):
            time.sleep(self.server.hub.drip_s)
            self.wfile.write(content[start : start + size])
