"""The command line `autorank-jax`: `run` compares rank policies, `ranks` scores tables, `data` fetches datasets.

`finetune` trains a language model by many clients, from its folder to adapters (`finetuning`).

`entry` hears Ctrl-C first, `main` turns mistakes into lines and exit codes, `parsing` words into a command of
`options`, and `dispatch` loads what does it: `running`, `finetuning`, `scoring` or `comparing`. `live` shows a run
while it goes on, `tables` and `figures` show what it found on whatever `terminal` there is, `folders`, `formats` and
`files` keep what it leaves, `interrupts` lets it be stopped. All work is done by `autorank_jax.experiment` and below,
which print nothing.

```python
from autorank_jax.cli.main import main

print(main(["data"]))  # the exit code: 0, 2 for a mistake of the user, 3 for a run that diverged
```

"""
