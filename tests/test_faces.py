"""What users import: names of the package, and of the rooms that were modules once."""

import importlib
import importlib.resources

import pytest

import sparc_hf

ROOMS = ("codes", "encoders", "evaluation", "features", "hub", "maps", "training")


def test_every_name_of_the_package_is_there():
    for name in sparc_hf.__all__:
        assert getattr(sparc_hf, name) is not None
    assert set(sparc_hf.__all__) <= set(dir(sparc_hf))
    assert sparc_hf.FeatureDataset is importlib.import_module("sparc_hf.features").FeatureDataset


def test_what_type_checkers_are_told_is_what_is_there():
    """The imports for type checkers and the lazy table name the same things."""
    source = (importlib.resources.files("sparc_hf") / "__init__.py").read_text(encoding="utf-8")
    told = source[source.index("if TYPE_CHECKING:") : source.index("__all__")]
    for name in sparc_hf.__all__:
        if name != "__version__":
            module = getattr(sparc_hf, name).__module__
            assert f"from {module} import" in told, name


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_offer_their_main_names(room):
    module = importlib.import_module(f"sparc_hf.{room}")
    names = [name for name in dir(module) if not name.startswith("_") and name != "lazy_names"]
    assert names
    for name in names:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("name", ["sparc_hf", *(f"sparc_hf.{room}" for room in ROOMS)])
def test_unknown_names_are_attribute_errors(name):
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'SparkModel'"):
        _ = importlib.import_module(name).SparkModel
