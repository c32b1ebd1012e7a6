"""The bundled model: a 7.7-million-parameter byte-level Llama with attention sinks.

Its model card, `README.md` in the folder, says what it is, what it was trained on and what it
cannot do; `training/` in the repository made it.
"""

from importlib.resources import files
from pathlib import Path


def path() -> Path:
    """The model's folder; it loads offline like any model of yours.

    >>> sorted(file.name for file in path().iterdir())[1:3]
    ['config.json', 'generation_config.json']

        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path())  # bfloat16, as stored
        tokenizer = AutoTokenizer.from_pretrained(path())  # a byte is its own id; BOS comes first

    Raises RuntimeError where the package is not unpacked on disk (imported from a zip file).
    """
    folder = files("attnspan.models") / "bundled"
    if not isinstance(folder, Path):
        raise RuntimeError(
            f"attnspan must be installed unpacked to read its model, not at {folder}"
        )
    return folder
