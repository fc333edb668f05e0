"""hub.py against a Hub on this machine, which answers as the real one: hub_server.py."""

import errno
import json
import multiprocessing
import os
import resource
import ssl
import sys
import threading
import time
import urllib.request
from functools import partial

import pytest

import barthez
from hub import NoNetwork, find_model
from hub_server import Hub, etag
from test_cli import PLAIN, fork, run

REPO = "moussaKam/barthez-orangesum-abstract"
TOKEN = "hf_NeverInAnyMessage"
BIN, SAFETENSORS = "pytorch_model.bin", "model.safetensors"
LARGE = bytes(range(251)) * 37  # 9,287 bytes, which no block size divides
FILES = {"config.json": b'{"d_model": 768}', "sentencepiece.bpe.model": LARGE[:999], BIN: LARGE}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that publishes FILES, an empty cache in tmp_path/hub; pauses are noted, not made."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("SSL_CERT_FILE", os.devnull)  # certificates take long to read
        hub.pauses = []
        monkeypatch.setattr(time, "sleep", hub.pauses.append)
        hub.commit = hub.add(REPO, FILES)
        yield hub


def weights(*arguments, **options):
    """The contents of the weights that are found."""
    folder = find_model(*(arguments or [REPO]), **options)
    safetensors = folder / SAFETENSORS
    return (safetensors if safetensors.is_file() else folder / BIN).read_bytes()


def fails(kind, *arguments, **options):
    """The message of the error: one line without secrets."""
    with pytest.raises(kind) as caught:
        find_model(*(arguments or [REPO]), **options)
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert message and "\n" not in message and TOKEN not in message and "Signature" not in message
    return message


def root(tmp_path):
    return tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"


def cache(tmp_path):
    """{path: contents, or target of a link} of what the cache has of the model."""
    folder = root(tmp_path)
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink()
            else path.read_bytes() for path in folder.rglob("*") if not path.is_dir()}


def official(commit, files):
    """What the official client makes of these files."""
    made = {"refs/main": commit.encode()}
    for name, contents in files.items():
        made[f"blobs/{etag(name, contents)}"] = contents
        made[f"snapshots/{commit}/{name}"] = f"../../blobs/{etag(name, contents)}"
    return made


def fill(tmp_path, made):
    for name, contents in made.items():
        path = root(tmp_path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(contents) if isinstance(contents, str) else path.write_bytes(contents)


def leave(tmp_path, part):
    """What an interrupted download of the weights may leave."""
    fill(tmp_path, {f"blobs/{etag(BIN, LARGE)}.incomplete": part})


def find_in_another_process():
    process = multiprocessing.get_context("fork").Process(target=find_model, args=[REPO])
    process.start()
    return process


def wait_until(done):
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


# ------------------------------------------------------------------------------------------------
# Which files, of which revision


def test_the_cache_is_laid_out_as_the_official_client_keeps_it(hub, tmp_path):
    assert find_model(REPO) == root(tmp_path) / "snapshots" / hub.commit
    assert cache(tmp_path) == official(hub.commit, FILES)
    hops = [hop for hop, *_ in hub.log]
    assert hops == ["api", "resolve", "cache", "resolve", "cache", "resolve", "cdn"]
    lock = f"{etag(BIN, LARGE)}.lock"  # at which the official client waits too
    assert (tmp_path / "hub/.locks" / root(tmp_path).name / lock).exists()


def test_only_the_files_that_a_model_needs_are_downloaded(hub):
    """Safetensors are preferred."""
    names = [SAFETENSORS, "generation_config.json", "added_tokens.json", "tokenizer_config.json"]
    more = dict.fromkeys(names, b"")
    hub.add(REPO, {**FILES, **more, "README.md": b"#", "../../evil": b"", "tf_model.h5": LARGE})
    assert {path.name for path in find_model(REPO).iterdir()} == {*FILES, *more} - {BIN}


def test_a_renamed_model_is_found_under_its_old_name(hub):
    hub.renamed["old/name"] = REPO
    assert weights("old/name") == LARGE


def test_a_pull_request_is_a_revision(hub, tmp_path):
    commit = hub.add(REPO, {**FILES, SAFETENSORS: b"safe"}, "refs/pr/2")
    assert weights(REPO, "refs/pr/2") == b"safe"
    assert cache(tmp_path)["refs/refs/pr/2"] == commit.encode()
    assert weights(REPO) == LARGE


def test_a_commit_in_the_cache_needs_no_request(hub, tmp_path):
    assert weights(REPO, hub.commit) == LARGE
    assert not (root(tmp_path) / "refs").exists()
    hub.log.clear()
    assert weights(REPO, hub.commit) == LARGE and not hub.log


def test_a_pinned_commit_is_used_instead_of_main_and_needs_no_request_later(hub):
    pinned = hub.add(REPO, {**FILES, SAFETENSORS: b"safe"}, "refs/pr/2")
    assert weights(REPO, pinned=pinned) == b"safe"
    hub.log.clear()
    assert weights(REPO, pinned=pinned) == b"safe" and not hub.log
    assert weights(REPO, "main", pinned=pinned) == LARGE  # the user's choice


def test_a_pinned_pull_request_is_asked_like_a_branch(hub):
    hub.add(REPO, {**FILES, SAFETENSORS: b"safe"}, "refs/pr/2")
    assert weights(REPO, pinned="refs/pr/2") == b"safe"
    hub.add(REPO, {**FILES, SAFETENSORS: b"newer"}, "refs/pr/2")
    assert weights(REPO, pinned="refs/pr/2") == b"newer"


def test_a_readable_main_in_the_cache_is_preferred_to_downloading_the_pinned_commit(hub):
    pinned = hub.add(REPO, {**FILES, SAFETENSORS: b"safe"}, "refs/pr/2")
    find_model(REPO)
    assert weights(REPO, pinned=pinned) == LARGE
    assert weights(REPO, pinned=pinned, readable=[SAFETENSORS]) == b"safe"
    assert weights(REPO, pinned=pinned) == b"safe", "complete, so that it needs no request"


def test_main_is_used_if_the_pinned_commit_is_gone(hub, capsys):
    assert weights(REPO, pinned="0" * 40) == LARGE
    assert not capsys.readouterr().err
    hub.close()
    assert weights(REPO, pinned="0" * 40) == LARGE
    note, = capsys.readouterr().err.splitlines()
    assert "from the cache" in note


# ------------------------------------------------------------------------------------------------
# The token, redirects and other answers


def test_the_token_stays_with_its_host(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = TOKEN
    find_model(REPO)
    for hop, _, headers in hub.log:
        assert headers.get("Authorization") == (None if hop == "cdn" else f"Bearer {TOKEN}")
        assert headers["Accept-Encoding"] == "identity"


def test_a_mirror_may_redirect_and_its_token_is_not_passed_on(hub, monkeypatch):
    with Hub() as mirror:
        mirror.mirror = hub.url
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert weights() == LARGE
        assert "Authorization" in mirror.log[0][2]
    assert not any("Authorization" in headers for *_, headers in hub.log)


def test_the_token_is_where_the_settings_say(hub, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_home\n")
    (tmp_path / "other").write_text("hf_path\nX-Other: 1")
    fails(PermissionError)
    for name, value in [("HF_TOKEN_PATH", str(tmp_path / "other")),
                        ("HUGGING_FACE_HUB_TOKEN", "hf_older"), ("HF_TOKEN", "hf_newer")]:
        monkeypatch.setenv(name, value)
        fails(PermissionError)
    assert [headers["Authorization"] for headers in hub.at("api")] == [
        "Bearer hf_home", "Bearer hf_pathX-Other:1", "Bearer hf_older", "Bearer hf_newer"]


@pytest.mark.parametrize("settings, place", [
    ({"HF_HUB_CACHE": "~/a", "HF_HOME": "{}/b"}, "home/a"),
    ({"HUGGINGFACE_HUB_CACHE": "$HOME/a", "HF_HOME": "{}/b"}, "home/a"),
    ({"HF_HOME": "{}/b", "XDG_CACHE_HOME": "{}/c"}, "b/hub"),
    ({"XDG_CACHE_HOME": "{}/c"}, "c/huggingface/hub"),
    ({"HF_HUB_CACHE": ""}, "home/.cache/huggingface/hub")])
def test_the_cache_is_where_the_settings_say(hub, tmp_path, monkeypatch, settings, place):
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert find_model(REPO).parents[2] == tmp_path / place


def test_missing_and_closed_models_are_refused_in_the_words_of_the_hub(hub, monkeypatch):
    page = f"{hub.url}/no/such"
    message = fails(PermissionError, "no/such")
    assert "no folder no/such" in message and "Invalid username" in message and page in message
    hub.gated.add(REPO)
    assert "is restricted" in fails(PermissionError)
    assert '"Invalid rev id: v9"' in fails(FileNotFoundError, REPO, "v9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "Invalid credentials" in fails(PermissionError)
    hub.token = TOKEN
    assert "is restricted" in fails(PermissionError)
    assert "Repository not found" in fails(FileNotFoundError, "no/such")
    assert not hub.pauses


@pytest.mark.parametrize("lacks", FILES)
def test_a_file_that_the_model_lacks_is_named(hub, lacks):
    hub.add(REPO, {name: FILES[name] for name in FILES if name != lacks})
    message = fails(FileNotFoundError)
    assert f"{hub.url}/{REPO} lacks " in message and lacks in message and not hub.at("resolve")


def test_impossible_names_and_endpoints_are_refused(hub, monkeypatch):
    for name in "", "a/b/c", "../x", "a b/c", "a/b\n", "/a", "a/", "é/b", "a\\b", "a/.b":
        assert repr(name) in fails(ValueError, name) and not hub.log
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    assert "huggingface.co" in fails(ValueError)


@pytest.mark.parametrize("fault", [
    b"<html>Log in</html>", b"[1]", b'{"sha": "main", "siblings": []}'])
def test_a_login_page_is_not_taken_for_the_hub(hub, tmp_path, fault):
    hub.faults["api"] = [{"body": fault}]
    assert "Log in to this network" in fails(ConnectionError)
    assert not (tmp_path / "hub").exists() and not hub.pauses


def test_a_checksum_cannot_lead_out_of_the_cache(hub):
    file = {"rfilename": "config.json", "size": 1, "blobId": "../../../x"}
    hub.faults["api"] = [{"body": json.dumps({"sha": hub.commit, "siblings": [file]}).encode()}]
    assert "does not answer as the Hub" in fails(ConnectionError)


# ------------------------------------------------------------------------------------------------
# Interruptions


@pytest.mark.parametrize("hop, status, headers, pause", [
    ("api", 429, {"RateLimit": '"api";r=0;t=52'}, 53), ("cdn", 500, {}, 1),
    ("api", 429, {"RateLimit": '"api";r=9;t=52'}, 1), ("resolve", 503, {"Retry-After": "7"}, 8),
    ("resolve", 503, {"Retry-After": "soon"}, 1)])
def test_the_pause_that_the_server_asks_for_is_made(hub, hop, status, headers, pause):
    hub.faults[hop] = [{"status": status, **headers}]
    assert weights() == LARGE and hub.pauses == [pause]


def test_pauses_grow_until_it_gives_up(hub):
    hub.faults["api"] = [{"status": 503}] * 9
    assert "503" in fails(ConnectionError) and hub.pauses == [1, 2, 4, 8]
    hub.faults["api"] = [{"status": 429, "Retry-After": "86400"}]
    assert "Try again later" in fails(ConnectionError) and len(hub.pauses) == 4


def test_a_broken_download_is_resumed(hub):
    hub.faults["cdn"] = [{"drop": 1000}] * 7  # each brings something, so that none counts
    assert weights() == LARGE
    assert [headers.get("Range") for headers in hub.at("cdn")] == [
        None, *(f"bytes={n}000-" for n in range(1, 8))]
    assert set(hub.pauses) == {1}


@pytest.mark.parametrize("fault", [{"drop": 0}, {"whole": True, "drop": 1000}])
def test_a_download_that_makes_no_progress_is_given_up(hub, fault):
    hub.faults["cdn"] = [{"drop": 1000}] + [fault] * 4
    assert "the download will resume" in fails(ConnectionError)
    assert hub.pauses == [1, 2, 4, 8] and weights() == LARGE


def test_no_content_length_is_needed(hub):
    hub.faults = {hop: [{"chunked": True}] for hop in hub.faults}
    hub.faults["cdn"] = [{"chunked": True, "drop": 1000}, {"chunked": True}]
    assert weights() == LARGE and hub.pauses == [1]


def test_a_network_that_fails_during_a_download_is_retried(hub, tmp_path):
    leave(tmp_path, LARGE[:999])
    hub.servers[1].server_close()  # the storage
    fails(ConnectionError)
    assert hub.pauses == [1, 2, 4, 8]


def test_a_killed_download_is_resumed(hub, tmp_path):
    hub.faults["cdn"] = [{"stall": 5000}]
    process, blobs = find_in_another_process(), root(tmp_path) / "blobs"
    wait_until(lambda: hub.at("cdn") and any(path.stat().st_size == 5000
                                             for path in blobs.glob("*.incomplete")))
    process.kill()
    process.join()
    assert [path.read_bytes() for path in blobs.glob("*.incomplete")] == [LARGE[:5000]]
    assert weights() == LARGE and cache(tmp_path) == official(hub.commit, FILES)
    assert hub.at("cdn")[-1]["Range"] == "bytes=5000-"


def test_a_run_killed_between_two_files_leaves_no_model(hub, tmp_path):
    hub.faults["resolve"] = [{}, {}, {"status": 404}]
    fails(FileNotFoundError)
    assert not (root(tmp_path) / "refs").exists()
    hub.log.clear()
    assert weights() == LARGE and [hop for hop, *_ in hub.log] == ["api", "resolve", "cdn"]


def test_two_processes_fetch_it_once(hub, tmp_path):
    hub.faults["cdn"] = [{"stall": 5000}]
    processes = [find_in_another_process(), find_in_another_process()]
    wait_until(lambda: len(hub.at("api")) == 2 and hub.at("cdn"))
    threading.Event().wait(0.2)  # for the second to do harm, were there no lock
    hub.go.set()
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert len(hub.at("cdn")) == 1 and cache(tmp_path) == official(hub.commit, FILES)


@pytest.mark.parametrize("left, fault, requests", [
    (LARGE, {}, 0), (LARGE[:99], {}, 1), (LARGE[:99], {"whole": True}, 1)])
def test_what_an_earlier_run_left_is_used(hub, tmp_path, left, fault, requests):
    leave(tmp_path, left)
    hub.faults["cdn"] = [fault]
    assert weights() == LARGE and len(hub.at("cdn")) == requests
    assert cache(tmp_path) == official(hub.commit, FILES)


@pytest.mark.parametrize("left", [b"?" * 99, b"?" * len(LARGE), b"?" * 20000])
def test_a_damaged_part_is_emptied(hub, tmp_path, left):
    leave(tmp_path, left)
    assert "damaged" in fails(ConnectionError)
    assert weights() == LARGE


@pytest.mark.parametrize("hop", ["cache", "cdn"])
def test_a_damaged_file_is_not_kept(hub, tmp_path, hop):
    hub.faults[hop] = [{"body": b"x" * 20000}]
    assert "damaged" in fails(ConnectionError)
    assert {path.stat().st_size for path in root(tmp_path).rglob("*.incomplete")} == {0}
    assert weights() == LARGE


# ------------------------------------------------------------------------------------------------
# The network and the cache


def test_no_network_is_an_error_of_its_own(hub, monkeypatch):
    for address in "http://hub.invalid", "http://127.0.0.1:9", "https://127.0.0.1:9":
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert "cannot be reached" in fails(NoNetwork, REPO, pinned="0" * 40) and not hub.pauses
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "unset HF_HUB_OFFLINE" in fails(NoNetwork)


def test_a_proxy_is_named_without_its_password(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test")
    monkeypatch.setenv("http_proxy", "http://user:password@127.0.0.1:9")
    message = fails(NoNetwork)
    assert "proxy: 127.0.0.1:9" in message and "password" not in message


def test_a_refused_certificate_names_the_remedy(hub, monkeypatch):
    def refuse(*_, **__):
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_message = "unable to get local issuer certificate"
        raise urllib.request.URLError(error)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    message = fails(ConnectionError)
    assert "SSL_CERT_FILE" in message and "Install Certificates.command" in message


def test_a_second_call_asks_once_and_writes_nothing(hub, tmp_path):
    first = find_model(REPO)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    hub.log.clear()
    assert find_model(REPO) == first and [hop for hop, *_ in hub.log] == ["api"]
    assert before == {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("fault", [
    {"status": 401}, {"status": 429, "RateLimit": '"api";r=0;t=52'}, {"status": 500},
    {"body": b"<html>Log in</html>"}, {"drop": 10}, "no network"])
def test_a_model_in_the_cache_is_used_if_the_hub_does_not_answer(hub, capsys, fault):
    find_model(REPO)
    hub.close() if fault == "no network" else hub.faults["api"].append(fault)
    assert weights() == LARGE and not hub.pauses
    note, = capsys.readouterr().err.splitlines()
    assert note.startswith(f"Using {REPO} from the cache. ")


def test_a_model_without_weights_in_the_cache_is_not_complete(hub, tmp_path, monkeypatch):
    made = official(hub.commit, FILES)
    fill(tmp_path, {name: made[name] for name in made if BIN not in name})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(NoNetwork)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert weights() == LARGE


def test_the_cache_of_the_official_client_is_used(hub, tmp_path, capsys, monkeypatch):
    fill(tmp_path, official(hub.commit, FILES))
    assert weights() == LARGE and [hop for hop, *_ in hub.log] == ["api"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    assert weights() == LARGE and len(hub.log) == 1 and not capsys.readouterr().err


def test_a_new_commit_with_the_same_weights_fetches_no_weights(hub, tmp_path):
    find_model(REPO)
    hub.log.clear()
    commit = hub.add(REPO, {**FILES, "config.json": b"{}"})
    folder = find_model(REPO)
    assert folder.name == commit and weights() == LARGE and not hub.at("cdn")
    assert (folder / "config.json").read_bytes() == b"{}"


def test_an_interrupted_update_keeps_the_old_model(hub, capsys, monkeypatch):
    old = find_model(REPO)
    new = hub.add(REPO, {**FILES, "config.json": b"{}", BIN: LARGE[::-1]})
    hub.faults["cdn"] = [{"drop": 0}] * 5
    assert find_model(REPO) == old
    assert "from the cache" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model(REPO) == old
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert find_model(REPO).name == new and weights() == LARGE[::-1]


def test_a_broken_link_is_repaired(hub, tmp_path):
    find_model(REPO)
    (root(tmp_path) / "blobs" / etag(BIN, LARGE)).unlink()
    assert weights() == LARGE and cache(tmp_path) == official(hub.commit, FILES)


def test_symbolic_links_are_not_needed(hub, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "refused")
    monkeypatch.setattr(os, "symlink", refuse)
    assert weights() == LARGE and not any(path.is_symlink() for path in find_model(REPO).iterdir())


def test_a_full_disk_is_reported_in_one_line(hub, tmp_path):
    limit = resource.RLIMIT_FSIZE, (5000, 5000)  # bytes a file
    status, _, err = fork(partial(find_model, REPO), before=lambda: resource.setrlimit(*limit))
    assert err.splitlines()[-1] == "OSError: [Errno 27] File too large"
    assert status == 1 and weights() == LARGE and hub.at("cdn")[-1]["Range"]


def test_only_a_terminal_shows_progress(hub):
    for number, is_terminal in enumerate([True, False]):
        hub.add(REPO, FILES | {BIN: bytes(12_000_000 + number)})
        status, out, err = fork(partial(find_model, REPO), before=lambda: setattr(
            sys.stderr, "isatty", lambda: is_terminal))
        assert (status, out) == (0, "") and bool(err) == is_terminal
        assert not err or err.endswith("\r12 of 12 MB\n")


def test_a_first_run_downloads_loads_and_summarizes(hub, tmp_path):
    """The default model's name, whose safetensors are in a pinned commit."""
    pinned = barthez.CONVERSIONS[REPO]
    names = "config.json", "sentencepiece.bpe.model", SAFETENSORS
    hub.repos[REPO][pinned] = pinned, {name: (PLAIN / name).read_bytes() for name in names}
    (tmp_path / "texte.txt").write_text("Le président s'est rendu à Paris.", "utf-8")
    command = "barthez.py", "--summarize", tmp_path / "texte.txt", "--max-length", 8
    status, out, err = run(*command)
    assert (status, err) == (0, "") and out.strip()
    assert {hop for hop, *_ in hub.log} == {"api", "resolve", "cache", "cdn"}
    hub.log.clear()
    assert run(*command) == (0, out, "") and not hub.log, "the second run needs no request"
