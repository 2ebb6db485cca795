"""Codes of a whole dataset, and what is found in them: top samples, concepts, searches."""

from sparc_hf.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CodeTable": "code_table",
        "encode_features": "code_table",
    },
)
