"""Features of several streams for the same samples: made, stored, read, and given out in batches."""

from sparc_hf.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FeatureBatches": "batches",
        "FeatureDataset": "dataset",
        "FeatureWriter": "writer",
        "StreamedBatches": "batches",
        "extract_features": "extraction",
    },
)
