"""Put questions for objects to the codes of a finished `sparc demo`, the folder of which is the one argument."""

import argparse
import json
import sys
from pathlib import Path

import torch

from sparc_hf.codes.code_table import encode_features
from sparc_hf.codes.search import CodeSearch
from sparc_hf.demo.encoder_training.queries import DEPTH, QUERIES, precision_at_depth
from sparc_hf.demo.scenes import SPLITS, make_scene
from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.model.modeling_sparc import SparcModel


@torch.no_grad()
def code_queries(demo: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return precision at 5 of the same questions by single-stream codes of a finished `sparc demo`, for each stream.

    Args:
        demo: the output folder of `sparc demo`; its held-out scenes are searched.
    """
    model = SparcModel.from_pretrained(demo / "model").eval()
    features = FeatureDataset.load(demo / "features" / "test")
    seed = (features.source or {}).get("seed", 0)
    samples = [make_scene(index, seed) for index in SPLITS["test"][: len(features)]]
    search = CodeSearch(encode_features(model, features, encoding="single"))
    encoder = load_encoders([record for record in model.config.streams if record["modality"] == "text"])["clip_txt"]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for kind, queries in QUERIES.items():
        rows = encoder.rows(encoder.prepare([query.text for query in queries]))
        codes = model.encode({encoder.name: rows})[encoder.name].to_dense().numpy()
        for stream in model.config.stream_names:
            retrieved = [[match.row for match in search.search(stream, code, DEPTH)] for code in codes]
            figures.setdefault(kind, {})[stream] = precision_at_depth(retrieved, queries, samples)
    return figures


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description="Measure retrieval by the codes of a finished demo.")
    parser.add_argument("demo", type=Path, help="output folder of `sparc demo`")
    sys.stdout.write(json.dumps(code_queries(parser.parse_args().demo), indent=2) + "\n")


if __name__ == "__main__":
    main()
