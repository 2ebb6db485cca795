"""`sparc space`: serve the Space."""

import os
from dataclasses import dataclass, field
from typing import Any

from sparc_hf.cli.guards import check_address


@dataclass
class SpaceArguments:
    """Flags of `sparc space`; those left out are taken from the environment variables of the Space."""

    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the model (default: SPARC_MODEL, or the demo, prepared once)."},
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "Feature dataset the model is shown on, with images, texts and labels: folder or Hub id; rows "
            "that lack a stream of the model are left out (default: SPARC_DATASET, or the demo's held-out scenes)."
        },
    )
    cache: str | None = field(
        default=None,
        metadata={"help": "Folder for what is computed once (default: SPARC_CACHE, or ~/.cache/sparc_hf)."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 lets other machines in."})
    port: int | None = field(default=None, metadata={"help": "Port (default: the first free one from 7860)."})


def run_space(args: Any) -> None:
    import importlib.util

    from sparc_hf.files.installed_folders import space_folder
    from sparc_hf.space.data import open_space

    if importlib.util.find_spec("gradio") is None:
        raise ImportError('the Space needs gradio: pip install "sparc-hf[space]"')
    check_address(args.host, args.port)
    model = args.model or os.environ.get("SPARC_MODEL") or None
    # A model of one's own is not shown on the dataset that the environment has for another one.
    features = args.features or (None if args.model else os.environ.get("SPARC_DATASET")) or None
    data = open_space(model, features, args.cache)
    spec = importlib.util.spec_from_file_location("sparc_space_app", space_folder() / "app.py")
    assert spec is not None
    assert spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    app.launch(data, host=args.host, port=args.port)
