"""Lists every config key with its default and its meaning: `python -m dsr_jax.config [WORD ...]`.

A config file names the keys that differ from these defaults; `configs/x.py:key=value,key` passes
its own short arguments, joined by commas, and `--config.KEY=VALUE` behind it sets any key:

    python -m dsr_jax.train --config=configs/digits.py:runlocal --config.optim.lr=1e-3 --workdir=x

The last column says what a run that continues does with a change: "free" takes it, "ask" takes it
with --allow-change KEY, "never" refuses it.
"""

from collections.abc import Sequence

from dsr_jax.config.loading import RENAMED
from dsr_jax.config.schema import SCHEMA
from dsr_jax.core.cli import make_parser, run_main
from dsr_jax.core.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's)."""
    parser = make_parser(__doc__, "python -m dsr_jax.config")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only keys that contain a word")
    print(format_keys(parser.parse_args(argv).words))


def format_keys(words: Sequence[str] = ()) -> str:
    """Returns the table of keys as text.

    Args:
      words: Only keys whose name or meaning contains one of these; none for all.

    Raises:
      ConfigError: If no key does.
    """
    names = [
        name
        for name, key in SCHEMA.items()
        if not words or any(word.lower() in f"{name} {key.meaning}".lower() for word in words)
    ]
    if not names:
        raise ConfigError(f"no key contains {' or '.join(words)}", "leave the words out for all")
    width = max(map(len, names))
    defaults = [repr(SCHEMA[name].default) for name in names]
    default_width = max(map(len, defaults))
    lines = [
        f"{name:<{width}}  {default:<{default_width}}  {SCHEMA[name].meaning} "
        f"[{SCHEMA[name].change.value}]"
        for name, default in zip(names, defaults, strict=True)
    ]
    lines += [f"{old}: now {new}" for old, new in RENAMED.items() if not words]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
