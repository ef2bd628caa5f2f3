"""Every setting of the model: which pretrained network, and which classifier on top of it. Standard library only."""

from dataclasses import dataclass

from finetune.config.fields import Choice, ignored, nearest, setting


class Family(Choice):
    """Which kind of model `model.name` is looked up as."""

    clip = "clip"
    vit = "vit"


class HeadKind(Choice):
    """How the classifier starts."""

    auto = "auto"
    zeroshot = "zeroshot"
    linear_probe = "linear_probe"
    random = "random"
    keep = "keep"


class Library(Choice):
    """Whose model `model.name` is, where several libraries know the name."""

    auto = "auto"
    open_clip = "open_clip"
    timm = "timm"
    torchvision = "torchvision"


class TemplateSet(Choice):
    """Prompts that `model.templates` may call by name."""

    default = "default"
    simple = "simple"
    imagenet = "imagenet"


class Pool(Choice):
    """How the tokens behind the last block become one feature vector."""

    auto = "auto"
    mean = "mean"


@dataclass
class ModelConf:
    """Which pretrained model, and which classifier on top of it."""

    family: Family = setting(Family.clip, "clip: an open_clip image tower; vit: a timm or torchvision network")
    name: str = setting("glyph_clip", "architecture, by its library's name; glyph_clip and glyph_vit are bundled")
    pretrained: str = setting(
        "bundled", "weights: bundled, none, an open_clip or timm tag, a hub id or a path", place=True
    )
    pretrained_key: str | None = setting(
        None,
        "which weights of a file that has several, such as teacher.backbone; null: where the names fit",
    )
    library: Library = setting(Library.auto, "whose model it is, where several libraries know the name")
    image_size: int = setting(0, "pixels a side that the model sees; 0: the size of its weights", ge=0, le=16_384)
    in_channels: int = setting(3, "channels of an image: 3 (RGB) or 1 (grey); others for models alone", ge=1, le=1024)
    head: HeadKind = setting(
        HeadKind.auto,
        "zeroshot (from class names), linear_probe (fitted on frozen features), random, keep (the checkpoint's own);"
        " auto: zeroshot where there is a text tower",
    )
    templates: list[str] = setting(
        ["default"], "prompts of the zero-shot head, {} is the class name; or sets: default, simple (7), imagenet (80)"
    )
    class_names: str | None = setting(
        None,
        "text file for the zero-shot head: a name a line in class order, or CLASS<tab>NAME; null: the classes'",
        place=True,
    )
    drop_path: float = setting(0.0, "ViT: probability of dropping the last block; rises linearly from 0", ge=0, lt=1)
    head_dropout: float = setting(0.0, "dropout on the features ahead of the classifier", ge=0, lt=1)
    head_scale: float = setting(1.0, "head=random: factor on its first values; MAE, FT-CLIP: 0.001", gt=0, le=1)
    head_bias: bool = setting(False, "zero-shot head: learn an offset a class too; multi-label heads always do")
    pool: Pool = setting(Pool.auto, "auto: as the weights were trained; mean: the mean of all patches under a new norm")


def model_problems(model: ModelConf) -> list[str]:
    """What is wrong with the settings of the model beyond their ranges, one line each."""
    problems = _template_problems(model.templates)
    if model.pool == Pool.mean and model.head in (HeadKind.zeroshot, HeadKind.keep):
        mend = "use model.head=random or model.pool=auto"
        problems.append(f"model.head={model.head} needs the pooling of the weights: {mend}")
    reasons: dict[str, str] = {}
    if model.family != Family.clip or model.head not in (HeadKind.auto, HeadKind.zeroshot):
        reasons["head_bias"] = "every other head than the zero-shot one has offsets"
    is_zeroshot = model.family == Family.clip and model.head == HeadKind.auto and model.pool == Pool.auto
    if not is_zeroshot and model.head != HeadKind.zeroshot:
        reasons |= dict.fromkeys(("class_names", "templates"), "only a zero-shot head reads names")
    if is_zeroshot or model.head not in (HeadKind.auto, HeadKind.random):
        kind = HeadKind.zeroshot if is_zeroshot else model.head
        reasons["head_scale"] = f"it is for a random head, and this one is {kind}; add model.head=random"
    return problems + ignored("model", model, reasons)


def _template_problems(templates: list[str]) -> list[str]:
    if not templates:
        return ["model.templates is empty: give at least one prompt, such as 'a photo of a {}.'"]
    sets = [word.value for word in TemplateSet]
    return [
        f"model.templates: {template!r} must hold {{}} once, where the class name goes, or be one of"
        f" {', '.join(sets)}{nearest(template, sets)}"
        for template in templates
        if template not in sets and (template.count("{}") != 1 or template.count("{") > 1)
    ]
