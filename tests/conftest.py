"""Shared fixtures: tiny models, planted features and the reference data beside the repository."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

# Read when the libraries are imported: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

from sparc_hf import SparcConfig, SparcModel, optimizer, sparse_ops
from sparc_hf.features import FeatureDataset
from sparc_hf.step_kernel import load_step_kernel

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
WIDTHS = {"dino": 24, "clip_img": 16, "clip_txt": 12}


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers made by the two earlier projects."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the reference numbers (shared/golden beside the repository) are not here")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs, captions and features."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real data (shared/data beside the repository) are not here")
    return folder


def tiny_model(streams: int = 3, seed: int = 0, **settings) -> SparcModel:
    """A model of one to three (or five) small streams, in eval mode."""
    widths = dict(list((WIDTHS | {"siglip": 10, "vit": 14}).items())[:streams])
    torch.manual_seed(seed)
    settings = {"num_latents": 64, "k": 8, "auxk": 8, "dead_after_steps": 5} | settings
    model = SparcModel(SparcConfig(streams={name: {"hidden_size": d} for name, d in widths.items()}, **settings))
    # Biases away from zero, so that a term with the wrong bias shows.
    with torch.no_grad():
        for name in widths:
            model.pre_bias[name].normal_(std=0.1)
            model.encoders[name].bias.normal_(std=0.1)
    return model.eval()


def random_features(model: SparcModel, rows: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    """Feature rows for a model."""
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, width, generator=draws) for name, width in model.config.hidden_sizes.items()}


def planted_features(rows: int = 600, seed: int = 0, normalize: str = "l2") -> FeatureDataset:
    """Three streams that are linear views of the same sparse causes, with the causes as labels."""
    draws = np.random.default_rng(seed)
    causes = (draws.random((rows, 20)) < 0.15) * draws.uniform(0.5, 1.5, (rows, 20))
    causes[causes.sum(axis=1) == 0, 0] = 1.0
    arrays = {
        name: (causes @ draws.normal(size=(20, width)) + 0.05 * draws.normal(size=(rows, width))).astype(np.float32)
        for name, width in WIDTHS.items()
    }
    return FeatureDataset.from_arrays(
        arrays,
        streams={name: {"normalize": normalize} for name in WIDTHS},
        ids=[f"sample-{row}" for row in range(rows)],
        labels=(causes > 0).astype(np.uint8),
        label_names=[f"cause {number}" for number in range(20)],
    )


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory) -> Path:
    """A saved planted dataset of 600 rows."""
    folder = tmp_path_factory.mktemp("planted") / "features"
    planted_features().save(folder)
    return folder


@pytest.fixture(scope="session")
def space_cache(tmp_path_factory) -> Path:
    """The cache folder of `small_space`."""
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="session")
def small_space(space_cache):
    """A Space over a small demo, whose preparation takes seconds."""
    from space_demo import small_demo

    return small_demo(space_cache)


@pytest.fixture(scope="module")
def one_thread():
    """Run in one thread, as forked children need it; with more, some processors add in another order too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the commands that are run
        yield
    torch.set_num_threads(threads)


BROWSERS = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
BROWSER_OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"]
BROWSER_OPTIONS += [
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def lacking(what: str) -> None:
    """Skip a test for something that is missing on this machine, but fail where everything is to be tested."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true asks for every test")
    pytest.skip(what)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacking("the browser is driven by playwright, which is not installed")
    if CHROMIUM is None:
        lacking("there is no Chromium here; install it, or name it with CHROMIUM")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url):
    """Return what opens an address of the Space; afterwards nothing may have failed or left the machine."""
    contexts, failures = [], []

    def opened(address: str = "", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("dialog", lambda dialog: failures.append(dialog.message))
        page.on("response", lambda answer: failures.append(answer.url) if answer.status >= 400 else None)
        page.on(
            "request",
            lambda sent: failures.append(sent.url) if not sent.url.startswith((url, "data:", "blob:")) else None,
        )
        page.goto(url + address)
        page.wait_for_selector("#latents a")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert failures == []


@contextlib.contextmanager
def torch_operators_only() -> Iterator[None]:
    """Leave the compiled operators out, wherever they are loaded."""
    with (
        mock.patch.object(sparse_ops, "compiled_ops", return_value=None),
        mock.patch.object(optimizer, "compiled_ops", return_value=None),
    ):
        yield


@pytest.fixture(scope="module", params=["torch", "compiled"])
def step_kernel(request) -> Iterator[str]:
    """Run a test with torch's operators, then with the compiled ones, which are built where there is a compiler."""
    if request.param == "torch":
        with torch_operators_only():
            yield "torch"
    else:
        if not load_step_kernel():
            pytest.skip("the compiled step needs a C++ compiler and ninja")
        yield "compiled"
