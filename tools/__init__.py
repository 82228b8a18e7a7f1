"""Tools for people who train and measure: python -m tools.NAME, from the project's folder."""
