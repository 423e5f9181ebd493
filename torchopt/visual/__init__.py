"""See the graph that a gradient flows through, and read why it does not arrive."""

from torchopt.visual.dot import make_dot as make_dot
from torchopt.visual.dot import resize_graph as resize_graph
from torchopt.visual.explain import explain as explain
from torchopt.visual.show import show as show
