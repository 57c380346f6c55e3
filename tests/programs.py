"""Compiler settings for tests, which mostly compile programs that run for milliseconds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def quick_programs(cache: Path) -> Iterator[None]:
    """Compiles without XLA's costly passes, and a program that `cache` holds not again."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: jax.config.values[name] for name in settings}

    def use(values: dict[str, object]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        # JAX decides at its first compilation whether there is a cache.
        compilation_cache.reset_cache()

    use(settings)
    try:
        yield
    finally:
        use(before)
