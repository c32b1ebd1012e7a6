"""How the model in `attnspan.models.bundled` was made: data, model, training, export."""
