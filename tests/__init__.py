"""Tests, in the folders of what they test."""

import jaxlib

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""XLA's options for compilation that is quick."""

if jaxlib.__version__.startswith("0.10."):  # XLA ends the process at an option that it does not know
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # half of the time that compilation takes
    QUICK += " --xla_cpu_parallel_codegen_split_count=1"  # a sixth of the rest
