"""What each stage does. A stage reads the recipe and the outputs of the stages before it, and leaves its own, whole."""
