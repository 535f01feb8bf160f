"""Token ids as text, for servers and endpoints that only take text; and how many tokens a text has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

_BYTES_PER_TOKEN = 4  # of English in the vocabularies of today, roughly
# Short, frequent words: one token each in most vocabularies, with the space before them.
_WORDS = """the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such our man me even
most made after also did many off before must well back through years where much your way down should because long each
just state those people too good very make world still see own men work here get both life being under three never day
same another know while last might us great old year come since against go came right used take house use during again
place around small found those high part school left few next head without white number sound small side water far call
put end does why asked set want show every air name large point big act land home hand read port spell add even page
""".split()
NUM_WORDS = len(set(_WORDS))


class Wording(Protocol):
    """Turns token ids into text; equal prefixes give equal prefixes."""

    vocab_size: int  # ids are below it

    def text(self, token_ids: tuple[int, ...]) -> str: ...

    def count(self, text: str) -> int: ...


class Words:
    """Without a tokenizer: a common word for each token, so lengths are near what was asked and not exact."""

    vocab_size = NUM_WORDS

    def __init__(self) -> None:
        self._words = [" " + word for word in dict.fromkeys(_WORDS)]

    def text(self, token_ids: tuple[int, ...]) -> str:
        return "".join(self._words[token % NUM_WORDS] for token in token_ids)

    def count(self, text: str) -> int:
        """An estimate."""
        return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN)


class Vocabulary:
    """With the model's `tokenizer.json`: random tokens are decoded, which the server encodes to nearly as many."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, ValueError."""
        from tokenizers import Tokenizer  # not needed otherwise, and slow to import

        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no {file}")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} is no tokenizer: {error}") from error
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=False)

    def text(self, token_ids: tuple[int, ...]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)
