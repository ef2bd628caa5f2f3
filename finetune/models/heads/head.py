"""The linear classifier, and how it takes the place of the classifier that a network brings.

A random head draws its first values from torch's global generator. `app` seeds that generator with `seed` just before
`build_model`, so the same seed gives the same head.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import HeadKind, ModelConf, Pool
from finetune.core.layers import LayeredModel
from finetune.models.heads.imagenet import with_wordnet
from finetune.system.errors import UserError
from finetune.system.natural import natural_key
from finetune.system.terminal import counted

SHOWN = 100  # letters of a stranger's name of a class in a message
NAME_THEM = ', or put their names, in the order of the rows, into a config.json beside them: {"label_names": ["", ""]}'


class Head(nn.Linear):
    """A linear classifier over image features; its tensors are `weight` and, where it has one, `bias`."""

    def __init__(
        self, in_features: int, num_classes: int, *, bias: bool = True, normalize: bool = False, dropout: float = 0.0
    ) -> None:
        """Make a random head: weights from a normal of standard deviation 0.02, cut at 2 (ViT's own); bias 0.

        With `normalize` features are scaled to length 1 first, as CLIP scores them. `dropout` is the probability, in
        [0, 1), of dropping a feature while training.
        """
        super().__init__(in_features, num_classes, bias=bias)
        self.normalize = normalize
        self.dropout = dropout
        nn.init.trunc_normal_(self.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits. (batch, in_features) -> (batch, classes).

        Networks that do not pool (open_clip's `pool_type='none'`, its cascaded and parallel attentional pools, timm's
        encoders) give (batch, tokens, in_features) or (batch, in_features, height, width). The head takes the mean over
        tokens or positions.
        """
        features = mean_over_positions(features)
        if self.normalize:
            features = F.normalize(features, dim=-1)
        # Dropout follows the normalisation, which would undo dropout's rescaling.
        features = F.dropout(features, self.dropout, self.training)
        return super().forward(features)

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copy a classifier's tensors into this head, which must have the same: (classes, in_features), (classes,)."""
        assert self.weight.shape == weight.shape, f"weight {tuple(weight.shape)} for {tuple(self.weight.shape)}"
        assert (self.bias is None) == (bias is None), "a bias on one side only"
        self.weight.copy_(weight)
        if bias is not None:
            self.bias.copy_(bias)


def mean_over_positions(features: Tensor) -> Tensor:
    """Mean over positions or tokens. (batch, n), (batch, tokens, n) or (batch, n, height, width) -> (batch, n)."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features


def read_by(head: Head, forward: Callable[[], object]) -> Tensor:
    """What `head` reads while `forward` runs its network: features before any mean over positions."""
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        forward()
    finally:
        handle.remove()
    return inputs[0]


class TowerWithHead(nn.Module):
    """An image tower of open_clip, or an encoder of timm, and a classifier. Keys under `visual.` are a whole CLIP's."""

    def __init__(self, visual: nn.Module, head: Head) -> None:
        """Put `head` on top of `visual`."""
        super().__init__()
        self.visual = visual
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits. (batch, 3, height, width) -> (batch, classes)."""
        return self.head(self.visual(images))  # type: ignore[no-any-return]


def find_head(net: nn.Module) -> Head:
    """The only `Head` in a network; a UserError where the classifier is not linear, or there are two, as in DeiT."""
    heads = [module for module in net.modules() if isinstance(module, Head)]
    if len(heads) != 1:
        found = f"{len(heads) or 'no'} linear classifier{'s' * (len(heads) != 1)}"
        mend = "model.head=linear_probe needs exactly one; use model.head=random"
        raise UserError(f"{type(net).__name__} has {found}, not one: {mend}")
    return heads[0]


def head_kind(conf: ModelConf, *, has_text: bool) -> HeadKind:
    """The kind of head that `model.head` asks for, `auto` resolved; a text tower can read class names.

    A zero-shot head without a text tower, and `keep` where the weights have no classifier, are a UserError.
    """
    if conf.head == HeadKind.auto:
        # A text tower with random weights cannot read class names. With another pooling, image features no longer
        # lie in the space of the text features.
        reads_names = has_text and conf.pretrained != "none" and conf.pool == Pool.auto
        return HeadKind.zeroshot if reads_names else HeadKind.random
    if conf.head == HeadKind.zeroshot and not has_text:
        mend = "use model.head=random, or a CLIP (model=clip)"
        raise UserError(f"model.head=zeroshot needs a text tower, and {conf.name} has none: {mend}")
    if conf.head == HeadKind.keep and (has_text or conf.pretrained == "none"):
        why = "a CLIP" if has_text else "a model without weights"
        mend = f"use model.head=random{' or zeroshot' * has_text}"
        raise UserError(f"model.head=keep: {why} has no classifier to keep; {mend}")
    return HeadKind(conf.head)


def put_head(net: nn.Module, name: str, num_classes: int, *, dropout: float) -> None:
    """Replace the module `name`, a linear layer or 1 x 1 convolution that gives the logits, by a new random one."""
    old = net.get_submodule(name)
    if isinstance(old, nn.Linear):
        net.set_submodule(name, Head(old.in_features, num_classes, dropout=dropout))
        return
    if dropout or not isinstance(old, nn.Conv2d):
        what = f"model.head_dropout={dropout} would be ignored" if dropout else "it cannot be replaced"
        raise UserError(f"the classifier of {type(net).__name__} ({name}) is a {type(old).__name__}: {what}")
    new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    nn.init.trunc_normal_(new.weight, std=0.02)
    nn.init.zeros_(new.bias)  # type: ignore[arg-type]
    net.set_submodule(name, new)


@torch.no_grad()
def keep_head(
    net: nn.Module, name: str, classes: Sequence[str], *, dropout: float, named: Mapping[str, Sequence[str]]
) -> list[str]:
    """Turn the module `name`, which gives the logits, into a `Head` with its rows for `classes`; return the new ones.

    `named` are the class names that the weights were trained with, by the place that says them. A place with another
    number of names than rows does not count. Without any place the classes are taken to be the same in the same order.
    Else the rows follow the names, and a new class gets a random row. A UserError where there is no class in common,
    where places disagree or none has a name for each row, where the order of unnamed rows is unclear, and where the
    classifier is not linear.
    """
    old: Any = net.get_submodule(name)
    if type(old) is nn.Identity:
        raise _not_kept("the weights have no classifier to keep")
    if type(old) is not nn.Linear:
        raise _not_kept(f"the classifier of {type(net).__name__} is a {type(old).__name__}, not a linear layer")
    rows = _rows_by_order(old.out_features, classes) if not named else _rows_by_name(old.out_features, classes, named)
    head = Head(old.in_features, len(classes), bias=old.bias is not None, dropout=dropout)
    kept = [index for index, row in enumerate(rows) if row is not None]
    source = [row for row in rows if row is not None]
    head.weight[kept] = old.weight[source]
    if old.bias is not None:
        head.bias[kept] = old.bias[source]
    net.set_submodule(name, head)
    return [classes[index] for index, row in enumerate(rows) if row is None]


def _not_kept(problem: str, mend: str = "") -> UserError:
    return UserError(f"model.head=keep: {problem}; use model.head=random{mend}")


def _rows_by_order(number: int, classes: Sequence[str]) -> list[int | None]:
    """The rows of classes without names; a UserError where their number or order may be another one."""
    size = counted(number, "class", "classes")
    if number != len(classes):
        problem = (
            f"the weights classify into {size} and the data has {len(classes)}, and nothing says the names of theirs"
        )
        raise _not_kept(problem, NAME_THEM)
    # Half of the programs sort the names of folders by letters, and half by numbers, as here.
    if [*classes] == sorted(classes, key=natural_key) != (letters := sorted(classes)):
        first = next(index for index, name in enumerate(classes) if name != letters[index])
        order = f"row {first} may be '{classes[first]}' or, by the order of letters, '{letters[first]}'"
        raise _not_kept(f"nothing says the names of the {size} of the weights, and {order}", NAME_THEM)
    return list(range(number))


def _rows_by_name(number: int, classes: Sequence[str], named: Mapping[str, Sequence[str]]) -> list[int | None]:
    """The row of each class by its name, None for a new one; a UserError where the names do not say it."""
    fitting = {place: names for place, names in named.items() if len(names) == number}
    if not fitting:
        place, names = next(iter(named.items()))
        size = f"{counted(number, 'class', 'classes')} and {counted(len(names), 'name')} are known of them ({place})"
        raise _not_kept(f"the weights classify into {size}, so nothing says which row is whose")
    found = {place: rows_of(with_wordnet(names, classes), classes) for place, names in fitting.items()}
    (first, rows), *others = found.items()
    for place, other in others:
        if other != rows:
            mend = ", or save the tensors alone, and beside them a config.json with the right label_names"
            raise _not_kept(f"{first} and {place} name the rows of the classifier differently", mend)
    if all(row is None for row in rows):
        example = f"'{fitting[first][0][:SHOWN]}' for '{classes[0]}'"
        raise _not_kept(f"the weights know other classes than the data, such as {example}, and none of the data's")
    return rows


def rows_of(known: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """For each class the index of its name in `known`, or None.

    Names are compared as they are, then without capitals, underscores and ways to write an accent (`sea_lion`, `Sea
    lion`), then by the words
    between commas, of which ImageNet's names have several (`tench, Tinca tinca`). A name that fits two rows fits none.
    """
    rows: list[int | None] = [None] * len(classes)
    used: set[int] = set()
    forms: tuple[Callable[[str], list[str]], ...] = (
        lambda name: [name],
        lambda name: [_plain(name)],
        lambda name: [_plain(name), *(_plain(word) for word in name.split(","))],
    )
    for form in forms:
        where: dict[str, set[int]] = defaultdict(set)
        for row, name in enumerate(known):
            for word in form(name):
                where[word].add(row)
        for index, name in enumerate(classes):
            found = where.get(form(name)[0], set())
            if rows[index] is None and len(found) == 1 and not found & used:
                (rows[index],) = found
                used |= found
    return rows


def _plain(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


@torch.no_grad()
def scale_head(model: LayeredModel, factor: float) -> None:
    """Multiply the classifier's first values by `factor`, as MAE and BEiT do (`init_scale`): smaller first logits."""
    for name, parameter in model.net.named_parameters():
        if model.layer_ids[name] == len(model.layers) - 1:
            parameter.mul_(factor)
