"""Shared by the tools that run on the host: checks of a user's loss, and printing."""
