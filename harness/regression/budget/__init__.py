"""Facts that are known without a GPU (machine code of kernels, saved bytes, rows, start-up), against
budget.json."""
