"""What models are measured by, and the report of it."""

from sparc_hf.lazy_names import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "EvaluationSettings": "suite",
        "evaluate_model": "suite",
        "evaluate_models": "suite",
        "write_report": "report",
    },
)
