"""Heads: what CLIP's own text tower says, with the logit scale folded in once; and random ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import HeadKind, ModelConf
from finetune.models import build_model
from finetune.models.clip import ClipClassifier
from finetune.models.heads import Head, class_prompts, zeroshot_head, zeroshot_weight

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
    """Letters as tokens; the highest number ends the text, as CLIP's text tower expects."""
    tokens = torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        codes = [ord(letter) for letter in text[:11]]
        row[: len(codes) + 1] = torch.tensor([*codes, 299])
    return tokens


def test_logits_equal_clips_own_for_one_template(clip: nn.Module) -> None:
    images = torch.randn(5, 3, 16, 16)
    head = zeroshot_head(clip, tokenizer, CLASSES, ["a photo of a {}."])
    prompts = [f"a photo of a {name}." for name in ("a cat", "dog", "7")]
    with torch.no_grad():
        expected, _ = clip.get_logits(images, tokenizer(prompts))
        got = ClipClassifier(clip.visual, head)(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.argsort(dim=1), expected.argsort(dim=1))


def test_templates_are_averaged_as_openai_and_open_clip_do(clip: nn.Module) -> None:
    from open_clip.zero_shot_classifier import build_zero_shot_classifier_legacy

    prompts = ["a cat", "dog", "7"]
    expected = build_zero_shot_classifier_legacy(clip, tokenizer, prompts, TEMPLATES) * clip.logit_scale.exp()
    weight = zeroshot_weight(clip, tokenizer, CLASSES, TEMPLATES)
    torch.testing.assert_close(weight, expected.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.norm(dim=1), clip.logit_scale.exp().expand(3).detach())


def test_many_prompts_are_read_in_parts(clip: nn.Module, monkeypatch) -> None:
    whole = zeroshot_weight(clip, tokenizer, CLASSES, TEMPLATES)
    monkeypatch.setattr("finetune.models.heads.PROMPTS_AT_ONCE", 2)
    torch.testing.assert_close(zeroshot_weight(clip, tokenizer, CLASSES, TEMPLATES), whole)


def test_a_zeroshot_head_learns_and_has_no_bias(clip: nn.Module) -> None:
    head = zeroshot_head(clip, tokenizer, CLASSES, TEMPLATES, dropout=0.1)
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
