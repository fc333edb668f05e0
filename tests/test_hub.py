"""The Hub client against a Hub on this machine, which answers as the real one: hub_server.py."""

import contextlib
import errno
import os
import pty
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from http.client import HTTPResponse
from pathlib import Path

import pytest

import load_weights as client
from hub_server import Hub, etag_of, sign
from load_weights import NoNetwork, download, hub_files

REPO = "moussaKam/barthez-orangesum-abstract"
TOKEN = "hf_NeverInAnyMessage"
LARGE = bytes(range(251)) * 37  # 9,287 bytes, which no block size divides
FILES = {"config.json": b'{"d_model": 768}', "sentencepiece.bpe.model": LARGE[:999],
         "pytorch_model.bin": LARGE}
BIN = "pytorch_model.bin"
ROOT = Path(client.__file__).parent


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that publishes FILES, an empty cache in tmp_path/hub; pauses are noted, not made."""
    for name in list(os.environ):
        if name.startswith(("HF_", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setattr(client, "FAMILIES", {})
        hub.pauses = []
        monkeypatch.setattr(time, "sleep", hub.pauses.append)
        hub.commit = hub.add(REPO, FILES)
        yield hub


def fails(kind, *arguments, find=download):
    """The message of the error: one line without secrets."""
    with pytest.raises(kind) as caught:
        find(*(arguments or (REPO, BIN)))
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert message and "\n" not in message and TOKEN not in message and "Signature" not in message
    return message


def cache(tmp_path):
    """{path: content, or target of a link} of all that is in the cache, without the locks."""
    root = tmp_path / "hub"
    return {str(path.relative_to(root)): os.readlink(path) if path.is_symlink()
            else path.read_bytes() for path in root.rglob("*")
            if not path.is_dir() and ".locks" not in path.parts}


def official(commit, files, revision="main"):
    """The cache that the official client makes of these files."""
    root = f"models--{REPO.replace('/', '--')}"
    made = {f"{root}/refs/{revision}": commit.encode()}
    for name, content in files.items():
        made[f"{root}/blobs/{etag_of(name, content)}"] = content
        made[f"{root}/snapshots/{commit}/{name}"] = f"../../blobs/{etag_of(name, content)}"
    return made


def fill(tmp_path, made):
    for name, content in made.items():
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(content) if isinstance(content, str) else path.write_bytes(content)


def partial(tmp_path, content):
    name = f"models--{REPO.replace('/', '--')}/blobs/{etag_of(BIN, LARGE)}.incomplete"
    fill(tmp_path, {name: content})
    return tmp_path / "hub" / name


def child(code="", **options):
    """Another process, which downloads the weights."""
    code = f"import load_weights as client; {code}\nclient.download({REPO!r}, {BIN!r})"
    options = {"stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, **options}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **options)


def wait_until(done):
    for _ in range(2000):
        if done():
            return
        threading.Event().wait(0.005)
    raise AssertionError("nothing happened within 10 s")


# ------------------------------------------------------------------------------------------------
# The answers of the table

def test_files_in_git_and_large_files_are_downloaded(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in FILES:
        assert download(REPO, name).read_bytes() == FILES[name]
    assert cache(tmp_path) == official(hub.commit, FILES)
    assert [hop for hop, *_ in hub.log] == ["resolve", "cache", "resolve", "cdn", "resolve", "cdn"]
    assert all(headers["Accept-Encoding"] == "identity" for *_, headers in hub.log)
    for hop, _, headers in hub.log:  # the token reaches the endpoint's own host alone
        assert headers.get("Authorization") == (None if hop == "cdn" else f"Bearer {TOKEN}")
    assert (tmp_path / f"hub/.locks/models--{REPO.replace('/', '--')}"
            / f"{etag_of(BIN, LARGE)}.lock").exists(), "the official client waits at this file"


@pytest.mark.parametrize("variant", [
    {"direct": {REPO}}, {"bare": True}, {"renamed": {"old/name": REPO}}])
def test_other_answers_are_understood(hub, variant):
    for key, value in variant.items():
        setattr(hub, key, value)
    name = "old/name" if hub.renamed else REPO
    assert {key: path.read_bytes() for key, path in hub_files(name).items()} == {
        "weights": LARGE, **{key: FILES[key] for key in FILES if key != BIN}}


def test_a_mirror_may_redirect_to_the_hub(hub, monkeypatch):
    with Hub() as mirror:
        mirror.mirror = hub.url
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert hub_files(REPO)["weights"].read_bytes() == LARGE
        assert "no such revision" in fails(FileNotFoundError, REPO, BIN, "v9")
        assert "Authorization" in mirror.log[0][2]
    assert not any("Authorization" in headers for *_, headers in hub.log)


def test_unusual_names_and_empty_files_are_downloaded(hub):
    hub.add("gpt2", {"empty": b"", "a folder/ü?.txt": b"x"}, "refs/pr/2")
    assert download("gpt2", "empty", "refs/pr/2").read_bytes() == b""
    assert download("gpt2", "a folder/ü?.txt", "refs/pr/2").read_bytes() == b"x"


@pytest.mark.parametrize("name, hop", [("config.json", "cache"), (BIN, "cdn")])
def test_a_length_is_not_needed(hub, name, hop):
    hub.faults[hop] = [{"chunked": True}]
    assert download(REPO, name).read_bytes() == FILES[name]


@pytest.mark.parametrize("refusal, kind, words", [
    ((401, {"X-Error-Code": "GatedRepo"}), PermissionError, "accept its terms"),
    ((403, {"X-Error-Code": "GatedRepo"}), PermissionError, "accept its terms"),
    ((401, {"X-Error-Code": "RepoNotFound"}), FileNotFoundError, "private"),
    ((404, {"X-Error-Code": "RepoNotFound"}), FileNotFoundError, "private"),
    ((401, {}), FileNotFoundError, "private"),
    ((403, {"X-Error-Message": "Access to this resource is disabled."}), ConnectionError,
     "disabled"),
    ((407, {}), ConnectionError, "407")])
def test_a_refusal_says_what_to_do(hub, refusal, kind, words):
    hub.refused[REPO] = refusal
    assert words in fails(kind) and len(hub.log) == 1 and not hub.pauses


def test_missing_files_and_revisions_are_named(hub, monkeypatch):
    assert "no tokenizer.json" in fails(FileNotFoundError, REPO, "tokenizer.json")
    assert "no such revision" in fails(FileNotFoundError, REPO, BIN, "refs/pr/9")
    assert "no/such is missing" in fails(FileNotFoundError, "no/such", BIN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = "hf_another"
    assert "rejects your token" in fails(PermissionError)
    assert not hub.pauses


@pytest.mark.parametrize("headers, pause", [
    ({}, 1), ({"Retry-After": "7"}, 8), ({"Retry-After": "soon"}, 1),
    ({"RateLimit": '"resolvers";r=0;t=52'}, 53), ({"RateLimit": '"resolvers";r=9;t=52'}, 1)])
@pytest.mark.parametrize("hop, status", [("resolve", 429), ("resolve", 503), ("cdn", 500)])
def test_the_pause_that_the_hub_asks_for_is_kept(hub, hop, status, headers, pause):
    hub.faults[hop] = [{"status": status, **headers}]
    assert download(REPO, BIN).read_bytes() == LARGE and hub.pauses == [pause]


def test_pauses_grow_until_it_gives_up(hub):
    hub.faults["resolve"] = [{"status": 503}] * 9
    assert "503" in fails(ConnectionError) and hub.pauses == [1, 2, 4, 8]
    hub.faults["resolve"] = [{"status": 429, "Retry-After": "86400"}]
    assert "429" in fails(ConnectionError) and len(hub.pauses) == 4


def test_the_storage_may_redirect_again(hub):
    hub.faults["cdn"] = [{"status": 307, "Location": f"{hub.url}/{REPO}/resolve/main/{BIN}"}]
    assert download(REPO, BIN).read_bytes() == LARGE and not hub.pauses


def test_an_expired_address_is_renewed(hub):
    hub.faults["cdn"] = [{"status": 403}]
    assert download(REPO, BIN).read_bytes() == LARGE and len(hub.at("resolve")) == 2


# ------------------------------------------------------------------------------------------------
# Interruptions

def test_a_broken_download_is_resumed(hub):
    hub.faults["cdn"] = [{"drop": 1000}] * 7  # each brings something, so that none counts
    assert download(REPO, BIN).read_bytes() == LARGE and hub.sent == len(LARGE)
    assert [headers.get("Range") for headers in hub.at("cdn")] == [
        None, *(f"bytes={n}000-" for n in range(1, 8))]
    assert set(hub.pauses) == {1}


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), TimeoutError("timed out")])
def test_a_network_error_in_the_body_is_retried(hub, monkeypatch, error):
    read = HTTPResponse.read1

    def failing(answer, size):
        monkeypatch.setattr(HTTPResponse, "read1", read)
        raise error
    monkeypatch.setattr(HTTPResponse, "read1", failing)
    hub.faults["cdn"] = [{}, {"drop": 1000, "chunked": True}]
    assert download(REPO, BIN).read_bytes() == LARGE and hub.pauses == [1, 1]


def test_a_download_that_brings_nothing_is_given_up(hub, tmp_path):
    hub.faults["cdn"] = [{"drop": 1000}] + [{"drop": 0}] * 5  # a storage that sends 206 and nothing
    assert "at 1,000 bytes" in fails(ConnectionError)
    assert download(REPO, BIN).read_bytes() == LARGE and hub.sent == len(LARGE)


def test_a_download_that_always_starts_over_is_given_up(hub):
    hub.faults["cdn"] = [{"whole": True, "drop": 1000}] * 20
    assert "at 1,000 bytes" in fails(ConnectionError)
    assert len(hub.at("cdn")) == 6  # the first brought something


def test_a_killed_download_is_resumed(hub, tmp_path):
    hub.faults["cdn"] = [{"stall": 5000}]
    process, blobs = child(), tmp_path / "hub" / f"models--{REPO.replace('/', '--')}/blobs"
    wait_until(lambda: any(path.stat().st_size for path in blobs.glob("*")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.read_bytes() for path in blobs.iterdir()] == [LARGE[:5000]]
    assert download(REPO, BIN).read_bytes() == LARGE
    assert hub.at("cdn")[-1]["Range"] == "bytes=5000-" and len(list(blobs.iterdir())) == 1


def test_two_processes_fetch_it_once(hub, tmp_path):
    hub.faults["cdn"] = [{"stall": 5000}]
    processes = [child(), child()]
    wait_until(lambda: len(hub.at("resolve")) == 2 and hub.sent)
    threading.Event().wait(0.2)  # for the second to do harm, were there no lock
    hub.go.set()
    assert [process.communicate(timeout=20)[1] for process in processes] == ["", ""]
    assert hub.sent == len(LARGE) and cache(tmp_path) == official(hub.commit, {BIN: LARGE})


@pytest.mark.parametrize("left, fault", [
    (LARGE, {}), (b"wrong" * 99, {}), (b"wrong" * 9999, {}), (b"?" * len(LARGE), {}),
    (LARGE[:999], {"whole": True}), (LARGE[:999], {"shift": 7}), (LARGE[:999], {"status": 416})])
def test_leftovers_of_an_earlier_attempt_are_used_or_replaced(hub, tmp_path, left, fault):
    partial(tmp_path, left)
    hub.faults["cdn"] = [fault]
    assert download(REPO, BIN).read_bytes() == LARGE
    assert cache(tmp_path) == official(hub.commit, {BIN: LARGE})
    assert "whole" not in fault or len(hub.at("cdn")) == 1


# ------------------------------------------------------------------------------------------------
# Wrong answers

@pytest.mark.parametrize("name, hop", [("config.json", "cache"), (BIN, "cdn")])
@pytest.mark.parametrize("fault", [{"body": b"other"}, {"body": b"x" * 20000}, {"html": True}])
def test_wrong_bytes_are_not_kept(hub, tmp_path, name, hop, fault):
    hub.faults[hop] = [fault]
    assert name in fails(ConnectionError, REPO, name) and not hub.pauses
    assert cache(tmp_path) == {}
    assert download(REPO, name).read_bytes() == FILES[name]


@pytest.mark.parametrize("fault", [
    {"html": True}, {"status": 302, "Location": "/again"}, {"status": 304},
    {"status": 302, "X-Repo-Commit": "a" * 40, "Location": "CDN"},  # whose etag is not the file's
    {"status": 200, "X-Repo-Commit": "../../x", "ETag": f'"{"a" * 40}"'},
    {"status": 200, "X-Repo-Commit": "a" * 40, "ETag": '"../../../../x"'}])
def test_a_login_page_is_not_taken_for_the_hub(hub, tmp_path, fault):
    if fault.get("Location") == "CDN":
        path = f"/xet-bridge-us/{hub.commit}/{BIN}"
        fault = {**fault, "Location": f"{hub.cdn}{path}?Signature={sign(path)}"}
    hub.faults["resolve"] = [fault] * 10
    assert "Log in to this network" in fails(ConnectionError) and not cache(tmp_path)
    for target in "file:///etc/hostname", "ftp://127.0.0.1/x":
        hub.faults["resolve"] = [{"status": 302, "Location": target}] * 9
        assert "unknown url type" in fails(ConnectionError)


# ------------------------------------------------------------------------------------------------
# The network

def test_no_network_is_an_error_of_its_own(hub, monkeypatch):
    for address in "http://hub.invalid", "http://127.0.0.1:9", "https://127.0.0.1:9":
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert "cannot be reached" in fails(NoNetwork) and not hub.pauses
        fails(NoNetwork, REPO, find=hub_files)


def test_a_network_that_fails_later_is_another_error(hub):
    hub.servers[1].server_close()  # the storage
    assert "localhost" in fails(ConnectionError) and hub.pauses == [1, 2, 4, 8]


@pytest.mark.parametrize("dead", [socket.AF_INET, socket.AF_INET6])
def test_an_address_family_that_swallows_packets_costs_one_timeout(hub, monkeypatch, dead):
    look_up, connect, late = socket.getaddrinfo, socket.create_connection, []
    hosts = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
    with socket.socket(dead) as full, Hub(socket.AF_INET6) as other, socket.socket(dead) as first:
        full.bind((hosts[dead], 0))
        full.listen(0)  # once its queue is full, it answers no packet
        first.connect(full.getsockname()[:2])
        other.repos = hub.repos
        live = other if dead == socket.AF_INET else hub

        def found(host, port, family=0, *rest, **options):
            if host != "hub.test":
                return look_up(host, port, family, *rest, **options)
            ports = {family: live.servers[0].server_port for family in hosts}
            ports[dead] = full.getsockname()[1]
            return [(kind, socket.SOCK_STREAM, 6, "", (hosts[kind], ports[kind]))
                    for kind in hosts if family in (0, kind) for _ in range(8)]

        def connected(address, timeout, source=None, **options):
            try:
                return connect(address, 0.3, source, **options)
            except TimeoutError:
                late.append(address)
                raise
        monkeypatch.setattr(socket, "getaddrinfo", found)
        monkeypatch.setattr(socket, "create_connection", connected)
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.test")
        begun = time.monotonic()
        download(REPO, "config.json")
        fails(FileNotFoundError, REPO, "other")
        assert len(live.log) == 3 and len(late) == (dead == socket.AF_INET), late
        assert time.monotonic() - begun < 2, "each request tries the dead addresses"


def test_a_refused_certificate_names_the_remedy(hub, monkeypatch):
    def refuse(*_, **__):
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "unable to get local issuer certificate"
        raise urllib.error.URLError(error)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    message = fails(ConnectionError)
    assert "SSL_CERT_FILE" in message and "Install Certificates" in message and not hub.pauses


def test_proxies_are_used(hub, monkeypatch):
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test")
    assert download(REPO, "config.json").read_bytes() == FILES["config.json"]
    assert all(path.startswith("http://hub.test/") for _, path, _ in hub.log)
    monkeypatch.setenv("https_proxy", hub.url)  # which does not know CONNECT
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.test")
    assert "hub.test does not answer (Tunnel connection failed" in fails(ConnectionError)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(client, "FAMILIES", {})
    assert "127.0.0.1 cannot be reached" in fails(NoNetwork)


# ------------------------------------------------------------------------------------------------
# The cache

def test_a_second_call_asks_once_and_writes_nothing(hub, tmp_path):
    first = hub_files(REPO)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    hub.log.clear()
    assert hub_files(REPO) == first and [hop for hop, *_ in hub.log] == ["resolve"]
    hub.log.clear()
    assert hub_files(REPO, hub.commit) == first and not hub.log  # a commit does not move
    assert download(REPO, BIN, hub.commit) == first["weights"] and not hub.log
    assert before == {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("value", ["1", "ON", "yes", "True"])
def test_the_cache_of_the_official_client_is_used(hub, tmp_path, monkeypatch, value):
    fill(tmp_path, official(hub.commit, FILES))
    assert hub_files(REPO)["weights"].read_bytes() == LARGE
    hub.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub_files(REPO)["weights"].read_bytes() == LARGE
    assert "unset HF_HUB_OFFLINE" in fails(NoNetwork, REPO, "tokenizer.json")
    (tmp_path / f"hub/models--{REPO.replace('/', '--')}/blobs" / etag_of(BIN, LARGE)).unlink()
    assert "unset HF_HUB_OFFLINE" in fails(NoNetwork, REPO, find=hub_files)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.log == [] and hub_files(REPO)["weights"].read_bytes() == LARGE


@pytest.mark.parametrize("fault", [
    {"status": 401}, {"status": 403, "X-Error-Code": "GatedRepo"}, {"html": True},
    {"status": 429, "RateLimit": '"resolvers";r=0;t=52'}, {"status": 503}, "no network"])
def test_a_model_in_the_cache_is_used_if_the_hub_refuses(hub, capsys, fault):
    files = hub_files(REPO)
    hub.add(REPO, {**FILES, "config.json": b"{}"})
    hub.close() if fault == "no network" else hub.faults["resolve"].append(fault)
    assert hub_files(REPO) == files and not hub.pauses
    message, = capsys.readouterr().err.splitlines()
    assert message.endswith("The model in the cache is used.")


def test_a_branch_may_move(hub, capsys):
    old = hub_files(REPO)
    first, *others = [path for hop, path, _ in hub.log if hop == "resolve"]
    assert "/resolve/main/" in first, "all other files are of its commit"
    assert {path.split("/")[4] for path in others} == {hub.commit, client.CONVERSIONS[REPO]}
    hub.add(REPO, {**FILES, BIN: LARGE[::-1]})
    assert hub_files(REPO)["weights"].read_bytes() == LARGE[::-1]
    hub.add(REPO, {**FILES, "config.json": b"{}", BIN: LARGE[1:]})
    hub.faults["cdn"] = [{"status": 503}]
    assert hub_files(REPO)["weights"].read_bytes() == LARGE[::-1]  # not mixed with the new config
    assert hub_files(REPO)["weights"].read_bytes() == LARGE[1:]
    hub.add(REPO, {"config.json": b"{}"})
    assert hub_files(REPO)["weights"].read_bytes() == LARGE[1:]
    told = capsys.readouterr().err
    assert "503" in told and "no sentencepiece.bpe.model" in told and old


def test_a_damaged_reference_is_replaced(hub, tmp_path):
    fill(tmp_path, official(hub.commit, FILES))
    ref = tmp_path / f"hub/models--{REPO.replace('/', '--')}/refs/main"
    ref.write_bytes(b"\xff../../..")
    assert hub_files(REPO)["weights"].read_bytes() == LARGE
    assert ref.read_text() == hub.commit


@pytest.mark.parametrize("settings, place", [
    ({"HF_HUB_CACHE": "{}/a", "HF_HOME": "{}/b", "XDG_CACHE_HOME": "{}/c"}, "a"),
    ({"HF_HOME": "{}/b", "XDG_CACHE_HOME": "{}/c"}, "b/hub"),
    ({"XDG_CACHE_HOME": "{}/c"}, "c/huggingface/hub"),
    ({"HF_HUB_CACHE": ""}, "home/.cache/huggingface/hub"),
    ({"HF_HUB_CACHE": "~/d"}, "home/d"), ({"HF_HUB_CACHE": "$HOME/e"}, "home/e")])
def test_the_cache_is_where_the_settings_say(hub, tmp_path, monkeypatch, settings, place):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert download(REPO, "config.json").parents[3] == tmp_path / place


def test_the_token_is_where_the_settings_say(hub, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_home\n")
    (tmp_path / "other").write_text("hf_path\nX-Other: 1")
    download(REPO, "config.json")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "other"))
    download(REPO, "config.json")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path))  # no file
    download(REPO, "config.json")
    tokens = [headers.get("Authorization") for headers in hub.at("resolve")]
    assert tokens == ["Bearer hf_home", "Bearer hf_pathX-Other:1", None]


def test_symbolic_links_are_not_needed(hub, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "refused")
    monkeypatch.setattr(os, "symlink", refuse)
    path = download(REPO, BIN)
    assert path.read_bytes() == LARGE and not path.is_symlink()


def test_a_full_disk_is_reported_in_one_line(hub, tmp_path):
    limit = resource.RLIMIT_FSIZE, (5000, 5000)  # bytes a file
    process = child(preexec_fn=lambda: resource.setrlimit(*limit))
    message = process.communicate(timeout=20)[1].splitlines()[-1]
    assert "Cannot write" in message and "HF_HUB_CACHE" in message and len(hub.at("cdn")) == 1
    assert download(REPO, BIN).read_bytes() == LARGE and hub.at("cdn")[-1]["Range"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process as another user")
def test_a_read_only_cache_is_reported_in_one_line(hub, tmp_path):
    hub_files(REPO)
    for folder in [tmp_path, *tmp_path.parents]:
        folder.chmod(folder.stat().st_mode | 0o555)
    code = f"import encodings.idna, os; os.setuid(65534); client.hub_files({REPO!r})"
    assert child(code).communicate(timeout=20)[1] == ""  # nothing needs to be written
    hub.add(REPO, {**FILES, BIN: LARGE[::-1]})
    note, *_, message = child(code).communicate(timeout=20)[1].splitlines()
    assert "Permission denied" in note and "The model in the cache is used" in note
    assert "Cannot write" in message and str(tmp_path / "hub") in message


@pytest.mark.parametrize("disabled", ["", "1"])
def test_a_terminal_shows_progress(hub, monkeypatch, disabled):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", disabled)
    hub.add(REPO, {**FILES, BIN: LARGE * 200})
    hub.faults["cdn"] = [{"slow": 0.03}]
    ours, theirs = pty.openpty()
    with child("client.LARGE = 1000", stderr=theirs) as process:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # the end
            while block := os.read(ours, 1000):
                text += block
    os.close(ours)
    announced, *shown = text.decode().splitlines()
    assert process.returncode == 0 and "Downloading" in announced and "2 MB" in announced
    assert bool(shown) != bool(disabled)
    if shown:
        assert re.search(r"2 MB, \d+\.\d MB/s, 00:00:00 left", shown[-1]), shown


# ------------------------------------------------------------------------------------------------
# Which files

@pytest.mark.parametrize("pinned, expected", [
    (None, LARGE), ("refs/pr/2", b"converted"), ("commit", b"converted"), ("0" * 40, LARGE)])
def test_a_pinned_conversion_is_used_while_it_exists(hub, monkeypatch, pinned, expected):
    commit = hub.add(REPO, {"model.safetensors": b"converted"}, "refs/pr/2")
    conversions = {REPO: commit if pinned == "commit" else pinned} if pinned else {}
    monkeypatch.setattr(client, "CONVERSIONS", conversions)  # the last one is gone
    assert hub_files(REPO)["weights"].read_bytes() == expected
    assert hub_files(REPO, "main")["weights"].read_bytes() == LARGE
    hub.close()
    assert hub_files(REPO)["weights"].read_bytes() == expected
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_files(REPO)["weights"].read_bytes() == expected


def test_files_on_main_are_found(hub):
    hub.add(REPO, {**FILES, "model.safetensors": b"main", "generation_config.json": b"{}"})
    files = hub_files(REPO)
    assert files["weights"].read_bytes() == b"main"
    assert files["generation_config.json"].read_bytes() == b"{}"


@pytest.mark.parametrize("name, words", [
    ("model.safetensors.index.json", "sharded"), ("pytorch_model.bin.index.json", "max_shard_size"),
    ("tf_model.h5", "no model.safetensors")])
def test_weights_that_cannot_be_used_are_named(hub, name, words):
    hub.add(REPO, {"config.json": b"{}", "sentencepiece.bpe.model": b"m", name: b"{}"})
    assert words in fails(FileNotFoundError, REPO, find=hub_files)


def test_impossible_names_and_settings_are_refused(hub, monkeypatch):
    for name in "", "a/b/c", "../x", "./model", "a b/c", "a/b\n", "/a", "a/", "é/b", "a\\b":
        assert repr(name) in fails(ValueError, name, find=hub_files)
    for address in "huggingface.co", "ftp://huggingface.co":
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert address in fails(ValueError)
    assert not hub.log


@pytest.mark.skipif(not (ROOT / "barthez.py").exists(), reason="the client alone")
def test_a_first_run_downloads_loads_and_summarizes(hub, tmp_path):
    """The default model's name, the real Hub's answers: a summary, and no other word."""
    plain = ROOT / "tests/goldens/plain"
    names = "config.json", "sentencepiece.bpe.model", "model.safetensors"
    files = {name: (plain / name).read_bytes() for name in names}
    weights = {"model.safetensors": files.pop("model.safetensors")}
    pinned = hub.add(REPO, weights, "refs/pr/2")
    revisions = hub.repos[REPO]
    revisions[client.CONVERSIONS[REPO]] = client.CONVERSIONS[REPO], revisions.pop(pinned)[1]
    hub.add(REPO, files)
    (tmp_path / "texte.txt").write_text("Le président s'est rendu à Paris.", "utf-8")
    done = subprocess.run([sys.executable, ROOT / "barthez.py", "--summarize",
                           tmp_path / "texte.txt", "--max-length", "8"],
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()
    assert {hop for hop, *_ in hub.log} == {"resolve", "cache", "cdn"}
