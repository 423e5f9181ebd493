"""The networks that ``inner_loop`` blocks have put back, so that explanations can tell of them."""

from __future__ import annotations

import weakref

from torch import nn


#: Networks whose steps ended with a block: a loss computed now knows nothing of those.
networks: weakref.WeakSet[nn.Module] = weakref.WeakSet()
