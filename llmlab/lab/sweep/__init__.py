"""One notebook over a grid of its parameters."""

from llmlab.lab.sweep.schedule import status as status
from llmlab.lab.sweep.schedule import sweep as sweep
