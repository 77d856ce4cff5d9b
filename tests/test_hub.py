"""Hub models that are there, that are not, and a hub that does not answer."""

import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from huggingface_hub import constants

from expert_iteration.errors import UserError
from expert_iteration.hub import cached_folder, check_model_available, is_hub_id

ANSWERS = {
    "org/there": (200, ""),
    "org/gated": (403, "GatedRepo"),
    "org/unknown": (401, "RepoNotFound"),
    "org/no-model": (404, "EntryNotFound"),
    "org/broken": (503, ""),
}


class FakeHub(BaseHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def do_HEAD(self):
        name = self.path.removeprefix("/").partition("/resolve/")[0]
        self.requests.append(name)
        if name == "org/silent":
            self.server.stop.wait(10)  # type: ignore[attr-defined]
        status, code = ANSWERS.get(name, (500, ""))
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.stop = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    FakeHub.requests = []
    yield server
    server.stop.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["tiny", "/models/a", "./a", "~/a"])
def test_paths_and_the_built_in_model_are_not_asked_for(name, hub):
    assert not is_hub_id(name)
    check_model_available(name)
    assert FakeHub.requests == []


def test_a_model_that_is_there_passes(hub):
    check_model_available("org/there")
    assert FakeHub.requests == ["org/there"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("org/gated", "accept its terms at https://huggingface.co/org/gated and export HF_TOKEN"),
        ("org/unknown", "check its spelling, or export HF_TOKEN"),
        ("org/no-model", "has no config.json"),
        ("org/broken", "the hub cannot be reached"),
    ],
)
def test_a_refusal_says_what_to_do_after_one_request(name, remedy, hub):
    with pytest.raises(UserError) as error:
        check_model_available(name)
    assert str(error.value).startswith(f"model.name ({name})")
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)
    assert FakeHub.requests == [name]


def test_a_hub_that_does_not_answer_is_given_up(hub):
    with pytest.raises(UserError, match=r"cannot be reached \(.*model.name=tiny"):
        check_model_available("org/silent", time_limit=0.3)


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(UserError, match=r"cannot be reached .*give its folder as a path"):
        check_model_available("org/there")


def test_a_relative_folder_is_recognized(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "unknown").mkdir(parents=True)
    with pytest.raises(UserError, match=r"write \./org/unknown"):
        check_model_available("org/unknown")


def put_in_cache(cache, name, files):
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    for file, text in files.items():
        (snapshot / file).write_text(text)


INDEX = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})


@pytest.mark.parametrize(
    ("files", "is_complete"),
    [
        ({"model.safetensors": ""}, True),
        ({"pytorch_model.bin": ""}, True),
        ({}, False),
        ({"model.safetensors.index.json": INDEX, "1.safetensors": "", "2.safetensors": ""}, True),
        ({"model.safetensors.index.json": INDEX, "1.safetensors": ""}, False),
    ],
)
def test_a_cached_model_needs_no_hub_if_it_is_complete(files, is_complete, hub, tmp_path):
    put_in_cache(tmp_path, "org/there", {"config.json": "{}", "tokenizer.json": "{}"} | files)
    check_model_available("org/there")
    assert FakeHub.requests == ([] if is_complete else ["org/there"])
    folder = cached_folder("org/there")
    assert (folder is not None and (folder / "tokenizer.json").is_file()) == is_complete


def test_a_model_cached_without_its_tokenizer_is_not_complete(hub, tmp_path):
    put_in_cache(tmp_path, "org/there", {"config.json": "{}", "model.safetensors": ""})
    assert cached_folder("org/there") is None
