"""Fine-tuning classifiers by recipe."""
