"""From a recipe to a checkpoint: recipes, sources, the plan, gates, and the writer."""

__version__ = "0.1.0"
