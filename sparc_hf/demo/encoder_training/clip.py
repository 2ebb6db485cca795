"""The demo CLIP: a small `CLIPModel` and its tokenizer, trained on scenes and their captions.

Image-caption contrast alone learns what tells most scenes apart, colours, places and backgrounds, and stops before
shapes. So the image tower starts from the vision-only encoder, which has seen silhouettes, each caption stands beside
variants that are wrong by one word (as NegCLIP, arXiv 2210.01936), and now and then a phrase of one object takes the
caption's place.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2WithRegistersModel,
)

from sparc_hf.demo.encoder_training.image_tower import copy_image_tower
from sparc_hf.demo.encoder_training.steps import IMAGE_PROCESSING, Recipe, normalised, take_steps, to_pixels
from sparc_hf.demo.encoder_training.word_swaps import WordSwaps, object_phrases
from sparc_hf.demo.raster import IMAGE_SIZE

CONTEXT_LENGTH = 32
_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
# As CLIP limits it (arXiv 2103.00020, section 2.5), because training is unstable beyond.
_MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class ClipRecipe(Recipe):
    """Settings of the CLIP training; the defaults made the shipped encoder.

    Attributes:
        wrong_captions: variants of each caption that are wrong by one word.
        phrase_share: how often a phrase of one object stands for the caption.
        vision_layers: blocks of the image tower.
        text_layers: blocks of the text tower.
    """

    steps: int = 1300
    wrong_captions: int = 3
    phrase_share: float = 0.3
    vision_layers: int = 4
    text_layers: int = 3


def build_tokenizer(captions: Iterable[str], vocabulary_size: int = 1200) -> CLIPTokenizer:
    """Byte-level BPE trained on captions: their words are one token each, any other text falls into pieces."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The trainer alone would keep `x</w>` only for characters it saw at a word's end: unknown text needs all.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*_SPECIAL_TOKENS, *(f"{character}</w>" for character in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=CONTEXT_LENGTH)  # pyright: ignore[reportArgumentType]


def build_clip(tokenizer: CLIPTokenizer, recipe: ClipRecipe) -> CLIPModel:
    """A CLIPModel with fresh weights for 64-pixel images and this tokenizer."""
    special_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    width = recipe.hidden_size
    tower = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 32,
        "projection_dim": width,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(
        vision_config={
            **tower,
            "num_hidden_layers": recipe.vision_layers,
            "image_size": IMAGE_SIZE,
            "patch_size": recipe.patch_size,
        },
        text_config={
            **tower,
            **special_ids,
            "num_hidden_layers": recipe.text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT_LENGTH,
        },
        projection_dim=width,
        logit_scale_init_value=math.log(10),
    )
    return CLIPModel(config)


def encode_captions(tokenizer: CLIPTokenizer, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Token ids int64 [scenes, captions per scene, 32]."""
    flat = [caption for captions_of_scene in captions for caption in captions_of_scene]
    ids = tokenizer(flat, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    return np.asarray(ids, dtype=np.int64).reshape(len(captions), -1, CONTEXT_LENGTH)


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, wrong: torch.Tensor, valid: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy of matching rows, in which an image also has to tell its caption from wrong variants.

    Args:
        images: unit rows [batch, dim].
        texts: unit rows [batch, dim].
        wrong: unit rows [batch, variants, dim].
        valid: bool [batch, variants], which of them count.
        scale: 0-dim, factor of the cosines.
    """
    logits = scale * images @ texts.T
    hard = (scale * torch.einsum("bd,bvd->bv", images, wrong)).masked_fill(~valid, -torch.inf)
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(torch.cat([logits, hard], dim=1), target) + F.cross_entropy(logits.T, target)) / 2


class CaptionSampler:
    """Draws the texts of a step: a caption or a phrase of every scene, and variants that are wrong by one word."""

    def __init__(self, tokenizer: CLIPTokenizer, captions: Sequence[Sequence[str]], recipe: ClipRecipe):
        self._recipe = recipe
        self._captions = encode_captions(tokenizer, captions)
        self._swaps = WordSwaps(tokenizer, self._captions)
        phrases = [object_phrases(texts) for texts in captions]
        self._counts = np.array([len(texts) for texts in phrases])
        self._phrases = encode_captions(tokenizer, [[phrase] for texts in phrases for phrase in texts])[:, 0]

    def draw(self, scenes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids int64 [scenes, 1 + variants, tokens], the true text first, and bool [scenes, variants]."""
        texts = self._captions[scenes, rng.integers(0, self._captions.shape[1], len(scenes))]
        counts = self._counts[scenes]
        short = (rng.random(len(scenes)) < self._recipe.phrase_share) & (counts > 0)
        first = np.cumsum(self._counts)[scenes] - counts
        texts[short] = self._phrases[(first + (rng.random(len(scenes)) * counts).astype(np.int64))[short]]
        wrong, valid = self._swaps.swapped(texts, scenes, self._recipe.wrong_captions, rng)
        return np.concatenate([texts[:, None], wrong], axis=1), valid


def _embed_texts(model: Any, ids: torch.Tensor, end: int, groups: int = 3) -> torch.Tensor:
    """Unit rows [texts, dim] of token ids [texts, tokens], texts of like length together, which saves padding."""
    lengths = (ids == end).int().argmax(dim=1) + 1
    order = lengths.argsort()
    rows = []
    for members in order.tensor_split(groups):
        width = int(lengths[members].max())
        mask = (torch.arange(width, device=ids.device) < lengths[members, None]).long()
        rows.append(model.get_text_features(input_ids=ids[members, :width], attention_mask=mask).pooler_output)
    return F.normalize(torch.cat(rows)[order.argsort()], dim=-1)


def _clip_loss(model: Any, pixels: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor, end: int) -> torch.Tensor:
    """Loss of images [batch, 3, 64, 64] against texts [batch, 1 + variants, tokens], the true one first."""
    images = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    texts = _embed_texts(model, ids.flatten(0, 1), end).view(*ids.shape[:2], -1)
    scale = model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
    return contrastive_loss(images, texts[:, 0], texts[:, 1:], valid, scale)


def train_clip(
    images: np.ndarray,
    captions: Sequence[Sequence[str]],
    image_tower: Dinov2WithRegistersModel | None = None,
    *,
    recipe: ClipRecipe | None = None,
    device: torch.device | str = "cpu",
) -> tuple[CLIPModel, CLIPProcessor]:
    """Train both towers.

    Args:
        images: uint8 [scenes, 64, 64, 3].
        captions: the captions of each scene, equally many for all.
        image_tower: the vision-only encoder the image tower starts from; without one it starts from nothing, as the
            text tower does.
        recipe: settings, default `ClipRecipe()`.
        device: where to train.

    Returns:
        The model in eval mode and its processor.
    """
    recipe = recipe or ClipRecipe()
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    tokenizer = build_tokenizer(caption for captions_of_scene in captions for caption in captions_of_scene)
    texts = CaptionSampler(tokenizer, captions, recipe)
    end = int(tokenizer.convert_tokens_to_ids(_SPECIAL_TOKENS[1]))  # pyright: ignore[reportArgumentType]
    model: Any = build_clip(tokenizer, recipe)
    if image_tower is not None:
        copy_image_tower(image_tower, model)
    model.to(device).train()

    def loss_of(rows: np.ndarray) -> torch.Tensor:
        ids, valid = (torch.from_numpy(array).to(device) for array in texts.draw(rows, rng))
        return _clip_loss(model, normalised(to_pixels(images[rows], device)), ids, valid, end)

    take_steps("clip", model, loss_of, len(images), recipe, rng)
    return model.eval(), CLIPProcessor(image_processor=CLIPImageProcessorPil(**IMAGE_PROCESSING), tokenizer=tokenizer)
