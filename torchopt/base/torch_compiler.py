"""The names of torch's compiler that this package uses; to import it takes a second.

So only what is loaded when a tracer asks may import from here (``kernels/library/compiled.py``).
"""

from __future__ import annotations

from typing import Any

import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor


#: A decorator: the compiler's frontend leaves calls of the function in the graph, unread.
allow_in_graph: Any = torch._dynamo.allow_in_graph
#: A decorator: calls are run on fake tensors, unread, with any tree as an argument; ``None`` where
#: torch lacks it.
nonstrict_trace: Any = getattr(torch._dynamo, "nonstrict_trace", None)
