"""Write the byte tokenizer: one token per byte, its id the byte's value, and three specials.

    python -m training.tokenizer FOLDER

The tokens carry the names of GPT-2's byte alphabet, so the `ByteLevel` parts of the `tokenizers`
library map text to bytes and back without a vocabulary of our own invention.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS, PAD, VOCAB = 256, 257, 258, 264
SPECIALS = {"<|attnspan.bos|>": BOS, "<|attnspan.eos|>": EOS, "<|attnspan.pad|>": PAD}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's name for each byte: itself where printable in Latin-1, else U+0100 and upward."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    alphabet = dict(sorted(byte_alphabet().items(), key=lambda item: item[1]))
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    )
    bos, eos, pad = SPECIALS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)]
    )
    found = {name: tokenizer.token_to_id(name) for name in [*alphabet, *SPECIALS]}
    if found != alphabet | SPECIALS:
        raise RuntimeError("the tokenizers library gave the tokens other ids than asked for")

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # Text that spells a special token out stays text: no input can forge a BOS.
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m training.tokenizer FOLDER")
    write_tokenizer(Path(sys.argv[1]))
