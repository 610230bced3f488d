"""Names that people type: the one that resembles them, lists of them, and objects of a user's own modules.

Nothing here knows of anything else in the house but `errors`, so that everything may use it.
"""

from naming.nearest import beside, close, hint, unknown
from naming.outside import fingerprint, is_outside, load

__all__ = ["beside", "close", "fingerprint", "hint", "is_outside", "load", "unknown"]
