"""Figures, a file a subject: numbers in, Figure out, drawn in one style; a figure's `title` is its message.

`figures.show(figures.scoring.endings(...), name, alt)` saves one and shows it.
"""

from llmlab.lab.figures import challenge as challenge
from llmlab.lab.figures import decoding as decoding
from llmlab.lab.figures import quantization as quantization
from llmlab.lab.figures import scoring as scoring
from llmlab.lab.figures import sharding as sharding
from llmlab.lab.figures import speed as speed
from llmlab.lab.figures import tradeoffs as tradeoffs
from llmlab.lab.figures.draw import drawable as drawable
from llmlab.lab.figures.draw import save as save
from llmlab.lab.figures.draw import show as show
from llmlab.lab.figures.draw import style as style
