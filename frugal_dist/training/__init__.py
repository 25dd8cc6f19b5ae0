"""The applications around the optimizer: data, models, engines, the training loop and what people look at."""
