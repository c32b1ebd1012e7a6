"""Folders that load, and those that are refused in one sentence each."""

import json
import os
import pickle
import shutil

import pytest
import torch
from tiny import tiny_llama
from transformers.utils import logging

from attnspan.models import bundled
from attnspan.models.loading import load


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=264).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path() / name, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_folder_loads_in_float32_and_eval_mode(folder, capfd):
    model, tokenizer = load(str(folder))
    assert model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert not model.training
    assert tokenizer("hi")["input_ids"] == [256, 104, 105]
    assert capfd.readouterr() == ("", "")
    assert load(folder, device="cpu", dtype=torch.float64)[0].dtype == torch.float64


def test_the_bundled_model_loads_quietly(capfd):
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model, tokenizer = load("bundled")
    assert model.config.max_position_embeddings == 1024
    assert tokenizer.bos_token_id == 256
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bar)


def only_pickled(folder):
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Trap(), file)


class Trap:
    """Unpickling it would run this."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


REFUSED = {
    "no config": (lambda f: (f / "config.json").unlink(), r"there is no config\.json in it"),
    "broken config": (
        lambda f: (f / "config.json").write_text("{"),
        r"config\.json can't be read",
    ),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff"), "can't be read"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
    "unknown type": (
        lambda f: change(f / "config.json", model_type="nonesuch"),
        "the model can't be loaded|its tokenizer can't be loaded",
    ),
    "remote code": (
        lambda f: change(f / "config.json", auto_map={"AutoModel": "evil.Model"}),
        r"config\.json asks for remote code \(auto_map\)",
    ),
    "nested remote code": (
        lambda f: change(f / "config.json", text_config=[{"auto_map": {"AutoModel": "e.M"}}]),
        "asks for remote code",
    ),
    "remote kernel": (
        lambda f: change(f / "config.json", attn_implementation="someone/kernel"),
        r"asks for remote code \(attn_implementation\)",
    ),
    "remote tokenizer": (
        lambda f: change(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["e.T", None]}),
        r"tokenizer_config\.json asks for remote code",
    ),
    "pickled": (only_pickled, r"pickled weights only \(pytorch_model\.bin\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "there are no weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "there is no tokenizer"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "its tokenizer can't be loaded",
    ),
    "truncated weights": (truncated, "the model can't be loaded"),
    "weights of a smaller model": (
        lambda f: change(f / "config.json", num_hidden_layers=3),
        "its weights don't fill the model: 9 tensors are missing",
    ),
    "weights of another shape": (
        lambda f: change(f / "config.json", intermediate_size=40),
        "don't fill the model|can't be loaded",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(folder, case, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    spoil, match = REFUSED[case]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        load(folder)
    assert str(caught.value).startswith(f"model {folder}: ")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not (folder / "unpickled").exists()


def test_missing_folders_and_wrong_devices(tmp_path, folder):
    for wrong in (tmp_path / "nowhere", folder / "config.json", "gpt2"):
        with pytest.raises(FileNotFoundError, match="there is no such folder; bundled or"):
            load(wrong)
    with pytest.raises(ValueError, match="device 'tpu'"):
        load(folder, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda'"):
            load(folder, device="cuda")
