"""Custom ops in ``torch.ops.w4a16``. Importing this package registers them; every op file reads schema, fake,
implementation, autograd."""

from inductor_ext.ops.linear import linear

__all__ = ["linear"]
