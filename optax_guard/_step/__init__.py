"""One step in one pass: observe the gradient, judge it, act or hold, and record a row."""
