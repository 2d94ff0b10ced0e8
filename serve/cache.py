"""Shows the cache of compiled executables, or clears it.

    python serve/cache.py
    python serve/cache.py --clear

The same as `superserve cache`. superserve_jax/commands/cache.py holds the workflow, and explains it.
"""

from superserve_jax import cli
from superserve_jax.commands.cache import main

if __name__ == "__main__":
    cli.run(main)
