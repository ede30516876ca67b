"""A hub on this machine that lies in every way that a hub can."""

import hashlib
import http.server
import json
import threading
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from builders import refuses
from ppf.errors import DamagedError, InputError, PPFError, ResourceError, UnsupportedError
from ppf.llm import hub as module
from ppf.llm.hub import revision_of
from ppf.llm.load import load_model

REPLY = SimpleNamespace(headers={}, request=None)
COMMITS = ("a" * 40, "b" * 40)


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder as the hub does; ``lie`` says how it fails."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}
    lie = ""
    asked: list[str] = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        type(self).asked.append(self.path)
        if self.path.startswith("/api/models/"):
            commit = self.path.rpartition("/")[2] if COMMITS[0] in self.path or COMMITS[1] in self.path else COMMITS[0]
            if self.lie == "moved" and "/revision/main" in self.path and sum("/revision/main" in path for path in self.asked) > 1:
                commit = COMMITS[1]
            if "/tree/" in self.path:
                tree = [self.entry(name, data) for name, data in self.files.items()]
                return self.send(json.dumps(tree).encode(), {}, body)
            names = [{"rfilename": name} for name in self.files]
            return self.send(json.dumps({"id": "x/m", "sha": commit, "siblings": names, "tags": []}).encode(), {}, body)
        _, _, rest = self.path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        data = self.files.get(name)
        if data is None:
            return self.send(b"", {"X-Error-Code": "EntryNotFound"}, body, 404)
        digest = hashlib.sha256(data).hexdigest()
        if name.endswith(".safetensors") and body:
            if self.lie == "another content":
                data = data[:-1] + bytes([data[-1] ^ 1])
            if self.lie == "another size":
                data = data[:-1]
        return self.send(data, {"ETag": f'"{digest}"', "X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"'}, body, name=name)

    def entry(self, name, data):
        digest = hashlib.sha256(data).hexdigest()
        large = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 100}} if name.endswith(".safetensors") else {}
        return {"type": "file", "path": name, "size": len(data), "oid": digest[:40], **large}

    def send(self, data, headers, body, status=200, name=""):
        self.send_response(status)
        cut = self.lie == "cut" and body and name.endswith(".safetensors")
        size = len(self.files[name]) if name and self.lie == "another size" and not body else len(data)
        for key, value in {**headers, "Content-Length": str(size), "X-Linked-Size": str(size)}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


@pytest.fixture
def hub(whole, tmp_path, monkeypatch):
    """A hub with one tiny model, and an empty cache."""
    Hub.files = {path.name: path.read_bytes() for path in whole.iterdir()}
    Hub.lie, Hub.asked = "", []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_EXCEPTIONS", (), raising=False)
        yield Hub
        server.shutdown()
        thread.join()


def test_a_model_comes_whole_with_its_commit(hub):
    loaded = load_model("x/m")
    assert revision_of(loaded.folder) == COMMITS[0] and loaded.layout.layers == 3


@pytest.mark.parametrize("lie", ["another content", "another size", "cut"])
def test_what_is_not_what_the_hub_tells_of_is_refused_and_fetched_again(hub, lie):
    hub.lie = lie
    with pytest.raises(PPFError) as caught:
        load_model("x/m")
    assert isinstance(caught.value, DamagedError if lie == "another content" else (DamagedError, ResourceError))
    with refuses(type(caught.value)):
        raise caught.value
    hub.lie = ""
    assert load_model("x/m").layout.layers == 3


def test_a_model_that_moves_on_between_two_questions_is_read_as_it_was(hub):
    hub.lie = "moved"
    assert revision_of(load_model("x/m").folder) == COMMITS[0]


def test_a_folder_has_no_commit(whole):
    assert revision_of(whole) is None and revision_of(None) is None


def test_a_hub_id_is_fetched_without_code_or_pickles(whole, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "snapshot_download", lambda *args, **options: asked.append((args, options)) or str(whole))
    assert load_model("someone/model").folder == whole
    assert [args for args, _ in asked] == [("someone/model",)] * 2
    config, rest = (options["allow_patterns"] for _, options in asked)
    assert config == ["config.json"]

    def fetched(name):
        return any(fnmatch(name, pattern) for pattern in rest)

    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja", "tokenizer.model"):
        assert fetched(name)
    assert fetched("model.safetensors") and fetched("model-00001-of-00002.safetensors") and fetched("merges.txt")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling_x.py", "onnx/model.safetensors", "original/a.pth"):
        assert not fetched(name)


@pytest.mark.parametrize(("kind", "error"), [("gpt2", UnsupportedError), (None, UnsupportedError), (..., DamagedError)])
def test_a_hub_model_of_another_family_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch, kind, error):
    def download(name, allow_patterns):
        assert allow_patterns == ["config.json"]
        return str(tmp_path)

    (tmp_path / "config.json").write_text("{}" if kind is ... else json.dumps({"model_type": kind}))
    monkeypatch.setattr(module, "snapshot_download", download)
    with refuses(error):
        load_model("someone/model")


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (errors.HFValidationError("Repo id must be\nshorter"), InputError),
        (errors.RepositoryNotFoundError("404\nnot found", response=REPLY), InputError),
        (errors.GatedRepoError("403\nlog in first", response=REPLY), ResourceError),
        (errors.LocalEntryNotFoundError("offline\nand not cached"), ResourceError),
        (errors.HfHubHTTPError("500\nserver error", response=REPLY), ResourceError),
        (ConnectionError("no route\nto host"), ResourceError),
        (Exception("read\ntimed out"), ResourceError),
        (OSError(28, "No space left on device"), ResourceError),
    ],
)
def test_what_the_hub_answers_is_translated(monkeypatch, failure, kind):
    def download(*_, **__):
        raise failure

    monkeypatch.setattr(module, "snapshot_download", download)
    with refuses(kind) as caught:
        load_model("someone/model")
    assert "someone/model" in str(caught.value)


def test_being_offline_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refuses(ResourceError):
        load_model("no-such-owner/no-such-model")
