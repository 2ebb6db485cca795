"""Train both demo encoders: `python -m sparc_hf.demo.encoder_training.train --output FOLDER`.

The shipped ones, `sparc_hf/demo/encoders/`, are what this makes with its defaults. It takes about half an hour
on two CPU cores and uses a GPU where there is one. CLIP's image tower starts from the vision-only encoder as it was
saved, so that one is trained first; `--only clip` takes it from the output folder.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import Dinov2WithRegistersModel

from sparc_hf.demo.encoder_training.clip import train_clip
from sparc_hf.demo.encoder_training.dino import train_dino
from sparc_hf.demo.encoder_training.steps import save_encoder
from sparc_hf.demo.raster import IMAGE_SIZE
from sparc_hf.demo.scenes import SPLITS, make_scene

logger = logging.getLogger(__name__)

SCENES = 30_000


def draw_scenes(split: str, scenes: int) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Return images, uint8 [scenes, 64, 64, 3], and the captions of the first scenes of a split."""
    images = np.empty((scenes, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    captions = []
    for row, index in enumerate(tqdm(SPLITS[split][:scenes], desc=f"drawing {split} scenes", unit="scene")):
        scene = make_scene(index)
        images[row] = np.asarray(scene.image)
        captions.append(scene.captions)
    return images, captions


def main() -> None:
    """Parse the flags, draw the scenes, train and save."""
    parser = argparse.ArgumentParser(description="Train the demo encoders.")
    parser.add_argument("--output", type=Path, required=True, help="folder for `clip/` and `dino/`")
    parser.add_argument("--only", choices=("clip", "dino"), help="train one of them")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"training scenes (default {SCENES})")
    args = parser.parse_args()
    clip, dino = args.output / "clip", args.output / "dino"
    if args.only == "clip" and not dino.is_dir():
        parser.error(f"CLIP's image tower starts from the vision-only encoder, but there is no {dino}; train it first")
    logging.basicConfig(level=logging.INFO)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, captions = draw_scenes("encoders", args.scenes)
    if args.only != "clip":
        save_encoder(*train_dino(images, device=device), dino)
    if args.only != "dino":
        image_tower = Dinov2WithRegistersModel.from_pretrained(dino, dtype=torch.float32)
        save_encoder(*train_clip(images, captions, image_tower, device=device), clip)
    logger.info("saved in %s", args.output)


if __name__ == "__main__":
    main()
