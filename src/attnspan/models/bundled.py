"""The bundled model: a 7.7-million-parameter byte-level Llama with attention sinks.

Its model card, `README.md` in the folder, says what it is, what it was trained on and what it
cannot do; `training/` in the repository made it.
"""

from importlib.resources import files
from pathlib import Path


def path() -> Path:
    """The model's folder; it loads offline like any model of yours.

    >>> from transformers import AutoTokenizer
    >>> AutoTokenizer.from_pretrained(path()).encode("é")  # BOS, then each byte's value
    [256, 195, 169]

    `AutoModelForCausalLM.from_pretrained(path())` gives the model in bfloat16, as it is stored.

    Raises RuntimeError where the package is not unpacked on disk (imported from a zip file).
    """
    folder = files("attnspan.models") / "bundled"
    if not isinstance(folder, Path):
        raise RuntimeError(
            f"attnspan must be installed unpacked to read its model, not at {folder}"
        )
    return folder
