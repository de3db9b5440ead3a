"""What the tools that run on the host share: looking at a user's loss, and printing."""
