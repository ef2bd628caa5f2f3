"""A head made from class names by the text tower of a CLIP."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import TemplateSet, nearest
from finetune.models.heads.head import Head
from finetune.system.errors import UserError
from finetune.system.limits import NAMES, read_text, text_lines
from finetune.system.terminal import counted

logger = logging.getLogger("finetune")

SHOWN = 5  # names in a message
PROMPTS_AT_ONCE = 256  # read by the text tower; bounds the memory, and the features do not depend on it

Tokenizer = Callable[[list[str]], Tensor]


def expand_templates(templates: Sequence[str]) -> list[str]:
    """The prompts, each name of a set replaced by the prompts of that set; no prompt twice.

    `imagenet` are the 80 prompts that OpenAI published with CLIP, `simple` the 7 of them that do almost as well.
    """
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    sets: dict[str, Sequence[str]] = {
        TemplateSet.default: ("{}", "a photo of a {}.", "a photo of the {}."),
        TemplateSet.simple: [fill("{}") for fill in SIMPLE_IMAGENET_TEMPLATES],
        TemplateSet.imagenet: [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES],
    }
    return list(dict.fromkeys(prompt for template in templates for prompt in sets.get(template, [template])))


def read_class_names(path: Path | None, classes: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """The names that prompts use for `classes`: the data's own names in the order of the labels, or those in a file.

    A line of the text file, UTF-8, holds either a name, in the order of the classes, or `CLASS<tab>NAME`, in any order;
    a class without such a line has its name in `known`, if it has one there, and else its own. Another number of names
    than classes, or a class that the data lacks, is a UserError, and a missing file a FileNotFoundError.
    """
    own = [(known or {}).get(name, name) for name in classes]
    if path is None:
        return own
    if not path.is_file():
        raise FileNotFoundError(f"model.class_names={path}: no such file")
    text = read_text(path, f"model.class_names={path}", NAMES)
    lines = text_lines(text)
    if lines and all("\t" in line for line in lines):
        named = dict(line.split("\t", 1) for line in lines)
        of_data = set(classes)
        unknown = [name for name in named if name not in of_data]
        if unknown:
            problem = f"{unknown[0]!r}, no class of the data{nearest(unknown[0], classes)}"
            raise UserError(f"model.class_names={path} names {problem}")
        return [named.get(name, default) for name, default in zip(classes, own, strict=True)]
    if len(lines) != len(classes):
        problem = f"holds {counted(len(lines), 'name')} and the data has {counted(len(classes), 'class', 'classes')}"
        mend = "give one name a line in class order, or CLASS<tab>NAME for some"
        raise UserError(f"model.class_names={path} {problem}: {mend}")
    return lines


def class_prompts(classes: Sequence[str], may_repeat: Collection[str] = ()) -> list[str]:
    """Class names as a sentence holds them: underscores of folder names become spaces.

    Two equal names that are not in `may_repeat`, or an empty one, are a UserError: a text tower cannot tell such
    classes apart.
    """
    names = [" ".join(name.replace("_", " ").split()) for name in classes]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1 and name not in may_repeat)
    if repeated:
        raise UserError(f"class names must differ for a zero-shot head; used twice: {', '.join(map(repr, repeated))}")
    if "" in names:
        raise UserError(f"class {names.index('')} has an empty name, which a zero-shot head cannot read")
    return names


def refuse_equal_tokens(
    tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], may_repeat: Collection[str] = ()
) -> None:
    """A UserError where the tokenizer makes the same of two names, so that their rows of the head would be equal.

    It puts most letters into lower case and cuts long texts off; a warning names the classes whose prompt is cut off.
    """
    broken = [name for name in names if any("\ud800" <= char <= "\udfff" for char in name)]
    if broken:
        mend = "rename it, or give a name by model.class_names"
        raise UserError(f"class {broken[0]!r} has bytes that are no text, which a zero-shot head cannot read; {mend}")
    prompts = [templates[0].replace("{}", name) for name in names]
    tokens = tokenizer(prompts)
    longer = tokenizer([f"{prompt} zebra" for prompt in prompts])  # a text that is cut off stays the same
    is_cut = [bool(torch.equal(one, other)) for one, other in zip(tokens, longer, strict=True)]
    seen: dict[bytes, int] = {}
    for label, row in enumerate(tokens):
        first = seen.setdefault(row.numpy().tobytes(), label)
        if first == label or names[label] in may_repeat:
            continue
        one, other = ([template.replace("{}", names[place]) for template in templates] for place in (first, label))
        if torch.equal(tokenizer(one), tokenizer(other)):
            why = f" once it is cut off at {len(row)} tokens" if is_cut[label] else ""
            pair = f"{names[first]!r} and {names[label]!r}"
            mend = "give them other names by model.class_names=FILE, or use model.head=random"
            raise UserError(
                f"class names must differ for a zero-shot head: its tokenizer reads {pair} alike{why}; {mend}"
            )
    if cut := [name for name, cut_off in zip(names, is_cut, strict=True) if cut_off]:
        shown = ", ".join(f"{name[:40]!r}" for name in cut[:SHOWN])
        more = f" and {len(cut) - SHOWN:,} more" if len(cut) > SHOWN else ""
        logger.warning("prompts of a zero-shot head are cut off at %d tokens: %s%s", tokens.shape[1], shown, more)


@torch.no_grad()
def zeroshot_weight(
    clip: nn.Module,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    may_repeat: Collection[str] = (),
) -> Tensor:
    """Classifier weights from the text tower of a whole open_clip model. -> (classes, embedding), float32.

    For each class: the mean over templates of normalised text features, normalised again, times the logit scale
    (Radford et al., arXiv:2103.00020, section 3.1.4). Without the scale the logits of a normalised image would be
    about 100 times too small to train. Templates are prompts, each with `{}` in the place of the class name, or names
    of sets of prompts. Class names that a text tower cannot tell apart are a UserError, but for those `may_repeat`.
    """
    templates = expand_templates(templates)
    names = class_prompts(classes, may_repeat)
    refuse_equal_tokens(tokenizer, names, templates, may_repeat)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    device = next(clip.parameters()).device
    clip.eval()
    features = [
        clip.encode_text(tokenizer(prompts[i : i + PROMPTS_AT_ONCE]).to(device), normalize=True)  # type: ignore[operator]
        for i in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    means = torch.cat(features).float().reshape(len(classes), len(templates), -1).mean(dim=1)
    return (F.normalize(means, dim=-1) * clip.logit_scale.float().exp()).cpu()  # type: ignore[operator]


def zeroshot_head(weight: Tensor, *, dropout: float = 0.0, bias: bool = False) -> Head:
    """A head that scores images as CLIP does and can be trained on: it normalises features first.

    `weight` comes from `zeroshot_weight`; a `bias` learns, from 0 on.
    """
    head = Head(weight.shape[1], weight.shape[0], bias=bias, normalize=True, dropout=dropout)
    head.set(weight, torch.zeros(len(weight)) if bias else None)
    return head
