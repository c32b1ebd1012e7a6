"""Text as tokens, piece by piece: a file of any size in a bounded amount of memory."""

from __future__ import annotations

import codecs
import hashlib
import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 16_384
"""Characters tokenised at once."""

CONTEXT = 256
"""Characters before and after a piece that are tokenised with it and whose tokens are dropped."""

LONGEST = 1 << 20
"""Characters of the longest token: a text without any token boundary for longer is refused."""

# Where common tokenizers always start a token, best first: a line's first character, if neither
# side of the line break is blank (blank lines join into one token), and the space before a word.
_BOUNDARIES = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


@dataclass(frozen=True)
class Place:
    """Where a reader is: enough to go on from there with the same tokens.

    Attributes:
        offset: bytes of the text before the present piece.
        context: how many of them, the last ones, are tokenised with the piece.
        taken: tokens of the piece that have been read.
        sha256: of the first `offset` bytes.
        read: the same of those that all tokens read so far stand for.
    """

    offset: int
    context: int
    taken: int
    sha256: str
    read: str


class TextReader:
    """The tokens of a UTF-8 text, in order, each with the bytes of text that it stands for.

    A piece of text is tokenised together with a little text on either side, and only the tokens
    between two boundaries are given out, so what a tokenizer does at the ends of its input (a
    space put before the first word, say) happens once, at the ends of the text. The tokens are
    those of the whole text tokenised at once wherever the tokenizer's decisions reach no further
    than `CONTEXT` characters and it always ends a token at one of the boundaries. Where a piece
    has no such boundary (one endless line) it ends at the start of some token, and the tokens
    right after it may differ from those of the whole text.

    No special token is added. A token's bytes are those from the end of the token before it to
    its own end, so that the bytes of all tokens add up to the text's.

    Args:
        file: binary, at the text's first byte; it is read once and forwards.
        tokenizer: one that gives offsets (`is_fast`).
        name: what messages call the text.
        place: where to go on, from another reader's `place`.

    Raises:
        ValueError: the text is not UTF-8, has fewer than two tokens, or is not the one that
            `place` comes from.
    """

    def __init__(
        self,
        file: BinaryIO,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "text",
        place: Place | None = None,
    ) -> None:
        self._file, self._tokenizer, self._name = file, tokenizer, name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._received = 0  # bytes
        self._ended = False
        # `_text` is context, then the present piece, then what has been read ahead.
        self._text, self._start, self._stop = "", 0, 0  # in characters
        self._offset, self._context = 0, 0  # in bytes
        self._hash = hashlib.sha256()
        self._ids: list[int] = []
        self._widths: list[int] = []
        self._taken = 0
        if place is None:
            self._tokenise()
            if self._ended and self._stop == len(self._text) and len(self._ids) < 2:
                raise ValueError(
                    f"text {name}: it has {len(self._ids)} tokens; two or more are needed"
                )
        else:
            self._go_to(place)

    @property
    def place(self) -> Place:
        sha256 = self._hash.hexdigest()
        return Place(self._offset, self._context, self._taken, sha256, self._read_hash())

    def _read_hash(self) -> str:
        found = self._hash.copy()
        piece = self._text[self._start : self._stop].encode()
        found.update(piece[: sum(self._widths[: self._taken])])
        return found.hexdigest()

    def read(self, count: int) -> tuple[list[int], list[int]]:
        """Up to `count` token ids and the bytes that each stands for; fewer only at the end."""
        ids: list[int] = []
        widths: list[int] = []
        while len(ids) < count and (self._taken < len(self._ids) or self._next_piece()):
            stop = self._taken + count - len(ids)
            ids += self._ids[self._taken : stop]
            widths += self._widths[self._taken : stop]
            self._taken = min(stop, len(self._ids))
        return ids, widths

    def _go_to(self, place: Place) -> None:
        tail = b""
        while self._received < place.offset:
            block = self._file.read(min(1 << 16, place.offset - self._received))
            if not block:
                break
            self._received += len(block)
            self._hash.update(block)
            tail = (tail + block)[-place.context :] if place.context else b""
        other = ValueError(f"text {self._name}: it is not the one that the snapshot was taken of")
        if self._hash.hexdigest() != place.sha256:
            raise other
        self._offset, self._context = place.offset, place.context
        self._text = tail.decode()
        self._start = len(self._text)
        self._tokenise()
        if place.taken > len(self._ids):
            raise ValueError(f"text {self._name}: it ends before the place of the snapshot")
        self._taken = place.taken
        if self._read_hash() != place.read:
            raise other

    def _next_piece(self) -> bool:
        """Leaves the present piece and tokenises the next; False at the end of the text."""
        if self._ended and self._stop == len(self._text):
            return False
        piece = self._text[self._start : self._stop].encode()
        self._hash.update(piece)
        self._offset += len(piece)
        first = max(0, self._stop - CONTEXT)
        self._context = len(self._text[first : self._stop].encode())
        self._text, self._start = self._text[first:], self._stop - first
        self._tokenise()
        return bool(self._ids)

    def _tokenise(self) -> None:
        """Finds the end of the piece that begins at `_start`, and its tokens."""
        size = PIECE
        while not self._fits(size):
            size *= 2
            if size > LONGEST:
                raise ValueError(
                    f"text {self._name}: the {LONGEST:,} characters after byte {self._offset:,} "
                    "are one token; a text that can be cut is needed"
                )

    def _fits(self, size: int) -> bool:
        """Tokenises a piece of at most `size` characters; False if no token ends in it."""
        reach = self._start + size + CONTEXT
        while len(self._text) <= reach and not self._ended:
            self._text += self._more()
        last = len(self._text) <= reach
        # The piece depends on the text alone, not on how far it happens to be read.
        encoded = self._tokenizer(
            self._text[:reach],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        spans: list[tuple[int, int]] = encoded["offset_mapping"]
        starts = [start for start, _ in spans]
        stop = len(self._text) if last else self._cut(spans, starts, self._start + size)
        tokens = range(bisect_left(starts, self._start), bisect_left(starts, stop))
        if not last and not tokens:
            return False
        self._stop, self._taken = stop, 0
        self._ids = [encoded["input_ids"][i] for i in tokens]
        ends = [min(max(spans[i][1], self._start), stop) for i in tokens]
        ends[-1:] = [stop] if ends else []
        sizes = (len(character.encode()) for character in self._text[self._start : stop])
        before = list(accumulate(sizes, initial=0))
        upto = [before[end - self._start] for end in accumulate(ends, max)]
        self._widths = [b - a for a, b in zip([0, *upto], upto, strict=False)]
        return True

    def _cut(self, spans: list[tuple[int, int]], starts: list[int], limit: int) -> int:
        """The last good place up to `limit` that lies in no token; `_start` if there is none."""

        def covering(place: int) -> int | None:
            """The start of the token that `place` lies in."""
            i = bisect_left(starts, place) - 1
            return starts[i] if i >= 0 and spans[i][1] > place else None

        for boundary in _BOUNDARIES:
            places = [m.start() for m in boundary.finditer(self._text, self._start + 1, limit + 1)]
            for place in reversed(places):
                if covering(place) is None:
                    return place
        inside = covering(limit)
        return limit if inside is None else max(inside, self._start)

    def _more(self) -> str:
        block = self._file.read(1 << 16)
        pending = len(self._decoder.getstate()[0])
        self._ended = not block
        try:
            text = self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            at = self._received - pending + error.start
            raise ValueError(f"text {self._name}: byte {at:,} is not valid UTF-8") from None
        self._received += len(block)
        return text
