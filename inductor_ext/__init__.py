"""int4 weights for torch.compile: `torch.compile(model, backend="w4a16")`.

Everything here is imported on first use, so that `import inductor_ext` costs nothing and needs no transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from inductor_ext._version import __version__

if TYPE_CHECKING:
    from inductor_ext.convert import convert_
    from inductor_ext.explained import explain, explain_for
    from inductor_ext.loader import from_pretrained
    from inductor_ext.prepack import prepack_
    from inductor_ext.weights import invalidate

__all__ = ["__version__", "convert_", "explain", "explain_for", "from_pretrained", "invalidate", "prepack_"]

_HOME = {
    "convert_": "inductor_ext.convert",
    "explain": "inductor_ext.explained",
    "explain_for": "inductor_ext.explained",
    "from_pretrained": "inductor_ext.loader",
    "invalidate": "inductor_ext.weights",
    "prepack_": "inductor_ext.prepack",
}

if not TYPE_CHECKING:  # a checker that saw this would take every misspelt name for one of ours

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'inductor_ext' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(import_module(_HOME[name]), name)

    def __dir__():
        return sorted({*globals(), *__all__})
