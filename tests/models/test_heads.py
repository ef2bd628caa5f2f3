"""Heads: from CLIP's text tower, random, kept from the weights, and fitted by a linear probe."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.config import Conf, Family, HeadKind, Library, ModelConf, find_problems
from finetune.models import build_model
from finetune.models.heads.head import Head, TowerWithHead, find_head, rows_of
from finetune.models.heads.imagenet import imagenet_names
from finetune.models.heads.probe import STRENGTHS, features_of, linear_probe
from finetune.models.heads.zeroshot import (
    class_prompts,
    expand_templates,
    read_class_names,
    zeroshot_head,
    zeroshot_weight,
)

TEMPLATES = ["{}", "a photo of a {}.", "the {}"]
CLASSES = ["a_cat", "dog", "7"]


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 12, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(24, vision, text).eval()


def tokenizer(texts: list[str]) -> Tensor:
    """Letters as tokens; CLIP's text tower takes the highest number as the end of the text."""
    tokens = torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        codes = [ord(letter) for letter in text[:11]]
        row[: len(codes) + 1] = torch.tensor([*codes, 299])
    return tokens


def test_logits_equal_clips_own_for_one_template(clip: nn.Module) -> None:
    images = torch.randn(5, 3, 16, 16)
    head = zeroshot_head(zeroshot_weight(clip, tokenizer, CLASSES, ["of {}."]))
    prompts = [f"of {name}." for name in ("a cat", "dog", "7")]
    with torch.no_grad():
        expected, _ = clip.get_logits(images, tokenizer(prompts))
        got = TowerWithHead(clip.visual, head)(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.argsort(dim=1), expected.argsort(dim=1))


def test_templates_are_averaged_as_openai_and_open_clip_do(clip: nn.Module) -> None:
    from open_clip.zero_shot_classifier import build_zero_shot_classifier_legacy

    prompts = ["a cat", "dog", "7"]
    expected = build_zero_shot_classifier_legacy(clip, tokenizer, prompts, TEMPLATES) * clip.logit_scale.exp()
    weight = zeroshot_weight(clip, tokenizer, CLASSES, TEMPLATES)
    torch.testing.assert_close(weight, expected.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.norm(dim=1), clip.logit_scale.exp().expand(3).detach())


def test_classes_that_the_tokenizer_reads_alike_are_refused(clip: nn.Module, caplog) -> None:
    def lower(texts: list[str]) -> Tensor:
        return tokenizer([text.lower() for text in texts])

    for classes, words in {
        ("Cat", "dog", "cat"): r"reads 'Cat' and 'cat' alike; give them other names by model\.class_names",
        (
            "a very long name",
            "dog",
            "a very long one",
        ): r"alike once it is cut off at 12 tokens",
        ("dog", "caf\udce9"): r"class 'caf\\udce9' has bytes that are no text",
    }.items():
        with pytest.raises(ValueError, match=words):
            zeroshot_weight(clip, lower, classes, ["{}"])
    # Another prompt tells them apart.
    weight = zeroshot_weight(clip, lower, ["very long name", "very long one"], ["it is a {}", "{}"])
    assert not torch.equal(weight[0], weight[1])
    with caplog.at_level("WARNING", logger="finetune"):
        zeroshot_weight(clip, lower, ["x", "a name that is long"], ["{}"])
    assert "cut off at 12 tokens: 'a name that is long'" in caplog.text and "'x'" not in caplog.text


def test_many_prompts_are_read_in_parts(clip: nn.Module, monkeypatch) -> None:
    whole = zeroshot_weight(clip, tokenizer, CLASSES, TEMPLATES)
    monkeypatch.setattr("finetune.models.heads.zeroshot.PROMPTS_AT_ONCE", 2)
    torch.testing.assert_close(zeroshot_weight(clip, tokenizer, CLASSES, TEMPLATES), whole)


def test_a_zeroshot_head_learns_and_has_no_bias(clip: nn.Module) -> None:
    head = zeroshot_head(zeroshot_weight(clip, tokenizer, CLASSES, TEMPLATES), dropout=0.1)
    assert set(dict(head.named_parameters())) == {"weight"}
    assert head.weight.requires_grad and head.normalize and head.dropout == 0.1


def test_underscores_become_spaces_and_double_names_are_refused() -> None:
    assert class_prompts(["great_white_shark", " tench "]) == ["great white shark", "tench"]
    with pytest.raises(ValueError, match="used twice: 'a b'"):
        class_prompts(["a_b", "c", "a b"])
    with pytest.raises(ValueError, match="class 1 has an empty name"):
        class_prompts(["a", "_"])


def test_a_random_head_is_small_and_unbiased() -> None:
    torch.manual_seed(0)
    head = Head(400, 100)
    assert head.bias is not None and not head.bias.any()
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert set(head.state_dict()) == {"weight", "bias"}


def test_normalised_features_do_not_feel_their_length() -> None:
    head = Head(8, 3, normalize=True, bias=False)
    x = torch.randn(4, 8)
    torch.testing.assert_close(head(x), head(10 * x))
    torch.testing.assert_close(head(x), F.linear(F.normalize(x, dim=-1), head.weight))


def test_dropout_acts_while_training_only() -> None:
    head = Head(100, 3, dropout=0.5)
    x = torch.randn(4, 100)
    assert torch.equal(head.eval()(x), F.linear(x, head.weight, head.bias))
    head.train()
    assert not torch.equal(head(x), head(x))
    kept = torch.stack([head(x) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(kept, head.eval()(x), rtol=0, atol=0.05)


def test_unpooled_towers_are_averaged() -> None:
    head = Head(8, 3)
    x = torch.randn(4, 5, 8)
    assert torch.equal(head(x), head(x.mean(1)))


def test_the_head_is_the_only_thing_that_the_text_tower_leaves() -> None:
    built = build_model(ModelConf(), ["zero", "one"])
    names = [name for name, _ in built.model.net.named_parameters()]
    assert all(name.startswith(("visual.", "head.")) for name in names)
    assert "head.bias" not in names
    torch.manual_seed(0)
    random = build_model(ModelConf(head=HeadKind.random, head_dropout=0.3), ["zero", "one"])
    assert not random.has_zeroshot and random.model.net.head.dropout == 0.3
    assert random.model.net.head.bias is not None


def test_class_names_of_the_bundled_clip_move_its_head() -> None:
    first = build_model(ModelConf(), ["0", "1"]).model.net.head.weight
    second = build_model(ModelConf(), ["1", "0"]).model.net.head.weight
    torch.testing.assert_close(first, second.flip(0))


def test_random_weights_get_a_random_head_unless_asked_otherwise() -> None:
    built = build_model(ModelConf(pretrained="none"), ["zero", "one"])
    assert not built.has_zeroshot and built.model.net.head.bias is not None
    assert build_model(ModelConf(pretrained="none", head=HeadKind.zeroshot), ["zero", "one"]).has_zeroshot


def test_a_file_may_name_the_classes(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("zero\n\none \n")
    own, named = (
        build_model(ModelConf(class_names=name), ["0", "1"]).model.net.head.weight for name in (None, str(path))
    )
    expected = build_model(ModelConf(), ["zero", "one"]).model.net.head.weight
    assert torch.equal(named, expected) and not torch.equal(named, own)
    path.write_text("1\tthe one\n")
    assert read_class_names(path, ["0", "1"]) == ["0", "the one"]
    path.write_bytes("one\u2028half\r\ntwo\x0b2\n".encode())  # no ends of lines but line breaks
    assert read_class_names(path, ["0", "1"]) == ["one\u2028half", "two\x0b2"]


def test_wordnet_ids_of_imagenet_have_openais_names(tmp_path: Path) -> None:
    """By hand: tench, goldfish, construction crane and the bird; two classes are called missile; 21k has dog."""
    by_hand = {
        "n01440764": "tench",
        "n01443537": "goldfish",
        "n02012849": "crane bird",
        "n03126707": "construction crane",
    }
    assert imagenet_names(["cat", *by_hand, "n1234", "n99999999", "N01440764"]) == by_hand
    assert imagenet_names(["n02084071"]) == {"n02084071": "dog"}
    assert imagenet_names(["n03773504", "n04008634"]) == {"n03773504": "missile", "n04008634": "missile"}
    wnids = ["n01443537", "background", "n01440764"]
    ours = build_model(ModelConf(), wnids)
    words = build_model(ModelConf(), ["goldfish", "background", "tench"])
    assert torch.equal(ours.model.net.head.weight, words.model.net.head.weight)
    assert "names for 2 classes" in ours.description and "WordNet" not in words.description
    path = tmp_path / "names.txt"
    path.write_text("n01440764\tdoctor fish\n")
    named = build_model(ModelConf(class_names=str(path)), wnids).model.net.head.weight
    expected = build_model(ModelConf(), ["goldfish", "background", "doctor fish"]).model.net.head.weight
    assert torch.equal(named, expected)
    twins = build_model(ModelConf(), ["n03773504", "n04008634"]).model.net.head.weight
    assert torch.equal(twins[0], twins[1])  # as published: equal at first, and each learns for itself
    with pytest.raises(ValueError, match="used twice: 'tench'"):
        build_model(ModelConf(), ["n01440764", "tench"])


def test_all_thousand_names_are_openais_in_the_order_of_the_ids() -> None:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data.imagenet_info import ImageNetInfo

    wnids = sorted(ImageNetInfo().label_names())
    names = imagenet_names(wnids[::-1])
    assert [names[wnid] for wnid in wnids] == list(IMAGENET_CLASSNAMES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zero\none\ntwo\n", "holds 3 names and the data has 2 classes"),
        ("", "holds 0 names"),
        ("n01\ttench\n", r"names 'n01', no class of the data \(did you mean 'n0"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        build_model(ModelConf(class_names=str(tmp_path / "names.txt")), ["n02", "n03"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_model(ModelConf(class_names=str(tmp_path / "nothing.txt")), ["n02", "n03"])


def test_names_for_a_head_that_reads_none_are_a_problem() -> None:
    conf = Conf(model=ModelConf(class_names="names.txt", head=HeadKind.random))
    assert any("class_names=names.txt would be ignored" in problem for problem in find_problems(conf))


# Named sets of prompts.


def test_templates_are_prompts_or_sets_of_them_by_name() -> None:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    imagenet = expand_templates(["imagenet"])
    assert len(imagenet) == 80 and imagenet == [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES]
    assert len(expand_templates(["simple"])) == 7
    assert expand_templates(["default", "a {}", "{}"]) == ["{}", "a photo of a {}.", "a photo of the {}.", "a {}"]
    assert ModelConf().templates == ["default"]


def test_an_unknown_set_is_a_problem_that_names_the_nearest() -> None:
    conf = Conf(model=ModelConf(templates=["imagnet"]))
    (problem,) = find_problems(conf)
    assert "did you mean 'imagenet'" in problem
    assert find_problems(Conf(model=ModelConf(templates=["imagenet", "a {}"]))) == []


# Keeping the classifier of the weights.


def vit_file(folder: Path, classes: list[str] | None) -> Path:
    built = build_model(ModelConf(family=Family.vit, name="glyph_vit"), ["a", "b", "c"])
    path = folder / "w.safetensors"
    save_file(
        built.model.net.state_dict(), path, metadata={"classes": json.dumps(classes)} if classes else {"format": "pt"}
    )
    return path


@pytest.mark.parametrize("known", [None, ["a", "b", "c"]])
def test_a_kept_head_classifies_as_it_did(known: list[str] | None, tmp_path: Path) -> None:
    path = vit_file(tmp_path, known)
    conf = ModelConf(family=Family.vit, name="glyph_vit", pretrained=str(path), head=HeadKind.keep, head_dropout=0.2)
    head = build_model(conf, ["a", "b", "c"]).model.net.head
    state = load_file(path)
    assert torch.equal(head.weight, state["head.weight"]) and torch.equal(head.bias, state["head.bias"])
    assert head.dropout == 0.2


def test_a_kept_head_of_other_classes_is_refused(tmp_path: Path) -> None:
    conf = ModelConf(
        family=Family.vit, name="glyph_vit", pretrained=str(vit_file(tmp_path, ["a", "b", "c"])), head=HeadKind.keep
    )
    with pytest.raises(ValueError, match=r"other classes than the data, such as 'a' for 'x', and none"):
        build_model(conf, ["x", "y", "z"])
    unnamed = dataclasses.replace(conf, pretrained=str(vit_file(tmp_path, None)))
    with pytest.raises(ValueError, match=r"classify into 3 classes and the data has 2, and nothing says"):
        build_model(unnamed, ["a", "b"])
    with pytest.raises(ValueError, match=r"a CLIP has no classifier to keep"):
        build_model(ModelConf(head=HeadKind.keep), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"a model without weights has no classifier"):
        build_model(ModelConf(family=Family.vit, name="glyph_vit", pretrained="none", head=HeadKind.keep), ["a"])


def test_a_kept_head_has_the_rows_of_the_names_and_new_ones(tmp_path: Path) -> None:
    path = vit_file(tmp_path, ["a", "Sea_lion", "c"])
    conf = ModelConf(family=Family.vit, name="glyph_vit", pretrained=str(path), head=HeadKind.keep)
    weight, bias = (load_file(path)[f"head.{name}"] for name in ("weight", "bias"))
    built = build_model(conf, ["c", "new", "sea lion", "other"])
    head = built.model.net.head
    assert torch.equal(head.weight[[0, 2]], weight[[2, 1]]) and torch.equal(head.bias[[0, 2]], bias[[2, 1]])
    assert head.weight[1].std() > 0 and not torch.equal(head.weight[1], head.weight[3]) and head.bias[1] == 0
    assert "; 2 of 4 classes keep their classifier, new are: new, other" in built.description
    built = build_model(conf, ["a", "c"])
    assert torch.equal(built.model.net.head.weight, weight[[0, 2]]) and "new are" not in built.description


def test_rows_go_by_names_and_never_by_a_guess() -> None:
    imagenet = ["n01440764, tench, Tinca tinca", "n02012849, crane", "n03126707, crane"]
    assert rows_of(imagenet, ["n03126707", "Tench", "crane"]) == [2, 0, None]
    assert rows_of(["A", "a", "b"], ["a", "A", "B"]) == [1, 0, 2]
    assert rows_of(["A", "a"], ["a"]) == [1]
    assert rows_of(["cat", "dog"], ["Cat", "cat"]) == [None, 0]


def test_imagenets_classes_are_known_of_the_libraries_own_weights(monkeypatch, tmp_path: Path) -> None:
    import timm
    from torchvision import models

    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32)
    whole = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **args: whole(
            name, pretrained=pretrained, pretrained_cfg_overlay={"state_dict": net.state_dict()}, **args
        ),
    )
    conf = ModelConf(family=Family.vit, name="vit_tiny_patch16_224", head=HeadKind.keep, image_size=32)
    built = build_model(dataclasses.replace(conf, pretrained="augreg_in21k_ft_in1k"), ["goldfish", "n01440764", "newt"])
    assert torch.equal(built.model.net.head.weight[:2], net.head.weight[[1, 0]])
    resnet = models.resnet18()
    monkeypatch.setattr("finetune.models.upstream.from_torchvision._fetch", lambda *place: dict(resnet.state_dict()))
    settings = {"name": "resnet18", "library": Library.torchvision, "pretrained": "DEFAULT", "image_size": 0}
    built = build_model(dataclasses.replace(conf, **settings), ["n01443537", "gizmo"])
    assert torch.equal(built.model.net.fc.weight[0], resnet.fc.weight[1]) and "new are: gizmo" in built.description


def test_the_bundled_vits_own_62_characters_are_kept() -> None:
    characters = list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
    conf = ModelConf(family=Family.vit, name="glyph_vit", head=HeadKind.keep)
    assert build_model(conf, characters).model.net.head.out_features == 62
    weight = build_model(conf, characters).model.net.head.weight
    assert torch.equal(build_model(conf, ["B", "0"]).model.net.head.weight, weight[[11, 0]])


# The linear probe.


def blobs(count: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Three classes that overlap a little, in 20 features of very different size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    centres = torch.randn(3, 20, generator=torch.Generator().manual_seed(9))
    sizes = torch.logspace(-2, 2, 20) * scale
    return (centres[labels] + 1.5 * torch.randn(count, 20, generator=generator)) * sizes + 3, labels


def test_a_probe_reaches_what_scikit_learn_reaches_at_the_same_strength() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    (x, y), (val_x, val_y) = blobs(300, 0), blobs(200, 1)
    probe = linear_probe(x, y, (val_x, val_y), num_classes=3)
    assert probe.strength in STRENGTHS
    scaler = StandardScaler().fit(x.numpy())
    reference = LogisticRegression(C=1 / (probe.strength * len(x)), max_iter=2000, tol=1e-8)
    reference.fit(scaler.transform(x.numpy()), y.numpy())
    expected = torch.from_numpy(reference.predict_proba(scaler.transform(val_x.numpy()))).float()
    got = (val_x @ probe.weight.T + probe.bias).softmax(dim=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
    assert probe.val_top1 == pytest.approx((got.argmax(1) == val_y).float().mean().item())


def test_the_strength_is_picked_on_validation() -> None:
    (x, y), (val_x, val_y) = blobs(60, 0), blobs(400, 1)
    probe = linear_probe(x, y, (val_x, val_y), num_classes=3)
    swapped = linear_probe(x, y, (x, y), num_classes=3)  # validated on the training data, the weakest penalty wins
    assert swapped.strength < probe.strength
    assert torch.equal(
        linear_probe(x, y, (val_x, val_y), num_classes=3).weight, probe.weight
    )  # a second fit gives the same bits


def test_a_probe_does_not_feel_the_scale_of_the_features() -> None:
    (x, y), (val_x, val_y) = blobs(300, 0), blobs(200, 1)
    small, large = (
        linear_probe(x, y, (val_x, val_y), num_classes=3),
        linear_probe(100 * x, y, (100 * val_x, val_y), num_classes=3),
    )
    assert small.strength == large.strength
    torch.testing.assert_close(small.weight, 100 * large.weight, rtol=1e-2, atol=1e-4)


def test_folds_of_the_training_images_pick_the_strength_where_validation_is_small() -> None:
    (x, y), val = blobs(60, 0), blobs(400, 1)
    alone = linear_probe(x, y, num_classes=3)
    few = linear_probe(x, y, (val[0][:3], val[1][:3]), num_classes=3)
    assert few.strength == alone.strength > STRENGTHS[-1] and torch.equal(few.weight, alone.weight)
    assert round(3 * few.val_top1, 5) in (0, 1, 2, 3)
    with pytest.raises(ValueError, match="needs images"):
        linear_probe(x[:3], y[:3], num_classes=3)


def test_a_probe_that_is_sure_of_what_is_wrong_is_not_picked() -> None:
    """Labels with mistakes: the weakest penalty learns them, and pays for it with its loss on other images."""
    (x, y), (val_x, val_y) = blobs(120, 0), blobs(400, 1)
    noisy = torch.where(torch.arange(120) % 4 == 0, (y + 1) % 3, y)
    probe = linear_probe(x, noisy, (val_x, val_y), num_classes=3)
    logits = val_x @ probe.weight.T + probe.bias
    assert torch.nn.functional.cross_entropy(logits, val_y) < 1.0 and probe.strength >= 1e-3


def test_a_probe_of_nothing_or_of_nan_is_refused() -> None:
    x, y = blobs(10, 0)
    with pytest.raises(ValueError, match="needs images"):
        linear_probe(x[:0], y[:0], (x, y), num_classes=3)
    with pytest.raises(ValueError, match="finite"):
        linear_probe(x / 0, y, (x, y), num_classes=3)


@pytest.mark.parametrize(
    "conf",
    [
        ModelConf(head=HeadKind.linear_probe),
        ModelConf(family=Family.vit, name="glyph_vit", head=HeadKind.linear_probe),
        ModelConf(family=Family.vit, name="regnetx_002", pretrained="none", head=HeadKind.linear_probe),  # no chain
    ],
)
def test_a_fitted_head_gives_the_probes_logits(conf: ModelConf) -> None:
    torch.manual_seed(0)
    model = build_model(conf, ["a", "b", "c"]).model.eval()
    images = torch.randn(12, 3, 32, 32)
    labels = torch.arange(12) % 3
    features = features_of(model, images)
    probe = linear_probe(features, labels, (features, labels), num_classes=3)
    find_head(model.net).set(probe.weight, probe.bias)
    with torch.no_grad():
        torch.testing.assert_close(model(images), features @ probe.weight.T + probe.bias, rtol=1e-3, atol=1e-3)
    assert probe.val_top1 == 1.0


def test_two_classifiers_cannot_be_probed() -> None:
    conf = ModelConf(family=Family.vit, name="deit_tiny_distilled_patch16_224", pretrained="none", image_size=32)
    model = build_model(conf, ["a", "b"]).model
    with pytest.raises(ValueError, match="2 linear classifiers, not one"):
        features_of(model, torch.randn(1, 3, 32, 32))
