"""Text read piece by piece has the tokens, and the bytes, of the whole text tokenised at once."""

import argparse
import io
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attnspan.evaluation import text as module
from attnspan.evaluation.text import TextReader
from attnspan.models import bundled

CORPUS = [
    "def window(keys, size):\n    return keys[-size:]\n\n\nclass Cache:\n    pass\n",
    "The cache holds the first tokens;\nthe window holds the last.  Nothing else.\n\n",
    "naïve café — 100 €, {'a': [1, 2, 3]}\r\n\tif x == y:\n",
]


def bundled_tokenizer():
    return AutoTokenizer.from_pretrained(bundled.path())


def word_bpe():
    """Byte-level BPE after a split into words, as GPT-2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def sentence_bpe():
    """BPE over whole texts with a space put before the first word, as Llama 2's."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=["<unk>", "<s>", *bytes_]
    )
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # for training: words within lines
    core.train_from_iterator(CORPUS * 4, trainer)
    core.pre_tokenizer = None
    core.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {make.__name__: make() for make in (bundled_tokenizer, word_bpe, sentence_bpe)}
lines = st.lists(
    st.sampled_from(
        ["def f(x):", "    return x", "", "  ", "the window", "é€😀", "\r", "  a  b ", "();", "\t"]
    )
    | st.text(st.characters(codec="utf-8"), max_size=12),
    max_size=60,
).map("\n".join)


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def read_all(reader, count):
    ids, widths = [], []
    while True:
        more, sizes = reader.read(count)
        ids += more
        widths += sizes
        if len(more) < count:
            return ids, widths


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 24)
    monkeypatch.setattr(module, "CONTEXT", 12)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=lines, count=st.integers(1, 50))
def test_pieces_equal_the_whole(name, text, count):
    tokenizer = TOKENIZERS[name]
    assume(len(whole(tokenizer, text)) >= 2)  # shorter ones are refused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 40)
        patch.setattr(module, "CONTEXT", 40)
        ids, widths = read_all(TextReader(io.BytesIO(text.encode()), tokenizer), count)
    assert ids == whole(tokenizer, text)
    assert sum(widths) == len(text.encode()) or not ids
    assert min(widths, default=0) >= 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_real_file_in_pieces_of_the_real_size(name):
    """The default sizes on 150 kB of this package's own kind of text."""
    text = "".join(Path(m.__file__).read_text() for m in (module, io, argparse)) * 2
    tokenizer = TOKENIZERS[name]
    ids, widths = read_all(TextReader(io.BytesIO(text.encode()), tokenizer), 256)
    assert ids == whole(tokenizer, text)
    assert sum(widths) == len(text.encode())


@pytest.mark.usefixtures("small_pieces")
def test_without_context_the_pieces_differ(monkeypatch):
    """The oracle can fail: with no context Llama's space comes back at every piece."""
    text = CORPUS[1] * 4
    tokenizer = TOKENIZERS["sentence_bpe"]
    monkeypatch.setattr(module, "CONTEXT", 0)
    ids, _ = read_all(TextReader(io.BytesIO(text.encode()), tokenizer), 7)
    assert ids != whole(tokenizer, text)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(text=lines, first=st.integers(0, 300), count=st.integers(1, 40))
def test_resumes_anywhere(name, text, first, count):
    tokenizer = TOKENIZERS[name]
    assume(len(whole(tokenizer, text)) >= 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 24)
        patch.setattr(module, "CONTEXT", 12)
        patch.setattr(module, "LONGEST", 1 << 12)
        reader = TextReader(io.BytesIO(text.encode()), tokenizer)
        reader.read(first)
        place = reader.place
        rest = read_all(reader, count)
        again = TextReader(io.BytesIO(text.encode()), tokenizer, place=place)
        assert again.place == place
        assert read_all(again, count + 3) == rest


@pytest.mark.usefixtures("small_pieces")
def test_resume_refuses_another_text():
    text = CORPUS[0] * 5
    reader = TextReader(io.BytesIO(text.encode()), TOKENIZERS["word_bpe"])
    reader.read(60)
    for other in (text.replace("def", "Def"), text[:20]):
        with pytest.raises(ValueError, match=r"text notes\.txt: it is not the one that"):
            TextReader(
                io.BytesIO(other.encode()), TOKENIZERS["word_bpe"], "notes.txt", reader.place
            )


def test_resume_refuses_another_text_within_the_first_piece():
    text, tokenizer = CORPUS[0] * 5, TOKENIZERS["word_bpe"]
    reader = TextReader(io.BytesIO(text.encode()), tokenizer)
    _, widths = reader.read(60)
    seen = sum(widths)
    assert reader.place.offset == 0 < seen < len(text.encode())
    later = text[:-2] + "~~"  # nobody has read that
    TextReader(io.BytesIO(later.encode()), tokenizer, place=reader.place)
    with pytest.raises(ValueError, match="it is not the one that the snapshot was taken of"):
        TextReader(io.BytesIO(("~" + text[1:]).encode()), tokenizer, place=reader.place)


@pytest.mark.parametrize(
    ("text", "at"),
    [(b"abc\xff", "3"), (b"\xe2\x82", "0"), (b"\xc3\xa9" * 40_000 + b"\xc3(", "80,000")],
)
def test_invalid_utf8_names_the_byte(text, at):
    with pytest.raises(ValueError, match=f"text in.txt: byte {at} is not valid UTF-8"):
        read_all(TextReader(io.BytesIO(text), TOKENIZERS["bundled_tokenizer"], "in.txt"), 100)


def test_one_endless_line_takes_bounded_memory():
    """Without line breaks and spaces a piece ends at some token; the byte tokenizer stays exact."""

    class Endless(io.RawIOBase):
        def read(self, size=-1):
            return b"x" * size

    reader = TextReader(Endless(), TOKENIZERS["bundled_tokenizer"])
    for _ in range(40):
        ids, widths = reader.read(10_000)
        assert ids == [ord("x")] * 10_000
        assert widths == [1] * 10_000
        assert len(reader._text) < 100_000


def test_a_text_of_one_token_is_refused(monkeypatch):
    core = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    monkeypatch.setattr(module, "LONGEST", 1 << 15)
    with pytest.raises(ValueError, match="are one token"):
        TextReader(io.BytesIO(b"x" * 200_000), tokenizer)


def test_special_tokens_follow_the_tokenizer():
    """Text that spells a special token stays text for the bundled model, as its tokenizer says."""
    text = "<|attnspan.bos|>\n"
    ids, _ = TextReader(io.BytesIO(text.encode()), TOKENIZERS["bundled_tokenizer"]).read(99)
    assert ids == list(text.encode())
    added = TOKENIZERS["word_bpe"]
    added.add_tokens([AddedToken("<s>", special=True)])
    assert TextReader(io.BytesIO(b"<s> a"), added).read(9)[0] == whole(added, "<s> a")


@pytest.mark.parametrize("text", [b"", b"a"])
def test_fewer_than_two_tokens_are_refused(text):
    with pytest.raises(ValueError, match="two or more are needed"):
        TextReader(io.BytesIO(text), TOKENIZERS["bundled_tokenizer"])
