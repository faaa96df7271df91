"""Text: tokenizers, prepared data and streams."""
