"""sparc_hf: one sparse concept space for many frozen vision and language encoders (SPARC, arXiv 2507.06265)."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_hf.version import __version__

if TYPE_CHECKING:
    from sparc_hf.configuration_sparc import SparcConfig
    from sparc_hf.modeling_sparc import SparcModel, SparcOutput, SparseCodes

__all__ = ["SparcConfig", "SparcModel", "SparcOutput", "SparseCodes", "__version__"]

_MODULE_OF = {
    "SparcConfig": "sparc_hf.configuration_sparc",
    "SparcModel": "sparc_hf.modeling_sparc",
    "SparcOutput": "sparc_hf.modeling_sparc",
    "SparseCodes": "sparc_hf.modeling_sparc",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_OF[name]), name)


def _register_auto_classes() -> None:
    from transformers import AutoConfig, AutoModel

    from sparc_hf.configuration_sparc import SparcConfig
    from sparc_hf.modeling_sparc import SparcModel

    AutoConfig.register(SparcConfig.model_type, SparcConfig)
    AutoModel.register(SparcConfig, SparcModel)


# The `sparc` command answers --help before torch could be imported; its commands import the model when they run.
if Path(sys.argv[0] if sys.argv else "").stem != "sparc":
    _register_auto_classes()
