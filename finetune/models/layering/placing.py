"""The ordered layers of any image network: which parameter belongs to the stem, to which block, to readout or head.

timm's networks publish a `group_matcher`: expressions that sort parameter names into groups from the input up. It is
taken where it is right and corrected where it is not (`layering.py`); torchvision and open_clip publish none, so theirs
stand in their own modules. The rules are strict: a parameter that none of them names is an error, never a default.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.core.layers import Layer
from finetune.system.errors import UserError

# What timm calls a matcher: the expressions of each group in order, or a function that gives a name's group. A group is
# one expression, or several with a suffix of their own; the numbers that an expression captures sort within the group.
Spec = str | Sequence[tuple[str, tuple[int, ...] | None]] | None
Matcher = Mapping[str, Spec] | Callable[[str], Any]
Key = tuple[float, ...]

# timm's suffix for what runs behind a group's last member and shares its layer.
WITH_PREVIOUS = 99999
NOTHING = r"(?!)"


@dataclass(frozen=True)
class Rule:
    """Which names belong where; expressions are matched from the start of a name, the first that matches decides.

    Attributes:
        head: The classifier.
        readout: What lies between the last block and the classifier: final norm, pooling, projections.
        stem: What the matcher would place elsewhere or nowhere: tokens, position tables shared by all blocks.
        matcher: The stem (its first group) and the blocks.
        below: Parameters of the readout that timm's rule counts with the last block, one step below the classifier.
    """

    matcher: Matcher
    head: str = NOTHING
    readout: str = NOTHING
    stem: str = NOTHING
    below: str = NOTHING


STEM: Key = (-math.inf,)
READOUT: Key = (math.inf, 0)
HEAD: Key = (math.inf, 1)


def group_key(name: str, matcher: Matcher) -> Key | None:
    """Where a timm matcher puts a name: group, numbers captured, suffix; None where it names it nowhere.

    The format is that of timm's `group_matcher` (timm.models.group_parameters).
    """
    if not isinstance(matcher, Mapping):
        found = matcher(name)
        key = tuple(found) if isinstance(found, tuple) else (float(found),)
        return None if key in ((), (math.inf,)) else key
    for ordinal, spec in enumerate(matcher.values()):
        pairs = [(spec, None)] if isinstance(spec, str) else spec or []
        for expression, suffix in pairs:
            match = re.match(expression, name)
            if match:
                return (ordinal, *(int(number) for number in match.groups() if number is not None), *(suffix or ()))
    return None


def place(name: str, rule: Rule) -> Key | None:
    """The key of one name under a rule, in the order of the forward pass; None where no expression matches."""
    for expression, key in ((rule.head, HEAD), (rule.stem, STEM), (rule.readout, READOUT)):
        if re.match(expression, name):
            return key
    found = group_key(name, rule.matcher)
    if found is None:
        return None
    if len(found) == 1 and found[0] == 0:
        return STEM
    # `norm` with the suffix of the last block and no number of its own: it follows all blocks. timm trains it at the
    # last block's rate; here the readout holds it, with BEiT, MAE and DINO.
    return READOUT if len(found) == 2 and found[-1] == WITH_PREVIOUS else found


def ordered_layers(net: nn.Module, rule: Rule) -> list[Layer]:
    """Stem, blocks, readout and, where the network has a classifier, head. Runs are None: see the chains.

    Raises:
        ValueError: A parameter or buffer that the rule does not place.
    """
    keys = _keys(net, rule)
    tensors = {name for name, _ in named_tensors(net)}
    blocks = block_numbers(key for name, key in keys.items() if name in tensors)
    top = max(blocks.values(), default=0) + 1
    ids: dict[str, int] = {}
    for name, key in keys.items():
        if key in (STEM, READOUT, HEAD):
            ids[name] = {STEM: 0, READOUT: top, HEAD: top + 1}[key]
        else:
            # An activation with an index of its own (VGG's) has no parameters, so no layer: it joins the one below it.
            ids[name] = blocks.get(key) or max((number for other, number in blocks.items() if other <= key), default=0)
    names = ["stem", *(f"block.{number}" for number in range(1, top)), "readout", "head"]
    if not any(key == HEAD for name, key in keys.items() if name in tensors):
        # A bare tower: an Identity in the classifier's place is the end of the readout.
        names.pop()
        ids = {name: min(number, top) for name, number in ids.items()}
    owned = covering(net, ids)
    layers = [Layer(name, tuple(owned.get(number, ())), None) for number, name in enumerate(names)]
    lower = {name: 1 for name, _ in net.named_parameters() if ids[name] == top and re.match(rule.below, name)}
    layers[top] = dataclasses.replace(layers[top], timm_steps=lower)
    return layers


def named_tensors(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters, then buffers, each once."""
    yield from net.named_parameters()
    yield from net.named_buffers()


def _keys(net: nn.Module, rule: Rule) -> dict[str, Key]:
    """The key of every tensor, and of every leaf module without one, in order of registration."""
    tensors = {name for name, _ in named_tensors(net)}
    keys: dict[str, Key] = {}
    unplaced: list[str] = []
    previous = STEM
    for path, module in net.named_modules():
        own = [name for name, _ in module.named_parameters(path, recurse=False)]
        own += [name for name, _ in module.named_buffers(path, recurse=False)]
        for name in own:
            if name not in tensors:
                continue  # tied to a tensor that stands under an earlier name
            key = place(name, rule)
            if key is None:
                unplaced.append(name)
            else:
                previous = keys[name] = key
        if not own and path and not any(True for _ in module.children()):
            # Activation, dropout, pooling: nothing to train. One that no expression names follows its predecessor.
            key = place(path, rule)
            previous = keys[path] = previous if key is None else key
    if unplaced:
        more = f" and {len(unplaced) - 1} more" if len(unplaced) > 1 else ""
        raise UserError(
            f"{type(net).__name__}: no rule says which layer '{unplaced[0]}'{more} belongs to, so neither freezing nor"
            " layer decay would be right; its rule in finetune/models/ needs a line"
        )
    return keys


def block_numbers(keys: Iterator[Key]) -> dict[Key, int]:
    """Number the keys of blocks 1 to L; a key with timm's suffix `WITH_PREVIOUS` shares the one before it."""
    numbers: dict[Key, int] = {}
    for key in sorted({key for key in keys if key not in (STEM, READOUT, HEAD)}):
        last = max(numbers.values(), default=0)
        numbers[key] = max(last, 1) if key[-1] == WITH_PREVIOUS else last + 1
    return numbers


def covering(net: nn.Module, ids: Mapping[str, int]) -> dict[int, list[str]]:
    """The fewest names that cover each layer: a module wholly inside one layer stands for everything in it.

    So a module that asks its own `training` flag (attention with dropout inside) follows its layer into eval mode.
    """
    inside: dict[str, set[int]] = {}
    for name, number in ids.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:end]), set()).add(number)
    owned: dict[int, list[str]] = {}
    for name, numbers in inside.items():
        parent = name.rpartition(".")[0]
        if len(numbers) == 1 and (not parent or len(inside[parent]) > 1):
            owned.setdefault(next(iter(numbers)), []).append(name)
    return owned
