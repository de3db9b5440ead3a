"""What the library costs and what its rules do, measured; each program's docstring has its command."""
