"""Outlook attention: the centre of a window says how its places are mixed."""

from attn.outlook.api import OUTLOOK, check_windows, outlook_attention, outlook_centres, outlook_maps

__all__ = ["OUTLOOK", "check_windows", "outlook_attention", "outlook_centres", "outlook_maps"]
