"""Tiny random encoders with processors and tokenizers, saved as checkpoints, for tests."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LAYER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {**LAYER, "image_size": 32, "patch_size": 8}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
TEXTS = ["a red circle", "a blue square on a green field", "two dogs are playing in the snow", "cat"]


def clip_tokenizer(limit: int | None = 16) -> transformers.CLIPTokenizer:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    options = {} if limit is None else {"model_max_length": limit}
    return transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges, **options)


def save_clip(folder: Path, limit: int | None = 16, positions: int = 16) -> Path:
    tokenizer = clip_tokenizer(limit)
    text = {
        **LAYER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=12)
    return _save(folder, transformers.CLIPModel(config), _processor("CLIP", center_crop=True), tokenizer)


def save_siglip(folder: Path) -> Path:
    tokenizer = clip_tokenizer()
    text = {**LAYER, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=IMAGE)
    return _save(folder, transformers.SiglipModel(config), _processor("Siglip"), tokenizer)


def save_dinov2(folder: Path) -> Path:
    # As in the published checkpoints, the positions are for larger images than the processor makes.
    config = transformers.Dinov2Config(**DINO, image_size=56)
    return _save(folder, transformers.Dinov2Model(config), _processor("Bit", center_crop=True))


def save_dinov2_with_registers(folder: Path) -> Path:
    config = transformers.Dinov2WithRegistersConfig(**DINO, image_size=56, num_register_tokens=3)
    return _save(folder, transformers.Dinov2WithRegistersModel(config), _processor("Bit", center_crop=True))


def save_vit(folder: Path) -> Path:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE))  # a head and no pooler
    return _save(folder, model, _processor("ViT"))


SAVERS = {
    "clip": save_clip,
    "siglip": save_siglip,
    "dinov2": save_dinov2,
    "dinov2_with_registers": save_dinov2_with_registers,
    "vit": save_vit,
}


def _processor(kind: str, center_crop: bool = False) -> transformers.BaseImageProcessor:
    square = {"height": 32, "width": 32}
    sizes = {"size": {"shortest_edge": 36}, "crop_size": square} if center_crop else {"size": square}
    return getattr(transformers, f"{kind}ImageProcessorPil")(**sizes)


def _save(folder: Path, model: torch.nn.Module, *parts: object) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the default initialisation leaves some at zero
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    for part in (model, *parts):
        part.save_pretrained(folder)
    return folder
