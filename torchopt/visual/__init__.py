"""See the graph that a gradient flows through, and read why it does not arrive."""

import sys as _sys

from torchopt.base import lazy as _lazy
from torchopt.visual.dot import make_dot as make_dot
from torchopt.visual.dot import resize_graph as resize_graph
from torchopt.visual.explain import explain as explain
from torchopt.visual.show import show as show


__dir__ = _lazy.shown(_sys.modules[__name__])
