"""hub.py, chapter two: ids of the hub, in a cache laid out as huggingface_hub does, and offline.

The cache holds a checkpoint that transformers made: models--owner--name/refs/main names a commit,
snapshots/<commit> links to blobs. No test asks the network.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from tiny_checkpoint import make_checkpoint
from transformers import AutoModelForImageTextToText

import hub
from checkpoint import FILES, checkpoint_folder
from data import Processor
from hub import is_hub_id, snapshot
from journal import newest_checkpoint
from model import Qwen2VL

ROOT = Path(__file__).resolve().parent.parent
COMMIT, OLDER = "895c3a49bc3fa70a340399125c650a463535e71c", "1" * 40


def put(cache: Path, source: Path, name: str, commit: str, ref: str, kind="model") -> Path:
    """Copies a folder's files into a hub cache as a repository's revision."""
    repo = cache / f"{kind}s--{name.replace('/', '--')}"
    folder = repo / "snapshots" / commit
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "blobs").mkdir(exist_ok=True)
    folder.mkdir(parents=True)
    (repo / "refs" / ref).write_text(commit)
    for file in sorted(source.iterdir()):
        blob = repo / "blobs" / f"{commit[:8]}-{file.name}"
        shutil.copy(file, blob)
        (folder / file.name).symlink_to(os.path.relpath(blob, folder))
    return folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with acme/tiny-2.5 at main, sharded, and another model at its revision v1."""
    work, cache = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("cache")
    new = make_checkpoint(work / "new", family="qwen2_5_vl", tie=False)
    model = AutoModelForImageTextToText.from_pretrained(new)
    model.save_pretrained(new, max_shard_size="100KB")
    assert len(list(new.glob("model-*.safetensors"))) > 2
    older = make_checkpoint(work / "older", seed=1)
    put(cache, new, "acme/tiny-2.5", COMMIT, "main")
    put(cache, older, "acme/tiny-2.5", OLDER, "v1")
    return cache


@pytest.fixture
def cache(filled, monkeypatch):
    """The same, as the only place to look."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(filled))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return filled


# --------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("name", [
    "Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "leonardPKU/clevr_cogen_a_train",
    "owner/name@main", "owner/name@v1.0", "owner/name@refs/pr/3",
])  # fmt: skip
def test_owner_and_name_are_a_hub_id(name):
    assert is_hub_id(name)


@pytest.mark.parametrize("name", [
    "tiny", "", "/models/x", "./owner/name", "../owner/name", "runs/a/step_000100", "owner/",
    "owner/name@", "world:A,n=8", "a b/c", "https://huggingface.co/owner/name", "~/models",
])  # fmt: skip
def test_paths_and_sources_are_none(name):
    assert not is_hub_id(name)


def test_a_file_or_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/tiny")
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    assert not is_hub_id("runs/tiny")
    (tmp_path / "runs" / "rows.jsonl").write_text("")
    assert not is_hub_id("runs/rows.jsonl")


# ---------------------------------------------------------------------------------------- snapshots


def test_a_cached_repository_is_its_snapshot_folder(cache):
    repo = cache / "models--acme--tiny-2.5"
    assert snapshot("acme/tiny-2.5", "model", FILES) == repo / "snapshots" / COMMIT
    assert snapshot("acme/tiny-2.5@v1", "model", FILES) == repo / "snapshots" / OLDER
    assert snapshot(f"acme/tiny-2.5@{OLDER}", "model", FILES) == repo / "snapshots" / OLDER


def test_a_data_set_is_not_a_model_of_the_same_name(cache, tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    folder = put(cache, tmp_path, "acme/rows", COMMIT, "main", kind="dataset")
    assert snapshot("acme/rows", "dataset", ("*.jsonl",)) == folder
    with pytest.raises(ValueError, match="model acme/rows: no such file or folder"):
        snapshot("acme/rows", "model", FILES)


@pytest.mark.parametrize("name", ["acme/never-seen", "acme/tiny-2.5@v9"])
def test_what_the_cache_does_not_hold_is_told_offline(cache, name):
    repo = name.partition("@")[0]
    with pytest.raises(ValueError) as error:
        snapshot(name, "model", FILES)
    message = str(error.value)
    assert message.startswith(f"model {name}: no such file or folder, and {repo} is not in")
    assert "hub's cache" in message and "\n" not in message


@pytest.fixture
def answering(monkeypatch, tmp_path):
    """answering(status, code): a hub on this machine that answers everything so, and no cache. Of
    its answer of `length` bytes it sends two."""
    servers = []

    def serve(status: int, code: str | None, length: int = 2):
        class Hub(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Hub))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{servers[-1].server_port}")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status, code, told", [
    (401, "RepoNotFound", "the hub has no model acme/x (or it is private: `hf auth login`)"),
    (404, "RepoNotFound", "the hub has no model acme/x (or it is private: `hf auth login`)"),
    (404, "RevisionNotFound", "acme/x of the hub has no revision v9"),
    (403, "GatedRepo", "accepted its terms: do that on huggingface.co/acme/x, then `hf auth"),
    (400, None, "acme/x is not in the hub's cache and the hub cannot be asked: "),
])  # fmt: skip
def test_what_the_hub_answers_is_told(answering, status, code, told):
    answering(status, code)
    with pytest.raises(ValueError) as error:
        snapshot("acme/x@v9", "model", FILES)
    assert "model acme/x@v9: no such file or folder, and" in str(error.value)
    assert told in str(error.value)


def test_a_hub_that_cannot_be_reached_is_told(answering, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ValueError, match=r"acme/x is not in the hub's cache and the hub cannot be"):
        snapshot("acme/x", "model", FILES)


def test_an_answer_that_is_cut_short_is_told(answering):
    """What the HTTP package raises then is no OSError."""
    answering(200, None, length=100)
    with pytest.raises(ValueError, match=r"the hub cannot be asked: \S+"):
        snapshot("acme/x", "model", FILES)


@pytest.mark.parametrize("error, told", [
    (hub.errors.HTTPError(""), "HTTPError"), (OSError(), "OSError"),
    (RuntimeError("Task error: CAS Client Error\nmore"), "Task error: CAS Client Error"),
])  # fmt: skip
def test_an_error_without_a_message_is_told_by_its_name_and_of_others_a_line(
    monkeypatch, error, told
):
    def stop(*args, **options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", stop)
    with pytest.raises(ValueError) as caught:
        snapshot("acme/x", "model", FILES)
    assert str(caught.value).endswith(f"the hub cannot be asked: {told}")


# ------------------------------------------------------------------------------------- checkpoints


def test_of_a_repository_only_what_makes_a_checkpoint_is_asked_for():
    """Qwen2-VL-2B-Instruct's files, and what else model repositories hold."""
    wanted = [
        "chat_template.json", "chat_template.jinja", "config.json", "generation_config.json",
        "merges.txt", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    others = [
        ".gitattributes", "LICENSE", "README.md", "pytorch_model.bin", "optimizer.pt", "train.py",
        "checkpoint-100/model.safetensors", "checkpoint-100/optimizer.pt", "adapter.safetensors",
    ]  # fmt: skip
    found = filter_repo_objects([*wanted, *others], allow_patterns=list(FILES))
    assert sorted(found) == sorted(wanted)


@torch.no_grad()
def test_a_model_and_its_processor_load_by_their_id(cache, monkeypatch, tmp_path):
    """And where a folder has that name, from there."""
    monkeypatch.chdir(tmp_path)
    model = Qwen2VL.from_pretrained("acme/tiny-2.5")
    folder = newest_checkpoint("acme/tiny-2.5")
    assert folder == str(checkpoint_folder("acme/tiny-2.5")) and folder.endswith(COMMIT)
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(model.head, theirs.lm_head.weight)
    assert Processor.from_pretrained(folder).vocab_size == 398
    assert Qwen2VL.from_pretrained("acme/tiny-2.5@v1").cfg.vision.family == "qwen2_vl"
    shutil.copytree(cache / "models--acme--tiny-2.5" / "snapshots" / OLDER, "acme/tiny-2.5")
    assert newest_checkpoint("acme/tiny-2.5") == "acme/tiny-2.5"
    assert Qwen2VL.from_pretrained("acme/tiny-2.5").cfg.vision.family == "qwen2_vl"


def test_a_name_that_is_neither_says_both(cache):
    with pytest.raises(ValueError, match="model acme/typo: no such file or folder, and acme/typo"):
        newest_checkpoint("acme/typo")
    with pytest.raises(ValueError, match=r"a checkpoint folder .* nor the id of one on the hub"):
        newest_checkpoint("typo")
    with pytest.raises(FileNotFoundError, match=r"typo: no config\.json.* on the hub"):
        Qwen2VL.from_pretrained("typo")


def test_the_environment_of_huggingface_hub_is_enough(filled):
    """A new process with nothing but HF_HUB_CACHE and HF_HUB_OFFLINE."""
    code = "import hub, sys; print(hub.snapshot(sys.argv[1], 'model', ('*.json',)))"
    env = {**os.environ, "HF_HUB_CACHE": str(filled), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code, "acme/tiny-2.5"], env=env, cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    folder = Path(out.stdout.strip())
    assert folder.name == COMMIT
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"
