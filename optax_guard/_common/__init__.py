"""What every other room uses: trees, numbers, counters, checks of arguments. Imports nothing from above."""
