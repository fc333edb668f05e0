"""The Hub client against a Hub on this machine: every fault, and the remedy that it has.

Each test fails if the remedy that it names is taken out of the code.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from email.message import Message
from email.utils import formatdate
from pathlib import Path

import pytest

import load_weights as client
from hub_server import Hub, etag_of
from load_weights import EntryNotFoundError, cached, download

TOKEN = "hf_NeverToBeSeenInAnyMessage"
REPO = "moussaKam/barthez"
LARGE = bytes(range(251)) * 37  # 9,287 bytes: a length that divides nothing
SMALL = b'{"d_model": 768, "encoder_layers": 6, "decoder_layers": 6}'
FILES = {"config.json": SMALL, "model.safetensors": LARGE}


@pytest.fixture
def hub(monkeypatch, tmp_path, capsys):
    """A Hub that publishes FILES, an empty cache in tmp_path/hub, and a token; pauses are noted in
    hub.pauses instead of made."""
    for name in list(os.environ):
        if name.startswith(("HF_", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "5")
        hub.pauses = []
        monkeypatch.setattr(time, "sleep", hub.pauses.append)
        hub.commit = hub.add(REPO, dict(FILES))
        yield hub
    assert TOKEN not in "".join(capsys.readouterr()), "the token was printed"
    assert not any("Authorization" in headers for headers in hub.requests("cdn"))


def fails(kind, filename="model.safetensors", revision="main", repo_id=REPO) -> str:
    """The message with which download fails: one line, without the token."""
    with pytest.raises(kind) as caught:
        download(repo_id, filename, revision)
    assert type(caught.value) is kind, repr(caught.value)
    message = str(caught.value)
    assert message and "\n" not in message and TOKEN not in message, message
    return message


def tree(folder: Path) -> "dict[str, object]":
    """Every file below: its bytes, or for a link where it points to."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else
            path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_symlink() or path.is_file()}


def cache_of(commit: str, *names: str, files=FILES, revision="main") -> "dict[str, object]":
    """What `tree` gives for a cache as the official client (0.36) fills it; without lock files."""
    root, expected = "models--moussaKam--barthez", {}
    for name in names:
        etag = etag_of(name, files[name])
        expected[f"{root}/blobs/{etag}"] = files[name]
        expected[f"{root}/snapshots/{commit}/{name}"] = f"../../blobs/{etag}"
    if revision:
        expected[f"{root}/refs/{revision}"] = commit.encode()
    return expected


def cache(tmp_path: Path) -> "dict[str, object]":
    found = tree(tmp_path / "hub") if (tmp_path / "hub").exists() else {}
    return {name: content for name, content in found.items() if not name.startswith(".locks/")}


def leftover(tmp_path: Path, content: bytes, name="model.safetensors") -> Path:
    """What an interrupted download leaves behind."""
    path = tmp_path / "hub" / "models--moussaKam--barthez" / "blobs"
    path.mkdir(parents=True)
    path = path / f"{etag_of(name, FILES[name])}.incomplete"
    path.write_bytes(content)
    return path


# The protocol when all goes well

def test_a_large_file_comes_from_the_storage_without_the_token(hub, tmp_path):
    path = download(REPO, "model.safetensors")
    assert path == tmp_path / "hub/models--moussaKam--barthez/snapshots" / hub.commit / path.name
    assert path.read_bytes() == LARGE
    assert cache(tmp_path) == cache_of(hub.commit, "model.safetensors")
    lock = f"hub/.locks/models--moussaKam--barthez/{etag_of(path.name, LARGE)}.lock"
    assert (tmp_path / lock).exists(), "the official client waits at this very file"
    assert [(server, verb) for server, verb, *_ in hub.log] == [
        ("hub", "HEAD"), ("hub", "GET"), ("cdn", "GET")]
    for headers in hub.requests("hub", "HEAD") + hub.requests("hub"):
        assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert hub.commit in hub.log[1][2], "the bytes are to come from the commit, not the branch"
    assert {headers["Accept-Encoding"] for *_, headers in hub.log} == {"identity"}


def test_a_small_file_comes_from_the_hub_itself(hub, tmp_path):
    assert download(REPO, "config.json").read_bytes() == SMALL
    assert cache(tmp_path) == cache_of(hub.commit, "config.json")
    assert len(hub.log) == 2


def test_a_small_file_by_a_redirect_that_has_a_query(hub, tmp_path):
    hub.relay = True
    assert download(REPO, "config.json").read_bytes() == SMALL
    assert cache(tmp_path) == cache_of(hub.commit, "config.json")
    assert len(hub.log) == 4


def test_a_second_call_asks_but_fetches_nothing(hub):
    first = download(REPO, "model.safetensors")
    hub.log.clear()
    assert download(REPO, "model.safetensors") == first
    assert [verb for _, verb, *_ in hub.log] == ["HEAD"]


def test_a_pull_request_is_a_revision(hub, tmp_path):
    files = {"model.safetensors": LARGE[::-1]}
    commit = hub.add(REPO, files, revision="refs/pr/2")
    assert download(REPO, "model.safetensors", "refs/pr/2").read_bytes() == LARGE[::-1]
    assert cache(tmp_path) == cache_of(commit, "model.safetensors", files=files,
                                       revision="refs/pr/2")


def test_files_in_folders(hub, tmp_path):
    hub.add(REPO, {"onnx/a b.bin": b"weights"})
    path = download(REPO, "onnx/a b.bin")
    assert path.read_bytes() == b"weights" and path.parent.name == "onnx"
    assert os.readlink(path).startswith("../../../blobs/")


def test_a_renamed_repository_is_followed_with_the_token(hub):
    hub.renamed["moussaKam/old"] = REPO
    assert download("moussaKam/old", "config.json").read_bytes() == SMALL
    assert download("moussaKam/old", "model.safetensors").read_bytes() == LARGE
    assert all("Authorization" in headers for server, *_, headers in hub.log if server == "hub")


def test_a_branch_that_moved_costs_only_what_changed(hub, tmp_path):
    old, before = hub.commit, download(REPO, "model.safetensors")
    new = hub.add(REPO, {"config.json": b"{}", "model.safetensors": LARGE})
    hub.log.clear()
    after = download(REPO, "model.safetensors")
    assert before != after and before.resolve() == after.resolve()
    assert [verb for _, verb, *_ in hub.log] == ["HEAD"]
    assert cache(tmp_path) == {**cache_of(old, "model.safetensors"),
                               **cache_of(new, "model.safetensors")}


@pytest.mark.parametrize("etag", ['W/"{}"', '"{}"', "{}"])
def test_etags_are_stripped(hub, tmp_path, etag):
    plain = etag_of("config.json", SMALL)
    hub.faults["HEAD"] = [{"ETag": etag.format(plain)}]
    download(REPO, "config.json")
    assert cache(tmp_path) == cache_of(hub.commit, "config.json")


# What the Hub refuses

@pytest.mark.parametrize("kind, says, status, headers", [
    (PermissionError, "gated", 403, {"X-Error-Code": "GatedRepo"}),
    (PermissionError, "HF_TOKEN", 401, {}),
    (PermissionError, "renew", 401,
     {"X-Error-Message": "Invalid credentials in Authorization header"}),
    (PermissionError, "may not be read", 403, {}),
    (PermissionError, "may not be read", 403, {"X-Error-Code": "Disabled"}),
    (FileNotFoundError, "check its name", 404, {"X-Error-Code": "RepoNotFound"}),
    (FileNotFoundError, "check its name", 401, {"X-Error-Code": "RepoNotFound"}),
    (FileNotFoundError, "check its name", 404, {}),
    (ConnectionError, "HTTP 410", 410, {}),
    (ConnectionError, "HTTP 304", 304, {}),
])
def test_each_refusal_has_its_own_message(hub, tmp_path, kind, says, status, headers):
    hub.refusals[REPO] = status, headers
    message = fails(kind)
    assert says in message and (REPO in message or says == "renew"), message
    assert len(hub.log) == 1 and not hub.pauses, "a refusal is final"
    assert not cache(tmp_path)


def test_missing_file_revision_and_repository(hub):
    assert "no pytorch_model.bin of" in fails(EntryNotFoundError, "pytorch_model.bin")
    assert "No such revision" in fails(FileNotFoundError, revision="refs/pr/9")
    assert "no/such does not exist" in fails(FileNotFoundError, repo_id="no/such")


def test_a_refusal_of_the_storage_is_not_blamed_on_the_token(hub):
    hub.faults["CDN"] = [{"status": 403}]  # an address that has expired
    message = fails(ConnectionError)
    assert "403" in message and "secret" not in message  # the address is signed


# Retries

@pytest.mark.parametrize("where, status", [
    *(("HEAD", status) for status in (408, 429, 500, 502, 503, 504)), ("GET", 503), ("CDN", 503)])
def test_these_are_tried_again(hub, where, status):
    hub.faults[where] = [{"status": status}] * 2
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert hub.pauses == [1, 2]


@pytest.mark.parametrize("where", ["HEAD", "GET", "CDN"])
def test_a_connection_cut_before_the_answer_is_tried_again(hub, where):
    hub.faults[where] = [{"hangup": True}]
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert hub.pauses == [1]


@pytest.mark.parametrize("where, setting", [
    ("HEAD", "HF_HUB_ETAG_TIMEOUT"), ("CDN", "HF_HUB_DOWNLOAD_TIMEOUT")])
@pytest.mark.parametrize("fault", [{"silent": True}, {"stall": 100}])
def test_silence_is_not_waited_for(hub, monkeypatch, where, setting, fault):
    monkeypatch.setenv(setting, "0.1")
    hub.faults[where] = [fault]
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert hub.pauses == ([] if where == "HEAD" and "stall" in fault else [1])


@pytest.mark.parametrize("base, pauses", [(1, [1, 2, 4, 8]), (25, [25, 50, 60, 60])])
def test_pauses_grow_up_to_a_limit_and_then_it_gives_up(hub, monkeypatch, capsys, base, pauses):
    monkeypatch.setattr(client, "PAUSE", base)
    hub.faults["HEAD"] = [{"status": 503}] * 9
    assert "HTTP 503" in fails(ConnectionError)
    assert hub.pauses == pauses
    assert capsys.readouterr().err.count("trying again") == 4


def test_one_try_can_be_all(hub):
    hub.close()
    with pytest.raises(ConnectionError):
        download(REPO, "config.json", tries=1)
    assert not hub.pauses


@pytest.mark.parametrize("wish, pause", [
    ("7", 7), ("0", 1), ("-5", 1), ("86400", 60), ("9" * 400, 60), ("soon", 1), ("", 1), ("²", 1)])
def test_retry_after_in_seconds(hub, wish, pause):
    hub.faults["HEAD"] = [{"status": 429, "Retry-After": wish}]
    download(REPO, "config.json")
    assert hub.pauses == [pause]


@pytest.mark.parametrize("skew", [-1e7, 0, 1e7])  # in seconds: four months
def test_retry_after_as_a_date_when_our_clock_is_wrong(hub, skew):
    now = time.time() + skew
    hub.faults["HEAD"] = [{"status": 429, "Date": formatdate(now, usegmt=True),
                           "Retry-After": formatdate(now + 7, usegmt=True)}]
    download(REPO, "config.json")
    assert hub.pauses == [7]


def test_an_invalid_certificate_is_final_and_names_the_clock(hub, monkeypatch):
    def refuse(*_, **__):
        error = ssl.SSLCertVerificationError(1, "[SSL] certificate verify failed")
        error.verify_message = "certificate is not yet valid"
        raise urllib.error.URLError(error)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    message = fails(ConnectionError)
    assert "clock" in message and "not yet valid" in message and not hub.pauses


# Interruptions

def test_a_dropped_download_resumes(hub, tmp_path):
    hub.faults["CDN"] = [{"drop": 1000}] * (client.TRIES + 2)  # each gains, so none counts
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert [headers.get("Range") for headers in hub.requests("cdn")] == [
        None, *(f"bytes={n}000-" for n in range(1, client.TRIES + 3))]
    assert hub.sent == len(LARGE)
    assert set(hub.pauses) == {1}


def test_a_download_that_gains_nothing_is_given_up(hub, tmp_path):
    hub.faults["CDN"] = [{"drop": 1000}] + [{"drop": 0}] * 9
    assert "1,000 of 9,287 bytes" in fails(ConnectionError)
    assert len(hub.requests("cdn")) == client.TRIES
    assert list(cache(tmp_path).values()) == [LARGE[:1000]], "kept, to go on from later"
    hub.faults["CDN"].clear()
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert hub.sent == len(LARGE)


def test_a_killed_download_resumes(hub, tmp_path):
    hub.faults["CDN"] = [{"stall": 5000}]
    blobs = tmp_path / "hub/models--moussaKam--barthez/blobs"
    process = child()
    wait_until(lambda: any(path.stat().st_size for path in blobs.glob("*")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = blobs.iterdir()
    assert partial.read_bytes() == LARGE[:5000] and partial.suffix == ".incomplete"
    assert cached(REPO, "model.safetensors") is None
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert hub.requests("cdn")[-1]["Range"] == "bytes=5000-"
    assert cache(tmp_path) == cache_of(hub.commit, "model.safetensors")


def child() -> subprocess.Popen:
    """Another process that downloads the large file and prints its bytes as hexadecimal."""
    code = (f"from {client.__name__} import download\n"
            f"print(download({REPO!r}, 'model.safetensors').read_bytes().hex())")
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(client.__file__).parent)})


def wait_until(done, *processes):
    for _ in range(3000):
        if done():
            return
        assert all(process.poll() is None for process in processes), "one ended before its time"
        threading.Event().wait(0.01)  # time.sleep only takes notes here
    raise AssertionError("nothing happened within 30 s")


@pytest.mark.parametrize("fault, requests", [
    ({"ignore_range": True}, 1), ({"shift": 7}, 2), ({"shift": -7}, 2), ({"status": 416}, 2)])
def test_a_server_that_cannot_resume_starts_over(hub, tmp_path, fault, requests):
    leftover(tmp_path, LARGE[:4000])
    hub.faults["CDN"] = [fault]
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert len(hub.requests("cdn")) == requests
    assert cache(tmp_path) == cache_of(hub.commit, "model.safetensors")


@pytest.mark.parametrize("content", [b"wrong" * 500, b"wrong" * 9999, b"?" * len(LARGE)],
                         ids=["shorter", "longer", "as long"])
def test_a_leftover_that_is_wrong_is_given_up(hub, tmp_path, content):
    leftover(tmp_path, content)
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert cache(tmp_path) == cache_of(hub.commit, "model.safetensors")


def test_a_leftover_that_is_complete_is_not_fetched_again(hub, tmp_path):
    leftover(tmp_path, LARGE)
    assert download(REPO, "model.safetensors").read_bytes() == LARGE
    assert [verb for _, verb, *_ in hub.log] == ["HEAD"]


# Wrong answers

def in_vain(hub, tmp_path, says: str, filename="model.safetensors"):
    """It fails with this message, leaves nothing where it counts, and succeeds the next time."""
    message = fails(ConnectionError, filename)
    assert says in message, message
    assert all(name.endswith(".incomplete") for name in cache(tmp_path)), cache(tmp_path).keys()
    assert cached(REPO, filename) is None
    for queue in hub.faults.values():
        queue.clear()
    assert download(REPO, filename).read_bytes() == FILES[filename]
    assert cache(tmp_path) == cache_of(hub.commit, filename)


@pytest.mark.parametrize("name, where", [("model.safetensors", "CDN"), ("config.json", "GET")])
@pytest.mark.parametrize("fault, says", [
    ({"body": b"wrong" * 5000}, "checksum"),  # longer than promised
    ({"html": True}, "web page"),
    ({"gzip": True}, "compressed"),
])
def test_wrong_content_is_never_kept(hub, tmp_path, name, where, fault, says):
    hub.faults[where] = [fault] * 9
    in_vain(hub, tmp_path, says, name)


@pytest.mark.parametrize("name, where", [("model.safetensors", "CDN"), ("config.json", "GET")])
def test_wrong_bytes_of_the_right_length(hub, tmp_path, name, where):
    hub.faults[where] = [{"body": FILES[name][::-1]}] * 9
    in_vain(hub, tmp_path, "checksum", name)
    assert not hub.pauses, "the whole file came, wrong: another try would cost as much again"


@pytest.mark.parametrize("size, says", [("9288", "9,287 of 9,288"), ("9286", "checksum")])
def test_a_size_that_is_wrong(hub, tmp_path, size, says):
    hub.faults["HEAD"] = [{"X-Linked-Size": size}]
    in_vain(hub, tmp_path, says)


def test_an_endless_answer_does_not_fill_the_disk(hub, tmp_path):
    hub.faults["CDN"] = [{"body": bytes(50_000_000)}]
    in_vain(hub, tmp_path, "checksum")
    assert hub.sent < 20_000_000


@pytest.mark.parametrize("fault", [
    {"html": True}, {"X-Repo-Commit": None}, {"X-Linked-Etag": '"md5-of-something"'},
    {"X-Repo-Commit": "../../../../escaped"}, {"X-Linked-Etag": '"../../../../escaped"'},
    {"X-Linked-Etag": '"' + "a" * 63 + '/"'}, {"X-Repo-Commit": "/" + "a" * 39},
    {"X-Linked-Size": None}, {"X-Linked-Size": "-1"}, {"X-Linked-Size": "²"},
])
def test_an_answer_that_is_not_the_hubs(hub, tmp_path, fault):
    hub.faults["HEAD"] = [fault]
    before = set(tmp_path.parent.rglob("*"))
    in_vain(hub, tmp_path, "does not answer as the Hub")
    assert all(tmp_path / "hub" in (path, *path.parents)
               for path in set(tmp_path.parent.rglob("*")) - before)


def test_another_commit_than_the_one_asked_for(hub, tmp_path):
    hub.faults["HEAD"] = [{"X-Repo-Commit": "0" * 40}]
    assert "0" * 40 in fails(ConnectionError, revision=hub.commit)


@pytest.mark.parametrize("where", ["HEAD", "GET"])
@pytest.mark.parametrize("target", [
    "file:///etc/hostname", "ftp://127.0.0.1:1/x", "data:,x", "mailto:x", "//[",
    "http://127.0.0.1:99999/", "http://127.0.0.1:1/é", "http://127.0.0.1:1/a b?signature=secret"])
def test_redirects_to_nowhere(hub, tmp_path, capsys, where, target):
    hub.faults[where] = [{"status": 302, "Location": target}] * 9
    assert "secret" not in fails(ConnectionError) + capsys.readouterr().err
    assert set(cache(tmp_path).values()) <= {b""}


def test_redirects_in_circles(hub):
    hub.faults["HEAD"] = [{"status": 302, "Location": "/again"}] * 99
    assert "circles" in fails(ConnectionError)
    assert len(hub.log) == 10


# Two at once

def test_two_processes_at_once_fetch_it_once(hub, tmp_path):
    hub.faults["CDN"] = [{"stall": 5000}]
    processes = [child(), child()]
    wait_until(lambda: len(hub.requests("hub", "HEAD")) == 2 and hub.sent, *processes)
    threading.Event().wait(0.3)  # for the second to go ahead, were there no lock
    hub.go.set()
    output, notes = zip(*(process.communicate(timeout=60) for process in processes))
    assert [bytes.fromhex(text) for text in output] == [LARGE, LARGE], notes
    assert "".join(notes).count("Another process") == 1 and hub.sent == len(LARGE), notes
    assert cache(tmp_path) == cache_of(hub.commit, "model.safetensors")


@pytest.mark.parametrize("missing", ["module", "on this drive"])
def test_two_at_once_where_there_are_no_locks(hub, tmp_path, monkeypatch, missing):
    if missing == "module":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    hub.faults["CDN"] = [{"slow": pause, "step": 1000} for pause in (0.01, 0.013)]
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(download(REPO, "model.safetensors")))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in paths] == [LARGE, LARGE]
    assert len(hub.requests("cdn")) == 2 and not hub.pauses
    assert cache(tmp_path) == cache_of(hub.commit, "model.safetensors")


def test_without_locks_a_failure_leaves_no_litter(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    hub.faults["CDN"] = [{"drop": 100}] + [{"drop": 0}] * 9
    fails(ConnectionError)
    assert not cache(tmp_path)


# The disk

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk(hub, tmp_path):
    partial = leftover(tmp_path, b"")
    partial.unlink()
    partial.symlink_to("/dev/full")
    message = fails(OSError)
    assert "No space left on device" in message and "HF_HUB_CACHE" in message
    assert len(hub.requests("cdn")) == 1 and not hub.pauses, "no retry makes room on a disk"
    partial.unlink()
    assert cache(tmp_path) == {}
    assert download(REPO, "model.safetensors").read_bytes() == LARGE


def test_a_disk_that_fills_while_the_branch_is_noted(hub, tmp_path, monkeypatch):
    download(REPO, "config.json")
    ref = tmp_path / "hub/models--moussaKam--barthez/refs/main"
    new = hub.add(REPO, {"config.json": b"{}"})

    def half(path, text):
        path.write_bytes(text[:20].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_text", half)
    assert download(REPO, "config.json").read_bytes() == SMALL  # the copy of before
    assert ref.read_text() == hub.commit != new
    assert not list(tmp_path.rglob("*.incomplete"))


def test_without_symlinks_the_file_is_copied(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "symlink", fail_with(errno.EPERM))
    path = download(REPO, "model.safetensors")
    assert path.read_bytes() == LARGE and not path.is_symlink()
    assert download(REPO, "model.safetensors") == path and len(hub.requests("cdn")) == 1


def test_a_disk_that_fills_while_the_file_is_copied(hub, tmp_path, monkeypatch):
    def half(source, target):
        Path(target).write_bytes(LARGE[:5000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "symlink", fail_with(errno.EPERM))
    monkeypatch.setattr(shutil, "copyfile", half)
    assert "No space left" in fails(OSError)
    assert list(cache(tmp_path).values()) == [LARGE], "the blob is whole, and there is no more"


def fail_with(number: int):
    def function(*_, **__):
        raise OSError(number, os.strerror(number))
    return function


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    message = fails(OSError)
    assert "Not a directory" in message and "HF_HUB_CACHE" in message and "/file/hub" in message
    assert not hub.requests("cdn") and not hub.pauses


def test_a_cache_that_is_up_to_date_is_only_read(hub, tmp_path):
    download(REPO, "model.safetensors")
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path / "hub").rglob("*")}
    download(REPO, "model.safetensors")
    assert before == {path: path.lstat().st_mtime_ns for path in (tmp_path / "hub").rglob("*")}


def test_a_read_only_cache_still_gives_its_own_copy(hub, monkeypatch, capsys):
    old = download(REPO, "config.json")
    hub.add(REPO, {"config.json": b"{}"})
    monkeypatch.setattr(os, "replace", fail_with(errno.EROFS))
    assert download(REPO, "config.json") == old
    assert "Read-only file system" in capsys.readouterr().err


# Offline

def test_a_commit_in_the_cache_is_returned_without_a_request(hub, tmp_path):
    path = download(REPO, "config.json", hub.commit)
    assert cache(tmp_path) == cache_of(hub.commit, "config.json", revision=None)
    hub.log.clear()
    assert download(REPO, "config.json", hub.commit) == path and not hub.log


@pytest.mark.parametrize("value", ["1", "ON", "yes", "True"])
def test_offline_nothing_is_asked(hub, monkeypatch, value):
    path = download(REPO, "config.json")
    hub.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert download(REPO, "config.json") == path
    assert "HF_HUB_OFFLINE" in fails(EntryNotFoundError)
    assert "HF_HUB_OFFLINE" in fails(EntryNotFoundError, revision="0" * 40)
    assert not hub.log


def test_offline_can_be_switched_off(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert download(REPO, "config.json").read_bytes() == SMALL


def test_without_a_network_the_cached_copy_is_used(hub, capsys):
    path = download(REPO, "config.json")
    hub.close()
    assert download(REPO, "config.json") == path and not hub.pauses
    assert capsys.readouterr().err.strip().endswith("Using the copy in the cache.")
    assert "127.0.0.1 cannot be reached" in fails(ConnectionError)
    assert hub.pauses == [1, 2, 4, 8]


def test_where_names_do_not_resolve_there_is_no_waiting(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    assert "hub.invalid" in fails(ConnectionError) and not hub.pauses


@pytest.mark.parametrize("fault", [
    {"status": 503}, {"status": 401}, {"status": 403, "X-Error-Code": "GatedRepo"},
    {"status": 404, "X-Error-Code": "RepoNotFound"}, {"html": True}, {"hangup": True}])
def test_when_the_hub_fails_the_cached_copy_is_used(hub, fault):
    path = download(REPO, "config.json")
    hub.faults["HEAD"] = [fault]
    assert download(REPO, "config.json") == path and not hub.pauses


def test_when_the_new_file_cannot_be_fetched_the_cached_copy_is_used(hub):
    path = download(REPO, "config.json")
    hub.add(REPO, {"config.json": b"{}"})
    hub.faults["GET"] = [{"html": True}]
    assert download(REPO, "config.json") == path
    assert download(REPO, "config.json").read_bytes() == b"{}"


def test_a_file_that_was_removed_from_the_branch_is_not_taken_from_the_cache(hub):
    download(REPO, "config.json")
    hub.add(REPO, {"model.safetensors": LARGE})
    fails(EntryNotFoundError, "config.json")


# The official client's cache and settings

def fill_as_the_official_client_does(cache: Path, commit: str):
    for name, content in cache_of(commit, *FILES).items():
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(content) if isinstance(content, str) else path.write_bytes(content)
    for name in (f"models--moussaKam--barthez/.no_exist/{commit}/tokenizer_config.json",
                 f".locks/models--moussaKam--barthez/{etag_of('config.json', SMALL)}.lock"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).touch()


def test_a_cache_of_the_official_client_is_used_offline(hub, tmp_path, monkeypatch):
    fill_as_the_official_client_does(tmp_path / "hub", hub.commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {name: download(REPO, name).read_bytes() for name in FILES} == FILES
    assert not hub.log


def test_a_cache_of_the_official_client_is_used_online(hub, tmp_path):
    fill_as_the_official_client_does(tmp_path / "hub", hub.commit)
    assert {name: download(REPO, name).read_bytes() for name in FILES} == FILES
    assert {verb for _, verb, *_ in hub.log} == {"HEAD"}


@pytest.mark.parametrize("damage", ["ref", "blob"])
def test_a_damaged_cache_is_mended(hub, tmp_path, damage):
    fill_as_the_official_client_does(tmp_path / "hub", hub.commit)
    folder = tmp_path / "hub/models--moussaKam--barthez"
    if damage == "ref":
        (folder / "refs/main").write_bytes(b"\xff../../..\n")
    else:  # the links remain
        shutil.rmtree(folder / "blobs")
    assert cached(REPO, "config.json") is None
    assert download(REPO, "config.json").read_bytes() == SMALL
    assert (folder / "refs/main").read_bytes() == hub.commit.encode()


def test_a_branch_in_the_cache_cannot_point_outside(hub, tmp_path, monkeypatch):
    fill_as_the_official_client_does(tmp_path / "hub", hub.commit)
    (tmp_path / "hub/models--moussaKam--barthez/refs/main").write_text("../../../elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("{}")
    assert cached(REPO, "config.json") is None


@pytest.mark.parametrize("settings, place", [
    ({"HF_HUB_CACHE": "{}/a", "HF_HOME": "{}/b", "XDG_CACHE_HOME": "{}/c"}, "a"),
    ({"HF_HOME": "{}/b", "XDG_CACHE_HOME": "{}/c"}, "b/hub"),
    ({"XDG_CACHE_HOME": "{}/c"}, "c/huggingface/hub"),
    ({}, "home/.cache/huggingface/hub"),
    ({"HF_HUB_CACHE": "~/d"}, "home/d"),
    ({"HF_HUB_CACHE": "$HOME/e"}, "home/e"),
    ({"HF_HUB_CACHE": ""}, "home/.cache/huggingface/hub"),
])
def test_where_the_cache_is(hub, tmp_path, monkeypatch, settings, place):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    path = download(REPO, "config.json")
    assert path.parents[3] == tmp_path / place


@pytest.mark.parametrize("name, value", [
    ("HF_ENDPOINT", "huggingface.co"), ("HF_ENDPOINT", "ftp://huggingface.co"),
    ("HF_ENDPOINT", f"https://user:{TOKEN}@huggingface.co"), ("HF_ENDPOINT", "https://a/?b"),
    ("HF_HUB_ETAG_TIMEOUT", "ten"), ("HF_HUB_ETAG_TIMEOUT", "-1"), ("HF_HUB_ETAG_TIMEOUT", "nan"),
])
def test_settings_that_cannot_be_right(hub, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert name in fails(ValueError) and not hub.log


# Security

@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/",
                                  "a\\..\\x", "C:x", "a\0b", "a\nb", "a/./b", "x?y"])
def test_unsafe_names_never_become_paths(hub, tmp_path, name):
    fails(ValueError, filename=name)
    fails(ValueError, revision=name)
    assert not hub.log and not cache(tmp_path)


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a/..", "a b/c", "a/b\n", "/a", "a/", ".a/b",
                                  "a--b/c", "a..b", "b.git", "é/b", "x" * 97, "./model", "a\\b"])
def test_malformed_repositories(hub, tmp_path, name):
    assert repr(name) in fails(ValueError, repo_id=name)
    assert not hub.log and not cache(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "a/b", "0-a_b.c/D", "x" * 96])
def test_wellformed_repositories(hub, name):
    hub.add(name, {"config.json": SMALL})
    assert download(name, "config.json").read_bytes() == SMALL


@pytest.mark.parametrize("endpoint", ["http://hub.invalid", "http://127.0.0.1.hub.invalid",
                                      "http://localhost.hub.invalid", "http://10.0.0.1:1"])
def test_the_token_is_never_sent_unencrypted(hub, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", fail_with(errno.ENETUNREACH))
    assert "HF_TOKEN" in fails(ValueError)
    monkeypatch.delenv("HF_TOKEN")
    assert "cannot be reached" in fails(ConnectionError)  # without a token it may be tried


@pytest.mark.parametrize("target, trusted", [
    ("/renamed/model/resolve/main/config.json", True),
    ("https://hub.invalid/x", True),
    ("http://hub.invalid/x", False),
    ("https://hub.invalid:8443/x", False),
    ("https://cdn.hub.invalid/x", False),
    ("https://hub.invalid@evil.invalid/x", False),
    ("//evil.invalid/x", False),
])
def test_only_the_hub_itself_sees_the_token(hub, monkeypatch, target, trusted):
    seen = []

    def answer(self, request, timeout):
        seen.append(request.get_header("Authorization"))
        headers = Message()
        if len(seen) == 1:
            headers["Location"] = target
        status = 302 if len(seen) == 1 else 410
        return urllib.request.addinfourl(io.BytesIO(), headers, request.full_url, status)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", answer)
    fails(ConnectionError)
    assert seen == [f"Bearer {TOKEN}", f"Bearer {TOKEN}" if trusted else None]


def test_the_token_of_a_file(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_home\n")
    download(REPO, "config.json")
    (tmp_path / "other").write_text("hf_path\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "other"))
    download(REPO, "config.json")
    (tmp_path / "other").unlink()
    download(REPO, "config.json")
    assert [headers.get("Authorization") for headers in hub.requests("hub", "HEAD")] == [
        "Bearer hf_home", "Bearer hf_path", None]


@pytest.mark.parametrize("token", [f"{TOKEN}\nX-Other: 1", f"{TOKEN} x", f"{TOKEN}é"])
def test_a_token_that_cannot_be_sent_is_not_printed_either(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    assert "HF_TOKEN" in fails(ValueError)


def test_a_proxy_is_not_asked_for_this_very_machine(hub, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert download(REPO, "model.safetensors").read_bytes() == LARGE


def test_a_proxy_is_asked_for_any_other(hub, monkeypatch):
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.delenv("HF_TOKEN")
    assert download(REPO, "config.json").read_bytes() == SMALL
    assert all(path.startswith("http://hub.invalid/") for _, _, path, _ in hub.log)


# What the user sees

class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_large_download_is_announced_in_one_line(hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(client, "LARGE", 5000)
    download(REPO, "config.json")
    assert capsys.readouterr() == ("", "")
    download(REPO, "model.safetensors")
    out, line = capsys.readouterr()
    assert not out and line.count("\n") == 1 and "\r" not in line
    assert all(part in line for part in (REPO, "model.safetensors", "0 MB", str(tmp_path / "hub")))


@pytest.mark.parametrize("disabled", ["", "1"])
def test_progress_on_a_terminal(hub, monkeypatch, disabled):
    monkeypatch.setattr(client, "LARGE", 5000)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", disabled)
    screen = Screen()
    with contextlib.redirect_stderr(screen):
        download(REPO, "model.safetensors")
    announced, *progress = screen.getvalue().splitlines()
    assert "Downloading" in announced and bool(progress) != bool(disabled)
    assert disabled or re.search(r"0\.0 of 0\.0 MB, \d+\.\d MB/s, 0:00 left", progress[-1])
    assert screen.getvalue().endswith("\n")


def test_progress_counts_from_where_a_download_resumed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "LARGE", 10)
    monkeypatch.setitem(FILES, "model.safetensors", bytes(3_000_000))
    hub.add(REPO, dict(FILES))
    leftover(tmp_path, bytes(2_000_000))
    hub.faults["CDN"] = [{"slow": 0.15, "step": 250_000}]
    screen = Screen()
    with contextlib.redirect_stderr(screen):
        download(REPO, "model.safetensors")
    rate = re.findall(r"3\.0 of 3\.0 MB, ([\d.]+) MB/s", screen.getvalue())[-1]
    assert float(rate) < 4, screen.getvalue()  # 1 MB in 0.45 s or more
