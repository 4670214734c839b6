"""Checks of arguments, and text from outside made safe for messages."""
