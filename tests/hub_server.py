"""A Hub on this machine, which answers as the real one did in 2026.

The headers are those of public dumps: a relative 307 into resolve-cache for a file kept in git, a
signed 302 to storage on another host for a large file, and `X-Error-Code` with errors. Variants:

    hub.gated           repositories that are listed, but whose files are refused
    hub.mirror          the address of a Hub to which this one redirects every request (308)
    hub.renamed         {name: new name}
    hub.token           the valid token; any other is refused
    hub.faults[hop]     what the next requests at "api", "resolve", "cache" or "cdn" meet, one each:

    {"status": 503, "Retry-After": "7"}     this status; capitalized keys are headers
    {"drop": 100} {"stall": 100}            the body breaks off; or waits until hub.go is set
    {"body": b"other"}                      other bytes
    {"whole": True} {"chunked": True}       the range is ignored; no Content-Length
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS = ".safetensors", ".bin"


class Hub:
    """`with Hub() as hub`: url, and log, a list of (hop, path, headers)."""

    def __init__(self):
        self.repos, self.renamed, self.gated = {}, {}, set()
        self.mirror, self.token = "", None
        self.faults, self.log = {"api": [], "resolve": [], "cache": [], "cdn": []}, []
        self.go = threading.Event()
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            server.hub, server.daemon_threads = self, True
            server.handle_error = lambda *_: None  # clients are killed on purpose
            threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.cdn = f"http://localhost:{self.servers[1].server_port}"

    def add(self, repo_id, files, revision="main"):
        """Publishes a commit of `files` alone; returns its name."""
        commit = hashlib.sha1(repr((repo_id, sorted(files.items()))).encode()).hexdigest()
        revisions = self.repos.setdefault(repo_id, {})
        revisions[revision] = revisions[commit] = commit, files
        return commit

    def at(self, hop):
        """The headers of the requests at this hop."""
        return [headers for place, _, headers in self.log if place == hop]

    def close(self):
        self.go.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Refusal(Exception):
    """Its arguments are the status and the headers."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, parts = self.server.hub, urlsplit(self.path)
        hop = "cache" if parts.path.startswith("/api/resolve-cache/") else (
            "api" if parts.path.startswith("/api/") else "resolve")
        hop = "cdn" if self.server is hub.servers[1] else hop
        hub.log.append((hop, self.path, dict(self.headers.items())))
        self.has_ranges = hop in ("cache", "cdn")
        self.fault = hub.faults[hop].pop(0) if hub.faults[hop] else {}
        if hub.mirror:
            self.answer(308, {"Location": hub.mirror + self.path})
        elif "status" in self.fault:
            headers = {key: value for key, value in self.fault.items() if key[0].isupper()}
            self.answer(self.fault["status"], headers, b"Not now")
        else:
            try:
                self.answer(*getattr(self, hop)(parts))
            except Refusal as refusal:
                self.answer(*refusal.args, b'{"error":"Refused"}')

    do_HEAD = do_GET

    # The four hops. Each returns the status, the headers and the contents.

    def api(self, parts):
        repo_id, _, revision = parts.path.removeprefix("/api/models/").partition("/revision/")
        # A slash in a revision has to come quoted.
        commit, files = self.revision(repo_id, "/" not in revision and unquote(revision))
        siblings = [{"rfilename": name} for name in files]
        if parse_qs(parts.query).get("blobs") == ["true"]:
            siblings = [sibling(name, content) for name, content in files.items()]
        listing = {"id": repo_id, "sha": commit, "private": False, "siblings": siblings}
        headers = {"Content-Type": "application/json; charset=utf-8", "ETag": 'W/"3d1-x2YvT5"'}
        return 200, headers, json.dumps(listing).encode()

    def resolve(self, parts):
        hub = self.server.hub
        repo_id, _, rest = parts.path[1:].partition("/resolve/")
        revision, _, name = map(unquote, rest.partition("/"))
        commit, files = self.revision(repo_id, revision)
        if repo_id in hub.gated:
            status = 403 if "Authorization" in self.headers else 401
            raise Refusal(status, {"X-Error-Code": "GatedRepo",
                                   "X-Error-Message": f"Access to model {repo_id} is restricted."})
        if name not in files:
            raise Refusal(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, checksum = files[name], etag(name, files[name])
        headers = {"X-Repo-Commit": commit, "X-Linked-ETag": f'"{checksum}"'}
        if name.endswith(LFS):
            path = f"/xet-bridge-us/{commit}/{quote(name)}"
            target = f"{hub.cdn}{path}?Expires=1781098782&Signature={sign(path)}"
            headers |= {"X-Linked-Size": str(len(content)), "X-Xet-Hash": xet(content)}
            return 302, headers | {"Location": target}, f"Found. Redirecting to {target}".encode()
        if not content:
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{checksum}"'}, content
        query = f"{quote(parts.path, safe='')}=&etag=%22{checksum}%22"
        target = f"/api/resolve-cache/models/{repo_id}/{commit}/{quote(name)}?{query}"
        return 307, headers | {"Location": target}, b"Temporary Redirect"

    def cache(self, parts):
        path = unquote(parts.path).removeprefix("/api/resolve-cache/models/")
        owner, model, commit, name = path.split("/", 3)
        content = self.server.hub.repos[f"{owner}/{model}"][commit][1][name]
        if f"etag=%22{blob_id(content)}%22" not in parts.query:
            raise Refusal(400, {})
        return 200, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit}, content

    def cdn(self, parts):
        if "Authorization" in self.headers:
            raise Refusal(400, {})
        if f"Signature={sign(parts.path)}" not in parts.query:
            raise Refusal(403, {})
        commit, name = unquote(parts.path).removeprefix("/xet-bridge-us/").split("/", 1)
        content = next(r[commit][1][name] for r in self.server.hub.repos.values() if commit in r)
        return 200, {"ETag": f'"{xet(content)}"'}, content

    def revision(self, repo_id, revision):
        """The commit of a revision, and its files."""
        hub, token = self.server.hub, self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo_id in hub.renamed:
            raise Refusal(307, {"Location": self.path.replace(repo_id, hub.renamed[repo_id])})
        if token and token != hub.token:
            raise Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if not token and repo_id not in hub.repos:
            raise Refusal(401, {"X-Error-Message": "Invalid username or password."})
        if repo_id not in hub.repos:
            raise Refusal(404, {"X-Error-Code": "RepoNotFound",
                                "X-Error-Message": "Repository not found"})
        if revision not in hub.repos[repo_id]:
            raise Refusal(404, {"X-Error-Code": "RevisionNotFound",
                                "X-Error-Message": f"Invalid rev id: {revision}"})
        return hub.repos[repo_id][revision]

    def answer(self, status, headers, content=b""):
        hub, fault = self.server.hub, self.fault
        content = fault.get("body", content)
        asked, total = self.headers.get("Range"), len(content)
        if status == 200 and asked and self.has_ranges and not fault.get("whole"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            status, headers["Content-Range"] = 416, f"bytes */{total}"
            if start < total:
                status, headers["Content-Range"] = 206, f"bytes {start}-{total - 1}/{total}"
            content = content[start:] if status == 206 else b""
        headers = {"RateLimit": '"resolvers";r=998;t=172'} | headers
        if "chunked" in fault:
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(len(content))
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = self.close_connection or "drop" in fault
        if self.command == "HEAD":
            return
        content = content[:fault.get("drop", len(content))]
        step = fault.get("stall") or len(content) or 1
        for begin in range(0, len(content), step):
            block = content[begin:begin + step]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if "chunked" in fault else block)
            hub.go.wait(20 if "stall" in fault else 0)
        if "chunked" in fault and "drop" not in fault:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


def sibling(name, content):
    """What the list of files says of one."""
    sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    if not name.endswith(LFS):
        return {"rfilename": name, "size": size, "blobId": blob_id(content)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return {"rfilename": name, "size": size, "blobId": blob_id(pointer.encode()),
            "lfs": {"sha256": sha256, "size": size, "pointerSize": len(pointer)}}


def etag(name, content):
    """The name of a file in the cache."""
    return hashlib.sha256(content).hexdigest() if name.endswith(LFS) else blob_id(content)


def xet(content):
    return hashlib.sha256(b"xet" + content).hexdigest()  # 64 digits, but not the file's sha256


def sign(path):
    return hashlib.sha1(path.encode()).hexdigest()


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
