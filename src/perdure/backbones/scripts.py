"""Whether a text tower can read a text: what it cannot read it still embeds, and answers nonsense with confidence."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence

_ASKED = 200  # texts looked at: enough to know a script


def unread_scripts(
    texts: Sequence[str], tokens_of: Callable[[str], Sequence[int]], unknown: int | None, only: str | None = None
) -> Iterator[str]:
    """Why some of `texts` mean nothing to a text tower, a line for each script; none when all can be read.

    A token that stands for the unknown, and a letter that takes several tokens (spelt byte by byte), are no word that a
    model has learnt. Whether known tokens were ever trained cannot be told from a tokenizer: weights that perdure
    brings say which script theirs were.

    Args:
        texts: words, names, sentences.
        tokens_of: a text to its tokens, without those that begin and end it.
        unknown: the token for what is not in the vocabulary, None when there is none.
        only: the one script whose words the weights have seen, such as "LATIN"; None when that is not known.
    """
    told: dict[str, str] = {}
    for text in texts[:_ASKED]:
        for word in text.split():
            script = script_of(word)
            if script is None or script in told:
                continue
            ids = tokens_of(word)
            letters = sum(map(str.isalpha, word))
            if unknown in ids and script == "LATIN" and set(ids) != {unknown}:  # a sign in it, not its letters
                told[script] = f"the text encoder knows {word!r} in part only: write it without what is no letter"
            elif unknown in ids:
                told[script] = _unread(script, f"its tokenizer does not know {word!r}")
            elif script != "LATIN" and len(ids) > letters:
                spelt = f"its tokenizer spells {word!r} byte by byte, {len(ids)} tokens for {letters} letters"
                told[script] = _unread(script, spelt)
            elif only not in (None, script):
                told[script] = _unread(script, f"its weights have seen words in {only.title()} script only")
    yield from told.values()


def _unread(script: str, why: str) -> str:
    named = "Chinese" if script == "CJK" else script.title()
    return f"the text encoder cannot read {named} script: {why}; answers to such words mean nothing"


def script_of(word: str) -> str | None:
    """The first word of the Unicode name of a word's first letter, such as "LATIN", "CJK"; None without letters."""
    letter = next((each for each in word if each.isalpha()), None)
    return None if letter is None else unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
