"""sparc_hf: one sparse concept space for many frozen vision and language encoders (SPARC, arXiv 2507.06265)."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_hf.version import __version__

if TYPE_CHECKING:
    from sparc_hf.model.configuration_sparc import SparcConfig
    from sparc_hf.features.dataset import FeatureBatches, FeatureDataset
    from sparc_hf.model.modeling_sparc import SparcModel, SparcOutput, SparseCodes
    from sparc_hf.pipeline import SparcPipeline

__all__ = [
    "FeatureBatches",
    "FeatureDataset",
    "SparcConfig",
    "SparcModel",
    "SparcOutput",
    "SparcPipeline",
    "SparseCodes",
    "__version__",
]

_MODULE_OF = {
    "FeatureBatches": "features",
    "FeatureDataset": "features",
    "SparcConfig": "configuration_sparc",
    "SparcModel": "modeling_sparc",
    "SparcOutput": "modeling_sparc",
    "SparcPipeline": "pipeline",
    "SparseCodes": "modeling_sparc",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def _register_auto_classes() -> None:
    """Make AutoConfig and AutoModel know this package's classes, importing the model's module at its first use."""
    from transformers import AutoConfig, AutoModel

    from sparc_hf.model.configuration_sparc import SparcConfig

    class ForwardToSparcModel(type):
        """Looks everything up on SparcModel; its module takes a second to import, which most scripts never need."""

        def __getattr__(cls, name: str) -> Any:
            return getattr(import_module("sparc_hf.model.modeling_sparc").SparcModel, name)

    stand_in = ForwardToSparcModel("SparcModel", (), {"config_class": SparcConfig})
    AutoConfig.register(SparcConfig.model_type, SparcConfig)
    AutoModel.register(SparcConfig, stand_in)  # pyright: ignore[reportArgumentType]


# The `sparc` command answers --help before torch could be imported; its commands import the model when they run.
if Path(sys.argv[0] if sys.argv else "").name not in ("sparc", "sparc.exe"):
    _register_auto_classes()
