"""The manual: guides whose blocks run, and a reference of every public name, built by Sphinx from the package itself.

`python -m autorank_jax.manual FOLDER` builds a static site (extra `docs`); with `--no-execute` the blocks are shown
but not run. The sources are the Markdown notebooks of this folder; the pages of the reference are written from the
docstrings of the rooms and their `__all__`.

- `build`: everything, into a folder. `sources`: how a folder of sources is laid out. `check_links`: of a built site.
- `reference`: the pages of the reference. `pages`: the guides as text, and the names that they show.
- `docstrings`: how docstrings in Markdown become what Sphinx reads.

```python
from autorank_jax.manual import code_blocks, guides

print(len(guides()) >= 10, len(code_blocks(guides()[0])) > 1)
```
"""

from autorank_jax.manual.pages import code_blocks, guides
from autorank_jax.manual.site import build, check_links, sources

__all__ = ["build", "check_links", "code_blocks", "guides", "sources"]
