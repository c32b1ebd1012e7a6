"""Two tokenizers: bytes, and one that joins bytes of English."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attnspan.evaluation.tasks import Writer
from attnspan.evaluation.texts import english_heldout
from attnspan.models import bundled


@pytest.fixture(scope="session")
def bytewise():
    return AutoTokenizer.from_pretrained(str(bundled.path()), local_files_only=True)


@pytest.fixture(scope="session")
def joining():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [english_heldout()[:20_000], "".join(f" {n}" for n in range(10_000, 12_000))]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(params=["bytewise", "joining"])
def writer(request):
    return Writer(request.getfixturevalue(request.param), 256)
