"""The AMD kernels: code objects compiled from csrc/hip when the package was built, launched through libamdhip64."""
