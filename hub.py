"""Find a model of the Hugging Face Hub in the shared cache, or download it.

    folder = find_model("moussaKam/barthez-orangesum-abstract")

One request returns the commit of a revision and its files, with sizes and checksums. Each file is
one more GET, which the Hub redirects to its storage. The cache is that of the official client,
huggingface_hub: blobs/<checksum> holds a file, snapshots/<commit>/<file> links to it, and
refs/<revision> names the commit. This module needs only the standard library and can be copied.
"""

import hashlib
import io
import json
import os
import re
import sys
import time
from http.client import HTTPException
from pathlib import Path
from ssl import SSLCertVerificationError, SSLError
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, getproxies

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

REQUIRED = "config.json", "sentencepiece.bpe.model"
OPTIONAL = "generation_config.json", "tokenizer_config.json", "added_tokens.json"
WEIGHTS = "model.safetensors", "pytorch_model.bin"  # the first that a model has is downloaded


class NoNetwork(ConnectionError):
    """The Hub cannot be reached, or HF_HUB_OFFLINE is set, and the cache lacks the model."""


def find_model(repo_id, revision=None, pinned=None, readable=WEIGHTS):
    """The cached folder of a model, updated if the Hub answers.

    revision: a branch, a tag, a commit or refs/pr/N.
    pinned: a revision with safetensors, for a model whose `main` has only a pickle. It is used
        instead of `main`, unless only `main` is cached, with `readable` weights, or the Hub has
        deleted it.
    Raises NoNetwork, another OSError or ValueError, with a message of one line.
    """
    if not re.fullmatch(r"(?a:\w[\w.-]*(/\w[\w.-]*)?)", repo_id):
        raise ValueError(f"{repo_id!r} is neither a folder nor a model on the Hub (owner/name).")
    if pinned and not revision:
        if in_cache(repo_id, pinned) or not in_cache(repo_id, "main", readable):
            try:
                return find_revision(repo_id, pinned)
            except FileNotFoundError:  # deleted from the Hub
                pass
    return find_revision(repo_id, revision or "main")


def find_revision(repo_id, revision):
    """The snapshot of a revision: the newest, or the one in the cache if the Hub sends none."""
    cached = in_cache(repo_id, revision)
    offline = os.getenv("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if cached and (offline or re.fullmatch("[0-9a-f]{40}", revision)):
        return cached
    if offline:
        raise NoNetwork(f"{repo_id} is neither a folder nor in the cache: unset HF_HUB_OFFLINE.")
    try:
        return update(repo_id, revision, attempts=1 if cached else 5)
    except OSError as error:
        failure = explain(error, repo_id)
    if not cached:
        raise failure
    print(f"Using {repo_id} from the cache. {failure}", file=sys.stderr)
    return cached


def explain(error, repo_id):
    """The error with a message of one line, in the words of the Hub if it has answered."""
    if isinstance(error, HTTPError):
        kind = FileNotFoundError if error.code == 404 else PermissionError
        said = error.headers.get("X-Error-Message") or error.reason
        return kind(f'There is no folder {repo_id}, and the Hub says "{said}": see '
                    f"{endpoint()}/{repo_id} (private or gated models need HF_TOKEN).")
    if isinstance(error, URLError):
        if isinstance(error.reason, SSLCertVerificationError):
            return ConnectionError(f"{error.reason.verify_message}. Run 'Install Certificates"
                                   ".command' of Python on macOS, or set SSL_CERT_FILE.")
        proxy = getproxies().get(urlsplit(endpoint()).scheme, "none").rpartition("@")[2]
        return NoNetwork(f"There is no folder {repo_id}, and {endpoint()} cannot be reached "
                         f"({error.reason}; proxy: {proxy}).")
    return error


def in_cache(repo_id, revision, weights=WEIGHTS):
    """The cached snapshot of a revision, or None if files are missing."""
    folder = model_folder(repo_id)
    snapshot = folder / "snapshots" / (read(folder / "refs" / revision) or revision)
    is_complete = (all((snapshot / name).is_file() for name in REQUIRED)
                   and any((snapshot / name).is_file() for name in weights))
    return snapshot if is_complete else None


def update(repo_id, revision, attempts):
    """Download what the cache lacks of a revision, and return its snapshot."""
    folder = model_folder(repo_id)
    commit, files = list_files(repo_id, revision, attempts)
    weights = [name for name in WEIGHTS if name in files][:1]
    missing = [name for name in REQUIRED if name not in files]
    if missing or not weights:
        raise FileNotFoundError(f"{endpoint()}/{repo_id} lacks {', '.join(missing or WEIGHTS)}.")
    snapshot = folder / "snapshots" / commit
    for name in (*REQUIRED, *OPTIONAL, *weights):
        path = snapshot / name
        if name in files and not path.is_file():
            checksum, size = files[name]
            blob = fetch(f"{endpoint()}/{repo_id}/resolve/{commit}/{name}", folder, checksum, size)
            try:
                os.symlink(f"../../blobs/{checksum}", beside(path))
            except OSError:  # Windows allows links to few users
                os.replace(blob, path)
            else:
                os.replace(beside(path), path)
    ref = folder / "refs" / revision
    if commit not in (revision, read(ref)):
        beside(ref).write_text(commit)  # last, so that an interrupted update keeps the older one
        os.replace(beside(ref), ref)
    return snapshot


def list_files(repo_id, revision, attempts):
    """The commit of a revision, and its files: {name: (checksum, size)}."""
    url = f"{endpoint()}/api/models/{repo_id}/revision/{quote(revision, safe='')}?blobs=true"
    body = io.BytesIO()
    download(url, body, attempts)
    try:
        listing = json.loads(body.getvalue())
        files = {}
        for file in listing["siblings"]:
            checksum = file["lfs"]["sha256"] if file.get("lfs") else file["blobId"]
            bytes.fromhex(checksum)  # raises ValueError; it becomes a file name
            files[file["rfilename"]] = checksum, file["size"]
        bytes.fromhex(listing["sha"])
        return listing["sha"], files
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConnectionError(f"{endpoint()} does not answer as the Hub does. Log in to this "
                              "network in a browser, or check HF_ENDPOINT.") from None


def fetch(url, folder, checksum, size):
    """The path of a blob. It is downloaded and verified if the cache lacks it."""
    blob = folder / "blobs" / checksum
    partial = blob.with_name(f"{checksum}.incomplete")
    lock = folder.parent / ".locks" / folder.name / f"{checksum}.lock"
    for path in blob, lock:
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as held:
        if fcntl:
            fcntl.flock(held, fcntl.LOCK_EX)
        if blob.is_file():  # another process may have downloaded it meanwhile
            return blob
        digest = hashlib.sha256() if len(checksum) == 64 else hashlib.sha1(b"blob %d\0" % size)
        with open(partial, "a+b") as file:
            if file.tell() < size:
                download(url, file)
            file.seek(0)
            while block := file.read(1 << 20):
                digest.update(block)
            if digest.hexdigest() != checksum:
                file.truncate(0)
                raise ConnectionError(f"{url} arrived damaged and was deleted. Try again.")
        os.replace(partial, blob)
        return blob


def download(url, file, attempts=5):
    """Download the rest of `url` to the end of `file`. Failed attempts are repeated."""
    failures = 0
    while True:
        start, pause = file.tell(), 0
        try:
            return receive(url, file)
        except HTTPError as error:
            if error.code not in (408, 429, 500, 502, 503, 504):
                raise
            reason = error
            asked = (re.search(r"r=0;t=(\d+)", error.headers.get("RateLimit", ""))
                     or re.search(r"^(\d+)$", error.headers.get("Retry-After", "")))
            pause = int(asked[1]) + 1 if asked else 0
        except (URLError, HTTPException, ConnectionError, TimeoutError, SSLError) as error:
            if isinstance(error, URLError) and not start:  # nothing has arrived: fail at once
                raise
            reason = error
        failures = 1 if file.tell() > start else failures + 1
        pause = pause or 2 ** (failures - 1)  # 1, 2, 4, 8 seconds
        reason = f"Download from {urlsplit(url).hostname} interrupted: {reason}."
        if failures == attempts or pause > 310:  # its limits end every 300 seconds
            raise ConnectionError(f"{reason} Try again later: the download will resume.")
        print(f"{reason} Next attempt in {pause} s.", file=sys.stderr)
        time.sleep(pause)


def receive(url, file):
    """One attempt to append the rest of `url` to `file`. A terminal shows the progress."""
    done = file.tell()
    request = Request(url, headers={"User-Agent": "lsg-barthez"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    token = os.getenv("HF_TOKEN") or os.getenv("HUGGING_FACE_HUB_TOKEN")
    token = token or read(hf_path(os.getenv("HF_TOKEN_PATH"), "token"))
    if token:  # without white space: an error about a line break would show the token
        request.add_unredirected_header("Authorization", f"Bearer {''.join(token.split())}")
    with build_opener(Redirects).open(request, timeout=15) as answer:
        if answer.status != 206:  # the answer is the whole file
            file.seek(0)
            file.truncate()
            done = 0
        size = done + int(answer.headers.get("Content-Length") or 0)
        while block := answer.read1(1 << 18):  # `read` waits for a full block, which a kill loses
            file.write(block)
            done += len(block)
            if size >= 10**7 and sys.stderr.isatty():
                print(f"{done // 10**6:,} of {size // 10**6:,} MB", file=sys.stderr,
                      end="\n" if done == size else "\r")
    if done < size:
        raise ConnectionError(f"{size - done:,} bytes are missing")


class Redirects(HTTPRedirectHandler):
    """Sends the token only to the same host. Follows 308, which Python 3.10 does not."""

    http_error_308 = HTTPRedirectHandler.http_error_302

    def redirect_request(self, request, answer, code, message, headers, url):
        redirected = super().redirect_request(request, answer, 307, message, headers, url)
        if urlsplit(url)[:2] == urlsplit(request.full_url)[:2]:  # scheme, host and port
            redirected.unredirected_hdrs.update(request.unredirected_hdrs)
        return redirected


def endpoint():
    return (os.getenv("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hf_path(path, name):
    """`path`, by default `name` in HF_HOME."""
    cache = os.getenv("XDG_CACHE_HOME") or "~/.cache"
    home = os.getenv("HF_HOME") or f"{cache}/huggingface"
    return Path(os.path.expandvars(os.path.expanduser(path or f"{home}/{name}")))


def model_folder(repo_id):
    cache = hf_path(os.getenv("HF_HUB_CACHE") or os.getenv("HUGGINGFACE_HUB_CACHE"), "hub")
    return cache / f"models--{repo_id.replace('/', '--')}"


def read(path):
    return path.read_text(errors="replace") if path.is_file() else ""


def beside(path):
    """A temporary path from which a file is moved to `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{os.getpid()}")
