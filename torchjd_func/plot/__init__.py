"""Pictures of gradients and of training, on matplotlib; in a checkout `pip install -e '.[plot]'`.

Each function draws on `ax`, or on a new pyplot figure of its own style: white, whatever the style
or the theme around it. What is drawn on `ax` follows the style of its owner.
"""

from torchjd_func.plot._cone import cone
from torchjd_func.plot._conflict_matrix import conflict_matrix
from torchjd_func.plot._front import front
from torchjd_func.plot._training import training
from torchjd_func.plot._trajectories import trajectories

__all__ = ["cone", "conflict_matrix", "front", "training", "trajectories"]
