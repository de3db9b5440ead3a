"""Used by every other folder: trees, numbers, counters, checks of arguments. Imports nothing from above."""
