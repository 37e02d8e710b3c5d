"""`python -m prefold`, for launchers that start a module: `torchrun ... -m prefold run RECIPE`."""

from prefold.cli import main

main()
