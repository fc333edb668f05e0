"""A Hub on this machine, which answers as the real one did in 2026.

The headers are those of public dumps (April to October 2026): a relative 307 into resolve-cache
for a file kept in git, a signed 302 to a storage network on another host for a large file, and
`X-Error-Code` with errors. What differs is a variant:

    hub.direct          repositories whose files in git come without a redirect (private, gated)
    hub.bare            the 307 names no etag, as in April 2026; the next hop does
    hub.mirror          the address of a Hub to which this one redirects every request (308)
    hub.renamed         {name: new name}
    hub.refused         {name: (status, headers)}
    hub.faults[hop]     what the next requests at "resolve", "cache" or "cdn" meet, one each:

    {"status": 503, "Retry-After": "7"}     this status; capitalized keys are headers
    {"drop": 100} {"stall": 100}            the body breaks off; or waits until hub.go is set
    {"slow": 0.01}                          a pause in seconds after each 64 KiB
    {"body": b"other"} {"html": True}       other bytes; a login page
    {"whole": True} {"shift": 3}            the range is ignored, or starts elsewhere
    {"chunked": True}                       no Content-Length, as behind some proxies
"""

import hashlib
import socket
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

LFS = ".safetensors", ".bin", ".model"


def etag_of(name, content):
    if name.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """`with Hub() as hub`: url, and log, a list of (hop, path, headers)."""

    def __init__(self, family=socket.AF_INET):
        self.repos, self.renamed, self.refused = {}, {}, {}
        self.direct, self.bare, self.mirror, self.token = set(), False, "", None
        self.faults, self.log = {"resolve": [], "cache": [], "cdn": []}, []
        self.sent, self.go = 0, threading.Event()
        ThreadingHTTPServer.address_family = family
        address = "127.0.0.1" if family == socket.AF_INET else "::1"
        self.servers = [ThreadingHTTPServer((address, 0), Handler) for _ in range(2)]
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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, parts = self.server.hub, urlsplit(self.path)
        self.status, self.extra, self.fault = 200, {}, {}
        hop = "cdn" if self.server is hub.servers[1] else (
            "cache" if parts.path.startswith("/api/resolve-cache/") else "resolve")
        hub.log.append((hop, self.path, dict(self.headers.items())))
        self.fault = hub.faults[hop].pop(0) if hub.faults[hop] else {}
        if "status" in self.fault:
            headers = {key: value for key, value in self.fault.items() if key[0].isupper()}
            self.answer(self.fault["status"], headers, b"Not now")
        elif self.fault.get("html"):
            self.answer(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Log in</html>")
        else:
            getattr(self, hop)(unquote(parts.path), parts)

    do_HEAD = do_GET

    def resolve(self, path, parts):
        hub = self.server.hub
        repo_id, _, rest = parts.path[1:].partition("/resolve/")
        revision, _, name = map(unquote, rest.partition("/"))  # a slash in it comes quoted
        if hub.mirror:
            return self.answer(308, {"Location": hub.mirror + self.path})
        if repo_id in hub.renamed:
            return self.redirect(self.path.replace(repo_id, hub.renamed[repo_id]), {})
        if repo_id in hub.refused:
            return self.answer(*hub.refused[repo_id], b"Refused")
        token = self.headers.get("Authorization")
        if token and hub.token and token != f"Bearer {hub.token}":
            message = "Invalid credentials in Authorization header"
            return self.answer(401, {"X-Error-Message": message}, b'{"error":"Invalid"}')
        if repo_id not in hub.repos:
            message = "Invalid username or password."
            return self.answer(401, {"X-Error-Message": message, "ETag": 'W/"1d-2YvT5"'}, b"{}")
        if revision not in hub.repos[repo_id]:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound",
                                     "X-Error-Message": f"Invalid rev id: {revision}"}, b"{}")
        commit, files = hub.repos[repo_id][revision]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found",
                        "ETag": 'W/"f-mY2VvLxuxB7KhsoOdQTlMTccuAQ"'}
            return self.answer(404, headers, b"Entry not found")
        etag = etag_of(name, files[name])
        linked = {"X-Linked-ETag": f'"{etag}"'}
        if name.endswith(LFS):
            target = f"/xet-bridge-us/{commit}/{quote(name)}"
            linked |= {"X-Linked-Size": str(len(files[name])), "X-Xet-Hash": xet(files[name]),
                       "Link": f'<{hub.url}/api/models/{repo_id}/xet-read-token>; rel="xet-auth"'}
            target = f"{hub.cdn}{target}?Expires=1781098782&Signature={sign(target)}"
            return self.redirect(target, headers | linked, 302)
        if repo_id in hub.direct or "/" not in repo_id or not files[name]:
            return self.answer(200, headers | {"ETag": f'"{etag}"'}, files[name])
        query = f"{quote(parts.path, safe='')}=&etag=%22{etag}%22"
        target = f"/api/resolve-cache/models/{repo_id}/{commit}/{quote(name)}?{query}"
        self.redirect(target, headers | ({} if hub.bare else linked) | {"X-Hub-Cache": "MISS"})

    def cache(self, path, parts):
        owner, model, commit, name = path.removeprefix("/api/resolve-cache/models/").split("/", 3)
        content = self.server.hub.repos[f"{owner}/{model}"][commit][1][name]
        etag = etag_of(name, content)
        if f"etag=%22{etag}%22" not in parts.query:
            return self.answer(400, {}, b"The query is missing")
        self.answer(200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, content)

    def cdn(self, path, parts):
        if "Authorization" in self.headers:
            return self.answer(400, {}, b"<Code>InvalidArgument</Code>")
        if f"Signature={sign(parts.path)}" not in parts.query:
            return self.answer(403, {}, b"<Code>AccessDenied</Code>")
        commit, name = path.removeprefix("/xet-bridge-us/").split("/", 1)
        content = next(r[commit][1][name] for r in self.server.hub.repos.values() if commit in r)
        self.answer(200, {"ETag": f'"{xet(content)}"', "X-Cache": "Miss from cloudfront",
                          "Content-Type": "application/octet-stream"}, content)

    def redirect(self, target, headers, status=307):
        kind = {302: "Found", 307: "Temporary Redirect"}[status]
        body = f"{kind}. Redirecting to {target}".encode()
        self.answer(status, {"Location": target, "Vary": "Origin, Accept", **headers}, body)

    def answer(self, status, headers, content=b""):
        hub, fault = self.server.hub, self.fault
        content = fault.get("body", content)
        asked, total = self.headers.get("Range"), len(content)
        headers = {"Content-Type": "text/plain; charset=utf-8", "X-Powered-By": "huggingface-moon",
                   "Date": formatdate(usegmt=True), "RateLimit": '"resolvers";r=2998;t=172',
                   "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'} | headers
        if status == 200 and asked and not fault.get("whole"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            status, headers["Content-Range"] = 416, f"bytes */{total}"
            if start < total:
                start += fault.get("shift", 0)
                status, headers["Content-Range"] = 206, f"bytes {start}-{total - 1}/{total}"
            content = content[start:] if status == 206 else b""
        length = {"Transfer-Encoding": "chunked"} if fault.get("chunked") else {
            "Content-Length": str(len(content))}
        self.send_response_only(status)
        for name, value in (headers | length).items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = self.close_connection or "drop" in fault
        if self.command == "HEAD":
            return
        step = fault.get("stall") or 1 << 16
        content = content[:fault.get("drop", len(content))]
        for begin in range(0, len(content), step):
            block = content[begin:begin + step]
            hub.sent += len(block) if status in (200, 206) else 0
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if "chunked" in fault else block)
            hub.go.wait(20 if "stall" in fault else fault.get("slow", 0))
        if "chunked" in fault and "drop" not in fault:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


def xet(content):
    return hashlib.sha256(b"xet" + content).hexdigest()  # 64 digits, but not the file's sha256


def sign(path):
    return hashlib.sha1(path.encode()).hexdigest()
