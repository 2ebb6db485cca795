"""Publishing on the Hub: models, feature datasets, metrics and the Space, each as one commit of one folder."""

import ast
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparc_hf.codes.concepts import CONCEPTS_FILE
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.features.parquet import check_split_name, write_parquet_split
from sparc_hf.files.atomic_files import write_json
from sparc_hf.files.installed_folders import package_folder
from sparc_hf.hub.cards import config_of, write_dataset_card, write_model_card
from sparc_hf.model_folder import ORIGIN_FILE, RESULTS_FILE, SETTINGS_FILE, read_settings
from sparc_hf.version import __version__

METRICS = package_folder() / "metrics"
# What a model's repository gets of the folder of its run.
PUSHED_FILES = (
    "config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    CONCEPTS_FILE,
    RESULTS_FILE,
    SETTINGS_FILE,
    ORIGIN_FILE,
)
# Answers of a Hub that is busy, and seconds to wait before each further attempt.
BUSY = (408, 429, 500, 502, 503, 504)
PAUSES = (1, 4, 10)


def prepare_model(model: Path, folder: Path, *, repo: str, results: str | None = None) -> None:
    """Copy a model's files into a folder and write its card for `repo`; the weights keep their bytes.

    The code of `trust_remote_code` is this package's, whatever Python files lie beside the model.
    """
    from sparc_hf.evaluation.results import results_of_model

    config_of(model)
    if not list(model.glob("model*.safetensors")):
        raise ValueError(f"{model} holds no weights (no model*.safetensors)")
    own = model / RESULTS_FILE
    file = results or (own if own.is_file() else None)
    shown = None if file is None else results_of_model(file, model)
    for pattern in PUSHED_FILES:
        for file in model.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    settings = read_settings(folder)
    if settings is not None:
        # Where things lay on the trainer's machine is nobody's business.
        private = ("features", "eval_features", "output_dir")
        write_json(folder / SETTINGS_FILE, {name: value for name, value in settings.items() if name not in private})
    write_model_card(folder, results=shown, settings=settings, repo=repo)
    _add_code(folder)


def _add_code(folder: Path) -> None:
    """Write the files of `trust_remote_code`, and their names in config.json."""
    from transformers.dynamic_module_utils import custom_object_save

    from sparc_hf.model.configuration_sparc import SparcConfig
    from sparc_hf.model.modeling_sparc import SparcModel

    config: Any = SparcConfig.from_pretrained(folder)
    config.auto_map = None
    with torch.device("meta"):
        model = SparcModel(config)
    # Both ask for an instance: of a class they would note that it is a `type`.
    for instance in (model, config):
        custom_object_save(instance, folder, config=config)
    config.save_pretrained(folder)


def prepare_features(
    splits: dict[str, Path], folder: Path, *, repo: str | None = None, license: str | None = None
) -> None:
    """Write feature datasets as the splits of one Parquet dataset, with its card.

    Raises:
        ValueError: where the splits do not have the same streams, or as `FeatureDataset.load`.
    """
    for split in splits:
        check_split_name(split)
    loaded = {split: FeatureDataset.load(path) for split, path in splits.items()}
    first = next(iter(loaded.values()))
    for split, features in loaded.items():
        if features.streams != first.streams:
            raise ValueError(f"the splits of one dataset have the same streams, but those of `{split}` are others")
    for split, features in loaded.items():
        write_parquet_split(features, folder, split)
    write_dataset_card(folder, loaded, repo=repo, license=license)


def prepare_metric(name: str, folder: Path, *, repo: str) -> None:
    """Copy a metric as an evaluate module; evaluate finds it by the repository's name, which must be the metric's."""
    known = sorted(path.parent.name for path in METRICS.glob("*/*.py") if path.stem == path.parent.name)
    if name not in known:
        raise ValueError(f"there is no metric `{name}`; the metrics are {known}")
    if repo.rsplit("/", 1)[-1] != name:
        raise ValueError(f"evaluate finds a metric by its repository's name, so `{repo}` must end in `/{name}`")
    for file in (METRICS / name).glob("*.py"):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)
    title = name.replace("_", " ").capitalize()
    front = f"title: {title}\nsdk: gradio\napp_file: app.py\ntags:\n- evaluate\n- metric\nlicense: apache-2.0\n"
    use = f'```python\nimport evaluate\n\nmetric = evaluate.load("{repo}")\n```\n'
    text = f"---\n{front}---\n\n# {title}\n\n{_description_of(name)}\n\n{use}"
    (folder / "README.md").write_text(text, encoding="utf-8")
    imports = "import evaluate\nfrom evaluate.utils import launch_gradio_widget\n"
    app = f'{imports}\nlaunch_gradio_widget(evaluate.load("{repo}"))\n'
    (folder / "app.py").write_text(app, encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(_requirements_of(name)) + "\n", encoding="utf-8")


def _requirements_of(metric: str) -> list[str]:
    """Return what a metric's files import, as this package requires it."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (METRICS / metric).glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    modules = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    installed = packages_distributions()
    distributions = {canonicalize_name(installed[module][0]) for module in modules}
    known = {canonicalize_name(line.name): line for line in map(Requirement, requires("sparc-hf") or [])}
    return sorted(f"{name}{known[name].specifier}" for name in distributions)


def _description_of(metric: str) -> str:
    import importlib

    module = importlib.import_module(f"sparc_hf.metrics.{metric}.{metric}")
    return module._DESCRIPTION.strip()


def push_folder(
    folder: Path, repo: str, kind: str, *, private: bool = False, replaced: Sequence[str] | None = None
) -> str:
    """Upload a folder as one commit and return the commit's address.

    The Hub takes a commit whole or not at all: after an interruption the repository is as it was, and a second call
    completes it. Files of a former push that this one replaces (`replaced`) go with the same commit.

    Args:
        folder: what to upload.
        repo: `owner/name`; made where it is missing.
        kind: "model", "dataset" or "space".
        private: whether a new repository is private.
        replaced: patterns of files that go where they are not among the new ones.

    Raises:
        ValueError: in one sentence, where the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    check_login(repo)
    with _refusals(repo):
        api.create_repo(
            repo, repo_type=kind, private=private, exist_ok=True, space_sdk="gradio" if kind == "space" else None
        )
        for pause in (*PAUSES, None):
            try:
                commit = api.upload_folder(
                    folder_path=folder,
                    repo_id=repo,
                    repo_type=kind,
                    commit_message=f"Push with sparc_hf {__version__}",
                    delete_patterns=list(replaced or []),
                )
            except HfHubHTTPError as error:
                # The client tries uploads again by itself, but not the commit.
                if pause is None or error.response is None or error.response.status_code not in BUSY:
                    raise
                time.sleep(pause)
            else:
                return str(commit.commit_url)
    raise AssertionError("unreachable: the last attempt returns or raises")


def check_login(repo: str) -> None:
    """Ask the Hub who is there, before anything is prepared for it."""
    from huggingface_hub import HfApi

    with _refusals(repo):
        HfApi().whoami()


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # Whichever HTTP library this version of the client stands on.
    transport_errors: Any = tuple(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError("the Hub is switched off here (HF_HUB_OFFLINE is set); unset it to push") from error
    except LocalTokenNotFoundError as error:
        raise ValueError("there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            text = "the Hub does not accept the token; log in anew with `hf auth login`, or check HF_TOKEN"
        elif status in (403, 409):
            text = (
                f"the Hub does not let this token write to `{repo}`: the name belongs to somebody else, or the token "
                "may only read; choose a repository of your own and a token with the right to write"
            )
        else:
            text = f"the Hub answered {status} ({error}); nothing was changed, so push again later"
        raise ValueError(text) from error
    except (*transport_errors, OSError, RuntimeError) as error:
        # A failed upload is a RuntimeError whose cause says more.
        reason = f"{error} {error.__cause__}" if error.__cause__ else str(error)
        raise ValueError(f"cannot reach the Hub ({reason}); nothing was changed, so push again later") from error


def check_repository_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1:
        raise ValueError(f"`repo` must be `owner/name`, but it is {repo!r}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"`repo` is no name for a repository: {error}") from error
