"""One step, in one pass: observe the gradient, judge it, act or hold, record the row."""
