"""Where a concept lies in an image or a text, and the pictures that show it."""

from sparc_hf.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ConceptTarget": "targets",
        "SimilarityTarget": "targets",
        "explain_sample": "explanation",
        "image_maps": "patch_maps",
        "word_scores": "scored_words",
    },
)
