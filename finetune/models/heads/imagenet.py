"""Names for the classes of ImageNet, whose folders have WordNet ids such as n01440764: a prompt needs words."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

WNID = re.compile(r"n\d{8}")


def imagenet_names(classes: Sequence[str]) -> dict[str, str]:
    """Those of `classes` that are WordNet ids of ImageNet, each with its name: `n01440764` is `tench`.

    The 1,000 classes of ImageNet-1k have the names that OpenAI published with CLIP (Radford et al., arXiv:2103.00020),
    in the order of the sorted ids. Twice two of them share a name there, missile and sunglasses. Other classes of
    ImageNet-21k have WordNet's first word; where two would share it, all of WordNet's words.
    """
    ids = [name for name in classes if WNID.fullmatch(name)]
    if not ids:
        return {}
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data.imagenet_info import ImageNetInfo

    thousand: Any = ImageNetInfo()
    openai = dict(zip(sorted(thousand.label_names()), IMAGENET_CLASSNAMES, strict=True))
    names = {wnid: openai[wnid] for wnid in ids if wnid in openai}
    if len(names) == len(ids):
        return names
    others: Any = ImageNetInfo("imagenet-22k")
    words = {wnid: others.label_name_to_description(wnid) for wnid in {*others.label_names()} & {*ids} - names.keys()}
    first = {wnid: text.split(",")[0] for wnid, text in words.items()}
    used = Counter([*names.values(), *first.values()])
    return names | {wnid: first[wnid] if used[first[wnid]] == 1 else words[wnid] for wnid in words}


def with_wordnet(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Names of classes, with id and words for each of ImageNet: `n01440764`, `tench, Tinca tinca` become both.

    They stay as they are where `names` and `classes` are both ids, or both words.
    """
    is_id, wants_ids = any(map(WNID.fullmatch, names)), any(map(WNID.fullmatch, classes))
    if is_id and not all(map(WNID.fullmatch, classes)):
        from timm.data.imagenet_info import ImageNetInfo

        info: Any = ImageNetInfo("imagenet-22k")
        known = {*info.label_names()}
        return [f"{name}, {info.label_name_to_description(name)}" if name in known else name for name in names]
    if wants_ids and not is_id:
        from timm.data.imagenet_info import ImageNetInfo

        thousand: Any = ImageNetInfo()
        words = {wnid: thousand.label_name_to_description(wnid) for wnid in thousand.label_names()}
        used = Counter(words.values())  # two classes are called crane
        ids = {text: wnid for wnid, text in words.items() if used[text] == 1}
        return [f"{ids[name]}, {name}" if name in ids else name for name in names]
    return [*names]
