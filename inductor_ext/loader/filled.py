"""Modules that are filled from a checkpoint's tensors, one by one, and give them back under the same names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Filled(nn.Module):
    """A module whose `state_dict()` has the files' tensors, of each expert by itself, such as "3.up_proj.qweight",
    where its own buffers hold those of all experts together.

    The buffers start on the meta device and are filled by `put`, then `settle`.
    """

    def declared(self) -> Iterator[tuple[str, Tensor]]:
        """The name of every tensor in the files, within this module, and a meta tensor of its shape and dtype."""
        raise NotImplementedError

    def put(self, name: str, stored: Tensor) -> None:
        """Takes in a tensor of the files, one of `declared` by name, shape and dtype."""
        raise NotImplementedError

    def get(self, name: str) -> Tensor:
        """A tensor of the files as it was put in. May share memory with the buffers."""
        raise NotImplementedError

    def settle(self) -> None:
        """To be called when everything was put in."""

    def faults(self) -> list[str]:
        """What is wrong with the values that were put in, as far as it can be told: a sentence each."""
        return []

    def _home(self) -> Tensor:
        """A buffer on the device of all of them."""
        raise NotImplementedError

    def _contradictions(self, name: str, stored: Tensor) -> list[str]:
        """What the values of a tensor of the files, that is no buffer's, say against the module."""
        return []

    # -- the state dict ------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, like in self.declared():
            destination[prefix + name] = like if self._home().is_meta else self.get(name)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        declared, wrong = dict(self.declared()), []
        given = {name: state_dict[prefix + name] for name in declared if prefix + name in state_dict}
        for name, tensor in given.items():
            like = declared[name]
            if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
                needed = f"{like.dtype} {list(like.shape)} is needed"
                wrong.append(f"{prefix}{name} is {tensor.dtype} {list(tensor.shape)}; {needed}.")
            else:
                wrong += [f"{prefix[:-1]} {fault}." for fault in self._contradictions(name, tensor)]
        if strict:
            missing += [prefix + name for name in declared if name not in given]
            ours = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
            unexpected += [prefix + name for name in ours if name not in declared and name.split(".")[0] != "act_fn"]
        errors += wrong
        if not wrong:
            for name, tensor in given.items():
                self.put(name, tensor.to(self._home().device))
            self.settle()
