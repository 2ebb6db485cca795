"""Stream records from what users write: strings of the command line, and records without widths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparc_hf.encoders.families import MODALITIES, POOLINGS
from sparc_hf.model.stream_record import StreamRecords, check_names_differ, check_stream_name, listed_records


def parse_streams(specifications: Sequence[str]) -> list[dict[str, Any]]:
    """Return stream records from strings `name=encoder[@revision]:modality[:pooling]`.

    Raises:
        ValueError: for a string of another form, a name that no stream may have, or one that occurs twice.
    """
    records = []
    for text in specifications:
        name, equals, rest = text.partition("=")
        parts = rest.rsplit(":", 2)
        pooling = parts.pop() if len(parts) == 3 and parts[1] in MODALITIES else None
        encoder, modality = ":".join(parts[:-1]), parts[-1]
        if not equals or not encoder or modality not in MODALITIES:
            raise ValueError(
                f"cannot read the stream {text!r}; write name=encoder[@revision]:modality[:pooling], for example "
                "dino=facebook/dinov2-base:image"
            )
        check_stream_name(name)
        if pooling not in (None, *POOLINGS):
            raise ValueError(f"the stream {text!r} has the pooling {pooling!r}; it must be one of {list(POOLINGS)}")
        record: dict[str, Any] = {"name": name, "encoder": encoder, "modality": modality}
        if "@" in encoder and not Path(encoder).is_dir():
            record["encoder"], _, record["revision"] = encoder.rpartition("@")
        records.append(record | ({"pooling": pooling} if pooling else {}))
    check_names_differ([record["name"] for record in records])
    return records


def completed_records(streams: StreamRecords | None, widths: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return stream records with the width of their columns filled in.

    Args:
        streams: records, perhaps without `hidden_size`, as a list or a dict name -> record; or None.
        widths: stream name -> width of its column.

    Raises:
        ValueError: if the names or a width disagree.
    """
    records = listed_records([{"name": name} for name in widths] if streams is None else streams)
    names = [record.get("name") for record in records]
    if set(names) != set(widths):
        raise ValueError(f"the stream records are for {names}, but the feature columns are {list(widths)}")
    for record in records:
        width = widths[record["name"]]
        if record.setdefault("hidden_size", width) != width:
            raise ValueError(
                f"stream `{record['name']}` has `hidden_size` {record['hidden_size']}, but its rows have {width}"
            )
    return records
