"""Scores of captions: CIDEr-D, BLEU-1 to 4 and ROUGE-L, as pycocoevalcap computes them, without Java.

Sources: Vedantam et al., "CIDEr", CVPR 2015, arXiv 1411.5726; Papineni et al., "BLEU", ACL 2002; Lin, "ROUGE", 2004;
with the constants of pycocoevalcap 1.2.

Differs: words are cut by a regular expression in place of the Penn Treebank tokeniser, which is a Java program. Case
goes, and so do the punctuation marks that pycocoevalcap drops; 's and n't are words by themselves. Chinese is cut into
characters; with it all punctuation goes, and full-width forms become plain ones.
"""

import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from perdure.scoring.marks import Grade, Mark, Reference, check_all, form_of, has_truth, mean
from perdure.scoring.normalise import has_han
from perdure.scoring.symbols import HAN

Words = tuple[str, ...]
Counts = Counter[Words]
References = Sequence[Sequence[Words]]
"""All captions of each image."""
One = Callable[[int, Words], float]
"""The score of a caption of the image at an index."""
Vector = tuple[list[dict[Words, float]], list[float], int]
"""tf-idf of n-grams of each order, the norms, and a length."""

_WORD = re.compile(rf"[{HAN}]|n't\b|'[a-z]+|[^\W{HAN}]+?(?=n't\b)|[^\W{HAN}]+(?:[.,-][^\W{HAN}]+)*|[^\w\s]")
_DROPPED = set("'\"`“”‘’.?!,:-;()[]{}—–…。，、：；？！（）《》【】·")
_FULL_POINT = re.compile(r"(?<=\d)．(?=\d)")
_SENTENCE = re.compile(r"[.!?:;]+(?=\s|$)|[。！？：；]|\n")
_ORDERS = range(1, 5)
_SIGMA = 6.0
_BETA = 1.2
_SMALL, _TINY = 1e-9, 1e-15
_ALONE = ("CIDEr of one image is 0, whatever was said: its idf is log 1",)


def words(caption: str) -> Words:
    """The words of a caption, the characters of a Chinese one."""
    plain = (_plain_chinese(caption) if has_han(caption) else caption).lower().replace("’", "'")
    return tuple(word for word in _WORD.findall(plain) if word not in _DROPPED)


def _plain_chinese(caption: str) -> str:
    """A caption without punctuation but that of English words and numbers, such as 't-shirt' and 3.5."""
    caption = _FULL_POINT.sub(".", caption)
    wide = "".join(" " if _is_mark(each) and not each.isascii() and each != "’" else each for each in caption)
    plain = unicodedata.normalize("NFKC", wide)
    return "".join(" " if _is_mark(each) and each not in "'’.,-" else each for each in plain)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "P" or character in "~～"


def cider(references: References) -> One:
    """CIDEr-D, 0 to 10: cosines of tf-idf vectors of n-grams, the idf from these references, with a length penalty.

    One image alone gives 0: its idf is log 1. A subset of a test set has another idf and another score.
    """
    sets = [[_grams(reference) for reference in each] for each in references]
    frequency = Counter(gram for each in sets for gram in set().union(*each))
    log_images = math.log(len(sets))

    def vector(grams: Counts) -> Vector:
        orders: list[dict[Words, float]] = [{} for _ in _ORDERS]
        for gram, count in grams.items():
            orders[len(gram) - 1][gram] = count * (log_images - math.log(max(1, frequency[gram])))
        # pycocoevalcap counts bigrams where it says length.
        length = sum(count for gram, count in grams.items() if len(gram) == 2)
        return orders, [math.hypot(*order.values()) for order in orders], length

    vectors = [[vector(grams) for grams in each] for each in sets]

    def one(image: int, caption: Words) -> float:
        said = vector(_grams(caption))
        return 10 * statistics.fmean(_alike(said, reference) for reference in vectors[image])

    return one


def bleu(references: References, order: int = 4) -> One:
    """BLEU of n-grams up to `order` of one caption, 0 to 1, with the closest reference's length."""
    return lambda image, caption: _bleu(order, [_matches(caption, references[image])])


def rouge(references: References) -> One:
    """ROUGE-L, 0 to 1: F (beta 1.2) of the longest common subsequence, best precision and best recall apart."""

    def one(image: int, caption: Words) -> float:
        common = [_common(caption, reference) for reference in references[image]]
        precision = max(common) / max(len(caption), 1)
        recall = max(n / max(len(reference), 1) for n, reference in zip(common, references[image], strict=True))
        both = recall + _BETA**2 * precision
        return (1 + _BETA**2) * precision * recall / both if both else 0.0

    return one


def corpus_bleu(captions: Sequence[Words], references: References, order: int = 4) -> float:
    """BLEU of a whole set: n-grams and lengths are summed before they are divided."""
    return _bleu(order, list(map(_matches, captions, references)))


@dataclass(frozen=True)
class CaptionScore:
    """A score of a set of captions. Lenient: of the best sentence of each answer, whatever stands before and after.

    Args:
        name: as it is chosen.
        one: makes of references what scores one caption.
        whole: scores a set; the mean of its captions when None.
        top: the highest possible value.
    """

    name: str
    one: Callable[[References], One]
    whole: Callable[[Sequence[Words], References], float] | None = None
    top: float = 1.0

    def check(self, reference: Reference) -> None:
        """Raise a ValueError where an image has no caption."""
        has_truth(reference)

    def grade(self, answers: Sequence[str], references: Sequence[Reference]) -> Grade:
        """Score captions, one an image."""
        check_all(self, answers, references)
        truths = [[words(caption) for caption in reference.answers] for reference in references]
        one, chosen, marks = self.one(truths), [], []
        for image, answer in enumerate(answers):
            parts = [words(answer), *map(words, _SENTENCE.split(answer))]
            values = [one(image, part) for part in parts]
            chosen.append(parts[values.index(max(values))])
            marks.append(Mark(values[0], max(values), form_of(answer)))
        grade = mean(tuple(marks))
        if self.whole is not None:
            strict = self.whole(list(map(words, answers)), truths)
            grade = replace(grade, strict=strict, lenient=max(strict, self.whole(chosen, truths)))
        return replace(grade, remarks=_ALONE) if self.name == "cider" and len(answers) == 1 else grade


def _bleu_score(name: str, order: int) -> CaptionScore:
    return CaptionScore(name, partial(bleu, order=order), partial(corpus_bleu, order=order))


CAPTION_SCORES: Sequence[CaptionScore] = (
    CaptionScore("cider", cider, top=10.0),
    _bleu_score("bleu", 4),
    *(_bleu_score(f"bleu_{order}", order) for order in (1, 2, 3)),
    CaptionScore("rouge", rouge),
)
"""Scores of sets of captions; `bleu` is BLEU-4."""


def _grams(caption: Words) -> Counts:
    return Counter(caption[i : i + n] for n in _ORDERS for i in range(len(caption) - n + 1))


def _alike(hypothesis: Vector, reference: Vector) -> float:
    """Mean over n of the cosine of n-grams; none counts for more than the reference has of it."""
    (h, h_norms, h_length), (r, r_norms, r_length) = hypothesis, reference
    products = (sum(min(w, r[n][g]) * r[n][g] for g, w in h[n].items() if g in r[n]) for n in range(len(_ORDERS)))
    norms = (a * b or 1.0 for a, b in zip(h_norms, r_norms, strict=True))
    cosines = (product / norm for product, norm in zip(products, norms, strict=True))
    return statistics.fmean(cosines) * math.exp(-((h_length - r_length) ** 2) / (2 * _SIGMA**2))


def _matches(caption: Words, references: Sequence[Words]) -> list[int]:
    """n-grams of each order that a reference has too, all of each order; the length, and the closest reference's."""
    most: Counts = Counter()
    for reference in references:
        most |= _grams(reference)
    right = _grams(caption) & most
    matched = [sum(count for gram, count in right.items() if len(gram) == n) for n in _ORDERS]
    closest = min((abs(len(reference) - len(caption)), len(reference)) for reference in references)[1]
    return [*matched, *(max(0, len(caption) - n + 1) for n in _ORDERS), len(caption), closest]


def _bleu(order: int, parts: Sequence[Sequence[int]]) -> float:
    *counts, length, closest = map(sum, zip(*parts, strict=True))
    precision = math.prod((r + _TINY) / (g + _SMALL) for r, g in zip(counts[:order], counts[4:], strict=False))
    ratio = (length + _TINY) / (closest + _SMALL)
    return precision ** (1 / order) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def _common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for left in a:
        corner = 0
        for j, right in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]
