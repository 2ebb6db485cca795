"""Cards, and publishing on the Hub."""

from sparc_hf.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "write_dataset_card": "cards",
        "write_model_card": "cards",
    },
)
