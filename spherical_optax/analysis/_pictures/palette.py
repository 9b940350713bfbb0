"""The colours of all pictures of the package."""

from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart. Their yellow is too pale on white,
# and black belongs to the median and the prediction.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#999999")
# One pattern per colour, for prints without colours.
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (10, 2)), (0, (2, 1)))
ORDERED = "viridis"  # for parameters from first to last, if they are more than colours
LOSS = "cividis"
