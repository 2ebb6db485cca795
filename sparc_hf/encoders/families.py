"""Families of backbones: which vector, which tokens and which options each kind of model has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

POOLINGS = ("cls", "mean", "pooler", "projection", "tokens")
MODALITIES = ("image", "text")


@dataclass(frozen=True)
class Family:
    """What has to be known of the models of one `config.model_type`.

    Args:
        pooling: the vector of an image or text that the papers use: "cls" (first token of the last hidden state),
            "mean" (mean of the patch tokens, or of the tokens of a text), "pooler" (the model's own pooling head) or
            "projection" (the vector of the space that images and texts share). Patch tokens come from every family.
        modalities: what the model can encode.
        class_token: whether a class token precedes the patch tokens (register tokens are read from the config).
        attention_mask: whether the text tower was trained with padding masked, and not with padding to full length.
        options: arguments of `from_pretrained`.
    """

    pooling: str
    modalities: tuple[str, ...] = ("image",)
    class_token: bool = True
    attention_mask: bool = True
    options: tuple[tuple[str, Any], ...] = ()


FAMILIES: Mapping[str, Family] = {
    "clip": Family("projection", MODALITIES),
    "metaclip_2": Family("projection", MODALITIES),
    "siglip": Family("pooler", MODALITIES, class_token=False, attention_mask=False),
    "clip_vision_model": Family("pooler"),
    "siglip_vision_model": Family("pooler", class_token=False),
    "dinov2": Family("cls"),
    "dinov2_with_registers": Family("cls"),
    "dinov3_vit": Family("cls"),
    # Most ViT checkpoints have no pooler; without this option transformers would add one with random weights.
    "vit": Family("cls", options=(("add_pooling_layer", False),)),
}
