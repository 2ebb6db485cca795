"""How much a packed file says it holds, against the bytes it has: a few of them can claim terabytes."""

# Features are noise to a packer; what shrinks further than this was never measured on anything.
MOST_SHRUNK = 100
# Smaller things do no harm, however they shrank.
HARMLESS_BYTES = 1 << 28


def check_declared(declared: int, stored: int, name: str) -> None:
    """Raise ValueError where something unpacks to far more bytes than data shrink to.

    Args:
        declared: bytes it says it holds.
        stored: bytes it takes in its file.
        name: what the error calls it.
    """
    if declared > HARMLESS_BYTES and declared > MOST_SHRUNK * stored:
        raise ValueError(
            f"{name} says that it holds {declared / 1e9:,.1f} GB but takes {stored:,} bytes of its file; it was never "
            "written, or it is a packing bomb"
        )
