"""A tiny model with the bundled tokenizer, and a text."""

import io

import pytest
from tiny import tiny_llama
from transformers import AutoTokenizer

from attnspan.evaluation.texts import python_heldout
from attnspan.models import bundled


@pytest.fixture(scope="session")
def tiny_tuned():
    """Its heads of 32 are what every storage can hold."""
    model = tiny_llama(
        vocab_size=264, head_dim=32, max_position_embeddings=128, num_hidden_layers=2
    )
    return model, AutoTokenizer.from_pretrained(bundled.path())


@pytest.fixture
def text():
    return lambda size=6000: io.BytesIO(python_heldout()[:size].encode())
