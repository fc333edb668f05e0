"""A Hub on this machine: two servers in the test process, with faults on demand.

`Hub().add("owner/name", {"config.json": b"{}"})` publishes a commit. The first server resolves
files as the Hub does; large ones (by their suffix, as .gitattributes has it) it redirects to the
second, which stands for the storage network. `hub.log` keeps every request, so that a test can see
what was asked, of whom, and whether the token went along.

A fault is a dictionary queued in `hub.faults["HEAD" | "GET" | "CDN"]`, each spent on one request:

    {"status": 503, "Retry-After": "7"}     this status; other capitalised keys are headers
    {"hangup": True} {"drop": 100}          the connection is cut at once, or in the body
    {"silent": True} {"stall": 100}         it is left open, and goes on when `hub.go` is set
    {"step": 1000, "slow": 0.01}            a pause in seconds after each so many bytes
    {"html": True} {"gzip": True}           a page of a proxy instead, or the body compressed
    {"body": b"other"}                      other bytes than those that were promised
    {"ignore_range": True}                  200 and the whole body, whatever range was asked for
    {"shift": 3}                            206, but starting elsewhere than asked
"""

import gzip
import hashlib
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model")


def etag_of(name: str, content: bytes) -> str:
    """What the Hub calls a file by: its sha256 if it is large, git's own sum if it is not."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """`with Hub() as hub:` has url, cdn_url, faults and log, of (server, verb, path, headers)."""

    def __init__(self):
        self.repos = {}  # repo_id -> {a branch's or a commit's name: (commit, files)}
        self.refusals, self.renamed = {}, {}  # repo_id -> (status, headers); -> its new name
        self.log, self.faults = [], {"HEAD": [], "GET": [], "CDN": []}
        self.relay = False  # whether small files come by a redirect without a host
        self.sent = 0  # bytes of files
        self.go = threading.Event()
        self.servers = {}
        for name in ("hub", "cdn"):
            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.hub, server.name, server.daemon_threads = self, name, True
            server.handle_error = lambda *_: None  # a client killed on purpose is no news
            threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
            self.servers[name] = server
        ports = [server.server_port for server in self.servers.values()]
        self.url, self.cdn_url = (f"http://127.0.0.1:{port}" for port in ports)

    def add(self, repo_id: str, files: "dict[str, bytes]", revision: str = "main") -> str:
        """Publishes a commit with these files, and these alone; returns its name."""
        commit = hashlib.sha1(repr((repo_id, sorted(files.items()))).encode()).hexdigest()
        self.repos.setdefault(repo_id, {})
        self.repos[repo_id][revision] = self.repos[repo_id][commit] = commit, files
        return commit

    def requests(self, server: str, method: str = "GET") -> list:
        """The headers of the requests that this server has seen, in order."""
        return [headers for name, verb, _, headers in self.log if (name, verb) == (server, method)]

    def close(self):
        self.go.set()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def log_message(self, *_):
        pass

    def respond(self):
        hub, here = self.server.hub, self.server.name
        hub.log.append((here, self.command, self.path, dict(self.headers.items())))
        queue = hub.faults["CDN" if here == "cdn" else self.command]
        fault = queue.pop(0) if queue else {}
        if fault.get("silent"):
            hub.go.wait(20)
        if fault.get("hangup"):
            return
        extra = {name: value for name, value in fault.items() if name[0].isupper()}
        if fault.get("html"):
            page = b"<html><body>Please sign in to the guest network.</body></html>"
            return self.answer(200, {"Content-Type": "text/html; charset=utf-8"}, page, fault)
        if "status" in fault:
            return self.answer(fault["status"], extra, b"<Error>Not now</Error>")
        path = unquote(urlsplit(self.path).path)
        if here == "cdn":  # /<commit>/<file>, whose owner no longer matters
            commit, name = path[1:].split("/", 1)
            content = next(r[commit][1][name] for r in hub.repos.values() if commit in r)
            return self.answer(200, extra, content, fault)
        self.resolve(path, extra, fault)

    def resolve(self, path: str, extra: dict, fault: dict):
        hub = self.server.hub
        # A slash in the revision has to come quoted, or it would begin the file's name.
        revision = unquote(urlsplit(self.path).path.partition("/resolve/")[2].partition("/")[0])
        repo_id, _, rest = path[1:].partition("/resolve/")
        name, relay = rest[len(revision) + 1:], "/api/resolve-cache/models/"
        if path.startswith(relay):
            owner, model, revision, name = path.removeprefix(relay).split("/", 3)
            repo_id = f"{owner}/{model}"
        if repo_id in hub.renamed:
            return self.answer(307, {"Location": self.path.replace(repo_id, hub.renamed[repo_id])})
        if repo_id in hub.refusals:
            return self.answer(*hub.refusals[repo_id])
        if repo_id not in hub.repos:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in hub.repos[repo_id]:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = hub.repos[repo_id][revision]
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", **headers})
        etag = f'"{etag_of(name, files[name])}"'
        if hub.relay and not name.endswith(LARGE) and not path.startswith(relay):
            target = f"{relay}{repo_id}/{commit}/{quote(name)}?etag={quote(etag)}"
            return self.answer(307, {**headers, "Location": target})
        if not name.endswith(LARGE):
            return self.answer(200, {**headers, "ETag": etag, **extra}, files[name], fault)
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(files[name])),
                    "ETag": '"of-the-redirect"', "Content-Length": "913",
                    "Location": f"{hub.cdn_url}/{commit}/{quote(name)}?signature=secret"}
        self.answer(302, {**headers, **extra}, b"x" * 913 if self.command == "GET" else b"")

    def answer(self, status: int, headers: dict, content: bytes = b"", fault: dict | None = None):
        fault = fault or {}
        content = fault.get("body", content)
        start, total = 0, len(content)
        # As the storage network does: what is compressed cannot be resumed.
        squeeze = fault.get("gzip") or "gzip" in self.headers.get("Accept-Encoding", "")
        asked = self.headers.get("Range")
        if status == 200 and squeeze:
            content, headers = gzip.compress(content), {**headers, "Content-Encoding": "gzip"}
        elif status == 200 and asked and not fault.get("ignore_range"):
            start = int(asked.removeprefix("bytes=").rstrip("-")) + fault.get("shift", 0)
            status = 206 if start < total else 416
            headers = {**headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
            content = content[start:] if status == 206 else b""
        self.send_response_only(status)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(content)),
                   "Date": formatdate(usegmt=True), **headers}
        for name, value in headers.items():
            if value is not None:  # a fault may take a header away
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        content = content[:fault.get("drop", len(content))]
        step = fault.get("stall") or fault.get("step") or 1 << 16
        for begin in range(0, len(content), step):
            if status < 300:
                self.server.hub.sent += len(content[begin:begin + step])
            self.wfile.write(content[begin:begin + step])
            self.server.hub.go.wait(20 if "stall" in fault else fault.get("slow", 0))
