"""Pretrain the two small bundled models on rendered glyphs: about 0.35 s a step on one free core, 40 minutes each.

    python scripts/pretrain_glyphs.py clip --steps 6500 --fonts DIR... --hand-fonts DIR... --out finetune/models/bundled
    python scripts/pretrain_glyphs.py vit  --steps 6500 --fonts DIR... --hand-fonts DIR... --out finetune/models/bundled
    python scripts/pretrain_glyphs.py clip --evaluate --out finetune/models/bundled

`clip` learns by contrast. Every step draws one caption for each of the 62 characters. The loss is each image's cross
entropy over these captions: CLIP's image-to-text loss (Radford et al., arXiv:2103.00020, figure 3) with classes as
candidates, as in UniCL (Yang et al., arXiv:2204.03610). Two images of one class are so never each other's negatives.
Then the text tower alone learns to recognise a character's name between random words (`teach_prompts`).
`vit` learns the 62 classes with a linear head. The weights of the last step are written.

Only `--evaluate` reads real digits. They are used neither for training nor to pick a step.
"""

import argparse
import json
import logging
import math
import random
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from glyph_captions import (
    ANY_TEMPLATES,
    CONTEXT_LENGTH,
    DIGIT_TEMPLATES,
    NUMBER_WORDS,
    UNSEEN_TEMPLATES,
    captions,
    names_of,
    random_prompt,
    write_merges,
)
from glyphs import CHARACTERS, IMAGE_SIZE, Bank, GlyphSampler, build_bank, find_fonts
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

log = logging.getLogger("pretrain_glyphs")

MEAN, STD = 0.3, 0.35  # of the rendered pixels; all three channels are the same
PREPROCESS = {
    "mean": [MEAN] * 3,
    "std": [STD] * 3,
    "interpolation": "bicubic",
    "resize_mode": "squash",
    "size": [IMAGE_SIZE, IMAGE_SIZE],
}
VISION = {"layers": 6, "width": 128, "head_width": 32, "patch_size": 8, "image_size": IMAGE_SIZE}
VIT_ARGS = {
    "img_size": IMAGE_SIZE,
    "patch_size": 8,
    "in_chans": 3,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "global_pool": "token",
    "num_classes": len(CHARACTERS),
}


def clip_config(vocab_size: int) -> dict[str, object]:
    """The content of the configuration file, in open_clip's format."""
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocab_size, "width": 64, "heads": 4, "layers": 2}
    return {
        "model_cfg": {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": text},
        "preprocess_cfg": PREPROCESS,
    }


class ClipTask:
    """A CLIP for glyphs; `logits(images)` compares images with one random caption for each character."""

    def __init__(self, out: Path) -> None:
        """Start from open_clip's initial weights, with the tokenizer's merges in the folder `out`."""
        self.tokenizer = SimpleTokenizer(bpe_path=str(out / "glyph_bpe.txt.gz"), context_length=CONTEXT_LENGTH)
        self.config = clip_config(self.tokenizer.vocab_size)
        cfg = self.config["model_cfg"]
        self.model = CLIP(cfg["embed_dim"], dict(cfg["vision_cfg"]), dict(cfg["text_cfg"]))
        self.tokens = [self.tokenizer(texts) for texts in captions()]

    def logits(self, images: Tensor) -> Tensor:
        """Scaled cosine similarities with one random caption for each character. (batch, 3, 32, 32) -> (batch, 62)."""
        drawn = torch.stack([tokens[torch.randint(len(tokens), ())] for tokens in self.tokens])
        text = F.normalize(self.model.encode_text(drawn), dim=-1)
        image = F.normalize(self.model.encode_image(images), dim=-1)
        return self.model.logit_scale.exp() * image @ text.T


class VitTask:
    """A plain ViT classifier over the 62 characters."""

    def __init__(self) -> None:
        """Start from timm's initial weights."""
        self.config = {
            "architecture": "vit_glyph",
            "args": VIT_ARGS,
            "preprocess_cfg": PREPROCESS,
            "classes": CHARACTERS,
        }
        self.model = VisionTransformer(**VIT_ARGS)
        self.logits = self.model


def to_input(images: Tensor) -> Tensor:
    """Normalise grey images in [0, 1] and repeat them to three channels. (b, 1, h, w) -> (b, 3, h, w)."""
    return ((images - MEAN) / STD).expand(-1, 3, -1, -1)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay on vectors, scalars, tokens and position embeddings."""
    named = list(model.named_parameters())
    plain = [p for name, p in named if p.ndim < 2 or "embed" in name.replace("patch_embed", "") or "token" in name]
    plain_ids = {id(p) for p in plain}
    decayed = [p for _, p in named if id(p) not in plain_ids]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def pretrain(task: ClipTask | VitTask, sampler: GlyphSampler, name: str, args: argparse.Namespace) -> None:
    """Train with warmup, cosine decay and gradients clipped to norm 1; write weights every `args.save_every` steps."""
    optimizer = make_optimizer(task.model, args.lr)
    warmup = max(1, args.steps // 20)

    def factor(step: int) -> float:
        t = (step - warmup) / max(1, args.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * t))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    task.model.train()
    start, loss_sum, right, seen = time.monotonic(), 0.0, 0, 0
    for step in range(1, args.steps + 1):
        images, labels = sampler.batch(args.batch_size)
        logits = task.logits(to_input(images))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if isinstance(task, ClipTask):
            with torch.no_grad():
                task.model.logit_scale.clamp_(0, math.log(100))  # CLIP's limit, against a collapse of the softmax
        loss_sum, right, seen = loss_sum + loss.item(), right + int((logits.argmax(1) == labels).sum()), seen + 1
        if step % 100 == 0 or step == args.steps:
            rate = seen * args.batch_size
            seconds = time.monotonic() - start
            log.info("step %d  loss %.3f  top1 %.3f  %.0f s", step, loss_sum / seen, right / rate, seconds)
            loss_sum, right, seen = 0.0, 0, 0
        if step % args.save_every == 0 or step == args.steps:
            write_model(task, args.out, name)


def write_model(task: ClipTask | VitTask, out: Path, name: str) -> None:
    """Write the weights in half precision, and the configuration beside them."""
    state = {key: value.detach().half().contiguous() for key, value in task.model.state_dict().items()}
    save_file(state, out / f"{name}.safetensors", metadata={"format": "pt"})
    (out / f"{name}.json").write_text(json.dumps(task.config, indent=2) + "\n")


def read_model(task: ClipTask | VitTask, path: Path) -> None:
    """Load written weights in single precision."""
    task.model.load_state_dict({key: value.float() for key, value in load_file(path).items()})


def teach_prompts(task: ClipTask, *, steps: int, seed: int) -> None:
    """Teach the text tower to ignore the words around a character's name; the image tower does not change.

    Without this stage, templates with words that no caption has ("a tattoo of a {}.") classify no better than chance.
    The target of each character is the mean of its captions' features ahead of this stage; the loss is 1 - cosine.
    """
    rng = random.Random(seed)
    names = [names_of(character) for character in CHARACTERS]
    with torch.no_grad():
        means = [F.normalize(task.model.encode_text(tokens), dim=-1).mean(0) for tokens in task.tokens]
        targets = F.normalize(torch.stack(means), dim=-1)
    parameters = [
        p for key, p in task.model.named_parameters() if not key.startswith("visual.") and key != "logit_scale"
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        prompts = [random_prompt(rng.choice(of_one), task.tokenizer, rng) for of_one in names]
        captioned = torch.stack([tokens[rng.randrange(len(tokens))] for tokens in task.tokens])
        features = task.model.encode_text(torch.cat([task.tokenizer(prompts), captioned]))
        loss = (1 - F.cosine_similarity(features, targets.repeat(2, 1), dim=-1)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if step % 500 == 0:
            log.info("prompts: step %d  1 - cosine %.4f", step, loss.item())


@torch.no_grad()
def evaluate(task: ClipTask | VitTask, path: Path) -> None:
    """Print the accuracy on the 1,797 real digits: for each template, or with the ViT's own logits of digits."""
    from sklearn.datasets import load_digits  # only for evaluation: see the module's docstring

    digits = load_digits()
    grey = (torch.from_numpy(digits.images) * 255 / 16).floor().float()[:, None]
    large = F.interpolate(grey, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True).clamp(0, 255).round() / 255
    labels = torch.from_numpy(digits.target)
    read_model(task, path)
    task.model.eval()
    print(f"parameters: {sum(p.numel() for p in task.model.parameters()):,}")
    if isinstance(task, VitTask):
        right = task.model(to_input(large))[:, :10].argmax(1) == labels
        print(f"digits by the pretraining head: {right.float().mean():.4f}")
        return
    images = F.normalize(task.model.encode_image(to_input(large)), dim=-1)
    total = torch.zeros(2, 10, images.shape[1])
    taught = ANY_TEMPLATES + DIGIT_TEMPLATES
    for template in taught + UNSEEN_TEMPLATES:
        row = []
        for i, names in enumerate((tuple("0123456789"), NUMBER_WORDS)):
            tokens = task.tokenizer([template.format(name) for name in names])
            text = F.normalize(task.model.encode_text(tokens), dim=-1)
            total[i] += text * (template in taught)
            row.append(((images @ text.T).argmax(1) == labels).float().mean().item())
        print(f"{template!r:45} digits {row[0]:.4f}  words {row[1]:.4f}")
    for i, kind in enumerate(("digits", "words")):
        right = (images @ F.normalize(total[i], dim=-1).T).argmax(1) == labels
        classes = [f"{right[labels == k].float().mean():.2f}" for k in range(10)]
        print(f"mean of the taught templates, {kind}: {right.float().mean():.4f}  by digit {' '.join(classes)}")


def make_bank(args: argparse.Namespace) -> Bank:
    """Render the glyphs and log the fonts."""
    fonts = find_fonts([*args.fonts, Path(matplotlib.get_data_path()) / "fonts" / "ttf"])
    bank = build_bank(fonts, find_fonts(args.hand_fonts), drawings=args.drawings, seed=args.seed)
    log.info("%d glyphs; fonts: %s", len(bank.labels), ", ".join(f"{k} ({n})" for k, n in bank.sources.items()))
    return bank


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("clip", "vit"))
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="folders, beside matplotlib's own fonts")
    parser.add_argument("--hand-fonts", type=Path, nargs="*", default=[], help="folders of handwriting fonts")
    parser.add_argument("--drawings", type=int, default=80, help="drawn examples per way of writing a digit")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt-steps", type=int, default=3000, help="clip: last stage, text tower only")
    parser.add_argument("--prompts-only", action="store_true", help="clip: only that stage, from the weights in --out")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="score the written weights on real digits; no training")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"glyph_{args.model}"
    if args.model == "clip" and not args.evaluate:
        write_merges(args.out / "glyph_bpe.txt.gz")
    task = ClipTask(args.out) if args.model == "clip" else VitTask()
    if args.evaluate:
        evaluate(task, args.out / f"{name}.safetensors")
        return
    if args.prompts_only:
        read_model(task, args.out / f"{name}.safetensors")
    else:
        pretrain(task, GlyphSampler(make_bank(args), seed=args.seed), name, args)
    if isinstance(task, ClipTask):
        teach_prompts(task, steps=args.prompt_steps, seed=args.seed)
        write_model(task, args.out, name)


if __name__ == "__main__":
    main()
