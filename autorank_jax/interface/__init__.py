"""What the interface of every package needs: arguments checked from their annotations, names imported when asked for.

- `checked` around a public function tells a mistake of kind at once, in one line; `check_least`, `check_share`,
  `check_name` and their like tell what annotations do not say.
- `lazy.lazy` makes a package import its names when they are first asked for.

```python
from autorank_jax.interface import checked


@checked
def double(number: int) -> int:
    return 2 * number


try:
    double("5")
except TypeError as error:
    print(error)
```
"""

from typing import TYPE_CHECKING

from autorank_jax.interface.lazy import lazy

if TYPE_CHECKING:
    from autorank_jax.interface.arguments import (
        FOREIGN_FAILURES,
        check_counts,
        check_key,
        check_kind,
        check_least,
        check_name,
        check_one,
        check_share,
        check_values,
        checked,
        describe,
        first_line,
    )
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "FOREIGN_FAILURES",
    "check_counts",
    "check_key",
    "check_kind",
    "check_least",
    "check_name",
    "check_one",
    "check_share",
    "check_values",
    "checked",
    "describe",
    "first_line",
]
