"""`sparc card`: write the model card of a saved model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class CardArguments:
    """Flags of `sparc card`."""

    model: str = field(metadata={"help": "Folder of the model; its README.md is replaced."})
    results: str | None = field(default=None, metadata={"help": "results.json written by `sparc evaluate --output`."})
    repo: str | None = field(default=None, metadata={"help": "Hub id readers will load it from."})


def run_card(args: Any) -> dict[str, Any]:
    from sparc_hf.evaluation.results import results_of_model
    from sparc_hf.hub.cards import write_model_card
    from sparc_hf.model_folder import read_settings

    results = results_of_model(args.results, args.model) if args.results else None
    settings = read_settings(Path(args.model))
    return {"card": str(write_model_card(args.model, results=results, settings=settings, repo=args.repo))}
