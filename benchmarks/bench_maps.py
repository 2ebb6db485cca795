"""Time and memory of maps on one image.

python benchmarks/bench_maps.py                # two image streams of the embedded world's encoders, one concept
python benchmarks/bench_maps.py --large        # two random encoders of the size of ViT-L/14 at 224 pixels

Each repeats `explain_sample`'s maps (relevance, one latent) and reports the median; memory is the process's peak.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from sparc_hf import SparcConfig, SparcModel
from sparc_hf.demo.scenes import make_scene
from sparc_hf.encoders.stream_encoder import StreamEncoder, load_encoders
from sparc_hf.features.stream_records import parse_streams
from sparc_hf.maps.methods import MAP_METHODS
from sparc_hf.maps.patch_maps import image_maps
from sparc_hf.maps.targets import ConceptTarget

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


def large_encoders() -> dict[str, StreamEncoder]:
    encoders = {}
    for name in ("first", "second"):
        with tempfile.TemporaryDirectory() as folder:
            transformers.ViTModel(transformers.ViTConfig(**LARGE), add_pooling_layer=False).save_pretrained(folder)
            transformers.ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(folder)
            encoders[name] = StreamEncoder(name, str(Path(folder)), "image")
    return encoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--targets", type=int, default=1, help="latents a map is made of")
    parser.add_argument("--shifts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    streams = ("dino=demo:dino:image", "clip_img=demo:clip:image")
    encoders = large_encoders() if args.large else load_encoders(parse_streams(streams))
    picture = make_scene(0).image
    if args.large:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8))
    torch.manual_seed(0)
    model = SparcModel(SparcConfig(streams=[one.record for one in encoders.values()])).eval()
    targets = [ConceptTarget((number,)) for number in range(args.targets)]
    for method in MAP_METHODS:
        times = []
        for _ in range(args.repeats + 1):
            started = time.perf_counter()
            image_maps(model, encoders, [picture], targets, method, shifts=args.shifts)
            times.append(time.perf_counter() - started)
        print(f"{method:12} {statistics.median(times[1:]):.3f} s (first {times[0]:.3f} s)")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
