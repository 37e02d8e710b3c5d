"""Pages, cards and terminal tables about runs, data and comparisons. Imports neither torch nor transformers."""
