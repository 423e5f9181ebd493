"""From rules to kernels: trace, derive, and write as bytecode, C or Triton."""
