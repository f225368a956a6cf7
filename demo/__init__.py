"""Demo world: a small real text-to-image model, its data, its CLIP and its concepts."""
