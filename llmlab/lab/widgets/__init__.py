"""Views with controls, one line each in a notebook; where nobody can move a control they are figures instead."""

from llmlab.lab.widgets.plans import plan_explorer as plan_explorer
from llmlab.lab.widgets.steps import step_viewer as step_viewer
from llmlab.lab.widgets.tradeoffs import tradeoff_explorer as tradeoff_explorer
from llmlab.lab.widgets.tries import trie_viewer as trie_viewer
