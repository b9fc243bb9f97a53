"""For developers: measures launch layouts of kernels on a GPU and prints the best of them."""
