"""`python -m autorank_jax` is `autorank-jax`."""

from autorank_jax.cli.entry import entry

entry()
