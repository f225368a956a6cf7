"""The demo world: a small real text-to-image model, its data, its judge and its concepts."""
