"""Tools for people who train and measure: python -m tools.NAME, from the project's folder."""

import training  # noqa: F401  before torch: how its threads wait
