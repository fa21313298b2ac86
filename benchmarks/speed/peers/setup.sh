#!/usr/bin/env bash
# Make the environments of the peers that rounds.py compares with, each with pinned versions, in DIR/NAME.
# Usage: setup.sh DIR [drjax] [fedjax] [pfl] [flower] [torch]      (default: all five; PYTHON picks the interpreter)
# `torch_vmap` runs in the environment `torch`. Sizes: 0.5 GB (drjax, fedjax) to 1.5 GB (flower) each.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd); shift
names=("$@"); [ ${#names[@]} -gt 0 ] || names=(drjax fedjax pfl flower torch)
torch=torch==2.13.0   # a CPU build will do; pip takes what its index offers for this platform
for name in "${names[@]}"; do
  case $name in
    drjax)  wanted=(drjax==0.2.1 jax==0.10.2) ;;
    fedjax) wanted=(fedjax==0.0.17 jax==0.10.2 dm-haiku==0.0.17) ;;
    pfl)    wanted=(pfl==0.6.0) ;;
    flower) wanted=("flwr[simulation]==1.41.0" ray==2.55.1) ;;
    torch)  wanted=(numpy) ;;
    *) echo "expected drjax, fedjax, pfl, flower or torch, got $name" >&2; exit 2 ;;
  esac
  "${PYTHON:-python3}" -m venv "$dir/$name"
  pip=("$dir/$name/bin/python" -m pip install --quiet)
  case $name in pfl|flower|torch) "${pip[@]}" "$torch" ;; esac   # first, so that nothing else picks a version
  "${pip[@]}" "${wanted[@]}"
  "$dir/$name/bin/python" -m pip list --format=freeze > "$dir/$name/versions.txt"
  echo "$name: $(grep -ciE '==' "$dir/$name/versions.txt") packages in $dir/$name"
done
