"""How seconds and memory grow, with the data, with the model, and with the number of workers."""
