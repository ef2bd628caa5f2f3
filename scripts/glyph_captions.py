"""The texts for pretraining the bundled CLIP: captions, random prompts, and the merges of its tokenizer."""

import gzip
import itertools
import random
import string
from collections import Counter
from pathlib import Path

from glyphs import CHARACTERS
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode

CONTEXT_LENGTH = 24
NUM_MERGES = 320
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANY_TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a {}.",
    "a photo of a {}.",
    "a photo of a {}",
    "a photo of the {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "a scan of a {}.",
    "a handwritten {}.",
    "a handwritten {}",
    "a printed {}.",
    "a {} written by hand.",
    "a photo of a handwritten {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a black and white photo of a {}.",
    "a bad photo of a {}.",
    "a white {} on black.",
    "itap of a {}.",
)
DIGIT_TEMPLATES = (
    "the digit {}",
    "the digit {}.",
    "a digit {}",
    "digit {}",
    "number {}",
    "the number {}.",
    "the numeral {}.",
    "the figure {}",
    "a photo of the digit {}.",
    'a photo of the digit "{}".',
    'a photo of the number: "{}".',
    "a photo of the number {}.",
    "a picture of the number {}.",
    "a handwritten digit {}.",
    "the handwritten digit {}.",
    "a photo of a handwritten digit {}.",
    "an image of the digit {}.",
    "a scan of the handwritten number {}.",
)
# Templates for `--evaluate`; training does not use them.
UNSEEN_TEMPLATES = (
    "a {} on a postcard.",
    "a tattoo of a {}.",
    "a photo of my {}.",
    "someone wrote {} here",
    "class {}",
)
# Everyday words, from which the merges are learned too. Class names then become a few tokens, not one for each letter.
WORDS = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than
first water been call who oil its now find long down day did get come made may part image picture photo drawing sketch
painting small large big little old new good bad black white red green blue dark bright clean blurry close cropped low
high resolution pixelated rendered render printed handwritten hand writing script letter capital lower upper case
character digit numeral figure symbol sign scan type typed font bold italic left right round straight line stroke
circle ink paper pen pencil school book page text name animal cat dog bird fish horse flower tree house car truck ship
plane bicycle man woman child face food fruit shirt shoe bag coat dress street road building sky sea mountain river
plant leaf ten eleven twelve hundred thousand million zero three four five six seven eight nine
"""

# Words that may stand around a name without changing its meaning.
FILLERS = sorted(
    set(WORDS.split())
    - {*NUMBER_WORDS, "ten", "eleven", "twelve", "hundred", "thousand", "million"}
    - {"capital", "small", "lower", "upper", "case", "letter"}
)


def names_of(character: str) -> tuple[str, ...]:
    """The names of a character in captions. The tokenizer makes all letters small, so the names state the case."""
    if character.isdigit():
        return (character, NUMBER_WORDS[int(character)])
    capital, small = ("capital", "uppercase", "upper case"), ("small", "lowercase", "lower case")
    cases = capital if character.isupper() else small
    return tuple(f"{case}{kind} {character}" for case in cases for kind in ("", " letter"))


def captions() -> list[list[str]]:
    """For each of CHARACTERS its captions: every template with every name."""
    result = []
    for character in CHARACTERS:
        templates = ANY_TEMPLATES + (DIGIT_TEMPLATES if character.isdigit() else ())
        result.append([template.format(name) for name in names_of(character) for template in templates])
    return result


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Byte pair merges, the most frequent pair first (Sennrich et al., arXiv:1508.07909), ties in alphabetical order.

    Texts are split into words as open_clip's tokenizer splits letters. Digits stay single tokens and need no merge.
    """
    encoder = bytes_to_unicode()
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word in "".join(c if c.isalpha() else " " for c in text.lower()).split():
            symbols = [encoder[byte] for byte in word.encode()]
            counts[(*symbols[:-1], symbols[-1] + "</w>")] += 1
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, number in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += number
        if not pairs:
            raise ValueError(f"the word list gives only {len(merges)} merges, {count} were asked for: add words")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        counts = Counter({merge_pair(word, best): number for word, number in counts.items()})
    return merges


def merge_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with each occurrence of the pair joined into one symbol, from left to right."""
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def write_merges(path: Path) -> None:
    """Write the gzip file for `SimpleTokenizer(bpe_path=...)`: a header, then one merge a line, no last newline."""
    # There are many more captions than words, so each word counts twelve times.
    merges = learn_merges([text for texts in captions() for text in texts] + WORDS.split() * 12, NUM_MERGES)
    lines = "\n".join(["#version: glyph captions", *(" ".join(pair) for pair in merges)])
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def random_prompt(name: str, tokenizer: SimpleTokenizer, rng: random.Random) -> str:
    """The name between up to seven random words, common or made up, that say nothing about the character."""

    def word() -> str:
        if rng.random() < 0.7:
            return rng.choice(FILLERS)
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7)))

    before, after = [word() for _ in range(rng.randint(0, 4))], [word() for _ in range(rng.choice((0, 0, 0, 1, 2, 3)))]
    quoted = f'"{name}"' if rng.random() < 0.1 else name
    prompt = " ".join([*before, quoted, *after]) + rng.choice(("", "", ".", "!", " ."))
    # The tokenizer would cut a longer prompt, perhaps ahead of the name.
    return prompt if len(tokenizer.encode(prompt)) <= CONTEXT_LENGTH - 2 else name
