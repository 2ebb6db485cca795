"""What the demo encoders see: `python -m sparc_hf.demo.encoder_training.measure`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from sparc_hf.demo import ENCODERS_PATH
from sparc_hf.demo.encoder_training.dino import DinoRecipe, build_dino
from sparc_hf.demo.encoder_training.queries import DEPTH, QUERIES, precision_at_depth, precision_by_chance
from sparc_hf.demo.scenes import SPLITS, Scene, make_scene
from sparc_hf.demo.taxonomy import SHAPES

NEIGHBOURS = 20


@torch.no_grad()
def clip_retrieval(folder: Path, scenes: int = 1000) -> dict[str, float]:
    """Return image-to-text and text-to-image recall over held-out scenes and their first captions.

    A tie with the own caption is a miss, so scenes that share a caption word for word can never hit; `ceiling` is the
    share of the others.
    """
    samples = [make_scene(index) for index in SPLITS["test"][:scenes]]
    captions = [scene.captions[0] for scene in samples]
    similarity = _clip_images(folder, samples) @ _clip_texts(folder, captions).T
    own = similarity.diagonal()
    figures = {"ceiling": sum(captions.count(caption) == 1 for caption in captions) / scenes}
    for name, rows in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        ranks = (rows >= own[:, None]).sum(dim=1)
        figures |= {f"{name}_r_at_{depth}": (ranks <= depth).float().mean().item() for depth in (1, 5)}
    return figures


def clip_queries(folder: Path, scenes: int = 1000) -> dict[str, dict[str, dict[str, float]]]:
    """Return precision at 5 of questions for objects over held-out scenes by CLIP's embeddings, and by chance."""
    samples = [make_scene(index) for index in SPLITS["test"][:scenes]]
    images = _clip_images(folder, samples)
    figures = {}
    for kind, queries in QUERIES.items():
        texts = _clip_texts(folder, [query.text for query in queries])
        retrieved = (texts @ images.T).topk(DEPTH, dim=1).indices.tolist()
        figures[kind] = {
            "embeddings": precision_at_depth(retrieved, queries, samples),
            "chance": precision_by_chance(queries, samples),
        }
    return figures


@torch.no_grad()
def shape_neighbours(folder: Path, bank: int = 3000, queries: int = 1000) -> dict[str, float]:
    """Return the k-NN shape accuracy (k 20, cosine) of the vision-only CLS token on scenes with one object.

    The bank comes from the "train" scenes, the queries from the held-out ones. Beside it stand the most frequent
    shape, raw pixels, and the same architecture with fresh weights.
    """
    known, asked = _single_objects("train", bank), _single_objects("test", queries)
    shapes = [torch.tensor([scene.objects[0].shape for scene in scenes]) for scenes in (known, asked)]
    torch.manual_seed(0)
    models = {
        "encoder": AutoModel.from_pretrained(folder, dtype=torch.float32),
        "untrained": build_dino(DinoRecipe()).eval(),
    }

    def accuracy(features: Callable[[list[Scene]], Tensor]) -> float:
        rows, others = F.normalize(features(asked), dim=1), F.normalize(features(known), dim=1)
        nearest = (rows @ others.T).topk(NEIGHBOURS, dim=1)
        votes = torch.zeros(len(rows), len(SHAPES))
        votes.scatter_add_(1, shapes[0][nearest.indices], nearest.values)
        return (votes.argmax(dim=1) == shapes[1]).float().mean().item()

    def pixels(scenes: list[Scene]) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes])).flatten(1).float() - 128

    figures = {"most_frequent": (shapes[1].bincount().max() / len(asked)).item(), "pixels": accuracy(pixels)}
    for name, model in models.items():
        figures[name] = accuracy(
            lambda scenes, model=model: _encode(
                folder, [scene.image for scene in scenes], lambda x: model(x).last_hidden_state[:, 0]
            )
        )
    return figures


def _single_objects(split: str, count: int) -> list[Scene]:
    single: list[Scene] = []
    for index in SPLITS[split]:
        scene = make_scene(index)
        single += [scene] if len(scene.objects) == 1 else []
        if len(single) == count:
            return single
    raise ValueError(f"the split `{split}` has fewer than {count} scenes with one object")


@torch.no_grad()
def _encode(folder: Path, images: list[Any], pooled: Callable[[Tensor], Tensor], batch: int = 250) -> Tensor:
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return torch.cat([pooled(block) for block in pixels.split(batch)])


def _clip_images(folder: Path, scenes: list[Scene]) -> Tensor:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    images = [scene.image for scene in scenes]
    return F.normalize(_encode(folder, images, lambda x: model.get_image_features(x).pooler_output), dim=1)


@torch.no_grad()
def _clip_texts(folder: Path, texts: list[str]) -> Tensor:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    return F.normalize(model.get_text_features(**tokens).pooler_output, dim=1)


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description="Measure the demo encoders on held-out scenes.")
    parser.add_argument("--encoders", type=Path, default=ENCODERS_PATH, help="folder with `clip/` and `dino/`")
    args = parser.parse_args()
    clip, dino = args.encoders / "clip", args.encoders / "dino"
    figures = {"clip": clip_retrieval(clip), "queries": clip_queries(clip), "dino_shapes": shape_neighbours(dino)}
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
