"""The words for splits in tables, folders, shards and data sets. Standard library only."""

import re

# Word -> index into SPLITS. What `_ENDS` cuts off is left out here: `train_set` and `train2017` are `train`.
_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), 0),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development"), 1),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout"), 2),
}
_ENDS = re.compile(r"[ _-]*(sets?|data|dataset|split|images|imgs|samples|(19|20)\d\d)$")
# Images that have no labels, or that no score is meant for.
_EXTRA = frozenset(
    [
        "unlabeled",
        "unlabelled",
        "unsupervised",
        "unsup",
        "extra",
        "extras",
        "withheld",
        "predict",
        "prediction",
        "pseudo",
    ]
)


def split_of(word: str) -> int | None:
    """Index into SPLITS of the split that a word names, such as `Training_Set`; None for any other word."""
    return _WORDS.get(_stem(word))


def is_extra(word: str) -> bool:
    """Whether a word names images beside the splits, such as `unlabeled`."""
    return _stem(word) in _EXTRA


def _stem(word: str) -> str:
    plain = word.strip().lower()
    return plain if plain in _WORDS else _ENDS.sub("", plain)
