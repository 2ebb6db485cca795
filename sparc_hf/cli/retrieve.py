"""`sparc retrieve`: the samples whose codes are most like those of an image, a text, or another sample."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparc_hf.cli.parser import trust_remote_code_flag
from sparc_hf.codes.code_table import check_streams, encode_features
from sparc_hf.codes.concepts import concept_names
from sparc_hf.codes.encoding import sample_code
from sparc_hf.codes.search import CodeSearch, Match
from sparc_hf.encoders.inputs import open_image, size_of_file
from sparc_hf.encoders.stream_encoder import load_encoders
from sparc_hf.features.dataset import FeatureDataset
from sparc_hf.model.modeling_sparc import SparcModel


@dataclass
class RetrieveArguments:
    """Flags of `sparc retrieve`."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    features: str = field(metadata={"help": "Feature dataset to search."})
    text: str | None = field(default=None, metadata={"help": "The query, a text."})
    image: str | None = field(default=None, metadata={"help": "The query, an image file."})
    row: int | None = field(default=None, metadata={"help": "The query, a row of the dataset."})
    source: str | None = field(
        default=None, metadata={"help": "Stream that encodes the query (default: the first that can)."}
    )
    target: list[str] = field(default_factory=list, metadata={"help": "Streams to search (default: all)."})
    count: int = field(default=10, metadata={"help": "Most samples to find in a stream."})
    shared: int = field(default=3, metadata={"help": "Concepts to tell of each match, those that bring it most."})
    batch_size: int = field(default=1024, metadata={"help": "Rows at a time."})
    no_verify: bool = field(default=False, metadata={"help": "Do not compare features with their checksums."})
    trust_remote_code: bool = trust_remote_code_flag()


def run_retrieve(args: RetrieveArguments) -> dict[str, Any]:
    """Search a dataset by single-stream codes.

    Returns:
        "source", and "matches": stream -> the most similar samples first, each {"row", "id", "text", "similarity",
        "shared"}; `id` and `text` where the dataset has them.

    Raises:
        ValueError: for none or several queries, unknown streams or rows, or a query no stream can encode.
    """
    if args.shared < 0 or args.batch_size < 1:
        raise ValueError(
            f"`shared` must not be negative and `batch_size` at least 1, but they are {args.shared} and "
            f"{args.batch_size}"
        )
    given = {name: value for name in ("text", "image", "row") if (value := getattr(args, name)) is not None}
    if len(given) != 1 or args.count < 1:
        raise ValueError(
            f"give one of `text`, `image` and `row`, and a `count` of 1 or more, but got {given or 'none'}"
        )
    if args.image is not None:
        size_of_file(args.image)
    model = SparcModel.from_pretrained(args.model).eval()
    streams = model.config.stream_names
    if unknown := [name for name in [*args.target, *filter(None, [args.source])] if name not in streams]:
        raise ValueError(f"there are no streams {unknown}; this model has {streams}")
    record = None if args.row is not None else _encoding_stream(args, model)
    features = FeatureDataset.load(args.features, verify=not args.no_verify)
    check_streams(model, features)
    if args.row is not None and not 0 <= args.row < len(features):
        raise ValueError(f"the samples are numbered from 0 to {len(features) - 1}, and {args.row} is none of them")
    source = args.source or streams[0] if record is None else record["name"]
    if args.row is not None and not features.present(source, [args.row])[0]:
        raise ValueError(
            f"{features.row_name(args.row)} lacks the stream `{source}`; give another row, or another `source`"
        )
    # The query first: encoding the dataset takes longest.
    encoded = None if record is None else _encoded(args, model, record)
    index = CodeSearch(encode_features(model, features, encoding="single", batch_size=args.batch_size))
    query = index.query(source, args.row or 0) if encoded is None else encoded
    names = concept_names(model)
    ids, texts = features.ids, features.text

    def facts(match: Match) -> dict[str, Any]:
        about = {"id": None if ids is None else ids[match.row], "text": None if texts is None else texts[match.row]}
        shared = [
            {"latent": latent, "name": names.get(latent), "share": round(share, 4)}
            for latent, share in match.shared[: args.shared]
        ]
        known = {key: value for key, value in about.items() if value is not None}
        return {"row": match.row, **known, "similarity": round(match.similarity, 5), "shared": shared}

    return {
        "source": source,
        "matches": {
            # In its own stream the query would find itself first.
            stream: [
                facts(match)
                for match in index.search(stream, query, args.count, without=args.row if stream == source else None)
            ]
            for stream in args.target or streams
        },
    }


def _encoding_stream(args: RetrieveArguments, model: SparcModel) -> dict[str, Any]:
    """Return the record of the stream that encodes the query."""
    modality = "text" if args.text is not None else "image"
    able = [record for record in model.config.streams or [] if record.get("modality") == modality]
    records = [record for record in able if args.source in (None, record["name"])]
    if not records:
        raise ValueError(
            f"no stream {args.source or ''} of this model encodes {modality}; those that do are "
            f"{[record['name'] for record in able]}"
        )
    return records[0]


def _encoded(args: RetrieveArguments, model: SparcModel, record: dict[str, Any]) -> np.ndarray:
    """Return the code [N] of an image or a text; of patch tokens the largest values."""
    encoder = load_encoders([record], trust_remote_code=args.trust_remote_code)[record["name"]]
    sample: Any = args.text if args.image is None else open_image(args.image)
    return sample_code(model, encoder, sample).numpy()
