"""A command without JAX that appends numbers to a file: `worker.py FOLDER [--careless]`.

The careful one continues after the last whole line; the careless one begins its count again.
"""

import sys
import time
from pathlib import Path

TOTAL = 30


def main() -> None:
    """Appends the numbers that are missing."""
    path = Path(sys.argv[1]) / "numbers.txt"
    careless = "--careless" in sys.argv
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    valid = [line for i, line in enumerate(whole) if line == str(i)]
    if not careless:
        path.write_text("".join(f"{line}\n" for line in valid))
    with path.open("a") as file:
        for number in range(0 if careless else len(valid), TOTAL):
            file.write(f"{number}\n")
            file.flush()
            (path.parent / f"{number}.done").touch()
            time.sleep(0.01)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"cannot write: {error}")
