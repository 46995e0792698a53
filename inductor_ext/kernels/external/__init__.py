"""Other people's kernels, called where their package is installed and has the op. A binding is a kernel as any other
(see ``Kernel`` and ``MoeKernel``); the layouts are in ``inductor_ext/layouts``. None of these packages was at hand: the
tests call stand-ins with their signatures."""
