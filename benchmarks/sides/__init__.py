"""One file per side: how one library does the work that a benchmark measures."""
