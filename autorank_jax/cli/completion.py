"""Scripts that complete commands and options in a shell."""

from collections.abc import Mapping

from autorank_jax.cli.fields import Option, options_of
from autorank_jax.cli.options import COMMANDS, PROGRAM

SHELLS = ("bash", "zsh", "fish", "tcsh")
_BASH = """_autorank_jax() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}"
  [ "$command" = data ] && [ "${{COMP_WORDS[2]}}" = fetch ] && command="data fetch"
  local known
  if [ "$COMP_CWORD" = 1 ]; then known="{commands}"
  else case "$command" in
{cases}
  esac; fi
  COMPREPLY=($(compgen -W "$known" -- "$word"))
}}
complete -o default -F _autorank_jax {program}"""


def completion(shell: str) -> str:
    """Return the script for a shell out of `SHELLS`."""
    flags = {name: [option.flag for option in _flags(name).values()] for name in COMMANDS}
    first = " ".join([*dict.fromkeys(name.partition(" ")[0] for name in COMMANDS), "completion"])
    flags["data"] = ["list", "fetch"]
    if shell == "fish":
        lines = [f"complete -c {PROGRAM} -n __fish_use_subcommand -f -a '{first}'"]
        lines.append(f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from data' -f -a 'list fetch'")
        for name in COMMANDS:
            seen = f"-n '__fish_seen_subcommand_from {name.split()[-1]}'"
            lines += [f"complete -c {PROGRAM} {seen} -l {o.flag[2:]}{_takes(o)}" for o in _flags(name).values()]
        return "\n".join(lines)
    if shell == "tcsh":
        words = " ".join(dict.fromkeys(word for found in flags.values() for word in found if word.startswith("--")))
        options = " ".join(word.removeprefix("--") for word in words.split())
        return f"complete {PROGRAM} 'p/1/({first})/' 'n/data/(list fetch)/' 'c/--/({options})/'"
    cases = "\n".join(f'    "{name}") known="{" ".join([*found, "--help"])}";;' for name, found in flags.items())
    script = _BASH.format(commands=first, cases=cases, program=PROGRAM)
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script


def _flags(name: str) -> Mapping[str, Option]:
    return {key: option for key, option in options_of(COMMANDS[name]).items() if not option.bare}


def _takes(option: Option) -> str:
    return "" if option.kind is bool else " -r"
