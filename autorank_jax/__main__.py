"""`python -m autorank_jax` is `autorank-jax`."""

import sys

from autorank_jax.cli import main

sys.exit(main())
