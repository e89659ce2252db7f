"""Notebooks run and rendered into pages that can be read, sent and printed, with an index."""

from llmlab.lab.notebooks import find_notebooks as find_notebooks
from llmlab.lab.report.build import report as report
from llmlab.lab.report.pages import Run as Run
