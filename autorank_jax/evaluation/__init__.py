"""What was learnt, and what it cost.

`make_evaluate` tests the server's model after a round; `class_accuracy` by class; `label_weighted_accuracy` predicts every
client's accuracy from its label mix; `personal_scores` measures clients on examples of their own, before and after local
training. `make_evaluate_language` and `client_perplexities` are for language models, `continue_text` lets one speak. `privacy` accounts for the noise of private rounds. `client_costs` counts parameters, bytes in either direction and FLOPs of every client.

```python
import autorank_jax as ar
from flax import nnx

images = ar.load_dataset("synthetic")
features = images.x_train[0].size
task = ar.task_from_nnx(ar.models.MLP((features, 8, images.classes), rngs=nnx.Rngs(0)), max_rank=4)
ranks = ar.ranks_from_ratios([0.5, 1.0], ar.max_ranks(task.server.trainable))
state = ar.init_state(task.server, ar.aggregators.rbla(), ranks)
print(sorted(ar.make_evaluate(task, images.x_test, images.y_test)(state)))
```
"""  # noqa: E501

from typing import TYPE_CHECKING

from autorank_jax.interface.lazy import lazy

if TYPE_CHECKING:
    from autorank_jax.evaluation import privacy
    from autorank_jax.evaluation.costs import client_costs
    from autorank_jax.evaluation.language import (
        client_perplexities,
        continue_text,
        language_flops,
        make_evaluate_language,
    )
    from autorank_jax.evaluation.metrics import (
        class_accuracy,
        classification_metrics,
        label_weighted_accuracy,
        make_evaluate,
        regression_metrics,
        summarize_clients,
    )
    from autorank_jax.evaluation.personal import PersonalScores, personal_scores, with_personal_scores
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = [
    "PersonalScores",
    "class_accuracy",
    "classification_metrics",
    "client_costs",
    "client_perplexities",
    "continue_text",
    "label_weighted_accuracy",
    "language_flops",
    "make_evaluate",
    "make_evaluate_language",
    "personal_scores",
    "privacy",
    "regression_metrics",
    "summarize_clients",
    "with_personal_scores",
]
