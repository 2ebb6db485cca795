"""Which errors tell a user what to change, and which are faults of this package and keep their traceback."""

import dis
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def is_users(error: BaseException) -> bool:
    """Return whether an error's message is for the user.

    It is, where the world outside is at fault: files, disks, networks, libraries that are not installed. The type of
    a ValueError does not tell: this package raises one with a sentence about an unusable value, but numpy, torch and
    Python itself raise one out of an operation that such a value should never have reached. So what counts is whether
    a `raise` statement of this package made it.
    """
    if isinstance(error, OSError | ImportError):
        return True
    return isinstance(error, ValueError | FloatingPointError) and raised_by_package(error)


def raised_by_package(error: BaseException) -> bool:
    """Return whether a `raise` statement in a file of this package made an error."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    # A call of C code, such as numpy's, has no frame of its own and leaves ours standing at the call.
    return (
        Path(code.co_filename).resolve().is_relative_to(PACKAGE)
        and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    )
