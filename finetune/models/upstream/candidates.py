"""Find a network's weights in a file that holds more: other networks, averages, losses, the state of an optimizer.

Training programs put prefixes in front of names (`module.`, `teacher.backbone.`) and nest dictionaries. No list of such
words is complete, so none is kept: each prefix is tried under which some of the network's own names stand, and the
tensors under it are a candidate. A complete one has all names, and nearly all with the network's shapes.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune.config import nearest
from finetune.models.upstream import forms
from finetune.models.upstream.class_names import Named
from finetune.models.upstream.layouts import COUNTER, GROUPED, Layout, Source, StateDict, Wanted, shown
from finetune.system.errors import UserError

# Parts that wrappers (DDP, torch.compile, FSDP, checkpointing) put inside names, in front of a part that they wrap.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# An optimizer's averages have the names and shapes of the weights, and are no weights; nor is a network that was an
# argument of the one that learned, which Lightning keeps in `hyper_parameters` as it was before.
NO_WEIGHTS = re.compile(
    r"(^|\.)(optim\w*|exp_avg\w*|momentum_buffer|grads?|gradients?|hyper_parameters|hparams)(\.|$)", re.IGNORECASE
)
# A complete candidate has at most this share of tensors of another shape: those that depend on the size of the images.
MAX_MISSHAPEN = 0.25
MAX_PARTS = 40  # of a name
# The end of a numbered part of a name: `blocks.3` of `blocks.3.attn.qkv.weight`.
BLOCK_END = re.compile(r"(?<=\.)\d+(?=\.)")
TOP = "."  # stands for the names without a prefix in `model.pretrained_key`
SHOWN = 6  # candidates and parts that a message lists at most


@dataclass(frozen=True)
class Found:
    """The weights of a network."""

    state: StateDict  # under the network's own names, and with them unknown ones that look like parts of the network
    place: str = ""  # the prefix under which they stood in the file
    left_out: str = ""  # what else the file holds, in few words
    program: str = ""  # see `Layout`
    stem: str = ""  # a note, where the first convolution was adapted
    named: Named = field(default_factory=dict)  # names of classes in the same file
    resized: Sequence[str] = ()  # tensors that depend on the size of the images, and have another in the file

    @property
    def note(self) -> str:
        """Where in the file the weights stood and what was left out, for the line about the model."""
        words = [f"in {self.program}'s layout"] * bool(self.program) + [f"read from {self.place}"] * bool(self.place)
        words += [f"left out of the file: {self.left_out}"] * bool(self.left_out)
        words += [f"resized: {shown(self.resized, 1)}"] * bool(self.resized)
        return "".join(f"; {word}" for word in words) + self.stem


@dataclass
class _Candidate:
    prefix: str
    layout: Layout
    names: dict[str, str] = field(default_factory=dict)  # the layout's name -> the file's
    missing: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)  # tensors of another shape or kind, in words
    resized: list[str] = field(default_factory=list)  # those of them with another number of numbers, but for kernels
    is_complete: bool = False
    # Whether a tensor cannot be this network's: whole numbers for real ones, or the kernel of a convolution of another
    # size, such as that of larger patches. timm would resample those, and the features would be other ones.
    is_foreign: bool = False

    @property
    def place(self) -> str:
        return self.prefix or TOP


@dataclass(frozen=True)
class Converted:
    """What a library's own reader made of the tensors under a prefix."""

    state: StateDict  # under the network's own names, or as the library takes them
    used: frozenset[str]  # the names of the tensors that went into the network


Convert = Callable[[StateDict], Converted | None]


def find_weights(
    tensors: StateDict,
    wanted: Wanted,
    layouts: Sequence[Layout],
    *,
    key: str | None,
    source: str,
    convert: Convert = lambda group: None,
) -> Found:
    """The weights of a network out of all tensors of a file, by their full names.

    `key` is `model.pretrained_key`, `source` the name of the file for messages. `convert` is a library's own reader of
    other layouts: it takes the tensors under a prefix, and returns the network's or None.

    Raises:
        UserError: No candidate is complete, or several are and `key` does not choose; it lists them.
    """
    if form := forms.altered(tensors, wanted.shapes):
        raise UserError(f"{source} {form}")
    candidates = _candidates(tensors, wanted, layouts)
    complete = [each for each in candidates if each.is_complete]
    # A deeper network has all names too. It is meant where no other fits, and the error then lists its other blocks.
    complete = _distinct([each for each in complete if not _is_deeper(each, tensors)] or complete, tensors)
    if complete:
        place = _chosen([each.place for each in complete], key, source)
        return _found(tensors, wanted, next(each for each in complete if each.place == place), source)
    converted = {} if any(each.is_foreign for each in candidates) else _converted(tensors, wanted, convert)
    if converted:
        return _found_converted(tensors, converted, key, source)
    near = [each for each in candidates if key is None or _matches(key, each.place)]
    if key is not None and not near:
        keys = sorted({*_parts(each.place for each in candidates), *(name.partition(".")[0] for name in tensors)})
        problem = f"{source} has nothing of this model there{nearest(key, keys)}"
        firsts = sorted({name.partition(".")[0] for name in tensors})
        raise UserError(f"model.pretrained_key={key}: {problem}; its names begin with {shown(firsts, SHOWN)}")
    best = max(near, key=lambda each: len(each.names) - len(each.missing) - len(each.shapes), default=None)
    raise UserError(_misfit(tensors, wanted, best, source))


def has_complete(tensors: StateDict, wanted: Wanted, layouts: Sequence[Layout]) -> bool:
    """Whether a file holds all tensors of a network."""
    return any(each.is_complete for each in _candidates(tensors, wanted, layouts))


def _candidates(tensors: StateDict, wanted: Wanted, layouts: Sequence[Layout]) -> list[_Candidate]:
    """A candidate for each layout and each prefix under which at least one of its names stands."""
    found: dict[tuple[int, str], _Candidate] = {}
    for full in tensors:
        parts = full.split(".")
        for cut in range(len(parts) if len(parts) <= MAX_PARTS else 0):
            for index, layout in enumerate(layouts):
                name = _plain(parts[cut:], layout)
                if name in layout.names and parts[cut] == name.partition(".")[0]:
                    prefix = ".".join(parts[:cut])
                    candidate = found.setdefault((index, prefix), _Candidate(prefix, layout))
                    candidate.names.setdefault(name, full)
    candidates = [each for each in found.values() if not NO_WEIGHTS.search(each.prefix)]
    for candidate in candidates:
        _judge(candidate, tensors, wanted)
    return candidates


def _unwrapped(parts: Iterable[str]) -> str:
    return ".".join(part for part in parts if part not in WRAPPERS)


def _plain(parts: Sequence[str], layout: Layout) -> str:
    """A name without wrappers, and without the numbers of groups of blocks."""
    name = _unwrapped(parts)
    return name if layout.has_groups else GROUPED.sub(r".\1", name)


def _judge(candidate: _Candidate, tensors: StateDict, wanted: Wanted) -> None:
    """Compare a candidate's names and shapes with what the network needs."""
    sources = {own: source for own, source in candidate.layout.sources.items() if wanted.needs(own)}
    for source in sources.values():
        candidate.missing += [name for name in source.names if name not in candidate.names]
    if candidate.missing:
        return
    for own, source in sources.items():
        parts = [tensors[candidate.names[name]].to("meta") for name in source.names]
        shape = _shape(source, parts)
        whole = [part.dtype for part in parts if not part.is_floating_point()]
        if whole and own in wanted.numbers:  # such as weights in 8 bits, which mean nothing without their scales
            candidate.shapes.append(f"{own} {whole[0]}{forms.WHOLE}")
            candidate.is_foreign = True
        elif shape != wanted.shapes[own]:
            candidate.shapes.append(f"{own} {tuple(shape or parts[0].shape)} for {tuple(wanted.shapes[own])}")
            if own not in wanted.kernels and (shape is None or shape.numel() != wanted.shapes[own].numel()):
                candidate.resized.append(candidate.shapes[-1])
            is_kernel = own in wanted.kernels and shape is not None and len(shape) == len(wanted.shapes[own])
            candidate.is_foreign |= is_kernel and (shape or ())[2:] != wanted.shapes[own][2:]
    candidate.is_complete = not candidate.is_foreign and len(candidate.shapes) <= MAX_MISSHAPEN * len(sources)


def _is_deeper(candidate: _Candidate, tensors: StateDict) -> bool:
    """Whether blocks stand under the candidate's prefix, beside those of its layout, that the layout lacks."""
    names = (_plain(name.split("."), candidate.layout) for name in _under(tensors, candidate.prefix))
    return bool(_beyond(candidate.layout.names, names))


def _beyond(used: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that belong to blocks which stand beside those of the names `used`, and have no such name."""
    blocks = {block for name in used for block in _blocks(name)}
    rows = {block.rpartition(".")[0] for block in blocks}
    return [
        name
        for name in names
        if any(block not in blocks and block.rpartition(".")[0] in rows for block in _blocks(name))
    ]


def _blocks(name: str) -> list[str]:
    return [name[: number.end()] for number in BLOCK_END.finditer(name)]


def _shape(source: Source, parts: Sequence[Tensor]) -> torch.Size | None:
    try:
        return source.make(*parts).shape
    except (RuntimeError, IndexError):  # of another number of dimensions
        return None


def _distinct(candidates: Sequence[_Candidate], tensors: StateDict) -> list[_Candidate]:
    """The candidates without those that hold the same numbers as one with as many names or more."""
    distinct: list[_Candidate] = []
    for candidate in sorted(candidates, key=lambda each: (-len(each.names), len(each.prefix), each.prefix)):
        names = candidate.names
        others = [
            {name: tensors[full] for name, full in each.names.items() if name in names}
            for each in distinct
            if names.keys() <= each.names.keys()
        ]
        is_there = any(set(names.values()) <= set(each.names.values()) for each in distinct)
        if not is_there and not any(_equal({name: tensors[names[name]] for name in other}, other) for other in others):
            distinct.append(candidate)
    return sorted(distinct, key=lambda each: (len(each.prefix), each.prefix))


def _matches(key: str, place: str) -> bool:
    """Whether a key names a place in a file: the parts of one stand side by side in the other, wrappers or not."""
    bare = _unwrapped(key.split("."))
    is_inside = bool(bare) and f".{bare}." in f".{_unwrapped(place.split('.'))}."
    return key == place or f".{key}." in f".{place}." or is_inside


def _parts(places: Iterable[str]) -> list[str]:
    """The places and their parts: all that a key may name."""
    words = [word for place in places for word in (place, *place.split("."))]
    return [word for word in dict.fromkeys(words) if word not in WRAPPERS and word]


def _chosen(places: Sequence[str], key: str | None, source: str) -> str:
    """The place that `key` names, or the only one."""
    fitting = [place for place in places if key is None or place == key]
    fitting = fitting or [place for place in places if key is not None and _matches(key, place)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise UserError(
            f"model.pretrained_key={key}: {source} has weights of this model under {shown(places, SHOWN)}, and none"
            f" there{nearest(key or '', _parts(places))}"
        )
    meaning = f" ({TOP} are the names without a prefix)" if TOP in fitting else ""
    raise UserError(
        f"{source} has {len(fitting)} different sets of weights of this model, under {shown(fitting, SHOWN)}{meaning}:"
        f" choose one, such as model.pretrained_key={fitting[-1]}"
    )


def _found(tensors: StateDict, wanted: Wanted, chosen: _Candidate, source: str) -> Found:
    """The network's tensors of a complete candidate."""
    state: StateDict = {}
    used = set(chosen.names.values())
    names = dict(chosen.names)
    parent = chosen.prefix.rpartition(".")[0]
    for own, origin in chosen.layout.sources.items():
        if not wanted.needs(own):
            # Other programs put the classifier beside the network that has the prefix: `vit.` and `classifier.`.
            beside = {name: f"{parent}.{name}" if parent else name for name in origin.names}
            names |= {name: full for name, full in beside.items() if name not in names and full in tensors}
        if all(name in names for name in origin.names):
            tensor = origin.make(*(tensors[names[name]] for name in origin.names))
            if wanted.needs(own) or own.endswith(COUNTER) or tensor.shape[1:] == wanted.shapes[own][1:]:
                state[own] = tensor
                used |= {names[name] for name in origin.names}
    for start in wanted.optional:  # a classifier of another form is none
        if f"{start}weight" not in state:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(start)}
    for name, full in _under(tensors, chosen.prefix).items():
        if full not in used and _is_part(name, tensors[full], wanted, chosen.layout):
            state[name] = tensors[full]
            used.add(full)
    if chosen.layout.program and (strange := [name for name in state if name not in wanted.shapes]):
        problem = f"{source} has parts that this model lacks: {len(strange)} unexpected: {shown(strange)}"
        raise UserError(f"{problem}; check model.name")
    return Found(state, chosen.prefix, _left_out(tensors, used), chosen.layout.program, resized=chosen.resized)


def _under(tensors: StateDict, prefix: str) -> dict[str, str]:
    """The names under a prefix, without it and without wrappers, each with the full name."""
    start = f"{prefix}." if prefix else ""
    return {_unwrapped(full[len(start) :].split(".")): full for full in tensors if full.startswith(start)}


def _is_part(name: str, tensor: Tensor, wanted: Wanted, layout: Layout) -> bool:
    """Whether a name that the network lacks looks like a part of it: then the file is another model's."""
    first = name.partition(".")[0]
    if not layout.program:
        return first in wanted.known and not name.startswith(wanted.optional) and name not in wanted.shapes
    known = {theirs.partition(".")[0] for theirs in layout.names}
    is_nothing = name.endswith(".bias") and not bool(tensor.any())
    return first in known and not is_nothing and not layout.ignored.search(name)


def _found_converted(tensors: StateDict, converted: Mapping[str, Converted], key: str | None, source: str) -> Found:
    """The weights as a library's own reader has converted them: those at the only place in the file, or at `key`."""
    prefixes = {place: "" if place == TOP else place for place in converted}
    names = {place: _under(tensors, prefix) for place, prefix in prefixes.items()}
    lost = {place: sorted(_beyond(converted[place].used, names[place])) for place in converted}
    place = _chosen([place for place in converted if not lost[place]] or list(converted), key, source)
    if lost[place]:
        problem = f"{source} holds the weights of a deeper model than the one built here"
        raise UserError(f"{problem} ({len(lost[place])} unexpected: {shown(lost[place])}); check model.name")
    used = [full for name, full in names[place].items() if name in converted[place].used]
    return Found(converted[place].state, prefixes[place], _left_out(tensors, used))


def _converted(tensors: StateDict, wanted: Wanted, convert: Convert) -> dict[str, Converted]:
    """What a library's own reader makes of the tensors under each prefix that has at least half of what it needs."""
    sizes: Counter[str] = Counter()
    for full in tensors:
        parts = full.split(".")
        sizes.update(".".join(parts[:cut]) for cut in range(min(len(parts), MAX_PARTS)))
    least = len([name for name in wanted.shapes if wanted.needs(name)]) / 2
    converted: dict[str, Converted] = {}
    for place in sorted(place for place, size in sizes.items() if size >= least and not NO_WEIGHTS.search(place)):
        made = convert({name: tensors[full] for name, full in _under(tensors, place).items()})
        if made is not None and not any(_equal(made.state, other.state) for other in converted.values()):
            converted[place or TOP] = made
    return converted


def _equal(state: StateDict, other: StateDict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def _left_out(tensors: StateDict, used: Iterable[str]) -> str:
    """The tensors that are not used: the shortest prefixes under which none is used, each with their number."""
    used = set(used)
    ancestors: set[str] = set()
    for name in used:
        parts = name.split(".")
        ancestors.update(".".join(parts[:cut]) for cut in range(1, len(parts) + 1))
    groups: Counter[str] = Counter()
    for name in tensors.keys() - used:
        parts = name.split(".")
        cuts = (".".join(parts[:cut]) for cut in range(1, len(parts) + 1))
        groups[next((cut for cut in cuts if cut not in ancestors), name)] += 1
    words = [f"{name} ({number} tensors)" if number > 1 else name for name, number in sorted(groups.items())]
    return shown(words, SHOWN) if words else ""


def _misfit(tensors: StateDict, wanted: Wanted, best: _Candidate | None, source: str) -> str:
    """The error of a file without a complete candidate: what the nearest one lacks."""
    missing, shapes, place = sorted(name for name in wanted.shapes if wanted.needs(name)), [], ""
    names = _under(tensors, best.prefix if best is not None else "")
    known: set[str] = set()
    if best is not None:
        missing, shapes, place = sorted(best.missing), best.shapes, f" under {best.place}" * bool(best.prefix)
        known = set(best.names)
    if form := forms.unfit({name: tensors[full] for name, full in names.items()}, missing, shapes, source):
        return f"{source} {form}"
    unexpected = sorted(name for name in names if name not in known and not name.startswith(wanted.optional))
    faults = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    listed = "; ".join(f"{len(words)} {fault}: {shown(words)}" for fault, words in faults if words)
    theirs, ours = _sizes({name: tensors[full].shape for name, full in names.items()}), _sizes(wanted.shapes)
    likeness = f"; it looks like a model of {theirs}, and this one has {ours}" if theirs and theirs != ours else ""
    problem = f"{source} holds{place} the weights of another model than the one built here"
    return f"{problem} ({listed}){likeness}; check model.name"


def _sizes(shapes: Mapping[str, torch.Size]) -> str:
    """The depth and width of a transformer in words; empty where the names show none."""
    depths: dict[str, set[str]] = defaultdict(set)
    widths: Counter[int] = Counter()
    for name, shape in shapes.items():
        if block := re.match(r"(.*?(?:blocks|layers?))\.(\d+)\.", name):
            depths[block[1]].add(block[2])
            widths.update(shape[:1] if len(shape) == 1 and "norm" in name.replace("ln_", "norm") else ())
    if not widths:
        return ""
    depth = max(map(len, depths.values()))
    return f"{depth} block{'s' * (depth != 1)} of width {widths.most_common(1)[0][0]}"
