"""Sort the names of a network's parameters and modules into layers: stem, blocks, readout, head.

timm's networks publish a `group_matcher`: expressions that sort parameter names into groups, from the input to the
output. `timm_networks.py` corrects it where it does not follow the forward pass. torchvision and open_clip publish
none, so their modules hold all rules. A parameter that no expression names is an error; there is no default layer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.core.layers import Layer
from finetune.system.errors import UserError

# A matcher in timm's format: the expressions of each group in order, or a function from a name to its group's key. A
# group is one expression, or several, each with a suffix. The numbers that an expression captures, and then the suffix,
# sort the names within a group.
Spec = str | Sequence[tuple[str, tuple[int, ...] | None]] | None
Matcher = Mapping[str, Spec] | Callable[[str], Any]
GroupKey = tuple[float, ...]

# timm's suffix for a module that runs behind the last member of a group and belongs to the same layer as that member.
WITH_PREVIOUS = 99999
NOTHING = r"(?!)"


@dataclass(frozen=True)
class Rule:
    """Regular expressions for names, matched at the start and in the order `head`, `stem`, `readout`, `matcher`."""

    matcher: Matcher  # the stem (the first group) and the blocks, in timm's format
    head: str = NOTHING  # the classifier
    readout: str = NOTHING  # the parts between the last block and the classifier: final norm, pooling, projections
    stem: str = NOTHING  # parts of the stem that the matcher puts elsewhere or leaves out
    below: str = NOTHING  # parameters of the readout that timm trains at the last block's rate


STEM: GroupKey = (-math.inf,)
READOUT: GroupKey = (math.inf, 0)
HEAD: GroupKey = (math.inf, 1)


def group_key(name: str, matcher: Matcher) -> GroupKey | None:
    """The sort key of a name as in timm's `group_parameters`: group, captured numbers, suffix; None without a match."""
    if not isinstance(matcher, Mapping):
        found = matcher(name)
        key = tuple(found) if isinstance(found, tuple) else (float(found),)
        return None if key in ((), (math.inf,)) else key
    for ordinal, spec in enumerate(matcher.values()):
        for expression, suffix in [(spec, None)] if isinstance(spec, str) else spec or []:
            if match := re.match(expression, name):
                return (ordinal, *(int(number) for number in match.groups() if number is not None), *(suffix or ()))
    return None


def layer_key(name: str, rule: Rule) -> GroupKey | None:
    """The key that sorts a name into its layer, in the order of the forward pass; None where no expression matches."""
    for expression, key in ((rule.head, HEAD), (rule.stem, STEM), (rule.readout, READOUT)):
        if re.match(expression, name):
            return key
    found = group_key(name, rule.matcher)
    if found is None:
        return None
    if len(found) == 1 and found[0] == 0:
        return STEM
    # A key of a group and this suffix, without a block's number, is the final norm. timm trains it at the last block's
    # rate; here it belongs to the readout, as in BEiT, MAE and DINO.
    return READOUT if len(found) == 2 and found[-1] == WITH_PREVIOUS else found


def ordered_layers(net: nn.Module, rule: Rule) -> list[Layer]:
    """Stem, blocks, readout and, where the network has a classifier, head, without the functions that run them."""
    keys, tensors = _keys(net, rule), {name for name, _ in named_tensors(net)}
    blocks = block_numbers(key for name, key in keys.items() if name in tensors)
    top = max(blocks.values(), default=0) + 1
    ids: dict[str, int] = {}
    for name, key in keys.items():
        if key in (STEM, READOUT, HEAD):
            ids[name] = {STEM: 0, READOUT: top, HEAD: top + 1}[key]
        else:
            # An activation with an index of its own has no parameters, so no layer: it joins the layer below.
            ids[name] = blocks.get(key) or max((number for other, number in blocks.items() if other <= key), default=0)
    names = ["stem", *(f"block.{number}" for number in range(1, top)), "readout", "head"]
    if not any(key == HEAD for name, key in keys.items() if name in tensors):
        # A bare tower has an Identity in the place of its classifier: that belongs to the readout.
        names.pop()
        ids = {name: min(number, top) for name, number in ids.items()}
    owned = covering(ids)
    layers = [Layer(name, tuple(owned.get(number, ())), None) for number, name in enumerate(names)]
    lower = {name: 1 for name, _ in net.named_parameters() if ids[name] == top and re.match(rule.below, name)}
    layers[top] = dataclasses.replace(layers[top], timm_steps=lower)
    return layers


def named_tensors(net: nn.Module, prefix: str = "", *, recurse: bool = True) -> Iterator[tuple[str, Any]]:
    """Parameters, then buffers; a tensor with two names comes once."""
    yield from net.named_parameters(prefix, recurse)
    yield from net.named_buffers(prefix, recurse)


def _keys(net: nn.Module, rule: Rule) -> dict[str, GroupKey]:
    """The key of every tensor and of every leaf module without tensors, in order of registration."""
    tensors = {name for name, _ in named_tensors(net)}
    keys: dict[str, GroupKey] = {}
    unplaced: list[str] = []
    previous = STEM
    for path, module in net.named_modules():
        own = [name for name, _ in named_tensors(module, path, recurse=False)]
        for name in own:
            if name not in tensors:
                continue  # the same tensor already has an earlier name
            key = layer_key(name, rule)
            if key is None:
                unplaced.append(name)
            else:
                previous = keys[name] = key
        if not own and path and not any(True for _ in module.children()):
            # An activation, dropout or pooling has nothing to train. If no expression names it, it belongs to the layer
            # of the module registered before it.
            key = layer_key(path, rule)
            previous = keys[path] = previous if key is None else key
    if unplaced:
        more = f" and {len(unplaced) - 1} more" if len(unplaced) > 1 else ""
        problem = (
            f"no rule says which layer '{unplaced[0]}'{more} belongs to, so neither freezing nor layer decay would"
        )
        raise UserError(f"{type(net).__name__}: {problem} be right; its rule in finetune/models/layering/ needs a line")
    return keys


def block_numbers(keys: Iterator[GroupKey]) -> dict[GroupKey, int]:
    """Number the keys of blocks 1 to L; a key with the suffix `WITH_PREVIOUS` gets the number before it."""
    numbers: dict[GroupKey, int] = {}
    for key in sorted({key for key in keys if key not in (STEM, READOUT, HEAD)}):
        last = max(numbers.values(), default=0)
        numbers[key] = max(last, 1) if key[-1] == WITH_PREVIOUS else last + 1
    return numbers


def covering(ids: Mapping[str, int]) -> dict[int, list[str]]:
    """The fewest names that cover each layer: the name of a module stands for everything in it.

    Naming whole modules matters for those that read their own `training` flag, such as attention with dropout inside:
    when a layer is frozen, the modules that it names go into eval mode.
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
