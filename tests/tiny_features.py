"""A small feature dataset with every kind of column, for tests."""

import numpy as np

from sparc_hf.features.dataset import FeatureDataset

WIDTHS = {"zeta": 6, "alpha": 4}  # not in alphabetical order, which must survive
RECORDS = [
    {"name": "zeta", "hidden_size": 6, "normalize": "l2", "encoder": "some/encoder"},
    {"name": "alpha", "hidden_size": 4, "normalize": "standardize", "mean": 0.5, "std": 2.0},
]


def arrays(rows: int = 25, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((rows, width)).astype(dtype) for name, width in WIDTHS.items()}


def features(rows: int = 25, dtype: str = "float32") -> FeatureDataset:
    return FeatureDataset.from_arrays(
        arrays(rows, dtype),
        streams=RECORDS,
        ids=[f"id{i}" for i in range(rows)],
        text=[f"text {i}" for i in range(rows)],
        labels=[[i % 3, 2] if i % 2 else [] for i in range(rows)],
        label_names=["a", "b", "c"],
        taxonomy={"LabelName": "/m/0", "Subcategory": [{"LabelName": "a"}]},
        source={"made": "by a test"},
    )


def assert_same(left: FeatureDataset, right: FeatureDataset) -> None:
    assert left.streams == right.streams
    for name in left.stream_names:
        np.testing.assert_array_equal(left.array(name), right.array(name))
    for attribute in ("ids", "text", "label_names", "taxonomy", "source", "column_names"):
        assert getattr(left, attribute) == getattr(right, attribute)
