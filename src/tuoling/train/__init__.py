"""The run: plan, loop, checkpoints.

The package has the name of the verb: `tuoling.train(...)` trains (see `tuoling.train.entry`), and importing a
submodule must not take the function away. So the package itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **keys: Any) -> Any:
        from tuoling.train.entry import train

        return train(*args, **keys)


sys.modules[__name__].__class__ = _CallablePackage
