"""Files and folders on the disk: read with a check, written whole or not at all, by one process at a time."""
