"""Frozen encoders: what a stream's features come from, and how they are loaded."""

from sparc_hf.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "StreamEncoder": "stream_encoder",
        "check_encoders": "stream_encoder",
        "load_encoders": "stream_encoder",
    },
)
